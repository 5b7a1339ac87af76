package sqlstore_test

import (
	"crypto/sha256"
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/rollback"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/node"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

func voids() rollback.Voids {
	return rollback.Voids{
		Enrollment: func(org org.ID, id string, _ int) audit.Event { return event(audit.EnrollmentRevoked, org, id) },
		Withdrawn:  func(org org.ID, id string) audit.Event { return event(audit.KeyWithdrawn, org, id) },
	}
}

func acceptRollback(t *testing.T, db *sqlstore.DB) (void int) {
	t.Helper()
	if _, err := db.Sequence(t.Context(), 1000, audit.Condition{}); err != nil {
		t.Fatal(err)
	}
	head, err := db.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	accepted := audit.Rollback{From: head.Text(), To: head.Text(), Kept: head.Size, Reason: "a test"}.Event()
	if void, err = db.AcceptRollback(t.Context(), head, accepted, nil, voids()); err != nil {
		t.Fatal(err)
	}
	return void
}

// What a backup holds of an enrollment that was open says nothing of what was
// done with its token since, so it is over. A key that had been released works on,
// however long its node is silent.
func TestAnAcceptedRollbackVoidsOpenEnrollments(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, location string) {
		minted := func(e enroll.Enrollment) string {
			t.Helper()
			id, err := mint(t, db, e, time.Hour, 7)
			if err != nil {
				t.Fatal(err)
			}
			return id
		}
		claimed := func(id string) (enroll.Delivery, enroll.Recipient) {
			t.Helper()
			r := recipient(t)
			d, err := claim(t, db, id, r)
			if err != nil {
				t.Fatal(err)
			}
			return d, r
		}
		unclaimed := minted(enroll.Enrollment{})
		bothWays := minted(enroll.Enrollment{Uses: 3})
		d, has := claimed(bothWays)
		available := offered(t, db, d)
		waiting, _ := claimed(bothWays)
		made := minted(enroll.Enrollment{})
		stored, _ := claimed(made)
		attempt := uuid.NewString()
		if mine, err := db.Begin(t.Context(), stored.KeyID, attempt, time.Minute); err != nil || !mine {
			t.Fatal(err)
		}
		if _, err := db.StoreWrapped(t.Context(), stored.KeyID, attempt, []byte("public"), enroll.Wrapped{Value: []byte("wrapped")}, "print",
			event(audit.KeyCreated, "acme", stored.KeyID), event(audit.KeySealed, "acme", stored.KeyID)); err != nil {
			t.Fatal(err)
		}
		done := minted(enroll.Enrollment{})
		d, _ = claimed(done)
		received := offered(t, db, d)
		if err := db.Receive(t.Context(), received.KeyID, func(int) audit.Event { return event(audit.KeyReceived, "acme", received.KeyID) }); err != nil {
			t.Fatal(err)
		}

		if n, err := db.OpenEnrollments(t.Context()); err != nil || n != 3 {
			t.Errorf("%d enrollments are open, want 3: %v", n, err)
		}
		if n := acceptRollback(t, db); n != 3 {
			t.Errorf("%d enrollments are void, want 3", n)
		}
		if n := recorded(t, db, audit.EnrollmentRevoked); n != 3 {
			t.Errorf("%d events of it, want 3", n)
		}
		if n := recorded(t, db, audit.KeyWithdrawn); n != 1 {
			t.Errorf("%d keys withdrawn, want the one that was made and not released", n)
		}
		for _, id := range []string{unclaimed, bothWays, made} {
			if _, err := claim(t, db, id, recipient(t)); !errors.Is(err, enroll.ErrClosed) {
				t.Errorf("a void token: %v", err)
			}
		}
		if e, err := db.Enrollment(t.Context(), "acme", done); err != nil || !e.Revoked.IsZero() {
			t.Errorf("what was over is void: %+v, %v", e, err)
		}
		for _, key := range []string{waiting.KeyID, stored.KeyID} {
			if d, err := db.Delivery(t.Context(), key); err != nil || d.Stage != enroll.Ended {
				t.Errorf("%+v, %v", d, err)
			}
		}
		// Of 7 places, the two live keys have one each.
		if _, err := mint(t, db, enroll.Enrollment{Uses: 5}, time.Hour, 7); err != nil {
			t.Errorf("places are not given back: %v", err)
		}

		// The recipient that may have its key already gets it again, and no sweeper ends it.
		if d, err := claim(t, db, bothWays, has); err != nil || d.KeyID != available.KeyID || d.Stage != enroll.Available || !d.Until.IsZero() {
			t.Errorf("%+v, %v", d, err)
		}
		statement(t, raw(t, location), "UPDATE deliveries SET until = 1 WHERE until IS NOT NULL AND stage NOT IN ('open', 'received', 'ended')")
		sweep(t, db, func(string, int) {})
		for _, key := range []string{available.KeyID, received.KeyID} {
			if found, err := db.LiveKeys(t.Context(), "acme", netip.MustParseAddr("192.0.2.1"), key, 5); err != nil || len(found) != 1 {
				t.Errorf("an older key: %+v, %v", found, err)
			}
		}
	})
}

// A key that its node has used needs no receipt: the sweeper notes that it arrived, also one
// that was used before a rollback was accepted, and one that was used only after.
func TestAUsedKeyIsReceivedAfterAnAcceptedRollback(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, location string) {
		_, before := claimed(t, db, enroll.Enrollment{}, time.Hour, 9)
		_, after := claimed(t, db, enroll.Enrollment{}, time.Hour, 9)
		_, silent := claimed(t, db, enroll.Enrollment{}, time.Hour, 9)
		offered(t, db, before)
		offeredAs(t, db, after, "another print")
		offeredAs(t, db, silent, "a third print")
		used := func(key, ip string) {
			t.Helper()
			found, err := db.LiveKeys(t.Context(), "acme", netip.MustParseAddr(ip), key, 9)
			at := slices.IndexFunc(found, func(k node.Signer) bool { return k.Key == key })
			if err != nil || at < 0 {
				t.Fatal(found, err)
			}
			use := node.Use{Org: "acme", Signer: found[at], Message: sha256.Sum256([]byte(key)), Until: time.Now().Add(time.Hour)}
			if err := db.Register(t.Context(), use, node.Node{ID: uuid.NewString(), IP: netip.MustParseAddr(ip)}, func(id string, _ node.Change) audit.Event {
				return event(audit.NodeRegistered, "acme", id)
			}); err != nil {
				t.Fatal(err)
			}
		}
		direct := raw(t, location)
		used(before.KeyID, "192.0.2.1")
		acceptRollback(t, db)
		used(after.KeyID, "192.0.2.2")
		statement(t, direct, "UPDATE deliveries SET until = 1 WHERE until IS NOT NULL AND stage = 'available'")
		sweep(t, db, func(string, int) {})
		for key, want := range map[string]enroll.Stage{before.KeyID: enroll.Received, after.KeyID: enroll.Received, silent.KeyID: enroll.Available} {
			if d, err := db.Delivery(t.Context(), key); err != nil || d.Stage != want {
				t.Errorf("%s, %v; want %s", d.Stage, err, want)
			}
		}
	})
}
