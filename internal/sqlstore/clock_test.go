package sqlstore_test

import (
	"database/sql"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
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

// The summary counts an enrollment as open by the database's clock, which here is ten minutes
// behind the replica's.
func TestTheDatabasesClockSaysWhatIsOpen(t *testing.T) {
	location := newDatabase(t, postgres)
	admin := raw(t, location)
	for _, text := range []string{
		"CREATE SCHEMA behind",
		"CREATE FUNCTION behind.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS 'SELECT pg_catalog.clock_timestamp() - interval ''10 minutes'''",
		"ALTER DATABASE " + databaseOf(location) + " SET search_path = behind, pg_catalog",
	} {
		statement(t, admin, text)
	}
	db := open(t, location)
	_, err := mint(t, db, enroll.Enrollment{}, time.Minute, 1)
	must(t, err)
	if counts, err := db.OrgCounts(t.Context(), "acme", time.Now()); err != nil || counts.Enrollments != 1 {
		t.Errorf("%d enrollments are open, %v; want 1", counts.Enrollments, err)
	}
}

// A place that a crash left reserved, by a clock that was an hour ahead and has been
// set back, is free again once its life is over by the clock as it is now.
func TestAReservationOutlivesNoClockThatWasSetBack(t *testing.T) {
	location := filepath.Join(t.TempDir(), "orgkeys.db")
	db := open(t, location)
	beside, err := sql.Open("sqlite3", "file:"+location+"?_busy_timeout=5000")
	must(t, err)
	defer beside.Close()
	lost := reserve(t, db, "acme", 1)
	statement(t, beside, "UPDATE org_keys SET expires_at = expires_at + 3600000000 WHERE id = $1", lost)
	const short = 300 * time.Millisecond
	for began := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		_, err := db.Sweep(t.Context(), 10, short, swept)
		must(t, err)
		err = db.Reserve(t.Context(), "acme", uuid.NewString(), 1, short)
		if err == nil {
			break
		}
		if !errors.As(err, new(*orgkey.QuotaError)) || time.Since(began) > 10*time.Second {
			t.Fatalf("after %s: %v", time.Since(began), err)
		}
	}
}

// Likewise an attempt that a crash left, and what the reaper asks of its key.
func TestAnAttemptOutlivesNoClockThatWasSetBack(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, location string) {
		id, err := mint(t, db, enroll.Enrollment{}, time.Hour, 2)
		must(t, err)
		d, err := claim(t, db, id, recipient(t))
		must(t, err)
		lost := uuid.NewString()
		mine, err := db.Begin(t.Context(), d.KeyID, lost, time.Minute)
		must(t, err)
		if again, err := db.Begin(t.Context(), d.KeyID, uuid.NewString(), time.Minute); err != nil || again || !mine {
			t.Fatalf("the delivery was given to two attempts: %t, %v", again, err)
		}
		if needed, err := db.Needed(t.Context(), []string{lost}); err != nil || !needed[lost] {
			t.Fatalf("the attempt's key is not needed, %v", err)
		}
		statement(t, raw(t, location), "UPDATE deliveries SET attempt_until = attempt_until + 7200000000")
		if needed, err := db.Needed(t.Context(), []string{lost}); err != nil || needed[lost] {
			t.Errorf("the key of an attempt before the clock was set back is needed, %v", err)
		}
		if again, err := db.Begin(t.Context(), d.KeyID, uuid.NewString(), time.Minute); err != nil || !again {
			t.Errorf("no attempt can begin: %v", err)
		}
	})
}
