package keypool

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// metrics count at this replica.
type metrics struct {
	takenTotal, madeTotal, destroyedTotal *prometheus.CounterVec
}

func newMetrics(uses []orgkey.Use) metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	m := metrics{
		takenTotal:     counter("orgkeys_pool_requests_total", "Keys that were asked of the pool at this replica, by whether it had one.", "use", "result"),
		madeTotal:      counter("orgkeys_pool_made_total", "Keys that this replica made ahead.", "use"),
		destroyedTotal: counter("orgkeys_pool_destroyed_total", "Pool keys that this replica destroyed, because they expired or for another reason.", "use", "reason"),
	}
	for _, use := range uses {
		m.madeTotal.WithLabelValues(string(use))
		for _, result := range []string{"taken", "empty"} {
			m.takenTotal.WithLabelValues(string(use), result)
		}
		for _, reason := range []string{reasonExpired, reasonSealingKey, reasonCredentials, reasonUnreadable, reasonOff, reasonSessions, reasonFailed} {
			m.destroyedTotal.WithLabelValues(string(use), reason)
		}
	}
	return m
}

func (m metrics) taken(use orgkey.Use, had bool) {
	result := "empty"
	if had {
		result = "taken"
	}
	m.takenTotal.WithLabelValues(string(use), result).Inc()
}

var poolKeys = prometheus.NewDesc("orgkeys_pool_keys", "Keys in the pool; with Vault the same at each replica, with a PKCS#11 module those of this one.", []string{"use"}, nil)

const askTimeout = 5 * time.Second

// Describe implements prometheus.Collector.
func (r *runner) Describe(ch chan<- *prometheus.Desc) {
	ch <- poolKeys
	for _, c := range []prometheus.Collector{r.count.takenTotal, r.count.madeTotal, r.count.destroyedTotal} {
		c.Describe(ch)
	}
}

// Collect implements prometheus.Collector. It leaves out how many keys there are while
// the database cannot be asked.
func (r *runner) Collect(ch chan<- prometheus.Metric) {
	for _, c := range []prometheus.Collector{r.count.takenTotal, r.count.madeTotal, r.count.destroyedTotal} {
		c.Collect(ch)
	}
	ctx, cancel := context.WithTimeout(context.Background(), askTimeout)
	defer cancel()
	ready, err := r.stock.ready(ctx)
	if err != nil {
		return
	}
	for _, use := range r.stock.uses() {
		ch <- prometheus.MustNewConstMetric(poolKeys, prometheus.GaugeValue, float64(ready[use]), string(use))
	}
}
