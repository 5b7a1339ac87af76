package sqlstore_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"log/slog"
	"math/rand/v2"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/archive"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// However claims, approvals, sealings and the ends of an enrollment race, what they
// leave in the log does not look forged to who verifies an export.
func TestNoRaceOfAnEnrollmentLooksForged(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		_, private, err := ed25519.GenerateKey(nil)
		must(t, err)
		quiet := slog.New(slog.DiscardHandler)
		checkpoints := audit.NewCheckpointer(audit.NewLog(db, quiet), db, audit.LocalSigner{Private: private}, time.Hour, quiet)
		sequencing, stop := context.WithCancel(t.Context())
		defer stop()
		var sequencer sync.WaitGroup
		sequencer.Go(func() {
			for sequencing.Err() == nil {
				_, _ = db.Sequence(t.Context(), 3, audit.Condition{}) // the last call below says what fails
			}
		})
		recipients := make([]enroll.Recipient, 4)
		for i := range recipients {
			recipients[i] = recipient(t)
		}
		for round := range 20 {
			raced(t, db, recipients, round)
		}
		stop()
		sequencer.Wait()
		for n := 1; n > 0; {
			n, err = db.Sequence(t.Context(), 1000, audit.Condition{})
			must(t, err)
		}
		must(t, checkpoints.Sign(t.Context()))
		keys, err := db.CheckpointKeys(t.Context())
		must(t, err)
		var export bytes.Buffer
		_, err = archive.Write(t.Context(), &export, db, nil, t.TempDir(), "a test", nil)
		must(t, err)
		if report, err := archive.Verify(t.Context(), &export, keys, archive.Outside{}, nil); err != nil || report.Enrollments != 20 || report.InPart > 0 {
			t.Errorf("%+v, %v", report, err)
		}
	})
}

// raced has everything happen to an enrollment for two nodes at once. What of it is
// refused depends on the order, and is no matter.
func raced(t *testing.T, db *sqlstore.DB, recipients []enroll.Recipient, round int) {
	t.Helper()
	id, approval := uuid.NewString(), round%2 == 1
	described := func(kind audit.Type, object string, pairs ...string) audit.Event {
		e := event(kind, "acme", object)
		for i := 0; i < len(pairs); i += 2 {
			e.Add(map[string]string{pairs[i]: pairs[i+1]})
		}
		return e
	}
	_, err := db.CreateEnrollment(t.Context(), enroll.Permission{Enrollment: enroll.Enrollment{ID: id, Org: "acme", Scope: enroll.ForNode, Uses: 2, Approval: approval}, K: []byte("sealed")},
		time.Hour, []string{uuid.NewString(), uuid.NewString()}, 100, described(audit.EnrollmentCreated, id, "scope", "node", "uses", "2", "approval", strconv.FormatBool(approval)))
	must(t, err)
	var all sync.WaitGroup
	some := func(most time.Duration, do func()) {
		wait := rand.N(most)
		all.Go(func() {
			time.Sleep(wait)
			do()
		})
	}
	for _, r := range recipients {
		some(5*time.Millisecond, func() {
			d, err := db.Claim(t.Context(), id, r, "192.0.2.9", time.Hour, enroll.Attempt{}, func(key string) audit.Event {
				return described(audit.EnrollmentClaimed, id, "key", key, "recipient", r.ID)
			}, described(audit.EnrollmentConflict, id))
			if err != nil {
				return
			}
			if approval && db.Approve(t.Context(), "acme", id, r.ID, time.Hour, described(audit.EnrollmentApproved, id, "recipient", r.ID)) != nil {
				return
			}
			attempt := uuid.NewString()
			if mine, err := db.Begin(t.Context(), d.KeyID, attempt, time.Minute); err != nil || !mine {
				return
			}
			_, err = db.StoreWrapped(t.Context(), d.KeyID, attempt, []byte("public"), enroll.Wrapped{Alg: envelope.WrapSHA256, Value: []byte("wrapped"), SHA256: "digest"}, d.KeyID,
				described(audit.KeyCreated, d.KeyID, "enrollment", id, "scope", "node", "backend", "pkcs11"),
				described(audit.KeySealed, d.KeyID, "enrollment", id, "recipient", r.ID, "sealed", "digest"))
			if err == nil {
				_, _ = db.Offer(t.Context(), d.KeyID, time.Hour)
			}
		})
	}
	some(20*time.Millisecond, func() {
		if round%4 < 2 {
			must(t, db.Revoke(t.Context(), "acme", id, described(audit.EnrollmentRevoked, id), func(key string) audit.Event { return event(audit.KeyWithdrawn, "acme", key) }))
			return
		}
		_, err := db.DeleteKeys(t.Context(), "acme", true, event(audit.KeysDeleted, "acme", ""), func(key string, released bool) audit.Event {
			if released {
				return event(audit.KeyDeleted, "acme", key)
			}
			return event(audit.KeyWithdrawn, "acme", key)
		}, func(enrollment string, _ int) audit.Event { return event(audit.EnrollmentRevoked, "acme", enrollment) })
		must(t, err)
	})
	all.Wait()
}
