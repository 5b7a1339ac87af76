package doctor

import (
	"context"
	"errors"
	"net/http"
	"time"

	vaultapi "github.com/hashicorp/vault/api"

	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/server"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/internal/vault"
)

// vault returns the client if the login succeeds, and whether Vault is set up
// correctly.
func (d *doctor) vault(ctx context.Context, db *sqlstore.DB) (client *vault.Client, sound bool) {
	if d.cfg.VaultAuth == config.VaultAppRole && d.cfg.VaultSecretIDPath != "" {
		d.warn("Vault", "ask /readyz on the running server's admin listener, or give doctor a secret ID of its own",
			"not examined: a wrapped secret ID is good for one login, which is the server's")
		return nil, false
	}
	settings := vault.Config{Login: server.VaultLogin(d.cfg), ReapGrace: d.cfg.ReservationTTL, Log: d.log}
	if db != nil {
		settings.Live = db.Needed
	}
	client, err := vault.Open(ctx, settings)
	if err != nil {
		d.fail("Vault", "check VAULT_ADDR and VAULT_CACERT, that Vault runs and is unsealed, and the login's files", "%v", err)
		return nil, false
	}
	sound = true
	for _, f := range client.Check(ctx) {
		if f.Fatal {
			sound = false
			d.fail("Vault", f.Remedy, "%s", f.Problem)
		} else {
			d.warn("Vault", f.Remedy, "%s", f.Problem)
		}
	}
	if sound {
		d.ok("Vault", "unsealed, audited, and set up correctly")
		d.ok("sealed delivery", "keys are sealed to their recipients in orgkeys-sealed, as %s", envelope.WrapSHA256)
	}
	return client, sound
}

// receiptKey checks that Vault signs receipts with the same key as before.
func (d *doctor) receiptKey(ctx context.Context, db *sqlstore.DB, client *vault.Client) {
	if db == nil {
		return
	}
	keys, err := client.ReceiptKeys(ctx)
	known, knownErr := db.ReceiptKeys(ctx)
	if err = errors.Join(err, knownErr); err == nil {
		err = keys.Replace(client.Sink().Name(), known)
	}
	if err != nil {
		d.fail("receipt key", restoreRemedy, "%v", err)
	}
}

// vaultClock compares Vault's clock, of which HTTP gives whole seconds, with
// this process's.
func (d *doctor) vaultClock(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	client, err := vaultapi.NewClient(vaultapi.DefaultConfig())
	if err != nil {
		d.warn("clock", "check the environment variables of the Vault client", "Vault's clock cannot be read: %v", err)
		return
	}
	response, err := client.Logical().ReadRawWithContext(ctx, "sys/seal-status")
	if err != nil {
		d.warn("clock", "check that Vault answers", "Vault's clock cannot be read: %v", err)
		return
	}
	defer response.Body.Close()
	date, err := http.ParseTime(response.Header.Get("Date"))
	if err != nil {
		d.warn("clock", "check the proxies between orgkeys and Vault", "Vault's answer has no usable date: %v", err)
		return
	}
	d.clock("Vault's", time.Since(date.Add(500*time.Millisecond)), clockDoubt+time.Second)
}

// pool examines the keys that wait in Vault.
func (d *doctor) pool(ctx context.Context, db *sqlstore.DB) {
	if db == nil {
		return
	}
	all, err := db.Ahead(ctx)
	if err != nil {
		d.fail("key pool", "see the database's own log", "%v", err)
		return
	}
	ready, expired := 0, 0
	for _, a := range all {
		switch {
		case a.Expired:
			expired++
		case a.Sealed != nil:
			ready++
		}
	}
	switch {
	case expired > 0:
		d.warn("key pool", "start the service, or look for the reason in its log: it destroys them", "%d keys in the pool have expired", expired)
	case d.cfg.Pool == 0 && len(all) > 0:
		d.warn("key pool", "restart every replica with the same ORGKEYS_POOL: one that has 0 destroys the keys", "ORGKEYS_POOL is 0, but %d keys are in the pool", len(all))
	case d.cfg.Pool == 0:
		d.ok("key pool", "off")
	default:
		d.ok("key pool", "%d keys wait in Vault, of at most %d for export and %d to be sealed", ready, d.cfg.Pool, d.cfg.Pool)
	}
}
