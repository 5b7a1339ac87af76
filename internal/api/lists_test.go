package api

import (
	"bufio"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/node"
)

// TestSlowReadersOfListsTakeBoundedMemory: what is written takes its part of listsMemory
// until it is read or the reader is gone. Without room for it a list is refused, and one
// that takes next to nothing is not.
func TestSlowReadersOfListsTakeBoundedMemory(t *testing.T) {
	t.Parallel()
	b := newBench(t, nil)
	b.nodes.nodes = make([]node.Node, 8)
	for i := range b.nodes.nodes {
		b.nodes.nodes[i].ID, b.nodes.nodes[i].Version = nodeID, strings.Repeat("v", 2<<20)
	}
	written := func() bool {
		if !b.api.lists.memory.TryAcquire(listsMemory) {
			return true
		}
		b.api.lists.memory.Release(listsMemory)
		return false
	}
	reader := dialFrom(t, "127.0.0.2", b.address)
	if _, err := fmt.Fprintf(reader, "GET /organization/acme/nodes HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer %s\r\n\r\n", token); err != nil {
		t.Fatal(err)
	}
	await(t, "a list that nobody reads takes memory", written)
	if !b.api.lists.making.TryAcquire(maxListing) {
		t.Error("a list that is being written is still taken for one that is being made")
	}
	b.api.lists.making.Release(maxListing)

	rest := int64(listsMemory - 16<<20 - 64<<10) // all but what that list takes, and more
	if !b.api.lists.memory.TryAcquire(rest) {
		t.Fatal("the list takes more than it is long")
	}
	if a := b.ask("GET", "/organization/acme/nodes"); a.StatusCode != http.StatusServiceUnavailable || a.Header.Get("Retry-After") == "" || !strings.Contains(string(a.body), `"overloaded"`) {
		t.Errorf("a list too many gets %d %v %.200s", a.StatusCode, a.Header, a.body)
	}
	if a := b.ask("GET", "/organization/acme/key"); a.StatusCode != http.StatusOK {
		t.Errorf("a list that takes next to nothing gets %d %s", a.StatusCode, a.body)
	}
	b.api.lists.memory.Release(rest)
	reader.Close()
	await(t, "memory is given back when the reader is gone", func() bool { return !written() })
	if a := b.ask("GET", "/organization/acme/nodes"); a.StatusCode != http.StatusOK {
		t.Errorf("afterwards a list gets %d %.200s", a.StatusCode, a.body)
	}
}

// Every list waits for its turn to be made, and gives it back.
func TestFewListsAreMadeAtOnce(t *testing.T) {
	t.Parallel()
	b := newBench(t, nil)
	if !b.api.lists.making.TryAcquire(maxListing) {
		t.Fatal("there are fewer turns")
	}
	refused := make(chan answer)
	asked := []struct{ method, path string }{
		{"GET", "/organization/acme/key"}, {"GET", "/organization/acme/nodes"}, {"GET", "/organization/acme/secret"},
		{"GET", "/organization/acme/enrollment"}, {"GET", "/organization/acme/device"}, {"GET", "/organization/acme/event"}, {"POST", "/systemevent"},
	}
	for _, r := range asked {
		go func() { refused <- b.ask(r.method, r.path) }()
	}
	for range asked {
		if a := <-refused; a.StatusCode != http.StatusServiceUnavailable || a.Header.Get("Retry-After") == "" {
			t.Errorf("%s: a list too many gets %d %s", a.Request.URL.Path, a.StatusCode, a.body)
		}
	}
	b.api.lists.making.Release(maxListing)
	b.ask("GET", "/organization/acme/key")
	if !b.api.lists.making.TryAcquire(maxListing) {
		t.Error("a list's turn is not given back")
	}
}

// A body that does not come holds no turn.
func TestStalledBodiesHoldNoTurnOfLists(t *testing.T) {
	t.Parallel()
	b := newBench(t, nil)
	b.events.page.Take = 1
	for range maxListing {
		conn := b.dial()
		if _, err := fmt.Fprintf(conn, "POST /systemevent HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\nContent-Length: 10\r\nExpect: 100-continue\r\n\r\n", token); err != nil {
			t.Fatal(err)
		}
		if line, err := bufio.NewReader(conn).ReadString('\n'); err != nil || line != "HTTP/1.1 100 Continue\r\n" {
			t.Fatalf("no body is waited for: %q, %v", line, err)
		}
	}
	for _, r := range []struct{ method, path string }{{"GET", "/organization/acme/nodes"}, {"POST", "/systemevent"}} {
		if a := b.ask(r.method, r.path); a.StatusCode != http.StatusOK {
			t.Errorf("%s beside them gets %d %s", r.path, a.StatusCode, a.body)
		}
	}
}

func await(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(what + ": not so after 20 s")
		}
	}
}
