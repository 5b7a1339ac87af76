package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/orgkeys/orgkeys/internal/panics"
)

// writer is SQLite's one writing connection.
type writer struct {
	db    *sql.DB
	limit time.Duration // after which no further change of a batch is begun
	queue chan *change
	quit  sync.RWMutex // held for reading while a change is put into the queue
	done  chan struct{}
	ended bool
	aside chan struct{} // closed when checkpoints have ended
	due   chan struct{} // holds an element while a checkpoint is due

	indices atomic.Pointer[indices]   // of events that are awaited; nil: only the sequencer gives them
	given   *lru.Cache[string, int64] // the indices given last, by event ID
	last    batch                     // that was committed
	commits int
	careful int // commits for which each change gets a savepoint, because one failed

	conn     *sql.Conn // nil until the first change, and after the connection failed
	prepared map[string]*sql.Stmt
}

// batch is how many changes shared a commit, and how long that took.
type batch struct {
	changes int
	took    time.Duration
}

// indices gives the events that wait for them their indices, in the transaction of
// the newest of them.
type indices struct {
	give   func(context.Context, *txn) error
	first  func(context.Context, *txn) (int64, bool, error) // see growing
	settle func(context.Context, *txn) error
	grown  func(size int64) // told of the log's size after a commit with an event that is awaited
}

// placed is an event that got its index in a transaction.
type placed struct {
	id    string
	index int64
}

type change struct {
	ctx    context.Context
	do     func(context.Context, *txn) error
	result chan error
	err    error
	bug    *panics.Elsewhere // that do panicked with
}

// run does the change. A panic is undone as a failure is, and its caller's: here it would end
// the process.
func (c *change) run(ctx context.Context, tx *txn) (err error) {
	defer func() {
		if v := recover(); v != nil {
			bug := panics.Moved(v)
			c.bug, err = &bug, panics.ErrBug
		}
	}()
	return c.do(ctx, tx)
}

var (
	errClosed = errors.New("the database is closed")
	errSlow   = errors.New("the database took too long over what came before")
)

// indicesKept is how many indices are remembered: whoever waits for one asks soon.
const indicesKept = 1 << 13

func newWriter(db *sql.DB) *writer {
	given, err := lru.New[string, int64](indicesKept)
	if err != nil {
		panic(fmt.Sprint("sqlstore: ", err)) // it refuses negative sizes only
	}
	w := &writer{
		db: db, limit: statementTimeout, queue: make(chan *change, batchSize), done: make(chan struct{}), given: given,
		aside: make(chan struct{}), due: make(chan struct{}, 1),
	}
	go w.run()
	go w.checkpoint()
	return w
}

const (
	checkpointAfter = 50   // commits, which are some 1,000 pages of the write-ahead log
	mostPages       = 8192 // of it, 32 MiB, at which a commit makes a checkpoint itself
)

// checkpoint moves what the write-ahead log holds into the database's file beside the
// commits: one that did it itself would keep all that wait for it waiting for the
// disk. A log that was not moved as a whole, because commits go on, grows. From mostPages
// on a commit moves the rest, which is little then, and the next one begins the log anew.
func (w *writer) checkpoint() {
	defer close(w.aside)
	for range w.due {
		_, _ = w.db.ExecContext(context.Background(), "PRAGMA wal_checkpoint(PASSIVE)") // or the next one, or a commit
	}
}

func (w *writer) write(ctx context.Context, do func(context.Context, *txn) error) error {
	c := &change{ctx: ctx, do: do, result: make(chan error, 1)}
	if err := w.enqueue(c); err != nil {
		return err
	}
	select {
	case err := <-c.result:
		if c.bug != nil && errors.Is(err, panics.ErrBug) {
			panic(*c.bug)
		}
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
	<-w.aside
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
	awaited   bool    // somebody waits until the sinks have them
	placed    []placed
	growing   *growing // nil: events get their indices later
}

// SQLite's statements are not interrupted, see commit; for a context that may end, the
// driver would start goroutines for each.
func (t *txn) ExecContext(ctx context.Context, text string, args ...any) (sql.Result, error) {
	if t.writer == nil {
		return t.Tx.ExecContext(ctx, text, args...)
	}
	ctx = context.WithoutCancel(ctx)
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
	ctx = context.WithoutCancel(ctx)
	s, err := t.writer.statement(ctx, text)
	if err != nil {
		return nil, err
	}
	return s.QueryContext(ctx, args...)
}

func (t *txn) QueryRowContext(ctx context.Context, text string, args ...any) *sql.Row {
	if t.writer != nil {
		ctx = context.WithoutCancel(ctx)
		if s, err := t.writer.statement(ctx, text); err == nil {
			return s.QueryRowContext(ctx, args...)
		}
	}
	return t.Tx.QueryRowContext(ctx, text, args...) // and so the row says what is wrong
}

func (w *writer) run() {
	defer close(w.due)
	defer close(w.done)
	for first := range w.queue {
		changes := w.collect(first)
		started := time.Now()
		err := w.commit(changes)
		w.last = batch{len(changes), time.Since(started)}
		for _, c := range changes {
			if c.err == nil {
				c.err = err
			}
			c.result <- c.err
		}
	}
}

// mostGathering is how long a change waits at most for others to share its commit.
const mostGathering = 2 * time.Millisecond

// collect takes the waiting changes. If several shared the last commit it waits
// for as many, since their callers are likely to be back, but for no longer than
// that commit took: what a commit costs is shared by all that are in it.
// A change that comes alone never waits for a second.
func (w *writer) collect(first *change) []*change {
	all := []*change{first}
	var over <-chan time.Time
	for len(all) < batchSize {
		select {
		case c, ok := <-w.queue:
			if !ok {
				return all
			}
			all = append(all, c)
			continue
		default:
		}
		if len(all) >= w.last.changes {
			return all
		}
		if over == nil {
			timer := time.NewTimer(min(w.last.took, mostGathering))
			defer timer.Stop()
			over = timer.C
		}
		select {
		case c, ok := <-w.queue:
			if !ok {
				return all
			}
			all = append(all, c)
		case <-over:
			return all
		}
	}
	return all
}

// commit runs a batch in one transaction. Only a change that fails is undone. That takes a
// savepoint for each, for which SQLite copies every page that a change touches, so a batch
// has none at first: if a change fails, everything is undone, and done again with savepoints,
// as are the next commits. An error that commit
// returns is the error of all changes. A change that has begun is finished, however long
// that takes; changes after it are refused then.
func (w *writer) commit(batch []*change) error {
	started := time.Now()
	if w.careful > 0 {
		w.careful--
		return w.transact(batch, started, true)
	}
	err := w.transact(batch, started, false)
	if errors.Is(err, errUndone) {
		w.careful = carefulFor
		err = w.transact(batch, started, true)
	}
	return err
}

// carefulFor is for how many commits savepoints are used after a change failed, so that who makes
// changes that fail cannot have every batch done twice.
const carefulFor = 64

// errUndone: a change of a batch failed, and the batch was undone as a whole.
var errUndone = errors.New("a change failed")

// transact runs a batch in one transaction. If a change fails it reports errUndone, unless
// that change alone can be undone: each has a savepoint, or it is a single one.
func (w *writer) transact(batch []*change, started time.Time, savepoints bool) error {
	tx, err := w.begin()
	if err != nil {
		return unavailable(err)
	}
	indices := w.indices.Load()
	if indices != nil && !savepoints && len(batch) >= manyEvents {
		tx.growing = &growing{begin: indices.first}
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
		switch {
		case len(batch) == 1:
			if c.err = c.run(ctx, tx); c.err != nil {
				return ignoreDone(tx.Rollback())
			}
		case !savepoints:
			if c.err = c.run(ctx, tx); c.err != nil {
				return undone(tx)
			}
		default:
			if err := apply(ctx, tx, c); err != nil {
				return errors.Join(unavailable(err), ignoreDone(tx.Rollback()))
			}
		}
	}
	if tx.growing != nil {
		if err := indices.settle(context.Background(), tx); err != nil {
			return errors.Join(err, undone(tx))
		}
	} else if err := giveIndices(tx, indices); err != nil {
		return errors.Join(unavailable(err), ignoreDone(tx.Rollback()))
	}
	if err := tx.Commit(); err != nil {
		return unavailable(err)
	}
	if w.commits++; w.commits%checkpointAfter == 0 {
		select {
		case w.due <- struct{}{}:
		default:
		}
	}
	for _, p := range tx.placed {
		w.given.Add(p.id, p.index)
	}
	if indices != nil && tx.awaited && len(tx.placed) > 0 {
		indices.grown(tx.placed[len(tx.placed)-1].index + 1)
	}
	return nil
}

// undone undoes a batch as a whole.
func undone(tx *txn) error {
	if err := ignoreDone(tx.Rollback()); err != nil {
		return unavailable(err)
	}
	return errUndone
}

// manyEvents is how many changes a batch has at least whose events get their indices as they are
// inserted: that takes some statements for each batch, and spares one for each event.
const manyEvents = 4

// giveIndices gives the events of a batch their indices if somebody waits for that,
// which spares a commit of its own. If it cannot, the batch goes on without: the
// sequencer tries again, and says why.
func giveIndices(tx *txn, indices *indices) error {
	if indices == nil || !tx.awaited {
		return nil
	}
	c := &change{do: indices.give}
	if err := apply(context.Background(), tx, c); err != nil {
		return errors.Join(err, c.err)
	}
	return nil
}

// apply undoes the change if it fails. An error is all changes', whose transaction has failed.
func apply(ctx context.Context, tx *txn, c *change) error {
	if _, err := tx.ExecContext(ctx, "SAVEPOINT change"); err != nil {
		return err
	}
	before := len(tx.placed)
	if c.err = c.run(ctx, tx); c.err != nil {
		tx.placed = tx.placed[:before]
		if _, err := tx.ExecContext(ctx, "ROLLBACK TO change"); err != nil {
			return err
		}
	}
	_, err := tx.ExecContext(ctx, "RELEASE change")
	return err
}
