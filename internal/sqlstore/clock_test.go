package sqlstore_test

import (
	"database/sql"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// A replica's clock that is ten minutes ahead dates no event.
func TestTheDatabasesClockDatesEvents(t *testing.T) {
	location := newDatabase(t, postgres)
	db := open(t, location)
	e := event(audit.KeysListed, "acme", "")
	e.Time = time.Now().Add(10 * time.Minute)
	must(t, db.Record(t.Context(), e))
	_, err := db.Sequence(t.Context(), 10, audit.Condition{})
	must(t, err)
	entries, err := db.Entries(t.Context(), 0, 1)
	must(t, err)
	recorded, err := audit.Decode(entries[0].Leaf)
	must(t, err)
	var column int64
	must(t, raw(t, location).QueryRow("SELECT occurred_at FROM events").Scan(&column))
	if off := time.Since(recorded.Time); off.Abs() > time.Minute || column != recorded.Time.UnixMicro() {
		t.Errorf("the event is of %s, %s ago, and its column says %d", recorded.Time, off, column)
	}
}

// A place that a crash left reserved, by a clock that was an hour ahead and has been
// set back, is free again once its life is over by the clock as it is now.
func TestAReservationOutlivesNoClockThatWasSetBack(t *testing.T) {
	location := filepath.Join(t.TempDir(), "orgkeys.db")
	db := open(t, location)
	beside, err := sql.Open("sqlite", "file:"+location+"?_pragma=busy_timeout(5000)")
	must(t, err)
	defer beside.Close()
	lost := reserve(t, db, "acme", 1)
	statement(t, beside, "UPDATE org_keys SET expires_at = expires_at + 3600000000 WHERE id = $1", lost)
	const short = 300 * time.Millisecond
	for began := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		err := db.Reserve(t.Context(), "acme", uuid.NewString(), 1, short)
		if err == nil {
			break
		}
		if !errors.As(err, new(*orgkey.QuotaError)) || time.Since(began) > 10*time.Second {
			t.Fatalf("after %s: %v", time.Since(began), err)
		}
	}
}
