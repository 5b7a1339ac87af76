package bench_test

import (
	"os"
	"slices"
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
		inPhases(b, nodeClients, "old", before.register, "new", now.register)
	})
	b.Run("secrets", func(b *testing.B) {
		before, now := builds(b, 100)
		inPhases(b, nodeClients, "old", before.fetch, "new", now.fetch)
	})
	b.Run("half-load", halfLoad)
}

func builds(b *testing.B, registrations int) (before, now nodes) {
	b.Helper()
	path := os.Getenv("ORGKEYS_BENCH_OLD")
	if path == "" {
		path = harness.Binary(b)
	}
	return startNodes(b, registrations, harness.Program(path)), startNodes(b, registrations)
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
