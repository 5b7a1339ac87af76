package verify

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
)

// bundleWidth is how many events an entry bundle of the archive has, and bundleLevel the
// level of its root hash in the tree.
const (
	bundleWidth = 256
	bundleLevel = 8
)

// Bundle is a bundle of the archive. Leaves is nil where the entries were removed.
type Bundle struct {
	Leaves   [][]byte
	Hashes   []tlog.Hash
	Personal [][]byte            // an empty one: there is none
	Receipts map[string][][]byte // by sink; an empty one: there is none
}

// ArchivedKeys are the keys that archived events are about, with which records are compared.
type ArchivedKeys struct {
	Created map[string]string // by ID, the organization
	Ended   map[string]string
	Whole   bool      // every event was read
	Known   time.Time // otherwise, of the first event that was read; of what is older nothing is known
}

// claim is what an event says of events that may be moved, or removed.
type claim struct{ index, moved, removed int64 }

// walkArchive takes the events that are no longer in the database.
func (v *verification) walkArchive(ctx context.Context, s Snapshot, stored func() (StoredHash, error, bool)) error {
	a, err := s.Archived(ctx)
	if err != nil || a.Moved == 0 {
		return err
	}
	if a.Moved > v.Log.Size || a.Removed > a.Moved {
		return Problemf(-1, "according to the database %d events were moved to an archive, and the log holds %d", a.Moved, v.Log.Size)
	}
	v.Archived, v.Removed = a.Moved, a.Removed
	v.archived.Created, v.archived.Ended = map[string]string{}, map[string]string{}
	held, err := s.ArchiveCheckpoint(ctx)
	switch {
	case errors.As(err, new(*Problem)):
		return err
	case errors.Is(err, fs.ErrNotExist):
		return Problemf(0, "the archive, to which the first %d events were moved, does not hold them: %v", a.Moved, err)
	case err != nil:
		v.Unread = err
	case held.Origin != v.Log.Origin:
		return Problemf(-1, "the archive's checkpoint is of another log (%s, not %s)", held.Origin, v.Log.Origin)
	case held.Size < a.Moved:
		return Problemf(held.Size, "it was moved to the archive, whose checkpoint covers %d events", held.Size)
	}
	v.archived.Whole = v.Unread == nil && a.Removed == 0
	if v.delivered, err = s.DeliveredTo(ctx); err != nil {
		return err
	}
	for v.tree.size < a.Moved {
		bundle := v.tree.size / bundleWidth
		if v.Unread != nil {
			err = v.growBundle(stored)
		} else {
			err = v.readBundle(ctx, s, bundle, v.tree.size < a.Removed, stored)
		}
		if err != nil {
			return err
		}
		v.progress(v.tree.size, v.Log.Size)
	}
	return nil
}

// growBundle takes a bundle that is not read by its root hash in the database: the
// checkpoints decide whether that is right.
func (v *verification) growBundle(stored func() (StoredHash, error, bool)) error {
	root, err, ok := stored()
	if err != nil {
		return err
	}
	if want := tlog.StoredHashIndex(bundleLevel, v.tree.size/bundleWidth); !ok || root.Index != want {
		return Problemf(v.tree.size, "it was moved to an archive, and the tree's hash %d, which covers it, is missing", want)
	}
	if held, ok := v.copy.bundle(v.tree.size); ok && held != root.Hash {
		v.parted = &Problem{v.tree.size, fmt.Sprintf("it, or one of the %d that follow, differs from the sink's copy: the log was rewritten", bundleWidth-1)}
		v.copy.keep(v.tree.size)
	}
	for l, h := range v.tree.PushBundle(root.Hash) {
		if l == 0 {
			continue
		}
		if err := checkHash(h, v.tree.size-1, stored); err != nil {
			return err
		}
	}
	return v.checkCheckpoint()
}

func (v *verification) readBundle(ctx context.Context, s Snapshot, bundle int64, removed bool, stored func() (StoredHash, error, bool)) error {
	b, err := s.Bundle(ctx, bundle, removed)
	if errors.Is(err, fs.ErrNotExist) {
		return Problemf(v.tree.size, "it is missing in the archive: %v", err)
	}
	if err != nil {
		return err
	}
	for i, h := range b.Hashes {
		index := v.tree.size
		v.compare(index, h)
		if b.Leaves != nil {
			if err := v.readArchived(index, b, i); err != nil {
				return err
			}
		}
		if err := v.grow(h, bundleLevel, stored); err != nil {
			return err
		}
	}
	return nil
}

// readArchived checks the i-th event of a bundle.
func (v *verification) readArchived(index int64, b Bundle, i int) error {
	e, err := audit.Decode(b.Leaves[i])
	if err != nil {
		return &Problem{index, "its leaf is not an event"}
	}
	if v.archived.Known.IsZero() {
		v.archived.Known = e.Time
	}
	row := Row{Index: index}
	row.ID, row.Time, row.Actor, row.Leaf = e.ID, e.Time, e.Actor.ID, b.Leaves[i]
	if row.Personal = v.delivered[e.ID]; len(b.Personal[i]) > 0 {
		row.Personal = b.Personal[i]
	}
	switch e.Type {
	case audit.KeyCreated:
		v.archived.Created[e.Object] = string(e.Org)
	case audit.KeyDeleted, audit.KeyWithdrawn:
		v.archived.Ended[e.Object] = string(e.Org)
	}
	for sink, receipts := range b.Receipts {
		if len(receipts[i]) == 0 {
			continue
		}
		if err := v.receiptKeys[sink].Verify(row.Leaf, receipts[i]); err != nil {
			return &Problem{index, fmt.Sprintf("the receipt of sink %s: %v", sink, err)}
		}
		v.Receipts++
	}
	return v.checkEvent(row, e)
}

// checkClaims requires that the log itself says of what is gone that it may be. An event counts
// only if a signed checkpoint covers it: anybody who writes to the database could
// insert one.
func (v *verification) checkClaims() error {
	var moved, removed int64
	for _, c := range v.claims {
		if c.index < v.Signed {
			moved, removed = max(moved, c.moved), max(removed, c.removed)
		}
	}
	switch {
	case moved < v.Archived:
		return Problemf(moved, "it is missing, and no event that a signed checkpoint covers says that it was moved to an archive")
	case removed < v.Removed:
		return Problemf(removed, "it is missing in the archive, and no event that a signed checkpoint covers says that it was removed by the policy of retention")
	}
	return nil
}
