// Package doctor examines everything that the server needs and says how to fix
// what is wrong. It changes nothing, except that it records refused PINs.
package doctor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/orgkeys/orgkeys/internal/api"
	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/privatefile"
	"github.com/orgkeys/orgkeys/internal/server"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/policies"
)

// Diagnosis is the result of examining one thing.
type Diagnosis struct {
	What   string `json:"what"`
	State  string `json:"state"` // ok, warn or fail
	Found  string `json:"found"`
	Remedy string `json:"remedy,omitempty"`
}

// States of a diagnosis.
const (
	OK   = "ok"
	Warn = "warn"
	Fail = "fail"
)

const (
	timeout    = 30 * time.Second // for everything
	askTimeout = 5 * time.Second  // for one dependency

	clockDoubt  = time.Second      // tokens and node timestamps tolerate more
	clockBroken = 30 * time.Second // tokens' expiry tolerates less
)

// doctor examines the parts of one configuration.
type doctor struct {
	cfg     config.Config
	version string // of this program
	log     *slog.Logger
	found   []Diagnosis
}

func (d *doctor) ok(what, found string, args ...any) {
	d.found = append(d.found, Diagnosis{what, OK, fmt.Sprintf(found, args...), ""})
}

func (d *doctor) warn(what, remedy, found string, args ...any) {
	d.found = append(d.found, Diagnosis{what, Warn, fmt.Sprintf(found, args...), remedy})
}

func (d *doctor) fail(what, remedy, found string, args ...any) {
	d.found = append(d.found, Diagnosis{what, Fail, fmt.Sprintf(found, args...), remedy})
}

// Misconfigured is the diagnosis of settings that cannot be read.
func Misconfigured(err error) []Diagnosis {
	d := &doctor{}
	d.fail("configuration", "orgkeys serve --help lists every setting", "%v", err)
	return d.found
}

// Examine examines everything that a server of that version needs with these settings.
func Examine(ctx context.Context, cfg config.Config, version string) []Diagnosis {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	d := &doctor{cfg: cfg, version: version, log: slog.New(slog.DiscardHandler)}
	d.configuration()
	revision := d.policy(ctx)
	d.tokenKeys(ctx)
	d.redis(ctx)
	db := d.database(ctx)
	if db != nil {
		defer db.Close() // it was only read
	}
	sinks, closeBackend := d.backend(ctx, db)
	defer closeBackend()
	if db == nil {
		return d.found
	}
	d.sinks(ctx, db, sinks)
	d.heldBack(ctx, db)
	if d.cfg.DatabaseURL != "" { // SQLite's one process tells nobody of itself
		d.replicas(ctx, db, revision)
	}
	return d.found
}

func (d *doctor) configuration() {
	_, roots := server.TPMRoots(d.cfg.TPMRootsFile)
	err := errors.Join(roots,
		api.CheckTransport(api.ServerConfig{
			Address: d.cfg.Listen, TLS: api.TLSFiles{Cert: d.cfg.TLSCertFile, Key: d.cfg.TLSKeyFile, ClientCA: d.cfg.ClientCAFile},
			Proxies: api.Proxies{Trusted: d.cfg.TrustedProxies, TLS: d.cfg.TLSByProxy},
		}),
		api.CheckOrigins(d.cfg.CORSOrigins))
	if err != nil {
		d.fail("configuration", "orgkeys serve --help lists every setting", "%v", err)
		return
	}
	d.ok("configuration", "valid; at most %d keys an organization", d.cfg.Max)
	err = privatefile.CheckDir(d.cfg.DataDir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		d.warn("data directory", "orgkeys serve makes it", "%s does not exist yet", d.cfg.DataDir)
	case errors.Is(err, os.ErrPermission):
		d.fail("data directory", "make sure that the user that runs orgkeys can read it", "%v", err)
	case err != nil:
		d.fail("data directory", "chmod 700 "+d.cfg.DataDir, "%v", err)
	case unix.Access(d.cfg.DataDir, unix.W_OK) != nil:
		d.fail("data directory", "make sure that the user that runs orgkeys may write there, and that the unit's sandbox allows it (ReadWritePaths=)", "%s cannot be written to", d.cfg.DataDir)
	default:
		d.ok("data directory", "%s is private", d.cfg.DataDir)
	}
}

// policy returns the revision that this configuration would use.
func (d *doctor) policy(ctx context.Context) string {
	if d.cfg.PolicyDir == "" {
		p, err := authz.Load(ctx, policies.Files)
		if err != nil {
			d.fail("policy", "this build is broken: use another one", "%v", err)
			return ""
		}
		d.ok("policy", "embedded, revision %s", p.Revision())
		return p.Revision()
	}
	p, err := authz.Open(ctx, d.cfg.PolicyDir)
	if err != nil {
		d.fail("policy", "fix the files in ORGKEYS_POLICY_DIR; running replicas keep their policy", "%v", err)
		return ""
	}
	d.ok("policy", "%s, revision %s", d.cfg.PolicyDir, p.Revision())
	return p.Revision()
}

// backend examines what makes and seals keys. It returns the audit sinks, and
// the function that ends their use.
func (d *doctor) backend(ctx context.Context, db *sqlstore.DB) (sinks []audit.Sink, end func()) {
	end = func() {}
	if d.cfg.Keystore != config.KeystoreVault {
		d.hsm(ctx, db)
		return d.required(nil), end
	}
	client, sound := d.vault(ctx, db)
	if client != nil {
		end = client.Close // it gives the token back
	}
	if !sound {
		return d.required(nil), end
	}
	d.receiptKey(ctx, db, client)
	d.sealingKey(ctx, db, client.Sealer())
	d.pool(ctx, db)
	d.vaultClock(ctx)
	return d.required(client.Sink()), end
}

// required are the audit sinks of the settings, without the keystore's if that cannot be used,
// which is a diagnosis of its own.
func (d *doctor) required(own audit.Sink) []audit.Sink {
	cfg := d.cfg
	if own == nil {
		cfg.AuditSinks = slices.DeleteFunc(slices.Clone(cfg.AuditSinks), func(name string) bool { return name == config.SinkVault })
	}
	sinks, err := server.Sinks(cfg, own)
	if err != nil {
		d.fail("audit sinks", "orgkeys serve --help lists every setting", "%v", err)
	}
	return sinks
}

// restoreRemedy is for a key that was replaced.
const restoreRemedy = "see docs/operations.md, Backup and restore"

// sealingKey checks that the sealing key decrypts the database's records.
func (d *doctor) sealingKey(ctx context.Context, db *sqlstore.DB, sealer orgkey.Sealer) {
	if db == nil {
		return
	}
	there, err := server.OpensEventKey(ctx, sealer, db)
	if err != nil {
		d.fail("sealing key", restoreRemedy, "%v", err)
	} else if there {
		d.ok("sealing key", "decrypts the database's records")
	}
}
