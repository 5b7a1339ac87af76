package e2e

import (
	"bytes"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/testca"
)

// TestPromise10_DoubtfulConfigurationsAreRefused: promptly, without listening,
// and with a message that names what is wrong.
func TestPromise10_DoubtfulConfigurationsAreRefused(t *testing.T) {
	t.Parallel()
	issuer := harness.NewIssuer(t)
	open := filepath.Join(t.TempDir(), "pin")
	if err := os.WriteFile(open, []byte("1234"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o644); err != nil {
		t.Fatal(err)
	}
	ca := testca.New(t)
	authorities, err := os.ReadFile(ca.File)
	if err != nil {
		t.Fatal(err)
	}
	loose := filepath.Join(t.TempDir(), "roots.pem")
	if err := errors.Join(os.WriteFile(loose, authorities, 0o600), os.Chmod(loose, 0o666)); err != nil {
		t.Fatal(err)
	}
	cert := ca.Issue(t, "server")
	other := ca.Issue(t, "other")
	with := func(base map[string]string, change ...string) map[string]string {
		all := map[string]string{}
		for k, v := range base {
			all[k] = v
		}
		for i := 0; i < len(change); i += 2 {
			all[change[i]] = change[i+1]
		}
		return all
	}
	configured := issuer.Settings()
	for _, c := range []struct {
		name     string
		settings map[string]string
		says     string
	}{
		{"makers of TPMs from a file that is not there", with(nil, "ORGKEYS_TPM_ROOTS_FILE", "/nonexistent/roots.pem"), "ORGKEYS_TPM_ROOTS_FILE"},
		{"makers of TPMs from a file that everybody may write", with(nil, "ORGKEYS_TPM_ROOTS_FILE", loose), "may be changed by others"},
		{"makers of TPMs from a file without certificates", with(nil, "ORGKEYS_TPM_ROOTS_FILE", open), "ORGKEYS_TPM_ROOTS_FILE"},
		{"an unknown setting", with(nil, "ORGKEYS_LISTN", "127.0.0.1:0"), "ORGKEYS_LISTN"},
		{"an empty audience", with(configured, "ORGKEYS_AUDIENCE", ""), "ORGKEYS_AUDIENCE"},
		{"an audience of blanks", with(configured, "ORGKEYS_AUDIENCE", "  "), "ORGKEYS_AUDIENCE"},
		{"an issuer without keys, and no address to find them by", with(nil, "ORGKEYS_ISSUER", "urn:issuer", "ORGKEYS_AUDIENCE", "a"), "ORGKEYS_JWKS"},
		{"keys without an issuer", with(nil, "ORGKEYS_JWKS", issuer.JWKS), "ORGKEYS_ISSUER"},
		{"an audit file in no directory", with(nil, "ORGKEYS_AUDIT_FILE", "/nonexistent/audit.jsonl"), "ORGKEYS_AUDIT_FILE"},
		{"an audit file that cannot be written", with(nil, "ORGKEYS_AUDIT_FILE", "/proc/audit.jsonl"), "ORGKEYS_AUDIT_FILE"},
		{"keys by http", with(configured, "ORGKEYS_JWKS", "http://127.0.0.1:1/jwks"), "ORGKEYS_JWKS"},
		{"keys from a file that is not there", with(configured, "ORGKEYS_JWKS", "/nonexistent/jwks.json"), "jwks.json"},
		{"a PIN file that others may read", with(nil, "ORGKEYS_PKCS11_MODULE", harness.SoftHSM, "ORGKEYS_PKCS11_PIN_FILE", open), "600"},
		{"a secret's file that others may read", with(nil, "ORGKEYS_DATABASE_URL_FILE", open, "ORGKEYS_REDIS_URL", "redis://127.0.0.1:1"), "600"},
		{"the development issuer beyond loopback", with(nil, "ORGKEYS_LISTEN", "0.0.0.0:0", "ORGKEYS_TLS_CERT_FILE", cert.Cert, "ORGKEYS_TLS_KEY_FILE", cert.Key), "issuer"},
		{"the development issuer on every IPv6 address", with(nil, "ORGKEYS_LISTEN", "[::]:0", "ORGKEYS_TLS_CERT_FILE", cert.Cert, "ORGKEYS_TLS_KEY_FILE", cert.Key), "issuer"},
		{"a listener beyond loopback without TLS", with(configured, "ORGKEYS_LISTEN", "0.0.0.0:0"), "TLS"},
		{"an empty host, which is every address, without TLS", with(configured, "ORGKEYS_LISTEN", ":0"), "TLS"},
		{"an admin listener beyond loopback", with(nil, "ORGKEYS_ADMIN_LISTEN", "0.0.0.0:0"), "ADMIN"},
		{"TLS by a proxy without naming it", with(configured, "ORGKEYS_LISTEN", "0.0.0.0:0", "ORGKEYS_TLS_BY_PROXY", "true"), "ORGKEYS_TRUSTED_PROXIES"},
		{"a certificate without its key", with(nil, "ORGKEYS_TLS_CERT_FILE", cert.Cert), "ORGKEYS_TLS_KEY_FILE"},
		{"a certificate with another's key", with(nil, "ORGKEYS_TLS_CERT_FILE", cert.Cert, "ORGKEYS_TLS_KEY_FILE", other.Key), "TLS"},
		{"client certificates without TLS", with(nil, "ORGKEYS_TLS_CLIENT_CA_FILE", ca.File), "TLS"},
		{"any origin", with(nil, "ORGKEYS_CORS_ORIGINS", "*"), "ORGKEYS_CORS_ORIGINS"},
		{"a limit that is no number", with(nil, "ORGKEYS_MAX", "many"), "ORGKEYS_MAX"},
		{"a negative limit", with(nil, "ORGKEYS_MAX", "-1"), "ORGKEYS_MAX"},
		{"a reservation shorter than a generation", with(nil, "ORGKEYS_RESERVATION_TTL", "1s"), "ORGKEYS_RESERVATION_TTL"},
		{"a back end nobody knows", with(nil, "ORGKEYS_KEYSTORE", "memory"), "ORGKEYS_KEYSTORE"},
		{"a policy directory that is not there", with(nil, "ORGKEYS_POLICY_DIR", "/nonexistent"), "ORGKEYS_POLICY_DIR"},
		{"a policy directory with nothing in it", with(nil, "ORGKEYS_POLICY_DIR", t.TempDir()), "policy"},
		{"no audit sink", with(nil, "ORGKEYS_AUDIT_SINKS", ""), "ORGKEYS_AUDIT_SINKS"},
		{"an audit sink nobody knows", with(nil, "ORGKEYS_AUDIT_SINKS", "stdout"), "ORGKEYS_AUDIT_SINKS"},
		{"a database with no Redis", with(nil, "ORGKEYS_DATABASE_URL", "postgres://127.0.0.1:1/x"), "ORGKEYS_REDIS_URL"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var opts []harness.Option
			for k, v := range c.settings {
				opts = append(opts, harness.Set(k, v))
			}
			s := harness.Configure(t, opts...)
			_, stderr, code := s.Run(t, "serve")
			if code == 0 || !strings.Contains(strings.ToLower(stderr), strings.ToLower(c.says)) {
				t.Errorf("exit code %d, want a refusal that says %q:\n%s", code, c.says, stderr)
			}
			if strings.Contains(stderr, `"msg":"listening"`) {
				t.Error("it listened before it refused")
			}
		})
	}
}

func TestDataDirectoryBelongsToOneProcess(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	if _, stderr, code := s.Run(t, "serve"); code == 0 || !strings.Contains(stderr, s.Dir) {
		t.Errorf("a second process on the same data directory: exit code %d\n%s", code, stderr)
	}
	if resp := s.Do(t, harness.Request{Method: "GET", Path: "/healthz"}); resp.Status != 200 {
		t.Errorf("the first one: status %d", resp.Status)
	}
}

func TestDataDirectoryIsPrivate(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	s.Generate(t, harness.Org())
	err := filepath.WalkDir(s.Dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %04o", path, info.Mode().Perm())
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	s.Stop(t)
	if err := os.Chmod(s.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, stderr, code := s.Run(t, "serve"); code == 0 || !strings.Contains(stderr, "700") {
		t.Errorf("on a data directory that others may enter: exit code %d\n%s", code, stderr)
	}
}

// TestTokensComeBeforeTheFirstStart: the data directory is made as serve wants
// it, and refused as serve refuses it.
func TestTokensComeBeforeTheFirstStart(t *testing.T) {
	t.Parallel()
	s := harness.Configure(t)
	token := s.Token(t, "acme", "OWNER")
	s.Start(t)
	if resp := s.Do(t, harness.Request{Method: "GET", Path: harness.KeyPath("acme"), Token: token}); resp.Status != 200 {
		t.Errorf("status %d: %s", resp.Status, resp.Body)
	}
	open := t.TempDir()
	if err := os.Chmod(open, 0o755); err != nil {
		t.Fatal(err)
	}
	s = harness.Configure(t, harness.In(open))
	if _, stderr, code := s.Run(t, "token", "--org", "acme", "--role", "OWNER"); code == 0 || !strings.Contains(stderr, "chmod 700") {
		t.Errorf("in a directory that others may enter: exit code %d\n%s", code, stderr)
	}
	if left, err := os.ReadDir(open); err != nil || len(left) > 0 {
		t.Errorf("it holds %v, %v", left, err)
	}
}

// TestSettingsComeFromAFileToo: the same names, the environment first, and a
// file that others may read is refused.
func TestSettingsComeFromAFileToo(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "orgkeys.env")
	write := func(text string, mode os.FileMode) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
	}
	s := harness.Configure(t)
	refused := func(name, says string) {
		t.Helper()
		if _, stderr, code := s.Run(t, "serve", "--config", file); code == 0 || !strings.Contains(stderr, says) {
			t.Errorf("%s: exit code %d\n%s", name, code, stderr)
		}
	}
	write("ORGKEYS_MAX=2\nORGKEYS_MAXIMUM=3\n", 0o600)
	refused("an unknown setting", "ORGKEYS_MAXIMUM")
	write("ORGKEYS_MAX=2\n", 0o644)
	refused("a file that others may read", "600")
	write("ORGKEYS_MAX=2\nORGKEYS_LISTEN=nowhere\n", 0o600)
	c := harness.Start(t, harness.Config(file))
	org := harness.Org()
	c.Generate(t, org)
	c.Generate(t, org)
	c.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: c.Token(t, org, "OWNER")}).Want(t, 400, strings.Replace(quotaMessage, "(5)", "(2)", 1))
}

// TestPromise8_RestartsGoOnWithWhatIsThere: after an orderly end and after
// SIGKILL alike. The orderly end is prompt, with exit code 0, and leaves no
// process behind.
func TestPromise8_RestartsGoOnWithWhatIsThere(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	key := s.Generate(t, org)
	token := s.Token(t, org, "OWNER")
	for _, end := range []string{"SIGTERM", "SIGKILL"} {
		if end == "SIGKILL" {
			s.Kill()
		} else if code := s.Stop(t); code != 0 {
			t.Errorf("after SIGTERM: exit code %d", code)
		}
		if left := s.Children(); len(left) != 0 {
			t.Errorf("after %s these processes are left: %v", end, left)
		}
		s.Start(t)
		listed := harness.ReadList(t, s.Do(t, harness.Request{Method: "GET", Path: harness.KeyPath(org), Token: token}))
		if len(listed) != 1 || listed[0].ID != key.ID || !listed[0].Public(t).Equal(&key.Private.PublicKey) {
			t.Errorf("after %s: listed %+v", end, listed)
		}
		s.Generate(t, org)
		s.Do(t, harness.Request{Method: "DELETE", Path: harness.KeyPath(org) + "/" + s.List(t, org)[0].ID, Token: token})
	}
	s.Stop(t)
	if _, stderr, code := s.Run(t, "audit", "verify"); code != 3 {
		t.Errorf("audit verify with the sink inside the data directory: exit code %d\n%s", code, stderr)
	}
}

// TestAnotherTokenIsRefused: with records that another token sealed, a fresh
// one is the wrong one, and is not made in silence. A boot secret is such a
// record as much as a key.
func TestAnotherTokenIsRefused(t *testing.T) {
	t.Parallel()
	for name, seal := range map[string]func(s *harness.Server, org string){
		"a key": func(s *harness.Server, org string) { s.Generate(t, org) },
		"a boot secret": func(s *harness.Server, org string) {
			s.Do(t, harness.Request{
				Method: "PUT", Path: "/organization/" + org + "/secret/env_s3", Token: s.Token(t, org, "OWNER"), Body: []byte("A=1"),
				Header: http.Header{"Content-Type": {"application/octet-stream"}},
			}).Want(t, 200, "Secret stored successfully")
		},
	} {
		s := harness.Start(t)
		seal(s, harness.Org())
		s.Stop(t)
		for _, gone := range []string{"tokens", "pin"} {
			if err := os.RemoveAll(filepath.Join(s.Dir, gone)); err != nil {
				t.Fatal(err)
			}
			if _, stderr, code := s.Run(t, "serve"); code == 0 || !strings.Contains(stderr, "token") {
				t.Errorf("%s sealed, %s gone: exit code %d\n%s", name, gone, code, stderr)
			}
		}
	}
}

// A terminal that goes away, or an operator who means "reload", ends nothing.
func TestHangupEndsNothing(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	if err := syscall.Kill(s.PID(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, harness.Patience, "the log tells of it", func() bool {
		return bytes.Contains(s.Output(), []byte("SIGHUP is ignored"))
	})
	s.Generate(t, harness.Org())
	if code := s.Stop(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// TestOrderlyEndLetsRequestsFinish sends SIGTERM while keys are being made.
func TestOrderlyEndLetsRequestsFinish(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	owner := s.Token(t, org, "OWNER")
	db := s.Database(t)
	answers := make(chan harness.Response, 2)
	for range 2 {
		go func() {
			resp, err := s.Try(t.Context(), harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: owner})
			if err != nil {
				t.Errorf("a request under way was cut off: %v", err)
			}
			answers <- resp
		}()
	}
	harness.Eventually(t, harness.Patience, "two places are taken", func() bool {
		return harness.Number(t, db, `SELECT count(*) FROM org_keys WHERE org_id = ?`, org) == 2
	})
	if code := s.Stop(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
	released := 0
	for range 2 {
		resp := <-answers
		if resp.Status == 200 {
			harness.ReadKey(t, org, resp)
			released++
		} else if resp.Status != 503 {
			t.Errorf("status %d, body %.300q", resp.Status, resp.Body)
		}
	}
	s.Start(t)
	if n := len(s.List(t, org)); n != released {
		t.Errorf("%d keys listed, %d released", n, released)
	}
}
