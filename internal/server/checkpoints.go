package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// flushTimeout bounds how long a stopping server sees to it that the log and
// its sinks are complete. What it does not manage is done at the next start.
const flushTimeout = 5 * time.Second

// SignCheckpoint signs a checkpoint while no server runs, if the log has grown
// since the newest one, and returns the newest.
func SignCheckpoint(ctx context.Context, cfg config.Config, log *slog.Logger) (newest audit.Signed, err error) {
	o, err := openStopped(ctx, cfg, backend.sinks, log)
	if err != nil {
		return newest, err
	}
	defer func() { err = errors.Join(err, o.close()) }()
	p, err := openPolicy(ctx, cfg, log)
	if err != nil {
		return newest, err
	}
	c, err := openCheckpoints(ctx, cfg, o.db, audit.NewLog(o.db, log, o.sinks...), o.backend, p, log)
	if err == nil {
		err = c.Sign(ctx)
	}
	if err != nil {
		return newest, err
	}
	return o.db.LastSigned(ctx)
}

// openCheckpoints returns what signs checkpoints, and refuses a log that does
// not extend its newest one.
func openCheckpoints(ctx context.Context, cfg config.Config, db *sqlstore.DB, auditLog *audit.Log, b backend, p policy, log *slog.Logger) (*audit.Checkpointer, error) {
	c := audit.NewCheckpointer(auditLog, db, b.signer, cfg.CheckpointInterval, log)
	keep := keepPolicy(db)
	c.Prepare = func(ctx context.Context) error { return keep(ctx, p.current()) }
	if err := keep(ctx, p.current()); err != nil {
		return nil, err
	}
	_, _, err := c.Check(ctx)
	var rewritten *audit.RewrittenError
	if errors.As(err, &rewritten) {
		return nil, fmt.Errorf("%w; find out why; after a restored backup run: orgkeys audit accept-rollback --reason …", err)
	}
	if err != nil {
		return nil, err
	}
	return c, db.CheckArchived(ctx)
}

// keepPolicy returns what stores a policy's text for auditors.
func keepPolicy(db *sqlstore.DB) func(context.Context, *authz.Policy) error {
	return func(ctx context.Context, p *authz.Policy) error { return db.KeepPolicy(ctx, p.Revision(), p.Files()) }
}

// rewritten reports that the log under the running server was rewritten.
func rewritten(c *audit.Checkpointer) error {
	err := c.Status().Err
	if errors.As(err, new(*audit.RewrittenError)) || errors.As(err, new(*audit.RollbackError)) {
		return err
	}
	return nil
}

// following runs the log until everything that records events has ended.
type following struct {
	auditLog    *audit.Log
	checkpoints *audit.Checkpointer
	log         *slog.Logger
	running     *errgroup.Group
	stop        func()
	once        sync.Once
}

func follow(ctx context.Context, auditLog *audit.Log, checkpoints *audit.Checkpointer, log *slog.Logger) *following {
	ctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	running, ctx := errgroup.WithContext(ctx)
	running.Go(func() error { return auditLog.Run(ctx) })
	running.Go(func() error { checkpoints.Run(ctx); return nil })
	running.Go(func() error { signOnDemand(ctx, checkpoints, log); return nil })
	return &following{auditLog: auditLog, checkpoints: checkpoints, log: log, running: running, stop: stop}
}

// end completes the log and its sinks, with a signed checkpoint of all of it,
// and stops.
func (f *following) end() {
	f.once.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), flushTimeout)
		defer cancel()
		err := f.auditLog.Flush(ctx)
		if err == nil {
			err = f.checkpoints.Sign(ctx)
		}
		if err == nil {
			err = f.auditLog.Flush(ctx)
		}
		if err != nil {
			f.log.Warn("the audit sinks lack the newest events; they get them at the next start", "error", err)
		}
		f.stop()
		_ = f.running.Wait() // its parts return no error
	})
}

// signOnDemand signs a checkpoint whenever SIGUSR1 comes, until ctx ends.
func signOnDemand(ctx context.Context, c *audit.Checkpointer, log *slog.Logger) {
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGUSR1)
	defer signal.Stop(asked)
	for {
		select {
		case <-ctx.Done():
			return
		case <-asked:
		}
		if err := c.Sign(ctx); err != nil {
			log.Error("no checkpoint could be signed", "error", err)
			continue
		}
		log.Info("signed a checkpoint", "size", c.Status().Size)
	}
}
