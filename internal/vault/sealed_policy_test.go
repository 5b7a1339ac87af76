package vault_test

import (
	"context"
	"net/http"
	"testing"

	"github.com/google/uuid"
	"github.com/hashicorp/vault/api"
)

// The service's own token, asking for a sealed key what sealing never needs, in
// every other way that Transit has. TestThePolicyKeepsSealedKeysIn has the ways out.
func TestThePolicyLetsNothingElseBeDoneWithASealedKey(t *testing.T) {
	c := open(t)
	createSealed(t, c)
	name := sealedInVault(t)[0].(string)
	defer func() {
		if err := c.Keystore().DestroySealed(context.WithoutCancel(t.Context()), name); err != nil {
			t.Error(err)
		}
	}()
	service, all := c.API().Logical(), root(t).Logical()
	key, config := "orgkeys-sealed/keys/"+name, "orgkeys-sealed/keys/"+name+"/config"
	for _, tt := range []struct{ name, method, path, body string }{
		{"encrypting", "PUT", "orgkeys-sealed/encrypt/" + name, `{"plaintext":"AAAA"}`},
		{"encrypting anew", "PUT", "orgkeys-sealed/rewrap/" + name, `{"ciphertext":"vault:v1:AAAA"}`},
		{"making a data key", "PUT", "orgkeys-sealed/datakey/plaintext/" + name, `{}`},
		{"signing by a hash", "PUT", "orgkeys-sealed/sign/" + name + "/sha2-256", `{"input":"AAAA"}`},
		{"verifying", "PUT", "orgkeys-sealed/verify/" + name, `{"input":"AAAA","signature":"vault:v1:AAAA"}`},
		{"a MAC", "PUT", "orgkeys-sealed/hmac/" + name, `{"input":"AAAA"}`},
		{"a certificate request", "PUT", key + "/csr", `{}`},
		{"dropping versions", "PUT", key + "/trim", `{"min_available_version":1}`},
		{"putting a backup back", "PUT", "orgkeys-sealed/restore/" + uuid.NewString(), `{"backup":"AAAA"}`},
		{"the key for importing private keys", "GET", "orgkeys-sealed/wrapping_key", ""},
		{"exporting the public half", "GET", "orgkeys-sealed/export/public-key/" + name + "/1", ""},
		{"exporting the MAC key", "GET", "orgkeys-sealed/export/hmac-key/" + name + "/1", ""},
		{"the mount's keys' settings", "PUT", "orgkeys-sealed/config/keys", `{"disable_upsert":true}`},
		{"a newer version alone", "PUT", config, `{"deletion_allowed":true,"min_decryption_version":1}`},
		{"rotating by itself", "PUT", config, `{"deletion_allowed":true,"auto_rotate_period":"1h"}`},
		{"exportable, said again", "PUT", config, `{"deletion_allowed":true,"exportable":true}`},
		{"a larger key", "PUT", "orgkeys-sealed/keys/" + uuid.NewString(), `{"type":"rsa-4096","exportable":true}`},
		{"a key that cannot leave", "PUT", "orgkeys-sealed/keys/" + uuid.NewString(), `{"type":"rsa-2048","exportable":false}`},
		{"a context", "PUT", "orgkeys-sealed/keys/" + uuid.NewString(), `{"type":"rsa-2048","exportable":true,"context":"AAAA"}`},
		{"importing for rotation", "PUT", "orgkeys-sealed/keys/" + uuid.NewString() + "/import", `{"type":"rsa-3072","public_key":"x","allow_rotation":true}`},
		{"importing by another hash", "PUT", "orgkeys-sealed/keys/" + uuid.NewString() + "/import", `{"type":"rsa-3072","public_key":"x","hash_function":"SHA1"}`},
		{"the mount's settings", "PUT", "sys/mounts/orgkeys-sealed/tune", `{"description":"x"}`},
		{"moving the mount", "PUT", "sys/remount", `{"from":"none-such","to":"orgkeys"}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			try := func(l *api.Logical) error {
				if tt.method == "GET" {
					return second(l.ReadRawWithContext(t.Context(), tt.path))
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
	for _, made := range sealedInVault(t) { // by root
		if made != name {
			if err := c.Keystore().DestroySealed(t.Context(), made.(string)); err != nil {
				t.Error(err)
			}
		}
	}
}
