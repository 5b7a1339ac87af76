package chaos

import (
	"bufio"
	"context"
	"crypto/rsa"
	"crypto/x509"
	"database/sql"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // registers the driver "pgx"
	"github.com/redis/go-redis/v9"

	"github.com/orgkeys/orgkeys/internal/chaos/cluster"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// collect reads everything that the run left behind.
func collect(t *testing.T, c *cluster.Cluster, l *load) Evidence {
	t.Helper()
	e := Evidence{
		Limit: 5, Received: l.received, Deletions: l.requests, Deleted: l.deleted,
		Listed: map[string][]string{}, Public: map[string]string{},
	}
	if c.Vault != nil {
		e.Device = device(t, c.Vault.AuditFile)
	} else {
		e.Device = files(t, c)
	}
	for _, org := range l.orgs {
		for _, key := range l.list(t, org) {
			e.Listed[org] = append(e.Listed[org], key.ID)
			e.Public[key.ID] = key.thumbprint(t)
		}
	}
	db := database(t, c)
	settle(t, db)
	e.Log, e.Unplaced = readLog(t, db), number(t, db, "SELECT count(*) FROM events WHERE idx IS NULL")
	if err := db.QueryRow("SELECT size, root FROM log_head").Scan(&e.Size, &e.Root); err != nil {
		t.Fatal(err)
	}
	e.Keys = readKeys(t, db)
	e.Transit, e.Locks = transit(t, c), locks(t, c, db)
	// 3: consistent, and no sink's copy outside the data directory was given.
	if stdout, stderr, code := c.Replicas[0].Run(t, "audit", "verify"); code != 0 && code != 3 {
		e.Verified = stdout + stderr
	}
	return e
}

// listed is a key as the API lists it.
type listed struct{ ID, PublicKey string }

func (k listed) thumbprint(t *testing.T) string {
	t.Helper()
	block, _ := pem.Decode([]byte(k.PublicKey))
	if block == nil {
		t.Fatalf("key %s is listed with the public key %q", k.ID, k.PublicKey)
	}
	public, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		t.Fatalf("key %s: %v", k.ID, err)
	}
	return thumbprint(public.(*rsa.PublicKey))
}

// list is the keys that the API lists.
func (l *load) list(t *testing.T, org string) []listed {
	t.Helper()
	a, _, err := l.do(rand.New(rand.NewPCG(0, 0)), http.MethodGet, keys(org), l.tokens[org], nil)
	if err != nil || a.status != http.StatusOK {
		t.Fatalf("listing the keys of %s: status %d, %v", org, a.status, err)
	}
	var list struct{ Data []listed }
	if err := json.Unmarshal(a.body, &list); err != nil {
		t.Fatal(err)
	}
	return list.Data
}

func database(t *testing.T, c *cluster.Cluster) *sql.DB {
	t.Helper()
	db, err := sql.Open("pgx", c.Database)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// settle waits until the last events have their places.
func settle(t *testing.T, db *sql.DB) {
	t.Helper()
	harness.Eventually(t, harness.Patience, "every event has its place in the log", func() bool {
		return number(t, db, "SELECT count(*) FROM events WHERE idx IS NULL") == 0
	})
}

func number(t *testing.T, db *sql.DB, query string) (n int) {
	t.Helper()
	if err := db.QueryRow(query).Scan(&n); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return n
}

func rows(t *testing.T, db *sql.DB, query string, each func(scan func(...any) error) error) {
	t.Helper()
	r, err := db.Query(query)
	if err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	defer r.Close()
	for r.Next() {
		if err := each(r.Scan); err != nil {
			t.Fatalf("%s: %v", query, err)
		}
	}
	if err := r.Err(); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
}

func readLog(t *testing.T, db *sql.DB) []Leaf {
	t.Helper()
	var all []Leaf
	rows(t, db, "SELECT idx, leaf FROM events WHERE idx IS NOT NULL ORDER BY idx", func(scan func(...any) error) error {
		var l Leaf
		if err := scan(&l.Index, &l.Raw); err != nil {
			return err
		}
		all = append(all, l)
		return json.Unmarshal(l.Raw, &all[len(all)-1])
	})
	return all
}

func readKeys(t *testing.T, db *sql.DB) []KeyRow {
	t.Helper()
	var all []KeyRow
	rows(t, db, "SELECT id, org_id, state, coalesce(slot, 0), released_at FROM org_keys", func(scan func(...any) error) error {
		var k KeyRow
		var released sql.NullInt64
		err := scan(&k.ID, &k.Org, &k.State, &k.Slot, &released)
		if released.Valid {
			k.Released = time.UnixMicro(released.Int64)
		}
		all = append(all, k)
		return err
	})
	return all
}

// device reads when Vault's audit device had each event first: the request's
// entry is written before Vault acts on it.
func device(t *testing.T, path string) map[string]time.Time {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	had := map[string]time.Time{}
	lines := bufio.NewReaderSize(f, 1<<20)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return had
		}
		var entry struct {
			Time    time.Time
			Type    string
			Request struct {
				Path string
				Data struct {
					Batch []struct{ Event string } `json:"batch_input"`
				}
			}
		}
		if err := json.Unmarshal(line, &entry); err != nil {
			t.Fatalf("Vault's audit file: %v: %q", err, line)
		}
		if entry.Type != "request" || entry.Request.Path != "orgkeys-audit/sign/receipt" {
			continue
		}
		for _, item := range entry.Request.Data.Batch {
			if !strings.HasPrefix(item.Event, "{") {
				continue // a checkpoint, which the same key signs
			}
			var leaf struct{ ID string }
			if err := json.Unmarshal([]byte(item.Event), &leaf); err != nil {
				t.Fatalf("an event in Vault's audit file: %v: %q", err, item.Event)
			}
			if _, before := had[leaf.ID]; !before {
				had[leaf.ID] = entry.Time
			}
		}
	}
}

// files reads which events the file sinks hold, all of them, where there is no
// Vault. They do not say since when.
func files(t *testing.T, c *cluster.Cluster) map[string]time.Time {
	t.Helper()
	holders := map[string]int{}
	for _, r := range c.Replicas {
		seen := map[string]bool{}
		for _, event := range r.Sink(t).Events {
			if id := event.Leaf.ID; !seen[id] {
				seen[id] = true
				holders[id]++
			}
		}
	}
	had := map[string]time.Time{}
	for id, n := range holders {
		if n == len(c.Replicas) {
			had[id] = time.Time{}
		}
	}
	return had
}

// transit lists the keys left in Transit.
func transit(t *testing.T, c *cluster.Cluster) []string {
	t.Helper()
	if c.Vault == nil {
		return nil
	}
	client, err := c.Vault.Client(c.Vault.RootToken)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := client.Logical().ListWithContext(t.Context(), "orgkeys/keys")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	if secret == nil {
		return nil
	}
	for _, name := range secret.Data["keys"].([]any) {
		names = append(names, name.(string))
	}
	return names
}

// locks lists quota locks in Redis, and advisory locks in PostgreSQL that stay.
func locks(t *testing.T, c *cluster.Cluster, db *sql.DB) []string {
	t.Helper()
	client := redis.NewClient(&redis.Options{Addr: c.Redis.Addr()})
	defer client.Close()
	names, err := client.Keys(context.Background(), "*").Result()
	if err != nil {
		t.Fatal(err)
	}
	names = slices.DeleteFunc(names, func(name string) bool { return strings.HasPrefix(name, "orgkeys:quota:{.probe}:") }) // readiness takes them all the time
	// A lock of a session, which has no transaction, is as old as its silence.
	rows(t, db, `SELECT a.pid, coalesce(a.xact_start, a.state_change) AS since FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
		WHERE l.locktype = 'advisory' AND coalesce(a.xact_start, a.state_change) < now() - interval '15 s'`,
		func(scan func(...any) error) error {
			var pid int
			var since time.Time
			err := scan(&pid, &since)
			names = append(names, fmt.Sprintf("advisory, of backend %d since %s", pid, since))
			return err
		})
	return names
}

// Lives of what a crash leaves behind, as documented, and what a busy machine
// may add.
const (
	reservationLife = 10 * time.Second    // as configured in TestChaos
	reapInterval    = reservationLife / 2 // between looks for keys left in Transit
	blankLife       = 30 * time.Second    // of what is made in the place of a key whose deletion was interrupted
	lockLife        = 15 * time.Second    // 5 s in Redis; in PostgreSQL locks() lists none that is younger
	slack           = 15 * time.Second
)

// awaitLives waits until every life has ended that a crash can leave behind.
func awaitLives(t *testing.T, c *cluster.Cluster) {
	t.Helper()
	db := database(t, c)
	for _, r := range c.Replicas {
		harness.Eventually(t, 2*time.Minute, r.Address()+" is ready", r.Ready)
	}
	// Each is waited for as long as it may live, which counts from now.
	harness.Eventually(t, lockLife+slack, "no lock is left", func() bool { return len(locks(t, c, db)) == 0 })
	harness.Eventually(t, reservationLife+slack, "no reservation is left", func() bool {
		return number(t, db, "SELECT count(*) FROM org_keys WHERE state IN ('reserved', 'pending')") == 0
	})
	harness.Eventually(t, reservationLife+blankLife+reapInterval+slack, "no Transit key is left", func() bool { return len(transit(t, c)) == 0 })
}

// summary is the run in one line.
func (l *load) summary(e Evidence) string {
	kinds := map[string]int{}
	reasons := map[string]int{}
	for _, event := range e.Log {
		kinds[event.Type]++
		if event.Type == "orgkey.withdrawn" {
			reasons[event.Reason]++
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%d requests (%d without a whole answer, answers %v), %d keys received in full, %d deletions answered; ", l.asked, l.failed, l.statuses, len(l.received), len(l.deleted))
	fmt.Fprintf(&b, "%d events in the log (created %d, delivered %d, deleted %d, withdrawn %v)",
		len(e.Log), kinds["orgkey.created"], kinds["orgkey.delivered"], kinds["orgkey.deleted"], reasons)
	return b.String()
}
