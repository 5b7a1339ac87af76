package tiles

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
)

// Log is a database out of which the log can be moved. Its implementation is sqlstore.
type Log interface {
	Source
	// Movable returns how many first events, whole bundles among the first size, happened
	// before a time, as Older finds, and every shared sink has acknowledged.
	Movable(ctx context.Context, before time.Time, size int64) (int64, error)
	// Announce records an event of audit.LogMoved or EntriesRemoved, and notes it as the next.
	Announce(ctx context.Context, e audit.Event) error
	// Vouched returns an event that the newest signed checkpoint covers, and its index; -1: it
	// covers no such event.
	Vouched(ctx context.Context, eventID string) (audit.Event, int64, error)
	// BundleReceipts returns the receipts for the events of a bundle, by sink.
	BundleReceipts(ctx context.Context, bundle int64) (map[string][][]byte, error)
	// ReceiptSinksOf names the sinks that give receipts.
	ReceiptSinksOf(ctx context.Context) ([]string, error)
	// MoveOut deletes the events from index from to before to, whole bundles, if those
	// before are gone already and the next event says so.
	MoveOut(ctx context.Context, from, to int64) error
	// NoteRemoved notes, likewise, that the entries of bundles are removed.
	NoteRemoved(ctx context.Context, from, to int64) error
	// At returns the checkpoint that the log had at an earlier size.
	At(ctx context.Context, size int64) (audit.Checkpoint, error)
	// ClockAhead is how far this process's clock is ahead of the database's, if it has one.
	ClockAhead(ctx context.Context) (time.Duration, error)
}

// Move is what is to be moved out of a database, and removed from the archive.
type Move struct {
	Before time.Time     // when the events happened
	Keep   time.Duration // entries that are older are removed; 0: none
	// Signed waits until covered says that a signed checkpoint covers what was recorded, or
	// has one signed.
	Signed   func(ctx context.Context, covered func(context.Context) (bool, error)) error
	Progress func(doing string) verify.Progress
}

// Moved is what Run has done.
type Moved struct {
	Published audit.Signed
	audit.Archived
	Events  int64 // that were moved
	Entries int64 // that were removed
}

// chunk is how many events are moved in one transaction, and entries removed after one
// note.
const chunk = 16 * width

// clockDoubt is by how much two clocks may differ if what is removed is to go by them.
const clockDoubt = time.Minute

// ErrNotCovered: the event that announces what is to be moved is in no signed checkpoint yet.
var ErrNotCovered = errors.New("no signed checkpoint covers the event that announces it yet: nothing was moved; run the same command again")

// Run publishes the log, announces in it what is to be moved, waits until that is signed,
// and moves it, bundle by bundle: after what the archive holds was read back. It goes on
// where an earlier run was interrupted.
func (m Move) Run(ctx context.Context, a Archive, log Log) (done Moved, err error) {
	unlock, err := a.Lock(ctx)
	if err != nil {
		return done, err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	if done.Published, err = publish(ctx, a, log, m.Progress("published")); err != nil {
		return done, err
	}
	before, err := log.Archived(ctx)
	if err != nil {
		return done, err
	}
	defer func() {
		var after error
		done.Archived, after = log.Archived(context.WithoutCancel(ctx))
		done.Events, done.Entries = done.Moved-before.Moved, done.Removed-before.Removed
		err = errors.Join(err, after)
	}()
	// What an earlier run has announced comes first: the event must still be here.
	if err := m.finish(ctx, a, log, done.Published, false); err != nil {
		return done, err
	}
	announced, err := m.announce(ctx, a, log, done.Published)
	if err != nil || !announced {
		return done, err
	}
	if err := m.Signed(ctx, func(ctx context.Context) (bool, error) { return covered(ctx, log) }); err != nil {
		return done, err
	}
	if done.Published, err = publish(ctx, a, log, m.Progress("published")); err != nil {
		return done, err
	}
	return done, m.finish(ctx, a, log, done.Published, true)
}

// covered reports whether signed checkpoints cover the events that announce something.
func covered(ctx context.Context, log Log) (bool, error) {
	now, err := log.Archived(ctx)
	if err != nil {
		return false, err
	}
	for next, by := range map[string]string{now.NextMove: now.MovedBy, now.NextRemoval: now.RemovedBy} {
		if next == by {
			continue
		}
		if _, index, err := log.Vouched(ctx, next); err != nil || index < 0 {
			return false, err
		}
	}
	return true, nil
}

// announce records what is to be moved and removed, and reports whether there is anything.
func (m Move) announce(ctx context.Context, a Archive, log Log, head audit.Signed) (bool, error) {
	now, err := log.Archived(ctx)
	if err != nil {
		return false, err
	}
	var events []audit.Event
	removable, limit := now.Removed, time.Time{}
	if m.Keep > 0 {
		if limit, err = m.limit(ctx, log); err == nil {
			removable, err = m.removable(ctx, log, now, limit)
		}
		if err == nil && removable > now.Removed {
			err = m.plausible(ctx, log, head.Size, limit)
		}
		if err != nil {
			return false, err
		}
	}
	if removable > now.Removed {
		events = append(events, audit.EntriesRemoved(removable, limit))
	}
	movable, err := log.Movable(ctx, m.Before, head.Size)
	if err != nil {
		return false, err
	}
	if movable > now.Moved {
		events = append(events, audit.LogMoved(movable, now.Removed, a.String(), head.Checkpoint))
	}
	for _, e := range events {
		if err := log.Announce(ctx, e); err != nil {
			return false, err
		}
	}
	return len(events) > 0, nil
}

// limit is the time before which entries are removed: by the clock that is behind, since
// nothing brings them back.
func (m Move) limit(ctx context.Context, log Log) (time.Time, error) {
	ahead, err := log.ClockAhead(ctx)
	if err == nil && ahead.Abs() > clockDoubt {
		err = fmt.Errorf("the clocks of this machine and of the database differ by %s: no further entries are removed; have both follow NTP", ahead.Abs().Round(time.Millisecond))
	}
	return time.Now().Add(-max(ahead, 0) - m.Keep), err
}

// removable is how many first entries of the archive are older than a time. Only what is
// no longer in the database counts, and what the log compares with its hashes: whoever
// writes to the archive must not date events.
func (m Move) removable(ctx context.Context, log Log, now audit.Archived, limit time.Time) (int64, error) {
	tick := m.Progress("dated").Ticking()
	read := now.Removed
	return Older(now.Removed, now.Moved, limit, func(bundle int64, before time.Time) (bool, error) {
		n := bundle * width
		page, err := log.Entries(ctx, n, width)
		if err == nil && len(page) < width {
			err = verify.Problemf(n+int64(len(page)), "it is missing")
		}
		if err != nil {
			return false, err
		}
		for _, entry := range page {
			e, err := audit.Decode(entry.Leaf)
			if err != nil {
				return false, verify.Problemf(entry.Index, "its leaf is not an event")
			}
			if !e.Time.Before(before) {
				return false, nil
			}
		}
		read += width
		tick(min(read, now.Moved), now.Moved)
		return true, nil
	})
}

// plausible reports an error if even the newest of the first size events is older than a limit: by
// a clock that is ahead everything would be removed.
func (m Move) plausible(ctx context.Context, log Log, size int64, limit time.Time) error {
	page, err := log.Entries(ctx, size-1, 1)
	if err == nil && len(page) == 0 {
		err = verify.Problemf(size-1, "it is missing")
	}
	if err != nil {
		return err
	}
	e, err := audit.Decode(page[0].Leaf)
	if err != nil {
		return verify.Problemf(size-1, "its leaf is not an event")
	}
	if limit.After(e.Time.Add(clockDoubt)) {
		return fmt.Errorf("entries from before %s would be removed, and even the newest event that is signed, %d, is from %s: nothing more was moved or removed. If this machine's clock is ahead, set it; "+
			"if it is right, and nothing was recorded for so long, run the command once without ORGKEYS_AUDIT_RETENTION, or have something recorded, such as a list of keys, and signed",
			limit.UTC().Format(time.RFC3339), size-1, e.Time.UTC().Format(time.RFC3339))
	}
	return nil
}

// finish moves and removes what is announced. Unless it must be, what is not
// signed yet is left, and so is a removal that the archive does not explain by itself: one
// whose event is not published.
func (m Move) finish(ctx context.Context, a Archive, log Log, published audit.Signed, must bool) error {
	now, err := log.Archived(ctx)
	if err != nil {
		return err
	}
	if now.NextRemoval != "" {
		e, index, err := log.Vouched(ctx, now.NextRemoval)
		to := now.Removed
		switch {
		case err != nil:
			return err
		case index >= 0 && index < published.Size:
			to = max(to, e.Removed())
		case must && now.NextRemoval != now.RemovedBy:
			return ErrNotCovered
		}
		if err := m.remove(ctx, a, log, now.Removed, to); err != nil {
			return err
		}
	}
	if now.NextMove == "" {
		return nil
	}
	e, index, err := log.Vouched(ctx, now.NextMove)
	if err == nil && index < 0 && must {
		err = ErrNotCovered
	}
	if err != nil {
		return err
	}
	return m.move(ctx, a, log, now.Moved, e.Moved())
}

func (m Move) move(ctx context.Context, a Archive, log Log, from, to int64) error {
	if from >= to {
		return nil
	}
	held, err := readPublished(ctx, a)
	if err != nil {
		return err
	}
	if held.size < to {
		return fmt.Errorf("%s holds %d events, not the %d that are to be moved", a, held.size, to)
	}
	progress, first := m.Progress("moved"), from
	tick := progress.Ticking()
	for from < to {
		started := time.Now()
		next := min(from+chunk, to)
		for b := from / width; b < next/width; b++ {
			if err := keepBundle(ctx, a, log, b); err != nil {
				return err
			}
		}
		if err := a.Flush(ctx); err != nil {
			return err
		}
		deleting := time.Now()
		if err := log.MoveOut(ctx, from, next); err != nil {
			return err
		}
		from = next
		tick(from-first, to-first)
		// SQLite's one writer is the server's too: it gets its turn.
		if rest := 2*time.Since(deleting) - time.Since(started); rest > 0 {
			select {
			case <-time.After(rest):
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
	return nil
}

// keepBundle writes what is not published of a bundle, and reads back what is.
func keepBundle(ctx context.Context, a Archive, log Log, bundle int64) error {
	page, err := log.Entries(ctx, bundle*width, width)
	if err != nil {
		return err
	}
	if len(page) < width {
		return verify.Problemf(bundle*width+int64(len(page)), "it is missing")
	}
	leaves := make([][]byte, width)
	for i, e := range page {
		leaves[i] = e.Leaf
	}
	receipts, err := log.BundleReceipts(ctx, bundle)
	if err != nil {
		return err
	}
	for sink, of := range receipts {
		if err := a.Keep(ctx, sink, bundle, of); err != nil {
			return err
		}
	}
	return a.Holds(ctx, bundle, leaves, receipts)
}

// remove removes entries. It begins before those, since an earlier run may have been
// killed behind its note.
func (m Move) remove(ctx context.Context, a Archive, log Log, from, to int64) error {
	sinks, err := log.ReceiptSinksOf(ctx)
	if err != nil {
		return err
	}
	tick := m.Progress("removed").Ticking()
	first := max(0, from-chunk)
	for next := from; ; {
		for b := first / width; b < next/width; b++ {
			if err := a.Remove(ctx, b, sinks); err != nil {
				return err
			}
		}
		tick(next, to)
		if next == to {
			return nil
		}
		first, next = next, min(next+chunk, to)
		if err := log.NoteRemoved(ctx, first, next); err != nil {
			return err
		}
	}
}
