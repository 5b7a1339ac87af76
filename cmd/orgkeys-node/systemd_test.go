package main_test

import (
	"crypto/tls"
	"maps"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/e2e/systemd"
	"github.com/orgkeys/orgkeys/internal/testca"
)

// nodeUser is the user that the unit runs as, in the machines of these tests.
const nodeUser = 990

// box is a machine with the shipped units and the shipped program.
type box struct {
	*systemd.Machine
	t     *testing.T
	front *front
}

// newBox prepares a machine that is as a node's should be: settings, key, and
// dependents of the unit. What a test takes away it puts back with put.
func newBox(t *testing.T, f *front) *box {
	t.Helper()
	b := &box{systemd.New(t, []systemd.User{{Name: "orgkeys-node", ID: nodeUser}}, append(dependents(), "orgkeys-node.service")...), t, f}
	for name, text := range dependentUnits {
		b.Put("systemd/system/"+name, text+"RemainAfterExit=yes\nExecStartPre=/bin/grep -q v1 /var/lib/orgkeys-node/env_s3\n", 0o644, 0)
	}
	for _, unit := range []string{"orgkeys-node.service", "orgkeys-node-refresh.service", "orgkeys-node-refresh.timer"} {
		text, err := os.ReadFile(unit)
		if err != nil {
			t.Fatal(err)
		}
		b.Put("systemd/system/"+unit, string(text), 0o644, 0)
	}
	b.settings(f.url)
	b.Put("orgkeys-node/key.pem", string(f.key), 0o600, nodeUser)
	return b
}

// dependentUnits are the ways in which units need the secrets.
var dependentUnits = map[string]string{
	"requires.service": "[Unit]\nRequires=orgkeys-node.service\nAfter=orgkeys-node.service\n[Service]\nType=oneshot\nExecStart=/bin/true\n",
	"daemon.service":   "[Unit]\nRequires=orgkeys-node.service\nAfter=orgkeys-node.service\n[Service]\nRestart=always\nExecStart=/bin/sleep infinity\n",
	"bound.service":    "[Unit]\nBindsTo=orgkeys-node.service\nAfter=orgkeys-node.service\n[Service]\nType=oneshot\nExecStart=/bin/true\n",
	"wants.service":    "[Unit]\nWants=orgkeys-node.service\nAfter=orgkeys-node.service\n[Service]\nType=oneshot\nExecStart=/bin/true\n",
	"second.service":   "[Unit]\nRequires=requires.service\nAfter=requires.service\n[Service]\nType=oneshot\nExecStart=/bin/true\n",
}

func dependents() []string { return slices.Sorted(maps.Keys(dependentUnits)) }

func (b *box) settings(server string, more ...string) {
	b.Put("orgkeys-node/env", strings.Join(append([]string{
		"ORGKEYS_NODE_SERVER=" + server, "ORGKEYS_NODE_ORG=" + b.front.org, "ORGKEYS_NODE_IP=192.0.2.7", "ORGKEYS_NODE_REGION=eu",
	}, more...), "\n")+"\n", 0o644, 0)
}

// boot starts the machine.
func (b *box) boot() { b.Boot(binary, "orgkeys-node") }

// waits waits until the unit's one start job waits for something.
func (b *box) waits() {
	b.t.Helper()
	harness.Eventually(b.t, harness.Patience, "the unit waits", func() bool {
		return strings.HasPrefix(b.Property("orgkeys-node.service", "StatusText"), "Waiting")
	})
	if state := b.Property("orgkeys-node.service", "SubState"); state != "start" {
		b.t.Errorf("the unit is in %q while it waits", state)
	}
}

// isUp checks that the unit and all dependents have started, each at its first attempt.
func (b *box) isUp() {
	b.t.Helper()
	for _, unit := range append(dependents(), "orgkeys-node.service") {
		harness.Eventually(b.t, 2*harness.Patience, unit+" is active", func() bool { return b.Property(unit, "ActiveState") == "active" })
		if n := b.Property(unit, "NRestarts"); n != "0" {
			b.t.Errorf("%s was started again %s times", unit, n)
		}
	}
}

// front is what a node's requests meet first: a reverse proxy before a real
// server, which a test can make answer otherwise, or not at all.
type front struct {
	*harness.Server
	org, url string
	key      []byte
	address  string
	handler  atomic.Pointer[http.HandlerFunc] // nil: the real server
	tls      atomic.Pointer[tls.Config]       // nil: http
	stop     func()
}

// newFront starts a front before s, for an organization with a key and a secret.
func newFront(t *testing.T, s *harness.Server) *front {
	t.Helper()
	f := &front{Server: s, org: harness.Org()}
	f.key = s.Generate(t, f.org).PEM
	f.putSecret(t, "env_s3", strings.Repeat("v1\n", 4000))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f.address = l.Addr().String()
	f.url = "http://" + f.address
	f.serve(t, l)
	t.Cleanup(func() { f.stop() })
	return f
}

func (f *front) putSecret(t *testing.T, name, value string) {
	t.Helper()
	f.PutSecret(t, f.org, name, []byte(value))
}

func (f *front) serve(t *testing.T, l net.Listener) {
	t.Helper()
	target, err := url.Parse(f.API)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(target)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if h := f.handler.Load(); h != nil {
			(*h)(w, r)
			return
		}
		proxy.ServeHTTP(w, r)
	})}
	go server.Serve(maybeTLS{l, f})
	var once sync.Once
	f.stop = func() { once.Do(func() { server.Close() }) }
}

// maybeTLS speaks what the front is to speak at the moment of a connection.
type maybeTLS struct {
	net.Listener
	f *front
}

func (l maybeTLS) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if config := l.f.tls.Load(); err == nil && config != nil {
		return tls.Server(c, config), nil
	}
	return c, err
}

func (f *front) answers(h http.HandlerFunc) { f.handler.Store(&h) }

// begin is the front's return after stop.
func (f *front) begin(t *testing.T) {
	t.Helper()
	l, err := net.Listen("tcp", f.address)
	if err != nil {
		t.Fatal(err)
	}
	f.serve(t, l)
}

// condition is something that is in a booting node's way and passes.
type condition struct {
	short bool                              // in the short form too
	begin func(t *testing.T, b *box) func() // before the boot; returns what ends it
}

func foreign(h http.HandlerFunc) func(*testing.T, *box) func() {
	return func(_ *testing.T, b *box) func() {
		b.front.answers(h)
		return func() { b.front.handler.Store(nil) }
	}
}

// overTLS has the front speak TLS under the node's own authority once it ends.
func overTLS(t *testing.T, b *box, first *tls.Config) func() {
	ca := testca.New(t)
	pair := ca.Issue(t, "localhost").Pair(t)
	b.settings("https://localhost:"+port(b.front.address), "ORGKEYS_NODE_CA_FILE=/etc/orgkeys-node/ca.pem")
	authority, err := os.ReadFile(ca.File)
	if err != nil {
		t.Fatal(err)
	}
	b.Put("orgkeys-node/ca.pem", string(authority), 0o644, 0)
	b.front.tls.Store(first)
	return func() { b.front.tls.Store(&tls.Config{Certificates: []tls.Certificate{pair}}) }
}

func port(address string) string {
	_, port, _ := net.SplitHostPort(address)
	return port
}

var conditions = map[string]condition{
	"connection refused": {true, func(t *testing.T, b *box) func() {
		b.front.stop()
		return func() { b.front.begin(t) }
	}},
	"portal's page":         {true, foreign(answering(200, "text/html", "<html>log in"))},
	"portal's redirect":     {false, foreign(answering(302, "text/html", "", "Location", "https://portal.example/"))},
	"ingress without route": {false, foreign(answering(404, "text/plain", "default backend - 404"))},
	"foreign 401":           {false, foreign(answering(401, "text/html", ""))},
	"foreign 403":           {false, foreign(answering(403, "application/json", `{"message":"Forbidden"}`))},
	"foreign 421":           {false, foreign(answering(421, "text/html", ""))},
	"foreign 425":           {false, foreign(answering(425, "", ""))},
	"foreign 429":           {false, foreign(answering(429, "text/html", "", "Retry-After", "1"))},
	"foreign 502":           {false, foreign(answering(502, "text/html", ""))},
	"other JSON":            {false, foreign(answering(200, "application/json", `{"status":"up"}`))},
	"draining":              {false, foreign(refusing(503, "draining", "Retry-After", "1"))},
	"stale timestamp":       {true, foreign(refusing(400, "stale_timestamp"))},
	"key comes later": {true, func(t *testing.T, b *box) func() {
		b.Remove("orgkeys-node/key.pem")
		return func() { b.Put("orgkeys-node/key.pem", string(b.front.key), 0o600, nodeUser) }
	}},
	"half a key": {false, func(t *testing.T, b *box) func() {
		b.Put("orgkeys-node/key.pem", string(b.front.key[:500]), 0o600, nodeUser)
		return func() { b.Put("orgkeys-node/key.pem", string(b.front.key), 0o600, nodeUser) }
	}},
	"key of another user": {false, func(t *testing.T, b *box) func() {
		b.Put("orgkeys-node/key.pem", string(b.front.key), 0o644, 1)
		return func() { b.Put("orgkeys-node/key.pem", string(b.front.key), 0o600, nodeUser) }
	}},
	"settings come later": {false, func(t *testing.T, b *box) func() {
		b.Remove("orgkeys-node/env")
		return func() { b.settings(b.front.url) }
	}},
	"no name service": {false, func(t *testing.T, b *box) func() {
		b.settings("http://localhost:" + port(b.front.address))
		b.Put("nsswitch.conf", "hosts: files dns\n", 0o644, 0)
		b.Put("hosts", "", 0o644, 0)
		return func() { b.Put("hosts", "127.0.0.1 localhost\n", 0o644, 0) }
	}},
	"untrusted certificate": {false, func(t *testing.T, b *box) func() {
		return overTLS(t, b, &tls.Config{Certificates: []tls.Certificate{testca.New(t).Issue(t, "localhost").Pair(t)}})
	}},
	"TLS not yet up": {false, func(t *testing.T, b *box) func() { return overTLS(t, b, nil) }},
	"authority comes later": {false, func(t *testing.T, b *box) func() {
		overTLS(t, b, nil)()
		ca, err := os.ReadFile(b.Path("/etc/orgkeys-node/ca.pem"))
		if err != nil {
			t.Fatal(err)
		}
		b.Remove("orgkeys-node/ca.pem")
		return func() { b.Put("orgkeys-node/ca.pem", string(ca), 0o644, 0) }
	}},
	"disk full": {false, func(t *testing.T, b *box) func() {
		b.Put(`systemd/system/var-lib-orgkeys\x2dnode.mount`, "[Mount]\nWhat=tmpfs\nWhere=/var/lib/orgkeys-node\nType=tmpfs\nOptions=size=8k,mode=700\n", 0o644, 0)
		return func() {
			if out, err := b.Inside("mount", "-o", "remount,size=1m", "/var/lib/orgkeys-node"); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
	}},
}

// A node that boots into a bad minute boots all the same, and so do the units
// that need its secrets: whatever passes is waited for within the one start job.
func TestABadMinuteAtBootPasses(t *testing.T) {
	if systemd.AsRoot(t) {
		return
	}
	s := harness.Start(t)
	for name, c := range conditions {
		if !c.short && os.Getenv("ORGKEYS_TEST_LONG") == "" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBox(t, newFront(t, s))
			end := c.begin(t, b)
			b.boot()
			b.waits()
			for _, unit := range dependents() {
				if state := b.Property(unit, "ActiveState"); state == "active" || state == "failed" {
					t.Errorf("%s is %s before the secrets are there", unit, state)
				}
			}
			end()
			b.isUp()
		})
	}
}

// Changed secrets and a new key come without a restart of what needs them.
func TestRefreshRestartsNothing(t *testing.T) {
	if systemd.AsRoot(t) {
		return
	}
	f := newFront(t, harness.Start(t))
	f.putSecret(t, "env_gcs", "v1")
	b := newBox(t, f)
	b.boot()
	b.isUp()
	invocations := func() (all string) {
		for _, unit := range dependents() {
			all += b.Property(unit, "InvocationID") + "\n"
		}
		return all
	}
	before := invocations()
	holds := func(want map[string]string) {
		t.Helper()
		m := machine{t: t, dir: b.Path("/var/lib/orgkeys-node")}
		m.holds(want)
	}
	// The key is replaced as docs/nodes.md says.
	next := f.Generate(t, f.org)
	b.Put("orgkeys-node/key.pem", string(next.PEM), 0o440, nodeUser)
	// As something else on the machine would provide it, for the group to read.
	if err := os.Chown(b.Path("/etc/orgkeys-node/key.pem"), 0, nodeUser); err != nil {
		t.Fatal(err)
	}
	f.putSecret(t, "env_s3", "v1 and more")
	owner := f.Client(t, f.org, "OWNER")
	if err := owner.DeleteSecret(t.Context(), f.org, "env_gcs"); err != nil {
		t.Fatal(err)
	}
	if out, err := b.Inside("systemctl", "reload", "orgkeys-node"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	holds(map[string]string{"env_s3": "v1 and more"})
	f.putSecret(t, "env_s3", "v1 of the timer")
	if out, err := b.Inside("systemctl", "start", "orgkeys-node-refresh.service"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	holds(map[string]string{"env_s3": "v1 of the timer"})

	// One that fails leaves everything as it is.
	if err := owner.DeleteKeys(t.Context(), f.org); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Inside("systemctl", "reload", "orgkeys-node"); err == nil {
		t.Error("a refresh with a deleted key succeeded")
	}
	b.isUp()
	if after := invocations(); after != before {
		t.Errorf("dependents were restarted: invocations\n%sbefore\n%s", after, before)
	}
}
