package node

import (
	"context"
	"net/netip"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
)

// Limits for callers without a key.
const (
	wideLane     = 64               // concurrent verifications
	widePatience = 10 * time.Second // how long a request waits for one of them

	narrowLane     = 2 // the same for addresses with too many failures
	narrowPatience = 2 * time.Second

	failuresAllowed = 30          // that an address may have at once
	failureForgiven = time.Second // after this time one failure is forgotten
	addressesKept   = 1 << 16     // the least recently failing ones are dropped first
)

// lanes limits concurrent verifications: the narrow lane is for addresses with too
// many failures, the wide lane for all others.
type lanes struct {
	wide     chan struct{}
	narrow   chan struct{}
	failures failures
}

func newLanes(now func() time.Time) (*lanes, error) {
	kept, err := lru.New[netip.Prefix, time.Time](addressesKept)
	if err != nil {
		return nil, err
	}
	return &lanes{
		wide: make(chan struct{}, wideLane), narrow: make(chan struct{}, narrowLane),
		failures: failures{now: now, forgiven: kept},
	}, nil
}

// enter waits for a place in the address's lane. leave gives it back, and returns
// the error for the caller if the verification failed.
func (l *lanes) enter(ctx context.Context, address string) (leave func(verified bool) error, err error) {
	source := sourceOf(address)
	lane, patience, full, answer := l.wide, widePatience, ErrBusy, ErrSignature
	if l.failures.tooMany(source) {
		lane, patience, full, answer = l.narrow, narrowPatience, ErrTooManyFailures, ErrTooManyFailures
	}
	if err := place(ctx, lane, patience, full); err != nil {
		return nil, err
	}
	return func(verified bool) error {
		<-lane
		if verified {
			return nil
		}
		l.failures.add(source)
		return answer
	}, nil
}

func place(ctx context.Context, lane chan struct{}, patience time.Duration, full error) error {
	select {
	case lane <- struct{}{}:
		return nil
	default:
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case lane <- struct{}{}:
		return nil
	case <-timer.C:
		return full
	case <-ctx.Done():
		return ctx.Err()
	}
}

// sourceOf is the key by which failures are counted: an IPv4 address, or the /64
// of an IPv6 address. All texts that are not addresses are one source.
func sourceOf(address string) netip.Prefix {
	addr, err := netip.ParseAddr(address)
	if err != nil {
		return netip.Prefix{}
	}
	addr = addr.Unmap().WithZone("")
	bits := 64
	if addr.Is4() {
		bits = 32
	}
	return netip.PrefixFrom(addr, bits).Masked()
}

// failures counts failures by source. It keeps one time for each: when the
// last failure is forgotten (a leaky bucket, GCRA).
type failures struct {
	now      func() time.Time
	mu       sync.Mutex // keeps add's reading and writing together
	forgiven *lru.Cache[netip.Prefix, time.Time]
}

func (f *failures) tooMany(source netip.Prefix) bool {
	forgiven, ok := f.forgiven.Peek(source)
	return ok && forgiven.Sub(f.now()) > (failuresAllowed-1)*failureForgiven
}

func (f *failures) add(source netip.Prefix) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := f.now()
	forgiven, ok := f.forgiven.Peek(source)
	if !ok || forgiven.Before(now) {
		forgiven = now
	}
	// At most a little over the limit, so that an hour of failures is
	// forgotten as fast as a minute of them.
	if limit := now.Add(failuresAllowed * failureForgiven); forgiven.Before(limit) {
		forgiven = forgiven.Add(failureForgiven)
	}
	f.forgiven.Add(source, forgiven)
}
