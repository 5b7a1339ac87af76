package vault_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/vault"
)

func TestPrivateKeyIsTheOneOfThePublicKey(t *testing.T) {
	c := open(t)
	k, err := c.Keystore().Create(t.Context(), uuid.NewString())
	if err != nil {
		t.Fatal(err)
	}
	defer k.Destroy(context.WithoutCancel(t.Context()))
	if _, err := k.Export(t.Context()); err != nil {
		t.Errorf("the export is not the public key's other half: %v", err)
	}
}

func TestDestroyedKeyCannotBeHadByAnybody(t *testing.T) {
	c := open(t)
	name := uuid.NewString()
	k, err := c.Keystore().Create(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := root(t).Logical().ReadWithContext(t.Context(), "orgkeys/export/encryption-key/"+name+"/1"); err != nil {
		t.Fatalf("before Destroy root could not export it, so this test shows nothing: %v", err)
	}
	if err := k.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := k.Destroy(t.Context()); err != nil {
		t.Errorf("destroying it again: %v", err)
	}
	if _, err := k.Export(t.Context()); err == nil {
		t.Error("the service can still export it")
	}
	if s, err := root(t).Logical().ReadWithContext(t.Context(), "orgkeys/export/encryption-key/"+name+"/1"); s != nil || err != nil {
		t.Errorf("root reads %v, %v", s, err)
	}
	if left := keysInVault(t); len(left) > 0 {
		t.Errorf("Transit still holds %v", left)
	}
}

func TestDestroyIsDoneWhenSomebodyElseDeletedTheKey(t *testing.T) {
	c := open(t)
	name := uuid.NewString()
	k, err := c.Keystore().Create(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := root(t).Logical().DeleteWithContext(t.Context(), "orgkeys/keys/"+name); err != nil {
		t.Fatal(err)
	}
	if err := k.Destroy(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestDestroyFailsWhileTheKeyIsThere(t *testing.T) {
	c := open(t)
	name := uuid.NewString()
	k, err := c.Keystore().Create(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	allow := func(deletion bool) {
		if _, err := root(t).Logical().WriteWithContext(t.Context(), "orgkeys/keys/"+name+"/config", map[string]any{"deletion_allowed": deletion}); err != nil {
			t.Fatal(err)
		}
	}
	allow(false)
	if err := k.Destroy(t.Context()); err == nil {
		t.Error("Destroy reported success with the key still there")
	}
	allow(true)
	if err := k.Destroy(t.Context()); err != nil {
		t.Errorf("Destroy cannot be repeated: %v", err)
	}
}

func TestTwoCreationsNeverShareAKey(t *testing.T) {
	c := open(t)
	name := uuid.NewString()
	k, err := c.Keystore().Create(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Destroy(context.WithoutCancel(t.Context()))
	if _, err := c.Keystore().Create(t.Context(), name); !errors.Is(err, vault.ErrNotFresh) {
		t.Errorf("a second creation under the name: got %v, want ErrNotFresh", err)
	}
}

func TestKeyThatSomebodyPlantedIsNotTaken(t *testing.T) {
	c := open(t)
	for _, kind := range []string{"rsa-4096", "ecdsa-p256", "aes256-gcm96"} {
		name := uuid.NewString()
		if _, err := root(t).Logical().WriteWithContext(t.Context(), "orgkeys/keys/"+name, map[string]any{"type": kind, "exportable": true}); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Keystore().Create(t.Context(), name); !errors.Is(err, vault.ErrNotFresh) {
			t.Errorf("%s: got %v, want ErrNotFresh", kind, err)
		}
		forget(t, name)
	}
}

// forget deletes a key as root.
func forget(t *testing.T, name string) {
	t.Helper()
	r := root(t).Logical()
	if _, err := r.WriteWithContext(t.Context(), "orgkeys/keys/"+name+"/config", map[string]any{"deletion_allowed": true}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.DeleteWithContext(t.Context(), "orgkeys/keys/"+name); err != nil {
		t.Fatal(err)
	}
}

func TestFreshness(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	public := publicPEM(t)
	answer := func(change ...string) []byte {
		text := fmt.Sprintf(`{"data":{"type":"rsa-2048","latest_version":1,"exportable":true,"deletion_allowed":false,"allow_plaintext_backup":false,
			"imported_key":false,"keys":{"1":{"public_key":%q,"creation_time":"2026-01-02T03:04:05.5Z"}}}}`, public)
		return []byte(strings.NewReplacer(change...).Replace(text))
	}
	tests := []struct {
		name  string
		body  []byte
		fresh bool
	}{
		{"made by this call", answer(), true},
		{"made before, by the lost answer of the same call", answer("03:04:05.5Z", "03:04:02Z"), true},
		{"made long before", answer("03:04:05.5Z", "03:03:05Z"), false},
		{"without a creation time", answer(`"creation_time"`, `"other"`), false},
		{"of another type", answer("rsa-2048", "rsa-4096"), false},
		{"rotated", answer(`"latest_version":1`, `"latest_version":2`), false},
		{"not exportable", answer(`"exportable":true`, `"exportable":false`), false},
		{"imported, so known to somebody", answer(`"imported_key":false`, `"imported_key":true`), false},
		{"open to backup in clear", answer(`"allow_plaintext_backup":false`, `"allow_plaintext_backup":true`), false},
		{"configured by somebody", answer(`"deletion_allowed":false`, `"deletion_allowed":true`), false},
		{"an empty answer", []byte(`{}`), false},
		{"not JSON", []byte(`<html>`), false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := vault.FreshKey(tt.body, now, 5*time.Second); (err == nil) != tt.fresh {
				t.Errorf("got %v, want fresh %t", err, tt.fresh)
			}
		})
	}
}

func publicPEM(t *testing.T) string {
	t.Helper()
	name := uuid.NewString()
	s, err := root(t).Logical().WriteWithContext(t.Context(), "orgkeys/keys/"+name, map[string]any{"type": "rsa-2048"})
	if err != nil {
		t.Fatal(err)
	}
	forget(t, name)
	return s.Data["keys"].(map[string]any)["1"].(map[string]any)["public_key"].(string)
}

func TestKeyNameIsNoPath(t *testing.T) {
	c := open(t)
	for _, name := range []string{"", "x", "../seal", strings.ToUpper(uuid.NewString()), uuid.NewString() + "/config", uuid.NewString() + "?x"} {
		if _, err := c.Keystore().Create(t.Context(), name); err == nil {
			t.Errorf("a key was created under the name %q", name)
		}
	}
}

func TestExportThatIsNotTheKeyIsRefused(t *testing.T) {
	proxy, c := through(t)
	other := uuid.NewString()
	if _, err := root(t).Logical().WriteWithContext(t.Context(), "orgkeys/keys/"+other, map[string]any{"type": "rsa-2048", "exportable": true}); err != nil {
		t.Fatal(err)
	}
	defer forget(t, other)
	k, err := c.Keystore().Create(t.Context(), uuid.NewString())
	if err != nil {
		t.Fatal(err)
	}
	defer k.Destroy(context.WithoutCancel(t.Context()))
	proxy.Before(func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/export/") {
			r.URL.Path = "/v1/orgkeys/export/encryption-key/" + other + "/1"
		}
		return true
	})
	if _, err := k.Export(t.Context()); err == nil {
		t.Error("another key's private half was taken for this one's")
	}
}

func TestExportErrorsQuoteNothing(t *testing.T) {
	for _, body := range []string{
		`{"data":{"keys":{"1":"SECRET`, `{"data":{"keys":{"1":"SECRET"}}}`, `{"data":{"keys":{"1":["SECRET"]}}}`,
		`{"data":{"keys":{"1":"-----BEGIN PRIVATE KEY-----\nU0VDUkVU\n-----END PRIVATE KEY-----\n"}}}`, `{}`, ``,
	} {
		_, err := vault.PrivateKey([]byte(body))
		if err == nil || strings.Contains(err.Error(), "SECRET") || strings.Contains(err.Error(), "U0VD") {
			t.Errorf("%s: got %v", body, err)
		}
	}
}

func TestManyAtOnce(t *testing.T) {
	c := open(t)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := generate(t.Context(), c); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if left := keysInVault(t); len(left) > 0 {
		t.Errorf("Transit still holds %v", left)
	}
}

// A key is gone when Vault says so, not when something in between knows no such page.
func TestAProxysNotFoundIsNoAbsence(t *testing.T) {
	proxy, c := through(t)
	var confirming atomic.Bool
	proxy.Before(func(w http.ResponseWriter, r *http.Request) bool {
		if !confirming.Load() || r.Method != http.MethodGet || !strings.HasPrefix(r.URL.Path, "/v1/orgkeys/keys/") {
			return true
		}
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, "<html>no such page</html>")
		return false
	})
	k, err := c.Keystore().Create(t.Context(), uuid.NewString())
	if err != nil {
		t.Fatal(err)
	}
	confirming.Store(true)
	if err := k.Destroy(t.Context()); !errors.Is(err, orgkey.ErrUnavailable) {
		t.Errorf("got %v, want ErrUnavailable", err)
	}
	confirming.Store(false)
	if err := k.Destroy(t.Context()); err != nil {
		t.Error(err)
	}
}
