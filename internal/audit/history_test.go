package audit_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/audittest"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// The checks that find a rewritten history.
const (
	byTheTree      = "the tree"                            // orgkeys audit verify, with nothing else
	bySignature    = "the signed checkpoints"              // audit verify with those that the database holds
	byTheSinksCopy = "the sink's copy"                     // audit verify --sink
	atSigning      = "the next signature"                  // the running server, within the interval
	bySinkAtStart  = "the sink's checkpoint at start"      // the server refuses to start
	byTheVerifier  = "an earlier checkpoint, kept outside" // audit verify --checkpoint
)

// Issue 6: history rewritten in every way that the database allows, and which
// check finds it. A forger "recomputes" who makes the whole tree fit again.
func TestEveryRewritingOfHistoryIsFound(t *testing.T) {
	alter := []string{`UPDATE events SET leaf = CAST(replace(leaf, 'u-1', 'u-2') AS BLOB), actor = 'u-2' WHERE idx = 12`}
	drop := []string{`DELETE FROM events WHERE idx = 12`, `UPDATE events SET idx = -idx WHERE idx > 12`, `UPDATE events SET idx = -idx - 1 WHERE idx < 0`}
	insert := []string{`UPDATE events SET idx = -idx WHERE idx >= 12`, `UPDATE events SET idx = 1 - idx WHERE idx < 0`,
		`INSERT INTO events (idx, id, occurred_at, type, org_id, actor, object, leaf) SELECT 12, 'x', occurred_at, type, org_id, actor, object, CAST(replace(leaf, id, 'x') AS BLOB) FROM events WHERE idx = 13`}
	swap := []string{`UPDATE events SET idx = 99 WHERE idx = 12`, `UPDATE events SET idx = 12 WHERE idx = 20`, `UPDATE events SET idx = 20 WHERE idx = 99`}
	truncate := []string{`DELETE FROM events WHERE idx >= 25`}
	whole := []string{`UPDATE events SET leaf = CAST(replace(leaf, 'u-1', 'u-9') AS BLOB), actor = 'u-9'`}
	unsign := `DELETE FROM signed_checkpoints WHERE size > 20`
	for _, c := range []struct {
		name       string
		statements []string
		recompute  bool
		found      []string
	}{
		{"an event altered", alter, false, []string{byTheTree}},
		{"an event dropped", drop, false, []string{byTheTree}},
		{"an event inserted", insert, false, []string{byTheTree}},
		{"two events swapped", swap, false, []string{byTheTree}},
		{"the newest cut off", truncate, false, []string{byTheTree}},
		{"an event altered, recomputed", alter, true, []string{bySignature, byTheSinksCopy, atSigning, bySinkAtStart, byTheVerifier}},
		{"an event dropped, recomputed", drop, true, []string{bySignature, byTheSinksCopy, atSigning, bySinkAtStart, byTheVerifier}},
		{"an event inserted, recomputed", insert, true, []string{bySignature, byTheSinksCopy, atSigning, bySinkAtStart, byTheVerifier}},
		{"two events swapped, recomputed", swap, true, []string{bySignature, byTheSinksCopy, atSigning, bySinkAtStart, byTheVerifier}},
		{"the newest cut off, recomputed", truncate, true, []string{bySignature, byTheSinksCopy, atSigning, bySinkAtStart, byTheVerifier}},
		{"the newest cut off, recomputed, their signed checkpoints removed", append(truncate, unsign), true, []string{byTheSinksCopy, atSigning, bySinkAtStart, byTheVerifier}},
		{"the whole log replaced, recomputed", whole, true, []string{bySignature, byTheSinksCopy, atSigning, bySinkAtStart, byTheVerifier}},
		{"the whole log replaced, recomputed, no signed checkpoint left", append(whole, `DELETE FROM signed_checkpoints`), true, []string{byTheSinksCopy, atSigning, bySinkAtStart, byTheVerifier}},
		{"everything deleted", []string{`DELETE FROM events`, `DELETE FROM signed_checkpoints`}, true, []string{byTheSinksCopy, atSigning, bySinkAtStart, byTheVerifier}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHistory(t)
			h.Exec(t, c.statements...)
			if c.recompute {
				h.Rebuild(t)
			}
			h.wantFound(t, c.found)
		})
	}
}

// Yesterday's backup is a consistent log with valid signatures: only what lies
// outside the database shows that it is not today's.
func TestYesterdaysBackupIsFoundFromOutside(t *testing.T) {
	h := newHistory(t)
	backup := filepath.Join(t.TempDir(), "backup.db")
	h.Exec(t, `VACUUM INTO '`+backup+`'`)
	sink, kept := h.copyOfSink(t), h.checkpoint(t)
	h.Add(t, 5)
	h.sign(t)
	later := h.checkpoint(t)
	restored, err := sqlstore.Open(t.Context(), backup)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { restored.Close() })
	h.DB = restored
	h.kept = later
	h.wantFound(t, []string{byTheSinksCopy, atSigning, bySinkAtStart, byTheVerifier})
	// With what was kept before the backup only, nothing can be seen.
	h.kept = kept
	if err := os.WriteFile(h.Sink, sink, 0o600); err != nil {
		t.Fatal(err)
	}
	h.wantFound(t, []string{atSigning})
}

// history is a log of 30 events that is signed at 10, 20 and 30, with its sink.
type history struct {
	audittest.Log
	signer  audit.LocalSigner
	running *audit.Checkpointer // that of the server that ran all the while
	kept    audit.Checkpoint    // by an auditor

	elsewhere bool // another replica is signing
}

func newHistory(t *testing.T) *history {
	t.Helper()
	h := &history{Log: audittest.Open(t), signer: audittest.NewSigner(t)}
	h.running = h.checkpointer()
	for range 3 {
		h.Add(t, 10)
		h.sign(t)
	}
	h.kept = h.checkpoint(t)
	for check, err := range h.checks(t) {
		if err != nil {
			t.Fatalf("before anything was done, %s finds: %v", check, err)
		}
	}
	return h
}

func (h *history) checkpointer() *audit.Checkpointer {
	quiet := slog.New(slog.DiscardHandler)
	return audit.NewCheckpointer(audit.NewLog(h.DB, quiet), store{h}, h.signer, time.Hour, quiet)
}

// store is the database that the history is in at the moment, which a test may
// replace under a running checkpointer as an administrator does under a server.
type store struct{ h *history }

func (s store) Head(ctx context.Context) (audit.Checkpoint, error) { return s.h.DB.Head(ctx) }
func (s store) Durable(ctx context.Context, held audit.Checkpoint, limit int) ([]audit.Entry, audit.Checkpoint, error) {
	return s.h.DB.Durable(ctx, held, limit)
}
func (s store) LastSigned(ctx context.Context) (audit.Signed, error) {
	return s.h.DB.LastSigned(ctx)
}
func (s store) KeepSigned(ctx context.Context, c audit.Signed, vkey string) error {
	return s.h.DB.KeepSigned(ctx, c, vkey)
}
func (s store) ThinSigned(ctx context.Context) error { return s.h.DB.ThinSigned(ctx) }
func (s store) Exclusive(ctx context.Context, name string, do func(context.Context) error) (bool, error) {
	if s.h.elsewhere {
		return false, nil
	}
	return s.h.DB.Exclusive(ctx, name, do)
}
func (s store) Consistency(ctx context.Context, size, old int64) (tlog.TreeProof, error) {
	return s.h.DB.Consistency(ctx, size, old)
}

func (h *history) sign(t *testing.T) {
	t.Helper()
	if err := h.running.Sign(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func (h *history) checkpoint(t *testing.T) audit.Checkpoint {
	t.Helper()
	head, err := h.DB.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return head
}

func (h *history) copyOfSink(t *testing.T) []byte {
	t.Helper()
	b, err := os.ReadFile(h.Sink)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// checks runs every check and says what each finds.
func (h *history) checks(t *testing.T) map[string]error {
	t.Helper()
	signed, outside := &verify.Copy{}, &verify.Copy{}
	all, err := h.DB.SignedAfter(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range all {
		signed.AddSigned(s.Checkpoint)
	}
	outside.AddCheckpoint(h.kept)
	verify := func(c *verify.Copy) error { _, err := verify.Verify(t.Context(), h.DB, c, nil); return err }
	quiet := slog.New(slog.DiscardHandler)
	return map[string]error{
		byTheTree:      verify(nil),
		bySignature:    verify(signed),
		byTheSinksCopy: verify(h.Copy(t)),
		byTheVerifier:  verify(outside),
		atSigning:      h.running.Sign(t.Context()),
		bySinkAtStart:  audit.NewLog(h.DB, quiet, audit.NewFileSink(h.Sink)).CheckExtends(t.Context()),
	}
}

func (h *history) wantFound(t *testing.T, want []string) {
	t.Helper()
	found := h.checks(t)
	tree := found[byTheTree] != nil
	for _, check := range want {
		err := found[check]
		delete(found, check)
		var problem *verify.Problem
		var rewritten *audit.RewrittenError
		var rollback *audit.RollbackError
		if !errors.As(err, &problem) && !errors.As(err, &rewritten) && !errors.As(err, &rollback) {
			t.Errorf("%s does not find it: %v", check, err)
		}
	}
	for check, err := range found {
		if err != nil && !tree {
			t.Errorf("%s finds it, which the table does not say: %v", check, err)
		}
	}
}

// A checkpoint is signed only when the log has grown, so an idle log costs nothing.
func TestACheckpointIsSignedWhenTheLogHasGrown(t *testing.T) {
	h := newHistory(t)
	h.sign(t)
	all, err := h.DB.SignedAfter(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	var sizes []int64
	for _, s := range all {
		sizes = append(sizes, s.Size)
	}
	if fmt.Sprint(sizes) != "[10 20 30]" {
		t.Errorf("signed at %v", sizes)
	}
}

// What has been found to be rewritten is not signed, by whoever asks next.
func TestARewrittenLogIsNotSigned(t *testing.T) {
	h := newHistory(t)
	h.Rebuild(t, `UPDATE events SET leaf = CAST(replace(leaf, 'u-1', 'u-2') AS BLOB), actor = 'u-2' WHERE idx = 12`)
	h.add30(t)
	restarted := h.checkpointer()
	for name, c := range map[string]*audit.Checkpointer{"the running server": h.running, "one that starts": restarted} {
		var rewritten *audit.RewrittenError
		if err := c.Sign(t.Context()); !errors.As(err, &rewritten) || c.Status().Err == nil {
			t.Errorf("%s: %v, status %v", name, err, c.Status().Err)
		}
	}
	h.elsewhere = true
	for name, c := range map[string]*audit.Checkpointer{"the running server": h.running, "one that starts": restarted} {
		if err := c.Sign(t.Context()); !errors.As(err, new(*audit.RewrittenError)) || c.Status().Err == nil {
			t.Errorf("%s, while another replica is signing: %v, status %v", name, err, c.Status().Err)
		}
	}
	last, err := h.DB.LastSigned(t.Context())
	if err != nil || last.Size != 30 {
		t.Errorf("the newest signed checkpoint covers %d, %v", last.Size, err)
	}
}

// What a sink holds already and no checkpoint covers yet cannot be rewritten
// either: the running server signs nothing more, and the sink gets nothing more.
func TestALogRewrittenBetweenTwoSignaturesIsNotSigned(t *testing.T) {
	for _, c := range []struct {
		name  string
		later int // events recorded after it was rewritten
	}{{"before anything else is recorded", 0}, {"and more was recorded", 3}} {
		t.Run(c.name, func(t *testing.T) {
			l := audittest.Open(t)
			quiet := slog.New(slog.DiscardHandler)
			auditLog := audit.NewLog(l.DB, quiet, audit.NewFileSink(l.Sink))
			checkpoints := audit.NewCheckpointer(auditLog, l.DB, audittest.NewSigner(t), time.Hour, quiet)
			defer run(t, auditLog)()
			record(t, auditLog, 5)
			flush(t, auditLog)
			if err := checkpoints.Sign(t.Context()); err != nil {
				t.Fatal(err)
			}
			record(t, auditLog, 5)
			flush(t, auditLog)
			held := read(t, l.Sink)
			l.Rebuild(t, `UPDATE events SET leaf = CAST(replace(leaf, 'acme', 'evil') AS BLOB), org_id = 'evil' WHERE idx = 7`)
			if c.later > 0 {
				record(t, auditLog, c.later)
				waitFor(t, "they get no place", func() bool { return errors.As(auditLog.Halted(), new(*audit.RollbackError)) })
			}
			if err := checkpoints.Sign(t.Context()); !errors.As(err, new(*audit.RollbackError)) {
				t.Errorf("signing: %v", err)
			}
			waitFor(t, "the sink's follower sees it", func() bool { return errors.As(auditLog.Sinks()[0].Err, new(*audit.RollbackError)) })
			if read(t, l.Sink) != held {
				t.Error("the sink was given more")
			}
			if last, err := l.DB.LastSigned(t.Context()); err != nil || last.Size != 5 {
				t.Errorf("the newest signed checkpoint covers %d, %v", last.Size, err)
			}
		})
	}
}

// add30 adds an event without a sink.
func (h *history) add30(t *testing.T) {
	t.Helper()
	if err := h.DB.Record(t.Context(), audit.New(audit.KeysListed, "acme")); err != nil {
		t.Fatal(err)
	}
	if _, err := h.DB.Sequence(t.Context(), 1000, audit.Condition{}); err != nil {
		t.Fatal(err)
	}
}

// Signed checkpoints reach every sink, in order, and none is passed over by a
// sink that was down when it was signed.
func TestEverySinkRecordsSignedCheckpoints(t *testing.T) {
	l := audittest.Open(t)
	file := audit.NewFileSink(l.Sink)
	gate := &gatedSink{Sink: audit.NewFileSink(l.Sink + ".second")}
	gate.set(errors.New("disk full"))
	quiet := slog.New(slog.DiscardHandler)
	auditLog := audit.NewLog(l.DB, quiet, file, gate)
	c := audit.NewCheckpointer(auditLog, l.DB, audittest.NewSigner(t), time.Hour, quiet)
	end := run(t, auditLog)
	defer end()
	for range 4 {
		if err := auditLog.Record(t.Context(), audit.New(audit.KeysListed, "acme")); err != nil {
			t.Fatal(err)
		}
		if _, err := l.DB.Sequence(t.Context(), 10, audit.Condition{}); err != nil {
			t.Fatal(err)
		}
		if err := c.Sign(t.Context()); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the healthy sink has the signed checkpoint", func() bool {
			last, err := l.DB.LastSigned(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return strings.Contains(read(t, l.Sink), quoted(last.Note))
		})
	}
	if strings.Contains(read(t, l.Sink+".second"), "— ") {
		t.Fatal("the failing sink has a signed checkpoint already, so the case proves nothing")
	}
	gate.set(nil)
	flush(t, auditLog)
	all, err := l.DB.SignedAfter(t.Context(), 0)
	if err != nil || len(all) != 4 {
		t.Fatalf("%d signed, %v", len(all), err)
	}
	for _, s := range all {
		if !strings.Contains(read(t, l.Sink), quoted(s.Note)) {
			t.Errorf("the sink that was there lacks the signed checkpoint of %d events", s.Size)
		}
	}
	if !strings.Contains(read(t, l.Sink+".second"), quoted(all[3].Note)) {
		t.Error("the sink that was down lacks the newest signed checkpoint")
	}
	for _, path := range []string{l.Sink, l.Sink + ".second"} {
		wantSameEvents(t, l.DB, path)
	}
}

// Issue 6: whatever a sink does, nothing is missing from any, compared event by event.
func TestSinkFaultsLoseNothing(t *testing.T) {
	for _, c := range []struct {
		name  string
		fault func(*gatedSink) (undo func())
		up    bool // whether the sink still counts as following
	}{
		{"refusing", func(s *gatedSink) func() { s.set(errors.New("refused")); return func() { s.set(nil) } }, false},
		{"hung", func(s *gatedSink) func() { return s.hang() }, false},
		{"slow", func(s *gatedSink) func() { s.slow(200 * time.Millisecond); return func() { s.slow(0) } }, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			l := audittest.Open(t)
			bad := &gatedSink{Sink: audit.NewFileSink(l.Sink + ".second")}
			auditLog := audit.NewLog(l.DB, slog.New(slog.DiscardHandler), audit.NewFileSink(l.Sink), bad)
			auditLog.SetSinkDeadline(300 * time.Millisecond)
			defer run(t, auditLog)()
			record(t, auditLog, 20)
			flush(t, auditLog)
			undo := c.fault(bad)
			record(t, auditLog, 20)
			waitFor(t, "the other sink goes on", func() bool { return auditLog.Sinks()[0].Next == 40 })
			if !c.up {
				waitFor(t, "the sink's trouble is seen", func() bool { return auditLog.Sinks()[1].Err != nil })
				event := audit.New(audit.KeysListed, "acme")
				if err := auditLog.Record(t.Context(), event); err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				err := auditLog.Acknowledged(ctx, event.ID)
				if err == nil || !strings.Contains(err.Error(), "sink second") {
					t.Errorf("a release that waits for it hears %v, which must name the sink", err)
				}
			}
			undo()
			record(t, auditLog, 20)
			flush(t, auditLog)
			for _, path := range []string{l.Sink, l.Sink + ".second"} {
				wantSameEvents(t, l.DB, path)
			}
		})
	}
}

// A sink that goes on failing is tried at growing distances, also if it worked
// before; once it works it is followed at once.
func TestPausesGrowWhileASinkFails(t *testing.T) {
	t.Parallel()
	l := audittest.Open(t)
	bad := &gatedSink{Sink: audit.NewFileSink(l.Sink + ".second")}
	auditLog := audit.NewLog(l.DB, slog.New(slog.DiscardHandler), bad)
	defer run(t, auditLog)()
	record(t, auditLog, 3)
	flush(t, auditLog)
	tries := func() int { bad.mu.Lock(); defer bad.mu.Unlock(); return bad.calls }
	bad.set(errors.New("refused"))
	before := tries()
	record(t, auditLog, 3)
	time.Sleep(4 * time.Second)
	// At 0, 0.25, 0.75, 1.75 and 3.75 s; without growing pauses 16 times.
	if n := tries() - before; n < 2 || n > 8 {
		t.Errorf("it was tried %d times in 4 s", n)
	}
	bad.set(nil)
	flush(t, auditLog)
	wantSameEvents(t, l.DB, l.Sink+".second")
}

// A stopped service leaves no event without its place in the log.
func TestFlushLeavesNothingBehind(t *testing.T) {
	l := audittest.Open(t)
	auditLog := audit.NewLog(l.DB, slog.New(slog.DiscardHandler), audit.NewFileSink(l.Sink))
	end := run(t, auditLog)
	record(t, auditLog, 500)
	flush(t, auditLog)
	end()
	if n, err := l.DB.Unsequenced(t.Context()); n != 0 || err != nil {
		t.Errorf("%d events without a place, %v", n, err)
	}
	wantSameEvents(t, l.DB, l.Sink)
}

// A shared sink may hold a checkpoint of entries whose receipts nobody has: the
// process ended, or its answer was lost. They are given again, and no receipt is missing.
func TestLostReceiptsAreGivenAgain(t *testing.T) {
	l := audittest.Open(t)
	sink := &signingSink{FileSink: audit.NewFileSink(l.Sink)}
	auditLog := audit.NewLog(l.DB, slog.New(slog.DiscardHandler), sink)
	end := run(t, auditLog)
	record(t, auditLog, 20)
	flush(t, auditLog)
	sink.deaf.Store(true)
	record(t, auditLog, 20)
	waitFor(t, "the sink holds what it gave no receipts for", func() bool {
		held, err := sink.Last(t.Context())
		return err == nil && held.Size == 40
	})
	end()
	sink.deaf.Store(false)
	again := audit.NewLog(l.DB, slog.New(slog.DiscardHandler), &signingSink{FileSink: audit.NewFileSink(l.Sink)})
	defer run(t, again)()
	flush(t, again)
	receipts, err := l.DB.Receipts(t.Context(), sink.Name(), 0, 100)
	if err != nil || len(receipts) != 40 {
		t.Errorf("%d receipts of 40, %v", len(receipts), err)
	}
}

// While another replica feeds a shared sink, nobody knows whether it will succeed: this
// one's earlier trouble is not over, and the sink does not hold the whole log.
func TestAReplicaThatWaitsForAnotherHasNotCaughtUp(t *testing.T) {
	l := audittest.Open(t)
	sink := &signingSink{FileSink: audit.NewFileSink(l.Sink)}
	db := &contended{DB: l.DB}
	auditLog := audit.NewLog(db, slog.New(slog.DiscardHandler), sink)
	defer run(t, auditLog)()
	record(t, auditLog, 20)
	flush(t, auditLog)
	waitFor(t, "the sink has caught up", func() bool { s := auditLog.Sinks()[0]; return s.Err == nil && !s.CaughtUp.IsZero() })
	sink.deaf.Store(true)
	record(t, auditLog, 1)
	waitFor(t, "the sink's trouble is seen", func() bool { return auditLog.Sinks()[0].Err != nil })
	before := auditLog.Sinks()[0].CaughtUp

	db.elsewhere.Store(true)
	waitFor(t, "it has waited for the other replica", func() bool { return db.refused.Load() >= 3 })
	if s := auditLog.Sinks()[0]; s.Err == nil || s.CaughtUp != before {
		t.Errorf("while another replica is at it: error %v, caught up %v, and before at %v", s.Err, s.CaughtUp, before)
	}

	sink.deaf.Store(false)
	db.elsewhere.Store(false)
	flush(t, auditLog)
	waitFor(t, "the sink has caught up again", func() bool { return auditLog.Sinks()[0].CaughtUp.After(before) })
}

// A sink whose receipts for a whole batch take longer than a call may take gets less at
// once: it would never get on with the same again.
func TestASlowSinkGetsOnWithItsBacklog(t *testing.T) {
	l := audittest.Open(t)
	sink := &signingSink{FileSink: audit.NewFileSink(l.Sink), each: 2 * time.Millisecond}
	auditLog := audit.NewLog(l.DB, slog.New(slog.DiscardHandler), sink)
	auditLog.SetSinkDeadline(time.Second) // 1,000 events take two
	record(t, auditLog, 1500)
	defer run(t, auditLog)()
	flush(t, auditLog)
	if receipts, err := l.DB.Receipts(t.Context(), sink.Name(), 0, 1500); err != nil || len(receipts) != 1500 {
		t.Errorf("%d receipts of 1500, %v", len(receipts), err)
	}
}

// contended is a database whose exclusive work another replica may be doing.
type contended struct {
	*sqlstore.DB
	elsewhere atomic.Bool
	refused   atomic.Int64
}

func (c *contended) Exclusive(ctx context.Context, name string, do func(context.Context) error) (bool, error) {
	if c.elsewhere.Load() {
		c.refused.Add(1)
		return false, nil
	}
	return c.DB.Exclusive(ctx, name, do)
}

// signingSink is a shared sink that gives receipts, and may have its answers lost.
type signingSink struct {
	*audit.FileSink
	deaf atomic.Bool
	each time.Duration // what an entry takes
}

func (s *signingSink) Name() string { return "signing" }

func (s *signingSink) Shared() bool { return true }

func (s *signingSink) Append(ctx context.Context, entries []audit.Entry, c audit.Checkpoint) ([][]byte, error) {
	if _, err := s.FileSink.Append(ctx, entries, c); err != nil {
		return nil, err
	}
	if s.deaf.Load() {
		return nil, errors.New("the answer was lost")
	}
	select {
	case <-time.After(time.Duration(len(entries)) * s.each):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	receipts := make([][]byte, len(entries))
	for i, e := range entries {
		receipts[i] = fmt.Appendf(nil, "receipt of %d", e.Index)
	}
	return receipts, nil
}

// gatedSink is a sink whose disk can be made to fail, hang or be slow.
type gatedSink struct {
	audit.Sink

	mu    sync.Mutex
	err   error
	delay time.Duration
	hung  chan struct{}
	calls int // of Append
}

func (s *gatedSink) Name() string { return "second" }

func (s *gatedSink) set(err error) { s.mu.Lock(); defer s.mu.Unlock(); s.err = err }

func (s *gatedSink) slow(d time.Duration) { s.mu.Lock(); defer s.mu.Unlock(); s.delay = d }

func (s *gatedSink) hang() (undo func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hung = make(chan struct{})
	return func() { s.mu.Lock(); defer s.mu.Unlock(); close(s.hung); s.hung = nil }
}

func (s *gatedSink) Append(ctx context.Context, entries []audit.Entry, c audit.Checkpoint) ([][]byte, error) {
	s.mu.Lock()
	err, delay, hung := s.err, s.delay, s.hung
	s.calls++
	s.mu.Unlock()
	if hung != nil {
		<-hung // as a write to a dead disk, it does not end with ctx
	}
	if err != nil {
		return nil, err
	}
	time.Sleep(delay)
	return s.Sink.Append(ctx, entries, c)
}

func run(t *testing.T, auditLog *audit.Log) (end func()) {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- auditLog.Run(ctx) }()
	return func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func record(t *testing.T, auditLog *audit.Log, n int) {
	t.Helper()
	var events []audit.Event
	for range n {
		events = append(events, audit.New(audit.KeysListed, "acme"))
	}
	if err := auditLog.Record(t.Context(), events...); err != nil {
		t.Fatal(err)
	}
}

func flush(t *testing.T, auditLog *audit.Log) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := auditLog.Flush(ctx); err != nil {
		t.Fatal(err)
	}
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return string(b)
}

func quoted(text string) string { return strings.ReplaceAll(text, "\n", `\n`) }

// wantSameEvents compares a file sink with the log, event by event.
func wantSameEvents(t *testing.T, db *sqlstore.DB, path string) {
	t.Helper()
	entries, err := db.Entries(t.Context(), 0, 10000)
	if err != nil {
		t.Fatal(err)
	}
	held := map[string]bool{}
	for line := range bytes.Lines([]byte(read(t, path))) {
		held[string(line)] = true
	}
	for _, e := range entries {
		if !held[fmt.Sprintf(`{"index":%d,"event":%s}`+"\n", e.Index, e.Leaf)] {
			t.Errorf("%s lacks event %d", filepath.Base(path), e.Index)
		}
	}
	copied, err := verify.ReadCopy(strings.NewReader(read(t, path)))
	if err != nil {
		t.Fatal(err)
	}
	if report, err := verify.Verify(t.Context(), db, copied, nil); err != nil || report.Covered != int64(len(entries)) {
		t.Errorf("%s covers %d of %d events, %v", filepath.Base(path), report.Covered, len(entries), err)
	}
}

// What a sink would refuse is not signed: the key's word for two logs would be
// worth nothing.
func TestWhatASinkRefusesIsNotSigned(t *testing.T) {
	quiet := slog.New(slog.DiscardHandler)
	for name, damage := range map[string]func(t *testing.T, l audittest.Log){
		"yesterday's log": func(t *testing.T, l audittest.Log) { l.Rebuild(t, "DELETE FROM events WHERE idx >= 20") },
		"another log":     func(t *testing.T, l audittest.Log) { l.Rebuild(t, audittest.AlterEvent7) },
		"a sink that does not answer": func(t *testing.T, l audittest.Log) {
			audittest.Must(t, os.Remove(l.Sink))
			audittest.Must(t, os.Mkdir(l.Sink, 0o700))
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := audittest.New(t)
			damage(t, l)
			c := audit.NewCheckpointer(audit.NewLog(l.DB, quiet, audit.NewFileSink(l.Sink)), l.DB, audittest.NewSigner(t), time.Hour, quiet)
			if err := c.Sign(t.Context()); err == nil || c.Status().Err == nil {
				t.Errorf("signed: %v", err)
			}
			if last, err := l.DB.LastSigned(t.Context()); err != nil || last.Seq != 0 {
				t.Errorf("a signed checkpoint of %d events is stored, %v", last.Size, err)
			}
		})
	}
}
