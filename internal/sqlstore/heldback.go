package sqlstore

import (
	"context"
	"database/sql"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit/tiles"
)

// Hold is what keeps events in the database that are old enough to be moved.
type Hold struct {
	Sink     string // empty: a delivery that is under way
	Key, Org string // of the delivery
	Next     int64  // the first event that it keeps
}

// HeldBack returns what keeps the bundle at an index from being moved, although its events
// happened before a time and are among the first size.
func (d *DB) HeldBack(ctx context.Context, index int64, before time.Time, size int64) ([]Hold, error) {
	end := index + tiles.Width
	if end > size {
		return nil, nil
	}
	newest, err := query(ctx, d.read, func(scan func(...any) error) (at sql.NullInt64, err error) { return at, scan(&at) },
		"SELECT max(occurred_at) FROM events WHERE idx >= $1 AND idx < $2", index, end)
	if err != nil || !newest[0].Valid || newest[0].Int64 >= before.UnixMicro() {
		return nil, err
	}
	return query(ctx, d.read, func(scan func(...any) error) (h Hold, err error) { return h, scan(&h.Sink, &h.Key, &h.Org, &h.Next) },
		`SELECT sink, '', '', next FROM sink_progress WHERE next < $1 UNION ALL
		SELECT '', v.key_id, v.org_id, e.idx FROM deliveries v JOIN events e ON e.id = v.event_id WHERE `+needsEvent+` AND e.idx < $1
		ORDER BY 4, 1, 2`, end)
}
