package vault

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/orgkey"
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
	return together(ctx, c.checkDevices, c.checkPlain, c.checkCache, c.checkKeys, c.checkToken, c.checkPolicyTexts, c.checkCapabilities, c.checkLeftBehind)
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
