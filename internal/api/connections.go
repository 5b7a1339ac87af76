package api

import (
	"net"
	"net/http"
	"net/netip"
	"sync"

	"golang.org/x/net/netutil"
)

// fairListener shares a number of places out among connections. An address may
// hold as many of them as it leaves free, so that one takes half, a second a
// quarter, and a place remains for whoever holds none; beyond that its
// connections are closed at once. Addresses that stand for many clients are
// bounded by the places alone, and wait for one like everybody.
type fairListener struct {
	net.Listener // waits while no place is free
	places       int
	shared       func(netip.Addr) bool // addresses that stand for many clients

	mu    sync.Mutex
	taken int
	held  map[netip.Prefix]int
}

func newFairListener(l net.Listener, places int, shared func(netip.Addr) bool) *fairListener {
	return &fairListener{Listener: netutil.LimitListener(l, places), places: places, shared: shared, held: map[netip.Prefix]int{}}
}

func (l *fairListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		addr := peerOf(conn.RemoteAddr().String())
		// An IPv6 subscriber usually has a /64, and every address in it.
		source, _ := addr.Prefix(min(addr.BitLen(), 64)) // fails for no address, which is one source
		if l.admit(source, l.shared(addr)) {
			return &placedConn{Conn: conn, release: sync.OnceFunc(func() { l.leave(source) })}, nil
		}
		_ = conn.Close() // nothing was written
	}
}

func (l *fairListener) admit(source netip.Prefix, shared bool) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if free := l.places - l.taken; !shared && l.held[source] >= free {
		return false
	}
	l.taken++
	l.held[source]++
	return true
}

func (l *fairListener) leave(source netip.Prefix) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.taken--
	l.held[source]--
	if l.held[source] == 0 {
		delete(l.held, source)
	}
}

// scarce reports whether half of the places are taken.
func (l *fairListener) scarce() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.taken >= l.places/2
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
	defer c.release()
	return c.Conn.Close()
}
