package sqlstore

import (
	"context"
	"database/sql"
	"fmt"
	"iter"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
)

var _ audit.Archive = (*DB)(nil)

// Rows implements audit.Archive.
func (d *DB) Rows(ctx context.Context) iter.Seq2[audit.Row, error] {
	return stream(ctx, d.read, func(scan func(...any) error) (r audit.Row, err error) {
		var at int64
		err = scan(&r.Index, &r.ID, &at, &r.Type, &r.Reason, &r.Org, &r.Kind, &r.Actor, &r.Object, &r.Leaf, &r.Personal)
		r.Time = time.UnixMicro(at).UTC()
		return r, err
	}, `SELECT e.idx, e.id, e.occurred_at, e.type, e.reason, e.org_id, e.actor_kind, e.actor, e.object, e.leaf, p.personal
		FROM events e LEFT JOIN event_persons p ON p.event_id = e.id WHERE e.idx IS NOT NULL ORDER BY e.idx`)
}

// Hashes implements audit.Archive.
func (d *DB) Hashes(ctx context.Context) iter.Seq2[audit.StoredHash, error] {
	return stream(ctx, d.read, func(scan func(...any) error) (h audit.StoredHash, err error) {
		var b []byte
		if err := scan(&h.Index, &b); err != nil {
			return h, err
		}
		if len(b) != tlog.HashSize {
			return h, fmt.Errorf("the tree's hash %d has %d bytes", h.Index, len(b))
		}
		h.Hash = tlog.Hash(b)
		return h, nil
	}, "SELECT idx, hash FROM log_hashes ORDER BY idx")
}

// Unsequenced implements audit.Archive.
func (d *DB) Unsequenced(ctx context.Context) (n int64, err error) {
	err = d.read.QueryRowContext(ctx, "SELECT count(*) FROM events WHERE idx IS NULL").Scan(&n)
	return n, unavailable(err)
}

// contradictions are the ways in which records and events can fail to fit: each
// statement returns key IDs. They rely on the events' columns, which
// audit.Verify has compared with the leaves by then.
var contradictions = []struct{ what, statement string }{
	{"key %s has a record, and no event says that it was created", `
		SELECT id, org_id FROM org_keys WHERE state <> 'reserved' EXCEPT
		SELECT object, org_id FROM events WHERE type = 'orgkey.created'`},
	{"key %s was created according to its event, and has no record", `
		SELECT object, org_id FROM events WHERE type = 'orgkey.created' EXCEPT
		SELECT id, org_id FROM org_keys WHERE state <> 'reserved'`},
	{"key %s is deleted, and no event says so", `
		SELECT id, org_id FROM org_keys WHERE state = 'deleted' EXCEPT
		SELECT object, org_id FROM events WHERE type IN ('orgkey.deleted', 'orgkey.withdrawn')`},
	{"key %s was deleted according to its event, and its record is not", `
		SELECT id, org_id FROM org_keys WHERE state <> 'deleted' INTERSECT
		SELECT object, org_id FROM events WHERE type IN ('orgkey.deleted', 'orgkey.withdrawn')`},
}

// Contradictions implements audit.Archive.
func (d *DB) Contradictions(ctx context.Context) ([]string, error) {
	var all []string
	for _, c := range contradictions {
		ids, err := query(ctx, d.read, func(scan func(...any) error) (id string, err error) {
			var org string
			err = scan(&id, &org)
			return id, err
		}, c.statement+" ORDER BY 1 LIMIT 10")
		if err != nil {
			return nil, err
		}
		for _, id := range ids {
			all = append(all, fmt.Sprintf(c.what, id))
		}
	}
	return all, nil
}

// stream yields one T for each row.
func stream[T any](ctx context.Context, db *sql.DB, scan func(scan func(...any) error) (T, error), statement string) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		rows, err := db.QueryContext(ctx, statement)
		if err != nil {
			var none T
			yield(none, unavailable(err))
			return
		}
		defer rows.Close()
		for rows.Next() {
			t, err := scan(rows.Scan)
			if !yield(t, err) || err != nil {
				return
			}
		}
		if err := rows.Err(); err != nil {
			var none T
			yield(none, unavailable(err))
		}
	}
}
