// Package server puts the parts together: it opens what the settings name,
// refuses what does not fit together, and runs the service until it is told to
// end. The operator's commands open the same parts by it.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/orgkeys/orgkeys/internal/api"
	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authn"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// Intervals of background work.
const (
	sweepInterval   = time.Second
	keepInterval    = 5 * time.Second  // between writing down last uses of keys and contacts of nodes
	summaryInterval = time.Minute      // between summaries of refused unknown callers
	startTimeout    = 15 * time.Second // for reaching everything that is needed, without migrations
)

// heapFloor is what the garbage collector is told is in use and never touched,
// so that it takes no memory. Beside the 6 MiB that are in use it would
// otherwise collect after every 6 MiB that requests allocate, and each decision
// or signature that it interrupts takes several times as long.
const heapFloor = 16 << 20

// Serve puts the parts together and runs them until ctx ends.
func Serve(ctx context.Context, cfg config.Config, version string, log *slog.Logger) (err error) {
	defer runtime.KeepAlive(make([]byte, heapFloor))
	closeAll := closers{}
	defer func() { err = errors.Join(err, closeAll.close()) }()
	closeAll.add(outliveHangups(log))

	edge := api.ServerConfig{
		Address: cfg.Listen, TLS: api.TLSFiles{Cert: cfg.TLSCertFile, Key: cfg.TLSKeyFile, ClientCA: cfg.ClientCAFile},
		Proxies:            api.Proxies{Trusted: cfg.TrustedProxies, TLS: cfg.TLSByProxy},
		GenerationDeadline: cfg.ReservationTTL / 2, Log: log,
	}
	if err := errors.Join(api.CheckTransport(edge), api.CheckOrigins(cfg.CORSOrigins)); err != nil {
		return err
	}
	if err := HideMemory(); err != nil {
		return fmt.Errorf("keeping memory private: %w", err)
	}
	p, err := open(ctx, cfg, version, log, &closeAll)
	if err != nil {
		return err
	}
	u, err := p.useCases()
	if err != nil {
		return err
	}
	surface, err := p.surface(u, edge.Proxies)
	if err != nil {
		return err
	}
	public, err := api.Listen(edge, surface.Handler())
	if err != nil {
		return err
	}
	admin, err := api.Listen(api.ServerConfig{Address: cfg.AdminListen, Log: log}, surface.Admin())
	if err != nil {
		return err
	}

	// What serves requests ends before what they need: running ends with
	// background, which the shutdown below cancels last.
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	following := follow(ctx, p.auditLog, p.checkpoints, log)
	defer following.end()
	running, background := errgroup.WithContext(background)
	p.work(background, running, u, public.Addr().String())
	running.Go(public.Serve)
	running.Go(admin.Serve)
	debug.FreeOSMemory() // compiling the policy and running its tests took much that nothing needs again
	log.Info("listening", "api", public.Addr().String(), "admin", admin.Addr().String(), "version", version, "policy", p.policy.Revision())

	select {
	case <-ctx.Done():
		log.Info("shutting down: requests in progress may finish", "notice", cfg.ShutdownNotice.String(), "timeout", cfg.ShutdownTimeout.String())
		surface.Leave()
		select {
		case <-time.After(cfg.ShutdownNotice):
		case <-background.Done():
		}
	case <-background.Done(): // something ended that should not have
	}
	surface.Drain()
	ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), cfg.ShutdownTimeout)
	defer cancel()
	err = public.Shutdown(ending)
	stop()
	err = errors.Join(err, admin.Shutdown(ending), running.Wait())
	following.end()
	log.Info("stopped")
	return err
}

// parts are what the use cases need, opened and checked.
type parts struct {
	cfg     config.Config
	version string
	log     *slog.Logger
	own     string // a name that no other replica has

	db          *sqlstore.DB
	backend     backend
	origin      string // the log's
	auditLog    *audit.Log
	checkpoints *audit.Checkpointer
	policy      policy
	tokens      *authn.Verifier
	failures    *authn.Failures
	lock        locker
}

// open opens what the settings name, and refuses what does not fit together.
func open(ctx context.Context, cfg config.Config, version string, log *slog.Logger, closeAll *closers) (_ *parts, err error) {
	p := &parts{cfg: cfg, version: version, log: log, failures: &authn.Failures{}}
	// Compiling the policy and running its tests takes about as long as all that comes before it is
	// needed, and needs none of that.
	compiled := sync.OnceValues(func() (policy, error) {
		compiling, cancel := context.WithTimeout(ctx, startTimeout)
		defer cancel()
		return openPolicy(compiling, cfg, log)
	})
	go compiled()
	defer func() {
		if err != nil {
			_, _ = compiled() // the error that matters is the first one; nothing goes on behind it
		}
	}()
	dir, err := OpenDataDir(cfg.DataDir)
	if err != nil {
		return nil, err
	}
	closeAll.add(dir.Close)
	if p.db, err = OpenDatabase(ctx, cfg); err != nil {
		return nil, err
	}
	closeAll.add(p.db.Close)
	starting, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if p.backend, err = openBackend(starting, cfg, dir.path, p.db, log); err != nil {
		return nil, err
	}
	closeAll.add(p.backend.close)
	if err := openEventKey(starting, p.backend.sealer, p.db); err != nil {
		return nil, err
	}
	if p.own, err = dir.own(); err != nil {
		return nil, err
	}
	holder, err := sqlstore.Holder(dir.path, p.own)
	if err != nil {
		return nil, err
	}
	p.db.UseHolder(holder)
	sinks, err := p.backend.sinks(cfg)
	if err != nil {
		return nil, err
	}
	warnOfOnlySink(cfg, log)
	p.auditLog = audit.NewLog(p.db, log, sinks...)
	if err := checkSinks(starting, p.auditLog, log); err != nil {
		return nil, err
	}
	if p.policy, err = compiled(); err != nil {
		return nil, err
	}
	if p.checkpoints, err = openCheckpoints(starting, cfg, p.db, p.auditLog, p.backend, p.policy, log); err != nil {
		return nil, err
	}
	if p.tokens, err = openTokens(cfg, dir.path, p.policy, log); err != nil {
		return nil, err
	}
	p.tokens.UsePseudonyms(cfg.Pseudonyms, p.db)
	if p.lock, err = openLocker(cfg, log); err != nil {
		return nil, err
	}
	closeAll.add(p.lock.close)
	head, err := p.db.Head(starting)
	p.origin = head.Origin
	return p, err
}

// work starts what goes on in the background until ctx ends. address is the public listener's.
func (p *parts) work(ctx context.Context, running *errgroup.Group, u *useCases, address string) {
	running.Go(func() error { return u.keys.Sweep(ctx, sweepInterval) })
	running.Go(func() error { return u.enrollments.Sweep(ctx, sweepInterval) })
	running.Go(func() error { return p.backend.reap(ctx) })
	running.Go(func() error { return u.pool.Run(ctx) })
	running.Go(func() error { return u.nodes.Keep(ctx, keepInterval) })
	running.Go(func() error { p.tokens.Run(ctx); return nil })
	if p.cfg.IssuersFile != "" {
		running.Go(func() error { p.tokens.Follow(ctx, p.cfg.IssuersFile, p.cfg.JWKSInterval, p.log); return nil })
	}
	running.Go(func() error {
		p.policy.follow(ctx, keepPolicy(p.db))
		return nil
	})
	refused := summary{failures: p.failures, record: p.db.RecordOnce}
	running.Go(func() error { refused.run(ctx, p.log); return nil })
	if p.cfg.DatabaseURL != "" {
		running.Go(func() error {
			announce(ctx, p.db, func() sqlstore.Replica {
				return sqlstore.Replica{Address: address + " " + p.own, Version: p.version, Policy: p.policy.Revision(), Max: p.cfg.Max, Timeline: p.auditLog.Attended(ctx), Credentials: p.backend.mark()}
			}, p.log)
			return nil
		})
	}
}

// closers closes what was opened, in reverse order.
type closers []func() error

func (c *closers) add(f func() error) { *c = append(*c, f) }

func (c closers) close() error {
	var all []error
	for i := len(c) - 1; i >= 0; i-- {
		all = append(all, c[i]())
	}
	return errors.Join(all...)
}

// checkSinks refuses a log that does not extend what a sink holds. A sink that
// cannot be asked does not stop the start: nothing is released before it
// answers, and the same check comes first then.
func checkSinks(ctx context.Context, auditLog *audit.Log, log *slog.Logger) error {
	err := auditLog.CheckExtends(ctx)
	if audit.SetBack(err) {
		return errors.Join(advised(err), auditLog.HoldBack(ctx, err))
	}
	if err != nil {
		log.Warn("an audit sink does not answer yet", "error", err)
	}
	return nil
}

// advised says with err what to do, where only an operator can.
func advised(err error) error {
	if !audit.SetBack(err) {
		return err
	}
	if _, elsewhere := errors.AsType[*audit.HaltError](err); elsewhere {
		return fmt.Errorf("%w; find out why; after a failover of the database, accept the loss with the data directory of the replica that it names: orgkeys audit accept-rollback --reason …; if that is gone for good, with another one and --lost-sink (orgkeys doctor prints the words; see docs/operations.md)", err)
	}
	return fmt.Errorf("%w; find out why; after a failover of the database or a restored backup, accept the loss with: orgkeys audit accept-rollback --reason … (see docs/operations.md)", err)
}

func sinkTrouble(auditLog *audit.Log) error {
	var all []error
	for _, s := range auditLog.Sinks() {
		if s.Err != nil {
			all = append(all, advised(fmt.Errorf("sink %s: %w", s.Name, s.Err)))
		}
	}
	return errors.Join(all...)
}
