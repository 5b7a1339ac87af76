package enroll_test

import (
	"bytes"
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
	if got := f.history(t); got != "request.failed:not_found orgkey.created request.failed:not_found" {
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
	if got := f.history(t); got != "request.failed:bad_signature" {
		t.Errorf("the log has %q", got)
	}
}
