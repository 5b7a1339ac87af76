package main

import (
	"database/sql"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// used is a stopped server with a log of some events, whose file sink is outside.
func used(t *testing.T) (s *harness.Server, sink string) {
	t.Helper()
	sink = filepath.Join(t.TempDir(), "sink.jsonl")
	s = harness.Start(t, harness.Set("ORGKEYS_AUDIT_FILE", sink))
	org := harness.Org()
	s.Generate(t, org)
	for range 6 {
		s.List(t, org)
	}
	s.Stop(t)
	return s, sink
}

// Promise 5: what vouches for nothing does not exclude truncation.
func TestAnEmptyCopyExcludesNothing(t *testing.T) {
	t.Parallel()
	s, sink := used(t)
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	refused := func(what string, s *harness.Server, args ...string) {
		t.Helper()
		if out, errs, code := s.Run(t, append([]string{"audit", "verify"}, args...)...); code != 3 || !strings.Contains(errs, "truncation not excluded") || strings.Contains(out, "truncation excluded") {
			t.Errorf("%s: exit code %d\n%s%s", what, code, out, errs)
		}
	}
	refused("--sink /dev/null", s, "--sink", "/dev/null")
	refused("an empty copy", s, "--sink", empty)
	refused("an empty sink outside", harness.Configure(t, harness.In(s.Dir), harness.Set("ORGKEYS_AUDIT_FILE", empty)))
	inside := filepath.Join(s.Dir, "audit.jsonl")
	text, err := os.ReadFile(sink)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(inside, text, 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(inside, link); err != nil {
		t.Fatal(err)
	}
	refused("a link into the data directory", harness.Configure(t, harness.In(s.Dir), harness.Set("ORGKEYS_AUDIT_FILE", link)))
	if out := ok(t, s, "audit", "verify"); !strings.Contains(out, "truncation excluded: the copy covers 8 of 8 events\n") {
		t.Errorf("the sink itself: %s", out)
	}
}

// Promise 5: an export says by itself that its end may be missing; what vouches
// for the end comes from elsewhere.
func TestAnExportAloneDoesNotExcludeTruncation(t *testing.T) {
	t.Parallel()
	s, _ := used(t)
	key := strings.TrimSpace(ok(t, s, "audit", "key"))
	archive, kept := filepath.Join(t.TempDir(), "export.tar.gz"), filepath.Join(t.TempDir(), "kept")
	ok(t, s, "audit", "export", archive)
	keep := func() {
		if err := os.WriteFile(kept, []byte(ok(t, s, "audit", "checkpoint")), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	keep()
	verify := func(want int, says string, args ...string) {
		t.Helper()
		out, errs, code := s.Run(t, append([]string{"audit", "verify", archive, "--key", key}, args...)...)
		if code != want || !strings.Contains(out+errs, says) {
			t.Errorf("%v: exit code %d, want %d and %q\n%s%s", args, code, want, says, out, errs)
		}
	}
	verify(3, "truncation not excluded: the export ends with the signed checkpoint of 8 events")
	verify(0, "truncation excluded: the given checkpoint covers 8 of 8 events", "--checkpoint", kept)
	s.Start(t)
	s.List(t, harness.Org())
	s.Stop(t)
	older := kept
	kept += "-later"
	keep()
	verify(1, "event 8: it is missing", "--checkpoint", kept)
	ok(t, s, "audit", "export", archive)
	verify(3, "truncation not excluded: the given checkpoint covers 8 of 9 events", "--checkpoint", older)
	verify(0, "covers 9 of 9 events", "--checkpoint", kept)
}

// restored is a server whose data directory is of before its newest events.
func restored(t *testing.T, change func(t *testing.T, db *sql.DB)) *harness.Server {
	t.Helper()
	s, _ := used(t)
	yesterday := harness.Copy(t, s.Dir)
	s.Start(t)
	s.List(t, harness.Org())
	s.Generate(t, harness.Org())
	s.Stop(t)
	putBack(t, s, yesterday)
	if change != nil {
		db := harness.OpenDatabase(t, s.Dir)
		harness.Unprotect(t, db)
		change(t, db)
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// rewriteEvent3 changes an event and makes everything else fit, as a forger would.
func rewriteEvent3(t *testing.T, db *sql.DB) {
	harness.Exec(t, db, `UPDATE events SET leaf = CAST(replace(leaf, '"actor":"admin"', '"actor":"other"') AS BLOB), actor = 'other' WHERE idx = 3`)
	harness.Exec(t, db, `DELETE FROM signed_checkpoints`)
	harness.Exec(t, db, `DELETE FROM log_hashes`)
	var leaves [][]byte
	for _, leaf := range harness.Strings(t, db, `SELECT leaf FROM events ORDER BY idx`) {
		leaves = append(leaves, []byte(leaf))
	}
	hashes, root, err := audit.Grow(0, leaves, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i, h := range hashes {
		harness.Exec(t, db, `INSERT INTO log_hashes (idx, hash) VALUES (?, ?)`, i, h[:])
	}
	harness.Exec(t, db, `UPDATE log_head SET root = ?`, root[:])
}

// Promise 5: a genuine key that signs a log which the sinks refuse would vouch
// for two logs.
func TestACheckpointOfARestoredLogIsNotSigned(t *testing.T) {
	t.Parallel()
	s := restored(t, rewriteEvent3)
	out, errs, code := s.Run(t, "audit", "checkpoint")
	if code != 1 || strings.Contains(out, "— ") || !strings.Contains(errs, "sink file has acknowledged") {
		t.Errorf("exit code %d\n%s%s", code, out, errs)
	}
	if n := harness.Number(t, harness.OpenDatabase(t, s.Dir), `SELECT count(*) FROM signed_checkpoints`); n != 0 {
		t.Errorf("%d signed checkpoints", n)
	}
}

// With the server still stopped, the log accounts for what the sink was told.
func TestAnAcceptedRollbackVerifiesAtOnce(t *testing.T) {
	t.Parallel()
	s := restored(t, nil)
	ok(t, s, "audit", "accept-rollback", "--reason", "restored the backup")
	if out := ok(t, s, "audit", "verify"); !strings.Contains(out, `a rollback was accepted: "restored the backup"`) {
		t.Errorf("said %s", out)
	}
	s.Start(t)
	s.Generate(t, harness.Org())
	s.Stop(t)
	ok(t, s, "audit", "verify")
}

// A rewritten log is not a backup: the first event that was changed is named.
func TestARewrittenLogIsNotAcceptedAsABackup(t *testing.T) {
	t.Parallel()
	s := restored(t, rewriteEvent3)
	if out, errs, code := s.Run(t, "audit", "accept-rollback", "--reason", "restored the backup"); code != 1 || !strings.Contains(errs, "event 3: it differs") {
		t.Fatalf("exit code %d\n%s%s", code, out, errs)
	}
	if _, errs, code := s.Run(t, "serve"); code != 1 || !strings.Contains(errs, "accept-rollback") {
		t.Fatalf("it started: exit code %d: %s", code, errs)
	}
	ok(t, s, "audit", "accept-rollback", "--reason", "known to us", "--rewritten")
	s.Start(t)
	s.Generate(t, harness.Org())
	s.Stop(t)
	out := ok(t, s, "audit", "verify")
	if !strings.Contains(out, `a rollback was accepted: "known to us"`) || !strings.Contains(out, "it kept the first 3 of 8 events, and the log was rewritten from event 3 on") {
		t.Errorf("said %s", out)
	}
	if list := ok(t, s, "audit", "list"); !strings.Contains(list, `"kept":"3"`) {
		t.Errorf("no event says what was kept: %s", list)
	}
}

// putBack has the server's data directory be what it was when it was copied.
func putBack(t *testing.T, s *harness.Server, from string) {
	t.Helper()
	if err := os.RemoveAll(s.Dir); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(s.Dir, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	harness.Tighten(t, s.Dir)
}

// Each further file sink, and a run that was interrupted, is accepted by the
// same command again, and not called rewritten.
func TestAnAcceptedRollbackIsAcceptedInTheNextSinkToo(t *testing.T) {
	t.Parallel()
	s := restored(t, nil)
	first := s.Setting("ORGKEYS_AUDIT_FILE")
	second := filepath.Join(t.TempDir(), "second.jsonl")
	b, err := os.ReadFile(first)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(second, b, 0o600); err != nil {
		t.Fatal(err)
	}
	ok(t, s, "audit", "accept-rollback", "--reason", "restored the backup of Sunday")
	s.Configured("ORGKEYS_AUDIT_FILE", second)
	if _, errs, code := s.Run(t, "audit", "accept-rollback", "--reason", "another"); code != 1 || !strings.Contains(errs, `repeat --reason "restored the backup of Sunday"`) {
		t.Errorf("with another reason: exit code %d: %s", code, errs)
	}
	ok(t, s, "audit", "accept-rollback", "--reason", "restored the backup of Sunday")
	s.Start(t)
	s.Generate(t, harness.Org())
	s.Stop(t)
	if out := ok(t, s, "audit", "verify"); !strings.Contains(out, "truncation excluded") || strings.Contains(out, "rewritten") {
		t.Errorf("said %s", out)
	}
	if list := ok(t, s, "audit", "list"); strings.Count(list, "log.rollback_accepted") != 1 {
		t.Errorf("one rollback left these events: %s", list)
	}
	// A copy from before vouches for what was kept.
	old := filepath.Join(t.TempDir(), "old")
	if err := os.WriteFile(old, b, 0o600); err != nil {
		t.Fatal(err)
	}
	out, errs, code := s.Run(t, "audit", "verify", "--sink", old)
	if code != 3 || !strings.Contains(out, `a rollback was accepted: "restored the backup of Sunday"`) || !strings.Contains(errs, "covers 8 of 11 events") {
		t.Errorf("a copy from before: exit code %d\n%s%s", code, out, errs)
	}
}

// A log that was rewritten behind the rollback is not excused by it.
func TestARollbackExcusesNothingBehindIt(t *testing.T) {
	t.Parallel()
	s := restored(t, nil)
	ok(t, s, "audit", "accept-rollback", "--reason", "restored the backup")
	s.Start(t)
	org := harness.Org()
	s.List(t, org)
	s.Stop(t)
	forged := harness.Copy(t, s.Dir)
	s.Start(t)
	s.List(t, org)
	s.Stop(t)
	putBack(t, s, forged)
	s.Configured("ORGKEYS_AUDIT_SINKS", "file")
	db := harness.OpenDatabase(t, s.Dir)
	harness.Unprotect(t, db)
	rewriteEvent3(t, db)
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if _, errs, code := s.Run(t, "audit", "accept-rollback", "--reason", "restored the backup"); code != 1 || !strings.Contains(errs, "event 3: it differs") {
		t.Errorf("exit code %d: %s", code, errs)
	}
}

// The same backup may be put back again.
func TestABackupThatIsRestoredTwiceVerifies(t *testing.T) {
	t.Parallel()
	s, _ := used(t)
	backup := harness.Copy(t, s.Dir)
	s.Start(t)
	s.Generate(t, harness.Org())
	s.Stop(t)
	for _, reason := range []string{"once", "twice", "thrice"} {
		putBack(t, s, backup)
		ok(t, s, "audit", "accept-rollback", "--reason", reason)
		s.Start(t)
		s.Generate(t, harness.Org())
		s.Stop(t)
		if out := ok(t, s, "audit", "verify"); !strings.Contains(out, "truncation excluded") || !strings.Contains(out, reason) {
			t.Errorf("%s: said %s", reason, out)
		}
	}
}
