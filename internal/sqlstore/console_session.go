package sqlstore

import (
	"context"
	"time"

	"github.com/orgkeys/orgkeys/internal/session"
)

var _ session.Store = (*DB)(nil)

// KeepSession implements session.Store.
func (d *DB) KeepSession(ctx context.Context, s session.Stored, most int) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		if err := d.lock(ctx, tx, "session:"+s.Holder); err != nil {
			return err
		}
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		if _, err := exec(ctx, tx, "DELETE FROM console_sessions WHERE expires_at <= $1", now); err != nil {
			return err
		}
		if _, err := exec(ctx, tx, "INSERT INTO console_sessions (id, holder, sealed, created_at, expires_at) VALUES ($1, $2, $3, $4, $5)", s.ID, s.Holder, s.Sealed, now, s.Expires.UnixMicro()); err != nil {
			return err
		}
		_, err = exec(ctx, tx, `DELETE FROM console_sessions WHERE holder = $1 AND id <> $2 AND id NOT IN (
			SELECT id FROM console_sessions WHERE holder = $1 AND id <> $2 ORDER BY created_at DESC, id LIMIT $3)`, s.Holder, s.ID, most-1)
		return err
	})
}

// Session implements session.Store.
func (d *DB) Session(ctx context.Context, id string) (session.Stored, bool, error) {
	found, err := query(ctx, d.read, func(scan func(...any) error) (s session.Stored, err error) {
		var expires int64
		err = scan(&s.ID, &s.Holder, &s.Sealed, &expires)
		s.Expires = time.UnixMicro(expires)
		return s, err
	}, "SELECT id, holder, sealed, expires_at FROM console_sessions WHERE id = $1 AND expires_at > "+d.present(), id)
	if err != nil || len(found) == 0 {
		return session.Stored{}, false, err
	}
	return found[0], true, nil
}

// DropSession implements session.Store.
func (d *DB) DropSession(ctx context.Context, id string) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		_, err := exec(ctx, tx, "DELETE FROM console_sessions WHERE id = $1", id)
		return err
	})
}
