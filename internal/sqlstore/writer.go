package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"sync"
	"time"
)

// writer is SQLite's one writing connection.
type writer struct {
	db    *sql.DB
	limit time.Duration // after which no further change of a batch is begun
	queue chan *change
	quit  sync.RWMutex // held for reading while a change is put into the queue
	done  chan struct{}
	ended bool

	conn     *sql.Conn // nil until the first change, and after the connection failed
	prepared map[string]*sql.Stmt
}

type change struct {
	ctx    context.Context
	do     func(context.Context, *txn) error
	result chan error
	err    error
}

var (
	errClosed = errors.New("the database is closed")
	errSlow   = errors.New("the database took too long over what came before")
)

func newWriter(db *sql.DB) *writer {
	w := &writer{db: db, limit: statementTimeout, queue: make(chan *change, batchSize), done: make(chan struct{})}
	go w.run()
	return w
}

func (w *writer) write(ctx context.Context, do func(context.Context, *txn) error) error {
	c := &change{ctx: ctx, do: do, result: make(chan error, 1)}
	if err := w.enqueue(c); err != nil {
		return err
	}
	select {
	case err := <-c.result:
		return err
	case <-ctx.Done():
		return unavailable(ctx.Err())
	}
}

func (w *writer) enqueue(c *change) error {
	w.quit.RLock()
	defer w.quit.RUnlock()
	if w.ended {
		return unavailable(errClosed)
	}
	select {
	case w.queue <- c:
		return nil
	case <-c.ctx.Done():
		return unavailable(c.ctx.Err())
	}
}

func (w *writer) close() error {
	w.quit.Lock()
	if !w.ended {
		w.ended = true
		close(w.queue)
	}
	w.quit.Unlock()
	<-w.done
	return errors.Join(w.forget(), w.db.Close())
}

// begin starts a transaction on the one connection. No context ends it:
// database/sql would roll it back behind the writer's back, and what the
// writer still does on the connection would be committed statement by statement.
func (w *writer) begin() (*txn, error) {
	ctx := context.Background()
	if w.conn == nil {
		conn, err := w.db.Conn(ctx)
		if err != nil {
			return nil, err
		}
		w.conn, w.prepared = conn, map[string]*sql.Stmt{}
	}
	tx, err := w.conn.BeginTx(ctx, nil)
	if err != nil {
		return nil, errors.Join(err, w.forget())
	}
	return &txn{Tx: tx, writer: w}, nil
}

// forget gives the connection back, and with it what was prepared on it.
func (w *writer) forget() error {
	if w.conn == nil {
		return nil
	}
	var errs []error
	for _, s := range w.prepared {
		errs = append(errs, s.Close()) // the connection would stay open for it
	}
	conn := w.conn
	w.conn, w.prepared = nil, nil
	return errors.Join(append(errs, conn.Close())...)
}

// statement prepares each statement once: parsing was a third of the writer's time.
func (w *writer) statement(ctx context.Context, text string) (*sql.Stmt, error) {
	if s := w.prepared[text]; s != nil {
		return s, nil
	}
	s, err := w.conn.PrepareContext(ctx, text)
	if err == nil {
		w.prepared[text] = s
	}
	return s, err
}

// txn is a transaction. SQLite's uses the writer's prepared statements; pgx
// keeps its own.
type txn struct {
	*sql.Tx
	writer    *writer // SQLite only
	recorded  bool    // whether events are in it
	unhurried bool    // others follow them within the second, and nobody waits for these
}

func (t *txn) ExecContext(ctx context.Context, text string, args ...any) (sql.Result, error) {
	if t.writer == nil {
		return t.Tx.ExecContext(ctx, text, args...)
	}
	s, err := t.writer.statement(ctx, text)
	if err != nil {
		return nil, err
	}
	return s.ExecContext(ctx, args...)
}

func (t *txn) QueryContext(ctx context.Context, text string, args ...any) (*sql.Rows, error) {
	if t.writer == nil {
		return t.Tx.QueryContext(ctx, text, args...)
	}
	s, err := t.writer.statement(ctx, text)
	if err != nil {
		return nil, err
	}
	return s.QueryContext(ctx, args...)
}

func (t *txn) QueryRowContext(ctx context.Context, text string, args ...any) *sql.Row {
	if t.writer != nil {
		if s, err := t.writer.statement(ctx, text); err == nil {
			return s.QueryRowContext(ctx, args...)
		}
	}
	return t.Tx.QueryRowContext(ctx, text, args...) // and so the row says what is wrong
}

func (w *writer) run() {
	defer close(w.done)
	for first := range w.queue {
		batch := w.collect(first)
		err := w.commit(batch)
		for _, c := range batch {
			if c.err == nil {
				c.err = err
			}
			c.result <- c.err
		}
	}
}

// collect takes the waiting changes; it never waits for more.
func (w *writer) collect(first *change) []*change {
	batch := []*change{first}
	for len(batch) < batchSize {
		select {
		case c, ok := <-w.queue:
			if !ok {
				return batch
			}
			batch = append(batch, c)
		default:
			return batch
		}
	}
	return batch
}

// commit runs a batch in one transaction. Only a change that
// fails is undone; a single change needs no savepoint for that. An error that commit
// returns is the error of all changes. A change that has begun is finished, however long
// that takes; changes after it are refused then.
func (w *writer) commit(batch []*change) error {
	started := time.Now()
	tx, err := w.begin()
	if err != nil {
		return unavailable(err)
	}
	for _, c := range batch {
		if c.err = c.ctx.Err(); c.err != nil {
			continue // its caller has given up
		}
		if time.Since(started) > w.limit {
			c.err = unavailable(errSlow)
			continue
		}
		// SQLite would roll back the whole transaction if a caller that leaves
		// interrupted one of its statements.
		ctx := context.WithoutCancel(c.ctx)
		if len(batch) == 1 {
			if c.err = c.do(ctx, tx); c.err != nil {
				return ignoreDone(tx.Rollback())
			}
			break
		}
		if err := apply(ctx, tx, c); err != nil {
			return errors.Join(unavailable(err), ignoreDone(tx.Rollback()))
		}
	}
	return unavailable(tx.Commit())
}

func apply(ctx context.Context, tx *txn, c *change) error {
	if _, err := tx.ExecContext(ctx, "SAVEPOINT change"); err != nil {
		return err
	}
	if c.err = c.do(ctx, tx); c.err != nil {
		if _, err := tx.ExecContext(ctx, "ROLLBACK TO change"); err != nil {
			return err
		}
	}
	_, err := tx.ExecContext(ctx, "RELEASE change")
	return err
}
