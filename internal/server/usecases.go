package server

import (
	"context"
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/orgkeys/orgkeys/internal/api"
	"github.com/orgkeys/orgkeys/internal/dryrun"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/keypool"
	"github.com/orgkeys/orgkeys/internal/node"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/orglog"
	"github.com/orgkeys/orgkeys/internal/systemevent"
)

// useCases are what the API calls, behind the gate.
type useCases struct {
	guard       gate.Gate
	keys        *orgkey.Service
	nodes       *node.Service
	enrollments *enroll.Service
	pool        keyPool // also while ORGKEYS_POOL is 0: then it destroys what is in it
	metrics     []prometheus.Collector
}

func (p *parts) useCases() (*useCases, error) {
	cfg, lost, outcomes := p.cfg, newLostEvents(), newOutcomes()
	u := &useCases{guard: gate.Gate{Policy: p.policy, AuditLog: p.auditLog, Log: p.log, Lost: lost}}
	opener, err := orgkey.NewOpener(p.backend.sealer, p.log, time.Now)
	if err != nil {
		return nil, err
	}
	u.pool = p.backend.pool(keypool.Config{
		Size: cfg.Pool, Idle: func() time.Duration { return u.keys.Idle() }, Exclusive: p.db.Exclusive, Record: p.db.RecordOnce,
		Sinks:   func() error { return errors.Join(sinkTrouble(p.auditLog), p.auditLog.Halted()) },
		Backend: p.backend.name, Log: p.log,
	})
	u.metrics = []prometheus.Collector{lost, outcomes, u.pool}
	var ahead keyPool
	if cfg.Pool > 0 {
		ahead = u.pool
	}
	u.keys, err = orgkey.New(orgkey.Config{
		Gate: u.guard, Pool: ahead,
		Store: p.db, Keystore: p.backend.keystore, Sealer: p.backend.sealer, Opener: opener, Locker: p.lock.Locker,
		Backend: p.backend.name, Limit: cfg.Max, Concurrency: cfg.MaxGenerations,
		ReservationLife: cfg.ReservationTTL, AuditDeadline: cfg.AuditDeadline,
	})
	if err != nil {
		return nil, err
	}
	u.nodes, err = node.New(node.Config{
		Gate:  u.guard,
		Store: p.db, Sealer: p.backend.sealer, Opener: opener, Window: cfg.TimestampWindow, AuditDeadline: cfg.AuditDeadline,
	})
	if err != nil {
		return nil, err
	}
	roots, err := TPMRoots(cfg.TPMRootsFile)
	if err != nil {
		return nil, err
	}
	u.enrollments, err = enroll.New(enroll.Config{
		Roots: roots,
		Gate:  u.guard, Pool: ahead,
		Store: p.db, Keystore: p.backend.sealed, Sealer: p.backend.sealer, Opener: opener, Admit: u.keys.Admit, Busy: u.keys.Busy, Enter: u.nodes.Enter,
		Count:  func(o enroll.Outcome) { outcomes.WithLabelValues(string(o)).Inc() },
		Origin: p.origin, Backend: p.backend.name, Limit: cfg.Max, NodeLimit: cfg.MaxNodeKeys,
		AttemptLife: cfg.ReservationTTL, AuditDeadline: cfg.AuditDeadline, DeliverFor: cfg.DeliveryTTL,
	})
	return u, err
}

// surface is what is reached from outside: the API, the console, and the checks of readiness.
func (p *parts) surface(u *useCases, proxies api.Proxies) (*api.API, error) {
	pages, err := newConsole(p.cfg, p.version, p.tokens, p.failures, proxies, p.policy, p.db, p.log)
	if err != nil {
		return nil, err
	}
	return api.New(api.Config{
		Keys: u.keys, Nodes: u.nodes, Enrollments: u.enrollments,
		SystemEvents: systemevent.New(u.guard, p.db), DryRuns: dryrun.New(u.guard),
		OrgLog:       orglog.New(orglog.Config{Gate: u.guard, Store: p.db, Limit: p.cfg.Max, NodeLimit: p.cfg.MaxNodeKeys, Sinks: p.auditLog.Sinks, Covered: p.checkpoints.Status}),
		Console:      pages,
		Rejections:   u.guard,
		Authenticate: p.tokens.Authenticate, Unauthenticated: p.failures.Count,
		Checks: append([]api.Check{
			{Name: "database", Ask: p.db.Healthy},
			{Name: p.backend.name, Ask: p.backend.healthy},
			{Name: "sealed records", Ask: func(ctx context.Context) error { return stillOpen(ctx, p.backend.sealer, p.db) }},
			{Name: "audit sinks", Ask: func(context.Context) error { return sinkTrouble(p.auditLog) }},
			{Name: "audit log", Ask: func(context.Context) error { return advised(p.auditLog.Halted()) }},
			{Name: "audit checkpoints", Ask: func(context.Context) error { return rewritten(p.checkpoints) }},
			{Name: "audit events", Ask: func(ctx context.Context) error { return unauthenticated(ctx, p.db) }, Optional: true},
			{Name: "token keys", Ask: func(context.Context) error { return p.tokens.Ready() }},
			{Name: "token issuers", Ask: func(context.Context) error { return p.tokens.AllReady() }, Optional: true},
		}, p.lock.checks...),
		Metrics: newRegistry(p.db, p.auditLog, p.checkpoints, append(p.lock.metrics, u.metrics...)), Log: p.log, CORSOrigins: p.cfg.CORSOrigins, Proxies: proxies,
	})
}
