package sqlstore

import (
	"context"
	"database/sql"
	"sync/atomic"
	"time"

	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// clockSlack is by how much the database's clock may be set back, as by a failover, before
// a pool key or an attempt seems to expire later than it can.
const clockSlack = time.Minute

// aheadAtMost is the latest expiry of a pool key, counted from now: a later one was altered.
const aheadAtMost = orgkey.MaxAge + clockSlack

// attemptAtMost is the latest end of an attempt, counted from now: ORGKEYS_RESERVATION_TTL
// is an hour at most.
const attemptAtMost = time.Hour + clockSlack

// takeAhead takes a pool key of a use in tx, or returns nil: it deletes the key's row.
// Of several takers at once each gets another key. An ID that is a key's
// already, in a database that was restored or altered, is not taken.
func (d *DB) takeAhead(ctx context.Context, tx *txn, use orgkey.Use, now int64) (*orgkey.Ahead, error) {
	taken, err := query(ctx, tx, func(scan func(...any) error) (a orgkey.Ahead, err error) {
		err = scan(&a.ID, &a.Use, &a.Sealed)
		return a, err
	}, `DELETE FROM pool_keys WHERE id = (SELECT p.id FROM pool_keys p WHERE p.use = $1 AND p.sealed IS NOT NULL AND p.expires_at > $2 AND p.expires_at <= $3
		AND NOT EXISTS (SELECT 1 FROM org_keys k WHERE k.id = p.id) AND NOT EXISTS (SELECT 1 FROM keys_of_nodes k WHERE k.id = p.id)
		ORDER BY p.expires_at, p.id LIMIT 1`+d.forUpdate(" SKIP LOCKED")+`) AND sealed IS NOT NULL RETURNING id, use, sealed`, string(use), now, now+aheadAtMost.Microseconds())
	if err != nil || len(taken) == 0 {
		return nil, err
	}
	return &taken[0], nil
}

// ReserveAhead implements keypool.Store.
func (d *DB) ReserveAhead(ctx context.Context, org org.ID, asked string, limit int, life time.Duration) (*orgkey.Ahead, error) {
	return d.reserve(ctx, org, asked, limit, life, true)
}

// BeginAhead implements keypool.Store.
func (d *DB) BeginAhead(ctx context.Context, keyID, attempt string, life time.Duration) (bool, *orgkey.Ahead, error) {
	type begun struct {
		mine  bool
		taken *orgkey.Ahead
	}
	var lost atomic.Pointer[orgkey.Ahead] // what may have been taken if the answer of the commit is lost
	b, err := outcome(ctx, d, func(ctx context.Context, tx *txn) (b begun, err error) {
		now, err := d.now(ctx, tx)
		if err != nil {
			return b, err
		}
		if b.mine, err = begin(ctx, tx, keyID, attempt, now, life); err != nil || !b.mine {
			return b, err
		}
		if b.taken, err = d.takeAhead(ctx, tx, orgkey.UseSealed, now); err != nil || b.taken == nil {
			return b, err
		}
		lost.Store(b.taken)
		return b, one(exec(ctx, tx, "UPDATE deliveries SET attempt = $3 WHERE key_id = $1 AND attempt = $2", keyID, attempt, b.taken.ID))
	})
	if err != nil {
		return false, lost.Load(), err
	}
	return b.mine, b.taken, nil
}

// AddAhead implements keypool.Store.
func (d *DB) AddAhead(ctx context.Context, use orgkey.Use, id string, limit int, life time.Duration) (bool, error) {
	return outcome(ctx, d, func(ctx context.Context, tx *txn) (bool, error) {
		if err := d.lock(ctx, tx, "pool rows"); err != nil {
			return false, err
		}
		now, err := d.now(ctx, tx)
		if err != nil {
			return false, err
		}
		n, err := query(ctx, tx, scanInt, "SELECT count(*) FROM pool_keys WHERE use = $1 AND expires_at > $2", string(use), now)
		if err != nil || n[0] >= limit {
			return false, err
		}
		_, err = exec(ctx, tx, "INSERT INTO pool_keys (id, use, expires_at) VALUES ($1, $2, $3)", id, string(use), now+life.Microseconds())
		return err == nil, err
	})
}

// FillAhead implements keypool.Store.
func (d *DB) FillAhead(ctx context.Context, id string, sealed []byte, life time.Duration) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		return one(exec(ctx, tx, "UPDATE pool_keys SET sealed = $3, expires_at = $4 WHERE id = $1 AND sealed IS NULL AND expires_at > $2", id, now, sealed, now+life.Microseconds()))
	})
}

// RemoveAhead implements keypool.Store.
func (d *DB) RemoveAhead(ctx context.Context, id string) (bool, error) {
	return outcome(ctx, d, func(ctx context.Context, tx *txn) (bool, error) {
		n, err := exec(ctx, tx, "DELETE FROM pool_keys WHERE id = $1", id)
		return n == 1, err
	})
}

// Ahead implements keypool.Store.
func (d *DB) Ahead(ctx context.Context) ([]orgkey.Ahead, error) {
	return query(ctx, d.read, func(scan func(...any) error) (a orgkey.Ahead, err error) {
		err = scan(&a.ID, &a.Use, &a.Sealed, &a.Expired)
		return a, err
	}, "SELECT id, use, sealed, expires_at <= "+d.present()+" OR expires_at > "+d.present()+" + $1 FROM pool_keys ORDER BY expires_at, id", aheadAtMost.Microseconds())
}

// Credentials implements keypool.Store.
func (d *DB) Credentials(ctx context.Context) ([]string, error) {
	if !d.postgres {
		return nil, nil
	}
	return query(ctx, d.read, func(scan func(...any) error) (string, error) {
		var mark sql.NullString
		err := scan(&mark)
		return mark.String, err
	}, liveReplicas("credentials", 1), replicaLife.Microseconds())
}
