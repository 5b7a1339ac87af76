package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"slices"
	"sync/atomic"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/enroll"
)

// deliveryColumns reads deliveries with the state of their keys: one whose key
// was deleted is over, whatever its row says.
const deliveryColumns = `SELECT d.key_id, d.org_id, d.enrollment_id, d.scope, ` + deliveryStage + `,
	coalesce(d.recipient, ''), d.recipient_key, d.claimed_from, d.claimed_at, d.approved_at IS NOT NULL, d.attempt,
	d.origin, d.ek, d.evidence, d.alg, d.wrapped, d.digest, coalesce(k.sealed, n.sealed), d.fingerprint, d.event_id, d.until, d.answers, d.received_at` + deliveryTables

const (
	deliveryStage  = `CASE WHEN d.stage <> 'ended' AND coalesce(k.state, n.state, 'deleted') = 'deleted' THEN 'ended' ELSE d.stage END`
	deliveryTables = `
	FROM deliveries d
	LEFT JOIN org_keys k ON k.id = d.key_id AND d.scope = 'organization'
	LEFT JOIN keys_of_nodes n ON n.id = d.key_id AND d.scope = 'node'`
)

func scanDelivery(scan func(...any) error) (v enroll.Delivery, err error) {
	var claimed, until, received sql.NullInt64
	err = scan(&v.KeyID, &v.Org, &v.Enrollment, &v.Scope, &v.Stage, &v.Recipient, &v.DER, &v.From, &claimed, &v.Approved, &v.Attempt,
		&v.Origin, &v.Device.EK, &v.Device.Evidence, &v.Wrapped.Alg, &v.Wrapped.Value, &v.Wrapped.SHA256, &v.Public, &v.Fingerprint, &v.Event, &until, &v.Answers, &received)
	v.ClaimedAt, v.Until, v.ReceivedAt = micros(claimed), micros(until), micros(received)
	return v, err
}

func delivery(ctx context.Context, q querier, where string, args ...any) (enroll.Delivery, error) {
	found, err := query(ctx, q, scanDelivery, deliveryColumns+" WHERE "+where, args...)
	if err == nil && len(found) == 0 {
		err = enroll.ErrNotFound
	}
	if err != nil {
		return enroll.Delivery{}, err
	}
	return found[0], nil
}

// Delivery implements enroll.Store.
func (d *DB) Delivery(ctx context.Context, keyID string) (enroll.Delivery, error) {
	return delivery(ctx, d.read, "d.key_id = $1", keyID)
}

// DeliveryTo implements enroll.Store.
func (d *DB) DeliveryTo(ctx context.Context, id, recipient string) (enroll.Delivery, error) {
	return deliveryTo(ctx, d.read, id, recipient)
}

// deliveryTo finds it by an index. SQLite compares a parameter with the conditions of partial
// indices, and then prepares the statement anew each time that it is run; it does not do so
// with what is cast.
func deliveryTo(ctx context.Context, q querier, id, recipient string) (enroll.Delivery, error) {
	return delivery(ctx, q, "d.enrollment_id = CAST($1 AS TEXT) AND d.enrollment_id <> '' AND d.recipient = $2", id, recipient)
}

// Begin implements enroll.Store.
func (d *DB) Begin(ctx context.Context, keyID, attempt string, life time.Duration) (bool, error) {
	mine := false
	err := d.write(ctx, func(ctx context.Context, tx *txn) error {
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		mine, err = begin(ctx, tx, keyID, attempt, now, life)
		return err
	})
	return err == nil && mine, err
}

// beginClaimed begins attempt, if there is one, for a delivery whose key the back end
// can make now. It notes in begun what of that is to be given up if the commit's answer is lost.
func beginClaimed(ctx context.Context, tx *txn, v *enroll.Delivery, attempt enroll.Attempt, now int64, begun *atomic.Pointer[enroll.Delivery]) (err error) {
	if attempt.Name == "" || v.Stage != enroll.Claimed || !v.Approved || v.Origin != enroll.FromBackend {
		return nil
	}
	if v.Begun, err = begin(ctx, tx, v.KeyID, attempt.Name, now, attempt.Life); v.Begun {
		v.Attempt = attempt.Name
		begun.Store(&enroll.Delivery{KeyID: v.KeyID, Attempt: v.Attempt, Begun: true})
	}
	return err
}

// begin gives the delivery of a key to attempt, unless another one has it.
func begin(ctx context.Context, tx *txn, keyID, attempt string, now int64, life time.Duration) (mine bool, err error) {
	const update = "UPDATE deliveries SET attempt = $2, attempt_until = $3 WHERE key_id = $1 AND stage = 'claimed' AND approved_at IS NOT NULL AND "
	until := now + life.Microseconds()
	n, err := exec(ctx, tx, update+"attempt_until IS NULL", keyID, attempt, until)
	if err != nil || n == 1 {
		return n == 1, err
	}
	// An attempt that would have the delivery for longer than any began before the clock was set back.
	latest := until + clockSlack.Microseconds()
	if _, err := exec(ctx, tx, traceAttempts+"key_id = $1 AND (attempt_until <= $2 OR attempt_until > $3)"+unlessTraced, keyID, now, latest); err != nil {
		return false, err
	}
	n, err = exec(ctx, tx, update+"(attempt_until <= $4 OR attempt_until > $5)", keyID, attempt, until, now, latest)
	return n == 1, err
}

// GiveUp implements enroll.Store.
func (d *DB) GiveUp(ctx context.Context, keyID, attempt string) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		_, err := exec(ctx, tx, "UPDATE deliveries SET attempt = '', attempt_until = NULL WHERE key_id = $1 AND attempt = $2 AND stage = 'claimed'", keyID, attempt)
		return err
	})
}

// StoreWrapped implements enroll.Store. The attempt fences off one that was slow.
func (d *DB) StoreWrapped(ctx context.Context, keyID, attempt string, public []byte, w enroll.Wrapped, fingerprint string, created, sealed audit.Event) (enroll.Delivery, error) {
	return d.step(ctx, keyID, func(ctx context.Context, tx *txn, now int64) error {
		scopes, err := query(ctx, tx, scanText, `UPDATE deliveries SET stage = 'sealed', alg = $4, wrapped = $5, digest = $6, fingerprint = $7, event_id = $8, attempt_until = NULL
			WHERE key_id = $1 AND attempt = $2 AND stage = 'claimed' AND attempt_until > $3 RETURNING scope`,
			keyID, attempt, now, w.Alg, w.Value, w.SHA256, fingerprint, sealed.ID)
		if err := one(int64(len(scopes)), err); err != nil {
			return err
		}
		return d.pend(ctx, tx, keyID, enroll.Scope(scopes[0]), now, public, created, sealed)
	})
}

// step takes a delivery a stage further in one transaction, and returns it as it is then.
func (d *DB) step(ctx context.Context, keyID string, do func(ctx context.Context, tx *txn, now int64) error) (v enroll.Delivery, err error) {
	err = d.write(ctx, func(ctx context.Context, tx *txn) error {
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		if err := do(ctx, tx, now); err != nil {
			return err
		}
		v, err = delivery(ctx, tx, "d.key_id = $1", keyID)
		return err
	})
	return v, err
}

// pend makes a delivery's reserved key a pending one. Somebody waits until the sinks
// have the events.
func (d *DB) pend(ctx context.Context, tx *txn, keyID string, scope enroll.Scope, now int64, public []byte, events ...audit.Event) error {
	if err := one(exec(ctx, tx, "UPDATE "+keyTable(scope)+" SET state = "+pending+", sealed = $3, created_at = $2 WHERE id = $1 AND state = "+reserved+" AND expires_at > $2",
		keyID, now, public)); err != nil {
		return err
	}
	tx.awaited = true
	return d.record(ctx, tx, events...)
}

// StoreOwn implements enroll.Store.
func (d *DB) StoreOwn(ctx context.Context, keyID string, public []byte, fingerprint string, created audit.Event) (enroll.Delivery, error) {
	return d.step(ctx, keyID, func(ctx context.Context, tx *txn, now int64) error {
		scopes, err := query(ctx, tx, scanText, `UPDATE deliveries SET stage = 'sealed', wrapped = $2, fingerprint = $3, event_id = $4
			WHERE key_id = $1 AND stage = 'claimed' AND origin = 'node' AND approved_at IS NOT NULL RETURNING scope`, keyID, []byte{}, fingerprint, created.ID)
		if err != nil || len(scopes) == 0 {
			return err
		}
		return d.pend(ctx, tx, keyID, enroll.Scope(scopes[0]), now, public, created)
	})
}

// Seal implements enroll.Store.
func (d *DB) Seal(ctx context.Context, keyID string, sealed audit.Event) (enroll.Delivery, error) {
	return d.step(ctx, keyID, func(ctx context.Context, tx *txn, _ int64) error {
		n, err := exec(ctx, tx, "UPDATE deliveries SET stage = 'sealed', event_id = $2 WHERE key_id = $1 AND stage = 'stored'", keyID, sealed.ID)
		if err != nil || n == 0 {
			return err
		}
		tx.awaited = true
		return d.record(ctx, tx, sealed)
	})
}

// Offer implements enroll.Store.
func (d *DB) Offer(ctx context.Context, keyID string, deliverFor time.Duration) (enroll.Delivery, error) {
	return d.step(ctx, keyID, func(ctx context.Context, tx *txn, now int64) error {
		offered, err := query(ctx, tx, func(scan func(...any) error) (v enroll.Delivery, err error) {
			err = scan(&v.Scope, &v.Origin, &v.Event)
			return v, err
		}, "UPDATE deliveries SET stage = 'available', until = $2 WHERE key_id = $1 AND stage = 'sealed' RETURNING scope, origin, event_id", keyID, now+deliverFor.Microseconds())
		if err != nil || len(offered) == 0 {
			return err
		}
		v := offered[0]
		if err := one(exec(ctx, tx, "UPDATE "+keyTable(v.Scope)+" SET state = "+released+", released_at = $2, expires_at = NULL WHERE id = $1 AND state = "+pending+" AND expires_at > $2", keyID, now)); err != nil || v.Origin == enroll.FromBackend {
			return err
		}
		// Its holder has it, and came from where the event of its making says.
		if _, err := exec(ctx, tx, "UPDATE deliveries SET stage = 'received', wrapped = NULL, received_at = $2 WHERE key_id = $1", keyID, now); err != nil {
			return err
		}
		_, err = exec(ctx, tx, "UPDATE "+keyTable(v.Scope)+" SET delivered_at = $2, delivery_event = $3 WHERE id = $1", keyID, now, v.Event)
		return err
	})
}

// Answered implements enroll.Store.
func (d *DB) Answered(ctx context.Context, keyID string, delivered audit.Event) (first bool, err error) {
	err = d.write(ctx, func(ctx context.Context, tx *txn) error {
		first = false
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		if _, err := exec(ctx, tx, "UPDATE deliveries SET answers = answers + 1 WHERE key_id = $1", keyID); err != nil {
			return err
		}
		for _, scope := range []enroll.Scope{enroll.ForNode, enroll.ForOrganization} {
			n, err := exec(ctx, tx, "UPDATE "+keyTable(scope)+" SET delivered_at = $2, delivery_event = $3 WHERE id = $1 AND delivered_at IS NULL AND released_at IS NOT NULL", keyID, now, delivered.ID)
			if err != nil {
				return err
			}
			first = first || n > 0
		}
		if !first {
			return nil
		}
		tx.unhurried = true // the receipt follows
		return d.record(ctx, tx, delivered)
	})
	if err != nil {
		return false, err
	}
	return first, nil
}

// Receive implements enroll.Store. A delivery that the sweeper found in use was received
// then, and keeps its deadline, which ended nothing; one that was signed for has none.
func (d *DB) Receive(ctx context.Context, keyID string, received func(int) audit.Event) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		answers, err := query(ctx, tx, scanInt, `UPDATE deliveries SET stage = 'received', wrapped = NULL, until = NULL, received_at = CASE WHEN stage = 'available' THEN $2 ELSE received_at END
			WHERE key_id = $1 AND (stage = 'available' OR stage = 'received' AND origin = 'backend' AND received_at = used_at AND until IS NOT NULL) RETURNING answers`, keyID, now)
		if err != nil {
			return err
		}
		if len(answers) == 0 {
			v, err := delivery(ctx, tx, "d.key_id = $1", keyID)
			switch {
			case err != nil:
				return err
			case v.Stage != enroll.Received:
				return enroll.ErrClosed
			}
			return enroll.ErrUnchanged
		}
		return d.record(ctx, tx, received(answers[0]))
	})
}

// Leaf implements enroll.Store.
func (d *DB) Leaf(ctx context.Context, keyID string) ([]byte, error) {
	var leaf []byte
	err := d.read.QueryRowContext(ctx, "SELECT coalesce(e.leaf, v.leaf) FROM deliveries v LEFT JOIN events e ON e.id = v.event_id WHERE v.key_id = $1", keyID).Scan(&leaf)
	if errors.Is(err, sql.ErrNoRows) || err == nil && leaf == nil {
		return nil, enroll.ErrNotFound
	}
	return slices.Clone(leaf), unavailable(err)
}
