//go:build cgo

package hsm

import (
	"fmt"
	"time"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// limits is how long this package waits for what may not come. A call into the
// library cannot be interrupted, so each limit is the caller's: it goes away,
// and the call stays.
type limits struct {
	// answer is for whatever takes a token milliseconds: sealing, opening,
	// signing, wrapping, destroying. A network HSM takes some tens of them.
	answer time.Duration
	// generate is for one key pair, and for a renewal that a key waits for.
	// SoftHSM takes 0.2 s and a slow HSM several; a request has 30 s by
	// default, and must hear before they are over that it is the token, since
	// afterwards it looks as if too many were asked for.
	generate time.Duration
	// held is how long a life that is to end waits for keys that are held; a key
	// is held from its generation to its destruction, mostly well under a second.
	held time.Duration
	// closing is the same at Close. The requests are over by then.
	closing time.Duration
	// pause is the least time between a renewal that failed and the next.
	pause time.Duration
}

func defaultLimits() limits {
	return limits{
		answer:   5 * time.Second,
		generate: 15 * time.Second,
		held:     30 * time.Second,
		closing:  3 * time.Second,
		pause:    time.Second,
	}
}

// errSlow: a call into the library has not returned in time, or a renewal has
// not come to an end. It is not lost: no new life can begin with a call under way.
var errSlow = fmt.Errorf("%w: the token does not answer in time", orgkey.ErrUnavailable)
