package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/chaos/cluster"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/vault/vaulttest"
)

func poolOf(n int) harness.Option { return harness.Set("ORGKEYS_POOL", strconv.Itoa(n)) }

var poolKeysLine = regexp.MustCompile(`(?m)^orgkeys_pool_keys\{use="(\w+)"\} (\d+)$`)

// filled waits until the pool has n keys for every use.
func filled(t *testing.T, s *harness.Server, n int) {
	t.Helper()
	harness.Eventually(t, 2*time.Minute, fmt.Sprintf("%d keys are in the pool", n), func() bool {
		uses := poolKeysLine.FindAllStringSubmatch(s.AskAdmin(t, "/metrics"), -1)
		return len(uses) > 0 && !slices.ContainsFunc(uses, func(use []string) bool { return use[2] != strconv.Itoa(n) })
	})
}

// metric is the value of one of a server's metrics.
func metric(t *testing.T, s *harness.Server, name string) string {
	t.Helper()
	for line := range strings.Lines(s.AskAdmin(t, "/metrics")) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// fromPool reports whether the event of a key's creation says that it was made ahead.
func fromPool(t *testing.T, s *harness.Server, id string) bool {
	t.Helper()
	var created []harness.Leaf
	harness.Eventually(t, harness.Patience, "the key's event is in the sink", func() bool {
		created = s.Sink(t).Find(func(l harness.Leaf) bool { return l.Type == "orgkey.created" && l.Object == id })
		return len(created) == 1
	})
	made, pool := created[0].Detail["made"], created[0].Detail["pool"]
	if (made == "") != (pool == "") || pool != "" && pool != "true" {
		t.Errorf("the event of key %s has the details %v", id, created[0].Detail)
	}
	if made != "" {
		if at, err := time.Parse(time.RFC3339, made); err != nil || time.Since(at) > 24*time.Hour || time.Until(at) > time.Minute {
			t.Errorf("key %s was made at %q: %v", id, made, err)
		}
	}
	return pool != ""
}

// TestPoolOnSoftHSM: keys out of the pool are as good as others, the pool is filled again,
// and a killed process leaves nothing of it.
func TestPoolOnSoftHSM(t *testing.T) {
	t.Parallel()
	s := harness.Start(t, poolOf(2), harness.Set("ORGKEYS_MAX", "9"))
	filled(t, s, 2)
	org, seen := harness.Org(), map[string]bool{}
	for i := range 2 {
		key := s.Generate(t, org)
		if seen[key.Fingerprint] || !fromPool(t, s, key.ID) {
			t.Errorf("key %d: seen before %t; it is not said to be from the pool", i+1, seen[key.Fingerprint])
		}
		seen[key.Fingerprint] = true
	}
	filled(t, s, 2)
	if listed := s.List(t, org); len(listed) != 2 {
		t.Errorf("%d keys are listed", len(listed))
	}
	m := mint(t, s, org, `{}`)
	if _, err := enrollment(t, s.API, m.Token, newRecipient(t), time.Minute).Fetch(t.Context()); err != nil {
		t.Error(err)
	}
	if got := metric(t, s, `orgkeys_pool_requests_total{result="taken",use="any"}`); got != "3" {
		t.Errorf("%s keys were taken, want 3", got)
	}
	filled(t, s, 2)
	s.Kill()
	onlyOwnKeys(t, s)
	s.Start(t)
	filled(t, s, 2)
}

// TestPoolKeysStayInTheTokenUntilTheyAreTaken, as pkcs11-spy sees it.
func TestPoolKeysStayInTheTokenUntilTheyAreTaken(t *testing.T) {
	t.Parallel()
	const n = 3
	dir, pin := t.TempDir(), "spied-"+harness.Org()
	pinFile, log := filepath.Join(dir, "pin"), filepath.Join(dir, "spy.log")
	must(t, os.WriteFile(pinFile, []byte(pin), 0o600))
	s := harness.Start(t, poolOf(n), harness.Set("ORGKEYS_PKCS11_MODULE", spyModule(t)), harness.Set("ORGKEYS_PKCS11_PIN_FILE", pinFile),
		harness.Set("PKCS11SPY", harness.SoftHSM), harness.Set("PKCS11SPY_OUTPUT", log), harness.Set("SOFTHSM2_CONF", harness.NewToken(t, "orgkeys", pin)))
	calls := func(name string) int {
		b, err := os.ReadFile(log)
		must(t, err)
		return len(regexp.MustCompile(`(?m)^\d+: `+name+`$`).FindAll(b, -1))
	}
	wrapped, encrypted := calls("C_WrapKey"), calls("C_Encrypt")
	filled(t, s, n)
	if w, e := calls("C_WrapKey"), calls("C_Encrypt"); w != wrapped || e != encrypted {
		t.Errorf("filling the pool took %d C_WrapKey and %d C_Encrypt", w-wrapped, e-encrypted)
	}
	destroyed := calls("C_DestroyObject")
	for range n {
		s.Generate(t, harness.Org())
	}
	if got := calls("C_WrapKey") - wrapped; got != n {
		t.Errorf("%d C_WrapKey for %d keys", got, n)
	}
	if got := calls("C_DestroyObject") - destroyed; got < 2*n {
		t.Errorf("%d C_DestroyObject for %d key pairs", got, n)
	}
}

// keyCounts is what Vault's audit files say of the keys in a mount, by name: made and
// deleted are entries that Vault wrote after it had done so, ending those that it wrote
// before a deletion. When the caller dies meanwhile, Vault may delete a key and report an error:
// then a blank is made in its place, without saying a type, and deleted.
type keyCounts struct{ made, exported, ending, deleted, blanks map[string]int }

func countKeys(t *testing.T, v *vaulttest.Server, mount string) keyCounts {
	t.Helper()
	c := keyCounts{map[string]int{}, map[string]int{}, map[string]int{}, map[string]int{}, map[string]int{}}
	blank := map[string]bool{} // is there
	b, err := os.ReadFile(v.AuditFile)
	must(t, err)
	for line := range bytes.Lines(b) {
		var e struct {
			vaultEntry
			Error string `json:"error"`
		}
		mustUnmarshal(t, line, &e)
		rest, ours := strings.CutPrefix(e.Request.Path, mount+"/")
		parts := strings.Split(rest, "/")
		if ours && e.Type == "request" && len(parts) == 2 && parts[0] == "keys" && e.Request.Operation == "delete" {
			c.ending[parts[1]]++
		}
		if e.Type != "response" || e.Error != "" {
			continue
		}
		switch {
		case !ours:
		case len(parts) == 2 && parts[0] == "keys" && e.Request.Operation == "update" && !bytes.Contains(e.Request.Data, []byte(`"type"`)):
			blank[parts[1]] = true
		case len(parts) == 2 && parts[0] == "keys" && e.Request.Operation == "update":
			c.made[parts[1]]++
		case len(parts) == 3 && parts[0] == "keys" && parts[2] == "import":
			c.made[parts[1]]++
		case len(parts) == 2 && parts[0] == "keys" && e.Request.Operation == "delete" && blank[parts[1]]:
			c.blanks[parts[1]]++
			delete(blank, parts[1])
		case len(parts) == 2 && parts[0] == "keys" && e.Request.Operation == "delete":
			c.deleted[parts[1]]++
		case parts[0] == "export" && len(parts) == 4, parts[0] == "byok-export":
			c.exported[parts[2]]++
		}
	}
	return c
}

// addsUp compares Vault's audit file with the pool and the keys that callers got: keys
// made = keys released + destroyed + in the pool.
func addsUp(t *testing.T, s *harness.Server, v *vaulttest.Server, got map[string]int, pool int) {
	t.Helper()
	var inPool []string
	harness.Eventually(t, 2*time.Minute, "Vault holds the pool and nothing else", func() bool {
		inPool = harness.Strings(t, s.Database(t), "SELECT id FROM pool_keys WHERE use = 'plain' AND sealed IS NOT NULL ORDER BY id")
		var there []string
		for _, name := range inTransit(t, v) {
			there = append(there, name.(string))
		}
		slices.Sort(there)
		return len(inPool) == pool && slices.Equal(there, inPool)
	})
	c := countKeys(t, v, "orgkeys")
	released, destroyed := 0, 0
	for name := range c.made {
		switch {
		case got[name] > 0:
			released++
		case !slices.Contains(inPool, name):
			destroyed++
		}
		if (c.ending[name] > 0) == slices.Contains(inPool, name) {
			t.Errorf("key %s: deletions begun %d, ended %d, in the pool %t", name, c.ending[name], c.deleted[name], slices.Contains(inPool, name))
		}
		if c.deleted[name] > 1 {
			t.Errorf("Vault says %d times that it deleted key %s", c.deleted[name], name)
		}
		if c.exported[name] > 0 && slices.Contains(inPool, name) {
			t.Errorf("key %s is in the pool and was exported", name)
		}
	}
	for name, n := range got {
		if n != 1 || c.made[name] != 1 || c.deleted[name] != 1 && c.blanks[name] == 0 {
			t.Errorf("key %s: released %d times, made %d times, deleted %d times, overwritten %d times", name, n, c.made[name], c.deleted[name], c.blanks[name])
		}
	}
	if len(c.made) != released+destroyed+len(inPool) {
		t.Errorf("%d keys were made, %d released, %d destroyed, %d are in the pool", len(c.made), released, destroyed, len(inPool))
	}
	t.Logf("%d keys were made, %d released, %d destroyed, %d are in the pool", len(c.made), released, destroyed, len(inPool))
}

// askForKey has a key made in an organization of its own, by a server that may die.
func askForKey(t testing.TB, s *harness.Server, token func(org string) string) (harness.Response, error) {
	org := harness.Org()
	return s.Try(context.Background(), harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: token(org)})
}

// TestPoolKilledAtEveryStep: whichever call to Vault the service dies after, while it
// fills the pool or gives a key out of it, no key is lost in Vault, and none is given twice.
func TestPoolKilledAtEveryStep(t *testing.T) {
	t.Parallel()
	v, proxy, settings := onItsOwnVault(t)
	issuer := harness.NewIssuer(t)
	s := harness.Start(t, settings, poolOf(2), shortLife(t, 3*time.Second), harness.TrustedBy(issuer))
	kills := 6
	if long() {
		kills = 300
	}
	random := mathrand.New(mathrand.NewPCG(*seed, 19))
	got, fingerprints := map[string]int{}, map[string]bool{}
	for range kills {
		at := int64(1 + random.IntN(24)) // filling takes five calls a key, an answer some ten
		var calls atomic.Int64
		killed := make(chan struct{})
		proxy.After(func(r *http.Response) error {
			if strings.Contains(r.Request.URL.Path, "/auth/") || strings.Contains(r.Request.URL.Path, "/sys/") || calls.Add(1) != at {
				return nil
			}
			s.Kill()
			close(killed)
			return errors.New("killed")
		})
		// Mostly there is a key in the pool; sometimes not.
		time.Sleep(time.Duration(random.IntN(300)) * time.Millisecond)
		for dead := false; !dead; {
			resp, err := askForKey(t, s, func(org string) string { return issuer.Token(t, harness.Claims{"org_id": org, "org_role": "OWNER"}) })
			if err == nil && resp.Status == http.StatusOK {
				key := harness.ReadKey(t, "", resp)
				got[key.ID]++
				if fingerprints[key.Fingerprint] {
					t.Fatalf("key %s was given twice", key.Fingerprint)
				}
				fingerprints[key.Fingerprint] = true
			}
			select {
			case <-killed:
				dead = true
			default:
			}
		}
		proxy.After(nil)
		s.Start(t)
	}
	filled(t, s, 2)
	// A released key whose answer did not arrive counts as released, too.
	for _, id := range harness.Strings(t, s.Database(t), "SELECT id FROM org_keys WHERE released_at IS NOT NULL") {
		if got[id] == 0 {
			got[id] = 1
		}
	}
	addsUp(t, s, v, got, 2)
	s.Stop(t)
	if out, stderr, code := s.Run(t, "audit", "verify"); code != 0 && code != 3 { // 3: the sink lies beside the log
		t.Errorf("audit verify: exit code %d\n%s%s", code, out, stderr)
	}
}

// TestPoolOfThreeReplicas: one pool, from which clients of all replicas take at once, and
// never more keys in it than it may have.
func TestPoolOfThreeReplicas(t *testing.T) {
	t.Parallel()
	const size, clients = 3, 8
	each := 3
	if long() {
		each = 40
	}
	c := cluster.Start(t, 3, poolOf(size))
	filled(t, c.Replicas[0], size)
	db := clusterDatabase(t, c)
	done := make(chan struct{})
	watched := make(chan error, 1)
	go func() {
		for {
			var most int
			err := db.QueryRow("SELECT coalesce(max(n), 0) FROM (SELECT count(*) AS n FROM pool_keys GROUP BY use) AS uses").Scan(&most)
			if err == nil && most > size {
				err = fmt.Errorf("%d keys are in a pool of %d", most, size)
			}
			select {
			case <-done:
				watched <- err
				return
			case <-time.After(20 * time.Millisecond):
			}
			if err != nil {
				watched <- err
				return
			}
		}
	}()
	var mu sync.Mutex
	got, fingerprints, pooled := map[string]int{}, map[string]bool{}, 0
	var all sync.WaitGroup
	for i := range clients {
		all.Go(func() {
			for n := range each {
				s := c.Replicas[(i+n)%3]
				resp, err := askForKey(t, s, func(org string) string { return c.Owner(t, org) })
				if err != nil || resp.Status != http.StatusOK {
					t.Errorf("client %d: status %d, %v", i, resp.Status, err)
					continue
				}
				key := harness.ReadKey(t, "", resp)
				mu.Lock()
				if got[key.ID]++; fingerprints[key.Fingerprint] {
					t.Errorf("key %s was given twice", key.Fingerprint)
				}
				fingerprints[key.Fingerprint] = true
				mu.Unlock()
			}
		})
	}
	all.Wait()
	close(done)
	must(t, <-watched)
	filled(t, c.Replicas[0], size)
	for _, r := range c.Replicas {
		n, err := strconv.Atoi(metric(t, r, `orgkeys_pool_requests_total{result="taken",use="plain"}`))
		must(t, err)
		pooled += n
	}
	if pooled < size {
		t.Errorf("%d keys came out of the pool, at least %d were in it", pooled, size)
	}
	rows := map[string]bool{}
	found, err := db.Query("SELECT id FROM pool_keys WHERE use = 'plain'")
	must(t, err)
	defer found.Close()
	for found.Next() {
		var id string
		must(t, found.Scan(&id))
		rows[id] = true
	}
	must(t, found.Err())
	counted := countKeys(t, c.Vault, "orgkeys")
	for id := range counted.made {
		if counted.deleted[id] == 0 != rows[id] || got[id] == 0 && !rows[id] {
			t.Errorf("key %s: deleted %d times, released %d times, in the pool %t", id, counted.deleted[id], got[id], rows[id])
		}
	}
	if len(counted.made) != len(got)+len(rows) {
		t.Errorf("%d keys were made, %d released, %d are in the pool", len(counted.made), len(got), len(rows))
	}
}

// TestPoolAfterARestoredDatabase: keys that were taken after the backup are in the restored
// pool again, and nobody gets one of them.
func TestPoolAfterARestoredDatabase(t *testing.T) {
	t.Parallel()
	v, _, settings := onItsOwnVault(t)
	s := harness.Start(t, settings, poolOf(2), shortLife(t, 3*time.Second), harness.Set("ORGKEYS_MAX", "9"))
	filled(t, s, 2)
	s.Stop(t)
	backup := harness.Copy(t, s.Dir)
	s.Start(t)
	org, before := harness.Org(), map[string]bool{}
	for range 2 {
		key := s.Generate(t, org)
		before[key.Fingerprint] = true
		if !fromPool(t, s, key.ID) {
			t.Error("a full pool gave no key")
		}
	}
	s.Stop(t)
	must(t, os.RemoveAll(s.Dir))
	must(t, os.Rename(backup, s.Dir))
	succeeds(t, s, "audit", "accept-rollback", "--reason", "a test")
	if n := harness.Number(t, s.Database(t), "SELECT count(*) FROM pool_keys"); n != 0 {
		t.Errorf("%d keys are in the pool after a rollback was accepted", n)
	}
	s.Start(t)
	key := s.Generate(t, org)
	if before[key.Fingerprint] {
		t.Error("a key was given twice")
	}
	filled(t, s, 2)
	harness.Eventually(t, 2*time.Minute, "Vault holds the pool and nothing else", func() bool { return len(inTransit(t, v)) == 2 })
}

// TestPoolWithAnAlteredDatabase: rows that were put back, moved to another use or changed
// give nobody a key that somebody has had, and every request gets a key.
func TestPoolWithAnAlteredDatabase(t *testing.T) {
	t.Parallel()
	v, _, settings := onItsOwnVault(t)
	s := harness.Start(t, settings, poolOf(2), harness.Set("ORGKEYS_MAX", "20"))
	filled(t, s, 2)
	org, seen := harness.Org(), map[string]bool{}
	generate := func(what string) harness.Key {
		t.Helper()
		key := s.Generate(t, org)
		if seen[key.Fingerprint] {
			t.Errorf("%s: a key was given twice", what)
		}
		seen[key.Fingerprint] = true
		return key
	}
	s.Stop(t)
	db := s.Database(t)
	harness.Unprotect(t, db)
	harness.Exec(t, db, "CREATE TABLE stolen AS SELECT * FROM pool_keys")
	s.Start(t)
	generate("out of the pool")
	generate("out of the pool")
	for _, tampering := range []struct {
		what       string
		statements []string
	}{
		{"rows put back, without the records of their keys", []string{
			"DELETE FROM pool_keys", "DELETE FROM org_keys", "INSERT INTO pool_keys SELECT * FROM stolen WHERE use = 'plain'",
		}},
		{"the keys of one use as those of the other", []string{
			"UPDATE pool_keys SET use = CASE use WHEN 'plain' THEN 'sealed' ELSE 'plain' END",
		}},
		{"the row of one key for another", []string{
			"UPDATE pool_keys SET sealed = (SELECT p.sealed FROM pool_keys p WHERE p.use = pool_keys.use AND p.id <> pool_keys.id)",
		}},
	} {
		s.Stop(t)
		for _, statement := range tampering.statements {
			harness.Exec(t, db, statement)
		}
		s.Start(t)
		generate(tampering.what)
		generate(tampering.what)
		filled(t, s, 2)
	}
	harness.Eventually(t, time.Minute, "no key is left", func() bool {
		c := countKeys(t, v, "orgkeys")
		return len(c.made)-len(c.deleted) == len(inTransit(t, v))
	})
}

// TestPoolKeyOfTwoDatabases: a copy of the database runs beside it, on one Vault. Both take
// the same key and export it at the same time; one of them releases it.
func TestPoolKeyOfTwoDatabases(t *testing.T) {
	t.Parallel()
	_, proxy, settings := onItsOwnVault(t)
	first := harness.Start(t, settings, poolOf(1), harness.Set("ORGKEYS_AUDIT_SINKS", "file"))
	filled(t, first, 1)
	first.Stop(t)
	copied := harness.Copy(t, first.Dir)
	first.Start(t)
	second := harness.Start(t, settings, poolOf(1), harness.Set("ORGKEYS_AUDIT_SINKS", "file"), harness.In(copied))
	name := harness.Strings(t, first.Database(t), "SELECT id FROM pool_keys WHERE use = 'plain'")[0]
	var both sync.WaitGroup // both have exported the key before either deletes it
	both.Add(2)
	var exports atomic.Int64
	proxy.Before(func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodDelete && strings.HasSuffix(r.URL.Path, "/orgkeys/keys/"+name) {
			both.Wait()
		}
		return true
	})
	proxy.After(func(r *http.Response) error {
		if strings.Contains(r.Request.URL.Path, "/orgkeys/export/encryption-key/"+name) && r.StatusCode == http.StatusOK && exports.Add(1) <= 2 {
			both.Done()
		}
		return nil
	})
	keys := make([]harness.Key, 2)
	var all sync.WaitGroup
	for i, s := range []*harness.Server{first, second} {
		all.Go(func() {
			org := harness.Org()
			resp, err := s.Try(context.Background(), harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: s.Token(t, org, "OWNER")})
			if err != nil || resp.Status != http.StatusOK {
				t.Errorf("server %d: status %d, %v", i+1, resp.Status, err)
				return
			}
			keys[i] = harness.ReadKey(t, org, resp)
		})
	}
	all.Wait()
	if exports.Load() != 2 {
		t.Fatalf("the key was exported %d times: the test shows nothing", exports.Load())
	}
	if (keys[0].ID == name) == (keys[1].ID == name) || keys[0].Fingerprint == keys[1].Fingerprint {
		t.Errorf("the servers gave the keys %s and %s, of which %s was in both pools", keys[0].ID, keys[1].ID, name)
	}
}

// TestPoolIsDestroyed: when the sealing key is rotated, when the credentials change, and when the
// pool is turned off, nothing of it stays in Vault.
func TestPoolIsDestroyed(t *testing.T) {
	t.Parallel()
	v, _, settings := onItsOwnVault(t)
	s := harness.Start(t, settings, poolOf(1))
	db := func() []string {
		return harness.Strings(t, s.Database(t), "SELECT id FROM pool_keys WHERE sealed IS NOT NULL ORDER BY id")
	}
	replaced := func(what string, before []string) {
		t.Helper()
		harness.Eventually(t, 2*time.Minute, what+": every key is another one", func() bool {
			now := db()
			return len(now) == 2 && !slices.ContainsFunc(now, func(id string) bool { return slices.Contains(before, id) })
		})
		harness.Eventually(t, time.Minute, what+": the old ones are destroyed", func() bool {
			there := append(inTransit(t, v), sealedInVault(t, v)...)
			return !slices.ContainsFunc(there, func(name any) bool { return slices.Contains(before, name.(string)) })
		})
	}
	filled(t, s, 1)
	before := db()
	rotate(t, v)
	replaced("the sealing key was rotated", before)

	before = db()
	s.Stop(t)
	s.Start(t) // the credentials are the same
	filled(t, s, 1)
	if now := db(); !slices.Equal(now, before) {
		t.Errorf("a restart replaced the pool: %v, then %v", before, now)
	}
	s.Stop(t)
	secret, err := root(t, v).WriteWithContext(t.Context(), "auth/approle/role/orgkeys/secret-id", nil)
	must(t, err)
	file := filepath.Join(t.TempDir(), "secret-id")
	must(t, os.WriteFile(file, []byte(secret.Data["secret_id"].(string)), 0o600))
	s.Configured("ORGKEYS_VAULT_SECRET_ID_FILE", file)
	s.Start(t)
	replaced("the credentials changed", before)

	s.Stop(t)
	harness.Exec(t, s.Database(t), "UPDATE pool_keys SET expires_at = 1")
	before = db()
	s.Start(t)
	replaced("the keys expired", before)

	s.Stop(t)
	s.Configured("ORGKEYS_POOL", "0")
	s.Start(t)
	harness.Eventually(t, time.Minute, "nothing is left", func() bool {
		return len(db()) == 0 && len(inTransit(t, v)) == 0 && len(sealedInVault(t, v)) == 0
	})
	if org := harness.Org(); fromPool(t, s, s.Generate(t, org).ID) {
		t.Error("a key came out of a pool that is off")
	}
}

// TestPoolOfSealedKeys: keys of the mount of sealed deliveries wait there, and one that was
// taken is destroyed in Vault before it is released.
func TestPoolOfSealedKeys(t *testing.T) {
	t.Parallel()
	v, _, settings := onItsOwnVault(t)
	s := harness.Start(t, settings, poolOf(1), harness.Set("ORGKEYS_RESERVATION_TTL", "3s"))
	filled(t, s, 1)
	name := harness.Strings(t, s.Database(t), "SELECT id FROM pool_keys WHERE use = 'sealed'")[0]
	time.Sleep(5 * time.Second) // longer than the reaper's grace, and another round of it
	if there := sealedInVault(t, v); !slices.Contains(there, any(name)) {
		t.Fatalf("the key %s is not in Vault: %v", name, there)
	}
	org := harness.Org()
	m := mint(t, s, org, `{}`)
	key, err := enrollment(t, s.API, m.Token, newRecipient(t), time.Minute).Fetch(t.Context())
	must(t, err)
	sealed := s.Sink(t).Find(func(l harness.Leaf) bool { return l.Type == "orgkey.sealed" })
	if len(sealed) != 1 || sealed[0].Detail["attempt"] != name {
		t.Errorf("the events of the sealing are %+v, want the pool key %s", sealed, name)
	}
	if !fromPool(t, s, sealed[0].Object) || key.Fingerprint == "" {
		t.Error("the key is not said to be from the pool")
	}
	c := countKeys(t, v, "orgkeys-sealed")
	if c.exported[name] != 1 || c.deleted[name] != 1 {
		t.Errorf("the key was exported %d times and deleted %d times", c.exported[name], c.deleted[name])
	}
	filled(t, s, 1)
	output, code := counted(t, s, v)
	if code != 0 && code != 3 {
		t.Errorf("verify-export: exit code %d\n%s", code, output)
	}
}
