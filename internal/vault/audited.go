package vault

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// auditCheckLife is how long a check of Vault's audit devices is valid: a change in
// Vault stops the service after this time at the latest.
const (
	auditCheckLife = time.Second
	checkAges      = 800 * time.Millisecond // for callers that need a valid check soon and should not wait for it then
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
	if at, _ := c.lastLook(); time.Since(at) > checkAges {
		c.looking(ctx)
	}
}

// look stores its result, unless Vault did not answer: then the next caller checks again.
func (c *Client) look(ctx context.Context) (err error) {
	at := time.Now()
	var problems, causes []error
	for _, f := range c.checkDevices(ctx) {
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

// checkDevices checks that the audit devices record events and checkpoints in
// clear, but not keys and secrets.
func (c *Client) checkDevices(ctx context.Context) []Finding {
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
