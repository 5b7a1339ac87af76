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
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/orgkeys/orgkeys/internal/api"
	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authn"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/dryrun"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/keypool"
	"github.com/orgkeys/orgkeys/internal/node"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/orglog"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/internal/systemevent"
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
	dir, err := OpenDataDir(cfg.DataDir)
	if err != nil {
		return err
	}
	closeAll.add(dir.Close)
	db, err := OpenDatabase(ctx, cfg)
	if err != nil {
		return err
	}
	closeAll.add(db.Close)
	starting, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	backend, err := openBackend(starting, cfg, dir.path, db, log)
	if err != nil {
		return err
	}
	closeAll.add(backend.close)
	if err := openEventKey(starting, backend.sealer, db); err != nil {
		return err
	}
	holder, err := sqlstore.Holder(dir.path)
	if err != nil {
		return err
	}
	db.UseHolder(holder)
	sinks, err := backend.sinks(cfg)
	if err != nil {
		return err
	}
	warnOfOnlySink(cfg, log)
	auditLog := audit.NewLog(db, log, sinks...)
	if err := checkSinks(starting, auditLog, log); err != nil {
		return err
	}
	policy, err := openPolicy(starting, cfg, log)
	if err != nil {
		return err
	}
	checkpoints, err := openCheckpoints(starting, cfg, db, auditLog, backend, policy, log)
	if err != nil {
		return err
	}
	tokens, err := openTokens(cfg, dir.path, policy, log)
	if err != nil {
		return err
	}
	tokens.UsePseudonyms(cfg.Pseudonyms, db)
	lock, err := openLocker(cfg, log)
	if err != nil {
		return err
	}
	closeAll.add(lock.close)
	lost, outcomes := newLostEvents(), newOutcomes()
	guard := gate.Gate{Policy: policy, AuditLog: auditLog, Log: log, Lost: lost}
	opener, err := orgkey.NewOpener(backend.sealer, log, time.Now)
	if err != nil {
		return err
	}
	var service *orgkey.Service
	pool := backend.pool(keypool.Config{
		Size: cfg.Pool, Idle: func() time.Duration { return service.Idle() }, Exclusive: db.Exclusive, Record: db.RecordOnce,
		Sinks:   func() error { return errors.Join(sinkTrouble(auditLog), auditLog.Halted()) },
		Backend: backend.name, Log: log,
	})
	var ahead keyPool
	if cfg.Pool > 0 {
		ahead = pool
	}
	service, err = orgkey.New(orgkey.Config{
		Gate: guard, Pool: ahead,
		Store: db, Keystore: backend.keystore, Sealer: backend.sealer, Opener: opener, Locker: lock.Locker,
		Backend: backend.name, Limit: cfg.Max, Concurrency: cfg.MaxGenerations,
		ReservationLife: cfg.ReservationTTL, AuditDeadline: cfg.AuditDeadline,
	})
	if err != nil {
		return err
	}
	nodes, err := node.New(node.Config{
		Gate:  guard,
		Store: db, Sealer: backend.sealer, Opener: opener, Window: cfg.TimestampWindow, AuditDeadline: cfg.AuditDeadline,
	})
	if err != nil {
		return err
	}
	head, err := db.Head(starting)
	if err != nil {
		return err
	}
	roots, err := TPMRoots(cfg.TPMRootsFile)
	if err != nil {
		return err
	}
	enrollments, err := enroll.New(enroll.Config{
		Roots: roots,
		Gate:  guard, Pool: ahead,
		Store: db, Keystore: backend.sealed, Sealer: backend.sealer, Opener: opener, Admit: service.Admit, Busy: service.Busy, Enter: nodes.Enter,
		Count:  func(o enroll.Outcome) { outcomes.WithLabelValues(string(o)).Inc() },
		Origin: head.Origin, Backend: backend.name, Limit: cfg.Max, NodeLimit: cfg.MaxNodeKeys,
		AttemptLife: cfg.ReservationTTL, AuditDeadline: cfg.AuditDeadline, DeliverFor: cfg.DeliveryTTL,
	})
	if err != nil {
		return err
	}
	failures := &authn.Failures{}
	pages, err := newConsole(cfg, version, tokens, failures, policy, db, log)
	if err != nil {
		return err
	}
	surface, err := api.New(api.Config{
		Keys: service, Nodes: nodes, Enrollments: enrollments,
		SystemEvents: systemevent.New(guard, db), DryRuns: dryrun.New(guard),
		OrgLog:       orglog.New(orglog.Config{Gate: guard, Store: db, Limit: cfg.Max, NodeLimit: cfg.MaxNodeKeys, Sinks: auditLog.Sinks, Covered: checkpoints.Status}),
		Console:      pages,
		Rejections:   guard,
		Authenticate: tokens.Authenticate, Unauthenticated: failures.Count,
		Checks: append([]api.Check{
			{Name: "database", Ask: db.Healthy},
			{Name: backend.name, Ask: backend.healthy},
			{Name: "sealed records", Ask: func(ctx context.Context) error { return stillOpen(ctx, backend.sealer, db) }},
			{Name: "audit sinks", Ask: func(context.Context) error { return sinkTrouble(auditLog) }},
			{Name: "audit log", Ask: func(context.Context) error { return advised(auditLog.Halted()) }},
			{Name: "audit checkpoints", Ask: func(context.Context) error { return rewritten(checkpoints) }},
			{Name: "audit events", Ask: func(ctx context.Context) error { return unauthenticated(ctx, db) }, Optional: true},
			{Name: "token keys", Ask: func(context.Context) error { return tokens.Ready() }},
			{Name: "token issuers", Ask: func(context.Context) error { return tokens.AllReady() }, Optional: true},
		}, lock.checks...),
		Metrics: newRegistry(db, auditLog, checkpoints, append(lock.metrics, lost, outcomes, pool)), Log: log, CORSOrigins: cfg.CORSOrigins, Proxies: edge.Proxies,
	})
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
	following := follow(ctx, auditLog, checkpoints, log)
	defer following.end()
	running, background := errgroup.WithContext(background)
	running.Go(func() error { return service.Sweep(background, sweepInterval) })
	running.Go(func() error { return enrollments.Sweep(background, sweepInterval) })
	running.Go(func() error { return backend.reap(background) })
	running.Go(func() error { return pool.Run(background) })
	running.Go(func() error { return nodes.Keep(background, keepInterval) })
	running.Go(func() error { tokens.Run(background); return nil })
	if cfg.IssuersFile != "" {
		running.Go(func() error { tokens.Follow(background, cfg.IssuersFile, cfg.JWKSInterval, log); return nil })
	}
	running.Go(func() error {
		policy.follow(background, func() { keepPolicy(background, db, policy, log) })
		return nil
	})
	refused := summary{failures: failures, record: db.RecordOnce}
	running.Go(func() error { refused.run(background, log); return nil })
	if cfg.DatabaseURL != "" {
		running.Go(func() error {
			announce(background, db, func() sqlstore.Replica {
				return sqlstore.Replica{Address: public.Addr().String(), Version: version, Policy: policy.Revision(), Max: cfg.Max, Timeline: auditLog.Attended(background), Credentials: backend.mark()}
			}, log)
			return nil
		})
	}
	running.Go(public.Serve)
	running.Go(admin.Serve)
	debug.FreeOSMemory() // compiling the policy and running its tests took much that nothing needs again
	log.Info("listening", "api", public.Addr().String(), "admin", admin.Addr().String(), "version", version, "policy", policy.Revision())

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

// summary records how many unauthenticated callers were refused, for each reason.
type summary struct {
	failures *authn.Failures
	record   func(context.Context, ...audit.Event) error // of events that it may have recorded already
	unsent   []audit.Event                               // that may have been recorded; they are repeated as they are
}

// run does so once per minute.
func (s *summary) run(ctx context.Context, log *slog.Logger) {
	ticker := time.NewTicker(summaryInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
		case <-ticker.C:
		}
		if err := s.report(context.WithoutCancel(ctx)); err != nil {
			log.Warn("the summary of unauthenticated callers is not in the audit log yet", "error", err)
		}
		if ctx.Err() != nil {
			return
		}
	}
}

func (s *summary) report(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := s.send(ctx); err != nil {
		return err
	}
	for reason, n := range s.failures.Flush() {
		e := audit.New(audit.UnknownCallers, "")
		e.Actor = audit.Actor{Kind: audit.System, ID: "authn"}
		e.Outcome, e.Reason = audit.Denied, reason
		e.Detail = map[string]string{"count": fmt.Sprint(n)}
		s.unsent = append(s.unsent, e)
	}
	return s.send(ctx)
}

func (s *summary) send(ctx context.Context) error {
	if len(s.unsent) == 0 {
		return nil
	}
	err := s.record(ctx, s.unsent...)
	if err == nil {
		s.unsent = nil
	}
	return err
}
