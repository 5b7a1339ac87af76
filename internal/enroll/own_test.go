package enroll_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/policies"
)

// letOwnersAdd has the policy grant what the shipped one grants nobody.
func (f *fixture) letOwnersAdd(t *testing.T) {
	t.Helper()
	text, err := policies.Files.ReadFile("authz.rego")
	if err != nil {
		t.Fatal(err)
	}
	changed := bytes.Replace(text, []byte(`"orgkey.add": {}`), []byte(`"orgkey.add": {"OWNER": "organization"}`), 1)
	if f.gate.Policy, err = authz.Load(t.Context(), fstest.MapFS{"authz.rego": {Data: changed}}); err != nil || bytes.Equal(changed, text) {
		t.Fatalf("the policy has no orgkey.add: %v", err)
	}
}

// keyOf returns a new key, its public half as its holder announces it, and that as PEM.
func keyOf(t *testing.T, bits int) (*rsa.PrivateKey, enroll.Recipient, string) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	id, err := envelope.Recipient(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return key, enroll.Recipient{Public: &key.PublicKey, DER: der, ID: id, Origin: enroll.FromNode}, string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

func signedBy(t *testing.T, key *rsa.PrivateKey, text []byte) []byte {
	t.Helper()
	digest := sha256.Sum256(text)
	signature, err := rsa.SignPKCS1v15(nil, key, crypto.SHA256, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	return signature
}

func encoded(t *testing.T, fields map[string]string) []byte {
	t.Helper()
	body, err := json.Marshal(fields)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// history is the events, "TYPE" or "TYPE:REASON", oldest first.
func (f fixture) history(t *testing.T) string {
	t.Helper()
	rows, err := f.raw.Query("SELECT leaf FROM events ORDER BY seq")
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
		all = append(all, strings.TrimSuffix(string(e.Type)+":"+e.Reason, ":"))
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return strings.Join(all, " ")
}

func ignored(enroll.Answer) error { return nil }

// A request to add a key may end between its claim and its record. What is left is not
// finished by whoever may fetch sealed keys: nobody has proved to them to have the key.
func TestAKeyOfItsHoldersIsFinishedByItsHolderOnly(t *testing.T) {
	f := newFixture(t)
	f.letOwnersAdd(t)
	s := f.service(t, func(*enroll.Config) {})
	key, recipient, text := keyOf(t, 2048)
	left, err := f.db.ClaimOwn(t.Context(), "acme", uuid.NewString(), recipient, 5, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Fetch(t.Context(), owner("acme"), "acme", left.KeyID, ignored); !errors.Is(err, enroll.ErrNotFound) {
		t.Errorf("fetched: %v, want that there is nothing to fetch", err)
	}
	if keys, err := f.db.Keys(t.Context(), "acme"); err != nil || len(keys) != 0 {
		t.Fatalf("%d keys are live, which nobody has signed for: %v", len(keys), err)
	}
	got := ""
	body := encoded(t, map[string]string{"publicKey": text, "signature": base64.StdEncoding.EncodeToString(signedBy(t, key, envelope.OwnKeyText("acme", recipient.ID)))})
	if err := s.Add(t.Context(), owner("acme"), "acme", body, func(a enroll.Answer) error { got = a.KeyID; return nil }); err != nil || got != left.KeyID {
		t.Errorf("its holder asks again: %v, and gets %q, want %q", err, got, left.KeyID)
	}
	// It is nothing to fetch afterwards either.
	if err := s.Fetch(t.Context(), owner("acme"), "acme", left.KeyID, ignored); !errors.Is(err, enroll.ErrNotFound) {
		t.Errorf("fetched when it is live: %v", err)
	}
	if err := s.Add(t.Context(), owner("acme"), "acme", body, ignored); err != nil {
		t.Errorf("added again: %v", err)
	}
	if got := f.history(t); got != "request.failed:not_found orgkey.created request.failed:not_found request.repeated" {
		t.Errorf("the log has %q", got)
	}
}

// However a delivery got that far, no record says that its key's holder signed if they did not.
func TestNoKeyOfItsHoldersIsStoredWithoutTheirSignature(t *testing.T) {
	f := newFixture(t)
	s := f.service(t, func(*enroll.Config) {})
	_, recipient, text := keyOf(t, 3072) // which is one that a key can be sealed to, too
	if _, err := f.db.ClaimOwn(t.Context(), "acme", uuid.NewString(), recipient, 5, time.Hour); err != nil {
		t.Fatal(err)
	}
	if err := s.Generate(t.Context(), owner("acme"), "acme", encoded(t, map[string]string{"recipient": text}), ignored); !errors.Is(err, enroll.ErrProof) {
		t.Errorf("%v, want that possession is not proven", err)
	}
	if keys, err := f.db.Keys(t.Context(), "acme"); err != nil || len(keys) != 0 {
		t.Errorf("%d keys are live, %v", len(keys), err)
	}
	if got := f.history(t); got != "orgkey.refused:bad_signature" {
		t.Errorf("the log has %q", got)
	}
}

// failing is a service's parts, of which one fails until it is mended.
type failing struct {
	orgkey.SealedKeystore
	orgkey.Sealer
	at     string
	with   error
	failed int
}

func (f *failing) fails(at string) error {
	if f.at != at {
		return nil
	}
	f.failed++
	return f.with
}

func (f *failing) admit() (func(), error) { return func() {}, f.fails("admission") }

func (f *failing) CreateSealed(ctx context.Context, name string) (orgkey.SealableKey, error) {
	if err := f.fails("making"); err != nil {
		return nil, err
	}
	key, err := f.SealedKeystore.CreateSealed(ctx, name)
	return failingKey{key, f}, err
}

type failingKey struct {
	orgkey.SealableKey
	by *failing
}

func (k failingKey) Seal(ctx context.Context, recipient *rsa.PublicKey) (envelope.SealedKey, error) {
	if err := k.by.fails("wrapping"); err != nil {
		return envelope.SealedKey{}, err
	}
	return k.SealableKey.Seal(ctx, recipient)
}

func (k failingKey) Destroy(ctx context.Context) error {
	return errors.Join(k.SealableKey.Destroy(ctx), k.by.fails("destroying"))
}

func (f *failing) Seal(ctx context.Context, b orgkey.Binding, plaintext []byte) ([]byte, error) {
	if err := f.fails("sealing"); err != nil {
		return nil, err
	}
	return f.Sealer.Seal(ctx, b, plaintext)
}

func (f *failing) SealAll(ctx context.Context, all []orgkey.Unsealed) ([][]byte, error) {
	if err := f.fails("sealing"); err != nil {
		return nil, err
	}
	return f.Sealer.SealAll(ctx, all)
}

type failingStore struct {
	enroll.Store
	by *failing
}

func (f failingStore) ClaimOwn(ctx context.Context, org org.ID, keyID string, r enroll.Recipient, limit int, deliverFor time.Duration) (enroll.Delivery, error) {
	d, err := f.Store.ClaimOwn(ctx, org, keyID, r, limit, deliverFor)
	if lost := f.by.fails("the answer to the claim"); lost != nil && err == nil {
		return enroll.Delivery{}, lost
	}
	return d, err
}

func (f failingStore) Claim(ctx context.Context, id string, r enroll.Recipient, from string, deliverFor time.Duration, attempt enroll.Attempt, claimed func(string) audit.Event, conflict audit.Event) (enroll.Delivery, error) {
	d, err := f.Store.Claim(ctx, id, r, from, deliverFor, attempt, claimed, conflict)
	if lost := f.by.fails("the answer to the claim"); lost != nil && err == nil {
		return d, lost
	}
	return d, err
}

func (f failingStore) Begin(ctx context.Context, keyID, attempt string, life time.Duration) (bool, error) {
	if err := f.by.fails("beginning"); err != nil {
		return false, err
	}
	mine, err := f.Store.Begin(ctx, keyID, attempt, life)
	if lost := f.by.fails("the answer to the beginning"); lost != nil && err == nil {
		return false, lost
	}
	return mine, err
}

func (f failingStore) StoreWrapped(ctx context.Context, keyID, attempt string, public []byte, w enroll.Wrapped, fingerprint string, created, sealed audit.Event) (enroll.Delivery, error) {
	if err := f.by.fails("storing"); err != nil {
		return enroll.Delivery{}, err
	}
	stored, err := f.Store.StoreWrapped(ctx, keyID, attempt, public, w, fingerprint, created, sealed)
	if lost := f.by.fails("the answer"); lost != nil && err == nil {
		return enroll.Delivery{}, lost
	}
	return stored, err
}

// failingService has one place for an organization's keys.
func (f fixture) failingService(t *testing.T, at string, with error) (*enroll.Service, *failing) {
	t.Helper()
	parts := &failing{SealedKeystore: token, Sealer: token, at: at, with: with}
	return f.service(t, func(c *enroll.Config) {
		c.Store, c.Keystore, c.Sealer, c.Admit, c.Limit = failingStore{f.db, parts}, parts, parts, parts.admit, 1
	}), parts
}

// deleting is a store in which all keys are deleted while one is on its way.
type deleting struct {
	enroll.Store
	all func()
	at  string
}

func (d deleting) StoreWrapped(ctx context.Context, keyID, attempt string, public []byte, w enroll.Wrapped, fingerprint string, created, sealed audit.Event) (enroll.Delivery, error) {
	if d.at == "storing" {
		d.all()
	}
	return d.Store.StoreWrapped(ctx, keyID, attempt, public, w, fingerprint, created, sealed)
}

func (d deleting) Offer(ctx context.Context, keyID string, deliverFor time.Duration) (enroll.Delivery, error) {
	if d.at == "releasing" {
		d.all()
	}
	return d.Store.Offer(ctx, keyID, deliverFor)
}

// Whoever asks for a key that is deleted meanwhile hears that it is over.
func TestASealedKeyThatIsDeletedOnItsWayIsOver(t *testing.T) {
	for _, at := range []string{"storing", "releasing"} {
		t.Run(at, func(t *testing.T) {
			f := newFixture(t)
			s := f.service(t, func(c *enroll.Config) {
				c.Store = deleting{f.db, func() {
					of := func(kind audit.Type, id string) audit.Event {
						e := audit.New(kind, "acme")
						e.Object = id
						return e
					}
					if _, err := f.db.DeleteKeys(t.Context(), "acme", true, of(audit.KeysDeleted, ""), func(id string, _ bool) audit.Event { return of(audit.KeyWithdrawn, id) }, nil); err != nil {
						t.Error(err)
					}
				}, at}
			})
			if err := s.Generate(t.Context(), owner("acme"), "acme", recipientBody(t), ignored); !errors.Is(err, enroll.ErrOver) {
				t.Errorf("%v, want that it is over", err)
			}
		})
	}
}

// A request for a sealed key that came to nothing costs no place, whatever failed.
func TestASealedKeyThatWasNotMadeHasNoPlace(t *testing.T) {
	refused := errors.New("a back end that refuses")
	recipients := [][]byte{recipientBody(t), recipientBody(t), recipientBody(t)}
	for _, c := range []struct {
		at     string
		with   error
		want   error
		reason string
	}{
		{"admission", orgkey.ErrOverloaded, orgkey.ErrOverloaded, "overloaded"},
		{"the answer to the claim", orgkey.ErrUnavailable, orgkey.ErrUnavailable, "unavailable"},
		{"beginning", orgkey.ErrUnavailable, orgkey.ErrUnavailable, "generation_failed"},
		{"the answer to the beginning", orgkey.ErrUnavailable, orgkey.ErrUnavailable, "generation_failed"},
		{"making", refused, orgkey.ErrBackend, "generation_failed"},
		{"making", orgkey.ErrSealedUnavailable, orgkey.ErrSealedUnavailable, "sealed_unavailable"},
		{"wrapping", refused, orgkey.ErrBackend, "generation_failed"},
		{"destroying", refused, orgkey.ErrBackend, "generation_failed"},
		{"sealing", orgkey.ErrUnavailable, orgkey.ErrUnavailable, "generation_failed"},
	} {
		t.Run(c.at+" "+c.reason, func(t *testing.T) {
			f := newFixture(t)
			s, parts := f.failingService(t, c.at, c.with)
			for _, body := range recipients[:2] { // the second has to have the place of the first
				if err := s.Generate(t.Context(), owner("acme"), "acme", body, ignored); !errors.Is(err, c.want) {
					t.Errorf("%v, want %v", err, c.want)
				}
			}
			if parts.failed != 2 {
				t.Errorf("%s failed %d times", c.at, parts.failed)
			}
			parts.at = ""
			if err := s.Generate(t.Context(), owner("acme"), "acme", recipients[2], ignored); err != nil {
				t.Errorf("when it works again: %v", err)
			}
			if got, want := f.history(t), strings.Repeat("orgkey.refused:"+c.reason+" ", 2)+"orgkey.created orgkey.sealed orgkey.delivered"; got != want {
				t.Errorf("the log has %q, want %q", got, want)
			}
		})
	}
}

func TestAnAddedKeyThatWasNotStoredHasNoPlace(t *testing.T) {
	f := newFixture(t)
	f.letOwnersAdd(t)
	s, parts := f.failingService(t, "", orgkey.ErrUnavailable)
	add := func() error {
		key, recipient, text := keyOf(t, 2048)
		signature := signedBy(t, key, envelope.OwnKeyText("acme", recipient.ID))
		return s.Add(t.Context(), owner("acme"), "acme", encoded(t, map[string]string{"publicKey": text, "signature": base64.StdEncoding.EncodeToString(signature)}), ignored)
	}
	for _, parts.at = range []string{"the answer to the claim", "sealing", "the answer to the claim"} {
		if err := add(); !errors.Is(err, orgkey.ErrUnavailable) {
			t.Errorf("%v, want that it is not available", err)
		}
	}
	parts.at = ""
	if err := add(); err != nil {
		t.Errorf("when it works again: %v", err)
	}
	if got, want := f.history(t), "orgkey.refused:unavailable orgkey.refused:generation_failed orgkey.refused:unavailable orgkey.created"; got != want {
		t.Errorf("the log has %q, want %q", got, want)
	}
}

// losing is a pool whose answer is lost.
type losing struct {
	f  fixture
	id string // of the pool key that it takes
}

func (l losing) Begin(ctx context.Context, keyID, attempt string, life time.Duration) (bool, *orgkey.Taken[orgkey.SealableKey], error) {
	if mine, err := l.f.db.Begin(ctx, keyID, l.id, life); err != nil || !mine {
		return mine, nil, err
	}
	return false, &orgkey.Taken[orgkey.SealableKey]{ID: l.id}, orgkey.ErrUnavailable
}

// Likewise with a key out of the pool, whose name the attempt has.
func TestAnAttemptWithAPoolKeyWhoseAnswerWasLostHasNoPlace(t *testing.T) {
	f := newFixture(t)
	s := f.service(t, func(c *enroll.Config) { c.Pool, c.Limit = losing{f, uuid.NewString()}, 1 })
	for range 2 {
		if err := s.Generate(t.Context(), owner("acme"), "acme", recipientBody(t), ignored); !errors.Is(err, orgkey.ErrUnavailable) {
			t.Error(err)
		}
	}
	if got := f.history(t); got != "orgkey.refused:generation_failed orgkey.refused:generation_failed" {
		t.Errorf("the log has %q", got)
	}
}

// A node whose claim's answer was lost need not wait for the attempt's life to be over.
func TestAClaimWhoseAnswerWasLostIsAnsweredNext(t *testing.T) {
	f := newFixture(t)
	s, parts := f.failingService(t, "the answer to the claim", orgkey.ErrUnavailable)
	var token envelope.Token
	if err := s.Create(t.Context(), owner("acme"), "acme", []byte(`{}`), func(m enroll.Minted) (err error) { token, err = envelope.ParseToken(m.Token); return err }); err != nil {
		t.Fatal(err)
	}
	_, recipient, text := keyOf(t, 3072)
	body := encoded(t, map[string]string{"recipient": text, "mac": base64.StdEncoding.EncodeToString(envelope.ClaimMAC(token.K, token.ID, recipient.ID))})
	ask := func() error {
		return s.Claim(t.Context(), enroll.Origin{Request: "r-2", Address: "192.0.2.9"}, token.ID, body, ignored, nil)
	}
	if err := ask(); !errors.Is(err, orgkey.ErrUnavailable) || parts.failed != 1 {
		t.Fatal(err, parts.failed)
	}
	parts.at = ""
	if err := ask(); err != nil {
		t.Errorf("asking again: %v", err)
	}
}

// A key that may have been stored keeps its place, and its recipient gets it.
func TestASealedKeyThatMayBeStoredKeepsItsPlace(t *testing.T) {
	body, another := recipientBody(t), recipientBody(t)
	for _, at := range []string{"the answer", "storing"} {
		t.Run(at, func(t *testing.T) {
			f := newFixture(t)
			s, parts := f.failingService(t, at, orgkey.ErrUnavailable)
			if err := s.Generate(t.Context(), owner("acme"), "acme", body, ignored); !errors.Is(err, orgkey.ErrUnavailable) || parts.failed != 1 {
				t.Fatal(err, parts.failed)
			}
			parts.at = ""
			if err := s.Generate(t.Context(), owner("acme"), "acme", another, ignored); !errors.As(err, new(*orgkey.QuotaError)) {
				t.Errorf("another recipient: %v, want that there is no place", err)
			}
			want := error(nil)
			if at == "storing" { // until the attempt's life is over
				want = enroll.ErrPending
			}
			if err := s.Generate(t.Context(), owner("acme"), "acme", body, ignored); !errors.Is(err, want) {
				t.Errorf("the same recipient: %v, want %v", err, want)
			}
		})
	}
}

// Of two requests of one recipient the one that fails takes nothing away from the other.
func TestAFailureEndsNoAttemptOfAnotherRequest(t *testing.T) {
	f := newFixture(t)
	a := &held{token, make(chan struct{}), make(chan struct{})}
	slow := f.service(t, func(c *enroll.Config) { c.Keystore = a })
	other, parts := f.failingService(t, "beginning", orgkey.ErrUnavailable)
	body, got := recipientBody(t), ""
	first := make(chan error, 1)
	go func() {
		first <- slow.Generate(t.Context(), owner("acme"), "acme", body, func(a enroll.Answer) error { got = a.KeyID; return nil })
	}()
	<-a.destroying
	if err := other.Generate(t.Context(), owner("acme"), "acme", body, ignored); !errors.Is(err, orgkey.ErrUnavailable) || parts.failed != 1 {
		t.Error(err, parts.failed)
	}
	close(a.goOn)
	if err := <-first; err != nil || got == "" {
		t.Errorf("the request that was making the key: %v, and key %q", err, got)
	}
	if got := f.history(t); got != "request.failed:generation_failed orgkey.created orgkey.sealed orgkey.delivered" {
		t.Errorf("the log has %q", got)
	}
}

// slowly has somebody else hand a key out first.
type slowly struct {
	enroll.Store
	first func()
}

func (s slowly) Leaf(ctx context.Context, keyID string) ([]byte, error) {
	s.first()
	return s.Store.Leaf(ctx, keyID)
}

// Promise 5: whoever gets the bytes of a sealed key is in the log, also who comes second, at the same moment,
// or whose connection ends; and so is who has to ask again.
func TestPromise5_EveryAdministratorWhoAskedForASealedKeyIsInTheLog(t *testing.T) {
	f := newFixture(t)
	a := &held{token, make(chan struct{}), make(chan struct{})}
	slow := f.service(t, func(c *enroll.Config) { c.Keystore = a })
	s := f.service(t, func(*enroll.Config) {})
	body, key := recipientBody(t), ""
	first := make(chan error, 1)
	go func() {
		first <- slow.Generate(t.Context(), owner("acme"), "acme", body, func(enroll.Answer) error { return errors.New("a connection that ends") })
	}()
	<-a.destroying
	if err := s.Generate(t.Context(), owner("acme"), "acme", body, ignored); !errors.Is(err, enroll.ErrPending) {
		t.Error(err)
	}
	close(a.goOn)
	if err := <-first; err == nil {
		t.Error("the connection did not end")
	}
	fetch := func(by *enroll.Service) {
		t.Helper()
		if err := by.Fetch(t.Context(), owner("acme"), "acme", key, ignored); err != nil {
			t.Error(err)
		}
	}
	late := f.service(t, func(c *enroll.Config) { c.Store = slowly{f.db, func() { fetch(s) }} })
	if err := f.raw.QueryRow("SELECT key_id FROM deliveries").Scan(&key); err != nil {
		t.Fatal(err)
	}
	fetch(late) // while which another fetches it first
	fetch(s)
	if err := s.Fetch(t.Context(), owner("acme"), "acme", key, func(enroll.Answer) error { return errors.New("a connection that ends") }); err == nil {
		t.Error("the connection did not end")
	}
	const want = "request.failed:pending orgkey.created orgkey.sealed request.failed:write_failed orgkey.delivered orgkey.fetched orgkey.fetched orgkey.fetched request.failed:write_failed"
	if got := f.history(t); got != want {
		t.Errorf("the log has %q, want %q", got, want)
	}
}

// The log says why an administrator's receipt was not taken, and a key that is over is said to be one.
func TestAnAdministratorsReceipts(t *testing.T) {
	f := newFixture(t)
	s := f.service(t, func(*enroll.Config) {})
	recipient, named, text := keyOf(t, 3072)
	var got enroll.Answer
	if err := s.Generate(t.Context(), owner("acme"), "acme", encoded(t, map[string]string{"recipient": text}), func(a enroll.Answer) error { got = a; return nil }); err != nil {
		t.Fatal(err)
	}
	der, err := got.Sealed.Open(recipient)
	if err != nil {
		t.Fatal(err)
	}
	opened, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		t.Fatal(err)
	}
	receipt := func(by *rsa.PrivateKey) error {
		signature := base64.StdEncoding.EncodeToString(signedBy(t, by, got.ReceiptText()))
		return s.ReceiveOwn(t.Context(), owner("acme"), "acme", got.KeyID, encoded(t, map[string]string{"recipient": named.ID, "signature": signature}))
	}
	if err := receipt(recipient); !errors.Is(err, enroll.ErrSignature) {
		t.Errorf("signed by another key: %v", err)
	}
	if err := receipt(opened.(*rsa.PrivateKey)); err != nil {
		t.Error(err)
	}
	if err := s.Fetch(t.Context(), owner("acme"), "acme", got.KeyID, ignored); !errors.Is(err, enroll.ErrOver) {
		t.Errorf("fetched after the receipt: %v, want that it is over", err)
	}
	deleted := audit.New(audit.KeyDeleted, "acme")
	deleted.Object = got.KeyID
	if err := f.db.DeleteKey(t.Context(), "acme", got.KeyID, deleted); err != nil {
		t.Fatal(err)
	}
	if err := receipt(opened.(*rsa.PrivateKey)); !errors.Is(err, enroll.ErrOver) {
		t.Errorf("a receipt after the deletion: %v, want that it is over", err)
	}
	const want = "orgkey.created orgkey.sealed orgkey.delivered request.failed:bad_signature orgkey.received " +
		"request.failed:enrollment_closed orgkey.deleted request.failed:enrollment_closed"
	if got := f.history(t); got != want {
		t.Errorf("the log has %q, want %q", got, want)
	}
}
