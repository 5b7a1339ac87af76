package sqlstore

import (
	"context"
	"database/sql"
	"time"
)

// UnderWay is how many enrollments and deliveries are not over.
type UnderWay struct {
	Open       int      // enrollments with uses that nobody has claimed
	Approval   Awaiting // claims that wait for an administrator
	Making     Awaiting // claims that wait for their key
	Unreceived Awaiting // keys that went out, or may, and that nobody has signed for or used
}

// Awaiting is some that wait for the same.
type Awaiting struct {
	Count  int
	Oldest time.Time // when the first of them was claimed
}

// UnderWay counts what is not over.
func (d *DB) UnderWay(ctx context.Context) (UnderWay, error) {
	var w UnderWay
	open, err := query(ctx, d.read, scanInt, `SELECT count(*) FROM enrollments e WHERE e.ended_at IS NULL
		AND EXISTS (SELECT 1 FROM deliveries d WHERE d.enrollment_id = e.id AND d.stage = 'open')`)
	if err != nil {
		return w, err
	}
	w.Open = open[0]
	states := map[string]*Awaiting{"approval": &w.Approval, "making": &w.Making, "unreceived": &w.Unreceived}
	// The condition is that of the index deliveries_until.
	err = each(ctx, d.read, func(scan func(...any) error) error {
		var state string
		var oldest sql.NullInt64
		var n int
		if err := scan(&state, &n, &oldest); err != nil {
			return err
		}
		if s := states[state]; s != nil {
			s.Count, s.Oldest = n, micros(oldest)
		}
		return nil
	}, `SELECT state, count(*), min(claimed_at) FROM (SELECT claimed_at, CASE
			WHEN stage = 'available' AND used_at IS NULL THEN 'unreceived' WHEN stage = 'available' THEN 'used'
			WHEN stage = 'claimed' AND approved_at IS NULL THEN 'approval' ELSE 'making' END AS state
		FROM deliveries WHERE stage NOT IN ('open', 'received', 'ended')) AS v GROUP BY state`)
	return w, err
}
