package server

import (
	"context"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/prometheus/client_golang/prometheus"
)

// newRegistry returns the metrics that belong to no request.
func newRegistry(db *sqlstore.DB, auditLog *audit.Log, checkpoints *audit.Checkpointer, more []prometheus.Collector) *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(sinkCollector{auditLog}, checkpointCollector{checkpoints}, refusedCollector{db}, deliveryCollector{db})
	r.MustRegister(more...)
	return r
}

func newLostEvents() prometheus.Counter {
	return prometheus.NewCounter(prometheus.CounterOpts{
		Name: "orgkeys_audit_events_lost_total", Help: "Requests, most of them denied or failed, whose event could not be recorded.",
	})
}

// newOutcomes has every outcome from the start, so that the first of its kind
// is an increase.
func newOutcomes() *prometheus.CounterVec {
	c := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "orgkeys_enrollment_outcomes_total", Help: "What became of enrollments and of sealed keys, at this replica.",
	}, []string{"outcome"})
	for _, o := range enroll.Outcomes() {
		c.WithLabelValues(string(o))
	}
	return c
}

var (
	sinkNext   = prometheus.NewDesc("orgkeys_audit_sink_next_index", "First index of the log that the sink has not acknowledged.", []string{"sink"}, nil)
	sinkUp     = prometheus.NewDesc("orgkeys_audit_sink_up", "1 while the sink follows the log.", []string{"sink"}, nil)
	sinkBehind = prometheus.NewDesc("orgkeys_audit_sink_caught_up_timestamp_seconds", "When the sink last held the whole log; 0 if it has not since the start.", []string{"sink"}, nil)

	checkpointSize = prometheus.NewDesc("orgkeys_audit_checkpoint_size", "Events that the newest signed checkpoint covers.", nil, nil)
	checkpointTime = prometheus.NewDesc("orgkeys_audit_checkpoint_timestamp_seconds", "When the whole log was last found to be covered by a signed checkpoint.", nil, nil)
	logRewritten   = prometheus.NewDesc("orgkeys_audit_log_rewritten", "1 if the log does not extend its newest signed checkpoint, or what a sink has acknowledged.", nil, nil)
)

// sinkCollector shows how far each audit sink has come.
type sinkCollector struct{ auditLog *audit.Log }

func (sinkCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- sinkNext
	ch <- sinkUp
	ch <- sinkBehind
}

func (c sinkCollector) Collect(ch chan<- prometheus.Metric) {
	for _, s := range c.auditLog.Sinks() {
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

// askTimeout is for what a scrape asks of the database.
const askTimeout = 5 * time.Second

var eventsRefused = prometheus.NewDesc("orgkeys_audit_events_unauthenticated", "Events in the database that orgkeys did not record and that get no index in the log.", nil, nil)

// refusedCollector shows nothing while the database cannot be asked.
type refusedCollector struct{ db *sqlstore.DB }

func (refusedCollector) Describe(ch chan<- *prometheus.Desc) { ch <- eventsRefused }

func (c refusedCollector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), askTimeout)
	defer cancel()
	if n, err := c.db.Unauthenticated(ctx); err == nil {
		ch <- prometheus.MustNewConstMetric(eventsRefused, prometheus.GaugeValue, float64(n))
	}
}

var (
	enrollmentsOpen = prometheus.NewDesc("orgkeys_enrollments_open", "Enrollments with uses that nobody has claimed yet; the same at each replica.", nil, nil)
	deliveries      = prometheus.NewDesc("orgkeys_deliveries", "Claims that wait for an administrator (approval) or for their key (making), and sealed keys that nobody has signed for or used (unreceived); the same at each replica.", []string{"state"}, nil)
	deliveryOldest  = prometheus.NewDesc("orgkeys_delivery_oldest_timestamp_seconds", "When the oldest of orgkeys_deliveries was claimed.", []string{"state"}, nil)
)

// deliveryCollector shows nothing while the database cannot be asked.
type deliveryCollector struct{ db *sqlstore.DB }

func (deliveryCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- enrollmentsOpen
	ch <- deliveries
	ch <- deliveryOldest
}

func (c deliveryCollector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), askTimeout)
	defer cancel()
	w, err := c.db.UnderWay(ctx)
	if err != nil {
		return
	}
	ch <- prometheus.MustNewConstMetric(enrollmentsOpen, prometheus.GaugeValue, float64(w.Open))
	for state, s := range map[string]sqlstore.Awaiting{"approval": w.Approval, "making": w.Making, "unreceived": w.Unreceived} {
		ch <- prometheus.MustNewConstMetric(deliveries, prometheus.GaugeValue, float64(s.Count), state)
		if s.Count > 0 {
			ch <- prometheus.MustNewConstMetric(deliveryOldest, prometheus.GaugeValue, float64(s.Oldest.UnixMilli())/1000, state)
		}
	}
}
