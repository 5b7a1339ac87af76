package vault

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json"
)

// Finding is something about Vault that an operator should know at start.
type Finding struct {
	Fatal   bool   // the service must not start, or would not work
	Problem string // what is wrong
	Remedy  string // what to do
}

func (f Finding) String() string { return f.Problem + ": " + f.Remedy }

func fatal(remedy, problem string, args ...any) Finding {
	return Finding{true, fmt.Sprintf(problem, args...), remedy}
}

const runSetup = "run vault/setup against this Vault"

// Check looks at all that the service relies on in Vault. It changes nothing.
//
// A server with disable_cache=true is not found: only its configuration tells,
// which the service must not read, so vault/setup looks. It would not break
// orgkeys, which uses no byok-export.
func (c *Client) Check(ctx context.Context) []Finding {
	if found := c.checkSeal(ctx); len(found) > 0 {
		return found
	}
	if _, err := c.session(ctx); err != nil {
		return []Finding{fatal("check the role ID and secret ID files, or the token file; vault/setup --credentials makes new ones; after a 500, see that every audit device can be written", "the login failed: %v", err)}
	}
	if err := c.Healthy(ctx); err != nil {
		return []Finding{fatal("see that every audit device can be written, and what Vault's own log says", "Vault does not answer an audited call: %v", err)}
	}
	return slices.Concat(c.checkAudit(ctx), c.checkKeys(ctx), c.checkClear(ctx), c.checkPolicy(ctx), c.checkLeftBehind(ctx))
}

// Healthy makes a call that Vault cannot answer without writing it to its
// audit device. sys/health stays 200 when that is full.
func (c *Client) Healthy(ctx context.Context) error {
	_, err := c.do(ctx, request{method: http.MethodGet, path: "auth/token/lookup-self"})
	return err
}

func (c *Client) checkSeal(ctx context.Context) []Finding {
	answer, err := c.send(ctx, &session{api: c.base}, request{method: http.MethodGet, path: "sys/seal-status"})
	if err != nil {
		return []Finding{fatal("check VAULT_ADDR and VAULT_CACERT, and that Vault runs", "Vault cannot be asked: %v", err)}
	}
	var status struct {
		Initialized bool `json:"initialized"`
		Sealed      bool `json:"sealed"`
	}
	if err := json.Unmarshal(answer.body, &status); err != nil {
		return []Finding{fatal("check that VAULT_ADDR is Vault's", "the answer is not Vault's: %v", err)}
	}
	switch {
	case !status.Initialized:
		return []Finding{fatal("vault operator init, then unseal it and "+runSetup, "Vault is not initialized")}
	case status.Sealed:
		return []Finding{fatal("vault operator unseal", "Vault is sealed")}
	}
	return nil
}

func (c *Client) checkAudit(ctx context.Context) []Finding {
	answer, err := c.do(ctx, request{method: http.MethodGet, path: "sys/audit"})
	if err != nil {
		return []Finding{fatal(runSetup+", which lets the service list the audit devices", "cannot tell whether Vault has an audit device: %v", err)}
	}
	devices, err := data[map[string]struct {
		Options map[string]string `json:"options"`
	}](answer.body)
	if err != nil {
		return []Finding{fatal(runSetup, "cannot tell whether Vault has an audit device: %v", err)}
	}
	if len(devices) == 0 {
		return []Finding{fatal("vault audit enable file file_path=/var/log/vault/audit.log", "Vault has no audit device, and answers every request unaudited")}
	}
	var found []Finding
	for _, name := range slices.Sorted(maps.Keys(devices)) {
		text, set := devices[name].Options["log_raw"]
		if raw, err := strconv.ParseBool(text); set && (raw || err != nil) {
			found = append(found, fatal("vault audit disable "+name+", destroy its log, and enable it without log_raw",
				"audit device %s has log_raw=%s, and writes private keys in clear", name, text))
		}
	}
	return found
}

// keyCheck is a key that setup makes, and what Transit should say of it.
type keyCheck struct {
	path string
	want standingKey
}

// standingKey is what Transit says of a key that stays.
type standingKey struct {
	Type            string `json:"type"`
	Derived         bool   `json:"derived"`
	Exportable      bool   `json:"exportable"`
	DeletionAllowed bool   `json:"deletion_allowed"`
	PlaintextBackup bool   `json:"allow_plaintext_backup"`
}

func (c *Client) checkKeys(ctx context.Context) []Finding {
	var found []Finding
	for _, k := range []keyCheck{
		{sealKey, standingKey{Type: "aes256-gcm96", Derived: true}},
		{receiptKey, standingKey{Type: "ed25519"}},
	} {
		if f, ok := c.checkKey(ctx, k); !ok {
			found = append(found, f)
		}
	}
	if _, err := c.Sink().Last(ctx); err != nil {
		found = append(found, fatal(runSetup, "the checkpoint cannot be read: %v", err))
	}
	return found
}

func (c *Client) checkKey(ctx context.Context, k keyCheck) (Finding, bool) {
	answer, err := c.do(ctx, request{method: http.MethodGet, path: k.path})
	switch {
	case missingMount(err):
		return fatal(runSetup, "there is no mount for %s", k.path), false
	case errors.Is(err, errNotFound):
		return fatal(runSetup+", unless records were sealed under a key that was lost: then restore Vault from its backup", "there is no key %s", k.path), false
	case err != nil:
		return fatal(runSetup, "%s cannot be read: %v", k.path, err), false
	}
	got, err := data[standingKey](answer.body)
	if err != nil || got != k.want {
		return fatal("find out who made or changed it; vault/setup makes a sound one on a fresh mount", "%s is %+v, not %+v (%v)", k.path, got, k.want, err), false
	}
	return Finding{}, true
}

// checkClear sees that the audit device records events and checkpoints in clear.
func (c *Client) checkClear(ctx context.Context) []Finding {
	var found []Finding
	for _, m := range []struct{ mount, field string }{{auditMount, "event"}, {stateMount, "checkpoint"}} {
		answer, err := c.do(ctx, request{method: http.MethodGet, path: "sys/mounts/" + m.mount + "/tune"})
		if err != nil {
			found = append(found, fatal(runSetup, "the settings of mount %s cannot be read: %v", m.mount, err))
			continue
		}
		tune, err := data[struct {
			Clear []string `json:"audit_non_hmac_request_keys"`
		}](answer.body)
		if err != nil || !slices.Contains(tune.Clear, m.field) {
			found = append(found, fatal(runSetup, "mount %s does not have %q audited in clear", m.mount, m.field))
		}
	}
	return found
}

const sampleKey = "00000000-0000-4000-8000-000000000000"

// granted are the capabilities that the service has, on every path that its
// policies name.
var granted = map[string][]string{
	"orgkeys/keys":                                      {"list"},
	"orgkeys/keys/" + sampleKey:                         {"delete", "read", "update"},
	"orgkeys/keys/" + sampleKey + "/config":             {"update"},
	"orgkeys/export/encryption-key/" + sampleKey + "/1": {"read"},
	"orgkeys-seal/encrypt/seal":                         {"update"},
	"orgkeys-seal/decrypt/seal":                         {"update"},
	"orgkeys-seal/rewrap/seal":                          {"update"},
	"orgkeys-seal/keys/seal":                            {"read"},
	"orgkeys-audit/sign/receipt":                        {"update"},
	"orgkeys-audit/keys/receipt":                        {"read"},
	"orgkeys-state/data/checkpoint":                     {"create", "read", "update"},
	"sys/audit":                                         {"read", "sudo"},
	"sys/mounts/orgkeys-audit/tune":                     {"read"},
	"sys/mounts/orgkeys-state/tune":                     {"read"},
	"sys/capabilities-self":                             {"update"},
	"auth/token/lookup-self":                            {"read"},
	"auth/token/renew-self":                             {"update"},
	"auth/token/revoke-self":                            {"update"},
}

// denied are paths that the service never needs, one for each way of getting
// at what it must not have: the standing keys, other keys, the evidence, and
// its own permissions.
var denied = []string{
	"orgkeys/export/encryption-key/" + sampleKey, "orgkeys/export/encryption-key/" + sampleKey + "/2",
	"orgkeys/export/signing-key/" + sampleKey + "/1", "orgkeys/byok-export/" + sampleKey + "/" + sampleKey,
	"orgkeys/backup/" + sampleKey, "orgkeys/restore", "orgkeys/restore/" + sampleKey,
	"orgkeys/keys/" + sampleKey + "/rotate", "orgkeys/keys/" + sampleKey + "/import", "orgkeys/keys/" + sampleKey + "/trim",
	"orgkeys/encrypt/" + sampleKey, "orgkeys/decrypt/" + sampleKey, "orgkeys/sign/" + sampleKey, "orgkeys/config/keys", "orgkeys/cache-config",
	"orgkeys-seal/keys", "orgkeys-seal/keys/other", "orgkeys-seal/keys/seal/config", "orgkeys-seal/keys/seal/rotate", "orgkeys-seal/keys/seal/trim",
	"orgkeys-seal/export/encryption-key/seal", "orgkeys-seal/export/encryption-key/seal/1", "orgkeys-seal/byok-export/seal/seal",
	"orgkeys-seal/backup/seal", "orgkeys-seal/restore/seal", "orgkeys-seal/datakey/plaintext/seal", "orgkeys-seal/encrypt/other", "orgkeys-seal/config/keys",
	"orgkeys-audit/keys", "orgkeys-audit/keys/other", "orgkeys-audit/keys/receipt/config", "orgkeys-audit/keys/receipt/rotate",
	"orgkeys-audit/export/signing-key/receipt", "orgkeys-audit/export/signing-key/receipt/1", "orgkeys-audit/backup/receipt", "orgkeys-audit/restore/receipt", "orgkeys-audit/sign/other",
	"orgkeys-state/metadata/checkpoint", "orgkeys-state/metadata", "orgkeys-state/delete/checkpoint", "orgkeys-state/undelete/checkpoint",
	"orgkeys-state/destroy/checkpoint", "orgkeys-state/config", "orgkeys-state/data/other",
	"sys/audit/file", "sys/audit-hash/file", "sys/config/auditing/request-headers/x-correlation-id", "sys/config/auditing/request-headers",
	"sys/mounts", "sys/mounts/orgkeys", "sys/mounts/orgkeys-seal", "sys/mounts/orgkeys-audit", "sys/remount", "sys/raw/core", "sys/seal", "sys/rotate",
	"sys/policies/acl/orgkeys-service", "sys/policies/acl/orgkeys-reaper", "sys/policy/orgkeys-service", "sys/auth", "sys/auth/approle", "sys/config/state/sanitized",
	"auth/approle/role/orgkeys", "auth/approle/role/orgkeys/role-id", "auth/approle/role/orgkeys/secret-id", "auth/approle/role/orgkeys/policies",
	"auth/token/create", "auth/token/create-orphan", "auth/token/accessors", "identity/entity", "cubbyhole/orgkeys", "secret/data/orgkeys", "transit/keys/orgkeys",
}

// checkPolicy compares what the token may do with what it needs, both ways.
func (c *Client) checkPolicy(ctx context.Context) []Finding {
	paths := append(slices.Collect(maps.Keys(granted)), denied...)
	body, err := json.Marshal(map[string][]string{"paths": paths})
	if err != nil {
		return []Finding{fatal(runSetup, "the token's policy cannot be checked: %v", err)}
	}
	answer, err := c.do(ctx, request{method: http.MethodPut, path: "sys/capabilities-self", body: body})
	if err != nil {
		return []Finding{fatal(runSetup, "the token's policy cannot be checked: %v", err)}
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
		found = append(found, fatal("give the token the policies orgkeys-service and orgkeys-reaper of vault/setup and no other",
			"the policy is too strong: the service has %s on %s and never needs it", strings.Join(extra, ", "), path))
	}
	return found
}

func without(list, taken []string) []string {
	return slices.DeleteFunc(slices.Sorted(slices.Values(list)), func(s string) bool { return slices.Contains(taken, s) })
}

func (c *Client) checkLeftBehind(ctx context.Context) []Finding {
	names, err := c.keyNames(ctx)
	if err != nil {
		return []Finding{fatal(runSetup, "the keys in Transit cannot be listed: %v", err)}
	}
	old := 0
	for _, name := range names {
		if age, err := c.age(ctx, name); err == nil && age > c.config.ReapGrace {
			old++
		}
	}
	if old == 0 {
		return nil
	}
	return []Finding{{Problem: fmt.Sprintf("Transit holds %d keys that a crash left behind", old),
		Remedy: "the reaper deletes them; if they stay, see its messages"}}
}
