package audit

import (
	"context"
	"errors"
	"fmt"
	"sync"
)

// A log that is behind a sink has lost events, and must not give their indices
// to others: then nobody could tell a failover from a forgery. So events are
// given indices only on this condition: every sink was asked what it holds, again
// after each failover of the database, and the log extends it. Events are still
// recorded meanwhile, and get their indices when the sinks and the log agree.

// Condition is what must be so when events are given indices. The zero Condition
// asks for nothing.
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
	return fmt.Sprintf("the database has failed over (it is on timeline %s), and the sinks are asked what they hold", e.Timeline)
}

// HaltError says why events are given no indices.
type HaltError struct {
	Why     string
	SetBack bool // another replica's sink holds what the log has not: only an operator can end that
}

func (e *HaltError) Error() string { return "no event is given its place in the log: " + e.Why }

// passing reports whether events get no indices only until a sink, or another
// replica, has said what it holds.
func passing(err error) bool {
	halted, ok := errors.AsType[*HaltError](err)
	return ok && !halted.SetBack || errors.As(err, new(*TimelineError))
}

// growth is whether events are given indices, and under which timeline.
type growth struct {
	mu       sync.Mutex
	timeline *string // nil: not known yet
	halted   error
}

// timeline is that of the database, as far as this process has noticed.
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

// moveTo notes the database's timeline, upon which every sink is asked again.
func (l *Log) moveTo(timeline string) {
	l.growth.mu.Lock()
	l.growth.timeline = &timeline
	l.growth.mu.Unlock()
	l.grown.send()
}

// condition is what the next events' indices depend on, or why there are none.
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

// Halted returns why the last attempt to give events indices did not come off.
func (l *Log) Halted() error {
	l.growth.mu.Lock()
	defer l.growth.mu.Unlock()
	return l.growth.halted
}

// halt notes how an attempt ended, and reports whether that is news.
func (l *Log) halt(err error) bool {
	l.growth.mu.Lock()
	defer l.growth.mu.Unlock()
	before := l.growth.halted
	l.growth.halted = err
	return err != nil && (before == nil || before.Error() != err.Error())
}

// HoldBack lets no replica give events indices while a sink of this one does not
// fit the log, if that is what err says.
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

// asked notes what the sink holds, as it said under the timeline.
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

// known is the newest checkpoint that the sink is known to hold, or why that
// cannot be relied on.
func (f *follower) known(timeline string) (Checkpoint, error) {
	held, err := f.state()
	if errors.As(err, new(*RollbackError)) {
		return held, err
	}
	if !f.askedUnder(timeline) {
		if err == nil {
			err = errNotYet
		}
		return held, &HaltError{Why: fmt.Sprintf("sink %s has not said what it holds, since the start or a failover of the database: %v", f.sink.Name(), err)}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.held.Size > f.newest.Size {
		return f.held, nil
	}
	return f.newest, nil
}
