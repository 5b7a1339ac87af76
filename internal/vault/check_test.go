package vault_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/vault"
)

// Each case has Vault asked about something else in place of what setup makes,
// so that its answers are real. The token is root's, so that the policy does
// not answer first.
func TestCheckFindsWhatIsMissingOrLoose(t *testing.T) {
	for path, fields := range map[string]map[string]any{
		"orgkeys-seal/keys/loose":     {"type": "aes256-gcm96", "derived": true, "exportable": true},
		"orgkeys-seal/keys/underived": {"type": "aes256-gcm96"},
	} {
		if _, err := root(t).Logical().WriteWithContext(t.Context(), path, fields); err != nil {
			t.Fatal(err)
		}
	}
	tests := []struct {
		name, asked, answered, problem, remedy string
	}{
		{"no sealing key", "orgkeys-seal/keys/seal", "orgkeys-seal/keys/none", "there is no key orgkeys-seal/keys/seal", "restore Vault from its backup"},
		{"no sealing mount", "orgkeys-seal/keys/seal", "nowhere/keys/seal", "there is no mount for orgkeys-seal/keys/seal", "restore Vault from its backup"},
		{"a sealing key that can be exported", "orgkeys-seal/keys/seal", "orgkeys-seal/keys/loose", "Exportable:true", "find out who"},
		{"a sealing key that ignores whose the value is", "orgkeys-seal/keys/seal", "orgkeys-seal/keys/underived", "Derived:false", "find out who"},
		{"no receipt key", "orgkeys-audit/keys/receipt", "orgkeys-audit/keys/none", "there is no key orgkeys-audit/keys/receipt", "restore Vault from its backup"},
		{"no key mount", "orgkeys/keys", "nowhere/keys", "the keys in Transit cannot be listed", "vault/setup"},
		{"no state mount", "orgkeys-state/data/checkpoint", "nowhere/data/checkpoint", "the checkpoint cannot be read", "vault/setup"},
		{"events not in clear", "sys/mounts/orgkeys-audit/tune", "sys/mounts/orgkeys/tune", `does not have "event" audited in clear`, "vault/setup"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			proxy, c := through(t, func(c *vault.Config) { c.Login = tokenFile(t, server.RootToken) })
			proxy.Before(func(_ http.ResponseWriter, r *http.Request) bool {
				if r.URL.Path == "/v1/"+tt.asked {
					r.URL.Path = "/v1/" + tt.answered
				}
				return true
			})
			for _, f := range c.Check(t.Context()) {
				if strings.Contains(f.Problem, tt.problem) && strings.Contains(f.Remedy, tt.remedy) && f.Fatal {
					return
				}
			}
			t.Errorf("found:\n%s\nwant: %s", problems(c), tt.problem)
		})
	}
}
