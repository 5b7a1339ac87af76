package sqlstore

import (
	"context"
	"slices"
	"strconv"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// DeleteKey implements orgkey.Store.
func (d *DB) DeleteKey(ctx context.Context, org org.ID, id string, event audit.Event) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		n, err := exec(ctx, tx, endKey+" AND org_id = $3 AND "+isLive, id, now, org)
		if err == nil && n == 0 {
			n, err = exec(ctx, tx, "UPDATE keys_of_nodes"+endedKey+" AND org_id = $3 AND "+isLive, id, now, org)
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return orgkey.ErrNotFound
		}
		if _, err := exec(ctx, tx, endDelivery, id); err != nil {
			return err
		}
		if err := dissociate(ctx, tx, id); err != nil {
			return err
		}
		return d.record(ctx, tx, event)
	})
}

// DeleteKeys implements orgkey.Store.
func (d *DB) DeleteKeys(ctx context.Context, org org.ID, withNodeKeys bool, request audit.Event, each func(id string, released bool) audit.Event, over func(enrollment string, unmade int) audit.Event) (orgkey.Ended, error) {
	var n orgkey.Ended
	err := d.write(ctx, func(ctx context.Context, tx *txn) error {
		n = orgkey.Ended{}
		if err := d.lock(ctx, tx, "org:"+string(org)); err != nil {
			return err
		}
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		if err := traceOrg(ctx, tx, org); err != nil {
			return err
		}
		deleting := deletion{org: org, now: now, each: each, over: over}
		if n.Keys, err = d.deleteScope(ctx, tx, enroll.ForOrganization, &deleting); err != nil {
			return err
		}
		counts := map[string]string{"count": strconv.Itoa(n.Keys)}
		if withNodeKeys {
			if n.NodeKeys, err = d.deleteScope(ctx, tx, enroll.ForNode, &deleting); err != nil {
				return err
			}
			counts["nodeKeys"] = strconv.Itoa(n.NodeKeys)
		}
		request.Add(counts)
		return d.record(ctx, tx, append([]audit.Event{request}, deleting.events...)...)
	})
	if err != nil {
		return orgkey.Ended{}, err
	}
	return n, nil
}

// deletion is all keys of an organization on their way out.
type deletion struct {
	org    org.ID
	now    int64
	each   func(id string, released bool) audit.Event
	over   func(enrollment string, unmade int) audit.Event
	events []audit.Event
}

// deleteScope ends what there is of a scope, and returns how many keys had been
// released.
func (d *DB) deleteScope(ctx context.Context, tx *txn, scope enroll.Scope, x *deletion) (released int, err error) {
	table := keyTable(scope)
	if _, err := exec(ctx, tx, "DELETE FROM "+table+" WHERE org_id = $1 AND state = "+reserved, x.org); err != nil {
		return 0, err
	}
	live, err := query(ctx, tx, scanState, "SELECT id, org_id, state FROM "+table+" WHERE org_id = $1 AND slot IS NOT NULL ORDER BY id"+d.forUpdate(""), x.org)
	if err != nil {
		return 0, err
	}
	enrollments, err := query(ctx, tx, scanText, "UPDATE enrollments SET revoked_at = $2, ended_at = coalesce(ended_at, $2) WHERE org_id = $1 AND scope = $3 AND ended_at IS NULL RETURNING id", x.org, x.now, string(scope))
	if err != nil {
		return 0, err
	}
	for _, id := range enrollments {
		x.events = append(x.events, x.over(id, 0))
	}
	unmade, err := query(ctx, tx, scanEnding, endingColumns+"d.org_id = $1 AND d.scope = $2 AND d.stage = 'claimed' ORDER BY d.key_id"+d.forUpdate(""), x.org, string(scope))
	if err != nil {
		return 0, err
	}
	unmade = slices.DeleteFunc(unmade, func(e ending) bool { return slices.Contains(enrollments, e.enrollment) })
	x.events = append(x.events, placesBack(unmade, func(_ org.ID, id string, places int) audit.Event { return x.over(id, places) })...)
	// The places of those that nobody claimed are gone already.
	if _, err := exec(ctx, tx, "DELETE FROM deliveries WHERE org_id = $1 AND scope = $2 AND stage = 'open'", x.org, string(scope)); err != nil {
		return 0, err
	}
	if _, err := exec(ctx, tx, "UPDATE deliveries SET stage = 'ended', wrapped = NULL WHERE org_id = $1 AND scope = $2 AND stage NOT IN ('received', 'ended')", x.org, string(scope)); err != nil {
		return 0, err
	}
	ids := make([]string, len(live))
	for i, k := range live {
		ids[i] = k.id
		if k.state == orgkey.Released {
			released++
		}
		x.events = append(x.events, x.each(k.id, k.state == orgkey.Released))
	}
	if _, err := d.endKeys(ctx, tx, table, "slot IS NOT NULL", ids, x.now); err != nil {
		return 0, err
	}
	return released, nil
}
