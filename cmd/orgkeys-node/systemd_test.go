package main_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// nodeUser is the user that the unit runs as, in the machines of these tests.
const nodeUser = 990

// box is a machine whose process 1 is the real systemd, with the shipped units
// and the shipped program (testdata/machine.sh).
type box struct {
	t     *testing.T
	etc   string // what its /etc is made of
	pid   int    // its process 1, seen from here
	front *front
}

// ranAsRoot runs the test by another process as root, unless this one is: only
// root has machines.
func ranAsRoot(t *testing.T) bool {
	t.Helper()
	if os.Geteuid() == 0 {
		return false
	}
	cmd := exec.Command("sudo", "-n", "env", "PATH="+os.Getenv("PATH"), "HOME="+os.Getenv("HOME"), "GOFLAGS="+os.Getenv("GOFLAGS"),
		"ORGKEYS_TEST_LONG="+os.Getenv("ORGKEYS_TEST_LONG"), os.Args[0], "-test.v", "-test.run=^"+t.Name()+"$")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return true
}

// newBox prepares a machine that is as a node's should be: settings, key, and
// dependents of the unit. What a test takes away it puts back with put.
func newBox(t *testing.T, f *front) *box {
	t.Helper()
	b := &box{t: t, etc: filepath.Join(t.TempDir(), "etc"), front: f}
	for path, text := range map[string]string{
		"passwd":     fmt.Sprintf("root:x:0:0::/root:/bin/sh\norgkeys-node:x:%d:%d::/nonexistent:/usr/sbin/nologin\n", nodeUser, nodeUser),
		"group":      fmt.Sprintf("root:x:0:\norgkeys-node:x:%d:\n", nodeUser),
		"machine-id": "0123456789abcdef0123456789abcdef\n",
		"hosts":      "127.0.0.1 localhost\n",
		"systemd/system/machine.target": "[Unit]\nWants=systemd-journald.service systemd-journald.socket systemd-journald-dev-log.socket\n" +
			"Wants=orgkeys-node.service " + strings.Join(dependents(), " ") + "\n",
	} {
		b.put(path, text, 0o644, 0)
	}
	for name, text := range dependentUnits {
		b.put("systemd/system/"+name, text+"RemainAfterExit=yes\nExecStartPre=/bin/grep -q v1 /var/lib/orgkeys-node/env_s3\n", 0o644, 0)
	}
	for _, unit := range []string{"orgkeys-node.service", "orgkeys-node-refresh.service", "orgkeys-node-refresh.timer"} {
		text, err := os.ReadFile(unit)
		if err != nil {
			t.Fatal(err)
		}
		b.put("systemd/system/"+unit, string(text), 0o644, 0)
	}
	b.settings(f.url)
	b.put("orgkeys-node/key.pem", string(f.key), 0o600, nodeUser)
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
	b.put("orgkeys-node/env", strings.Join(append([]string{
		"ORGKEYS_NODE_SERVER=" + server, "ORGKEYS_NODE_ORG=" + b.front.org, "ORGKEYS_NODE_IP=192.0.2.7", "ORGKEYS_NODE_REGION=eu",
	}, more...), "\n")+"\n", 0o644, 0)
}

// root is a path on the machine, seen from here.
func (b *box) root(path string) string {
	if b.pid == 0 {
		return filepath.Join(b.etc, strings.TrimPrefix(path, "/etc"))
	}
	return fmt.Sprintf("/proc/%d/root%s", b.pid, path)
}

// put writes a file under /etc, whole or not at all, before the machine boots or while it runs.
func (b *box) put(path, text string, mode fs.FileMode, owner int) {
	b.t.Helper()
	to := b.root("/etc/" + path)
	if err := errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to+".new", []byte(text), mode), os.Chmod(to+".new", mode),
		os.Chown(to+".new", owner, owner), os.Rename(to+".new", to)); err != nil {
		b.t.Fatal(err)
	}
}

func (b *box) remove(path string) {
	b.t.Helper()
	if err := os.Remove(b.root("/etc/" + path)); err != nil {
		b.t.Fatal(err)
	}
}

// boot starts the machine. The test's end takes its power away.
func (b *box) boot() {
	b.t.Helper()
	dir := filepath.Dir(b.etc)
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "root"), 0o755), os.Mkdir(filepath.Join(dir, "bin"), 0o755),
		os.Link(binary, filepath.Join(dir, "bin", "orgkeys-node"))); err != nil {
		b.t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child", "--", "testdata/machine.sh", dir, controlGroup(b.t))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() {
		if b.t.Failed() && b.pid != 0 {
			log, _ := b.inside("journalctl", "--no-pager", "--output=short-monotonic")
			b.t.Logf("%s\n%s", log, out.String())
		}
		cmd.Process.Kill() // takes its child along, and that all processes of the machine
		cmd.Wait()
	})
	harness.Eventually(b.t, harness.Patience, "systemd answers", func() bool {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", cmd.Process.Pid, cmd.Process.Pid))
		if _, scanErr := fmt.Sscan(string(text), &b.pid); err != nil || scanErr != nil {
			return false
		}
		_, err = b.inside("systemctl", "show", "--property=Version")
		return err == nil
	})
}

// controlGroup makes a control group for a machine, and removes it with what
// systemd made in it.
func controlGroup(t *testing.T) string {
	t.Helper()
	parent := "/sys/fs/cgroup"
	if _, err := os.Stat(parent + "/unified"); err == nil { // beside version 1
		parent += "/unified"
	}
	group, err := os.MkdirTemp(parent, "orgkeys-machine-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		var all []string
		filepath.WalkDir(group, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				all = append(all, path)
			}
			return nil
		})
		for _, path := range slices.Backward(all) {
			harness.Eventually(t, harness.Patience, path+" is removed", func() bool { return syscall.Rmdir(path) == nil })
		}
	})
	return group
}

// inside runs a program on the machine.
func (b *box) inside(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--target", fmt.Sprint(b.pid), "--mount", "--pid", "--cgroup", "--root", "--"}, args...)...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin"}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (b *box) property(unit, name string) string {
	out, _ := b.inside("systemctl", "show", "--value", "--property="+name, unit)
	return strings.TrimSpace(out)
}

// waits waits until the unit's one start job waits for something.
func (b *box) waits() {
	b.t.Helper()
	harness.Eventually(b.t, harness.Patience, "the unit waits", func() bool {
		return strings.HasPrefix(b.property("orgkeys-node.service", "StatusText"), "Waiting")
	})
	if state := b.property("orgkeys-node.service", "SubState"); state != "start" {
		b.t.Errorf("the unit is in %q while it waits", state)
	}
}

// isUp checks that the unit and all dependents have started, each at its first attempt.
func (b *box) isUp() {
	b.t.Helper()
	for _, unit := range append(dependents(), "orgkeys-node.service") {
		harness.Eventually(b.t, 2*harness.Patience, unit+" is active", func() bool { return b.property(unit, "ActiveState") == "active" })
		if n := b.property(unit, "NRestarts"); n != "0" {
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
	ca := harness.NewCA(t)
	pair := ca.Issue(t, "localhost").Pair(t)
	b.settings("https://localhost:"+port(b.front.address), "ORGKEYS_NODE_CA_FILE=/etc/orgkeys-node/ca.pem")
	authority, err := os.ReadFile(ca.File)
	if err != nil {
		t.Fatal(err)
	}
	b.put("orgkeys-node/ca.pem", string(authority), 0o644, 0)
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
		b.remove("orgkeys-node/key.pem")
		return func() { b.put("orgkeys-node/key.pem", string(b.front.key), 0o600, nodeUser) }
	}},
	"half a key": {false, func(t *testing.T, b *box) func() {
		b.put("orgkeys-node/key.pem", string(b.front.key[:500]), 0o600, nodeUser)
		return func() { b.put("orgkeys-node/key.pem", string(b.front.key), 0o600, nodeUser) }
	}},
	"key of another user": {false, func(t *testing.T, b *box) func() {
		b.put("orgkeys-node/key.pem", string(b.front.key), 0o644, 1)
		return func() { b.put("orgkeys-node/key.pem", string(b.front.key), 0o600, nodeUser) }
	}},
	"settings come later": {false, func(t *testing.T, b *box) func() {
		b.remove("orgkeys-node/env")
		return func() { b.settings(b.front.url) }
	}},
	"no name service": {false, func(t *testing.T, b *box) func() {
		b.settings("http://localhost:" + port(b.front.address))
		b.put("nsswitch.conf", "hosts: files dns\n", 0o644, 0)
		b.put("hosts", "", 0o644, 0)
		return func() { b.put("hosts", "127.0.0.1 localhost\n", 0o644, 0) }
	}},
	"untrusted certificate": {false, func(t *testing.T, b *box) func() {
		return overTLS(t, b, &tls.Config{Certificates: []tls.Certificate{harness.NewCA(t).Issue(t, "localhost").Pair(t)}})
	}},
	"TLS not yet up": {false, func(t *testing.T, b *box) func() { return overTLS(t, b, nil) }},
	"authority comes later": {false, func(t *testing.T, b *box) func() {
		overTLS(t, b, nil)()
		ca, err := os.ReadFile(b.root("/etc/orgkeys-node/ca.pem"))
		if err != nil {
			t.Fatal(err)
		}
		b.remove("orgkeys-node/ca.pem")
		return func() { b.put("orgkeys-node/ca.pem", string(ca), 0o644, 0) }
	}},
	"disk full": {false, func(t *testing.T, b *box) func() {
		b.put(`systemd/system/var-lib-orgkeys\x2dnode.mount`, "[Mount]\nWhat=tmpfs\nWhere=/var/lib/orgkeys-node\nType=tmpfs\nOptions=size=8k,mode=700\n", 0o644, 0)
		return func() {
			if out, err := b.inside("mount", "-o", "remount,size=1m", "/var/lib/orgkeys-node"); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
	}},
}

// A node that boots into a bad minute boots all the same, and so do the units
// that need its secrets: whatever passes is waited for within the one start job.
func TestABadMinuteAtBootPasses(t *testing.T) {
	if ranAsRoot(t) {
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
				if state := b.property(unit, "ActiveState"); state == "active" || state == "failed" {
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
	if ranAsRoot(t) {
		return
	}
	f := newFront(t, harness.Start(t))
	f.putSecret(t, "env_gcs", "v1")
	b := newBox(t, f)
	b.boot()
	b.isUp()
	invocations := func() (all string) {
		for _, unit := range dependents() {
			all += b.property(unit, "InvocationID") + "\n"
		}
		return all
	}
	before := invocations()
	holds := func(want map[string]string) {
		t.Helper()
		m := machine{t: t, dir: b.root("/var/lib/orgkeys-node")}
		m.holds(want)
	}
	// The key is replaced as docs/nodes.md says.
	next := f.Generate(t, f.org)
	b.put("orgkeys-node/key.pem", string(next.PEM), 0o440, nodeUser)
	// As something else on the machine would provide it, for the group to read.
	if err := os.Chown(b.root("/etc/orgkeys-node/key.pem"), 0, nodeUser); err != nil {
		t.Fatal(err)
	}
	f.putSecret(t, "env_s3", "v1 and more")
	owner := f.Client(t, f.org, "OWNER")
	if err := owner.DeleteSecret(t.Context(), f.org, "env_gcs"); err != nil {
		t.Fatal(err)
	}
	if out, err := b.inside("systemctl", "reload", "orgkeys-node"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	holds(map[string]string{"env_s3": "v1 and more"})
	f.putSecret(t, "env_s3", "v1 of the timer")
	if out, err := b.inside("systemctl", "start", "orgkeys-node-refresh.service"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	holds(map[string]string{"env_s3": "v1 of the timer"})

	// One that fails leaves everything as it is.
	if err := owner.DeleteKeys(t.Context(), f.org); err != nil {
		t.Fatal(err)
	}
	if _, err := b.inside("systemctl", "reload", "orgkeys-node"); err == nil {
		t.Error("a refresh with a deleted key succeeded")
	}
	b.isUp()
	if after := invocations(); after != before {
		t.Errorf("dependents were restarted: invocations\n%sbefore\n%s", after, before)
	}
}
