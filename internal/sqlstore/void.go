package sqlstore

import (
	"context"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/rollback"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/org"
)

var _ rollback.Store = (*DB)(nil)

// unreleased is the condition on deliveries d whose key nobody can have had, as
// far as the database knows.
const unreleased = "d.stage NOT IN ('available', 'received', 'ended')"

// openEnrollments is those with a use that is not decided.
const openEnrollments = " FROM enrollments e WHERE e.revoked_at IS NULL AND EXISTS (SELECT 1 FROM deliveries d WHERE d.enrollment_id = e.id AND " + unreleased + ")"

// OpenEnrollments implements rollback.Store.
func (d *DB) OpenEnrollments(ctx context.Context) (int, error) {
	found, err := query(ctx, d.read, scanInt, "SELECT count(*)"+openEnrollments)
	if err != nil {
		return 0, err
	}
	return found[0], nil
}

// voidEnrollments ends every open enrollment, and returns how many. A key that
// had been released goes on: its node may have signed for it or used it since
// the backup, so nothing but its receipt or an administrator ends its delivery.
func (d *DB) voidEnrollments(ctx context.Context, tx *txn, v rollback.Voids) (int, error) {
	now, err := d.now(ctx, tx)
	if err != nil {
		return 0, err
	}
	if _, err := exec(ctx, tx, "UPDATE deliveries SET until = NULL WHERE stage = 'available'"); err != nil {
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
	for _, e := range all {
		if _, err := exec(ctx, tx, "UPDATE enrollments SET revoked_at = $2, ended_at = coalesce(ended_at, $2) WHERE id = $1", e.id, now); err != nil {
			return 0, err
		}
		ended, err := query(ctx, tx, scanDelivery, deliveryColumns+" WHERE d.enrollment_id = $1 AND "+unreleased+" ORDER BY d.key_id", e.id)
		if err != nil {
			return 0, err
		}
		if err := d.record(ctx, tx, v.Enrollment(e.org, e.id, len(ended))); err != nil {
			return 0, err
		}
		if err := d.endDeliveries(ctx, tx, ended, now, func(keyID string) audit.Event { return v.Withdrawn(e.org, keyID) }); err != nil {
			return 0, err
		}
	}
	return len(all), nil
}

func (d *DB) endDeliveries(ctx context.Context, tx *txn, all []enroll.Delivery, now int64, withdrawn func(string) audit.Event) error {
	for _, v := range all {
		if err := d.endDelivery(ctx, tx, v, now, withdrawn); err != nil {
			return err
		}
	}
	return nil
}
