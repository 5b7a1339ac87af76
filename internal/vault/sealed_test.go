package vault_test

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/vault/api"

	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/orgkey/backendtest"
	"github.com/orgkeys/orgkeys/internal/vault"
	"github.com/orgkeys/orgkeys/internal/vault/vaulttest"
)

// recipients are made once: making them takes most of the tests' time.
var recipients = sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, 3072) })

func recipient(t *testing.T) *rsa.PrivateKey {
	t.Helper()
	made, err := recipients()
	if err != nil {
		t.Fatal(err)
	}
	return made
}

func TestSealedKeystoreContract(t *testing.T) {
	backendtest.Sealed(t, open(t).Keystore(), func(t *testing.T, name string) {
		t.Helper()
		if !isGone(t, "orgkeys-sealed", name) {
			t.Errorf("key %s is there", name)
		}
	})
	nothingSealedIsLeft(t)
}

func createSealed(t *testing.T, c *vault.Client) orgkey.SealableKey {
	t.Helper()
	k, err := c.Keystore().CreateSealed(t.Context(), uuid.NewString())
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// sealedInVault is keysInVault of the mount of sealed keys.
func sealedInVault(t *testing.T) []any { t.Helper(); return keysIn(t, "orgkeys-sealed") }

func nothingSealedIsLeft(t *testing.T) {
	t.Helper()
	eventually(t, func() error {
		if left := sealedInVault(t); len(left) > 0 {
			return fmt.Errorf("Transit still holds %v", left)
		}
		return nil
	})
}

// The recipient is in Transit while it is sealed to, and not for long afterwards.
func TestSealingLeavesNoRecipient(t *testing.T) {
	c := open(t)
	k := createSealed(t, c)
	for range 2 { // as when the first answer was lost
		sealed, err := k.Seal(t.Context(), &recipient(t).PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		if private, err := backendtest.OpenSealed(sealed, recipient(t)); err != nil || orgkey.NewPublic(&private.PublicKey).Fingerprint() != k.Public().Fingerprint() {
			t.Errorf("it is another key: %v", err)
		}
		eventually(t, func() error {
			if left := sealedInVault(t); len(left) != 1 {
				return fmt.Errorf("a recipient was left: %v", left)
			}
			return nil
		})
	}
	for range 2 {
		if err := k.Destroy(t.Context()); err != nil {
			t.Error(err)
		}
	}
	nothingSealedIsLeft(t)
}

func TestRecipientsThatTransitDoesNotTakeAreRefusedBeforeItIsAsked(t *testing.T) {
	c := open(t)
	k := createSealed(t, c)
	defer func() {
		if err := k.Destroy(t.Context()); err != nil {
			t.Error(err)
		}
	}()
	for name, to := range map[string]*rsa.PublicKey{
		"none": nil, "1024 bits": {N: new(big.Int).Rsh(recipient(t).N, 2048), E: 65537}, "exponent 3": {N: recipient(t).N, E: 3},
	} {
		entries := audited(t, func() {
			if _, err := k.Seal(t.Context(), to); err == nil || errors.Is(err, orgkey.ErrUnavailable) {
				t.Errorf("%s: got %v", name, err)
			}
		})
		if len(entries) > 0 {
			t.Errorf("%s: Vault was asked %d times", name, len(entries))
		}
	}
	for _, name := range []string{"", "../x", "A1B2C3D4-0000-4000-8000-000000000000"} {
		if _, err := c.Keystore().CreateSealed(t.Context(), name); err == nil {
			t.Errorf("a key was made under the name %q", name)
		}
		if err := c.Keystore().DestroySealed(t.Context(), name); err == nil {
			t.Errorf("%q was destroyed", name)
		}
	}
}

// Whatever step fails, before Vault does it or after, and however: what was made
// goes, and nothing that makes or imports is sent twice under one name.
func TestAFailureOfEachStepOfSealingLeavesNothing(t *testing.T) {
	fails := []struct {
		name   string
		before bool
		fail   func(http.ResponseWriter)
	}{
		{"500", true, func(w http.ResponseWriter) { w.WriteHeader(http.StatusInternalServerError) }},
		{"another success", true, func(w http.ResponseWriter) { fmt.Fprint(w, `{"data":{}}`) }},
		{"the connection breaks", false, func(http.ResponseWriter) { panic(http.ErrAbortHandler) }},
	}
	steps := []string{"create", "allow", "import", "allow recipient", "export", "delete recipient"}
	for _, step := range steps {
		for _, f := range fails {
			t.Run(step+", "+f.name, func(t *testing.T) { sealFails(t, step, f.before, f.fail) })
		}
	}
}

func sealFails(t *testing.T, step string, before bool, fail func(http.ResponseWriter)) {
	proxy, c := through(t, func(c *vault.Config) { c.CallTimeout = 3 * time.Second })
	name := uuid.NewString()
	var mu sync.Mutex
	made := map[string]int{}
	matches := func(r *http.Request) bool {
		of, path := r.URL.Path, ""
		if rest, ok := strings.CutPrefix(of, "/v1/orgkeys-sealed/"); ok {
			path = rest
		}
		mine := strings.HasPrefix(path, "keys/"+name)
		switch {
		case r.Method == "PUT" && (path == "keys/"+name || strings.HasSuffix(path, "/import")):
			mu.Lock()
			made[path]++
			mu.Unlock()
			return step == "create" && mine || step == "import" && !mine
		case r.Method == "PUT" && strings.HasSuffix(path, "/config"):
			return step == "allow" && mine || step == "allow recipient" && !mine
		case strings.HasPrefix(path, "byok-export/"):
			return step == "export"
		case path == "" || mine:
			return false
		}
		return r.Method == "DELETE" && step == "delete recipient"
	}
	failed := false
	first := func(r *http.Request) bool {
		match := matches(r)
		mu.Lock()
		defer mu.Unlock()
		now := match && !failed
		failed = failed || now
		return now
	}
	proxy.Before(func(w http.ResponseWriter, r *http.Request) bool {
		if !first(r) {
			return true
		}
		if !before { // Vault does it, and its answer is lost
			again := r.Clone(r.Context())
			proxy.Forward(again)
		}
		fail(w)
		return false
	})
	k, err := c.Keystore().CreateSealed(t.Context(), name)
	if err == nil {
		_, _ = k.Seal(t.Context(), &recipient(t).PublicKey) // whether it fails is the step's matter; what is left is the test's
		if destroyErr := k.Destroy(t.Context()); destroyErr != nil {
			t.Errorf("destroying: %v", destroyErr)
		}
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) { // the recipient is removed in the background
		mu.Lock()
		if failed || time.Now().After(deadline) {
			break
		}
		mu.Unlock()
	}
	if !failed {
		t.Error("the step was never reached: the case shows nothing")
	}
	for path, n := range made {
		if n > 1 {
			t.Errorf("%s was sent %d times", path, n)
		}
	}
	mu.Unlock()
	proxy.Before(nil)
	if err := c.Keystore().DestroySealed(t.Context(), name); err != nil {
		t.Errorf("destroying what was left: %v", err)
	}
	nothingSealedIsLeft(t)
}

// The service's token can do nothing with a sealed key but what sealing needs.
func TestThePolicyKeepsSealedKeysIn(t *testing.T) {
	c := open(t)
	createSealed(t, c)
	name, to := sealedInVault(t)[0].(string), uuid.NewString()
	defer func() { // root forbids its deletion below
		if err := c.Keystore().DestroySealed(context.WithoutCancel(t.Context()), name); err != nil {
			t.Error(err)
		}
	}()
	der, err := x509.MarshalPKIXPublicKey(&recipient(t).PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	public := strings.ReplaceAll(string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})), "\n", `\n`)
	service, all := c.API().Logical(), root(t).Logical()
	if _, err := service.WriteRawWithContext(t.Context(), "orgkeys-sealed/keys/"+to+"/import", []byte(`{"type":"rsa-3072","public_key":"`+public+`"}`)); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.Keystore().DestroySealed(t.Context(), to); err != nil {
			t.Error(err)
		}
	}()
	export := "orgkeys-sealed/byok-export/" + to + "/" + name
	get := func(query string) map[string][]string {
		if query == "" {
			return nil
		}
		field, value, _ := strings.Cut(query, "=")
		return map[string][]string{field: {value}}
	}
	for _, tt := range []struct{ name, method, path, body string }{
		{"export in clear", "GET", "orgkeys-sealed/export/encryption-key/" + name, ""},
		{"export of a version in clear", "GET", "orgkeys-sealed/export/encryption-key/" + name + "/1", ""},
		{"export to sign", "GET", "orgkeys-sealed/export/signing-key/" + name + "/1", ""},
		{"backup", "GET", "orgkeys-sealed/backup/" + name, ""},
		{"signing", "PUT", "orgkeys-sealed/sign/" + name, `{"input":"AAAA"}`},
		{"decrypting", "PUT", "orgkeys-sealed/decrypt/" + name, `{"ciphertext":"vault:v1:AAAA"}`},
		{"rotating", "PUT", "orgkeys-sealed/keys/" + name + "/rotate", `{}`},
		{"every version", "GET", export, ""},
		{"another hash", "GET", export + "/1", "hash=SHA1"},
		{"the default hash by name", "GET", export + "/1", "hash=SHA256"},
		{"a key open to backup", "PUT", "orgkeys-sealed/keys/" + uuid.NewString(), `{"type":"rsa-2048","exportable":true,"allow_plaintext_backup":true}`},
		{"a key that rotates", "PUT", "orgkeys-sealed/keys/" + uuid.NewString(), `{"type":"rsa-2048","exportable":true,"auto_rotate_period":"1h"}`},
		{"a key of another type", "PUT", "orgkeys-sealed/keys/" + uuid.NewString(), `{"type":"aes256-gcm96","exportable":true}`},
		{"a derived key", "PUT", "orgkeys-sealed/keys/" + uuid.NewString(), `{"type":"rsa-2048","exportable":true,"derived":true}`},
		{"opening to backup", "PUT", "orgkeys-sealed/keys/" + name + "/config", `{"deletion_allowed":true,"allow_plaintext_backup":true}`},
		{"forbidding deletion", "PUT", "orgkeys-sealed/keys/" + name + "/config", `{"deletion_allowed":false}`},
		{"importing a private key", "PUT", "orgkeys-sealed/keys/" + uuid.NewString() + "/import", `{"type":"rsa-3072","ciphertext":"AAAA"}`},
		{"importing what can be exported", "PUT", "orgkeys-sealed/keys/" + uuid.NewString() + "/import", `{"type":"rsa-3072","public_key":"` + public + `","exportable":true}`},
		{"importing another type", "PUT", "orgkeys-sealed/keys/" + uuid.NewString() + "/import", `{"type":"aes256-gcm96","public_key":"x"}`},
		{"a version more", "PUT", "orgkeys-sealed/keys/" + to + "/import_version", `{"public_key":"` + public + `"}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			try := func(l *api.Logical) error {
				if tt.method == "GET" {
					return second(l.ReadRawWithDataWithContext(t.Context(), tt.path, get(tt.body)))
				}
				return second(l.WriteRawWithContext(t.Context(), tt.path, []byte(tt.body)))
			}
			if err := try(service); status(err) != http.StatusForbidden {
				t.Errorf("got %v, want 403", err)
			}
			if err := try(all); status(err) == http.StatusForbidden {
				t.Error("root is refused as well: the request shows nothing of the policy")
			}
		})
	}
	for _, key := range sealedInVault(t) { // what root made above
		if key != name && key != to {
			if err := c.Keystore().DestroySealed(t.Context(), key.(string)); err != nil {
				t.Error(err)
			}
		}
	}
	if err := second(service.ReadRawWithContext(t.Context(), export+"/1")); err != nil {
		t.Errorf("what sealing needs was refused: %v", err)
	}
}

func TestTheReaperClearsWhatSealedDeliveriesLeft(t *testing.T) {
	young := open(t)
	left := createSealed(t, young)
	if n, err := young.Reap(t.Context(), nobodyLives); err != nil || n != 0 {
		t.Errorf("it reaped %d young keys, %v", n, err)
	}
	old := open(t, func(c *vault.Config) { c.ReapGrace = 1 }) // a nanosecond
	eventually(t, func() error {
		if n, err := old.Reap(t.Context(), nobodyLives); err != nil || n != 1 {
			return fmt.Errorf("it reaped %d, %v", n, err)
		}
		return nil
	})
	nothingSealedIsLeft(t)
	if err := left.Destroy(t.Context()); err != nil {
		t.Errorf("destroying what the reaper took: %v", err)
	}
}

func TestAServerWithoutItsCacheIsRefused(t *testing.T) {
	v, err := vaulttest.Start(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := v.Stop(); err != nil {
			t.Error(err)
		}
	}()
	login, err := v.AppRole(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := v.Stop(); err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(v.Dir, "server.hcl")
	text, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(config, append(text, "disable_cache = true\n"...), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := v.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if output, err := v.Setup(t.Context()); err == nil || !strings.Contains(output, "disable_cache=true") {
		t.Errorf("the set-up said %q, %v", output, err)
	}
	t.Setenv("VAULT_CACERT", v.CACert)
	c := open(t, func(c *vault.Config) { c.Address, c.Login = v.Address, login })
	if p := problems(c); !strings.Contains(p, "disable_cache=true") || !strings.Contains(p, "restart it") {
		t.Errorf("the check at start finds: %q", p)
	}
	if _, err := createSealed(t, c).Seal(t.Context(), &recipient(t).PublicKey); !errors.Is(err, orgkey.ErrSealedUnavailable) {
		t.Errorf("sealing: got %v", err)
	}
}
