package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"iter"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/tiles"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
)

var (
	_ verify.Log      = (*DB)(nil)
	_ verify.Snapshot = snapshot{}
)

// snapshot reads the log at one moment, page by page: PostgreSQL sends one result at a
// time on a connection.
type snapshot struct {
	q       reader
	archive *tiles.Archive // nil: it is not known where what was moved is
}

const snapshotPage = 1000

// snapshotIdle is how long PostgreSQL waits for the next statement of a snapshot, whose reader
// computes meanwhile on a machine that may be busy. No write waits for a snapshot.
const snapshotIdle = time.Minute

// Snapshot implements verify.Log.
func (d *DB) Snapshot(ctx context.Context, do func(verify.Snapshot) error) error {
	options := &sql.TxOptions{ReadOnly: true}
	if d.postgres {
		options.Isolation = sql.LevelRepeatableRead
	}
	tx, err := d.read.BeginTx(ctx, options)
	if err != nil {
		return unavailable(err)
	}
	err = d.limitStatements(ctx, tx, 0)
	if err == nil && d.postgres {
		_, err = tx.ExecContext(ctx, fmt.Sprintf("SET LOCAL idle_in_transaction_session_timeout = %d", snapshotIdle.Milliseconds()))
	}
	if err == nil {
		err = do(d.over(tx))
	} else {
		err = unavailable(err)
	}
	return errors.Join(err, unavailable(ignoreDone(tx.Rollback())))
}

// Head implements audit.Store and verify.Snapshot.
func (s snapshot) Head(ctx context.Context) (audit.Checkpoint, error) { return readHead(ctx, s.q) }

// Rows implements verify.Snapshot.
func (s snapshot) Rows(ctx context.Context) iter.Seq2[verify.Row, error] {
	return paged(ctx, s.q, func(scan func(...any) error) (r verify.Row, err error) {
		var at int64
		err = scan(&r.Index, &r.ID, &at, &r.Type, &r.Reason, &r.Org, &r.Kind, &r.Actor, &r.Object, &r.Leaf, &r.Personal)
		r.Time = time.UnixMicro(at).UTC()
		return r, err
	}, func(r verify.Row) int64 { return r.Index },
		`SELECT e.idx, e.id, e.occurred_at, e.type, e.reason, e.org_id, e.actor_kind, e.actor, e.object, e.leaf, p.personal
		FROM events e LEFT JOIN event_persons p ON p.event_id = e.id WHERE e.idx > $1 ORDER BY e.idx LIMIT $2`)
}

// Hashes implements verify.Snapshot.
func (s snapshot) Hashes(ctx context.Context) iter.Seq2[verify.StoredHash, error] {
	return paged(ctx, s.q, scanHash, func(h verify.StoredHash) int64 { return h.Index }, "SELECT idx, hash FROM log_hashes WHERE idx > $1 ORDER BY idx LIMIT $2")
}

// Unsequenced implements verify.Snapshot.
func (s snapshot) Unsequenced(ctx context.Context) (n int64, err error) {
	err = s.q.QueryRowContext(ctx, "SELECT count(*) FROM events WHERE idx IS NULL AND refused = 0").Scan(&n)
	return n, unavailable(err)
}

// Unauthenticated implements verify.Snapshot.
func (s snapshot) Unauthenticated(ctx context.Context) (n int64, err error) {
	err = s.q.QueryRowContext(ctx, "SELECT count(*) FROM events WHERE refused = 1 OR idx IS NULL AND refused <> 0").Scan(&n)
	return n, unavailable(err)
}

// Erasing implements verify.Snapshot.
func (s snapshot) Erasing(ctx context.Context) ([]string, error) {
	return query(ctx, s.q, scanText, "SELECT object FROM events WHERE idx IS NULL AND refused = 0 AND type = $1", string(audit.PersonErased))
}

// ReceiptSinks implements verify.Snapshot.
func (s snapshot) ReceiptSinks(ctx context.Context) (sinks []string, err error) {
	err = each(ctx, s.q, func(scan func(...any) error) error {
		sink, err := scanText(scan)
		sinks = append(sinks, sink)
		return err
	}, "SELECT DISTINCT sink FROM event_receipts ORDER BY sink")
	return sinks, err
}

func scanText(scan func(...any) error) (text string, err error) {
	err = scan(&text)
	return text, err
}

// everyKey has organization keys and node keys.
const everyKey = "(SELECT id, org_id, state, created_at, deleted_at FROM org_keys UNION ALL SELECT id, org_id, state, created_at, deleted_at FROM keys_of_nodes) AS k"

// contradictions are the ways in which records and events can disagree: each statement
// returns key IDs. They rely on the events' columns, which
// verify.Verify has compared with the leaves by then. Events that are in the archive
// explain what those in the database do not: archived has their keys, and since is the
// column with the time before which nothing is known.
var contradictions = []struct {
	what, statement string
	since           string
	archived        func(verify.ArchivedKeys) map[string]string
}{
	{"key %s has a record, but no event says that it was created", `
		SELECT id, org_id FROM ` + everyKey + ` WHERE state <> ` + reserved + ` EXCEPT
		SELECT object, org_id FROM events WHERE ` + isRecorded + ` AND type = 'orgkey.created'`, "created_at", created},
	{"key %s was created according to its event, but has no record", `
		SELECT object, org_id FROM events WHERE ` + isRecorded + ` AND type = 'orgkey.created' EXCEPT
		SELECT id, org_id FROM ` + everyKey + ` WHERE state <> ` + reserved, "", nil},
	{"key %s is deleted, but no event says so", `
		SELECT id, org_id FROM ` + everyKey + ` WHERE state = ` + deleted + ` EXCEPT
		SELECT object, org_id FROM events WHERE ` + isRecorded + ` AND type IN ('orgkey.deleted', 'orgkey.withdrawn')`, "deleted_at", ended},
	{"key %s was deleted according to its event, but its record is not", `
		SELECT id, org_id FROM ` + everyKey + ` WHERE state <> ` + deleted + ` INTERSECT
		SELECT object, org_id FROM events WHERE ` + isRecorded + ` AND type IN ('orgkey.deleted', 'orgkey.withdrawn')`, "", nil},
}

func created(a verify.ArchivedKeys) map[string]string { return a.Created }
func ended(a verify.ArchivedKeys) map[string]string   { return a.Ended }

// knownSlack is by how much a record's time may differ from its event's.
const knownSlack = time.Hour

// Contradictions implements verify.Snapshot.
func (s snapshot) Contradictions(ctx context.Context, a verify.ArchivedKeys) ([]string, error) {
	const most = 10 // of each kind
	moved, err := s.Archived(ctx)
	if err != nil {
		return nil, err
	}
	var all []string
	for _, c := range contradictions {
		statement, args, n := c.statement, []any{}, 0
		if c.since != "" && moved.Moved > 0 && !a.Whole {
			statement = "SELECT d.id, d.org_id FROM (" + statement + ") AS d JOIN " + everyKey + " ON k.id = d.id AND k." + c.since + " >= $1"
			args = append(args, a.Known.Add(knownSlack).UnixMicro())
		}
		err := each(ctx, s.q, func(scan func(...any) error) error {
			var id, org string
			if err := scan(&id, &org); err != nil || n == most || c.archived != nil && c.archived(a)[id] == org && org != "" {
				return err
			}
			n++
			all = append(all, fmt.Sprintf(c.what, id))
			return nil
		}, statement+" ORDER BY 1", args...)
		if err != nil {
			return nil, err
		}
	}
	if len(a.Created) == 0 && len(a.Ended) == 0 {
		return all, nil
	}
	found, err := s.archivedContradictions(ctx, a)
	return append(all, found...), err
}

// archivedContradictions compares the archived events with the records.
func (s snapshot) archivedContradictions(ctx context.Context, a verify.ArchivedKeys) (all []string, err error) {
	missing := maps.Clone(a.Created)
	err = each(ctx, s.q, func(scan func(...any) error) error {
		var id, org, state string
		if err := scan(&id, &org, &state); err != nil {
			return err
		}
		if missing[id] == org {
			delete(missing, id)
		}
		if a.Ended[id] == org && org != "" && state != "deleted" {
			all = append(all, fmt.Sprintf(contradictions[3].what, id))
		}
		return nil
	}, "SELECT id, org_id, state FROM "+everyKey+" WHERE state <> "+reserved)
	for _, id := range slices.Sorted(maps.Keys(missing)) {
		all = append(all, fmt.Sprintf(contradictions[1].what, id))
	}
	return all, err
}

// paged yields one T for each row, by pages of a statement over $1, the number
// of the last row of the page before, and $2, a page's size.
func paged[T any](ctx context.Context, q querier, scan func(scan func(...any) error) (T, error), number func(T) int64, statement string) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for last := int64(math.MinInt64); ; {
			page, err := query(ctx, q, scan, statement, last, snapshotPage)
			if err != nil {
				var none T
				yield(none, err)
				return
			}
			for _, t := range page {
				if !yield(t, nil) {
					return
				}
				last = number(t)
			}
			if len(page) < snapshotPage {
				return
			}
		}
	}
}
