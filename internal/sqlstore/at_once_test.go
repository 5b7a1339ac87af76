package sqlstore_test

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/node"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// An event that somebody waits for has its index when its transaction is
// committed, and so have those that were waiting; one that nobody waits for is
// the sequencer's.
func TestAnAwaitedEventHasItsIndexAtOnce(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "orgkeys.db"))
	sizes := atOnce(t, db, func() (audit.Condition, error) { return audit.Condition{}, nil })
	earlier := event(audit.KeysListed, "acme", "")
	must(t, db.Record(t.Context(), earlier))
	if _, given, err := db.Index(t.Context(), earlier.ID); given || err != nil {
		t.Errorf("an event that nobody waits for has an index: %v", err)
	}
	pending(t, db, "acme", 5)
	if head, err := db.Head(t.Context()); err != nil || head.Size != 2 {
		t.Errorf("the log has %d events, %v; want 2", head.Size, err)
	}
	if size := <-sizes; size != 2 {
		t.Errorf("told of %d events, want 2", size)
	}
	if got := types(t, db); got != "orgkey.listed orgkey.created" {
		t.Errorf("the log holds %s", got)
	}
}

// Promise 5: no event gets an index at once that the sequencer would not give
// one, and the change itself is made nevertheless: its caller waits, and is told.
func TestPromise5_NoIndexAtOnceThatTheSequencerWouldNotGive(t *testing.T) {
	refusing := errors.New("a sink has not reported what it holds")
	location := filepath.Join(t.TempDir(), "orgkeys.db")
	db := open(t, location)
	var waiting []string
	none := func(what string) {
		t.Helper()
		id := reserve(t, db, "acme", 5)
		e := event(audit.KeyCreated, "acme", id)
		must(t, db.StorePending(t.Context(), id, id, []byte("sealed"), e))
		waiting = append(waiting, e.ID)
		if head, err := db.Head(t.Context()); err != nil || head.Size != 0 {
			t.Errorf("%s: the log has %d events, %v; want none", what, head.Size, err)
		}
	}
	atOnce(t, db, func() (audit.Condition, error) { return audit.Condition{}, refusing })
	none("without the condition")
	head, err := db.Head(t.Context())
	must(t, err)
	head.Size = 7
	atOnce(t, db, func() (audit.Condition, error) {
		return audit.Condition{Held: []audit.SinkHeld{{Sink: "file", Checkpoint: head}}}, nil
	})
	none("a sink that is ahead of the log")
	if _, err := db.Sequence(t.Context(), 10, audit.Condition{Held: []audit.SinkHeld{{Sink: "file", Checkpoint: head}}}); !errors.As(err, new(*audit.RollbackError)) {
		t.Errorf("the sequencer says %v", err)
	}

	atOnce(t, db, func() (audit.Condition, error) { return audit.Condition{}, nil })
	r, err := event(audit.SecretsFetched, "acme", "").Encode()
	must(t, err)
	statement(t, administrator(t, location), "INSERT INTO events (id, occurred_at, type, org_id, actor, object, leaf, mac) VALUES ($1, $2, $3, $4, '', '', $5, $6)",
		r.ID, r.Time.UnixMicro(), string(r.Type), r.Org, r.Leaf, audit.NewEventKey().MAC(r.Leaf))
	none("a forged event among those that wait")
	entries, err := db.Entries(t.Context(), 0, 10)
	if err != nil || len(entries) != 0 {
		t.Errorf("entries %v, %v", entries, err)
	}
	for _, id := range waiting {
		if _, given, err := db.Index(t.Context(), id); given || err != nil {
			t.Errorf("event %s has an index that was taken back: %v", id, err)
		}
	}
	if n, err := db.Sequence(t.Context(), 10, audit.Condition{}); n != 3 || !errors.As(err, new(*audit.UnauthenticatedError)) {
		t.Errorf("the sequencer gives %d events their indices, and says %v", n, err)
	}
}

// Many events that come together have their indices when they are committed, though nobody
// waits for them, and the log is whole.
func TestManyEventsHaveTheirIndicesAtOnce(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "orgkeys.db"))
	atOnce(t, db, func() (audit.Condition, error) { return audit.Condition{}, nil })
	for round := range 3 {
		must(t, together(t, db, records(db, 6)...))
		if n, err := db.Sequence(t.Context(), 10, audit.Condition{}); n != 0 || err != nil {
			t.Errorf("round %d: %d events were left to the sequencer, %v", round, n, err)
		}
	}
	wholeLog(t, db, 18)
}

// Promise 5: likewise, many events get no index that the sequencer would not give them, and are
// recorded nevertheless.
func TestPromise5_NoIndicesForManyEventsThatTheSequencerWouldNotGive(t *testing.T) {
	refusing := errors.New("a sink has not reported what it holds")
	location := filepath.Join(t.TempDir(), "orgkeys.db")
	db := open(t, location)
	want := int64(0)
	none := func(what string) {
		t.Helper()
		must(t, together(t, db, records(db, 6)...))
		if head, err := db.Head(t.Context()); err != nil || head.Size != want {
			t.Errorf("%s: the log has %d events, %v; want %d", what, head.Size, err, want)
		}
	}
	atOnce(t, db, func() (audit.Condition, error) { return audit.Condition{}, refusing })
	none("without the condition")
	atOnce(t, db, func() (audit.Condition, error) { return audit.Condition{}, nil })
	none("while earlier events wait")
	if n, err := db.Sequence(t.Context(), 100, audit.Condition{}); n != 12 || err != nil {
		t.Fatalf("%d events, %v", n, err)
	}
	want = 12
	ahead, err := db.Head(t.Context())
	must(t, err)
	ahead.Size = 20
	atOnce(t, db, func() (audit.Condition, error) {
		return audit.Condition{Held: []audit.SinkHeld{{Sink: "file", Checkpoint: ahead}}}, nil
	})
	none("a sink that is ahead of the log")
	if n, err := db.Sequence(t.Context(), 100, audit.Condition{}); n != 6 || err != nil {
		t.Fatalf("%d events, %v", n, err)
	}
	want = 18
	atOnce(t, db, func() (audit.Condition, error) { return audit.Condition{}, nil })
	statement(t, administrator(t, location), "DELETE FROM log_hashes")
	none("a tree that has lost its hashes")
}

// A change that fails among others is undone, and it alone: each of the others is
// made, once.
func TestAChangeThatFailsIsUndoneAlone(t *testing.T) {
	for _, given := range []bool{false, true} {
		db := open(t, filepath.Join(t.TempDir(), "orgkeys.db"))
		if given {
			atOnce(t, db, func() (audit.Condition, error) { return audit.Condition{}, nil })
		}
		tooMany := func() error {
			return db.PutSecret(t.Context(), "acme", node.SealedSecret{Name: "env_s3", Sealed: []byte("sealed")}, 0, event(audit.SecretPut, "acme", ""))
		}
		for range 3 { // the first batch is undone as a whole, the next ones have savepoints
			changes := slices.Insert(records(db, 5), 2, tooMany)
			if err := together(t, db, changes...); !errors.Is(err, node.ErrTooManySecrets) || errors.Is(err, orgkey.ErrUnavailable) {
				t.Errorf("the changes: %v", err)
			}
		}
		if names, err := db.SecretNames(t.Context(), "acme"); err != nil || len(names) != 0 {
			t.Errorf("the change that failed left %v, %v", names, err)
		}
		_, err := db.Sequence(t.Context(), 100, audit.Condition{})
		must(t, err)
		wholeLog(t, db, 15)
	}
}

// records are n changes that each record an event.
func records(db *sqlstore.DB, n int) []func() error {
	return slices.Repeat([]func() error{func() error {
		return db.Record(context.Background(), event(audit.KeysListed, "acme", ""))
	}}, n)
}

// together makes changes in one batch, in their order, and returns their errors.
func together(t *testing.T, db *sqlstore.DB, changes ...func() error) error {
	t.Helper()
	leave := db.Stall(t.Context())
	results := make(chan error, len(changes))
	for i, change := range changes {
		go func() { results <- change() }()
		until(t, "the change waits", func() bool { return db.Waiting() == i+1 })
	}
	errs := []error{leave()}
	for range changes {
		errs = append(errs, <-results)
	}
	return errors.Join(errs...)
}

// wholeLog checks that the log has n events, all different, and that its root is theirs.
func wholeLog(t *testing.T, db *sqlstore.DB, n int) {
	t.Helper()
	head, err := db.Head(t.Context())
	must(t, err)
	entries, err := db.Entries(t.Context(), 0, n+1)
	must(t, err)
	var stored []tlog.Hash
	reader := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		found := make([]tlog.Hash, len(indexes))
		for i, x := range indexes {
			found[i] = stored[x]
		}
		return found, nil
	})
	ids := map[string]bool{}
	for i, e := range entries {
		added, err := tlog.StoredHashes(int64(i), e.Leaf, reader)
		must(t, err)
		stored = append(stored, added...)
		decoded, err := audit.Decode(e.Leaf)
		must(t, err)
		ids[decoded.ID] = true
	}
	root, err := tlog.TreeHash(int64(len(entries)), reader)
	must(t, err)
	if head.Size != int64(n) || len(ids) != n || head.Root != root {
		t.Errorf("the log has %d events, %d of them different, want %d; its root is right: %t", head.Size, len(ids), n, head.Root == root)
	}
}

// atOnce has db give awaited events their indices, and returns what sizes it tells.
func atOnce(t *testing.T, db *sqlstore.DB, only func() (audit.Condition, error)) <-chan int64 {
	t.Helper()
	sizes := make(chan int64, 100)
	t.Cleanup(db.AtOnce(1000, func(context.Context) (audit.Condition, error) { return only() }, func(size int64) { sizes <- size }))
	return sizes
}
