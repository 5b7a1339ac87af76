package sqlstore

import (
	"context"
	"database/sql"
	"strings"
	"time"

	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orglog"
)

var _ orglog.Store = (*DB)(nil)

const orgEvent = "SELECT e.seq, e.idx, e.leaf, p.personal FROM events e LEFT JOIN event_persons p ON p.event_id = e.id WHERE " + isRecorded + " AND "

func scanOrgEvent(scan func(...any) error) (s orglog.Stored, err error) {
	var index sql.NullInt64
	err = scan(&s.Number, &index, &s.Leaf, &s.Personal)
	if s.Index = -1; index.Valid {
		s.Index = index.Int64
	}
	return s, err
}

// indexed are the conditions that events_of_org, or events_of_object, leads to.
func indexed(f orglog.Filter) (c conditions) {
	c.add("e.org_id = ?", f.Org)
	if f.Object != "" {
		c.add("e.object <> '' AND e.object = ?", f.Object) // the condition of events_of_object
	}
	if f.Before > 0 {
		c.add("e.seq < ?", f.Before)
	}
	return c
}

// OrgFloor implements orglog.Store.
func (d *DB) OrgFloor(ctx context.Context, f orglog.Filter, n int) (int64, error) {
	c := indexed(f)
	found, err := query(ctx, d.read, func(scan func(...any) error) (seq int64, err error) { return seq, scan(&seq) },
		"SELECT e.seq FROM events e WHERE "+strings.Join(c.terms, " AND ")+" ORDER BY e.seq DESC LIMIT 1 OFFSET "+c.arg(n-1), c.args...)
	if err != nil || len(found) == 0 {
		return 0, err
	}
	return found[0], nil
}

// OrgEvents implements orglog.Store.
func (d *DB) OrgEvents(ctx context.Context, f orglog.Filter) ([]orglog.Stored, error) {
	c := indexed(f)
	if f.Actor != "" {
		c.add("e.actor = ?", f.Actor)
	}
	if f.Person != "" {
		c.add("e.actor_kind = 'user' AND e.actor = ?", f.Person)
	}
	if !f.From.IsZero() {
		c.add("e.occurred_at >= ?", f.From.UnixMicro())
	}
	if !f.Until.IsZero() {
		c.add("e.occurred_at < ?", f.Until.UnixMicro())
	}
	if f.Floor > 0 {
		c.add("e.seq >= ?", f.Floor)
	}
	switch {
	case len(f.Types) == 0:
	case d.postgres: // which follows the index in its order with this, and joins with the other
		c.add("e.type = ANY(?)", f.Types)
	default:
		names, err := list(f.Types)
		if err != nil {
			return nil, err
		}
		c.terms = append(c.terms, "e.type IN "+d.texts(c.arg(names)))
	}
	return query(ctx, d.read, scanOrgEvent, orgEvent+strings.Join(c.terms, " AND ")+" ORDER BY e.seq DESC LIMIT "+c.arg(f.Take), c.args...)
}

// OrgEvent implements orglog.Store.
func (d *DB) OrgEvent(ctx context.Context, org org.ID, id, person string) (orglog.Stored, bool, error) {
	var c conditions
	c.add("e.id = ?", id)
	c.add("e.org_id = ?", org)
	if person != "" {
		c.add("e.actor_kind = 'user' AND e.actor = ?", person)
	}
	found, err := query(ctx, d.read, scanOrgEvent, orgEvent+strings.Join(c.terms, " AND "), c.args...)
	if err != nil || len(found) == 0 {
		return orglog.Stored{}, false, err
	}
	return found[0], true, nil
}

// orgCounts is one statement, so that what it counts is of one moment, the database's.
func (d *DB) orgCounts() string {
	return `SELECT
	(SELECT count(*) FROM keys_of_nodes WHERE org_id = $1 AND slot IS NOT NULL),
	(SELECT count(*) FROM nodes WHERE org_id = $1 AND deleted_at IS NULL),
	(SELECT count(*) FROM boot_secrets WHERE org_id = $1),
	(SELECT count(*) FROM org_keys WHERE org_id = $1 AND ` + isLive + ` AND delivered_at IS NULL),
	(SELECT count(*) FROM deliveries WHERE org_id = $1 AND stage = 'available'),
	(SELECT count(*) FROM enrollments e WHERE org_id = $1 AND revoked_at IS NULL AND ended_at IS NULL AND expires_at > ` + d.present() + `
		AND EXISTS (SELECT 1 FROM deliveries d WHERE d.enrollment_id = e.id AND d.stage = 'open')),
	(SELECT count(*) FROM deliveries d JOIN enrollments e ON e.id = d.enrollment_id
		WHERE e.org_id = $1 AND e.approval = 1 AND e.revoked_at IS NULL AND d.stage = 'claimed' AND d.approved_at IS NULL),
	(SELECT coalesce(sum(conflicts), 0) FROM enrollments WHERE org_id = $1)`
}

// OrgCounts implements orglog.Store.
func (d *DB) OrgCounts(ctx context.Context, org org.ID, first time.Time) (orglog.Counts, error) {
	found, err := query(ctx, d.read, func(scan func(...any) error) (c orglog.Counts, err error) {
		err = scan(&c.NodeKeys, &c.Nodes, &c.Secrets, &c.Unconfirmed, &c.Unreceived, &c.Enrollments, &c.Approvals, &c.Conflicts)
		return c, err
	}, d.orgCounts(), org)
	if err != nil {
		return orglog.Counts{}, err
	}
	counts := found[0]
	counts.Occupants, err = query(ctx, d.read, func(scan func(...any) error) (o orglog.Occupant, err error) {
		var since sql.NullInt64
		var enrollment, origin sql.NullString
		err = scan(&o.ID, &o.State, &since, &enrollment, &origin)
		if o.Enrollment, o.Sealed = enrollment.String, origin.String == string(enroll.FromBackend); since.Valid {
			o.Since = time.UnixMicro(since.Int64)
		}
		return o, err
	}, `SELECT k.id, k.state, k.created_at, d.enrollment_id, d.origin FROM org_keys k LEFT JOIN deliveries d ON d.key_id = k.id
		WHERE k.org_id = $1 AND k.slot IS NOT NULL ORDER BY k.slot`, org)
	if err != nil {
		return orglog.Counts{}, err
	}
	err = each(ctx, d.read, func(scan func(...any) error) error {
		var hour, n int
		if err := scan(&hour, &n); err != nil {
			return err
		}
		if hour >= 0 && hour < len(counts.EventsByHour) {
			counts.EventsByHour[hour] = n
		}
		return nil
	}, `SELECT (occurred_at - $2) / 3600000000 AS hour, count(*)
		FROM (SELECT occurred_at FROM events WHERE org_id = $1 AND `+isRecorded+` ORDER BY seq DESC LIMIT $3) recent WHERE occurred_at >= $2 GROUP BY hour`, org, first.UnixMicro(), orglog.MostCounted)
	return counts, err
}
