package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

func TestTimesAndAges(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for text, want := range map[string]string{
		"90d": "2025-12-01T12:00:00Z", "36h": "2026-02-28T00:00:00Z", "2026-01-31T12:00:00+01:00": "2026-01-31T12:00:00+01:00",
		"2026-03-01T12:00:00Z": "2026-03-01T12:00:00Z", "2026-03-01T12:00:01Z": "", "2026-03-01T13:30:00+01:00": "",
		"": "", "-5d": "", "5": "", "d": "", "40000d": "", "yesterday": "", "0h": "",
	} {
		at, err := pastTime(text, now)
		if (err != nil) != (want == "") || err == nil && at.Format(time.RFC3339) != want {
			t.Errorf("%q: %v, %v; want %q", text, at, err, want)
		}
	}
}

// The command moves the log beside a running server, whatever moment it is killed at, and
// goes on; the server never notices, and starts and serves on what is left.
func TestTheArchiveCommandBesideAServer(t *testing.T) {
	t.Parallel()
	archive := filepath.Join(t.TempDir(), "archive")
	s := harness.Start(t, harness.Set("ORGKEYS_CHECKPOINT_INTERVAL", "1s"), harness.Set("ORGKEYS_AUDIT_ARCHIVE", archive))
	org := harness.Org()
	for range 2 {
		s.Generate(t, org)
	}
	for range 700 {
		s.List(t, org)
	}
	run := func(want int, args ...string) string {
		t.Helper()
		out, errs, code := s.Run(t, append([]string{"audit"}, args...)...)
		if code != want {
			t.Fatalf("%q: exit code %d, want %d: %s%s", args, code, want, out, errs)
		}
		return out + errs
	}
	size := func() int64 {
		info, err := os.Stat(filepath.Join(s.Dir, "orgkeys.db"))
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	if said := run(0, "archive", "--before", "1d", "--dry-run"); !strings.Contains(said, "nothing is moved: 0 events") {
		t.Errorf("a dry run says %s", said)
	}
	run(1, "archive", "--before", "soon")
	// By the database itself: what is in the write-ahead log alone is not in the file yet.
	before := harness.Number(t, s.Database(t), "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size")
	kills := 0
	for wait := 20 * time.Millisecond; ; wait += wait/3 + 20*time.Millisecond {
		ctx, cancel := context.WithTimeout(t.Context(), wait)
		killed := s.RunUntil(t, ctx, "audit", "archive", "--before", time.Now().Format(time.RFC3339Nano))
		cancel()
		if said := run(0, "verify", "--sink", filepath.Join(s.Dir, "audit.jsonl")); !strings.Contains(said, "truncation excluded") {
			t.Fatalf("after %v: %s", wait, said)
		}
		s.List(t, org)
		if !killed {
			break
		}
		kills++
	}
	if kills < 3 {
		t.Errorf("only %d kills", kills)
	}
	said := run(0, "verify", "--sink", filepath.Join(s.Dir, "audit.jsonl"))
	moved := regexp.MustCompile(`the first (\d+) of them are in the archive`).FindStringSubmatch(said)
	if moved == nil {
		t.Fatalf("verify says %s", said)
	}
	if n, err := strconv.Atoi(moved[1]); err != nil || n < 512 {
		t.Errorf("%s events were moved", moved[1])
	}
	if n := harness.Number(t, s.Database(t), "SELECT count(*) FROM events WHERE idx < "+moved[1]); n != 0 {
		t.Errorf("%d of them are in the database", n)
	}
	run(0, "prove", "3")
	key := strings.TrimSpace(run(0, "key"))
	run(3, "verify-tiles", archive, "--key", key)
	export := filepath.Join(t.TempDir(), "export.tar.gz")
	run(0, "export", export)
	run(3, "verify-export", export, "--key", key)
	root := harness.ModuleRoot(t)
	if out, err := exec.CommandContext(t.Context(), "python3", filepath.Join(root, "contrib/verify_export.py"), export, "--key", key).CombinedOutput(); !strings.HasPrefix(string(out), "verified: ") {
		t.Errorf("the independent implementation: %v\n%s", err, out)
	}
	s.Stop(t)
	if after := size(); after >= before {
		t.Errorf("the database takes %d bytes, and took %d", after, before)
	}

	// No server runs: the command signs by itself. Then a start without the archive.
	if said := run(0, "archive", "--before", time.Now().Format(time.RFC3339Nano)); !strings.Contains(said, "moved ") {
		t.Errorf("without a server: %s", said)
	}
	if err := os.Rename(archive, archive+".away"); err != nil {
		t.Fatal(err)
	}
	s.Start(t)
	s.List(t, org)
	s.Generate(t, org)
	run(1, "verify", "--sink", filepath.Join(s.Dir, "audit.jsonl"))
	s.Stop(t)
	if err := os.Rename(archive+".away", archive); err != nil {
		t.Fatal(err)
	}
	run(0, "verify", "--sink", filepath.Join(s.Dir, "audit.jsonl"))

	// A thief deletes more, and says that it was archived: no start, and no rollback.
	db := s.Database(t)
	more := harness.Number(t, db, "SELECT moved FROM log_archive") + 256
	harness.Exec(t, db, fmt.Sprintf("DELETE FROM events WHERE idx < %d", more))
	harness.Exec(t, db, fmt.Sprintf("UPDATE log_archive SET moved = %d", more))
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	run(1, "verify", "--sink", filepath.Join(s.Dir, "audit.jsonl"))
	if said := run(1, "accept-rollback", "--reason", "a thief's"); !strings.Contains(said, "they were deleted") {
		t.Errorf("of deleted events accept-rollback says %s", said)
	}
	if _, errs, code := s.Run(t, "serve"); code != 1 || !strings.Contains(errs, "they were deleted") {
		t.Errorf("a start says %d, %s", code, errs)
	}
}

// A restored backup cannot go on in its archive, which is ahead; --from takes it over to another.
func TestARestoredBackupGoesOnInAnotherArchive(t *testing.T) {
	t.Parallel()
	old, next := filepath.Join(t.TempDir(), "old"), filepath.Join(t.TempDir(), "next")
	sink := filepath.Join(t.TempDir(), "sink.jsonl")
	s := harness.Start(t, harness.Set("ORGKEYS_AUDIT_FILE", sink), harness.Set("ORGKEYS_AUDIT_ARCHIVE", old))
	org := harness.Org()
	used := func(events int) {
		t.Helper()
		for range events {
			s.List(t, org)
		}
		s.Stop(t)
	}
	archive := func(args ...string) (string, int) {
		t.Helper()
		out, errs, code := s.Run(t, append([]string{"audit", "archive", "--before", time.Now().Format(time.RFC3339Nano)}, args...)...)
		return out + errs, code
	}
	used(300)
	if said := ok(t, s, "audit", "archive", "--before", "1d"); !strings.Contains(said, "moved 0 events") || !strings.Contains(said, "not old enough: event 2") {
		t.Errorf("of events of today it says %s", said)
	}
	db := s.Database(t)
	harness.Exec(t, db, "INSERT INTO sink_progress (sink, next) VALUES ('vault', 7)") // it was configured once
	for _, args := range [][]string{{"--dry-run"}, nil} {
		if said, code := archive(args...); code != 0 || !strings.Contains(said, `held back: the sink "vault" has acknowledged 7 events, and ORGKEYS_AUDIT_SINKS does not name it`) {
			t.Errorf("exit code %d: %s", code, said)
		}
	}
	harness.Exec(t, db, "DELETE FROM sink_progress WHERE sink = 'vault'")
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if said, code := archive(); code != 0 || !strings.Contains(said, "the first 256 are no longer") || strings.Contains(said, "held back") {
		t.Fatalf("exit code %d: %s", code, said)
	}
	backup := harness.Copy(t, s.Dir)
	s.Start(t)
	used(300)
	if said, code := archive(); code != 0 || !strings.Contains(said, "the first 512 are no longer") {
		t.Fatalf("exit code %d: %s", code, said)
	}
	putBack(t, s, backup)
	ok(t, s, "audit", "accept-rollback", "--reason", "restored the backup")
	s.Start(t)
	used(600)
	if said, code := archive(); code != 1 || !strings.Contains(said, "once with --from "+old) {
		t.Errorf("the archive, which is ahead: exit code %d: %s", code, said)
	}
	s.Configured("ORGKEYS_AUDIT_ARCHIVE", next)
	if said, code := archive(); code != 1 {
		t.Errorf("an empty one: exit code %d: %s", code, said)
	}
	if said, code := archive("--from", old); code != 0 || !strings.Contains(said, "the first 768 are no longer") {
		t.Fatalf("exit code %d: %s", code, said)
	}
	if err := os.RemoveAll(old); err != nil {
		t.Fatal(err)
	}
	if said := ok(t, s, "audit", "verify"); !strings.Contains(said, "truncation excluded") || !strings.Contains(said, "the first 768 of them are in the archive") {
		t.Errorf("verifying says %s", said)
	}
	s.Start(t)
	used(300)
	if said, code := archive(); code != 0 || !strings.Contains(said, "the first 1024 are no longer") {
		t.Errorf("the night after: exit code %d: %s", code, said)
	}
	ok(t, s, "audit", "verify")
}

// What retention removed after the backup was made is not missing to the restored log, if the
// archive's own log says so, signed by a key that was kept; a thief of entries says nothing.
func TestARestoredBackupAndWhatRetentionRemovedSince(t *testing.T) {
	t.Parallel()
	old, next := filepath.Join(t.TempDir(), "old"), filepath.Join(t.TempDir(), "next")
	sink := filepath.Join(t.TempDir(), "sink.jsonl")
	s := harness.Start(t, harness.Set("ORGKEYS_AUDIT_FILE", sink), harness.Set("ORGKEYS_AUDIT_ARCHIVE", old))
	s.Stop(t)
	db := s.Database(t)
	fillLog(t, db, 1100) // a year ago
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	s.Start(t)
	s.Stop(t)
	archive := func(want int, args ...string) string {
		t.Helper()
		out, errs, code := s.Run(t, append([]string{"audit", "archive", "--before", "90d"}, args...)...)
		if code != want {
			t.Fatalf("%q: exit code %d, want %d: %s%s", args, code, want, out, errs)
		}
		return out + errs
	}
	if said := archive(0); !strings.Contains(said, "the first 1024 are no longer in the database") {
		t.Fatalf("it says %s", said)
	}
	key := strings.TrimSpace(ok(t, s, "audit", "key"))
	backup := harness.Copy(t, s.Dir)
	s.Configured("ORGKEYS_AUDIT_RETENTION", "8700h")
	if said := archive(0); !strings.Contains(said, "the first 1024 are no longer in the archive") {
		t.Fatalf("it says %s", said)
	}
	ok(t, s, "audit", "verify")
	s.Configured("ORGKEYS_AUDIT_RETENTION", "")
	putBack(t, s, backup)
	ok(t, s, "audit", "accept-rollback", "--reason", "restored the backup")
	s.Start(t)
	s.List(t, harness.Org())
	s.Stop(t)
	if _, errs, code := s.Run(t, "audit", "verify"); code != 1 || !strings.Contains(errs, "event 0: it is missing in the archive") {
		t.Errorf("verifying says %d, %s", code, errs)
	}
	s.Configured("ORGKEYS_AUDIT_ARCHIVE", next)
	if said := archive(1, "--from", old); !strings.Contains(said, "with --key") {
		t.Errorf("without a key: %s", said)
	}
	if said := archive(1, "--from", old, "--key", "orgkeys/another+00000000+AQ"); !strings.Contains(said, "not a verifier key") {
		t.Errorf("with no key: %s", said)
	}
	stranger := harness.Start(t)
	stranger.List(t, harness.Org())
	stranger.Stop(t)
	if said := archive(1, "--from", old, "--key", strings.TrimSpace(ok(t, stranger, "audit", "key"))); !strings.Contains(said, "none of the given keys has signed it") {
		t.Errorf("with another log's key: %s", said)
	}
	if n := harness.Number(t, s.Database(t), "SELECT count(*) FROM events WHERE type = 'log.pruned'"); n != 0 {
		t.Errorf("%d removals were announced", n)
	}
	if said := archive(0, "--from", old, "--key", key); strings.Contains(said, "moved 1024 events") {
		t.Errorf("it says %s", said)
	}
	if err := os.RemoveAll(old); err != nil {
		t.Fatal(err)
	}
	if said := ok(t, s, "audit", "verify"); !strings.Contains(said, "entries below 1024 were removed by the policy of retention") || !strings.Contains(said, "truncation excluded") {
		t.Errorf("verifying says %s", said)
	}
	if out, errs, code := s.Run(t, "audit", "verify-tiles", next, "--key", key); code != 3 || !strings.Contains(out, "below 1024") {
		t.Errorf("the files alone: exit code %d: %s%s", code, out, errs)
	}
	s.Start(t)
	s.List(t, harness.Org())
}
