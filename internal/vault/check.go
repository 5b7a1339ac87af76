package vault

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"golang.org/x/sync/singleflight"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	setup "github.com/orgkeys/orgkeys/vault"
)

// Finding is a problem of Vault's set-up, for the operator.
type Finding struct {
	Fatal   bool   // the service must not start, or would not work
	Problem string // what is wrong
	Remedy  string // what to do

	cause error // what Vault's answer to a call was, or why there was none
}

func (f Finding) String() string { return f.Problem + ": " + f.Remedy }

func fatal(remedy, problem string, args ...any) Finding {
	return Finding{Fatal: true, Problem: fmt.Sprintf(problem, args...), Remedy: remedy}
}

// failed is what is found when a call fails. A Vault that is slow or away says
// nothing of its set-up.
func failed(cause error, remedy, problem string, args ...any) Finding {
	if errors.Is(cause, orgkey.ErrUnavailable) {
		remedy = slowVault
	}
	f := fatal(remedy, "%s: %v", fmt.Sprintf(problem, args...), cause)
	f.cause = cause
	return f
}

const (
	runSetup       = "run vault/setup against this Vault"
	mendLogin      = "check the role ID and secret ID files, or the token file; vault/setup --credentials makes new ones"
	lockedOut      = "make sure that the login is enabled at the expected path, and that the role ID is not locked out after refused logins: \"vault read sys/locked-users\" shows it, \"vault write -f sys/locked-users/ACCESSOR/unlock/ROLE_ID\" ends it, and vault/setup turns that lockout off"
	leadPastCache  = "let VAULT_ADDR, or VAULT_AGENT_ADDR if set, bypass the cache and lead to Vault itself; or take \"cache {}\" out of the Agent's configuration; or let the Agent also log in, and set ORGKEYS_VAULT_AUTH=token_file"
	boundAddresses = "see token_bound_cidrs of the role with \"vault read auth/approle/role/orgkeys\": the token may be used only from those addresses, as Vault sees them behind proxies"
	slowVault      = "Vault is slow or unavailable: check its load and its own log"
	restore        = runSetup + "; but if orgkeys has used this Vault before, restore Vault from its backup instead: nothing else has the keys"
	twoPolicies    = "give the token the policies orgkeys-service and orgkeys-reaper of vault/setup and no others"
)

// Check checks everything in Vault that the service relies on. It changes nothing.
func (c *Client) Check(ctx context.Context) []Finding {
	if found := c.checkSeal(ctx); len(found) > 0 {
		return found
	}
	if _, err := c.session(ctx); err != nil {
		return []Finding{fatal(loginRemedy(err), "the login failed: %v", err)}
	}
	switch _, err := c.token(ctx); {
	case errors.Is(err, ErrLogin):
		return []Finding{fatal(loginRemedy(err), "%v", err)}
	case errors.Is(err, ErrDenied):
		return []Finding{fatal(twoPolicies, "the token may not look itself up: %v", err)}
	case err != nil:
		return []Finding{fatal("make sure that every audit device can be written, and see Vault's own log", "Vault does not answer an audited call: %v", err)}
	}
	return together(ctx, c.checkTrail, c.checkPlain, c.checkCache, c.checkKeys, c.checkToken, c.checkPolicyTexts, c.checkCapabilities, c.checkLeftBehind)
}

// together runs checks at the same time, so that a slow Vault delays the start
// by the slowest only, and returns what they found in their order.
func together(ctx context.Context, checks ...func(context.Context) []Finding) []Finding {
	found := make([][]Finding, len(checks))
	var running sync.WaitGroup
	for i, check := range checks {
		running.Go(func() { found[i] = check(ctx) })
	}
	running.Wait()
	return slices.Concat(found...)
}

// auditCheckLife is how long a check of Vault's audit devices is valid: a change in
// Vault stops the service after this time at the latest.
const (
	auditCheckLife = time.Second
	trailAges      = 800 * time.Millisecond // for callers that need a valid check soon and should not wait for it then
)

// auditCheck is the last check of the audit devices, and the one in progress.
type auditCheck struct {
	looking singleflight.Group

	mu  sync.Mutex
	at  time.Time
	err error
}

// Healthy checks the audit devices, with calls that Vault cannot answer without writing
// them to its audit devices. (sys/health stays 200 when those are full.) The error wraps
// orgkey.ErrUnavailable.
func (c *Client) Healthy(ctx context.Context) error {
	select {
	case seen := <-c.looking(ctx):
		return seen.Err
	case <-ctx.Done():
		return fmt.Errorf("checking Vault's audit devices: %w: %w", orgkey.ErrUnavailable, ctx.Err())
	}
}

// looking begins a check, or joins the one in progress, which outlives ctx.
func (c *Client) looking(ctx context.Context) <-chan singleflight.Result {
	return c.auditCheck.looking.DoChan("", func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.config.CallTimeout)
		defer cancel()
		return nil, c.look(ctx)
	})
}

// lastLook returns the time and the result of the last check.
func (c *Client) lastLook() (at time.Time, err error) {
	c.auditCheck.mu.Lock()
	defer c.auditCheck.mu.Unlock()
	return c.auditCheck.at, c.auditCheck.err
}

// audited returns the last check's result if it is still valid, and otherwise checks. It
// is called before a private key is exported and before events count as recorded, so that
// the audit devices show the events and hide the keys.
func (c *Client) audited(ctx context.Context) error {
	if at, err := c.lastLook(); time.Since(at) < auditCheckLife {
		return err
	}
	return c.Healthy(ctx)
}

// anticipate begins a check, if needed, for a caller that needs its result soon.
func (c *Client) anticipate(ctx context.Context) {
	if at, _ := c.lastLook(); time.Since(at) > trailAges {
		c.looking(ctx)
	}
}

// look stores its result, unless Vault did not answer: then the next caller checks again.
func (c *Client) look(ctx context.Context) (err error) {
	at := time.Now()
	var problems, causes []error
	for _, f := range c.checkTrail(ctx) {
		problems = append(problems, errors.New(f.Problem))
		if f.cause != nil {
			causes = append(causes, f.cause)
		}
	}
	switch {
	case len(causes) > 0:
		at, err = time.Time{}, fmt.Errorf("checking Vault's audit devices: %w: %w", orgkey.ErrUnavailable, errors.Join(causes...))
	case len(problems) > 0:
		err = fmt.Errorf("%w: Vault's audit devices are not safe: %w", orgkey.ErrUnavailable, errors.Join(problems...))
	}
	c.auditCheck.mu.Lock()
	defer c.auditCheck.mu.Unlock()
	c.auditCheck.at, c.auditCheck.err = at, err
	return err
}

func (c *Client) checkSeal(ctx context.Context) []Finding {
	answer, err := c.send(ctx, &session{api: c.base}, request{method: http.MethodGet, path: "sys/seal-status"})
	if err != nil {
		return []Finding{fatal("check VAULT_ADDR (or VAULT_AGENT_ADDR if set), VAULT_CACERT, and that Vault runs", "Vault does not answer at %s: %v", c.base.Address(), err)}
	}
	var status struct {
		Initialized bool `json:"initialized"`
		Sealed      bool `json:"sealed"`
	}
	if err := json.Unmarshal(answer.body, &status); err != nil {
		return []Finding{fatal("make sure that VAULT_ADDR is Vault's address", "the answer is not Vault's: %v", err)}
	}
	switch {
	case !status.Initialized:
		return []Finding{fatal("vault operator init, then unseal it and "+runSetup, "Vault is not initialized")}
	case status.Sealed:
		return []Finding{fatal("vault operator unseal", "Vault is sealed")}
	}
	return c.checkSecondary(ctx)
}

// checkSecondary finds a Vault that is unsealed and answers nothing all the same.
// What keeps sys/health from being asked is no finding: others see to that.
func (c *Client) checkSecondary(ctx context.Context) []Finding {
	_, err := c.send(ctx, &session{api: c.base}, request{method: http.MethodGet, path: "sys/health", query: url.Values{"standbyok": {"true"}, "perfstandbyok": {"true"}}})
	if e, ok := errors.AsType[*statusError](err); ok && standby[e.status] != "" {
		return []Finding{fatal("let VAULT_ADDR (or VAULT_AGENT_ADDR if set) lead to a Vault that serves", "%v", err)}
	}
	return nil
}

// checkTrail sees that the audit devices record events and checkpoints in
// clear, and keys and secrets not.
func (c *Client) checkTrail(ctx context.Context) []Finding {
	checks := []func(context.Context) []Finding{c.checkAudit}
	for _, m := range []inClear{{keysMount, nil}, {sealedMount, nil}, {sealMount, nil}, {auditMount, []string{"event"}}, {stateMount, []string{"checkpoint"}}} {
		checks = append(checks, func(ctx context.Context) []Finding { return c.checkClear(ctx, m) })
	}
	return together(ctx, checks...)
}

func (c *Client) checkAudit(ctx context.Context) []Finding {
	devices, err := c.devices(ctx)
	if err != nil {
		return []Finding{failed(err, runSetup+", which lets the service list the audit devices", "cannot tell whether Vault has an audit device")}
	}
	const enable = "vault audit enable file file_path=/var/log/vault/audit.log"
	if len(devices) == 0 {
		return []Finding{fatal(enable, "Vault has no audit device, so it answers every request without an audit entry")}
	}
	var found []Finding
	kept := 0
	for _, name := range slices.Sorted(maps.Keys(devices)) {
		if !devices[name].discards() {
			kept++
		}
		text, set := devices[name].Options["log_raw"]
		if raw, err := strconv.ParseBool(text); set && (raw || err != nil) {
			found = append(found, fatal("vault audit disable "+name+", destroy its log, and enable it without log_raw",
				"audit device %s has log_raw=%s, and writes private keys in clear", name, text))
		}
	}
	if kept == 0 {
		found = append(found, fatal(enable, "Vault has no audit device that stores its entries"))
	}
	return found
}

// checkPlain warns unless a device writes entries that "audit verify" can read. The
// service works without one, so its absence would only be noticed at an audit.
func (c *Client) checkPlain(ctx context.Context) []Finding {
	devices, err := c.devices(ctx)
	if err != nil || len(devices) == 0 {
		return nil // checkAudit's to say
	}
	for _, d := range devices {
		if d.plain() {
			return nil
		}
	}
	return []Finding{{Problem: "no audit device of Vault writes plain JSON, so \"orgkeys audit verify --vault-audit\" cannot compare the log with what Vault recorded",
		Remedy: "enable another one: vault audit enable -path=plain file file_path=/var/log/vault/audit-plain.log"}}
}

func (c *Client) checkCache(ctx context.Context) []Finding {
	switch err := c.cached(ctx); {
	case errors.Is(err, orgkey.ErrSealedUnavailable):
		return []Finding{fatal("take disable_cache out of the configuration of every node of this Vault, and restart it", "%v", err)}
	case err != nil:
		return []Finding{failed(err, runSetup, "cannot tell whether Vault's cache is enabled")}
	}
	return nil
}

func (c *Client) devices(ctx context.Context) (map[string]device, error) {
	answer, err := c.do(ctx, request{method: http.MethodGet, path: "sys/audit"})
	if err != nil {
		return nil, err
	}
	return data[map[string]device](answer.body)
}

// device is what Vault says of an audit device.
type device struct {
	Type    string            `json:"type"`
	Options map[string]string `json:"options"`
}

// discards reports whether the device keeps nothing.
func (d device) discards() bool {
	path := cmp.Or(d.Options["file_path"], d.Options["path"]) // the name that Vault reads too
	return d.Type == "file" && (strings.EqualFold(path, "discard") || filepath.Clean(path) == os.DevNull)
}

// plain reports whether the device writes JSON lines and nothing else: no other
// format, nothing before an entry, and every entry. The output of a device for syslog, or for standard
// output, is mixed with other lines.
func (d device) plain() bool {
	o := d.Options
	if cmp.Or(o["format"], "json") != "json" || o["prefix"]+o["filter"]+o["exclude"] != "" || d.discards() {
		return false
	}
	return d.Type == "socket" || d.Type == "file" && cmp.Or(o["file_path"], o["path"]) != "stdout"
}

// standingKey is what Transit says of a key that stays.
type standingKey struct {
	Type            string `json:"type"`
	Derived         bool   `json:"derived"`
	Exportable      bool   `json:"exportable"`
	DeletionAllowed bool   `json:"deletion_allowed"`
	PlaintextBackup bool   `json:"allow_plaintext_backup"`
	AutoRotate      int64  `json:"auto_rotate_period"` // seconds; 0: never
}

func (c *Client) checkKeys(ctx context.Context) []Finding {
	return together(ctx,
		c.checkKey(sealKey, standingKey{Type: "aes256-gcm96", Derived: true}),
		c.checkKey(receiptKey, standingKey{Type: "ed25519"}),
		c.checkCheckpoint)
}

func (c *Client) checkCheckpoint(ctx context.Context) []Finding {
	// A lost one is for who compares the log with it.
	if _, err := c.Sink().Last(ctx); err != nil && !errors.Is(err, audit.ErrCheckpointLost) {
		return []Finding{failed(err, runSetup, "the checkpoint cannot be read")}
	}
	return nil
}

// checkKey compares a key with the one that vault/setup makes.
func (c *Client) checkKey(path string, want standingKey) func(context.Context) []Finding {
	return func(ctx context.Context) []Finding {
		answer, err := c.do(ctx, request{method: http.MethodGet, path: path})
		switch {
		case missingMount(err):
			return []Finding{fatal(restore, "there is no mount for %s", path)}
		case errors.Is(err, errNotFound):
			return []Finding{fatal(restore, "there is no key %s", path)}
		case err != nil:
			return []Finding{failed(err, runSetup, "%s cannot be read", path)}
		}
		got, err := data[standingKey](answer.body)
		if err != nil {
			return []Finding{failed(err, runSetup, "%s cannot be read", path)}
		}
		if got.AutoRotate > 0 {
			return []Finding{{Problem: fmt.Sprintf("%s is rotated automatically every %s", path, time.Duration(got.AutoRotate)*time.Second),
				Remedy: rotating[path] + "; or turn that off: vault write " + path + "/config auto_rotate_period=0"}}
		}
		if got != want {
			return []Finding{fatal("find out who made or changed it; vault/setup makes a correct one on a new mount", "%s is %+v, not %+v", path, got, want)}
		}
		return nil
	}
}

// rotating is what each rotation of a key asks of an operator.
var rotating = map[string]string{
	sealKey:    "after each rotation back Vault up and run \"orgkeys rewrap\"",
	receiptKey: "after each rotation deposit the new line of \"orgkeys audit key\"",
}

// inClear is which fields of a mount's requests the audit devices record in
// clear; of its answers they record none so.
type inClear struct {
	mount  string
	fields []string
}

func (c *Client) checkClear(ctx context.Context, m inClear) []Finding {
	answer, err := c.do(ctx, request{method: http.MethodGet, path: "sys/mounts/" + m.mount + "/tune"})
	if err != nil {
		return []Finding{failed(err, runSetup, "the settings of mount %s cannot be read", m.mount)}
	}
	tune, err := data[struct {
		Requests []string `json:"audit_non_hmac_request_keys"`
		Answers  []string `json:"audit_non_hmac_response_keys"`
	}](answer.body)
	if err != nil {
		return []Finding{failed(err, runSetup, "the settings of mount %s cannot be read", m.mount)}
	}
	if missing := without(m.fields, tune.Requests); len(missing) > 0 {
		return []Finding{fatal(runSetup, "mount %s does not have %q audited in clear", m.mount, strings.Join(missing, ", "))}
	}
	if extra := append(without(tune.Requests, m.fields), tune.Answers...); len(extra) > 0 {
		return []Finding{fatal(runSetup+", and destroy the audit devices' logs since then", "mount %s has %q audited in clear, which may be secret", m.mount, strings.Join(extra, ", "))}
	}
	return nil
}

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
			if age, err := c.age(ctx, mount+"/keys/"+name); err == nil && age > c.config.ReapGrace {
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
