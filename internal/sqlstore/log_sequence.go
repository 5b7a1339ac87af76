package sqlstore

import (
	"context"
	"encoding/hex"
	"errors"

	"github.com/go-json-experiment/json"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

type unsequenced struct {
	seq       int64
	id        string
	leaf, mac []byte
}

// Sequence implements audit.Store. On PostgreSQL an advisory lock lets
// one process at a time do it; it belongs to the transaction, so when its holder dies
// another process takes over at once.
func (d *DB) Sequence(ctx context.Context, limit int, only audit.Condition) (int, error) {
	// Checked here, too, so that an idle process notices a failover.
	if err := d.heldBack(ctx, d.read, only); err != nil {
		return 0, err
	}
	waiting, err := query(ctx, d.read, scanInt, "SELECT count(*) FROM (SELECT 1 FROM events WHERE idx IS NULL AND refused = 0 LIMIT 1) AS waiting")
	if err != nil || waiting[0] == 0 {
		return 0, err
	}
	n, refused := 0, 0
	err = d.write(ctx, func(ctx context.Context, tx *txn) error {
		mine, err := d.tryLock(ctx, tx, "sequencer", holderIdle)
		if err != nil || !mine {
			return err
		}
		if err := d.mayGrow(ctx, tx, only); err != nil {
			return err
		}
		if err := d.noteChange(ctx, tx); err != nil {
			return err
		}
		n, refused, err = d.sequence(ctx, tx, limit)
		return err
	})
	if err != nil {
		return 0, err
	}
	if refused > 0 {
		return n, &audit.UnauthenticatedError{Count: refused}
	}
	return n, nil
}

// AtOnce implements audit.Store. PostgreSQL shares commits itself, but not among
// transactions that hold the sequencer's lock.
func (d *DB) AtOnce(limit int, only func(context.Context) (audit.Condition, error), grown func(size int64)) (end func()) {
	if d.postgres {
		return func() {}
	}
	d.writer.indices.Store(&indices{
		give:   func(ctx context.Context, tx *txn) error { return d.giveAtOnce(ctx, tx, limit, only) },
		first:  func(ctx context.Context, tx *txn) (int64, bool, error) { return d.firstIndex(ctx, tx, only) },
		settle: d.settle, grown: grown,
	})
	return func() { d.writer.indices.Store(nil) }
}

func (d *DB) giveAtOnce(ctx context.Context, tx *txn, limit int, only func(context.Context) (audit.Condition, error)) error {
	condition, err := only(ctx)
	if err != nil {
		return err
	}
	if err := d.mayGrow(ctx, tx, condition); err != nil {
		return err
	}
	_, refused, err := d.sequence(ctx, tx, limit)
	if err == nil && refused > 0 { // the sequencer reports it
		err = &audit.UnauthenticatedError{Count: refused}
	}
	return err
}

// growing gives events of a batch their indices as they are inserted, so that
// the sequencer need not read and change each of them.
type growing struct {
	begin  func(context.Context, *txn) (first int64, ok bool, err error) // nil once it was called
	first  int64
	leaves [][]byte
}

// next returns the index for an event that is about to be inserted, if there is one.
func (t *txn) next(ctx context.Context, r audit.Record) (index int64, ok bool, err error) {
	if g := t.growing; g != nil && g.begin != nil {
		if g.first, ok, err = g.begin(ctx, t); err != nil {
			return 0, false, err
		}
		if g.begin = nil; !ok {
			t.growing = nil
		}
	}
	if t.growing == nil {
		return 0, false, nil
	}
	index = t.growing.first + int64(len(t.growing.leaves))
	t.growing.leaves = append(t.growing.leaves, r.Leaf)
	t.placed = append(t.placed, placed{r.ID, index})
	return index, true, nil
}

// firstIndex returns the log's next index if the sequencer would give it to the next event that
// is recorded: there is none while others wait. It changes nothing. An error is the database's:
// why the log may not grow is for the sequencer to say.
func (d *DB) firstIndex(ctx context.Context, tx *txn, only func(context.Context) (audit.Condition, error)) (first int64, ok bool, err error) {
	condition, err := only(ctx)
	if err != nil {
		return 0, false, nil
	}
	if err := d.mayGrow(ctx, tx, condition); errors.Is(err, orgkey.ErrUnavailable) {
		return 0, false, err
	} else if err != nil {
		return 0, false, nil
	}
	waiting, err := query(ctx, tx, scanInt, "SELECT 1 FROM events WHERE idx IS NULL AND refused = 0 LIMIT 1")
	if err != nil || len(waiting) > 0 {
		return 0, false, err
	}
	head, err := readHead(ctx, tx)
	return head.Size, err == nil, err
}

// settle extends the tree by the events that got their indices as they were inserted. Further
// ones of the batch wait for the sequencer.
func (d *DB) settle(ctx context.Context, tx *txn) error {
	g := tx.growing
	tx.growing = nil
	if g == nil || len(g.leaves) == 0 {
		return nil
	}
	return d.extend(ctx, tx, g.first, g.leaves)
}

// extend appends leaves to the tree of the first events.
func (d *DB) extend(ctx context.Context, tx *txn, first int64, leaves [][]byte) error {
	hashes, root, err := audit.Grow(first, leaves, d.over(tx).hashReader(ctx))
	if err != nil {
		return err
	}
	if err := d.storeHashes(ctx, tx, hashes, tlog.StoredHashIndex(0, first)); err != nil {
		return err
	}
	return one(exec(ctx, tx, "UPDATE log_head SET size = $1, root = $2 WHERE size = $3", first+int64(len(leaves)), root[:], first))
}

// isRecorded is the condition on rows of events that they are events: they have their place in
// the log, or wait for it. Whatever else stands there was refused, or was never to be looked at.
const isRecorded = "(idx IS NOT NULL OR refused = 0)"

// notRefused is isRecorded for statements that read events by an index of other columns.
const notRefused = "seq NOT IN (SELECT seq FROM events WHERE idx IS NULL AND refused <> 0)"

func (d *DB) sequence(ctx context.Context, tx *txn, limit int) (given, refused int, err error) {
	waiting, err := query(ctx, tx, scanUnsequenced, "SELECT seq, id, leaf, mac FROM events WHERE idx IS NULL AND refused = 0 ORDER BY seq LIMIT $1", limit)
	if err != nil {
		return 0, 0, err
	}
	return d.place(ctx, tx, waiting)
}

func scanUnsequenced(scan func(...any) error) (u unsequenced, err error) {
	err = scan(&u.seq, &u.id, &u.leaf, &u.mac)
	return u, err
}

// place gives the next indices to the events that are waiting, and refuses those
// whose MAC is wrong.
func (d *DB) place(ctx context.Context, tx *txn, waiting []unsequenced) (given, refused int, err error) {
	if d.eventKey == nil {
		return 0, 0, errNoEventKey
	}
	if err := d.settle(ctx, tx); err != nil {
		return 0, 0, err
	}
	head, err := readHead(ctx, tx)
	if err != nil {
		return 0, 0, err
	}
	var leaves [][]byte
	var rows, foreign []int64
	for _, w := range waiting {
		if d.eventKey.Authentic(w.leaf, w.mac) {
			tx.placed = append(tx.placed, placed{w.id, head.Size + int64(len(rows))})
			leaves, rows = append(leaves, w.leaf), append(rows, w.seq)
			continue
		}
		foreign = append(foreign, w.seq)
	}
	if refused = len(foreign); refused > 0 {
		some, err := list(foreign)
		if err != nil {
			return 0, 0, err
		}
		if _, err := exec(ctx, tx, "UPDATE events SET refused = 1 WHERE seq IN "+d.integers("$1"), some); err != nil {
			return 0, 0, err
		}
	}
	if len(rows) == 0 {
		return 0, refused, nil
	}
	if err := d.giveIndices(ctx, tx, rows, head.Size); err != nil {
		return 0, 0, err
	}
	return len(rows), refused, d.extend(ctx, tx, head.Size, leaves)
}

// giveIndices gives the events in these rows consecutive indices from first
// on. Their MACs go, so that no event can be made to get an index again. A batch
// is one statement, not one an event.
func (d *DB) giveIndices(ctx context.Context, tx *txn, rows []int64, first int64) error {
	if d.postgres {
		_, err := exec(ctx, tx, `UPDATE events SET idx = $2 + row.n - 1, mac = ''
			FROM unnest($1::bigint[]) WITH ORDINALITY AS row (seq, n) WHERE events.seq = row.seq`, rows, first)
		return err
	}
	list, err := json.Marshal(rows)
	if err != nil {
		return err
	}
	_, err = exec(ctx, tx, "UPDATE events SET idx = $2 + row.key, mac = '' FROM json_each($1) AS row WHERE events.seq = row.value", string(list), first)
	return err
}

// storeHashes stores the tree's hashes numbered from first on, likewise.
func (d *DB) storeHashes(ctx context.Context, tx *txn, hashes []tlog.Hash, first int64) error {
	if d.postgres {
		plain := make([][]byte, len(hashes))
		for i := range hashes {
			plain[i] = hashes[i][:]
		}
		_, err := exec(ctx, tx, `INSERT INTO log_hashes (idx, hash)
			SELECT $2 + row.n - 1, row.hash FROM unnest($1::bytea[]) WITH ORDINALITY AS row (hash, n)`, plain, first)
		return err
	}
	plain := make([]string, len(hashes))
	for i := range hashes {
		plain[i] = hex.EncodeToString(hashes[i][:])
	}
	list, err := json.Marshal(plain)
	if err != nil {
		return err
	}
	_, err = exec(ctx, tx, "INSERT INTO log_hashes (idx, hash) SELECT $2 + key, unhex(value) FROM json_each($1)", string(list), first)
	return err
}
