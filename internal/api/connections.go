package api

import (
	"net"
	"net/http"
	"net/netip"

	"golang.org/x/net/netutil"

	"github.com/orgkeys/orgkeys/internal/shares"
)

// fairListener gives each connection a place. Connections of an address that may
// hold no more are closed at once; others wait for a place.
type fairListener struct {
	net.Listener // waits while no place is free
	places       *shares.Places
	all          int
}

func newFairListener(l net.Listener, all int, shared func(netip.Addr) bool) *fairListener {
	return &fairListener{netutil.LimitListener(l, all), shares.New(all, shared), all}
}

func (l *fairListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if leave := l.places.Take(peerOf(conn.RemoteAddr().String())); leave != nil {
			return &placedConn{Conn: conn, release: leave}, nil
		}
		_ = conn.Close() // nothing was written
	}
}

// closing has connections end with their next answer while places are scarce,
// so that idle ones never hold more than half of them.
func (l *fairListener) closing(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if l.places.Taken() >= l.all/2 {
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
