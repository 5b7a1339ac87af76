package sqlstore_test

import (
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/orgkey"
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
