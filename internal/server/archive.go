package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/bucket"
	"github.com/orgkeys/orgkeys/internal/audit/tiles"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/durable"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// OpenTiles returns the store at a place: a directory, or a bucket.
func OpenTiles(cfg config.Config, place string) (tiles.Store, error) {
	if bucket.IsPlace(place) {
		return bucket.New(bucket.Config{
			Endpoint: cfg.S3Endpoint, Region: cfg.S3Region, CAFile: cfg.S3CAFile, AccessKey: cfg.S3AccessKey, SecretKey: cfg.S3SecretKey, Place: place,
		})
	}
	dir, err := filepath.Abs(place)
	return tiles.NewDir(dir), err
}

// useArchive lets db read what was moved out of it.
func useArchive(cfg config.Config, db *sqlstore.DB) error {
	if cfg.AuditArchive == "" {
		return nil
	}
	store, err := OpenTiles(cfg, cfg.AuditArchive)
	if err == nil {
		db.UseArchive(tiles.Archive{Store: store})
	}
	return err
}

// ErrNoArchive: the settings do not say where to.
var ErrNoArchive = errors.New("set ORGKEYS_AUDIT_ARCHIVE to the place of the archive, for this command, for the server and for all other commands")

// Before is where the archive was before, if it is to be taken over from there.
type Before struct {
	Place string     // empty: nowhere
	Keys  audit.Keys // for what retention removed there after the log was set back
}

// ArchiveLog moves old events out of the database, as m says, beside a running server or
// without one.
func ArchiveLog(ctx context.Context, cfg config.Config, db *sqlstore.DB, m tiles.Move, before Before, log *slog.Logger) (done tiles.Moved, err error) {
	if cfg.AuditArchive == "" {
		return done, ErrNoArchive
	}
	store, err := OpenTiles(cfg, cfg.AuditArchive)
	if err != nil {
		return done, err
	}
	if err := OpenToRecord(ctx, cfg, db, log); err != nil {
		return done, err
	}
	m.Keep = cfg.AuditRetention
	m.Signed = func(ctx context.Context, covered func(context.Context) (bool, error)) error {
		return signed(ctx, cfg, db, covered, log)
	}
	// The store of another kind than a directory has no lock.
	unlock, err := durable.Lock(ctx, filepath.Join(cfg.DataDir, "archive.lock"))
	if err != nil {
		return done, err
	}
	a := tiles.Archive{Store: store}
	if before.Place != "" {
		err = takeOver(ctx, cfg, db, m, before, a)
		db.UseArchive(a)
	}
	if err == nil {
		err = exclusively(ctx, db, func(ctx context.Context) (err error) {
			done, err = m.Run(ctx, a, db)
			return err
		})
	}
	if errors.Is(err, tiles.ErrRewritten) {
		err = fmt.Errorf("%w. For the archive: set ORGKEYS_AUDIT_ARCHIVE to an empty place, and give this one once with --from %s", err, a)
	}
	return done, errors.Join(err, unlock())
}

// takeOver has an archive hold what is in the one before.
func takeOver(ctx context.Context, cfg config.Config, db *sqlstore.DB, m tiles.Move, before Before, to tiles.Archive) error {
	store, err := OpenTiles(cfg, before.Place)
	if err != nil {
		return err
	}
	from := tiles.Archive{Store: store}
	db.UseArchive(from)
	return exclusively(ctx, db, func(ctx context.Context) error {
		_, err := m.Explain(ctx, from, db, before.Keys)
		if errors.Is(err, tiles.ErrEntriesGone) {
			err = fmt.Errorf("%w; if retention removed them after the backup was made, the log in %s says so: give the log's verifier key, which was kept elsewhere, with --key. Otherwise bring them back from a copy of the archive", err, from)
		}
		if err == nil {
			_, err = tiles.Transfer(ctx, from, to, db, m.Progress)
		}
		return err
	})
}

func exclusively(ctx context.Context, db *sqlstore.DB, do func(context.Context) error) error {
	mine, err := db.Exclusive(ctx, "archive run", do)
	if err == nil && !mine {
		err = errors.New("another process moves the log to the archive: try again when it has ended")
	}
	return err
}

// signedPoll is how often it is looked whether the server has signed.
const signedPoll = 250 * time.Millisecond

// signed waits until the running server has signed what was recorded. If none
// runs, it does for a moment what a server would.
func signed(ctx context.Context, cfg config.Config, db *sqlstore.DB, covered func(context.Context) (bool, error), log *slog.Logger) error {
	replicas, err := db.Replicas(ctx)
	if err != nil {
		return err
	}
	wait := 2*cfg.CheckpointInterval + 2*flushTimeout
	if len(replicas) == 0 {
		err := completeLog(ctx, cfg, log)
		if err == nil {
			wait = 0
		} else if !errors.Is(err, errLocked) {
			return err
		}
	}
	for waited := time.Now(); ; {
		done, err := covered(ctx)
		if err != nil || done {
			return err
		}
		if time.Since(waited) >= wait {
			return tiles.ErrNotCovered
		}
		select {
		case <-time.After(signedPoll):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// completeLog gives recorded events their indices, feeds the sinks and signs a checkpoint,
// while no server runs.
func completeLog(ctx context.Context, cfg config.Config, log *slog.Logger) (err error) {
	o, err := openStopped(ctx, cfg, backend.sinks, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, o.close()) }()
	if err := openEventKey(ctx, o.backend.sealer, o.db); err != nil {
		return err
	}
	p, err := openPolicy(ctx, cfg, log)
	if err != nil {
		return err
	}
	auditLog := audit.NewLog(o.db, log, o.sinks...)
	c, err := openCheckpoints(ctx, cfg, o.db, auditLog, o.backend, p, log)
	if err != nil {
		return err
	}
	following := follow(ctx, auditLog, c, log)
	defer following.end()
	// A sink may lack more than it can be given in this time: it gets that at the next start.
	flushing, cancel := context.WithTimeout(ctx, flushTimeout)
	defer cancel()
	if err := auditLog.Flush(flushing); err != nil && flushing.Err() == nil {
		return err
	}
	return c.Sign(ctx)
}
