package archive_test

import (
	"context"
	"crypto/ed25519"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
	"golang.org/x/sys/unix"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/archive"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/org"
)

// bigLog is the audittest.SignedLog of a large log, without a database.
type bigLog struct {
	leaves [][]byte
	head   audit.Signed
	vkey   string
}

func (l *bigLog) Entries(_ context.Context, index int64, limit int) ([]audit.Entry, error) {
	var all []audit.Entry
	for i := index; i < min(index+int64(limit), int64(len(l.leaves))); i++ {
		all = append(all, audit.Entry{Index: i, Leaf: l.leaves[i]})
	}
	return all, nil
}
func (l *bigLog) At(context.Context, int64) (audit.Checkpoint, error) {
	return audit.Checkpoint{}, nil
}
func (l *bigLog) Index(context.Context, string) (int64, bool, error) { return 0, false, nil }
func (l *bigLog) Inclusion(context.Context, int64, int64) (tlog.RecordProof, error) {
	return nil, nil
}
func (l *bigLog) LastSigned(context.Context) (audit.Signed, error) { return l.head, nil }
func (l *bigLog) SignedAfter(_ context.Context, seq int64) ([]audit.Signed, error) {
	if seq > 0 {
		return nil, nil
	}
	return []audit.Signed{l.head}, nil
}
func (l *bigLog) CheckpointKeys(context.Context) ([]string, error)        { return []string{l.vkey}, nil }
func (l *bigLog) ReceiptKeys(context.Context) ([]audit.ReceiptKey, error) { return nil, nil }
func (l *bigLog) Policies(context.Context) ([]audit.PolicyFile, error)    { return nil, nil }
func (l *bigLog) Receipts(context.Context, string, int64, int64) ([]audit.Receipt, error) {
	return nil, nil
}

func newBigLog(b *testing.B, n int) *bigLog {
	b.Helper()
	l := &bigLog{}
	for i := range n {
		e := audit.New(audit.KeysListed, org.ID(fmt.Sprintf("org-%d", i/10%1000)))
		e.Actor, e.Action, e.Request = audit.Actor{Kind: authz.Person, ID: "user-1234567890"}, "orgkey.list", "683f334f-31c2-4300-9a01-b96eceffc579"
		switch i % 10 {
		case 0:
			e.Type, e.Object = audit.KeyCreated, fmt.Sprintf("key-%d", i)
			e.Detail = map[string]string{"backend": "vault", "algorithm": "rsa-2048", "fingerprint": "VXY3gR8pBtaHUe071sZNYuNBAvzsp1qbLsU9XiG0Olw"}
		case 1:
			e.Type, e.Object = audit.KeyDelivered, fmt.Sprintf("key-%d", i-1)
		}
		r, err := e.Encode()
		if err != nil {
			b.Fatal(err)
		}
		l.leaves = append(l.leaves, r.Leaf)
	}
	_, root, err := audit.Grow(0, l.leaves, nil)
	if err != nil {
		b.Fatal(err)
	}
	skey, vkey, err := note.GenerateKey(nil, "orgkeys/bench")
	if err != nil {
		b.Fatal(err)
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		b.Fatal(err)
	}
	c := audit.Checkpoint{Origin: "orgkeys/bench", Size: int64(n), Root: root}
	text, err := note.Sign(&note.Note{Text: c.Text()}, signer)
	if err != nil {
		b.Fatal(err)
	}
	l.head, l.vkey = audit.Signed{Checkpoint: c, Seq: 1, Note: string(text)}, vkey
	return l
}

// BenchmarkExport exports and verifies a log of ORGKEYS_BENCH_EVENTS events
// (100,000 if unset), a tenth of them new keys.
func BenchmarkExport(b *testing.B) {
	n := 100_000
	if text := os.Getenv("ORGKEYS_BENCH_EVENTS"); text != "" {
		var err error
		if n, err = strconv.Atoi(text); err != nil {
			b.Fatal(err)
		}
	}
	l := newBigLog(b, n)
	path := filepath.Join(b.TempDir(), "export.tar.gz")
	export := func() {
		f, err := os.Create(path)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := archive.Write(b.Context(), f, l, nil, b.TempDir(), "a benchmark", nil); err != nil {
			b.Fatal(err)
		}
		if err := f.Close(); err != nil {
			b.Fatal(err)
		}
	}
	rate := func(b *testing.B, before time.Duration) {
		b.ReportMetric((cpuTime(b)-before).Seconds()/float64(b.N), "cpu-s/op")
		b.ReportMetric(float64(n)*float64(b.N)/b.Elapsed().Seconds(), "events/s")
		b.ReportMetric(peak(b), "MB-resident-peak")
	}
	b.Run("export", func(b *testing.B) {
		before := cpuTime(b)
		for b.Loop() {
			export()
		}
		rate(b, before)
	})
	export()
	l.leaves = nil
	runtime.GC()
	b.Run("verify", func(b *testing.B) {
		before := cpuTime(b)
		for b.Loop() {
			f, err := os.Open(path)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := archive.Verify(b.Context(), f, []string{l.vkey}, archive.Outside{}, nil); err != nil {
				b.Fatal(err)
			}
			if err := f.Close(); err != nil {
				b.Fatal(err)
			}
		}
		rate(b, before)
	})
	b.Run("receipt", func(b *testing.B) {
		_, private, err := ed25519.GenerateKey(nil)
		if err != nil {
			b.Fatal(err)
		}
		leaf := []byte(strings.Repeat("x", 400))
		signature := ed25519.Sign(private, leaf)
		for b.Loop() {
			if !ed25519.Verify(private.Public().(ed25519.PublicKey), leaf, signature) {
				b.Fatal("does not verify")
			}
		}
	})
}

// cpuTime is what the process has used of the processors.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// peak is the most memory that the process has held, in MB (Linux).
func peak(b *testing.B) float64 {
	b.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "VmHWM:")
	kb, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
	if err != nil {
		b.Fatal(err)
	}
	return kb / 1024
}
