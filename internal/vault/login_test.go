package vault_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/vault"
)

func write(t *testing.T, path, text string, mode os.FileMode) string {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path+".new", mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	return path
}

func tokenFile(t *testing.T, token string) *vault.TokenFile {
	t.Helper()
	return &vault.TokenFile{Path: write(t, filepath.Join(t.TempDir(), "token"), token+"\n", 0o600)}
}

// refusedOpen fails the test unless Open refuses the login with a message that holds want.
func refusedOpen(t *testing.T, login vault.Login, want string) {
	t.Helper()
	c, err := vault.Open(t.Context(), vault.Config{Address: server.Address, Login: login})
	if err == nil {
		c.Close()
	}
	if !errors.Is(err, vault.ErrLogin) || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want ErrLogin with %q", err, want)
	}
}

func TestCredentialsThatOthersCanReadAreRefused(t *testing.T) {
	dir := t.TempDir()
	role := write(t, filepath.Join(dir, "role"), "r", 0o644)
	for _, mode := range []os.FileMode{0o644, 0o604, 0o620, 0o602} {
		file := write(t, filepath.Join(dir, "secret"), "s", mode)
		refusedOpen(t, &vault.AppRole{RoleIDFile: role, SecretIDFile: file}, "chmod")
		refusedOpen(t, &vault.TokenFile{Path: file}, "chmod")
	}
	secret := write(t, filepath.Join(dir, "secret"), "s", 0o600)
	refusedOpen(t, &vault.AppRole{RoleIDFile: write(t, role, "r", 0o666), SecretIDFile: secret}, "chmod")
	refusedOpen(t, &vault.TokenFile{Path: filepath.Join(dir, "none")}, "no such file")
	refusedOpen(t, &vault.TokenFile{Path: write(t, filepath.Join(dir, "empty"), " \n", 0o600)}, filepath.Join(dir, "empty")+" is empty")
	refusedOpen(t, &vault.TokenFile{Path: write(t, filepath.Join(dir, "two"), "hvs.one\nhvs.two\n", 0o600)}, "more than one word")
	refusedOpen(t, &vault.TokenFile{Path: dir}, "")
	refusedOpen(t, nil, "no way to log in")
}

const wrongID = "00000000-0000-4000-8000-000000000000"

// wrongSecret is the service's login with a secret ID that Vault does not know.
func wrongSecret(t *testing.T) *vault.AppRole {
	t.Helper()
	good, err := server.AppRole(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return &vault.AppRole{RoleIDFile: good.RoleIDFile, SecretIDFile: write(t, filepath.Join(t.TempDir(), "secret"), wrongID, 0o600)}
}

func TestWrongSecretIDIsRefusedAtOnce(t *testing.T) {
	refusedOpen(t, wrongSecret(t), "400")
}

// goodSecret puts the right secret ID into the file of a wrong one.
func goodSecret(t *testing.T, login *vault.AppRole) {
	t.Helper()
	good, err := server.AppRole(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	id, err := os.ReadFile(good.SecretIDFile)
	if err != nil {
		t.Fatal(err)
	}
	write(t, login.SecretIDFile, string(id), 0o600)
}

// Whoever knows the role ID can have logins refused, and so can a service with a
// wrong file: after vault/setup that keeps nobody out.
func TestRefusedLoginsLockNobodyOut(t *testing.T) {
	for range 8 {
		refusedOpen(t, wrongSecret(t), "400")
	}
	login := wrongSecret(t)
	goodSecret(t, login)
	if p := problems(open(t, func(c *vault.Config) { c.Login = login })); p != "" {
		t.Error(p)
	}
}

// Where somebody else set Vault's lockout up again, its 403 is explained.
func TestALockedOutRoleIsExplained(t *testing.T) {
	tune := func(disable bool) {
		t.Helper()
		if err := second(root(t).Logical().WriteWithContext(context.WithoutCancel(t.Context()), "sys/auth/approle/tune",
			map[string]any{"user_lockout_config": map[string]any{"lockout_disable": disable}})); err != nil {
			t.Fatal(err)
		}
	}
	tune(false)
	defer tune(true)
	for range 5 {
		refusedOpen(t, wrongSecret(t), "400")
	}
	good, err := server.AppRole(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	refusedOpen(t, good, "sys/locked-users")
	if output, err := server.Setup(t.Context()); err != nil || !strings.Contains(output, "lock nobody out") {
		t.Errorf("the set-up said %q, %v", output, err)
	}
	if p := problems(open(t)); p != "" {
		t.Errorf("after the set-up: %s", p)
	}
}

// What something between the service and Vault answers is no refusal of Vault's.
func TestAProxysRefusalIsNotVaults(t *testing.T) {
	proxy, c := through(t)
	var down atomic.Bool
	proxy.Before(func(w http.ResponseWriter, _ *http.Request) bool {
		if down.Load() {
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprint(w, "<html>maintenance</html>")
		}
		return !down.Load()
	})
	down.Store(true)
	revoke(t, c.Token())
	for range 3 {
		if err := c.Healthy(t.Context()); !errors.Is(err, orgkey.ErrUnavailable) || errors.Is(err, vault.ErrLogin) {
			t.Errorf("got %v", err)
		}
		time.Sleep(vault.LoginPause)
	}
	down.Store(false)
	back := time.Now()
	eventually(t, func() error { return c.Healthy(t.Context()) })
	if took := time.Since(back); took > 3*time.Second {
		t.Errorf("it was in again after %s", took)
	}
}

// A service whose secret ID was taken back while it serves does not hammer at
// Vault with it, and takes a new one at once.
func TestRefusedCredentialsAreNotTriedAgain(t *testing.T) {
	login := wrongSecret(t)
	goodSecret(t, login)
	var log bytes.Buffer
	t.Cleanup(func() { // when the client that writes to it is closed
		if n := strings.Count(log.String(), "logging in to Vault"); n > 2 {
			t.Errorf("two refusals are logged %d times:\n%s", n, log.String())
		}
	})
	c := open(t, func(c *vault.Config) { c.Login, c.Log = login, slog.New(slog.NewTextHandler(&log, nil)) })
	write(t, login.SecretIDFile, wrongID, 0o600)
	logins := 0
	for _, e := range audited(t, func() {
		revoke(t, c.Token())
		for range 16 {
			if err := c.Healthy(t.Context()); !errors.Is(err, vault.ErrLogin) {
				t.Errorf("got %v, want ErrLogin", err)
			}
			time.Sleep(vault.LoginPause)
		}
		if err := c.Healthy(t.Context()); err == nil || !strings.Contains(err.Error(), "tries again when the files change") {
			t.Errorf("it does not say when it tries again: %v", err)
		}
	}) {
		if e.Type == "request" && e.Request.Path == "auth/approle/login" {
			logins++
		}
	}
	if logins != 2 { // after five seconds once more, then a minute later
		t.Errorf("it tried %d times with the same files", logins)
	}
	goodSecret(t, login)
	eventually(t, func() error { return c.Healthy(context.WithoutCancel(t.Context())) })
}

// The service's own attempts must not be what locks its role out: with five
// refusals in fifteen minutes Vault does.
func TestRefusedPausesDoNotAddUpToALockout(t *testing.T) {
	at := []time.Duration{0}
	for times := 1; times <= 20; times++ {
		at = append(at, at[times-1]+vault.RefusedPause(times))
	}
	count := 0
	for i, a := range at {
		if i > 0 && a-at[i-1] > 15*time.Minute {
			count = 0
		}
		if count++; count >= 5 {
			t.Fatalf("attempt %d, after %s, locks the role out", i+1, a)
		}
	}
}

// The variables of an operator's shell do not change what the service gets.
func TestVaultWrapTTLWrapsNothing(t *testing.T) {
	t.Setenv("VAULT_WRAP_TTL", "5m")
	c := open(t)
	revoke(t, c.Token())
	if p := problems(c); p != "" {
		t.Error(p)
	}
}

func TestALimitedTokenIsRefused(t *testing.T) {
	s, err := root(t).Auth().Token().CreateWithContext(t.Context(), &api.TokenCreateRequest{
		Policies: []string{"orgkeys-service", "orgkeys-reaper"}, NoDefaultPolicy: true, NumUses: 1000})
	if err != nil {
		t.Fatal(err)
	}
	c := open(t, func(c *vault.Config) { c.Login = tokenFile(t, s.Auth.ClientToken) })
	if p := problems(c); !strings.Contains(p, "more times") {
		t.Errorf("found: %q", p)
	}
}

func TestAnUnknownTokenIsSaidToBeOne(t *testing.T) {
	c := open(t, func(c *vault.Config) { c.Login = tokenFile(t, "hvs.unknown") })
	if p := problems(c); !strings.Contains(p, "does not accept the token in") || !strings.Contains(p, "check the role ID and secret ID files, or the token file") {
		t.Errorf("found: %q", p)
	}
}

func TestUnprotectedConnectionsAreRefused(t *testing.T) {
	login := tokenFile(t, "x")
	if _, err := vault.Open(t.Context(), vault.Config{Address: "http://vault.example:8200", Login: login}); !errors.Is(err, vault.ErrInsecure) {
		t.Errorf("plain HTTP: got %v", err)
	}
	t.Run("through a proxy", func(t *testing.T) {
		t.Setenv("VAULT_PROXY_ADDR", "http://proxy.example:3128")
		if _, err := vault.Open(t.Context(), vault.Config{Address: "http://127.0.0.1:8200", Login: login}); !errors.Is(err, vault.ErrInsecure) || !strings.Contains(err.Error(), "VAULT_PROXY_ADDR") {
			t.Errorf("got %v", err)
		}
	})
	t.Setenv("VAULT_SKIP_VERIFY", "true")
	if _, err := vault.Open(t.Context(), vault.Config{Address: server.Address, Login: login}); !errors.Is(err, vault.ErrInsecure) {
		t.Errorf("VAULT_SKIP_VERIFY: got %v", err)
	}
}

func TestWrappedSecretID(t *testing.T) {
	dir := t.TempDir()
	if _, err := server.Setup(t.Context(), "--credentials", dir, "--wrap", "5m"); err != nil {
		t.Fatal(err)
	}
	login := func(file string) *vault.AppRole {
		return &vault.AppRole{RoleIDFile: filepath.Join(dir, "role_id"), SecretIDFile: file, WrappedAt: "auth/approle/role/orgkeys/secret-id"}
	}
	good := filepath.Join(dir, "secret_id")

	t.Run("made by another path", func(t *testing.T) {
		client := root(t)
		client.SetWrappingLookupFunc(func(string, string) string { return "5m" })
		s, err := client.Logical().WriteWithContext(t.Context(), "sys/wrapping/wrap", map[string]any{"secret_id": "planted"})
		if err != nil {
			t.Fatal(err)
		}
		file := write(t, filepath.Join(t.TempDir(), "secret"), s.WrapInfo.Token, 0o600)
		refusedOpen(t, login(file), `"sys/wrapping/wrap"`)
		if _, err := server.RunSetup(t.Context(), "", "--wrap"); err == nil {
			t.Error("--wrap without a time was accepted")
		}
		// Refused before it was used up: whoever investigates can still look.
		if _, err := root(t).Logical().UnwrapWithContext(t.Context(), s.WrapInfo.Token); err != nil {
			t.Errorf("the wrapping token was used: %v", err)
		}
	})
	t.Run("used once, and kept for later logins", func(t *testing.T) {
		c := open(t, func(c *vault.Config) { c.Login = login(good) })
		revoke(t, c.Token())
		if err := c.Healthy(t.Context()); err != nil {
			t.Errorf("after its token was revoked: %v", err)
		}
	})
	t.Run("used before", func(t *testing.T) { refusedOpen(t, login(good), "or may have been used") })
}

func revoke(t *testing.T, token string) {
	t.Helper()
	if err := root(t).Auth().Token().RevokeTreeWithContext(t.Context(), token); err != nil {
		t.Fatal(err)
	}
}

func TestRevokedTokenCostsNoRequest(t *testing.T) {
	c := open(t)
	var wg sync.WaitGroup
	for range 3 {
		old := c.Token()
		revoke(t, old)
		for range 8 {
			wg.Go(func() {
				if _, err := c.Sink().Last(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if c.Token() == old {
			t.Error("the token was not replaced")
		}
	}
}

func TestTokensThatExpireCostNoRequest(t *testing.T) {
	role := "auth/approle/role/orgkeys"
	if _, err := root(t).Logical().WriteWithContext(t.Context(), role, map[string]any{"token_ttl": "2s", "token_max_ttl": "3s"}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if _, err := root(t).Logical().WriteWithContext(context.WithoutCancel(t.Context()), role, map[string]any{"token_ttl": "15m", "token_max_ttl": "4h"}); err != nil {
			t.Error(err)
		}
	}()
	c := open(t)
	first := c.Token()
	var calls atomic.Int64
	eventually(t, func() error {
		if err := c.Healthy(t.Context()); err != nil {
			t.Fatalf("call %d: %v", calls.Load(), err)
		}
		calls.Add(1)
		if c.Token() == first {
			return errors.New("the token was not replaced before it ended")
		}
		return nil
	})
}

func TestDeniedCallIsNoReasonToLogInAgain(t *testing.T) {
	c := open(t, func(c *vault.Config) {
		c.Login = tokenFile(t, tokenWith(t, `path "auth/token/lookup-self" { capabilities = ["read"] }`, false))
	})
	before := c.Token()
	if _, err := generate(t.Context(), c); !errors.Is(err, vault.ErrDenied) {
		t.Errorf("got %v, want ErrDenied", err)
	}
	if c.Token() != before {
		t.Error("it logged in again")
	}
}

func TestTokenFileIsFollowed(t *testing.T) {
	make := func() string {
		s, err := root(t).Auth().Token().CreateWithContext(t.Context(), &api.TokenCreateRequest{Policies: []string{"orgkeys-service"}, TTL: "10m"})
		if err != nil {
			t.Fatal(err)
		}
		return s.Auth.ClientToken
	}
	file := tokenFile(t, make())
	c := open(t, func(c *vault.Config) { c.Login = file })

	t.Run("replaced while its token is good", func(t *testing.T) {
		next := make()
		write(t, file.Path, next, 0o600)
		eventually(t, func() error {
			if c.Token() != next {
				return errors.New("the new token is not used")
			}
			return nil
		})
	})
	t.Run("revoked, then replaced", func(t *testing.T) {
		revoke(t, c.Token())
		promptly(t, 3*time.Second, func() error { return c.Healthy(t.Context()) })
		write(t, file.Path, make(), 0o600)
		eventually(t, func() error { return c.Healthy(context.WithoutCancel(t.Context())) })
	})
}
