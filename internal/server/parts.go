package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/orgkeys/orgkeys/internal/api"
	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authn"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/hsm"
	"github.com/orgkeys/orgkeys/internal/keypool"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/privatefile"
	"github.com/orgkeys/orgkeys/internal/redislock"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/internal/tpm"
	"github.com/orgkeys/orgkeys/internal/vault"
	"github.com/orgkeys/orgkeys/policies"
)

// backend is what makes and seals keys.
type backend struct {
	name     string
	keystore orgkey.Keystore
	sealed   orgkey.SealedKeystore
	sealer   orgkey.Sealer
	sink     audit.Sink // nil: the back end is no audit sink
	signer   audit.Signer
	healthy  func(context.Context) error
	pool     func(keypool.Config) keyPool
	mark     func() string               // of the credentials in use; empty: it is not known
	reap     func(context.Context) error // clears what crashes left in the back end, until ctx ends
	close    func() error
}

// keyPool has keys that were made ahead.
type keyPool interface {
	orgkey.Pool
	enroll.Pool
	prometheus.Collector
	Run(context.Context) error
}

// sinks are the audit sinks that cfg requires, each of which can be written to.
func (b backend) sinks(cfg config.Config) ([]audit.Sink, error) {
	if slices.Contains(cfg.AuditSinks, config.SinkFile) {
		if err := checkSinkFile(cfg.AuditFile); err != nil {
			return nil, err
		}
	}
	return Sinks(cfg, b.sink)
}

// askedSinks are the same, of which a file is only read.
func (b backend) askedSinks(cfg config.Config) ([]audit.Sink, error) {
	all, err := Sinks(cfg, b.sink)
	for i, s := range all {
		if s.Name() == config.SinkFile {
			all[i] = audit.AskFileSink(cfg.AuditFile)
		}
	}
	return all, err
}

// Sinks are the audit sinks that cfg requires. own is the keystore's; nil: it has none.
func Sinks(cfg config.Config, own audit.Sink) ([]audit.Sink, error) {
	var all []audit.Sink
	for _, name := range cfg.AuditSinks {
		switch {
		case name == config.SinkFile:
			all = append(all, audit.NewFileSink(cfg.AuditFile))
		case own != nil && name == own.Name():
			all = append(all, own)
		default:
			return nil, fmt.Errorf("ORGKEYS_AUDIT_SINKS: the keystore %s has no sink %q", cfg.Keystore, name)
		}
	}
	return all, nil
}

// checkSinkFile reports a file that this process cannot write: no key would ever
// leave. One for which the disk has no room passes, since that may end.
func checkSinkFile(path string) error {
	_, missing := os.Stat(path)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return nil
	case err != nil:
		return fmt.Errorf("ORGKEYS_AUDIT_FILE cannot be written: %w; under systemd, ReadWritePaths= of the unit has to name its directory", err)
	}
	if missing != nil { // the sink makes its file itself, with the first event
		err = os.Remove(path)
	}
	return errors.Join(err, f.Close())
}

func openBackend(ctx context.Context, cfg config.Config, dir string, db *sqlstore.DB, log *slog.Logger) (backend, error) {
	if err := HideMemory(); err != nil {
		return backend{}, fmt.Errorf("keeping memory private: %w", err)
	}
	if cfg.Keystore == config.KeystoreVault {
		return openVault(ctx, cfg, db, log)
	}
	return openHSM(ctx, cfg, dir, db, log)
}

// openHSM opens the token that cfg names, or the default SoftHSM token. It makes
// neither a token nor a sealing key if the database holds sealed records: then a token
// without a sealing key is the wrong token.
func openHSM(ctx context.Context, cfg config.Config, dir string, db *sqlstore.DB, log *slog.Logger) (backend, error) {
	sealed, err := db.HasSealed(ctx)
	if err != nil {
		return backend{}, err
	}
	hc := HSMConfig(cfg, dir)
	hc.CreateSealingKey = !sealed
	switch {
	case cfg.PINFile == "":
		if _, err := os.Stat(filepath.Join(dir, "tokens")); sealed && errors.Is(err, os.ErrNotExist) {
			return backend{}, fmt.Errorf("the database holds records sealed by a SoftHSM token, but %s is missing: restore tokens and pin", filepath.Join(dir, "tokens"))
		}
		hc, _, err = hsm.InitSoftHSM(dir)
	case hc.Module == "":
		hc.Module, err = hsm.FindSoftHSM()
	}
	if err != nil {
		return backend{}, err
	}
	hc.Log, hc.Register = log, db
	token, err := hsm.Open(ctx, hc)
	if errors.Is(err, hsm.ErrNoSealingKey) {
		err = fmt.Errorf("%w, but the database holds sealed records: this is not the token that sealed them", err)
	}
	if err == nil && cfg.PINFile == "" {
		if err = hsm.KeepSoftHSM(dir); err != nil {
			err = errors.Join(fmt.Errorf("keeping a copy of the token's record: %w", err), token.Close())
		}
	}
	if err != nil {
		return backend{}, err
	}
	return backend{
		name: config.KeystorePKCS11, keystore: token, sealed: token, sealer: token, healthy: token.Healthy,
		signer: &hsmSigner{token: token, sealer: token, db: db},
		pool:   func(c keypool.Config) keyPool { return keypool.NewLocal(c, db, token) },
		mark:   func() string { return "" },                // a login's pool keys end with it
		reap:   func(context.Context) error { return nil }, // session objects go with their process
		close:  token.Close,
	}, nil
}

// HSMConfig is the token that cfg names.
func HSMConfig(cfg config.Config, dir string) hsm.Config {
	t := cfg.Token
	return hsm.Config{
		Module: cfg.PKCS11Module, InitArgs: t.InitArgs, PINFile: cfg.PINFile, AttemptFile: hsm.AttemptFile(dir),
		TokenLabel: t.Label, TokenSerial: t.Serial, TokenManufacturer: t.Manufacturer, TokenModel: t.Model, Slot: t.Slot,
		KeyLabel: t.KeyLabel, KeyID: t.KeyID,
	}
}

// openVaultClient logs in to Vault and refuses one that is not set up as it must be.
func openVaultClient(ctx context.Context, cfg config.Config, db *sqlstore.DB, log *slog.Logger) (*vault.Client, error) {
	client, err := vault.Open(ctx, vault.Config{Login: VaultLogin(cfg), ReapGrace: cfg.ReservationTTL, Live: db.Needed, Traces: db, Log: log})
	if err != nil {
		return nil, err
	}
	var fatal []error
	for _, finding := range client.Check(ctx) {
		if finding.Fatal {
			fatal = append(fatal, errors.New(finding.String()))
			continue
		}
		log.Warn("Vault", "problem", finding.Problem, "remedy", finding.Remedy)
	}
	if len(fatal) > 0 {
		client.Close()
		return nil, errors.Join(fatal...)
	}
	return client, nil
}

func openVault(ctx context.Context, cfg config.Config, db *sqlstore.DB, log *slog.Logger) (backend, error) {
	client, err := openVaultClient(ctx, cfg, db, log)
	if err != nil {
		return backend{}, err
	}
	sink := client.Sink()
	sink.Keys = func(ctx context.Context, keys audit.ReceiptKeys) error {
		known, err := db.ReceiptKeys(ctx)
		if err == nil {
			err = keys.Replace(sink.Name(), known)
		}
		if err != nil {
			return err
		}
		return db.KeepReceiptKeys(ctx, sink.Name(), keys)
	}
	keys, err := client.ReceiptKeys(ctx)
	if err == nil {
		err = sink.Keys(ctx, keys)
	}
	if err != nil {
		client.Close()
		return backend{}, err
	}
	return backend{
		name: config.KeystoreVault, keystore: client.Keystore(), sealed: client.Keystore(), sealer: client.Sealer(), sink: sink, signer: sink,
		pool: func(c keypool.Config) keyPool { return keypool.NewShared(c, db, client.Keystore(), client.Sealer()) },
		mark: client.Keystore().Credentials, healthy: client.Healthy, close: func() error { client.Close(); return nil },
		reap: func(ctx context.Context) error { client.ReapEvery(ctx, reapInterval(cfg), db.Needed); return nil },
	}, nil
}

// reapInterval is short, so that a key that a crash left in Transit is deleted soon
// after its reservation has expired.
func reapInterval(cfg config.Config) time.Duration { return max(time.Second, cfg.ReservationTTL/2) }

// VaultLogin is how the settings say to log in to Vault.
func VaultLogin(cfg config.Config) vault.Login {
	if cfg.VaultAuth == config.VaultTokenFile {
		return &vault.TokenFile{Path: cfg.VaultTokenFile}
	}
	return &vault.AppRole{RoleIDFile: cfg.VaultRoleIDFile, SecretIDFile: cfg.VaultSecretIDFile, WrappedAt: cfg.VaultSecretIDPath}
}

// policy is the embedded policy, or the one in a directory that is followed.
type policy struct {
	decider
	current func() *authz.Policy
	follow  func(ctx context.Context, keep func(context.Context, *authz.Policy) error)
}

type decider interface {
	Decide(context.Context, authz.Request) (authz.Decision, error)
	Revision() string
	authn.Rules
}

func openPolicy(ctx context.Context, cfg config.Config, log *slog.Logger) (policy, error) {
	if cfg.PolicyDir == "" {
		p, err := authz.Load(ctx, policies.Files)
		return policy{p, func() *authz.Policy { return p }, func(context.Context, func(context.Context, *authz.Policy) error) {}}, err
	}
	d, err := authz.Open(ctx, cfg.PolicyDir)
	if err != nil {
		return policy{}, fmt.Errorf("ORGKEYS_POLICY_DIR: %w", err)
	}
	return policy{d, d.Current, func(ctx context.Context, keep func(context.Context, *authz.Policy) error) {
		d.Follow(ctx, keep, func(revision string, err error) {
			if err != nil {
				log.Error("the changed policy directory cannot be used; the previous policy stays in force", "policy", revision, "error", err)
				return
			}
			log.Info("policy replaced", "policy", revision)
		})
	}}, nil
}

// OpenVerifier returns the token verifier of the settings, for commands that do not
// serve requests: it does not replace subjects by pseudonyms.
func OpenVerifier(ctx context.Context, cfg config.Config, log *slog.Logger) (*authn.Verifier, error) {
	if cfg.Development() {
		if _, err := authn.FindDevIssuer(cfg.DataDir); err != nil { // which openTokens would make
			return nil, fmt.Errorf("%w (orgkeys serve and orgkeys token make it)", err)
		}
	}
	p, err := openPolicy(ctx, cfg, log)
	if err != nil {
		return nil, err
	}
	return openTokens(cfg, cfg.DataDir, p, log)
}

// openTokens returns who may call.
func openTokens(cfg config.Config, dir string, rules authn.Rules, log *slog.Logger) (*authn.Verifier, error) {
	issuers, err := tokenIssuers(cfg, dir, log)
	if err != nil {
		return nil, err
	}
	return authn.New(rules, issuers...)
}

func tokenIssuers(cfg config.Config, dir string, log *slog.Logger) ([]authn.Issuer, error) {
	if cfg.Development() {
		development, err := authn.OpenDevIssuer(dir)
		if err != nil {
			return nil, err
		}
		log.Warn("tokens come from the development issuer: anybody who can read the data directory can impersonate anybody")
		issuer, err := development.Issuer()
		return []authn.Issuer{issuer}, err
	}
	configured, err := authn.Configured(cfg)
	if err != nil {
		return nil, err
	}
	return authn.Open(configured, cfg.JWKSInterval, log)
}

// RedisConfig is how the settings say that Redis is reached.
func RedisConfig(cfg config.Config) redislock.Config {
	return redislock.Config{URL: cfg.RedisURL, CAFile: cfg.RedisCAFile, CertFile: cfg.RedisCertFile, KeyFile: cfg.RedisKeyFile}
}

// locker keeps concurrent reservations of an organization in order: within the
// process, or on Redis among replicas.
type locker struct {
	orgkey.Locker
	checks  []api.Check
	metrics []prometheus.Collector
	close   func() error
}

func openLocker(cfg config.Config, log *slog.Logger) (locker, error) {
	if cfg.RedisURL == "" {
		return locker{Locker: orgkey.NewLocalLock(), close: func() error { return nil }}, nil
	}
	l, err := redislock.Open(RedisConfig(cfg), log)
	if err != nil {
		return locker{}, fmt.Errorf("opening the lock on Redis: %w", err)
	}
	return locker{l, []api.Check{{Name: "redis", Ask: l.Healthy, Optional: true}}, []prometheus.Collector{l.Outcomes()}, l.Close}, nil
}

// maxRoots is the longest file of makers of TPMs, in bytes.
const maxRoots = 4 << 20

// TPMRoots reads the authorities whose certificates of endorsement keys are
// believed. Without a path there are none.
func TPMRoots(path string) (tpm.Roots, error) {
	if path == "" {
		return tpm.Roots{}, nil
	}
	text, err := privatefile.Read(path, maxRoots, privatefile.Everybody)
	if err != nil {
		return tpm.Roots{}, fmt.Errorf("ORGKEYS_TPM_ROOTS_FILE: %w", err)
	}
	roots, err := tpm.ReadRoots(text)
	if err != nil {
		return tpm.Roots{}, fmt.Errorf("ORGKEYS_TPM_ROOTS_FILE %s: %w", path, err)
	}
	return roots, nil
}
