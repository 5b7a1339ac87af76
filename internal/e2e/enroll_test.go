package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/freeport"
)

// minted is an enrollment as its administrator sees it.
type minted struct {
	ID    string `json:"id"`
	Token string `json:"token"`
}

func mint(t *testing.T, s *harness.Server, org, terms string) minted {
	t.Helper()
	resp := s.Do(t, harness.Request{Method: http.MethodPost, Path: "/organization/" + org + "/enrollment", Token: s.Token(t, org, "OWNER"), Body: []byte(terms)})
	resp.Want(t, http.StatusCreated, "Enrollment created. The token is shown only once.")
	var answer struct {
		Data minted `json:"data"`
	}
	if err := json.Unmarshal(resp.Body, &answer); err != nil {
		t.Fatal(err)
	}
	return answer.Data
}

// shown is an enrollment in the list.
type shown struct {
	ID        string `json:"id"`
	State     string `json:"state"`
	Conflicts int    `json:"conflicts"`
	Claims    []struct {
		KeyID       string `json:"keyId"`
		State       string `json:"state"`
		Fingerprint string `json:"fingerprint"`
		Answers     int    `json:"answers"`
	} `json:"claims"`
}

func show(t *testing.T, s *harness.Server, org, id string) shown {
	t.Helper()
	resp := s.Do(t, harness.Request{Method: http.MethodGet, Path: "/organization/" + org + "/enrollment/" + id, Token: s.Token(t, org, "OWNER")})
	var answer struct {
		Data shown `json:"data"`
	}
	if resp.Status != http.StatusOK || json.Unmarshal(resp.Body, &answer) != nil {
		t.Fatalf("showing an enrollment: %d %s", resp.Status, resp.Body)
	}
	return answer.Data
}

func newRecipient(t *testing.T) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func enrollment(t *testing.T, server, token string, recipient *rsa.PrivateKey, retry time.Duration) *client.Enrollment {
	t.Helper()
	c, err := client.New(client.Config{Server: server, Retry: client.Retry{For: retry}, Attempt: 20 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	e, err := client.NewEnrollment(c, []byte(token), recipient)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// fetch gets the key, checks it, and signs for it.
func fetch(t *testing.T, e *client.Enrollment) *client.Delivered {
	t.Helper()
	key, err := e.Fetch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	private, err := client.ParsePrivateKey(key.PEM)
	if err != nil || client.Fingerprint(private.Public()) != key.Fingerprint {
		t.Fatalf("the key that arrived: %v", err)
	}
	if err := e.Client.Receipt(t.Context(), key.Delivery, private); err != nil {
		t.Fatal(err)
	}
	return key
}

// A node fetches its own key, signs with it, and its administrator sees all of it.
func TestANodeFetchesItsOwnKey(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	m := mint(t, s, org, `{"note":"rack 12"}`)
	e := enrollment(t, s.API, m.Token, newRecipient(t), 20*time.Second)
	if state := show(t, s, org, m.ID).State; state != "open" {
		t.Errorf("state %q before the claim", state)
	}
	first, err := e.Fetch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if state := show(t, s, org, m.ID).State; state != "sealed" {
		t.Errorf("state %q after the claim", state)
	}
	again := fetch(t, e)
	if !bytes.Equal(first.PEM, again.PEM) || first.SHA256 != again.SHA256 {
		t.Error("asking again got another key")
	}
	after := show(t, s, org, m.ID)
	if after.State != "received" || len(after.Claims) != 1 || after.Claims[0].Fingerprint != first.Fingerprint || after.Claims[0].Answers != 2 {
		t.Errorf("after the receipt: %+v", after)
	}
	if _, err := e.Fetch(t.Context()); !errors.Is(err, client.EnrollmentClosed) {
		t.Errorf("asking after the receipt: %v", err)
	}
	other := enrollment(t, s.API, m.Token, newRecipient(t), 0)
	if _, err := other.Fetch(t.Context()); !errors.Is(err, client.EnrollmentClaimed) {
		t.Errorf("another recipient: %v", err)
	}
	if n := show(t, s, org, m.ID).Conflicts; n != 1 {
		t.Errorf("%d conflicts shown, want 1", n)
	}
	forged := enrollment(t, s.API, m.Token[:len(m.Token)-2]+flipped(m.Token[len(m.Token)-2:]), newRecipient(t), 0)
	if _, err := forged.Fetch(t.Context()); !errors.Is(err, client.EnrollmentUnknown) {
		t.Errorf("a token with another secret: %v", err)
	}

	for _, want := range []string{
		`orgkeys_enrollment_outcomes_total{outcome="minted"} 1`, `orgkeys_enrollment_outcomes_total{outcome="claimed"} 1`, `orgkeys_enrollment_outcomes_total{outcome="conflict"} 1`,
		`orgkeys_enrollment_outcomes_total{outcome="received"} 1`, `orgkeys_enrollment_outcomes_total{outcome="failed"} 0`, `orgkeys_authn_failures_total{reason="enrollment"} 1`,
		`orgkeys_enrollments_open 0`, `orgkeys_deliveries{state="unreceived"} 0`,
	} {
		if shown := s.AskAdmin(t, "/metrics"); !strings.Contains(shown, want+"\n") {
			t.Errorf("the metrics lack %s", want)
		}
	}

	private, err := client.ParsePrivateKey(again.PEM)
	if err != nil {
		t.Fatal(err)
	}
	node := client.Node{Client: e.Client, Org: org, IP: "192.0.2.7", Region: "eu", Key: private, KeyID: again.KeyID}
	if err := node.Register(t.Context(), client.Registration{Version: "1", Status: "active"}); err != nil {
		t.Error(err)
	}
	if _, err := node.Secrets(t.Context()); err != nil {
		t.Error(err)
	}
	node.KeyID = "" // found by the node's address now
	if err := node.Register(t.Context(), client.Registration{Version: "2", Status: "active"}); err != nil {
		t.Error(err)
	}
	if keys := s.List(t, org); len(keys) != 0 {
		t.Errorf("a node key is listed as the organization's: %+v", keys)
	}
}

func flipped(text string) string {
	if text == "AA" {
		return "BA"
	}
	return "AA"
}

// TestPromise12_ALostAnswerIsNotALostKey kills the server at random moments
// while a node asks and asks again. It ends with one key of one fingerprint, one
// place in the quota, and no other key left.
func TestPromise12_ALostAnswerIsNotALostKey(t *testing.T) {
	t.Parallel()
	port, err := freeport.Find(1000)
	if err != nil {
		t.Fatal(err)
	}
	s := harness.Start(t, harness.Set("ORGKEYS_RESERVATION_TTL", "2s"), harness.Set("ORGKEYS_LISTEN", fmt.Sprintf("127.0.0.1:%d", port)))
	org := harness.Org()
	rounds := 6
	if long() {
		rounds = 250
	}
	random := mathrand.New(mathrand.NewPCG(*seed, 12))
	recipient := newRecipient(t)
	fingerprints := map[string]bool{}
	for range rounds {
		m := mint(t, s, org, `{}`)
		e := enrollment(t, s.API, m.Token, recipient, time.Minute)
		seen := make(chan string, 3)
		go func() {
			defer close(seen)
			for range 2 {
				key, err := e.Fetch(context.Background())
				if err != nil {
					t.Errorf("fetching while the server dies: %v", err)
					return
				}
				seen <- key.Fingerprint
			}
		}()
		time.Sleep(time.Duration(random.IntN(500)) * time.Millisecond)
		s.Kill()
		s.Start(t)
		all := map[string]bool{}
		for f := range seen {
			all[f] = true
		}
		key := fetch(t, e)
		all[key.Fingerprint] = true
		if len(all) != 1 || fingerprints[key.Fingerprint] {
			t.Fatalf("an enrollment ended with %d keys (one of them another's: %t)", len(all), fingerprints[key.Fingerprint])
		}
		fingerprints[key.Fingerprint] = true
	}
	db := s.Database(t)
	if n := harness.Number(t, db, "SELECT count(*) FROM keys_of_nodes WHERE slot IS NOT NULL"); n != int64(rounds) {
		t.Errorf("%d places are taken, want %d", n, rounds)
	}
	if n := harness.Number(t, db, "SELECT count(*) FROM deliveries WHERE wrapped IS NOT NULL"); n != 0 {
		t.Errorf("%d wrapped keys are left after their receipts", n)
	}
	onlyOwnKeys(t, s)
}

// TestPromise13_NobodyInBetween puts a proxy between node and server that may
// read and change everything.
func TestPromise13_NobodyInBetween(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	target, err := url.Parse(s.API)
	if err != nil {
		t.Fatal(err)
	}
	thief := newRecipient(t)
	var saved []byte
	for name, c := range map[string]struct {
		ask    func(*http.Request)
		answer func(*http.Response) error
		want   error
	}{
		"its own recipient": {ask: func(r *http.Request) {
			replaceBody(t, r, func(fields map[string]any) {
				fields["recipient"] = publicPEM(t, thief)
			})
		}, want: client.EnrollmentUnknown},
		"another key's answer": {answer: func(r *http.Response) error {
			return replaceAnswer(r, func([]byte) []byte { return saved })
		}, want: client.ErrForged},
		"a changed fingerprint": {answer: func(r *http.Response) error {
			return replaceAnswer(r, func(b []byte) []byte {
				return bytes.Replace(b, []byte(`"fingerprint":"`), []byte(`"fingerprint":"x`), 1)
			})
		}, want: client.ErrForged},
		"changed sealed bytes": {answer: func(r *http.Response) error {
			return replaceAnswer(r, func(b []byte) []byte {
				return bytes.Replace(b, []byte(`"value":"`), []byte(`"value":"AAAA`), 1)
			})
		}, want: client.ErrSealedDamaged},
	} {
		t.Run(name, func(t *testing.T) {
			other := mint(t, s, org, `{}`)
			saved = claimed(t, s, other, newRecipient(t))
			proxy := httptest.NewServer(&httputil.ReverseProxy{
				Rewrite: func(r *httputil.ProxyRequest) {
					r.SetURL(target)
					if c.ask != nil {
						c.ask(r.Out)
					}
				},
				ModifyResponse: func(r *http.Response) error {
					if c.answer == nil || r.StatusCode != http.StatusOK {
						return nil
					}
					return c.answer(r)
				},
			})
			defer proxy.Close()
			m := mint(t, s, org, `{}`)
			recipient := newRecipient(t)
			if _, err := enrollment(t, proxy.URL, m.Token, recipient, 0).Fetch(t.Context()); !errors.Is(err, c.want) {
				t.Errorf("through the proxy: %v, want %v", err, c.want)
			}
			// Without it the node gets its key all the same.
			fetch(t, enrollment(t, s.API, m.Token, recipient, 10*time.Second))
		})
	}
}

func publicPEM(t *testing.T, key *rsa.PrivateKey) string {
	t.Helper()
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: publicDER(t, key)}))
}

func publicDER(t *testing.T, key *rsa.PrivateKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// claimed returns the answer to another enrollment, as the proxy saw it.
func claimed(t *testing.T, s *harness.Server, m minted, recipient *rsa.PrivateKey) []byte {
	t.Helper()
	var body []byte
	target, err := url.Parse(s.API)
	if err != nil {
		t.Fatal(err)
	}
	tap := httptest.NewServer(&httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target) },
		ModifyResponse: func(r *http.Response) error {
			return replaceAnswer(r, func(b []byte) []byte {
				body = bytes.Clone(b)
				return b
			})
		},
	})
	defer tap.Close()
	if _, err := enrollment(t, tap.URL, m.Token, recipient, 10*time.Second).Fetch(t.Context()); err != nil {
		t.Fatal(err)
	}
	return body
}

func replaceBody(t *testing.T, r *http.Request, change func(map[string]any)) {
	t.Helper()
	var fields map[string]any
	if err := json.NewDecoder(r.Body).Decode(&fields); err != nil {
		t.Error(err)
	}
	change(fields)
	text, err := json.Marshal(fields)
	if err != nil {
		t.Error(err)
	}
	r.Body, r.ContentLength = readCloser{bytes.NewReader(text)}, int64(len(text))
}

func replaceAnswer(r *http.Response, change func([]byte) []byte) error {
	var b bytes.Buffer
	if _, err := b.ReadFrom(r.Body); err != nil {
		return err
	}
	text := change(b.Bytes())
	r.Body, r.ContentLength = readCloser{bytes.NewReader(text)}, int64(len(text))
	r.Header.Set("Content-Length", fmt.Sprint(len(text)))
	return nil
}

type readCloser struct{ *bytes.Reader }

func (readCloser) Close() error { return nil }

// A node with nothing but sh, openssl, curl and jq.
func TestAShellNodeFetchesItsOwnKey(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	m := mint(t, s, org, `{}`)
	dir := t.TempDir()
	token, node := filepath.Join(dir, "token"), filepath.Join(dir, "node")
	if err := os.WriteFile(token, []byte(m.Token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	run := func() (string, int) {
		cmd := exec.Command("../../examples/enroll.sh", "--server", s.API, "--token-file", token, "--dir", node)
		cmd.Env = append(os.Environ(), "no_proxy=*", "NO_PROXY=*")
		out, err := cmd.CombinedOutput()
		if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		return string(out), cmd.ProcessState.ExitCode()
	}
	// The first answer is lost after it was stored, so the receipt never left.
	s.Kill()
	if out, code := run(); code != 75 {
		t.Fatalf("without a server: %d %s", code, out)
	}
	s.Start(t)
	for range 2 {
		if out, code := run(); code != 0 {
			t.Fatalf("%d %s", code, out)
		}
	}
	if _, err := os.Stat(token); !os.IsNotExist(err) {
		t.Errorf("the token's file after the receipt: %v", err)
	}
	text, err := os.ReadFile(filepath.Join(node, "private_key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	key := harness.ParsePrivate(t, text)
	if got := show(t, s, org, m.ID); got.State != "received" || got.Claims[0].Fingerprint != client.Fingerprint(&key.PublicKey) {
		t.Errorf("%+v", got)
	}
	leftover, err := filepath.Glob(filepath.Join(node, "*"))
	if err != nil || len(leftover) != 2 {
		t.Errorf("left on the node: %s", strings.Join(leftover, " "))
	}
}

// An administrator's key that nobody in between can read, fetched again after a
// lost answer.
func TestAnAdministratorsSealedKey(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	c := s.Client(t, org, "OWNER") // which holds each exchange against the OpenAPI document
	recipient := newRecipient(t)
	// Of several at once one makes the key, and the rest hear that it is not ready.
	var all sync.WaitGroup
	for range 6 {
		all.Go(func() {
			if _, err := c.SealedKey(t.Context(), org, recipient); err != nil && !errors.Is(err, client.Pending) {
				t.Error(err)
			}
		})
	}
	all.Wait()
	first, err := c.SealedKey(t.Context(), org, recipient)
	if err != nil {
		t.Fatal(err)
	}
	again, err := c.SealedKey(t.Context(), org, recipient)
	if err != nil || again.KeyID != first.KeyID || !bytes.Equal(again.PEM, first.PEM) {
		t.Fatalf("asked again: %v", err)
	}
	private, err := client.ParsePrivateKey(first.PEM)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Receipt(t.Context(), first.Delivery, private); err != nil {
		t.Fatal(err)
	}
	listed := s.List(t, org)
	if len(listed) != 1 || listed[0].ID != first.KeyID {
		t.Fatalf("%+v", listed)
	}
	// Once it was received, the same recipient gets another key.
	next, err := c.SealedKey(t.Context(), org, recipient)
	if err != nil || next.KeyID == first.KeyID {
		t.Errorf("after the receipt: %v", err)
	}
}

// TestAfterARestoredBackupTokensAreVoid: what was done with a token since the
// backup is forgotten, so it gives nothing any more; a key from before works on.
func TestAfterARestoredBackupTokensAreVoid(t *testing.T) {
	t.Parallel()
	port, err := freeport.Find(1000)
	if err != nil {
		t.Fatal(err)
	}
	s := harness.Start(t, harness.Set("ORGKEYS_AUDIT_FILE", filepath.Join(t.TempDir(), "sink.jsonl")), harness.Set("ORGKEYS_MAX_NODE_KEYS", "3"),
		harness.Set("ORGKEYS_LISTEN", fmt.Sprintf("127.0.0.1:%d", port)))
	org := harness.Org()
	older := fetch(t, enrollment(t, s.API, mint(t, s, org, `{}`).Token, newRecipient(t), 20*time.Second))
	// This one's receipt is in the sink alone.
	receiptLost := enrollment(t, s.API, mint(t, s, org, `{}`).Token, newRecipient(t), 20*time.Second)
	unreceived, err := receiptLost.Fetch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m := mint(t, s, org, `{}`)
	s.Stop(t)
	backup := harness.Copy(t, s.Dir)
	s.Start(t)
	fetch(t, receiptLost)
	newer := fetch(t, enrollment(t, s.API, m.Token, newRecipient(t), 20*time.Second))
	s.Stop(t)

	if err := os.RemoveAll(s.Dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(backup, s.Dir); err != nil {
		t.Fatal(err)
	}
	if out := succeeds(t, s, "audit", "accept-rollback", "--reason", "a test", "--dry-run"); !strings.Contains(out, "would be void: 1 open enrollments") {
		t.Errorf("a dry run said %s", out)
	}
	out := succeeds(t, s, "audit", "accept-rollback", "--reason", "a test")
	if !strings.Contains(out, "void: 1 open enrollments") || !strings.Contains(out, fmt.Sprintf("orgkey.created, organization %q, object %q", org, newer.KeyID)) || strings.Contains(out, "orgkey.created, organization \""+org+"\", object \""+older.KeyID) {
		t.Errorf("it said %s", out)
	}
	s.Start(t)
	if _, err := enrollment(t, s.API, m.Token, newRecipient(t), 0).Fetch(t.Context()); !errors.Is(err, client.EnrollmentClosed) {
		t.Errorf("the token of a void enrollment: %v", err)
	}
	if got := show(t, s, org, m.ID); got.State != "revoked" {
		t.Errorf("shown as %q", got.State)
	}
	if again, err := receiptLost.Fetch(t.Context()); err != nil || !bytes.Equal(again.PEM, unreceived.PEM) {
		t.Errorf("a key that was released before the backup: %v", err)
	}
	for _, key := range []*client.Delivered{older, unreceived, newer} {
		private, err := client.ParsePrivateKey(key.PEM)
		if err != nil {
			t.Fatal(err)
		}
		node := client.Node{Client: receiptLost.Client, Org: org, IP: "192.0.2.7", Region: "eu", Key: private, KeyID: key.KeyID}
		_, err = node.Secrets(t.Context())
		if works := err == nil; works != (key != newer) {
			t.Errorf("key %s works: %t, %v", key.KeyID, works, err)
		}
	}
	mint(t, s, org, `{}`) // the place came back
	s.Stop(t)
	if out := succeeds(t, s, "audit", "verify"); !strings.Contains(out, "a rollback was accepted") {
		t.Errorf("audit verify said %s", out)
	}
}

// Beside a running server, which uses the same HSM, an export tells how each of
// a token's nodes got its key; the public keys are left out where that is wanted.
func TestAnExportBesideARunningServer(t *testing.T) {
	t.Parallel()
	s := harness.Start(t, harness.Set("ORGKEYS_CHECKPOINT_INTERVAL", "1s"))
	org := harness.Org()
	m := mint(t, s, org, `{"uses":2}`)
	keys := map[string]bool{}
	for range 2 {
		keys[fetch(t, enrollment(t, s.API, m.Token, newRecipient(t), 20*time.Second)).KeyID] = true
	}
	archive := filepath.Join(t.TempDir(), "export.tar.gz")
	var said struct {
		PublicKeys int
		Enrolled   []struct{ Key, Enrollment, Receipt, From string }
	}
	export := func(flags ...string) {
		t.Helper()
		harness.Eventually(t, harness.Patience, "a signed checkpoint covers the receipts", func() bool {
			if _, _, code := s.Run(t, append([]string{"audit", "export", archive}, flags...)...); code != 0 {
				return false
			}
			said.PublicKeys, said.Enrolled = 0, nil
			out, _, _ := s.Run(t, "audit", "verify-export", archive, "--json", "--key", strings.TrimSpace(succeeds(t, s, "audit", "key")))
			if err := json.Unmarshal([]byte(out), &said); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			return len(said.Enrolled) == 2 && said.Enrolled[1].Receipt != "none"
		})
	}
	export()
	for _, e := range said.Enrolled {
		if !keys[e.Key] || e.Enrollment != m.ID || e.Receipt != "signed" || e.From != "127.0.0.1" || said.PublicKeys != 2 {
			t.Errorf("%+v", said)
		}
	}
	export("--without-public-keys")
	for _, e := range said.Enrolled {
		if e.Receipt != "unchecked" || said.PublicKeys != 0 {
			t.Errorf("without public keys: %+v", said)
		}
	}
}

// A node that used its key, and whose receipt comes when that was taken for one, has
// signed for it all the same.
func TestAReceiptAfterItsKeyWasInUse(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	m := mint(t, s, org, `{}`)
	e := enrollment(t, s.API, m.Token, newRecipient(t), 20*time.Second)
	key, err := e.Fetch(t.Context())
	must(t, err)
	private, err := client.ParsePrivateKey(key.PEM)
	must(t, err)
	node := client.Node{Client: e.Client, Org: org, IP: "192.0.2.7", Region: "eu", Key: private, KeyID: key.KeyID}
	_, err = node.Secrets(t.Context())
	must(t, err)
	db := s.Database(t)
	harness.Exec(t, db, "UPDATE deliveries SET until = 1 WHERE key_id = '"+key.KeyID+"'")
	harness.Eventually(t, harness.Patience, "use stands for the receipt", func() bool { return show(t, s, org, m.ID).State == "received" })
	for range 2 {
		must(t, e.Client.Receipt(t.Context(), key.Delivery, private))
	}
	if n := harness.Number(t, db, "SELECT count(*) FROM events WHERE type = 'orgkey.received'"); n != 2 {
		t.Errorf("%d events, want one of the use and one of the signature", n)
	}
	s.Stop(t)
	archive := filepath.Join(t.TempDir(), "export.tar.gz")
	succeeds(t, s, "audit", "export", archive)
	out, _, _ := s.Run(t, "audit", "verify-export", archive, "--json", "--key", strings.TrimSpace(succeeds(t, s, "audit", "key")))
	var said struct{ Enrolled []struct{ Receipt string } }
	if err := json.Unmarshal([]byte(out), &said); err != nil || len(said.Enrolled) != 1 || said.Enrolled[0].Receipt != "signed" {
		t.Errorf("%v: %s", err, out)
	}
}

// listedKey is a key as lists show it, with where it went.
type listedKey struct {
	ID          string    `json:"id"`
	Scope       string    `json:"scope"`
	Enrollment  string    `json:"enrollment"`
	DeliveredAt time.Time `json:"deliveredAt"`
	DeliveredTo string    `json:"deliveredTo"`
	NodeKeys    []struct {
		NodeID string `json:"nodeId"`
	} `json:"nodeKeys"`
}

func listKeys(t *testing.T, s *harness.Server, org, query string) []listedKey {
	t.Helper()
	resp := s.Do(t, harness.Request{Method: http.MethodGet, Path: harness.KeyPath(org) + query, Token: s.Token(t, org, "OWNER")})
	var answer struct {
		Data []listedKey `json:"data"`
	}
	if resp.Status != http.StatusOK || json.Unmarshal(resp.Body, &answer) != nil {
		t.Fatalf("listing keys: %d %s", resp.Status, resp.Body)
	}
	return answer.Data
}

// An administrator sees when each key was handed out, and to what address; node
// keys apart, and each of the ways to end them.
func TestNodeKeysInListsAndDeletions(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	own := s.Generate(t, org)
	m := mint(t, s, org, `{"uses":4}`)
	var keys []*client.Delivered
	for i := range 4 {
		e := enrollment(t, s.API, m.Token, newRecipient(t), 20*time.Second)
		keys = append(keys, fetch(t, e))
		if err := nodeOf(t, e, org, keys[i], i).Register(t.Context(), client.Registration{Version: "1", Status: "active"}); err != nil {
			t.Fatal(err)
		}
	}
	lives := func(i int) bool {
		t.Helper()
		_, err := nodeOf(t, enrollment(t, s.API, m.Token, newRecipient(t), 0), org, keys[i], i).Secrets(t.Context())
		return err == nil
	}
	del := func(path, message string) {
		t.Helper()
		s.Do(t, harness.Request{Method: http.MethodDelete, Path: "/organization/" + org + path, Token: s.Token(t, org, "OWNER")}).Want(t, http.StatusOK, message)
	}

	if got := listKeys(t, s, org, ""); len(got) != 1 || got[0].ID != own.ID || got[0].Scope != "organization" || got[0].DeliveredTo != "127.0.0.1" || time.Since(got[0].DeliveredAt) > time.Minute {
		t.Errorf("the organization's keys: %+v", got)
	}
	listed := listKeys(t, s, org, "?scope=node")
	if len(listed) != 4 {
		t.Fatalf("node keys: %+v", listed)
	}
	for _, k := range listed {
		if k.Scope != "node" || k.Enrollment != m.ID || k.DeliveredTo != "127.0.0.1" || k.DeliveredAt.IsZero() || len(k.NodeKeys) != 1 {
			t.Errorf("a node key: %+v", k)
		}
	}
	if out := succeeds(t, s, "audit", "erase", "--subject", "admin", "--reason", "a test"); out == "" {
		t.Error("erasing says nothing")
	}
	if got := listKeys(t, s, org, ""); got[0].DeliveredTo != "" || got[0].DeliveredAt.IsZero() {
		t.Errorf("after the erasure: %+v", got[0])
	}

	del("/key/"+keys[0].KeyID, "Organization key deleted successfully")
	nodes := s.Do(t, harness.Request{Method: http.MethodGet, Path: "/organization/" + org + "/nodes", Token: s.Token(t, org, "OWNER")})
	var there struct {
		Data []struct{ ID, IP string } `json:"data"`
	}
	if err := json.Unmarshal(nodes.Body, &there); err != nil {
		t.Fatal(err)
	}
	for _, n := range there.Data {
		if n.IP == "192.0.2.11" {
			del("/node/"+n.ID, "Node deleted successfully")
		}
	}
	del("/key", "Successfully deleted 1 organization key(s)")
	for i, want := range []bool{false, false, true, true} {
		if got := lives(i); got != want {
			t.Errorf("key %d works: %t, want %t", i, got, want)
		}
	}
	if state := show(t, s, org, m.ID).State; state == "revoked" {
		t.Error("deleting the organization's keys revoked an enrollment of nodes")
	}
	del("/key?scope=all", "Successfully deleted 0 organization key(s) and 2 node key(s)")
	if lives(2) || lives(3) || len(listKeys(t, s, org, "?scope=node")) != 0 {
		t.Error("node keys outlive the deletion of all")
	}
	if state := show(t, s, org, m.ID).State; state != "revoked" {
		t.Errorf("the enrollment is %q", state)
	}
}

func nodeOf(t *testing.T, e *client.Enrollment, org string, key *client.Delivered, i int) client.Node {
	t.Helper()
	private, err := client.ParsePrivateKey(key.PEM)
	if err != nil {
		t.Fatal(err)
	}
	return client.Node{Client: e.Client, Org: org, IP: fmt.Sprintf("192.0.2.%d", 10+i), Region: "eu", Key: private, KeyID: key.KeyID}
}
