// Package shares divides places, turns and memory among those who ask for them, so that
// nobody takes them all.
package shares

import (
	"context"
	"net/netip"
	"sync"
)

// Amount is shared out among holders. A holder may hold as much of it as it leaves
// free, so that one takes half, a second a quarter, and something remains for whoever
// holds nothing, which may take what is left.
type Amount[K comparable] struct {
	all int64

	mu    sync.Mutex
	taken int64
	held  map[K]int64
	freed chan struct{} // closed when something is given back; nil: nobody asked
}

// NewAmount returns an amount of which nothing is taken.
func NewAmount[K comparable](all int64) *Amount[K] {
	return &Amount[K]{all: all, held: map[K]int64{}}
}

// Take takes n for a holder; more than half of all counts as half. keep gives back what
// is more than its argument. Without n left for the holder, keep is nil.
func (a *Amount[K]) Take(of K, n int64) (keep func(n int64)) {
	keep, _ = a.take(of, n, true)
	return keep
}

// Await is Take, and waits until ctx ends. Whoever wants little does not wait behind
// those who want much.
func (a *Amount[K]) Await(ctx context.Context, of K, n int64) (keep func(n int64)) {
	for {
		keep, freed := a.take(of, n, true)
		if keep != nil {
			return keep
		}
		select {
		case <-freed:
		case <-ctx.Done():
			return nil
		}
	}
}

// take takes n for a holder, or returns what will be closed when it is worth another try.
func (a *Amount[K]) take(of K, n int64, bounded bool) (keep func(n int64), freed <-chan struct{}) {
	n = min(n, max(a.all/2, 1))
	a.mu.Lock()
	defer a.mu.Unlock()
	held, left := a.held[of], a.all-a.taken-n
	if n > 0 && (left < 0 || bounded && held > 0 && held+n > left) {
		if a.freed == nil {
			a.freed = make(chan struct{})
		}
		return nil, a.freed
	}
	a.add(of, n)
	return func(rest int64) {
		a.mu.Lock()
		defer a.mu.Unlock()
		if rest >= n {
			return
		}
		a.add(of, rest-n)
		n = rest
		if a.freed != nil {
			close(a.freed)
			a.freed = nil
		}
	}, nil
}

func (a *Amount[K]) add(of K, n int64) {
	a.taken += n
	a.held[of] += n
	if a.held[of] == 0 {
		delete(a.held, of)
	}
}

// Taken is how much is taken.
func (a *Amount[K]) Taken() int64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.taken
}

// smallAnswer is up to how many bytes of an answer its connection's buffers hold.
const smallAnswer = 4 << 10

// Counted is what counts of an answer's size where memory is shared out: nothing of a
// small one, which never waits.
func Counted(size int64) int64 {
	if size <= smallAnswer {
		return 0
	}
	return size
}

// Places are shared out among addresses. Addresses that stand for many clients are
// bounded by the places alone.
type Places struct {
	amount *Amount[netip.Prefix]
	shared func(netip.Addr) bool // addresses that stand for many clients
}

// New returns places that are all free; shared reports which addresses stand for many
// clients.
func New(all int, shared func(netip.Addr) bool) *Places {
	return &Places{NewAmount[netip.Prefix](int64(all)), shared}
}

// Take takes a place for an address, which leave gives back; without one left for it,
// leave is nil.
func (p *Places) Take(addr netip.Addr) (leave func()) {
	// An IPv6 subscriber usually has a /64, and every address in it.
	source, _ := addr.Prefix(min(addr.BitLen(), 64)) // fails for no address, which is one source
	keep, _ := p.amount.take(source, 1, !p.shared(addr))
	if keep == nil {
		return nil
	}
	return func() { keep(0) }
}

// Taken is how many places are taken.
func (p *Places) Taken() int { return int(p.amount.Taken()) }
