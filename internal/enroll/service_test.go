package enroll_test

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"database/sql"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/hsm"
	"github.com/orgkeys/orgkeys/internal/hsm/tokentest"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/panics"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/policies"
)

// token is one SoftHSM token for all tests of the package: a process has one.
var token *hsm.Token

func TestMain(m *testing.M) { os.Exit(tokentest.Run(&token, m.Run)) }

// fixture is a database with its log, for several services on it.
type fixture struct {
	db   *sqlstore.DB
	raw  *sql.DB // the same, to read events from
	gate gate.Gate
}

// shippedPolicy is one for all tests: its own tests, which run when it is loaded, take a while.
var shippedPolicy = sync.OnceValues(func() (*authz.Policy, error) { return authz.Load(context.Background(), policies.Files) })

func newFixture(t *testing.T) fixture {
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
	policy, err := shippedPolicy()
	if err != nil {
		t.Fatal(err)
	}
	quiet := slog.New(slog.DiscardHandler)
	auditLog := audit.NewLog(db, quiet, audit.NewFileSink(filepath.Join(dir, "audit.jsonl")))
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- auditLog.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return fixture{db, raw, gate.Gate{Policy: policy, AuditLog: auditLog, Log: quiet}}
}

// service is one replica's.
func (f fixture) service(t *testing.T, change func(*enroll.Config)) *enroll.Service {
	t.Helper()
	c := enroll.Config{
		Store: f.db, Keystore: token, Sealer: token, Gate: f.gate,
		Admit: func() (func(), error) { return func() {}, nil },
		Busy:  func() func() { return func() {} },
		Enter: func(context.Context, string) (func(bool) error, error) { return func(bool) error { return nil }, nil },
		Count: func(enroll.Outcome) {},
		Limit: 5, NodeLimit: 1000, AttemptLife: time.Minute, AuditDeadline: 10 * time.Second, DeliverFor: time.Hour,
	}
	change(&c)
	var err error
	if c.Opener, err = orgkey.NewOpener(token, f.gate.Log, time.Now); err != nil {
		t.Fatal(err)
	}
	s, err := enroll.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func owner(org org.ID) gate.Call {
	return gate.Call{Caller: authz.Caller{Kind: authz.Person, Subject: "u-1", Org: org, Roles: []authz.Role{authz.Owner}}, Request: "r-1", Address: "192.0.2.7"}
}

// held is the back end of a replica whose token takes its time over a destruction.
type held struct {
	orgkey.SealedKeystore
	destroying chan struct{}
	goOn       chan struct{}
}

type heldKey struct {
	orgkey.SealableKey
	by *held
}

func (h *held) CreateSealed(ctx context.Context, name string) (orgkey.SealableKey, error) {
	key, err := h.SealedKeystore.CreateSealed(ctx, name)
	return heldKey{key, h}, err
}

func (k heldKey) Destroy(ctx context.Context) error {
	close(k.by.destroying)
	<-k.by.goOn
	return k.SealableKey.Destroy(ctx)
}

// elsewhere is the token as another process has it: it sees no session objects of this one.
type elsewhere struct{ orgkey.SealedKeystore }

func (elsewhere) DestroySealed(context.Context, string) error { return nil }

func TestPromise1_NoReplicaReleasesWhatAnotherHasNotDestroyed(t *testing.T) {
	f := newFixture(t)
	a := &held{token, make(chan struct{}), make(chan struct{})}
	slow := f.service(t, func(c *enroll.Config) { c.Keystore = a })
	other := f.service(t, func(c *enroll.Config) { c.Keystore = elsewhere{token} })
	body := recipientBody(t)
	delivered := func(enroll.Answer) error { return nil }
	first := make(chan error, 1)
	go func() { first <- slow.Generate(t.Context(), owner("acme"), "acme", body, delivered) }()
	<-a.destroying
	if err := other.Generate(t.Context(), owner("acme"), "acme", body, delivered); !errors.Is(err, enroll.ErrPending) {
		t.Errorf("while the first replica has the key in its token: %v, want that it is not ready", err)
	}
	close(a.goOn)
	if err := <-first; err != nil {
		t.Error(err)
	}
	if err := other.Generate(t.Context(), owner("acme"), "acme", body, delivered); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// keeping is a back end that fails to destroy the first key.
type keeping struct {
	orgkey.SealedKeystore
	kept string // the fingerprint of that key
}

type keptKey struct {
	orgkey.SealableKey
	by *keeping
}

func (k *keeping) CreateSealed(ctx context.Context, name string) (orgkey.SealableKey, error) {
	key, err := k.SealedKeystore.CreateSealed(ctx, name)
	if err != nil || k.kept != "" {
		return key, err
	}
	k.kept = key.Public().Fingerprint()
	return keptKey{key, k}, nil
}

func (keptKey) Destroy(context.Context) error { return orgkey.ErrUnavailable }

// A key that the back end may still have is nobody's: nothing of it is stored, and asking
// again gives another one.
func TestPromise1_ASealedKeyThatWasNotDestroyedIsNobodys(t *testing.T) {
	f := newFixture(t)
	backEnd := &keeping{SealedKeystore: token}
	s := f.service(t, func(c *enroll.Config) { c.Keystore = backEnd })
	body := recipientBody(t)
	got := ""
	delivered := func(a enroll.Answer) error { got = a.Fingerprint; return nil }
	if err := s.Generate(t.Context(), owner("acme"), "acme", body, delivered); !errors.Is(err, orgkey.ErrUnavailable) || got != "" {
		t.Errorf("with a key that is not destroyed: %v, and %q was released", err, got)
	}
	if keys, err := f.db.Keys(t.Context(), "acme"); err != nil || len(keys) != 0 {
		t.Errorf("%d keys are there, %v", len(keys), err)
	}
	if err := s.Generate(t.Context(), owner("acme"), "acme", body, delivered); err != nil || got == "" || got == backEnd.kept {
		t.Errorf("asking again: %v, and the key %q; the one that was kept is %q", err, got, backEnd.kept)
	}
}

// panicking is a sealer with a bug, until it is mended.
type panicking struct {
	orgkey.Sealer
	mended bool
}

func (p *panicking) SealAll(ctx context.Context, all []orgkey.Unsealed) ([][]byte, error) {
	if !p.mended {
		panic("a bug")
	}
	return p.Sealer.SealAll(ctx, all)
}

// Sealing is done beside the request's goroutine, where a panic would end the process.
func TestAPanicWhileAKeyIsSealedEndsOneRequestOnly(t *testing.T) {
	f := newFixture(t)
	sealer := &panicking{Sealer: token}
	s := f.service(t, func(c *enroll.Config) { c.Sealer = sealer })
	body, delivered := recipientBody(t), func(enroll.Answer) error { return nil }
	if err := s.Generate(t.Context(), owner("acme"), "acme", body, delivered); !errors.Is(err, panics.ErrBug) {
		t.Errorf("with a sealer that panics: %v", err)
	}
	sealer.mended = true
	if err := s.Generate(t.Context(), owner("acme"), "acme", body, delivered); err != nil {
		t.Errorf("asking again: %v", err)
	}
}

// recipientBody is the body of a request for a key that is sealed to a new recipient.
func recipientBody(t *testing.T) []byte {
	t.Helper()
	recipient, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&recipient.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	body, err := json.Marshal(map[string]string{"recipient": string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))})
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// A claim that nobody approved in time is told like a use that nobody claimed: in the
// log, with how many places came back, and among the outcomes, by which it is alerted.
func TestAClaimThatNobodyApprovedExpires(t *testing.T) {
	f := newFixture(t)
	counted := map[enroll.Outcome]int{}
	s := f.service(t, func(c *enroll.Config) {
		c.Count = func(o enroll.Outcome) { counted[o]++ }
	})
	id, _ := f.permitted(t, enroll.Enrollment{Approval: true}, 2*time.Second)
	f.claimed(t, id, "r")
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Sweep(ctx, 50*time.Millisecond) }()
	told := ""
	for end := time.Now().Add(10 * time.Second); told == "" && time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		entries, err := f.db.Entries(t.Context(), 0, 100)
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range entries {
			if e, err := audit.Decode(entry.Leaf); err != nil || e.Type == audit.EnrollmentExpired {
				told += fmt.Sprintln(e.Object == id, e.Reason, e.Detail["places"], err)
			}
		}
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if told != "true not_made 1 <nil>\n" {
		t.Errorf("the log tells %q", told)
	}
	if counted[enroll.Expirations] != 1 || counted[enroll.Withdrawals] != 0 {
		t.Errorf("outcomes %v, want one that is expired", counted)
	}
}

// unanswered is a store whose answer to a mint is lost.
type unanswered struct{ enroll.Store }

func (s unanswered) CreateEnrollment(ctx context.Context, e enroll.Permission, life time.Duration, keys []string, limit int, event audit.Event) (enroll.Enrollment, error) {
	if _, err := s.Store.CreateEnrollment(ctx, e, life, keys, limit, event); err != nil {
		return enroll.Enrollment{}, err
	}
	return enroll.Enrollment{}, orgkey.ErrUnavailable
}

func TestAnEnrollmentWhoseAnswerWasLostHoldsNoPlaces(t *testing.T) {
	f := newFixture(t)
	minted := func(enroll.Minted) error { return nil }
	losing := f.service(t, func(c *enroll.Config) { c.Store = unanswered{f.db} })
	if err := losing.Create(t.Context(), owner("acme"), "acme", []byte(`{"uses":1000}`), minted); !errors.Is(err, orgkey.ErrUnavailable) {
		t.Fatal(err)
	}
	if err := f.service(t, func(*enroll.Config) {}).Create(t.Context(), owner("acme"), "acme", []byte(`{"uses":1000}`), minted); err != nil {
		t.Errorf("the same again: %v", err)
	}
}
