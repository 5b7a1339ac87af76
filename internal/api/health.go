package api

import (
	"context"
	"net/http"
	"sync"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/singleflight"
)

const (
	healthPath = "/healthz"
	readyPath  = "/readyz"
)

// Check asks one dependency whether it can be used. Its error is shown on the
// admin listener and must hold no secrets.
type Check struct {
	Name     string
	Ask      func(ctx context.Context) error
	Optional bool // its failure is shown, and leaves the service ready
}

// state is what the last round of checks found.
type state struct {
	Name  string  `json:"name"`
	OK    bool    `json:"ok"`
	Error string  `json:"error,omitempty"`
	Took  float64 `json:"ms"`

	optional bool
}

// readiness runs all checks concurrently, at most one round at a time and one per
// checkInterval: anybody may ask /readyz, and that must not load the dependencies.
type readiness struct {
	checks []Check
	round  singleflight.Group

	mu     sync.Mutex // guards what follows, never held while asking
	asked  time.Time
	states []state
}

func newReadiness(checks []Check) *readiness { return &readiness{checks: checks} }

// ask returns every check's state, no older than checkInterval. It reports
// false if any failed, or if ctx ended first.
func (r *readiness) ask(ctx context.Context) ([]state, bool) {
	if states, fresh := r.last(); fresh {
		return states, allOK(states)
	}
	answer := r.round.DoChan("", func() (any, error) {
		if states, fresh := r.last(); fresh {
			return states, nil
		}
		return r.askAll(), nil
	})
	select {
	case result := <-answer:
		states := result.Val.([]state)
		return states, allOK(states)
	case <-ctx.Done():
		return nil, false
	}
}

var dependencyUp = prometheus.NewDesc("orgkeys_dependency_up", "Whether the dependency could be used when it was last asked, as /readyz shows it.", []string{"name"}, nil)

// Describe implements prometheus.Collector.
func (r *readiness) Describe(ch chan<- *prometheus.Desc) { ch <- dependencyUp }

// Collect implements prometheus.Collector. It runs the checks as /readyz does, so that
// the metric is current even if nobody asks /readyz.
func (r *readiness) Collect(ch chan<- prometheus.Metric) {
	states, _ := r.ask(context.Background()) // a round is bounded by checkTimeout
	for _, s := range states {
		up := 0.0
		if s.OK {
			up = 1
		}
		ch <- prometheus.MustNewConstMetric(dependencyUp, prometheus.GaugeValue, up, s.Name)
	}
}

func (r *readiness) last() ([]state, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.states, !r.asked.IsZero() && time.Since(r.asked) < checkInterval
}

func (r *readiness) askAll() []state {
	// Not the context of the request that happened to start the round: others share it.
	ctx, cancel := context.WithTimeout(context.Background(), checkTimeout)
	defer cancel()
	states := make([]state, len(r.checks))
	var all sync.WaitGroup
	for i, check := range r.checks {
		all.Go(func() { states[i] = check.ask(ctx) })
	}
	all.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.states, r.asked = states, time.Now()
	return states
}

// ask comes back when ctx ends, also if the check does not.
func (k Check) ask(ctx context.Context) state {
	started := time.Now()
	answer := make(chan error, 1)
	go func() { answer <- k.Ask(ctx) }()
	var err error
	select {
	case err = <-answer:
	case <-ctx.Done():
		err = ctx.Err()
	}
	s := state{Name: k.Name, OK: err == nil, optional: k.Optional, Took: float64(time.Since(started).Microseconds()) / 1000}
	if err != nil {
		s.Error = err.Error()
	}
	return s
}

func allOK(states []state) bool {
	for _, s := range states {
		if !s.OK && !s.optional {
			return false
		}
	}
	return true
}

type health struct {
	Status string `json:"status"`
}

func (a *API) routesHealth(r gin.IRouter) {
	get(r, healthPath, live)
	get(r, readyPath, func(c *gin.Context) {
		if _, ok := a.ready.ask(c.Request.Context()); !ok || a.ending() {
			a.refuse(c, notReady)
			return
		}
		writeJSON(c, http.StatusOK, health{"ready"})
	})
}

// ending reports whether a signal has arrived, after which clients should use another
// replica.
func (a *API) ending() bool { return a.leaving.Load() || a.draining.Load() }

func live(c *gin.Context) { writeJSON(c, http.StatusOK, health{"ok"}) }

type detailedHealth struct {
	health
	Checks []state `json:"checks"`
}

func (a *API) routesAdmin(r gin.IRouter) {
	get(r, healthPath, live)
	get(r, readyPath, func(c *gin.Context) {
		states, ok := a.ready.ask(c.Request.Context())
		if states == nil {
			states = []state{}
		}
		switch {
		case a.ending():
			writeJSON(c, http.StatusServiceUnavailable, detailedHealth{health{"draining"}, states})
		case !ok:
			writeJSON(c, http.StatusServiceUnavailable, detailedHealth{health{"unavailable"}, states})
		default:
			writeJSON(c, http.StatusOK, detailedHealth{health{"ready"}, states})
		}
	})
	get(r, "/metrics", gin.WrapH(promhttp.HandlerFor(a.Metrics, promhttp.HandlerOpts{ErrorHandling: promhttp.HTTPErrorOnError})))
}
