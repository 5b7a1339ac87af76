// Package config reads the settings: environment variables, and the same names
// in a file. An unknown setting, an empty one, or two that contradict
// each other stop the program with a message that says what to do.
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/orgkeys/orgkeys/internal/privatefile"
)

// Config is every setting, read and checked.
type Config struct {
	Listen          string
	AdminListen     string
	DataDir         string
	Max             int
	MaxNodeKeys     int
	DeliveryTTL     time.Duration
	TPMRootsFile    string // certificates of the authorities of TPMs; empty: none is believed
	MaxGenerations  int
	ReservationTTL  time.Duration
	Pool            int // keys made ahead
	ShutdownNotice  time.Duration
	ShutdownTimeout time.Duration
	LogLevel        string

	Keystore     string // KeystorePKCS11 or KeystoreVault
	PKCS11Module string // empty: SoftHSM's
	Token        Token
	PINFile      string // empty: a SoftHSM token that the service makes in DataDir

	VaultAuth         string // VaultAppRole or VaultTokenFile
	VaultRoleIDFile   string
	VaultSecretIDFile string
	VaultSecretIDPath string
	VaultTokenFile    string

	DatabaseURL         string // empty: SQLite in DataDir
	DatabaseConnections int    // at most
	RedisURL            string // empty: the lock is in the process
	RedisCAFile         string // empty: the system's authorities
	RedisCertFile       string // empty: no client certificate
	RedisKeyFile        string

	Issuer       string // empty: the development issuer
	Audience     string
	JWKS         string // empty: found through the issuer's metadata
	JWKSCAFile   string
	JWKSInterval time.Duration
	ClaimSubject string
	ClaimOrg     string
	ClaimRole    string
	RoleMap      string
	RoleDefault  string
	Pseudonyms   string // PseudonymAddresses, PseudonymAlways or PseudonymNever
	IssuersFile  string // several issuers, in place of all of these but JWKSInterval

	PolicyDir          string // empty: the embedded policy
	AuditSinks         []string
	AuditFile          string
	AuditDeadline      time.Duration
	AuditArchive       string // empty: the log stays in the database
	S3Endpoint         string // of an archive in a bucket; what follows, too
	S3Region           string
	S3CAFile           string
	S3AccessKey        string
	S3SecretKey        string
	AuditRetention     time.Duration // of entries in the archive; 0: for ever
	CheckpointInterval time.Duration

	TimestampWindow time.Duration

	TLSCertFile    string
	TLSKeyFile     string
	ClientCAFile   string
	TLSByProxy     bool
	TrustedProxies []netip.Prefix
	CORSOrigins    []string

	Console             string // "true" or "false"; see HasConsole
	ConsoleURL          string
	ConsoleClientID     string
	ConsoleClientSecret string
	ConsoleScopes       []string
	ConsoleResource     string
	ConsoleAudience     string
	ConsoleIssuer       string // with IssuersFile; else Issuer

	// Libraries are variables of the file that libraries read; the environment
	// does not have them.
	Libraries map[string]string
}

// Values of settings.
const (
	KeystorePKCS11 = "pkcs11"
	KeystoreVault  = "vault"
	VaultAppRole   = "approle"
	VaultTokenFile = "token_file"
	// Whose subject is replaced by a pseudonym in events.
	PseudonymAddresses = "addresses"
	PseudonymAlways    = "always"
	PseudonymNever     = "never"

	defaultAuditDeadline = 10 * time.Second

	defaultSubject = "sub"
	defaultOrg     = "org_id"
	defaultRole    = "org_role"
	SinkFile       = "file"
	SinkVault      = "vault"
)

// Load reads environ, in the form of os.Environ, and the file if one is named. The
// environment takes precedence.
func Load(environ []string, file string) (Config, error) {
	given, from := map[string]string{}, origin{}
	if file != "" {
		var err error
		if given, from, err = fromFile(file); err != nil {
			return Config{}, err
		}
	}
	libraries := takeLibraries(given)
	for _, pair := range environ {
		name, value, _ := strings.Cut(pair, "=")
		delete(libraries, name)
		if strings.HasPrefix(name, prefix) && !forScripts(name) && !byKubernetes(name, value) {
			given[name] = value
			delete(from, name)
		}
	}
	names := slices.Collect(maps.Keys(given))
	c, err := parse(given, from)
	if err != nil {
		return Config{}, err
	}
	c.Libraries = libraries
	return c, from.locate(errors.Join(c.check(), c.ignored(names)))
}

// forLibraries are the variables that libraries read which orgkeys loads or
// links. The file may set them, because the systemd unit reads no other file.
// A name that ends in _ is a prefix.
var forLibraries = []string{
	"SOFTHSM2_CONF", "NSS_", "P11_KIT_", "XDG_CONFIG_HOME", "PKCS11SPY", "PKCS11SPY_", "OPENCRYPTOKI_", "TPM2_PKCS11_",
	"CLOUDHSM_", "ChrystokiConfigurationPath", "CKNFAST_", "NFAST_", "YUBIHSM_PKCS11_", "KMS_PKCS11_CONFIG", "GOOGLE_APPLICATION_CREDENTIALS",
	"VAULT_", "SSL_CERT_FILE", "SSL_CERT_DIR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "PGSSLROOTCERT", "PGSSLCERT", "PGSSLKEY", "PGPASSFILE", "TZ",
}

func forLibrary(name string) bool {
	return slices.ContainsFunc(forLibraries, func(known string) bool {
		return name == known || strings.HasSuffix(known, "_") && strings.HasPrefix(name, known)
	})
}

// takeLibraries moves the variables of libraries out of given.
func takeLibraries(given map[string]string) map[string]string {
	taken := map[string]string{}
	for name, value := range given {
		if forLibrary(name) {
			taken[name] = value
			delete(given, name)
		}
	}
	return taken
}

const prefix = "ORGKEYS_"

// maxFile is the size limit, in bytes, of the file of settings and of a file with one value.
const maxFile = 1 << 20

// forScripts reports whether a name is used by the scripts and tests only. The
// program may find it in its environment and ignores it.
func forScripts(name string) bool {
	return name == "ORGKEYS_CACHE" || strings.HasPrefix(name, "ORGKEYS_TEST_")
}

// parse sets defaults, then what is given. Errors name the setting, where it was
// given, and its value unless that may be a secret.
func parse(given map[string]string, from origin) (Config, error) {
	var c Config
	var errs []error
	names := slices.Collect(maps.Keys(given))
	for _, s := range settings {
		value, err := s.value(given)
		if err == nil && value != "" {
			err = s.set(&c, value)
		}
		if err != nil {
			errs = append(errs, from.locate(fmt.Errorf("%s: %w", s.shown(given), err)))
		}
		delete(given, s.Name)
		if s.Secret {
			delete(given, s.Name+"_FILE")
		}
	}
	for name := range given {
		errs = append(errs, from.locate(fmt.Errorf("%s is not a setting: see orgkeys serve --help", name)))
	}
	for _, name := range names {
		if k := keystoreOf(name); k != "" && c.Keystore != "" && k != c.Keystore {
			errs = append(errs, from.locate(fmt.Errorf("%s is only for ORGKEYS_KEYSTORE=%s, but ORGKEYS_KEYSTORE is %s", name, k, c.Keystore)))
		}
	}
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return c, errors.Join(errs...)
}

// keystoreOf is the keystore that a setting is for, or empty.
func keystoreOf(name string) string {
	switch {
	case strings.HasPrefix(name, prefix+"PKCS11_"):
		return KeystorePKCS11
	case strings.HasPrefix(name, prefix+"VAULT_"):
		return KeystoreVault
	}
	return ""
}

// shown is the setting with its value, unless the value is empty or may hold a
// secret, such as an address with a user name or a text pasted into the wrong line.
func (s Setting) shown(given map[string]string) string {
	const longest = 16
	value := given[s.Name]
	if s.Secret || strings.TrimSpace(value) == "" || strings.Contains(value, "@") || len(value) > longest {
		return s.Name
	}
	return fmt.Sprintf("%s=%q", s.Name, value)
}

var errEmpty = errors.New("is set but empty: give it a value, or unset it for the default")

func (s Setting) value(given map[string]string) (string, error) {
	value, ok := given[s.Name]
	path, fileOK := given[s.Name+"_FILE"]
	switch {
	case ok && s.Secret && fileOK:
		return "", fmt.Errorf("is given twice, also as %s_FILE", s.Name)
	case ok && strings.TrimSpace(value) == "":
		return "", errEmpty
	case ok && strings.TrimSpace(value) != value:
		return "", errors.New("begins or ends with a blank")
	case ok:
		return value, nil
	case s.Secret && fileOK:
		b, err := privatefile.Read(path, maxFile, privatefile.Owner)
		if err != nil {
			return "", err
		}
		if value = strings.TrimSpace(string(b)); value == "" {
			return "", fmt.Errorf("%s, which %s_FILE names, is empty", path, s.Name)
		}
		return value, nil
	}
	return s.Default, nil
}

// check refuses settings that contradict each other, and completes the rest.
func (c *Config) check() error {
	c.fill()
	if err := c.fillToken(); err != nil {
		return err
	}
	if !Loopback(c.AdminListen) {
		return fmt.Errorf("ORGKEYS_ADMIN_LISTEN is %s: it must be a loopback address such as 127.0.0.1:4000, because the admin listener has no authentication", c.AdminListen)
	}
	// A generation, and the server's connections, end at half of the reservation's life anyhow.
	if c.AuditDeadline > defaultAuditDeadline && c.AuditDeadline > c.ReservationTTL/2 {
		return fmt.Errorf("ORGKEYS_AUDIT_DEADLINE is %s, but a generation times out after half of ORGKEYS_RESERVATION_TTL, which is %s: lower the one, or raise the other to %s", c.AuditDeadline, c.ReservationTTL, 2*c.AuditDeadline)
	}
	return errors.Join(c.checkTokens(), c.checkStorage(), c.checkSinks(), c.checkArchive(), c.checkVault(), c.checkConsole())
}

func (c *Config) fill() {
	if c.AuditFile == "" {
		c.AuditFile = filepath.Join(c.DataDir, "audit.jsonl")
	}
	if c.AuditSinks == nil {
		c.AuditSinks = []string{SinkFile}
		if c.Keystore == KeystoreVault {
			c.AuditSinks = []string{SinkVault, SinkFile}
		}
	}
	if c.AdminListen == "" {
		c.AdminListen = adminListen(c.Listen)
	}
}

// adminListen is loopback on the port + 1000; with port 0, any.
func adminListen(listen string) string {
	_, port, err := net.SplitHostPort(listen)
	n, numErr := strconv.Atoi(port)
	if err != nil || numErr != nil || n == 0 || n+1000 > 65535 {
		return "127.0.0.1:0"
	}
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(n+1000))
}

func (c *Config) checkTokens() error {
	const missing = "configure ORGKEYS_ISSUER and ORGKEYS_AUDIENCE, or ORGKEYS_ISSUERS_FILE"
	about := c.aboutOneIssuer()
	switch {
	case c.IssuersFile != "" && c.Issuer != "":
		return errors.New("ORGKEYS_ISSUERS_FILE and ORGKEYS_ISSUER are both set: unset one of them")
	case c.IssuersFile != "" && about != nil:
		return fmt.Errorf("ORGKEYS_ISSUERS_FILE holds all settings of its issuers: unset %s", strings.Join(about, ", "))
	case c.Issuer != "" && c.Audience == "":
		return errors.New("ORGKEYS_ISSUER and ORGKEYS_AUDIENCE belong together: set both, or neither for the development issuer")
	case c.Issuer == "" && c.IssuersFile == "" && about != nil:
		return fmt.Errorf("%s: needs ORGKEYS_ISSUER, which is not set: set it too, or unset these for the development issuer", strings.Join(about, ", "))
	case c.Development() && c.TLSByProxy:
		return errors.New("ORGKEYS_TLS_BY_PROXY=true means that other machines have access through a proxy, but the development issuer is for this machine only: " + missing)
	case c.Development() && !Loopback(c.Listen):
		return fmt.Errorf("the development issuer is for loopback addresses only, but ORGKEYS_LISTEN is %s: "+missing, c.Listen)
	}
	return nil
}

// aboutOneIssuer returns the settings about the tokens of ORGKEYS_ISSUER that are given.
func (c *Config) aboutOneIssuer() (names []string) {
	for _, s := range []struct{ name, value, otherwise string }{
		{"ORGKEYS_AUDIENCE", c.Audience, ""},
		{"ORGKEYS_JWKS", c.JWKS, ""},
		{"ORGKEYS_JWKS_CA_FILE", c.JWKSCAFile, ""},
		{"ORGKEYS_CLAIM_SUBJECT", c.ClaimSubject, defaultSubject},
		{"ORGKEYS_CLAIM_ORG", c.ClaimOrg, defaultOrg},
		{"ORGKEYS_CLAIM_ROLE", c.ClaimRole, defaultRole},
		{"ORGKEYS_ROLE_MAP", c.RoleMap, ""},
		{"ORGKEYS_ROLE_DEFAULT", c.RoleDefault, ""},
	} {
		if s.value != s.otherwise {
			names = append(names, s.name)
		}
	}
	return names
}

// Development reports whether the development issuer signs the tokens.
func (c *Config) Development() bool { return c.Issuer == "" && c.IssuersFile == "" }

// HasConsole reports whether the console is served.
func (c *Config) HasConsole() bool {
	return c.Console == "true" || c.Console == "" && c.Development()
}

func (c *Config) checkConsole() error {
	switch {
	case c.Development() || !c.HasConsole():
		return nil // ignored reports what would have no effect
	case c.ConsoleURL == "" || c.ConsoleClientID == "":
		return errors.New("ORGKEYS_CONSOLE=true needs ORGKEYS_CONSOLE_URL and ORGKEYS_CONSOLE_CLIENT_ID: where browsers reach the service, and as which client people sign in at the provider")
	case c.IssuersFile != "" && c.ConsoleIssuer == "":
		return errors.New("ORGKEYS_CONSOLE=true with ORGKEYS_ISSUERS_FILE needs ORGKEYS_CONSOLE_ISSUER: the issuer that people sign in at")
	case c.IssuersFile == "" && c.ConsoleIssuer != "":
		return errors.New("ORGKEYS_CONSOLE_ISSUER is for ORGKEYS_ISSUERS_FILE: people sign in at ORGKEYS_ISSUER")
	case strings.HasPrefix(c.ConsoleURL, "http:") && (c.TLSCertFile != "" || c.TLSByProxy):
		return errors.New("ORGKEYS_CONSOLE_URL is http, but the service is reached over TLS: it begins with https")
	}
	return nil
}

// Loopback reports whether a listener's address is reachable from this host only.
func Loopback(listen string) bool {
	host, _, err := net.SplitHostPort(listen)
	if err != nil {
		return false
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.IsLoopback() || host == "localhost"
}

func (c *Config) checkArchive() error {
	if c.AuditRetention > 0 && c.AuditArchive == "" {
		return errors.New("ORGKEYS_AUDIT_RETENTION is about the entries of an archive: set ORGKEYS_AUDIT_ARCHIVE too")
	}
	inBucket := strings.HasPrefix(c.AuditArchive, "s3://")
	switch {
	case inBucket && (c.S3Endpoint == "" || c.S3AccessKey == "" || c.S3SecretKey == ""):
		return errors.New("ORGKEYS_AUDIT_ARCHIVE is in a bucket: set ORGKEYS_AUDIT_S3_ENDPOINT, ORGKEYS_AUDIT_S3_ACCESS_KEY and ORGKEYS_AUDIT_S3_SECRET_KEY_FILE too")
	case !inBucket && (c.S3Endpoint != "" || c.S3Region != "" || c.S3CAFile != "" || c.S3AccessKey != "" || c.S3SecretKey != ""):
		return errors.New("the settings ORGKEYS_AUDIT_S3_… are for an ORGKEYS_AUDIT_ARCHIVE such as s3://bucket/prefix")
	}
	return nil
}

func (c *Config) checkStorage() error {
	if c.DatabaseURL != "" && c.RedisURL == "" {
		return errors.New("with ORGKEYS_DATABASE_URL several replicas may share the database, so ORGKEYS_REDIS_URL must be set too")
	}
	for name, file := range map[string]string{"ORGKEYS_REDIS_CA_FILE": c.RedisCAFile, "ORGKEYS_REDIS_CERT_FILE": c.RedisCertFile} {
		if file != "" && !strings.HasPrefix(c.RedisURL, "rediss://") {
			return fmt.Errorf("%s is for TLS, which needs ORGKEYS_REDIS_URL=rediss://…", name)
		}
	}
	if (c.RedisCertFile == "") != (c.RedisKeyFile == "") {
		return errors.New("ORGKEYS_REDIS_CERT_FILE and ORGKEYS_REDIS_KEY_FILE belong together: set both, or neither")
	}
	if c.PKCS11Module != "" && c.PINFile == "" {
		return errors.New("ORGKEYS_PKCS11_MODULE needs ORGKEYS_PKCS11_PIN_FILE: only the default SoftHSM token is set up without one")
	}
	if c.Token != (Token{Label: defaultTokenLabel}) && c.PINFile == "" && c.Keystore == KeystorePKCS11 {
		return errors.New("ORGKEYS_PKCS11_TOKEN_LABEL, _TOKEN_SERIAL, _SLOT, _URI and _INIT_ARGS select an existing token and need ORGKEYS_PKCS11_PIN_FILE: without it the default SoftHSM token is used")
	}
	if c.DatabaseURL == "" && c.RedisURL != "" {
		return errors.New("ORGKEYS_REDIS_URL is for several replicas, which share a database: set ORGKEYS_DATABASE_URL too")
	}
	if c.PolicyDir != "" {
		if info, err := os.Stat(c.PolicyDir); errors.Is(err, fs.ErrNotExist) || err == nil && !info.IsDir() {
			return fmt.Errorf("ORGKEYS_POLICY_DIR: %s is not a directory", c.PolicyDir)
		}
	}
	return nil
}

// ignored reports settings that were given and would have no effect.
func (c *Config) ignored(given []string) error {
	var errs []error
	noProvider, why := c.Development() || !c.HasConsole(), "ORGKEYS_CONSOLE is not true"
	if c.Development() {
		why = "the development issuer's tokens are what people sign in to the console with"
	}
	for _, i := range []struct {
		name    string
		without bool
		why     string
	}{
		{"ORGKEYS_AUDIT_FILE", !slices.Contains(c.AuditSinks, SinkFile), "ORGKEYS_AUDIT_SINKS does not name file"},
		{"ORGKEYS_JWKS_INTERVAL", c.Development(), "the development issuer has no JWKS"},
		{"ORGKEYS_VAULT_TOKEN_FILE", c.VaultAuth == VaultAppRole, "ORGKEYS_VAULT_AUTH is approle"},
		{"ORGKEYS_VAULT_ROLE_ID_FILE", c.VaultAuth == VaultTokenFile, "ORGKEYS_VAULT_AUTH is token_file"},
		{"ORGKEYS_VAULT_SECRET_ID_FILE", c.VaultAuth == VaultTokenFile, "ORGKEYS_VAULT_AUTH is token_file"},
		{"ORGKEYS_VAULT_SECRET_ID_PATH", c.VaultAuth == VaultTokenFile, "ORGKEYS_VAULT_AUTH is token_file"},
		{"ORGKEYS_CONSOLE_URL", noProvider, why},
		{"ORGKEYS_CONSOLE_CLIENT_ID", noProvider, why},
		{"ORGKEYS_CONSOLE_CLIENT_SECRET", noProvider, why},
		{"ORGKEYS_CONSOLE_CLIENT_SECRET_FILE", noProvider, why},
		{"ORGKEYS_CONSOLE_SCOPES", noProvider, why},
		{"ORGKEYS_CONSOLE_RESOURCE", noProvider, why},
		{"ORGKEYS_CONSOLE_AUDIENCE", noProvider, why},
		{"ORGKEYS_CONSOLE_ISSUER", noProvider, why},
		{"ORGKEYS_TLS_KEY_FILE", c.TLSCertFile == "", "ORGKEYS_TLS_CERT_FILE is not set"},
		{"ORGKEYS_TLS_CLIENT_CA_FILE", c.TLSCertFile == "", "ORGKEYS_TLS_CERT_FILE is not set"},
	} {
		if i.without && slices.Contains(given, i.name) {
			errs = append(errs, fmt.Errorf("%s would have no effect, because %s: unset one, or change the other", i.name, i.why))
		}
	}
	return errors.Join(errs...)
}

// checkFile refuses a path at which no file can be made. Otherwise only the
// server's log would show it, after the start.
func checkFile(setting, path string) error {
	if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() {
		return fmt.Errorf("%s: %s is not a regular file", setting, path)
	}
	dir := filepath.Dir(path)
	switch info, err := os.Stat(dir); {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s: there is no directory %s", setting, dir)
	case err != nil:
		return fmt.Errorf("%s: %w", setting, err)
	case !info.IsDir():
		return fmt.Errorf("%s: %s is not a directory", setting, dir)
	}
	return nil
}

func (c *Config) checkSinks() error {
	for i, s := range c.AuditSinks {
		if s != SinkFile && s != SinkVault || slices.Contains(c.AuditSinks[:i], s) {
			return fmt.Errorf("ORGKEYS_AUDIT_SINKS: item %d: it is a list of %s and %s, each at most once", i+1, SinkFile, SinkVault)
		}
	}
	if filepath.Dir(c.AuditFile) != filepath.Clean(c.DataDir) && slices.Contains(c.AuditSinks, SinkFile) {
		if err := checkFile("ORGKEYS_AUDIT_FILE", c.AuditFile); err != nil {
			return err
		}
	}
	if slices.Contains(c.AuditSinks, SinkVault) && c.Keystore != KeystoreVault {
		return errors.New("ORGKEYS_AUDIT_SINKS names vault, which needs ORGKEYS_KEYSTORE=vault")
	}
	return nil
}

func (c *Config) checkVault() error {
	if c.Keystore != KeystoreVault {
		return nil
	}
	switch {
	case c.VaultAuth == VaultAppRole && (c.VaultRoleIDFile == "" || c.VaultSecretIDFile == ""):
		return errors.New("ORGKEYS_VAULT_AUTH=approle needs ORGKEYS_VAULT_ROLE_ID_FILE and ORGKEYS_VAULT_SECRET_ID_FILE: vault/setup writes both")
	case c.VaultAuth == VaultTokenFile && c.VaultTokenFile == "":
		return errors.New("ORGKEYS_VAULT_AUTH=token_file needs ORGKEYS_VAULT_TOKEN_FILE, the file that Vault Agent's sink writes")
	}
	return nil
}
