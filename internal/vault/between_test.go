package vault_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/orgkeys/orgkeys/internal/freeport"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/vault"
	"github.com/orgkeys/orgkeys/internal/vault/vaulttest"
)

// agent runs a real Vault Agent in front of the shared Vault, and returns its address.
func agent(t *testing.T, stanza string) string {
	t.Helper()
	binary, err := vaulttest.Binary()
	if err != nil {
		t.Fatal(err)
	}
	port, err := freeport.Find(0)
	if err != nil {
		t.Fatal(err)
	}
	dir, address := t.TempDir(), fmt.Sprintf("127.0.0.1:%d", port)
	config := filepath.Join(dir, "agent.hcl")
	text := fmt.Sprintf("vault {\n  address = %q\n  ca_cert = %q\n}\nlistener \"tcp\" {\n  address = %q\n  tls_disable = true\n}\n%s", server.Address, server.CACert, address, stanza)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	cmd := exec.Command(binary, "agent", "-config="+config)
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("the Agent said:\n%s", said.String())
		}
	})
	eventually(t, func() error {
		r, err := http.Get("http://" + address + "/v1/sys/health")
		if err != nil {
			return err
		}
		return r.Body.Close()
	})
	return "http://" + address
}

// record is a log that a test reads while the client writes it.
type record struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (r *record) Write(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.Write(b)
}

func (r *record) count(what string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Count(r.text.String(), what)
}

// An Agent that caches answers the login that should replace a revoked token
// with that very token.
func TestALoginThatAnAgentAnswersFromItsCacheIsAskedPastIt(t *testing.T) {
	var log record
	c := open(t, func(c *vault.Config) {
		c.Address, c.Log = agent(t, "cache {}\n"), slog.New(slog.NewTextHandler(&log, nil))
	})
	for round := range 2 {
		old := c.Token()
		revoke(t, old)
		for range 5 {
			if _, err := generate(t.Context(), c); err != nil {
				t.Errorf("round %d: %v", round, err)
			}
		}
		if c.Token() == old {
			t.Error("the dead token stayed")
		}
	}
	if log.count("X-Cache") == 0 {
		t.Errorf("what is in between is not said:\n%s", log.text.String())
	}
	if n := log.count("logged in to Vault"); n != 3 {
		t.Errorf("it logged in %d times, want once at the start and once a revoked token", n)
	}
}

// A cache that goes by the address alone gives nothing else whatever is asked:
// that is no login, it is said what is in between, and it is not hammered.
func TestALoginFromAStubbornCacheIsNone(t *testing.T) {
	proxy, err := vaulttest.NewProxy(server)
	if err != nil {
		t.Fatal(err)
	}
	defer proxy.Close()
	var logins, caching atomic.Int64
	var answer atomic.Value
	caching.Store(1)
	proxy.After(func(r *http.Response) error {
		if !strings.HasSuffix(r.Request.URL.Path, "/login") {
			return nil
		}
		b, err := io.ReadAll(r.Body)
		answer.Store(b)
		r.Body = io.NopCloser(bytes.NewReader(b))
		return err
	})
	proxy.Before(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, "/login") {
			return true
		}
		logins.Add(1)
		b, cached := answer.Load().([]byte)
		if !cached || caching.Load() == 0 {
			return true
		}
		w.Header().Set("Age", "17")
		w.Write(b)
		return false
	})
	var log record
	c := open(t, func(c *vault.Config) { c.Address, c.Log = proxy.Address, slog.New(slog.NewTextHandler(&log, nil)) })
	revoke(t, c.Token())
	logins.Store(0)
	began := time.Now()
	for time.Since(began) < 6*time.Second {
		err := c.Healthy(t.Context())
		if !errors.Is(err, vault.ErrLogin) || !errors.Is(err, orgkey.ErrUnavailable) || !strings.Contains(err.Error(), "cache") || !strings.Contains(err.Error(), `Age: "17"`) {
			t.Fatalf("got %v", err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	if n := logins.Load(); n < 4 || n > 8 { // at 0, 1 and 3 s, and asked past each time
		t.Errorf("it sent %d logins within six seconds", n)
	}
	if p := problems(c); !strings.Contains(p, "VAULT_ADDR") || !strings.Contains(p, "cache") {
		t.Errorf("the check at start finds: %s", p)
	}
	if log.count("logged in to Vault") > 1 {
		t.Error("it says that it logged in")
	}
	caching.Store(0)
	eventually(t, func() error { return c.Healthy(context.WithoutCancel(t.Context())) })
}

// A role whose tokens may be used from elsewhere only logs in, and every call is
// refused: said by its cause, not by the policies, and not tried without end.
func TestATokenBoundToOtherAddressesIsSaidToBeOne(t *testing.T) {
	const role = "auth/approle/role/orgkeys"
	c := open(t)
	bind := func(cidrs ...string) {
		t.Helper()
		if err := second(root(t).Logical().WriteWithContext(context.WithoutCancel(t.Context()), role, map[string]any{"token_bound_cidrs": cidrs})); err != nil {
			t.Fatal(err)
		}
	}
	bind("192.0.2.0/24", "127.0.0.1/32")
	output, err := server.Setup(t.Context())
	if err != nil || !strings.Contains(output, "token_bound_cidrs") || !strings.Contains(output, "192.0.2.0/24") {
		t.Errorf("the set-up said %q, %v", output, err)
	}
	if p := problems(open(t)); !strings.Contains(p, "may be used from") || strings.Contains(p, "policies") {
		t.Errorf("from a bound address the check at start finds: %q", p)
	}
	bind("192.0.2.0/24")
	defer bind()
	revoke(t, c.Token())
	logins := 0
	for _, e := range audited(t, func() {
		for range 30 {
			if err := c.Healthy(t.Context()); !errors.Is(err, orgkey.ErrUnavailable) || strings.Contains(err.Error(), "policies") {
				t.Fatalf("got %v", err)
			}
			time.Sleep(100 * time.Millisecond)
		}
	}) {
		if e.Type == "request" && e.Request.Path == "auth/approle/login" {
			logins++
		}
	}
	if logins > 6 { // at 0, 1 and 3 s, and once more each time, past whatever cache
		t.Errorf("it logged in %d times within three seconds", logins)
	}
	if p := problems(open(t)); !strings.Contains(p, "does not accept it from this address") || !strings.Contains(p, "token_bound_cidrs") || strings.Contains(p, "twoPolicies") {
		t.Errorf("the check at start finds: %q", p)
	}
	bind()
	eventually(t, func() error { return c.Healthy(context.WithoutCancel(t.Context())) })
}

// wrappingRole is a login whose token may wrap, unlike the service's.
func wrappingRole(t *testing.T) *vault.AppRole {
	t.Helper()
	const role = "auth/approle/role/wrapping"
	logical, dir := root(t).Logical(), t.TempDir()
	if err := second(logical.WriteWithContext(t.Context(), role, map[string]any{"token_policies": "default"})); err != nil {
		t.Fatal(err)
	}
	id, err := logical.ReadWithContext(t.Context(), role+"/role-id")
	if err != nil {
		t.Fatal(err)
	}
	secret, err := logical.WriteWithContext(t.Context(), role+"/secret-id", nil)
	if err != nil {
		t.Fatal(err)
	}
	return &vault.AppRole{
		RoleIDFile:   write(t, filepath.Join(dir, "role_id"), id.Data["role_id"].(string), 0o600),
		SecretIDFile: write(t, filepath.Join(dir, "secret_id"), secret.Data["secret_id"].(string), 0o600),
	}
}

// A sink of Vault Agent that wraps or encrypts writes no token.
func TestATokenFileOfAnAgentThatWrapsIsSaidToBeOne(t *testing.T) {
	for _, options := range []string{"wrap_ttl = \"5m\"", "dh_type = \"curve25519\"\n  dh_path = %q\n  aad = \"x\""} {
		t.Run(strings.Fields(options)[0], func(t *testing.T) {
			good := wrappingRole(t)
			file := filepath.Join(t.TempDir(), "token")
			if strings.Contains(options, "%q") {
				// Any Curve25519 key will do: nobody opens what is written.
				key := write(t, filepath.Join(t.TempDir(), "key"), `{"curve25519_public_key":"CQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}`, 0o600)
				options = fmt.Sprintf(options, key)
			}
			agent(t, fmt.Sprintf(`auto_auth {
  method "approle" {
    config = {
      role_id_file_path = %q
      secret_id_file_path = %q
      remove_secret_id_file_after_reading = false
    }
  }
  sink "file" {
    %s
    config = { path = %q, mode = 0600 }
  }
}
`, good.RoleIDFile, good.SecretIDFile, options, file))
			eventually(t, func() error { _, err := os.Stat(file); return err })
			refusedOpen(t, &vault.TokenFile{Path: file}, "wrap_ttl or dh_type")
		})
	}
}

// Standing keys that rotate by themselves are warned of; they are no reason not to serve.
func TestKeysThatRotateByThemselvesAreWarnedOf(t *testing.T) {
	for path, remedy := range map[string]string{"orgkeys-seal/keys/seal": "orgkeys rewrap", "orgkeys-audit/keys/receipt": "orgkeys audit key"} {
		rotate := func(period string) {
			t.Helper()
			if err := second(root(t).Logical().WriteWithContext(context.WithoutCancel(t.Context()), path+"/config", map[string]any{"auto_rotate_period": period})); err != nil {
				t.Fatal(err)
			}
		}
		rotate("720h")
		if output, err := server.Setup(t.Context()); err != nil || !strings.Contains(output, "warning: "+path+" has auto_rotate_period") || !strings.Contains(output, remedy) {
			t.Errorf("the set-up said %q, %v", output, err)
		}
		warned(t, path+" is rotated automatically every 720h", remedy)
		rotate("0")
		if p := problems(open(t)); p != "" {
			t.Errorf("found: %q", p)
		}
	}
}

// warned fails the test unless the check finds the one problem, and no fatal one.
func warned(t *testing.T, problem, remedy string) {
	t.Helper()
	found := open(t).Check(t.Context())
	if len(found) != 1 || found[0].Fatal || !strings.Contains(found[0].Problem, problem) || !strings.Contains(found[0].Remedy, remedy) {
		t.Errorf("the check at start finds %v; want a warning of %q", found, problem)
	}
}

// Devices whose lines "audit verify" cannot read are warned of at once, and not
// found out at an audit.
func TestAuditDevicesThatVerifyCannotReadAreWarnedOf(t *testing.T) {
	sys, ctx := root(t).Sys(), context.WithoutCancel(t.Context())
	enable := func(name, kind string, options map[string]string) {
		t.Helper()
		if err := sys.EnableAuditWithOptionsWithContext(ctx, name, &api.EnableAuditOptions{Type: kind, Options: options}); err != nil {
			t.Fatal(err)
		}
	}
	disable := func(name string) {
		t.Helper()
		if err := sys.DisableAuditWithContext(ctx, name); err != nil {
			t.Error(err)
		}
	}
	main := map[string]string{"file_path": server.AuditFile}
	for name, d := range map[string]struct {
		options map[string]string
		plain   bool
	}{
		"jsonx":            {map[string]string{"file_path": filepath.Join(t.TempDir(), "x"), "format": "jsonx"}, false},
		"a prefix":         {map[string]string{"file_path": filepath.Join(t.TempDir(), "x"), "prefix": "vault: "}, false},
		"standard output":  {map[string]string{"file_path": "stdout"}, false},
		"format=json said": {map[string]string{"file_path": filepath.Join(t.TempDir(), "x"), "format": "json"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			enable("other", "file", d.options)
			if p := problems(open(t)); p != "" {
				t.Errorf("beside a plain device the check finds: %q", p)
			}
			disable("file")
			output, err := server.Setup(ctx)
			if err != nil || strings.Contains(output, "plain JSON") == d.plain {
				t.Errorf("the set-up said %q, %v", output, err)
			}
			if d.plain {
				if p := problems(open(t)); p != "" {
					t.Errorf("the check finds: %q", p)
				}
			} else {
				warned(t, "no audit device of Vault writes plain JSON", "-path=plain")
			}
			enable("file", "file", main)
			disable("other")
		})
	}
}
