// Package audittest has logs for tests: in a real database, with a file sink,
// and open to be tampered with.
package audittest

import (
	"crypto/ed25519"
	"database/sql"
	"encoding/base64"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// Log is a log in SQLite, and its file sink.
type Log struct {
	DB   *sqlstore.DB
	Raw  *sql.DB // for tampering, past sqlstore
	Sink string  // the sink's file
}

// New makes a log of 30 events in three batches.
func New(t *testing.T) Log {
	t.Helper()
	return Open(t).fill(t)
}

func (l Log) fill(t *testing.T) Log {
	t.Helper()
	for range 3 {
		l.Add(t, 10)
	}
	return l
}

// Open makes an empty log.
func Open(t *testing.T) Log {
	t.Helper()
	return OpenAt(t, filepath.Join(t.TempDir(), "orgkeys.db"))
}

// OpenAt opens the log in a database: a SQLite file, or a PostgreSQL URL.
func OpenAt(t *testing.T, location string) Log {
	t.Helper()
	db, err := sqlstore.Open(t.Context(), location)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	if err := db.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	db.UseEventKey(audit.EventKey{})
	driver, name := "sqlite3", "file:"+location
	if strings.HasPrefix(location, "postgres") {
		driver, name = "pgx", location
	}
	raw, err := sql.Open(driver, name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Close() })
	return Log{db, raw, filepath.Join(t.TempDir(), "elsewhere.jsonl")}
}

// Add records n events, sequences them and feeds the sink.
func (l Log) Add(t *testing.T, n int) {
	t.Helper()
	for range n {
		e := audit.New(audit.KeysListed, "acme")
		e.Actor = audit.Actor{Kind: "user", ID: "u-1"}
		e.Personal = audit.Personal{Name: "Ada"}
		if err := l.DB.Record(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.DB.Sequence(t.Context(), 1000, audit.Condition{}); err != nil {
		t.Fatal(err)
	}
	sink := audit.NewFileSink(l.Sink)
	last, err := sink.Last(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	entries, err := l.DB.Entries(t.Context(), last.Size, 1000)
	if err != nil {
		t.Fatal(err)
	}
	head, err := l.DB.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sink.Append(t.Context(), entries, head); err != nil {
		t.Fatal(err)
	}
}

// Exec runs statements on the database, past sqlstore.
func (l Log) Exec(t *testing.T, statements ...string) {
	t.Helper()
	for _, s := range statements {
		if _, err := l.Raw.Exec(s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
}

// Copy reads the sink's file.
func (l Log) Copy(t *testing.T) *verify.Copy {
	t.Helper()
	f, err := os.Open(l.Sink)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c, err := verify.ReadCopy(f)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// Text returns what stands in the sink's file.
func (l Log) Text(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(l.Sink)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// AlterEvent7 is a statement that names another actor in event 7.
const AlterEvent7 = `UPDATE events SET leaf = CAST(replace(leaf, 'u-1', 'u-2') AS BLOB), actor = 'u-2' WHERE idx = 7`

// Rebuild tampers and then recomputes the whole tree, as an attacker who has
// our code and the database would.
func (l Log) Rebuild(t *testing.T, statements ...string) {
	t.Helper()
	l.Exec(t, statements...)
	rows, err := l.Raw.Query("SELECT leaf FROM events WHERE idx IS NOT NULL ORDER BY idx")
	if err != nil {
		t.Fatal(err)
	}
	var leaves [][]byte
	for rows.Next() {
		var b []byte
		if err := rows.Scan(&b); err != nil {
			t.Fatal(err)
		}
		leaves = append(leaves, b)
	}
	hashes, root, err := audit.Grow(0, leaves, nil)
	if err != nil {
		t.Fatal(err)
	}
	l.Exec(t, "DELETE FROM log_hashes")
	for i, h := range hashes {
		if _, err := l.Raw.Exec("INSERT INTO log_hashes VALUES ($1, $2)", i, h[:]); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.Raw.Exec("UPDATE log_head SET size = $1, root = $2", len(leaves), root[:]); err != nil {
		t.Fatal(err)
	}
}

// SignedLog is a log with keys, nodes, receipts and signed checkpoints.
type SignedLog struct {
	Log
	Signer      audit.LocalSigner
	Checkpoints *audit.Checkpointer
	Policy      string
}

// NewSigner returns a signer with a fresh key.
func NewSigner(t *testing.T) audit.LocalSigner {
	t.Helper()
	_, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return audit.LocalSigner{Private: private}
}

// NewSigned makes a log in which acme's keys k-1 (used by two nodes, then
// deleted), k-2 (withdrawn) and k-3 (in use) live.
func NewSigned(t *testing.T) SignedLog {
	t.Helper()
	return NewSignedAt(t, filepath.Join(t.TempDir(), "orgkeys.db"))
}

// NewSignedAt makes that log in an empty database.
func NewSignedAt(t *testing.T, location string) SignedLog {
	t.Helper()
	l := OpenAt(t, location).fill(t)
	e := SignedLog{Log: l, Signer: NewSigner(t)}
	files := map[string][]byte{"authz.rego": []byte("package orgkeys.authz\n"), "data.json": []byte("{}")}
	e.Policy = authz.Revision(files)
	if err := l.DB.KeepPolicy(t.Context(), e.Policy, files); err != nil {
		t.Fatal(err)
	}
	public := e.Signer.Private.Public().(ed25519.PublicKey)
	if err := l.DB.KeepReceiptKeys(t.Context(), "vault", map[int]ed25519.PublicKey{1: public}); err != nil {
		t.Fatal(err)
	}
	e.Checkpoints = audit.NewCheckpointer(audit.NewLog(l.DB, slog.New(slog.DiscardHandler)), l.DB, e.Signer, time.Hour, slog.New(slog.DiscardHandler))
	e.Sign(t)
	e.Record(t, e.Key(audit.KeyCreated, "k-1"), e.Key(audit.KeyDelivered, "k-1"), e.Node(audit.NodeRegistered, "k-1", "n-1"), e.Node(audit.NodeRegistered, "k-1", "n-2"))
	e.Record(t, e.Key(audit.KeyCreated, "k-2"), e.Key(audit.KeyWithdrawn, "k-2"), e.Node(audit.SecretsFetched, "k-1", ""))
	e.Record(t, e.Key(audit.KeyDeleted, "k-1"), e.Key(audit.KeyCreated, "k-3"), e.Node(audit.NodeRegistered, "k-3", "n-1"))
	return e
}

// Key returns an event of a key, by a person.
func (e SignedLog) Key(t audit.Type, id string) audit.Event {
	event := audit.New(t, "acme")
	event.Actor, event.Object, event.Policy, event.Request = audit.Actor{Kind: authz.Person, ID: "u-1"}, id, e.Policy, "r-"+id
	event.Detail = map[string]string{"backend": "pkcs11", "algorithm": "rsa-2048", "fingerprint": "f <&> ü \u2028 " + id}
	return event
}

// Node returns an event that a node caused with its key.
func (e SignedLog) Node(t audit.Type, key, node string) audit.Event {
	event := audit.New(t, "acme")
	event.Actor, event.Object, event.Policy = audit.Actor{Kind: authz.Node, ID: key}, node, e.Policy
	event.Detail = map[string]string{"ip": "192.0.2.7"}
	return event
}

// Record puts events into the log, with receipts, and signs a checkpoint.
func (e SignedLog) Record(t *testing.T, events ...audit.Event) {
	t.Helper()
	head, err := e.DB.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := e.DB.Record(t.Context(), events...); err != nil {
		t.Fatal(err)
	}
	if _, err := e.DB.Sequence(t.Context(), 1000, audit.Condition{}); err != nil {
		t.Fatal(err)
	}
	entries, err := e.DB.Entries(t.Context(), head.Size, 1000)
	if err != nil {
		t.Fatal(err)
	}
	var receipts [][]byte
	for _, entry := range entries {
		receipts = append(receipts, []byte(Receipt(e.Signer, entry.Leaf)))
	}
	if err := e.DB.Acknowledge(t.Context(), "vault", head.Size+int64(len(receipts)), receipts); err != nil {
		t.Fatal(err)
	}
	e.Sign(t)
}

// Receipt returns the receipt that a sink with that key gives for a leaf.
func Receipt(s audit.LocalSigner, leaf []byte) string {
	return "vault:v1:" + base64.StdEncoding.EncodeToString(ed25519.Sign(s.Private, leaf))
}

// Sign signs a checkpoint.
func (e SignedLog) Sign(t *testing.T) {
	t.Helper()
	if err := e.Checkpoints.Sign(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// VKey returns the verifier key.
func (e SignedLog) VKey(t *testing.T) string {
	t.Helper()
	keys, err := e.DB.CheckpointKeys(t.Context())
	if err != nil || len(keys) != 1 {
		t.Fatalf("keys %q, %v", keys, err)
	}
	return keys[0]
}

// Must ends the test if err is not nil.
func Must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
