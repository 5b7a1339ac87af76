package tiles_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/audittest"
	"github.com/orgkeys/orgkeys/internal/audit/tiles"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// Whoever writes to the archive does not decide what is old enough to be removed.
func TestForgedEntriesAreNotRemoved(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, location string) {
		e := newMovable(t, location)
		e.run(t, e.move(t), 512, 0)
		old := make([][]byte, tiles.Width)
		for i := range old {
			event := e.Key(audit.KeysListed, "")
			event.Time = time.Date(2020, 1, 1, 0, 0, i, 0, time.UTC)
			r, err := event.Encode()
			audittest.Must(t, err)
			old[i] = r.Leaf
		}
		forged, err := tiles.Pack(old)
		audittest.Must(t, err)
		for _, name := range []string{"000", "001"} {
			audittest.Must(t, os.WriteFile(filepath.Join(e.dir, "tile/entries", name), forged, 0o600))
		}
		before := files(t, e.dir)
		m := e.move(t)
		m.Keep = 365 * 24 * time.Hour
		done, err := m.Run(t.Context(), e.Archive, e.DB)
		if !errors.As(err, new(*verify.Problem)) || done.Removed != 0 || e.count(t, "events WHERE type = 'log.pruned'") != 0 {
			t.Errorf("removed %d entries, %v; want a problem", done.Removed, err)
		}
		if now := files(t, e.dir); !maps.Equal(now, before) {
			t.Error("the archive was changed")
		}
	})
}

// skewed is a database beside a machine with another clock.
type skewed struct {
	*sqlstore.DB
	ahead time.Duration
}

func (s skewed) ClockAhead(context.Context) (time.Duration, error) { return s.ahead, nil }

// What cannot be undone goes by the clock that is behind, and by none that is wrong.
func TestAWrongClockRemovesNothing(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, location string) {
		e := newMovable(t, location)
		e.run(t, e.move(t), 512, 0)
		m := e.move(t)
		m.Keep = time.Nanosecond
		for _, c := range []struct {
			ahead   time.Duration
			refused bool
			entries int64
		}{{2 * time.Hour, true, 0}, {-2 * time.Hour, true, 0}, {59 * time.Second, false, 0}, {-time.Second, false, 512}} {
			done, err := m.Run(t.Context(), e.Archive, skewed{e.DB, c.ahead})
			if (err != nil) != c.refused || done.Entries != c.entries {
				t.Errorf("a clock that is %s ahead: %d entries were removed, %v", c.ahead, done.Entries, err)
			}
		}
		e.wantGood(t)
	})
}

// While packs are not written, release ends that; waiting waits until so many
// transactions wait for any lock, or something is done.
func (e movable) holdPacks(t *testing.T) (waiting func(n int, done <-chan error), release func()) {
	t.Helper()
	tx, err := e.Raw.Begin()
	audittest.Must(t, err)
	_, err = tx.Exec("LOCK TABLE archived_persons IN EXCLUSIVE MODE")
	audittest.Must(t, err)
	waiting = func(n int, done <-chan error) {
		t.Helper()
		for end := time.Now().Add(4 * time.Second); e.count(t, "pg_locks WHERE NOT granted") < int64(n) && len(done) == 0; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("fewer than %d wait for a lock", n)
			}
		}
	}
	return waiting, func() { audittest.Must(t, tx.Commit()) }
}

func (e movable) erase(t *testing.T, subject string) <-chan error {
	done := make(chan error, 1)
	go func() {
		_, err := e.DB.Erase(t.Context(), subject, func(id string, _ int64) audit.Event {
			event := audit.New(audit.PersonErased, "")
			event.Object = id
			return event
		})
		done <- err
	}()
	return done
}

func (e movable) moving(t *testing.T) <-chan error {
	moved := make(chan error, 1)
	go func() {
		_, err := e.move(t).Run(t.Context(), e.Archive, e.DB)
		moved <- err
	}()
	return moved
}

func (e movable) wantErased(t *testing.T, subject string) {
	t.Helper()
	if n, err := e.DB.Erasable(t.Context(), subject); err != nil || n != 0 {
		t.Errorf("of %s, who was erased, %d personal parts are left, %v", subject, n, err)
	}
}

// Who is erased while events are moved does not come back.
func TestErasingWhileMoving(t *testing.T) {
	t.Parallel()
	e := newMovable(t, newPostgres(t))
	waiting, release := e.holdPacks(t)
	moved := e.moving(t)
	waiting(1, moved)
	erased := e.erase(t, "u-1")
	waiting(2, erased)
	release()
	audittest.Must(t, errors.Join(<-moved, <-erased))
	e.wantErased(t, "u-1")
	e.sign(t)
	e.wantGood(t)
}

// Nor when somebody else of the same bundle is erased.
func TestErasingTwoAtOnce(t *testing.T) {
	t.Parallel()
	e := newMovable(t, newPostgres(t))
	e.run(t, e.move(t), 512, 0)
	waiting, release := e.holdPacks(t)
	first, second := e.erase(t, "u-1"), e.erase(t, "u-2")
	waiting(2, nil)
	release()
	audittest.Must(t, errors.Join(<-first, <-second))
	e.wantErased(t, "u-1")
	e.wantErased(t, "u-2")
	e.sign(t)
	e.wantGood(t)
}

// A person is looked for in a large archive while others write.
func TestErasingHoldsUpNobody(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, location string) {
		e := newMovable(t, location)
		var more []audit.Event
		for range 40 {
			event := e.Key(audit.KeysListed, "")
			event.Actor.ID, event.Personal = "u-9", audit.Personal{Name: "Grace"}
			more = append(more, event)
		}
		e.SignedLog.Record(t, more...)
		e.run(t, e.move(t), 768, 0)
		const packs = 1 << 14 // without u-9
		for n := 4; n < 2*packs; n *= 2 {
			e.Exec(t, fmt.Sprintf("INSERT INTO archived_persons SELECT bundle + %d, content FROM archived_persons WHERE bundle %% 4 < 2", n))
		}
		e.Exec(t, fmt.Sprintf("UPDATE log_archive SET moved = %d", 2*packs*tiles.Width))
		begun := time.Now()
		erased := e.erase(t, "u-9")
		longest, writes := time.Duration(0), 0
		for ; len(erased) == 0; writes++ {
			started := time.Now()
			audittest.Must(t, e.DB.Record(t.Context(), e.Key(audit.KeysListed, "")))
			longest = max(longest, time.Since(started))
			time.Sleep(time.Millisecond)
		}
		audittest.Must(t, <-erased)
		t.Logf("a search through %d packs took %v; of %d writes meanwhile the longest took %v", e.count(t, "archived_persons"), time.Since(begun), writes, longest)
		if longest > time.Second {
			t.Errorf("a write took %v", longest)
		}
		e.wantErased(t, "u-9")
	})
}

// What an event of a key's delivery knew is in one place, whenever the key is deleted.
func TestDeletingAKeyWhileMoving(t *testing.T) {
	t.Parallel()
	e := newMovable(t, newPostgres(t))
	waiting, release := e.holdPacks(t)
	moved := e.moving(t)
	waiting(1, moved)
	audittest.Must(t, e.DB.DeleteKey(t.Context(), "acme", "k-3", e.Key(audit.KeyDeleted, "k-3")))
	release()
	audittest.Must(t, <-moved)
	e.sign(t)
	e.wantGood(t)
}

// A node that made its key gets the same answer for as long as the key lives, from the
// database alone.
func TestANodesOwnKeyKeepsItsEvent(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, location string) {
		e := newMovable(t, location)
		var id string
		audittest.Must(t, e.Raw.QueryRow("SELECT id FROM events WHERE type = 'orgkey.created' AND object = 'k-3'").Scan(&id))
		_, err := e.Raw.Exec(`INSERT INTO deliveries (key_id, org_id, enrollment_id, scope, stage, recipient, origin, event_id, received_at)
			VALUES ('k-3', 'acme', 'e-1', 'organization', 'received', 'r', 'node', $1, 1)`, id)
		audittest.Must(t, err)
		before, err := e.DB.Leaf(t.Context(), "k-3")
		if event, badLeaf := audit.Decode(before); err != nil || badLeaf != nil || event.ID != id {
			t.Fatalf("the leaf is of event %s, %v, %v", event.ID, err, badLeaf)
		}
		e.run(t, e.move(t), 512, 0)
		audittest.Must(t, os.RemoveAll(e.dir))
		after, err := e.DB.Leaf(t.Context(), "k-3")
		if err != nil || !bytes.Equal(before, after) {
			t.Errorf("%s, %v; before the event was moved %s", after, err, before)
		}
	})
}

// A sealed key that waits for its receipt, however long, holds nothing back: its node gets the
// same answer from the database alone. One that was not offered yet does.
func TestADeliveryKeepsItsEvent(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, location string) {
		e := newMovable(t, location)
		sealed := e.Key(audit.KeySealed, "k-3")
		e.SignedLog.Record(t, sealed)
		var more []audit.Event
		for range 300 {
			more = append(more, e.Key(audit.KeysListed, ""))
		}
		e.SignedLog.Record(t, more...)
		_, err := e.Raw.Exec(`INSERT INTO deliveries (key_id, org_id, enrollment_id, scope, stage, recipient, origin, event_id, wrapped)
			VALUES ('k-3', 'acme', 'e-1', 'organization', 'sealed', 'r', 'backend', $1, $2)`, sealed.ID, []byte("wrapped"))
		audittest.Must(t, err)
		before, err := e.DB.Leaf(t.Context(), "k-3")
		if event, badLeaf := audit.Decode(before); err != nil || badLeaf != nil || event.ID != sealed.ID {
			t.Fatalf("the leaf is of event %s, %v, %v", event.ID, err, badLeaf)
		}
		late := time.Now().Add(time.Hour)
		e.run(t, e.move(t), 512, 0)
		holds, err := e.DB.HeldBack(t.Context(), 512, late, 1024)
		if want := (sqlstore.Hold{Key: "k-3", Org: "acme", Next: 740}); err != nil || len(holds) != 1 || holds[0] != want {
			t.Errorf("held back by %+v, %v; want %+v", holds, err, want)
		}
		e.Exec(t, "UPDATE deliveries SET stage = 'available'")
		if holds, err := e.DB.HeldBack(t.Context(), 512, late, 1024); err != nil || len(holds) != 0 {
			t.Errorf("held back by %+v, %v; want nothing", holds, err)
		}
		e.run(t, e.move(t), 512, 0)
		audittest.Must(t, os.RemoveAll(e.dir))
		after, err := e.DB.Leaf(t.Context(), "k-3")
		if err != nil || !bytes.Equal(before, after) {
			t.Errorf("%s, %v; before the event was moved %s", after, err, before)
		}
	})
}

// Bundles are old as those behind them are, where more of these are.
func TestAWrongClockHoldsNothingBack(t *testing.T) {
	t.Parallel()
	limit := time.Date(2026, 7, 1, 0, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		times string // of each bundle: o old, . old by a moment, y young
		want  int64
	}{
		{"", 0}, {"oooo", 4}, {"ooyy", 2}, {"yyyy", 0},
		{"yoo", 3}, {"oyooyy", 4}, {"oooyoo", 6}, {"ooyyyooooooyyyyy", 11}, {"yoyoooo", 0}, {"yoyoooooo", 9}, {"oyoooyoooy", 9},
		{"yo", 0}, {"y..yyyy", 0}, {"y..", 0}, {"oyyyoyyy", 1}, {"yyyyyyyyooyyyyyyy", 0}, // the clock was behind
		{"oyyoo", 1}, {"oyoy", 1},
	} {
		asked := 0
		at := func(bundle int64) time.Time {
			return limit.Add(map[byte]time.Duration{'o': -2 * time.Hour, '.': -time.Minute, 'y': 24 * time.Hour}[c.times[bundle]])
		}
		got, err := tiles.Older(0, int64(len(c.times))*tiles.Width+5, limit, func(bundle int64, before time.Time) (bool, error) {
			asked++
			return at(bundle).Before(before), nil
		})
		if err != nil || got != c.want*tiles.Width {
			t.Errorf("of %q %d bundles are old, %v; want %d", c.times, got/tiles.Width, err, c.want)
		}
	}
	asked := 0
	if n, err := tiles.Older(0, 1<<20*tiles.Width, limit, func(bundle int64, _ time.Time) (bool, error) { asked++; return bundle < 100, nil }); err != nil || n != 100*tiles.Width || asked > 130 {
		t.Errorf("%d events are old, of which %d bundles were asked: %v", n, asked, err)
	}
}

// An event from a future that has not come is moved, and removed, with those around it.
func TestEventsOfAClockThatWasAhead(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, location string) {
		e := newMovable(t, location)
		var more []audit.Event
		for range 600 {
			more = append(more, e.Key(audit.KeysListed, ""))
		}
		e.SignedLog.Record(t, more...)
		e.Exec(t, "UPDATE events SET occurred_at = occurred_at + 500000000000000 WHERE idx = 100") // 15 years
		late := e.move(t)
		late.Before = time.Now().Add(2 * time.Hour)
		e.run(t, late, 1280, 0)
	})
}

// Retention goes by the same, and removes nothing where by the clock everything would be.
func TestRetentionAndAClockThatWasAhead(t *testing.T) {
	t.Parallel()
	e := newMovable(t, filepath.Join(t.TempDir(), "orgkeys.db")) // 740 events, of today
	at := func(before time.Duration, n int) {
		t.Helper()
		var more []audit.Event
		for range n {
			event := e.Key(audit.KeysListed, "")
			event.Time = time.Now().Add(-before)
			more = append(more, event)
		}
		e.SignedLog.Record(t, more...)
	}
	at(48*time.Hour, 850)
	at(48*time.Hour, 850)
	e.run(t, e.move(t), 2304, 0)
	m := e.move(t)
	m.Keep = 24 * time.Hour
	at(25*time.Hour, 1)
	if done, err := m.Run(t.Context(), e.Archive, e.DB); err == nil || !strings.Contains(err.Error(), "even the newest event that is signed, 2441,") || done.Removed != 0 || e.count(t, "events WHERE type = 'log.pruned'") != 0 {
		t.Errorf("by a clock that is ahead %d entries are removed, %v", done.Removed, err)
	}
	at(time.Hour, 1)
	e.run(t, m, 0, 2304)
	e.wantGood(t)
}

// What retention removes while a person is looked for needs no erasing.
func TestErasingWhileEntriesAreRemoved(t *testing.T) {
	t.Parallel()
	e := newMovable(t, newPostgres(t))
	e.run(t, e.move(t), 512, 0)
	tx, err := e.Raw.Begin()
	audittest.Must(t, err)
	_, err = tx.Exec("SELECT pg_advisory_xact_lock(hashtextextended('archive', 0))")
	audittest.Must(t, err)
	erased := e.erase(t, "u-1") // it has looked for the person, and waits for its turn
	for end := time.Now().Add(10 * time.Second); e.count(t, "pg_locks WHERE locktype = 'advisory' AND NOT granted") == 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("nobody waits for the archive's lock")
		}
	}
	for _, statement := range []string{"DELETE FROM archived_persons WHERE bundle = 0", "UPDATE log_archive SET removed = 256"} {
		_, err := tx.Exec(statement)
		audittest.Must(t, err)
	}
	audittest.Must(t, tx.Commit())
	audittest.Must(t, <-erased)
	e.wantErased(t, "u-1")
}
