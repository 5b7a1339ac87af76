package sqlstore_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/node"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/internal/sqlstore/pgtest"
)

var postgres *pgtest.Server

func TestMain(m *testing.M) {
	os.Exit(func() int {
		var err error
		if postgres, err = pgtest.Start(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer postgres.Close()
		return m.Run()
	}())
}

// onBoth runs a test over SQLite and over PostgreSQL.
func onBoth(t *testing.T, test func(t *testing.T, db *sqlstore.DB, location string)) {
	t.Run("sqlite", func(t *testing.T) {
		location := filepath.Join(t.TempDir(), "orgkeys.db")
		test(t, open(t, location), location)
	})
	t.Run("postgres", func(t *testing.T) {
		location, err := postgres.NewDatabase("t" + strings.ReplaceAll(uuid.NewString(), "-", ""))
		if err != nil {
			t.Fatal(err)
		}
		test(t, open(t, location), location)
	})
	t.Run("postgres with the next version's schema", func(t *testing.T) {
		location, err := postgres.NewDatabase("t" + strings.ReplaceAll(uuid.NewString(), "-", ""))
		if err != nil {
			t.Fatal(err)
		}
		db := open(t, location)
		migrateToNext(t, location)
		test(t, db, location)
	})
}

// migrateToNext does to the schema what a next version's migrations may: a
// rolling upgrade has this version run on it.
func migrateToNext(t *testing.T, location string) {
	t.Helper()
	next := raw(t, location)
	for _, table := range []string{"org_keys", "events", "event_persons", "log_hashes", "log_head", "event_receipts", "sink_progress", "nodes", "node_keys", "signature_uses", "boot_secrets"} {
		statement(t, next, "ALTER TABLE "+table+" ADD COLUMN of_the_next_version TEXT")
	}
	statement(t, next, "CREATE TABLE of_the_next_version (id TEXT PRIMARY KEY)")
	statement(t, next, "INSERT INTO goose_db_version (version_id, is_applied) VALUES (9999, true)")
}

func open(t testing.TB, location string) *sqlstore.DB {
	t.Helper()
	db, err := sqlstore.Open(t.Context(), location)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := db.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	db.UseEventKey(audit.EventKey{})
	return db
}

const life = time.Minute

func reserve(t testing.TB, db *sqlstore.DB, org org.ID, limit int) string {
	t.Helper()
	id := uuid.NewString()
	if err := db.Reserve(t.Context(), org, id, limit, life); err != nil {
		t.Fatal(err)
	}
	return id
}

func enrollmentRevoked(id string, _ int) audit.Event {
	return event(audit.EnrollmentRevoked, "acme", id)
}

func event(kind audit.Type, org org.ID, id string) audit.Event {
	e := audit.New(kind, org)
	e.Object = id
	e.Personal = audit.Personal{Name: "Ada", Address: "192.0.2.1"}
	return e
}

func pending(t testing.TB, db *sqlstore.DB, org org.ID, limit int) string {
	t.Helper()
	id := reserve(t, db, org, limit)
	if err := db.StorePending(t.Context(), id, id, []byte("sealed "+id), event(audit.KeyCreated, org, id)); err != nil {
		t.Fatal(err)
	}
	return id
}

func released(t testing.TB, db *sqlstore.DB, org org.ID, limit int) string {
	t.Helper()
	id := pending(t, db, org, limit)
	if err := db.Release(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	return id
}

// signer is a live key of acme's, as it verifies a signature.
func signer(t testing.TB, db *sqlstore.DB, id string) node.Signer {
	t.Helper()
	live, err := db.LiveKeys(t.Context(), "acme", netip.MustParseAddr("192.0.2.254"), id, node.MaxKeys)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range live {
		if k.Key == id {
			return k
		}
	}
	t.Fatalf("key %s is not live", id)
	return node.Signer{}
}

// swept is the event of a sweeper that took a pending key.
func swept(org org.ID, id string) audit.Event { return orgkey.SweptEvent(org, id) }

// Whatever table has it, a sealed value needs the token or Vault that sealed it.
func TestHasSealedSeesEveryTable(t *testing.T) {
	inserts := map[string]string{
		"org_keys":        `INSERT INTO org_keys (id, org_id, slot, state, sealed) VALUES ('k', 'acme', 1, 'released', '\x00')`,
		"keys_of_nodes":   `INSERT INTO keys_of_nodes (id, org_id, slot, state, sealed) VALUES ('k', 'acme', 1, 'released', '\x00')`,
		"boot_secrets":    `INSERT INTO boot_secrets (org_id, name, sealed, created_at, updated_at) VALUES ('acme', 'env', '\x00', 1, 1)`,
		"checkpoint_keys": `INSERT INTO checkpoint_keys (vkey, sealed) VALUES ('v', '\x00')`,
		"event_keys":      `INSERT INTO event_keys (origin, sealed) VALUES ('o', '\x00')`,
		"pool_keys":       `INSERT INTO pool_keys (id, use, sealed, expires_at) VALUES ('k', 'plain', '\x00', 1)`,
	}
	location, err := postgres.NewDatabase("t" + strings.ReplaceAll(uuid.NewString(), "-", ""))
	if err != nil {
		t.Fatal(err)
	}
	db, direct := open(t, location), raw(t, location)
	rows, err := direct.QueryContext(t.Context(), `SELECT table_name FROM information_schema.columns WHERE table_schema = current_schema() AND column_name = 'sealed'
		AND table_name <> 'console_sessions'`) // which are sealed under a key of their cookie
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	var tables []string
	for rows.Next() {
		tables = append(tables, "")
		if err := rows.Scan(&tables[len(tables)-1]); err != nil {
			t.Fatal(err)
		}
	}
	if rows.Err() != nil || len(tables) < len(inserts) {
		t.Fatalf("tables %q, %v", tables, rows.Err())
	}
	for _, table := range tables {
		if found, err := db.HasSealed(t.Context()); err != nil || found {
			t.Errorf("before: %v, %v", found, err)
		}
		if inserts[table] == "" {
			t.Fatalf("what is sealed in %s?", table)
		}
		statement(t, direct, inserts[table])
		if found, err := db.HasSealed(t.Context()); err != nil || !found {
			t.Errorf("a sealed value in %s: %v, %v", table, found, err)
		}
		statement(t, direct, "DELETE FROM "+table)
	}
}

// Promise 3: the quota is never exceeded by concurrent requests, without any lock.
func TestConcurrentReservationsNeverExceedTheLimit(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		var given, refused atomic.Int64
		var wg sync.WaitGroup
		for range 64 {
			wg.Go(func() {
				err := db.Reserve(t.Context(), "acme", uuid.NewString(), 5, life)
				var quota *orgkey.QuotaError
				switch {
				case err == nil:
					given.Add(1)
				case errors.As(err, &quota) && quota.Limit == 5:
					refused.Add(1)
				default:
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if given.Load() != 5 || refused.Load() != 59 {
			t.Errorf("64 requests for 5 places: %d given, %d refused", given.Load(), refused.Load())
		}
	})
}

// Promise 3: a place is given only while fewer are occupied than the limit, holes or not.
func TestNoPlaceIsGivenAboveALoweredLimit(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		var ids []string
		for range 5 {
			ids = append(ids, released(t, db, "acme", 5))
		}
		for _, id := range ids[:2] { // leaves the holes 1 and 2, and three keys
			if err := db.DeleteKey(t.Context(), "acme", id, event(audit.KeyDeleted, "acme", id)); err != nil {
				t.Fatal(err)
			}
		}
		var quota *orgkey.QuotaError
		if err := db.Reserve(t.Context(), "acme", uuid.NewString(), 3, life); !errors.As(err, &quota) {
			t.Errorf("three keys and a limit of 3: %v", err)
		}
		reserve(t, db, "acme", 4)
	})
}

func TestAnotherOrganizationsPlacesDoNotCount(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		reserve(t, db, "acme", 1)
		reserve(t, db, "Acme", 1)
	})
}

// Promise 3: a crash holds a place no longer than one reservation's life.
func TestAnExpiredPlaceIsGivenAgainAndItsOwnerFencedOff(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		stale := uuid.NewString()
		if err := db.Reserve(t.Context(), "acme", stale, 1, time.Millisecond); err != nil {
			t.Fatal(err)
		}
		fresh := eventually(t, func() (string, error) {
			id := uuid.NewString()
			return id, db.Reserve(t.Context(), "acme", id, 1, life)
		})
		if err := db.StorePending(t.Context(), stale, stale, []byte("x"), event(audit.KeyCreated, "acme", stale)); !errors.Is(err, orgkey.ErrGone) {
			t.Errorf("the stale owner stored its key: %v", err)
		}
		if err := db.StorePending(t.Context(), fresh, fresh, []byte("x"), event(audit.KeyCreated, "acme", fresh)); err != nil {
			t.Errorf("the new owner: %v", err)
		}
	})
}

func eventually[T any](t *testing.T, try func() (T, error)) T {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for {
		got, err := try()
		if err == nil {
			return got
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func TestOnlyReleasedKeysAreListedNewestFirst(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		first, second := released(t, db, "acme", 5), released(t, db, "acme", 5)
		pending(t, db, "acme", 5)
		reserve(t, db, "acme", 5)
		if err := db.Delivered(t.Context(), second, event(audit.KeyDelivered, "acme", second)); err != nil {
			t.Fatal(err)
		}
		keys, err := db.Keys(t.Context(), "acme")
		if err != nil {
			t.Fatal(err)
		}
		if len(keys) != 2 || keys[0].ID != second || keys[1].ID != first {
			t.Fatalf("keys %+v, want %s then %s", keys, second, first)
		}
		if keys[0].Delivered.IsZero() || keys[0].DeliveredTo != "192.0.2.1" || !keys[1].Delivered.IsZero() || keys[1].DeliveredTo != "" {
			t.Errorf("delivered: %+v, %+v", keys[0], keys[1])
		}
		if string(keys[0].Sealed) != "sealed "+second || keys[0].Created.IsZero() {
			t.Errorf("record %+v", keys[0])
		}
	})
}

func TestAKeyIsReleasedOnce(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		id := released(t, db, "acme", 5)
		if err := db.Release(t.Context(), id); !errors.Is(err, orgkey.ErrGone) {
			t.Errorf("released twice: %v", err)
		}
		if err := db.Release(t.Context(), uuid.NewString()); !errors.Is(err, orgkey.ErrGone) {
			t.Errorf("released a key that never was: %v", err)
		}
	})
}

// What the reaper asks: a back end's key is somebody's until its generation has
// released it, or its time is up.
func TestOnlyGenerationsUnderWayAreReserved(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		pending := func(org org.ID, life time.Duration) string {
			id := uuid.NewString()
			if err := errors.Join(
				db.Reserve(t.Context(), org, id, 9, life),
				db.StorePending(t.Context(), id, id, []byte("x"), event(audit.KeyCreated, org, id)),
			); err != nil {
				t.Fatal(err)
			}
			return id
		}
		reserved, underWay, done, late := reserve(t, db, "acme", 9), pending("acme", time.Minute), pending("acme", time.Minute), pending("late", 50*time.Millisecond)
		if err := db.Release(t.Context(), done); err != nil {
			t.Fatal(err)
		}
		all := []string{reserved, underWay, done, late, uuid.NewString()}
		want := map[string]bool{reserved: true, underWay: true}
		eventually(t, func() (int, error) {
			got, err := db.Needed(t.Context(), all)
			if err == nil && !maps.Equal(got, want) {
				err = fmt.Errorf("reserved are %v, want %v", got, want)
			}
			return len(got), err
		})
	})
}

func TestAPendingKeyPastItsExpiryIsNotReleasedButSwept(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		id := uuid.NewString()
		if err := db.Reserve(t.Context(), "acme", id, 1, 50*time.Millisecond); err != nil {
			t.Fatal(err)
		}
		if err := db.StorePending(t.Context(), id, id, []byte("x"), event(audit.KeyCreated, "acme", id)); err != nil {
			t.Fatal(err)
		}
		n := eventually(t, func() (int, error) {
			n, err := db.Sweep(t.Context(), 10, time.Minute, swept)
			if err == nil && n == 0 {
				err = errors.New("nothing to sweep")
			}
			return n, err
		})
		if n != 1 {
			t.Errorf("swept %d", n)
		}
		if err := db.Release(t.Context(), id); !errors.Is(err, orgkey.ErrGone) {
			t.Errorf("released after it was swept: %v", err)
		}
		if got := types(t, db); got != "orgkey.created orgkey.withdrawn" {
			t.Errorf("events: %s", got)
		}
		reserve(t, db, "acme", 1)
	})
}

// types sequences what there is and returns the types of all events.
func types(t *testing.T, db *sqlstore.DB) string {
	t.Helper()
	if _, err := db.Sequence(t.Context(), 1000, audit.Condition{}); err != nil {
		t.Fatal(err)
	}
	entries, err := db.Entries(t.Context(), 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range entries {
		decoded, err := audit.Decode(e.Leaf)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, string(decoded.Type))
	}
	return strings.Join(all, " ")
}

func TestDeletingAKey(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		id, other := released(t, db, "acme", 5), pending(t, db, "acme", 5)
		del := func(org org.ID, id string) error {
			return db.DeleteKey(t.Context(), org, id, event(audit.KeyDeleted, org, id))
		}
		if err := del("evil", id); !errors.Is(err, orgkey.ErrNotFound) {
			t.Errorf("another organization deleted it: %v", err)
		}
		if err := del("acme", other); !errors.Is(err, orgkey.ErrNotFound) {
			t.Errorf("a pending key was deleted as if it were listed: %v", err)
		}
		if err := del("acme", id); err != nil {
			t.Fatal(err)
		}
		if err := del("acme", id); !errors.Is(err, orgkey.ErrNotFound) {
			t.Errorf("deleted twice: %v", err)
		}
		if got := types(t, db); got != "orgkey.created orgkey.created orgkey.deleted" {
			t.Errorf("a refused deletion left its event behind: %s", got)
		}
	})
}

// A signature may have verified a moment before its key was deleted. The
// transaction that acts looks again, also where the same request was served before.
func TestPromise6_AKeyDeletedAfterItVerifiedActsNoMore(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		id, ip := released(t, db, "acme", 5), netip.MustParseAddr("192.0.2.7")
		by := signer(t, db, id)
		registered := func(id string, _ node.Change) audit.Event { return event(audit.NodeRegistered, "acme", id) }
		register := func(message byte) error {
			use := node.Use{Org: "acme", Signer: by, Message: [32]byte{message}, Until: time.Now().Add(time.Hour)}
			return db.Register(t.Context(), use, node.Node{ID: uuid.NewString(), Org: "acme", IP: ip}, registered)
		}
		if err := register(1); err != nil {
			t.Fatal(err)
		}
		if err := db.DeleteKey(t.Context(), "acme", id, event(audit.KeyDeleted, "acme", id)); err != nil {
			t.Fatal(err)
		}
		for name, message := range map[string]byte{"the request from before": 1, "a new request": 2} {
			if err := register(message); !errors.Is(err, node.ErrKeyGone) {
				t.Errorf("%s: %v, want ErrKeyGone", name, err)
			}
		}
		_, err := db.Secrets(t.Context(), "acme", by, netip.MustParseAddr("192.0.2.1"), 0, func([]string) audit.Event { return event(audit.SecretsFetched, "acme", id) })
		if !errors.Is(err, node.ErrKeyGone) {
			t.Errorf("secrets: %v, want ErrKeyGone", err)
		}
		if got := types(t, db); got != "orgkey.created node.registered orgkey.deleted" {
			t.Errorf("events: %s", got)
		}
	})
}

// Promise 6: deleting all keys also cancels what is reserved or pending.
func TestDeletingAllKeysCancelsWhatIsUnderWay(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		released(t, db, "acme", 9)
		released(t, db, "acme", 9)
		underWay, waiting := reserve(t, db, "acme", 9), pending(t, db, "acme", 9)
		kept := released(t, db, "other", 9)
		n, err := db.DeleteKeys(t.Context(), "acme", false, event(audit.KeysDeleted, "acme", ""), func(id string, wasReleased bool) audit.Event {
			if wasReleased {
				return event(audit.KeyDeleted, "acme", id)
			}
			return event(audit.KeyWithdrawn, "acme", id)
		}, enrollmentRevoked)
		if err != nil || n.Keys != 2 {
			t.Fatalf("deleted %d keys, %v; want the 2 released ones", n.Keys, err)
		}
		if err := db.StorePending(t.Context(), underWay, underWay, []byte("x"), event(audit.KeyCreated, "acme", underWay)); !errors.Is(err, orgkey.ErrGone) {
			t.Errorf("a cancelled generation was stored: %v", err)
		}
		if err := db.Release(t.Context(), waiting); !errors.Is(err, orgkey.ErrGone) {
			t.Errorf("a cancelled key was released: %v", err)
		}
		if keys, err := db.Keys(t.Context(), "other"); err != nil || len(keys) != 1 || keys[0].ID != kept {
			t.Errorf("the other organization's keys: %v, %v", keys, err)
		}
		if got := types(t, db); strings.Count(got, "orgkey.deleted") != 2 || strings.Count(got, "orgkey.withdrawn") != 1 || strings.Count(got, "orgkey.all_deleted") != 1 {
			t.Errorf("events: %s", got)
		}
	})
}

func TestWithdrawingEndsAReleasedKeyAndIsRepeatable(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		id := released(t, db, "acme", 1)
		for _, there := range []bool{true, false} {
			if ended, err := db.Withdraw(t.Context(), id, event(audit.KeyWithdrawn, "acme", id)); err != nil || ended != there {
				t.Fatalf("ended %v, %v, want %v", ended, err, there)
			}
		}
		if got := types(t, db); got != "orgkey.created orgkey.withdrawn" {
			t.Errorf("events: %s", got)
		}
		reserve(t, db, "acme", 1)
	})
}

func TestAChangeThatFailsLeavesNoEvent(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		id := reserve(t, db, "acme", 1)
		created := event(audit.KeyCreated, "acme", id)
		if err := db.Record(t.Context(), created); err != nil {
			t.Fatal(err)
		}
		// The same event's ID again violates a constraint after the key's row changed.
		if err := db.StorePending(t.Context(), id, id, []byte("x"), created); !errors.Is(err, orgkey.ErrUnavailable) {
			t.Fatalf("a second event with the same ID: %v", err)
		}
		again := event(audit.KeyCreated, "acme", id)
		if err := db.StorePending(t.Context(), id, id, []byte("x"), again); err != nil {
			t.Errorf("the reservation was changed by the failed transaction: %v", err)
		}
	})
}

func TestMigratingTwiceAndAtOnceIsHarmless(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, location string) {
		before, err := db.Head(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				other, err := sqlstore.Open(context.Background(), location)
				if err != nil {
					t.Error(err)
					return
				}
				if err := errors.Join(other.Migrate(context.Background()), other.CheckMigrated(context.Background()), other.Close()); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if after, err := db.Head(t.Context()); err != nil || after != before {
			t.Errorf("the log's head changed from %+v to %+v, %v", before, after, err)
		}
	})
}

// Who only looks whether a database is migrated leaves nothing in it.
func TestLookingForMigrationsChangesNothing(t *testing.T) {
	for _, tt := range []struct{ name, location, driver, tables string }{
		{"sqlite", filepath.Join(t.TempDir(), "orgkeys.db"), "sqlite3", "SELECT count(*) FROM sqlite_master"},
		{"postgres", newDatabase(t, postgres), "pgx", "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			db, err := sqlstore.Open(t.Context(), tt.location)
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			if err := db.CheckMigrated(t.Context()); !errors.Is(err, sqlstore.ErrNotMigrated) {
				t.Errorf("an empty database: %v", err)
			}
			other, err := sql.Open(tt.driver, tt.location)
			if err != nil {
				t.Fatal(err)
			}
			defer other.Close()
			var tables int
			if err := other.QueryRow(tt.tables).Scan(&tables); err != nil || tables != 0 {
				t.Errorf("it holds %d tables now, %v", tables, err)
			}
			if err := errors.Join(db.Migrate(t.Context()), db.CheckMigrated(t.Context())); err != nil {
				t.Errorf("migrated: %v", err)
			}
		})
	}
}

// Promise 8.
func TestUnsafePostgresIsRefused(t *testing.T) {
	for _, setting := range []string{"fsync=off", "synchronous_commit=off", "full_page_writes=off"} {
		t.Run(setting, func(t *testing.T) {
			unsafe, err := pgtest.Start(setting)
			if err != nil {
				t.Fatal(err)
			}
			defer unsafe.Close()
			_, err = sqlstore.Open(t.Context(), unsafe.URL("postgres"))
			if err == nil || !strings.Contains(err.Error(), setting) {
				t.Errorf("opened, or for another reason not: %v", err)
			}
		})
	}
}

// Whoever fetches secrets has memory reserved for so many bytes, and gets no more.
func TestNoMoreSecretsThanExpected(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		by := signer(t, db, released(t, db, "acme", 5))
		for _, name := range []string{"a", "b"} {
			must(t, db.PutSecret(t.Context(), "acme", node.SealedSecret{Name: name, Sealed: make([]byte, 50)}, 5, event(audit.SecretPut, "acme", name)))
		}
		fetch := func(size int64) ([]node.SealedSecret, error) {
			return db.Secrets(t.Context(), "acme", by, netip.MustParseAddr("192.0.2.1"), size, func([]string) audit.Event { return event(audit.SecretsFetched, "acme", "") })
		}
		if got, err := fetch(99); !errors.Is(err, node.ErrLarger) || got != nil {
			t.Errorf("99 bytes: %v, %v", got, err)
		}
		if got := types(t, db); strings.Contains(got, string(audit.SecretsFetched)) {
			t.Errorf("events: %s", got)
		}
		if got, err := fetch(100); err != nil || len(got) != 2 {
			t.Errorf("100 bytes: %v, %v", got, err)
		}
	})
}
