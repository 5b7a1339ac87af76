package sqlstore

import (
	"context"
	"errors"
	"fmt"
)

// QuickVacuum is how large a SQLite database may be that is vacuumed beside a server: its
// writes wait meanwhile, and give up after five seconds.
const QuickVacuum = 256 << 20

// Space is what a database takes.
type Space struct {
	Size int64 // bytes
	Free int64 // of these, not in use
	// Kept: what is free was not given back to the file system.
	Kept bool
}

// Shrink gives what is free in SQLite's file back to the file system, unless too much is in use to do
// that beside a server; with force, whatever it takes. PostgreSQL does that itself
// on VACUUM FULL only, which locks the tables: it is left to its administrator.
func (d *DB) Shrink(ctx context.Context, force bool) (s Space, err error) {
	// Rows that nobody can ask for any more. Numbers are given in the order of recording.
	err = d.write(ctx, func(ctx context.Context, tx *txn) error {
		_, err := exec(ctx, tx, "DELETE FROM event_reads WHERE seq < (SELECT coalesce(min(seq), 0) FROM events)")
		return err
	})
	if err != nil {
		return s, err
	}
	if d.postgres {
		err := d.read.QueryRowContext(ctx, "SELECT pg_database_size(current_database())").Scan(&s.Size)
		s.Kept = true
		return s, unavailable(err)
	}
	conn, err := d.writer.db.Conn(ctx)
	if err != nil {
		return s, unavailable(err)
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	pragma := func(name string) (n int64, err error) {
		return n, conn.QueryRowContext(ctx, "PRAGMA "+name).Scan(&n)
	}
	measure := func() error {
		page, err := pragma("page_size")
		all, allErr := pragma("page_count")
		free, freeErr := pragma("freelist_count")
		s.Size, s.Free = all*page, free*page
		return unavailable(errors.Join(err, allErr, freeErr))
	}
	if err := measure(); err != nil || s.Free == 0 {
		return s, err
	}
	if s.Size-s.Free > QuickVacuum && !force {
		s.Kept = true
		return s, nil
	}
	// What VACUUM writes aside may be large.
	for _, statement := range []string{"PRAGMA temp_store = FILE", "VACUUM", "PRAGMA temp_store = MEMORY"} {
		if _, err := conn.ExecContext(ctx, statement); err != nil {
			return s, unavailable(fmt.Errorf("vacuuming the database: %w", err))
		}
	}
	// Until the write-ahead log is in the file, that keeps its size. While somebody reads, the
	// server's next checkpoint does it.
	if _, err := conn.ExecContext(ctx, "PRAGMA wal_checkpoint(TRUNCATE)"); err != nil {
		return s, unavailable(err)
	}
	return s, measure()
}
