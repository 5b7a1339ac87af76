package main

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/hsm"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// flushTimeout bounds how long a stopping server sees to it that the log and
// its sinks are complete. What it does not manage is done at the next start.
const flushTimeout = 5 * time.Second

// hsmSigner signs checkpoints in the HSM or, where its module has no Ed25519,
// with a key of its own that the HSM keeps sealed.
type hsmSigner struct {
	token  audit.Signer
	sealer orgkey.Sealer
	db     *sqlstore.DB

	mu    sync.Mutex
	local audit.Signer
}

// SignCheckpoint implements audit.Signer.
func (s *hsmSigner) SignCheckpoint(ctx context.Context, text []byte) ([]byte, ed25519.PublicKey, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.local == nil {
		signature, public, err := s.token.SignCheckpoint(ctx, text)
		if !errors.Is(err, hsm.ErrNoEd25519) {
			return signature, public, err
		}
		if s.local, err = openLocalSigner(ctx, s.sealer, s.db); err != nil {
			return nil, nil, err
		}
	}
	return s.local.SignCheckpoint(ctx, text)
}

// openLocalSigner opens the sealed checkpoint key in the database, or makes it.
func openLocalSigner(ctx context.Context, sealer orgkey.Sealer, db *sqlstore.DB) (audit.Signer, error) {
	head, err := db.Head(ctx)
	if err != nil {
		return nil, err
	}
	binding := orgkey.Binding{Purpose: "checkpoint", Org: head.Origin, ID: "ed25519"}
	sealed, err := db.SealedCheckpointKey(ctx)
	if err == nil && sealed == nil {
		if err = makeLocalKey(ctx, sealer, db, binding); err == nil {
			sealed, err = db.SealedCheckpointKey(ctx) // another replica's, if that was first
		}
	}
	if err != nil {
		return nil, fmt.Errorf("looking for the checkpoint key: %w", err)
	}
	opened, err := sealer.Open(ctx, []orgkey.Sealed{{Binding: binding, Ciphertext: sealed}})
	if err != nil {
		return nil, fmt.Errorf("opening the checkpoint key: %w", err)
	}
	defer clear(opened[0])
	if len(opened[0]) != ed25519.SeedSize {
		return nil, fmt.Errorf("opening the checkpoint key: it has %d bytes", len(opened[0]))
	}
	return audit.LocalSigner{Private: ed25519.NewKeyFromSeed(opened[0])}, nil
}

func makeLocalKey(ctx context.Context, sealer orgkey.Sealer, db *sqlstore.DB, binding orgkey.Binding) error {
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		return err
	}
	defer clear(private)
	sealed, err := sealer.Seal(ctx, binding, private.Seed())
	if err != nil {
		return err
	}
	vkey, err := audit.VerifierKey(binding.Org, public)
	if err != nil {
		return err
	}
	return db.KeepCheckpointKey(ctx, vkey, sealed)
}

// openCheckpoints returns what signs checkpoints, and refuses a log that does
// not extend its newest one.
func openCheckpoints(ctx context.Context, cfg config.Config, db *sqlstore.DB, trail *audit.Log, b backend, p policy, log *slog.Logger) (*audit.Checkpointer, error) {
	c := audit.NewCheckpointer(trail, db, b.signer, cfg.CheckpointInterval, log)
	c.Prepare = func(ctx context.Context) error {
		current := p.current()
		return db.KeepPolicy(ctx, current.Revision(), current.Files())
	}
	if err := db.KeepPolicy(ctx, p.Revision(), p.current().Files()); err != nil {
		return nil, err
	}
	_, _, err := c.Check(ctx)
	var rewritten *audit.RewrittenError
	if errors.As(err, &rewritten) {
		return nil, fmt.Errorf("%w; find out why, and if it was on purpose (a restored backup) run: orgkeys audit accept-rollback --reason …", err)
	}
	return c, err
}

func keepPolicy(ctx context.Context, db *sqlstore.DB, p policy, log *slog.Logger) {
	current := p.current()
	if err := db.KeepPolicy(ctx, current.Revision(), current.Files()); err != nil {
		log.Warn("the policy's text is not stored yet", "policy", current.Revision(), "error", err)
	}
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
	trail       *audit.Log
	checkpoints *audit.Checkpointer
	log         *slog.Logger
	running     *errgroup.Group
	stop        func()
	once        sync.Once
}

func follow(ctx context.Context, trail *audit.Log, checkpoints *audit.Checkpointer, log *slog.Logger) *following {
	ctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	running, ctx := errgroup.WithContext(ctx)
	running.Go(func() error { return trail.Run(ctx) })
	running.Go(func() error { checkpoints.Run(ctx); return nil })
	running.Go(func() error { signOnDemand(ctx, checkpoints, log); return nil })
	return &following{trail: trail, checkpoints: checkpoints, log: log, running: running, stop: stop}
}

// end completes the log and its sinks, with a signed checkpoint of all of it,
// and stops.
func (f *following) end() {
	f.once.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), flushTimeout)
		defer cancel()
		err := f.trail.Flush(ctx)
		if err == nil {
			err = f.checkpoints.Sign(ctx)
		}
		if err == nil {
			err = f.trail.Flush(ctx)
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

var (
	sinkNext   = prometheus.NewDesc("orgkeys_audit_sink_next_index", "First index of the log that the sink has not acknowledged.", []string{"sink"}, nil)
	sinkUp     = prometheus.NewDesc("orgkeys_audit_sink_up", "1 while the sink follows the log.", []string{"sink"}, nil)
	sinkBehind = prometheus.NewDesc("orgkeys_audit_sink_caught_up_timestamp_seconds", "When the sink last held the whole log; 0 if it has not since the start.", []string{"sink"}, nil)

	checkpointSize = prometheus.NewDesc("orgkeys_audit_checkpoint_size", "Events that the newest signed checkpoint covers.", nil, nil)
	checkpointTime = prometheus.NewDesc("orgkeys_audit_checkpoint_timestamp_seconds", "When the whole log was last found to be covered by a signed checkpoint.", nil, nil)
	logRewritten   = prometheus.NewDesc("orgkeys_audit_log_rewritten", "1 when the log does not extend its newest signed checkpoint, or what a sink has acknowledged.", nil, nil)
)

// sinkCollector shows how far each audit sink has come.
type sinkCollector struct{ trail *audit.Log }

func (sinkCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- sinkNext
	ch <- sinkUp
	ch <- sinkBehind
}

func (c sinkCollector) Collect(ch chan<- prometheus.Metric) {
	for _, s := range c.trail.Sinks() {
		up, caught := 1.0, 0.0
		if s.Err != nil {
			up = 0
		}
		if !s.CaughtUp.IsZero() {
			caught = float64(s.CaughtUp.UnixMilli()) / 1000
		}
		ch <- prometheus.MustNewConstMetric(sinkNext, prometheus.GaugeValue, float64(s.Next), s.Name)
		ch <- prometheus.MustNewConstMetric(sinkUp, prometheus.GaugeValue, up, s.Name)
		ch <- prometheus.MustNewConstMetric(sinkBehind, prometheus.GaugeValue, caught, s.Name)
	}
}

// checkpointCollector shows how the signing of checkpoints goes.
type checkpointCollector struct{ checkpoints *audit.Checkpointer }

func (checkpointCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- checkpointSize
	ch <- checkpointTime
	ch <- logRewritten
}

func (c checkpointCollector) Collect(ch chan<- prometheus.Metric) {
	status := c.checkpoints.Status()
	bad := 0.0
	if rewritten(c.checkpoints) != nil {
		bad = 1
	}
	ch <- prometheus.MustNewConstMetric(checkpointSize, prometheus.GaugeValue, float64(status.Size))
	ch <- prometheus.MustNewConstMetric(checkpointTime, prometheus.GaugeValue, float64(status.Covered.UnixMilli())/1000)
	ch <- prometheus.MustNewConstMetric(logRewritten, prometheus.GaugeValue, bad)
}
