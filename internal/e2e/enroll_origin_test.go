package e2e

import (
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/chaos/cluster"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/freeport"
	"github.com/orgkeys/orgkeys/internal/testca"
	"github.com/orgkeys/orgkeys/internal/tpm/tpmtest"
	"github.com/orgkeys/orgkeys/internal/tpmdevice"
)

// ownMaker makes a key as a node does, in software or in its TPM. tpm is nil for
// a key in software.
type ownMaker func(t *testing.T) (own client.PrivateKey, tpm client.TPM)

func inSoftware(t *testing.T) (client.PrivateKey, client.TPM) {
	t.Helper()
	key, err := client.NewOwnKey()
	must(t, err)
	return key, nil
}

func inTheTPM(d tpmdevice.Device) ownMaker {
	return func(t *testing.T) (client.PrivateKey, client.TPM) {
		t.Helper()
		key, err := d.Create(t.Context(), tpmdevice.Speaking)
		must(t, err)
		return key, key
	}
}

// onVaultFirst runs a test of replicas on Vault, and in its long form on SoftHSM too.
func onVaultFirst(t *testing.T, run func(t *testing.T, backend string)) {
	t.Run("Vault", func(t *testing.T) { run(t, "Vault") })
	if long() {
		t.Run("SoftHSM", func(t *testing.T) { run(t, "SoftHSM") })
	}
}

// announce has a node's own key accepted.
func announce(ctx context.Context, t *testing.T, server, token string, own client.PrivateKey, tpm client.TPM, retry time.Duration) (*client.Delivery, error) {
	t.Helper()
	e := enrollment(t, server, token, nil, retry)
	defer e.Close()
	e.TPM = tpm
	return e.Announce(ctx, own)
}

// claimOwn is the body of a claim for a node's own key in software.
func claimOwn(t *testing.T, m minted, own *rsa.PrivateKey) map[string]any {
	t.Helper()
	token, err := envelope.ParseToken([]byte(m.Token))
	must(t, err)
	id, err := client.RecipientID(&own.PublicKey)
	must(t, err)
	return map[string]any{
		"publicKey": publicPEM(t, own), "mac": base64.StdEncoding.EncodeToString(envelope.ClaimMAC(token.K, m.ID, id)),
		"signature": signedBy(t, own, envelope.ClaimText(m.ID, id)),
	}
}

func signedBy(t *testing.T, key *rsa.PrivateKey, text []byte) string {
	t.Helper()
	digest := crypto.SHA256.New()
	digest.Write(text)
	signature, err := rsa.SignPKCS1v15(nil, key, crypto.SHA256, digest.Sum(nil))
	must(t, err)
	return base64.StdEncoding.EncodeToString(signature)
}

// TestRefusalsOfATokensHolderAreLimited: whoever has a token, an old one too, gets
// no more failures into the log than who signs wrongly gets answers.
func TestRefusalsOfATokensHolderAreLimited(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	own, other := newRecipientOf(t, 2048), newRecipientOf(t, 2048)
	weak := &rsa.PrivateKey{PublicKey: rsa.PublicKey{N: own.N, E: 3}}
	open, closed, used, ofBackend := mint(t, s, org, `{"origin":"node"}`), mint(t, s, org, `{"origin":"node"}`), mint(t, s, org, `{"origin":"node"}`), mint(t, s, org, `{}`)
	do(t, s, http.StatusOK, harness.Request{Method: http.MethodDelete, Path: "/organization/" + org + "/enrollment/" + closed.ID, Token: s.Token(t, org, "OWNER")})
	live := newRecipientOf(t, 2048)
	if _, err := announce(t.Context(), t, s.API, used.Token, live, nil, time.Minute); err != nil {
		t.Fatal(err)
	}
	db := s.Database(t)
	failures := func() int64 {
		return harness.Number(t, db, "SELECT count(*) FROM events WHERE type = 'request.failed'")
	}
	wrongly := claimOwn(t, open, own)
	wrongly["signature"] = signedBy(t, other, []byte("another text"))
	for i, c := range []struct {
		what, code string
		m          minted
		body       map[string]any
	}{
		{"a signature of another key", "bad_signature", open, wrongly},
		{"a key of the wrong origin", "origin_not_allowed", ofBackend, claimOwn(t, ofBackend, own)},
		{"a weak key", "recipient_unacceptable", open, claimOf(t, open, weak)},
		{"a key that is in use", "recipient_unacceptable", open, claimOwn(t, open, live)},
		{"a revoked enrollment", "enrollment_closed", closed, claimOwn(t, closed, own)},
	} {
		t.Run(c.what, func(t *testing.T) {
			asker := from(net.IPv4(127, 17, byte(i), 1))
			defer asker.CloseIdleConnections()
			body, err := json.Marshal(c.body)
			must(t, err)
			before, began := failures(), time.Now()
			answers := map[string]int{}
			for range 150 {
				answers[claimCode(t, asker, s, c.m.ID, body)]++
			}
			recorded, most := failures()-before, int64(32+time.Since(began)/time.Second)
			if recorded < 20 || recorded > most || answers["429 too_many_failures"] < 100-int(most) || len(answers) != 2 {
				t.Errorf("%v, and %d events; want some %s, then too_many_failures, and at most %d events", answers, recorded, c.code, most)
			}
			for answer := range answers {
				if !strings.HasSuffix(answer, " "+c.code) && answer != "429 too_many_failures" {
					t.Errorf("an answer is %s", answer)
				}
			}
			// From elsewhere nobody notices.
			elsewhere := from(net.IPv4(127, 17, byte(i), 2))
			defer elsewhere.CloseIdleConnections()
			if answer := claimCode(t, elsewhere, s, c.m.ID, body); !strings.HasSuffix(answer, " "+c.code) {
				t.Errorf("from another address: %s", answer)
			}
		})
	}
	// Nor is the good claim refused that comes from such an address.
	asker := from(net.IPv4(127, 17, 0, 1))
	defer asker.CloseIdleConnections()
	body, err := json.Marshal(claimOwn(t, open, own))
	must(t, err)
	harness.Eventually(t, harness.Patience, "the good claim gets its answer", func() bool {
		return claimCode(t, asker, s, open.ID, body) == "200 "
	})
	if shown := s.AskAdmin(t, "/metrics"); !strings.Contains(shown, `orgkeys_authn_failures_total{reason="too_many"} `) || strings.Contains(shown, `orgkeys_authn_failures_total{reason="too_many"} 0`) {
		t.Error("the metrics do not count those who failed too often")
	}
}

// claimCode is status and code of the answer to a claim.
func claimCode(t *testing.T, by *http.Client, s *harness.Server, id string, body []byte) string {
	t.Helper()
	status, text := claimRaw(t, by, s, id, body)
	var answer struct {
		Code string `json:"errorCode"`
	}
	must(t, json.Unmarshal([]byte(text), &answer))
	return fmt.Sprintf("%d %s", status, answer.Code)
}

// claimOf is claimOwn for a key that cannot sign.
func claimOf(t *testing.T, m minted, own *rsa.PrivateKey) map[string]any {
	t.Helper()
	token, err := envelope.ParseToken([]byte(m.Token))
	must(t, err)
	id, err := client.RecipientID(&own.PublicKey)
	must(t, err)
	return map[string]any{"publicKey": publicPEM(t, own), "mac": base64.StdEncoding.EncodeToString(envelope.ClaimMAC(token.K, m.ID, id)), "signature": "AAAA"}
}

func newRecipientOf(t *testing.T, bits int) *rsa.PrivateKey {
	t.Helper()
	return keysOf(t, 1, bits)[0]
}

// shellNode is a machine with nothing but sh, openssl, curl and jq.
type shellNode struct {
	t          *testing.T
	server     string
	token, dir string
	under      []string // runs it below another program
}

func newShellNode(t *testing.T, server, token string) *shellNode {
	t.Helper()
	home := t.TempDir()
	n := &shellNode{t, server, filepath.Join(home, "token"), filepath.Join(home, "node"), nil}
	n.put(token)
	return n
}

func (n *shellNode) put(token string) {
	n.t.Helper()
	must(n.t, os.WriteFile(n.token, []byte(token+"\n"), 0o600))
}

// run runs examples/enroll.sh, and checks exit code and what it says.
func (n *shellNode) run(code int, text string, more ...string) {
	n.t.Helper()
	args := append(append(append([]string{}, n.under...), "../../examples/enroll.sh", "--server", n.server, "--token-file", n.token, "--dir", n.dir), more...)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "no_proxy=*", "NO_PROXY=*")
	out, err := cmd.CombinedOutput()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		n.t.Fatal(err)
	}
	if cmd.ProcessState.ExitCode() != code || !strings.Contains(string(out), text) {
		n.t.Fatalf("enroll.sh %q: exit code %d, printed %s; want %d and %q", more, cmd.ProcessState.ExitCode(), out, code, text)
	}
}

// key is the one that it has, beside nothing but the answer.
func (n *shellNode) key() *rsa.PrivateKey {
	n.t.Helper()
	entries, err := os.ReadDir(n.dir)
	must(n.t, err)
	names := []string{}
	for _, e := range entries {
		info, err := e.Info()
		must(n.t, err)
		if info.Mode() != 0o600 {
			n.t.Errorf("%s: %v", e.Name(), info.Mode())
		}
		names = append(names, e.Name())
	}
	if left := strings.Join(names, " "); left != "enrollment.json private_key.pem" {
		n.t.Errorf("left on the node: %s", left)
	}
	if _, err := os.Stat(n.token); !os.IsNotExist(err) {
		n.t.Errorf("the token's file: %v", err)
	}
	text, err := os.ReadFile(filepath.Join(n.dir, "private_key.pem"))
	must(n.t, err)
	if block, _ := pem.Decode(text); block == nil || block.Type != "RSA PRIVATE KEY" {
		n.t.Error("the key has not the form in which the server hands keys out")
	}
	return harness.ParsePrivate(n.t, text)
}

// A machine with nothing but sh, openssl, curl and jq makes its own key; with a
// new token it gets a new one, by either origin, and a key that it did not fetch
// stays.
func TestAShellNodeMakesItsOwnKey(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	m := mint(t, s, org, `{"origin":"node"}`)
	n := newShellNode(t, s.API, m.Token)
	n.run(64, "Usage: ", "--origin", "moon")
	n.run(77, "The enrollment is for keys of the other origin")
	s.Kill()
	n.run(75, "cannot be reached", "--origin", "node")
	begun, err := os.ReadFile(filepath.Join(n.dir, "own_key.pem"))
	must(t, err)
	s.Start(t)
	n.server = s.API
	for range 2 {
		n.run(0, "", "--origin", "node")
	}
	key := n.key()
	if !key.Equal(parsed(t, begun)) {
		t.Error("the key is another one than was there before the first request")
	}
	got := show(t, s, org, m.ID)
	if got.State != "received" || got.Claims[0].Fingerprint != client.Fingerprint(&key.PublicKey) || got.Conflicts != 0 {
		t.Errorf("%+v", got)
	}
	node := client.Node{Client: s.Client(t, org, "OWNER"), Org: org, IP: "192.0.2.7", Region: "eu", Key: key, KeyID: got.Claims[0].KeyID}
	must(t, node.Register(t.Context(), client.Registration{Version: "1", Status: "active"}))

	for _, origin := range []string{"node", "backend"} {
		m = mint(t, s, org, `{"origin":"`+origin+`"}`)
		n.put(m.Token)
		n.run(0, "key ", "--origin", origin)
		next := n.key()
		if got = show(t, s, org, m.ID); next.Equal(key) || got.Claims[0].Fingerprint != client.Fingerprint(&next.PublicKey) {
			t.Errorf("with a new token of origin %s: %+v", origin, got)
		}
		key = next
	}
	m = mint(t, s, org, `{"origin":"node"}`)
	n.put(m.Token)
	must(t, os.Remove(filepath.Join(n.dir, "enrollment.json")))
	n.run(64, "is a key that this did not fetch", "--origin", "node")
	if got = show(t, s, org, m.ID); got.State != "open" {
		t.Errorf("an enrollment that was not to be used is %s", got.State)
	}
}

// An interrupted exchange of one key for another goes on with the new one.
func TestAShellNodeIsCutOffBetweenAnswerAndKey(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	for _, origin := range []string{"node", "backend"} {
		m := mint(t, s, org, `{"origin":"`+origin+`"}`)
		n := newShellNode(t, s.API, m.Token)
		n.run(0, "key ", "--origin", origin)
		older := filepath.Join(n.dir, "private_key.pem")
		first, err := os.ReadFile(older)
		must(t, err)
		m = mint(t, s, org, `{"origin":"`+origin+`"}`)
		n.put(m.Token)
		n.under = []string{"strace", "-f", "-o", "/dev/null", "-P", older, "-e", "trace=rename,renameat,renameat2", "-e", "inject=rename,renameat,renameat2:error=EIO"}
		n.run(1, "", "--origin", origin)
		if answer, err := os.ReadFile(filepath.Join(n.dir, "enrollment.json")); err != nil || !strings.Contains(string(answer), m.ID) {
			t.Fatalf("it was cut off elsewhere: %s, %v", answer, err)
		}
		n.under = nil
		n.run(0, "key ", "--origin", origin)
		key := n.key()
		if got := show(t, s, org, m.ID); key.Equal(parsed(t, first)) || got.State != "received" || got.Claims[0].Fingerprint != client.Fingerprint(&key.PublicKey) {
			t.Errorf("origin %s: %+v", origin, got)
		}
	}
}

// parsed is a private key as openssl writes it.
func parsed(t *testing.T, text []byte) *rsa.PrivateKey {
	t.Helper()
	key, err := client.ParsePrivateKey(text)
	must(t, err)
	return key.(*rsa.PrivateKey)
}

// A node that makes its key, in software and in its TPM, boots against a server
// on Vault, which holds no key for it.
func TestANodesOwnKeyOnVault(t *testing.T) {
	v, _, settings := throughVault(t)
	s := harness.Start(t, settings)
	org := harness.Org()
	s.PutSecret(t, org, "env_s3", []byte("A=1"))
	made := func() [2]int {
		sealed, err := root(t, v).ListWithContext(t.Context(), "orgkeys-sealed/keys")
		must(t, err)
		n := 0
		if sealed != nil {
			n = len(sealed.Data["keys"].([]any))
		}
		return [2]int{len(inTransit(t, v)), n}
	}
	before := made()
	device := tpmtest.Start(t)
	d := tpmdevice.Device{Path: device.Socket}
	ek, err := d.Endorsement(t.Context())
	must(t, err)
	for i, c := range []struct {
		terms string
		flags []string
	}{
		{`{"origin":"node"}`, []string{"--origin", "node"}},
		{`{"origin":"node","bind":{"ek":"` + ek.ID + `"}}`, []string{"--origin", "node", "--tpm", device.Socket}},
	} {
		m := mint(t, s, org, c.terms)
		n := newEnrollingNode(t, s.API, m.Token, fmt.Sprintf("10.5.0.%d", i+1))
		n.more = c.flags
		for range 2 {
			if code, out := n.run(nil, "boot"); code != 0 || !strings.Contains(out, "registered "+n.ip) {
				t.Fatalf("%d %s", code, out)
			}
		}
		n.hasOnly("env_s3")
		if text, err := os.ReadFile(filepath.Join(n.dir, "env_s3")); err != nil || string(text) != "A=1" {
			t.Errorf("env_s3 holds %q, %v", text, err)
		}
		if got := show(t, s, org, m.ID); got.State != "received" || got.Claims[0].Fingerprint != n.ownFingerprint(d) {
			t.Errorf("%+v", got)
		}
		device.Restart(t)
		n.more = append([]string{"--ip", n.ip, "--region", "eu"}, c.flags...)
		if code, out := n.run(nil, "unregister"); code != 0 {
			t.Errorf("%d %s", code, out)
		}
	}
	if after := made(); after != before {
		t.Errorf("keys in Vault: %v, and before any node %v", after, before)
	}
}

// ownFingerprint is that of the node's key, wherever it is.
func (n *enrollingNode) ownFingerprint(d tpmdevice.Device) string {
	n.t.Helper()
	text, err := os.ReadFile(n.key())
	must(n.t, err)
	if !tpmdevice.IsKey(text) {
		return n.fingerprint()
	}
	key, err := d.Parse(text)
	must(n.t, err)
	return client.Fingerprint(key.Public())
}

// TestPromise12_AnOwnKeyOnThreeReplicas: a node announces its key to one replica,
// which dies meanwhile, to a second and to the third, which die when they have
// answered. It is one key, and it works on all of them.
func TestPromise12_AnOwnKeyOnThreeReplicas(t *testing.T) {
	onVaultFirst(t, func(t *testing.T, backend string) {
		c := replicasOf(t, backend, 3, shortLife(t, 3*time.Second))
		device := tpmtest.Start(t)
		d := tpmdevice.Device{Path: device.Socket}
		ek, err := d.Endorsement(t.Context())
		must(t, err)
		rounds := 4
		if long() {
			rounds = 40
		}
		random := mathrand.New(mathrand.NewPCG(*seed, 17))
		org := harness.Org()
		keys := map[string]bool{}
		for round := range rounds {
			a, b, third := c.Replicas[round%3], c.Replicas[(round+1)%3], c.Replicas[(round+2)%3]
			terms, makes := `{"origin":"node"}`, inSoftware
			if round%2 == 1 {
				terms, makes = `{"origin":"node","bind":{"ek":"`+ek.ID+`"}}`, inTheTPM(d)
			}
			m := mintBy(t, b, org, c.Owner(t, org), terms)
			own, tpm := makes(t)
			lost := make(chan error, 1)
			go func() {
				_, err := announce(context.Background(), t, a.API, m.Token, own, tpm, 0)
				lost <- err
			}()
			time.Sleep(time.Duration(random.IntN(500)) * time.Millisecond)
			a.Kill()
			began := <-lost
			first, err := announce(t.Context(), t, b.API, m.Token, own, tpm, time.Minute)
			must(t, err)
			b.Kill()
			again, err := announce(t.Context(), t, third.API, m.Token, own, tpm, time.Minute)
			must(t, err)
			if *first != *again || keys[first.KeyID] || first.Fingerprint != client.Fingerprint(own.Public()) {
				t.Fatalf("round %d (the first replica said %v): %+v, then %+v", round, began, first, again)
			}
			keys[first.KeyID] = true
			third.Kill()
			for _, r := range []*harness.Server{a, b, third} {
				r.Start(t)
			}
			for _, r := range c.Replicas {
				node := client.Node{Client: enrollment(t, r.API, m.Token, nil, time.Minute).Client, Org: org, IP: fmt.Sprintf("10.6.0.%d", round+1), Region: "eu", Key: own, KeyID: first.KeyID}
				must(t, node.Register(t.Context(), client.Registration{Version: "1", Status: "active"}))
			}
		}
		oneOwnKeyEach(t, c, rounds)
	})
}

// oneOwnKeyEach fails unless n keys that nodes made are live, each with its place
// and its events once, and nothing else is left of their enrollments.
func oneOwnKeyEach(t *testing.T, c *cluster.Cluster, n int) {
	t.Helper()
	db := clusterDatabase(t, c)
	for what, query := range map[string]string{
		"keys released and in their places": "SELECT count(*) FROM keys_of_nodes WHERE slot IS NOT NULL AND state = 'released'",
		"places taken":                      "SELECT count(*) FROM keys_of_nodes WHERE slot IS NOT NULL",
		"deliveries received":               "SELECT count(*) FROM deliveries WHERE stage = 'received' AND origin = 'node' AND wrapped IS NULL",
		"deliveries":                        "SELECT count(*) FROM deliveries",
		"fingerprints":                      "SELECT count(DISTINCT fingerprint) FROM deliveries",
		"events of creations":               "SELECT count(*) FROM events WHERE type = 'orgkey.created'",
		"events of claims":                  "SELECT count(*) FROM events WHERE type = 'enrollment.claimed'",
	} {
		if got := harness.Number(t, db, query); got != int64(n) {
			t.Errorf("%d %s, want %d", got, what, n)
		}
	}
	if got := harness.Number(t, db, "SELECT count(*) FROM events WHERE type = 'orgkey.sealed'"); got != 0 {
		t.Errorf("%d keys were sealed, and the nodes made all of them", got)
	}
	nothingInTheBackend(t, c)
}

// TestPromise13_AHundredOwnKeysWantOneToken: as many nodes as a token has uses get
// in, of a hundred that announce their keys at once over three replicas.
func TestPromise13_AHundredOwnKeysWantOneToken(t *testing.T) {
	onVaultFirst(t, func(t *testing.T, backend string) {
		c := replicasOf(t, backend, 3)
		in := 0
		for _, uses := range []int{1, 7} {
			keys := keysOf(t, 100, 2048)
			org := harness.Org()
			m := mintBy(t, c.Replicas[0], org, c.Owner(t, org), fmt.Sprintf(`{"origin":"node","uses":%d}`, uses))
			var mu sync.Mutex
			accepted, refused := map[string]bool{}, 0
			inParallel(len(keys), func(i int) {
				got, err := announce(t.Context(), t, c.Replicas[i%3].API, m.Token, keys[i], nil, 2*time.Minute)
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err == nil:
					accepted[got.KeyID] = true
				case errors.Is(err, client.EnrollmentClaimed):
					refused++
				default:
					t.Errorf("announcing: %v", err)
				}
			})
			if len(accepted) != uses || refused != len(keys)-uses {
				t.Errorf("%d uses: %d nodes are in, %d were refused", uses, len(accepted), refused)
			}
			in += len(accepted)
		}
		oneOwnKeyEach(t, c, in)
	})
}

// TestPromise14_ANodesOwnKeyOnEveryReplica: it acts for its node only, and is
// refused on every replica as soon as its node, or the key, was deleted on one.
func TestPromise14_ANodesOwnKeyOnEveryReplica(t *testing.T) {
	onVaultFirst(t, func(t *testing.T, backend string) {
		c := replicasOf(t, backend, 3)
		device := tpmtest.Start(t)
		d := tpmdevice.Device{Path: device.Socket}
		ek, err := d.Endorsement(t.Context())
		must(t, err)
		const here, there, free = "192.0.2.1", "192.0.2.2", "192.0.2.3"
		for round := range 2 {
			org := harness.Org()
			owner := c.Owner(t, org)
			terms := []string{`{"origin":"node"}`, `{"origin":"node","bind":{"ek":"` + ek.ID + `"}}`}
			makes := []ownMaker{inSoftware, inTheTPM(d)}
			nodes := from(net.IPv4(127, 18, byte(round), 1)) // failures are limited by address
			enroll := func(kind int) client.Node {
				t.Helper()
				own, tpm := makes[kind](t)
				got, err := announce(t.Context(), t, c.Replicas[0].API, mintBy(t, c.Replicas[0], org, owner, terms[kind]).Token, own, tpm, time.Minute)
				must(t, err)
				return client.Node{Org: org, Region: "eu", Key: own, KeyID: got.KeyID}
			}
			node, other := enroll(round), enroll(1-round)
			on := func(r *harness.Server, n client.Node, ip string) client.Node {
				t.Helper()
				cl, err := client.New(client.Config{Server: r.API, Transport: nodes.Transport})
				must(t, err)
				n.Client, n.IP = cl, ip
				return n
			}
			all := func(n client.Node, ip string, want error) {
				t.Helper()
				for i, r := range c.Replicas {
					n := on(r, n, ip)
					for what, err := range map[string]error{
						"register":   n.Register(t.Context(), client.Registration{Version: "1", Status: "active"}),
						"secrets":    second(n.Secrets(t.Context())),
						"unregister": n.Unregister(t.Context()),
					} {
						if !errors.Is(err, want) {
							t.Errorf("round %d, replica %d: %s for %s: %v, want %v", round, i, what, ip, err, want)
						}
					}
				}
			}
			for n, ip := range map[*client.Node]string{&node: here, &other: there} {
				for _, r := range c.Replicas {
					must(t, on(r, *n, ip).Register(t.Context(), client.Registration{Version: "1", Status: "active"}))
					must(t, second(on(r, *n, ip).Secrets(t.Context())))
				}
			}
			all(node, there, client.AddressInUse)
			all(other, here, client.AddressInUse)
			administrator, err := client.New(client.Config{Server: c.Replicas[1].API, Token: func(context.Context) (string, error) { return owner, nil }})
			must(t, err)
			list, err := administrator.Nodes(t.Context(), org)
			must(t, err)
			for _, n := range list {
				if n.IP == here {
					must(t, administrator.DeleteNode(t.Context(), org, n.ID))
				}
			}
			all(node, here, client.BadSignature)
			all(node, free, client.BadSignature)
			must(t, administrator.DeleteKey(t.Context(), org, other.KeyID))
			all(other, there, client.BadSignature)
			all(other, free, client.BadSignature)
			nodes.CloseIdleConnections()
		}
	})
}

func second[T any](_ T, err error) error { return err }

// TestAfterARestoredBackupOwnKeysAreVoid: nodes that made their keys, in software
// and in TPMs, are treated as all others are. What the backup does not know is
// over, what was open in it is void, the list of TPMs is as it was, and older
// nodes notice nothing.
func TestAfterARestoredBackupOwnKeysAreVoid(t *testing.T) {
	t.Parallel()
	port, err := freeport.Find(1000)
	must(t, err)
	s := harness.Start(t, harness.Set("ORGKEYS_AUDIT_FILE", filepath.Join(t.TempDir(), "sink.jsonl")), harness.Set("ORGKEYS_LISTEN", fmt.Sprintf("127.0.0.1:%d", port)))
	org := harness.Org()
	owner := s.Client(t, org, "OWNER")
	device, removed, later := tpmtest.Start(t), "sha256-"+strings.Repeat("a", 64), "sha256-"+strings.Repeat("b", 64)
	d := tpmdevice.Device{Path: device.Socket}
	ek, err := d.Endorsement(t.Context())
	must(t, err)
	must(t, owner.AllowDevice(t.Context(), org, ek.ID, "this one"))
	must(t, owner.AllowDevice(t.Context(), org, removed, "removed after the backup"))
	inTPM := []string{"--origin", "node", "--tpm", device.Socket}

	type booting struct {
		*enrollingNode
		m minted
	}
	begin := func(ip int, terms string, flags ...string) booting {
		t.Helper()
		m := mint(t, s, org, terms)
		n := newEnrollingNode(t, s.API, m.Token, fmt.Sprintf("10.7.0.%d", ip))
		n.more = flags
		return booting{n, m}
	}
	boots := func(n booting, code int, text string) {
		t.Helper()
		if got, out := n.run(nil, "boot"); got != code || !strings.Contains(out, text) {
			t.Errorf("%s: %d %s, want %d and %q", n.ip, got, out, code, text)
		}
	}
	older, olderInTPM := begin(1, `{"origin":"node"}`, "--origin", "node"), begin(2, `{"origin":"node","bind":{"tpm":true}}`, inTPM...)
	boots(older, 0, "registered")
	boots(olderInTPM, 0, "registered")
	// Open at the backup, and used after it: in software, in the TPM, a second use
	// of a token whose first was before, and one that was approved after.
	newer, newerInTPM := begin(3, `{"origin":"node"}`, "--origin", "node"), begin(4, `{"origin":"node","bind":{"ek":"`+ek.ID+`"}}`, inTPM...)
	shared := begin(5, `{"origin":"node","uses":2}`, "--origin", "node")
	boots(shared, 0, "registered")
	sharing := booting{newEnrollingNode(t, s.API, shared.m.Token, "10.7.0.6"), shared.m}
	sharing.more = shared.more
	approved := begin(7, `{"origin":"node","approval":true}`, "--origin", "node")
	approved.wait = "0s"
	boots(approved, 75, "is not ready yet")
	s.Stop(t)
	backup := harness.Copy(t, s.Dir)
	s.Start(t)
	approve := func() {
		t.Helper()
		list, err := owner.Permission(t.Context(), org, approved.m.ID)
		must(t, err)
		must(t, owner.ApproveEnrollment(t.Context(), org, approved.m.ID, list.Claims[0].Recipient))
	}
	approve()
	after := []booting{newer, newerInTPM, sharing, approved}
	keys := map[string]bool{}
	for _, n := range after {
		n.wait = "1m"
		boots(n, 0, "registered")
		keys[n.ownFingerprint(d)] = true
	}
	must(t, owner.RemoveDevice(t.Context(), org, removed))
	must(t, owner.AllowDevice(t.Context(), org, later, "allowed after the backup"))
	s.Stop(t)

	must(t, os.RemoveAll(s.Dir))
	must(t, os.Rename(backup, s.Dir))
	out := succeeds(t, s, "audit", "accept-rollback", "--reason", "a test")
	if !strings.Contains(out, "void: 4 open enrollments") {
		t.Errorf("it said %s", out)
	}
	if n := strings.Count(out, "orgkey.created, organization \""+org+"\""); n != len(after) {
		t.Errorf("it names %d keys that were made after the backup, want %d: %s", n, len(after), out)
	}
	for _, event := range []string{"device.removed", "device.allowed"} {
		if !strings.Contains(out, event+", organization \""+org+"\"") {
			t.Errorf("it does not name %s, which the list no longer has: %s", event, out)
		}
	}
	s.Start(t)
	for _, n := range []booting{older, olderInTPM, shared} {
		boots(n, 0, "registered")
	}
	for _, n := range after {
		boots(n, 77, "does not accept this key")
		if got := show(t, s, org, n.m.ID).State; got != "revoked" {
			t.Errorf("the enrollment of %s is %s", n.ip, got)
		}
		// Its token is over, and a new one brings a new key in the old one's place.
		again := booting{newEnrollingNode(t, s.API, n.m.Token, n.ip), n.m}
		again.more = n.more
		boots(again, 77, "is over")
		terms := `{"origin":"node"}`
		if n.ip == newerInTPM.ip {
			terms = `{"origin":"node","bind":{"tpm":true}}`
		}
		n.put(mint(t, s, org, terms).Token)
		boots(n, 0, "registered")
		if keys[n.ownFingerprint(d)] {
			t.Errorf("%s has a key from before the restoration", n.ip)
		}
	}
	devices, err := owner.Devices(t.Context(), org)
	must(t, err)
	listed := fmt.Sprint(devices)
	if len(devices) != 2 || !strings.Contains(listed, ek.ID) || !strings.Contains(listed, removed) {
		t.Errorf("the list of TPMs is %s", listed)
	}
	s.Stop(t)
	if out := succeeds(t, s, "audit", "verify"); !strings.Contains(out, "a rollback was accepted") {
		t.Errorf("audit verify said %s", out)
	}
}

// TestPromise13_ANodeWithItsOwnKeyBelievesNobodyInBetween: a proxy that ends the
// node's TLS changes what node and server say about the node's own key. The
// server takes no other key, and the node keeps nothing of what it hears.
func TestPromise13_ANodeWithItsOwnKeyBelievesNobodyInBetween(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	device, another := tpmtest.Start(t), tpmtest.Start(t)
	d, e := tpmdevice.Device{Path: device.Socket}, tpmdevice.Device{Path: another.Socket}
	ek, err := d.Endorsement(t.Context())
	must(t, err)
	anotherEK, err := e.Endorsement(t.Context())
	must(t, err)
	for _, id := range []string{ek.ID, anotherEK.ID} {
		must(t, s.Client(t, org, "OWNER").AllowDevice(t.Context(), org, id, ""))
	}
	stranger, err := tpmdevice.Device{Path: tpmtest.Start(t).Socket}.Endorsement(t.Context())
	must(t, err)
	p := newChanging(t, s)
	thief := newRecipientOf(t, 2048)
	// What the same proxy heard in answer to another node's key.
	other := mint(t, s, org, `{"origin":"node"}`)
	status, answer := postClaim(t, s, other.ID, claimOwn(t, other, newRecipientOf(t, 2048)))
	if status != http.StatusOK {
		t.Fatalf("%d %s", status, answer)
	}
	type trial struct {
		ask    func(map[string]any)
		answer func(map[string]any)
		code   int
		text   string
	}
	set := func(name string, value any) func(map[string]any) {
		return func(f map[string]any) {
			if f[name] != nil { // else it is a challenge
				f[name] = value
			}
		}
	}
	zero := base64.StdEncoding.EncodeToString(make([]byte, 32))
	both := map[string]trial{
		"another public key": {ask: set("publicKey", publicPEM(t, thief)), code: 77, text: "does not accept the token"},
		"another public key, signed for": {ask: func(f map[string]any) {
			mac := f["mac"]
			for name, value := range claimOwn(t, minted{p.id, p.token}, thief) {
				f[name] = value
			}
			f["mac"] = mac
		}, code: 77, text: "does not accept the token"},
		"another signature": {ask: set("signature", base64.StdEncoding.EncodeToString(make([]byte, 256))), code: 77, text: "has no proof"},
		"no signature":      {ask: set("signature", ""), code: 77, text: "refuses (400)"},
		"a recipient in place of the key": {ask: func(f map[string]any) {
			f["recipient"] = f["publicKey"]
			delete(f, "publicKey")
			delete(f, "signature")
		}, code: 77},
		"another node's answer": {answer: func(f map[string]any) {
			if f["challenge"] == nil {
				clear(f)
				must(t, json.Unmarshal(answer, &f))
			}
		}, code: 76, text: "is not used"},
		"another fingerprint":  {answer: set("fingerprint", client.Fingerprint(&thief.PublicKey)), code: 76, text: "is not used"},
		"another key ID":       {answer: set("keyId", "00000000-0000-4000-8000-000000000000"), code: 76, text: "is not used"},
		"another organization": {answer: set("org", "globex"), code: 76, text: "is not used"},
		"another log":          {answer: set("origin", "elsewhere"), code: 76, text: "is not used"},
		"a wrong MAC":          {answer: set("mac", zero), code: 76, text: "is not used"},
		"no MAC":               {answer: func(f map[string]any) { delete(f, "mac") }, code: 76, text: "is not used"},
		"a key of its own": {answer: func(f map[string]any) {
			if f["challenge"] != nil {
				return
			}
			sealed := sealTo(t, p.public(t), thief)
			f["fingerprint"], f["sha256"] = client.Fingerprint(&thief.PublicKey), envelope.Digest(sealed.Value)
			f["sealed"] = map[string]any{"alg": sealed.Alg, "value": base64.StdEncoding.EncodeToString(sealed.Value)}
		}, code: 76, text: "is not used"},
	}
	challenge := func(change func(c map[string]any)) func(map[string]any) {
		return func(f map[string]any) {
			if c, ok := f["challenge"].(map[string]any); ok {
				change(c)
			}
		}
	}
	ofTPM := func(change func(f map[string]any)) func(map[string]any) {
		return func(f map[string]any) {
			if c, ok := f["tpm"].(map[string]any); ok {
				change(c)
			}
		}
	}
	onlyInTPM := map[string]trial{
		"no TPM":                      {ask: func(f map[string]any) { delete(f, "tpm"); delete(f, "proof") }, code: 77, text: "does not allow the TPM"},
		"a TPM that is not allowed":   {ask: ofTPM(func(f map[string]any) { f["ek"] = stranger.PEM }), code: 77, text: "does not allow the TPM"},
		"another TPM that is allowed": {ask: ofTPM(func(f map[string]any) { f["ek"] = anotherEK.PEM }), code: 76, text: "not for the key in the TPM"},
		"another proof":               {ask: set("proof", zero), code: 77, text: "has no proof"},
		"another challenge":           {answer: challenge(func(c map[string]any) { c["idObject"] = zero }), code: 76, text: "is not used"},
		"another secret":              {answer: challenge(func(c map[string]any) { c["encSecret"] = zero }), code: 76, text: "is not used"},
		"a challenge without a MAC":   {answer: challenge(func(c map[string]any) { delete(c, "mac") }), code: 76, text: "is not used"},
		"an answer in place of the challenge": {answer: func(f map[string]any) {
			clear(f)
			must(t, json.Unmarshal(answer, &f))
		}, code: 76, text: "is not used"},
	}
	for where, flags := range map[string][]string{"software": {"--origin", "node"}, "TPM": {"--origin", "node", "--tpm", device.Socket}} {
		trials := []map[string]trial{both}
		terms := `{"origin":"node"}`
		if where == "TPM" {
			trials = append(trials, onlyInTPM)
			terms = `{"origin":"node","bind":{"tpm":true}}`
		}
		m := mint(t, s, org, terms)
		n := newEnrollingNode(t, p.URL, m.Token, "10.8.0.1")
		if where == "TPM" {
			n.ip = "10.8.0.2"
		}
		n.more, n.wait = append([]string{"--ca-file", p.ca}, flags...), "0s"
		if code, out := n.run(nil, "recipient", "--key-file", n.key()); code != 0 {
			t.Fatalf("%d %s", code, out)
		}
		p.knows(m)
		for _, some := range trials {
			for name, c := range some {
				p.change(c.ask, c.answer)
				if code, out := n.run(nil, "enroll"); code != c.code || !strings.Contains(out, c.text) {
					t.Errorf("%s, %s: exit code %d, printed %s; want %d and %q", where, name, code, out, c.code, c.text)
				}
				if exists(n.key()) || exists(n.key()+".enrollment") || !exists(n.token) || !exists(n.key()+".recipient") {
					t.Fatalf("%s, %s: something of it was stored, or what the node had is gone", where, name)
				}
			}
		}
		// What it adds beside what the MAC covers is nothing to the node.
		p.change(nil, func(f map[string]any) {
			sealed := sealTo(t, p.public(t), thief)
			f["sealed"] = map[string]any{"alg": sealed.Alg, "value": base64.StdEncoding.EncodeToString(sealed.Value)}
		})
		if code, out := n.run(nil, "enroll"); code != 0 {
			t.Fatalf("%s: %d %s", where, code, out)
		}
		p.change(nil, nil)
		n.wait = "1m"
		if code, out := n.run(nil, "boot"); code != 0 {
			t.Fatalf("%s: %d %s", where, code, out)
		}
		n.hasOnly()
		got := show(t, s, org, m.ID)
		if got.State != "received" || len(got.Claims) != 1 || got.Claims[0].Fingerprint != n.ownFingerprint(d) || n.ownFingerprint(d) == client.Fingerprint(&thief.PublicKey) {
			t.Errorf("%s: %+v", where, got)
		}
	}
}

// postClaim sends a claim, and returns the answer.
func postClaim(t *testing.T, s *harness.Server, id string, claim map[string]any) (int, []byte) {
	t.Helper()
	body, err := json.Marshal(claim)
	must(t, err)
	resp := s.Do(t, harness.Request{Method: http.MethodPost, Path: "/enroll/" + id, Header: http.Header{"Content-Type": {"application/json"}}, Body: body})
	return resp.Status, resp.Body
}

// changing is a proxy that ends TLS, and changes the fields of what goes through.
type changing struct {
	*httptest.Server
	ca        string // its authority's certificate, which the node trusts
	id, token string
	asked     atomic.Pointer[[]byte] // the last request's public key
	ask       atomic.Pointer[func(map[string]any)]
	answer    atomic.Pointer[func(map[string]any)]
}

func newChanging(t *testing.T, s *harness.Server) *changing {
	t.Helper()
	p := &changing{}
	target, err := url.Parse(s.API)
	must(t, err)
	p.Server = httptest.NewUnstartedServer(&httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			if !strings.HasPrefix(r.In.URL.Path, "/enroll/") {
				return
			}
			replaceBody(t, r.Out, func(f map[string]any) {
				if text, ok := f["publicKey"].(string); ok {
					key := []byte(text)
					p.asked.Store(&key)
				}
				if change := p.ask.Load(); change != nil {
					(*change)(f)
				}
			})
		},
		ModifyResponse: func(r *http.Response) error {
			change := p.answer.Load()
			if change == nil || r.StatusCode != http.StatusOK || !strings.HasPrefix(r.Request.URL.Path, "/enroll/") {
				return nil
			}
			return replaceAnswer(r, func(b []byte) []byte {
				var fields map[string]any
				if err := json.Unmarshal(b, &fields); err != nil {
					t.Error(err)
				}
				(*change)(fields)
				text, err := json.Marshal(fields)
				if err != nil {
					t.Error(err)
				}
				return text
			})
		},
	})
	ca := testca.New(t)
	p.ca = ca.File
	p.TLS = &tls.Config{Certificates: []tls.Certificate{ca.Issue(t, "localhost").Pair(t)}}
	p.StartTLS()
	t.Cleanup(p.Close)
	_, port, err := net.SplitHostPort(p.Listener.Addr().String())
	must(t, err)
	p.URL = "https://localhost:" + port
	return p
}

// knows tells the proxy the enrollment's ID. It does not have K, and a token
// with another secret serves it as well.
func (p *changing) knows(m minted) {
	p.id, p.token = m.ID, "oke1."+m.ID+"."+strings.Repeat("A", 43)
}

func (p *changing) change(ask, answer func(map[string]any)) {
	for to, f := range map[*atomic.Pointer[func(map[string]any)]]func(map[string]any){&p.ask: ask, &p.answer: answer} {
		to.Store(nil)
		if f != nil {
			to.Store(&f)
		}
	}
}

// public is the key that the node asked with.
func (p *changing) public(t *testing.T) *rsa.PublicKey {
	t.Helper()
	block, _ := pem.Decode(*p.asked.Load())
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	must(t, err)
	return key.(*rsa.PublicKey)
}
