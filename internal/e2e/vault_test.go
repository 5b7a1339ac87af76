package e2e

import (
	"bytes"
	"context"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptrace"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/vault/vaulttest"
)

// shared is the Vault of these tests, started when the first one needs it.
// They do not run in parallel: several of them break it.
var shared sharedVault

type sharedVault struct {
	once   sync.Once
	dir    string
	server *vaulttest.Server
	err    error
}

func (v *sharedVault) get(t *testing.T) *vaulttest.Server {
	t.Helper()
	v.once.Do(func() {
		if v.dir, v.err = os.MkdirTemp("", "orgkeys-e2e-vault-"); v.err != nil {
			return
		}
		if v.server, v.err = vaulttest.Start(context.Background(), v.dir); v.err != nil {
			return
		}
		_, v.err = v.server.AppRole(context.Background())
	})
	if v.err != nil {
		t.Fatal(v.err)
	}
	return v.server
}

func (v *sharedVault) end() {
	if v.server != nil {
		v.server.Kill()
	}
	if v.dir != "" {
		os.RemoveAll(v.dir)
	}
}

// throughVault are the settings of a server on the shared Vault, and the proxy
// in front of it. The log that an earlier test began is forgotten there.
func throughVault(t *testing.T) (*vaulttest.Server, *vaulttest.Proxy, harness.Option) {
	t.Helper()
	v := shared.get(t)
	proxy, err := vaulttest.NewProxy(v)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(proxy.Close)
	if _, err := root(t, v).DeleteWithContext(t.Context(), "orgkeys-state/metadata/checkpoint"); err != nil {
		t.Fatal(err)
	}
	login, err := v.AppRole(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return v, proxy, func(s *harness.Server) {
		for name, value := range map[string]string{
			"ORGKEYS_KEYSTORE": "vault", "VAULT_ADDR": proxy.Address, "VAULT_CACERT": v.CACert,
			"ORGKEYS_VAULT_ROLE_ID_FILE": login.RoleIDFile, "ORGKEYS_VAULT_SECRET_ID_FILE": login.SecretIDFile,
		} {
			harness.Set(name, value)(s)
		}
	}
}

func root(t testing.TB, v *vaulttest.Server) *api.Logical {
	t.Helper()
	client, err := v.Client(v.RootToken)
	if err != nil {
		t.Fatal(err)
	}
	return client.Logical()
}

// inTransit lists the keys that root sees.
func inTransit(t testing.TB, v *vaulttest.Server) []any {
	t.Helper()
	list, err := root(t, v).ListWithContext(t.Context(), "orgkeys/keys")
	if err != nil {
		t.Fatal(err)
	}
	if list == nil {
		return nil
	}
	return list.Data["keys"].([]any)
}

// vaultEntry is a line of Vault's audit file.
type vaultEntry struct {
	Type    string `json:"type"`
	Request struct {
		Operation string              `json:"operation"`
		Path      string              `json:"path"`
		Headers   map[string][]string `json:"headers"`
		Data      json.RawMessage     `json:"data"`
	} `json:"request"`
}

func vaultAudit(t testing.TB, v *vaulttest.Server) []vaultEntry {
	t.Helper()
	b, err := os.ReadFile(v.AuditFile)
	if err != nil {
		t.Fatal(err)
	}
	var entries []vaultEntry
	for line := range bytes.Lines(b) {
		var e vaultEntry
		if err := json.Unmarshal(line, &e); err != nil {
			t.Fatalf("Vault's audit file: %v: %.200q", err, line)
		}
		entries = append(entries, e)
	}
	return entries
}

// eventsInVault are the events that Vault's audit file holds in clear: what
// Vault wrote before it signed them.
func eventsInVault(t testing.TB, v *vaulttest.Server, is func(harness.Leaf) bool) []harness.Leaf {
	t.Helper()
	var found []harness.Leaf
	for _, e := range vaultAudit(t, v) {
		if e.Type != "request" || e.Request.Path != "orgkeys-audit/sign/receipt" {
			continue
		}
		var data struct {
			Batch []struct{ Event string } `json:"batch_input"`
		}
		if err := json.Unmarshal(e.Request.Data, &data); err != nil {
			t.Fatalf("Vault's audit file: %v", err)
		}
		for _, item := range data.Batch {
			var leaf harness.Leaf
			if json.Unmarshal([]byte(item.Event), &leaf) == nil && is(leaf) { // checkpoints are no JSON
				found = append(found, leaf)
			}
		}
	}
	return found
}

// release asks for a key and has first run when the first byte of the answer is there.
func release(t *testing.T, s *harness.Server, org string, first func()) harness.Response {
	t.Helper()
	ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{GotFirstResponseByte: first})
	req := harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: s.Token(t, org, "OWNER")}
	resp, err := s.Try(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	s.Check(t, req, resp)
	return resp
}

// TestPromise1_VaultKeepsNoKeyAndItsAuditFileNoSecret: the whole life of a key.
func TestPromise1_VaultKeepsNoKeyAndItsAuditFileNoSecret(t *testing.T) {
	v, proxy, settings := throughVault(t)
	var mu sync.Mutex
	var token string
	proxy.Before(func(_ http.ResponseWriter, r *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		token = r.Header.Get("X-Vault-Token")
		return true
	})
	s := harness.Start(t, settings)
	org := harness.Org()
	var atFirstByte []any
	var audited []harness.Leaf
	resp := release(t, s, org, func() {
		atFirstByte = inTransit(t, v)
		audited = eventsInVault(t, v, func(l harness.Leaf) bool { return l.Org == org && l.Type == "orgkey.created" })
	})
	if resp.Status != 200 {
		t.Fatalf("status %d, body %q", resp.Status, resp.Body)
	}
	key := harness.ReadKey(t, org, resp)

	t.Run("at the first byte Transit has no key", func(t *testing.T) {
		if len(atFirstByte) > 0 {
			t.Errorf("Transit held %v", atFirstByte)
		}
	})
	t.Run("at the first byte Vault's audit file holds the event in clear", func(t *testing.T) {
		if len(audited) != 1 || audited[0].Object != key.ID || audited[0].Detail["fingerprint"] != key.Fingerprint {
			t.Errorf("it holds %+v", audited)
		}
	})
	t.Run("the service's own token cannot get the key", func(t *testing.T) {
		mu.Lock()
		client, err := v.Client(token)
		mu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{"orgkeys/export/encryption-key/" + key.ID + "/1", "orgkeys/export/encryption-key/" + key.ID, "orgkeys/backup/" + key.ID, "orgkeys/keys/" + key.ID} {
			if got, err := client.Logical().ReadWithContext(t.Context(), path); got != nil {
				t.Errorf("%s answers %v, %v", path, got.Data, err)
			}
		}
		if list, err := client.Logical().ListWithContext(t.Context(), "orgkeys/keys"); list != nil || err != nil {
			t.Errorf("listing answers %v, %v", list, err)
		}
	})
	t.Run("it is listed and deleted", func(t *testing.T) {
		listed := s.List(t, org)
		if len(listed) != 1 || listed[0].ID != key.ID || !listed[0].Public(t).Equal(key.Private.Public().(*rsa.PublicKey)) {
			t.Errorf("listed: %+v", listed)
		}
		gone := s.Do(t, harness.Request{Method: "DELETE", Path: harness.KeyPath(org) + "/" + key.ID, Token: s.Token(t, org, "OWNER")})
		if gone.Status != 200 || len(s.List(t, org)) != 0 {
			t.Errorf("deleting: status %d", gone.Status)
		}
	})
	t.Run("Vault's audit file holds every event of it", func(t *testing.T) {
		var types []string
		harness.Eventually(t, harness.Patience, "all events are there", func() bool {
			types = nil
			for _, l := range eventsInVault(t, v, func(l harness.Leaf) bool { return l.Org == org }) {
				types = append(types, l.Type)
			}
			return len(types) >= 5
		})
		if want := []string{"orgkey.created", "orgkey.delivered", "orgkey.listed", "orgkey.deleted", "orgkey.listed"}; !slices.Equal(types, want) {
			t.Errorf("events %v, want %v", types, want)
		}
	})
	t.Run("X-Correlation-Id ties Vault's own entries to the key", func(t *testing.T) {
		var calls []string
		for _, e := range vaultAudit(t, v) {
			if e.Type == "response" && slices.Contains(e.Request.Headers["x-correlation-id"], key.ID) {
				calls = append(calls, e.Request.Operation+" "+strings.ReplaceAll(e.Request.Path, key.ID, "KEY"))
			}
		}
		const seal = "update orgkeys-seal/encrypt/seal"
		if at := slices.Index(calls, seal); at >= 2 { // sealing goes beside what comes after the configuration
			calls = append(slices.Delete(calls, at, at+1), seal)
		}
		want := []string{"update orgkeys/keys/KEY", "update orgkeys/keys/KEY/config", "read orgkeys/export/encryption-key/KEY/1",
			"delete orgkeys/keys/KEY", "read orgkeys/keys/KEY", seal}
		if !slices.Equal(calls, want) {
			t.Errorf("entries %q, want %q", calls, want)
		}
	})
	t.Run("the key is in no file of Vault's or the service's", func(t *testing.T) {
		scan := &harness.Scanner{}
		scan.AddKey(key)
		planted := v.Dir + "/planted"
		if err := os.WriteFile(planted, key.PEM, 0o600); err != nil {
			t.Fatal(err)
		}
		if len(scan.ScanTree(t, v.Dir)) == 0 {
			t.Error("a planted copy was not found")
		}
		if err := os.Remove(planted); err != nil {
			t.Fatal(err)
		}
		for _, f := range append(scan.ScanTree(t, v.Dir), scan.ScanTree(t, s.Dir)...) {
			t.Error(f)
		}
	})
}

// TestPromise4_NothingLeavesBeforeVaultHasAnswered holds Vault's answer to one
// call of a generation.
func TestPromise4_NothingLeavesBeforeVaultHasAnswered(t *testing.T) {
	const held = 3 * time.Second
	_, proxy, settings := throughVault(t)
	s := harness.Start(t, settings)
	for name, is := range map[string]func(r *http.Request) bool{
		"the receipt of the event":       func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, "/sign/receipt") },
		"the deletion of Transit's copy": func(r *http.Request) bool { return r.Method == http.MethodDelete },
		"the confirmation that it is gone": func(r *http.Request) bool {
			return r.Method == http.MethodGet && strings.HasPrefix(r.URL.Path, "/v1/orgkeys/keys/")
		},
		"the sealed public key of the record": func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, "/encrypt/seal") },
	} {
		t.Run(name, func(t *testing.T) {
			var mu sync.Mutex
			var let, first time.Time
			proxy.After(func(r *http.Response) error {
				if !is(r.Request) {
					return nil
				}
				mu.Lock()
				defer mu.Unlock()
				if let.IsZero() {
					time.Sleep(held)
					let = time.Now()
				}
				return nil
			})
			defer proxy.After(nil)
			start := time.Now()
			resp := release(t, s, harness.Org(), func() { first = time.Now() })
			mu.Lock()
			defer mu.Unlock()
			if resp.Status != 200 || let.IsZero() || first.Before(let) || first.Sub(start) < held {
				t.Errorf("status %d; the first byte came after %s, Vault's answer was let go after %s", resp.Status, first.Sub(start), let.Sub(start))
			}
		})
	}
}

// killer kills a server when Vault has answered the nth call about one key,
// and the answer is not through yet.
type killer struct {
	mu     sync.Mutex
	name   string // of the key
	calls  []string
	killed bool
}

// call describes a call of a generation; it is empty for others.
func (k *killer) call(r *http.Request) string {
	path := strings.TrimPrefix(r.URL.Path, "/v1/")
	if name, ok := strings.CutPrefix(path, "orgkeys/keys/"); ok && r.Method == http.MethodPut && !strings.Contains(name, "/") && k.name == "" {
		k.name = name
	}
	switch {
	case k.name == "":
		return ""
	case strings.Contains(path, k.name):
		return r.Method + " " + strings.ReplaceAll(path, k.name, "KEY")
	case strings.HasSuffix(path, "/encrypt/seal"), strings.HasSuffix(path, "/sign/receipt"), strings.HasSuffix(path, "/data/checkpoint"):
		return r.Method + " " + path
	}
	return ""
}

// after returns a function that kills s after it has made a call for the nth
// time, or never if there is no such call.
func (k *killer) after(call string, n int, s *harness.Server) func(*http.Response) error {
	return func(r *http.Response) error {
		k.mu.Lock()
		defer k.mu.Unlock()
		what := k.call(r.Request)
		if what == "" || k.killed {
			return nil
		}
		k.calls = append(k.calls, what)
		if what != call {
			return nil
		}
		if n--; n > 0 {
			return nil
		}
		s.Kill()
		k.killed = true
		return errors.New("killed")
	}
}

func (k *killer) result() (calls []string, killed bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.calls), k.killed
}

// TestPromise4_KilledAfterEachCallToVault: whatever call the service dies
// after, nothing was released without its event, and Transit is empty again.
func TestPromise4_KilledAfterEachCallToVault(t *testing.T) {
	const life = 8 * time.Second // of a reservation
	v, proxy, settings := throughVault(t)
	s := harness.Start(t, settings, harness.Set("ORGKEYS_RESERVATION_TTL", life.String()))
	received := map[string]bool{}
	generate := func(call string, n int) (calls []string, killed bool) {
		k := &killer{}
		proxy.After(k.after(call, n, s))
		defer proxy.After(nil)
		org := harness.Org()
		resp, err := s.Try(t.Context(), harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: s.Token(t, org, "OWNER")})
		if err == nil && resp.Status == 200 {
			received[resp.Header.Get("X-Key-Id")] = true
		}
		calls, killed = k.result()
		for deadline := time.Now().Add(2 * time.Second); err == nil && !killed && time.Now().Before(deadline); calls, killed = k.result() {
			time.Sleep(20 * time.Millisecond) // for calls that follow the answer
		}
		return calls, killed
	}
	calls, _ := generate("none", 1)
	slices.Sort(calls)
	sign, checkpoint := "PUT orgkeys-audit/sign/receipt", "PUT orgkeys-state/data/checkpoint"
	if want := []string{"DELETE orgkeys/keys/KEY", "GET orgkeys/export/encryption-key/KEY/1", "GET orgkeys/keys/KEY", sign, sign,
		"PUT orgkeys-seal/encrypt/seal", checkpoint, checkpoint, "PUT orgkeys/keys/KEY", "PUT orgkeys/keys/KEY/config"}; !slices.Equal(calls, want) {
		t.Fatalf("a generation calls Vault for %q, want %q", calls, want)
	}
	for i, call := range calls {
		n := 1
		if i > 0 && call == calls[i-1] {
			n = 2
		}
		if _, killed := generate(call, n); !killed {
			t.Errorf("it was not killed after %s", call)
			continue
		}
		s.Start(t)
	}
	start := time.Now()
	harness.Eventually(t, 2*life+harness.Patience, "nothing is left in Transit", func() bool { return len(inTransit(t, v)) == 0 })
	t.Logf("Transit was empty %s after the last start; a reservation lives for %s", time.Since(start).Round(time.Millisecond), life)
	db := s.Database(t)
	harness.Eventually(t, 2*life+harness.Patience, "nothing is reserved or pending", func() bool {
		return harness.Number(t, db, `SELECT count(*) FROM org_keys WHERE state IN ('reserved', 'pending')`) == 0
	})
	created := map[string]bool{}
	for _, l := range eventsInVault(t, v, func(l harness.Leaf) bool { return l.Type == "orgkey.created" }) {
		created[l.Object] = true
	}
	released := harness.Strings(t, db, `SELECT id FROM org_keys WHERE released_at IS NOT NULL`)
	for _, id := range released {
		if !created[id] {
			t.Errorf("key %s was released, and Vault's audit file does not hold its event", id)
		}
		delete(received, id)
	}
	if len(received) > 0 || len(released) == 0 {
		t.Errorf("received but not released: %v; released: %v", received, released)
	}
	if out, stderr, code := s.Run(t, "audit", "verify"); code != 0 && code != 3 {
		t.Errorf("audit verify: exit code %d\n%s%s", code, out, stderr)
	}
}

const promptly = 10 * time.Second

// refusesPromptly fails the test unless what needs Vault gets a clear 5xx in
// time, and readiness says so.
func refusesPromptly(t *testing.T, s *harness.Server) {
	t.Helper()
	org := harness.Org()
	resp := s.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: s.Token(t, org, "OWNER")})
	t.Logf("generating: status %d after %s, %s", resp.Status, resp.Took.Round(time.Millisecond), resp.Body)
	if resp.Status < 500 || resp.Took > promptly || bytes.Contains(resp.Body, []byte("ault ")) {
		t.Errorf("generating: status %d after %s, body %q", resp.Status, resp.Took, resp.Body)
	}
	if resp.Status == 503 && resp.Header.Get("Retry-After") == "" {
		t.Error("503 without Retry-After")
	}
	harness.Eventually(t, promptly, "it is not ready", func() bool { return readiness(t, s) == 503 })
}

func readiness(t *testing.T, s *harness.Server) int {
	t.Helper()
	resp, err := s.HTTP.Get(s.API + "/readyz")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

// worksAgain fails the test unless the same process soon does all that needs Vault.
func worksAgain(t *testing.T, s *harness.Server, v *vaulttest.Server) {
	t.Helper()
	start := time.Now()
	harness.Eventually(t, harness.Patience, "it is ready again", func() bool { return readiness(t, s) == 200 })
	org := harness.Org()
	s.Generate(t, org)
	if n := len(s.List(t, org)); n != 1 {
		t.Errorf("%d keys listed", n)
	}
	t.Logf("back at work after %s", time.Since(start).Round(time.Millisecond))
	harness.Eventually(t, harness.Patience, "nothing is left in Transit", func() bool { return len(inTransit(t, v)) == 0 })
}

// TestPromise9_VaultInTrouble: one process of the service goes through all of it.
func TestPromise9_VaultInTrouble(t *testing.T) {
	v, proxy, settings := throughVault(t)
	s := harness.Start(t, settings, harness.Set("ORGKEYS_RESERVATION_TTL", "14s"))
	known := harness.Org()
	s.Generate(t, known)
	pid := s.PID()
	try := func(name string, do func(t *testing.T)) {
		t.Run(name, func(t *testing.T) {
			do(t)
			worksAgain(t, s, v)
			if !s.Running() || s.PID() != pid {
				t.Fatal("it is not the same process")
			}
		})
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	try("sealed and unsealed", func(t *testing.T) {
		must(v.Seal(t.Context()))
		refusesPromptly(t, s)
		resp := s.Do(t, harness.Request{Method: "GET", Path: harness.KeyPath(known), Token: s.Token(t, known, "OWNER")})
		if resp.Status < 500 || resp.Took > promptly {
			t.Errorf("listing: status %d after %s", resp.Status, resp.Took)
		}
		must(v.Unseal(t.Context()))
	})
	try("killed and restarted", func(t *testing.T) {
		must(v.Kill())
		refusesPromptly(t, s)
		must(v.Restart(t.Context()))
	})
	try("token revoked", func(t *testing.T) {
		client, err := v.Client(v.RootToken)
		must(err)
		revoked := tokenInUse(t, s, proxy)
		must(client.Auth().Token().RevokeTreeWithContext(t.Context(), revoked))
		org := harness.Org()
		s.Generate(t, org) // without anybody noticing
		if tokenInUse(t, s, proxy) == revoked {
			t.Error("it still uses the revoked token")
		}
	})
	try("audit file cannot be written", func(t *testing.T) {
		must(v.BreakAudit())
		harness.Eventually(t, promptly, "Vault refuses", func() bool { return readiness(t, s) == 503 })
		refusesPromptly(t, s)
		must(v.MendAudit())
	})
	try("three seconds for every call", func(t *testing.T) {
		proxy.Before(func(_ http.ResponseWriter, r *http.Request) bool {
			select {
			case <-time.After(3 * time.Second):
			case <-r.Context().Done():
			}
			return true
		})
		defer proxy.Before(nil)
		org := harness.Org()
		resp := s.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: s.Token(t, org, "OWNER")})
		t.Logf("generating: status %d after %s, %s", resp.Status, resp.Took.Round(time.Millisecond), resp.Body)
		if resp.Status != 503 || resp.Took > promptly {
			t.Errorf("generating: status %d after %s", resp.Status, resp.Took)
		}
	})
	try("every call answered with 500 once", func(t *testing.T) {
		var mu sync.Mutex
		asked := map[string]int{}
		proxy.Before(func(w http.ResponseWriter, r *http.Request) bool {
			mu.Lock()
			defer mu.Unlock()
			asked[r.Method+r.URL.Path]++
			if asked[r.Method+r.URL.Path] > 1 {
				return true
			}
			w.WriteHeader(http.StatusInternalServerError)
			return false
		})
		defer proxy.Before(nil)
		s.Generate(t, harness.Org())
	})
	try("every call answered with 500", func(t *testing.T) {
		proxy.Before(func(w http.ResponseWriter, _ *http.Request) bool {
			w.WriteHeader(http.StatusInternalServerError)
			return false
		})
		defer proxy.Before(nil)
		refusesPromptly(t, s)
	})
}

// tokenInUse is the token of the service's next call.
func tokenInUse(t *testing.T, s *harness.Server, proxy *vaulttest.Proxy) string {
	t.Helper()
	seen := make(chan string, 1)
	proxy.Before(func(_ http.ResponseWriter, r *http.Request) bool {
		select {
		case seen <- r.Header.Get("X-Vault-Token"):
		default:
		}
		return true
	})
	defer proxy.Before(nil)
	readiness(t, s)
	select {
	case token := <-seen:
		return token
	case <-time.After(harness.Patience):
		t.Fatal("it does not call Vault")
		return ""
	}
}

// sealedVersions counts the sealed records by the version of the key.
func sealedVersions(t *testing.T, s *harness.Server) map[string]int {
	t.Helper()
	versions := map[string]int{}
	db := s.Database(t)
	for _, sealed := range harness.Strings(t, db, `SELECT sealed FROM org_keys WHERE sealed IS NOT NULL UNION ALL SELECT sealed FROM boot_secrets`) {
		version, _, _ := strings.Cut(strings.TrimPrefix(sealed, "vault:"), ":")
		versions[version]++
	}
	return versions
}

// TestRewrapAfterRotation: "orgkeys rewrap" beside a running server.
func TestRewrapAfterRotation(t *testing.T) {
	v, proxy, settings := throughVault(t)
	s := harness.Start(t, settings, harness.Set("ORGKEYS_RESERVATION_TTL", "10s"))
	org := harness.Org()
	owner := s.Token(t, org, "OWNER")
	keys := []harness.Key{s.Generate(t, org), s.Generate(t, org), s.Generate(t, org)}
	put := func(name string) {
		resp, err := s.Try(t.Context(), harness.Request{Method: "PUT", Path: "/organization/" + org + "/secret/" + name, Token: owner, Body: []byte("AWS_REGION=eu\n"),
			Header: http.Header{"Content-Type": {"application/octet-stream"}}})
		if err != nil || resp.Status != 200 {
			t.Errorf("putting a boot secret: status %d, %v", resp.Status, err)
		}
	}
	put("env_s3")
	late := make(chan struct{}) // closed to let out what was sealed before the rotation
	sealed, stored := make(chan struct{}), make(chan struct{})
	proxy.After(func(r *http.Response) error {
		if strings.HasSuffix(r.Request.URL.Path, "/encrypt/seal") {
			close(sealed)
			<-late
		}
		return nil
	})
	go func() { put("env_late"); close(stored) }()
	<-sealed
	version := rotate(t, v)
	proxy.After(nil)
	keys = append(keys, s.Generate(t, org)) // of the newest version already
	vNew := fmt.Sprintf("v%d", version)
	rewrap := func(t *testing.T) (string, int) {
		t.Helper()
		stdout, stderr, code := s.Run(t, "rewrap")
		if stdout != "" {
			t.Errorf("it wrote to standard output: %q", stdout)
		}
		return stderr, code
	}
	events := func() []harness.Leaf {
		return s.Sink(t).Find(func(l harness.Leaf) bool { return l.Type == "seal.rewrapped" })
	}
	db := s.Database(t)

	t.Run("a key deleted meanwhile stays deleted, and what was being sealed is not missed", func(t *testing.T) {
		asked := 0
		proxy.After(func(r *http.Response) error {
			if strings.HasSuffix(r.Request.URL.Path, "/rewrap/seal") {
				switch asked++; asked {
				case 1:
					resp, err := s.Try(t.Context(), harness.Request{Method: "DELETE", Path: harness.KeyPath(org) + "/" + keys[0].ID, Token: owner})
					if err != nil || resp.Status != 200 {
						t.Errorf("deleting: status %d, %v", resp.Status, err)
					}
				case 3: // keys and boot secrets have been looked at
					close(late)
					<-stored
				}
			}
			return nil
		})
		defer proxy.After(nil)
		progress, code := rewrap(t)
		if code != 0 || !strings.Contains(progress, "boot secrets: 2, of which 1 were rewrapped") || !strings.Contains(progress, "public keys: 4, of which 2 were rewrapped to version") || !strings.Contains(progress, "boot secrets: 1, of which 1 were rewrapped") ||
			!strings.Contains(progress, "keys that authenticate events: 1, of which 1 were rewrapped") {
			t.Errorf("exit code %d\n%s", code, progress)
		}
		if n := harness.Number(t, db, `SELECT count(*) FROM org_keys WHERE state = 'deleted' AND sealed IS NULL AND id = '`+keys[0].ID+`'`); n != 1 {
			t.Error("the deleted key came back")
		}
	})
	t.Run("every record is of the newest version and opens under it alone", func(t *testing.T) {
		if got := sealedVersions(t, s); got[vNew] != 5 || len(got) != 1 {
			t.Errorf("records by version: %v", got)
		}
		for _, least := range []int{version, 1} {
			openFrom(t, v, least)
			if n := len(s.List(t, org)); n != 3 {
				t.Errorf("%d keys listed", n)
			}
		}
	})
	t.Run("a second run changes nothing", func(t *testing.T) {
		all := `SELECT sealed FROM org_keys WHERE sealed IS NOT NULL UNION ALL SELECT sealed FROM boot_secrets UNION ALL SELECT sealed FROM event_keys`
		before := harness.Strings(t, db, all)
		progress, code := rewrap(t)
		if code != 0 || !strings.Contains(progress, "public keys: 3, of which 0 were") || !strings.Contains(progress, "boot secrets: 2, of which 0 were") {
			t.Errorf("exit code %d\n%s", code, progress)
		}
		if !slices.Equal(before, harness.Strings(t, db, all)) {
			t.Error("records changed")
		}
	})
	t.Run("an interrupted run is completed by another", func(t *testing.T) {
		version = rotate(t, v)
		var mu sync.Mutex
		asked := 0
		proxy.Before(func(w http.ResponseWriter, r *http.Request) bool {
			mu.Lock()
			defer mu.Unlock()
			if !strings.HasSuffix(r.URL.Path, "/rewrap/seal") {
				return true
			}
			if asked++; asked == 1 {
				return true
			}
			w.WriteHeader(http.StatusServiceUnavailable)
			return false
		})
		defer proxy.Before(nil)
		if progress, code := rewrap(t); code != 1 || !strings.Contains(progress, "public keys: 3, of which 3 were") {
			t.Errorf("exit code %d\n%s", code, progress)
		}
		proxy.Before(nil)
		openFrom(t, v, version)
		if progress, code := rewrap(t); code != 1 || !strings.Contains(progress, "lower min_decryption_version") {
			t.Errorf("with min_decryption_version raised too early: exit code %d\n%s", code, progress)
		}
		openFrom(t, v, 1)
		if progress, code := rewrap(t); code != 0 || !strings.Contains(progress, "public keys: 3, of which 0 were") || !strings.Contains(progress, "boot secrets: 2, of which 2 were") {
			t.Errorf("exit code %d\n%s", code, progress)
		}
		if got := sealedVersions(t, s); got[fmt.Sprintf("v%d", version)] != 5 || len(got) != 1 {
			t.Errorf("records by version: %v", got)
		}
	})
	t.Run("killed runs are completed by another", func(t *testing.T) {
		version = rotate(t, v)
		for _, at := range []struct {
			call     int64
			answered bool
		}{{1, false}, {1, true}, {2, false}, {1, true}, {2, false}} { // what is stored is not asked for again
			ctx, kill := context.WithTimeout(t.Context(), harness.Patience)
			ended := make(chan struct{})
			var asked atomic.Int64
			last := func(path string) bool {
				if !strings.HasSuffix(path, "/rewrap/seal") || asked.Add(1) < at.call {
					return false
				}
				kill()
				<-ended
				return true
			}
			if at.answered {
				proxy.After(func(r *http.Response) error { last(r.Request.URL.Path); return nil })
			} else {
				proxy.Before(func(_ http.ResponseWriter, r *http.Request) bool { return !last(r.URL.Path) })
			}
			killed := s.RunUntil(t, ctx, "rewrap")
			close(ended)
			proxy.Before(nil)
			proxy.After(nil)
			if !killed {
				t.Errorf("call %d, answered %t: the run was not killed", at.call, at.answered)
			}
			if n := len(s.List(t, org)); n != 3 {
				t.Errorf("%d keys listed", n)
			}
		}
		if progress, code := rewrap(t); code != 0 || !strings.Contains(progress, "public keys: 3, of which 0 were") || !strings.Contains(progress, "boot secrets: 2, of which 0 were") ||
			!strings.Contains(progress, "keys that authenticate events: 1, of which 1 were") {
			t.Errorf("exit code %d\n%s", code, progress)
		}
		if got := sealedVersions(t, s); got[fmt.Sprintf("v%d", version)] != 5 || len(got) != 1 {
			t.Errorf("records by version: %v", got)
		}
	})
	t.Run("a broken record is named and does not stop the others", func(t *testing.T) {
		version = rotate(t, v)
		sealed := harness.Strings(t, db, `SELECT sealed FROM org_keys WHERE id = '`+keys[1].ID+`'`)[0]
		harness.Exec(t, db, `UPDATE org_keys SET sealed = CAST($1 AS BLOB) WHERE id = $2`, sealed[:len(sealed)-8]+"AAAAAAA=", keys[1].ID)
		progress, code := rewrap(t)
		if code != 1 || !strings.Contains(progress, keys[1].ID) {
			t.Errorf("exit code %d\n%s", code, progress)
		}
		if strings.Count(progress, keys[1].ID) != 1 {
			t.Errorf("the broken record is named more than once:\n%s", progress)
		}
		if got := sealedVersions(t, s); got[fmt.Sprintf("v%d", version)] != 4 {
			t.Errorf("records by version: %v", got)
		}
	})
	t.Run("every run that was not killed is an event, the interrupted one too", func(t *testing.T) {
		harness.Eventually(t, harness.Patience, "six events are in the log", func() bool { return len(events()) == 6 })
		if interrupted := events()[2]; interrupted.Reason != "interrupted" || interrupted.Detail["count"] != "3" {
			t.Errorf("event %+v", interrupted)
		}
		first, last := events()[0], events()[5]
		if first.Outcome != "success" || first.Detail["count"] != "5" || last.Outcome != "failure" || last.Detail["count"] != "5" {
			t.Errorf("events %+v and %+v", first, last)
		}
	})
}

// openFrom has Vault refuse what is sealed under older versions.
func openFrom(t *testing.T, v *vaulttest.Server, version int) {
	t.Helper()
	if _, err := root(t, v).WriteWithContext(t.Context(), "orgkeys-seal/keys/seal/config", map[string]any{"min_decryption_version": version}); err != nil {
		t.Fatal(err)
	}
}

// rotate makes a new version of the sealing key and returns its number.
func rotate(t *testing.T, v *vaulttest.Server) int {
	t.Helper()
	if _, err := root(t, v).WriteWithContext(t.Context(), "orgkeys-seal/keys/seal/rotate", nil); err != nil {
		t.Fatal(err)
	}
	key, err := root(t, v).ReadWithContext(t.Context(), "orgkeys-seal/keys/seal")
	if err != nil {
		t.Fatal(err)
	}
	version, err := key.Data["latest_version"].(json.Number).Int64()
	if err != nil {
		t.Fatal(err)
	}
	return int(version)
}

func TestRewrapIsForVault(t *testing.T) {
	t.Parallel()
	s := harness.Configure(t)
	if _, stderr, code := s.Run(t, "rewrap"); code != 1 || !strings.Contains(stderr, "ORGKEYS_KEYSTORE=vault") {
		t.Errorf("exit code %d, %q", code, stderr)
	}
}

// TestPromise10_VaultThatIsNotSetUpIsRefused: each case does something to the
// Vault, sees the service refuse it and say what to do, and undoes it.
func TestPromise10_VaultThatIsNotSetUpIsRefused(t *testing.T) {
	v, _, settings := throughVault(t)
	client, err := v.Client(v.RootToken)
	if err != nil {
		t.Fatal(err)
	}
	sys, ctx := client.Sys(), t.Context()
	file := &api.EnableAuditOptions{Type: "file", Options: map[string]string{"file_path": v.AuditFile}}
	raw := &api.EnableAuditOptions{Type: "file", Options: map[string]string{"file_path": v.Dir + "/raw.log", "log_raw": "true"}}
	policy, err := sys.GetPolicyWithContext(ctx, "orgkeys-service")
	if err != nil {
		t.Fatal(err)
	}
	const exporting = "\npath \"orgkeys-seal/export/encryption-key/seal\" {\n  capabilities = [\"read\"]\n}\n"
	tests := []struct {
		name         string
		do, undo     func() error
		says, advise string
	}{
		{"sealed", func() error { return v.Seal(ctx) }, func() error { return v.Unseal(ctx) }, "Vault is sealed", "vault operator unseal"},
		{"no audit device", func() error { return sys.DisableAuditWithContext(ctx, "file") },
			func() error { return sys.EnableAuditWithOptionsWithContext(ctx, "file", file) }, "no audit device", "vault audit enable file"},
		{"an audit device with log_raw", func() error { return sys.EnableAuditWithOptionsWithContext(ctx, "raw", raw) },
			func() error { return errors.Join(sys.DisableAuditWithContext(ctx, "raw"), os.Remove(v.Dir+"/raw.log")) }, "log_raw=true", "vault audit disable raw/"},
		{"no sealing mount", func() error { return sys.RemountWithContext(ctx, "orgkeys-seal", "orgkeys-seal-away") },
			func() error { return sys.RemountWithContext(ctx, "orgkeys-seal-away", "orgkeys-seal") }, "no mount for orgkeys-seal/keys/seal", "vault/setup"},
		{"no sealing key", func() error {
			return errors.Join(sys.RemountWithContext(ctx, "orgkeys-seal", "orgkeys-seal-away"), sys.MountWithContext(ctx, "orgkeys-seal", &api.MountInput{Type: "transit"}))
		}, func() error {
			return errors.Join(sys.UnmountWithContext(ctx, "orgkeys-seal"), sys.RemountWithContext(ctx, "orgkeys-seal-away", "orgkeys-seal"))
		}, "no key orgkeys-seal/keys/seal", "vault/setup"},
		{"a policy that is too strong", func() error { return sys.PutPolicyWithContext(ctx, "orgkeys-service", policy+exporting) },
			func() error { return sys.PutPolicyWithContext(ctx, "orgkeys-service", policy) }, "the policy is too strong: the service has read on orgkeys-seal/export", "give the token the policies"},
		{"a policy that is too weak", func() error {
			return sys.PutPolicyWithContext(ctx, "orgkeys-service", strings.Replace(policy, "orgkeys-seal/decrypt/seal", "orgkeys-seal/decrypt/none", 1))
		}, func() error { return sys.PutPolicyWithContext(ctx, "orgkeys-service", policy) }, "the policy is too weak: the service needs update on orgkeys-seal/decrypt/seal", "vault/setup"},
		{"gone", v.Kill, func() error { return v.Restart(ctx) }, "Vault does not answer", "VAULT_ADDR"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := harness.Configure(t, settings)
			if err := tt.do(); err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := tt.undo(); err != nil {
					t.Fatal(err)
				}
			}()
			_, stderr, code := s.Run(t, "serve")
			if code != 1 || !strings.Contains(stderr, tt.says) || !strings.Contains(stderr, tt.advise) {
				t.Errorf("exit code %d; want %q and %q in\n%s", code, tt.says, tt.advise, stderr)
			}
		})
	}
	t.Run("as it should be again, it starts", func(t *testing.T) {
		s := harness.Start(t, settings)
		s.Generate(t, harness.Org())
	})
}

// TestKeysLeftInTransitAreToldOfAndReaped: a key that no reservation owns, as a
// crash right after its creation leaves it; the service may not delete it yet.
func TestKeysLeftInTransitAreToldOfAndReaped(t *testing.T) {
	const life = 2 * time.Second
	v, _, settings := throughVault(t)
	const name = "5f0c1f5e-9d3a-4c1b-8f57-2f6f3c8a1b2d"
	if _, err := root(t, v).WriteWithContext(t.Context(), "orgkeys/keys/"+name, map[string]any{"type": "rsa-2048", "exportable": true}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * life) // Vault tells the time in whole seconds
	s := harness.Start(t, settings, harness.Set("ORGKEYS_RESERVATION_TTL", life.String()))
	if !bytes.Contains(s.Output(), []byte("Transit holds 1 keys that a crash left behind")) {
		t.Errorf("it does not say so:\n%s", s.Output())
	}
	harness.Eventually(t, harness.Patience, "the key is gone", func() bool { return len(inTransit(t, v)) == 0 })
}

// TestDoctorLeavesVaultAsItWas: it gives its token back, and does not use up
// the one login that a wrapped secret ID is good for.
func TestDoctorLeavesVaultAsItWas(t *testing.T) {
	v, _, settings := throughVault(t)
	tokens := func() int {
		list, err := root(t, v).ListWithContext(t.Context(), "auth/token/accessors")
		if err != nil {
			t.Fatal(err)
		}
		return len(list.Data["keys"].([]any))
	}
	s := harness.Start(t, settings)
	before := tokens()
	if failing, said := diagnose(t, s); len(failing) > 0 || !slices.ContainsFunc(said, func(d diagnosis) bool { return d.What == "Vault" && d.State == "ok" }) ||
		!slices.ContainsFunc(said, func(d diagnosis) bool {
			return d.What == "sealed delivery" && d.State == "ok" && strings.Contains(d.Found, "RSA_AES_KEY_WRAP_SHA_256")
		}) {
		t.Errorf("doctor says %v", said)
	}
	if after := tokens(); after != before {
		t.Errorf("Vault had %d tokens and has %d", before, after)
	}
	s.Stop(t)

	dir := t.TempDir()
	if _, err := v.Setup(t.Context(), "--credentials", dir, "--wrap", "5m"); err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{
		"ORGKEYS_VAULT_ROLE_ID_FILE": dir + "/role_id", "ORGKEYS_VAULT_SECRET_ID_FILE": dir + "/secret_id",
		"ORGKEYS_VAULT_SECRET_ID_PATH": "auth/approle/role/orgkeys/secret-id",
	} {
		s.Configured(name, value)
	}
	if failing, said := diagnose(t, s); len(failing) > 0 || !slices.ContainsFunc(said, func(d diagnosis) bool { return d.What == "Vault" && d.State == "warn" }) {
		t.Errorf("doctor says %v", said)
	}
	s.Start(t)
	s.Generate(t, harness.Org())
}
