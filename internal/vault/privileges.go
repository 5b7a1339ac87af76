package vault

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"

	setup "github.com/orgkeys/orgkeys/vault"
)

const sampleKey = "00000000-0000-4000-8000-000000000000"

// granted are the capabilities that the service has, on every path that its
// policies name.
var granted = map[string][]string{
	"orgkeys/keys":                                                     {"list"},
	"orgkeys/keys/" + sampleKey:                                        {"delete", "read", "update"},
	"orgkeys/keys/" + sampleKey + "/config":                            {"update"},
	"orgkeys/export/encryption-key/" + sampleKey + "/1":                {"read"},
	"orgkeys-sealed/keys":                                              {"list"},
	"orgkeys-sealed/keys/" + sampleKey:                                 {"delete", "read", "update"},
	"orgkeys-sealed/keys/" + sampleKey + "/config":                     {"update"},
	"orgkeys-sealed/keys/" + sampleKey + "/import":                     {"update"},
	"orgkeys-sealed/byok-export/" + sampleKey + "/" + sampleKey + "/1": {"read"},
	"orgkeys-seal/encrypt/seal":                                        {"update"},
	"orgkeys-seal/decrypt/seal":                                        {"update"},
	"orgkeys-seal/rewrap/seal":                                         {"update"},
	"orgkeys-seal/keys/seal":                                           {"read"},
	"orgkeys-audit/sign/receipt":                                       {"update"},
	"orgkeys-audit/keys/receipt":                                       {"read"},
	"orgkeys-state/data/checkpoint":                                    {"create", "read", "update"},
	"sys/audit":                                                        {"read", "sudo"},
	"sys/mounts/orgkeys/tune":                                          {"read"},
	"sys/mounts/orgkeys-sealed/tune":                                   {"read"},
	"sys/mounts/orgkeys-seal/tune":                                     {"read"},
	"sys/config/state/sanitized":                                       {"read"},
	"sys/mounts/orgkeys-audit/tune":                                    {"read"},
	"sys/mounts/orgkeys-state/tune":                                    {"read"},
	"sys/policies/acl/orgkeys-service":                                 {"read"},
	"sys/policies/acl/orgkeys-reaper":                                  {"read"},
	"sys/capabilities-self":                                            {"update"},
	"auth/token/lookup-self":                                           {"read"},
	"auth/token/renew-self":                                            {"update"},
	"auth/token/revoke-self":                                           {"update"},
}

// denied are paths that the service never needs, one for each way to reach what it must
// not have: the permanent keys, other keys, the evidence, and its own permissions.
var denied = []string{
	"orgkeys/export/encryption-key/" + sampleKey, "orgkeys/export/encryption-key/" + sampleKey + "/2",
	"orgkeys/export/signing-key/" + sampleKey + "/1", "orgkeys/byok-export/" + sampleKey + "/" + sampleKey,
	"orgkeys/backup/" + sampleKey, "orgkeys/restore", "orgkeys/restore/" + sampleKey,
	"orgkeys/keys/" + sampleKey + "/rotate", "orgkeys/keys/" + sampleKey + "/import", "orgkeys/keys/" + sampleKey + "/trim",
	"orgkeys/encrypt/" + sampleKey, "orgkeys/decrypt/" + sampleKey, "orgkeys/sign/" + sampleKey, "orgkeys/config/keys", "orgkeys/cache-config",
	"orgkeys-sealed/export/encryption-key/" + sampleKey, "orgkeys-sealed/export/encryption-key/" + sampleKey + "/1",
	"orgkeys-sealed/export/signing-key/" + sampleKey + "/1", "orgkeys-sealed/export/hmac-key/" + sampleKey + "/1",
	"orgkeys-sealed/byok-export/" + sampleKey + "/" + sampleKey, "orgkeys-sealed/byok-export/" + sampleKey + "/" + sampleKey + "/2",
	"orgkeys-sealed/byok-export/" + sampleKey + "/" + sampleKey + "/latest",
	"orgkeys-sealed/backup/" + sampleKey, "orgkeys-sealed/restore", "orgkeys-sealed/restore/" + sampleKey,
	"orgkeys-sealed/sign/" + sampleKey, "orgkeys-sealed/sign/" + sampleKey + "/sha2-256", "orgkeys-sealed/decrypt/" + sampleKey, "orgkeys-sealed/encrypt/" + sampleKey,
	"orgkeys-sealed/rewrap/" + sampleKey, "orgkeys-sealed/hmac/" + sampleKey, "orgkeys-sealed/datakey/plaintext/" + sampleKey,
	"orgkeys-sealed/keys/" + sampleKey + "/rotate", "orgkeys-sealed/keys/" + sampleKey + "/trim", "orgkeys-sealed/keys/" + sampleKey + "/import_version",
	"orgkeys-sealed/keys/" + sampleKey + "/soft-delete", "orgkeys-sealed/config/keys", "orgkeys-sealed/cache-config", "orgkeys-sealed/wrapping_key",
	"orgkeys-seal/keys", "orgkeys-seal/keys/other", "orgkeys-seal/keys/seal/config", "orgkeys-seal/keys/seal/rotate", "orgkeys-seal/keys/seal/trim",
	"orgkeys-seal/export/encryption-key/seal", "orgkeys-seal/export/encryption-key/seal/1", "orgkeys-seal/byok-export/seal/seal",
	"orgkeys-seal/backup/seal", "orgkeys-seal/restore/seal", "orgkeys-seal/datakey/plaintext/seal", "orgkeys-seal/encrypt/other", "orgkeys-seal/config/keys",
	"orgkeys-audit/keys", "orgkeys-audit/keys/other", "orgkeys-audit/keys/receipt/config", "orgkeys-audit/keys/receipt/rotate",
	"orgkeys-audit/export/signing-key/receipt", "orgkeys-audit/export/signing-key/receipt/1", "orgkeys-audit/backup/receipt", "orgkeys-audit/restore/receipt", "orgkeys-audit/sign/other",
	"orgkeys-state/metadata/checkpoint", "orgkeys-state/metadata", "orgkeys-state/delete/checkpoint", "orgkeys-state/undelete/checkpoint",
	"orgkeys-state/destroy/checkpoint", "orgkeys-state/config", "orgkeys-state/data/other",
	"sys/audit/file", "sys/audit-hash/file", "sys/config/auditing/request-headers/x-correlation-id", "sys/config/auditing/request-headers",
	"sys/mounts", "sys/mounts/orgkeys", "sys/mounts/orgkeys-sealed", "sys/mounts/orgkeys-seal", "sys/mounts/orgkeys-audit", "sys/remount", "sys/raw/core", "sys/seal", "sys/rotate",
	"sys/policies/acl", "sys/policies/acl/orgkeys-setup", "sys/policy/orgkeys-service", "sys/auth", "sys/auth/approle",
	"auth/approle/role/orgkeys", "auth/approle/role/orgkeys/role-id", "auth/approle/role/orgkeys/secret-id", "auth/approle/role/orgkeys/policies",
	"auth/token/create", "auth/token/create-orphan", "auth/token/accessors", "identity/entity", "cubbyhole/orgkeys", "secret/data/orgkeys", "transit/keys/orgkeys",
}

// token is what Vault says of the service's own token.
type token struct {
	Policies []string `json:"policies"`
	Identity []string `json:"identity_policies"`
	NumUses  int      `json:"num_uses"` // 0: no limit
	Bound    []string `json:"bound_cidrs"`
}

func (c *Client) token(ctx context.Context) (token, error) {
	answer, err := c.do(ctx, request{method: http.MethodGet, path: "auth/token/lookup-self"})
	if err != nil {
		return token{}, err
	}
	return data[token](answer.body)
}

// policies are the names of the policies that the service's token has, in order.
func policies() []string { return []string{"orgkeys-reaper", "orgkeys-service"} }

// checkToken finds a policy too many by its name, and a policy that is not the
// one of vault/setup by its text: no list of paths shows all that it could allow.
func (c *Client) checkToken(ctx context.Context) []Finding {
	have, err := c.token(ctx)
	if err != nil {
		return []Finding{failed(err, runSetup, "the token's policies cannot be listed")}
	}
	var found []Finding
	if have.NumUses > 0 {
		found = append(found, fatal("make tokens without a limit, as vault/setup has the role do", "the token can be used only %d more times", have.NumUses))
	}
	if len(have.Bound) > 0 {
		found = append(found, Finding{Problem: "the token may be used from " + strings.Join(have.Bound, ", ") + " only, by token_bound_cidrs of its role",
			Remedy: "make sure that every replica has such an address, as Vault sees it behind proxies: calls from other addresses are refused"})
	}
	names := slices.Compact(slices.Sorted(slices.Values(append(have.Policies, have.Identity...))))
	if !slices.Equal(names, policies()) {
		found = append(found, fatal(twoPolicies, "the token has the policies %s, not %s", strings.Join(names, ", "), strings.Join(policies(), ", ")))
	}
	return found
}

func (c *Client) checkPolicyTexts(ctx context.Context) []Finding {
	var found []Finding
	for _, name := range policies() {
		want, err := setup.Policies.ReadFile(strings.TrimPrefix(name, "orgkeys-") + ".hcl")
		if err != nil {
			return []Finding{fatal("this build is broken: use another", "%v", err)}
		}
		answer, err := c.do(ctx, request{method: http.MethodGet, path: "sys/policies/acl/" + name})
		if err != nil {
			found = append(found, failed(err, runSetup, "the policy %s cannot be read", name))
			continue
		}
		have, err := data[struct {
			Policy string `json:"policy"`
		}](answer.body)
		if err != nil {
			found = append(found, failed(err, runSetup, "the policy %s cannot be read", name))
			continue
		}
		if !slices.Equal(rules(have.Policy), rules(string(want))) {
			found = append(found, fatal(runSetup+"; with several versions of orgkeys running, the newest one's", "the policy %s differs from the one of this version", name))
		}
	}
	return found
}

// rules are a policy's words without its comments.
func rules(hcl string) []string {
	var words []string
	for line := range strings.Lines(hcl) {
		if !strings.HasPrefix(strings.TrimSpace(line), "#") {
			words = append(words, strings.Fields(line)...)
		}
	}
	return words
}

// checkCapabilities compares the token's rights with those it needs, in both directions.
func (c *Client) checkCapabilities(ctx context.Context) []Finding {
	paths := append(slices.Collect(maps.Keys(granted)), denied...)
	body, err := json.Marshal(map[string][]string{"paths": paths})
	if err != nil {
		return []Finding{fatal(runSetup, "the token's policy cannot be checked: %v", err)}
	}
	answer, err := c.do(ctx, request{method: http.MethodPut, path: "sys/capabilities-self", body: body})
	if err != nil {
		return []Finding{failed(err, runSetup, "the token's policy cannot be checked")}
	}
	have, err := data[map[string][]string](answer.body)
	if err != nil {
		return []Finding{fatal(runSetup, "the token's policy cannot be checked: %v", err)}
	}
	var found []Finding
	slices.Sort(paths)
	for _, path := range paths {
		found = append(found, compareCapabilities(path, granted[path], have[path])...)
	}
	return found
}

func compareCapabilities(path string, want, have []string) []Finding {
	var found []Finding
	if missing := without(want, have); len(missing) > 0 && !slices.Contains(have, "root") {
		found = append(found, fatal(runSetup+" and give the token its policies, orgkeys-service and orgkeys-reaper",
			"the policy is too weak: the service needs %s on %s", strings.Join(missing, ", "), path))
	}
	if extra := without(have, append(want, "deny")); len(extra) > 0 {
		found = append(found, fatal(twoPolicies,
			"the policy is too strong: the service has %s on %s but never needs it", strings.Join(extra, ", "), path))
	}
	return found
}

func without(list, taken []string) []string {
	return slices.DeleteFunc(slices.Sorted(slices.Values(list)), func(s string) bool { return slices.Contains(taken, s) })
}

func (c *Client) checkLeftBehind(ctx context.Context) []Finding {
	// The start does not wait for a long list: what was not seen is the reaper's.
	ctx, cancel := context.WithTimeout(ctx, c.config.CallTimeout)
	defer cancel()
	old := 0
	for _, mount := range []string{keysMount, sealedMount} {
		names, err := c.keyNames(ctx, mount)
		if err != nil {
			return []Finding{failed(err, runSetup, "the keys in Transit cannot be listed")}
		}
		needed := map[string]bool{}
		if c.config.Live != nil {
			if needed, err = c.config.Live(ctx, names); err != nil {
				continue // the database has a check of its own
			}
		}
		for _, name := range names {
			if needed[name] {
				continue
			}
			if k, age, err := c.read(ctx, mount+"/keys/"+name); err == nil && !k.blank() && age > c.config.ReapGrace {
				old++
			}
		}
	}
	if old == 0 {
		return nil
	}
	return []Finding{{Problem: fmt.Sprintf("Transit holds %d keys that a crash left behind", old),
		Remedy: "the reaper deletes them; if they stay, see its messages"}}
}
