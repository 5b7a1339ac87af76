package sqlstore_test

import (
	"database/sql"
	"errors"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// Promise 5: whoever can write to the database and nothing else forges no
// event. What is refused stays, is reported once, and is in nobody's way.
func TestPromise5_AForgedRowGetsNoPlaceInTheLog(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, location string) {
		attacker := administrator(t, location)
		forge := func(mac func(leaf []byte) []byte) {
			t.Helper()
			r, err := event(audit.SecretsFetched, "acme", "").Encode()
			must(t, err)
			statement(t, attacker, "INSERT INTO events (id, occurred_at, type, org_id, actor, object, leaf, mac) VALUES ($1, $2, $3, $4, '', '', $5, $6)",
				r.ID, r.Time.UnixMicro(), string(r.Type), r.Org, r.Leaf, mac(r.Leaf))
		}
		genuine := event(audit.KeysListed, "acme", "")
		must(t, db.Record(t.Context(), genuine))
		var captured []byte
		must(t, attacker.QueryRow("SELECT mac FROM events WHERE id = $1", genuine.ID).Scan(&captured))
		forge(func([]byte) []byte { return []byte{} })
		forge(func([]byte) []byte { return captured })
		forge(audit.NewEventKey().MAC)
		altered := event(audit.KeysListed, "acme", "")
		must(t, db.Record(t.Context(), altered))
		statement(t, attacker, "UPDATE events SET leaf = $2 WHERE id = $1", altered.ID, []byte(`{"v":1}`))
		must(t, db.Record(t.Context(), event(audit.NodesListed, "acme", "")))

		// One at a time, so that a batch of forged rows has genuine ones behind it.
		given, refused := 0, 0
		for range 6 {
			n, err := db.Sequence(t.Context(), 1, audit.Condition{})
			var forged *audit.UnauthenticatedError
			if errors.As(err, &forged) {
				refused += forged.Count
			} else {
				must(t, err)
			}
			given += n
		}
		if given != 2 || refused != 4 {
			t.Errorf("%d events have their place and %d were refused, want 2 and 4", given, refused)
		}
		if got := types(t, db); got != "orgkey.listed node.listed" {
			t.Errorf("the log holds %s", got)
		}
		report, err := verify.Verify(t.Context(), db, nil, nil)
		if err != nil || report.Unauthenticated != 4 || report.Unsequenced != 0 {
			t.Errorf("verification reports %+v, %v", report, err)
		}

		// An event cannot be made to get a place again either.
		statement(t, attacker, "UPDATE events SET idx = NULL WHERE id = $1", genuine.ID)
		if n, err := db.Sequence(t.Context(), 10, audit.Condition{}); n != 0 || !errors.As(err, new(*audit.UnauthenticatedError)) {
			t.Errorf("an event that had its place: %d, %v", n, err)
		}
	})
}

// Without its key nothing is recorded or sequenced: there is no way round it.
func TestWithoutTheEventKeyNothingIsRecorded(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, location string) {
		must(t, db.Record(t.Context(), event(audit.KeysListed, "acme", "")))
		keyless, err := sqlstore.Open(t.Context(), location)
		must(t, err)
		defer keyless.Close()
		if err := keyless.Record(t.Context(), event(audit.KeysListed, "acme", "")); err == nil {
			t.Error("an event was recorded")
		}
		if n, err := keyless.Sequence(t.Context(), 10, audit.Condition{}); n != 0 || err == nil {
			t.Errorf("%d events were sequenced", n)
		}
	})
}

// The first to make the key is the one whose key counts.
func TestALogHasOneEventKey(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		head, err := db.Head(t.Context())
		must(t, err)
		if sealed, err := db.SealedEventKey(t.Context(), head.Origin); sealed != nil || err != nil {
			t.Fatalf("before there is one: %q, %v", sealed, err)
		}
		if has, err := db.HasSealed(t.Context()); has || err != nil {
			t.Errorf("an empty database has sealed records: %v", err)
		}
		must(t, db.KeepEventKey(t.Context(), head.Origin, []byte("first")))
		must(t, db.KeepEventKey(t.Context(), head.Origin, []byte("second")))
		if sealed, err := db.SealedEventKey(t.Context(), head.Origin); string(sealed) != "first" || err != nil {
			t.Errorf("the key is %q, %v", sealed, err)
		}
		if has, err := db.HasSealed(t.Context()); !has || err != nil {
			t.Errorf("another token would be taken for this log's: %v", err)
		}
	})
}

// administrator is a connection of somebody who can write to the database.
func administrator(t *testing.T, location string) *sql.DB {
	t.Helper()
	if strings.HasPrefix(location, "postgres") {
		return raw(t, location)
	}
	db, err := sql.Open("sqlite", "file:"+location+"?_pragma=busy_timeout(5000)")
	must(t, err)
	t.Cleanup(func() { db.Close() })
	return db
}
