package sqlstore_test

import (
	"context"
	"errors"
	"path/filepath"
	"testing"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// An event that somebody waits for has its index when its transaction is
// committed, and so have those that were waiting; one that nobody waits for is
// the sequencer's.
func TestAnAwaitedEventHasItsIndexAtOnce(t *testing.T) {
	db := open(t, filepath.Join(t.TempDir(), "orgkeys.db"))
	sizes := atOnce(t, db, func() (audit.Condition, error) { return audit.Condition{}, nil })
	earlier := event(audit.KeysListed, "acme", "")
	must(t, db.Record(t.Context(), earlier))
	if _, given, err := db.Index(t.Context(), earlier.ID); given || err != nil {
		t.Errorf("an event that nobody waits for has an index: %v", err)
	}
	pending(t, db, "acme", 5)
	if head, err := db.Head(t.Context()); err != nil || head.Size != 2 {
		t.Errorf("the log has %d events, %v; want 2", head.Size, err)
	}
	if size := <-sizes; size != 2 {
		t.Errorf("told of %d events, want 2", size)
	}
	if got := types(t, db); got != "orgkey.listed orgkey.created" {
		t.Errorf("the log holds %s", got)
	}
}

// Promise 5: no event gets an index at once that the sequencer would not give
// one, and the change itself is made nevertheless: its caller waits, and is told.
func TestPromise5_NoIndexAtOnceThatTheSequencerWouldNotGive(t *testing.T) {
	refusing := errors.New("a sink has not reported what it holds")
	location := filepath.Join(t.TempDir(), "orgkeys.db")
	db := open(t, location)
	var waiting []string
	none := func(what string) {
		t.Helper()
		id := reserve(t, db, "acme", 5)
		e := event(audit.KeyCreated, "acme", id)
		must(t, db.StorePending(t.Context(), id, id, []byte("sealed"), e))
		waiting = append(waiting, e.ID)
		if head, err := db.Head(t.Context()); err != nil || head.Size != 0 {
			t.Errorf("%s: the log has %d events, %v; want none", what, head.Size, err)
		}
	}
	atOnce(t, db, func() (audit.Condition, error) { return audit.Condition{}, refusing })
	none("without the condition")
	head, err := db.Head(t.Context())
	must(t, err)
	head.Size = 7
	atOnce(t, db, func() (audit.Condition, error) {
		return audit.Condition{Held: []audit.SinkHeld{{Sink: "file", Checkpoint: head}}}, nil
	})
	none("a sink that is ahead of the log")
	if _, err := db.Sequence(t.Context(), 10, audit.Condition{Held: []audit.SinkHeld{{Sink: "file", Checkpoint: head}}}); !errors.As(err, new(*audit.RollbackError)) {
		t.Errorf("the sequencer says %v", err)
	}

	atOnce(t, db, func() (audit.Condition, error) { return audit.Condition{}, nil })
	r, err := event(audit.SecretsFetched, "acme", "").Encode()
	must(t, err)
	statement(t, administrator(t, location), "INSERT INTO events (id, occurred_at, type, org_id, actor, object, leaf, mac) VALUES ($1, $2, $3, $4, '', '', $5, $6)",
		r.ID, r.Time.UnixMicro(), string(r.Type), r.Org, r.Leaf, audit.NewEventKey().MAC(r.Leaf))
	none("a forged event among those that wait")
	entries, err := db.Entries(t.Context(), 0, 10)
	if err != nil || len(entries) != 0 {
		t.Errorf("entries %v, %v", entries, err)
	}
	for _, id := range waiting {
		if _, given, err := db.Index(t.Context(), id); given || err != nil {
			t.Errorf("event %s has an index that was taken back: %v", id, err)
		}
	}
	if n, err := db.Sequence(t.Context(), 10, audit.Condition{}); n != 3 || !errors.As(err, new(*audit.UnauthenticatedError)) {
		t.Errorf("the sequencer gives %d events their indices, and says %v", n, err)
	}
}

// atOnce has db give awaited events their indices, and returns what sizes it tells.
func atOnce(t *testing.T, db *sqlstore.DB, only func() (audit.Condition, error)) <-chan int64 {
	t.Helper()
	sizes := make(chan int64, 100)
	t.Cleanup(db.AtOnce(1000, func(context.Context) (audit.Condition, error) { return only() }, func(size int64) { sizes <- size }))
	return sizes
}
