package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
)

// SystemEventsStatement is what SystemEvents asks the database.
var SystemEventsStatement = systemEvents

// WrappedKeysAfter is what SealedAfter asks the database about deliveries.
const WrappedKeysAfter = wrappedKeysAfter

// LimitWrites sets how long SQLite's writer begins further changes of a batch.
// It must be called while nothing writes.
func (d *DB) LimitWrites(limit time.Duration) { d.writer.limit = limit }

// Backdate has an event be of another time: PostgreSQL's clock dates them.
func (d *DB) Backdate(ctx context.Context, eventID string, at time.Time) error {
	return d.transact(ctx, func(ctx context.Context, tx *txn) error {
		return one(exec(ctx, tx, "UPDATE events SET occurred_at = $2 WHERE id = $1", eventID, at.UnixMicro()))
	})
}

// LastBatch is how many changes shared the last commit of SQLite's writer. It must be
// called while nothing writes.
func (d *DB) LastBatch() int { return d.writer.last.changes }

// Waiting is how many changes wait for SQLite's writer.
func (d *DB) Waiting() int { return len(d.writer.queue) }

// Prepared is how many statements SQLite's writer keeps, while nothing writes.
func (d *DB) Prepared() int { return len(d.writer.prepared) }

// ReadersPrepared is how many statements SQLite's readers keep.
func (d *DB) ReadersPrepared() int { return len(d.read.prepared) }

// HolderIdle is how long a holder may be silent.
const HolderIdle = holderIdle

// Hold takes the lock name as a sequencer or feeder does, and is then silent,
// as one that is stopped.
func (d *DB) Hold(ctx context.Context, name string) (*sql.Tx, error) {
	tx, err := d.read.BeginTx(ctx, nil)
	if err != nil {
		return nil, err
	}
	mine, err := d.tryLock(ctx, &txn{Tx: tx}, name, holderIdle)
	if err == nil && !mine {
		err = errors.New("another has it")
	}
	return tx, err
}

// BeginAndLock takes a lock in a transaction and is then silent, as a process
// that is stopped.
func (d *DB) BeginAndLock(ctx context.Context, name string) (*sql.Tx, error) {
	tx, err := d.read.BeginTx(ctx, nil)
	if err != nil {
		return nil, err
	}
	return tx, d.lock(ctx, &txn{Tx: tx}, name)
}

// SessionSetting is a setting of a session as it is.
func (d *DB) SessionSetting(ctx context.Context, name string) (value string, err error) {
	err = d.read.QueryRowContext(ctx, "SELECT current_setting($1)", name).Scan(&value)
	return value, err
}

// Execute runs a statement on any connection, in no transaction of this package.
func (d *DB) Execute(ctx context.Context, statement string) error {
	_, err := d.read.ExecContext(ctx, statement)
	return err
}

// Stall has SQLite's writer do nothing until leave is called: what is written meanwhile shares a batch.
func (d *DB) Stall(ctx context.Context) (leave func() error) {
	entered, left, result := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		result <- d.transact(ctx, func(context.Context, *txn) error { close(entered); <-left; return nil })
	}()
	<-entered
	return func() error { close(left); return <-result }
}

// Change makes a change of SQLite's of the statements that do executes.
func (d *DB) Change(ctx context.Context, do func(execute func(statement string) error) error) error {
	return d.transact(ctx, func(ctx context.Context, tx *txn) error {
		return do(func(statement string) error {
			_, err := exec(ctx, tx, statement)
			return err
		})
	})
}

// FirstIndexFails has a statement fail when a batch of many events asks for its first index.
func (d *DB) FirstIndexFails(statement string) {
	failing := *d.writer.indices.Load()
	failing.first = func(ctx context.Context, tx *txn) (int64, bool, error) {
		_, err := exec(ctx, tx, statement)
		return 0, false, err
	}
	d.writer.indices.Store(&failing)
}

// AnswerTimeout is how long requests wait for the database.
const AnswerTimeout = answerTimeout

// ReceiptsWhile is Receipts with something that happens behind its first statement.
func (d *DB) ReceiptsWhile(ctx context.Context, sink string, from, to int64, happens func()) ([]audit.Receipt, error) {
	return snapshot{&interrupted{d.read, happens, 0}, d.snapshot.archive}.Receipts(ctx, sink, from, to)
}

type interrupted struct {
	reader
	happens    func()
	statements int
}

func (i *interrupted) next() {
	if i.statements++; i.statements == 2 {
		i.happens()
	}
}

func (i *interrupted) QueryContext(ctx context.Context, text string, args ...any) (*sql.Rows, error) {
	i.next()
	return i.reader.QueryContext(ctx, text, args...)
}

func (i *interrupted) QueryRowContext(ctx context.Context, text string, args ...any) *sql.Row {
	i.next()
	return i.reader.QueryRowContext(ctx, text, args...)
}

// Pragma is what a setting of SQLite is on a connection that writes, or on one that reads.
func (d *DB) Pragma(ctx context.Context, name string, writes bool) (value string, err error) {
	var on interface {
		QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
	} = d.read
	if writes {
		on = d.writer.db
	}
	err = on.QueryRowContext(ctx, "PRAGMA "+name).Scan(&value)
	return value, err
}

// StorageFailure reports whether err says that the storage failed.
var StorageFailure = storageFailure

// PackPersons and UnpackPersons are the form of archived personal parts.
var (
	PackPersons   = packPersons
	UnpackPersons = unpackPersons
)
