package audit

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// ErrCheckpointLost: the sink's checkpoint was deleted or overwritten. The sink
// starts over when an operator accepts that.
var ErrCheckpointLost = errors.New("the sink's checkpoint is lost")

// Sink stores a copy of the log where the database's administrator cannot change
// it. Its implementations are FileSink and vault.Sink.
type Sink interface {
	Name() string
	// Shared reports whether all replicas feed one and the same sink, so that
	// one of them at a time is enough.
	Shared() bool
	// Last returns the newest checkpoint that the sink still holds; Size 0 if
	// none, and ErrCheckpointLost if there was one. It is called before the first Append and after each failed one.
	Last(ctx context.Context) (Checkpoint, error)
	// Append makes entries durable, and c, which covers them and what came
	// before. The entries are consecutive, and may repeat what was appended. They
	// count as acknowledged when it returns; a shared sink may hold c earlier than
	// them. A shared sink that signs what it got returns a receipt for each entry.
	Append(ctx context.Context, entries []Entry, c Checkpoint) (receipts [][]byte, err error)
	// KeepSigned records a signed checkpoint, a C2SP signed note. It covers no
	// more than what the sink has acknowledged, and may be given again.
	KeepSigned(ctx context.Context, note string) error
	// AcceptRollback makes the sink start over, after an accepted rollback or a lost
	// checkpoint. The event about it follows like any other event of the log.
	AcceptRollback(ctx context.Context, r Rollback) error
}

// CheckHeld reports ErrCheckpointLost for a shared sink that holds no checkpoint,
// and has acknowledged the entries before next.
func CheckHeld(s Sink, held Checkpoint, next int64) error {
	if s.Shared() && held.Size == 0 && next > 0 {
		return fmt.Errorf("%w: sink %s holds none, and has acknowledged %d events", ErrCheckpointLost, s.Name(), next)
	}
	return nil
}

// RollbackError says that the log does not extend a sink's copy: events were lost
// or rewritten, for example by restoring an old backup.
type RollbackError struct {
	Sink string
	Held Checkpoint // the sink's
	Log  Checkpoint // the log's, at the smaller of both sizes
}

func (e *RollbackError) Error() string {
	if e.Held.Size > e.Log.Size {
		return fmt.Sprintf("the log holds %d events, but sink %s has acknowledged %d: events were lost", e.Log.Size, e.Sink, e.Held.Size)
	}
	return fmt.Sprintf("the log's first %d events differ from those that sink %s has acknowledged", e.Held.Size, e.Sink)
}

// SetBack reports whether err says that the log does not extend a sink's copy, here
// or on another replica, so that an operator has to accept the rollback.
func SetBack(err error) bool {
	halted, ok := errors.AsType[*HaltError](err)
	return ok && halted.SetBack || errors.As(err, new(*RollbackError)) || errors.Is(err, ErrCheckpointLost)
}

// follower feeds one sink.
type follower struct {
	log  *Log
	sink Sink

	batch  int           // events in the next call to the sink
	call   chan struct{} // holds an element while a call to the sink has not returned
	signed atomic.Int64  // the place of the newest signed checkpoint that the sink has recorded

	mu       sync.Mutex
	held     Checkpoint // what the sink has acknowledged, as it was then
	newest   Checkpoint // the newest checkpoint that it ever reported
	attended *string    // the database's timeline at its last report; nil: none yet
	err      error
	caughtUp time.Time // when it last held the whole log
	empty    bool      // it held nothing when it was asked last
}

func (f *follower) state() (Checkpoint, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.held, f.err
}

func (f *follower) set(held Checkpoint, err error) {
	f.mu.Lock()
	f.held, f.err = held, err
	f.mu.Unlock()
	f.log.acted.send()
}

// caught records that the sink holds the whole log.
func (f *follower) caught() {
	f.batch = sinkBatch
	f.mu.Lock()
	defer f.mu.Unlock()
	f.caughtUp = time.Now()
}

func (f *follower) run(ctx context.Context) {
	backoff := poll
	for ctx.Err() == nil {
		before, _ := f.state()
		err := f.follow(ctx)
		if ctx.Err() != nil {
			return
		}
		held, trouble := f.state()
		if held != before || trouble == nil { // it followed before it failed
			backoff = poll
		}
		f.set(held, err)
		f.log.log.Warn("an audit sink is behind", "sink", f.sink.Name(), "next", held.Size, "error", err)
		if err := f.log.HoldBack(ctx, err); err != nil {
			f.log.log.Warn("other replicas have not been told of it yet", "error", err)
		}
		pause(ctx, backoff)
		backoff = min(2*backoff, sinkBackoff)
	}
}

// follow resumes at the sink's position and continues until an error.
func (f *follower) follow(ctx context.Context) error {
	held, err := f.begin(ctx)
	if err != nil {
		return err
	}
	for {
		grown := f.log.grown.wait()
		timeline, err := f.log.timeline(ctx)
		if err == nil && !f.askedUnder(timeline) {
			held, err = f.begin(ctx)
		}
		if err != nil {
			return err
		}
		after, waits, err := f.step(ctx, held)
		if err != nil {
			return err
		}
		if err := f.keepSigned(ctx, after.Size); err != nil {
			return err
		}
		// The error is cleared only now: a sink that reports its position may
		// still refuse the next entries, from this replica as from the one that it waits for.
		if _, trouble := f.state(); after != held || trouble != nil && !waits {
			f.set(after, nil)
		}
		if after != held {
			held = after
			continue
		}
		if !waits {
			f.caught()
		}
		select {
		case <-grown:
		case <-time.After(poll):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// begin resumes at the sink's position, and allows new indices after it.
func (f *follower) begin(ctx context.Context) (Checkpoint, error) {
	held, err := f.resume(ctx)
	if err == nil {
		err = f.log.store.SinkFits(ctx, f.sink.Name())
	}
	if err == nil {
		f.log.hurry()
	}
	return held, err
}

// resume asks the sink for its position, and checks that the log extends it. Entries
// of a shared sink that were never recorded as acknowledged are sent again, so that
// their receipts are not missing.
func (f *follower) resume(ctx context.Context) (held Checkpoint, err error) {
	ctx, cancel := context.WithTimeout(ctx, f.log.deadline)
	defer cancel()
	timeline, err := f.log.timeline(ctx)
	if err != nil {
		return Checkpoint{}, err
	}
	var last Checkpoint // used by the call only, which may outlive this function
	if err := f.bounded(ctx, func() (err error) { last, err = f.sink.Last(ctx); return err }); err != nil {
		return Checkpoint{}, fmt.Errorf("asking sink %s for its last checkpoint: %w", f.sink.Name(), err)
	}
	held = last
	head, err := f.extended(ctx, held)
	if err != nil {
		return held, err
	}
	f.foundEmpty(held.Size == 0, head.Size)
	if f.sink.Shared() {
		next, err := f.log.store.SinkNext(ctx, f.sink.Name())
		if err == nil {
			err = CheckHeld(f.sink, held, next)
		}
		if err == nil && next < held.Size {
			held, err = f.log.store.At(ctx, next)
		}
		if err != nil {
			return held, err
		}
	}
	f.asked(timeline, last)
	return held, nil
}

// foundEmpty says once that a sink that is not new holds nothing, as after its file was
// removed: it is filled again, and nothing else tells of it.
func (f *follower) foundEmpty(empty bool, events int64) {
	f.mu.Lock()
	before := f.empty
	f.empty = empty
	f.mu.Unlock()
	if empty && !before && events > 0 && !f.sink.Shared() {
		f.log.log.Warn("an audit sink is empty although the log has events: it is filled from the log, and detects no rollback until then; if it is not new, find out who emptied it",
			"sink", f.sink.Name(), "events", events)
	}
}

// extended returns the log's head, and reports *RollbackError unless the log
// extends held.
func (f *follower) extended(ctx context.Context, held Checkpoint) (head Checkpoint, err error) {
	head, err = f.log.store.Head(ctx)
	if err != nil || held.Size == 0 || head == held {
		return head, err
	}
	if head.Size < held.Size {
		return head, &RollbackError{f.sink.Name(), held, head}
	}
	then, err := f.log.store.At(ctx, held.Size)
	if err == nil && then != held {
		err = &RollbackError{f.sink.Name(), held, then}
	}
	return head, err
}

// step feeds the sink from held on and returns its new position. It waits if another
// replica is at it, and has got no further yet. It checks again
// that the log extends held, as does Store.Durable: the log may have been rewritten since.
func (f *follower) step(ctx context.Context, held Checkpoint) (after Checkpoint, waits bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, f.log.deadline)
	defer cancel()
	head, err := f.log.store.Head(ctx)
	if err != nil || head == held {
		return held, false, err
	}
	if !f.sink.Shared() {
		after, _, err := f.appendFrom(ctx, held)
		return after, false, err
	}
	if _, err := f.extended(ctx, held); err != nil {
		return held, false, err
	}
	name, after := f.sink.Name(), held
	mine, err := f.log.store.Exclusive(ctx, "sink "+name, func(ctx context.Context) error {
		done, err := f.log.store.SinkNext(ctx, name)
		if err != nil || done > held.Size {
			return err
		}
		fed, receipts, err := f.appendFrom(ctx, held)
		if err != nil || fed == held {
			return err
		}
		after = fed
		return f.log.store.Acknowledge(ctx, name, fed.Size, receipts)
	})
	if err != nil {
		return held, false, err
	}
	if after != held {
		return after, false, nil
	}
	done, err := f.log.store.SinkNext(ctx, name) // what another replica has done
	if err != nil || done <= held.Size {
		return held, !mine, err
	}
	after, err = f.log.store.At(ctx, done)
	return after, false, err
}

// appendFrom appends the durable entries of the log after held, and returns the
// sink's new position and its receipts.
func (f *follower) appendFrom(ctx context.Context, held Checkpoint) (Checkpoint, [][]byte, error) {
	entries, after, err := f.log.store.Durable(ctx, held, f.batch)
	if setBack, ok := errors.AsType[*RollbackError](err); ok {
		setBack.Sink = f.sink.Name()
	}
	if err != nil || len(entries) == 0 {
		return held, nil, err
	}
	// The call may outlive this function, so it has variables of its own.
	var given [][]byte
	err = f.bounded(ctx, func() (err error) { given, err = f.sink.Append(ctx, entries, after); return err })
	if err != nil {
		if ctx.Err() != nil { // the same again would take as long, and its receipts would be lost again
			f.batch = max(f.batch/2, fewestOfSink)
		}
		return held, nil, fmt.Errorf("appending to sink %s: %w", f.sink.Name(), err)
	}
	return after, given, nil
}

// keepSigned sends the sink the signed checkpoints that it has not recorded and
// that cover no more than next events. After a start it sends only the newest,
// which covers all events before it.
func (f *follower) keepSigned(ctx context.Context, next int64) error {
	newest := f.log.signed.Load()
	held := f.signed.Load()
	if newest <= held {
		return nil
	}
	if held == 0 {
		held = newest - 1
	}
	ctx, cancel := context.WithTimeout(ctx, f.log.deadline)
	defer cancel()
	waiting, err := f.log.store.SignedAfter(ctx, held)
	if err != nil {
		return err
	}
	for _, s := range waiting {
		if s.Size > next {
			return nil
		}
		if err := f.bounded(ctx, func() error { return f.sink.KeepSigned(ctx, s.Note) }); err != nil {
			return fmt.Errorf("sending sink %s a signed checkpoint: %w", f.sink.Name(), err)
		}
		f.signed.Store(s.Seq)
		f.log.acted.send()
	}
	return nil
}

// errHung: a call to a sink did not return in time.
var errHung = errors.New("the sink did not answer in time")

// bounded runs do and stops waiting for it when ctx ends, because a write to a file
// cannot be cancelled. While an abandoned call has not returned, no other is made:
// a sink that hangs forever holds one goroutine.
func (f *follower) bounded(ctx context.Context, do func() error) error {
	select {
	case f.call <- struct{}{}:
	case <-ctx.Done():
		return errHung
	}
	done := make(chan error, 1)
	go func() {
		defer func() { <-f.call }()
		done <- do()
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return errHung
	}
}
