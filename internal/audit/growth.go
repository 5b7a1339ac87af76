package audit

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// A log that is behind a sink has lost events and must not give their indices to
// other events: otherwise a failover could not be distinguished from a forgery. So
// events get indices only on this condition: every sink was asked what it holds,
// again after each failover of the database, and the log extends it. Until then
// events are recorded, and get their indices when the sinks and the log agree.

// Condition must hold when events get indices. The zero Condition always holds.
type Condition struct {
	Timeline string // of the database, as it was when the sinks were asked; see Store.Timeline
	Held     []SinkHeld
}

// SinkHeld is the newest checkpoint that a sink is known to hold.
type SinkHeld struct {
	Sink string
	Checkpoint
}

// TimelineError says that the database has failed over since the sinks were
// asked what they hold.
type TimelineError struct{ Timeline string }

func (e *TimelineError) Error() string {
	return fmt.Sprintf("the database has failed over (it is on timeline %s); waiting until the sinks have reported what they hold", e.Timeline)
}

// HaltError says why events get no indices.
type HaltError struct {
	Why     string
	SetBack bool // another replica's sink is ahead of the log: only an operator can end that
}

func (e *HaltError) Error() string { return "no event gets an index in the log: " + e.Why }

// passing reports whether events get no indices only until a sink, or another
// replica, has said what it holds.
func passing(err error) bool {
	halted, ok := errors.AsType[*HaltError](err)
	return ok && !halted.SetBack || errors.As(err, new(*TimelineError))
}

// AheadSink is a sink that the log was found not to extend: until an operator's word, or
// until it fits again, no event gets an index.
type AheadSink struct {
	Holder string // whose it is: host, data directory, and a name of that directory's own
	Sink   string
	Size   int64 // events that it holds
	Found  time.Time
}

func (s AheadSink) String() string {
	return fmt.Sprintf("sink %s of %s holds %d events that the log does not extend", s.Sink, s.Holder, s.Size)
}

// growth is whether events get indices, and under which timeline.
type growth struct {
	mu       sync.Mutex
	timeline *string // nil: not known yet
	halted   error
}

// timeline is the database's timeline, as last read by this process.
func (l *Log) timeline(ctx context.Context) (string, error) {
	l.growth.mu.Lock()
	known := l.growth.timeline
	l.growth.mu.Unlock()
	if known != nil {
		return *known, nil
	}
	now, err := l.store.Timeline(ctx)
	if err != nil {
		return "", err
	}
	l.moveTo(now)
	return now, nil
}

// moveTo stores the database's timeline, after which every sink is asked again.
func (l *Log) moveTo(timeline string) {
	l.growth.mu.Lock()
	l.growth.timeline = &timeline
	l.growth.mu.Unlock()
	l.grown.send()
}

// condition is the condition for the next events' indices, or the reason why
// there are none.
func (l *Log) condition(ctx context.Context) (Condition, error) {
	timeline, err := l.timeline(ctx)
	if err != nil {
		return Condition{}, err
	}
	c := Condition{Timeline: timeline}
	for _, f := range l.followers {
		held, err := f.known(timeline)
		if err != nil {
			return c, err
		}
		c.Held = append(c.Held, SinkHeld{f.sink.Name(), held})
	}
	return c, nil
}

// Attended returns the database's timeline under which every sink was found to
// fit the log; empty while that is not so.
func (l *Log) Attended(ctx context.Context) string {
	c, err := l.condition(ctx)
	if err != nil {
		return ""
	}
	return c.Timeline
}

// Halted returns why the last attempt to give events indices failed.
func (l *Log) Halted() error {
	l.growth.mu.Lock()
	defer l.growth.mu.Unlock()
	return l.growth.halted
}

// halt stores how an attempt ended, and reports whether that has changed.
func (l *Log) halt(err error) bool {
	l.growth.mu.Lock()
	defer l.growth.mu.Unlock()
	before := l.growth.halted
	l.growth.halted = err
	return err != nil && (before == nil || before.Error() != err.Error())
}

// HoldBack keeps all replicas from giving events indices while the log does not
// extend a sink of this one, if that is what err says.
func (l *Log) HoldBack(ctx context.Context, err error) error {
	setBack, ok := errors.AsType[*RollbackError](err)
	if !ok || setBack.Held.Origin != setBack.Log.Origin {
		return nil
	}
	if err := l.store.SinkAhead(ctx, setBack.Sink, setBack.Held.Size); err != nil {
		return fmt.Errorf("holding the log back: %w", err)
	}
	return nil
}

// asked stores what the sink reported under the timeline.
func (f *follower) asked(timeline string, last Checkpoint) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.attended = &timeline
	if last.Size > f.newest.Size {
		f.newest = last
	}
}

// askedUnder reports whether the sink was asked under the present timeline.
func (f *follower) askedUnder(timeline string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.attended != nil && *f.attended == timeline
}

// known is the newest checkpoint that the sink is known to hold, or the reason why
// it is not known.
func (f *follower) known(timeline string) (Checkpoint, error) {
	held, err := f.state()
	if errors.As(err, new(*RollbackError)) {
		return held, err
	}
	if !f.askedUnder(timeline) {
		if err == nil {
			err = errNotYet
		}
		return held, &HaltError{Why: fmt.Sprintf("sink %s has not reported what it holds since the start or a failover of the database: %v", f.sink.Name(), err)}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.held.Size > f.newest.Size {
		return f.held, nil
	}
	return f.newest, nil
}
