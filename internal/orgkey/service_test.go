package orgkey_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"database/sql"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/hsm"
	"github.com/orgkeys/orgkeys/internal/hsm/tokentest"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/policies"
)

// token is one SoftHSM token for all tests of the package: a process has one.
var token *hsm.Token

func TestMain(m *testing.M) { os.Exit(tokentest.Run(&token, m.Run)) }

// heldSink is a sink that acknowledges when it is let go.
type heldSink struct {
	*audit.FileSink
	held atomic.Bool
	fail atomic.Bool
}

func (s *heldSink) Append(ctx context.Context, entries []audit.Entry, c audit.Checkpoint) ([][]byte, error) {
	if s.fail.Load() {
		return nil, errors.New("the sink refuses")
	}
	for s.held.Load() {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
	return s.FileSink.Append(ctx, entries, c)
}

// fixture is a service on real parts.
type fixture struct {
	*orgkey.Service
	gate gate.Gate
	db   *sqlstore.DB
	raw  *sql.DB
	sink *heldSink
}

func newFixture(t *testing.T, change func(*orgkey.Config)) fixture {
	t.Helper()
	dir := t.TempDir()
	db, err := sqlstore.Open(t.Context(), filepath.Join(dir, "orgkeys.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	if err := db.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	db.UseEventKey(audit.EventKey{})
	raw, err := sql.Open("sqlite3", "file:"+filepath.Join(dir, "orgkeys.db")+"?_busy_timeout=5000")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Close() })
	policy, err := authz.Load(t.Context(), policies.Files)
	if err != nil {
		t.Fatal(err)
	}
	quiet := slog.New(slog.DiscardHandler)
	sink := &heldSink{FileSink: audit.NewFileSink(filepath.Join(dir, "audit.jsonl"))}
	auditLog := audit.NewLog(db, quiet, sink)
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- auditLog.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	cfg := orgkey.Config{
		Gate:  gate.Gate{Policy: policy, AuditLog: auditLog, Log: quiet},
		Store: db, Keystore: token, Sealer: token, Locker: orgkey.NewLocalLock(),
		Backend: "pkcs11", Limit: 5, Concurrency: 64, ReservationLife: time.Minute, AuditDeadline: 10 * time.Second,
	}
	if change != nil {
		change(&cfg)
	}
	if cfg.Opener, err = orgkey.NewOpener(cfg.Sealer, quiet, time.Now); err != nil {
		t.Fatal(err)
	}
	s, err := orgkey.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return fixture{s, cfg.Gate, db, raw, sink}
}

func owner(org org.ID) gate.Call {
	return gate.Call{Caller: authz.Caller{Kind: authz.Person, Subject: "u-1", Org: org, Roles: []authz.Role{authz.Owner}}, Request: "r-1", Address: "192.0.2.7"}
}

func accept(context.Context, orgkey.Generated) error { return nil }

// generate makes one key and returns its ID and a copy of its PEM.
func (f fixture) generate(t *testing.T, org org.ID) (id string, private []byte) {
	t.Helper()
	err := f.Generate(t.Context(), owner(org), org, func(_ context.Context, g orgkey.Generated) error {
		id, private = g.ID, append([]byte(nil), g.PEM...)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return id, private
}

// history returns the types and reasons of the events about object, in order.
func (f fixture) history(t *testing.T, where string, args ...any) string {
	t.Helper()
	rows, err := f.raw.Query("SELECT leaf FROM events WHERE "+where+" ORDER BY seq", args...)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	var all []string
	for rows.Next() {
		var leaf []byte
		if err := rows.Scan(&leaf); err != nil {
			t.Fatal(err)
		}
		e, err := audit.Decode(leaf)
		if err != nil {
			t.Fatal(err)
		}
		text := string(e.Type)
		if e.Reason != "" {
			text += ":" + e.Reason
		}
		all = append(all, text)
	}
	return strings.Join(all, " ")
}

func (f fixture) listed(t *testing.T, org org.ID) []orgkey.Key {
	t.Helper()
	keys, err := f.List(t.Context(), owner(org), org)
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

func TestAGeneratedKeyIsTheListedOne(t *testing.T) {
	f := newFixture(t, nil)
	id, private := f.generate(t, "acme")
	block, rest := pem.Decode(private)
	if block == nil || block.Type != "RSA PRIVATE KEY" || len(rest) != 0 {
		t.Fatalf("not one PKCS#1 PEM block: %v, %d bytes behind it", block, len(rest))
	}
	key, err := x509.ParsePKCS1PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	keys := f.listed(t, "acme")
	if len(keys) != 1 || keys[0].ID != id || keys[0].Public.Fingerprint() != orgkey.NewPublic(&key.PublicKey).Fingerprint() || keys[0].Fingerprint != keys[0].Public.Fingerprint() || keys[0].Delivered.IsZero() || keys[0].DeliveredTo == "" {
		t.Errorf("listed %+v", keys)
	}
	if key.N.BitLen() != orgkey.Bits {
		t.Errorf("%d bits", key.N.BitLen())
	}
	if got := f.history(t, "object = $1", id); got != "orgkey.created orgkey.delivered" {
		t.Errorf("events: %s", got)
	}
}

// Promise 1: the private key is cleared once it was handed out.
func TestPromise1_ThePrivateKeyIsClearedAfterItWasHandedOut(t *testing.T) {
	f := newFixture(t, nil)
	var kept []byte
	err := f.Generate(t.Context(), owner("acme"), "acme", func(_ context.Context, g orgkey.Generated) error {
		kept = g.PEM
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range kept {
		if b != 0 {
			t.Fatal("the PEM is still in memory")
		}
	}
}

// tapped is the token, with something else done where its keys are exported or
// destroyed.
type tapped struct {
	orgkey.Keystore
	export  func(context.Context, orgkey.BackendKey) ([]byte, error)
	destroy func(context.Context, orgkey.BackendKey) error
}

func (k tapped) Create(ctx context.Context, name string) (orgkey.BackendKey, error) {
	key, err := k.Keystore.Create(ctx, name)
	return tappedKey{key, k}, err
}

type tappedKey struct {
	orgkey.BackendKey
	by tapped
}

func (k tappedKey) Export(ctx context.Context) ([]byte, error) {
	if k.by.export == nil {
		return k.BackendKey.Export(ctx)
	}
	return k.by.export(ctx, k.BackendKey)
}

func (k tappedKey) Destroy(ctx context.Context) error {
	if k.by.destroy == nil {
		return k.BackendKey.Destroy(ctx)
	}
	return k.by.destroy(ctx, k.BackendKey)
}

// keeping keeps what it exports.
func keeping(exported *[]byte) orgkey.Keystore {
	return tapped{Keystore: token, export: func(ctx context.Context, k orgkey.BackendKey) (der []byte, err error) {
		*exported, err = k.Export(ctx)
		return *exported, err
	}}
}

// holding confirms that a key is gone when a test says so.
func holding(destroying func() error) orgkey.Keystore {
	return tapped{Keystore: token, destroy: func(ctx context.Context, k orgkey.BackendKey) error {
		return errors.Join(k.Destroy(ctx), destroying())
	}}
}

// guarded does not give keys out, for the reason that refuse gives, and notes
// whether they were destroyed in time.
func guarded(refuse func() error, destroyed *atomic.Bool) orgkey.Keystore {
	return tapped{token,
		func(context.Context, orgkey.BackendKey) ([]byte, error) { return nil, refuse() },
		func(ctx context.Context, k orgkey.BackendKey) error {
			destroyed.Store(ctx.Err() == nil)
			return k.Destroy(ctx)
		}}
}

func TestPromise1_TheExportedKeyIsCleared(t *testing.T) {
	var exported []byte
	f := newFixture(t, func(c *orgkey.Config) { c.Keystore = keeping(&exported) })
	for name, deliver := range map[string]func(context.Context, orgkey.Generated) error{
		"handed out":     func(context.Context, orgkey.Generated) error { return nil },
		"not handed out": func(context.Context, orgkey.Generated) error { return errors.New("the connection is gone") },
	} {
		if err := f.Generate(t.Context(), owner("acme"), "acme", deliver); (err == nil) != (name == "handed out") {
			t.Fatalf("%s: %v", name, err)
		}
		if len(exported) == 0 || bytes.ContainsFunc(exported, func(r rune) bool { return r != 0 }) {
			t.Errorf("%s: the exported key's %d bytes are still in memory", name, len(exported))
		}
	}
	exported = nil
	f = newFixture(t, func(c *orgkey.Config) {
		c.Keystore, c.AuditDeadline = keeping(&exported), time.Nanosecond
	})
	for range 50 { // the other half may fail before the key is exported
		if err := f.Generate(t.Context(), owner("acme"), "acme", accept); err == nil {
			t.Fatal("released without an acknowledgement")
		}
		if len(exported) > 0 {
			break
		}
	}
	if len(exported) == 0 || bytes.ContainsFunc(exported, func(r rune) bool { return r != 0 }) {
		t.Errorf("not acknowledged: the exported key's %d bytes are still in memory", len(exported))
	}
}

// The back end forgets the key while the log hears of it. The release waits
// for both, whichever takes longer.
func TestPromise1_NothingIsReleasedBeforeTheBackEndHasForgotten(t *testing.T) {
	forget := make(chan error)
	f := newFixture(t, func(c *orgkey.Config) {
		c.Keystore = holding(func() error { return <-forget })
	})
	for _, tt := range []struct {
		name   string
		forgot error
		events string
	}{
		{"it has", nil, "orgkey.created orgkey.delivered"},
		{"nobody knows", errors.New("no answer"), "orgkey.created orgkey.withdrawn:generation_failed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			org := org.ID(strings.ReplaceAll(tt.name, " ", "-"))
			released, ended := make(chan struct{}), make(chan error, 1)
			go func() {
				ended <- f.Generate(t.Context(), owner(org), org, func(context.Context, orgkey.Generated) error { close(released); return nil })
			}()
			waitFor(t, func() bool {
				return f.count(t, "SELECT count(*) FROM events WHERE type = 'orgkey.created' AND idx IS NOT NULL AND org_id = '"+string(org)+"'") == 1
			})
			select {
			case <-released:
				t.Error("released while the back end still had the key")
			case err := <-ended:
				t.Errorf("ended with %v while the back end still had the key", err)
			case <-time.After(300 * time.Millisecond):
			}
			forget <- tt.forgot
			if err := <-ended; !errors.Is(err, tt.forgot) || err != nil && !errors.Is(err, orgkey.ErrBackend) {
				t.Errorf("the caller hears %v", err)
			}
			if got := f.history(t, "type LIKE 'orgkey.%' AND object <> '' AND org_id = $1", org); got != tt.events {
				t.Errorf("events: %s", got)
			}
			if got, want := len(f.listed(t, org)), f.count(t, "SELECT count(*) FROM org_keys WHERE slot IS NOT NULL AND org_id = '"+string(org)+"'"); got != want || (got == 1) != (tt.forgot == nil) {
				t.Errorf("%d keys listed, %d places taken", got, want)
			}
		})
	}
}

// patient seals when the back end has been told to destroy its copy.
type patient struct {
	orgkey.Sealer
	told <-chan struct{}
}

func (p patient) Seal(ctx context.Context, b orgkey.Binding, plaintext []byte) ([]byte, error) {
	select {
	case <-p.told:
		return p.Sealer.Seal(ctx, b, plaintext)
	case <-time.After(5 * time.Second):
		return nil, errors.New("the back end's copy is still there")
	}
}

// A PKCS#11 library that has lost its sessions seals nothing before those that
// hold a key have given it up: destroying must not wait for sealing.
func TestAKeyIsDestroyedHoweverLongSealingTakes(t *testing.T) {
	told := make(chan struct{}, 1)
	f := newFixture(t, func(c *orgkey.Config) {
		c.Keystore = holding(func() error { told <- struct{}{}; return nil })
		c.Sealer = patient{c.Sealer, told}
	})
	if err := f.Generate(t.Context(), owner("acme"), "acme", accept); err != nil {
		t.Error(err)
	}
}

// stuck seals nothing for as long as its caller waits, and keeps why that ended.
type stuck struct {
	orgkey.Sealer
	cause *error
}

func (s stuck) Seal(ctx context.Context, _ orgkey.Binding, _ []byte) ([]byte, error) {
	<-ctx.Done()
	*s.cause = context.Cause(ctx)
	return nil, ctx.Err()
}

// A key that the back end does not give out leaves nothing, wherever its record
// is by then, and its caller waits for nothing else.
func TestAKeyThatIsNotExportedLeavesNothing(t *testing.T) {
	failed := errors.New("not today")
	for _, tt := range []struct {
		name   string
		change func(*orgkey.Config)
		before func(fixture)
		events string
	}{
		{"being sealed", func(c *orgkey.Config) { c.Sealer = stuck{c.Sealer, new(error)} }, func(fixture) {}, "orgkey.refused:generation_failed"},
		{"pending", func(c *orgkey.Config) { c.AuditDeadline = time.Minute }, func(f fixture) {
			waitFor(t, func() bool { return f.count(t, "SELECT count(*) FROM org_keys WHERE state = 'pending'") == 1 })
		}, "orgkey.created orgkey.withdrawn:generation_failed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var f fixture
			var destroyed atomic.Bool
			f = newFixture(t, func(c *orgkey.Config) {
				tt.change(c)
				c.Keystore = guarded(func() error { tt.before(f); return failed }, &destroyed)
			})
			f.sink.held.Store(true)
			started := time.Now()
			err := f.Generate(t.Context(), owner("acme"), "acme", accept)
			if took := time.Since(started); took > 15*time.Second { // half the reservation's life is 30
				t.Errorf("the caller waited %s", took)
			}
			if !errors.Is(err, failed) || !errors.Is(err, orgkey.ErrBackend) || errors.Is(err, gate.ErrAudit) {
				t.Errorf("the caller hears %v", err)
			}
			if got := f.history(t, "type LIKE 'orgkey.%'"); got != tt.events {
				t.Errorf("events: %s", got)
			}
			if n := f.count(t, "SELECT count(*) FROM org_keys WHERE slot IS NOT NULL"); n != 0 || !destroyed.Load() {
				t.Errorf("%d places are still taken; destroyed: %t", n, destroyed.Load())
			}
		})
	}
}

func TestAKeyIsDestroyedAlsoWhenItsCallerHasGone(t *testing.T) {
	ctx, leave := context.WithCancel(t.Context())
	var destroyed atomic.Bool
	f := newFixture(t, func(c *orgkey.Config) {
		c.Keystore = guarded(func() error { leave(); return context.Canceled }, &destroyed)
	})
	if err := f.Generate(ctx, owner("acme"), "acme", accept); !errors.Is(err, context.Canceled) {
		t.Errorf("the caller hears %v", err)
	}
	if !destroyed.Load() {
		t.Error("the back end was told to destroy the key, and not given the time")
	}
}

// overtaken stores a record, and answers after something else has happened.
type overtaken struct {
	orgkey.Store
	stored, happened chan struct{}
}

func (o overtaken) StorePending(ctx context.Context, id, asked string, sealed []byte, created audit.Event) error {
	err := o.Store.StorePending(context.WithoutCancel(ctx), id, asked, sealed, created)
	close(o.stored)
	<-o.happened
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(300 * time.Millisecond):
		return err
	}
}

// A record that is being stored when the export fails or the caller leaves is
// known to be there, and withdrawn: it takes up no place until it expires.
func TestARecordThatIsOvertakenIsWithdrawn(t *testing.T) {
	failed := errors.New("not today")
	for _, tt := range []struct {
		name   string
		failed error // of the export, or else the caller leaves
		reason string
	}{
		{"by a failure", failed, "generation_failed"},
		{"by the caller's leaving", nil, "caller_gone"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			stored, happened := make(chan struct{}), make(chan struct{})
			ctx, leave := context.WithCancel(t.Context())
			defer leave()
			f := newFixture(t, func(c *orgkey.Config) {
				c.Store = overtaken{c.Store, stored, happened}
				c.Keystore = guarded(func() error {
					<-stored
					defer close(happened)
					if tt.failed == nil {
						leave()
					}
					return tt.failed
				}, new(atomic.Bool))
			})
			if err := f.Generate(ctx, owner("acme"), "acme", accept); err == nil || !errors.Is(err, cmp.Or(tt.failed, context.Canceled)) {
				t.Errorf("the caller hears %v", err)
			}
			if n := f.count(t, "SELECT count(*) FROM org_keys WHERE slot IS NOT NULL"); n != 0 {
				t.Errorf("%d places are still taken", n)
			}
			if got := f.history(t, "type LIKE 'orgkey.%'"); got != "orgkey.created orgkey.withdrawn:"+tt.reason {
				t.Errorf("events: %s", got)
			}
		})
	}
}

// buggy panics where it should seal.
type buggy struct{ orgkey.Sealer }

func (buggy) Seal(context.Context, orgkey.Binding, []byte) ([]byte, error) { panic("secret") }

// A bug in one generation ends that generation, and nothing else.
func TestAPanicEndsOneGenerationAlone(t *testing.T) {
	for _, tt := range []struct {
		name string
		fail func(*orgkey.Config, *atomic.Bool)
	}{
		{"sealing", func(c *orgkey.Config, destroyed *atomic.Bool) {
			c.Sealer = buggy{c.Sealer}
			c.Keystore = guarded(func() error { return errors.New("not today") }, destroyed)
		}},
		{"exporting", func(c *orgkey.Config, destroyed *atomic.Bool) {
			c.Keystore = guarded(func() error { panic("secret") }, destroyed)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var log bytes.Buffer
			var destroyed atomic.Bool
			f := newFixture(t, func(c *orgkey.Config) {
				tt.fail(c, &destroyed)
				c.Gate.Log = slog.New(slog.NewTextHandler(&log, nil))
			})
			if err := f.Generate(t.Context(), owner("acme"), "acme", accept); err == nil {
				t.Error("the caller hears of success")
			}
			if n := f.count(t, "SELECT count(*) FROM org_keys WHERE slot IS NOT NULL"); n != 0 || !destroyed.Load() {
				t.Errorf("%d places are still taken; destroyed: %t", n, destroyed.Load())
			}
			if !strings.Contains(log.String(), "msg=panic") || !strings.Contains(log.String(), "stack=") || strings.Contains(log.String(), "secret") {
				t.Errorf("the log: %s", &log)
			}
		})
	}
}

// A PKCS#11 token that was told why a caller left would take a lost session of
// that caller's for a loss of its own, and start over.
func TestNeitherHalfHearsWhyTheOtherFailed(t *testing.T) {
	var cause error
	f := newFixture(t, func(c *orgkey.Config) {
		c.Sealer = stuck{c.Sealer, &cause}
		c.Keystore = guarded(func() error { return errors.New("not today") }, new(atomic.Bool))
	})
	if err := f.Generate(t.Context(), owner("acme"), "acme", accept); !errors.Is(err, orgkey.ErrBackend) {
		t.Errorf("the caller hears %v", err)
	}
	if cause != context.Canceled {
		t.Errorf("the sealer hears %v", cause)
	}
}

// A copy that may still be there is in the process's log, whatever else failed.
func TestACopyThatMayStillBeThereIsLogged(t *testing.T) {
	var log bytes.Buffer
	f := newFixture(t, func(c *orgkey.Config) {
		c.Keystore = holding(func() error { return errors.New("no answer") })
		c.Sealer = refusing{c.Sealer}
		c.Gate.Log = slog.New(slog.NewTextHandler(&log, nil))
	})
	if err := f.Generate(t.Context(), owner("acme"), "acme", accept); !errors.Is(err, orgkey.ErrBackend) {
		t.Errorf("the caller hears %v", err)
	}
	if !strings.Contains(log.String(), "may still have its copy") || !strings.Contains(log.String(), "no answer") {
		t.Errorf("the log: %s", &log)
	}
}

// late makes keys when the caller's time is over.
type late struct{ orgkey.Keystore }

func (late) Create(ctx context.Context, _ string) (orgkey.BackendKey, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// A generation that runs out of its time is one too many for the back end,
// wherever it was by then: the caller and the log hear the same.
func TestAGenerationThatRunsOutOfTimeIsOneTooMany(t *testing.T) {
	for _, tt := range []struct {
		name   string
		slow   orgkey.Keystore
		events string
	}{
		{"making the key", late{token}, "orgkey.refused:overloaded"},
		{"destroying the copy", holding(func() error { time.Sleep(6 * time.Second); return nil }), "orgkey.created orgkey.withdrawn:overloaded"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, func(c *orgkey.Config) { c.Keystore, c.ReservationLife = tt.slow, 10*time.Second })
			if err := f.Generate(t.Context(), owner("acme"), "acme", accept); !errors.Is(err, orgkey.ErrOverloaded) {
				t.Errorf("the caller hears %v", err)
			}
			if got := f.history(t, "type LIKE 'orgkey.%'"); got != tt.events {
				t.Errorf("events: %s", got)
			}
		})
	}
}

// A caller whose key is not released anyhow hears so at once, however long the
// log takes.
func TestAKeyThatIsNotForgottenWaitsForNoSink(t *testing.T) {
	lost := errors.New("no answer")
	var f fixture
	f = newFixture(t, func(c *orgkey.Config) {
		c.AuditDeadline = time.Minute
		c.Keystore = holding(func() error {
			waitFor(t, func() bool { return f.count(t, "SELECT count(*) FROM org_keys WHERE state = 'pending'") == 1 })
			return lost
		})
	})
	f.sink.held.Store(true)
	started := time.Now()
	err := f.Generate(t.Context(), owner("acme"), "acme", accept)
	if took := time.Since(started); took > 15*time.Second { // half the reservation's life is 30
		t.Errorf("the caller waited %s", took)
	}
	if !errors.Is(err, lost) || !errors.Is(err, orgkey.ErrBackend) || errors.Is(err, gate.ErrAudit) {
		t.Errorf("the caller hears %v", err)
	}
	if got := f.history(t, "type LIKE 'orgkey.%'"); got != "orgkey.created orgkey.withdrawn:generation_failed" {
		t.Errorf("events: %s", got)
	}
}

// always grants every lock at once.
type always struct{}

func (always) Lock(context.Context, org.ID) (func(), error) { return func() {}, nil }

// never grants none.
type never struct{}

func (never) Lock(context.Context, org.ID) (func(), error) { return nil, errors.New("no lock today") }

// Promise 3: the database decides, whatever the lock does.
func TestPromise3_TheQuotaHoldsWhateverTheLockDoes(t *testing.T) {
	for name, lock := range map[string]orgkey.Locker{"a lock that always grants": always{}, "a lock that never does": never{}, "the local lock": orgkey.NewLocalLock()} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, func(c *orgkey.Config) { c.Locker = lock })
			var made, refused atomic.Int64
			var wg sync.WaitGroup
			for range 30 {
				wg.Go(func() {
					err := f.Generate(t.Context(), owner("acme"), "acme", accept)
					var quota *orgkey.QuotaError
					switch {
					case err == nil:
						made.Add(1)
					case errors.As(err, &quota):
						refused.Add(1)
					default:
						t.Error(err)
					}
				})
			}
			wg.Wait()
			if made.Load() != 5 || refused.Load() != 25 || len(f.listed(t, "acme")) != 5 {
				t.Errorf("%d made, %d refused, %d listed", made.Load(), refused.Load(), len(f.listed(t, "acme")))
			}
		})
	}
}

// Promise 4: nothing is released before the sink has acknowledged the event.
func TestPromise4_NothingIsReleasedBeforeTheSinkAcknowledged(t *testing.T) {
	f := newFixture(t, nil)
	f.sink.held.Store(true)
	var released atomic.Bool
	done := make(chan error, 1)
	go func() {
		done <- f.Generate(context.Background(), owner("acme"), "acme", func(context.Context, orgkey.Generated) error {
			released.Store(true)
			return nil
		})
	}()
	waitFor(t, func() bool { return f.count(t, "SELECT count(*) FROM org_keys WHERE state = 'pending'") == 1 })
	time.Sleep(300 * time.Millisecond) // long enough for a release that did not wait
	if released.Load() || f.count(t, "SELECT count(*) FROM org_keys WHERE state = 'released'") != 0 {
		t.Fatal("released before the sink acknowledged")
	}
	f.sink.held.Store(false)
	if err := <-done; err != nil || !released.Load() {
		t.Errorf("after the sink acknowledged: %v", err)
	}
}

func (f fixture) execute(t *testing.T, statement string) {
	t.Helper()
	if _, err := f.raw.Exec(statement); err != nil {
		t.Fatal(err)
	}
}

func (f fixture) count(t *testing.T, statement string) (n int) {
	t.Helper()
	if err := f.raw.QueryRow(statement).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func waitFor(t *testing.T, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatal("it did not come to pass within 20 s")
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// Promise 4: without the sink there is no release, and the key is withdrawn.
func TestPromise4_AFailingSinkWithdrawsTheKey(t *testing.T) {
	f := newFixture(t, func(c *orgkey.Config) { c.AuditDeadline = 200 * time.Millisecond })
	f.sink.fail.Store(true)
	err := f.Generate(t.Context(), owner("acme"), "acme", func(context.Context, orgkey.Generated) error {
		t.Error("released")
		return nil
	})
	if !errors.Is(err, gate.ErrAudit) {
		t.Fatalf("the caller hears %v", err)
	}
	if got := f.history(t, "type LIKE 'orgkey.%'"); got != "orgkey.created orgkey.withdrawn:audit_not_acknowledged" {
		t.Errorf("events: %s", got)
	}
	f.sink.fail.Store(false)
	waitFor(t, func() bool { return f.Generate(t.Context(), owner("acme"), "acme", accept) == nil })
}

func TestAKeyThatCouldNotBeWrittenOutIsWithdrawn(t *testing.T) {
	f := newFixture(t, nil)
	broken := errors.New("connection reset")
	err := f.Generate(t.Context(), owner("acme"), "acme", func(context.Context, orgkey.Generated) error { return broken })
	if !errors.Is(err, broken) {
		t.Fatalf("the caller hears %v", err)
	}
	if keys := f.listed(t, "acme"); len(keys) != 0 {
		t.Errorf("still listed: %v", keys)
	}
	if got := f.history(t, "type LIKE 'orgkey.%' AND object <> ''"); got != "orgkey.created orgkey.withdrawn:write_failed" {
		t.Errorf("events: %s", got)
	}
}

// A key that was not handed out, and cannot be withdrawn at once, holds nobody
// up: that is done when the store takes writes again, or else as the service ends.
func TestAWithdrawalThatFailedIsMadeUpFor(t *testing.T) {
	broken := errors.New("connection reset")
	for _, tt := range []struct {
		name  string
		sweep func(t *testing.T, f fixture, mend func())
	}{
		{"while it serves", func(t *testing.T, f fixture, mend func()) {
			ctx, stop := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() { ended <- f.Sweep(ctx, 10*time.Millisecond) }()
			mend()
			waitFor(t, func() bool { return f.count(t, "SELECT count(*) FROM org_keys WHERE slot IS NOT NULL") == 0 })
			stop()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}},
		{"as it ends", func(t *testing.T, f fixture, mend func()) {
			mend()
			ctx, stop := context.WithCancel(t.Context())
			stop()
			if err := f.Sweep(ctx, time.Hour); err != nil {
				t.Error(err)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(t, nil)
			started := time.Now()
			err := f.Generate(t.Context(), owner("acme"), "acme", func(context.Context, orgkey.Generated) error {
				f.execute(t, "CREATE TRIGGER full BEFORE UPDATE ON org_keys BEGIN SELECT RAISE(ABORT, 'the disk is full'); END")
				return broken
			})
			if took := time.Since(started); !errors.Is(err, broken) || took > 10*time.Second {
				t.Fatalf("the caller hears %v after %s", err, took)
			}
			tt.sweep(t, f, func() { f.execute(t, "DROP TRIGGER full") })
			if got := f.history(t, "type LIKE 'orgkey.%' AND object <> ''"); got != "orgkey.created orgkey.withdrawn:write_failed" {
				t.Errorf("events: %s", got)
			}
			if keys := f.listed(t, "acme"); len(keys) != 0 {
				t.Errorf("still listed: %v", keys)
			}
		})
	}
}

// refusing is a back end that is there and does nothing.
type refusing struct{ orgkey.Sealer }

func (refusing) Create(context.Context, string) (orgkey.BackendKey, error) {
	return nil, fmt.Errorf("%w: sealed", orgkey.ErrUnavailable)
}

func (refusing) Seal(context.Context, orgkey.Binding, []byte) ([]byte, error) {
	return nil, fmt.Errorf("%w: sealed", orgkey.ErrUnavailable)
}

// What the back end failed to do and what the store failed to do are two
// errors: the contract has words for the first.
func TestAFailureOfTheBackEndIsNotOneOfTheStore(t *testing.T) {
	for _, tt := range []struct {
		name    string
		broken  func(*orgkey.Config)
		refused string // in the database
		backend bool
	}{
		{"no key is made", func(c *orgkey.Config) { c.Keystore = refusing{} }, "", true},
		{"nothing is sealed", func(c *orgkey.Config) { c.Sealer = refusing{c.Sealer} }, "", true},
		{"no place is given", nil, "INSERT", false},
		{"no record is stored", nil, "UPDATE", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(t, tt.broken)
			if tt.refused != "" {
				f.execute(t, "CREATE TRIGGER full BEFORE "+tt.refused+" ON org_keys BEGIN SELECT RAISE(ABORT, 'the disk is full'); END")
			}
			err := f.Generate(t.Context(), owner("acme"), "acme", accept)
			if !errors.Is(err, orgkey.ErrUnavailable) || errors.Is(err, orgkey.ErrBackend) != tt.backend {
				t.Errorf("the caller hears %v; of the back end: %t, want %t", err, errors.Is(err, orgkey.ErrBackend), tt.backend)
			}
		})
	}
}

func TestACallerWhoLeavesBeforeTheReleaseGetsNothingAndLeavesNothing(t *testing.T) {
	f := newFixture(t, nil)
	f.sink.held.Store(true)
	ctx, leave := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- f.Generate(ctx, owner("acme"), "acme", func(context.Context, orgkey.Generated) error {
			t.Error("released to nobody")
			return nil
		})
	}()
	waitFor(t, func() bool { return f.count(t, "SELECT count(*) FROM org_keys WHERE state = 'pending'") == 1 })
	leave()
	if err := <-done; err == nil {
		t.Error("no error for a caller who left")
	}
	f.sink.held.Store(false)
	if got := f.history(t, "type LIKE 'orgkey.%'"); got != "orgkey.created orgkey.withdrawn:caller_gone" {
		t.Errorf("events: %s", got)
	}
	if n := f.count(t, "SELECT count(*) FROM org_keys WHERE slot IS NOT NULL"); n != 0 {
		t.Errorf("%d places are still taken", n)
	}
}

// Promise 6: deleting all keys cancels what is being generated.
func TestPromise6_DeletingAllKeysCancelsAGenerationUnderWay(t *testing.T) {
	f := newFixture(t, nil)
	f.sink.held.Store(true)
	done := make(chan error, 1)
	go func() {
		done <- f.Generate(context.Background(), owner("acme"), "acme", func(context.Context, orgkey.Generated) error {
			t.Error("released after everything was deleted")
			return nil
		})
	}()
	waitFor(t, func() bool { return f.count(t, "SELECT count(*) FROM org_keys WHERE state = 'pending'") == 1 })
	if n, err := f.DeleteAll(t.Context(), owner("acme"), "acme", false); err != nil || n.Keys != 0 {
		t.Fatalf("deleted %+v, %v", n, err)
	}
	f.sink.held.Store(false)
	if err := <-done; !errors.Is(err, orgkey.ErrGone) {
		t.Errorf("the generation ended with %v", err)
	}
}

// A full organization always hears 400, and one generation too many 503 at once.
func TestOverloadIsRefusedAtOnceAndAFullOrganizationStillHearsItsQuota(t *testing.T) {
	f := newFixture(t, func(c *orgkey.Config) { c.Concurrency, c.Limit = 1, 1 })
	f.generate(t, "full")
	f.sink.held.Store(true)
	done := make(chan error, 1)
	go func() { done <- f.Generate(context.Background(), owner("slow"), "slow", accept) }()
	waitFor(t, func() bool { return f.count(t, "SELECT count(*) FROM org_keys WHERE state = 'pending'") == 1 })

	if err := f.Generate(t.Context(), owner("other"), "other", accept); !errors.Is(err, orgkey.ErrOverloaded) {
		t.Errorf("one too many: %v", err)
	}
	var quota *orgkey.QuotaError
	if err := f.Generate(t.Context(), owner("full"), "full", accept); !errors.As(err, &quota) {
		t.Errorf("a full organization under overload: %v", err)
	}
	f.sink.held.Store(false)
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := f.Generate(t.Context(), owner("other"), "other", accept); err != nil {
		t.Errorf("the refused one's place was not given back: %v", err)
	}
}

// A caller who reads its key slowly takes no place from others.
func TestASlowReaderLeavesItsPlaceToOthers(t *testing.T) {
	f := newFixture(t, func(c *orgkey.Config) { c.Concurrency = 1 })
	writing, read, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		done <- f.Generate(context.Background(), owner("slow"), "slow", func(context.Context, orgkey.Generated) error {
			close(writing)
			<-read
			return nil
		})
	}()
	<-writing
	if err := f.Generate(t.Context(), owner("other"), "other", accept); err != nil {
		t.Error(err)
	}
	close(read)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Promise 2: a ciphertext moved to another row does not open, and reading fails closed.
func TestPromise2_SwappedCiphertextsFailTheWholeList(t *testing.T) {
	for name, orgs := range map[string][2]org.ID{"within an organization": {"acme", "acme"}, "across organizations": {"acme", "other"}} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, nil)
			a, _ := f.generate(t, orgs[0])
			b, _ := f.generate(t, orgs[1])
			if _, err := f.raw.Exec(`CREATE TABLE before AS SELECT id, sealed FROM org_keys;
				UPDATE org_keys SET sealed = (SELECT sealed FROM before WHERE before.id <> org_keys.id) WHERE id IN ($1, $2)`, a, b); err != nil {
				t.Fatal(err)
			}
			keys, err := f.List(t.Context(), owner("acme"), "acme")
			if !errors.Is(err, orgkey.ErrSealBroken) || keys != nil {
				t.Errorf("listed %v, %v", keys, err)
			}
			if got := f.history(t, "type = 'orgkey.listed'"); got != "orgkey.listed:seal_broken" {
				t.Errorf("events: %s", got)
			}
		})
	}
}

// countingSealer counts what it is asked to open.
type countingSealer struct {
	orgkey.Sealer
	opened atomic.Int64
}

func (s *countingSealer) Open(ctx context.Context, items []orgkey.Sealed) ([][]byte, error) {
	s.opened.Add(int64(len(items)))
	return s.Sealer.Open(ctx, items)
}

// A list asks the back end once for each key, and again for one whose
// ciphertext is not the one that was opened.
func TestOpenedKeysAreRememberedByTheirCiphertext(t *testing.T) {
	sealer := &countingSealer{Sealer: token}
	f := newFixture(t, func(c *orgkey.Config) { c.Sealer = sealer })
	f.generate(t, "acme")
	f.generate(t, "acme")
	for range 3 {
		f.listed(t, "acme")
	}
	if n := sealer.opened.Load(); n != 2 {
		t.Errorf("3 lists of 2 keys opened %d values, want 2", n)
	}
	if _, err := f.raw.Exec(`CREATE TABLE before AS SELECT id, sealed FROM org_keys;
		UPDATE org_keys SET sealed = (SELECT sealed FROM before WHERE before.id <> org_keys.id)`); err != nil {
		t.Fatal(err)
	}
	if keys, err := f.List(t.Context(), owner("acme"), "acme"); !errors.Is(err, orgkey.ErrSealBroken) {
		t.Errorf("after their ciphertexts were swapped: listed %v, %v", keys, err)
	}
}

// Promise 5: every authenticated operation, denied ones and reads included, leaves its own event.
func TestPromise5_EveryOperationLeavesItsEvent(t *testing.T) {
	f := newFixture(t, func(c *orgkey.Config) { c.Limit = 1 })
	billing := owner("acme")
	billing.Caller.Roles = []authz.Role{authz.Billing}
	id, _ := f.generate(t, "acme")
	steps := []struct {
		do   func() error
		want string
	}{
		{func() error { return f.Generate(t.Context(), owner("acme"), "acme", accept) }, "orgkey.refused:quota"},
		{func() error { _, err := f.List(t.Context(), owner("acme"), "acme"); return err }, "orgkey.listed"},
		{func() error { _, err := f.List(t.Context(), billing, "acme"); return err }, "access.denied:insufficient_role"},
		{func() error { _, err := f.List(t.Context(), owner("evil"), "acme"); return err }, "access.denied:other_organization"},
		{func() error { return f.Delete(t.Context(), owner("acme"), "acme", "no-such-key") }, "request.failed:not_found"},
		{func() error { return f.Delete(t.Context(), owner("acme"), "acme", id) }, "orgkey.deleted"},
		{func() error { _, err := f.DeleteAll(t.Context(), owner("acme"), "acme", false); return err }, "orgkey.all_deleted"},
		{func() error {
			return f.gate.Reject(t.Context(), owner("acme"), "acme", authz.GenerateKey, "", "not_acceptable")
		}, "request.failed:not_acceptable"},
		{func() error {
			return f.gate.Reject(t.Context(), owner("acme"), "", authz.GenerateKey, "", "malformed_organization")
		}, "request.failed:malformed_organization"},
		{func() error {
			return f.gate.Reject(t.Context(), owner("evil"), "acme", authz.GenerateKey, "", "not_acceptable")
		}, "access.denied:other_organization"},
	}
	for i, s := range steps {
		last := f.count(t, "SELECT max(seq) FROM events")
		_ = s.do()
		if got := f.history(t, "seq > $1", last); got != s.want {
			t.Errorf("step %d left %q, want %q", i, got, s.want)
		}
	}
}

// lostAnswer reserves and does not say so, as a store does when its caller's
// time ends while the change is on its way.
type lostAnswer struct{ *sqlstore.DB }

func (s lostAnswer) Reserve(ctx context.Context, org org.ID, id string, limit int, life time.Duration) error {
	return errors.Join(context.Canceled, s.DB.Reserve(ctx, org, id, limit, life))
}

// Promise 3: a client that hangs up holds no place.
func TestPromise3_AReservationWhoseAnswerWasLostIsGivenBack(t *testing.T) {
	f := newFixture(t, func(c *orgkey.Config) { c.Store = lostAnswer{c.Store.(*sqlstore.DB)} })
	if err := f.Generate(t.Context(), owner("acme"), "acme", accept); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if n := f.count(t, "SELECT count(*) FROM org_keys WHERE slot IS NOT NULL"); n != 0 {
		t.Errorf("%d places are held", n)
	}
}

// lostRecord stores a record and does not say so, or fails and does not say whether it did.
type lostRecord struct {
	*sqlstore.DB
	stores bool
}

func (s lostRecord) StorePending(ctx context.Context, id, asked string, sealed []byte, created audit.Event) error {
	if !s.stores {
		return orgkey.ErrUnavailable
	}
	return errors.Join(orgkey.ErrUnavailable, s.DB.StorePending(ctx, id, asked, sealed, created))
}

// Promise 3: nor does a key that nobody was handed, whatever became of its record.
func TestPromise3_ARecordWhoseAnswerWasLostHoldsNoPlace(t *testing.T) {
	for name, c := range map[string]struct {
		stores bool
		events string
	}{
		"stored":     {true, "orgkey.created orgkey.withdrawn:unavailable"},
		"not stored": {false, "orgkey.refused:unavailable"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, func(config *orgkey.Config) { config.Store = lostRecord{config.Store.(*sqlstore.DB), c.stores} })
			if err := f.Generate(t.Context(), owner("acme"), "acme", accept); !errors.Is(err, orgkey.ErrUnavailable) {
				t.Fatal(err)
			}
			if n := f.count(t, "SELECT count(*) FROM org_keys WHERE slot IS NOT NULL"); n != 0 {
				t.Errorf("%d places are held", n)
			}
			if got := f.history(t, "type LIKE 'orgkey.%'"); got != c.events {
				t.Errorf("events: %s, want %s", got, c.events)
			}
		})
	}
}

// outage is a store that answers no change of a key until it is over, whether it is done or not.
type outage struct {
	*sqlstore.DB
	stores, withdraws bool
	over              atomic.Bool
}

func (s *outage) StorePending(ctx context.Context, id, asked string, sealed []byte, created audit.Event) error {
	return lostRecord{s.DB, s.stores}.StorePending(ctx, id, asked, sealed, created)
}

func (s *outage) Withdraw(ctx context.Context, id string, event audit.Event) (bool, error) {
	if s.over.Load() {
		return s.DB.Withdraw(ctx, id, event)
	}
	if !s.withdraws {
		return false, orgkey.ErrUnavailable
	}
	_, err := s.DB.Withdraw(ctx, id, event)
	return false, errors.Join(orgkey.ErrUnavailable, err)
}

// Promises 3 and 5: a generation in an outage of the store leaves its one outcome, and no
// place, when that is over.
func TestPromise5_AGenerationInAnOutageLeavesItsEventAfterIt(t *testing.T) {
	for _, c := range []struct {
		name              string
		stores, withdraws bool
		events            string
	}{
		{"nothing was stored", false, false, "orgkey.refused:unavailable"},
		{"the record was stored", true, false, "orgkey.created orgkey.withdrawn:unavailable"},
		{"it was withdrawn, too", true, true, "orgkey.created orgkey.withdrawn:unavailable"},
	} {
		t.Run(c.name, func(t *testing.T) {
			store := &outage{stores: c.stores, withdraws: c.withdraws}
			f := newFixture(t, func(config *orgkey.Config) {
				store.DB = config.Store.(*sqlstore.DB)
				config.Store = store
			})
			if err := f.Generate(t.Context(), owner("acme"), "acme", accept); !errors.Is(err, orgkey.ErrUnavailable) {
				t.Fatal(err)
			}
			store.over.Store(true)
			ctx, stop := context.WithCancel(t.Context())
			stop()
			if err := f.Sweep(ctx, time.Hour); err != nil {
				t.Error(err)
			}
			if n := f.count(t, "SELECT count(*) FROM org_keys WHERE slot IS NOT NULL"); n != 0 {
				t.Errorf("%d places are held", n)
			}
			if got := f.history(t, "type LIKE 'orgkey.%'"); got != c.events {
				t.Errorf("events: %s, want %s", got, c.events)
			}
		})
	}
}

func TestAnotherOrganizationsKeyIsNotFound(t *testing.T) {
	f := newFixture(t, nil)
	id, _ := f.generate(t, "acme")
	if err := f.Delete(t.Context(), owner("other"), "other", id); !errors.Is(err, orgkey.ErrNotFound) {
		t.Errorf("deleting it under one's own organization: %v", err)
	}
}

// Promise 3: a crash holds a place no longer than one reservation's life.
func TestPromise3_TheSweeperGivesBackWhatACrashLeft(t *testing.T) {
	f := newFixture(t, func(c *orgkey.Config) { c.Limit = 2 })
	crashed := func(id string) {
		t.Helper()
		if err := f.db.Reserve(t.Context(), "acme", id, 2, 50*time.Millisecond); err != nil {
			t.Fatal(err)
		}
	}
	crashed("reserved")
	crashed("pending")
	created := audit.New(audit.KeyCreated, "acme")
	created.Object = "pending"
	if err := f.db.StorePending(t.Context(), "pending", "pending", []byte("x"), created); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- f.Sweep(ctx, 10*time.Millisecond) }()
	waitFor(t, func() bool { return f.count(t, "SELECT count(*) FROM org_keys WHERE slot IS NOT NULL") == 0 })
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if got := f.history(t, "object = 'pending'"); got != "orgkey.created orgkey.withdrawn:expired" {
		t.Errorf("events: %s", got)
	}
}

func TestLocalLockSerializesAnOrganizationAndForgetsIt(t *testing.T) {
	l := orgkey.NewLocalLock()
	unlock, err := l.Lock(t.Context(), "acme")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := l.Lock(ctx, "acme"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("taken twice: %v", err)
	}
	if other, err := l.Lock(t.Context(), "other"); err != nil {
		t.Errorf("another organization waits: %v", err)
	} else {
		other()
	}
	unlock()
	if again, err := l.Lock(t.Context(), "acme"); err != nil {
		t.Error(err)
	} else {
		again()
	}
}

// What the caller has just had sealed is known, for that organization, key and
// ciphertext only.
func TestARememberedKeyIsKnownByItsCiphertext(t *testing.T) {
	sealer := &countingSealer{Sealer: token}
	opener, err := orgkey.NewOpener(sealer, slog.New(slog.DiscardHandler), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	public := orgkey.NewDecoy()
	der, err := public.DER()
	if err != nil {
		t.Fatal(err)
	}
	const id, other = "11ea7a05-6cc2-495a-a581-466cc1cd2067", "22ea7a05-6cc2-495a-a581-466cc1cd2067"
	sealed, err := token.Seal(t.Context(), orgkey.PublicKeyOf("acme", id), der)
	if err != nil {
		t.Fatal(err)
	}
	opener.Remember("acme", orgkey.SealedKey{ID: id, Sealed: sealed}, public)
	keys, err := opener.Open(t.Context(), "acme", []orgkey.SealedKey{{ID: id, Sealed: sealed}})
	if err != nil || keys[id].Fingerprint() != public.Fingerprint() || sealer.opened.Load() != 0 {
		t.Errorf("opened %d values for %v, %v", sealer.opened.Load(), keys, err)
	}
	changed := slices.Clone(sealed)
	changed[len(changed)-1] ^= 1
	for what, open := range map[string]func() (map[string]orgkey.Public, error){
		"another organization's": func() (map[string]orgkey.Public, error) {
			return opener.Open(t.Context(), "globex", []orgkey.SealedKey{{ID: id, Sealed: sealed}})
		},
		"another key's": func() (map[string]orgkey.Public, error) {
			return opener.Open(t.Context(), "acme", []orgkey.SealedKey{{ID: other, Sealed: sealed}})
		},
		"another ciphertext": func() (map[string]orgkey.Public, error) {
			return opener.Open(t.Context(), "acme", []orgkey.SealedKey{{ID: id, Sealed: changed}})
		},
	} {
		if keys, err := open(); !errors.Is(err, orgkey.ErrSealBroken) || len(keys) != 0 {
			t.Errorf("%s: opened %v, %v", what, keys, err)
		}
	}
}
