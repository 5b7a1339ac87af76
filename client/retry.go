package client

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"time"
)

// Pauses between attempts.
const (
	firstPause   = 500 * time.Millisecond // doubled each time...
	longestPause = 15 * time.Second       // ...up to this, and varied by half
	longestWait  = 5 * time.Minute        // of a server's Retry-After
)

// Forever is for Retry.For.
const Forever = time.Duration(math.MaxInt64)

// Retry says how long to repeat a call after temporary failures.
type Retry struct {
	// For is the time after which no further attempt is begun; 0 means one attempt.
	For time.Duration
	// Temporary reports whether an error is temporary; nil means the package's Temporary.
	Temporary func(error) bool
	// Waiting, if not nil, is told what is waited for, before each pause.
	Waiting func(err error, pause time.Duration)
}

// Do calls try until it succeeds, fails with an error that is not temporary, or
// the time is over, and returns its last error. When ctx ends during a pause,
// the error wraps ctx's as well.
func (r Retry) Do(ctx context.Context, try func(context.Context) error) error {
	temporary := r.Temporary
	if temporary == nil {
		temporary = Temporary
	}
	begun := time.Now()
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		err := try(ctx)
		if err == nil || ctx.Err() != nil || !temporary(err) {
			return err
		}
		left := r.For - time.Since(begun)
		if left <= 0 {
			return err
		}
		wait := pauseAfter(err, pause, left)
		if r.Waiting != nil {
			r.Waiting(err, wait)
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-time.After(wait):
		}
	}
}

// pauseAfter varies pauses, so that clients that were cut off together do not
// come back together. The last attempt is made when the time is over: a
// program that ended earlier, because the server asks for a longer pause, would be
// started again by its supervisor, and ask even sooner.
func pauseAfter(err error, pause, left time.Duration) time.Duration {
	wait := pause/2 + rand.N(pause)
	if asked := retryAfter(err); wait < asked {
		wait = asked + rand.N(pause)
	}
	return min(wait, left)
}

func retryAfter(err error) time.Duration {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.RetryAfter
	}
	if e, ok := errors.AsType[*ForeignError](err); ok {
		return e.RetryAfter
	}
	return 0
}
