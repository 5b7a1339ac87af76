package enroll_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/envelope"
)

// noted is an event of acme.
func noted(kind audit.Type, object string) audit.Event {
	e := audit.New(kind, "acme")
	e.Object = object
	return e
}

// permitted is an enrollment of acme for one node, whose key will have the ID key.
func (f fixture) permitted(t *testing.T, e enroll.Enrollment, life time.Duration) (id, key string) {
	t.Helper()
	id, key = uuid.NewString(), uuid.NewString()
	e.ID, e.Org, e.Scope, e.Uses = id, "acme", enroll.ForNode, 1
	if _, err := f.db.CreateEnrollment(t.Context(), enroll.Permission{Enrollment: e, K: []byte("sealed")}, life, []string{key}, 10, noted(audit.EnrollmentCreated, id)); err != nil {
		t.Fatal(err)
	}
	return id, key
}

func (f fixture) claimed(t *testing.T, id, recipient string) {
	t.Helper()
	if _, err := f.db.Claim(t.Context(), id, enroll.Recipient{ID: recipient, DER: []byte("der")}, "192.0.2.7", time.Hour, enroll.Attempt{},
		func(string) audit.Event { return noted(audit.EnrollmentClaimed, id) }, noted(audit.EnrollmentConflict, id)); err != nil {
		t.Fatal(err)
	}
}

// forged is a receipt of recipient that nobody signed.
func forged(recipient string) []byte {
	return fmt.Appendf(nil, `{"recipient":"%s","signature":"%s"}`, recipient, base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{7}, 256)))
}

// Whoever knows no more than a recipient's name is told of a delivery that is over, or that
// nobody has yet, what they are told of one that never was; and that counts as a failure.
func TestPromise13_AReceiptThatCannotBeCheckedIsOfAnUnknownEnrollment(t *testing.T) {
	f := newFixture(t)
	var known []bool
	s := f.service(t, func(c *enroll.Config) {
		c.Enter = func(context.Context, string) (func(bool) error, error) {
			return func(k bool) error { known = append(known, k); return nil }, nil
		}
	})
	recipient := strings.Repeat("ab", 32)
	ended, key := f.permitted(t, enroll.Enrollment{}, time.Hour)
	f.claimed(t, ended, recipient)
	if mine, err := f.db.Begin(t.Context(), key, "attempt", time.Minute); err != nil || !mine {
		t.Fatal(mine, err)
	}
	if _, err := f.db.StoreWrapped(t.Context(), key, "attempt", []byte("public"), enroll.Wrapped{Alg: envelope.WrapSHA256, Value: []byte("wrapped"), SHA256: "digest"}, "print",
		noted(audit.KeyCreated, key), noted(audit.KeySealed, key)); err != nil {
		t.Fatal(err)
	}
	if _, err := f.db.Offer(t.Context(), key, time.Hour); err != nil {
		t.Fatal(err)
	}
	if err := f.db.Revoke(t.Context(), "acme", ended, noted(audit.EnrollmentRevoked, ended), func(key string) audit.Event { return noted(audit.KeyWithdrawn, key) }); err != nil {
		t.Fatal(err)
	}
	making, _ := f.permitted(t, enroll.Enrollment{}, time.Hour)
	f.claimed(t, making, recipient)
	for what, id := range map[string]string{"one that ended": ended, "one that is being made": making, "one that never was": uuid.NewString()} {
		if err := s.Receive(t.Context(), enroll.Origin{Request: "r", Address: "192.0.2.66"}, id, forged(recipient)); !errors.Is(err, enroll.ErrUnknown) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if len(known) != 3 || slices.Contains(known, true) {
		t.Errorf("counted as known: %v, want none of three", known)
	}
	// An administrator is known, and told.
	own := uuid.NewString()
	if _, err := f.db.ClaimOwn(t.Context(), "acme", own, enroll.Recipient{ID: recipient, DER: []byte("der")}, 5, time.Hour); err != nil {
		t.Fatal(err)
	}
	if err := s.ReceiveOwn(t.Context(), owner("acme"), "acme", own, forged(recipient)); !errors.Is(err, enroll.ErrClosed) {
		t.Errorf("an administrator's own: %v", err)
	}
}
