package sqlstore_test

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// accepted takes a claimed key that its holder made to its end.
func accepted(t *testing.T, db *sqlstore.DB, d enroll.Delivery) enroll.Delivery {
	t.Helper()
	for range 2 { // as often as it is asked for
		_, err := db.StoreOwn(t.Context(), d.KeyID, []byte("public"), "print", event(audit.KeyCreated, "acme", d.KeyID))
		if err == nil {
			_, err = db.Offer(t.Context(), d.KeyID, time.Hour)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	d, err := db.Delivery(t.Context(), d.KeyID)
	if err != nil || d.Stage != enroll.Received {
		t.Fatalf("%+v, %v", d, err)
	}
	return d
}

// sealedKey is a delivery of acme that is available, and its key as whoever opened
// it would present it as their own.
func sealedKey(t *testing.T, db *sqlstore.DB) (enroll.Delivery, enroll.Recipient) {
	t.Helper()
	held := recipient(t)
	held.Origin = enroll.FromNode
	_, d := claimed(t, db, enroll.Enrollment{}, time.Hour, 10)
	return offeredAs(t, db, d, orgkey.NewPublic(held.Public).Fingerprint()), held
}

// A key that its holder made is one live key at most, whatever the organization, and
// is answered for as long as it lives.
func TestKeysThatTheirHoldersMade(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		own := recipient(t)
		own.Origin = enroll.FromNode
		enrollment := func(e enroll.Enrollment) string {
			t.Helper()
			e.Origin = enroll.FromNode
			id, err := mint(t, db, e, time.Hour, 10)
			if err != nil {
				t.Fatal(err)
			}
			return id
		}
		ids := make([]string, 6)
		for i := range ids {
			ids[i] = enrollment(enroll.Enrollment{})
		}
		var got, refused atomic.Int32
		var first atomic.Value
		var all sync.WaitGroup
		for _, id := range ids {
			all.Go(func() {
				_, err := claim(t, db, id, own)
				switch {
				case err == nil:
					got.Add(1)
					first.Store(id)
				case errors.Is(err, enroll.ErrInUse):
					refused.Add(1)
				default:
					t.Errorf("claiming: %v", err)
				}
			})
		}
		all.Wait()
		if got.Load() != 1 || refused.Load() != 5 {
			t.Fatalf("one key was taken %d times and refused %d times", got.Load(), refused.Load())
		}
		id := first.Load().(string)
		d, err := claim(t, db, id, own)
		if err != nil {
			t.Fatal(err)
		}
		accepted(t, db, d)
		again, err := claim(t, db, id, own)
		if err != nil || again.KeyID != d.KeyID || again.Stage != enroll.Received {
			t.Errorf("asked again: %+v, %v", again, err)
		}
		if _, err := db.ClaimOwn(t.Context(), "acme", uuid.NewString(), own, 5, time.Hour); !errors.Is(err, enroll.ErrInUse) {
			t.Errorf("an administrator adds it, too: %v", err)
		}
		if _, err := db.ClaimOwn(t.Context(), "other", uuid.NewString(), own, 5, time.Hour); !errors.Is(err, enroll.ErrInUse) {
			t.Errorf("another organization adds it, too: %v", err)
		}
		if err := db.DeleteKey(t.Context(), "acme", d.KeyID, event(audit.KeyDeleted, "acme", d.KeyID)); err != nil {
			t.Fatal(err)
		}
		if _, err := claim(t, db, id, own); !errors.Is(err, enroll.ErrClosed) {
			t.Errorf("asked again when it is deleted: %v", err)
		}
		added, err := db.ClaimOwn(t.Context(), "acme", uuid.NewString(), own, 5, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		accepted(t, db, added)
		if again, err := db.ClaimOwn(t.Context(), "acme", uuid.NewString(), own, 5, time.Hour); err != nil || again.KeyID != added.KeyID {
			t.Errorf("added again: %+v, %v", again, err)
		}
		// Nor does a key become its holder's own that the back end made and sealed.
		sealed, held := sealedKey(t, db)
		for _, organization := range []org.ID{"acme", "other"} {
			if _, err := db.ClaimOwn(t.Context(), organization, uuid.NewString(), held, 5, time.Hour); !errors.Is(err, enroll.ErrInUse) {
				t.Errorf("a sealed key is added to %s: %v", organization, err)
			}
		}
		if err := db.DeleteKey(t.Context(), "acme", sealed.KeyID, event(audit.KeyDeleted, "acme", sealed.KeyID)); err != nil {
			t.Fatal(err)
		}
		if _, err := db.ClaimOwn(t.Context(), "other", uuid.NewString(), held, 5, time.Hour); err != nil {
			t.Errorf("adding one that was deleted: %v", err)
		}
		// An enrollment that was revoked in between leaves no key.
		other := recipient(t)
		other.Origin = enroll.FromNode
		id = enrollment(enroll.Enrollment{Approval: true})
		if d, err = claim(t, db, id, other); err != nil {
			t.Fatal(err)
		}
		if d, err = db.StoreOwn(t.Context(), d.KeyID, []byte("public"), "print", event(audit.KeyCreated, "acme", d.KeyID)); err != nil || d.Stage != enroll.Claimed {
			t.Errorf("stored before it was approved: %+v, %v", d, err)
		}
		if err := db.Approve(t.Context(), "acme", id, other.ID, time.Hour, event(audit.EnrollmentApproved, "acme", id)); err != nil {
			t.Fatal(err)
		}
		if _, err := db.StoreOwn(t.Context(), d.KeyID, []byte("public"), "print", event(audit.KeyCreated, "acme", d.KeyID)); err != nil {
			t.Fatal(err)
		}
		withdrawn := 0
		if err := db.Revoke(t.Context(), "acme", id, event(audit.EnrollmentRevoked, "acme", id), func(key string) audit.Event {
			withdrawn++
			return event(audit.KeyWithdrawn, "acme", key)
		}); err != nil || withdrawn != 1 {
			t.Fatalf("revoking withdraws %d: %v", withdrawn, err)
		}
		if d, err = db.Offer(t.Context(), d.KeyID, time.Hour); err != nil || d.Stage != enroll.Ended {
			t.Errorf("revoked: %+v, %v", d, err)
		}
	})
}

// One TPM gets one use of an enrollment, and an enrollment for TPMs or keys of
// their own is one that a version without them lets nobody claim.
func TestDevices(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		id, err := mint(t, db, enroll.Enrollment{Uses: 3, TPM: enroll.AnyAllowedTPM}, time.Hour, 10)
		if err != nil {
			t.Fatal(err)
		}
		e, err := db.Enrollment(t.Context(), "acme", id)
		if err != nil || e.Recipient != "" || e.TPM != enroll.AnyAllowedTPM {
			t.Errorf("%+v, %v", e, err)
		}
		in := func(ek string) enroll.Recipient {
			r := recipient(t)
			r.Device = enroll.Device{EK: ek, Evidence: enroll.ByList}
			return r
		}
		first := in("sha256-a")
		if _, err := claim(t, db, id, first); err != nil {
			t.Fatal(err)
		}
		if d, err := claim(t, db, id, first); err != nil || d.Device != first.Device {
			t.Errorf("%+v, %v", d, err)
		}
		if _, err := claim(t, db, id, in("sha256-a")); !errors.Is(err, enroll.ErrClaimed) {
			t.Errorf("a second key in one TPM: %v", err)
		}
		if _, err := claim(t, db, id, in("sha256-b")); err != nil {
			t.Error(err)
		}
		if err := db.Conflict(t.Context(), id, "r", event(audit.EnrollmentConflict, "acme", id)); err != nil {
			t.Error(err)
		}
		if e, err = db.Enrollment(t.Context(), "acme", id); err != nil || e.Conflicts != 2 {
			t.Errorf("%+v, %v", e, err)
		}
		for i, ek := range []string{"sha256-a", "sha256-b", "sha256-c", "sha256-a"} {
			device, err := db.AllowDevice(t.Context(), "acme", ek, fmt.Sprint(i), 2, event(audit.DeviceAllowed, "acme", ek))
			if wrong := err != nil || device.Note != fmt.Sprint(i); wrong != (i == 2) || i == 2 && !errors.Is(err, enroll.ErrTooManyDevices) {
				t.Errorf("%s: %+v, %v", ek, device, err)
			}
		}
		if all, err := db.Devices(t.Context(), "acme"); err != nil || len(all) != 2 || all[1].Note != "3" && all[0].Note != "3" {
			t.Errorf("%+v, %v", all, err)
		}
		if _, err := db.Device(t.Context(), "globex", "sha256-a"); !errors.Is(err, enroll.ErrDeviceNotFound) {
			t.Errorf("another organization's: %v", err)
		}
		if err := db.RemoveDevice(t.Context(), "acme", "sha256-a", event(audit.DeviceRemoved, "acme", "sha256-a")); err != nil {
			t.Error(err)
		}
		if err := db.RemoveDevice(t.Context(), "acme", "sha256-a", event(audit.DeviceRemoved, "acme", "sha256-a")); !errors.Is(err, enroll.ErrDeviceNotFound) {
			t.Errorf("again: %v", err)
		}
	})
}
