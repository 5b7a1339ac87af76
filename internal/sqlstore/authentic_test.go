package sqlstore_test

import (
	"database/sql"
	"errors"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/orglog"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/internal/systemevent"
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
		statement(t, attacker, "UPDATE events SET leaf = $1 WHERE id = $2", []byte(`{"v":1}`), altered.ID)
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
	db, err := sql.Open("sqlite3", "file:"+location+"?_busy_timeout=5000")
	must(t, err)
	t.Cleanup(func() { db.Close() })
	return db
}

// A forged row that was refused explains nothing: not that a key is deleted, nor that a
// person's data is gone. Nor does one that the sequencer never looks at.
func TestPromise5_AForgedRowExplainsNothing(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, location string) {
		attacker := administrator(t, location)
		forge := func(id string, kind audit.Type, object string, refused int) {
			t.Helper()
			e := event(kind, "acme", object)
			statement(t, attacker, "INSERT INTO events (id, occurred_at, type, org_id, actor_kind, actor, object, leaf, mac, refused) VALUES ($1, $2, $3, 'acme', 'user', 'ada', $4, $5, $6, $7)",
				id, e.Time.UnixMicro(), string(kind), object, []byte("{}"), []byte{}, refused)
			n, err := db.Sequence(t.Context(), 10, audit.Condition{})
			if n != 0 || refused == 0 && !errors.As(err, new(*audit.UnauthenticatedError)) {
				t.Fatalf("the forged row: %d, %v", n, err)
			}
		}
		problem := func(while, want string) {
			t.Helper()
			if _, err := verify.Verify(t.Context(), db, nil, nil); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s verification says: %v, want %s", while, err, want)
			}
		}
		key := released(t, db, "acme", 5)
		seen := event(audit.KeysListed, "acme", "")
		seen.Actor, seen.Personal = audit.Actor{Kind: authz.Person, ID: "ada"}, audit.Personal{Name: "Ada"}
		must(t, db.Record(t.Context(), seen))
		_, err := db.Sequence(t.Context(), 10, audit.Condition{})
		must(t, err)
		if _, err := verify.Verify(t.Context(), db, nil, nil); err != nil {
			t.Fatal(err)
		}

		for refused := range 3 {
			forge("gone"+strconv.Itoa(refused), audit.PersonErased, "ada", refused)
		}
		statement(t, attacker, "DELETE FROM event_persons WHERE event_id = $1", seen.ID)
		problem("with a personal part deleted", "personal part")
		must(t, db.Record(t.Context(), event(audit.PersonErased, "", "ada"))) // a true one explains it while it waits
		if _, err := verify.Verify(t.Context(), db, nil, nil); err != nil {
			t.Errorf("with an event that waits: %v", err)
		}
		_, err = db.Sequence(t.Context(), 10, audit.Condition{})
		must(t, err)

		for refused := range 3 {
			forge("deleted"+strconv.Itoa(refused), audit.KeyDeleted, key, refused)
		}
		statement(t, attacker, "UPDATE org_keys SET state = 'deleted', slot = NULL, sealed = NULL, deleted_at = $1 WHERE id = $2", time.Now().UnixMicro(), key)
		problem("with a key deleted", "no event says so")

		// Nobody is shown such rows.
		events, err := db.OrgEvents(t.Context(), orglog.Filter{Org: "acme", Take: 100})
		must(t, err)
		if len(events) != 2 {
			t.Errorf("the organization's log shows %d events, want 2", len(events))
		}
		for _, id := range []string{"gone1", "deleted2"} {
			if _, there, err := db.OrgEvent(t.Context(), "acme", id, ""); there || err != nil {
				t.Errorf("event %s is shown, %v", id, err)
			}
		}
		counts, err := db.OrgCounts(t.Context(), "acme", time.Now().Add(-time.Hour))
		must(t, err)
		if n := counts.EventsByHour[0] + counts.EventsByHour[1]; n != 2 {
			t.Errorf("counted are %d events, want 2", n)
		}
		feed, total, err := db.SystemEvents(t.Context(), systemevent.Filter{Org: "acme", Kinds: everyKind, From: time.Now().Add(-time.Hour), Reader: "ada", Take: 100, Count: 100})
		must(t, err)
		if total != 1 || len(feed) != 1 {
			t.Errorf("the feed shows %d of %d changes, want 1", len(feed), total)
		}

		// What has its place is shown, whatever the row says.
		statement(t, attacker, "UPDATE events SET refused = 1 WHERE idx IS NOT NULL")
		if events, err = db.OrgEvents(t.Context(), orglog.Filter{Org: "acme", Take: 100}); err != nil || len(events) != 2 {
			t.Errorf("%d events are left, %v", len(events), err)
		}
	})
}
