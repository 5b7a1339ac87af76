package bench_test

import (
	"context"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/hsm"
)

// pooled is a server with keys made ahead, one without, and the back end alone.
type pooled struct {
	size  int
	pool  *harness.Server
	plain *harness.Server
	alone func() error

	keys    atomic.Int64 // asked for
	bearers []string
}

var many = harness.Set("ORGKEYS_MAX", strconv.Itoa(mostKeys))

// BenchmarkPoolSoftHSM: keys out of a filled pool, beside the same server without one and
// beside the PKCS#11 library alone.
func BenchmarkPoolSoftHSM(b *testing.B) {
	cfg, _, err := hsm.InitSoftHSM(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	token, err := hsm.Open(b.Context(), cfg)
	if err != nil {
		b.Fatal(err)
	}
	defer token.Close()
	besidePool(b, func(b *testing.B, size int) *pooled {
		return &pooled{
			pool: harness.Start(b, many, harness.Set("ORGKEYS_POOL", strconv.Itoa(size))), plain: harness.Start(b, many),
			alone: func() error { return oneKey(context.Background(), token) },
		}
	})
}

// BenchmarkPoolVault: the same on Vault. Each server has a Vault of its own, since one
// Vault has one log's checkpoint.
func BenchmarkPoolVault(b *testing.B) {
	besidePool(b, func(b *testing.B, size int) *pooled {
		v, pool := withVault(b, many, harness.Set("ORGKEYS_POOL", strconv.Itoa(size)))
		_, plain := withVault(b, many)
		direct := directClient(b, v)
		return &pooled{pool: pool, plain: plain, alone: func() error { return transitKey(context.Background(), direct) }}
	})
}

func besidePool(b *testing.B, start func(b *testing.B, size int) *pooled) {
	b.Run("filled", func(b *testing.B) { withSize(b, 4, start).filled(b) })
	b.Run("burst", func(b *testing.B) { withSize(b, 64, start).burst(b) })
}

func withSize(b *testing.B, size int, start func(b *testing.B, size int) *pooled) *pooled {
	p := start(b, size)
	p.size = size
	for i := range 3*(b.N+size)/mostKeys + 1 {
		for _, s := range []*harness.Server{p.pool, p.plain} {
			p.bearers = append(p.bearers, s.Token(b, fmt.Sprintf("bench-%d", i), "OWNER"))
		}
	}
	return p
}

// key has a server make a key, in one of as many organizations as all keys need.
func (p *pooled) key(s *harness.Server) func() error {
	of := 0
	if s == p.plain {
		of = 1
	}
	return func() error {
		i := int(p.keys.Add(1)) / mostKeys
		status, body, err := call(s, http.MethodPost, harness.KeyPath(fmt.Sprintf("bench-%d", i)), p.bearers[2*i+of])
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("status %d: %s", status, body)
		}
		return err
	}
}

var inPool = regexp.MustCompile(`(?m)^orgkeys_pool_keys\{use="(?:any|plain|sealed)"\} (\d+)$`)

// full waits until the pool is filled, for every use.
func (p *pooled) full(b *testing.B) {
	harness.Eventually(b, 10*time.Minute, "the pool is filled", func() bool {
		uses := inPool.FindAllStringSubmatch(p.pool.AskAdmin(b, "/metrics"), -1)
		return len(uses) > 0 && !slices.ContainsFunc(uses, func(use []string) bool { return use[1] != strconv.Itoa(p.size) })
	})
	time.Sleep(100 * time.Millisecond) // what was made last is put away
}

// timed does something n times, one after the other.
func timed(b *testing.B, n int, do func() error) (took []time.Duration) {
	for range n {
		start := time.Now()
		if err := do(); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(start))
	}
	return took
}

// filled: one caller, who takes as many keys as the pool has, then as many from the server
// without one, while the pool is full again.
func (p *pooled) filled(b *testing.B) {
	var with, without []time.Duration
	for range max(1, b.N/p.size) {
		p.full(b)
		with = append(with, timed(b, p.size, p.key(p.pool))...)
		p.full(b)
		without = append(without, timed(b, p.size, p.key(p.plain))...)
	}
	median := func(d []time.Duration) float64 {
		slices.Sort(d)
		return float64(d[len(d)/2].Microseconds()) / 1000
	}
	b.ReportMetric(median(with), "pool-p50-ms")
	b.ReportMetric(median(without), "off-p50-ms")
	b.ReportMetric(median(without)/median(with), "times")
}

// burst: as many keys as the pool has by 8 clients, then as many by 8 loops on the back
// end alone.
func (p *pooled) burst(b *testing.B) {
	var with, alone time.Duration
	rounds := max(1, b.N/p.size)
	for range rounds {
		p.full(b)
		key := p.key(p.pool)
		with += phase(b, 8, 0, p.size, func(int) error { return key() })
		p.full(b)
		alone += phase(b, 8, 0, p.size, func(int) error { return p.alone() })
	}
	b.ReportMetric(float64(rounds*p.size)/with.Seconds(), "pool/s")
	b.ReportMetric(float64(rounds*p.size)/alone.Seconds(), "alone/s")
	b.ReportMetric(alone.Seconds()/with.Seconds(), "times")
}
