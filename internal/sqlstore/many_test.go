package sqlstore_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/orglog"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/internal/systemevent"
)

// distant returns location as it is reached through a network on which what is sent
// to PostgreSQL takes its time.
func distant(t *testing.T, location string, delay time.Duration) string {
	t.Helper()
	u, err := url.Parse(location)
	if err != nil {
		t.Fatal(err)
	}
	server := u.Host
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			go relay(client, server, delay)
		}
	}()
	u.Host = listener.Addr().String()
	return u.String()
}

func relay(client net.Conn, server string, delay time.Duration) {
	defer client.Close()
	to, err := net.Dial("tcp", server)
	if err != nil {
		return
	}
	defer to.Close()
	go func() {
		_, _ = io.Copy(client, to)
		client.Close()
	}()
	buffer := make([]byte, 1<<20)
	for {
		n, err := client.Read(buffer)
		time.Sleep(delay)
		if _, written := to.Write(buffer[:n]); err != nil || written != nil {
			return
		}
	}
}

// openPlaces makes enrollments e1, e2, … of acme with places places each, of which nobody has
// claimed one, by SQL: making them is not what is tested.
func openPlaces(t *testing.T, location string, enrollments, places int, expires int64) {
	t.Helper()
	db := raw(t, location)
	statement(t, db, `INSERT INTO enrollments (id, org_id, scope, uses, recipient, approval, address, note, secret, created_at, expires_at)
		SELECT 'e' || e, 'acme', 'node', $2, '', 0, '', '', '\x00', 1, $3 FROM generate_series(1, $1::bigint) e`, enrollments, places, expires)
	statement(t, db, `INSERT INTO keys_of_nodes (id, org_id, slot, state, expires_at)
		SELECT 'e' || e || 'k' || p, 'acme', e * $2::bigint + p, 'reserved', $3 FROM generate_series(1, $1::bigint) e, generate_series(1, $2::bigint) p`, enrollments, places, expires)
	statement(t, db, `INSERT INTO deliveries (key_id, org_id, enrollment_id, scope, stage)
		SELECT 'e' || e || 'k' || p, 'acme', 'e' || e, 'node', 'open' FROM generate_series(1, $1::bigint) e, generate_series(1, $2::bigint) p`, enrollments, places)
}

func TestARollbackWithManyOpenPlacesIsAccepted(t *testing.T) {
	location := newDatabase(t, postgres)
	open(t, location)
	openPlaces(t, location, 20, 1000, time.Now().Add(time.Hour).UnixMicro())
	db := open(t, distant(t, location, time.Millisecond))
	if n := acceptRollback(t, db); n != 20 {
		t.Errorf("%d enrollments are void, want 20", n)
	}
	var left int
	if err := raw(t, location).QueryRow("SELECT (SELECT count(*) FROM deliveries) + (SELECT count(*) FROM keys_of_nodes)").Scan(&left); err != nil || left != 0 {
		t.Errorf("%d rows of places are left, %v", left, err)
	}
	if n := recorded(t, db, audit.EnrollmentRevoked); n != 20 {
		t.Errorf("%d events, want 20", n)
	}
}

// Accepting a rollback, and its dry run, may take as long as large tables need: here a lock
// takes longer than a request's statement may.
func TestARollbackHasTheTimeThatItNeeds(t *testing.T) {
	location := newDatabase(t, postgres)
	db := open(t, location)
	openPlaces(t, location, 2, 3, time.Now().Add(time.Hour).UnixMicro())
	blocked, err := raw(t, location).Begin()
	must(t, err)
	_, err = blocked.Exec("LOCK TABLE enrollments IN ACCESS EXCLUSIVE MODE")
	must(t, err)
	time.AfterFunc(sqlstore.AnswerTimeout+time.Second, func() { _ = blocked.Rollback() })
	counted := make(chan error, 1)
	go func() {
		n, err := db.OpenEnrollments(t.Context())
		if err == nil && n != 2 && n != 0 { // none if they were made void first
			err = fmt.Errorf("%d enrollments are open, want 2", n)
		}
		counted <- err
	}()
	if n := acceptRollback(t, db); n != 2 {
		t.Errorf("%d enrollments are void, want 2", n)
	}
	must(t, <-counted)
}

func TestManyExpiredPlacesHoldUpNoSweep(t *testing.T) {
	location := newDatabase(t, postgres)
	open(t, location)
	openPlaces(t, location, 40, 1000, 1)
	statement(t, raw(t, location), `UPDATE deliveries SET stage = 'claimed', recipient = 'r', recipient_key = '', until = 1 WHERE key_id = 'e1k1'`)
	db := open(t, distant(t, location, time.Millisecond))
	withdrawn := func(org org.ID, key string) audit.Event { return event(audit.KeyWithdrawn, org, key) }
	if n, err := db.SweepDeliveries(t.Context(), 200, withdrawn, withdrawn, func(org org.ID, id string, _ int) audit.Event { return event(audit.EnrollmentExpired, org, id) }); err != nil || n != 1 {
		t.Errorf("%d late deliveries were ended, want 1: %v", n, err)
	}
	if d, err := db.Delivery(t.Context(), "e1k1"); err != nil || d.Stage != enroll.Ended {
		t.Errorf("the late delivery is %q, %v", d.Stage, err)
	}
	expired, err := db.ExpiredEnrollments(t.Context(), 200)
	if err != nil || len(expired) != 40 {
		t.Fatalf("%d enrollments have expired, want 40: %v", len(expired), err)
	}
	places := 0
	for _, id := range expired {
		n, err := db.EndExpired(t.Context(), id, func(org org.ID, _ int) audit.Event { return event(audit.EnrollmentExpired, org, id) })
		if err != nil {
			t.Fatal(err)
		}
		places += n
	}
	if places != 39999 {
		t.Errorf("%d places came back, want 39999", places)
	}
	if expired, err = db.ExpiredEnrollments(t.Context(), 200); err != nil || len(expired) != 0 {
		t.Errorf("%d enrollments are left, %v", len(expired), err)
	}
}

func TestAThousandKeysAreMadeAndEndedInTime(t *testing.T) {
	location := newDatabase(t, postgres)
	open(t, location)
	db := open(t, distant(t, location, 2*time.Millisecond))
	within := func(do func(context.Context) error) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		if err := do(ctx); err != nil {
			t.Error(err)
		}
	}
	keys := make([]string, 1000)
	for i := range keys {
		keys[i] = fmt.Sprintf("key-%d", i)
	}
	e := enroll.Enrollment{ID: "many", Org: "acme", Scope: enroll.ForNode, Uses: len(keys), Address: netip.MustParseAddr("192.0.2.1")}
	within(func(ctx context.Context) error {
		_, err := db.CreateEnrollment(ctx, enroll.Permission{Enrollment: e, K: []byte("sealed")}, time.Hour, keys, 1000, event(audit.EnrollmentCreated, "acme", e.ID))
		return err
	})
	var places int
	if err := raw(t, location).QueryRow("SELECT count(*) FROM keys_of_nodes k JOIN deliveries d ON d.key_id = k.id WHERE k.address = '192.0.2.1' AND k.slot <= 1000").Scan(&places); err != nil || places != 1000 {
		t.Fatalf("%d places, want 1000: %v", places, err)
	}
	// All of them are fetched, and half of them received.
	statement(t, raw(t, location), "UPDATE keys_of_nodes SET state = 'released', sealed = '\\x01', created_at = 1, released_at = 1, expires_at = NULL")
	statement(t, raw(t, location), "UPDATE deliveries SET stage = 'available', recipient = key_id, recipient_key = '', wrapped = ''")
	within(func(ctx context.Context) error {
		return db.Revoke(ctx, "acme", "many", event(audit.EnrollmentRevoked, "acme", "many"), func(key string) audit.Event { return event(audit.KeyWithdrawn, "acme", key) })
	})
	events := func(kind audit.Type) (n int) {
		t.Helper()
		if err := raw(t, location).QueryRow("SELECT count(*) FROM events e JOIN event_persons p ON p.event_id = e.id WHERE type = $1", string(kind)).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	if n := events(audit.KeyWithdrawn); n != 1000 {
		t.Errorf("%d keys were withdrawn, want 1000", n)
	}
	statement(t, raw(t, location), "DELETE FROM deliveries")
	statement(t, raw(t, location), "DELETE FROM keys_of_nodes")
	statement(t, raw(t, location), "INSERT INTO keys_of_nodes (id, org_id, slot, state, sealed, created_at, released_at) SELECT 'live' || i, 'acme', i, 'released', '\\x01', 1, 1 FROM generate_series(1, 1000) i")
	var ended orgkey.Ended
	within(func(ctx context.Context) (err error) {
		ended, err = db.DeleteKeys(ctx, "acme", true, event(audit.KeysDeleted, "acme", ""),
			func(key string, _ bool) audit.Event { return event(audit.KeyDeleted, "acme", key) },
			enrollmentRevoked)
		return err
	})
	if n := events(audit.KeyDeleted); n != 1000 || ended.NodeKeys != 1000 {
		t.Errorf("%d keys were deleted with %d events, want 1000", ended.NodeKeys, n)
	}
}

// The order of events is the order in which they were recorded together.
func TestEventsThatAreRecordedTogetherKeepTheirOrder(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		events := make([]audit.Event, 300)
		for i := range events {
			events[i] = event(audit.EventsRead, "acme", fmt.Sprint(i))
			if i%2 == 1 {
				events[i].Personal = audit.Personal{}
			}
		}
		if err := db.Record(t.Context(), events...); err != nil {
			t.Fatal(err)
		}
		if _, err := db.Sequence(t.Context(), 1000, audit.Condition{}); err != nil {
			t.Fatal(err)
		}
		entries, err := db.Entries(t.Context(), 0, 1000)
		if err != nil || len(entries) != len(events) {
			t.Fatalf("%d events, want %d: %v", len(entries), len(events), err)
		}
		for i, entry := range entries {
			e, err := audit.Decode(entry.Leaf)
			if err != nil || e.ID != events[i].ID {
				t.Fatalf("event %d is %+v, %v", i, e, err)
			}
		}
		if n, err := db.Erasable(t.Context(), ""); err != nil || n != 150 {
			t.Errorf("%d events have a personal part, want 150: %v", n, err)
		}
	})
}

// Whoever can write to the database must not be able to halt the log by it, and a sink
// that signs each event must not either.
func TestManyForeignEventsAndReceiptsHoldUpNoLog(t *testing.T) {
	location := newDatabase(t, postgres)
	open(t, location)
	db := open(t, distant(t, location, 2*time.Millisecond))
	statement(t, raw(t, location), `INSERT INTO events (id, occurred_at, type, org_id, actor, object, leaf, mac)
		SELECT 'foreign' || i, 1, 'orgkey.created', 'acme', 'a', '', '{}', 'wrong' FROM generate_series(1, 5000) i`)
	_, err := db.Sequence(t.Context(), 5000, audit.Condition{})
	if refused, ok := errors.AsType[*audit.UnauthenticatedError](err); !ok || refused.Count != 5000 {
		t.Fatalf("%v, want that 5000 events are refused", err)
	}
	if n, err := db.Sequence(t.Context(), 5000, audit.Condition{}); err != nil || n != 0 {
		t.Errorf("afterwards: %d, %v", n, err)
	}
	receipts := make([][]byte, 5000)
	for i := range receipts {
		receipts[i] = []byte{byte(i)}
	}
	if err := db.Acknowledge(t.Context(), "sink", 5000, receipts); err != nil {
		t.Fatal(err)
	}
	var n int
	if err := raw(t, location).QueryRow("SELECT count(*) FROM event_receipts WHERE get_byte(receipt, 0) = idx % 256").Scan(&n); err != nil || n != 5000 {
		t.Errorf("%d receipts are stored, want 5000: %v", n, err)
	}
}

// SQLite keeps what it has prepared, so no list may make a statement of its own.
func TestAListMakesNoStatementOfItsOwn(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "orgkeys.db"))
	for n := range 300 {
		numbers := make([]int64, n+1)
		for i := range numbers {
			numbers[i] = int64(i + 1)
		}
		for _, read := range []bool{true, false} {
			m := systemevent.Marks{Org: "acme", Reader: "u-1", Numbers: numbers, Read: read}
			if err := db.MarkSystemEvents(t.Context(), m, []systemevent.Kind{{Type: audit.KeyCreated}}, func(int64) audit.Event { return event(audit.EventsRead, "acme", "") }); err != nil {
				t.Fatal(err)
			}
		}
	}
	if n := db.Prepared(); n > 20 {
		t.Errorf("%d statements are prepared", n)
	}
	var few int
	for n := range 64 {
		if _, err := db.OrgEvents(t.Context(), orglog.Filter{Org: "acme", Types: make([]string, n+1), Take: 10}); err != nil {
			t.Fatal(err)
		}
		if n == 1 {
			few = db.ReadersPrepared()
		}
	}
	if n := db.ReadersPrepared(); n != few {
		t.Errorf("%d statements are prepared for 64 lists of types, and %d for two", n, few)
	}
}

func TestOnlySomeKeysAreTriedForAnAddress(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, location string) {
		here := netip.MustParseAddr("192.0.2.1")
		id, err := mint(t, db, enroll.Enrollment{Uses: 100, Address: here}, time.Hour, 100)
		if err != nil {
			t.Fatal(err)
		}
		beside := raw(t, location)
		statement(t, beside, "UPDATE keys_of_nodes SET state = 'released', sealed = '\\x01', created_at = slot, released_at = 1, expires_at = NULL")
		var oldest, newest string
		if err := beside.QueryRow("SELECT (SELECT id FROM keys_of_nodes WHERE slot = 1), (SELECT id FROM keys_of_nodes WHERE slot = 100)").Scan(&oldest, &newest); err != nil {
			t.Fatal(err, id)
		}
		found, err := db.LiveKeys(t.Context(), "acme", here, oldest, 10)
		if err != nil {
			t.Fatal(err)
		}
		tried := map[string]bool{}
		for _, c := range found {
			tried[c.Key] = true
		}
		if len(found) != 11 || !tried[oldest] || !tried[newest] {
			t.Errorf("%d keys are tried, want the 10 newest and the one that was named", len(found))
		}
	})
}

func TestAListOfEnrollmentsIsBounded(t *testing.T) {
	location := newDatabase(t, postgres)
	db := open(t, location)
	openPlaces(t, location, 20, 1000, time.Now().Add(time.Hour).UnixMicro())
	beside := raw(t, location)
	statement(t, beside, "UPDATE deliveries SET stage = 'ended', recipient = key_id, recipient_key = '', claimed_at = 1")
	statement(t, beside, "UPDATE deliveries SET stage = 'available', wrapped = '', claimed_at = 2 WHERE key_id = 'e3k7'")
	all, err := db.Enrollments(t.Context(), "acme", 1000)
	if err != nil || len(all) != 20 {
		t.Fatalf("%d enrollments, %v", len(all), err)
	}
	claims := 0
	for _, e := range all {
		claims += len(e.Claims)
		waits := 0
		if e.ID == "e3" {
			waits = 1
		}
		if e.Claimed != 1000 || e.Unreceived != waits || e.Waiting != 0 {
			t.Errorf("%s: %d claimed, %d unreceived, %d waiting", e.ID, e.Claimed, e.Unreceived, e.Waiting)
		}
	}
	if claims != 1000 {
		t.Errorf("%d claims are listed, want 1000", claims)
	}
	e, err := db.Enrollment(t.Context(), "acme", "e3")
	if err != nil || len(e.Claims) != 1000 || e.Claims[999].KeyID != "e3k7" {
		t.Errorf("one enrollment has %d claims, %v", len(e.Claims), err)
	}
}
