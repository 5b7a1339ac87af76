//go:build cgo

package sqlstore

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"net/url"
	"regexp"

	"github.com/mattn/go-sqlite3"
)

// busyTimeout is how long SQLite waits for another process that holds its file.
const busyTimeout = statementTimeout

// sqliteSettings are those of every connection to SQLite. Savepoints' journals are kept in memory: they are
// needed only until their transaction ends, and were a fifth of the writer's time as files.
var sqliteSettings = fmt.Sprintf("PRAGMA busy_timeout = %d; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; "+
	"PRAGMA temp_store = MEMORY; PRAGMA foreign_keys = ON; ", busyTimeout.Milliseconds())

func openSQLite(ctx context.Context, path string) (*DB, error) {
	single := sql.OpenDB(newSQLiteConnector(path, "immediate", fmt.Sprintf("PRAGMA wal_autocheckpoint = %d", mostPages)))
	single.SetMaxOpenConns(3) // the writer's, one for migrations, and one for checkpoints
	readers := &pool{DB: sql.OpenDB(newSQLiteConnector(path, "deferred", "PRAGMA query_only = ON")), prepared: map[string]*sql.Stmt{}}
	d := &DB{snapshot: snapshot{q: readers}, read: readers, writer: newWriter(single), recorded: make(chan struct{}, 1)}
	d.LimitConnections(DefaultConnections)
	// The first connection to write creates the file and turns on its WAL.
	if err := errors.Join(single.PingContext(ctx), readers.PingContext(ctx)); err != nil {
		return nil, errors.Join(fmt.Errorf("opening %s: %w", path, err), d.Close())
	}
	return d, nil
}

// sqliteConnector is a driver.Connector for SQLite's file.
type sqliteConnector struct {
	driver *sqlite3.SQLiteDriver
	name   string
}

// newSQLiteConnector returns the connector for the file at path. Its transactions begin with lock, and its
// connections have the settings of all and more, which is SQL. database/sql uses a connection from
// one goroutine at a time, so SQLite need not lock it (SQLITE_OPEN_NOMUTEX).
func newSQLiteConnector(path, lock, more string) *sqliteConnector {
	name := url.URL{Scheme: "file", Opaque: (&url.URL{Path: path}).EscapedPath(), RawQuery: "_mutex=no&_txlock=" + lock}
	return &sqliteConnector{name: name.String(), driver: &sqlite3.SQLiteDriver{ConnectHook: func(c *sqlite3.SQLiteConn) error {
		_, err := c.Exec(sqliteSettings+more, nil)
		return err
	}}}
}

// Connect implements driver.Connector.
func (f *sqliteConnector) Connect(context.Context) (driver.Conn, error) {
	c, err := f.driver.Open(f.name)
	if err != nil {
		return nil, err
	}
	return &sqliteConn{SQLiteConn: c.(*sqlite3.SQLiteConn)}, nil
}

// Driver implements driver.Connector.
func (f *sqliteConnector) Driver() driver.Driver { return f.driver }

// sqliteConn has parameters counted as PostgreSQL counts them: $2 is the second argument. In
// SQLite that is a name, the argument of which is given by where it first appears, and ?2 is
// the second (https://sqlite.org/lang_expr.html#varparam).
type sqliteConn struct {
	*sqlite3.SQLiteConn
	inside bool // a transaction that was begun
}

var parameter = regexp.MustCompile(`\$([0-9])`)

func counted(statement string) string { return parameter.ReplaceAllString(statement, "?$1") }

var errRolledBack = errors.New("SQLite has rolled the transaction back by itself")

// rolledBack refuses what comes in a transaction that SQLite has rolled back by itself, as it may
// when its storage fails (https://sqlite.org/lang_transaction.html): each statement would be
// committed on its own.
func (c *sqliteConn) rolledBack() error {
	if c.inside && c.AutoCommit() {
		return errRolledBack
	}
	return nil
}

func (c *sqliteConn) BeginTx(ctx context.Context, options driver.TxOptions) (driver.Tx, error) {
	tx, err := c.SQLiteConn.BeginTx(ctx, options)
	if c.inside = err == nil; !c.inside {
		return nil, err
	}
	return sqliteTx{c, tx}, nil
}

func (c *sqliteConn) PrepareContext(ctx context.Context, statement string) (driver.Stmt, error) {
	s, err := c.SQLiteConn.PrepareContext(ctx, counted(statement))
	if err != nil {
		return nil, err
	}
	return sqliteStmt{s.(*sqlite3.SQLiteStmt), c}, nil
}

func (c *sqliteConn) ExecContext(ctx context.Context, statement string, args []driver.NamedValue) (driver.Result, error) {
	if err := c.rolledBack(); err != nil {
		return nil, err
	}
	return c.SQLiteConn.ExecContext(ctx, counted(statement), args)
}

func (c *sqliteConn) QueryContext(ctx context.Context, statement string, args []driver.NamedValue) (driver.Rows, error) {
	if err := c.rolledBack(); err != nil {
		return nil, err
	}
	return c.SQLiteConn.QueryContext(ctx, counted(statement), args)
}

type sqliteStmt struct {
	*sqlite3.SQLiteStmt
	conn *sqliteConn
}

func (s sqliteStmt) ExecContext(ctx context.Context, args []driver.NamedValue) (driver.Result, error) {
	if err := s.conn.rolledBack(); err != nil {
		return nil, err
	}
	return s.SQLiteStmt.ExecContext(ctx, args)
}

func (s sqliteStmt) QueryContext(ctx context.Context, args []driver.NamedValue) (driver.Rows, error) {
	if err := s.conn.rolledBack(); err != nil {
		return nil, err
	}
	return s.SQLiteStmt.QueryContext(ctx, args)
}

type sqliteTx struct {
	conn *sqliteConn
	tx   driver.Tx
}

func (t sqliteTx) Commit() error {
	err := t.conn.rolledBack()
	t.conn.inside = false
	if err != nil {
		return err
	}
	return t.tx.Commit()
}

// Rollback does nothing if SQLite has done it.
func (t sqliteTx) Rollback() error {
	err := t.conn.rolledBack()
	t.conn.inside = false
	if err != nil {
		return nil
	}
	return t.tx.Rollback()
}

// fileFailure reports whether SQLite found its file, or the disk, unfit for a write.
func fileFailure(err error) bool {
	failure, ok := errors.AsType[sqlite3.Error](err)
	if !ok {
		return false
	}
	switch failure.Code {
	case sqlite3.ErrFull, sqlite3.ErrIoErr, sqlite3.ErrReadonly, sqlite3.ErrCantOpen:
		return true
	}
	return false
}
