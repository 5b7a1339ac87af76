package sqlstore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/tiles"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
)

// The first events of the log may be in an archive. Of them the database keeps the root
// hash of each bundle of 256, and all hashes above, so that it proves and signs as before,
// and nothing that comes out of the archive has to be believed.

var _ tiles.Log = (*DB)(nil)

// bundleLevel is the level of a bundle's root hash in the tree.
const bundleLevel = 8

// UseArchive sets where events are read that are no longer here. No other call may be in
// progress.
func (d *DB) UseArchive(a tiles.Archive) { d.snapshot.archive = &a }

// ErrNoArchive: events were moved out of the database, and it is not known where to.
var ErrNoArchive = errors.New("it is in an archive: set ORGKEYS_AUDIT_ARCHIVE, as it was set for \"orgkeys audit archive\"")

// ErrRemoved: the entry was removed from the archive.
var ErrRemoved = errors.New("its entry was removed by the policy of retention")

// over is the log as q reads it.
func (d *DB) over(q reader) snapshot { return snapshot{q, d.snapshot.archive} }

// Archived implements tiles.Log, verify.Past and verify.Snapshot.
func (s snapshot) Archived(ctx context.Context) (a audit.Archived, err error) {
	err = s.q.QueryRowContext(ctx, "SELECT moved, moved_by, next_move, removed, removed_by, next_removal FROM log_archive").
		Scan(&a.Moved, &a.MovedBy, &a.NextMove, &a.Removed, &a.RemovedBy, &a.NextRemoval)
	if err != nil {
		err = fmt.Errorf("asking what was moved out of the database: %w", unavailable(err))
	}
	return a, err
}

// ArchiveCheckpoint implements verify.Past.
func (s snapshot) ArchiveCheckpoint(ctx context.Context) (audit.Checkpoint, error) {
	if s.archive == nil {
		return audit.Checkpoint{}, ErrNoArchive
	}
	return s.archive.Checkpoint(ctx)
}

// storedRoot is the root hash of a bundle, as the database has it.
func (s snapshot) storedRoot(ctx context.Context, bundle int64) (tlog.Hash, error) {
	at := tlog.StoredHashIndex(bundleLevel, bundle)
	found, err := query(ctx, s.q, scanHash, "SELECT idx, hash FROM log_hashes WHERE idx = $1", at)
	if err == nil && len(found) == 0 {
		err = fmt.Errorf("the tree's hash %d is missing", at)
	}
	if err != nil {
		return tlog.Hash{}, err
	}
	return found[0].Hash, nil
}

func altered(bundle int64) error {
	return verify.Problemf(bundle*tiles.Width, "it, or one of the %d that follow, is not in the archive as it was in the log", tiles.Width-1)
}

// bundleHashes returns the leaf hashes of a bundle that was moved.
func (s snapshot) bundleHashes(ctx context.Context, bundle int64) ([]tlog.Hash, error) {
	if s.archive == nil {
		return nil, fmt.Errorf("event %d: %w", bundle*tiles.Width, ErrNoArchive)
	}
	hashes, err := s.archive.Hashes(ctx, bundle)
	if err != nil {
		return nil, fmt.Errorf("reading the archive: %w", err)
	}
	return hashes, s.checkBundle(ctx, bundle, hashes)
}

func (s snapshot) checkBundle(ctx context.Context, bundle int64, hashes []tlog.Hash) error {
	want, err := s.storedRoot(ctx, bundle)
	if err == nil && tiles.Root(hashes) != want {
		err = altered(bundle)
	}
	return err
}

// bundleLeaves returns the events of a bundle that was moved.
func (s snapshot) bundleLeaves(ctx context.Context, bundle int64) ([][]byte, error) {
	if s.archive == nil {
		return nil, fmt.Errorf("event %d: %w", bundle*tiles.Width, ErrNoArchive)
	}
	leaves, err := s.archive.Leaves(ctx, bundle)
	if err != nil {
		return nil, fmt.Errorf("reading the archive: %w", err)
	}
	hashes := make([]tlog.Hash, len(leaves))
	for i, leaf := range leaves {
		hashes[i] = tlog.RecordHash(leaf)
	}
	return leaves, s.checkBundle(ctx, bundle, hashes)
}

// archivedEntries returns entries from an index that was moved, to the end of a bundle at most.
func (s snapshot) archivedEntries(ctx context.Context, a audit.Archived, index int64, limit int) ([]audit.Entry, error) {
	if index < a.Removed {
		return nil, fmt.Errorf("event %d: %w", index, ErrRemoved)
	}
	leaves, err := s.bundleLeaves(ctx, index/tiles.Width)
	if err != nil {
		return nil, err
	}
	leaves = leaves[index%tiles.Width:]
	entries := make([]audit.Entry, min(limit, len(leaves)))
	for i := range entries {
		entries[i] = audit.Entry{Index: index + int64(i), Leaf: leaves[i]}
	}
	return entries, nil
}

// LeafHashes implements rollback.Store.
func (d *DB) LeafHashes(ctx context.Context, index int64, limit int) ([]tlog.Hash, error) {
	a, err := d.Archived(ctx)
	if err != nil {
		return nil, err
	}
	if index < a.Moved {
		hashes, err := d.over(d.read).bundleHashes(ctx, index/tiles.Width)
		if err != nil {
			return nil, err
		}
		return hashes[index%tiles.Width:], nil
	}
	entries, err := d.Entries(ctx, index, limit)
	hashes := make([]tlog.Hash, len(entries))
	for i, e := range entries {
		hashes[i] = tlog.RecordHash(e.Leaf)
	}
	return hashes, err
}

// archivedHash returns a hash of the tree that was moved.
func (s snapshot) archivedHash(ctx context.Context, at int64) (tlog.Hash, error) {
	level, n := tlog.SplitStoredHashIndex(at)
	first := n << level
	a, err := s.Archived(ctx)
	if err != nil {
		return tlog.Hash{}, err
	}
	if level >= bundleLevel || first >= a.Moved {
		return tlog.Hash{}, fmt.Errorf("the tree's hash %d is missing", at)
	}
	hashes, err := s.bundleHashes(ctx, first/tiles.Width)
	if err != nil {
		return tlog.Hash{}, err
	}
	within := first % tiles.Width
	return tiles.Root(hashes[within : within+1<<level]), nil
}

// Bundle implements verify.Past.
func (s snapshot) Bundle(ctx context.Context, bundle int64, removed bool) (b verify.Bundle, err error) {
	if removed {
		b.Hashes, err = s.bundleHashes(ctx, bundle)
		return b, err
	}
	if b.Leaves, err = s.bundleLeaves(ctx, bundle); err != nil {
		return b, err
	}
	for _, leaf := range b.Leaves {
		b.Hashes = append(b.Hashes, tlog.RecordHash(leaf))
	}
	keys, err := s.ReceiptKeys(ctx)
	if err != nil {
		return b, err
	}
	b.Receipts = map[string][][]byte{}
	for _, k := range keys {
		if b.Receipts[k.Sink] != nil {
			continue
		}
		receipts, err := s.archive.Receipts(ctx, k.Sink, bundle)
		switch {
		case errors.Is(err, fs.ErrNotExist): // it gave none then
		case err != nil:
			return b, err
		default:
			b.Receipts[k.Sink] = receipts
		}
	}
	if b.Personal, err = s.personal(ctx, bundle); err != nil {
		return b, err
	}
	a, err := s.Archived(ctx)
	if err == nil && bundle*tiles.Width < a.Removed { // meanwhile, with the personal parts
		err = fmt.Errorf("event %d: %w", bundle*tiles.Width, fs.ErrNotExist)
	}
	return b, err
}

// archivedReceipts returns receipts for events that were moved, and how many were.
func (s snapshot) archivedReceipts(ctx context.Context, sink string, from, to int64) (all []audit.Receipt, moved int64, err error) {
	a, err := s.Archived(ctx)
	if err != nil || from >= a.Moved {
		return nil, a.Moved, err
	}
	if s.archive == nil {
		return nil, 0, fmt.Errorf("event %d: %w", from, ErrNoArchive)
	}
	for b := from / tiles.Width; b*tiles.Width < min(to, a.Moved); b++ {
		receipts, err := s.archive.Receipts(ctx, sink, b)
		if errors.Is(err, fs.ErrNotExist) { // it gave none then
			continue
		}
		if err != nil {
			return nil, 0, err
		}
		for i, receipt := range receipts {
			if index := b*tiles.Width + int64(i); len(receipt) > 0 && index >= from && index < to {
				all = append(all, audit.Receipt{Index: index, Receipt: receipt})
			}
		}
	}
	return all, a.Moved, nil
}
