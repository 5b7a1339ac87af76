package api

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/shares"
)

// dialFrom opens a connection to address from a loopback address.
func dialFrom(t *testing.T, from, address string) net.Conn {
	t.Helper()
	conn, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}).Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(60 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// asks sends a request on conn; an error says that conn was closed instead of
// an answer.
func asks(conn net.Conn) (*http.Response, error) {
	if _, err := io.WriteString(conn, "GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"); err != nil {
		return nil, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return nil, err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return resp, err
}

// TestIdleConnectionsLeaveRoom: more connections than there are places have
// each sent one request, and stay.
func TestIdleConnectionsLeaveRoom(t *testing.T) {
	b := newBench(t, nil)
	kept := 0
	for range maxConnections + 100 {
		resp, err := asks(dialFrom(t, "127.0.0.1", b.address))
		if err != nil || resp.StatusCode != 200 {
			t.Fatal(resp, err)
		}
		if !resp.Close {
			kept++
		}
	}
	if kept < maxConnections/4 || kept > maxConnections/2 {
		t.Errorf("%d of %d connections were kept", kept, maxConnections)
	}
}

// TestOneAddressLeavesRoomForOthers: it holds as many connections as it can,
// each with a request that never ends.
func TestOneAddressLeavesRoomForOthers(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	s, err := Listen(ServerConfig{Address: "127.0.0.1:0", Log: slog.New(slog.DiscardHandler)}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/held" {
			select {
			case entered <- struct{}{}:
			case <-leave:
			}
			<-leave
		}
	}))
	if err != nil {
		t.Fatal(err)
	}
	s.listener.places = shares.New(maxConnections, func(a netip.Addr) bool { return a == netip.MustParseAddr("127.0.0.9") })
	served := make(chan error, 1)
	go func() { served <- s.Serve() }()
	t.Cleanup(func() {
		close(leave)
		if err := s.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	// hold has an address take at most n places, until it gets no more.
	hold := func(from string, n int) (held int) {
		for range n {
			conn := dialFrom(t, from, s.Addr().String())
			fmt.Fprint(conn, "GET /held HTTP/1.1\r\nHost: h\r\n\r\n") // fails as the reading does
			gone := make(chan struct{})
			go func() { _, _ = conn.Read(make([]byte, 1)); close(gone) }()
			select {
			case <-entered:
				held++
			case <-gone:
				return held
			}
		}
		return held
	}
	for i, want := range []int{maxConnections / 2, maxConnections / 4, maxConnections / 8} {
		if got := hold(fmt.Sprintf("127.0.0.%d", i+2), maxConnections); got != want {
			t.Errorf("address %d holds %d places, want %d", i+1, got, want)
		}
	}
	for _, from := range []string{"127.0.0.1", "127.0.0.9"} {
		if resp, err := asks(dialFrom(t, from, s.Addr().String())); err != nil || resp.StatusCode != 200 {
			t.Errorf("%s: %v %v", from, resp, err)
		}
	}
	if got := hold("127.0.0.9", maxConnections/8-2); got != maxConnections/8-2 {
		t.Errorf("an address that stands for many clients holds %d places", got)
	}
}

// TestStalledBodiesLeaveRoomForOthers: an address announces as many bodies as it can,
// and sends none of them. What it holds meanwhile is bounded, and others are served.
func TestStalledBodiesLeaveRoomForOthers(t *testing.T) {
	b := newBench(t, nil)
	b.api.reading = shares.New(64, func(netip.Addr) bool { return false }) // the test has only addresses of this host
	for _, path := range []string{"/register", "/unregister", "/secrets", "/enroll/" + nodeID, "/enroll/" + nodeID + "/receipt"} {
		var stalled []net.Conn
		waiting := func() int {
			return b.api.reading.Taken()
		}
		stall := func(from string) net.Conn {
			conn := dialFrom(t, from, b.address)
			stalled = append(stalled, conn)
			if _, err := fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n", path); err != nil {
				t.Fatal(err)
			}
			return conn
		}
		for i := range 32 {
			stall("127.0.0.2")
			for deadline := time.Now().Add(5 * time.Second); waiting() <= i; time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("%s: %d of %d bodies are waited for", path, waiting(), i+1)
				}
			}
		}
		resp, err := http.ReadResponse(bufio.NewReader(stall("127.0.0.2")), nil)
		if err != nil || resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") == "" {
			t.Errorf("%s: one more body of the address: %+v, %v", path, resp, err)
		}
		if a := b.send(http.MethodPost, b.url+"/register", []byte(someRegistration), "Content-Type", "application/json"); a.StatusCode != http.StatusOK {
			t.Errorf("%s: another address gets %d %s", path, a.StatusCode, a.body)
		}
		for _, conn := range stalled {
			_ = conn.Close() // the answer to it is nobody's any more
		}
		for deadline := time.Now().Add(15 * time.Second); waiting() > 0; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: %d places were not given back", path, waiting())
			}
		}
	}
}
