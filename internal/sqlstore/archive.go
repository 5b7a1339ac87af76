package sqlstore

import (
	"bytes"
	"compress/flate"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"time"

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

// Archived implements tiles.Log and verify.Snapshot.
func (s snapshot) Archived(ctx context.Context) (a audit.Archived, err error) {
	err = s.q.QueryRowContext(ctx, "SELECT moved, moved_by, next_move, removed, removed_by, next_removal FROM log_archive").
		Scan(&a.Moved, &a.MovedBy, &a.NextMove, &a.Removed, &a.RemovedBy, &a.NextRemoval)
	if err != nil {
		err = fmt.Errorf("asking what was moved out of the database: %w", unavailable(err))
	}
	return a, err
}

// ArchiveCheckpoint implements verify.Snapshot.
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

// Bundle implements verify.Snapshot.
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
	b.Personal, err = s.personal(ctx, bundle)
	return b, err
}

// archivedReceipts returns receipts for events that were moved.
func (s snapshot) archivedReceipts(ctx context.Context, sink string, from, to int64) ([]audit.Receipt, error) {
	a, err := s.Archived(ctx)
	if err != nil || from >= a.Moved {
		return nil, err
	}
	if s.archive == nil {
		return nil, fmt.Errorf("event %d: %w", from, ErrNoArchive)
	}
	var all []audit.Receipt
	for b := from / tiles.Width; b*tiles.Width < min(to, a.Moved); b++ {
		receipts, err := s.archive.Receipts(ctx, sink, b)
		if errors.Is(err, fs.ErrNotExist) { // it gave none then
			continue
		}
		if err != nil {
			return nil, err
		}
		for i, receipt := range receipts {
			if index := b*tiles.Width + int64(i); len(receipt) > 0 && index >= from && index < to {
				all = append(all, audit.Receipt{Index: index, Receipt: receipt})
			}
		}
	}
	return all, nil
}

// personal returns the personal parts of a bundle's events; an empty one: there is none.
func (s snapshot) personal(ctx context.Context, bundle int64) ([][]byte, error) {
	found, err := query(ctx, s.q, scanBytes, "SELECT content FROM archived_persons WHERE bundle = $1", bundle)
	if err != nil || len(found) == 0 {
		return make([][]byte, tiles.Width), err
	}
	_, personal, err := unpackPersons(found[0])
	return personal, err
}

func scanBytes(scan func(...any) error) (b []byte, err error) {
	err = scan(&b)
	return bytes.Clone(b), err
}

// DeliveredTo implements verify.Snapshot.
func (s snapshot) DeliveredTo(ctx context.Context) (map[string][]byte, error) {
	all := map[string][]byte{}
	err := each(ctx, s.q, func(scan func(...any) error) error {
		var id string
		var personal []byte
		err := scan(&id, &personal)
		all[id] = bytes.Clone(personal)
		return err
	}, "SELECT event_id, personal FROM event_persons WHERE actor <> ''")
	return all, err
}

// maxPersons bounds what a bundle's personal parts may take when they are unpacked.
const maxPersons = 2 * tiles.Width * (audit.MaxLeaf + 2)

// packPersons packs the actors and the personal parts of a bundle's events.
func packPersons(actors, personal [][]byte) ([]byte, error) {
	plain, err := tiles.Pack(append(append([][]byte(nil), actors...), personal...))
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, flate.BestCompression)
	if err != nil {
		return nil, err
	}
	_, err = w.Write(plain)
	err = errors.Join(err, w.Close())
	return b.Bytes(), err
}

func unpackPersons(content []byte) (actors, personal [][]byte, err error) {
	plain, err := io.ReadAll(io.LimitReader(flate.NewReader(bytes.NewReader(content)), maxPersons+1))
	if err != nil {
		return nil, nil, fmt.Errorf("the personal parts of archived events are damaged: %w", err)
	}
	all, err := tiles.Unpack(plain, 2*tiles.Width)
	if err != nil {
		return nil, nil, fmt.Errorf("the personal parts of archived events are damaged: %w", err)
	}
	return all[:tiles.Width], all[tiles.Width:], nil
}

// datedPage is how many events are dated at once.
const datedPage = 64 * tiles.Width

// Movable implements tiles.Log.
func (d *DB) Movable(ctx context.Context, before time.Time, size int64) (int64, error) {
	a, err := d.Archived(ctx)
	if err != nil {
		return 0, err
	}
	// A shared sink's receipts come with what it acknowledges; a delivery that is under way
	// answers its node with its event.
	limit, err := query(ctx, d.read, func(scan func(...any) error) (n sql.NullInt64, err error) { return n, scan(&n) },
		`SELECT min(next) FROM sink_progress UNION ALL
		SELECT min(e.idx) FROM deliveries v JOIN events e ON e.id = v.event_id WHERE v.stage NOT IN ('received', 'ended')`)
	if err != nil {
		return 0, err
	}
	for _, n := range limit {
		if n.Valid {
			size = min(size, n.Int64)
		}
	}
	size -= size % tiles.Width
	for n := a.Moved; n < size; n += datedPage {
		newest, err := query(ctx, d.read, func(scan func(...any) error) (at int64, err error) { return at, scan(&at) },
			"SELECT max(occurred_at) FROM events WHERE idx >= $1 AND idx < $2 GROUP BY idx / 256 ORDER BY idx / 256", n, min(size, n+datedPage))
		if err != nil {
			return 0, err
		}
		for i, at := range newest {
			if at >= before.UnixMicro() {
				return n + int64(i)*tiles.Width, nil
			}
		}
	}
	return max(size, a.Moved), nil
}

// Announce implements tiles.Log.
func (d *DB) Announce(ctx context.Context, e audit.Event) error {
	statement := "UPDATE log_archive SET next_move = $1"
	if e.Type == audit.LogPruned {
		statement = "UPDATE log_archive SET next_removal = $1"
	}
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		if err := d.record(ctx, tx, e); err != nil {
			return err
		}
		return one(exec(ctx, tx, statement, e.ID))
	})
}

// Vouched implements tiles.Log.
func (s snapshot) Vouched(ctx context.Context, eventID string) (audit.Event, int64, error) {
	type row struct {
		index sql.NullInt64
		leaf  []byte
	}
	found, err := query(ctx, s.q, func(scan func(...any) error) (r row, err error) {
		err = scan(&r.index, &r.leaf)
		r.leaf = bytes.Clone(r.leaf)
		return r, err
	}, "SELECT idx, leaf FROM events WHERE id = $1", eventID)
	if err != nil || len(found) == 0 || !found[0].index.Valid {
		return audit.Event{}, -1, err
	}
	signed, err := query(ctx, s.q, scanSigned, lastSigned)
	index := found[0].index.Int64
	if err != nil || len(signed) == 0 || index >= signed[0].Size {
		return audit.Event{}, -1, err
	}
	path, err := tlog.ProveRecord(signed[0].Size, index, s.hashReader(ctx))
	if err != nil {
		return audit.Event{}, -1, err
	}
	if tlog.CheckRecord(path, signed[0].Size, signed[0].Root, index, tlog.RecordHash(found[0].leaf)) != nil {
		return audit.Event{}, -1, nil
	}
	e, err := audit.Decode(found[0].leaf)
	if err != nil || e.ID != eventID {
		return audit.Event{}, -1, err
	}
	return e, index, nil
}

// CheckArchived reports an error unless the log itself says, up to its newest signed
// checkpoint, that what is no longer in the database was moved, and what is no longer in
// the archive removed.
func (d *DB) CheckArchived(ctx context.Context) error {
	a, err := d.Archived(ctx)
	if err != nil || a.Moved == 0 {
		return err
	}
	moved, _, err := d.Vouched(ctx, a.MovedBy)
	if err != nil {
		return err
	}
	removed, _, err := d.Vouched(ctx, a.RemovedBy)
	if err != nil {
		return err
	}
	if moved.Moved() < a.Moved || max(moved.Removed(), removed.Removed()) < a.Removed {
		return fmt.Errorf("the database says that the first %d events were moved to an archive, and the first %d removed from there, and no event that a signed checkpoint covers says so: they were deleted. Keep the database as evidence, and restore a backup", a.Moved, a.Removed)
	}
	return nil
}

// errMoved: another process has moved events meanwhile, or what it was told of is not signed.
var errMoved = errors.New("another process moves the log too, or no signed checkpoint covers the event that announces it")

// BundleReceipts implements tiles.Log.
func (d *DB) BundleReceipts(ctx context.Context, bundle int64) (map[string][][]byte, error) {
	sinks, err := d.receiptSinks(ctx)
	if err != nil {
		return nil, err
	}
	all := map[string][][]byte{}
	for _, sink := range sinks {
		found, err := d.Receipts(ctx, sink, bundle*tiles.Width, (bundle+1)*tiles.Width)
		if err != nil {
			return nil, err
		}
		if len(found) == 0 {
			continue
		}
		all[sink] = make([][]byte, tiles.Width)
		for _, r := range found {
			all[sink][r.Index%tiles.Width] = bytes.Clone(r.Receipt)
		}
	}
	return all, nil
}

// receiptSinks names the sinks that sign receipts. To look at the receipts would take
// longer, the more there are.
func (d *DB) receiptSinks(ctx context.Context) ([]string, error) {
	return query(ctx, d.read, scanText, "SELECT DISTINCT sink FROM receipt_keys ORDER BY sink")
}

// ReceiptSinksOf implements tiles.Log.
func (d *DB) ReceiptSinksOf(ctx context.Context) ([]string, error) { return d.receiptSinks(ctx) }

// keptPersonal is the condition on events e whose personal part tells where a live key went.
const keptPersonal = `e.type = 'orgkey.delivered' AND (
	EXISTS (SELECT 1 FROM org_keys k WHERE k.id = e.object AND k.delivery_event = e.id AND k.state <> 'deleted') OR
	EXISTS (SELECT 1 FROM keys_of_nodes k WHERE k.id = e.object AND k.delivery_event = e.id AND k.state <> 'deleted'))`

// MoveOut implements tiles.Log.
func (d *DB) MoveOut(ctx context.Context, from, to int64) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		if err := d.lock(ctx, tx, "archive"); err != nil {
			return err
		}
		s := d.over(tx)
		a, err := s.Archived(ctx)
		if err != nil {
			return err
		}
		vouched, _, err := s.Vouched(ctx, a.NextMove)
		if err != nil {
			return err
		}
		if a.Moved != from || to > vouched.Moved() || from%tiles.Width != 0 || to%tiles.Width != 0 {
			return errMoved
		}
		kept, err := d.packAway(ctx, tx, from, to)
		if err != nil {
			return err
		}
		if err := d.deleteMoved(ctx, tx, from, to, kept); err != nil {
			return err
		}
		return one(exec(ctx, tx, "UPDATE log_archive SET moved = $2, moved_by = next_move WHERE moved = $1", from, to))
	})
}

// packAway packs the personal parts of events, by bundle, and returns the IDs of the
// events whose part stays: whether a key lives may change meanwhile.
func (d *DB) packAway(ctx context.Context, tx *txn, from, to int64) (kept []string, err error) {
	type person struct {
		index           int64
		actor, personal []byte
	}
	all, err := query(ctx, tx, func(scan func(...any) error) (p person, err error) {
		var id, actor string
		var keep bool
		err = scan(&p.index, &id, &actor, &keep, &p.personal)
		p.actor, p.personal = []byte(actor), bytes.Clone(p.personal)
		if keep {
			p.personal, kept = nil, append(kept, id)
		}
		return p, err
	}, `SELECT e.idx, e.id, e.actor, `+keptPersonal+`, p.personal
		FROM events e LEFT JOIN event_persons p ON p.event_id = e.id WHERE e.idx >= $1 AND e.idx < $2 ORDER BY e.idx`, from, to)
	if err != nil {
		return nil, err
	}
	if int64(len(all)) != to-from {
		return nil, fmt.Errorf("the database has %d of the events %d to %d", len(all), from, to-1)
	}
	for ; len(all) > 0; all = all[tiles.Width:] {
		actors, personal, empty := make([][]byte, tiles.Width), make([][]byte, tiles.Width), true
		for i, p := range all[:tiles.Width] {
			if len(p.personal) > 0 {
				actors[i], personal[i], empty = p.actor, p.personal, false
			}
		}
		if empty {
			continue
		}
		packed, err := packPersons(actors, personal)
		if err != nil {
			return nil, err
		}
		if _, err := exec(ctx, tx, "INSERT INTO archived_persons (bundle, content) VALUES ($1, $2)", all[0].index/tiles.Width, packed); err != nil {
			return nil, err
		}
	}
	return kept, nil
}

// deleteMoved deletes events and what goes with them, but for the personal parts of kept.
func (d *DB) deleteMoved(ctx context.Context, tx *txn, from, to int64, kept []string) error {
	keep, err := list(kept)
	if err != nil {
		return err
	}
	if _, err := exec(ctx, tx, "UPDATE event_persons SET actor = (SELECT e.actor FROM events e WHERE e.id = event_persons.event_id) WHERE event_id IN "+d.texts("$1"), keep); err != nil {
		return err
	}
	if _, err := exec(ctx, tx, "DELETE FROM event_persons WHERE event_id IN (SELECT e.id FROM events e WHERE e.idx >= $1 AND e.idx < $2) AND event_id NOT IN "+d.texts("$3"), from, to, keep); err != nil {
		return err
	}
	// A node that asks again for what became of its own key gets the same event.
	if _, err := exec(ctx, tx, `UPDATE deliveries SET leaf = (SELECT e.leaf FROM events e WHERE e.id = deliveries.event_id) WHERE origin = 'node' AND (key_id, event_id) IN
		(SELECT e.object, e.id FROM events e WHERE e.idx >= $1 AND e.idx < $2 AND e.type = 'orgkey.created')`, from, to); err != nil {
		return err
	}
	sinks, err := query(ctx, tx, scanText, "SELECT DISTINCT sink FROM receipt_keys")
	if err != nil {
		return err
	}
	for _, sink := range sinks {
		if _, err := exec(ctx, tx, "DELETE FROM event_receipts WHERE sink = $3 AND idx >= $1 AND idx < $2", from, to, sink); err != nil {
			return err
		}
	}
	for b := from / tiles.Width; b < to/tiles.Width; b++ {
		if _, err := exec(ctx, tx, "DELETE FROM log_hashes WHERE idx >= $1 AND idx < $2", tlog.StoredHashIndex(0, b*tiles.Width), tlog.StoredHashIndex(bundleLevel, b)); err != nil {
			return err
		}
	}
	n, err := exec(ctx, tx, "DELETE FROM events WHERE idx >= $1 AND idx < $2", from, to)
	if err == nil && n != to-from {
		err = fmt.Errorf("%d events would be deleted, not %d", n, to-from)
	}
	return err
}

// NoteRemoved implements tiles.Log.
func (d *DB) NoteRemoved(ctx context.Context, from, to int64) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		a, err := d.over(tx).Archived(ctx)
		if err != nil {
			return err
		}
		vouched, _, err := d.over(tx).Vouched(ctx, a.NextRemoval)
		if err != nil {
			return err
		}
		if a.Removed != from || to > vouched.Removed() || to > a.Moved {
			return errMoved
		}
		return one(exec(ctx, tx, "UPDATE log_archive SET removed = $2, removed_by = next_removal WHERE removed = $1", from, to))
	})
}

// FindArchived implements archive.Source. It reads the archive from its beginning.
func (d *DB) FindArchived(ctx context.Context, eventID string) (int64, bool, error) {
	a, err := d.Archived(ctx)
	if err != nil {
		return 0, false, err
	}
	begins := fmt.Appendf(nil, `{"v":1,"id":%q,`, eventID) // the form of every leaf
	for index := a.Removed; index < a.Moved; index += tiles.Width {
		entries, err := d.over(d.read).archivedEntries(ctx, a, index, tiles.Width)
		if err != nil {
			return 0, false, err
		}
		for _, e := range entries {
			if bytes.HasPrefix(e.Leaf, begins) {
				return e.Index, true, nil
			}
		}
	}
	return 0, false, nil
}

// packs is which bundles of archived events have a person's parts: all of them from one on
// are to be looked at again.
type packs struct {
	bundles []int64
	from    int64
}

// archivedOf looks for a person, which takes long where much is archived, outside of any
// transaction.
func (d *DB) archivedOf(ctx context.Context, subject string) (p packs, err error) {
	a, err := d.Archived(ctx) // first: a pseudonym that does not exist yet is in no event before
	if err != nil {
		return p, err
	}
	p.from = a.Moved / tiles.Width
	pseudonym, err := pseudonymOf(ctx, d.read, subject)
	if err != nil {
		return p, err
	}
	err = eachArchived(ctx, d.read, func(bundle int64, content []byte) error {
		actors, _, err := unpackPersons(content)
		if bundle < p.from && slices.ContainsFunc(actors, func(actor []byte) bool {
			return len(actor) > 0 && (string(actor) == subject || string(actor) == pseudonym)
		}) {
			p.bundles = append(p.bundles, bundle)
		}
		return err
	})
	return p, err
}

// eraseArchived erases the personal parts of archived events whose actor is one of a
// person's IDs, and returns how many of each there were.
func (d *DB) eraseArchived(ctx context.Context, tx *txn, where packs, ids ...string) (map[string]int64, error) {
	erased := map[string]int64{}
	for _, id := range ids {
		if id == "" {
			continue
		}
		n, err := exec(ctx, tx, "DELETE FROM event_persons WHERE actor = $1", id)
		if err != nil {
			return nil, err
		}
		erased[id] = n
	}
	later, err := query(ctx, tx, func(scan func(...any) error) (b int64, err error) { return b, scan(&b) },
		"SELECT bundle FROM archived_persons WHERE bundle >= $1 ORDER BY bundle", where.from)
	if err != nil {
		return nil, err
	}
	for _, bundle := range slices.Concat(where.bundles, later) {
		content, err := query(ctx, tx, scanBytes, "SELECT content FROM archived_persons WHERE bundle = $1", bundle)
		if err != nil {
			return nil, err
		}
		if len(content) == 0 {
			return nil, fmt.Errorf("the personal parts of archived events from %d on are gone", bundle*tiles.Width)
		}
		actors, personal, err := unpackPersons(content[0])
		if err != nil {
			return nil, err
		}
		some := false
		for i, actor := range actors {
			if _, its := erased[string(actor)]; its {
				erased[string(actor)]++
				actors[i], personal[i], some = nil, nil, true
			}
		}
		if !some {
			continue
		}
		packed, err := packPersons(actors, personal)
		if err == nil {
			err = one(exec(ctx, tx, "UPDATE archived_persons SET content = $2 WHERE bundle = $1", bundle, packed))
		}
		if err != nil {
			return nil, err
		}
	}
	return erased, nil
}

// personsPage is how many bundles' personal parts are read at once.
const personsPage = 64

func eachArchived(ctx context.Context, q querier, do func(bundle int64, content []byte) error) error {
	type row struct {
		bundle  int64
		content []byte
	}
	for last := int64(-1); ; {
		page, err := query(ctx, q, func(scan func(...any) error) (r row, err error) {
			err = scan(&r.bundle, &r.content)
			r.content = bytes.Clone(r.content)
			return r, err
		}, "SELECT bundle, content FROM archived_persons WHERE bundle > $1 ORDER BY bundle LIMIT $2", last, personsPage)
		if err != nil || len(page) == 0 {
			return err
		}
		for _, r := range page {
			if err := do(r.bundle, r.content); err != nil {
				return err
			}
			last = r.bundle
		}
	}
}
