// Package sqlstore keeps records, quota and log in SQL: SQLite (in the
// process) or PostgreSQL (pgx), with one set of statements.
//
// Everything that changes goes through write: one function, one transaction.
// On SQLite a single writer runs the functions that are waiting inside one
// transaction, so that concurrent requests share the one fsync; on PostgreSQL each has
// its own transaction, and the server shares commits itself. Both may run a function
// again. Times come from the database's clock.
package sqlstore

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// Limits of the connection to the database.
const (
	connectTimeout   = 3 * time.Second
	statementTimeout = 5 * time.Second
	silenceTimeout   = 3 * time.Second // of a transaction, shorter than statementTimeout: what waits for its locks gets them in time
	answerTimeout    = 8 * time.Second // for a whole transaction or query, by this process's clock: a server that hangs keeps no time
	rollbackTimeout  = 5 * time.Minute // for accepting a rollback, whose statements are as many as there are thousands of places
	eraseTimeout     = 5 * time.Minute // for erasing a person, of whom every bundle of archived events may know something
	idleTime         = 5 * time.Minute
	durableFor       = time.Second     // between two checks of PostgreSQL's durability settings
	connectionLife   = 5 * time.Minute // after a fail-over, connections to the wrong server last no longer
	batchSize        = 256             // writes that share one SQLite transaction
	attempts         = 4               // at a transaction that PostgreSQL aborted in favour of another
	firstRetry       = 5 * time.Millisecond
)

// DefaultConnections is the most connections that a process opens, unless changed by
// LimitConnections, and MinConnections how many it needs: work under a lock for all
// replicas keeps a connection until it ends.
const (
	DefaultConnections = 20
	MinConnections     = 5
)

// DB is the database. It implements orgkey.Store and audit.Store.
type DB struct {
	snapshot          // the present log
	read      *pool   // PostgreSQL: everything; SQLite: readers
	writer    *writer // SQLite only
	postgres  bool
	connector *connector // PostgreSQL only
	recorded  chan struct{}
	eventKey  *audit.EventKey // nil until UseEventKey
	standbys  atomic.Value    // of string: PostgreSQL's synchronous_standby_names, as last seen
	timeline  string          // PostgreSQL's expression for it
	history   string          // likewise: the timeline, and whose it is
	replica   atomic.Value    // of string: this process's ID among the replicas
	holder    string          // see UseHolder
	evidence  evidence
	thinned   atomic.Int64 // the newest signed checkpoint when the older ones were last thinned out
}

// Open opens the database at location: a postgres:// URL, or a SQLite file's
// path. It does not migrate.
func Open(ctx context.Context, location string) (*DB, error) {
	if strings.HasPrefix(location, "postgres://") || strings.HasPrefix(location, "postgresql://") {
		return openPostgres(ctx, location)
	}
	return openSQLite(ctx, location)
}

func openPostgres(ctx context.Context, location string) (*DB, error) {
	config, err := pgx.ParseConfig(location)
	if err != nil {
		// pgx's own text may repeat the URL with its password.
		return nil, errors.New("the PostgreSQL URL cannot be read: it has the form postgres://user@host:5432/database?sslmode=verify-full")
	}
	if err := checkMode(config.DefaultQueryExecMode); err != nil {
		return nil, err
	}
	config.ConnectTimeout = connectTimeout
	config.OnNotice = noteNotice
	if config.ValidateConnect == nil { // the URL has no target_session_attrs
		config.ValidateConnect = writable
	}
	connector := newConnector(*config)
	all := &pool{DB: sql.OpenDB(connector)}
	all.SetConnMaxIdleTime(idleTime)
	all.SetConnMaxLifetime(connectionLife)
	if err := all.PingContext(ctx); err != nil {
		return nil, errors.Join(unavailable(fmt.Errorf("connecting to PostgreSQL: %w", err)), all.Close())
	}
	var standbys string
	if err := all.QueryRowContext(ctx, "SELECT current_setting('synchronous_standby_names')").Scan(&standbys); err != nil {
		return nil, errors.Join(unavailable(fmt.Errorf("asking PostgreSQL for its standbys: %w", err)), all.Close())
	}
	timeline, err := timelineExpression(ctx, all)
	if err != nil {
		return nil, errors.Join(err, all.Close())
	}
	history, err := historyExpression(ctx, all, timeline)
	if err != nil {
		return nil, errors.Join(err, all.Close())
	}
	d := &DB{snapshot: snapshot{q: all}, read: all, postgres: true, connector: connector, timeline: timeline, history: history, recorded: make(chan struct{}, 1)}
	d.standbys.Store(standbys)
	d.LimitConnections(DefaultConnections)
	return d, nil
}

// checkDurable refuses a server that may lose acknowledged commits, at each connection,
// because after a failover it may be another server.
func checkDurable(ctx context.Context, conn *pgx.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	settings := []string{"fsync", "synchronous_commit", "full_page_writes"}
	values := make([]string, len(settings))
	err := conn.QueryRow(ctx, "SELECT current_setting($1), current_setting($2), current_setting($3)", settings[0], settings[1], settings[2]).
		Scan(&values[0], &values[1], &values[2])
	if err != nil {
		return fmt.Errorf("asking PostgreSQL whether it keeps what it acknowledges: %w", err)
	}
	if i := slices.Index(values, "off"); i >= 0 {
		return fmt.Errorf("PostgreSQL runs with %s=off and may lose acknowledged commits: set it to on", settings[i])
	}
	return nil
}

// stillDurable repeats checkDurable, since a server is reconfigured while
// connections to it live. It is asked of a connection that is about to be used, at
// most once every durableFor. While the answer is bad every connection that
// is asked is given up, and none is made instead.
func stillDurable() func(context.Context, *pgx.Conn) error {
	var good atomic.Pointer[time.Time] // when the answer was good last, by a clock that nobody sets
	return func(ctx context.Context, conn *pgx.Conn) error {
		if last := good.Load(); last != nil && time.Since(*last) < durableFor {
			return nil
		}
		if checkDurable(ctx, conn) != nil {
			return driver.ErrBadConn // the next connection's error has the details
		}
		now := time.Now()
		good.Store(&now)
		return nil
	}
}

// LimitConnections has the process open at most n connections (on SQLite, for
// reading), from MinConnections on. Idle ones are kept for a while.
func (d *DB) LimitConnections(n int) {
	d.read.SetMaxOpenConns(n)
	d.read.SetMaxIdleConns(n)
}

// ThroughPooler reports whether the last connection led to a pooler and not to
// PostgreSQL itself.
func (d *DB) ThroughPooler() bool { return d.connector != nil && d.connector.viaPooler.Load() }

// Close waits for writes in progress and closes the database. On SQLite the last
// connection to close, if it may write, moves what the write-ahead log holds into
// the database's file, and removes the log.
func (d *DB) Close() error {
	err := d.read.close()
	if d.writer != nil {
		err = errors.Join(err, d.writer.close())
	}
	return err
}

// rewriteHead makes SQLite write and commit a page without changing anything: only that
// shows whether the disk has room. SQLite does not write a row that stays the same.
func rewriteHead(ctx context.Context, tx *txn) error {
	if _, err := exec(ctx, tx, "UPDATE log_head SET size = size + 1"); err != nil {
		return err
	}
	_, err := exec(ctx, tx, "UPDATE log_head SET size = size - 1")
	return err
}

var errReadOnly = errors.New("PostgreSQL is a standby, or read-only")

// cannotWrite finds what keeps PostgreSQL from taking the writes without which
// no key can be made. It only asks: writes that come to nothing, once a second
// for each replica, would be the vacuum's work.
const cannotWrite = `SELECT current_setting('transaction_read_only')::boolean, coalesce(string_agg(what || ' on ' || thing, ', '), ''),
	current_setting('synchronous_standby_names')
	FROM (VALUES ('INSERT', 'events'), ('UPDATE', 'events'), ('INSERT', 'org_keys'), ('UPDATE', 'org_keys'), ('DELETE', 'org_keys'),
		('INSERT', 'log_hashes'), ('UPDATE', 'log_head')) AS needed (what, thing)
	WHERE NOT has_table_privilege(thing, what)`

// write runs do in a transaction, in PostgreSQL again if that aborted it, and
// lets the sequencer know of the events in it, unless they are unhurried: it looks
// for those from time to time. If ctx ends first, it is unknown whether the change
// was made, and do may still be running: variables that it sets must not be read.
func (d *DB) write(ctx context.Context, do func(context.Context, *txn) error) error {
	return d.writeWithin(ctx, answerTimeout, do)
}

func (d *DB) writeWithin(ctx context.Context, limit time.Duration, do func(context.Context, *txn) error) error {
	recorded, unhurried := false, false
	err := d.transactWithin(ctx, limit, func(ctx context.Context, tx *txn) error {
		err := do(ctx, tx)
		recorded, unhurried = tx.recorded, tx.unhurried
		return err
	})
	d.evidence.wrote(err, err == nil && recorded)
	if err == nil && recorded && !unhurried {
		select {
		case d.recorded <- struct{}{}:
		default:
		}
	}
	return err
}

// outcome is write of a change that has an outcome, which nobody reads if who asked for it has
// left: a closure that is left behind may still set it.
func outcome[T any](ctx context.Context, d *DB, do func(context.Context, *txn) (T, error)) (T, error) {
	return outcomeWithin(ctx, d, answerTimeout, do)
}

func outcomeWithin[T any](ctx context.Context, d *DB, limit time.Duration, do func(context.Context, *txn) (T, error)) (T, error) {
	var made, none T
	err := d.writeWithin(ctx, limit, func(ctx context.Context, tx *txn) (err error) {
		made, err = do(ctx, tx)
		return err
	})
	if err != nil {
		return none, err
	}
	return made, nil
}

func (d *DB) transact(ctx context.Context, do func(context.Context, *txn) error) error {
	return d.transactWithin(ctx, answerTimeout, do)
}

func (d *DB) transactWithin(ctx context.Context, limit time.Duration, do func(context.Context, *txn) error) error {
	if d.writer != nil {
		return d.writer.write(ctx, do)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err := d.attempt(ctx, do)
	for wait, n := firstRetry, 1; n < attempts && aborted(err); wait, n = 2*wait, n+1 {
		select {
		case <-time.After(wait/2 + rand.N(wait)):
		case <-ctx.Done():
			return err
		}
		err = d.attempt(ctx, do)
	}
	return err
}

// attempt runs do in a PostgreSQL transaction. The statements rely on READ
// COMMITTED: each must see what was committed while it waited for a lock.
func (d *DB) attempt(ctx context.Context, do func(context.Context, *txn) error) error {
	conn, err := d.read.Conn(ctx)
	if err != nil {
		return unavailable(err)
	}
	defer conn.Close() // it goes back to the pool
	tx, err := conn.BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelReadCommitted})
	if err != nil {
		return unavailable(err)
	}
	if err := do(ctx, &txn{Tx: tx}); err != nil {
		return errors.Join(err, ignoreDone(tx.Rollback()))
	}
	return d.commit(ctx, conn, tx)
}

// aborted reports whether PostgreSQL gave up a transaction, in favour of another or because
// this process sent nothing for too long, so that nothing of it was done and it can be tried again.
func aborted(err error) bool {
	failure, ok := errors.AsType[*pgconn.PgError](err)
	return ok && slices.Contains([]string{"40001", "40P01", "25P03"}, failure.Code)
}

func ignoreDone(err error) error {
	if errors.Is(err, sql.ErrTxDone) {
		return nil
	}
	return err
}

// now is the database's clock, in microseconds since the epoch.
func (d *DB) now(ctx context.Context, tx *txn) (int64, error) {
	if !d.postgres {
		return time.Now().UnixMicro(), nil // SQLite's own clock is this process's
	}
	var now int64
	err := tx.QueryRowContext(ctx, "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint").Scan(&now)
	return now, unavailable(err)
}

// present is the expression for the database's clock.
func (d *DB) present() string {
	if d.postgres {
		return postgresNow
	}
	return "CAST(unixepoch('subsec') * 1000000 AS INTEGER)"
}

// past is the expression for a column's time, and for the present where that is
// in the future: a clock has been set back since it was written.
func (d *DB) past(column string) string {
	now := d.present()
	if !d.postgres {
		now += " + 999" // it knows whole milliseconds, and column may be one of this one
	}
	return "CASE WHEN " + column + " > " + now + " THEN " + now + " ELSE " + column + " END"
}

// lock serializes the transactions that name the same thing. SQLite has one
// writer anyhow.
func (d *DB) lock(ctx context.Context, tx *txn, name string) error {
	if !d.postgres {
		return nil
	}
	_, err := tx.ExecContext(ctx, "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", name)
	return unavailable(err)
}

// unavailable marks what a driver reports as the database's trouble.
func unavailable(err error) error {
	if err == nil || errors.Is(err, orgkey.ErrUnavailable) {
		return err
	}
	return fmt.Errorf("%w: %w", orgkey.ErrUnavailable, explain(err))
}

// exec runs a statement and returns how many rows it touched.
func exec(ctx context.Context, tx *txn, statement string, args ...any) (int64, error) {
	result, err := tx.ExecContext(ctx, statement, args...)
	if err != nil {
		return 0, unavailable(err)
	}
	n, err := result.RowsAffected()
	return n, unavailable(err)
}

func micros(t sql.NullInt64) time.Time {
	if !t.Valid {
		return time.Time{}
	}
	return time.UnixMicro(t.Int64).UTC()
}
