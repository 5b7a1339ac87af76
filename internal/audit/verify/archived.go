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

// Past is the archive of a log, and what the database says of it. It is read outside of
// any snapshot: an archive may be slow, and a snapshot that lasts keeps what is deleted.
type Past interface {
	Head(ctx context.Context) (audit.Checkpoint, error)
	Archived(ctx context.Context) (audit.Archived, error)
	ReceiptSinks(ctx context.Context) ([]string, error)
	ReceiptKeys(ctx context.Context) ([]audit.ReceiptKey, error)
	// ArchiveCheckpoint returns up to where the archive says that it holds the log. An error that
	// is no *Problem: it cannot be read; fs.ErrNotExist: it holds nothing.
	ArchiveCheckpoint(ctx context.Context) (audit.Checkpoint, error)
	// Bundle reads a bundle of the archive, and compares it with its root hash in the
	// database; of one that was removed there are only the hashes.
	Bundle(ctx context.Context, bundle int64, removed bool) (Bundle, error)
	// DeliveredTo returns personal parts of archived events that are not with their
	// bundle, by the event's ID.
	DeliveredTo(ctx context.Context) (map[string][]byte, error)
}

// errMovedOn: more was moved to the archive than was read of it.
var errMovedOn = errors.New("more was moved to the archive meanwhile")

// hashBehind is a hash of the tree, which the event at index completed.
type hashBehind struct {
	hash  tlog.Hash
	index int64
}

// readArchive reads the events that are no longer in the database. It goes on where it ended
// before.
func (v *verification) readArchive(ctx context.Context, log Past) error {
	a, err := log.Archived(ctx)
	if err != nil || a.Moved <= v.tree.size {
		return err
	}
	if v.tree.size == 0 {
		v.archived = ArchivedKeys{Created: map[string]string{}, Ended: map[string]string{}, Whole: true}
		if err := v.checkCheckpoint(); err != nil {
			return err
		}
	}
	held, err := log.ArchiveCheckpoint(ctx)
	switch {
	case errors.As(err, new(*Problem)):
		return err
	case errors.Is(err, fs.ErrNotExist):
		return Problemf(0, "the archive, to which the first %d events were moved, does not hold them: %v", a.Moved, err)
	case err != nil:
		v.Unread, v.archived.Whole = err, false
		return nil
	case held.Origin != v.Log.Origin:
		return Problemf(-1, "the archive's checkpoint is of another log (%s, not %s)", held.Origin, v.Log.Origin)
	case held.Size < a.Moved:
		return Problemf(held.Size, "it was moved to the archive, whose checkpoint covers %d events", held.Size)
	}
	if v.delivered, err = log.DeliveredTo(ctx); err != nil {
		return err
	}
	if err := v.openReceipts(ctx, log); err != nil {
		return err
	}
	for v.tree.size < a.Moved {
		if a.Removed, err = v.readBundle(ctx, log, a.Removed); err != nil {
			return err
		}
		v.progress(v.tree.size, max(v.Log.Size, a.Moved))
	}
	return nil
}

// open begins with a log at rest: errMovedOn, before anything is done, unless what
// the archive has of it was read.
func (v *verification) open(ctx context.Context, s Snapshot) error {
	a, err := s.Archived(ctx)
	if err != nil {
		return err
	}
	head, err := s.Head(ctx)
	switch {
	case err != nil:
		return err
	case a.Moved > head.Size || a.Removed > a.Moved:
		return Problemf(-1, "according to the database %d events were moved to an archive, and the log holds %d", a.Moved, head.Size)
	case a.Moved > v.tree.size && v.Unread == nil:
		return errMovedOn
	case a.Moved < v.tree.size, head.Origin != v.Log.Origin:
		return errors.New("the log was set back while it was verified: verify it again")
	}
	v.Log, v.Archived, v.Removed = head, a.Moved, a.Removed
	return v.copy.addNewer(ctx, s, v.tree.size)
}

// compareArchived compares the stored hashes over what is in the archive with those that
// were computed or, where the archive was not read, the checkpoints with the stored ones.
func (v *verification) compareArchived(stored func() (StoredHash, error, bool)) error {
	for _, h := range v.pending {
		if err := checkHash(h.hash, h.index, stored); err != nil {
			return err
		}
	}
	for v.tree.size < v.Archived {
		if err := v.growBundle(stored); err != nil {
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

// readBundle takes the next bundle, of which below removed only hashes are left. It returns
// how many are removed: that may become more meanwhile.
func (v *verification) readBundle(ctx context.Context, log Past, removed int64) (int64, error) {
	bundle := v.tree.size / bundleWidth
	b, err := log.Bundle(ctx, bundle, v.tree.size < removed)
	if errors.Is(err, fs.ErrNotExist) && v.tree.size >= removed {
		now, asking := log.Archived(ctx)
		if asking != nil {
			return removed, asking
		}
		if removed = now.Removed; v.tree.size < removed {
			b, err = log.Bundle(ctx, bundle, true)
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return removed, Problemf(v.tree.size, "it is missing in the archive: %v", err)
	}
	if err != nil {
		return removed, err
	}
	for i, h := range b.Hashes {
		index := v.tree.size
		v.compare(index, h)
		if b.Leaves != nil {
			if err := v.readArchived(index, b, i); err != nil {
				return removed, err
			}
		}
		for l, h := range v.tree.Push(h) {
			if l >= bundleLevel {
				v.pending = append(v.pending, hashBehind{h, index})
			}
		}
		if err := v.checkCheckpoint(); err != nil {
			return removed, err
		}
	}
	if b.Leaves == nil {
		v.hashed, v.archived.Whole = v.tree.size, false
	}
	return removed, nil
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
