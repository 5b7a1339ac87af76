package sqlstore_test

import (
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// claimedOwn is an administrator's own delivery of acme, which has one place.
func claimedOwn(t *testing.T, db *sqlstore.DB, r enroll.Recipient) (enroll.Delivery, error) {
	t.Helper()
	return db.ClaimOwn(t.Context(), "acme", uuid.NewString(), r, 1, time.Hour)
}

// A place at which nothing was made is given back, once, with the event of that; one
// at which something is being made, or was, is not.
func TestAnOwnDeliverysPlaceIsGivenBack(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, location string) {
		ctx, direct := t.Context(), raw(t, location)
		giveBack := func(of org.ID, key string) bool {
			t.Helper()
			given, err := db.GiveBackOwn(ctx, of, key, event(audit.KeyRefused, of, ""))
			must(t, err)
			return given
		}
		recorded := func(want int) {
			t.Helper()
			var n int
			must(t, direct.QueryRowContext(ctx, "SELECT count(*) FROM events WHERE type = 'orgkey.refused'").Scan(&n))
			if n != want {
				t.Errorf("%d refusals are in the log, want %d", n, want)
			}
		}
		made := func(key, attempt string) error {
			_, err := db.StoreWrapped(ctx, key, attempt, []byte("public"), enroll.Wrapped{Alg: envelope.WrapSHA256, Value: []byte("wrapped"), SHA256: "digest"}, "print",
				event(audit.KeyCreated, "acme", key), event(audit.KeySealed, "acme", key))
			return err
		}
		d, err := claimedOwn(t, db, recipient(t))
		must(t, err)
		if _, err := claimedOwn(t, db, recipient(t)); !errors.As(err, new(*orgkey.QuotaError)) {
			t.Fatalf("the place is free: %v", err)
		}
		if giveBack("other", d.KeyID) || giveBack("acme", uuid.NewString()) {
			t.Error("what another organization has, or nobody, was given back")
		}
		if !giveBack("acme", d.KeyID) || giveBack("acme", d.KeyID) {
			t.Error("it was not given back once")
		}
		recorded(1)
		// Whoever had claimed it, too, comes too late.
		if mine, err := db.Begin(ctx, d.KeyID, uuid.NewString(), time.Minute); err != nil || mine {
			t.Errorf("beginning what was given back: %t, %v", mine, err)
		}
		if err := made(d.KeyID, uuid.NewString()); !errors.Is(err, orgkey.ErrGone) {
			t.Errorf("storing what was given back: %v", err)
		}
		if _, err := db.Delivery(ctx, d.KeyID); !errors.Is(err, enroll.ErrNotFound) {
			t.Errorf("reading what was given back: %v", err)
		}
		own := recipient(t)
		own.Origin = enroll.FromNode
		d, err = claimedOwn(t, db, own)
		must(t, err)
		if !giveBack("acme", d.KeyID) {
			t.Error("a key of its holder's was not given back")
		}
		if _, err := db.StoreOwn(ctx, d.KeyID, []byte("public"), "print", event(audit.KeyCreated, "acme", d.KeyID)); !errors.Is(err, enroll.ErrNotFound) {
			t.Errorf("storing a key of its holder's that was given back: %v", err)
		}
		recorded(2)

		// An attempt keeps it, also one that has taken too long, until it is given up.
		d, err = claimedOwn(t, db, recipient(t))
		must(t, err)
		for _, life := range []time.Duration{time.Minute, time.Millisecond} {
			attempt := uuid.NewString()
			if mine, err := db.Begin(ctx, d.KeyID, attempt, life); err != nil || !mine {
				t.Fatal(mine, err)
			}
			time.Sleep(10 * time.Millisecond)
			if giveBack("acme", d.KeyID) {
				t.Fatalf("given back while an attempt of %v has it", life)
			}
			must(t, db.GiveUp(ctx, d.KeyID, attempt))
		}
		attempt := uuid.NewString()
		if mine, err := db.Begin(ctx, d.KeyID, attempt, time.Minute); err != nil || !mine {
			t.Fatal(mine, err)
		}
		must(t, made(d.KeyID, attempt))
		if giveBack("acme", d.KeyID) {
			t.Error("given back with its key")
		}
		// An enrollment has its places until it ends.
		_, enrolled := claimed(t, db, enroll.Enrollment{}, time.Hour, 10)
		if giveBack("acme", enrolled.KeyID) {
			t.Error("an enrollment's place was given back")
		}
		recorded(2)
	})
}

// Of a request that failed and one that begins an attempt with the same delivery, one has it.
func TestAnOwnDeliveryIsGivenBackOrBegun(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		for range 30 {
			d, err := claimedOwn(t, db, recipient(t))
			must(t, err)
			var given, mine bool
			var both sync.WaitGroup
			both.Go(func() {
				var err error
				if given, err = db.GiveBackOwn(t.Context(), "acme", d.KeyID, event(audit.KeyRefused, "acme", "")); err != nil {
					t.Error(err)
				}
			})
			both.Go(func() {
				var err error
				if mine, err = db.Begin(t.Context(), d.KeyID, "a", time.Minute); err != nil {
					t.Error(err)
				}
			})
			both.Wait()
			if given == mine {
				t.Fatalf("given back: %t, begun: %t", given, mine)
			}
			if mine {
				must(t, db.GiveUp(t.Context(), d.KeyID, "a"))
				if given, err := db.GiveBackOwn(t.Context(), "acme", d.KeyID, event(audit.KeyRefused, "acme", "")); err != nil || !given {
					t.Fatal(given, err)
				}
			}
		}
	})
}

// A key that its holder made does not go out sealed.
func TestAnOwnKeyIsNoSealedOccupant(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		for _, origin := range []enroll.KeyOrigin{enroll.FromBackend, enroll.FromNode} {
			r := recipient(t)
			r.Origin = origin
			d, err := claimedOwn(t, db, r)
			must(t, err)
			counts, err := db.OrgCounts(t.Context(), "acme", time.Now())
			if must(t, err); len(counts.Occupants) != 1 || counts.Occupants[0].Sealed != (origin == enroll.FromBackend) {
				t.Errorf("of %s: %+v", origin, counts.Occupants)
			}
			_, err = db.GiveBackOwn(t.Context(), "acme", d.KeyID, event(audit.KeyRefused, "acme", ""))
			must(t, err)
		}
	})
}
