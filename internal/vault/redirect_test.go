package vault_test

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/vault"
	"github.com/orgkeys/orgkeys/internal/vault/vaulttest"
)

// elsewhere answers each request that match takes with a redirect to the same
// place, so that the one redirect that the Vault client follows leads to another.
func elsewhere(proxy *vaulttest.Proxy, status int, match func(*http.Request) bool) (seen *atomic.Int64) {
	seen = new(atomic.Int64)
	proxy.Before(func(w http.ResponseWriter, r *http.Request) bool {
		if !match(r) {
			return true
		}
		seen.Add(1)
		w.Header().Set("Location", proxy.Address+r.URL.RequestURI())
		w.WriteHeader(status)
		return false
	})
	return seen
}

var redirects = []int{300, 301, 302, 303, 304, 307, 308}

// A redirect that the client does not follow is no success of any call.
func TestARedirectThatIsNotFollowedIsNoSuccess(t *testing.T) {
	for _, status := range redirects {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			proxy, c := through(t)
			everywhere := func(*http.Request) bool { return true }
			elsewhere(proxy, status, everywhere)
			for name, do := range everything(t.Context(), c) {
				err := do()
				if !errors.Is(err, orgkey.ErrUnavailable) || !strings.Contains(err.Error(), "a redirect to "+proxy.Address) {
					t.Errorf("%s: got %v", name, err)
				}
			}
			if p := problems(c); !strings.Contains(p, "a redirect to "+proxy.Address) {
				t.Errorf("the check at start finds: %s", p)
			}
		})
	}
}

// Each call of a key's life by itself: what the others did before stands.
func TestARedirectAtOneCallIsNoSuccessOfIt(t *testing.T) {
	at := func(method, part string) func(*http.Request) bool {
		return func(r *http.Request) bool { return r.Method == method && strings.Contains(r.URL.Path, part) }
	}
	for _, call := range []struct {
		name  string
		match func(*http.Request) bool
	}{
		{"creating", func(r *http.Request) bool {
			return r.Method == "PUT" && strings.Contains(r.URL.Path, "/orgkeys/keys/") && !strings.HasSuffix(r.URL.Path, "/config")
		}},
		{"allowing deletion", at("PUT", "/config")},
		{"exporting", at("GET", "/orgkeys/export/")},
		{"deleting", at("DELETE", "/orgkeys/keys/")},
		{"confirming", at("GET", "/orgkeys/keys/")},
	} {
		t.Run(call.name, func(t *testing.T) {
			proxy, c := through(t)
			seen := elsewhere(proxy, http.StatusTemporaryRedirect, call.match)
			der, err := generate(t.Context(), c)
			if !errors.Is(err, orgkey.ErrUnavailable) || seen.Load() < 2 {
				t.Errorf("got %d bytes and %v after %d redirects", len(der), err, seen.Load())
			}
			proxy.Before(nil)
			c.Close() // ends what is under way in the background
			for _, name := range keysInVault(t) {
				if err := second(root(t).Logical().WriteWithContext(t.Context(), "orgkeys/keys/"+name.(string)+"/config", map[string]any{"deletion_allowed": true})); err != nil {
					t.Error(err)
				}
				if err := second(root(t).Logical().DeleteWithContext(t.Context(), "orgkeys/keys/"+name.(string))); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for name, path := range map[string]string{"signing": "/orgkeys-audit/sign/", "writing the checkpoint": "/orgkeys-state/data/"} {
		t.Run(name, func(t *testing.T) {
			proxy, c := through(t)
			elsewhere(proxy, http.StatusTemporaryRedirect, at("PUT", path))
			if err := appendAll(t, c.Sink(), entries(t, 0, 2), checkpointAt(freshLog(t), 2)); !errors.Is(err, orgkey.ErrUnavailable) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// A login that is led elsewhere is a Vault that cannot be asked; the credentials
// are good, and the process goes on.
func TestARedirectedLoginIsNoRefusal(t *testing.T) {
	for _, status := range redirects {
		proxy, err := vaulttest.NewProxy(server)
		if err != nil {
			t.Fatal(err)
		}
		defer proxy.Close()
		elsewhere(proxy, status, func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, "/login") })
		c := open(t, func(c *vault.Config) { c.Address = proxy.Address })
		err = c.Healthy(t.Context())
		if !errors.Is(err, orgkey.ErrUnavailable) || errors.Is(err, vault.ErrLogin) || !strings.Contains(err.Error(), proxy.Address) {
			t.Errorf("%d: got %v", status, err)
		}
		proxy.Before(nil)
		eventually(t, func() error { return c.Healthy(t.Context()) })
	}
}

// What answers 200 and is not Vault is as good as no answer, too.
func TestASuccessThatIsNotVaultsIsNone(t *testing.T) {
	for name, body := range map[string]string{"a page": "<html>welcome</html>", "nothing": "", "somebody else's JSON": `{"status":"ok"}`, "null": "null"} {
		t.Run(name, func(t *testing.T) {
			proxy, err := vaulttest.NewProxy(server)
			if err != nil {
				t.Fatal(err)
			}
			defer proxy.Close()
			proxy.Before(func(w http.ResponseWriter, _ *http.Request) bool { fmt.Fprint(w, body); return false })
			c := open(t, func(c *vault.Config) { c.Address, c.Log = proxy.Address, slog.New(slog.DiscardHandler) })
			if err := c.Healthy(t.Context()); !errors.Is(err, orgkey.ErrUnavailable) || errors.Is(err, vault.ErrLogin) {
				t.Errorf("got %v", err)
			}
			proxy.Before(nil)
			eventually(t, func() error { return c.Healthy(t.Context()) })
			proxy.Before(func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.URL.Path, "/export/") {
					return true
				}
				fmt.Fprint(w, body)
				return false
			})
			k, err := c.Keystore().Create(t.Context(), uuid.NewString())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := k.Export(t.Context()); !errors.Is(err, orgkey.ErrUnavailable) {
				t.Errorf("exporting: got %v", err)
			}
			if err := k.Destroy(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}
