package sqlstore

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"sync/atomic"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// Claim implements enroll.Store. Claims of one enrollment come one at a time.
func (d *DB) Claim(ctx context.Context, id string, r enroll.Recipient, from string, deliverFor time.Duration, attempt enroll.Attempt, claimed func(string) audit.Event, conflict audit.Event) (enroll.Delivery, error) {
	var v enroll.Delivery
	var lost atomic.Pointer[enroll.Delivery] // what attempt may have if the answer of the commit is lost
	refused := false
	err := d.write(ctx, func(ctx context.Context, tx *txn) error {
		refused = false
		if err := d.lock(ctx, tx, "enrollment:"+id); err != nil {
			return err
		}
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		e, err := enrollment(ctx, tx, id)
		if err != nil {
			return err
		}
		v, err = deliveryTo(ctx, tx, id, r.ID)
		switch {
		case err == nil && (v.Stage == enroll.Received && v.Origin == enroll.FromBackend || v.Stage == enroll.Ended):
			return enroll.ErrClosed
		case err == nil:
			return beginClaimed(ctx, tx, &v, attempt, now, &lost)
		case !errors.Is(err, enroll.ErrNotFound):
			return err
		case !e.Revoked.IsZero() || e.Expires.UnixMicro() <= now:
			return enroll.ErrClosed
		}
		key, err := openPlace(ctx, tx, e, now)
		if err != nil {
			return err
		}
		again, err := secondKey(ctx, tx, id, r.Device)
		if err != nil {
			return err
		}
		if key == "" || again || e.Recipient != "" && e.Recipient != r.ID {
			refused = true
			return d.conflict(ctx, tx, id, r.ID, conflict)
		}
		if err := d.checkUnused(ctx, tx, r); err != nil {
			return err
		}
		if err := claim(ctx, tx, e, key, r, from, now, deliverFor); err != nil {
			return insteadOfGone(err, enroll.ErrClosed) // its place ended meanwhile, and with it the enrollment
		}
		if v, err = delivery(ctx, tx, "d.key_id = $1", key); err != nil {
			return err
		}
		tx.unhurried = true // the key's own events follow: one batch for the sinks in place of two
		if err := d.record(ctx, tx, claimed(key)); err != nil {
			return err
		}
		return beginClaimed(ctx, tx, &v, attempt, now, &lost)
	})
	switch began := lost.Load(); {
	case err == nil && refused:
		return enroll.Delivery{}, enroll.ErrClaimed
	case err != nil && began != nil:
		return *began, err
	case err != nil:
		return enroll.Delivery{}, err
	}
	return v, nil
}

// openPlace returns the key of an unclaimed use, or nothing.
func openPlace(ctx context.Context, tx *txn, e enroll.Enrollment, now int64) (string, error) {
	found, err := query(ctx, tx, scanText, "SELECT d.key_id FROM deliveries d JOIN "+keyTable(e.Scope)+` k ON k.id = d.key_id
		WHERE d.enrollment_id = $1 AND d.stage = 'open' AND k.state = `+reserved+` AND k.expires_at > $2 ORDER BY k.slot LIMIT 1`, e.ID, now)
	if err != nil || len(found) == 0 {
		return "", err
	}
	return found[0], nil
}

// claim gives key's delivery to the recipient. One that needs no approval keeps
// its place from now on until it could have been received.
func claim(ctx context.Context, tx *txn, e enroll.Enrollment, key string, r enroll.Recipient, from string, now int64, deliverFor time.Duration) error {
	until, approved := e.Expires.UnixMicro(), sql.NullInt64{}
	if !e.Approval {
		until, approved = now+deliverFor.Microseconds(), sql.NullInt64{Int64: now, Valid: true}
	}
	if err := one(exec(ctx, tx, `UPDATE deliveries SET stage = 'claimed', recipient = $2, recipient_key = $3, claimed_from = $4, claimed_at = $5, approved_at = $6, until = $7, ek = $8, evidence = $9
		WHERE key_id = $1 AND stage = 'open'`, key, r.ID, r.DER, from, now, approved, until, r.Device.EK, string(r.Device.Evidence))); err != nil {
		return err
	}
	return one(exec(ctx, tx, "UPDATE "+keyTable(e.Scope)+" SET expires_at = $2 WHERE id = $1 AND state = "+reserved, key, until))
}

// secondKey reports whether a TPM has a use of the enrollment already: a token
// for several machines gives one of them no more than one key.
func secondKey(ctx context.Context, tx *txn, id string, device enroll.Device) (bool, error) {
	if device.EK == "" {
		return false, nil
	}
	found, err := query(ctx, tx, scanInt, "SELECT count(*) FROM deliveries WHERE enrollment_id = $1 AND ek = $2", id, device.EK)
	return err == nil && found[0] > 0, err
}

// checkUnused reports enroll.ErrInUse if a key that its holder made is a live one
// already, or on its way to be one: deleting a key would not end it, and one line
// that it signed would speak for two organizations.
func (d *DB) checkUnused(ctx context.Context, tx *txn, r enroll.Recipient) error {
	if r.Origin != enroll.FromNode {
		return nil
	}
	if err := d.lock(ctx, tx, "key:"+r.ID); err != nil {
		return err
	}
	all, err := query(ctx, tx, scanDelivery, deliveryColumns+" WHERE d.recipient = $1 AND d.origin = 'node' OR d.fingerprint = $2 AND d.fingerprint <> ''",
		r.ID, orgkey.NewPublic(r.Public).Fingerprint())
	if err != nil {
		return err
	}
	for _, v := range all {
		if v.Stage != enroll.Ended {
			return enroll.ErrInUse
		}
	}
	return nil
}

// Conflict implements enroll.Store.
func (d *DB) Conflict(ctx context.Context, id, recipient string, event audit.Event) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		if err := d.lock(ctx, tx, "enrollment:"+id); err != nil {
			return err
		}
		return d.conflict(ctx, tx, id, recipient, event)
	})
}

// conflict counts a recipient that wanted what another has. The first ones leave
// an event, once each.
func (d *DB) conflict(ctx context.Context, tx *txn, id, recipient string, event audit.Event) error {
	if _, err := exec(ctx, tx, "UPDATE enrollments SET conflicts = conflicts + 1 WHERE id = $1", id); err != nil {
		return err
	}
	n, err := exec(ctx, tx, `INSERT INTO enrollment_conflicts (enrollment_id, recipient) SELECT $1, $2
		WHERE (SELECT count(*) FROM enrollment_conflicts WHERE enrollment_id = $1) < $3 ON CONFLICT DO NOTHING`, id, recipient, enroll.MaxConflicts)
	if err != nil || n == 0 {
		return err
	}
	return d.record(ctx, tx, event)
}

// ClaimOwn implements enroll.Store.
func (d *DB) ClaimOwn(ctx context.Context, org org.ID, keyID string, r enroll.Recipient, limit int, deliverFor time.Duration) (enroll.Delivery, error) {
	var v enroll.Delivery
	err := d.write(ctx, func(ctx context.Context, tx *txn) error {
		if err := d.lock(ctx, tx, "org:"+string(org)); err != nil {
			return err
		}
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		if v, err = ownKey(ctx, tx, org, r); err == nil {
			return nil
		}
		if !errors.Is(err, enroll.ErrNotFound) {
			return err
		}
		v, err = delivery(ctx, tx, "d.org_id = $1 AND d.recipient = $2 AND d.enrollment_id = '' AND d.stage NOT IN ('received', 'ended')", org, r.ID)
		if err == nil && v.Stage != enroll.Ended {
			return nil
		}
		if err == nil { // its key was deleted
			_, err = exec(ctx, tx, endDelivery, v.KeyID)
		}
		if err != nil && !errors.Is(err, enroll.ErrNotFound) {
			return err
		}
		if err := d.checkUnused(ctx, tx, r); err != nil {
			return err
		}
		if err := d.placeOwn(ctx, tx, org, keyID, r, limit, now, now+deliverFor.Microseconds()); err != nil {
			return err
		}
		v, err = delivery(ctx, tx, "d.key_id = $1", keyID)
		return err
	})
	return v, err
}

// ownKey returns what became of a key that its holder, an administrator, added.
func ownKey(ctx context.Context, tx *txn, org org.ID, r enroll.Recipient) (enroll.Delivery, error) {
	if r.Origin != enroll.FromNode {
		return enroll.Delivery{}, enroll.ErrNotFound
	}
	all, err := query(ctx, tx, scanDelivery, deliveryColumns+" WHERE d.org_id = $1 AND d.recipient = $2 AND d.enrollment_id = '' AND d.origin = 'node'", org, r.ID)
	if err != nil {
		return enroll.Delivery{}, err
	}
	for _, v := range all {
		if v.Stage != enroll.Ended {
			return v, nil
		}
	}
	return enroll.Delivery{}, enroll.ErrNotFound
}

// GiveBackOwn implements enroll.Store. An attempt whose life is over counts, until it is
// given up: what it stored last may still be on its way.
func (d *DB) GiveBackOwn(ctx context.Context, org org.ID, keyID string, refused audit.Event) (given bool, err error) {
	err = d.write(ctx, func(ctx context.Context, tx *txn) error {
		given = false
		if err := d.lock(ctx, tx, "org:"+string(org)); err != nil {
			return err
		}
		n, err := exec(ctx, tx, "DELETE FROM deliveries WHERE key_id = $1 AND org_id = $2 AND enrollment_id = '' AND stage = 'claimed' AND attempt_until IS NULL", keyID, org)
		if err != nil || n == 0 {
			return err
		}
		if _, err := exec(ctx, tx, "DELETE FROM org_keys WHERE id = $1 AND state = "+reserved, keyID); err != nil {
			return err
		}
		given = true
		return d.record(ctx, tx, refused)
	})
	return err == nil && given, err
}

// endDelivery ends delivery $1 and keeps nothing of the wrapped key.
const endDelivery = "UPDATE deliveries SET stage = 'ended', wrapped = NULL WHERE key_id = $1 AND stage NOT IN ('received', 'ended')"

func (d *DB) placeOwn(ctx context.Context, tx *txn, org org.ID, keyID string, r enroll.Recipient, limit int, now, until int64) error {
	if err := d.sweepOrg(ctx, tx, org, now); err != nil {
		return err
	}
	slots, err := freeSlots(ctx, tx, "org_keys", org, 1, limit)
	if err != nil {
		return err
	}
	if _, err := exec(ctx, tx, "INSERT INTO org_keys (id, org_id, slot, state, expires_at) VALUES ($1, $2, $3, 'reserved', $4)",
		keyID, org, slots[0], until); err != nil {
		return err
	}
	_, err = exec(ctx, tx, `INSERT INTO deliveries (key_id, org_id, enrollment_id, scope, stage, recipient, recipient_key, claimed_at, approved_at, until, origin)
		VALUES ($1, $2, '', 'organization', 'claimed', $3, $4, $5, $5, $6, $7)`, keyID, org, r.ID, r.DER, now, until, string(cmp.Or(r.Origin, enroll.FromBackend)))
	return err
}

// Approve implements enroll.Store.
func (d *DB) Approve(ctx context.Context, org org.ID, id, recipient string, deliverFor time.Duration, event audit.Event) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		if err := d.lock(ctx, tx, "enrollment:"+id); err != nil {
			return err
		}
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		v, err := delivery(ctx, tx, "d.org_id = $1 AND d.enrollment_id = $2 AND d.recipient = $3", org, id, recipient)
		if err != nil {
			return err
		}
		if v.Stage == enroll.Ended {
			return enroll.ErrNotFound
		}
		if v.Approved {
			return enroll.ErrUnchanged
		}
		until := now + deliverFor.Microseconds()
		if err := one(exec(ctx, tx, "UPDATE deliveries SET approved_at = $2, until = $3 WHERE key_id = $1 AND approved_at IS NULL", v.KeyID, now, until)); err != nil {
			return insteadOfGone(err, enroll.ErrNotFound)
		}
		if err := one(exec(ctx, tx, "UPDATE "+keyTable(v.Scope)+" SET expires_at = $2 WHERE id = $1 AND state = "+reserved, v.KeyID, until)); err != nil {
			return insteadOfGone(err, enroll.ErrNotFound)
		}
		return d.record(ctx, tx, event)
	})
}

// insteadOfGone is what somebody else has just ended to whoever comes next.
func insteadOfGone(err, next error) error {
	if errors.Is(err, orgkey.ErrGone) {
		return next
	}
	return err
}
