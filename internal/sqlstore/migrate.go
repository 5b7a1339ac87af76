package sqlstore

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/google/uuid"
	"github.com/pressly/goose/v3"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
)

//go:embed migrations
var migrations embed.FS

// Migrate brings the schema up to date. It goes forward only, and several
// replicas may call it at once.
func (d *DB) Migrate(ctx context.Context) error {
	provider, err := d.provider()
	if err != nil {
		return err
	}
	// A start need not wait for its turn to migrate to find that it is done. In doubt it does.
	if done, err := d.migrated(ctx, provider); err != nil || !done {
		if err := d.migrateAlone(ctx, provider); err != nil {
			return fmt.Errorf("migrating the database: %w", unavailable(err))
		}
	}
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		empty, err := tlog.TreeHash(0, nil)
		if err != nil {
			return err
		}
		_, err = exec(ctx, tx, "INSERT INTO log_head (one, origin, size, root) VALUES (1, $1, 0, $2) ON CONFLICT DO NOTHING",
			"orgkeys/"+uuid.NewString(), empty[:])
		return err
	})
}

// A migration whose commit waits for a standby would wait for as long as that is
// away: it is given up after standbyPatience, and the next start goes on.
const (
	standbyPatience = 15 * time.Second
	standbyLook     = time.Second // between two looks
)

// migrate applies what is missing.
func (d *DB) migrate(ctx context.Context, provider *goose.Provider) error {
	if d.postgres {
		// A standby that is already unreachable is reported at once.
		if err := d.acknowledges(ctx); err != nil {
			return err
		}
	}
	ctx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	if d.postgres {
		go d.watchCommits(ctx, giveUp)
	}
	_, err := provider.Up(ctx)
	if cause := context.Cause(ctx); err != nil && errors.Is(cause, errCommitWait) {
		err = errors.Join(cause, err)
	}
	return err
}

// watchCommits calls giveUp when a commit of this program's role has waited for a
// standby for standbyPatience.
func (d *DB) watchCommits(ctx context.Context, giveUp context.CancelCauseFunc) {
	ticker := time.NewTicker(standbyLook)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		waiting, err := query(ctx, d.read, scanInt, `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND usename = current_user
			AND wait_event = 'SyncRep' AND state_change < clock_timestamp() - $1 * interval '1 second'`, standbyPatience.Seconds())
		if err == nil && waiting[0] > 0 {
			giveUp(fmt.Errorf("%w%s", errCommitWait, d.awaitedStandbys()))
			return
		}
	}
}

// migrated reports whether the newest migration is there already. It changes
// nothing: goose would make its table to find out.
func (d *DB) migrated(ctx context.Context, provider *goose.Provider) (bool, error) {
	table := "SELECT count(*) FROM sqlite_master WHERE name = 'goose_db_version'"
	if d.postgres {
		table = "SELECT count(to_regclass('goose_db_version'))"
	}
	tables, err := query(ctx, d.read, scanInt, table)
	if err != nil || tables[0] == 0 {
		return false, err
	}
	sources := provider.ListSources()
	newest := sources[len(sources)-1].Version
	applied, err := query(ctx, d.read, scanInt, "SELECT count(*) FROM goose_db_version WHERE version_id = $1 AND is_applied", newest)
	return err == nil && applied[0] > 0, err
}

const (
	migrateRetry = 250 * time.Millisecond // before a replica that finds another migrating looks again
	migrateIdle  = 30 * time.Second       // how long one that migrates may be silent
)

// migrateAlone migrates unless another replica does, and else waits until it has,
// or has died. The lock belongs to a transaction and not to a session, so it
// holds behind a pooler and is never left over.
func (d *DB) migrateAlone(ctx context.Context, provider *goose.Provider) error {
	for {
		mine, err := d.exclusive(ctx, "migrate", migrateIdle, func(ctx context.Context) error { return d.migrate(ctx, provider) })
		if err != nil || mine {
			return err
		}
		select {
		case <-time.After(migrateRetry):
		case <-ctx.Done():
			return ctx.Err()
		}
		if done, err := d.migrated(ctx, provider); err != nil || done {
			return err
		}
	}
}

func (d *DB) provider() (*goose.Provider, error) {
	if d.postgres {
		return newProvider(goose.DialectPostgres, d.read.DB, "migrations/postgres")
	}
	return newProvider(goose.DialectSQLite3, d.writer.db, "migrations/sqlite")
}

func newProvider(dialect goose.Dialect, db *sql.DB, dir string) (*goose.Provider, error) {
	files, err := fs.Sub(migrations, dir)
	if err != nil {
		return nil, err
	}
	return goose.NewProvider(dialect, db, files)
}

// ErrNotMigrated: the database has no schema yet, or an older one.
var ErrNotMigrated = errors.New("the database is not migrated: run orgkeys migrate")

// CheckMigrated reports ErrNotMigrated if a migration is missing. A newer
// schema is fine: migrations keep the previous version of the program working.
func (d *DB) CheckMigrated(ctx context.Context) error {
	provider, err := d.provider()
	if err != nil {
		return err
	}
	done, err := d.migrated(ctx, provider)
	if err == nil && !done {
		err = ErrNotMigrated
	}
	return err
}

var _ audit.Store = (*DB)(nil)
