package bench_test

import (
	"fmt"
	"net/http"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

const nodeClients = 16

// BenchmarkBuilds compares an earlier build of the program with the present one, in
// turns. ORGKEYS_BENCH_OLD is the earlier one's path; without it the present build is
// compared with itself, which shows how far two runs differ by themselves.
func BenchmarkBuilds(b *testing.B) {
	b.Run("register", func(b *testing.B) {
		before, now := builds(b, b.N)
		beside(b, nodeClients, before, now, before.register, now.register)
	})
	b.Run("secrets", func(b *testing.B) {
		before, now := builds(b, 100)
		beside(b, nodeClients, before, now, before.fetch, now.fetch)
	})
	b.Run("half-load", halfLoad)
	b.Run("list", func(b *testing.B) {
		before, now := builds(b, 1)
		beside(b, 2, before, now, before.lister(b), now.lister(b))
	})
	b.Run("keys", func(b *testing.B) { // RSA keys take widely different times to make: some 1,500 of them
		before, now := builds(b, 1, harness.Set("ORGKEYS_MAX", strconv.Itoa(mostKeys)))
		makeOld, makeNew := generator(b, before.s), generator(b, now.s)
		beside(b, 2, before, now, func(int) error { return makeOld() }, func(int) error { return makeNew() })
	})
	b.Run("start", startInTurns)
}

func builds(b *testing.B, registrations int, opts ...harness.Option) (before, now nodes) {
	b.Helper()
	path := os.Getenv("ORGKEYS_BENCH_OLD")
	if path == "" {
		path = harness.Binary(b)
	}
	// It may not know the settings that came since.
	asItWas := func(s *harness.Server) { s.Configured("ORGKEYS_POOL", "") }
	return startNodes(b, registrations, append(opts, harness.Program(path), asItWas)...), startNodes(b, registrations, opts...)
}

// lister returns a function that lists an organization with one key.
func (n nodes) lister(b *testing.B) func(int) error {
	bearer := n.s.Token(b, "bench", "OWNER")
	return func(int) error {
		status, body, err := call(n.s, http.MethodGet, harness.KeyPath("bench"), bearer)
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("status %d: %s", status, body)
		}
		return err
	}
}

// startInTurns is how long each build takes from the start of its process to its being
// ready, on an existing data directory.
func startInTurns(b *testing.B) {
	before, now := builds(b, 1)
	before.s.Stop(b)
	now.s.Stop(b)
	ready := func(s *harness.Server) time.Duration {
		start := time.Now()
		s.Start(b)
		defer s.Stop(b)
		return time.Since(start)
	}
	var old, new []time.Duration
	for b.Loop() {
		old, new = append(old, ready(before.s)), append(new, ready(now.s))
	}
	slices.Sort(old)
	slices.Sort(new)
	o, n := old[len(old)/2], new[len(new)/2]
	b.ReportMetric(float64(o.Milliseconds()), "old-ready-ms")
	b.ReportMetric(float64(n.Milliseconds()), "new-ready-ms")
	b.ReportMetric(100*o.Seconds()/n.Seconds(), "%")
}

// beside reports both rates, and the processor time of each program for one
// request, which depends less on what else the machine does.
func beside(b *testing.B, clients int, before, now nodes, old, new func(i int) error) {
	b.Helper()
	costBefore, costNow := before.processorTime(b), now.processorTime(b)
	inPhases(b, clients, "old", old, "new", new)
	costBefore, costNow = before.processorTime(b)-costBefore, now.processorTime(b)-costNow
	for name, cost := range map[string]time.Duration{"old-cpu-µs": costBefore, "new-cpu-µs": costNow} {
		b.ReportMetric(float64(cost.Microseconds())/float64(b.N), name)
	}
	b.ReportMetric(100*costBefore.Seconds()/costNow.Seconds(), "cpu-%")
}

func (n nodes) processorTime(b *testing.B) time.Duration {
	return processorTimeOf(b, strconv.Itoa(n.s.PID()))
}

// halfLoad is how long fetches take that come at half the rate that each build
// reaches, and those of the present build at the earlier one's half rate.
func halfLoad(b *testing.B) {
	const measuring = 3000
	before, now := builds(b, 100)
	half := func(n nodes) time.Duration {
		return 2 * phase(b, nodeClients, 0, measuring, n.fetch) / measuring
	}
	half(before) // the first is slower
	half(now)
	atHalf := []time.Duration{half(before), half(now)}
	series := []struct {
		name     string
		n        nodes
		interval time.Duration
		took     []time.Duration
	}{{"old", before, atHalf[0], nil}, {"new", now, atHalf[1], nil}, {"new-at-old-rate", now, atHalf[0], nil}}
	b.ResetTimer()
	round := max(1, b.N/5)
	for from := 0; from < b.N; from += round {
		for i := range series {
			s := &series[i]
			s.took = append(s.took, atIntervals(b, min(round, b.N-from), s.interval, s.n.fetch)...)
		}
	}
	for _, s := range series {
		slices.Sort(s.took)
		b.ReportMetric(float64(time.Second)/float64(s.interval), s.name+"/s")
		for _, percent := range []int{50, 99} {
			at := s.took[len(s.took)*percent/100]
			b.ReportMetric(float64(at.Microseconds())/1000, s.name+map[int]string{50: "-p50-ms", 99: "-p99-ms"}[percent])
		}
	}
}
