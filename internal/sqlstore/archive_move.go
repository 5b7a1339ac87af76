package sqlstore

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/tiles"
)

// datedPage is how many bundles are dated at once.
const datedPage = 16

// Movable implements tiles.Log.
func (d *DB) Movable(ctx context.Context, before time.Time, size int64) (int64, error) {
	a, err := d.Archived(ctx)
	if err != nil {
		return 0, err
	}
	old, err := d.older(ctx, a.Moved, size, before)
	if err != nil {
		return 0, err
	}
	// A shared sink's receipts come with what it acknowledges.
	limit, err := query(ctx, d.read, func(scan func(...any) error) (n sql.NullInt64, err error) { return n, scan(&n) },
		`SELECT min(next) FROM sink_progress UNION ALL
		SELECT min(e.idx) FROM deliveries v JOIN events e ON e.id = v.event_id WHERE `+needsEvent)
	if err != nil {
		return 0, err
	}
	for _, n := range limit {
		if n.Valid {
			size = min(size, n.Int64)
		}
	}
	return max(min(old, size-size%tiles.Width), a.Moved), nil
}

// older is tiles.Older for events in the database, from the first of a bundle on.
func (d *DB) older(ctx context.Context, from, size int64, before time.Time) (int64, error) {
	type dated struct{ bundle, newest int64 }
	page := map[int64]int64{}
	return tiles.Older(from, size, before, func(bundle int64, before time.Time) (bool, error) {
		if _, read := page[bundle]; !read {
			found, err := query(ctx, d.read, func(scan func(...any) error) (b dated, err error) { return b, scan(&b.bundle, &b.newest) },
				"SELECT idx / 256, max(occurred_at) FROM events WHERE idx >= $1 AND idx < $2 GROUP BY idx / 256", bundle*tiles.Width, (bundle+datedPage)*tiles.Width)
			if err != nil {
				return false, err
			}
			clear(page)
			for _, b := range found {
				page[b.bundle] = b.newest
			}
		}
		newest, there := page[bundle] // it may have been moved meanwhile
		return there && newest < before.UnixMicro(), nil
	})
}

// needsEvent is the condition on deliveries v whose key is released by what the sinks have of
// the event. The sweeper ends those that are late, so that none holds the log back for ever.
const needsEvent = "v.stage IN ('stored', 'sealed')"

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

// keptPersonal is the condition on events e whose personal part tells where a live key went,
// or where one is from that its holder made.
const keptPersonal = `(
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
	// Whoever asks again for a key that waits for its receipt gets the same event, and a node
	// for its own key always.
	if _, err := exec(ctx, tx, `UPDATE deliveries SET leaf = (SELECT e.leaf FROM events e WHERE e.id = deliveries.event_id)
		WHERE (origin = 'node' OR stage = 'available') AND (key_id, event_id) IN
		(SELECT e.object, e.id FROM events e WHERE e.idx >= $1 AND e.idx < $2 AND e.type IN ('orgkey.created', 'orgkey.sealed'))`, from, to); err != nil {
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

// NoteRemoved implements tiles.Log. What events knew of people goes with their entries.
func (d *DB) NoteRemoved(ctx context.Context, from, to int64) error {
	kept, err := d.keptAmong(ctx, from, to)
	if err != nil {
		return err
	}
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		if err := d.lock(ctx, tx, "archive"); err != nil {
			return err
		}
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
		if err := execAll(ctx, tx, "DELETE FROM event_persons WHERE actor <> '' AND event_id IN "+d.texts("$1"), kept); err != nil {
			return err
		}
		if _, err := exec(ctx, tx, "DELETE FROM archived_persons WHERE bundle < $1", to/tiles.Width); err != nil {
			return err
		}
		return one(exec(ctx, tx, "UPDATE log_archive SET removed = $2, removed_by = next_removal WHERE removed = $1", from, to))
	})
}

// keptAmong returns the IDs of archived events whose personal part is not with its bundle.
// What the archive lacks already tells of none.
func (d *DB) keptAmong(ctx context.Context, from, to int64) (ids []string, err error) {
	s := d.over(d.read)
	kept, err := s.DeliveredTo(ctx)
	if err != nil {
		return nil, err
	}
	for b := from / tiles.Width; b < to/tiles.Width && len(kept) > len(ids); b++ {
		leaves, err := s.bundleLeaves(ctx, b)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for i, leaf := range leaves {
			e, err := audit.Decode(leaf)
			if err != nil {
				return nil, fmt.Errorf("event %d: %w", b*tiles.Width+int64(i), err)
			}
			if _, its := kept[e.ID]; its {
				ids = append(ids, e.ID)
			}
		}
	}
	return ids, nil
}
