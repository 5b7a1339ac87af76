package bench_test

import (
	"bytes"
	"encoding/binary"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// generating is what a server's back end has spent on generations since it was last asked.
// It is taken apart from the rest: with keys that take between 10 and 500 ms to compute, nothing
// of a few per cent is seen without thousands of them.
type generating struct {
	n         int
	took      time.Duration
	processor time.Duration // of the server's own process
}

// spent is what the keys of one round took.
type spent struct {
	took       time.Duration // all requests
	own, all   time.Duration // processor time of the server's process, and of all
	generating generating
}

// arm is one of the two servers.
type arm struct {
	s         *harness.Server
	generated func(b *testing.B) generating
	rounds    []spent
}

// BenchmarkEmptyPoolSoftHSM: two clients without a pause, on a pool that they have emptied, and
// on the server without one.
func BenchmarkEmptyPoolSoftHSM(b *testing.B) {
	module := filepath.Join(b.TempDir(), "generating.so")
	if out, err := exec.CommandContext(b.Context(), "cc", "-shared", "-fPIC", "-o", module, "testdata/generating.c", "-ldl").CombinedOutput(); err != nil {
		b.Fatalf("cc: %v\n%s", err, out)
	}
	besideEmptyPool(b, func(opts ...harness.Option) *arm {
		dir, pin := b.TempDir(), "measured"
		pinFile, file := filepath.Join(dir, "pin"), filepath.Join(dir, "spent")
		for name, text := range map[string][]byte{pinFile: []byte(pin), file: make([]byte, 3*8)} {
			if err := os.WriteFile(name, text, 0o600); err != nil {
				b.Fatal(err)
			}
		}
		opts = append(opts, harness.Set("ORGKEYS_PKCS11_MODULE", module), harness.Set("ORGKEYS_PKCS11_PIN_FILE", pinFile),
			harness.Set("SOFTHSM2_CONF", harness.NewToken(b, "orgkeys", pin)),
			harness.Set("GENERATING_MODULE", harness.SoftHSM), harness.Set("GENERATING_FILE", file))
		var before generating
		return &arm{s: harness.Start(b, opts...), generated: func(b *testing.B) generating {
			spent, err := os.ReadFile(file)
			if err != nil {
				b.Fatal(err)
			}
			word := func(i int) uint64 { return binary.NativeEndian.Uint64(spent[8*i:]) }
			now := generating{int(word(0)), time.Duration(word(1)), time.Duration(word(2))}
			since := generating{now.n - before.n, now.took - before.took, now.processor - before.processor}
			before = now
			return since
		}}
	})
}

// BenchmarkEmptyPoolVault: the same on Vault, whose audit file says how long each generation took.
func BenchmarkEmptyPoolVault(b *testing.B) {
	besideEmptyPool(b, func(opts ...harness.Option) *arm {
		v, s := withVault(b, opts...)
		var read int64
		return &arm{s: s, generated: func(b *testing.B) (since generating) {
			text, err := os.Open(v.AuditFile)
			if err != nil {
				b.Fatal(err)
			}
			defer text.Close()
			entries, err := io.ReadAll(io.NewSectionReader(text, read, math.MaxInt64-read))
			if err != nil {
				b.Fatal(err)
			}
			read += int64(len(entries))
			return generatedIn(b, entries)
		}}
	})
}

// generatedIn adds up the generations in entries of Vault's audit file.
func generatedIn(b *testing.B, entries []byte) (sum generating) {
	begun := map[string]time.Time{}
	for line := range bytes.Lines(entries) {
		var e struct {
			Type    string    `json:"type"`
			Time    time.Time `json:"time"`
			Request struct {
				ID        string `json:"id"`
				Operation string `json:"operation"`
				Path      string `json:"path"`
			} `json:"request"`
		}
		if err := json.Unmarshal(line, &e); err != nil {
			b.Fatal(err)
		}
		name, ours := strings.CutPrefix(e.Request.Path, "orgkeys/keys/")
		switch {
		case !ours || strings.Contains(name, "/") || e.Request.Operation != "update":
		case e.Type == "request":
			begun[e.Request.ID] = e.Time
		default:
			sum.n, sum.took = sum.n+1, sum.took+e.Time.Sub(begun[e.Request.ID])
		}
	}
	return sum
}

// besideEmptyPool reports the rate with the pool as a share of that without, as if the
// generations of both had taken what they took on average: what differs is the rest. Each is
// followed by twice its standard error, by what differs from round to round. A round in which
// the pool made a key, because the clients came late to one another, is none on an empty pool:
// it counts for neither server.
func besideEmptyPool(b *testing.B, start func(opts ...harness.Option) *arm) {
	const round = 20
	var pool, off *arm
	p := withSize(b, 4, func(_ *testing.B, size int) *pooled {
		pool, off = start(many, harness.Set("ORGKEYS_POOL", strconv.Itoa(size))), start(many)
		return &pooled{pool: pool.s, plain: off.s}
	})
	leftOut := 0
	b.ResetTimer()
	for from := 0; from < b.N; from += round {
		n := min(round, b.N-from)
		p.full(b) // so that it is not filled beside the other server
		without := off.measure(b, 0, n, p.key(off.s))
		with := pool.measure(b, p.size, n, p.key(pool.s))
		if with.generating.n != n {
			leftOut++
			continue
		}
		off.rounds, pool.rounds = append(off.rounds, without), append(pool.rounds, with)
	}
	b.ReportMetric(float64(leftOut), "rounds-left-out")
	compare(b, pool, off, "", func(r spent) (common, rest time.Duration) { return r.generating.took, r.took - r.generating.took })
	compare(b, pool, off, "cpu-", func(r spent) (common, rest time.Duration) {
		rest = r.own - r.generating.processor
		return r.all - rest, rest
	})
}

// compare reports what of each key's time is the server's alone, and what follows for the rates.
func compare(b *testing.B, pool, off *arm, name string, of func(spent) (common, rest time.Duration)) {
	if len(pool.rounds) < 2 {
		return // the first run of a benchmark is short
	}
	var common, with, without float64
	var more []float64
	n := float64(len(pool.rounds))
	for i := range pool.rounds {
		c1, r1 := of(pool.rounds[i])
		c2, r2 := of(off.rounds[i])
		keys := float64(pool.rounds[i].generating.n)
		common += (ms(c1) + ms(c2)) / 2 / keys / n
		with, without = with+ms(r1)/keys/n, without+ms(r2)/keys/n
		more = append(more, (ms(r1)-ms(r2))/keys)
	}
	var variance float64
	for _, m := range more {
		variance += (m - (with - without)) * (m - (with - without)) / (n - 1)
	}
	b.ReportMetric(common, name+"common-ms")
	b.ReportMetric(with, "pool-"+name+"rest-ms")
	b.ReportMetric(without, "off-"+name+"rest-ms")
	b.ReportMetric((common+without)/(common+with), name+"ratio")
	b.ReportMetric(2*math.Sqrt(variance/n)/(common+with), name+"±")
}

// measure has two clients ask for keys without a pause, and says what the last n took.
func (a *arm) measure(b *testing.B, before, n int, key func() error) (r spent) {
	pid := strconv.Itoa(a.s.PID())
	a.generated(b)
	phase(b, 2, 0, before, func(int) error { return key() })
	own, all := processorTimeOf(b, pid), processorTime(b, a.s).all()
	var sum atomic.Int64
	phase(b, 2, 0, n, func(int) error {
		start := time.Now()
		err := key()
		sum.Add(int64(time.Since(start)))
		return err
	})
	r.own, r.all = processorTimeOf(b, pid)-own, processorTime(b, a.s).all()-all
	r.took, r.generating = time.Duration(sum.Load()), a.generated(b)
	return r
}

func ms(d time.Duration) float64 { return d.Seconds() * 1000 }
