// Package cluster runs replicas of the real program on one PostgreSQL, one
// Redis and one Vault, all of them real, for tests of several replicas.
package cluster

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/freeport"
	"github.com/orgkeys/orgkeys/internal/redislock/redistest"
	"github.com/orgkeys/orgkeys/internal/sqlstore/pgtest"
	"github.com/orgkeys/orgkeys/internal/vault/vaulttest"
)

// PoolerMode is the environment variable that puts a PgBouncer in this pool_mode
// between the replicas and PostgreSQL.
const PoolerMode = "ORGKEYS_TEST_POOLER"

// Cluster is what the replicas share, and the replicas.
type Cluster struct {
	Postgres *pgtest.Server
	Redis    *redistest.Server
	Vault    *vaulttest.Server
	Issuer   *harness.Issuer
	Replicas []*harness.Server
	Database string // URL of the database itself
	Behind   string // URL by which the replicas reach it: the same, or a pooler's
}

// Start starts what n replicas share and then the replicas, each on a port of
// its own that it keeps across restarts. The test's end stops everything.
func Start(t testing.TB, n int, more ...harness.Option) *Cluster {
	t.Helper()
	c := Configure(t, n, more...)
	for _, r := range c.Replicas {
		r.Start(t)
	}
	return c
}

// Configure is Start without starting the replicas.
func Configure(t testing.TB, n int, more ...harness.Option) *Cluster {
	t.Helper()
	c := &Cluster{Issuer: harness.NewIssuer(t)}
	c.startPostgres(t)
	c.startRedis(t)
	options := append(c.startVault(t),
		harness.TrustedBy(c.Issuer), harness.Set("ORGKEYS_KEYSTORE", "vault"),
		harness.Set("ORGKEYS_DATABASE_URL", c.Behind), harness.Set("ORGKEYS_REDIS_URL", c.Redis.URL()))
	for i := range n {
		own := append(options, harness.In(filepath.Join(t.TempDir(), fmt.Sprintf("replica-%d", i+1))),
			harness.Set("ORGKEYS_LISTEN", freeAddress(t)), harness.Set("ORGKEYS_ADMIN_LISTEN", freeAddress(t)))
		c.Replicas = append(c.Replicas, harness.Configure(t, append(own, more...)...))
	}
	return c
}

// ConfigureOnHSM is Configure with one SoftHSM token in Vault's place, which the
// first replica makes when it starts; the others are started after it. Its
// audit sinks are files.
func ConfigureOnHSM(t testing.TB, n int, more ...harness.Option) *Cluster {
	t.Helper()
	c := &Cluster{Issuer: harness.NewIssuer(t)}
	c.startPostgres(t)
	c.startRedis(t)
	first := filepath.Join(t.TempDir(), "replica-1")
	for i := range n {
		own := []harness.Option{
			harness.TrustedBy(c.Issuer), harness.Set("ORGKEYS_DATABASE_URL", c.Behind), harness.Set("ORGKEYS_REDIS_URL", c.Redis.URL()),
			harness.Set("ORGKEYS_LISTEN", freeAddress(t)), harness.Set("ORGKEYS_ADMIN_LISTEN", freeAddress(t)), harness.In(first),
		}
		if i > 0 {
			own = append(own, harness.In(filepath.Join(t.TempDir(), fmt.Sprintf("replica-%d", i+1))),
				harness.Set("SOFTHSM2_CONF", filepath.Join(first, "softhsm2.conf")), harness.Set("ORGKEYS_PKCS11_TOKEN_LABEL", "orgkeys"),
				harness.Set("ORGKEYS_PKCS11_PIN_FILE", filepath.Join(first, "pin")))
		}
		c.Replicas = append(c.Replicas, harness.Configure(t, append(own, more...)...))
	}
	return c
}

func (c *Cluster) startPostgres(t testing.TB) {
	t.Helper()
	var err error
	if c.Postgres, err = pgtest.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { atEnd(t, c.Postgres.Close) })
	if c.Database, err = c.Postgres.NewDatabase("orgkeys"); err != nil {
		t.Fatal(err)
	}
	c.Behind = c.Database
	if mode := os.Getenv(PoolerMode); mode != "" {
		p, err := c.Postgres.PoolerOf(documentedPooler(t, mode))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { atEnd(t, p.Close) })
		c.Behind = p.URL("orgkeys")
	}
}

// documentedPooler is the pgbouncer.ini that docs/operations.md shows, in this
// mode. The document asks for more server sessions in session mode.
func documentedPooler(t testing.TB, mode string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(harness.ModuleRoot(t), "docs", "operations.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(text), "\n## PostgreSQL behind PgBouncer\n")
	_, ini, shown := strings.Cut(section, "```ini\n")
	ini, _, _ = strings.Cut(ini, "```")
	if !found || !shown || !strings.Contains(ini, "\npool_mode = transaction\n") || !strings.Contains(ini, "\ndefault_pool_size = 20\n") {
		t.Fatalf("docs/operations.md shows no pgbouncer.ini that this test can put into a mode: %s", ini)
	}
	if mode == "transaction" {
		return ini
	}
	ini = strings.Replace(ini, "pool_mode = transaction", "pool_mode = "+mode, 1)
	return strings.Replace(ini, "default_pool_size = 20", "default_pool_size = 80", 1) // three replicas' connections, and one's more
}

func (c *Cluster) startRedis(t testing.TB) {
	t.Helper()
	var err error
	if c.Redis, err = redistest.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { atEnd(t, c.Redis.Close) })
}

func (c *Cluster) startVault(t testing.TB) []harness.Option {
	t.Helper()
	var err error
	if c.Vault, err = vaulttest.Start(t.Context(), t.TempDir()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { atEnd(t, c.Vault.Kill) })
	login, err := c.Vault.AppRole(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	options := []harness.Option{
		harness.Set("ORGKEYS_VAULT_ROLE_ID_FILE", login.RoleIDFile), harness.Set("ORGKEYS_VAULT_SECRET_ID_FILE", login.SecretIDFile),
	}
	for _, pair := range c.Vault.Env() {
		name, value, _ := strings.Cut(pair, "=")
		options = append(options, harness.Set(name, value))
	}
	return options
}

func atEnd(t testing.TB, stop func() error) {
	if err := stop(); err != nil {
		t.Error(err)
	}
}

// freeAddress is a loopback address that nobody listens on.
func freeAddress(t testing.TB) string {
	t.Helper()
	port, err := freeport.Find()
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("127.0.0.1:%d", port)
}

// Owner is a token of an organization's owner.
func (c *Cluster) Owner(t testing.TB, org string) string {
	t.Helper()
	return c.Issuer.Token(t, harness.Claims{"org_id": org, "org_role": "OWNER"})
}

// Signed is the body of a node's signed request, good for /secrets and
// /register, of the present moment.
func Signed(key *rsa.PrivateKey, org, ip string) ([]byte, error) {
	timestamp := fmt.Sprint(time.Now().UnixMilli())
	digest := sha256.Sum256([]byte(ip + "|eu-1|" + timestamp + "|" + org))
	signature, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, digest[:])
	if err != nil {
		return nil, err
	}
	body, encodeErr := json.Marshal(map[string]any{
		"ip": ip, "region": "eu-1", "timestamp": timestamp, "id_org": org, "version": "1.0", "status": "active",
		"signature": base64.StdEncoding.EncodeToString(signature),
	})
	return body, errors.Join(err, encodeErr)
}
