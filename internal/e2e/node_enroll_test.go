package e2e

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/envelope/envelopetest"
	"github.com/orgkeys/orgkeys/internal/testca"
)

// enrollingNode is a machine with an enrollment token, and orgkeys-node on it.
type enrollingNode struct {
	t      *testing.T
	dir    string // its key and secrets
	token  string // the token's file
	server string
	ip     string
	wait   string
	more   []string // flags

	mu      sync.Mutex
	running *os.Process
}

func newEnrollingNode(t *testing.T, server, token, ip string) *enrollingNode {
	t.Helper()
	home := t.TempDir()
	n := &enrollingNode{t: t, dir: filepath.Join(home, "node"), token: filepath.Join(home, "token"), server: server, ip: ip, wait: "1m"}
	n.put(token)
	return n
}

func (n *enrollingNode) put(token string) {
	n.t.Helper()
	if err := os.WriteFile(n.token, []byte(token+"\n"), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

func (n *enrollingNode) key() string { return filepath.Join(n.dir, "key.pem") }

// run runs a command of orgkeys-node, below another program if under is given,
// and returns its exit code, -1 if it was killed.
func (n *enrollingNode) run(under []string, command string, more ...string) (int, string) {
	n.t.Helper()
	args := append([]string{command, "--server", n.server, "--dir", n.dir, "--token-file", n.token, "--wait", n.wait}, append(n.more, more...)...)
	if command == "boot" {
		args = append(args, "--ip", n.ip, "--region", "eu")
	}
	args = append(append(slices.Clone(under), harness.NodeBinary(n.t)), args...)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "GOMAXPROCS=1"}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	n.mu.Lock()
	err := cmd.Start()
	n.running = cmd.Process
	n.mu.Unlock()
	if err != nil {
		n.t.Fatal(err)
	}
	err = cmd.Wait()
	if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		n.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String()
}

func (n *enrollingNode) kill() {
	n.mu.Lock()
	defer n.mu.Unlock()
	_ = n.running.Kill() // it may have ended
}

// fingerprint is that of the key that the node has.
func (n *enrollingNode) fingerprint() string {
	n.t.Helper()
	text, err := os.ReadFile(n.key())
	if err != nil {
		n.t.Fatal(err)
	}
	return client.Fingerprint(&harness.ParsePrivate(n.t, text).PublicKey)
}

// hasOnly checks what is on the node when all is done.
func (n *enrollingNode) hasOnly(secrets ...string) {
	n.t.Helper()
	entries, err := os.ReadDir(n.dir)
	if err != nil {
		n.t.Fatal(err)
	}
	var found []string
	for _, e := range entries {
		if info, err := e.Info(); err != nil || info.Mode() != 0o600 {
			n.t.Errorf("%s: %v %v", e.Name(), info.Mode(), err)
		}
		if !strings.HasPrefix(e.Name(), ".orgkeys-node.") {
			found = append(found, e.Name())
		}
	}
	want := append([]string{"key.pem", "key.pem.enrollment"}, secrets...)
	slices.Sort(want)
	if !slices.Equal(found, want) {
		n.t.Errorf("left on the node: %q, want %q", found, want)
	}
	if _, err := os.Stat(n.token); !os.IsNotExist(err) {
		n.t.Errorf("the token's file after the receipt: %v", err)
	}
}

// between is what lies between node and server: at a named point it does
// something, once.
type between struct {
	*httptest.Server
	forward http.Handler
	mu      sync.Mutex
	at      string
	do      func()
	cut     bool // and ends the connection without an answer
	reached bool
}

func newBetween(t *testing.T, s *harness.Server) *between {
	t.Helper()
	target, err := url.Parse(s.API)
	if err != nil {
		t.Fatal(err)
	}
	b := &between{forward: httputil.NewSingleHostReverseProxy(target)}
	b.Server = httptest.NewServer(b)
	t.Cleanup(b.Close)
	return b
}

// arm sets the point; empty is none.
func (b *between) arm(point string, do func(), cut bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.at, b.do, b.cut, b.reached = point, do, cut, false
}

func (b *between) wasReached() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.reached
}

// meets reports whether the connection ends at the point.
func (b *between) meets(point string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.at != point || b.reached {
		return false
	}
	b.reached = true
	if b.do != nil {
		b.do()
	}
	return b.cut
}

// stages of each request, in their order.
var stages = []string{"asked", "answered", "passed on"}

func (b *between) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	of := strings.TrimPrefix(r.URL.Path, "/") + " "
	if strings.HasPrefix(of, "enroll/") {
		of = "claim "
		if strings.HasSuffix(r.URL.Path, "/receipt") {
			of = "receipt "
		}
	}
	if b.meets(of + stages[0]) {
		panic(http.ErrAbortHandler)
	}
	rec := httptest.NewRecorder()
	b.forward.ServeHTTP(rec, r)
	if b.meets(of + stages[1]) {
		panic(http.ErrAbortHandler)
	}
	for name, values := range rec.Header() {
		w.Header()[name] = values
	}
	w.WriteHeader(rec.Code)
	if _, err := w.Write(rec.Body.Bytes()); err == nil {
		_ = http.NewResponseController(w).Flush() // to a node that may be dead
	}
	if b.meets(of + stages[2]) {
		panic(http.ErrAbortHandler)
	}
}

// death is a moment of a boot: a point between node and server, or a system
// call of the node on a path, before which strace kills it.
type death struct {
	point       string
	calls, path string
}

func (d death) String() string { return strings.TrimSpace(d.point + d.calls + " " + d.path) }

// deaths are all steps of a boot with a token, in their order.
func (n *enrollingNode) deaths() (all []death) {
	stored := func(name string) {
		temporary := "." + name + ".new"
		all = append(all, death{calls: "openat", path: temporary}, death{calls: "write", path: filepath.Join(n.dir, temporary)},
			death{calls: "fsync", path: filepath.Join(n.dir, temporary)}, death{calls: "renameat", path: temporary})
	}
	requested := func(what string) {
		for _, stage := range stages {
			all = append(all, death{point: what + " " + stage})
		}
	}
	all = append(all, death{calls: "mkdirat", path: n.dir})
	stored("key.pem.recipient")
	all = append(all, death{calls: "fsync", path: n.dir})
	requested("claim")
	stored("key.pem.enrollment")
	stored("key.pem")
	requested("receipt")
	stored("key.pem.enrollment")
	all = append(all, death{calls: "unlinkat", path: filepath.Join(n.dir, "key.pem.recipient")}, death{calls: "unlinkat", path: n.token})
	requested("secrets")
	stored(".orgkeys-node.json")
	stored("env_s3")
	requested("register")
	return all
}

// dies runs a boot that d ends, and reports whether it did.
func (n *enrollingNode) dies(b *between, d death) bool {
	n.t.Helper()
	if d.point == "" {
		code, _ := n.run([]string{"strace", "-f", "-o", "/dev/null", "-P", d.path, "-e", "trace=" + d.calls, "-e", "inject=" + d.calls + ":signal=KILL"}, "boot")
		return code == -1
	}
	b.arm(d.point, n.kill, false)
	n.run(nil, "boot")
	return b.wasReached()
}

// cut runs a boot whose connection d's point ends. It goes on by itself.
func (n *enrollingNode) cut(b *between, d death) bool {
	n.t.Helper()
	b.arm(d.point, nil, true)
	if code, out := n.run(nil, "boot"); code != 0 {
		n.t.Errorf("cut at %s: %d %s", d, code, out)
	}
	return b.wasReached()
}

// boots runs one that nothing disturbs.
func (n *enrollingNode) boots(b *between) {
	n.t.Helper()
	b.arm("", nil, false)
	if code, out := n.run(nil, "boot"); code != 0 {
		n.t.Fatalf("undisturbed, after all that: %d %s", code, out)
	}
}

// backEnds runs a test on each back end that seals keys.
func backEnds(t *testing.T, test func(t *testing.T, s *harness.Server)) {
	t.Run("pkcs11", func(t *testing.T) {
		s := harness.Start(t, harness.Set("ORGKEYS_MAX_NODE_KEYS", "1000"))
		test(t, s)
		onlyOwnKeys(t, s)
	})
	t.Run("vault", func(t *testing.T) {
		v, _, settings := throughVault(t)
		s := harness.Start(t, settings, harness.Set("ORGKEYS_MAX_NODE_KEYS", "1000"))
		test(t, s)
		harness.Eventually(t, time.Minute, "no key is left in the mount of sealed keys", func() bool { return len(sealedInVault(t, v)) == 0 })
	})
}

// oneEach checks that enrollments have one key each, and no other is left.
func oneEach(t *testing.T, s *harness.Server, org string, fingerprints map[string]string) {
	t.Helper()
	for id, fingerprint := range fingerprints {
		got := show(t, s, org, id)
		if got.State != "received" || len(got.Claims) != 1 || got.Claims[0].Fingerprint != fingerprint || got.Conflicts != 0 {
			t.Errorf("enrollment %s ended as %+v; the node has %s", id, got, fingerprint)
		}
	}
	db := s.Database(t)
	for query, want := range map[string]int{
		"SELECT count(*) FROM keys_of_nodes WHERE slot IS NOT NULL": len(fingerprints),
		"SELECT count(*) FROM deliveries WHERE wrapped IS NOT NULL": 0,
	} {
		if got := harness.Number(t, db, query); got != int64(want) {
			t.Errorf("%s: %d, want %d", query, got, want)
		}
	}
}

// TestPromise12_ANodeKilledAtAnyStepEndsWithOneKey kills a booting node before
// each of its steps in turn, and cuts its connection at each point, in one
// boot after the other; then, each time on a new node, at points of chance. It
// always ends with the one key that the server gave it, and nothing else.
func TestPromise12_ANodeKilledAtAnyStepEndsWithOneKey(t *testing.T) {
	backEnds(t, func(t *testing.T, s *harness.Server) {
		org := harness.Org()
		s.PutSecret(t, org, "env_s3", []byte("A=1"))
		b := newBetween(t, s)
		fingerprints := map[string]string{}
		enrolled := 0
		next := func() (*enrollingNode, string) {
			m := mint(t, s, org, `{}`)
			enrolled++
			return newEnrollingNode(t, b.URL, m.Token, fmt.Sprintf("10.2.%d.%d", enrolled>>8, enrolled&255)), m.ID
		}
		ends := func(n *enrollingNode, id string) {
			t.Helper()
			n.boots(b)
			n.hasOnly("env_s3")
			fingerprints[id] = n.fingerprint()
			n.boots(b)
			if n.fingerprint() != fingerprints[id] {
				t.Error("a later boot has another key")
			}
		}

		// inTurn ends one boot after the other by each death. A boot may get
		// further than to its own; then the next one is a new node's.
		inTurn := func(ended func(*enrollingNode, *between, death) bool, is func(death) bool) (n int) {
			node, id := next()
			for i, d := range node.deaths() {
				if !is(d) {
					continue
				}
				if !ended(node, b, node.deaths()[i]) {
					ends(node, id)
					node, id = next()
					if !ended(node, b, node.deaths()[i]) {
						t.Errorf("nothing ended the boot at %s", node.deaths()[i])
					}
				}
				n++
			}
			ends(node, id)
			return n
		}
		kills := inTurn((*enrollingNode).dies, func(death) bool { return true })
		cuts := inTurn((*enrollingNode).cut, func(d death) bool { return d.point != "" })

		rounds := 3
		if long() {
			rounds = 250 - kills - cuts
		}
		random := mathrand.New(mathrand.NewPCG(*seed, 16))
		for range rounds {
			n, id := next()
			for range 1 + random.IntN(3) {
				d := n.deaths()[random.IntN(len(n.deaths()))]
				switch {
				case d.point != "" && random.IntN(2) == 0:
					n.cut(b, d)
				case random.IntN(3) == 0:
					b.arm("", nil, false)
					timer := time.AfterFunc(time.Duration(random.IntN(600))*time.Millisecond, func() { n.kill() })
					n.run(nil, "boot")
					timer.Stop()
				default:
					n.dies(b, d)
				}
			}
			ends(n, id)
		}
		t.Logf("killed at %d steps and cut at %d in turn, and %d nodes at random: %d enrollments", kills, cuts, rounds, enrolled)
		oneEach(t, s, org, fingerprints)
	})
}

// cutter passes connections on to a server, and ends each after so many bytes
// of what the server says.
type cutter struct {
	net.Listener
	after atomic.Int64 // negative: never
	said  atomic.Int64 // bytes that the server has said in the last connection
	wg    sync.WaitGroup
}

func newCutter(t *testing.T, target string) *cutter {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cutter{Listener: l}
	go func() {
		for {
			from, err := l.Accept()
			if err != nil {
				return
			}
			c.wg.Go(func() { c.pass(from, target) })
		}
	}()
	t.Cleanup(func() {
		l.Close()
		c.wg.Wait()
	})
	return c
}

func (c *cutter) pass(from net.Conn, target string) {
	defer from.Close()
	to, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	defer to.Close()
	go func() {
		_, _ = io.Copy(to, from) // ends with either connection
		to.Close()
	}()
	c.said.Store(0)
	answers := io.Reader(to)
	if after := c.after.Load(); after >= 0 {
		answers = io.LimitReader(to, after)
	}
	n, _ := io.Copy(from, answers) // likewise
	c.said.Store(n)
}

// TestPromise12_AnswersCutAtEveryByte cuts what the server says at each byte,
// first the answer with the sealed key, then that to the receipt. The node
// believes no part of one, and goes on the next time.
func TestPromise12_AnswersCutAtEveryByte(t *testing.T) {
	backEnds(t, func(t *testing.T, s *harness.Server) {
		org := harness.Org()
		c := newCutter(t, strings.TrimPrefix(s.API, "http://"))
		m := mint(t, s, org, `{}`)
		n := newEnrollingNode(t, "http://"+c.Addr().String(), m.Token, "10.3.0.1")
		// How long both are is seen with another node.
		other := newEnrollingNode(t, n.server, mint(t, s, org, `{}`).Token, "10.3.0.2")
		c.after.Store(1 << 20)
		if code, out := other.run(nil, "enroll"); code != 0 {
			t.Fatalf("%d %s", code, out)
		}
		var both int64
		harness.Eventually(t, harness.Patience, "the connection has ended", func() bool {
			both = c.said.Load()
			return both > 0
		})
		n.wait = "0s"
		every := int64(197)
		if long() {
			every = 1
		}
		offset, tried := int64(0), 0
		for ; !exists(n.key()); offset += every {
			if offset > both {
				t.Fatalf("there is no key after %d bytes", offset)
			}
			c.after.Store(offset)
			tried++
			code, out := n.run(nil, "enroll")
			if code == 75 { // all of an answer that says that the key is still being made
				offset -= every
				continue
			}
			if !exists(n.key()) && code != 69 && code != 76 {
				t.Fatalf("cut after %d bytes: %d %s", offset, code, out)
			}
		}
		answer := offset - every
		fingerprint := n.fingerprint()
		for offset = 0; exists(n.token); offset += min(every, 17) {
			if offset > both-answer+every {
				t.Fatalf("the receipt is not taken after %d bytes", offset)
			}
			c.after.Store(offset)
			tried++
			if code, out := n.run(nil, "enroll"); exists(n.token) && code != 69 && code != 76 {
				t.Fatalf("the receipt's answer cut after %d bytes: %d %s", offset, code, out)
			}
		}
		c.after.Store(-1)
		n.wait = "1m"
		if code, out := n.run(nil, "boot"); code != 0 || n.fingerprint() != fingerprint {
			t.Errorf("%d %s", code, out)
		}
		n.hasOnly()
		t.Logf("cut at %d offsets of %d bytes", tried, both)
		if got := show(t, s, org, m.ID); got.State != "received" || len(got.Claims) != 1 || got.Claims[0].Fingerprint != fingerprint {
			t.Errorf("%+v", got)
		}
	})
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// TestPromise13_ANodeBelievesNobodyInBetween has a proxy that ends the node's TLS
// change what it likes. Nothing of what it says becomes the node's key, and
// the node gets its own when the proxy is gone.
func TestPromise13_ANodeBelievesNobodyInBetween(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	ca := testca.New(t)
	target, err := url.Parse(s.API)
	if err != nil {
		t.Fatal(err)
	}
	var (
		ask    atomic.Pointer[func(*http.Request)]
		answer atomic.Pointer[func([]byte) []byte]
	)
	proxy := httptest.NewUnstartedServer(&httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			if f := ask.Load(); f != nil {
				(*f)(r.Out)
			}
		},
		ModifyResponse: func(r *http.Response) error {
			f := answer.Load()
			if f == nil || r.StatusCode != http.StatusOK {
				return nil
			}
			return replaceAnswer(r, *f)
		},
	})
	proxy.TLS = &tls.Config{Certificates: []tls.Certificate{ca.Issue(t, "localhost").Pair(t)}}
	proxy.StartTLS()
	t.Cleanup(proxy.Close)

	m := mint(t, s, org, `{}`)
	_, port, _ := net.SplitHostPort(proxy.Listener.Addr().String())
	n := newEnrollingNode(t, "https://localhost:"+port, m.Token, "10.4.0.1")
	n.more = []string{"--ca-file", ca.File}
	n.wait = "0s"
	// The node's recipient is public: whoever is in between can seal to it.
	if code, out := n.run(nil, "recipient", "--key-file", n.key()); code != 0 {
		t.Fatalf("%d %s", code, out)
	}
	text, err := os.ReadFile(n.key() + ".recipient")
	if err != nil {
		t.Fatal(err)
	}
	recipient := readRecipient(t, text)
	thief := newRecipient(t)
	other := claimed(t, s, mint(t, s, org, `{}`), newRecipient(t))
	// The same node's recipient under another enrollment: a replay that would open.
	earlier := claimed(t, s, mint(t, s, org, `{}`), recipient)
	fields := func(change func(map[string]any)) func([]byte) []byte {
		return func(b []byte) []byte {
			var all map[string]any
			if err := json.Unmarshal(b, &all); err != nil {
				t.Error(err)
			}
			change(all)
			changed, err := json.Marshal(all)
			if err != nil {
				t.Error(err)
			}
			return changed
		}
	}
	own := ownKey(t, recipient)
	for name, c := range map[string]struct {
		ask    func(*http.Request)
		answer func([]byte) []byte
		code   int
		text   string
	}{
		"its own recipient": {
			ask: func(r *http.Request) {
				replaceBody(t, r, func(f map[string]any) { f["recipient"] = publicPEM(t, thief) })
			}, code: 77, text: "does not accept the token",
		},
		"another node's key":     {answer: func([]byte) []byte { return other }, code: 76, text: "and is not used"},
		"an earlier answer":      {answer: func([]byte) []byte { return earlier }, code: 76, text: "and is not used"},
		"a key of its own":       {answer: fields(func(f map[string]any) { own(f) }), code: 76, text: "and is not used"},
		"a wrong MAC":            {answer: fields(func(f map[string]any) { f["mac"] = base64.StdEncoding.EncodeToString(make([]byte, 32)) }), code: 76, text: "and is not used"},
		"no MAC":                 {answer: fields(func(f map[string]any) { delete(f, "mac") }), code: 76, text: "and is not used"},
		"another fingerprint":    {answer: fields(func(f map[string]any) { f["fingerprint"] = client.Fingerprint(&thief.PublicKey) }), code: 76, text: "and is not used"},
		"another organization":   {answer: fields(func(f map[string]any) { f["org"] = "globex" }), code: 76, text: "and is not used"},
		"another key ID":         {answer: fields(func(f map[string]any) { f["keyId"] = m.ID }), code: 76, text: "and is not used"},
		"another log":            {answer: fields(func(f map[string]any) { f["origin"] = "elsewhere" }), code: 76, text: "and is not used"},
		"its own key, MAC kept":  {answer: fields(func(f map[string]any) { mac := f["mac"]; own(f); f["mac"] = mac }), code: 76, text: "and is not used"},
		"its own sealed bytes":   {answer: fields(func(f map[string]any) { sealed := map[string]any{}; own(sealed); f["sealed"] = sealed["sealed"] }), code: 76, text: "was changed in transit"},
		"an unknown algorithm":   {answer: fields(func(f map[string]any) { f["sealed"].(map[string]any)["alg"] = "none" }), code: 76, text: "was changed in transit"},
		"sealed bytes cut short": {answer: fields(func(f map[string]any) { f["sealed"].(map[string]any)["value"] = "AAAA" }), code: 76, text: "was changed in transit"},
	} {
		ask.Store(nil)
		answer.Store(nil)
		if c.ask != nil {
			ask.Store(&c.ask)
		}
		if c.answer != nil {
			answer.Store(&c.answer)
		}
		if code, out := n.run(nil, "enroll"); code != c.code || !strings.Contains(out, c.text) {
			t.Errorf("%s: exit code %d, printed %s", name, code, out)
		}
		if exists(n.key()) || exists(n.key()+".enrollment") || !exists(n.token) {
			t.Fatalf("%s: something of it was stored, or the token is gone", name)
		}
	}
	ask.Store(nil)
	answer.Store(nil)
	n.wait = "1m"
	if code, out := n.run(nil, "boot"); code != 0 {
		t.Fatalf("%d %s", code, out)
	}
	n.hasOnly()
	if got := show(t, s, org, m.ID); got.State != "received" || got.Claims[0].Fingerprint != n.fingerprint() {
		t.Errorf("%+v", got)
	}
}

func readRecipient(t *testing.T, text []byte) *rsa.PrivateKey {
	t.Helper()
	block, _ := pem.Decode(text)
	if block == nil {
		t.Fatal("the recipient is not PEM")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return key.(*rsa.PrivateKey)
}

// sealTo wraps a key to a recipient, as a back end does.
func sealTo(t *testing.T, recipient *rsa.PublicKey, key *rsa.PrivateKey) envelope.SealedKey {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return envelopetest.Wrap(t, recipient, envelope.WrapSHA256, der)
}

// ownKey makes an answer one with a key that somebody in between has made, whole
// in all but K: sealed to the recipient and under a MAC with a K of theirs.
func ownKey(t *testing.T, recipient *rsa.PrivateKey) func(map[string]any) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	sealed := sealTo(t, &recipient.PublicKey, key)
	id, err := envelope.Recipient(&recipient.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return func(f map[string]any) {
		d := envelope.Delivery{Recipient: id, Fingerprint: client.Fingerprint(&key.PublicKey), SHA256: envelope.Digest(sealed.Value)}
		for name, to := range map[string]*string{"id": &d.Enrollment, "org": &d.Org, "origin": &d.Origin, "keyId": &d.KeyID} {
			*to, _ = f[name].(string)
		}
		f["fingerprint"], f["sha256"], f["sealed"] = d.Fingerprint, d.SHA256, map[string]any{"alg": sealed.Alg, "value": base64.StdEncoding.EncodeToString(sealed.Value)}
		f["mac"] = base64.StdEncoding.EncodeToString(d.MAC(make([]byte, envelope.TokenSecretSize)))
	}
}
