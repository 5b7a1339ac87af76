package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/orgkeys/orgkeys/internal/pkcs11uri"
)

// Setting is one environment variable.
type Setting struct {
	Name    string
	Default string // empty: none, or as Doc says
	Doc     string
	Secret  bool // may also be given as NAME_FILE, the path of a private file

	set func(*Config, string) error
}

// Settings returns every setting, in the order in which they are documented.
func Settings() []Setting { return append([]Setting(nil), settings...) }

// settings is read only.
var settings = []Setting{
	{Name: "ORGKEYS_LISTEN", Default: "127.0.0.1:3000", Doc: "address of the API", set: address(func(c *Config) *string { return &c.Listen })},
	{Name: "ORGKEYS_ADMIN_LISTEN", Doc: "address of /metrics and the detailed /readyz; default loopback, the API's port + 1000", set: address(func(c *Config) *string { return &c.AdminListen })},
	{Name: "ORGKEYS_DATA_DIR", Default: ".orgkeys", Doc: "SQLite file, development issuer, SoftHSM token, file sink", set: text(func(c *Config) *string { return &c.DataDir })},
	{Name: "ORGKEYS_MAX", Default: "5", Doc: "keys an organization may have, at most 64, because a node's signature is tried against each", set: number(0, 64, func(c *Config) *int { return &c.Max })},
	{Name: "ORGKEYS_MAX_NODE_KEYS", Default: "1000", Doc: "node keys an organization may have, including those that open enrollments reserve", set: number(0, 100_000, func(c *Config) *int { return &c.MaxNodeKeys })},
	{Name: "ORGKEYS_DELIVERY_TTL", Default: "168h", Doc: "how long a sealed key waits for its receipt, or its first use, before it is withdrawn", set: duration(time.Minute, 30*24*time.Hour, func(c *Config) *time.Duration { return &c.DeliveryTTL })},
	{Name: "ORGKEYS_TPM_ROOTS_FILE", Doc: "file with the certificates, PEM, of TPM makers whose endorsement keys are believed; default nobody's, so that each organization lists its TPMs", set: text(func(c *Config) *string { return &c.TPMRootsFile })},
	{Name: "ORGKEYS_MAX_GENERATIONS", Default: "16", Doc: "concurrent key generations; more get 503", set: number(1, 1024, func(c *Config) *int { return &c.MaxGenerations })},
	{Name: "ORGKEYS_RESERVATION_TTL", Default: "60s", Doc: "how long a reservation in the quota lasts after a crash; a generation times out after half of it", set: duration(2*time.Second, time.Hour, func(c *Config) *time.Duration { return &c.ReservationTTL })},
	{Name: "ORGKEYS_POOL", Default: "4", Doc: "keys made ahead inside the back end, for each use; 0: none. With Vault all replicas share them and need the same value", set: number(0, 256, func(c *Config) *int { return &c.Pool })},
	{Name: "ORGKEYS_KEYSTORE", Default: KeystorePKCS11, Doc: "what makes and seals keys: pkcs11 or vault", set: choice(func(c *Config) *string { return &c.Keystore }, KeystorePKCS11, KeystoreVault)},
	{Name: "ORGKEYS_PKCS11_MODULE", Doc: "path of the PKCS#11 library; default SoftHSM's", set: text(func(c *Config) *string { return &c.PKCS11Module })},
	{Name: "ORGKEYS_PKCS11_INIT_ARGS", Doc: "the library's parameters in CK_C_INITIALIZE_ARGS.pReserved, which NSS needs; default none", set: text(func(c *Config) *string { return &c.Token.InitArgs })},
	{Name: "ORGKEYS_PKCS11_TOKEN_LABEL", Doc: "label of the token; default orgkeys, unless serial, slot or URI is given", set: text(func(c *Config) *string { return &c.Token.Label })},
	{Name: "ORGKEYS_PKCS11_TOKEN_SERIAL", Doc: "serial number of the token", set: text(func(c *Config) *string { return &c.Token.Serial })},
	{Name: "ORGKEYS_PKCS11_SLOT", Doc: "number of the token's slot", set: slot},
	{Name: "ORGKEYS_PKCS11_URI", Doc: "the token and its sealing key as an RFC 7512 URI: pkcs11:token=…;serial=…;object=…?pin-source=file:/path", set: tokenURI},
	{Name: "ORGKEYS_PKCS11_PIN_FILE", Doc: "private file with the user PIN; default a SoftHSM token that the service makes in the data directory", set: text(func(c *Config) *string { return &c.PINFile })},
	{Name: "ORGKEYS_VAULT_AUTH", Default: VaultAppRole, Doc: "login to Vault: approle, or token_file (Vault Agent's sink); the address, CA and namespace are VAULT_ADDR, VAULT_CACERT, VAULT_NAMESPACE", set: choice(func(c *Config) *string { return &c.VaultAuth }, VaultAppRole, VaultTokenFile)},
	{Name: "ORGKEYS_VAULT_ROLE_ID_FILE", Doc: "file with the AppRole's role ID", set: text(func(c *Config) *string { return &c.VaultRoleIDFile })},
	{Name: "ORGKEYS_VAULT_SECRET_ID_FILE", Doc: "private file with the AppRole's secret ID", set: text(func(c *Config) *string { return &c.VaultSecretIDFile })},
	{Name: "ORGKEYS_VAULT_SECRET_ID_PATH", Doc: "the secret ID file holds a wrapping token that was created at this path", set: text(func(c *Config) *string { return &c.VaultSecretIDPath })},
	{Name: "ORGKEYS_VAULT_TOKEN_FILE", Doc: "private file with a token that another program renews", set: text(func(c *Config) *string { return &c.VaultTokenFile })},
	{Name: "ORGKEYS_DATABASE_URL", Doc: "postgres://…; default SQLite in the data directory", Secret: true, set: postgresURL},
	{Name: "ORGKEYS_DATABASE_CONNECTIONS", Default: "20", Doc: "the most connections that a process opens to the database; PostgreSQL, or a pooler, must allow as many for each replica", set: number(5, 1000, func(c *Config) *int { return &c.DatabaseConnections })},
	{Name: "ORGKEYS_REDIS_URL", Doc: "redis:// or rediss://, for the quota lock of several replicas; default a lock in the process", Secret: true, set: redisURL},
	{Name: "ORGKEYS_REDIS_CA_FILE", Doc: "certificate authorities for Redis, PEM; default the system's", set: text(func(c *Config) *string { return &c.RedisCAFile })},
	{Name: "ORGKEYS_REDIS_CERT_FILE", Doc: "client certificate for Redis, PEM", set: text(func(c *Config) *string { return &c.RedisCertFile })},
	{Name: "ORGKEYS_REDIS_KEY_FILE", Doc: "its private key, PEM, in a private file", set: text(func(c *Config) *string { return &c.RedisKeyFile })},
	{Name: "ORGKEYS_ISSUER", Doc: "the tokens' issuer, exactly as in the claim iss; default the development issuer, on loopback only", set: text(func(c *Config) *string { return &c.Issuer })},
	{Name: "ORGKEYS_AUDIENCE", Doc: "the audience that tokens must contain", set: text(func(c *Config) *string { return &c.Audience })},
	{Name: "ORGKEYS_JWKS", Doc: "the issuer's keys: an https URL or a file; default found through the issuer's metadata", set: text(func(c *Config) *string { return &c.JWKS })},
	{Name: "ORGKEYS_JWKS_CA_FILE", Doc: "certificate authorities for the issuer's server, PEM; default the system's", set: text(func(c *Config) *string { return &c.JWKSCAFile })},
	{Name: "ORGKEYS_JWKS_INTERVAL", Default: "30s", Doc: "unknown key IDs cause at most 5 fetches of the URL and one more per interval, signatures that do not fit one per interval; fetches that bring new keys do not count; a file is read at once", set: duration(time.Second, time.Hour, func(c *Config) *time.Duration { return &c.JWKSInterval })},
	{Name: "ORGKEYS_CLAIM_SUBJECT", Default: defaultSubject, Doc: "the claim with the caller's ID: a name, or with a leading slash a JSON pointer", set: text(func(c *Config) *string { return &c.ClaimSubject })},
	{Name: "ORGKEYS_CLAIM_ORG", Default: defaultOrg, Doc: "the claim that names the organization: a name, or with a leading slash a JSON pointer", set: text(func(c *Config) *string { return &c.ClaimOrg })},
	{Name: "ORGKEYS_CLAIM_ROLE", Default: defaultRole, Doc: "the claim with the role or roles: a name, or with a leading slash a JSON pointer", set: text(func(c *Config) *string { return &c.ClaimRole })},
	{Name: "ORGKEYS_ROLE_MAP", Doc: "maps values of the role claim to roles: value=ROLE,value=ROLE; others are ignored; default the role's name or integer", set: text(func(c *Config) *string { return &c.RoleMap })},
	{Name: "ORGKEYS_ROLE_DEFAULT", Doc: "the role of callers who have no other; default none", set: text(func(c *Config) *string { return &c.RoleDefault })},
	{Name: "ORGKEYS_ISSUERS_FILE", Doc: "JSON file with several issuers, their audiences and mappings, instead of ORGKEYS_ISSUER and its settings; re-read when it changes: docs/identity/README.md", set: text(func(c *Config) *string { return &c.IssuersFile })},
	{Name: "ORGKEYS_SUBJECT_PSEUDONYMS", Default: PseudonymAddresses, Doc: "which subjects are replaced by a pseudonym, in events and for the policy: addresses (mail addresses and telephone numbers), always or never", set: choice(func(c *Config) *string { return &c.Pseudonyms }, PseudonymAddresses, PseudonymAlways, PseudonymNever)},
	{Name: "ORGKEYS_POLICY_DIR", Doc: "a directory that replaces the embedded policy; re-read when it changes", set: text(func(c *Config) *string { return &c.PolicyDir })},
	{Name: "ORGKEYS_AUDIT_SINKS", Doc: "audit sinks, all of them required: file, vault; default file, and with Vault vault,file", set: list(func(c *Config) *[]string { return &c.AuditSinks })},
	{Name: "ORGKEYS_AUDIT_FILE", Doc: "the file sink; default audit.jsonl in the data directory, another disk is better", set: text(func(c *Config) *string { return &c.AuditFile })},
	{Name: "ORGKEYS_AUDIT_DEADLINE", Default: defaultAuditDeadline.String(), Doc: "how long a release waits for the audit sinks before 503; above 10s it may be half of ORGKEYS_RESERVATION_TTL at most", set: duration(100*time.Millisecond, 5*time.Minute, func(c *Config) *time.Duration { return &c.AuditDeadline })},
	{Name: "ORGKEYS_CHECKPOINT_INTERVAL", Default: "1m", Doc: "how often a checkpoint of the audit log is signed, if the log has grown; SIGUSR1 signs one at once", set: duration(time.Second, 24*time.Hour, func(c *Config) *time.Duration { return &c.CheckpointInterval })},
	{Name: "ORGKEYS_AUDIT_ARCHIVE", Doc: "where orgkeys audit archive moves old events of the log to, and where they are read: a directory, or s3://bucket/prefix", set: text(func(c *Config) *string { return &c.AuditArchive })},
	{Name: "ORGKEYS_AUDIT_S3_ENDPOINT", Doc: "the S3-compatible server of that bucket: https://s3.eu-central-1.amazonaws.com, or https://host:port", set: text(func(c *Config) *string { return &c.S3Endpoint })},
	{Name: "ORGKEYS_AUDIT_S3_REGION", Doc: "its region; default as the server says, for which the access key needs s3:GetBucketLocation", set: text(func(c *Config) *string { return &c.S3Region })},
	{Name: "ORGKEYS_AUDIT_S3_CA_FILE", Doc: "certificate authorities for that server, PEM; default the system's", set: text(func(c *Config) *string { return &c.S3CAFile })},
	{Name: "ORGKEYS_AUDIT_S3_ACCESS_KEY", Doc: "the access key for that bucket, which may read, write, list and, with a retention, delete", set: text(func(c *Config) *string { return &c.S3AccessKey })},
	{Name: "ORGKEYS_AUDIT_S3_SECRET_KEY", Doc: "its secret key", Secret: true, set: text(func(c *Config) *string { return &c.S3SecretKey })},
	{Name: "ORGKEYS_AUDIT_RETENTION", Doc: "how old entries of the archive become before orgkeys audit archive removes them, such as 17520h for two years; default none is removed", set: duration(24*time.Hour, 100*365*24*time.Hour, func(c *Config) *time.Duration { return &c.AuditRetention })},
	{Name: "ORGKEYS_TIMESTAMP_WINDOW", Default: "300s", Doc: "how far a node's timestamp may be from the server's clock", set: duration(time.Second, time.Hour, func(c *Config) *time.Duration { return &c.TimestampWindow })},
	{Name: "ORGKEYS_TLS_CERT_FILE", Doc: "certificate chain, PEM; re-read when it changes", set: text(func(c *Config) *string { return &c.TLSCertFile })},
	{Name: "ORGKEYS_TLS_KEY_FILE", Doc: "its private key, PEM", set: text(func(c *Config) *string { return &c.TLSKeyFile })},
	{Name: "ORGKEYS_TLS_CLIENT_CA_FILE", Doc: "require client certificates issued by these authorities", set: text(func(c *Config) *string { return &c.ClientCAFile })},
	{Name: "ORGKEYS_TLS_BY_PROXY", Default: "false", Doc: "true: a proxy terminates TLS; needs ORGKEYS_TRUSTED_PROXIES", set: boolean(func(c *Config) *bool { return &c.TLSByProxy })},
	{Name: "ORGKEYS_TRUSTED_PROXIES", Doc: "addresses or CIDRs of proxies whose X-Forwarded-For and X-Forwarded-Proto are trusted, none wider than 10.0.0.0/8 or fc00::/7; default none", set: prefixes},
	{Name: "ORGKEYS_CORS_ORIGINS", Doc: "exact origins of web pages that may call the API; default none", set: list(func(c *Config) *[]string { return &c.CORSOrigins })},
	{Name: "ORGKEYS_CONSOLE", Doc: "true or false: the pages under /console/; default true with the development issuer, else false: docs/console.md", set: choice(func(c *Config) *string { return &c.Console }, "true", "false")},
	{Name: "ORGKEYS_CONSOLE_URL", Doc: "where browsers reach the service, such as https://keys.example.com; the provider sends them back to this and /console/callback", set: consoleURL},
	{Name: "ORGKEYS_CONSOLE_CLIENT_ID", Doc: "the console's client at the OIDC provider", set: text(func(c *Config) *string { return &c.ConsoleClientID })},
	{Name: "ORGKEYS_CONSOLE_CLIENT_SECRET", Doc: "its secret; default none: a public client, with PKCE", Secret: true, set: text(func(c *Config) *string { return &c.ConsoleClientSecret })},
	{Name: "ORGKEYS_CONSOLE_SCOPES", Default: "openid", Doc: "the scopes to ask the provider for", set: list(func(c *Config) *[]string { return &c.ConsoleScopes })},
	{Name: "ORGKEYS_CONSOLE_RESOURCE", Doc: "the API that the access token is for (RFC 8707), where the provider wants it named", set: text(func(c *Config) *string { return &c.ConsoleResource })},
	{Name: "ORGKEYS_CONSOLE_AUDIENCE", Doc: "the same, for providers that call it audience", set: text(func(c *Config) *string { return &c.ConsoleAudience })},
	{Name: "ORGKEYS_CONSOLE_ISSUER", Doc: "which issuer of ORGKEYS_ISSUERS_FILE people sign in at", set: text(func(c *Config) *string { return &c.ConsoleIssuer })},
	{Name: "ORGKEYS_SHUTDOWN_NOTICE", Default: "0s", Doc: "how long requests are still served after a signal while /readyz already fails, so that a load balancer can notice", set: duration(0, 5*time.Minute, func(c *Config) *time.Duration { return &c.ShutdownNotice })},
	{Name: "ORGKEYS_SHUTDOWN_TIMEOUT", Default: "35s", Doc: "how long requests in progress may take after a signal", set: duration(time.Second, 10*time.Minute, func(c *Config) *time.Duration { return &c.ShutdownTimeout })},
	{Name: "ORGKEYS_LOG_LEVEL", Default: "info", Doc: "debug, info, warn or error", set: choice(func(c *Config) *string { return &c.LogLevel }, "debug", "info", "warn", "error")},
}

func text(field func(*Config) *string) func(*Config, string) error {
	return func(c *Config, v string) error { *field(c) = v; return nil }
}

func slot(c *Config, v string) error {
	n, err := strconv.ParseUint(v, 10, 0)
	if err != nil {
		return errors.New("is not the number of a slot")
	}
	number := uint(n)
	c.Token.Slot = &number
	return nil
}

func tokenURI(c *Config, v string) (err error) {
	c.Token.URI, err = pkcs11uri.Parse(v)
	return err
}

func address(field func(*Config) *string) func(*Config, string) error {
	return func(c *Config, v string) error {
		_, port, err := net.SplitHostPort(v)
		if n, numErr := strconv.Atoi(port); err != nil || numErr != nil || n < 0 || n > 65535 {
			return errors.New("is not of the form host:port")
		}
		*field(c) = v
		return nil
	}
}

// consoleURL is an origin as browsers write it: everything that is compared with it
// comes from one.
func consoleURL(c *Config, v string) error {
	u, err := url.Parse(v)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Hostname() == "" || v != u.Scheme+"://"+u.Host || v != strings.ToLower(v) {
		return errors.New("is not of the form https://host or https://host:port, in lower case")
	}
	if u.Scheme == "http" && !Loopback(net.JoinHostPort(u.Hostname(), "0")) {
		return errors.New("is not https, and http is for this machine only")
	}
	c.ConsoleURL = v
	return nil
}

func number(low, high int, field func(*Config) *int) func(*Config, string) error {
	return func(c *Config, v string) error {
		n, err := strconv.Atoi(v)
		if err != nil || n < low || n > high {
			return fmt.Errorf("is not a number from %d to %d", low, high)
		}
		*field(c) = n
		return nil
	}
}

func duration(low, high time.Duration, field func(*Config) *time.Duration) func(*Config, string) error {
	return func(c *Config, v string) error {
		d, err := time.ParseDuration(v)
		if err != nil || d < low || d > high {
			return fmt.Errorf("is not a duration from %s to %s, such as 30s or 5m", low, high)
		}
		*field(c) = d
		return nil
	}
}

func choice(field func(*Config) *string, allowed ...string) func(*Config, string) error {
	return func(c *Config, v string) error {
		for _, a := range allowed {
			if v == a {
				*field(c) = v
				return nil
			}
		}
		return fmt.Errorf("is none of %s", strings.Join(allowed, ", "))
	}
}

func boolean(field func(*Config) *bool) func(*Config, string) error {
	return func(c *Config, v string) error {
		if v != "true" && v != "false" {
			return errors.New("is neither true nor false")
		}
		*field(c) = v == "true"
		return nil
	}
}

func list(field func(*Config) *[]string) func(*Config, string) error {
	return func(c *Config, v string) error {
		for _, item := range strings.Split(v, ",") {
			item = strings.TrimSpace(item)
			if item == "" {
				return errors.New("has an empty item: it is a list separated by commas")
			}
			*field(c) = append(*field(c), item)
		}
		return nil
	}
}

func prefixes(c *Config, v string) error {
	var items []string
	if err := list(func(*Config) *[]string { return &items })(c, v); err != nil {
		return err
	}
	for i, item := range items {
		p, err := netip.ParsePrefix(item)
		if addr, addrErr := netip.ParseAddr(item); addrErr == nil {
			p, err = addr.Prefix(addr.BitLen())
		}
		if err != nil {
			return fmt.Errorf("item %d is not an address or CIDR of a proxy", i+1)
		}
		if p.Addr().Is4In6() {
			return fmt.Errorf("item %d is an IPv4 address in IPv6's form: write it as IPv4", i+1)
		}
		c.TrustedProxies = append(c.TrustedProxies, p.Masked())
	}
	return nil
}

func postgresURL(c *Config, v string) error {
	if !strings.HasPrefix(v, "postgres://") && !strings.HasPrefix(v, "postgresql://") {
		return errors.New("is not a postgres:// URL; for SQLite leave it unset")
	}
	c.DatabaseURL = v
	return nil
}

func redisURL(c *Config, v string) error {
	if !strings.HasPrefix(v, "redis://") && !strings.HasPrefix(v, "rediss://") {
		return errors.New("is not a redis:// or rediss:// URL")
	}
	c.RedisURL = v
	return nil
}
