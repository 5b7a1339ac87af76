package sqlstore

import (
	"context"
	"database/sql"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/org"
)

// AllowDevice implements enroll.Store.
func (d *DB) AllowDevice(ctx context.Context, org org.ID, ek, note string, limit int, event audit.Event) (enroll.AllowedDevice, error) {
	none := enroll.AllowedDevice{}
	return outcome(ctx, d, func(ctx context.Context, tx *txn) (enroll.AllowedDevice, error) {
		if err := d.lock(ctx, tx, "devices:"+string(org)); err != nil {
			return none, err
		}
		now, err := d.now(ctx, tx)
		if err != nil {
			return none, err
		}
		others, err := query(ctx, tx, scanInt, "SELECT count(*) FROM devices WHERE org_id = $1 AND ek <> $2", org, ek)
		if err != nil {
			return none, err
		}
		if others[0] >= limit {
			return none, enroll.ErrTooManyDevices
		}
		created, err := query(ctx, tx, scanMicros, `INSERT INTO devices (org_id, ek, note, created_at) VALUES ($1, $2, $3, $4)
			ON CONFLICT (org_id, ek) DO UPDATE SET note = excluded.note RETURNING created_at`, org, ek, note, now)
		if err != nil {
			return none, err
		}
		return enroll.AllowedDevice{EK: ek, Note: note, Created: micros(created[0])}, d.record(ctx, tx, event)
	})
}

func scanMicros(scan func(...any) error) (at sql.NullInt64, err error) {
	err = scan(&at)
	return at, err
}

// Devices implements enroll.Store.
func (d *DB) Devices(ctx context.Context, org org.ID) ([]enroll.AllowedDevice, error) {
	return d.devices(ctx, "org_id = $1 ORDER BY created_at DESC, ek", org)
}

// Device implements enroll.Store.
func (d *DB) Device(ctx context.Context, org org.ID, ek string) (enroll.AllowedDevice, error) {
	found, err := d.devices(ctx, "org_id = $1 AND ek = $2", org, ek)
	if err == nil && len(found) == 0 {
		err = enroll.ErrDeviceNotFound
	}
	if err != nil {
		return enroll.AllowedDevice{}, err
	}
	return found[0], nil
}

func (d *DB) devices(ctx context.Context, where string, args ...any) ([]enroll.AllowedDevice, error) {
	return query(ctx, d.read, func(scan func(...any) error) (v enroll.AllowedDevice, err error) {
		var created sql.NullInt64
		err = scan(&v.EK, &v.Note, &created)
		v.Created = micros(created)
		return v, err
	}, "SELECT ek, note, created_at FROM devices WHERE "+where, args...)
}

// RemoveDevice implements enroll.Store.
func (d *DB) RemoveDevice(ctx context.Context, org org.ID, ek string, event audit.Event) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		n, err := exec(ctx, tx, "DELETE FROM devices WHERE org_id = $1 AND ek = $2", org, ek)
		if err != nil {
			return err
		}
		if n == 0 {
			return enroll.ErrDeviceNotFound
		}
		return d.record(ctx, tx, event)
	})
}
