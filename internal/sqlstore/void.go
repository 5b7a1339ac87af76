package sqlstore

import (
	"context"
	"database/sql"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/rollback"
	"github.com/orgkeys/orgkeys/internal/org"
)

var _ rollback.Store = (*DB)(nil)

// unreleased is the condition on deliveries d whose key nobody can have had, as
// far as the database knows.
const unreleased = "d.stage NOT IN ('available', 'received', 'ended')"

// openEnrollments is those with a use that is not decided.
const openEnrollments = " FROM enrollments e WHERE e.revoked_at IS NULL AND EXISTS (SELECT 1 FROM deliveries d WHERE d.enrollment_id = e.id AND " + unreleased + ")"

// OpenEnrollments implements rollback.Store.
func (d *DB) OpenEnrollments(ctx context.Context) (n int, err error) {
	err = d.readWithin(ctx, rollbackTimeout, func(ctx context.Context, tx *sql.Tx) error {
		return unavailable(tx.QueryRowContext(ctx, "SELECT count(*)"+openEnrollments).Scan(&n))
	})
	return n, err
}

// voidEnrollments ends every open enrollment, and returns how many. A key that
// had been released goes on: its node may have signed for it or used it since
// the backup, so nothing but its receipt, its use or an administrator ends its delivery.
func (d *DB) voidEnrollments(ctx context.Context, tx *txn, v rollback.Voids) (int, error) {
	now, err := d.now(ctx, tx)
	if err != nil {
		return 0, err
	}
	if _, err := exec(ctx, tx, "UPDATE deliveries SET until = NULL WHERE stage = 'available' AND used_at IS NULL"); err != nil {
		return 0, err
	}
	type open struct {
		id  string
		org org.ID
	}
	all, err := query(ctx, tx, func(scan func(...any) error) (e open, err error) {
		err = scan(&e.id, &e.org)
		return e, err
	}, "SELECT e.id, e.org_id"+openEnrollments+" ORDER BY e.id"+d.forUpdate(""))
	if err != nil {
		return 0, err
	}
	ids := make([]string, len(all))
	for i, e := range all {
		ids[i] = e.id
	}
	if err := execAll(ctx, tx, "UPDATE enrollments SET revoked_at = $2, ended_at = coalesce(ended_at, $2) WHERE id IN "+d.texts("$1"), ids, now); err != nil {
		return 0, err
	}
	ended, err := queryAll(ctx, tx, scanEnding, endingColumns+"d.enrollment_id IN "+d.texts("$1")+" AND "+unreleased+" ORDER BY d.key_id"+d.forUpdate(""), ids)
	if err != nil {
		return 0, err
	}
	uses := map[string]int{}
	for _, e := range ended {
		uses[e.enrollment]++
	}
	events := make([]audit.Event, len(all))
	for i, e := range all {
		events[i] = v.Enrollment(e.org, e.id, uses[e.id])
	}
	if err := d.record(ctx, tx, events...); err != nil {
		return 0, err
	}
	return len(all), d.endDeliveries(ctx, tx, ended, now, v.Withdrawn)
}
