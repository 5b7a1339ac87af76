package sqlstore_test

import (
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// traced fails the test unless these are the traces, in whatever order.
func traced(t *testing.T, db *sqlstore.DB, when string, want ...orgkey.Trace) {
	t.Helper()
	got, err := db.Traces(t.Context())
	must(t, err)
	if len(got) != len(want) || slices.ContainsFunc(want, func(trace orgkey.Trace) bool { return !slices.Contains(got, trace) }) {
		t.Errorf("%s: the traces are %v, want %v", when, got, want)
	}
}

// A process that died leaves the name that it was making a key under, whatever ends its
// reservation or attempt; one that ended by itself leaves none.
func TestTheNamesOfDeadGenerationsAreKept(t *testing.T) {
	const short, alive = 200 * time.Millisecond, 2 * time.Second
	plain := func(id string) orgkey.Trace { return orgkey.Trace{Name: id, Use: orgkey.UsePlain} }
	sealed := func(id string) orgkey.Trace { return orgkey.Trace{Name: id, Use: orgkey.UseSealed} }
	dead := func(t *testing.T, db *sqlstore.DB, of org.ID, store bool) string {
		t.Helper()
		id := uuid.NewString()
		must(t, db.Reserve(t.Context(), of, id, 99, short))
		if store {
			must(t, db.StorePending(t.Context(), id, id, []byte("sealed "+id), event(audit.KeyCreated, of, id)))
		}
		return id
	}
	each := func(id string, _ bool) audit.Event { return event(audit.KeyWithdrawn, "acme", id) }
	onBoth(t, func(t *testing.T, db *sqlstore.DB, location string) {
		ctx := t.Context()
		released(t, db, "acme", 99)
		must(t, db.Cancel(ctx, reserve(t, db, "acme", 99)))
		_, taken := claimed(t, db, enroll.Enrollment{}, time.Hour, 99)
		offered(t, db, taken)
		_, given := claimed(t, db, enroll.Enrollment{}, time.Hour, 99)
		attempt := uuid.NewString()
		if mine, err := db.Begin(ctx, given.KeyID, attempt, time.Minute); err != nil || !mine {
			t.Fatal(mine, err)
		}
		if again, err := db.Begin(ctx, given.KeyID, uuid.NewString(), time.Minute); err != nil || again {
			t.Fatal(again, err)
		}
		must(t, db.GiveUp(ctx, given.KeyID, attempt))
		traced(t, db, "after what ended by itself")

		swept1, swept2 := dead(t, db, "one", false), dead(t, db, "another", true)
		pooled := inPool(t, db, orgkey.UsePlain, time.Hour)
		if got, err := db.ReserveAhead(ctx, "third", uuid.NewString(), 99, short); err != nil || got.ID != pooled {
			t.Fatal(got, err)
		}
		time.Sleep(2 * short)
		traced(t, db, "before the sweep")
		_, err := db.Sweep(ctx, 100, life, swept)
		must(t, err)
		traced(t, db, "after the sweep", plain(swept1), plain(swept2), plain(pooled))
		must(t, db.ForgetTraces(ctx, []string{swept1, swept2, pooled}))

		replaced := dead(t, db, "acme", false)
		time.Sleep(2 * short)
		reserve(t, db, "acme", 99)
		traced(t, db, "after its place was given to another", plain(replaced))
		must(t, db.ForgetTraces(ctx, []string{replaced}))

		// An attempt after which another begins, and one whose enrollment ends.
		first, second := uuid.NewString(), inPool(t, db, orgkey.UseSealed, time.Hour)
		id, d := claimed(t, db, enroll.Enrollment{}, time.Hour, 99)
		if mine, err := db.Begin(ctx, d.KeyID, first, short); err != nil || !mine {
			t.Fatal(mine, err)
		}
		time.Sleep(2 * short)
		if mine, got, err := db.BeginAhead(ctx, d.KeyID, uuid.NewString(), alive); err != nil || !mine || got.ID != second {
			t.Fatal(mine, got, err)
		}
		traced(t, db, "after another attempt began", sealed(first))
		waiting := uuid.NewString()
		_, d = claimed(t, db, enroll.Enrollment{}, time.Hour, 99)
		if mine, err := db.Begin(ctx, d.KeyID, waiting, short); err != nil || !mine {
			t.Fatal(mine, err)
		}
		time.Sleep(2 * short)
		for _, want := range [][]orgkey.Trace{{sealed(first), sealed(waiting)}, {sealed(first)}} {
			_, err = db.SweepDeliveries(ctx, 100, nil, nil, nil)
			must(t, err)
			traced(t, db, "after its time", want...)
			must(t, db.ForgetTraces(ctx, []string{waiting}))
		}
		must(t, db.Revoke(ctx, "acme", id, event(audit.EnrollmentRevoked, "acme", id), func(key string) audit.Event { return event(audit.KeyWithdrawn, "acme", key) }))
		time.Sleep(alive + short)
		traced(t, db, "after the enrollment ended", sealed(first), sealed(second))
		must(t, db.ForgetTraces(ctx, []string{first, second}))

		// A process may be alive when all keys are deleted: its names are none until it has given up.
		late, attempt := uuid.NewString(), uuid.NewString()
		must(t, db.Reserve(ctx, "acme", late, 99, alive))
		_, d = claimed(t, db, enroll.Enrollment{}, time.Hour, 99)
		if mine, err := db.Begin(ctx, d.KeyID, attempt, alive); err != nil || !mine {
			t.Fatal(mine, err)
		}
		_, err = db.DeleteKeys(ctx, "acme", true, event(audit.KeysDeleted, "acme", ""), each, enrollmentRevoked)
		must(t, err)
		traced(t, db, "when all keys were deleted")
		time.Sleep(alive + short)
		traced(t, db, "later", plain(late), sealed(attempt))

		statement(t, raw(t, location), "UPDATE key_traces SET due_at = due_at - 604900000000") // a week and more
		_, err = db.Sweep(ctx, 100, life, swept)
		must(t, err)
		traced(t, db, "after a week")
	})
}
