package sqlstore_test

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mattn/go-sqlite3"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// rolledBack fails, and SQLite rolls the transaction back, as it may when its storage fails.
const rolledBack = "INSERT OR ROLLBACK INTO log_head SELECT * FROM log_head"

// What comes after a statement for which SQLite rolled everything back is not committed by
// itself, also if the failure is passed over.
func TestNothingIsDoneInATransactionThatSQLiteRolledBack(t *testing.T) {
	location := filepath.Join(t.TempDir(), "orgkeys.db")
	db := open(t, location)
	statement(t, administrator(t, location), "CREATE TABLE done (n INTEGER)")
	for _, passedOver := range []bool{false, true} {
		err := db.Change(t.Context(), func(execute func(string) error) error {
			if err := execute("INSERT INTO done VALUES (1)"); err != nil {
				t.Error(err)
			}
			if err := execute(rolledBack); err == nil || !strings.Contains(err.Error(), "UNIQUE") {
				t.Errorf("a statement that fails: %v", err)
			}
			if err := execute("INSERT INTO done VALUES (2)"); err == nil || !passedOver {
				return err
			}
			return nil
		})
		if !errors.Is(err, orgkey.ErrUnavailable) {
			t.Errorf("if the failure of the statement after it is passed over (%t): %v", passedOver, err)
		}
		rows := 0
		if must(t, administrator(t, location).QueryRow("SELECT count(*) FROM done").Scan(&rows)); rows != 0 {
			t.Errorf("%d rows are there", rows)
		}
	}
}

// The other changes of a batch that SQLite rolled back are done again. If that happens again
// none is done, and the one whose statement it was hears why.
func TestABatchThatSQLiteRolledBackIsDoneAgain(t *testing.T) {
	for _, given := range []bool{false, true} {
		db := open(t, filepath.Join(t.TempDir(), "orgkeys.db"))
		if given {
			atOnce(t, db, func() (audit.Condition, error) { return audit.Condition{}, nil })
		}
		failures, err := 1, error(nil)
		failing := func() error {
			err = db.Change(t.Context(), func(execute func(string) error) error {
				if failures--; failures < 0 {
					return nil
				}
				return execute(rolledBack)
			})
			return err
		}
		must(t, together(t, db, slices.Insert(records(db, 5), 2, failing)...))
		failures = 2
		if all := together(t, db, slices.Insert(records(db, 5), 2, failing)...); !errors.Is(all, orgkey.ErrUnavailable) || err == nil || !strings.Contains(err.Error(), "UNIQUE") {
			t.Errorf("the changes: %v; that one: %v", all, err)
		}
		must(t, db.Record(t.Context(), event(audit.KeysListed, "acme", "")))
		_, err = db.Sequence(t.Context(), 100, audit.Condition{})
		must(t, err)
		wholeLog(t, db, 6)
	}
}

// Nor are events recorded by themselves when asking for their indices has failed so.
func TestABatchIsDoneAgainIfAskingForIndicesFails(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "orgkeys.db"))
	atOnce(t, db, func() (audit.Condition, error) { return audit.Condition{}, nil })
	db.FirstIndexFails(rolledBack)
	must(t, together(t, db, records(db, 6)...))
	_, err := db.Sequence(t.Context(), 100, audit.Condition{})
	must(t, err)
	wholeLog(t, db, 6)
}

// Promise 8: each commit is synced before it is answered (synchronous 2, FULL), and readers
// cannot write.
func TestPromise8_SQLiteSyncsEachCommit(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "orgkeys.db"))
	for _, want := range []struct{ setting, writing, reading string }{
		{"synchronous", "2", "2"},
		{"journal_mode", "wal", "wal"},
		{"foreign_keys", "1", "1"},
		{"query_only", "0", "1"},
		{"busy_timeout", "5000", "5000"},
		{"temp_store", "2", "2"},
		{"wal_autocheckpoint", "8192", "1000"},
	} {
		for writes, value := range map[bool]string{true: want.writing, false: want.reading} {
			if got, err := db.Pragma(t.Context(), want.setting, writes); err != nil || got != value {
				t.Errorf("%s where something is written (%t): %s, want %s (%v)", want.setting, writes, got, value, err)
			}
		}
	}
}

// A long read, such as an export's, does not make changes wait.
func TestASnapshotKeepsNobodyFromWriting(t *testing.T) {
	location := filepath.Join(t.TempDir(), "orgkeys.db")
	db := open(t, location)
	statement(t, administrator(t, location), "CREATE TABLE done (n INTEGER)")
	must(t, db.Snapshot(t.Context(), func(verify.Snapshot) error {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		written := make(chan error, 1)
		go func() {
			written <- db.Change(ctx, func(execute func(string) error) error { return execute("INSERT INTO done VALUES (1)") })
		}()
		select {
		case err := <-written:
			return err
		case <-ctx.Done():
			t.Error("a change waits for the snapshot")
			return nil
		}
	}))
}

// Errors of SQLite's that say that later writes will fail too are known as such.
func TestSQLitesErrorsSayWhetherTheStorageFailed(t *testing.T) {
	for code, failed := range map[sqlite3.ErrNo]bool{
		sqlite3.ErrFull: true, sqlite3.ErrIoErr: true, sqlite3.ErrReadonly: true, sqlite3.ErrCantOpen: true,
		sqlite3.ErrBusy: false, sqlite3.ErrConstraint: false, sqlite3.ErrInterrupt: false,
	} {
		if got := sqlstore.StorageFailure(sqlite3.Error{Code: code}); got != failed {
			t.Errorf("%v: %t", code, got)
		}
	}
}
