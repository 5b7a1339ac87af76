// Package doctor looks at everything that the server needs, and says what to do
// about what is not as it should be. It changes nothing, but for what it says.
package doctor

import (
	"bufio"
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	vaultapi "github.com/hashicorp/vault/api"
	"golang.org/x/sys/unix"

	"github.com/orgkeys/orgkeys/internal/api"
	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authn"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/hsm"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/privatefile"
	"github.com/orgkeys/orgkeys/internal/redislock"
	"github.com/orgkeys/orgkeys/internal/server"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/internal/vault"
	"github.com/orgkeys/orgkeys/policies"
)

// Diagnosis is one thing that was looked at.
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

	clockDoubt  = time.Second      // tokens and node timestamps tolerate more; other things get odd
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

// Examine looks at all that a server of that version needs with these settings.
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
	err := errors.Join(
		api.CheckTransport(api.ServerConfig{
			Address: d.cfg.Listen, TLS: api.TLSFiles{Cert: d.cfg.TLSCertFile, Key: d.cfg.TLSKeyFile, ClientCA: d.cfg.ClientCAFile},
			Proxies: api.Proxies{Trusted: d.cfg.TrustedProxies, TLS: d.cfg.TLSByProxy},
		}),
		api.CheckOrigins(d.cfg.CORSOrigins))
	if err != nil {
		d.fail("configuration", "orgkeys serve --help lists every setting", "%v", err)
		return
	}
	d.ok("configuration", "sound; at most %d keys an organization", d.cfg.Max)
	err = privatefile.CheckDir(d.cfg.DataDir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		d.warn("data directory", "orgkeys serve makes it", "%s does not exist yet", d.cfg.DataDir)
	case errors.Is(err, os.ErrPermission):
		d.fail("data directory", "see that the user that runs orgkeys can read it", "%v", err)
	case err != nil:
		d.fail("data directory", "chmod 700 "+d.cfg.DataDir, "%v", err)
	case unix.Access(d.cfg.DataDir, unix.W_OK) != nil:
		d.fail("data directory", "see that the user that runs orgkeys may write there, and that a unit's sandbox lets it (ReadWritePaths=)", "%s cannot be written to", d.cfg.DataDir)
	default:
		d.ok("data directory", "%s cannot be entered by others", d.cfg.DataDir)
	}
}

// policy returns the revision that this configuration would use.
func (d *doctor) policy(ctx context.Context) string {
	if d.cfg.PolicyDir == "" {
		p, err := authz.Load(ctx, policies.Files)
		if err != nil {
			d.fail("policy", "this build is broken: use another", "%v", err)
			return ""
		}
		d.ok("policy", "embedded, revision %s", p.Revision())
		return p.Revision()
	}
	p, err := authz.Open(ctx, d.cfg.PolicyDir)
	if err != nil {
		d.fail("policy", "mend the files in ORGKEYS_POLICY_DIR; replicas that run keep the policy they have", "%v", err)
		return ""
	}
	d.ok("policy", "%s, revision %s", d.cfg.PolicyDir, p.Revision())
	return p.Revision()
}

func (d *doctor) tokenKeys(ctx context.Context) {
	if d.cfg.Development() {
		d.warn("token keys", "set ORGKEYS_ISSUER and ORGKEYS_AUDIENCE", "the development issuer signs them: whoever can read the data directory can be anybody")
		return
	}
	configured, err := authn.Configured(d.cfg)
	var issuers []authn.Issuer
	if err == nil {
		issuers, err = authn.Open(configured, d.cfg.JWKSInterval, d.log)
	}
	if err != nil {
		d.fail("token keys", "mend the settings of the issuer: orgkeys serve --help lists them", "%v", err)
		return
	}
	for n, issuer := range issuers {
		d.issuer(ctx, configured[n], issuer)
	}
}

// issuer reads the issuer's keys, and compares what is configured with what
// the issuer says of itself.
func (d *doctor) issuer(ctx context.Context, c authn.IssuerConfig, issuer authn.Issuer) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	const exactly = "set the issuer to what the tokens have as iss, to the byte: orgkeys token explain < token"
	var mismatch *authn.IssuerMismatchError
	var unknown x509.UnknownAuthorityError
	switch err := issuer.Keys.Read(ctx); {
	case errors.As(err, &mismatch):
		d.fail("issuer", exactly, "%v", err)
		return
	case errors.As(err, &unknown):
		d.fail("token keys", "name the authority of its certificate in ORGKEYS_JWKS_CA_FILE, or jwksCaFile in the file of issuers", "%s: %v", c.Issuer, err)
		return
	case err != nil:
		d.fail("token keys", "see that ORGKEYS_JWKS, or the issuer's metadata, names the issuer's JWKS and can be read from here", "%s: %v", c.Issuer, err)
		return
	}
	d.ok("token keys", "%s: read from %s", c.Issuer, cmp.Or(c.JWKS, "where the issuer's metadata says"))
	if !c.IsRemote() {
		return // its provider may be out of reach on purpose
	}
	switch where, err := authn.Discover(ctx, c); {
	case errors.As(err, &mismatch):
		d.fail("issuer", exactly, "%v", err)
	case err != nil:
		d.warn("issuer", "a provider without metadata needs nothing; compare with orgkeys token explain < token", "%s cannot be compared with its metadata: %v", c.Issuer, err)
	case c.JWKS != "" && where != c.JWKS:
		d.warn("issuer", "leave ORGKEYS_JWKS out, and it is found", "%s says that its keys are at %s, and %s is configured", c.Issuer, where, c.JWKS)
	default:
		d.ok("issuer", "%s calls itself that", c.Issuer)
	}
}

func (d *doctor) redis(ctx context.Context) {
	if d.cfg.RedisURL == "" {
		return
	}
	const without = "; until then replicas collide more often, and the quota holds all the same"
	lock, err := redislock.Open(server.RedisConfig(d.cfg), d.log)
	if err != nil {
		d.fail("Redis", "mend ORGKEYS_REDIS_URL, or the TLS files", "%v", err)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	switch err := errors.Join(lock.Healthy(ctx), lock.Close()); {
	case err == nil:
		d.ok("Redis", "answers, and grants locks")
	case errors.Is(err, redislock.ErrLogin):
		d.warn("Redis", "mend user and password in ORGKEYS_REDIS_URL"+without, "%v", err)
	case errors.Is(err, redislock.ErrPermission):
		d.warn("Redis", "ACL SETUSER … ~orgkeys:quota:* "+redislock.Commands+without, "%v", err)
	case errors.Is(err, redislock.ErrMoved):
		d.warn("Redis", "it is a cluster: name another node in ORGKEYS_REDIS_URL with ?addr=HOST:PORT"+without, "%v", err)
	case errors.Is(err, redislock.ErrMemory):
		d.warn("Redis", "raise maxmemory, or set maxmemory-policy to one that evicts (volatile-ttl)"+without, "%v", err)
	case errors.Is(err, redislock.ErrTLS):
		d.warn("Redis", "use rediss:// exactly if Redis listens with TLS; ORGKEYS_REDIS_CA_FILE names the authority of its certificate, ORGKEYS_REDIS_CERT_FILE a client certificate if it wants one"+without, "%v", err)
	case errors.Is(err, redislock.ErrReadOnly):
		d.warn("Redis", "have ORGKEYS_REDIS_URL lead to the primary, or to the sentinels that know it"+without, "%v", err)
	default:
		d.warn("Redis", "start Redis, or mend ORGKEYS_REDIS_URL (rediss:// only where it listens with TLS)"+without, "it does not answer, or not as it must: %v", err)
	}
}

// database returns the database, or nil if it cannot be used.
func (d *doctor) database(ctx context.Context) *sqlstore.DB {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	location, kind := server.DatabaseLocation(d.cfg), "PostgreSQL"
	if d.cfg.DatabaseURL == "" {
		kind = "SQLite"
		if _, err := os.Stat(location); errors.Is(err, os.ErrNotExist) {
			d.warn("database", "orgkeys serve makes it", "%s does not exist yet", location)
			return nil
		}
	}
	db, err := sqlstore.Open(ctx, location)
	if err != nil {
		d.fail("database", "see that it runs, that ORGKEYS_DATABASE_URL leads to it, and that it keeps what it acknowledges", "%v", err)
		return nil
	}
	switch err := db.CheckMigrated(ctx); {
	case errors.Is(err, sqlstore.ErrNotMigrated):
		d.fail("database", "run orgkeys migrate", "%v", err)
		_ = db.Close() // it was only read
		return nil
	case err != nil:
		d.fail("database", "see the database's own log", "%v", err)
		_ = db.Close() // it was only read
		return nil
	}
	if err := db.Healthy(ctx); err != nil {
		d.fail("database", "see the database's own log", "%v", err)
		_ = db.Close() // it was only read
		return nil
	}
	d.ok("database", "%s answers, is migrated, and keeps what it acknowledges", kind)
	return db
}

// backend looks at what makes and seals keys, and returns the audit sinks, and
// what ends their use.
func (d *doctor) backend(ctx context.Context, db *sqlstore.DB) (sinks []audit.Sink, end func()) {
	end = func() {}
	for _, name := range d.cfg.AuditSinks {
		if name == config.SinkFile {
			sinks = append(sinks, audit.NewFileSink(d.cfg.AuditFile))
		}
	}
	if d.cfg.Keystore != config.KeystoreVault {
		d.hsm(ctx, db)
		return sinks, end
	}
	if d.cfg.VaultAuth == config.VaultAppRole && d.cfg.VaultSecretIDPath != "" {
		d.warn("Vault", "ask /readyz on the running server's admin listener, or give doctor a secret ID of its own",
			"not looked at: a wrapped secret ID is good for one login, which is the server's")
		return sinks, end
	}
	client, err := vault.Open(ctx, vault.Config{Login: server.VaultLogin(d.cfg), ReapGrace: d.cfg.ReservationTTL, Log: d.log})
	if err != nil {
		d.fail("Vault", "check VAULT_ADDR and VAULT_CACERT, that Vault runs and is unsealed, and the login's files", "%v", err)
		return sinks, end
	}
	end = client.Close // it gives the token back
	sound := true
	for _, f := range client.Check(ctx) {
		if f.Fatal {
			sound = false
			d.fail("Vault", f.Remedy, "%s", f.Problem)
		} else {
			d.warn("Vault", f.Remedy, "%s", f.Problem)
		}
	}
	if !sound {
		return sinks, end
	}
	d.ok("Vault", "unsealed, audited, and set up as it must be")
	d.ok("sealed delivery", "keys are sealed to their recipients in orgkeys-sealed, as %s", envelope.WrapSHA256)
	d.receiptKey(ctx, db, client)
	d.sealingKey(ctx, db, client.Sealer())
	d.vaultClock(ctx)
	if slices.Contains(d.cfg.AuditSinks, config.SinkVault) {
		sinks = append(sinks, client.Sink())
	}
	return sinks, end
}

// restoreRemedy is for a key that is not the one it was.
const restoreRemedy = "see docs/operations.md, Backup and restore"

// receiptKey sees that Vault signs receipts with the key that it did.
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

// sealingKey sees that what the database's records are sealed under opens one.
func (d *doctor) sealingKey(ctx context.Context, db *sqlstore.DB, sealer orgkey.Sealer) {
	if db == nil {
		return
	}
	there, err := server.OpensEventKey(ctx, sealer, db)
	if err != nil {
		d.fail("sealing key", restoreRemedy, "%v", err)
	} else if there {
		d.ok("sealing key", "opens what the database holds")
	}
}

// hsm tries on the token what the server needs of it, and then opens it as the
// server does. It makes nothing there that lasts.
func (d *doctor) hsm(ctx context.Context, db *sqlstore.DB) {
	hc, err := d.hsmConfig()
	if err != nil {
		d.fail("HSM", "install the module, or mend ORGKEYS_PKCS11_MODULE and its PIN file", "%v", err)
		return
	}
	if hc.Module == "" {
		return // there is no token of its own yet
	}
	if _, err := server.MakeDataDir(d.cfg.DataDir); err != nil {
		d.fail("HSM", "make the data directory: a PIN that the token refuses is remembered there, and is not offered before", "%v", err)
		return
	}
	if db != nil { // a nil *sqlstore.DB is no hsm.Register
		hc.Register = db
	}
	requirements, err := hsm.Examine(ctx, hc)
	switch {
	case errors.Is(err, hsm.ErrPIN):
		d.fail("HSM", "docs/hsm.md, When the token refuses the PIN", "%v", err)
		return
	case err != nil:
		d.fail("HSM", "see that the module and the token are there; docs/hsm.md has the settings for some", "%v", err)
		return
	}
	if d.requirements(requirements) {
		d.token(ctx, db, hc)
	}
}

// hsmConfig finds the module; none if orgkeys serve is still to make its token.
func (d *doctor) hsmConfig() (hsm.Config, error) {
	hc := server.HSMConfig(d.cfg, d.cfg.DataDir)
	var err error
	switch {
	case d.cfg.PINFile == "":
		if _, statErr := os.Stat(filepath.Join(d.cfg.DataDir, "tokens")); errors.Is(statErr, os.ErrNotExist) {
			d.warn("HSM", "orgkeys serve makes it", "there is no SoftHSM token in %s yet", d.cfg.DataDir)
			return hsm.Config{}, nil
		}
		hc, err = hsm.LocateSoftHSM(d.cfg.DataDir)
	case hc.Module == "":
		hc.Module, err = hsm.FindSoftHSM()
	}
	hc.Log, hc.ChangeNothing = d.log, true
	return hc, err
}

// requirements prints each with yes or no, and reports whether the token has
// all that it must.
func (d *doctor) requirements(all []hsm.Requirement) bool {
	complete := true
	for _, r := range all {
		switch {
		case r.Met:
			d.ok("HSM", "yes: %s: %s", r.Name, r.Detail)
		case r.Optional:
			d.warn("HSM", "docs/hsm.md says what is done without it", "no: %s: %s", r.Name, r.Detail)
		default:
			complete = false
			d.fail("HSM", "this token cannot be used; docs/hsm.md names some that can", "no: %s: %s", r.Name, r.Detail)
		}
	}
	return complete
}

// token opens the token without making a sealing key.
func (d *doctor) token(ctx context.Context, db *sqlstore.DB, hc hsm.Config) {
	sealed := false
	if db != nil {
		var err error
		if sealed, err = db.HasSealed(ctx); err != nil {
			d.fail("HSM", "see the database's own log", "%v", err)
			return
		}
	}
	token, err := hsm.Open(ctx, hc)
	if errors.Is(err, hsm.ErrNoSealingKey) && !sealed {
		d.warn("HSM", "orgkeys serve makes it at its first start", "the token is there and logged in to, and has no sealing key yet")
		return
	}
	if err != nil {
		d.fail("HSM", "see that it is the token that the records were sealed by", "%v", err)
		return
	}
	if err := token.Healthy(ctx); err != nil {
		d.fail("HSM", "see the token's own log", "%v", errors.Join(err, token.Close()))
		return
	}
	d.ok("HSM", "the token is there, logged in to, and has its sealing key, CKA_ID %x", token.SealingKeyID())
	d.sealingKey(ctx, db, token)
	if err := token.Close(); err != nil {
		d.fail("HSM", "see the token's own log", "%v", err)
	}
}

// vaultClock compares Vault's clock, of which HTTP gives whole seconds, with
// this process's.
func (d *doctor) vaultClock(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	client, err := vaultapi.NewClient(vaultapi.DefaultConfig())
	if err != nil {
		d.warn("clock", "check the Vault client's own variables", "Vault's clock cannot be read: %v", err)
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
		d.warn("clock", "look at what stands between orgkeys and Vault", "Vault's answer has no usable date: %v", err)
		return
	}
	d.clock("Vault's", time.Since(date.Add(500*time.Millisecond)), clockDoubt+time.Second)
}

// clock judges how far this process's clock is ahead of another.
func (d *doctor) clock(whose string, ahead, tolerated time.Duration) {
	const remedy = "have every machine follow NTP"
	switch {
	case ahead.Abs() > clockBroken:
		d.fail("clock", remedy, "this machine's is %s from %s", ahead.Round(time.Millisecond), whose)
	case ahead.Abs() > tolerated:
		d.warn("clock", remedy, "this machine's is %s from %s", ahead.Round(time.Millisecond), whose)
	default:
		d.ok("clock", "agrees with %s", whose)
	}
}

func (d *doctor) sinks(ctx context.Context, db *sqlstore.DB, sinks []audit.Sink) {
	if inside, err := server.OnlySinkInside(d.cfg); err == nil && inside {
		d.warn("audit sinks", server.OnlySinkRemedy, "%s", server.OnlySinkProblem)
	}
	for _, sink := range sinks {
		name := "sink " + sink.Name()
		// Asking the file sink would create the file, and mend a torn line.
		if sink.Name() == config.SinkFile {
			if _, err := os.Stat(d.cfg.AuditFile); errors.Is(err, os.ErrNotExist) {
				d.warn(name, "orgkeys serve fills it again from the database; find out who removed it", "%s does not exist", d.cfg.AuditFile)
				continue
			}
			d.sinkFile(ctx, db, name)
			continue
		}
		err := audit.NewLog(db, d.log, sink).CheckExtends(ctx)
		d.sink(name, err)
	}
}

// rollbackRemedy is for a sink that the log does not extend.
const rollbackRemedy = "find out why; if the database failed over or a backup was restored, and what it lost is to stay lost: docs/operations.md, Failover, and orgkeys audit accept-rollback --reason …"

// heldBack looks for what other replicas found of their sinks.
func (d *doctor) heldBack(ctx context.Context, db *sqlstore.DB) {
	ahead, err := db.SinksAhead(ctx)
	if err != nil {
		d.fail("audit log", "see the database's own log", "%v", err)
		return
	}
	for _, s := range ahead {
		d.fail("audit log", rollbackRemedy, "no event is given its place: sink %s of %s holds %d events that the log does not extend (since %s)",
			s.Sink, s.Holder, s.Size, s.Found.Format(time.RFC3339))
	}
}

// sinkFile compares the last checkpoint in the file with the log, without
// opening it for writing: a server may be at it.
func (d *doctor) sinkFile(ctx context.Context, db *sqlstore.DB, name string) {
	f, err := os.Open(d.cfg.AuditFile)
	if err != nil {
		d.fail(name, "see that the user that runs orgkeys owns it", "%v", err)
		return
	}
	held, err := lastCheckpoint(f)
	if err := errors.Join(err, f.Close()); err != nil {
		d.fail(name, "keep the file as evidence, and find out who changed it", "%v", err)
		return
	}
	d.sink(name, audit.NewLog(db, d.log, heldSink{held}).CheckExtends(ctx))
}

// lastCheckpoint finds the last checkpoint that a file sink holds; none has
// size 0. A last line that is not whole is one that is being written.
func lastCheckpoint(r io.Reader) (held audit.Checkpoint, err error) {
	in := bufio.NewReader(r)
	for {
		raw, err := in.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return held, nil
		}
		if err != nil {
			return held, err
		}
		var line struct {
			Checkpoint string `json:"checkpoint"`
		}
		if err := json.Unmarshal(raw, &line); err != nil {
			return held, fmt.Errorf("a line is not one that the sink writes: %w", err)
		}
		if line.Checkpoint == "" {
			continue
		}
		if held, err = audit.ParseCheckpoint(line.Checkpoint); err != nil {
			return held, err
		}
	}
}

// heldSink is a sink of which only the last checkpoint is known.
type heldSink struct{ held audit.Checkpoint }

func (heldSink) Name() string                                         { return config.SinkFile }
func (heldSink) Shared() bool                                         { return false }
func (s heldSink) Last(context.Context) (audit.Checkpoint, error)     { return s.held, nil }
func (heldSink) KeepSigned(context.Context, string) error             { return errHeldOnly }
func (heldSink) AcceptRollback(context.Context, audit.Rollback) error { return errHeldOnly }
func (heldSink) Append(context.Context, []audit.Entry, audit.Checkpoint) ([][]byte, error) {
	return nil, errHeldOnly
}

var errHeldOnly = errors.New("doctor changes nothing")

func (d *doctor) sink(name string, err error) {
	switch {
	case audit.SetBack(err):
		d.fail(name, rollbackRemedy, "%v", err)
	case err != nil:
		d.fail(name, "no key is released until it answers", "%v", err)
	default:
		d.ok(name, "the log extends what it holds")
	}
}

// replicas compares the replicas that live with each other and with this
// configuration.
func (d *doctor) replicas(ctx context.Context, db *sqlstore.DB, revision string) {
	live, err := db.Replicas(ctx)
	ahead, clockErr := db.ClockAhead(ctx)
	if err := errors.Join(err, clockErr); err != nil {
		d.fail("replicas", "see the database's own log", "%v", err)
		return
	}
	d.clock("the database's", ahead, clockDoubt)
	d.connections(ctx, db, len(live))
	mine := sqlstore.Replica{Version: d.version, Policy: revision, Max: d.cfg.Max}
	differing := 0
	for _, r := range live {
		if differences := differ(r, mine); len(differences) > 0 {
			differing++
			d.warn("replicas", "give all replicas one configuration and version; during a rolling upgrade this passes",
				"%s differs from this configuration: %s", r.Address, strings.Join(differences, ", "))
		}
		if r.ClockAhead.Abs() > clockDoubt {
			d.warn("replicas", "have every machine follow NTP", "%s: its clock is %s from the database's", r.Address, r.ClockAhead.Round(time.Millisecond))
		}
	}
	if differing == 0 {
		d.ok("replicas", "%d running, all alike", len(live))
	}
}

// connections compares what all replicas may open with what PostgreSQL gives.
func (d *doctor) connections(ctx context.Context, db *sqlstore.DB, replicas int) {
	given, err := db.Connections(ctx)
	if err != nil {
		d.fail("connections", "see the database's own log", "%v", err)
		return
	}
	replicas = max(replicas, 1)
	wanted := replicas * d.cfg.DatabaseConnections
	if db.ThroughPooler() {
		d.ok("connections", "%d replicas may open %d to the pooler: see that its max_client_conn and pool sizes suffice", replicas, wanted)
		return
	}
	if wanted > given {
		d.warn("connections", "raise max_connections in postgresql.conf, lower ORGKEYS_DATABASE_CONNECTIONS, or run fewer replicas; a rolling restart needs room for one more",
			"%d replicas may open %d, and PostgreSQL gives %d", replicas, wanted, given)
		return
	}
	d.ok("connections", "%d replicas may open %d of the %d that PostgreSQL gives", replicas, wanted, given)
}

func differ(r, mine sqlstore.Replica) []string {
	var all []string
	if r.Max != mine.Max {
		all = append(all, fmt.Sprintf("ORGKEYS_MAX is %d, not %d", r.Max, mine.Max))
	}
	if mine.Policy != "" && r.Policy != mine.Policy {
		all = append(all, fmt.Sprintf("its policy is %s, not %s", r.Policy, mine.Policy))
	}
	if r.Version != mine.Version {
		all = append(all, fmt.Sprintf("its version is %q, not %q", r.Version, mine.Version))
	}
	return all
}
