package sqlstore_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// underway is a log of three events, a fourth that waits for its place, and what
// must be so for it to get one.
func underway(t *testing.T, db *sqlstore.DB) audit.Condition {
	t.Helper()
	for range 3 {
		must(t, db.Record(t.Context(), event(audit.KeysListed, "acme", "")))
	}
	if n, err := db.Sequence(t.Context(), 10, audit.Condition{}); n != 3 || err != nil {
		t.Fatalf("sequenced %d, %v", n, err)
	}
	must(t, db.Record(t.Context(), event(audit.KeysListed, "acme", "")))
	timeline, err := db.Timeline(t.Context())
	must(t, err)
	_, held, err := db.Durable(t.Context(), audit.Checkpoint{}, 2)
	must(t, err)
	return audit.Condition{Timeline: timeline, Held: []audit.SinkHeld{{Sink: "file", Checkpoint: held}}}
}

func grows(t *testing.T, db *sqlstore.DB, only audit.Condition) error {
	t.Helper()
	n, err := db.Sequence(t.Context(), 10, only)
	if (n == 1) != (err == nil) {
		t.Errorf("sequenced %d, %v", n, err)
	}
	return err
}

// A log that is behind a sink, or is another one than the sink's, gives no event
// a place: neither a failover's nor a forger's.
func TestTheLogDoesNotGrowBehindASink(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		only := underway(t, db)
		for name, change := range map[string]func(*audit.Checkpoint){
			"ahead":     func(c *audit.Checkpoint) { c.Size = 4 },
			"rewritten": func(c *audit.Checkpoint) { c.Root[0] ^= 1 },
			"another":   func(c *audit.Checkpoint) { c.Origin = "orgkeys/another" },
		} {
			changed := only.Held[0]
			change(&changed.Checkpoint)
			setBack, ok := errors.AsType[*audit.RollbackError](grows(t, db, audit.Condition{Timeline: only.Timeline, Held: []audit.SinkHeld{only.Held[0], changed}}))
			if !ok || setBack.Sink != "file" || setBack.Held != changed.Checkpoint {
				t.Errorf("%s: %+v", name, setBack)
			}
		}
		if err := grows(t, db, only); err != nil {
			t.Errorf("a log that extends what the sink holds: %v", err)
		}
	})
}

// The log waits for other replicas: for one whose sink is ahead until an operator
// decides, or the sink fits; for one that lives until its sinks were asked since the failover.
func TestTheLogWaitsForOtherReplicasSinks(t *testing.T) {
	location := newDatabase(t, postgres)
	db, other, admin := open(t, location), open(t, location), raw(t, location)
	only := underway(t, db)
	db.UseHolder("a:/data")
	other.UseHolder("b:/data")
	must(t, db.AnnounceReplica(t.Context(), sqlstore.Replica{ID: "mine", Address: "a 127.0.0.1:3000", Timeline: only.Timeline}))
	must(t, other.AnnounceReplica(t.Context(), sqlstore.Replica{ID: "other", Address: "b 127.0.0.1:3000", Timeline: only.Timeline}))

	must(t, other.SinkAhead(t.Context(), "file", 7))
	halted, ok := errors.AsType[*audit.HaltError](grows(t, db, only))
	if !ok || !halted.SetBack || !strings.Contains(halted.Why, "sink file of b:/data holds 7 events") {
		t.Errorf("while another's sink is ahead: %+v", halted)
	}
	must(t, db.SinkFits(t.Context(), "file")) // this one's does, which is no news of the other's
	if grows(t, db, only) == nil {
		t.Error("it went on although another's sink is ahead")
	}
	must(t, other.SinkFits(t.Context(), "file"))

	var moved *audit.TimelineError
	if err := grows(t, db, audit.Condition{Timeline: "00000099"}); !errors.As(err, &moved) || moved.Timeline != only.Timeline {
		t.Errorf("after a failover: %v", err)
	}
	statement(t, admin, "UPDATE replicas SET timeline = '00000099' WHERE id = 'other'")
	if halted, ok = errors.AsType[*audit.HaltError](grows(t, db, only)); !ok || halted.SetBack || !strings.Contains(halted.Why, "b 127.0.0.1:3000") {
		t.Errorf("while another has not said that its sinks fit: %+v", halted)
	}
	// It is dead, by whichever clock it last spoke.
	for _, moved := range []string{"-", "+"} {
		statement(t, admin, "UPDATE replicas SET timeline = '00000099', seen_at = seen_at "+moved+" 60 * 1000000::bigint WHERE id = 'other'")
		if err := grows(t, db, only); err != nil {
			t.Errorf("with a dead replica: %v", err)
		}
		must(t, db.Record(t.Context(), event(audit.KeysListed, "acme", "")))
		must(t, other.AnnounceReplica(t.Context(), sqlstore.Replica{ID: "other", Address: "b 127.0.0.1:3000"}))
		if grows(t, db, only) == nil {
			t.Error("a replica that says nothing of its sinks counts as one that does")
		}
	}
	must(t, other.AnnounceReplica(t.Context(), sqlstore.Replica{ID: "other", Address: "b 127.0.0.1:3000", Timeline: only.Timeline}))
	if err := grows(t, db, only); err != nil {
		t.Errorf("when all have: %v", err)
	}
	// A recovery to a point in time brought back the row of a process that has ended.
	statement(t, admin, "INSERT INTO replicas (id, address, version, policy, max_keys, clock_ahead, seen_at, timeline) SELECT 'ended', address, version, policy, max_keys, clock_ahead, seen_at - 1000000, '00000099' FROM replicas WHERE id = 'other'")
	must(t, other.ForgetReplica(t.Context(), "other"))
	must(t, db.Record(t.Context(), event(audit.KeysListed, "acme", "")))
	if err := grows(t, db, only); err != nil {
		t.Errorf("when the process that took its place has ended: %v", err)
	}
}

// The event that accepts a rollback comes right behind what the log kept, before
// what was recorded since, and ends every hold.
func TestAnAcceptedRollbackComesFirst(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		underway(t, db)
		must(t, db.SinkAhead(t.Context(), "file", 9))
		head, err := db.Head(t.Context())
		must(t, err)
		accepted := audit.Rollback{From: head.Text(), To: head.Text(), Kept: 3, Reason: "failover"}.Event()
		earlier := head
		earlier.Size--
		ends, err := db.SinksAhead(t.Context())
		must(t, err)
		if _, err := db.AcceptRollback(t.Context(), earlier, accepted, ends, voids()); !errors.Is(err, sqlstore.ErrGrown) {
			t.Errorf("behind another head: %v", err)
		}
		if _, err := db.AcceptRollback(t.Context(), head, accepted, ends, voids()); err != nil {
			t.Fatal(err)
		}
		if index, known, err := db.Index(t.Context(), accepted.ID); index != 3 || !known || err != nil {
			t.Errorf("its index is %d, %t, %v", index, known, err)
		}
		if ahead, err := db.SinksAhead(t.Context()); err != nil || len(ahead) != 0 {
			t.Errorf("still held back: %+v, %v", ahead, err)
		}
		if n, err := db.Sequence(t.Context(), 10, audit.Condition{}); n != 1 || err != nil {
			t.Errorf("then what was waiting: %d, %v", n, err)
		}
	})
}

// The first event behind a failover says so; what somebody else writes there does not.
func TestTheLogSaysWhereItWentOnInAnotherDatabase(t *testing.T) {
	location := newDatabase(t, postgres)
	db, admin := open(t, location), raw(t, location)
	only := underway(t, db)
	var history string
	must(t, admin.QueryRow("SELECT history FROM log_head").Scan(&history))
	if system, timeline, _ := strings.Cut(history, "/"); len(system) < 10 || timeline != only.Timeline {
		t.Errorf("the log is in %q", history)
	}
	must(t, grows(t, db, only)) // the fourth, in the same database
	statement(t, admin, "UPDATE log_head SET history = 'before'")
	must(t, db.Record(t.Context(), event(audit.KeysListed, "acme", "")))
	must(t, grows(t, db, only))
	must(t, db.Record(t.Context(), event(audit.KeysListed, "acme", "")))
	must(t, grows(t, db, only))
	changed := func() (at []int64) {
		for index := range int64(7) {
			is, err := db.ChangedAt(t.Context(), index)
			must(t, err)
			if is {
				at = append(at, index)
			}
		}
		return at
	}
	if at := changed(); len(at) != 1 || at[0] != 4 {
		t.Fatalf("it went on in another database at %v", at)
	}
	var leaf []byte
	must(t, admin.QueryRow("SELECT leaf FROM events WHERE idx = 4").Scan(&leaf))
	statement(t, admin, "UPDATE events SET leaf = $1 WHERE idx = 6", leaf)
	statement(t, admin, "UPDATE events SET leaf = replace(encode(leaf, 'escape'), 'before', 'behind')::bytea WHERE idx = 4")
	if at := changed(); len(at) != 0 {
		t.Errorf("forged and moved ones are believed at %v", at)
	}
}
