package api

import (
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	requests      *prometheus.CounterVec
	durations     *prometheus.HistogramVec
	authnFailures *prometheus.CounterVec
	generating    prometheus.Gauge
}

// Labels are route patterns, known methods and reasons of a closed set, so
// that no client can make up new time series.
func newMetrics(r *prometheus.Registry, ready *readiness) (metrics, error) {
	m := metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "orgkeys_http_requests_total", Help: "Requests answered.",
		}, []string{"method", "route", "status"}),
		durations: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "orgkeys_http_request_duration_seconds", Help: "Time from a request's headers to the end of its answer.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}, []string{"method", "route"}),
		authnFailures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "orgkeys_authn_failures_total", Help: "Requests refused because the caller is not authenticated.",
		}, []string{"reason"}),
		generating: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "orgkeys_generations_in_flight", Help: "Requests for a new key in progress.",
		}),
	}
	err := errors.Join(r.Register(m.requests), r.Register(m.durations), r.Register(m.authnFailures), r.Register(m.generating), r.Register(ready))
	if err != nil {
		return metrics{}, fmt.Errorf("registering the API's metrics: %w", err)
	}
	return m, nil
}

func (m metrics) observe(method, route string, status int, took time.Duration) {
	m.requests.WithLabelValues(method, route, strconv.Itoa(status)).Inc()
	m.durations.WithLabelValues(method, route).Observe(took.Seconds())
}
