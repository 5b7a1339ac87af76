package sqlstore_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/panics"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

const writeLimit = 20 * time.Millisecond

// limited opens a SQLite database that gives a batch of writes no more than
// writeLimit.
func limited(t *testing.T) *sqlstore.DB {
	t.Helper()
	db := open(t, filepath.Join(t.TempDir(), "orgkeys.db"))
	db.LimitWrites(writeLimit)
	return db
}

// deleteAll deletes org's keys, and calls stall before each key's event.
func deleteAll(t *testing.T, db *sqlstore.DB, org org.ID, stall func()) (int, error) {
	n, err := db.DeleteKeys(t.Context(), org, false, event(audit.KeysDeleted, org, ""), func(id string, _ bool) audit.Event {
		stall()
		return event(audit.KeyDeleted, org, id)
	}, enrollmentRevoked)
	return n.Keys, err
}

// A change is made wholly or not at all, however long the disk or the process
// was held up in the middle of it.
func TestAStallWithinAChangeLeavesItWhole(t *testing.T) {
	db := limited(t)
	released(t, db, "acme", 5)
	released(t, db, "acme", 5)
	n, err := deleteAll(t, db, "acme", func() { time.Sleep(5 * writeLimit) })
	if err != nil || n != 2 {
		t.Errorf("deleted %d keys, %v; want 2", n, err)
	}
	if keys, err := db.Keys(t.Context(), "acme"); err != nil || len(keys) != 0 {
		t.Errorf("%d keys are left, %v", len(keys), err)
	}
	if got, want := types(t, db), "orgkey.created orgkey.created orgkey.all_deleted orgkey.deleted orgkey.deleted"; got != want {
		t.Errorf("events: %s, want %s", got, want)
	}
}

// What shares a batch with a change that took too long, and comes after it, is
// not made, and its caller hears so.
func TestAChangeBehindAStalledOneIsNotMade(t *testing.T) {
	db := limited(t)
	released(t, db, "first", 5)
	released(t, db, "acme", 5)
	results := map[string]chan error{"first": make(chan error, 1), "acme": make(chan error, 1), "other": make(chan error, 1)}
	entered, leave := make(chan struct{}), make(chan struct{})
	go func() {
		_, err := deleteAll(t, db, "first", func() { close(entered); <-leave })
		results["first"] <- err
	}()
	<-entered // the others wait for it, and so share the next batch
	go func() {
		_, err := deleteAll(t, db, "acme", func() { time.Sleep(5 * writeLimit) })
		results["acme"] <- err
	}()
	until(t, "the stalled change waits", func() bool { return db.Waiting() == 1 })
	go func() { results["other"] <- db.Reserve(t.Context(), "other", uuid.NewString(), 1, life) }()
	until(t, "the change behind it waits", func() bool { return db.Waiting() == 2 })
	close(leave)

	if err := errors.Join(<-results["first"], <-results["acme"]); err != nil {
		t.Errorf("the changes that were under way: %v", err)
	}
	if err := <-results["other"]; !errors.Is(err, orgkey.ErrUnavailable) {
		t.Errorf("the change behind them: %v, want ErrUnavailable", err)
	}
	reserve(t, db, "other", 1)
}

// A SQLite file that another process has locked cannot be written to, whatever
// can be read from it.
func TestALockedFileIsNotHealthy(t *testing.T) {
	path := filepath.Join(t.TempDir(), "orgkeys.db")
	db := open(t, path)
	other, err := sql.Open("sqlite3", "file:"+path+"?_txlock=immediate")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	lock, err := other.Begin()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := db.Healthy(ctx); !errors.Is(err, orgkey.ErrUnavailable) {
		t.Errorf("while another process has the lock: %v", err)
	}
	if err := lock.Rollback(); err != nil {
		t.Fatal(err)
	}
	if err := db.Healthy(t.Context()); err != nil {
		t.Errorf("when it is free again: %v", err)
	}
}

// Nor can one on a disk that is full, for which a limit on the size of files
// stands here.
func TestAFullDiskIsNotHealthy(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "orgkeys.db"))
	signal.Ignore(syscall.SIGXFSZ)
	defer signal.Reset(syscall.SIGXFSZ)
	var before syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &before); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: 1, Max: before.Max}); err != nil {
		t.Fatal(err)
	}
	err := db.Healthy(t.Context())
	if restore := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &before); restore != nil {
		t.Fatal(restore)
	}
	if !errors.Is(err, orgkey.ErrUnavailable) {
		t.Errorf("with a full disk: %v", err)
	}
	if err := db.Healthy(t.Context()); err != nil {
		t.Errorf("when there is room again: %v", err)
	}
}

// What was committed gets from the write-ahead log into the database's file although no
// commit moves it: see mostPages.
func TestCheckpointsAreMadeBesideTheCommits(t *testing.T) {
	location := filepath.Join(t.TempDir(), "orgkeys.db")
	db := open(t, location)
	size := func() int64 {
		t.Helper()
		info, err := os.Stat(location)
		must(t, err)
		return info.Size()
	}
	before := size()
	for range 100 {
		must(t, db.Record(t.Context(), event(audit.KeysListed, "acme", "")))
	}
	for end := time.Now().Add(10 * time.Second); size() == before; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("100 commits, and the database's file is what it was")
		}
	}
}

// Changes that come one after the other while several shared the last commit are
// gathered, and none is lost or made twice by that; a change that comes alone is
// made even so.
func TestGatheredChangesAreEachMadeOnce(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "orgkeys.db"))
	const callers, each = 8, 25
	var all sync.WaitGroup
	for range callers {
		all.Go(func() {
			for range each {
				if err := db.Record(t.Context(), event(audit.KeysListed, "acme", "")); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	must(t, db.Record(t.Context(), event(audit.KeysListed, "acme", "")))
	if n, err := db.Sequence(t.Context(), 1000, audit.Condition{}); n != callers*each+1 || err != nil {
		t.Errorf("%d events, %v; want %d", n, err, callers*each+1)
	}
	if n := db.LastBatch(); n != 1 {
		t.Errorf("the sequencer's change shared its commit with %d others", n-1)
	}
}

// A bug in one change is its caller's, alone or in a batch with others: they are made, it is
// undone, and the process goes on. What is logged of it is where it was.
func TestAChangeThatPanicsIsItsCallers(t *testing.T) {
	location := filepath.Join(t.TempDir(), "orgkeys.db")
	db := open(t, location)
	statement(t, administrator(t, location), "CREATE TABLE done (n INTEGER)")
	var log strings.Builder
	change := func(n int) (panicked bool) {
		defer func() {
			if v := recover(); v != nil {
				panicked = true
				panics.Log(slog.New(slog.NewTextHandler(&log, nil)), v)
			}
		}()
		if err := db.Change(t.Context(), func(execute func(string) error) error {
			err := execute(fmt.Sprintf("INSERT INTO done VALUES (%d)", n))
			return errors.Join(err, bug(n))
		}); err != nil {
			t.Error(err)
		}
		return false
	}
	leave := db.Stall(t.Context())
	var all sync.WaitGroup
	for n := range 3 {
		all.Go(func() {
			if panicked := change(n); panicked != (n == 1) {
				t.Errorf("change %d panicked: %t", n, panicked)
			}
		})
	}
	until(t, "the changes wait", func() bool { return db.Waiting() == 3 })
	must(t, leave())
	all.Wait()
	if !change(1) { // alone
		t.Error("no panic")
	}
	rows := 0
	if must(t, administrator(t, location).QueryRow("SELECT count(*) FROM done WHERE n <> 1").Scan(&rows)); rows != 2 {
		t.Errorf("%d of the others' changes were made", rows)
	}
	if must(t, administrator(t, location).QueryRow("SELECT count(*) FROM done").Scan(&rows)); rows != 2 {
		t.Errorf("%d changes were made", rows)
	}
	if said := log.String(); strings.Count(said, "sqlstore_test.bug") != 2 || !strings.Contains(said, "index out of range") {
		t.Errorf("logged: %s", said)
	}
}

// bug panics for 1.
func bug(n int) error {
	if n != 1 {
		return nil
	}
	return make([]error, n)[n]
}
