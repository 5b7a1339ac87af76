package sqlstore_test

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/keypool"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

var _ keypool.Store = (*sqlstore.DB)(nil)

// inPool puts a key into the pool.
func inPool(t *testing.T, db *sqlstore.DB, use orgkey.Use, life time.Duration) string {
	t.Helper()
	id := uuid.NewString()
	added, err := db.AddAhead(t.Context(), use, id, 1000, time.Minute)
	if err == nil && !added {
		err = errors.New("the pool is full")
	}
	if err := errors.Join(err, db.FillAhead(t.Context(), id, []byte("sealed "+id), life)); err != nil {
		t.Fatal(err)
	}
	return id
}

func poolRows(t *testing.T, db *sqlstore.DB) map[string]orgkey.Ahead {
	t.Helper()
	all, err := db.Ahead(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]orgkey.Ahead{}
	for _, a := range all {
		rows[a.ID] = a
	}
	return rows
}

// Taking is one transaction with the reservation: the key's ID is the reservation's, and
// its row is gone.
func TestAPoolKeyIsTakenWithThePlaceInTheQuota(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		id := inPool(t, db, orgkey.UsePlain, time.Hour)
		other := inPool(t, db, orgkey.UseSealed, time.Hour)
		asked := uuid.NewString()
		taken, err := db.ReserveAhead(t.Context(), "acme", asked, 2, time.Minute)
		if err != nil || taken == nil || taken.ID != id || string(taken.Sealed) != "sealed "+id || taken.Use != orgkey.UsePlain {
			t.Fatalf("took %+v, %v", taken, err)
		}
		if rows := poolRows(t, db); len(rows) != 1 || rows[other].ID != other {
			t.Errorf("the pool has %v", rows)
		}
		if needed, err := db.Needed(t.Context(), []string{id, other}); err != nil || !needed[id] || !needed[other] {
			t.Errorf("the reaper would delete one of them: %v, %v", needed, err)
		}
		fresh := uuid.NewString() // the pool is empty
		if taken, err := db.ReserveAhead(t.Context(), "acme", fresh, 2, time.Minute); err != nil || taken != nil {
			t.Errorf("took %+v, %v", taken, err)
		}
		if needed, err := db.Needed(t.Context(), []string{fresh}); err != nil || !needed[fresh] {
			t.Errorf("there is no reservation: %v, %v", needed, err)
		}
		// A full quota takes nothing.
		spare := inPool(t, db, orgkey.UsePlain, time.Hour)
		if taken, err := db.ReserveAhead(t.Context(), "acme", uuid.NewString(), 2, time.Minute); !errors.As(err, new(*orgkey.QuotaError)) || taken != nil {
			t.Errorf("took %+v, %v", taken, err)
		}
		if rows := poolRows(t, db); rows[spare].ID != spare {
			t.Error("a refused request took a key")
		}
		// What was cancelled, by who may not have had the answer, does not return.
		if err := db.Cancel(t.Context(), asked); err != nil {
			t.Fatal(err)
		}
		if rows := poolRows(t, db); len(rows) != 2 {
			t.Errorf("the pool has %v", rows)
		}
		if needed, err := db.Needed(t.Context(), []string{id}); err != nil || needed[id] {
			t.Errorf("the reaper would leave it: %v, %v", needed, err)
		}
	})
}

func TestOnlyFinishedPoolKeysInTimeAreTaken(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		making := uuid.NewString()
		if added, err := db.AddAhead(t.Context(), orgkey.UsePlain, making, 1, time.Minute); err != nil || !added {
			t.Fatal(added, err)
		}
		if added, err := db.AddAhead(t.Context(), orgkey.UsePlain, uuid.NewString(), 1, time.Minute); err != nil || added {
			t.Errorf("a key in the making does not count: %t, %v", added, err)
		}
		if needed, err := db.Needed(t.Context(), []string{making}); err != nil || !needed[making] {
			t.Errorf("the reaper would delete it: %v, %v", needed, err)
		}
		old := inPool(t, db, orgkey.UsePlain, time.Millisecond)
		altered := inPool(t, db, orgkey.UsePlain, 2*orgkey.MaxAge)
		used := inPool(t, db, orgkey.UsePlain, time.Hour)
		if err := db.Reserve(t.Context(), "initech", used, 1, time.Minute); err != nil {
			t.Fatal(err) // as in a restored database, where a key has the ID already
		}
		time.Sleep(5 * time.Millisecond)
		if taken, err := db.ReserveAhead(t.Context(), "acme", uuid.NewString(), 1, time.Minute); err != nil || taken != nil {
			t.Errorf("took %+v, %v", taken, err)
		}
		if rows := poolRows(t, db); !rows[old].Expired || !rows[altered].Expired || rows[used].Expired {
			t.Errorf("only the first and second of these have expired, or are altered: %v", []orgkey.Ahead{rows[old], rows[altered], rows[used]})
		}
		// Too late, and twice.
		late := uuid.NewString()
		if added, err := db.AddAhead(t.Context(), orgkey.UsePlain, late, 1000, time.Microsecond); err != nil || !added {
			t.Fatal(added, err)
		}
		time.Sleep(5 * time.Millisecond)
		if err := db.FillAhead(t.Context(), late, []byte("x"), time.Hour); !errors.Is(err, orgkey.ErrGone) {
			t.Errorf("a key that took too long was stored: %v", err)
		}
		if err := db.FillAhead(t.Context(), used, []byte("x"), time.Hour); !errors.Is(err, orgkey.ErrGone) {
			t.Errorf("a key was stored twice: %v", err)
		}
		for i := range 2 {
			if removed, err := db.RemoveAhead(t.Context(), used); err != nil || removed != (i == 0) {
				t.Errorf("removal %d: %t, %v", i+1, removed, err)
			}
		}
	})
}

// Twenty want one of ten keys at once.
func TestTwoTakersNeverShareAPoolKey(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		const keys, takers = 10, 20
		for range keys {
			inPool(t, db, orgkey.UsePlain, time.Hour)
		}
		var mu sync.Mutex
		got := map[string]int{}
		var all sync.WaitGroup
		for i := range takers {
			all.Go(func() {
				taken, err := db.ReserveAhead(t.Context(), org.ID("org-"+uuid.NewString()), uuid.NewString(), 1, time.Minute)
				if err != nil {
					t.Errorf("taker %d: %v", i, err)
				}
				if taken != nil {
					mu.Lock()
					got[taken.ID]++
					mu.Unlock()
				}
			})
		}
		all.Wait()
		for id, n := range got {
			if n != 1 {
				t.Errorf("key %s was taken %d times", id, n)
			}
		}
		if rows := poolRows(t, db); len(got)+len(rows) != keys {
			t.Errorf("%d keys were taken and %d are in the pool, of %d", len(got), len(rows), keys)
		}
	})
}

// A failover loses the transaction in which one request took a pool key, and another takes
// it. What the first does then is not done to the reservation of the second.
func TestAReservationIsThatOfWhoAskedForIt(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		first, second, id := uuid.NewString(), uuid.NewString(), uuid.NewString()
		take := func(asked string) {
			t.Helper()
			added, err := db.AddAhead(t.Context(), orgkey.UsePlain, id, 1, time.Minute)
			if err := errors.Join(err, db.FillAhead(t.Context(), id, []byte("sealed"), time.Hour)); err != nil || !added {
				t.Fatal(added, err)
			}
			if taken, err := db.ReserveAhead(t.Context(), "acme", asked, 1, time.Minute); err != nil || taken == nil || taken.ID != id {
				t.Fatal(taken, err)
			}
		}
		take(first)
		if err := db.Cancel(t.Context(), first); err != nil { // as if it had not been
			t.Fatal(err)
		}
		take(second)
		if err := db.StorePending(t.Context(), id, first, []byte("x"), event(audit.KeyCreated, "acme", id)); !errors.Is(err, orgkey.ErrGone) {
			t.Errorf("the first stored its record: %v", err)
		}
		if err := db.Exchange(t.Context(), first, time.Minute); !errors.Is(err, orgkey.ErrGone) {
			t.Errorf("the first exchanged its key: %v", err)
		}
		if err := db.Cancel(t.Context(), first); err != nil {
			t.Error(err)
		}
		if err := db.StorePending(t.Context(), id, second, []byte("x"), event(audit.KeyCreated, "acme", id)); err != nil {
			t.Errorf("the second: %v", err)
		}
	})
}

// The place stays taken while its key is exchanged, and the pool key is not needed any more.
func TestAPlaceKeepsWhileItsKeyIsExchanged(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		id, asked := inPool(t, db, orgkey.UsePlain, time.Hour), uuid.NewString()
		if taken, err := db.ReserveAhead(t.Context(), "acme", asked, 1, time.Second); err != nil || taken == nil {
			t.Fatal(taken, err)
		}
		if err := db.Exchange(t.Context(), asked, time.Hour); err != nil {
			t.Fatal(err)
		}
		time.Sleep(1100 * time.Millisecond)
		if needed, err := db.Needed(t.Context(), []string{id, asked}); err != nil || needed[id] || !needed[asked] {
			t.Errorf("needed are %v, %v", needed, err)
		}
		if err := db.StorePending(t.Context(), id, asked, []byte("x"), event(audit.KeyCreated, "acme", id)); !errors.Is(err, orgkey.ErrGone) {
			t.Errorf("the pool key was stored: %v", err)
		}
		if err := db.StorePending(t.Context(), asked, asked, []byte("x"), event(audit.KeyCreated, "acme", asked)); err != nil {
			t.Error(err)
		}
		if err := db.Exchange(t.Context(), asked, time.Hour); !errors.Is(err, orgkey.ErrGone) {
			t.Errorf("a pending key was exchanged: %v", err)
		}
	})
}

// Who leaves before the answer reads nothing that the change, left behind, still sets: the race
// detector says so.
func TestWhoLeavesReadsNothing(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "orgkeys.db"))
	for i := range 400 {
		ctx, leave := context.WithTimeout(t.Context(), time.Duration(i)*2*time.Microsecond)
		id := uuid.NewString()
		if added, err := db.AddAhead(ctx, orgkey.UsePlain, id, 1000, time.Hour); added && err != nil {
			t.Errorf("added, and %v", err)
		}
		if removed, err := db.RemoveAhead(ctx, id); removed && err != nil {
			t.Errorf("removed, and %v", err)
		}
		leave()
	}
}
