package e2e

import (
	"encoding/binary"
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

	"golang.org/x/sys/unix"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/e2e/systemd"
	"github.com/orgkeys/orgkeys/internal/privatefile"
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

// A key that was withdrawn before its receipt is said to be; a new token brings another.
func TestAShellNodeWhoseReceiptComesLate(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	target, err := url.Parse(s.API)
	must(t, err)
	forward := httputil.NewSingleHostReverseProxy(target)
	between := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/receipt") {
			panic(http.ErrAbortHandler)
		}
		forward.ServeHTTP(w, r)
	}))
	defer between.Close()
	m := mint(t, s, org, `{}`)
	n := newShellNode(t, between.URL, m.Token)
	n.run(75, "cannot be reached")
	do(t, s, 200, harness.Request{Method: "DELETE", Path: "/organization/" + org + "/enrollment/" + m.ID, Token: s.Token(t, org, "OWNER")})
	n.server = s.API
	n.run(77, "was withdrawn before its receipt arrived")
	n.put(mint(t, s, org, `{}`).Token)
	n.run(0, "key ")
	n.key()
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
	// What stands before an @ is no host.
	for _, scheme := range []string{"http://127.0.0.1:1@", "http://localhost:1@", "https://127.0.0.1:1@"} {
		n.server = scheme + strings.TrimPrefix(s.API, "http://")
		n.run(64, "--server: a URL without @", "--origin", "node")
	}
	if os.Geteuid() == 0 {
		must(t, os.Chown(n.dir, 1, 1))
		n.run(64, "belongs to another user", "--origin", "node")
		must(t, os.Chown(n.dir, 0, 0))
	}
	n.server = s.API + "//"
	dir := n.dir
	n.dir += ".link"
	must(t, os.Symlink(dir, n.dir))
	must(t, os.Chmod(dir, 0o777))
	n.run(64, "others may write to "+n.dir, "--origin", "node")
	must(t, os.Chmod(dir, 0o755))
	n.run(0, "key ", "--origin", "node")
	n.dir = dir
	n.key()
}

// The token's file is what orgkeys-node accepts as one, and nothing else.
func TestWhoMayReadAShellNodesToken(t *testing.T) {
	t.Parallel()
	// Nothing answers there: a file that is accepted is read, and the server missed.
	n := newShellNode(t, "http://127.0.0.1:1", "oke1.00000000-0000-4000-8000-000000000000."+strings.Repeat("A", 43))
	file := n.token
	const accepted, shared = "cannot be reached", "): chmod 600"
	try := func(mode os.FileMode, want string) {
		t.Helper()
		must(t, os.Chmod(file, mode))
		_, err := privatefile.Read(file, 4096, privatefile.Owner)
		if (err == nil) != (want == accepted) {
			t.Errorf("orgkeys-node says of %v: %v", mode, err)
		}
		n.run(map[string]int{accepted: 75, shared: 64}[want], want, "--origin", "node")
	}
	for mode, want := range map[os.FileMode]string{
		0o600: accepted, 0o400: accepted, 0o440: accepted,
		0o640: shared, 0o460: shared, 0o604: shared, 0o602: shared, 0o644: shared, 0o444: shared, 0o620: shared, 0o610: shared,
	} {
		try(mode, want)
	}
	n.token = file + ".link"
	must(t, os.Symlink(file, n.token))
	try(0o644, shared)
	try(0o600, accepted)
	if os.Geteuid() == 0 { // nobody else can give files away, or is not asked who may read them
		must(t, os.Chown(file, 0, 54321))
		try(0o440, shared)
		must(t, os.Chown(file, 1, 0))
		for _, mode := range []os.FileMode{0o600, 0o640, 0o440} {
			must(t, os.Chmod(file, mode))
			n.run(64, "belongs to user 1: chown it", "--origin", "node")
		}
	}
	n.token = t.TempDir()
	n.run(77, n.token+" is not a regular file", "--origin", "node")
	n.token = filepath.Join(t.TempDir(), "pipe")
	must(t, syscall.Mkfifo(n.token, 0o600))
	n.run(77, n.token+" is not a regular file", "--origin", "node")
}

// A systemd credential, of which the mode says that root's group may read it.
func TestAShellNodesTokenIsACredential(t *testing.T) {
	t.Parallel()
	if systemd.AsRoot(t) {
		return
	}
	n := newShellNode(t, "http://127.0.0.1:1", "oke1.00000000-0000-4000-8000-000000000000."+strings.Repeat("A", 43))
	for _, path := range []string{filepath.Dir(n.token), filepath.Dir(filepath.Dir(n.token))} {
		must(t, os.Chmod(path, 0o755))
	}
	must(t, os.Mkdir(n.dir, 0o700))
	const nobody = 65534
	must(t, os.Chown(n.dir, nobody, nobody))
	script, err := os.ReadFile("../../examples/enroll.sh")
	must(t, err)
	// The script as a text: nobody may be kept from reading the source tree.
	n.under = []string{"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", string(script)}
	must(t, os.Chmod(n.token, 0o440))
	n.run(64, "this user may not read "+n.token, "--origin", "node")
	// Version 2, and of each entry tag, permissions and ID: linux/posix_acl_xattr.h.
	list := []uint32{2, 4<<16 | 0x01, ^uint32(0), 4<<16 | 0x02, nobody, 0x04, ^uint32(0), 4<<16 | 0x10, ^uint32(0), 0x20, ^uint32(0)}
	encoded, err := binary.Append(nil, binary.LittleEndian, list)
	must(t, err)
	must(t, unix.Setxattr(n.token, "system.posix_acl_access", encoded, 0))
	n.run(75, "cannot be reached", "--origin", "node")
	// As Kubernetes mounts it.
	must(t, os.Remove(n.token))
	n.put("oke1.00000000-0000-4000-8000-000000000000." + strings.Repeat("A", 43))
	must(t, os.Chown(n.token, 0, nobody))
	must(t, os.Chmod(n.token, 0o640))
	n.run(75, "cannot be reached", "--origin", "node")
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

// A run that does not find the token, as when a credential is not mounted, leaves the receipt
// to one that does.
func TestAShellNodesReceiptIsSentLater(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	m := mint(t, s, org, `{}`)
	api, err := url.Parse(s.API)
	must(t, err)
	proxy := httputil.NewSingleHostReverseProxy(api)
	without := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/receipt") {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(without.Close)
	n := newShellNode(t, without.URL, m.Token)
	n.run(75, "")
	must(t, os.Rename(n.token, n.token+".away"))
	n.run(0, "")
	must(t, os.Rename(n.token+".away", n.token))
	n.server = s.API
	n.run(0, "key ")
	key := n.key()
	if got := show(t, s, org, m.ID); got.State != "received" || got.Claims[0].Fingerprint != client.Fingerprint(&key.PublicKey) {
		t.Errorf("%+v", got)
	}
}

// While a token for another key waits for its approval, runs that do not find it, and runs with
// the token of the key that is there, leave what it began with.
func TestAShellNodeLeavesWhatAnotherEnrollmentBeganWith(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	owner := s.Client(t, org, "OWNER")
	for origin, first := range map[string]string{"backend": "recipient.pem", "node": "own_key.pem"} {
		used := mint(t, s, org, `{"origin":"`+origin+`"}`)
		n := newShellNode(t, s.API, used.Token)
		n.run(0, "key ", "--origin", origin)
		before := n.key()

		m := mint(t, s, org, `{"origin":"`+origin+`","approval":true}`)
		n.put(m.Token)
		n.run(75, "not ready yet", "--origin", origin)
		begun, err := os.ReadFile(filepath.Join(n.dir, first))
		must(t, err)
		must(t, os.Remove(n.token))
		n.run(0, "", "--origin", origin)
		n.put(used.Token)
		n.run(0, "key ", "--origin", origin)
		if now, err := os.ReadFile(filepath.Join(n.dir, first)); err != nil || string(now) != string(begun) {
			t.Fatalf("%s: %s is not what it was: %v", origin, first, err)
		}
		n.put(m.Token)
		waiting, err := owner.Permission(t.Context(), org, m.ID)
		must(t, err)
		must(t, owner.ApproveEnrollment(t.Context(), org, m.ID, waiting.Claims[0].Recipient))
		n.run(0, "key ", "--origin", origin)
		if got := show(t, s, org, m.ID); n.key().Equal(before) || got.State != "received" || got.Conflicts != 0 {
			t.Errorf("%s: %+v", origin, got)
		}
	}
}

// A run that is killed when it has stored the answer, and not the key, leaves the key of the
// enrollment before, which a third token replaces, and what the key began with.
func TestAShellNodeThatIsKilledBetweenAnswerAndKey(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	killing := t.TempDir()
	must(t, os.WriteFile(filepath.Join(killing, "mv"), []byte("#!/bin/sh\ncase $2 in */private_key.pem) kill -9 $PPID; exit ;; esac\nPATH=${PATH#*:} exec mv \"$@\"\n"), 0o700))
	for _, origin := range []string{"backend", "node"} {
		n := newShellNode(t, s.API, mint(t, s, org, `{"origin":"`+origin+`"}`).Token)
		n.run(0, "key ", "--origin", origin)
		before := n.key()
		m := mint(t, s, org, `{"origin":"`+origin+`"}`)
		n.put(m.Token)
		n.under = []string{"env", "PATH=" + killing + ":" + os.Getenv("PATH")}
		for range 2 {
			n.run(-1, "", "--origin", origin)
		}
		n.under = nil
		must(t, os.Rename(n.token, n.token+".away"))
		n.run(0, "", "--origin", origin)
		switch origin {
		case "node": // the key that the server accepted is still there
			must(t, os.Rename(n.token+".away", n.token))
		case "backend":
			do(t, s, 200, harness.Request{Method: "DELETE", Path: "/organization/" + org + "/enrollment/" + m.ID, Token: s.Token(t, org, "OWNER")})
			m = mint(t, s, org, `{}`)
			n.put(m.Token)
		}
		n.run(0, "key ", "--origin", origin)
		if got := show(t, s, org, m.ID); n.key().Equal(before) || got.State != "received" || got.Conflicts != 0 {
			t.Errorf("%s: %+v", origin, got)
		}
	}
}
