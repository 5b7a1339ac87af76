// Package bench_test measures the shipped program beside its back end alone,
// both in one run and in turns, so that a busy machine slows both alike.
// scripts/bench runs it; docs/benchmarks.md has figures and how they came about.
package bench_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/hsm"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/policies"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }

// inTurns has n clients do a and then b, b.N times in all, and reports both
// rates, per client-second times n, and their ratio.
func inTurns(b *testing.B, n int, nameA string, doA func() error, nameB string, doB func() error) {
	b.Helper()
	var left, tookA, tookB atomic.Int64
	left.Store(int64(b.N))
	var wg sync.WaitGroup
	b.ResetTimer()
	for range n {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				start := time.Now()
				if err := doA(); err != nil {
					b.Error(err)
					return
				}
				middle := time.Now()
				if err := doB(); err != nil {
					b.Error(err)
					return
				}
				tookA.Add(int64(middle.Sub(start)))
				tookB.Add(int64(time.Since(middle)))
			}
		})
	}
	wg.Wait()
	rate := func(took *atomic.Int64) float64 {
		return float64(b.N) * float64(n) * float64(time.Second) / float64(took.Load())
	}
	b.ReportMetric(rate(&tookA), nameA+"/s")
	b.ReportMetric(rate(&tookB), nameB+"/s")
	b.ReportMetric(100*rate(&tookB)/rate(&tookA), "%")
}

// oneKey is what a key costs on the library alone: the same sessions, the same
// mechanisms, and nothing else.
func oneKey(ctx context.Context, token *hsm.Token) error {
	key, err := token.Create(ctx, uuid.NewString())
	if err != nil {
		return err
	}
	der, err := key.Export(ctx)
	clear(der)
	if err != nil {
		return err
	}
	return key.Destroy(ctx)
}

// BenchmarkKeysSoftHSM: keys a second through the running program, beside a
// loop on a session pool like its own. RSA keys take widely different times to
// make, so use some 1,000 of them.
func BenchmarkKeysSoftHSM(b *testing.B) {
	cfg, _, err := hsm.InitSoftHSM(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	token, err := hsm.Open(b.Context(), cfg)
	if err != nil {
		b.Fatal(err)
	}
	defer token.Close()
	s := harness.Start(b, harness.Set("ORGKEYS_MAX", "1000"), harness.Set("ORGKEYS_LOG_LEVEL", "warn"))
	bearer := s.Token(b, "bench", "OWNER")
	post := func() error {
		status, _, err := call(s, http.MethodPost, harness.KeyPath("bench"), bearer)
		if err == nil && status == http.StatusBadRequest { // full: begin again
			_, _, err = call(s, http.MethodDelete, harness.KeyPath("bench"), bearer)
			return err
		}
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("status %d", status)
		}
		return err
	}
	inTurns(b, 2, "library", func() error { return oneKey(context.Background(), token) }, "orgkeys", post)
}

func call(s *harness.Server, method, path, bearer string) (int, []byte, error) {
	req, err := http.NewRequest(method, s.API+path, nil)
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Authorization", "Bearer "+bearer)
	resp, err := s.HTTP.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, body, err
}

// percentiles reports p50 and p99 of what was measured.
func percentiles(b *testing.B, took []time.Duration) {
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Nanoseconds())/1000, "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds())/1000, "p99-µs")
}

// BenchmarkDecision: one decision of the shipped policy.
func BenchmarkDecision(b *testing.B) {
	p, err := authz.Load(b.Context(), policies.Files)
	if err != nil {
		b.Fatal(err)
	}
	r := authz.Request{
		Caller: authz.Caller{Kind: authz.Person, Subject: "u-1", Org: "acme", Roles: []authz.Role{authz.Owner}},
		Action: authz.GenerateKey, Org: "acme",
	}
	took := make([]time.Duration, 0, b.N)
	for b.Loop() {
		start := time.Now()
		d, err := p.Decide(b.Context(), r)
		if err != nil || !d.Allow {
			b.Fatal(d, err)
		}
		took = append(took, time.Since(start))
	}
	percentiles(b, took)
}

// BenchmarkListFiveKeysSoftHSM: GET …/key of an organization with five keys,
// through the running program, its audit event durable.
func BenchmarkListFiveKeysSoftHSM(b *testing.B) {
	s := harness.Start(b, harness.Set("ORGKEYS_LOG_LEVEL", "warn"))
	bearer := s.Token(b, "bench", "OWNER")
	for range 5 {
		if status, body, err := call(s, http.MethodPost, harness.KeyPath("bench"), bearer); err != nil || status != http.StatusOK {
			b.Fatal(status, string(body), err)
		}
	}
	took := make([]time.Duration, 0, b.N)
	for b.Loop() {
		start := time.Now()
		status, body, err := call(s, http.MethodGet, harness.KeyPath("bench"), bearer)
		if err != nil || status != http.StatusOK || bytes.Count(body, []byte("BEGIN PUBLIC KEY")) != 5 {
			b.Fatal(status, err)
		}
		took = append(took, time.Since(start))
	}
	percentiles(b, took)
}

// BenchmarkStart: from starting the process on an existing data directory to
// its being ready, and its resident memory then.
func BenchmarkStart(b *testing.B) {
	s := harness.Start(b)
	s.Stop(b)
	took := make([]time.Duration, 0, b.N)
	var resident, library int64
	for b.Loop() {
		start := time.Now()
		s.Start(b)
		took = append(took, time.Since(start))
		time.Sleep(500 * time.Millisecond) // at rest
		resident, library = memory(b, s.PID())
		s.Stop(b)
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Milliseconds()), "ready-ms")
	b.ReportMetric(float64(resident)/1024, "resident-MiB")
	b.ReportMetric(float64(library)/1024, "of-it-HSM-library-MiB")
}

// memory is a process's resident memory in KiB, and how much of it is mapped
// from the PKCS#11 module and OpenSSL, which only the module uses.
func memory(b *testing.B, pid int) (resident, library int64) {
	smaps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		b.Fatal(err)
	}
	ofLibrary := false
	for line := range strings.Lines(string(smaps)) {
		f := strings.Fields(line)
		if len(f) >= 5 && strings.Contains(f[0], "-") {
			name := filepath.Base(f[len(f)-1])
			ofLibrary = strings.HasPrefix(name, "libsofthsm2") || strings.HasPrefix(name, "libcrypto") ||
				strings.HasPrefix(name, "libstdc++") || strings.HasPrefix(name, "libm.")
		}
		if len(f) < 2 || f[0] != "Rss:" {
			continue
		}
		kib, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil {
			b.Fatal(err)
		}
		resident += kib
		if ofLibrary {
			library += kib
		}
	}
	return resident, library
}

// BenchmarkEvents: events into the log and its file sink, by 64 callers at once
// and by one, each event durable before its caller goes on.
func BenchmarkEvents(b *testing.B) {
	for _, callers := range []int{1, 64, 512} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			dir := b.TempDir()
			db, err := sqlstore.Open(b.Context(), filepath.Join(dir, "orgkeys.db"))
			if err != nil {
				b.Fatal(err)
			}
			defer db.Close()
			if err := db.Migrate(b.Context()); err != nil {
				b.Fatal(err)
			}
			trail := audit.NewLog(db, slog.New(slog.DiscardHandler), audit.NewFileSink(filepath.Join(dir, "audit.jsonl")))
			ctx, stop := context.WithCancel(b.Context())
			ended := make(chan error, 1)
			go func() { ended <- trail.Run(ctx) }()
			record(b, trail, callers)
			for trail.Sinks()[0].Next < int64(b.N) {
				time.Sleep(time.Millisecond)
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "events/s")
			stop()
			if err := <-ended; err != nil {
				b.Fatal(err)
			}
		})
	}
}

func record(b *testing.B, trail *audit.Log, callers int) {
	var left atomic.Int64
	left.Store(int64(b.N))
	var wg sync.WaitGroup
	b.ResetTimer()
	for range callers {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				e := audit.New(audit.KeysListed, "acme")
				e.Actor = audit.Actor{Kind: authz.Person, ID: "u-1"}
				e.Request = "0f0e0d0c-0b0a-0908-0706-050403020100"
				if err := trail.Record(b.Context(), e); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}
