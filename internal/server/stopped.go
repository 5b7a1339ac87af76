package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strconv"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/rollback"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/internal/vault"
)

// stopped is what a command works with in the place of a server.
type stopped struct {
	dir     *DataDir
	db      *sqlstore.DB
	backend backend
	sinks   []audit.Sink

	closers closers
}

func (o *stopped) close() error { return o.closers.close() }

// openStopped opens the parts that the log needs, and its sinks, in a data directory that no
// server uses meanwhile.
func openStopped(ctx context.Context, cfg config.Config, sinks func(backend, config.Config) ([]audit.Sink, error), log *slog.Logger) (_ *stopped, err error) {
	o := &stopped{}
	defer func() {
		if err != nil {
			err = errors.Join(err, o.close())
		}
	}()
	if err := isThere(cfg); err != nil { // before a directory is made
		return nil, err
	}
	if o.dir, err = OpenDataDir(cfg.DataDir); err != nil {
		return nil, err
	}
	o.closers.add(o.dir.Close)
	if o.db, err = OpenLog(ctx, cfg); err != nil {
		return nil, err
	}
	o.closers.add(o.db.Close)
	if o.backend, err = openBackend(ctx, cfg, o.dir.path, o.db, log); err != nil {
		return nil, err
	}
	o.closers.add(o.backend.close)
	o.sinks, err = sinks(o.backend, cfg)
	return o, err
}

// AcceptRollback accepts a rollback of the log, in the log and in every sink of the
// settings, and prints what it did. No server may be running.
func AcceptRollback(ctx context.Context, cfg config.Config, request rollback.Request, out io.Writer, log *slog.Logger) (err error) {
	sinks := backend.sinks
	if request.DryRun {
		sinks = backend.askedSinks
	}
	o, err := openStopped(ctx, cfg, sinks, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, o.close()) }()
	openKey := openEventKey
	if request.DryRun {
		openKey = openEventKeyIfAny
	}
	if err := openKey(ctx, o.backend.sealer, o.db); err != nil {
		return err
	}
	if err := o.db.CheckArchived(ctx); err != nil {
		return err
	}
	request.Sinks = o.sinks
	if request.Holder, err = o.dir.holder(); err != nil {
		return err
	}
	if slices.Contains(cfg.AuditSinks, config.SinkFile) {
		request.SinkFile = cfg.AuditFile
	}
	return rollback.Accept(ctx, o.db, request, out)
}

// dryStore discards resealed values instead of storing them.
type dryStore struct{ vault.SealedStore }

// Reseal implements vault.SealedStore.
func (dryStore) Reseal(_ context.Context, old []orgkey.Sealed, _ [][]byte) (int, error) {
	return len(old), nil
}

// dryWriter says before each line that it is of a dry run.
type dryWriter struct{ io.Writer }

func (w dryWriter) Write(line []byte) (int, error) {
	_, err := fmt.Fprintf(w.Writer, "dry run, nothing is stored: %s", line)
	return len(line), err
}

// Rewrap reseals everything that Vault has sealed under the sealing key's newest
// version, reports its progress, and records an event. A dry run lets Vault reseal
// everything and stores nothing.
func Rewrap(ctx context.Context, cfg config.Config, dryRun bool, progress io.Writer, log *slog.Logger) (err error) {
	if err := HideMemory(); err != nil {
		return fmt.Errorf("keeping memory private: %w", err)
	}
	db, err := OpenLog(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	starting, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	client, err := openVaultClient(starting, cfg, db, log)
	if err != nil {
		return err
	}
	defer client.Close()
	sealer := client.Sealer()
	if dryRun {
		done, err := sealer.RewrapAll(ctx, dryStore{db}, 0, dryWriter{progress})
		return errors.Join(err, done.Err())
	}
	done, err := sealer.RewrapAll(ctx, db, max(cfg.ReservationTTL, 2*gate.RecordDeadline), progress)
	return errors.Join(err, done.Err(), recordRewrap(ctx, sealer, db, done, err))
}

// recordRewrap leaves the run's event, also of one that was interrupted. The
// server gives it its place in the log.
func recordRewrap(ctx context.Context, sealer orgkey.Sealer, db *sqlstore.DB, done vault.Rewrapped, interrupted error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	e := audit.New(audit.SealsRewrapped, "")
	e.Actor = audit.Actor{Kind: audit.System, ID: "rewrap"}
	e.Detail = map[string]string{"version": strconv.Itoa(done.Version), "count": strconv.Itoa(done.Count)}
	switch {
	case interrupted != nil:
		e.Outcome, e.Reason = audit.Failure, "interrupted"
	case done.Broken > 0:
		e.Outcome, e.Reason = audit.Failure, "sealed_record_broken"
	}
	err := openEventKey(ctx, sealer, db)
	if err == nil {
		err = db.Record(ctx, e)
	}
	if err != nil {
		return fmt.Errorf("recording the run: %w", err)
	}
	return nil
}
