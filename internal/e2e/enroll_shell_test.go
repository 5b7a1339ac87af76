package e2e

import (
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// start starts examples/enroll.sh.
func (n *shellNode) start(more ...string) *exec.Cmd {
	n.t.Helper()
	args := append([]string{"--server", n.server, "--token-file", n.token, "--dir", n.dir}, more...)
	cmd := exec.Command("../../examples/enroll.sh", args...)
	cmd.Env = append(os.Environ(), "no_proxy=*", "NO_PROXY=*")
	must(n.t, cmd.Start())
	return cmd
}

// Two things on a machine may start it together: they end with one key between them.
func TestTwoShellNodesAtOnce(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	for round := range 6 {
		origin := []string{"node", "backend"}[round%2]
		m := mint(t, s, org, `{"origin":"`+origin+`"}`)
		n := newShellNode(t, s.API, m.Token)
		var both []*exec.Cmd
		for range 2 {
			both = append(both, n.start("--origin", origin))
		}
		for i, cmd := range both {
			if err := cmd.Wait(); err != nil {
				t.Errorf("round %d, run %d: %v", round, i, err)
			}
		}
		key := n.key()
		if got := show(t, s, org, m.ID); got.State != "received" || got.Conflicts != 0 || got.Claims[0].Fingerprint != client.Fingerprint(&key.PublicKey) {
			t.Errorf("round %d: %+v", round, got)
		}
	}
}

// Whatever ends it, no copy of the key stays beside the key.
func TestAShellNodeThatIsKilledLeavesNoCopyOfItsKey(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	target, err := url.Parse(s.API)
	must(t, err)
	forward := httputil.NewSingleHostReverseProxy(target)
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGHUP, syscall.SIGKILL} {
		t.Run(signal.String(), func(t *testing.T) {
			reached, release := make(chan struct{}), make(chan struct{})
			var once atomic.Bool
			between := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if strings.HasSuffix(r.URL.Path, "/receipt") && !once.Swap(true) {
					close(reached)
					<-release
					panic(http.ErrAbortHandler)
				}
				forward.ServeHTTP(w, r)
			}))
			defer between.Close()
			m := mint(t, s, org, `{}`)
			n := newShellNode(t, between.URL, m.Token)
			cmd := n.start()
			<-reached
			copies := filepath.Join(n.dir, ".work.*", "key.der")
			if there, err := filepath.Glob(copies); err != nil || len(there) != 1 {
				t.Fatalf("while it runs there is %v, %v", there, err)
			}
			must(t, cmd.Process.Signal(signal))
			if signal != syscall.SIGKILL {
				close(release)
			}
			if err := cmd.Wait(); err == nil {
				t.Error("it was not ended")
			}
			if there, err := filepath.Glob(copies); err != nil || len(there) > 0 && signal != syscall.SIGKILL {
				t.Errorf("it leaves %v, %v", there, err)
			}
			if signal == syscall.SIGKILL {
				close(release)
			}
			n.run(0, "key ")
			key := n.key()
			if got := show(t, s, org, m.ID); got.State != "received" || got.Claims[0].Fingerprint != client.Fingerprint(&key.PublicKey) {
				t.Errorf("%+v", got)
			}
		})
	}
}

// What is wrong with the arguments is told apart from what passes.
func TestAShellNodesArguments(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	m := mint(t, s, harness.Org(), `{"origin":"node"}`)
	n := newShellNode(t, s.API+"/elsewhere", m.Token)
	n.run(64, "is the path of --server right?", "--origin", "node")
	for _, mode := range []os.FileMode{0o770, 0o707, 0o777 | os.ModeSticky} {
		must(t, os.Chmod(n.dir, mode))
		n.run(64, "others may write to "+n.dir, "--origin", "node")
	}
	must(t, os.Chmod(n.dir, 0o755))
	if os.Geteuid() == 0 {
		must(t, os.Chown(n.dir, 1, 1))
		n.run(64, "belongs to another user", "--origin", "node")
		must(t, os.Chown(n.dir, 0, 0))
	}
	n.server = s.API + "//"
	n.run(0, "key ", "--origin", "node")
	n.key()
}

// A token that cannot be removed, or that a power cut brings back, is said, and changes nothing.
func TestAShellNodeWhoseTokenStays(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	for _, origin := range []string{"backend", "node"} {
		m := mint(t, s, org, `{"origin":"`+origin+`"}`)
		n := newShellNode(t, s.API, m.Token)
		n.under = []string{"strace", "-f", "-o", "/dev/null", "-P", n.token, "-e", "trace=unlink,unlinkat", "-e", "inject=unlink,unlinkat:error=EROFS"}
		n.run(0, n.token+" cannot be removed", "--origin", origin)
		n.server = "http://127.0.0.1:1" // nothing is left to ask
		n.run(0, n.token+" cannot be removed", "--origin", origin)
		n.under = nil
		token := n.token
		n.token += ".link"
		must(t, os.Symlink(token, n.token))
		n.run(0, n.token+" is a link, and what it leads to is not removed: remove both", "--origin", origin)
		_, err := os.Stat(n.token) // the link and the token
		must(t, err)
		must(t, os.Remove(n.token))
		n.token = token
		n.run(0, "key ", "--origin", origin)
		key := n.key()
		if got := show(t, s, org, m.ID); got.State != "received" || got.Conflicts != 0 || got.Claims[0].Fingerprint != client.Fingerprint(&key.PublicKey) {
			t.Errorf("%s: %+v", origin, got)
		}
	}
}
