package tiles

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
)

// Transfer makes an archive hold what another, of which log reads what was moved, holds of
// that log: for one that was set back, which the other cannot follow. Each bundle is compared
// with its root hash in the database; the checkpoint comes last.
func Transfer(ctx context.Context, from, to Archive, log Log, progress func(doing string) verify.Progress) (signed audit.Signed, err error) {
	unlock, err := to.Lock(ctx)
	if err != nil {
		return audit.Signed{}, err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	if err := transferReceipts(ctx, from, to, log, progress("receipts copied").Ticking()); err != nil {
		return audit.Signed{}, err
	}
	return publish(ctx, to, moved{log, from}, progress("published"))
}

// moved is a log whose first events are read from an archive, which is named where it lacks some.
type moved struct {
	Source
	from Archive
}

func (m moved) lacks(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%s lacks what the log says is there: %w", m.from, err)
	}
	return err
}

func (m moved) Entries(ctx context.Context, index int64, limit int) ([]audit.Entry, error) {
	all, err := m.Source.Entries(ctx, index, limit)
	return all, m.lacks(err)
}

func (m moved) LeafHashes(ctx context.Context, index int64, limit int) ([]tlog.Hash, error) {
	all, err := m.Source.LeafHashes(ctx, index, limit)
	return all, m.lacks(err)
}

// ErrEntriesGone: an archive lacks entries that the log, which was set back since, does not know
// to be removed.
var ErrEntriesGone = errors.New("entries are not there that the log says are")

// Explain finds whether entries that an archive lacks were removed by the policy of retention after
// the log was set back to where it is: the archive must hold what the log has moved, and
// say in its own later part, up to a checkpoint signed by one of the keys, how many were removed. That
// is announced in the log too, and noted once it is signed. It returns how many entries are
// removed; without keys it returns ErrEntriesGone if any are missing.
func (m Move) Explain(ctx context.Context, from Archive, log Log, keys audit.Keys) (int64, error) {
	now, err := log.Archived(ctx)
	if err != nil || now.Removed == now.Moved {
		return now.Removed, err
	}
	path := bundlePath(now.Removed/width, width)
	if _, err := from.Read(ctx, path); !errors.Is(err, fs.ErrNotExist) {
		return now.Removed, err
	}
	if len(keys) == 0 {
		return now.Removed, fmt.Errorf("event %d: %s/%s: %w", now.Removed, from, path, ErrEntriesGone)
	}
	kept, err := log.At(ctx, now.Moved)
	if err != nil {
		return now.Removed, err
	}
	signed, removed, err := Check(ctx, from, keys, kept, m.Progress("verified"))
	if err != nil {
		return now.Removed, fmt.Errorf("verifying what is in %s: %w", from, err)
	}
	removed = min(removed, now.Moved)
	if err := log.Announce(ctx, audit.EntriesFoundRemoved(removed, from.String(), signed.Checkpoint)); err != nil {
		return now.Removed, err
	}
	if err := m.Signed(ctx, func(ctx context.Context) (bool, error) { return covered(ctx, log) }); err != nil {
		return now.Removed, err
	}
	return removed, log.NoteRemoved(ctx, now.Removed, removed)
}

func transferReceipts(ctx context.Context, from, to Archive, log Log, tick func(done, all int64)) error {
	now, err := log.Archived(ctx)
	if err != nil {
		return err
	}
	sinks, err := log.ReceiptSinksOf(ctx)
	if err != nil {
		return err
	}
	for n := now.Removed; n < now.Moved; n += width {
		for _, sink := range sinks {
			receipts, err := from.Receipts(ctx, sink, n/width)
			if errors.Is(err, fs.ErrNotExist) { // it gave none then
				continue
			}
			if err == nil {
				err = to.Keep(ctx, sink, n/width, receipts)
			}
			if err != nil {
				return err
			}
		}
		tick(n+width, now.Moved)
	}
	return to.Flush(ctx)
}
