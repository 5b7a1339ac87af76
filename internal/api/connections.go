package api

import (
	"net"
	"net/http"
	"net/netip"
	"sync"

	"golang.org/x/net/netutil"
)

// places are shared out among addresses. An address may hold as many of them as
// it leaves free, so that one takes half, a second a quarter, and a place remains
// for whoever holds none. Addresses that stand for many clients are bounded by the
// places alone.
type places struct {
	all    int
	shared func(netip.Addr) bool // addresses that stand for many clients

	mu    sync.Mutex
	taken int
	held  map[netip.Prefix]int
}

func newPlaces(all int, shared func(netip.Addr) bool) *places {
	return &places{all: all, shared: shared, held: map[netip.Prefix]int{}}
}

// take takes a place for an address, which leave gives back; without one left for it,
// leave is nil.
func (p *places) take(addr netip.Addr) (leave func()) {
	// An IPv6 subscriber usually has a /64, and every address in it.
	source, _ := addr.Prefix(min(addr.BitLen(), 64)) // fails for no address, which is one source
	if !p.admit(source, p.shared(addr)) {
		return nil
	}
	return sync.OnceFunc(func() { p.leave(source) })
}

func (p *places) admit(source netip.Prefix, shared bool) bool {
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

func (p *places) leave(source netip.Prefix) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.taken--
	p.held[source]--
	if p.held[source] == 0 {
		delete(p.held, source)
	}
}

// scarce reports whether half of the places are taken.
func (p *places) scarce() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.taken >= p.all/2
}

// fairListener gives each connection a place. Connections of an address that may
// hold no more are closed at once; others wait for a place.
type fairListener struct {
	net.Listener // waits while no place is free
	*places
}

func newFairListener(l net.Listener, all int, shared func(netip.Addr) bool) *fairListener {
	return &fairListener{netutil.LimitListener(l, all), newPlaces(all, shared)}
}

func (l *fairListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if leave := l.take(peerOf(conn.RemoteAddr().String())); leave != nil {
			return &placedConn{Conn: conn, release: leave}, nil
		}
		_ = conn.Close() // nothing was written
	}
}

// closing has connections end with their next answer while places are scarce,
// so that idle ones never hold more than half of them.
func (l *fairListener) closing(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if l.scarce() {
			w.Header().Set("Connection", "close") // over HTTP/2: GOAWAY
		}
		h.ServeHTTP(w, r)
	})
}

// placedConn gives its place back when it is closed.
type placedConn struct {
	net.Conn
	release func()
}

func (c *placedConn) Close() error {
	// The listener's own place comes free with the connection, and only then does it
	// accept another, which has to find one here.
	c.release()
	return c.Conn.Close()
}
