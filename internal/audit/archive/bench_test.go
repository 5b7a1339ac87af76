package archive_test

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
	"golang.org/x/sys/unix"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/archive"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/org"
)

// bigLog is a large log without a database, whose events are made when they are
// asked for: only its size counts.
type bigLog struct {
	size     int64
	keys     int64 // created in its first tenth and more, one every ten events
	policies int
	of       func(int64) audit.Event // if it is set, what event gives
	head     audit.Signed
	vkey     string
}

func (l *bigLog) Entries(_ context.Context, index int64, limit int) ([]audit.Entry, error) {
	var all []audit.Entry
	for i := index; i < min(index+int64(limit), l.size); i++ {
		r, err := l.event(i).Encode()
		if err != nil {
			return nil, err
		}
		all = append(all, audit.Entry{Index: i, Leaf: r.Leaf})
	}
	return all, nil
}
func (l *bigLog) At(context.Context, int64) (audit.Checkpoint, error) {
	return audit.Checkpoint{}, nil
}
func (l *bigLog) Index(context.Context, string) (int64, bool, error)        { return 0, false, nil }
func (l *bigLog) FindArchived(context.Context, string) (int64, bool, error) { return 0, false, nil }
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
func (l *bigLog) Policies(_ context.Context, do func(string, map[string][]byte) error) error {
	for i := range l.policies { // of as many files as the server loads
		files := map[string][]byte{}
		for n := range 200 {
			files[fmt.Sprintf("organizations/of-a-customer/%03d.rego", n)] = fmt.Appendf(nil, "# %d\n", i)
		}
		if err := do(authz.Revision(files), files); err != nil {
			return err
		}
	}
	return nil
}
func (l *bigLog) Receipts(context.Context, string, int64, int64) ([]audit.Receipt, error) {
	return nil, nil
}

func (l *bigLog) event(i int64) audit.Event {
	if l.of != nil {
		return l.of(i)
	}
	id := sha256.Sum256(binary.BigEndian.AppendUint64(nil, uint64(i)))
	e := audit.Event{
		ID: uuid.UUID(id[:16]).String(), Time: time.UnixMicro(1_800_000_000_000_000 + 977*i).UTC(),
		Type: audit.KeysListed, Outcome: audit.Success, Org: org.ID(fmt.Sprintf("org-%d", i/10%1000)),
		Actor: audit.Actor{Kind: authz.Person, ID: "user-1234567890"}, Action: "orgkey.list", Request: "683f334f-31c2-4300-9a01-b96eceffc579",
	}
	switch {
	case i/10 >= l.keys:
	case i%10 == 0:
		e.Type, e.Object = audit.KeyCreated, fmt.Sprintf("key-%d", i)
		e.Detail = map[string]string{"backend": "vault", "algorithm": "rsa-2048", "fingerprint": "VXY3gR8pBtaHUe071sZNYuNBAvzsp1qbLsU9XiG0Olw"}
	case i%10 == 1:
		e.Type, e.Object = audit.KeyDelivered, fmt.Sprintf("key-%d", i-1)
	}
	return e
}

func newBigLog(b testing.TB, size, keys int64) *bigLog {
	b.Helper()
	return (&bigLog{size: size, keys: keys}).sign(b)
}

// sign signs a checkpoint of the whole log with a new key.
func (l *bigLog) sign(b testing.TB) *bigLog {
	b.Helper()
	var tree verify.Frontier
	for i := range l.size {
		r, err := l.event(i).Encode()
		if err != nil {
			b.Fatal(err)
		}
		tree.Push(tlog.RecordHash(r.Leaf))
	}
	skey, vkey, err := note.GenerateKey(nil, "orgkeys/bench")
	if err != nil {
		b.Fatal(err)
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		b.Fatal(err)
	}
	c := audit.Checkpoint{Origin: "orgkeys/bench", Size: l.size, Root: tree.Root()}
	text, err := note.Sign(&note.Note{Text: c.Text()}, signer)
	if err != nil {
		b.Fatal(err)
	}
	l.head, l.vkey = audit.Signed{Checkpoint: c, Seq: 1, Note: string(text)}, vkey
	return l
}

func setting(b *testing.B, name string, otherwise int64) int64 {
	b.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		b.Fatal(err)
	}
	return n
}

// BenchmarkExport exports and verifies a log of ORGKEYS_BENCH_EVENTS events
// (100,000 if unset), a tenth of them new keys, or ORGKEYS_BENCH_KEYS. With
// ORGKEYS_BENCH_ARCHIVE the export stays under that name, and its key beside it in
// NAME.key, for builds of the program to verify.
func BenchmarkExport(b *testing.B) {
	n := setting(b, "ORGKEYS_BENCH_EVENTS", 100_000)
	l := newBigLog(b, n, setting(b, "ORGKEYS_BENCH_KEYS", n/10))
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
	if kept := os.Getenv("ORGKEYS_BENCH_ARCHIVE"); kept != "" {
		if err := errors.Join(os.Rename(path, kept), os.WriteFile(kept+".key", []byte(l.vkey+"\n"), 0o600)); err != nil {
			b.Fatal(err)
		}
		path = kept
	}
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
