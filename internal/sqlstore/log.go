package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"slices"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/rollback"
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
func (d *DB) AcceptRollback(ctx context.Context, head audit.Checkpoint, e audit.Event, ends []audit.AheadSink, v rollback.Voids) (int, error) {
	return outcomeWithin(ctx, d, rollbackTimeout, func(ctx context.Context, tx *txn) (int, error) {
		if err := d.limitStatements(ctx, tx.Tx, rollbackTimeout); err != nil {
			return 0, err
		}
		if err := d.lock(ctx, tx, "sequencer"); err != nil {
			return 0, err
		}
		now, err := readHead(ctx, tx)
		if err != nil {
			return 0, err
		}
		if now != head {
			return 0, ErrGrown
		}
		if err := d.recordNext(ctx, tx, e); err != nil {
			return 0, err
		}
		for _, s := range ends {
			if err := forgetAhead(ctx, tx, s); err != nil {
				return 0, err
			}
		}
		// What was taken from the pool since the backup is in it again.
		if _, err := exec(ctx, tx, "DELETE FROM pool_keys"); err != nil {
			return 0, err
		}
		return d.voidEnrollments(ctx, tx, v)
	})
}

// recordNext records an event and gives it the next index, before all
// waiting events. tx has the sequencer's lock.
func (d *DB) recordNext(ctx context.Context, tx *txn, e audit.Event) error {
	if err := d.settle(ctx, tx); err != nil {
		return err
	}
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

// insertEvents inserts several in one statement in PostgreSQL, where each is a round trip.
func (d *DB) insertEvents(ctx context.Context, tx *txn, all []audit.Record) error {
	if d.postgres && len(all) > 1 {
		return d.insertTogether(ctx, tx, all)
	}
	for _, r := range all {
		var mac any = "" // what has an index bears none
		var place any
		index, given, err := tx.next(ctx, r)
		if err != nil {
			return err
		}
		if given {
			place = index
		} else {
			mac = d.eventKey.MAC(r.Leaf)
		}
		if _, err := exec(ctx, tx, `INSERT INTO events (id, occurred_at, type, reason, org_id, actor_kind, actor, object, leaf, mac, idx)
			VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)`,
			r.ID, r.Time.UnixMicro(), string(r.Type), r.Reason, r.Org, string(r.Kind), r.Actor, r.Object, r.Leaf, mac, place); err != nil {
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
	if _, err := exec(ctx, tx, `INSERT INTO events (id, occurred_at, type, reason, org_id, actor_kind, actor, object, leaf, mac)
		SELECT id, at, type, reason, org, kind, actor, object, leaf, mac
		FROM unnest($1::text[], $2::bigint[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::bytea[], $10::bytea[])
		WITH ORDINALITY AS e (id, at, type, reason, org, kind, actor, object, leaf, mac, n) ORDER BY n`,
		texts[0], times, texts[1], texts[2], texts[3], texts[4], texts[5], texts[6], leaves, macs); err != nil || persons == nil {
		return err
	}
	_, err := exec(ctx, tx, "INSERT INTO event_persons (event_id, personal) SELECT * FROM unnest($1::text[], $2::bytea[])", persons, personal)
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
