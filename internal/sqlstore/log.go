package sqlstore

import (
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/rollback"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// Record implements audit.Store.
func (d *DB) Record(ctx context.Context, events ...audit.Event) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error { return d.record(ctx, tx, events...) })
}

// RecordOnce is Record of events that may be recorded already: the answer of a commit
// can be lost.
func (d *DB) RecordOnce(ctx context.Context, events ...audit.Event) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		ids := make([]string, len(events))
		for i, e := range events {
			ids[i] = e.ID
		}
		known, err := queryAll(ctx, tx, scanText, "SELECT id FROM events WHERE id IN "+d.texts("$1"), ids)
		if err != nil {
			return err
		}
		return d.record(ctx, tx, slices.DeleteFunc(slices.Clone(events), func(e audit.Event) bool { return slices.Contains(known, e.ID) })...)
	})
}

// Recorded implements audit.Store.
func (d *DB) Recorded() <-chan struct{} { return d.recorded }

// ErrGrown: the log has grown since the checkpoint was read.
var ErrGrown = errors.New("the log has grown in the meantime: stop every replica first")

// AcceptRollback implements rollback.Store.
func (d *DB) AcceptRollback(ctx context.Context, head audit.Checkpoint, e audit.Event, v rollback.Voids) (void int, err error) {
	err = d.writeWithin(ctx, rollbackTimeout, func(ctx context.Context, tx *txn) error {
		if err := d.lock(ctx, tx, "sequencer"); err != nil {
			return err
		}
		now, err := readHead(ctx, tx)
		if err != nil {
			return err
		}
		if now != head {
			return ErrGrown
		}
		if err := d.recordNext(ctx, tx, e); err != nil {
			return err
		}
		if _, err := exec(ctx, tx, "DELETE FROM sinks_ahead"); err != nil {
			return err
		}
		// What was taken from the pool since the backup is in it again.
		if _, err := exec(ctx, tx, "DELETE FROM pool_keys"); err != nil {
			return err
		}
		void, err = d.voidEnrollments(ctx, tx, v)
		return err
	})
	return void, err
}

// recordNext records an event and gives it the next index, before all
// waiting events. tx has the sequencer's lock.
func (d *DB) recordNext(ctx context.Context, tx *txn, e audit.Event) error {
	if err := d.record(ctx, tx, e); err != nil {
		return err
	}
	recorded, err := query(ctx, tx, scanUnsequenced, "SELECT seq, id, leaf, mac FROM events WHERE id = $1", e.ID)
	if err != nil {
		return err
	}
	given, _, err := d.place(ctx, tx, recorded)
	return one(int64(given), err)
}

// UseEventKey sets the key that authenticates the log's events. It must be called before
// events are recorded or sequenced, and no other call may be in progress.
func (d *DB) UseEventKey(k audit.EventKey) { d.eventKey = &k }

var errNoEventKey = errors.New("the key that authenticates events is not loaded")

// record inserts events in the transaction of the change they describe. Their
// time is the database's: a replica's clock that is wrong must not put what
// happened into another order, or at another hour.
func (d *DB) record(ctx context.Context, tx *txn, events ...audit.Event) error {
	if d.eventKey == nil {
		return errNoEventKey
	}
	if len(events) == 0 {
		return nil
	}
	now, err := d.now(ctx, tx)
	if err != nil {
		return err
	}
	encoded := make([]audit.Record, len(events))
	for i, e := range events {
		if d.postgres { // SQLite's clock is the one that the event has its time from
			e.Time = time.UnixMicro(now).UTC()
		}
		if encoded[i], err = e.Encode(); err != nil {
			return err
		}
	}
	for batch := range slices.Chunk(encoded, listSize) {
		if err := d.insertEvents(ctx, tx, batch); err != nil {
			return err
		}
	}
	tx.recorded = true
	return nil
}

const insertEvent = "INSERT INTO events (id, occurred_at, type, reason, org_id, actor_kind, actor, object, leaf, mac) "

// insertEvents inserts several in one statement in PostgreSQL, where each is a round trip.
func (d *DB) insertEvents(ctx context.Context, tx *txn, all []audit.Record) error {
	if d.postgres && len(all) > 1 {
		return d.insertTogether(ctx, tx, all)
	}
	for _, r := range all {
		if _, err := exec(ctx, tx, insertEvent+"VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
			r.ID, r.Time.UnixMicro(), string(r.Type), r.Reason, r.Org, string(r.Kind), r.Actor, r.Object, r.Leaf, d.eventKey.MAC(r.Leaf)); err != nil {
			return err
		}
		if r.Personal == nil {
			continue
		}
		if _, err := exec(ctx, tx, "INSERT INTO event_persons (event_id, personal) VALUES ($1, $2)", r.ID, r.Personal); err != nil {
			return err
		}
	}
	return nil
}

func (d *DB) insertTogether(ctx context.Context, tx *txn, all []audit.Record) error {
	var texts [7][]string
	var times []int64
	var leaves, macs, personal [][]byte
	var persons []string
	for _, r := range all {
		for i, text := range []string{r.ID, string(r.Type), r.Reason, string(r.Org), string(r.Kind), r.Actor, r.Object} {
			texts[i] = append(texts[i], text)
		}
		times, leaves, macs = append(times, r.Time.UnixMicro()), append(leaves, r.Leaf), append(macs, d.eventKey.MAC(r.Leaf))
		if r.Personal != nil {
			persons, personal = append(persons, r.ID), append(personal, r.Personal)
		}
	}
	if _, err := exec(ctx, tx, insertEvent+`SELECT id, at, type, reason, org, kind, actor, object, leaf, mac
		FROM unnest($1::text[], $2::bigint[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::bytea[], $10::bytea[])
		WITH ORDINALITY AS e (id, at, type, reason, org, kind, actor, object, leaf, mac, n) ORDER BY n`,
		texts[0], times, texts[1], texts[2], texts[3], texts[4], texts[5], texts[6], leaves, macs); err != nil || persons == nil {
		return err
	}
	_, err := exec(ctx, tx, "INSERT INTO event_persons (event_id, personal) SELECT * FROM unnest($1::text[], $2::bytea[])", persons, personal)
	return err
}

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
		give: func(ctx context.Context, tx *txn) error { return d.giveAtOnce(ctx, tx, limit, only) }, grown: grown,
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

// How long PostgreSQL leaves a lock to an idle holder, which may be stopped, and how
// often a holder that is busy elsewhere sends something.
const (
	holderIdle  = 2 * time.Second
	holderTouch = 500 * time.Millisecond
)

// tryLock is lock without waiting. The transaction does not outlive its
// holder's silence by more than idle.
func (d *DB) tryLock(ctx context.Context, tx *txn, name string, idle time.Duration) (bool, error) {
	if !d.postgres {
		return true, nil
	}
	var mine bool
	err := tx.QueryRowContext(ctx, `SELECT pg_try_advisory_xact_lock(hashtextextended($1, 0))
		FROM set_config('idle_in_transaction_session_timeout', $2, true)`, name, strconv.FormatInt(idle.Milliseconds(), 10)).Scan(&mine)
	return mine, unavailable(err)
}

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
	hashes, root, err := audit.Grow(head.Size, leaves, d.over(tx).hashReader(ctx))
	if err != nil {
		return 0, 0, err
	}
	if err := d.storeHashes(ctx, tx, hashes, tlog.StoredHashIndex(0, head.Size)); err != nil {
		return 0, 0, err
	}
	return len(rows), refused, one(exec(ctx, tx, "UPDATE log_head SET size = $1, root = $2 WHERE size = $3", head.Size+int64(len(rows)), root[:], head.Size))
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

type rowQuerier interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// hashReader reads the tree's stored hashes, all that are asked for at once:
// few, along the tree's edge or a proof's path. Those that were moved come from the archive.
func (s snapshot) hashReader(ctx context.Context) tlog.HashReader {
	return tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		if len(indexes) == 0 {
			return nil, nil
		}
		var c conditions
		places := make([]string, len(indexes))
		for i, x := range indexes {
			places[i] = c.arg(x)
		}
		read, err := query(ctx, s.q, scanHash, "SELECT idx, hash FROM log_hashes WHERE idx IN ("+strings.Join(places, ", ")+")", c.args...)
		if err != nil {
			return nil, fmt.Errorf("reading the tree's hashes: %w", err)
		}
		found := make(map[int64]tlog.Hash, len(read))
		for _, h := range read {
			found[h.Index] = h.Hash
		}
		out := make([]tlog.Hash, len(indexes))
		for i, x := range indexes {
			h, ok := found[x]
			if !ok {
				if h, err = s.archivedHash(ctx, x); err != nil {
					return nil, err
				}
			}
			out[i] = h
		}
		return out, nil
	})
}

func scanHash(scan func(...any) error) (h verify.StoredHash, err error) {
	var b []byte
	if err := scan(&h.Index, &b); err != nil {
		return h, err
	}
	if len(b) != tlog.HashSize {
		return h, fmt.Errorf("the tree's hash %d has %d bytes", h.Index, len(b))
	}
	h.Hash = tlog.Hash(b)
	return h, nil
}

func readHead(ctx context.Context, q rowQuerier) (audit.Checkpoint, error) {
	var c audit.Checkpoint
	var root []byte
	if err := q.QueryRowContext(ctx, "SELECT origin, size, root FROM log_head").Scan(&c.Origin, &c.Size, &root); err != nil {
		return c, fmt.Errorf("reading the log's head: %w", unavailable(err))
	}
	if len(root) != tlog.HashSize {
		return c, fmt.Errorf("the log's root has %d bytes", len(root))
	}
	c.Root = tlog.Hash(root)
	return c, nil
}

// At implements audit.Store.
func (d *DB) At(ctx context.Context, size int64) (audit.Checkpoint, error) {
	return d.over(d.read).at(ctx, size)
}

func (s snapshot) at(ctx context.Context, size int64) (audit.Checkpoint, error) {
	head, err := readHead(ctx, s.q)
	if err != nil {
		return head, err
	}
	return s.below(ctx, head, size)
}

// below returns the checkpoint that the log had at an earlier size than head's.
func (s snapshot) below(ctx context.Context, head audit.Checkpoint, size int64) (audit.Checkpoint, error) {
	if size == head.Size {
		return head, nil
	}
	if size > head.Size {
		return head, fmt.Errorf("the log holds %d events, not %d", head.Size, size)
	}
	root, err := tlog.TreeHash(size, s.hashReader(ctx))
	return audit.Checkpoint{Origin: head.Origin, Size: size, Root: root}, err
}

// Entries implements audit.Store.
func (d *DB) Entries(ctx context.Context, index int64, limit int) ([]audit.Entry, error) {
	return d.over(d.read).entries(ctx, index, limit)
}

func (s snapshot) entries(ctx context.Context, index int64, limit int) ([]audit.Entry, error) {
	entries, err := query(ctx, s.q, func(scan func(...any) error) (e audit.Entry, err error) {
		err = scan(&e.Index, &e.Leaf)
		return e, err
	}, "SELECT idx, leaf FROM events WHERE idx >= $1 ORDER BY idx LIMIT $2", index, limit)
	if err != nil {
		return nil, err
	}
	if len(entries) == 0 || entries[0].Index != index {
		a, err := s.Archived(ctx)
		if err != nil {
			return nil, err
		}
		if index < a.Moved {
			return s.archivedEntries(ctx, a, index, limit)
		}
	}
	for i, e := range entries {
		if e.Index != index+int64(i) {
			return nil, fmt.Errorf("event %d is missing from the log", index+int64(i))
		}
	}
	return entries, nil
}

// Index implements audit.Store. Only in PostgreSQL can a failover take an index
// back that was given.
func (d *DB) Index(ctx context.Context, eventID string) (int64, bool, error) {
	if !d.postgres {
		if index, known := d.writer.given.Get(eventID); known {
			return index, true, nil
		}
	}
	var idx sql.NullInt64
	err := d.read.QueryRowContext(ctx, "SELECT idx FROM events WHERE id = $1", eventID).Scan(&idx)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, false, fmt.Errorf("event %s was never recorded: %w", eventID, orgkey.ErrGone)
	}
	return idx.Int64, idx.Valid, unavailable(err)
}

// Exclusive implements audit.Store. On PostgreSQL the lock belongs to a
// transaction, so it goes with a process that dies, and with one that is
// stopped; then do's context ends when that process goes on.
func (d *DB) Exclusive(ctx context.Context, name string, do func(context.Context) error) (bool, error) {
	return d.exclusive(ctx, name, holderIdle, do)
}

func (d *DB) exclusive(ctx context.Context, name string, idle time.Duration, do func(context.Context) error) (bool, error) {
	if !d.postgres {
		return true, do(ctx)
	}
	begun, err := d.read.BeginTx(ctx, nil)
	if err != nil {
		return false, unavailable(err)
	}
	tx := &txn{Tx: begun}
	mine, err := d.tryLock(ctx, tx, name, idle)
	if err != nil || !mine {
		return false, errors.Join(err, ignoreDone(tx.Rollback()))
	}
	holding, stop := context.WithCancel(ctx)
	kept := make(chan error, 1)
	go func() {
		defer stop()
		kept <- keep(holding, tx)
	}()
	err = do(holding)
	stop()
	return true, errors.Join(err, <-kept, unavailable(ignoreDone(tx.Rollback())))
}

// keep sends something in tx at intervals, so that PostgreSQL does not end it, until ctx
// ends or PostgreSQL has ended it.
func keep(ctx context.Context, tx *txn) error {
	ticker := time.NewTicker(holderTouch)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
			if err := ignoreDone(touch(context.WithoutCancel(ctx), tx)); err != nil {
				return fmt.Errorf("keeping a lock: %w", err)
			}
		}
	}
}

func touch(ctx context.Context, tx *txn) error {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	_, err := exec(ctx, tx, "SELECT 1")
	return err
}

// SinkNext implements audit.Store.
func (d *DB) SinkNext(ctx context.Context, sink string) (next int64, err error) {
	err = d.read.QueryRowContext(ctx, "SELECT next FROM sink_progress WHERE sink = $1", sink).Scan(&next)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, nil
	}
	return next, unavailable(err)
}

// Acknowledge implements audit.Store.
func (d *DB) Acknowledge(ctx context.Context, sink string, next int64, receipts [][]byte) error {
	first := next - int64(len(receipts))
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		if err := d.storeReceipts(ctx, tx, sink, first, receipts); err != nil {
			return err
		}
		_, err := exec(ctx, tx, "INSERT INTO sink_progress (sink, next) VALUES ($1, $2) ON CONFLICT (sink) DO UPDATE SET next = $2", sink, next)
		return err
	})
}

// storeReceipts is one statement in PostgreSQL, likewise.
func (d *DB) storeReceipts(ctx context.Context, tx *txn, sink string, first int64, receipts [][]byte) error {
	const into, again = "INSERT INTO event_receipts (sink, idx, receipt) ", " ON CONFLICT (sink, idx) DO UPDATE SET receipt = excluded.receipt"
	if d.postgres {
		_, err := exec(ctx, tx, into+"SELECT $1, $2 + row.n - 1, row.receipt FROM unnest($3::bytea[]) WITH ORDINALITY AS row (receipt, n)"+again, sink, first, receipts)
		return err
	}
	for i, receipt := range receipts {
		if _, err := exec(ctx, tx, into+"VALUES ($1, $2, $3)"+again, sink, first+int64(i), receipt); err != nil {
			return err
		}
	}
	return nil
}
