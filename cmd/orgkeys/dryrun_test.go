package main

import (
	"crypto/sha256"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// contents are what the audit log and what it knows of people consist of. The
// database's and the HSM's own files may be written by whoever opens them.
func contents(t *testing.T, s *harness.Server) map[string]string {
	t.Helper()
	found := map[string]string{}
	db := harness.OpenDatabase(t, s.Dir)
	defer db.Close()
	for _, query := range []string{
		`SELECT coalesce(idx, -1) || hex(leaf) FROM events ORDER BY id`, `SELECT event_id || hex(personal) FROM event_persons ORDER BY event_id`,
		`SELECT size || origin || hex(root) FROM log_head`, `SELECT sink || next FROM sink_progress ORDER BY sink`, `SELECT seq || text || superseded FROM signed_checkpoints ORDER BY seq`,
		`SELECT id || hex(sealed) FROM org_keys WHERE sealed IS NOT NULL ORDER BY id`,
	} {
		found[query] = strings.Join(harness.Strings(t, db, query), "\n")
	}
	for _, file := range []string{s.AuditFile()} {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(b)
		found[file] = string(sum[:])
	}
	return found
}

func unchanged(t *testing.T, before map[string]string, s *harness.Server) {
	t.Helper()
	for name, now := range contents(t, s) {
		if now != before[name] {
			t.Errorf("a dry run changed %s", name)
		}
	}
}

// A dry run says what would be accepted or erased, and changes nothing; then the
// real one does just that.
func TestDryRunsChangeNothing(t *testing.T) {
	t.Parallel()
	s := restored(t, nil)
	before := contents(t, s)
	if out := ok(t, s, "audit", "accept-rollback", "--reason", "a test", "--dry-run"); !strings.Contains(out, "would be accepted: the log continues from 8 events; sink file had acknowledged") {
		t.Errorf("said %q", out)
	}
	unchanged(t, before, s)
	if _, errs, code := s.Run(t, "serve"); code != 1 || !strings.Contains(errs, "accept-rollback") {
		t.Errorf("after the dry run it starts: %d %s", code, errs)
	}
	if out := ok(t, s, "audit", "accept-rollback", "--reason", "a test"); !strings.Contains(out, "\naccepted: ") && !strings.HasPrefix(out, "accepted: ") {
		t.Errorf("said %q", out)
	}
	if out := ok(t, s, "audit", "accept-rollback", "--reason", "a test", "--dry-run"); !strings.HasPrefix(out, "nothing to accept") {
		t.Errorf("said %q", out)
	}
	before = contents(t, s)
	out := ok(t, s, "audit", "erase", "--subject", "admin", "--reason", "a test", "--dry-run")
	if !strings.HasPrefix(out, "dry run, nothing is erased: 8 events hold personal data of admin") {
		t.Errorf("said %q", out)
	}
	unchanged(t, before, s)
	if out := ok(t, s, "audit", "erase", "--subject", "admin", "--reason", "a test"); !strings.HasPrefix(out, "erased the personal data of admin in 8 events") {
		t.Errorf("said %q", out)
	}
}

// Where the log was rewritten, and where there is no sink yet, a dry run says so
// and makes none.
func TestADryRunOfARewrittenLogNamesTheEvent(t *testing.T) {
	t.Parallel()
	s := restored(t, rewriteEvent3)
	before := contents(t, s)
	if out, errs, code := s.Run(t, "audit", "accept-rollback", "--reason", "a test", "--dry-run"); code != 1 || !strings.Contains(errs, "event 3: it differs") {
		t.Errorf("exit code %d\n%s%s", code, out, errs)
	}
	if out := ok(t, s, "audit", "accept-rollback", "--reason", "a test", "--rewritten", "--dry-run"); !strings.Contains(out, "would be accepted") || !strings.Contains(out, "event 3") {
		t.Errorf("said %q", out)
	}
	unchanged(t, before, s)
	// Nor does it copy a sink, which may be larger than what the machine has room for.
	s.Configured("TMPDIR", "/nonexistent")
	appendSink(t, s, "{\"torn")
	before = contents(t, s)
	if out := ok(t, s, "audit", "accept-rollback", "--reason", "a test", "--rewritten", "--dry-run"); !strings.Contains(out, "would be accepted") {
		t.Errorf("with a torn end and no room elsewhere it said %q", out)
	}
	unchanged(t, before, s)
	appendSink(t, s, "\n")
	if _, errs, code := s.Run(t, "audit", "accept-rollback", "--reason", "a test", "--dry-run"); code != 1 || !strings.Contains(errs, s.AuditFile()+": line ") {
		t.Errorf("of a sink with a broken line it says %d %s", code, errs)
	}
	if err := os.Remove(s.AuditFile()); err != nil {
		t.Fatal(err)
	}
	_, _, _ = s.Run(t, "audit", "accept-rollback", "--reason", "a test", "--dry-run")
	if _, err := os.Stat(s.AuditFile()); err == nil {
		t.Error("a dry run made a sink")
	}
}

func appendSink(t *testing.T, s *harness.Server, text string) {
	t.Helper()
	f, err := os.OpenFile(s.AuditFile(), os.O_WRONLY|os.O_APPEND, 0)
	if err == nil {
		_, err = f.WriteString(text)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}
