package node_test

import (
	"cmp"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"database/sql"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/hsm"
	"github.com/orgkeys/orgkeys/internal/hsm/tokentest"
	"github.com/orgkeys/orgkeys/internal/node"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/internal/sqlstore/pgtest"
	"github.com/orgkeys/orgkeys/policies"
)

// What all tests share: a PostgreSQL server, a SoftHSM token, a few RSA keys.
var (
	postgres *pgtest.Server
	token    *hsm.Token
	keyPairs []*rsa.PrivateKey
)

func TestMain(m *testing.M) {
	os.Exit(tokentest.Run(&token, func() int {
		code, err := withPostgres(m.Run)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
		return code
	}))
}

func withPostgres(run func() int) (_ int, err error) {
	if postgres, err = pgtest.Start(); err != nil {
		return 1, err
	}
	defer postgres.Close()
	for range 3 {
		key, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			return 1, err
		}
		keyPairs = append(keyPairs, key)
	}
	return run(), nil
}

// world is a service over real parts, with a clock of its own.
type world struct {
	t       testing.TB
	db      *sqlstore.DB
	log     *audit.Log
	service *node.Service
	opened  atomic.Int64 // values unsealed, or tried
	asked   atomic.Int64 // calls that did so
	down    atomic.Bool  // the sealer cannot be asked
	ahead   atomic.Int64 // how far the clock is ahead of the real one, in ns
	made    int
	raw     *sql.DB // the database, past sqlstore
	passed  int64   // of ahead, what forget has told the database, in ns
}

func (w *world) now() time.Time { return time.Now().Add(time.Duration(w.ahead.Load())) }

// exec changes the database past sqlstore.
func (w *world) exec(statement string, args ...any) {
	w.t.Helper()
	if _, err := w.raw.Exec(statement, args...); err != nil {
		w.t.Fatalf("%s: %v", statement, err)
	}
}

// Open counts.
func (w *world) Open(ctx context.Context, items []orgkey.Sealed) ([][]byte, error) {
	w.opened.Add(int64(len(items)))
	w.asked.Add(1)
	if w.down.Load() {
		return nil, orgkey.ErrUnavailable
	}
	return token.Open(ctx, items)
}

func (w *world) Seal(ctx context.Context, b orgkey.Binding, plaintext []byte) ([]byte, error) {
	return token.Seal(ctx, b, plaintext)
}

func (w *world) SealAll(ctx context.Context, values []orgkey.Unsealed) ([][]byte, error) {
	return token.SealAll(ctx, values)
}

// onBoth runs a test over SQLite and over PostgreSQL.
func onBoth(t *testing.T, test func(t *testing.T, w *world)) {
	t.Run("sqlite", func(t *testing.T) { test(t, newWorld(t, filepath.Join(t.TempDir(), "orgkeys.db"))) })
	t.Run("postgres", func(t *testing.T) {
		location, err := postgres.NewDatabase("t" + strings.ReplaceAll(uuid.NewString(), "-", ""))
		if err != nil {
			t.Fatal(err)
		}
		test(t, newWorld(t, location))
	})
}

func newWorld(t testing.TB, location string, sinks ...audit.Sink) *world {
	t.Helper()
	db, err := sqlstore.Open(t.Context(), location)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	db.UseEventKey(audit.EventKey{})
	logger := slog.New(slog.NewTextHandler(t.Output(), nil))
	if sinks == nil {
		sinks = []audit.Sink{audit.NewFileSink(filepath.Join(t.TempDir(), "audit.jsonl"))}
	}
	driver := "sqlite3"
	if strings.HasPrefix(location, "postgres") {
		driver = "pgx"
	}
	raw, err := sql.Open(driver, location)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Close() })
	w := &world{t: t, db: db, raw: raw, log: audit.NewLog(db, logger, sinks...)}
	w.service = w.another()
	running, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.log.Run(running) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

// another returns another replica, or the same after a restart.
func (w *world) another() *node.Service { return w.with(func(*node.Config) {}) }

// with returns a replica whose configuration was changed.
func (w *world) with(change func(*node.Config)) *node.Service {
	w.t.Helper()
	policy, err := authz.Load(w.t.Context(), policies.Files)
	if err != nil {
		w.t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(w.t.Output(), nil))
	opener, err := orgkey.NewOpener(w, log, w.now)
	if err != nil {
		w.t.Fatal(err)
	}
	c := node.Config{
		Store: w.db, Sealer: w, Opener: opener, Window: 300 * time.Second, AuditDeadline: 5 * time.Second, Now: w.now,
		Gate: gate.Gate{Policy: policy, AuditLog: w.log, Log: log},
	}
	change(&c)
	s, err := node.New(c)
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// key is an organization key and who holds it.
type key struct {
	id      string
	org     org.ID
	private *rsa.PrivateKey
}

// release puts a key into the store the way generating one does.
func (w *world) release(org org.ID) key {
	w.t.Helper()
	return w.releaseSealedFor(org, "")
}

// releaseSealedFor is release of a record that is damaged if it was sealed for
// another organization.
func (w *world) releaseSealedFor(org, sealedFor org.ID) key {
	w.t.Helper()
	k := key{uuid.NewString(), org, keyPairs[w.made%len(keyPairs)]}
	w.made++
	der, err := x509.MarshalPKIXPublicKey(&k.private.PublicKey)
	if err != nil {
		w.t.Fatal(err)
	}
	sealed, err := token.Seal(w.t.Context(), orgkey.PublicKeyOf(cmp.Or(sealedFor, org), k.id), der)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx := w.t.Context()
	w.must(w.db.Reserve(ctx, org, k.id, 100, time.Minute))
	w.must(w.db.StorePending(ctx, k.id, k.id, sealed, audit.New(audit.KeyCreated, org)))
	w.must(w.db.Release(ctx, k.id))
	return k
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) deleteKey(k key) {
	w.t.Helper()
	w.must(w.db.DeleteKey(w.t.Context(), k.org, k.id, audit.New(audit.KeyDeleted, k.org)))
}

func (k key) sign(line string) string {
	digest := sha256.Sum256([]byte(line))
	signature, err := rsa.SignPKCS1v15(nil, k.private, crypto.SHA256, digest[:])
	if err != nil {
		panic(err) // a 2048-bit key signs a digest
	}
	return base64.StdEncoding.EncodeToString(signature)
}

// fields is a request's body.
type fields map[string]any

// signedAt is a valid registration at a time, in the old form.
func (k key) signedAt(ip string, at time.Time) fields {
	stamp := strconv.FormatInt(at.UnixMilli(), 10)
	return fields{
		"ip": ip, "region": "eu", "timestamp": stamp, "signature": k.sign(ip + "|eu|" + stamp),
		"id_org": k.org, "version": "1", "status": "active",
	}
}

// with returns f with one field changed, or left out for nil.
func (f fields) with(name string, value any) fields {
	changed := fields{name: value}
	for n, v := range f {
		if n != name {
			changed[n] = v
		}
	}
	if value == nil {
		delete(changed, name)
	}
	return changed
}

func (f fields) body() []byte {
	text, err := json.Marshal(f)
	if err != nil {
		panic(err) // texts and numbers
	}
	return text
}

var (
	here  = node.Origin{Request: "r-1", Address: "198.51.100.1"}
	there = node.Origin{Request: "r-2", Address: "203.0.113.9"}
)

func (w *world) register(f fields) error {
	return w.service.Register(w.t.Context(), here, f.body())
}

func (w *world) unregister(f fields) error {
	return w.service.Unregister(w.t.Context(), here, f.body())
}

func (w *world) secrets(f fields) (got []node.Envelope, err error) {
	err = w.service.Secrets(w.t.Context(), here, f.body(), func(e []node.Envelope) error {
		got = e
		return nil
	})
	return got, err
}

// by is a call of a person.
func by(org org.ID, role authz.Role) gate.Call {
	return gate.Call{Caller: authz.Caller{Kind: authz.Person, Subject: "u-1", Org: org, Roles: []authz.Role{role}}, Request: "r-3", Address: "198.51.100.2"}
}

func (w *world) nodes(org org.ID) []node.Node {
	w.t.Helper()
	nodes, err := w.service.List(w.t.Context(), by(org, authz.User), org)
	w.must(err)
	return nodes
}

// events returns what is in the log, as "type reason" or "type outcome reason"
// where it did not succeed.
func (w *world) events() []string {
	w.t.Helper()
	last := audit.New(audit.EventsRead, "")
	w.must(w.log.Record(w.t.Context(), last))
	w.must(w.log.Acknowledged(w.t.Context(), last.ID))
	entries, err := w.db.Entries(w.t.Context(), 0, 10000)
	w.must(err)
	var all []string
	for _, entry := range entries {
		e, err := audit.Decode(entry.Leaf)
		w.must(err)
		if e.ID == last.ID {
			break
		}
		words := []string{string(e.Type)}
		if e.Outcome != audit.Success {
			words = append(words, string(e.Outcome))
		}
		if e.Reason != "" {
			words = append(words, e.Reason)
		}
		all = append(all, strings.Join(words, " "))
	}
	return all
}
