package sqlstore_test

import (
	"context"
	"database/sql"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/internal/sqlstore/pgtest"
)

// ignoring is what a PgBouncer is often told so that clients with settings of
// their own get in at all: it then drops them without a word.
const ignoring = "ignore_startup_parameters = extra_float_digits,statement_timeout,lock_timeout,idle_in_transaction_session_timeout,tcp_keepalives_idle,tcp_keepalives_interval,tcp_keepalives_count,tcp_user_timeout"

// throughPoolers runs do behind a real PgBouncer in each mode that works.
func throughPoolers(t *testing.T, do func(t *testing.T, through func(direct string) string)) {
	for name, tt := range map[string]struct {
		mode     string
		settings []string
	}{
		"session":                          {"session", nil},
		"session, settings dropped":        {"session", []string{ignoring}},
		"transaction":                      {"transaction", nil},
		"transaction, settings dropped":    {"transaction", []string{ignoring}},
		"transaction, few server sessions": {"transaction", []string{"default_pool_size = 6"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, err := postgres.Pooler(tt.mode, tt.settings...)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { p.Close() })
			do(t, func(direct string) string { return p.URL(databaseOf(direct)) })
		})
	}
}

func databaseOf(location string) string {
	name := location[strings.LastIndex(location, "/")+1:]
	return name[:strings.Index(name, "?")]
}

func opened(t *testing.T, location string) *sqlstore.DB {
	t.Helper()
	db, err := sqlstore.Open(t.Context(), location)
	if err != nil {
		t.Fatal(err)
	}
	db.LimitConnections(8) // two replicas share the 20 sessions that PgBouncer has
	t.Cleanup(func() { db.Close() })
	return db
}

// Four replicas that start at once migrate once, and leave no lock behind.
func TestMigrationsAtOnceThroughPgBouncer(t *testing.T) {
	rounds := 1
	if os.Getenv("ORGKEYS_TEST_LONG") != "" {
		rounds = 50
	}
	throughPoolers(t, func(t *testing.T, through func(string) string) {
		admin := raw(t, postgres.URL("postgres"))
		for range rounds {
			direct := newDatabase(t, postgres)
			location := through(direct)
			var all sync.WaitGroup
			for range 4 {
				all.Go(func() {
					db, err := sqlstore.Open(t.Context(), location)
					if err != nil {
						t.Error(err)
						return
					}
					ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
					defer cancel()
					if err := errors.Join(db.Migrate(ctx), db.CheckMigrated(ctx), db.Close()); err != nil {
						t.Error(err)
					}
				})
			}
			all.Wait()
			beside, err := sql.Open("pgx", direct)
			if err != nil {
				t.Fatal(err)
			}
			var locks, twice int
			err = errors.Join(
				beside.QueryRow("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())").Scan(&locks),
				beside.QueryRow("SELECT count(*) - count(DISTINCT version_id) FROM goose_db_version").Scan(&twice),
				beside.Close())
			if err != nil || locks != 0 || twice != 0 {
				t.Fatalf("%d locks were left, %d migrations ran twice, %v", locks, twice, err)
			}
			// A pooler keeps its sessions for minutes, and PostgreSQL has a hundred.
			statement(t, admin, "DROP DATABASE "+databaseOf(direct)+" WITH (FORCE)")
		}
	})
}

// Two replicas make keys and log events at once.
func TestTwoReplicasThroughPgBouncer(t *testing.T) {
	throughPoolers(t, func(t *testing.T, through func(string) string) {
		location := through(newDatabase(t, postgres))
		replicas := []*sqlstore.DB{opened(t, location), opened(t, location)}
		for _, db := range replicas {
			must(t, db.Migrate(t.Context()))
			db.UseEventKey(audit.EventKey{})
			if !db.ThroughPooler() {
				t.Error("the pooler was not noticed")
			}
			must(t, db.Healthy(t.Context()))
		}
		var all sync.WaitGroup
		for i, db := range replicas {
			for j := range 6 {
				all.Go(func() {
					acme := org.ID("org" + string(rune('a'+j)))
					id := uuid.NewString()
					if err := db.Reserve(t.Context(), acme, id, 1, life); err != nil {
						if !errors.As(err, new(*orgkey.QuotaError)) {
							t.Errorf("replica %d: %v", i, err)
						}
						return
					}
					if err := db.StorePending(t.Context(), id, id, []byte("sealed"), event(audit.KeyCreated, acme, id)); err != nil {
						t.Error(err)
					}
					if err := db.Release(t.Context(), id); err != nil {
						t.Error(err)
					}
				})
				all.Go(func() {
					if _, err := db.Sequence(t.Context(), 100, audit.Condition{}); err != nil {
						t.Error(err)
					}
				})
			}
		}
		all.Wait()
		for range 2 {
			_, err := replicas[0].Sequence(t.Context(), 100, audit.Condition{})
			must(t, err)
		}
		head, err := replicas[1].Head(t.Context())
		if err != nil || head.Size != 6 {
			t.Errorf("the log holds %d events, %v, want one for each organization", head.Size, err)
		}
	})
}

// A replica that is stopped in a transaction does not keep its locks, although
// no setting of its session reaches the server.
func TestATransactionThatIsSilentEndsThroughPgBouncer(t *testing.T) {
	throughPoolers(t, func(t *testing.T, through func(string) string) {
		location := through(newDatabase(t, postgres))
		silent, other := opened(t, location), opened(t, location)
		must(t, silent.Migrate(t.Context()))
		other.UseEventKey(audit.EventKey{})
		tx, err := silent.BeginAndLock(t.Context(), "org:acme")
		must(t, err)
		began := time.Now()
		must(t, other.Reserve(t.Context(), "acme", uuid.NewString(), 5, life))
		if waited := time.Since(began); waited < time.Second {
			t.Errorf("it waited %s only: the lock was not held", waited)
		}
		if err := tx.Commit(); err == nil {
			t.Error("the silent transaction was committed all the same")
		}
	})
}

// Sessions that the pooler ends, as server_lifetime and server_idle_timeout have it
// do, and transactions that wait for one, are nothing that a request hears of.
func TestAPoolerThatEndsSessionsLosesNothing(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"session", "transaction"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			size := map[string]string{"session": "20", "transaction": "6"}[mode]
			p, err := postgres.Pooler(mode, "server_lifetime = 1", "server_idle_timeout = 1", "query_wait_timeout = 10", "default_pool_size = "+size)
			must(t, err)
			t.Cleanup(func() { p.Close() })
			location := p.URL(databaseOf(newDatabase(t, postgres)))
			replicas := []*sqlstore.DB{opened(t, location), opened(t, location)}
			must(t, replicas[0].Migrate(t.Context()))
			made := make([]int, len(replicas))
			var all sync.WaitGroup
			for i, db := range replicas {
				db.UseEventKey(audit.EventKey{})
				all.Go(func() {
					acme := org.ID("org" + string(rune('a'+i)))
					for began := time.Now(); time.Since(began) < 4*time.Second; time.Sleep(400 * time.Millisecond) {
						id := uuid.NewString()
						if err := errors.Join(db.Reserve(t.Context(), acme, id, 100, life),
							db.StorePending(t.Context(), id, id, []byte("sealed"), event(audit.KeyCreated, acme, id)), db.Release(t.Context(), id)); err != nil {
							t.Errorf("after %s: %v", time.Since(began), err)
						}
						if _, err := db.Sequence(t.Context(), 100, audit.Condition{}); err != nil {
							t.Error(err)
						}
						made[i]++
					}
				})
			}
			all.Wait()
			for i, db := range replicas {
				keys, err := db.Keys(t.Context(), org.ID("org"+string(rune('a'+i))))
				if err != nil || len(keys) != made[i] || made[i] == 0 {
					t.Errorf("%d keys are there of %d, %v", len(keys), made[i], err)
				}
			}
		})
	}
}

// A statement whose caller has gone ends by itself, rather than being cancelled:
// PgBouncer 1.18 may exit over a cancellation (its issue 801).
func TestAStatementMayEndBeforeItIsCancelledThroughPgBouncer(t *testing.T) {
	throughPoolers(t, func(t *testing.T, through func(string) string) {
		direct := newDatabase(t, postgres)
		db := opened(t, through(direct))
		admin := raw(t, direct)
		statement(t, admin, "CREATE TABLE slow (n bigint)")
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		_ = db.Execute(ctx, "INSERT INTO slow SELECT 1 FROM pg_sleep(0.3)") // what the caller hears does not matter
		var n int
		until(t, "the statement ended by itself", func() bool {
			must(t, admin.QueryRow("SELECT count(*) FROM slow").Scan(&n))
			return n == 1
		})
	})
}

func TestWhatCannotWorkBehindPgBouncerIsRefusedByName(t *testing.T) {
	direct := newDatabase(t, postgres)
	p, err := postgres.Pooler("statement")
	must(t, err)
	defer p.Close()
	for location, want := range map[string]string{
		p.URL(databaseOf(direct)):                           "pool_mode = transaction",
		direct + "&default_query_exec_mode=describe_exec":   "default_query_exec_mode",
		direct + "&default_query_exec_mode=simple_protocol": "default_query_exec_mode",
	} {
		db, err := sqlstore.Open(t.Context(), location)
		if err == nil {
			db.Close()
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", location, err, want)
		}
	}
}

// A pooler that comes, or goes, while the service runs is noticed by each
// connection.
func TestSettingsOfTheSessionAreReadBack(t *testing.T) {
	direct := newDatabase(t, postgres)
	db := opened(t, direct)
	if db.ThroughPooler() {
		t.Error("a direct connection is taken for a pooler's")
	}
	for name, want := range map[string]string{"statement_timeout": "5s", "idle_in_transaction_session_timeout": "3s", "lock_timeout": "0", "tcp_user_timeout": "6000"} {
		if got, err := db.SessionSetting(t.Context(), name); err != nil || got != want {
			t.Errorf("%s is %q, %v, want %q", name, got, err, want)
		}
	}
}

func TestMessagesOfPostgresSayWhatToDo(t *testing.T) {
	direct := newDatabase(t, postgres)
	server, err := pgtest.Start()
	must(t, err)
	defer server.Close()
	for name, tt := range map[string]struct{ location, want string }{
		"no such database":  {server.URL("nowhere"), "createdb"},
		"no such user":      {strings.Replace(direct, "orgkeys@", "nobody@", 1), "pg_hba.conf"},
		"no such schema":    {direct + "&search_path=nowhere", "CREATE SCHEMA"},
		"a read-only login": {direct + "&default_transaction_read_only=on", "read-only"},
	} {
		t.Run(name, func(t *testing.T) {
			db, err := sqlstore.Open(t.Context(), tt.location)
			if err == nil {
				err = errors.Join(db.Migrate(t.Context()), db.Close())
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}

// A copy of the database's file alone holds everything, once its process ended
// in an orderly way.
func TestSQLiteIsOneFileAfterAnOrderlyEnd(t *testing.T) {
	path := filepath.Join(t.TempDir(), "orgkeys.db")
	db, err := sqlstore.Open(t.Context(), path)
	must(t, err)
	must(t, db.Migrate(t.Context()))
	db.UseEventKey(audit.EventKey{})
	id := released(t, db, "acme", 5)
	if keys, err := db.Keys(t.Context(), "acme"); err != nil || len(keys) != 1 {
		t.Fatalf("%d keys, %v", len(keys), err)
	}
	must(t, db.Close())
	for _, more := range []string{"-wal", "-shm"} {
		if info, err := os.Stat(path + more); err == nil && info.Size() > 0 {
			t.Errorf("%s still holds %d bytes", filepath.Base(path+more), info.Size())
		}
	}
	content, err := os.ReadFile(path)
	must(t, err)
	lone := filepath.Join(t.TempDir(), "copy.db")
	must(t, os.WriteFile(lone, content, 0o600))
	again := opened(t, lone)
	if keys, err := again.Keys(t.Context(), "acme"); err != nil || len(keys) != 1 || keys[0].ID != id {
		t.Errorf("the copy holds %+v, %v", keys, err)
	}
}
