package vault_test

import (
	"context"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/hashicorp/vault/api"

	"github.com/orgkeys/orgkeys/internal/vault"
	setup "github.com/orgkeys/orgkeys/vault"
)

// try sends one request of each kind to path, and returns those that were not
// answered with 403.
func try(t *testing.T, client *api.Client, path string) []string {
	t.Helper()
	logical := client.Logical()
	var passed []string
	for _, kind := range []struct {
		name string
		do   func() error
	}{
		{"read", func() error { _, err := logical.ReadRawWithContext(t.Context(), path); return err }},
		{"list", func() error {
			_, err := logical.ReadRawWithDataWithContext(t.Context(), path, map[string][]string{"list": {"true"}})
			return err
		}},
		{"update", func() error { _, err := logical.WriteRawWithContext(t.Context(), path, []byte(`{}`)); return err }},
		{"delete", func() error { _, err := logical.DeleteRawWithContext(t.Context(), path); return err }},
	} {
		if status(kind.do()) != http.StatusForbidden {
			passed = append(passed, kind.name)
		}
	}
	return passed
}

func TestServiceIsRefusedEverythingItNeverNeeds(t *testing.T) {
	c := open(t)
	for _, path := range vault.Denied {
		if path == "sys/seal" {
			continue // knows no other operation than the one tried below
		}
		if passed := try(t, c.API(), path); len(passed) > 0 {
			t.Errorf("%s: %v was not refused", path, passed)
		}
	}
	// That a refusal here means the policy, not a broken request or token.
	if status(second(c.API().Logical().ReadWithContext(t.Context(), "orgkeys-seal/keys/seal"))) != http.StatusOK {
		t.Error("the service's token is refused what it may do")
	}
	if status(second(root(t).Logical().ReadWithContext(t.Context(), "orgkeys-audit/export/signing-key/receipt"))) == http.StatusForbidden {
		t.Error("root is refused as well: the request shows nothing of the policy")
	}
}

func second[T any](_ T, err error) error { return err }

func TestServiceIsRefusedWhatItsPathsCouldDoBesides(t *testing.T) {
	c := open(t)
	name := uuid.NewString()
	tests := []struct {
		name, path, body string
		operation        string
	}{
		{"a key of another type", "orgkeys/keys/" + name, `{"type":"aes256-gcm96","exportable":true}`, "update"},
		{"a key open to backup in clear", "orgkeys/keys/" + name, `{"type":"rsa-2048","exportable":true,"allow_plaintext_backup":true}`, "update"},
		{"a key that rotates", "orgkeys/keys/" + name, `{"type":"rsa-2048","exportable":true,"auto_rotate_period":"1h"}`, "update"},
		{"forbidding deletion", "orgkeys/keys/" + name + "/config", `{"deletion_allowed":false}`, "update"},
		{"opening a key to backup in clear", "orgkeys/keys/" + name + "/config", `{"deletion_allowed":true,"allow_plaintext_backup":true}`, "update"},
		{"raising a key's version", "orgkeys/keys/" + name + "/config", `{"min_decryption_version":2}`, "update"},
		{"deleting the sealing key", "orgkeys-seal/keys/seal", "", "delete"},
		{"changing the sealing key", "orgkeys-seal/keys/seal", `{"type":"aes256-gcm96"}`, "update"},
		{"listing under the sealing key", "orgkeys-seal/keys/seal", "", "list"},
		{"deleting the receipt key", "orgkeys-audit/keys/receipt", "", "delete"},
		{"changing the receipt key", "orgkeys-audit/keys/receipt", `{"type":"ed25519"}`, "update"},
		{"deleting the checkpoint", "orgkeys-state/data/checkpoint", "", "delete"},
		{"sealing Vault", "sys/seal", `{}`, "update"},
		{"enabling an audit device", "sys/audit/other", `{"type":"file","options":{"file_path":"/dev/null"}}`, "update"},
		{"taking events out of the clear", "sys/mounts/orgkeys-audit/tune", `{"audit_non_hmac_request_keys":[]}`, "update"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			logical := c.API().Logical()
			var err error
			switch tt.operation {
			case "update":
				_, err = logical.WriteRawWithContext(t.Context(), tt.path, []byte(tt.body))
			case "delete":
				_, err = logical.DeleteRawWithContext(t.Context(), tt.path)
			case "list":
				_, err = logical.ReadRawWithDataWithContext(t.Context(), tt.path, map[string][]string{"list": {"true"}})
			}
			if status(err) != http.StatusForbidden {
				t.Errorf("got %v, want 403", err)
			}
		})
	}
}

func TestGrantedIsWhatThePolicyFilesName(t *testing.T) {
	c := open(t)
	for path, want := range vault.Granted {
		have, err := c.API().Sys().CapabilitiesSelfWithContext(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		slices.Sort(have)
		if !slices.Equal(have, want) {
			t.Errorf("%s: the token has %v, not %v", path, have, want)
		}
	}
}

func TestCheckFindsAPolicyThatDoesNotFit(t *testing.T) {
	tests := []struct {
		name, policy, want string
	}{
		{"too weak", `path "sys/capabilities-self" { capabilities = ["update"] } path "auth/token/lookup-self" { capabilities = ["read"] }`,
			"too weak: the service needs update on orgkeys-seal/encrypt/seal"},
		{"it can export the sealing key", `path "orgkeys-seal/export/encryption-key/seal/1" { capabilities = ["read"] }`,
			"too strong: the service has read on orgkeys-seal/export/encryption-key/seal/1"},
		{"it can delete the checkpoint", `path "orgkeys-state/data/checkpoint" { capabilities = ["delete"] }`,
			"too strong: the service has delete on orgkeys-state/data/checkpoint"},
		{"it can do what no list names", `path "kv-production/*" { capabilities = ["read"] }`,
			"the token has the policies orgkeys-reaper, orgkeys-service, test, not"},
		{"it is root", "", "too strong: the service has root on"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			token := server.RootToken
			if tt.policy != "" {
				token = tokenWith(t, tt.policy, tt.name != "too weak")
			}
			c := open(t, func(c *vault.Config) { c.Login = tokenFile(t, token) })
			if p := problems(c); !strings.Contains(p, tt.want) {
				t.Errorf("found:\n%s\nwant: %s", p, tt.want)
			}
		})
	}
}

// A policy of the right name that allows more than any list of paths shows, or
// does not hold a path to its parameters, is found by its text.
func TestCheckFindsAPolicyOfAnotherText(t *testing.T) {
	sound, err := setup.Policies.ReadFile("service.hcl")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if _, err := server.Setup(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	}()
	parameters := regexp.MustCompile(`(?s)  allowed_parameters = \{.*?\n  \}\n`)
	for name, text := range map[string]string{
		"a path besides":             string(sound) + `path "kv/*" { capabilities = ["read"] }`,
		"any parameter":              parameters.ReplaceAllString(string(sound), ""),
		"a rule in a comment's line": string(sound) + "# why\npath \"kv/*\" { capabilities = [\"read\"] }\n",
	} {
		t.Run(name, func(t *testing.T) {
			if err := root(t).Sys().PutPolicyWithContext(t.Context(), "orgkeys-service", text); err != nil {
				t.Fatal(err)
			}
			if p := problems(open(t)); p != "the policy orgkeys-service differs from the one of this version: run vault/setup against this Vault; with several versions of orgkeys running, the newest one's" {
				t.Errorf("found: %q", p)
			}
		})
	}
	t.Run("other comments and spaces", func(t *testing.T) {
		text := "# An older version's words.\n" + strings.ReplaceAll(string(sound), "  ", "\t")
		if err := root(t).Sys().PutPolicyWithContext(t.Context(), "orgkeys-service", text); err != nil {
			t.Fatal(err)
		}
		if p := problems(open(t)); p != "" {
			t.Errorf("found: %q", p)
		}
	})
}

// tokenWith makes a token with the policy given, beside the service's own or alone.
func tokenWith(t *testing.T, policy string, beside bool) string {
	t.Helper()
	if err := root(t).Sys().PutPolicyWithContext(t.Context(), "test", policy); err != nil {
		t.Fatal(err)
	}
	policies := []string{"test"}
	if beside {
		policies = append(policies, "orgkeys-service", "orgkeys-reaper")
	}
	s, err := root(t).Auth().Token().CreateWithContext(t.Context(), &api.TokenCreateRequest{Policies: policies, NoDefaultPolicy: true, TTL: "10m"})
	if err != nil {
		t.Fatal(err)
	}
	return s.Auth.ClientToken
}

func TestSoundVaultHasNoFindings(t *testing.T) {
	if p := problems(open(t)); p != "" {
		t.Error(p)
	}
}
