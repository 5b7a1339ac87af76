package sqlstore

import (
	"context"
	"slices"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/org"
)

// Revoke implements enroll.Store. An enrollment that is being made has the organization's
// lock: one whose maker lost the connection is waited for.
func (d *DB) Revoke(ctx context.Context, of org.ID, id string, event audit.Event, withdrawn func(string) audit.Event) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		for _, name := range []string{"org:" + string(of), "enrollment:" + id} {
			if err := d.lock(ctx, tx, name); err != nil {
				return err
			}
		}
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		n, err := exec(ctx, tx, "UPDATE enrollments SET revoked_at = $3, ended_at = coalesce(ended_at, $3) WHERE id = $2 AND org_id = $1 AND revoked_at IS NULL", of, id, now)
		if err != nil {
			return err
		}
		if n == 0 {
			there, err := query(ctx, tx, scanInt, "SELECT 1 FROM enrollments WHERE id = $2 AND org_id = $1", of, id)
			switch {
			case err != nil:
				return err
			case len(there) == 0:
				return enroll.ErrNotFound
			}
			return enroll.ErrUnchanged
		}
		if err := d.record(ctx, tx, event); err != nil {
			return err
		}
		open, err := query(ctx, tx, scanEnding, endingColumns+"d.enrollment_id = $1 AND d.stage NOT IN ('received', 'ended') AND d.used_at IS NULL ORDER BY d.key_id"+d.forUpdate(""), id)
		if err != nil {
			return err
		}
		return d.endDeliveries(ctx, tx, open, now, func(_ org.ID, key string) audit.Event { return withdrawn(key) })
	})
}

// ending is what must be known of a delivery to end it.
type ending struct {
	key        string
	org        org.ID
	enrollment string
	scope      enroll.Scope
	stage      enroll.Stage
}

const endingColumns = "SELECT d.key_id, d.org_id, d.enrollment_id, d.scope, d.stage FROM deliveries d WHERE "

func scanEnding(scan func(...any) error) (e ending, err error) {
	err = scan(&e.key, &e.org, &e.enrollment, &e.scope, &e.stage)
	return e, err
}

// endDeliveries ends deliveries, which tx has locked, with their keys. A mere place is
// given back; a key that was made is withdrawn, with its event.
func (d *DB) endDeliveries(ctx context.Context, tx *txn, all []ending, now int64, withdrawn func(org.ID, string) audit.Event) error {
	orgs := make(map[string]org.ID, len(all))
	keys := map[enroll.Scope][]string{}
	for _, e := range all {
		orgs[e.key] = e.org
		keys[e.scope] = append(keys[e.scope], e.key)
	}
	var events []audit.Event
	for _, scope := range []enroll.Scope{enroll.ForOrganization, enroll.ForNode} {
		if err := execAll(ctx, tx, traceAttempts+"key_id IN "+d.texts("$1")+unlessTraced, keys[scope]); err != nil {
			return err
		}
		for _, statement := range []string{
			"DELETE FROM deliveries WHERE stage = 'open' AND key_id IN ",
			"UPDATE deliveries SET stage = 'ended', wrapped = NULL WHERE stage NOT IN ('received', 'ended') AND key_id IN ",
			"DELETE FROM " + keyTable(scope) + " WHERE state = " + reserved + " AND id IN ",
		} {
			if err := execAll(ctx, tx, statement+d.texts("$1"), keys[scope]); err != nil {
				return err
			}
		}
		ended, err := d.endKeys(ctx, tx, keyTable(scope), "state IN ("+pending+", "+released+")", keys[scope], now)
		if err != nil {
			return err
		}
		for _, key := range ended {
			events = append(events, withdrawn(orgs[key], key))
		}
	}
	return d.record(ctx, tx, events...)
}

// endKeys ends those of keys, in a table, of which a condition is true, and returns them.
func (d *DB) endKeys(ctx context.Context, tx *txn, table, condition string, keys []string, now int64) ([]string, error) {
	ended, err := queryAll(ctx, tx, scanText, "UPDATE "+table+endedAt+" WHERE "+condition+" AND id IN "+d.texts("$1")+" RETURNING id", keys, now)
	if err != nil {
		return nil, err
	}
	slices.Sort(ended)
	return ended, execAll(ctx, tx, "DELETE FROM node_keys WHERE key_id IN "+d.texts("$1"), ended)
}

// endedAt ends keys at $2, endedKey the key $1.
const (
	endedAt  = " SET state = " + deleted + ", slot = NULL, sealed = NULL, expires_at = NULL, deleted_at = $2"
	endedKey = endedAt + " WHERE id = $1"
)

// giveUpAttempts gives deliveries back that an attempt has had for too long, and notes the attempt's name.
func giveUpAttempts(ctx context.Context, tx *txn, now int64) error {
	if _, err := exec(ctx, tx, traceAttempts+"attempt_until <= $1"+unlessTraced, now); err != nil {
		return err
	}
	_, err := exec(ctx, tx, "UPDATE deliveries SET attempt = '', attempt_until = NULL WHERE stage = 'claimed' AND attempt_until IS NOT NULL AND attempt_until <= $1", now)
	return err
}

// SweepDeliveries implements enroll.Store.
func (d *DB) SweepDeliveries(ctx context.Context, limit int, withdrawn, used func(org.ID, string) audit.Event, expired func(org.ID, string, int) audit.Event) (int, error) {
	var n int
	err := d.write(ctx, func(ctx context.Context, tx *txn) error {
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		if err := giveUpAttempts(ctx, tx, now); err != nil {
			return err
		}
		late, err := query(ctx, tx, scanEnding, endingColumns+`d.until <= $1 AND d.stage NOT IN ('open', 'received', 'ended')
			ORDER BY d.until LIMIT $2`+d.forUpdate(" SKIP LOCKED"), now, limit)
		if err != nil {
			return err
		}
		n = len(late)
		keys := make([]string, n)
		for i, e := range late {
			keys[i] = e.key
		}
		inUse, err := queryAll(ctx, tx, scanText, `UPDATE deliveries SET stage = 'received', wrapped = NULL, received_at = used_at
			WHERE stage = 'available' AND used_at IS NOT NULL AND key_id IN `+d.texts("$1")+" RETURNING key_id", keys)
		if err != nil {
			return err
		}
		var events []audit.Event
		var over []ending
		for _, e := range late {
			if slices.Contains(inUse, e.key) {
				events = append(events, used(e.org, e.key))
			} else {
				over = append(over, e)
			}
		}
		events = append(events, placesBack(over, expired)...)
		if err := d.record(ctx, tx, events...); err != nil {
			return err
		}
		return d.endDeliveries(ctx, tx, over, now, withdrawn)
	})
	if err != nil {
		return 0, err
	}
	return n, nil
}

// placesBack returns an event for each enrollment of which all has claims whose key was
// never made: what comes back of them is a place, and nothing else would say so.
func placesBack(all []ending, expired func(org.ID, string, int) audit.Event) []audit.Event {
	var of []ending // the first of each enrollment
	places := map[string]int{}
	for _, e := range all {
		if e.stage != enroll.Claimed || e.enrollment == "" {
			continue
		}
		if places[e.enrollment]++; places[e.enrollment] == 1 {
			of = append(of, e)
		}
	}
	events := make([]audit.Event, len(of))
	for i, e := range of {
		events[i] = expired(e.org, e.enrollment, places[e.enrollment])
	}
	return events
}

// ExpiredEnrollments implements enroll.Store.
func (d *DB) ExpiredEnrollments(ctx context.Context, limit int) ([]string, error) {
	return query(ctx, d.read, scanText, "SELECT id FROM enrollments WHERE expires_at <= "+d.present()+" AND ended_at IS NULL ORDER BY expires_at, id LIMIT $1", limit)
}

// EndExpired implements enroll.Store. A claim that began in time is waited for.
func (d *DB) EndExpired(ctx context.Context, id string, expired func(org.ID, int) audit.Event) (places int, err error) {
	err = d.write(ctx, func(ctx context.Context, tx *txn) error {
		places = 0
		if err := d.lock(ctx, tx, "enrollment:"+id); err != nil {
			return err
		}
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		n, err := exec(ctx, tx, "UPDATE enrollments SET ended_at = $2 WHERE id = $1 AND ended_at IS NULL AND expires_at <= $2", id, now)
		if err != nil || n == 0 {
			return err
		}
		e, err := enrollment(ctx, tx, id)
		if err != nil {
			return err
		}
		const open = " FROM deliveries WHERE enrollment_id = $1 AND stage = 'open'"
		if _, err := exec(ctx, tx, "DELETE FROM "+keyTable(e.Scope)+" WHERE state = "+reserved+" AND id IN (SELECT key_id"+open+")", id); err != nil {
			return err
		}
		n, err = exec(ctx, tx, "DELETE"+open, id)
		if err != nil || n == 0 {
			return err
		}
		places = int(n)
		return d.record(ctx, tx, expired(e.Org, places))
	})
	if err != nil {
		return 0, err
	}
	return places, nil
}
