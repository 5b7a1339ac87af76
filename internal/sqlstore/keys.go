package sqlstore

import (
	"context"
	"database/sql"
	"fmt"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

var _ orgkey.Store = (*DB)(nil)

// The states of keys, as SQL has them.
const (
	reserved = "'" + string(orgkey.Reserved) + "'"
	pending  = "'" + string(orgkey.Pending) + "'"
	released = "'" + string(orgkey.Released) + "'"
	deleted  = "'" + string(orgkey.Deleted) + "'"
)

// isLive is the one condition on org_keys under which a key is listed, can be
// deleted, and verifies what nodes sign. A live key has a slot; saying so lets
// the index on slots answer.
const isLive = "slot IS NOT NULL AND state = " + released

// Reserve implements orgkey.Store. The lowest free slot is taken under the
// organization's lock; UNIQUE (org_id, slot) refuses a second taker even if
// two got here at once.
func (d *DB) Reserve(ctx context.Context, org org.ID, asked string, limit int, life time.Duration) error {
	_, err := d.reserve(ctx, org, asked, limit, life, false)
	return err
}

// reserve takes a place for key asked or, if ahead is set and there is a pool key, takes
// that key and the place for it.
func (d *DB) reserve(ctx context.Context, org org.ID, asked string, limit int, life time.Duration, ahead bool) (*orgkey.Ahead, error) {
	var full error
	var taken *orgkey.Ahead
	err := d.write(ctx, func(ctx context.Context, tx *txn) error {
		full, taken = nil, nil
		if err := d.lock(ctx, tx, "org:"+string(org)); err != nil {
			return err
		}
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		if err := d.sweepOrg(ctx, tx, org, now); err != nil {
			return err
		}
		slot, occupied, err := freeSlot(ctx, tx, org)
		if err != nil {
			return err
		}
		if occupied >= limit {
			full = &orgkey.QuotaError{Limit: limit} // what sweepOrg did is to stay
			return nil
		}
		name := asked
		if ahead {
			if taken, err = d.takeAhead(ctx, tx, orgkey.UsePlain, now); err != nil {
				return err
			}
			if taken != nil {
				name = taken.ID
			}
		}
		_, err = exec(ctx, tx, "INSERT INTO org_keys (id, org_id, slot, state, expires_at, asked) VALUES ($1, $2, $3, "+reserved+", $4, $5)",
			name, org, slot, now+life.Microseconds(), asked)
		return err
	})
	if err != nil {
		return nil, err
	}
	return taken, full
}

// shorten has what was reserved by a clock that was set back since expire no later
// than what would be reserved now: a crash must not hold a place for as long as the clock
// was wrong. Places of enrollments last as long as the enrollment says, whose end
// people were told. Only SQLite's one process knows how long its own reservations
// last; PostgreSQL's clock is the operator's to keep.
func (d *DB) shorten(ctx context.Context, tx *txn, latest int64) error {
	if d.postgres {
		return nil
	}
	_, err := exec(ctx, tx, "UPDATE org_keys SET expires_at = $1 WHERE expires_at > $1 AND id NOT IN (SELECT key_id FROM deliveries)", latest)
	return err
}

// freeSlot returns org's lowest free slot and how many are occupied.
func freeSlot(ctx context.Context, tx *txn, org org.ID) (slot, occupied int, err error) {
	taken, err := query(ctx, tx, scanInt, "SELECT slot FROM org_keys WHERE org_id = $1 AND slot IS NOT NULL ORDER BY slot", org)
	if err != nil {
		return 0, 0, err
	}
	slot = 1
	for _, s := range taken {
		if s == slot {
			slot++
		}
	}
	return slot, len(taken), nil
}

// sweepOrg gives back the places of org that have expired.
func (d *DB) sweepOrg(ctx context.Context, tx *txn, org org.ID, now int64) error {
	expired, err := query(ctx, tx, scanState,
		"SELECT id, org_id, state FROM org_keys WHERE org_id = $1 AND slot IS NOT NULL AND expires_at <= $2 ORDER BY id"+d.forUpdate(""), org, now)
	if err != nil {
		return err
	}
	return d.end(ctx, tx, expired, now, orgkey.SweptEvent)
}

// Sweep implements orgkey.Store.
func (d *DB) Sweep(ctx context.Context, limit int, life time.Duration, withdrawn func(org org.ID, id string) audit.Event) (int, error) {
	var n int
	err := d.write(ctx, func(ctx context.Context, tx *txn) error {
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		if err := d.shorten(ctx, tx, now+life.Microseconds()); err != nil {
			return err
		}
		if _, err := exec(ctx, tx, "DELETE FROM key_traces WHERE due_at <= $1", now-traceLife.Microseconds()); err != nil {
			return err
		}
		expired, err := query(ctx, tx, scanState,
			"SELECT id, org_id, state FROM org_keys WHERE expires_at <= $1 ORDER BY expires_at LIMIT $2"+d.forUpdate(" SKIP LOCKED"), now, limit)
		if err != nil {
			return err
		}
		n = len(expired)
		return d.end(ctx, tx, expired, now, withdrawn)
	})
	if err != nil {
		return 0, err
	}
	return n, nil
}

type keyState struct {
	id    string
	org   org.ID
	state orgkey.State
}

func scanState(scan func(...any) error) (k keyState, err error) {
	err = scan(&k.id, &k.org, &k.state)
	return k, err
}

// end removes reservations, of which nothing is left, and withdraws pending
// records, each with its event. What changed state meanwhile is let be.
func (d *DB) end(ctx context.Context, tx *txn, keys []keyState, now int64, withdrawn func(org org.ID, id string) audit.Event) error {
	if len(keys) == 0 {
		return nil
	}
	ids, orgs := make([]string, len(keys)), make(map[string]org.ID, len(keys))
	for i, k := range keys {
		ids[i], orgs[k.id] = k.id, k.org
	}
	if err := execAll(ctx, tx, traceKeys+"id IN "+d.texts("$1")+unlessTraced, ids); err != nil {
		return err
	}
	if err := execAll(ctx, tx, "DELETE FROM org_keys WHERE state = "+reserved+" AND id IN "+d.texts("$1"), ids); err != nil {
		return err
	}
	ended, err := d.endKeys(ctx, tx, "org_keys", "state = "+pending, ids, now)
	if err != nil || len(ended) == 0 {
		return err
	}
	events := make([]audit.Event, len(ended))
	for i, id := range ended {
		events[i] = withdrawn(orgs[id], id)
	}
	return d.record(ctx, tx, events...)
}

const endKey = "UPDATE org_keys" + endedKey

// Exchange implements orgkey.Store.
func (d *DB) Exchange(ctx context.Context, asked string, life time.Duration) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		return one(exec(ctx, tx, "UPDATE org_keys SET id = asked, expires_at = $3 WHERE asked = $1 AND state = "+reserved+" AND expires_at > $2", asked, now, now+life.Microseconds()))
	})
}

// Cancel implements orgkey.Store.
func (d *DB) Cancel(ctx context.Context, asked string) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		_, err := exec(ctx, tx, "DELETE FROM org_keys WHERE asked = $1 AND state = "+reserved, asked)
		return err
	})
}

// StorePending implements orgkey.Store. The reservation's own ID fences off a stale
// owner: a reservation that expired and was given to another has another one, also if
// a failover lost the first and both were given the same pool key.
func (d *DB) StorePending(ctx context.Context, id, asked string, sealed []byte, created audit.Event) error {
	return d.changeOne(ctx, created, true, "UPDATE org_keys SET state = "+pending+", sealed = $3, created_at = $2 WHERE id = $1 AND asked = $4 AND state = "+reserved+" AND expires_at > $2", id, sealed, asked)
}

// Release implements orgkey.Store.
func (d *DB) Release(ctx context.Context, id string) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		return one(exec(ctx, tx, "UPDATE org_keys SET state = "+released+", released_at = $2, expires_at = NULL WHERE id = $1 AND state = "+pending+" AND expires_at > $2", id, now))
	})
}

// Delivered implements orgkey.Store.
func (d *DB) Delivered(ctx context.Context, id string, event audit.Event) error {
	return d.changeOne(ctx, event, false, "UPDATE org_keys SET delivered_at = $2, delivery_event = $3 WHERE id = $1 AND delivered_at IS NULL AND released_at IS NOT NULL", id, event.ID)
}

// changeOne changes key id by a statement over $1 (id), $2 (now) and args, and
// records event with it, which somebody waits for if it is awaited; it reports ErrGone
// if no row was touched.
func (d *DB) changeOne(ctx context.Context, event audit.Event, awaited bool, statement, id string, args ...any) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		if err := one(exec(ctx, tx, statement, append([]any{id, now}, args...)...)); err != nil {
			return err
		}
		tx.awaited = tx.awaited || awaited
		return d.record(ctx, tx, event)
	})
}

func one(n int64, err error) error {
	if err == nil && n != 1 {
		return orgkey.ErrGone
	}
	return err
}

// Withdraw implements orgkey.Store.
func (d *DB) Withdraw(ctx context.Context, id string, event audit.Event) (bool, error) {
	var ended bool
	err := d.write(ctx, func(ctx context.Context, tx *txn) error {
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		// Waits for a StorePending whose commit takes long: the change below would not see it.
		if _, err := query(ctx, tx, scanInt, "SELECT 1 FROM org_keys WHERE id = $1"+d.forUpdate(""), id); err != nil {
			return err
		}
		n, err := exec(ctx, tx, endKey+" AND state IN ("+pending+", "+released+")", id, now)
		if ended = n > 0; err != nil || !ended {
			return err
		}
		if err := dissociate(ctx, tx, id); err != nil {
			return err
		}
		return d.record(ctx, tx, event)
	})
	if err != nil {
		return false, err
	}
	return ended, nil
}

// Keys implements orgkey.Store.
func (d *DB) Keys(ctx context.Context, org org.ID) ([]orgkey.Record, error) {
	records, err := d.keys(ctx, org, "org_keys")
	if err != nil || len(records) == 0 {
		return records, err
	}
	return records, d.nodeKeys(ctx, org, records)
}

// keys are org's live ones in a table, newest first.
func (d *DB) keys(ctx context.Context, org org.ID, table string) ([]orgkey.Record, error) {
	return query(ctx, d.read, func(scan func(...any) error) (orgkey.Record, error) {
		r := orgkey.Record{Org: org}
		var created, delivered, used sql.NullInt64
		var personal []byte
		if err := scan(&r.ID, &r.Sealed, &created, &delivered, &personal, &r.Enrollment, &used); err != nil {
			return r, err
		}
		r.Created, r.Delivered, r.LastUsed = micros(created), micros(delivered), micros(used)
		if personal == nil {
			return r, nil
		}
		known, err := audit.DecodePersonal(personal)
		r.DeliveredTo = known.Address
		return r, err
	}, `SELECT k.id, k.sealed, k.created_at, k.delivered_at, p.personal, coalesce(v.enrollment_id, ''), `+d.past("k.last_used_at")+`
		FROM `+table+` k LEFT JOIN event_persons p ON p.event_id = k.delivery_event LEFT JOIN deliveries v ON v.key_id = k.id
		WHERE k.org_id = $1 AND `+isLive+` ORDER BY k.created_at DESC, k.id`, org)
}

// NodeKeys implements orgkey.Store. The node of a node key is the one that
// registered with it, and unregistered perhaps.
func (d *DB) NodeKeys(ctx context.Context, org org.ID) ([]orgkey.Record, error) {
	records, err := d.keys(ctx, org, "keys_of_nodes")
	if err != nil || len(records) == 0 {
		return records, err
	}
	return records, associate(ctx, d.read, records, `SELECT k.id, n.ip, true FROM keys_of_nodes k JOIN nodes n ON n.id = k.node_id
		WHERE k.org_id = $1 AND `+isLive, org)
}

// forUpdate makes a SELECT hold the rows it returns until the transaction
// ends. SQLite has one writer anyhow.
func (d *DB) forUpdate(how string) string {
	if !d.postgres {
		return ""
	}
	return " FOR UPDATE" + how
}

// HasSealed reports whether anything that was sealed is kept: a public key, a
// boot secret, a pool key's record, the key that signs checkpoints, or the key of events' MACs.
func (d *DB) HasSealed(ctx context.Context) (bool, error) {
	found, err := query(ctx, d.read, scanInt, `SELECT 1 FROM org_keys WHERE sealed IS NOT NULL
		UNION ALL SELECT 1 FROM keys_of_nodes WHERE sealed IS NOT NULL
		UNION ALL SELECT 1 FROM enrollments
		UNION ALL SELECT 1 FROM boot_secrets WHERE sealed IS NOT NULL
		UNION ALL SELECT 1 FROM pool_keys WHERE sealed IS NOT NULL
		UNION ALL SELECT 1 FROM checkpoint_keys WHERE sealed IS NOT NULL
		UNION ALL SELECT 1 FROM event_keys LIMIT 1`)
	return len(found) > 0, err
}

// Needed returns which of ids, names in the back end, are still needed: reserved or
// pending, an attempt's or in the pool, and not expired.
func (d *DB) Needed(ctx context.Context, ids []string) (map[string]bool, error) {
	live := map[string]bool{}
	now := d.present()
	for _, id := range ids {
		found, err := query(ctx, d.read, scanInt, "SELECT (SELECT count(*) FROM org_keys WHERE id = $1 AND state IN ("+reserved+", "+pending+") AND expires_at > "+now+
			") + (SELECT count(*) FROM pool_keys WHERE id = $1 AND expires_at > "+now+
			") + (SELECT count(*) FROM deliveries WHERE attempt = $1 AND stage = 'claimed' AND attempt_until IS NOT NULL AND attempt_until > "+now+" AND attempt_until <= "+now+" + $2)", id, attemptAtMost.Microseconds())
		if err != nil {
			return nil, err
		}
		if found[0] > 0 {
			live[id] = true
		}
	}
	return live, nil
}

// SealedPublicKeys returns the sealed public keys of those keys, of organizations
// and of nodes, that are not deleted. One without a record is an error: the log
// says that it was created.
func (d *DB) SealedPublicKeys(ctx context.Context, ids []string) (map[string]orgkey.Sealed, error) {
	type record struct {
		id     string
		org    org.ID
		state  orgkey.State
		sealed []byte
	}
	in := " WHERE id IN " + d.texts("$1")
	found, err := queryAll(ctx, d.read, func(scan func(...any) error) (r record, err error) {
		err = scan(&r.id, &r.org, &r.state, &r.sealed)
		return r, err
	}, "SELECT id, org_id, state, sealed FROM org_keys"+in+" UNION ALL SELECT id, org_id, state, sealed FROM keys_of_nodes"+in, ids)
	if err != nil {
		return nil, err
	}
	known := make(map[string]bool, len(found))
	sealed := make(map[string]orgkey.Sealed, len(found))
	for _, r := range found {
		known[r.id] = true
		if r.state != orgkey.Deleted {
			sealed[r.id] = orgkey.Sealed{Binding: orgkey.PublicKeyOf(r.org, r.id), Ciphertext: r.sealed}
		}
	}
	for _, id := range ids {
		if !known[id] {
			return nil, fmt.Errorf("key %s was created, says the log, and has no record: run \"orgkeys audit verify\"", id)
		}
	}
	return sealed, nil
}
