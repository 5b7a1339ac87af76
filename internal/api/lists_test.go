package api

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/node"
	"github.com/orgkeys/orgkeys/internal/org"
)

// manyClaims has enrollments that a hundred nodes claimed.
type manyClaims struct{ Enrollments }

func (manyClaims) Get(context.Context, gate.Call, org.ID, string) (enroll.Enrollment, error) {
	return enroll.Enrollment{ID: nodeID, Claims: make([]enroll.Delivery, 100)}, nil
}

// newListBench is a bench with two organizations, acme and other.
func newListBench(t *testing.T) *bench {
	return newBench(t, func(c *Config) {
		c.Enrollments = manyClaims{}
		ofAcme := c.Authenticate
		c.Authenticate = func(ctx context.Context, h http.Header) (authz.Caller, error) {
			if h.Get("Authorization") == "Bearer other" {
				return authz.Caller{Kind: authz.Person, Subject: "bob", Org: "other", Roles: []authz.Role{authz.Owner}}, nil
			}
			return ofAcme(ctx, h)
		}
	})
}

// TestSlowReadersOfListsTakeBoundedMemory: what is written takes its part of listsMemory
// until it is read or the reader is gone. Without room for it a list is refused, and one
// that takes next to nothing is not, nor that of another organization.
func TestSlowReadersOfListsTakeBoundedMemory(t *testing.T) {
	t.Parallel()
	b := newListBench(t)
	const size = 16 << 20
	b.nodes.nodes = make([]node.Node, 8)
	for i := range b.nodes.nodes {
		b.nodes.nodes[i].ID, b.nodes.nodes[i].Version = nodeID, strings.Repeat("v", size/8)
	}
	var readers []net.Conn
	for i := range int64(2) {
		reader := dialFrom(t, "127.0.0.2", b.address)
		readers = append(readers, reader)
		if _, err := fmt.Fprintf(reader, "GET /organization/acme/nodes HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer %s\r\n\r\n", token); err != nil {
			t.Fatal(err)
		}
		await(t, "a list that nobody reads takes memory", func() bool { return b.api.lists.memory.Taken() > (i+1)*size })
	}
	if n := b.api.lists.memory.Taken(); n > 2*(size+64<<10) {
		t.Errorf("the lists take %d bytes, more than they are long", n)
	}
	if n := b.api.lists.making.Taken(); n != 0 {
		t.Errorf("%d lists that are being written are still taken for such that are being made", n)
	}
	rest := b.api.lists.memory.Take("acme", listsMemory/2-b.api.lists.memory.Taken())
	if rest == nil {
		t.Fatal("an organization gets less than half")
	}
	for _, path := range []string{"/organization/acme/nodes", "/organization/acme/enrollment/" + nodeID} {
		if a := b.ask("GET", path); a.StatusCode != http.StatusServiceUnavailable || a.Header.Get("Retry-After") == "" || !strings.Contains(string(a.body), `"overloaded"`) {
			t.Errorf("%s: a list too many gets %d %v %.200s", path, a.StatusCode, a.Header, a.body)
		}
	}
	if recorded := b.keys.log(); !slices.Contains(recorded, "reject acme node.list overloaded") || !slices.Contains(recorded, "reject acme enrollment.list overloaded") {
		t.Errorf("recorded: %q", recorded)
	}
	if a := b.ask("GET", "/organization/acme/key"); a.StatusCode != http.StatusOK {
		t.Errorf("a list that takes next to nothing gets %d %s", a.StatusCode, a.body)
	}
	if a := b.ask("GET", "/organization/other/nodes", "Authorization", "Bearer other"); a.StatusCode != http.StatusOK {
		t.Errorf("another organization gets %d %.200s", a.StatusCode, a.body)
	}
	rest(0)
	for _, r := range readers {
		r.Close()
	}
	await(t, "memory is given back when the readers are gone", func() bool { return b.api.lists.memory.Taken() == 0 })
	if a := b.ask("GET", "/organization/acme/nodes"); a.StatusCode != http.StatusOK {
		t.Errorf("afterwards a list gets %d %.200s", a.StatusCode, a.body)
	}
}

// Every list waits for its turn to be made, and gives it back. One organization leaves
// turns to others.
func TestFewListsAreMadeAtOnce(t *testing.T) {
	t.Parallel()
	b := newListBench(t)
	var taken []func(int64)
	for range maxListing / 2 {
		taken = append(taken, b.api.lists.making.Take("acme", 1))
	}
	refused := make(chan answer)
	asked := []struct{ method, path string }{
		{"GET", "/organization/acme/key"}, {"GET", "/organization/acme/nodes"}, {"GET", "/organization/acme/secret"},
		{"GET", "/organization/acme/enrollment"}, {"GET", "/organization/acme/enrollment/" + nodeID}, {"GET", "/organization/acme/device"}, {"GET", "/organization/acme/event"}, {"POST", "/systemevent"}, {"GET", "/node"},
	}
	for _, r := range asked {
		go func() { refused <- b.ask(r.method, r.path) }()
	}
	for range asked {
		if a := <-refused; a.StatusCode != http.StatusServiceUnavailable || a.Header.Get("Retry-After") == "" {
			t.Errorf("%s: a list too many gets %d %s", a.Request.URL.Path, a.StatusCode, a.body)
		}
	}
	// Each leaves its event, or who may not list is told so.
	recorded := b.keys.log()
	slices.Sort(recorded)
	want := []string{
		"reject acme device.list overloaded", "reject acme enrollment.list overloaded", "reject acme enrollment.list overloaded", "reject acme event.read overloaded", "reject acme event.read overloaded",
		"reject acme node.list overloaded", "reject acme node.list overloaded", "reject acme orgkey.list overloaded", "reject acme secret.list overloaded",
	}
	if !slices.Equal(recorded, want) {
		t.Errorf("recorded: %q", recorded)
	}
	if a := b.ask("GET", "/organization/other/nodes", "Authorization", "Bearer other"); a.StatusCode != http.StatusOK {
		t.Errorf("another organization gets %d %s", a.StatusCode, a.body)
	}
	for _, turn := range taken {
		turn(0)
	}
	b.ask("GET", "/organization/acme/key")
	await(t, "a list's turn is given back", func() bool { return b.api.lists.making.Taken() == 0 })
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
