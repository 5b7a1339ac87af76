package main

import (
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

// Of a database whose log was archived, but for a hundredth, a twentieth is left at most; and a
// start, a list and a new key take what they take on an empty one. With ORGKEYS_TEST_LONG a million events
// are archived; it prints the figures of docs/benchmarks.md.
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
	t.Logf("the database took %d bytes, and takes %d: %.2f %%", before, after, 100*float64(after)/float64(before))
	empty.Stop(t)
	schema := int64(0)
	if events < 1_000_000 { // where what an empty database takes counts
		schema = size(empty)
	}
	if (after-schema)*20 > before {
		t.Errorf("the database took %d bytes, and takes %d, of which an empty one takes %d", before, after, schema)
	}
	if os.Getenv("ORGKEYS_TEST_LONG") == "" {
		return // times are of a quiet machine
	}

	starts := map[*harness.Server][]time.Duration{}
	for range 10 {
		for _, s := range []*harness.Server{empty, full} {
			began := time.Now()
			s.Start(t)
			starts[s] = append(starts[s], time.Since(began))
			s.Stop(t)
		}
	}
	ratio(t, "start", starts[empty], starts[full])
	empty.Start(t)
	full.Start(t)
	lists := map[*harness.Server][]time.Duration{}
	org := harness.Org()
	for _, s := range []*harness.Server{empty, full} {
		for range 5 {
			s.Generate(t, org)
		}
	}
	for range 400 {
		for _, s := range []*harness.Server{empty, full} {
			began := time.Now()
			s.List(t, org)
			lists[s] = append(lists[s], time.Since(began))
		}
	}
	ratio(t, "list", lists[empty], lists[full])
	made := map[*harness.Server][]time.Duration{}
	for range 4 {
		time.Sleep(8 * time.Second) // the pools fill
		for range 14 {
			for _, s := range []*harness.Server{empty, full} {
				org := harness.Org()
				began := time.Now()
				s.Generate(t, org)
				made[s] = append(made[s], time.Since(began))
			}
		}
	}
	ratio(t, "generate", made[empty], made[full])
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

// ratio prints how the medians compare.
func ratio(t *testing.T, what string, empty, full []time.Duration) {
	t.Helper()
	slices.Sort(empty)
	slices.Sort(full)
	a, b := empty[len(empty)/2], full[len(full)/2]
	t.Logf("%s: p50 %v on an empty database, %v on this: %.3f", what, a, b, float64(b)/float64(a))
}
