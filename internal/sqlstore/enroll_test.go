package sqlstore_test

import (
	"cmp"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/node"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// recipient is one that nothing was sealed to; the store looks at its ID only.
func recipient(t *testing.T) enroll.Recipient {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
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
	return enroll.Recipient{Public: &key.PublicKey, DER: der, ID: id}
}

// mint makes an enrollment of acme and returns its ID.
func mint(t *testing.T, db *sqlstore.DB, e enroll.Enrollment, life time.Duration, limit int) (string, error) {
	t.Helper()
	e.ID, e.Org = uuid.NewString(), "acme"
	if e.Scope == "" {
		e.Scope = enroll.ForNode
	}
	keys := make([]string, max(e.Uses, 1))
	for i := range keys {
		keys[i] = uuid.NewString()
	}
	e.Uses = len(keys)
	_, err := db.CreateEnrollment(t.Context(), enroll.Permission{Enrollment: e, K: []byte("sealed")}, life, keys, limit, event(audit.EnrollmentCreated, "acme", e.ID))
	return e.ID, err
}

func claim(t *testing.T, db *sqlstore.DB, id string, r enroll.Recipient) (enroll.Delivery, error) {
	t.Helper()
	return db.Claim(t.Context(), id, r, "192.0.2.9", time.Hour, enroll.Attempt{},
		func(string) audit.Event { return event(audit.EnrollmentClaimed, "acme", id) }, event(audit.EnrollmentConflict, "acme", id))
}

// claimed is a new enrollment, and a first claim of it.
func claimed(t *testing.T, db *sqlstore.DB, e enroll.Enrollment, life time.Duration, limit int) (id string, d enroll.Delivery) {
	t.Helper()
	id, err := mint(t, db, e, life, limit)
	if err != nil {
		t.Fatal(err)
	}
	if d, err = claim(t, db, id, recipient(t)); err != nil {
		t.Fatal(err)
	}
	return id, d
}

// offered takes a claimed delivery to the stage at which the key goes out.
func offered(t *testing.T, db *sqlstore.DB, d enroll.Delivery) enroll.Delivery {
	t.Helper()
	return offeredAs(t, db, d, "print")
}

func offeredAs(t *testing.T, db *sqlstore.DB, d enroll.Delivery, fingerprint string) enroll.Delivery {
	t.Helper()
	attempt := uuid.NewString()
	if mine, err := db.Begin(t.Context(), d.KeyID, attempt, time.Minute); err != nil || !mine {
		t.Fatalf("beginning: %t, %v", mine, err)
	}
	d, err := db.StoreWrapped(t.Context(), d.KeyID, attempt, []byte("public"), enroll.Wrapped{Alg: envelope.WrapSHA256, Value: []byte("wrapped"), SHA256: "digest"}, fingerprint,
		event(audit.KeyCreated, "acme", d.KeyID), event(audit.KeySealed, "acme", d.KeyID))
	if err == nil {
		d, err = db.Offer(t.Context(), d.KeyID, time.Hour)
	}
	if err != nil || d.Stage != enroll.Available {
		t.Fatalf("%+v, %v", d, err)
	}
	return d
}

func TestPromise13_OneEnrollmentIsUsedAsOftenAsItSays(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		id, err := mint(t, db, enroll.Enrollment{Uses: 3}, time.Hour, 10)
		if err != nil {
			t.Fatal(err)
		}
		recipients := make([]enroll.Recipient, 12)
		for i := range recipients {
			recipients[i] = recipient(t)
		}
		var got, refused atomic.Int32
		var keys sync.Map
		var all sync.WaitGroup
		for i := range 4 * len(recipients) {
			all.Go(func() {
				r := recipients[i%len(recipients)]
				d, err := claim(t, db, id, r)
				switch {
				case err == nil:
					if before, loaded := keys.LoadOrStore(r.ID, d.KeyID); loaded && before != d.KeyID {
						t.Errorf("one recipient got two keys")
					} else if !loaded {
						got.Add(1)
					}
				case errors.Is(err, enroll.ErrClaimed):
					refused.Add(1)
				default:
					t.Error(err)
				}
			})
		}
		all.Wait()
		e, err := db.Enrollment(t.Context(), "acme", id)
		if err != nil || got.Load() != 3 || len(e.Claims) != 3 || e.Conflicts != int(refused.Load()) {
			t.Errorf("%d recipients got a key, %d claims, %d conflicts of %d refusals, %v", got.Load(), len(e.Claims), e.Conflicts, refused.Load(), err)
		}
	})
}

func TestConflictsLeaveTwentyEvents(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		id, err := mint(t, db, enroll.Enrollment{}, time.Hour, 10)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := claim(t, db, id, recipient(t)); err != nil {
			t.Fatal(err)
		}
		for i := range 25 {
			r := enroll.Recipient{ID: fmt.Sprintf("%064x", i)}
			for range 2 {
				if _, err := claim(t, db, id, r); !errors.Is(err, enroll.ErrClaimed) {
					t.Fatal(err)
				}
			}
		}
		e, err := db.Enrollment(t.Context(), "acme", id)
		if n := recorded(t, db, audit.EnrollmentConflict); err != nil || e.Conflicts != 50 || n != 20 {
			t.Errorf("%d conflicts counted, %d events, %v; want 50 and 20", e.Conflicts, n, err)
		}
		if len(e.Refused) != enroll.MaxConflicts || !slices.IsSorted(e.Refused) || e.Refused[19] != fmt.Sprintf("%064x", 19) {
			t.Errorf("refused recipients %q", e.Refused)
		}
	})
}

func TestEnrollmentsHoldTheirPlaces(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		id, err := mint(t, db, enroll.Enrollment{Uses: 3}, time.Hour, 4)
		if err != nil {
			t.Fatal(err)
		}
		quota := new(*orgkey.QuotaError)
		if _, err := mint(t, db, enroll.Enrollment{Uses: 2}, time.Hour, 4); !errors.As(err, quota) || !(*quota).NodeKeys {
			t.Fatalf("a fifth place of four: %v", err)
		}
		d, err := claim(t, db, id, recipient(t))
		if err != nil {
			t.Fatal(err)
		}
		offered(t, db, d)
		withdrawn := 0
		if err := db.Revoke(t.Context(), "acme", id, event(audit.EnrollmentRevoked, "acme", id), func(key string) audit.Event {
			withdrawn++
			return event(audit.KeyWithdrawn, "acme", key)
		}); err != nil || withdrawn != 1 {
			t.Fatalf("%d keys withdrawn, %v; want the one that was sealed", withdrawn, err)
		}
		if _, err := mint(t, db, enroll.Enrollment{Uses: 4}, time.Hour, 4); err != nil {
			t.Errorf("revoking gave not all places back: %v", err)
		}
		if _, err := claim(t, db, id, recipient(t)); !errors.Is(err, enroll.ErrClosed) {
			t.Errorf("claiming what was revoked: %v", err)
		}
		// An organization's keys have a quota of their own, which enrollments for them share.
		released(t, db, "acme", 2)
		if _, err := mint(t, db, enroll.Enrollment{Scope: enroll.ForOrganization}, time.Hour, 2); err != nil {
			t.Fatal(err)
		}
		if err := db.Reserve(t.Context(), "acme", uuid.NewString(), 2, time.Minute); !errors.As(err, quota) || (*quota).NodeKeys {
			t.Errorf("a place that an enrollment holds was given away: %v", err)
		}
	})
}

// sweep ends what is past its time, and tells how many places of an enrollment came back.
func sweep(t *testing.T, db *sqlstore.DB, back func(id string, places int)) {
	t.Helper()
	_, err := db.SweepDeliveries(t.Context(), 100,
		func(org org.ID, key string) audit.Event { return event(audit.KeyWithdrawn, org, key) },
		func(org org.ID, key string) audit.Event { return event(audit.KeyReceived, org, key) },
		func(org org.ID, id string, n int) audit.Event {
			back(id, n)
			return event(audit.EnrollmentExpired, org, id)
		})
	if err != nil {
		t.Fatal(err)
	}
	expired, err := db.ExpiredEnrollments(t.Context(), 100)
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range expired {
		places, err := db.EndExpired(t.Context(), id, func(org org.ID, _ int) audit.Event { return event(audit.EnrollmentExpired, org, id) })
		if err != nil {
			t.Fatal(err)
		}
		back(id, places)
	}
}

func TestUnclaimedPlacesComeBack(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		const life = 4 * time.Second // claiming must come first, on a busy machine too
		id, d := claimed(t, db, enroll.Enrollment{Uses: 2}, life, 2)
		time.Sleep(life + 100*time.Millisecond)
		places := 0
		for range 2 {
			sweep(t, db, func(_ string, n int) { places += n })
		}
		if places != 1 {
			t.Errorf("%d places came back, want 1", places)
		}
		if _, err := claim(t, db, id, recipient(t)); !errors.Is(err, enroll.ErrClosed) {
			t.Errorf("claiming what expired: %v", err)
		}
		// What was claimed in time goes on.
		offered(t, db, d)
	})
}

// A claim whose key is never made leaves an event of the place that comes back, whether
// the place is taken again before the sweeper sees that or not.
func TestPlacesOfKeysThatWereNeverMadeComeBackInTheLog(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, location string) {
		const limit = 6
		unapproved, _ := claimed(t, db, enroll.Enrollment{Uses: 3, Approval: true}, time.Hour, limit)
		if _, err := claim(t, db, unapproved, recipient(t)); err != nil {
			t.Fatal(err)
		}
		unmade, _ := claimed(t, db, enroll.Enrollment{}, time.Hour, limit)
		_, made := claimed(t, db, enroll.Enrollment{}, time.Hour, limit)
		offered(t, db, made)
		goesOn, _ := claimed(t, db, enroll.Enrollment{}, time.Hour, limit)
		if _, err := db.ClaimOwn(t.Context(), "acme", uuid.NewString(), recipient(t), limit, time.Hour); err != nil {
			t.Fatal(err)
		}
		for _, statement := range []string{
			"UPDATE enrollments SET expires_at = 1 WHERE id = '" + unapproved + "'",
			"UPDATE deliveries SET until = 1 WHERE stage <> 'open' AND enrollment_id <> '" + goesOn + "'",
			"UPDATE org_keys SET expires_at = 1 WHERE state = 'reserved'",
			"UPDATE keys_of_nodes SET expires_at = 1 WHERE state = 'reserved' AND id NOT IN (SELECT key_id FROM deliveries WHERE enrollment_id = '" + goesOn + "')",
		} {
			if _, err := raw(t, location).Exec(statement); err != nil {
				t.Fatal(err)
			}
		}
		// Four places are free, and are given away before anything is swept.
		if _, err := mint(t, db, enroll.Enrollment{Uses: 4}, time.Hour, limit); err != nil {
			t.Fatal(err)
		}
		places := map[string]int{}
		for range 2 {
			sweep(t, db, func(id string, n int) {
				if n > 0 {
					places[id] += n
				}
			})
		}
		if want := map[string]int{unapproved: 3, unmade: 1}; !maps.Equal(places, want) {
			t.Errorf("places came back of %v, want %v", places, want)
		}
		// Two of the claims that nobody approved, one of the use that nobody claimed, one of the key that was not made.
		if n := recorded(t, db, audit.EnrollmentExpired); n != 3 {
			t.Errorf("%d events, want 3", n)
		}
		if n := recorded(t, db, audit.KeyWithdrawn); n != 1 {
			t.Errorf("%d keys withdrawn, want the one that was made", n)
		}
	})
}

// A late attempt finds that it is late, and cannot replace what another stored.
func TestALateAttemptStoresNothing(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		_, d := claimed(t, db, enroll.Enrollment{}, time.Hour, 2)
		late := uuid.NewString()
		if mine, err := db.Begin(t.Context(), d.KeyID, late, 50*time.Millisecond); err != nil || !mine {
			t.Fatal(mine, err)
		}
		if mine, err := db.Begin(t.Context(), d.KeyID, uuid.NewString(), time.Minute); err != nil || mine {
			t.Fatalf("two attempts at once: %t, %v", mine, err)
		}
		time.Sleep(100 * time.Millisecond)
		offered(t, db, d)
		_, err := db.StoreWrapped(t.Context(), d.KeyID, late, []byte("x"), enroll.Wrapped{Value: []byte("other")}, "other",
			event(audit.KeyCreated, "acme", d.KeyID), event(audit.KeySealed, "acme", d.KeyID))
		if !errors.Is(err, orgkey.ErrGone) {
			t.Errorf("the late attempt: %v", err)
		}
	})
}

// A claim begins the attempt of whoever claims, once, and not before it may.
func TestAClaimBeginsAnAttempt(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, location string) {
		asks := func(id string, r enroll.Recipient) enroll.Delivery {
			t.Helper()
			d, err := db.Claim(t.Context(), id, r, "192.0.2.9", time.Hour, enroll.Attempt{Name: uuid.NewString(), Life: time.Minute},
				func(key string) audit.Event { return event(audit.EnrollmentClaimed, "acme", key) }, event(audit.EnrollmentConflict, "acme", id))
			if err != nil {
				t.Fatal(err)
			}
			return d
		}
		id, err := mint(t, db, enroll.Enrollment{}, time.Hour, 5)
		if err != nil {
			t.Fatal(err)
		}
		r := recipient(t)
		first := asks(id, r)
		if kept, err := db.Delivery(t.Context(), first.KeyID); err != nil || !first.Begun || kept.Attempt != first.Attempt || kept.Begun {
			t.Errorf("the first: %+v, kept as %+v, %v", first, kept, err)
		}
		if again := asks(id, r); again.Begun || again.Attempt != first.Attempt {
			t.Errorf("while the first is at it: %+v", again)
		}
		if _, err := raw(t, location).Exec("UPDATE deliveries SET attempt_until = 1"); err != nil {
			t.Fatal(err)
		}
		second := asks(id, r)
		if !second.Begun || second.Attempt == first.Attempt {
			t.Errorf("when its time is over: %+v", second)
		}
		if _, err := db.StoreWrapped(t.Context(), first.KeyID, first.Attempt, []byte("x"), enroll.Wrapped{}, "x", event(audit.KeyCreated, "acme", first.KeyID), event(audit.KeySealed, "acme", first.KeyID)); !errors.Is(err, orgkey.ErrGone) {
			t.Errorf("the first is fenced off: %v", err)
		}
		stored, err := db.StoreWrapped(t.Context(), first.KeyID, second.Attempt, []byte("x"), enroll.Wrapped{Value: []byte("x")}, "x", event(audit.KeyCreated, "acme", first.KeyID), event(audit.KeySealed, "acme", first.KeyID))
		if err != nil || stored.Stage != enroll.Sealed {
			t.Errorf("the second stores: %+v, %v", stored, err)
		}
		if made := asks(id, r); made.Begun || made.Stage != enroll.Sealed {
			t.Errorf("when the key is made: %+v", made)
		}
		for name, e := range map[string]enroll.Enrollment{"it waits for approval": {Approval: true}, "the node makes the key": {Origin: enroll.FromNode}} {
			id, err := mint(t, db, e, time.Hour, 5)
			if err != nil {
				t.Fatal(err)
			}
			r := recipient(t)
			r.Origin = e.Origin
			if d := asks(id, r); d.Begun || d.Attempt != "" {
				t.Errorf("%s: %+v", name, d)
			}
		}
	})
}

// An older version committed the event of the sealing by itself, and a crash can have come before.
func TestADeliveryThatAnOlderVersionStoredGoesOn(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, location string) {
		_, d := claimed(t, db, enroll.Enrollment{}, time.Hour, 2)
		d = offered(t, db, d)
		for _, statement := range []string{
			"UPDATE deliveries SET stage = 'stored', event_id = '' WHERE key_id = '" + d.KeyID + "'",
			"UPDATE keys_of_nodes SET state = 'pending', released_at = NULL, expires_at = 9000000000000000 WHERE id = '" + d.KeyID + "'",
		} {
			if _, err := raw(t, location).Exec(statement); err != nil {
				t.Fatal(err)
			}
		}
		first := event(audit.KeySealed, "acme", d.KeyID)
		for _, sealed := range []audit.Event{first, event(audit.KeySealed, "acme", d.KeyID)} { // as when two replicas do so at once
			if after, err := db.Seal(t.Context(), d.KeyID, sealed); err != nil || after.Stage != enroll.Sealed || after.Event != first.ID {
				t.Fatalf("sealing: %+v, %v", after, err)
			}
		}
		if d, err := db.Offer(t.Context(), d.KeyID, time.Hour); err != nil || d.Stage != enroll.Available {
			t.Errorf("offering: %+v, %v", d, err)
		}
	})
}

func TestPromise14_ANodeKeyActsForItsNodeOnly(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, location string) {
		n := &nodes{t: t, db: db}
		nodeKey, register, unregister, secrets, must := n.key, n.register, n.unregister, n.secrets, n.want
		a, b, bound := nodeKey(""), nodeKey(""), nodeKey("192.0.2.30")
		must(register(a, "192.0.2.1"), nil)
		must(register(b, "192.0.2.1"), node.ErrAddressInUse)
		must(secrets(b, "192.0.2.1"), node.ErrAddressInUse)
		must(register(b, "192.0.2.2"), nil)
		must(register(a, "192.0.2.2"), node.ErrAddressInUse)
		must(secrets(a, "192.0.2.2"), node.ErrAddressInUse)
		must(register(bound, "192.0.2.31"), node.ErrAddressNotAllowed)
		must(secrets(bound, "192.0.2.31"), node.ErrAddressNotAllowed)
		must(register(bound, "192.0.2.30"), nil)
		must(register(bound, "192.0.2.31"), nil) // its node moves

		// The node moves and stays the same one.
		must(register(a, "192.0.2.3"), nil)
		nodes, err := db.Nodes(t.Context(), "acme")
		if err != nil || len(nodes) != 3 {
			t.Fatalf("%d nodes, %v; want 3", len(nodes), err)
		}
		// A node that an organization key registered can be given a key, but not be
		// taken by one that has its node.
		public := signer(t, db, released(t, db, "acme", 9))
		must(register(public, "192.0.2.40"), nil)
		must(register(a, "192.0.2.40"), node.ErrAddressInUse)
		must(unregister(a, "192.0.2.40"), node.ErrAddressInUse)
		given := nodeKey("")
		must(register(given, "192.0.2.40"), nil)
		must(register(public, "192.0.2.40"), nil)
		must(unregister(a, "192.0.2.40"), node.ErrAddressInUse)
		must(unregister(given, "192.0.2.40"), nil)

		// A key that never registered may become one such node, and do nothing else to any.
		must(register(public, "192.0.2.41"), nil)
		must(register(public, "192.0.2.42"), nil)
		if _, err := raw(t, location).Exec("UPDATE nodes SET seen_at = 1"); err != nil {
			t.Fatal(err)
		}
		fresh, allowed := nodeKey(""), nodeKey("192.0.2.42")
		for ip, want := range map[string]error{"192.0.2.41": nil, "192.0.2.42": nil, "192.0.2.43": nil, "192.0.2.2": node.ErrAddressInUse} {
			must(secrets(fresh, ip), want) // which it fetches before it registers
			must(unregister(fresh, ip), cmp.Or(want, node.ErrNodeNotFound))
		}
		must(unregister(allowed, "192.0.2.42"), node.ErrNodeNotFound)
		must(unregister(allowed, "192.0.2.41"), node.ErrAddressNotAllowed)
		contacts := map[node.Contact]time.Duration{}
		for key, ip := range map[string]string{fresh.Key: "192.0.2.41", allowed.Key: "192.0.2.42", b.Key: "192.0.2.2"} {
			contacts[node.Contact{Ref: node.Ref{Org: "acme", IP: netip.MustParseAddr(ip)}, Key: key}] = time.Second
		}
		must(db.Seen(t.Context(), nil, contacts), nil)
		seen := map[string]bool{}
		after, err := db.Nodes(t.Context(), "acme")
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range after {
			seen[n.IP.String()] = n.Seen.Year() > 1970
		}
		if want := map[string]bool{"192.0.2.2": true, "192.0.2.3": false, "192.0.2.31": false, "192.0.2.41": false, "192.0.2.42": false}; !maps.Equal(seen, want) {
			t.Errorf("nodes that are there, and whether they were seen: %v, want %v", seen, want)
		}
		must(register(fresh, "192.0.2.41"), nil)
		must(unregister(fresh, "192.0.2.42"), node.ErrAddressInUse)

		// Its node deleted, it is over.
		var id string
		for _, n := range nodes {
			if n.IP == netip.MustParseAddr("192.0.2.3") {
				id = n.ID
			}
		}
		ended := 0
		must(db.DeleteNode(t.Context(), "acme", id, event(audit.NodeDeleted, "acme", id), func(key string) audit.Event {
			ended++
			return event(audit.KeyDeleted, "acme", key)
		}), nil)
		if ended != 1 {
			t.Errorf("%d keys ended with their node, want 1", ended)
		}
		must(register(a, "192.0.2.3"), node.ErrKeyGone)
		must(secrets(a, "192.0.2.3"), node.ErrKeyGone)
		must(db.DeleteKey(t.Context(), "acme", b.Key, event(audit.KeyDeleted, "acme", b.Key)), nil)
		must(register(b, "192.0.2.2"), node.ErrKeyGone)
	})
}

// A key that signs was received, receipt or not, and is not withdrawn.
func TestUseStandsForAReceipt(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		id, d := claimed(t, db, enroll.Enrollment{}, time.Hour, 2)
		d = offered(t, db, d)
		found, err := db.LiveKeys(t.Context(), "acme", netip.MustParseAddr("192.0.2.1"), d.KeyID, 5)
		if err != nil || len(found) != 1 || !found[0].Unreceived || !found[0].OfNode {
			t.Fatalf("%+v, %v", found, err)
		}
		if found, err := db.LiveKeys(t.Context(), "acme", netip.MustParseAddr("192.0.2.1"), "", 5); err != nil || len(found) != 0 {
			t.Fatalf("a node key that nobody named: %+v, %v", found, err)
		}
		use := node.Use{Org: "acme", Signer: found[0], Message: [32]byte{9}, Until: time.Now().Add(time.Hour)}
		if err := db.Register(t.Context(), use, node.Node{ID: uuid.NewString(), IP: netip.MustParseAddr("192.0.2.1")}, func(id string, _ node.Change) audit.Event {
			return event(audit.NodeRegistered, "acme", id)
		}); err != nil {
			t.Fatal(err)
		}
		withdrawn := 0
		if err := db.Revoke(t.Context(), "acme", id, event(audit.EnrollmentRevoked, "acme", id), func(key string) audit.Event {
			withdrawn++
			return event(audit.KeyWithdrawn, "acme", key)
		}); err != nil || withdrawn != 0 {
			t.Errorf("%d keys withdrawn, %v: it was used", withdrawn, err)
		}
		if found, err := db.LiveKeys(t.Context(), "acme", netip.MustParseAddr("192.0.2.1"), "", 5); err != nil || len(found) != 1 || found[0].Unreceived {
			t.Errorf("by its address: %+v, %v", found, err)
		}
	})
}

// Node keys are listed by themselves, and end with all others only where that is
// asked for; the enrollments for what ends end with it, and leave nothing.
func TestNodeKeysAmongAllKeys(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, location string) {
		id, d := claimed(t, db, enroll.Enrollment{Uses: 3}, time.Hour, 5)
		d = offered(t, db, d)
		delivered := event(audit.KeyDelivered, "acme", d.KeyID)
		for _, want := range []bool{true, false} {
			if first, err := db.Answered(t.Context(), d.KeyID, delivered); err != nil || first != want {
				t.Fatal(first, err)
			}
		}
		made, err := claim(t, db, id, recipient(t))
		if err != nil {
			t.Fatal(err)
		}
		forOrganization, err := mint(t, db, enroll.Enrollment{Scope: enroll.ForOrganization}, time.Hour, 5)
		if err != nil {
			t.Fatal(err)
		}
		own := released(t, db, "acme", 5)
		listed, err := db.NodeKeys(t.Context(), "acme")
		if err != nil || len(listed) != 1 || listed[0].ID != d.KeyID || listed[0].Enrollment != id || listed[0].Delivered.IsZero() || listed[0].DeliveredTo != "192.0.2.1" || len(listed[0].Nodes) != 0 {
			t.Errorf("%+v, %v", listed, err)
		}
		if err := db.Register(t.Context(), node.Use{Org: "acme", Signer: signer(t, db, d.KeyID), Message: [32]byte{1}, Until: time.Now().Add(time.Hour)},
			node.Node{ID: uuid.NewString(), IP: netip.MustParseAddr("192.0.2.1")}, func(id string, _ node.Change) audit.Event { return event(audit.NodeRegistered, "acme", id) }); err != nil {
			t.Fatal(err)
		}
		if listed, err = db.NodeKeys(t.Context(), "acme"); err != nil || len(listed[0].Nodes) != 1 || listed[0].Nodes[0] != (orgkey.NodeKey{KeyID: d.KeyID, NodeID: "192.0.2.1", Confirmed: true}) {
			t.Errorf("its node: %+v, %v", listed, err)
		}
		if listed, err := db.Keys(t.Context(), "acme"); err != nil || len(listed) != 1 || listed[0].ID != own {
			t.Errorf("the organization's keys: %+v, %v", listed, err)
		}

		all := func(withNodeKeys bool) (orgkey.Ended, []string) {
			t.Helper()
			var revoked []string
			n, err := db.DeleteKeys(t.Context(), "acme", withNodeKeys, event(audit.KeysDeleted, "acme", ""),
				func(id string, _ bool) audit.Event { return event(audit.KeyDeleted, "acme", id) },
				func(id string, unmade int) audit.Event {
					revoked = append(revoked, id)
					return enrollmentRevoked(id, unmade)
				})
			if err != nil {
				t.Fatal(err)
			}
			return n, revoked
		}
		if n, revoked := all(false); n != (orgkey.Ended{Keys: 1}) || !slices.Equal(revoked, []string{forOrganization}) {
			t.Errorf("ended %+v, revoked %q", n, revoked)
		}
		if listed, err := db.NodeKeys(t.Context(), "acme"); err != nil || len(listed) != 1 {
			t.Errorf("node keys were touched: %+v, %v", listed, err)
		}
		if n, revoked := all(true); n != (orgkey.Ended{NodeKeys: 1}) || !slices.Equal(revoked, []string{id}) {
			t.Errorf("ended %+v, revoked %q", n, revoked)
		}
		if listed, err := db.NodeKeys(t.Context(), "acme"); err != nil || len(listed) != 0 {
			t.Errorf("%+v, %v", listed, err)
		}
		if made, err = db.Delivery(t.Context(), made.KeyID); err != nil || made.Stage != enroll.Ended {
			t.Errorf("what was under way: %+v, %v", made, err)
		}
		var left int
		if err := raw(t, location).QueryRow("SELECT count(*) FROM deliveries WHERE stage <> 'ended' OR wrapped IS NOT NULL").Scan(&left); err != nil || left != 0 {
			t.Errorf("%d deliveries are left, %v", left, err)
		}
		if _, err := mint(t, db, enroll.Enrollment{Uses: 5}, time.Hour, 5); err != nil {
			t.Errorf("places are not given back: %v", err)
		}
	})
}

// A signature that comes after the sweeper took the key's use for its arrival is recorded,
// once; the time of the arrival stays.
func TestASignatureAfterUseIsRecordedOnce(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, location string) {
		signedFor := func(key string) {
			t.Helper()
			var all sync.WaitGroup
			for range 4 {
				all.Go(func() {
					if err := db.Receive(t.Context(), key, func(int) audit.Event { return event(audit.KeyReceived, "acme", key) }); err != nil && !errors.Is(err, enroll.ErrUnchanged) {
						t.Error(err)
					}
				})
			}
			all.Wait()
		}
		_, d := claimed(t, db, enroll.Enrollment{}, time.Hour, 9)
		offered(t, db, d)
		statement(t, raw(t, location), "UPDATE deliveries SET used_at = 1, until = 2 WHERE key_id = $1", d.KeyID)
		sweep(t, db, func(string, int) {})
		if n := recorded(t, db, audit.KeyReceived); n != 1 {
			t.Fatalf("%d events of the use, want 1", n)
		}
		signedFor(d.KeyID)
		after, err := db.Delivery(t.Context(), d.KeyID)
		if n := recorded(t, db, audit.KeyReceived); err != nil || n != 2 || after.ReceivedAt.UnixMicro() != 1 || after.Stage != enroll.Received {
			t.Errorf("%d events of use and signature, want 2; %+v, %v", n, after, err)
		}
		// As if it had been used in the very moment of its receipt.
		_, d = claimed(t, db, enroll.Enrollment{}, time.Hour, 9)
		offered(t, db, d)
		signedFor(d.KeyID)
		statement(t, raw(t, location), "UPDATE deliveries SET used_at = received_at WHERE key_id = $1", d.KeyID)
		signedFor(d.KeyID)
		// Whoever made the key has signed for it by that.
		own := uuid.NewString()
		r := recipient(t)
		r.Origin = enroll.FromNode
		if _, err := db.ClaimOwn(t.Context(), "acme", own, r, 9, time.Hour); err != nil {
			t.Fatal(err)
		}
		if _, err := db.StoreOwn(t.Context(), own, []byte("public"), "own", event(audit.KeyCreated, "acme", own)); err != nil {
			t.Fatal(err)
		}
		if made, err := db.Offer(t.Context(), own, time.Hour); err != nil || made.Stage != enroll.Received {
			t.Fatalf("%+v, %v", made, err)
		}
		statement(t, raw(t, location), "UPDATE deliveries SET used_at = received_at WHERE key_id = $1", own)
		signedFor(own)
		if n := recorded(t, db, audit.KeyReceived); n != 3 {
			t.Errorf("%d events, want 3", n)
		}
	})
}

// An enrollment tells keys that never arrived from those that did, and are gone since.
func TestAnEnrollmentCountsKeysThatNeverArrived(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, location string) {
		late := func(d enroll.Delivery) {
			t.Helper()
			statement(t, raw(t, location), "UPDATE deliveries SET until = 1 WHERE key_id = $1", d.KeyID)
			sweep(t, db, func(string, int) {})
		}
		deleted := func(d enroll.Delivery) {
			t.Helper()
			if err := db.DeleteKey(t.Context(), "acme", d.KeyID, event(audit.KeyDeleted, "acme", d.KeyID)); err != nil {
				t.Fatal(err)
			}
		}
		received := func(d enroll.Delivery) {
			t.Helper()
			if err := db.Receive(t.Context(), d.KeyID, func(int) audit.Event { return event(audit.KeyReceived, "acme", d.KeyID) }); err != nil {
				t.Fatal(err)
			}
		}
		used := func(d enroll.Delivery) {
			t.Helper()
			statement(t, raw(t, location), "UPDATE deliveries SET used_at = 1 WHERE key_id = $1", d.KeyID)
		}
		for name, c := range map[string]struct {
			lost   int
			become func(d enroll.Delivery)
		}{
			"under way":                     {0, func(enroll.Delivery) {}},
			"never made":                    {1, late},
			"never signed for":              {1, func(d enroll.Delivery) { late(offered(t, db, d)) }},
			"deleted before it was":         {1, func(d enroll.Delivery) { deleted(offered(t, db, d)) }},
			"received":                      {0, func(d enroll.Delivery) { received(offered(t, db, d)) }},
			"received, and deleted":         {0, func(d enroll.Delivery) { received(offered(t, db, d)); deleted(d) }},
			"used":                          {0, func(d enroll.Delivery) { used(offered(t, db, d)); late(d) }},
			"used, and deleted":             {0, func(d enroll.Delivery) { used(offered(t, db, d)); late(d); deleted(d) }},
			"used, and deleted before that": {0, func(d enroll.Delivery) { used(offered(t, db, d)); deleted(d) }},
		} {
			id, d := claimed(t, db, enroll.Enrollment{}, time.Hour, 20)
			c.become(d)
			e, err := db.Enrollment(t.Context(), "acme", id)
			if err != nil || e.Claimed != 1 || e.Lost != c.lost {
				t.Errorf("%s: %d claimed and %d lost, want 1 and %d, %v", name, e.Claimed, e.Lost, c.lost, err)
			}
		}
	})
}

// What operators are told of what is not over.
func TestWhatIsUnderWay(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		began := time.Now().Add(-time.Minute)
		id, err := mint(t, db, enroll.Enrollment{Uses: 4}, time.Hour, 10)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			d, err := claim(t, db, id, recipient(t))
			if err != nil {
				t.Fatal(err)
			}
			offered(t, db, d)
		}
		if _, err := claim(t, db, id, recipient(t)); err != nil {
			t.Fatal(err)
		}
		waiting, err := mint(t, db, enroll.Enrollment{Approval: true}, time.Hour, 10)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := claim(t, db, waiting, recipient(t)); err != nil {
			t.Fatal(err)
		}
		w, err := db.UnderWay(t.Context())
		if err != nil || w.Open != 1 || w.Unreceived.Count != 2 || w.Making.Count != 1 || w.Approval.Count != 1 || w.Unreceived.Oldest.Before(began) || w.Unreceived.Oldest.After(w.Making.Oldest) {
			t.Errorf("%+v, %v", w, err)
		}
	})
}

// recorded counts the events of a type in the log.
func recorded(t *testing.T, db *sqlstore.DB, kind audit.Type) int {
	t.Helper()
	if _, err := db.Sequence(t.Context(), 1000, audit.Condition{}); err != nil {
		t.Fatal(err)
	}
	entries, err := db.Entries(t.Context(), 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, entry := range entries {
		e, err := audit.Decode(entry.Leaf)
		if err != nil {
			t.Fatal(err)
		}
		if e.Type == kind {
			n++
		}
	}
	return n
}

// A claim of an expired enrollment, whose key was not made, gives its place back with an event
// also when all keys are deleted; an enrollment that ends then has its own.
func TestPlacesThatComeBackWithAllKeysAreTold(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		id, err := mint(t, db, enroll.Enrollment{Uses: 3}, time.Second, 10)
		must(t, err)
		for range 2 {
			_, err := claim(t, db, id, recipient(t))
			must(t, err)
		}
		time.Sleep(1100 * time.Millisecond)
		if places, err := db.EndExpired(t.Context(), id, func(org org.ID, _ int) audit.Event { return event(audit.EnrollmentExpired, org, id) }); err != nil || places != 1 {
			t.Fatal(places, err)
		}
		another, _ := claimed(t, db, enroll.Enrollment{}, time.Hour, 10)
		told := map[string]int{}
		_, err = db.DeleteKeys(t.Context(), "acme", true, event(audit.KeysDeleted, "acme", ""), func(string, bool) audit.Event { return audit.Event{} },
			func(enrollment string, unmade int) audit.Event {
				told[enrollment] = unmade
				return enrollmentRevoked(enrollment, unmade)
			})
		must(t, err)
		if unmade, there := told[another]; len(told) != 2 || told[id] != 2 || !there || unmade != 0 {
			t.Errorf("told of %v", told)
		}
		if n := recorded(t, db, audit.EnrollmentRevoked); n != 2 {
			t.Errorf("%d of them are in the log", n)
		}
	})
}

// A receipt that comes when the key was withdrawn is not taken for one.
func TestAReceiptForWhatHasEndedIsRefused(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		receive := func(key string) error {
			return db.Receive(t.Context(), key, func(int) audit.Event { return event(audit.KeyReceived, "acme", key) })
		}
		var keys []string
		id, err := mint(t, db, enroll.Enrollment{Uses: 2}, time.Hour, 10)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			d, err := claim(t, db, id, recipient(t))
			if err != nil {
				t.Fatal(err)
			}
			keys = append(keys, offered(t, db, d).KeyID)
		}
		if err := receive(keys[0]); err != nil {
			t.Error(err)
		}
		if err := db.Revoke(t.Context(), "acme", id, event(audit.EnrollmentRevoked, "acme", id), func(key string) audit.Event {
			return event(audit.KeyWithdrawn, "acme", key)
		}); err != nil {
			t.Fatal(err)
		}
		if err := receive(keys[0]); !errors.Is(err, enroll.ErrUnchanged) {
			t.Errorf("the receipt again: %v", err)
		}
		if err := receive(keys[1]); !errors.Is(err, enroll.ErrClosed) {
			t.Errorf("a receipt for a key that was withdrawn: %v", err)
		}
		if n := recorded(t, db, audit.KeyReceived); n != 1 {
			t.Errorf("%d receipts recorded, want 1", n)
		}
	})
}
