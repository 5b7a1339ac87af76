package sqlstore

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgconn/ctxwatch"
	"github.com/jackc/pgx/v5/stdlib"
)

// Connections to PostgreSQL, directly and through a pooler.
//
// A direct connection gets its settings with its startup message and reads them
// back. A pooler (PgBouncer) refuses most of them there, or drops them, and in
// transaction mode gives each transaction another session. So through a pooler
// each transaction sets its limits for itself (SET LOCAL), and reads them back;
// statements are not kept prepared, since they would be looked for in the wrong
// session. A statement outside a transaction holds nothing that others wait for,
// and is bounded by this process's clock.
//
// A pooler is known by what cannot be hidden: the process ID that it announces
// (for cancelling requests) is not that of the session.

// sessionSettings are those of every direct PostgreSQL connection. The server
// ends a transaction whose client is stopped, and notices within seconds one
// whose host is gone: until then it would keep its locks. lock_timeout is turned
// off in case the role has one, since statement_timeout covers it.
var sessionSettings = map[string]string{
	"statement_timeout":                   fmt.Sprint(statementTimeout.Milliseconds()),
	"lock_timeout":                        "0",
	"idle_in_transaction_session_timeout": fmt.Sprint(silenceTimeout.Milliseconds()),
	"tcp_keepalives_idle":                 "3",
	"tcp_keepalives_interval":             "1",
	"tcp_keepalives_count":                "3",
	"tcp_user_timeout":                    "6000",
}

// cancelAfter is how long behind the end of its context a statement may still
// end by itself before pgx cancels it, through a pooler: PgBouncer 1.18 can exit
// when a client that asked it to cancel goes away (pgbouncer's issue 801).
const cancelAfter = time.Second

var (
	// errPooled: a connection that should be direct goes through a pooler.
	errPooled = errors.New("a pooler is in between")
	// errDirect: a connection that should go through a pooler is direct.
	errDirect = errors.New("no pooler is in between")
)

// connector makes connections in the mode that worked last, or otherwise in the other.
type connector struct {
	driver.Connector // direct
	pooled           driver.Connector
	viaPooler        atomic.Bool
}

func newConnector(config pgx.ConnConfig) *connector {
	direct, pooled := config, config
	direct.RuntimeParams = withParams(config.RuntimeParams, sessionSettings)
	pooled.RuntimeParams = withParams(config.RuntimeParams, nil)
	if pooled.DefaultQueryExecMode == pgx.QueryExecModeCacheStatement {
		pooled.DefaultQueryExecMode = pgx.QueryExecModeCacheDescribe
	}
	pooled.BuildContextWatcherHandler = func(c *pgconn.PgConn) ctxwatch.Handler {
		return &pgconn.DeadlineContextWatcherHandler{Conn: c.Conn(), DeadlineDelay: cancelAfter}
	}
	return &connector{
		Connector: stdlib.GetConnector(direct, stdlib.OptionAfterConnect(orClose(checkDirect)), stdlib.OptionResetSession(stillDurable())),
		pooled:    stdlib.GetConnector(pooled, stdlib.OptionAfterConnect(orClose(checkPooled)), stdlib.OptionResetSession(stillDurable())),
	}
}

func withParams(given, more map[string]string) map[string]string {
	all := map[string]string{"application_name": "orgkeys"}
	for _, params := range []map[string]string{given, more} {
		for name, value := range params {
			all[name] = value
		}
	}
	return all
}

// Connect implements driver.Connector.
func (c *connector) Connect(ctx context.Context) (driver.Conn, error) {
	ways := []func(context.Context) (driver.Conn, error){c.Connector.Connect, c.connectPooled}
	before := c.viaPooler.Load()
	if before {
		ways[0], ways[1] = ways[1], ways[0]
	}
	conn, err := ways[0](ctx)
	if !errors.Is(err, errDirect) && !errors.Is(err, errPooled) && !refusesSettings(err) {
		return conn, err
	}
	conn, err = ways[1](ctx)
	if err == nil {
		c.viaPooler.Store(!before)
	}
	return conn, err
}

func (c *connector) connectPooled(ctx context.Context) (driver.Conn, error) {
	conn, err := c.pooled.Connect(ctx)
	if err != nil {
		return nil, err
	}
	return &pooledConn{conn.(*stdlib.Conn)}, nil
}

// refusesSettings reports whether err is a pooler's refusal of what PostgreSQL
// would have taken as a setting.
func refusesSettings(err error) bool {
	failure, ok := errors.AsType[*pgconn.PgError](err)
	return ok && failure.Code == "08P01" && strings.HasPrefix(failure.Message, "unsupported startup parameter")
}

// orClose closes a connection that check refuses: the driver does not.
func orClose(check func(context.Context, *pgx.Conn) error) func(context.Context, *pgx.Conn) error {
	return func(ctx context.Context, conn *pgx.Conn) error {
		ctx, cancel := context.WithTimeout(ctx, connectTimeout)
		defer cancel()
		err := check(ctx, conn)
		if err != nil {
			_ = conn.Close(ctx) // the refusal is what matters
		}
		return err
	}
}

// writable refuses a server that is a standby, or read-only.
func writable(ctx context.Context, conn *pgconn.PgConn) error {
	if err := pgconn.ValidateConnectTargetSessionAttrsReadWrite(ctx, conn); err != nil {
		return fmt.Errorf("%w: %s", err, advice["25006"])
	}
	return nil
}

// toServer reports whether conn is a session of the server's own.
func toServer(ctx context.Context, conn *pgx.Conn) (bool, error) {
	var pid uint32
	err := conn.QueryRow(ctx, "SELECT pg_backend_pid()", pgx.QueryExecModeExec).Scan(&pid)
	return pid == conn.PgConn().PID(), err
}

// checkDirect refuses a session that does not have our settings.
func checkDirect(ctx context.Context, conn *pgx.Conn) error {
	if own, err := toServer(ctx, conn); err != nil || !own {
		return errors.Join(err, onlyIf(err == nil, errPooled))
	}
	names := make([]string, 0, len(sessionSettings))
	for name := range sessionSettings {
		names = append(names, name)
	}
	rows, err := conn.Query(ctx, "SELECT name, setting FROM pg_settings WHERE name = ANY($1)", pgx.QueryExecModeExec, names)
	if err != nil {
		return fmt.Errorf("reading back the session's settings: %w", err)
	}
	var name, value string
	_, err = pgx.ForEachRow(rows, []any{&name, &value}, func() error {
		// On a Unix socket, and where the server's system has no such thing, it is 0.
		if want := sessionSettings[name]; value != want && !(value == "0" && strings.HasPrefix(name, "tcp_")) {
			return fmt.Errorf("PostgreSQL reports %s=%s although %s was set: a program between orgkeys and the server changes it", name, value, want)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return checkDurable(ctx, conn)
}

func onlyIf(condition bool, err error) error {
	if condition {
		return err
	}
	return nil
}

// checkPooled tries a transaction: what a pooler cannot do shows there.
func checkPooled(ctx context.Context, conn *pgx.Conn) error {
	own, err := toServer(ctx, conn)
	if err != nil {
		return err
	}
	if own {
		return errDirect
	}
	tx, err := conn.Begin(ctx)
	if err != nil {
		if strings.Contains(err.Error(), "statement pooling") {
			return fmt.Errorf("PgBouncer's pool_mode is statement, which has no transactions: set pool_mode = transaction (or session) for this database in pgbouncer.ini: %w", err)
		}
		return err
	}
	if err := errors.Join(setLimits(ctx, conn), tx.Rollback(ctx)); err != nil {
		return err
	}
	return checkDurable(ctx, conn)
}

// limits are what a transaction through a pooler sets for itself. They come
// back as PostgreSQL understood them.
var limits = fmt.Sprintf(`SELECT set_config('statement_timeout', '%d', true), set_config('idle_in_transaction_session_timeout', '%d', true),
	set_config('lock_timeout', '0', true), current_setting('synchronous_commit')`, statementTimeout.Milliseconds(), silenceTimeout.Milliseconds())

// setLimits sets the limits of the transaction that conn is in. Another client may have
// left its own settings in the session, so the limits are read back.
func setLimits(ctx context.Context, conn *pgx.Conn) error {
	var statement, idle, lock, commit string // lock: 0 is written in one way only, and needs no look
	if err := conn.QueryRow(ctx, limits, pgx.QueryExecModeSimpleProtocol).Scan(&statement, &idle, &lock, &commit); err != nil {
		return err
	}
	for _, limit := range []struct {
		name, value string
		want        time.Duration
	}{{"statement_timeout", statement, statementTimeout}, {"idle_in_transaction_session_timeout", idle, silenceTimeout}} {
		if d, err := time.ParseDuration(limit.value); err != nil || d != limit.want {
			return fmt.Errorf("PostgreSQL reports %s=%s although %s was set: the pooler changes it", limit.name, limit.value, limit.want)
		}
	}
	if commit == "off" {
		return errors.New("the pooler's session runs with synchronous_commit=off and may lose acknowledged commits: use server_reset_query_always = 1, or no client that sets it")
	}
	return nil
}

// limitStatements sets how long each further statement of a transaction on PostgreSQL may
// take, where it may read a whole table; 0: until ctx ends.
func (d *DB) limitStatements(ctx context.Context, tx *sql.Tx, limit time.Duration) error {
	if !d.postgres {
		return nil
	}
	_, err := tx.ExecContext(ctx, "SELECT set_config('statement_timeout', $1, true)", strconv.FormatInt(limit.Milliseconds(), 10))
	return unavailable(err)
}

// readWithin has do read in a transaction whose statements may take as long as it may, where
// they may read a whole table.
func (d *DB) readWithin(ctx context.Context, limit time.Duration, do func(context.Context, *sql.Tx) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tx, err := d.read.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
	if err != nil {
		return unavailable(err)
	}
	if err = d.limitStatements(ctx, tx, limit); err == nil {
		err = do(ctx, tx)
	}
	return errors.Join(err, unavailable(ignoreDone(tx.Rollback())))
}

type stdlibConn = stdlib.Conn

// pooledConn is a connection through a pooler.
type pooledConn struct{ *stdlibConn }

// BeginTx implements driver.ConnBeginTx.
func (c *pooledConn) BeginTx(ctx context.Context, options driver.TxOptions) (driver.Tx, error) {
	tx, err := c.stdlibConn.BeginTx(ctx, options)
	if err != nil {
		return nil, err
	}
	if err := setLimits(ctx, c.Conn()); err != nil {
		return nil, errors.Join(err, tx.Rollback())
	}
	return tx, nil
}

// checkMode refuses modes of sending statements that do not work everywhere.
func checkMode(mode pgx.QueryExecMode) error {
	switch mode {
	case pgx.QueryExecModeCacheStatement, pgx.QueryExecModeCacheDescribe, pgx.QueryExecModeExec:
		return nil
	}
	return fmt.Errorf("the PostgreSQL URL has default_query_exec_mode=%s, which mixes up answers behind a pooler: remove it (orgkeys chooses by itself), or use cache_describe or exec", mode)
}
