// Package keypool has keys made ahead, inside the back end, so that a request for one
// need not wait for the computation.
//
// A pool key belongs to nobody. It is exported only after one transaction has taken it,
// for one caller, and it is that caller's only if its own deletion removed the key from
// the back end. Whatever goes wrong, the key is destroyed: it never returns to the pool.
//
// Filling pauses while somebody waits for a key, makes one key at a time among all replicas,
// and stops while an audit sink fails.
//
// There are two kinds of pools. Shared is the one of all replicas, with Vault: its keys
// have rows. Local is that of one process, with a PKCS#11 module: its keys are
// session objects, and end with the process.
package keypool

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

const (
	settle      = time.Second            // after the start, before the first key is made
	quiet       = 50 * time.Millisecond  // nobody has waited for a key for this long before one is made
	look        = 25 * time.Millisecond  // between two looks whether that is so
	elsewhere   = 100 * time.Millisecond // while another replica makes a key
	upkeep      = 10 * time.Second       // between two searches for keys that must go
	stale       = time.Second            // a taker asks again then what is present, which is a call to Vault
	clocks      = time.Hour              // by how much replicas' clocks may differ
	retry       = 2 * time.Second        // after a failure
	firstReport = 10 * time.Second       // after the start, before the first event with totals
	reportEvery = time.Minute            // at least, between two of them
	makeLife    = 30 * time.Second       // how long a key may be in the making
	cleanup     = 5 * time.Second        // for destroying a key
	exclusively = "pool filler"          // the lock of filling, among all replicas
)

// Reasons for which a pool key is destroyed without having been taken.
const (
	reasonExpired     = "expired"
	reasonSealingKey  = "sealing_key_changed"
	reasonCredentials = "credentials_changed"
	reasonUnreadable  = "unreadable"
	reasonOff         = "off"
	reasonSessions    = "sessions_ended"
	reasonFailed      = "failed" // while it was being made or taken
)

// Config holds the parts of a pool. Every field is required.
type Config struct {
	Size      int                                                                                  // keys of each use; 0: none are made
	Idle      func() time.Duration                                                                 // for how long nobody has waited for a key
	Exclusive func(ctx context.Context, name string, do func(context.Context) error) (bool, error) // among all replicas
	Sinks     func() error                                                                         // what is wrong with the audit sinks
	Record    func(context.Context, ...audit.Event) error                                          // of events that it may have recorded already
	Backend   string                                                                               // its name in events
	Log       *slog.Logger
}

// stock is what differs between the pools.
type stock interface {
	// add makes one key for a use, or reports that there are enough.
	add(ctx context.Context, use orgkey.Use) (full bool, err error)
	// keep destroys the keys that must not be used any more.
	keep(ctx context.Context) error
	// ready is how many keys there are for each use.
	ready(ctx context.Context) (map[orgkey.Use]int, error)
	uses() []orgkey.Use
}

// runner fills a stock.
type runner struct {
	Config
	stock  stock
	wake   chan struct{} // a key was taken
	count  *counts
	unsent []audit.Event // of a report that may have been recorded; it is repeated as it is
}

func newRunner(c Config, s stock) *runner {
	return &runner{Config: c, stock: s, wake: make(chan struct{}, 1), count: newCounts(s.uses())}
}

// taken is told that a key was asked for.
func (r *runner) taken(use orgkey.Use, had bool) {
	r.count.taken(use, had)
	if r.Size == 0 {
		return
	}
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Run fills the pool, and destroys what must go, until ctx ends. What must go does not
// wait for filling, which does not happen while keys are wanted.
func (r *runner) Run(ctx context.Context) error {
	var both sync.WaitGroup
	both.Go(func() { r.repeat(ctx, nil, "the pool of keys is not looked after", r.tend) })
	both.Go(func() { r.repeat(ctx, r.wake, "the pool of keys is not filled", r.fill) })
	both.Wait()
	return r.leave(ctx)
}

// repeat does something until ctx ends: soon, then every upkeep and at each wake, and
// after a failure, which it logs, as soon as retry has passed.
func (r *runner) repeat(ctx context.Context, wake <-chan struct{}, failed string, do func(context.Context) error) {
	said, wait, woken := "", settle, (<-chan struct{})(nil)
	for {
		select {
		case <-ctx.Done():
			return
		case <-woken:
		case <-time.After(wait):
		}
		err := do(ctx)
		if err == nil {
			said, wait, woken = "", upkeep, wake
			continue
		}
		wait, woken = retry, nil
		if text := err.Error(); ctx.Err() == nil && text != said {
			r.Log.Warn(failed, "error", err)
			said = text
		}
	}
}

// tend destroys what must go, and reports.
func (r *runner) tend(ctx context.Context) error {
	return errors.Join(r.stock.keep(ctx), r.report(ctx, false))
}

// fill makes keys until there are enough.
func (r *runner) fill(ctx context.Context) error {
	if r.Size == 0 {
		return nil
	}
	for _, use := range r.stock.uses() {
		for full := false; !full; {
			if err := r.await(ctx); err != nil {
				return err
			}
			mine, err := r.Exclusive(ctx, exclusively, func(ctx context.Context) (err error) {
				full, err = r.stock.add(ctx, use)
				return err
			})
			if err != nil {
				return err
			}
			if !mine {
				pause(ctx, elsewhere)
			}
		}
	}
	return nil
}

// await returns when nobody waits for a key and all sinks follow the log.
func (r *runner) await(ctx context.Context) error {
	for {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		idle := r.Idle()
		if idle >= quiet {
			if err := r.Sinks(); err != nil {
				return fmt.Errorf("an audit sink fails: %w", err)
			}
			return nil
		}
		pause(ctx, max(look, quiet-idle))
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// report records the totals since the last report.
func (r *runner) report(ctx context.Context, last bool) error {
	if err := r.send(ctx); err != nil {
		return err
	}
	totals := r.count.due(last)
	if len(totals) == 0 {
		return nil
	}
	ready, err := r.stock.ready(ctx)
	if err != nil {
		r.count.restore(totals)
		return fmt.Errorf("counting the keys made ahead: %w", err)
	}
	for use, t := range totals {
		e := audit.New(audit.PoolFilled, "")
		e.Actor = audit.Actor{Kind: audit.System, ID: "pool"}
		e.Detail = map[string]string{"use": string(use), "made": strconv.Itoa(t.made), "destroyed": strconv.Itoa(t.destroyed), "ready": strconv.Itoa(ready[use]), "backend": r.Backend}
		r.unsent = append(r.unsent, e)
	}
	return r.send(ctx)
}

func (r *runner) send(ctx context.Context) error {
	if len(r.unsent) == 0 {
		return nil
	}
	if err := r.Record(ctx, r.unsent...); err != nil {
		return fmt.Errorf("recording what was made ahead: %w", err)
	}
	r.unsent = nil
	return nil
}

func (r *runner) leave(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
	defer cancel()
	if err := r.report(ctx, true); err != nil {
		r.Log.Warn("ending", "error", err)
	}
	return nil
}

var errTooOld = errors.New("the pool key is past its age")

// checkAge refuses a key of this process that has waited too long, or was made in the
// future: then a clock has been set back, and its age is not known.
func checkAge(made time.Time) error {
	if age := time.Since(made); age > orgkey.MaxAge || age < -time.Minute {
		return errTooOld
	}
	return nil
}

// total is what happened for one use since the last report.
type total struct{ made, destroyed int }

// counts is what happened.
type counts struct {
	mu       sync.Mutex
	since    map[orgkey.Use]total
	reported time.Time
	metrics
}

func newCounts(uses []orgkey.Use) *counts {
	return &counts{since: map[orgkey.Use]total{}, reported: time.Now().Add(firstReport - reportEvery), metrics: newMetrics(uses)}
}

func (c *counts) made(use orgkey.Use) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.since[use]
	t.made++
	c.since[use] = t
	c.madeTotal.WithLabelValues(string(use)).Inc()
}

func (c *counts) destroyed(use orgkey.Use, reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.since[use]
	t.destroyed++
	c.since[use] = t
	c.destroyedTotal.WithLabelValues(string(use), reason).Inc()
}

// due takes the totals if it is time for a report.
func (c *counts) due(now bool) map[orgkey.Use]total {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.since) == 0 || !now && time.Since(c.reported) < reportEvery {
		return nil
	}
	taken := c.since
	c.since, c.reported = map[orgkey.Use]total{}, time.Now()
	return taken
}

func (c *counts) restore(totals map[orgkey.Use]total) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for use, t := range totals {
		now := c.since[use]
		c.since[use] = total{now.made + t.made, now.destroyed + t.destroyed}
	}
	c.reported = time.Time{}
}
