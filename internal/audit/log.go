// Package audit is the running audit log: events in a Merkle log
// (RFC 6962 hashing, as golang.org/x/mod/sumdb/tlog stores it), copied to sinks outside the database, and verifiable offline.
//
// An event's row is committed in the transaction of the change it describes.
// A sequencer, one at a time across all replicas, then gives rows their index
// and appends their leaves to the tree in batches, so writers never queue
// behind the tree's head. (On SQLite, which has one writer anyhow, an event that
// somebody waits for, or that comes with many, gets its index in its own transaction: see Store.AtOnce.) Each sink is fed from its own last
// checkpoint on: at least once, in order, keyed by index. An operation that must
// not happen before the log and its sinks have its event waits in
// Log.Acknowledged.
package audit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// Intervals, batch sizes, deadlines.
const (
	linger        = 200 * time.Millisecond // recorded events wait this long to form a batch, unless a caller waits for one
	poll          = 250 * time.Millisecond // how often the progress of other replicas is read
	waiting       = 25 * time.Millisecond  // the same, while a caller waits for it
	sequenceBatch = 5000                   // events that get their indices in one transaction
	sinkBatch     = 1000                   // events in one call to a sink
	fewestOfSink  = 100                    // the same, while larger calls take too long: what Vault signs in one request
	sinkDeadline  = 10 * time.Second       // for one call to a sink
	sinkBackoff   = 2 * time.Second        // longest pause before a failing sink is tried again
)

// Entry is an event with its index.
type Entry struct {
	Index int64
	Leaf  []byte // verbatim, as Event.Encode made it
}

// Store keeps events and tree. Its implementation is sqlstore.
type Store interface {
	// Record makes events durable in a transaction of their own.
	Record(ctx context.Context, events ...Event) error
	// Recorded receives a value after events were committed in this process.
	Recorded() <-chan struct{}
	// Sequence gives the next indices to at most limit events that have none,
	// and extends the tree by them, in one transaction. It returns how many.
	// While another process
	// does so, it returns 0. Events whose MAC is wrong are set aside, once, and
	// reported by an *UnauthenticatedError besides the number. Without the
	// condition no event gets an index: it reports *TimelineError or
	// *RollbackError, or *HaltError because of another replica's sinks.
	Sequence(ctx context.Context, limit int, only Condition) (int, error)
	// AtOnce has transactions whose event somebody will wait for give their indices to
	// it and to at most limit events that wait, where that spares a commit, and
	// transactions with many events to these, if the
	// condition that only returns is met; grown is told the log's size after a
	// commit with an event that somebody will wait for. It holds until end is called. Sequence does what they leave.
	AtOnce(limit int, only func(context.Context) (Condition, error), grown func(size int64)) (end func())
	// Timeline identifies the database's history: it is another one after a
	// failover or a restored backup (PostgreSQL's timeline ID). It is empty if the
	// database has none.
	Timeline(ctx context.Context) (string, error)
	// SinkAhead records, for all replicas, that the log does not extend the size
	// events in a sink of this replica; SinkFits records that it does.
	SinkAhead(ctx context.Context, sink string, size int64) error
	SinkFits(ctx context.Context, sink string) error
	// Head returns the log's present checkpoint.
	Head(ctx context.Context) (Checkpoint, error)
	// At returns the checkpoint that the log had at an earlier size.
	At(ctx context.Context, size int64) (Checkpoint, error)
	// Durable returns at most limit entries behind held, and the checkpoint that
	// covers them, none of
	// which a failover can lose unless the database is replicated asynchronously. It reports *RollbackError, without the sink's
	// name, unless the log extends held.
	Durable(ctx context.Context, held Checkpoint, limit int) ([]Entry, Checkpoint, error)
	// Exclusive runs do while no other process runs one of the same name. It
	// returns false at once if another does. do's context ends if the process
	// loses the lock, for example because it was stopped.
	Exclusive(ctx context.Context, name string, do func(context.Context) error) (bool, error)
	// SinkNext returns the first index that a shared sink has not acknowledged,
	// as Acknowledge last noted it.
	SinkNext(ctx context.Context, sink string) (int64, error)
	// Acknowledge notes that a shared sink has acknowledged the entries before
	// next, and keeps its receipts for the last of them, if it gives any.
	Acknowledge(ctx context.Context, sink string, next int64, receipts [][]byte) error
	// SignedAfter returns the signed checkpoints behind place seq, oldest first.
	SignedAfter(ctx context.Context, seq int64) ([]Signed, error)
	// Index returns an event's index, or false while it has none.
	Index(ctx context.Context, eventID string) (int64, bool, error)
}

// Log is the audit log of one process. Run sequences events and feeds the sinks.
type Log struct {
	store     Store
	followers []*follower
	log       *slog.Logger
	urgent    chan struct{} // a caller waits: do not collect a batch
	sequenced chan struct{} // Store.AtOnce has given indices: nothing waits
	deadline  time.Duration // for one call to a sink
	signed    atomic.Int64  // the place of the newest signed checkpoint, for the sinks
	size      atomic.Int64  // of the log, as far as this process has noticed

	growth growth
	grown  broadcast // the log has grown, or a signed checkpoint has come
	acted  broadcast // a sink has acknowledged something, or failed
}

// broadcast wakes all goroutines that wait for it.
type broadcast struct {
	mu   sync.Mutex
	next chan struct{}
}

func newBroadcast() broadcast { return broadcast{next: make(chan struct{})} }

// wait returns a channel that the next send closes.
func (b *broadcast) wait() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.next
}

func (b *broadcast) send() {
	b.mu.Lock()
	defer b.mu.Unlock()
	close(b.next)
	b.next = make(chan struct{})
}

// NewLog returns a log over store. Every sink is a required one.
func NewLog(store Store, log *slog.Logger, sinks ...Sink) *Log {
	l := &Log{store: store, log: log, deadline: sinkDeadline, urgent: make(chan struct{}, 1), sequenced: make(chan struct{}, 1), grown: newBroadcast(), acted: newBroadcast()}
	for _, s := range sinks {
		l.followers = append(l.followers, &follower{log: l, sink: s, call: make(chan struct{}, 1), err: errNotStarted, batch: sinkBatch})
	}
	return l
}

var (
	errNotStarted = errors.New("not started yet")
	errNotYet     = errors.New("it has not acknowledged the event yet")
)

// Record makes events durable; they get their indices shortly after.
func (l *Log) Record(ctx context.Context, events ...Event) error {
	return l.store.Record(ctx, events...)
}

// Acknowledged waits until the event has its index in the log and every sink
// has acknowledged it, or ctx ends.
func (l *Log) Acknowledged(ctx context.Context, eventID string) error {
	for {
		index, err := l.indexed(ctx, eventID)
		if err != nil {
			return err
		}
		l.grewTo(index + 1)
		if err := l.acknowledged(ctx, eventID, index); err != nil {
			return err
		}
		// A failover in between may have lost the index and given it to another event.
		if again, known, err := l.store.Index(ctx, eventID); err != nil || known && again == index {
			return err
		}
	}
}

// acknowledged waits until every sink has acknowledged the entry with the
// event's index.
func (l *Log) acknowledged(ctx context.Context, eventID string, index int64) error {
	for {
		acted := l.acted.wait()
		if l.sinksPast(index) {
			return nil
		}
		select {
		case <-acted:
		case <-time.After(waiting):
			l.grown.send() // another replica may feed a sink: let the followers read its progress
		case <-ctx.Done():
			return fmt.Errorf("waiting for event %s: %w", eventID, errors.Join(ctx.Err(), l.sinkErrors(index)))
		}
	}
}

// indexed waits until the event has its index in the log.
func (l *Log) indexed(ctx context.Context, eventID string) (int64, error) {
	for {
		grown := l.grown.wait()
		index, known, err := l.store.Index(ctx, eventID)
		if err != nil {
			return 0, fmt.Errorf("looking for event %s in the log: %w", eventID, err)
		}
		if known {
			return index, nil
		}
		l.hurry()
		select {
		case <-grown:
		case <-time.After(waiting):
		case <-ctx.Done():
			return 0, fmt.Errorf("waiting for the index of event %s in the log: %w", eventID, ctx.Err())
		}
	}
}

func (l *Log) hurry() {
	select {
	case l.urgent <- struct{}{}:
	default:
	}
}

// grewTo wakes the waiters if the log has grown to size events.
func (l *Log) grewTo(size int64) {
	for known := l.size.Load(); size > known; known = l.size.Load() {
		if l.size.CompareAndSwap(known, size) {
			l.grown.send()
			return
		}
	}
}

// offer tells the followers of signed checkpoints up to number seq.
func (l *Log) offer(seq int64) {
	if seq > l.signed.Swap(seq) {
		l.grown.send()
	}
}

// Flush gives every recorded event its index and waits until the sinks have
// them all, and every signed checkpoint, or ctx ends. Run must be running.
func (l *Log) Flush(ctx context.Context) error {
	for {
		n, err := l.advance(ctx)
		if n > 0 {
			continue
		}
		if passing(err) && ctx.Err() == nil {
			pause(ctx, waiting)
			continue
		}
		if err != nil {
			return fmt.Errorf("giving the last events their indices: %w", err)
		}
		break
	}
	head, err := l.store.Head(ctx)
	if err != nil {
		return err
	}
	l.grewTo(head.Size)
	for {
		acted := l.acted.wait()
		if l.sinksPast(head.Size-1) && l.sinksSigned() {
			return nil
		}
		select {
		case <-acted:
		case <-ctx.Done():
			return fmt.Errorf("waiting for the sinks: %w", errors.Join(ctx.Err(), l.sinkErrors(head.Size-1)))
		}
	}
}

func (l *Log) sinksPast(index int64) bool {
	for _, f := range l.followers {
		if held, err := f.state(); err != nil || held.Size <= index {
			return false
		}
	}
	return true
}

// sinksSigned reports whether every sink has recorded the newest signed checkpoint.
func (l *Log) sinksSigned() bool {
	newest := l.signed.Load()
	for _, f := range l.followers {
		if f.signed.Load() < newest {
			return false
		}
	}
	return true
}

// sinkErrors says why each sink that has not acknowledged the event has not.
func (l *Log) sinkErrors(index int64) error {
	var all []error
	for _, f := range l.followers {
		held, err := f.state()
		if err == nil && held.Size <= index {
			err = errNotYet
		}
		if err != nil {
			all = append(all, fmt.Errorf("sink %s: %w", f.sink.Name(), err))
		}
	}
	return errors.Join(all...)
}

// SinkStatus is the progress of a sink.
type SinkStatus struct {
	Name string
	Next int64      // the first index it has not acknowledged
	Held Checkpoint // of what it has acknowledged, as it was then
	Err  error      // why it is not going on, nil while it does

	CaughtUp time.Time // when it last held the whole log; zero: never since the start
}

// Sinks returns the state of each sink.
func (l *Log) Sinks() []SinkStatus {
	all := make([]SinkStatus, len(l.followers))
	for i, f := range l.followers {
		f.mu.Lock()
		all[i] = SinkStatus{f.sink.Name(), f.held.Size, f.held, f.err, f.caughtUp}
		f.mu.Unlock()
	}
	return all
}

// CheckExtends reports *RollbackError if a sink holds a checkpoint that the
// log does not extend, and any other error if that could not be found out.
func (l *Log) CheckExtends(ctx context.Context) error {
	for _, f := range l.followers {
		if _, err := f.resume(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Run sequences events and feeds the sinks until ctx ends.
func (l *Log) Run(ctx context.Context) error {
	defer l.store.AtOnce(sinkBatch, l.condition, func(size int64) {
		l.grewTo(size)
		select {
		case l.sequenced <- struct{}{}:
		default:
		}
	})()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { l.sequence(ctx); return nil })
	for _, f := range l.followers {
		g.Go(func() error { f.run(ctx); return nil })
	}
	return g.Wait()
}

func (l *Log) sequence(ctx context.Context) {
	for ctx.Err() == nil {
		n, err := l.advance(ctx)
		if err == nil { // also of those that got theirs as they were inserted
			err = l.announce(ctx)
		}
		if err != nil && ctx.Err() == nil {
			if l.halt(err) && !passing(err) {
				l.log.Warn("giving events their indices in the log", "error", err)
			}
			pause(ctx, poll)
		}
		if err == nil {
			l.halt(nil)
		}
		if n < sequenceBatch {
			l.await(ctx)
		}
	}
}

// advance gives a batch of events their indices, and returns how many it has
// processed.
func (l *Log) advance(ctx context.Context) (int, error) {
	only, err := l.condition(ctx)
	if err != nil {
		return 0, err
	}
	n, err := l.store.Sequence(ctx, sequenceBatch, only)
	if moved, ok := errors.AsType[*TimelineError](err); ok {
		l.moveTo(moved.Timeline)
	}
	if forged, ok := errors.AsType[*UnauthenticatedError](err); ok {
		l.log.Error("another program writes to the database", "error", err)
		return n + forged.Count, nil
	}
	return n, err
}

// announce tells the waiters how large the log is.
func (l *Log) announce(ctx context.Context) error {
	head, err := l.store.Head(ctx)
	if err == nil {
		l.grewTo(head.Size)
	}
	return err
}

// await returns when there may be something to sequence.
func (l *Log) await(ctx context.Context) {
	recorded, over := l.store.Recorded(), time.After(poll)
	for {
		select {
		case <-l.urgent:
			return
		case <-over:
			return
		case <-ctx.Done():
			return
		case <-recorded:
			recorded, over = nil, time.After(linger)
		case <-l.sequenced: // what comes is another batch
			recorded, over = l.store.Recorded(), time.After(poll)
		}
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
