// Package shares divides places among addresses, so that no address takes them all.
package shares

import (
	"net/netip"
	"sync"
)

// Places are shared out among addresses. An address may hold as many of them as
// it leaves free, so that one takes half, a second a quarter, and a place remains
// for whoever holds none. Addresses that stand for many clients are bounded by the
// places alone.
type Places struct {
	all    int
	shared func(netip.Addr) bool // addresses that stand for many clients

	mu    sync.Mutex
	taken int
	held  map[netip.Prefix]int
}

// New returns places that are all free; shared reports which addresses stand for many
// clients.
func New(all int, shared func(netip.Addr) bool) *Places {
	return &Places{all: all, shared: shared, held: map[netip.Prefix]int{}}
}

// Take takes a place for an address, which leave gives back; without one left for it,
// leave is nil.
func (p *Places) Take(addr netip.Addr) (leave func()) {
	// An IPv6 subscriber usually has a /64, and every address in it.
	source, _ := addr.Prefix(min(addr.BitLen(), 64)) // fails for no address, which is one source
	if !p.admit(source, p.shared(addr)) {
		return nil
	}
	return sync.OnceFunc(func() { p.leave(source) })
}

func (p *Places) admit(source netip.Prefix, shared bool) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	free := p.all - p.taken
	if free <= 0 || !shared && p.held[source] >= free {
		return false
	}
	p.taken++
	p.held[source]++
	return true
}

func (p *Places) leave(source netip.Prefix) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.taken--
	p.held[source]--
	if p.held[source] == 0 {
		delete(p.held, source)
	}
}

// Taken is how many places are taken.
func (p *Places) Taken() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.taken
}
