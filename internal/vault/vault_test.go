package vault_test

import (
	"context"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/vault/api"

	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/vault"
	"github.com/orgkeys/orgkeys/internal/vault/vaulttest"
)

// server is the Vault of all tests, set up by vault/setup.
var server *vaulttest.Server

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	dir, err := os.MkdirTemp("", "orgkeys-vault")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	ctx := context.Background()
	if server, err = vaulttest.Start(ctx, dir); err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, server.Stop()) }()
	if _, err := server.AppRole(ctx); err != nil {
		return 1, err
	}
	if err := os.Setenv("VAULT_CACERT", server.CACert); err != nil {
		return 1, err
	}
	return m.Run(), nil
}

// open returns a client of the shared Vault, logged in by AppRole.
func open(t testing.TB, change ...func(*vault.Config)) *vault.Client {
	t.Helper()
	login, err := server.AppRole(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	config := vault.Config{Address: server.Address, Login: login, Log: slog.New(slog.DiscardHandler)}
	for _, f := range change {
		f(&config)
	}
	c, err := vault.Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// through returns a proxy in front of the shared Vault and a client behind it.
func through(t *testing.T, change ...func(*vault.Config)) (*vaulttest.Proxy, *vault.Client) {
	t.Helper()
	proxy, err := vaulttest.NewProxy(server)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(proxy.Close)
	return proxy, open(t, append(change, func(c *vault.Config) { c.Address = proxy.Address })...)
}

func root(t testing.TB) *api.Client {
	t.Helper()
	client, err := server.Client(server.RootToken)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// generate does what the use case does with a keystore, and returns the private key.
func generate(ctx context.Context, c *vault.Client) ([]byte, error) {
	k, err := c.Keystore().Create(ctx, uuid.NewString())
	if err != nil {
		return nil, err
	}
	der, err := k.Export(ctx)
	return der, errors.Join(err, k.Destroy(ctx))
}

func mustGenerate(t testing.TB, c *vault.Client) *rsa.PrivateKey {
	t.Helper()
	der, err := generate(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.ParsePKCS1PrivateKey(der)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// keysInVault lists what root sees in the key mount, but blanks.
func keysInVault(t testing.TB) []any { t.Helper(); return keysIn(t, "orgkeys") }

func keysIn(t testing.TB, mount string) []any {
	t.Helper()
	return slices.DeleteFunc(namesIn(t, mount), func(name any) bool {
		return isGone(t, mount, name.(string))
	})
}

// isGone reports whether there is no key, or a blank in its place.
func isGone(t testing.TB, mount, name string) bool {
	t.Helper()
	k, err := root(t).Logical().ReadWithContext(context.WithoutCancel(t.Context()), mount+"/keys/"+name)
	if err != nil {
		t.Fatal(err)
	}
	return k == nil || k.Data["type"] == "aes256-gcm96" && k.Data["exportable"] == false
}

// namesIn lists what root sees in a mount of Transit.
func namesIn(t testing.TB, mount string) []any {
	t.Helper()
	list, err := root(t).Logical().ListWithContext(context.WithoutCancel(t.Context()), mount+"/keys")
	if err != nil {
		t.Fatal(err)
	}
	if list == nil {
		return nil
	}
	return list.Data["keys"].([]any)
}

// eventually repeats check until it reports nil, and fails the test with its
// last error after ten seconds.
func eventually(t testing.TB, check func() error) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// promptly fails the test unless do reports unavailability within limit.
func promptly(t *testing.T, limit time.Duration, do func() error) {
	t.Helper()
	start := time.Now()
	err := do()
	if !errors.Is(err, orgkey.ErrUnavailable) {
		t.Errorf("got %v, want an error that wraps ErrUnavailable", err)
	}
	if took := time.Since(start); took > limit {
		t.Errorf("the answer took %s, more than %s", took, limit)
	}
}

func status(err error) int {
	var refused *api.ResponseError
	if errors.As(err, &refused) {
		return refused.StatusCode
	}
	if err != nil {
		return -1
	}
	return http.StatusOK
}
