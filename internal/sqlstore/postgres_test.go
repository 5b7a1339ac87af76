package sqlstore_test

import (
	"context"
	"database/sql"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/internal/sqlstore/pgtest"
)

func newDatabase(t testing.TB, server *pgtest.Server) string {
	t.Helper()
	location, err := server.NewDatabase("t" + strings.ReplaceAll(uuid.NewString(), "-", ""))
	if err != nil {
		t.Fatal(err)
	}
	return location
}

// raw is a connection past the package, as another client of the server has.
func raw(t testing.TB, location string) *sql.DB {
	t.Helper()
	driver, source := "pgx", location
	if strings.HasSuffix(location, ".db") {
		driver, source = "sqlite3", "file:"+location+"?_busy_timeout=5000"
	}
	db, err := sql.Open(driver, source)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func statement(t testing.TB, on interface {
	Exec(string, ...any) (sql.Result, error)
}, text string, args ...any,
) {
	t.Helper()
	if _, err := on.Exec(text, args...); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
}

// A key whose record is not committed yet when its generation has failed is withdrawn
// once it is: to give its place back as one that was never recorded would find nothing.
func TestWithdrawingWaitsForARecordThatIsBeingCommitted(t *testing.T) {
	location := newDatabase(t, postgres)
	db, other := open(t, location), raw(t, location)
	id := reserve(t, db, "acme", 1)
	tx, err := other.Begin()
	if err != nil {
		t.Fatal(err)
	}
	statement(t, tx, "UPDATE org_keys SET state = 'pending', sealed = 'x', created_at = 1 WHERE id = $1", id)
	type result struct {
		ended bool
		err   error
	}
	done := make(chan result, 1)
	go func() {
		ended, err := db.Withdraw(t.Context(), id, event(audit.KeyWithdrawn, "acme", id))
		done <- result{ended, err}
	}()
	select {
	case r := <-done:
		t.Errorf("before the commit: ended %v, %v", r.ended, r.err)
	case <-time.After(500 * time.Millisecond):
		if err := tx.Commit(); err != nil {
			t.Fatal(err)
		}
		if r := <-done; r.err != nil || !r.ended {
			t.Errorf("ended %v, %v", r.ended, r.err)
		}
	}
	reserve(t, db, "acme", 1)
}

// PostgreSQL gives up one of two transactions that wait for each other. The
// caller of the one given up does not notice.
func TestADeadlockIsTriedAgain(t *testing.T) {
	location := newDatabase(t, postgres)
	db, other := open(t, location), raw(t, location)
	ids := []string{released(t, db, "acme", 5), released(t, db, "acme", 5)}
	first, last := min(ids[0], ids[1]), max(ids[0], ids[1])

	tx, err := other.Begin()
	if err != nil {
		t.Fatal(err)
	}
	statement(t, tx, "SET LOCAL deadlock_timeout = '30s'") // the other side finds the deadlock, and is the one given up
	statement(t, tx, "SELECT 1 FROM org_keys WHERE id = $1 FOR UPDATE", last)
	done := make(chan error, 1)
	go func() {
		n, err := db.DeleteKeys(t.Context(), "acme", false, event(audit.KeysDeleted, "acme", ""), func(id string, _ bool) audit.Event { return event(audit.KeyDeleted, "acme", id) }, enrollmentRevoked)
		if err == nil && n.Keys != 2 {
			err = errors.New("not both keys were deleted")
		}
		done <- err
	}()
	waiting := func() (n int) {
		if err := other.QueryRow("SELECT count(*) FROM pg_locks WHERE NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) OR NOT granted AND locktype = 'transactionid'").Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	until(t, "the deletion waits for the second key", func() bool { return waiting() > 0 })
	statement(t, tx, "SELECT 1 FROM org_keys WHERE id = $1 FOR UPDATE", first)
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Errorf("the deletion that PostgreSQL gave up once: %v", err)
	}
}

// A process that stood still in a transaction, as on a machine whose disk hangs for some
// seconds, has lost it. Its caller does not notice.
func TestATransactionThatWasIdleForTooLongIsTriedAgain(t *testing.T) {
	db := open(t, newDatabase(t, postgres))
	id := released(t, db, "acme", 5)
	var calls int
	n, err := db.DeleteKeys(t.Context(), "acme", false, event(audit.KeysDeleted, "acme", ""), func(id string, _ bool) audit.Event {
		if calls++; calls == 1 {
			time.Sleep(4 * time.Second) // PostgreSQL waits for 3
		}
		return event(audit.KeyDeleted, "acme", id)
	}, enrollmentRevoked)
	if err != nil || n.Keys != 1 || calls != 2 {
		t.Errorf("deleting %s: %d keys in %d attempts, %v", id, n.Keys, calls, err)
	}
	if got := types(t, db); got != "orgkey.created orgkey.all_deleted orgkey.deleted" {
		t.Errorf("events: %s", got)
	}
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it did not come about that %s", what)
		}
	}
}

// A process opens as many connections as it is allowed to, and no more, however
// many requests wait for the database.
func TestAProcessOpensNoMoreConnectionsThanItMay(t *testing.T) {
	for _, most := range []int{sqlstore.MinConnections, 9} {
		location := newDatabase(t, postgres)
		db, err := sqlstore.Open(t.Context(), location)
		must(t, err)
		must(t, db.Migrate(t.Context()))
		db.LimitConnections(most)
		beside := raw(t, location)
		held, err := beside.Begin()
		must(t, err)
		statement(t, held, "LOCK TABLE org_keys IN ACCESS EXCLUSIVE MODE")
		var all sync.WaitGroup
		for range 30 {
			all.Go(func() {
				if _, err := db.Keys(t.Context(), "acme"); err != nil {
					t.Error(err)
				}
			})
		}
		sessions := func() (n, waiting int) {
			must(t, held.QueryRow(`SELECT count(*), count(*) FILTER (WHERE wait_event_type = 'Lock')
				FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()`).Scan(&n, &waiting))
			statement(t, held, "SELECT pg_stat_clear_snapshot()") // or it would show the same sessions until its end
			return n, waiting
		}
		until(t, "every connection waits", func() bool { _, waiting := sessions(); return waiting >= most })
		for range 20 {
			if n, _ := sessions(); n > most {
				t.Fatalf("%d connections, want at most %d", n, most)
			}
			time.Sleep(5 * time.Millisecond)
		}
		must(t, held.Rollback())
		all.Wait()
		must(t, db.Close())
	}
}

// Promise 9: a PostgreSQL that is down is an error at once, and one that is
// back is used again without opening it again.
func TestPostgresRestarted(t *testing.T) {
	server, err := pgtest.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	db := open(t, newDatabase(t, server))
	id := released(t, db, "acme", 5)

	if err := server.Stop(); err != nil {
		t.Fatal(err)
	}
	started := time.Now()
	err = db.Reserve(t.Context(), "acme", uuid.NewString(), 5, life)
	if took := time.Since(started); !errors.Is(err, orgkey.ErrUnavailable) || took > 4*time.Second {
		t.Errorf("with PostgreSQL down: %v after %s, want ErrUnavailable promptly", err, took)
	}
	if err := db.Healthy(t.Context()); err == nil {
		t.Error("healthy with PostgreSQL down")
	}
	if err := server.Restart(); err != nil {
		t.Fatal(err)
	}
	until(t, "PostgreSQL is used again", func() bool { return db.Healthy(t.Context()) == nil })
	if records, err := db.Keys(t.Context(), "acme"); err != nil || len(records) != 1 || records[0].ID != id {
		t.Errorf("after the restart: %v, %v", records, err)
	}
	reserve(t, db, "acme", 5)
}

// A server that is a standby, or was made one, is not one to work with.
func TestAReadOnlyPostgresIsNotHealthy(t *testing.T) {
	location := newDatabase(t, postgres)
	db := open(t, location)
	statement(t, raw(t, location), "ALTER ROLE CURRENT_USER IN DATABASE "+location[strings.LastIndex(location, "/")+1:strings.Index(location, "?")]+" SET default_transaction_read_only = on")
	if err := db.Healthy(t.Context()); err != nil {
		t.Fatalf("a connection from before: %v", err)
	}
	again, err := sqlstore.Open(t.Context(), location)
	if err == nil {
		again.Close()
		t.Error("a read-only PostgreSQL was opened")
	}
}

// Promise 8: also a server that was made unsafe while connections to it live
// is not written to, and one that was made safe again is.
func TestAPostgresThatBecomesUnsafeIsRefused(t *testing.T) {
	server, err := pgtest.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	location := newDatabase(t, server)
	db, admin := open(t, location), raw(t, location)
	// Several connections, each of which has to be given up.
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() { reserve(t, db, org.ID(uuid.NewString()), 1) })
	}
	all.Wait()
	for _, setting := range []string{"fsync", "synchronous_commit", "full_page_writes"} {
		statement(t, admin, "ALTER SYSTEM SET "+setting+" = off")
		statement(t, admin, "SELECT pg_reload_conf()")
		until(t, "it is not healthy with "+setting+"=off", func() bool {
			err := db.Healthy(t.Context())
			return err != nil && strings.Contains(err.Error(), setting+"=off")
		})
		for range 8 {
			if err := db.Reserve(t.Context(), org.ID(uuid.NewString()), uuid.NewString(), 1, life); !errors.Is(err, orgkey.ErrUnavailable) {
				t.Errorf("with %s=off a place was given: %v", setting, err)
			}
		}
		statement(t, admin, "ALTER SYSTEM RESET "+setting)
		statement(t, admin, "SELECT pg_reload_conf()")
		until(t, "it is healthy again", func() bool { return db.Healthy(t.Context()) == nil })
		reserve(t, db, org.ID(uuid.NewString()), 1)
	}
}

// A role that may only read is not one to serve with.
func TestARoleThatMayNotWriteIsNotHealthy(t *testing.T) {
	location := newDatabase(t, postgres)
	open(t, location)
	admin := raw(t, location)
	role := "r" + strings.ReplaceAll(uuid.NewString(), "-", "")
	statement(t, admin, "CREATE ROLE "+role+" LOGIN")
	statement(t, admin, "GRANT SELECT ON ALL TABLES IN SCHEMA public TO "+role)
	db, err := sqlstore.Open(t.Context(), strings.Replace(location, "orgkeys@", role+"@", 1))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.Healthy(t.Context()); !errors.Is(err, orgkey.ErrUnavailable) || !strings.Contains(err.Error(), "INSERT on events") {
		t.Errorf("a role that may only read: %v", err)
	}
	statement(t, admin, "GRANT INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO "+role)
	if err := db.Healthy(t.Context()); err != nil {
		t.Errorf("a role that may write: %v", err)
	}
}

// Whatever isolation the database's administrator made the default: each
// statement sees what was committed while it waited for its turn.
func TestTheQuotaHoldsUnderAnotherDefaultIsolation(t *testing.T) {
	for _, isolation := range []string{"repeatable read", "serializable"} {
		t.Run(isolation, func(t *testing.T) {
			location := newDatabase(t, postgres)
			db := open(t, location+"&default_transaction_isolation="+strings.ReplaceAll(isolation, " ", "%20"))
			var given, refused atomic.Int64
			var wg sync.WaitGroup
			for range 40 {
				wg.Go(func() {
					err := db.Reserve(t.Context(), "acme", uuid.NewString(), 5, life)
					switch {
					case err == nil:
						given.Add(1)
					case errors.As(err, new(*orgkey.QuotaError)):
						refused.Add(1)
					default:
						t.Error(err)
					}
				})
			}
			wg.Wait()
			if given.Load() != 5 || refused.Load() != 35 {
				t.Errorf("%d places given, %d refused; want 5 and 35", given.Load(), refused.Load())
			}
		})
	}
}

// The sequencer's place is free as soon as its holder's connection is gone.
func TestTheSequencersPlaceGoesWithItsHolder(t *testing.T) {
	location := newDatabase(t, postgres)
	db, dying := open(t, location), raw(t, location)
	if err := db.Record(t.Context(), event(audit.KeysListed, "acme", "")); err != nil {
		t.Fatal(err)
	}
	tx, err := dying.Begin()
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	if err := tx.QueryRow("SELECT pg_backend_pid() FROM pg_advisory_xact_lock(hashtextextended('sequencer', 0))").Scan(&pid); err != nil {
		t.Fatal(err)
	}
	if n, err := db.Sequence(t.Context(), 10, audit.Condition{}); n != 0 || err != nil {
		t.Fatalf("sequenced %d, %v while another is at it", n, err)
	}
	statement(t, raw(t, location), "SELECT pg_terminate_backend($1)", pid)
	started := time.Now()
	until(t, "the place is taken over", func() bool {
		n, err := db.Sequence(t.Context(), 10, audit.Condition{})
		if err != nil {
			t.Fatal(err)
		}
		return n == 1
	})
	if took := time.Since(started); took > time.Second {
		t.Errorf("taken over after %s", took)
	}
}

// What is done exclusively is done by one at a time, and by another once the
// first one's connection is gone.
func TestExclusiveGoesWithItsHolder(t *testing.T) {
	location := newDatabase(t, postgres)
	db, second := open(t, location), open(t, location)
	entered, leave, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		_, err := db.Exclusive(t.Context(), "sink vault", func(context.Context) error { close(entered); <-leave; return nil })
		done <- err
	}()
	<-entered
	nothing := func(context.Context) error { return nil }
	if mine, err := second.Exclusive(t.Context(), "sink vault", nothing); mine || err != nil {
		t.Fatalf("mine is %t, error %v, while another is at it", mine, err)
	}
	if mine, err := second.Exclusive(t.Context(), "sink file", nothing); !mine || err != nil {
		t.Fatalf("another name: mine is %t, error %v", mine, err)
	}
	statement(t, raw(t, location), "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())")
	until(t, "another may", func() bool {
		mine, err := second.Exclusive(t.Context(), "sink vault", nothing)
		if err != nil {
			t.Fatal(err)
		}
		return mine
	})
	close(leave)
	if err := <-done; err == nil {
		t.Error("the holder whose connection was ended did not hear of it")
	}
}

// A replica that was killed and started again is one. Rows are forgotten by
// the clock that wrote them.
func TestReplicasAreThoseThatLive(t *testing.T) {
	location := newDatabase(t, postgres)
	db, admin := open(t, location), raw(t, location)
	for _, r := range []sqlstore.Replica{
		{ID: "killed", Address: "a 127.0.0.1:3000", Max: 5},
		{ID: "again", Address: "a 127.0.0.1:3000", Max: 6},
		{ID: "other", Address: "b 127.0.0.1:3000", Max: 5},
		{ID: "silent", Address: "c 127.0.0.1:3000", Max: 5},
		{ID: "old", Address: "d 127.0.0.1:3000", Max: 5},
	} {
		if err := db.AnnounceReplica(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	statement(t, admin, "UPDATE replicas SET seen_at = seen_at - 59 * 60 * 1000000::bigint WHERE id = 'silent'")
	statement(t, admin, "UPDATE replicas SET seen_at = seen_at - 61 * 60 * 1000000::bigint WHERE id = 'old'")
	if err := db.AnnounceReplica(t.Context(), sqlstore.Replica{ID: "other", Address: "b 127.0.0.1:3000", Max: 5}); err != nil {
		t.Fatal(err)
	}
	live, err := db.Replicas(t.Context())
	if err != nil || len(live) != 2 || live[0].ID != "again" || live[1].ID != "other" {
		t.Errorf("live: %+v, %v", live, err)
	}
	var rows string
	if err := admin.QueryRow("SELECT string_agg(id, ' ' ORDER BY id) FROM replicas").Scan(&rows); err != nil || rows != "again killed other silent" {
		t.Errorf("rows: %s, %v", rows, err)
	}
}

// The sequencer is called when events are there to be found, not before.
func TestRecordedTellsOfCommittedEventsOnly(t *testing.T) {
	location := newDatabase(t, postgres)
	db, admin := open(t, location), raw(t, location)
	told := func() bool {
		select {
		case <-db.Recorded():
			return true
		default:
			return false
		}
	}
	statement(t, admin, "CREATE FUNCTION refuse() RETURNS trigger AS $$ BEGIN RAISE 'not today'; END $$ LANGUAGE plpgsql")
	statement(t, admin, "CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON events DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()")
	if err := db.Record(t.Context(), event(audit.KeysListed, "acme", "")); !errors.Is(err, orgkey.ErrUnavailable) || told() {
		t.Errorf("a transaction that did not commit: %v; or the sequencer was told of it", err)
	}
	statement(t, admin, "DROP TRIGGER refuse ON events")
	if err := db.Record(t.Context(), event(audit.KeysListed, "acme", "")); err != nil || !told() {
		t.Errorf("a transaction that committed: %v; or the sequencer was not told of it", err)
	}
	if n, err := db.Sequence(t.Context(), 10, audit.Condition{}); n != 1 || err != nil || told() {
		t.Errorf("sequenced %d, %v; or that counts as an event", n, err)
	}
}

// A holder that is stopped keeps its connection and is silent on it. It is
// followed all the same, and hears of it when it goes on.
func TestAFrozenHolderIsFollowed(t *testing.T) {
	location := newDatabase(t, postgres)
	db := open(t, location)
	if err := db.Record(t.Context(), event(audit.KeysListed, "acme", "")); err != nil {
		t.Fatal(err)
	}
	for name, follow := range map[string]func() (bool, error){
		"sequencer": func() (bool, error) { n, err := db.Sequence(t.Context(), 10, audit.Condition{}); return n == 1, err },
		"sink vault": func() (bool, error) {
			return db.Exclusive(t.Context(), "sink vault", func(context.Context) error { return nil })
		},
	} {
		t.Run(name, func(t *testing.T) {
			frozen, err := db.Hold(t.Context(), name)
			if err != nil {
				t.Fatal(err)
			}
			if mine, err := follow(); mine || err != nil {
				t.Fatalf("mine is %t, %v, while another has it", mine, err)
			}
			started := time.Now()
			until(t, "another has it", func() bool {
				mine, err := follow()
				if err != nil {
					t.Fatal(err)
				}
				return mine
			})
			if took := time.Since(started); took > 2*sqlstore.HolderIdle {
				t.Errorf("followed after %s", took)
			}
			if err := frozen.Commit(); err == nil {
				t.Error("the holder that was frozen committed")
			}
		})
	}
}

// A holder that is at work keeps its place for as long as that takes.
func TestABusyHolderIsNotFollowed(t *testing.T) {
	location := newDatabase(t, postgres)
	db, second := open(t, location), open(t, location)
	entered, leave, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		_, err := db.Exclusive(t.Context(), "sink vault", func(ctx context.Context) error { close(entered); <-leave; return ctx.Err() })
		done <- err
	}()
	<-entered
	for working := time.Now(); time.Since(working) < 2*sqlstore.HolderIdle; time.Sleep(50 * time.Millisecond) {
		if mine, err := second.Exclusive(t.Context(), "sink vault", func(context.Context) error { return nil }); mine || err != nil {
			t.Fatalf("after %s: mine is %t, %v", time.Since(working), mine, err)
		}
	}
	close(leave)
	if err := <-done; err != nil {
		t.Errorf("the holder: %v", err)
	}
}

// Several replicas that start at once on an empty database all get through.
func TestMigratingConcurrently(t *testing.T) {
	location := newDatabase(t, postgres)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			db, err := sqlstore.Open(t.Context(), location)
			if err != nil {
				t.Error(err)
				return
			}
			defer db.Close()
			if err := errors.Join(db.Migrate(t.Context()), db.CheckMigrated(t.Context())); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	var heads int
	if err := raw(t, location).QueryRow("SELECT count(*) FROM log_head").Scan(&heads); err != nil || heads != 1 {
		t.Errorf("%d heads of the log, %v", heads, err)
	}
}

// A claim that began before its enrollment expired, and ends after the sweeper
// looked, keeps its place.
func TestASweeperWaitsForAClaim(t *testing.T) {
	location := newDatabase(t, postgres)
	db := open(t, location)
	id, err := mint(t, db, enroll.Enrollment{}, 200*time.Millisecond, 2)
	if err != nil {
		t.Fatal(err)
	}
	claiming, err := db.BeginAndLock(t.Context(), "enrollment:"+id)
	if err != nil {
		t.Fatal(err)
	}
	later := time.Now().Add(time.Hour).UnixMicro()
	statement(t, claiming, "UPDATE deliveries SET stage = 'claimed', recipient = 'r', claimed_at = 1, until = $2 WHERE enrollment_id = $1", id, later)
	statement(t, claiming, "UPDATE keys_of_nodes SET expires_at = $2 WHERE id IN (SELECT key_id FROM deliveries WHERE enrollment_id = $1)", id, later)
	time.Sleep(250 * time.Millisecond)
	places, done := 0, make(chan error, 1)
	go func() {
		var err error
		places, err = db.EndExpired(context.Background(), id, func(org org.ID, _ int) audit.Event { return event(audit.EnrollmentExpired, org, id) })
		done <- err
	}()
	untilWaiting(t, raw(t, location))
	if err := claiming.Commit(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil || places != 0 {
		t.Errorf("%d places came back, %v", places, err)
	}
	if d, err := db.DeliveryTo(t.Context(), id, "r"); err != nil || d.Stage != enroll.Claimed {
		t.Errorf("the delivery is %q, %v", d.Stage, err)
	}
}

// A key whose receipt is being recorded while its enrollment is revoked was received.
func TestARevocationWaitsForAReceipt(t *testing.T) {
	location := newDatabase(t, postgres)
	db := open(t, location)
	id, err := mint(t, db, enroll.Enrollment{}, time.Hour, 2)
	if err != nil {
		t.Fatal(err)
	}
	r := recipient(t)
	d, err := claim(t, db, id, r)
	if err != nil {
		t.Fatal(err)
	}
	offered(t, db, d)
	receiving, err := raw(t, location).Begin()
	if err != nil {
		t.Fatal(err)
	}
	statement(t, receiving, "UPDATE deliveries SET stage = 'received', wrapped = NULL, received_at = 1 WHERE key_id = $1", d.KeyID)
	withdrawn, done := 0, make(chan error, 1)
	go func() {
		done <- db.Revoke(context.Background(), "acme", id, event(audit.EnrollmentRevoked, "acme", id), func(key string) audit.Event {
			withdrawn++
			return event(audit.KeyWithdrawn, "acme", key)
		})
	}()
	untilWaiting(t, raw(t, location))
	if err := receiving.Commit(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil || withdrawn != 0 {
		t.Errorf("%d keys withdrawn, %v", withdrawn, err)
	}
	if d, err := db.DeliveryTo(t.Context(), id, r.ID); err != nil || d.Stage != enroll.Received {
		t.Errorf("the delivery is %q, %v", d.Stage, err)
	}
}

// An enrollment that is being made while it is revoked, as its maker lost the connection, is
// waited for.
func TestARevocationWaitsForAMint(t *testing.T) {
	location := newDatabase(t, postgres)
	db := open(t, location)
	making, err := db.BeginAndLock(t.Context(), "org:acme")
	must(t, err)
	id := uuid.NewString()
	statement(t, making, `INSERT INTO enrollments (id, org_id, scope, uses, recipient, approval, address, note, secret, created_at, expires_at)
		VALUES ($1, 'acme', 'node', 1, '', 0, '', '', 'k', 1, $2)`, id, time.Now().Add(time.Hour).UnixMicro())
	done := make(chan error, 1)
	go func() {
		done <- db.Revoke(context.Background(), "acme", id, event(audit.EnrollmentRevoked, "acme", id), func(string) audit.Event { return audit.Event{} })
	}()
	select {
	case err := <-done:
		t.Errorf("it did not wait: %v", err)
	case <-time.After(300 * time.Millisecond):
		must(t, making.Commit())
		must(t, <-done)
	}
}

// A claim whose place goes meanwhile, and an approval of one that ends, hear what they would hear next.
func TestWhatEndsMeanwhileIsOver(t *testing.T) {
	location := newDatabase(t, postgres)
	db := open(t, location)
	while := func(change string, id string, do func() error) error {
		t.Helper()
		ending, err := raw(t, location).Begin()
		must(t, err)
		statement(t, ending, change, id)
		done := make(chan error, 1)
		go func() { done <- do() }()
		untilWaiting(t, raw(t, location))
		must(t, ending.Commit())
		return <-done
	}
	id, err := mint(t, db, enroll.Enrollment{}, time.Hour, 9)
	must(t, err)
	r := recipient(t)
	if err := while("DELETE FROM deliveries WHERE enrollment_id = $1", id, func() error { return claimError(t, db, id, r) }); !errors.Is(err, enroll.ErrClosed) {
		t.Errorf("a claim: %v", err)
	}
	id, err = mint(t, db, enroll.Enrollment{Approval: true}, time.Hour, 9)
	must(t, err)
	must(t, claimError(t, db, id, r))
	if err := while("UPDATE deliveries SET stage = 'ended', approved_at = 1 WHERE enrollment_id = $1", id, func() error {
		return db.Approve(t.Context(), "acme", id, r.ID, time.Hour, event(audit.EnrollmentApproved, "acme", id))
	}); !errors.Is(err, enroll.ErrNotFound) {
		t.Errorf("an approval: %v", err)
	}
}

func claimError(t *testing.T, db *sqlstore.DB, id string, r enroll.Recipient) error {
	_, err := claim(t, db, id, r)
	return err
}

// Of a commit whose answer is an error, the caller learns what it may have begun.
func TestWhatALostAnswerMayHaveBegun(t *testing.T) {
	location := newDatabase(t, postgres)
	db := open(t, location)
	pooled := inPool(t, db, orgkey.UseSealed, time.Hour)
	id, err := mint(t, db, enroll.Enrollment{}, time.Hour, 9)
	must(t, err)
	r := recipient(t)
	d, err := claim(t, db, id, r)
	must(t, err)
	admin := administrator(t, location)
	statement(t, admin, `CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'a commit that fails'; END $$`)
	statement(t, admin, "CREATE CONSTRAINT TRIGGER late AFTER UPDATE ON deliveries DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()")
	if _, taken, err := db.BeginAhead(t.Context(), d.KeyID, uuid.NewString(), time.Minute); err == nil || taken == nil || taken.ID != pooled {
		t.Errorf("with a pool: %+v, %v; want key %s and an error", taken, err, pooled)
	}
	attempt := enroll.Attempt{Name: uuid.NewString(), Life: time.Minute}
	got, err := db.Claim(t.Context(), id, r, "192.0.2.9", time.Hour, attempt,
		func(string) audit.Event { return event(audit.EnrollmentClaimed, "acme", id) }, event(audit.EnrollmentConflict, "acme", id))
	if err == nil || !got.Begun || got.KeyID != d.KeyID || got.Attempt != attempt.Name {
		t.Errorf("a claim: %+v, %v; want the attempt and an error", got, err)
	}
}

// untilWaiting returns when a session of the database waits for a lock.
func untilWaiting(t *testing.T, other *sql.DB) {
	t.Helper()
	until(t, "a session waits for a lock", func() bool {
		var n int
		if err := other.QueryRow("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'").Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n > 0
	})
}

// What reads a whole table takes longer than a request's statement may, once there are
// millions of events.
func TestWhatReadsWholeTablesMayTakeLong(t *testing.T) {
	location := newDatabase(t, postgres)
	db, beside := open(t, location), raw(t, location)
	held, err := beside.Begin()
	must(t, err)
	statement(t, held, "LOCK TABLE events, event_persons, event_receipts IN ACCESS EXCLUSIVE MODE")
	all := map[string]func(context.Context) error{
		"audit erase": func(ctx context.Context) error {
			_, err := db.Erase(ctx, "ada", func(id string, _ int64) audit.Event { return event(audit.PersonErased, "", id) })
			return err
		},
		"audit erase --dry-run": func(ctx context.Context) error {
			_, err := db.Erasable(ctx, "ada")
			return err
		},
		"audit verify, its comparisons": func(ctx context.Context) error {
			return db.Snapshot(ctx, func(s verify.Snapshot) error {
				_, err := s.Contradictions(ctx, verify.ArchivedKeys{})
				return err
			})
		},
		"audit verify, its receipts": func(ctx context.Context) error {
			return db.Snapshot(ctx, func(s verify.Snapshot) error {
				_, err := s.ReceiptSinks(ctx)
				return err
			})
		},
	}
	type ended struct {
		what string
		err  error
	}
	done := make(chan ended, len(all))
	for what, do := range all {
		go func() { done <- ended{what, do(t.Context())} }()
	}
	until(t, "all of them have waited for longer than a request may", func() bool {
		var n int
		must(t, beside.QueryRow(`SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
			AND clock_timestamp() - query_start > $1 * interval '1 second'`, sqlstore.AnswerTimeout.Seconds()).Scan(&n))
		return n == len(all) || len(done) > 0
	})
	must(t, held.Rollback())
	for range all {
		if e := <-done; e.err != nil {
			t.Errorf("%s: %v", e.what, e.err)
		}
	}
}

// A migration may read a whole table. It does not wait for one for longer than a statement
// may, since all that writes to that waits behind it.
func TestMigrationsTakeTheirTimeButDoNotWaitForLocks(t *testing.T) {
	const dir = "migrations/postgres"
	files, err := os.ReadDir(dir)
	must(t, err)
	if len(files) < 2 {
		t.Fatalf("%d migrations", len(files))
	}
	for _, f := range files[1:] { // the first finds an empty database
		text, err := os.ReadFile(filepath.Join(dir, f.Name()))
		must(t, err)
		settings, _, _ := strings.Cut(regexp.MustCompile(`(?m)^--.*\n`).ReplaceAllString(string(text), ""), "5s';\n")
		if want := "SET LOCAL statement_timeout = 0;\nSET LOCAL lock_timeout = '"; settings != want {
			t.Errorf("%s does not begin with the settings %s5s';", f.Name(), want)
		}
	}
}
