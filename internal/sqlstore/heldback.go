package sqlstore

import (
	"context"
	"database/sql"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit/tiles"
)

// Hold is what keeps events in the database.
type Hold struct {
	Sink     string    // a sink that is away
	Key, Org string    // or a delivery that is under way
	At       time.Time // or an event, when it happened
	Next     int64     // the first event that it keeps, or that event
}

// HeldBack returns what keeps the bundle at an index from being moved, although it is among the first size events:
// an event in it that did not happen before a time or, if all did, what needs them.
func (d *DB) HeldBack(ctx context.Context, index int64, before time.Time, size int64) ([]Hold, error) {
	end := index + tiles.Width
	if end > size {
		return nil, nil
	}
	old, err := d.older(ctx, index, size, before)
	if err != nil {
		return nil, err
	}
	if old == index {
		return query(ctx, d.read, func(scan func(...any) error) (h Hold, err error) {
			var at sql.NullInt64
			err = scan(&h.Next, &at)
			h.At = micros(at)
			return h, err
		}, "SELECT idx, occurred_at FROM events WHERE idx >= $1 AND idx < $2 ORDER BY occurred_at DESC, idx LIMIT 1", index, end)
	}
	return query(ctx, d.read, func(scan func(...any) error) (h Hold, err error) { return h, scan(&h.Sink, &h.Key, &h.Org, &h.Next) },
		`SELECT sink, '', '', next FROM sink_progress WHERE next < $1 UNION ALL
		SELECT '', v.key_id, v.org_id, e.idx FROM deliveries v JOIN events e ON e.id = v.event_id WHERE `+needsEvent+` AND e.idx < $1
		ORDER BY 4, 1, 2`, end)
}
