package main

import (
	"bytes"
	"cmp"
	"context"
	"database/sql"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/org"
)

// fillLog puts events into a stopped server's log, as nodes and people cause them, a year ago.
func fillLog(t *testing.T, db *sql.DB, events int) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	size := harness.Number(t, db, "SELECT size FROM log_head")
	stored := map[int64]tlog.Hash{}
	rows, err := db.Query("SELECT idx, hash FROM log_hashes")
	must(err)
	for rows.Next() {
		var at int64
		var b []byte
		must(rows.Scan(&at, &b))
		stored[at] = tlog.Hash(b)
	}
	must(rows.Err())
	reader := tlog.HashReaderFunc(func(at []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(at))
		for i, x := range at {
			out[i] = stored[x]
		}
		return out, nil
	})
	const batch = 20_000
	for done := 0; done < events; {
		tx, err := db.Begin()
		must(err)
		insert := func(text string) *sql.Stmt {
			s, err := tx.Prepare(text)
			must(err)
			return s
		}
		event := insert("INSERT INTO events (idx, id, occurred_at, type, reason, org_id, actor_kind, actor, object, leaf, mac) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, '')")
		person := insert("INSERT INTO event_persons (event_id, personal) VALUES (?, ?)")
		hash := insert("INSERT INTO log_hashes (idx, hash) VALUES (?, ?)")
		var leaves [][]byte
		for ; done < events && len(leaves) < batch; done++ {
			org := org.ID(fmt.Sprintf("org-%d", done%200))
			e := audit.New(audit.SecretsFetched, org)
			e.Time = time.Now().Add(-365*24*time.Hour + time.Duration(done)*time.Millisecond).UTC()
			e.Actor = audit.Actor{Kind: "node", ID: fmt.Sprintf("019f0000-0000-7000-8000-%012d", done%1000)}
			e.Request, e.Detail = audit.NewID(), map[string]string{"ip": fmt.Sprintf("192.0.2.%d", done%250), "secrets": "3"}
			e.Personal = audit.Personal{Address: fmt.Sprintf("198.51.100.%d", done%250)}
			r, err := e.Encode()
			must(err)
			_, err = event.Exec(size+int64(len(leaves)), r.ID, r.Time.UnixMicro(), string(r.Type), r.Reason, org, string(r.Kind), r.Actor, r.Object, r.Leaf)
			must(err)
			_, err = person.Exec(r.ID, r.Personal)
			must(err)
			leaves = append(leaves, r.Leaf)
		}
		hashes, root, err := audit.Grow(size, leaves, reader)
		must(err)
		for i, h := range hashes {
			at := tlog.StoredHashIndex(0, size) + int64(i)
			stored[at] = h
			_, err := hash.Exec(at, h[:])
			must(err)
		}
		size += int64(len(leaves))
		_, err = tx.Exec("UPDATE log_head SET size = ?, root = ?", size, root[:])
		must(err)
		must(tx.Commit())
	}
}

// Of a database whose log was archived, but for a hundredth, a twenty-fifth is left at most; and a
// start, a list and a new key take what they take on an empty one: by what
// a list writes, and in turns by medians of time and processor time. With ORGKEYS_TEST_LONG a
// million events are archived; it prints the figures of docs/benchmarks.md.
func TestAnArchivedLogLeavesASmallDatabase(t *testing.T) {
	events := 51_712
	if os.Getenv("ORGKEYS_TEST_LONG") != "" {
		events = 1_010_000
	}
	archive := filepath.Join(t.TempDir(), "archive")
	pool := harness.Set("ORGKEYS_POOL", "16")
	empty, full := harness.Start(t, pool), harness.Start(t, pool, harness.Set("ORGKEYS_AUDIT_ARCHIVE", archive), harness.Set("ORGKEYS_CHECKPOINT_INTERVAL", "2s"))
	full.Stop(t)
	db := full.Database(t)
	filling := time.Now()
	fillLog(t, db, events)
	if _, err := db.Exec("PRAGMA wal_checkpoint(TRUNCATE)"); err != nil {
		t.Fatal(err)
	}
	at := harness.Number(t, db, fmt.Sprintf("SELECT occurred_at FROM events WHERE idx = %d", events/101*100))
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	size := func(s *harness.Server) int64 {
		info, err := os.Stat(filepath.Join(s.Dir, "orgkeys.db"))
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	before := size(full)
	t.Logf("%d events were made in %v", events, time.Since(filling))
	// The server signs what is there, and feeds the file sink.
	full.Start(t)
	harness.Eventually(t, 20*time.Minute, "the sink has everything", func() bool { return sinkHolds(t, full) >= int64(events) })
	moving := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Minute)
	defer cancel()
	if full.RunUntil(t, ctx, "audit", "archive", "--before", time.UnixMicro(at).UTC().Format(time.RFC3339Nano)) {
		t.Fatal("it takes too long")
	}
	t.Logf("they were moved in %v", time.Since(moving))
	if out, errs, code := full.Run(t, "audit", "archive", "--before", time.UnixMicro(at).UTC().Format(time.RFC3339Nano)); code != 0 {
		t.Fatalf("%s%s", out, errs)
	} else if !strings.Contains(out, "moved 0 events; the first "+strconv.Itoa(events/101*100/256*256)+" ") {
		t.Errorf("a second run says %s", out)
	}
	full.Stop(t)
	after := size(full)
	empty.Stop(t)
	schema := size(empty)
	percent := func(n int64) float64 { return 100 * float64(n) / float64(before) }
	t.Logf("the database took %d bytes, and takes %d: %.2f %%, and %.2f %% without the %d of an empty one", before, after, percent(after), percent(after-schema), schema)
	if (after-schema)*25 > before {
		t.Errorf("the database took %d bytes, and takes %d, of which an empty one takes %d", before, after, schema)
	}
	if os.Getenv("ORGKEYS_TEST_LONG") == "" {
		return // times are of a quiet machine
	}

	full.Configured("ORGKEYS_CHECKPOINT_INTERVAL", "") // as the other's: signing takes time, too
	both := []*harness.Server{empty, full}
	org := harness.Org()
	wrote := map[*harness.Server]int64{}
	for _, s := range both {
		s.Start(t)
		for range 30 {
			s.List(t, org)
		}
		before := written(t, s)
		for range 200 {
			s.List(t, org)
		}
		wrote[s] = written(t, s) - before
		s.Stop(t)
	}
	ratio := float64(wrote[full]) / float64(wrote[empty])
	t.Logf("200 lists write %d bytes on an empty database, %d on this: %.3f", wrote[empty], wrote[full], ratio)
	if ratio > most {
		t.Errorf("200 lists write %.3f of what they write on an empty database", ratio)
	}
	starts := costs{}
	for range 15 {
		for _, s := range both {
			starts.measure(t, s, 1, func() { s.Start(t) })
			s.Stop(t)
		}
		slices.Reverse(both)
	}
	starts.compare(t, "start", empty, full, true)
	empty.Start(t)
	full.Start(t)
	for _, s := range both {
		for range 5 {
			s.Generate(t, org)
		}
	}
	time.Sleep(8 * time.Second) // the pools fill
	lists := costs{}
	for range 40 {
		for _, s := range both {
			lists.measure(t, s, 50, func() { s.List(t, org) })
		}
		slices.Reverse(both)
	}
	lists.compare(t, "list", empty, full, true)
	made := costs{}
	for range 4 {
		time.Sleep(8 * time.Second) // the pools fill
		for range 14 {
			for _, s := range both {
				org := harness.Org()
				made.measure(t, s, 1, func() { s.Generate(t, org) })
			}
			slices.Reverse(both)
		}
	}
	made.compare(t, "generate", empty, full, false) // its processor time is that of the pool
}

// costs is what the same took on two servers, in turns.
type costs map[*harness.Server]*cost

type cost struct {
	took      []time.Duration // each
	processor []time.Duration // of the server, for each round
}

// measure has a server do something some times. A server that is not running begins with none.
func (c costs) measure(t *testing.T, s *harness.Server, times int, do func()) {
	t.Helper()
	if c[s] == nil {
		c[s] = &cost{}
	}
	before := time.Duration(0)
	if s.Running() {
		before = s.ProcessorTime(t)
	}
	for range times {
		began := time.Now()
		do()
		c[s].took = append(c[s].took, time.Since(began))
	}
	c[s].processor = append(c[s].processor, s.ProcessorTime(t)-before)
}

// most is how much more something may take on the full database: other work on the machine
// changes processor time by a tenth.
const most = 1.25

// compare prints how the medians compare, of rounds that were next to each other, and requires
// that of processor time where it counts.
func (c costs) compare(t *testing.T, what string, empty, full *harness.Server, counts bool) {
	t.Helper()
	a, b := c[empty], c[full]
	t.Logf("%s: p50 %v on an empty database, %v on this: %.3f", what, median(a.took), median(b.took), float64(median(b.took))/float64(median(a.took)))
	if !counts {
		return
	}
	ratios := make([]float64, len(a.processor))
	for i := range ratios {
		ratios[i] = float64(b.processor[i]) / float64(a.processor[i])
	}
	ratio := median(ratios)
	t.Logf("%s: processor time for a round %v on an empty database, %v on this: %.3f", what, median(a.processor), median(b.processor), ratio)
	if ratio > most {
		t.Errorf("%s takes %.3f of the processor time that it takes on an empty database", what, ratio)
	}
}

func median[T cmp.Ordered](all []T) T {
	sorted := slices.Sorted(slices.Values(all))
	return sorted[len(sorted)/2]
}

// written is how many bytes a server has written so far, to all of its files.
func written(t *testing.T, s *harness.Server) int64 {
	t.Helper()
	io, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", s.PID()))
	if err != nil {
		t.Fatal(err)
	}
	var n int64
	if _, err := fmt.Sscanf(string(io[bytes.Index(io, []byte("wchar:")):]), "wchar: %d", &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// sinkHolds is how many events the file sink covers.
func sinkHolds(t *testing.T, s *harness.Server) int64 {
	t.Helper()
	f, err := os.Open(s.AuditFile())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	tail := make([]byte, min(info.Size(), 8<<10))
	if _, err := f.ReadAt(tail, info.Size()-int64(len(tail))); err != nil {
		t.Fatal(err)
	}
	_, lines, _ := strings.Cut(string(tail), "\n")
	newest, err := verify.NewestIn(lines, false)
	if err != nil {
		return 0
	}
	c, err := audit.ParseCheckpoint(newest)
	if err != nil {
		t.Fatal(err)
	}
	return c.Size
}
