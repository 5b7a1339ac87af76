package sqlstore_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/internal/sqlstore/pgtest"
)

// pair is a primary and its standby.
type pair struct{ primary, standby *pgtest.Server }

func newPair(t *testing.T, synchronous bool) pair {
	t.Helper()
	var p pair
	var err error
	if p.primary, err = pgtest.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.primary.Close() })
	if p.standby, err = p.primary.Standby("s1"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.standby.Close() })
	must(t, p.primary.Streaming(1))
	if synchronous {
		must(t, p.primary.Set("synchronous_standby_names", "s1"))
	}
	return p
}

func shortly(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// Promise 8: PostgreSQL keeps, and shows, what was committed while a deadline of
// ours, an administrator or a restart ended the wait for the standby. None of it
// counts before a later commit was acknowledged.
func TestPromise8_WhatTheStandbyLacksIsNotDurable(t *testing.T) {
	p := newPair(t, true)
	location := newDatabase(t, p.primary)
	db, admin := open(t, location), raw(t, location)
	listed := event(audit.KeysListed, "acme", "")
	must(t, db.Record(t.Context(), listed))
	if n, err := db.Sequence(t.Context(), 10, audit.Condition{}); n != 1 || err != nil {
		t.Fatalf("sequenced %d, %v", n, err)
	}
	entries, held, err := db.Durable(t.Context(), audit.Checkpoint{}, 10)
	if err != nil || len(entries) != 1 || held.Size != 1 {
		t.Fatalf("with the standby there: %d entries up to %d, %v", len(entries), held.Size, err)
	}

	must(t, p.standby.Stop())
	visible := func() (n int) {
		must(t, admin.QueryRow("SELECT count(*) FROM events").Scan(&n))
		return n
	}
	// A deadline of ours.
	if err := db.Record(shortly(t, 300*time.Millisecond), event(audit.KeysListed, "acme", "")); !errors.Is(err, orgkey.ErrUnavailable) {
		t.Errorf("a commit that the deadline cut short: %v", err)
	}
	until(t, "PostgreSQL shows the event all the same", func() bool { return visible() == 2 })
	// An administrator.
	cancelled := make(chan error, 1)
	go func() { cancelled <- db.Record(t.Context(), event(audit.KeysListed, "acme", "")) }()
	until(t, "the commit waits and is cancelled", func() bool {
		var n int
		must(t, admin.QueryRow("SELECT count(*) FROM (SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep') c").Scan(&n))
		return n > 0
	})
	if err := <-cancelled; !errors.Is(err, sqlstore.ErrNotReplicated) || !errors.Is(err, orgkey.ErrUnavailable) {
		t.Errorf("a commit whose wait was cancelled: %v, want ErrNotReplicated", err)
	}
	until(t, "PostgreSQL shows that event, too", func() bool { return visible() == 3 })
	// The sequencer's own commit.
	if n, err := db.Sequence(shortly(t, 300*time.Millisecond), 10, audit.Condition{}); n != 0 || err == nil {
		t.Errorf("sequenced %d, %v without the standby", n, err)
	}
	until(t, "the log has grown for everybody who looks", func() bool {
		head, err := db.Head(t.Context())
		return err == nil && head.Size == 3
	})
	for _, ctx := range []context.Context{shortly(t, 300*time.Millisecond), shortly(t, 300*time.Millisecond)} {
		if entries, after, err := db.Durable(ctx, held, 10); err == nil {
			t.Errorf("%d entries up to %d count as durable without the standby", len(entries), after.Size)
		}
	}
	// A restart, after which nothing waits any more.
	must(t, p.primary.Restart())
	if entries, after, err := db.Durable(shortly(t, 2*time.Second), held, 10); err == nil {
		t.Errorf("after a restart %d entries up to %d count as durable without the standby", len(entries), after.Size)
	}

	must(t, p.standby.Restart())
	until(t, "they are durable once the standby has them", func() bool {
		entries, after, err := db.Durable(shortly(t, 2*time.Second), held, 10)
		return err == nil && len(entries) == 2 && after.Size == 3
	})
}

// A log that was set back, or is another one, is not one to go on with.
func TestDurableReportsARollback(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, location string) {
		for range 3 {
			must(t, db.Record(t.Context(), event(audit.KeysListed, "acme", "")))
		}
		if n, err := db.Sequence(t.Context(), 10, audit.Condition{}); n != 3 || err != nil {
			t.Fatalf("sequenced %d, %v", n, err)
		}
		_, whole, err := db.Durable(t.Context(), audit.Checkpoint{}, 10)
		must(t, err)
		ahead, other := whole, whole
		ahead.Size++
		other.Root[0] ^= 1
		for name, held := range map[string]audit.Checkpoint{"ahead": ahead, "another": other} {
			setBack, ok := errors.AsType[*audit.RollbackError](second(db.Durable(t.Context(), held, 10)))
			if !ok || setBack.Held != held || setBack.Log != whole {
				t.Errorf("%s: %+v", name, setBack)
			}
		}
		entries, after, err := db.Durable(t.Context(), whole, 10)
		if err != nil || len(entries) != 0 || after != whole {
			t.Errorf("of all: %d entries, %+v, %v", len(entries), after, err)
		}
		if entries, after, err = db.Durable(t.Context(), audit.Checkpoint{}, 2); err != nil || len(entries) != 2 || after.Size != 2 {
			t.Errorf("two of them: %d entries, %+v, %v", len(entries), after, err)
		}
	})
}

func second(_ []audit.Entry, _ audit.Checkpoint, err error) error { return err }
