package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/orgkeys/orgkeys/internal/audit/verdict"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// said is what a command with --json printed.
func said(t *testing.T, s *harness.Server, code int, args ...string) verdict.Verdict {
	t.Helper()
	out, errs, got := s.Run(t, append(args, "--json")...)
	if got != code {
		t.Errorf("%q: exit code %d, want %d\n%s%s", args, got, code, out, errs)
	}
	if code != 0 && !strings.HasPrefix(errs, "orgkeys: ") && !strings.Contains(errs, "\norgkeys: ") {
		t.Errorf("%q: standard error says %q", args, errs)
	}
	if _, _, plain := s.Run(t, args...); plain != got {
		t.Errorf("%q: exit code %d without --json, and %d with it", args, plain, got)
	}
	var v verdict.Verdict
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatalf("%q: %v\n%s", args, err, out)
	}
	if v.Format != "orgkeys-verify/1" || v.ExitCode != got || v.Verified != (got != 1) || v.TruncationExcluded != (got == 0 && v.Proof == nil) {
		t.Errorf("%q: %+v", args, v)
	}
	return v
}

// What --json prints says what the lines say, and the exit codes are the same.
func TestVerifyingPrintsJSON(t *testing.T) {
	t.Parallel()
	s, sink := used(t)
	dir := t.TempDir()
	in := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	archive, keyText := filepath.Join(dir, "export.tar.gz"), ok(t, s, "audit", "key")
	ok(t, s, "audit", "export", archive)
	key, keys := strings.TrimSpace(keyText), in("keys", "# the log's\n\n"+keyText)

	v := said(t, s, 0, "audit", "verify", "--key", keys)
	if v.Origin == "" || v.Size != 8 || v.Root == "" || v.Covered != 8 || v.Signed != 8 || v.Error != "" || v.NotExcluded != "" {
		t.Errorf("the log: %+v", v)
	}
	if v := said(t, s, 3, "audit", "verify", "--sink", in("empty", "")); v.NotExcluded == "" || v.Error != "" {
		t.Errorf("an empty copy: %+v", v)
	}
	if v := said(t, s, 3, "audit", "verify-export", archive, "--key", key); v.NotExcluded == "" || v.Size != 8 || v.Keys != 1 || v.Checkpoints == 0 {
		t.Errorf("an export: %+v", v)
	}
	if v := said(t, s, 0, "audit", "verify", archive, "--key", key, "--checkpoint", sink); v.Covered != 8 {
		t.Errorf("the older spelling: %+v", v)
	}
	for name, args := range map[string][]string{
		"no key": {"audit", "verify-export", archive}, "no archive": {"audit", "verify-export", sink, "--key", key},
		"a key that is none": {"audit", "verify-export", archive, "--key", "nonsense"}, "a time without files": {"audit", "verify-export", archive, "--key", key, "--as-of", "2026-01-01T00:00:00Z"},
	} {
		if v := said(t, s, 1, args...); v.Error == "" {
			t.Errorf("%s: %+v", name, v)
		}
	}
	proof := in("proof.json", ok(t, s, "audit", "prove", "3"))
	if v := said(t, s, 0, "audit", "verify-proof", proof, "--key", keys); v.Proof == nil || v.Proof.Index != 3 || v.Size != 8 || !strings.Contains(string(v.Proof.Event), `"type":"orgkey.listed"`) {
		t.Errorf("a proof: %+v", v)
	}
	said(t, s, 1, "audit", "verify-proof", in("bad.json", strings.Replace(ok(t, s, "audit", "prove", "3"), `"index": 3`, `"index": 4`, 1)), "--key", key)

	db := harness.OpenDatabase(t, s.Dir)
	harness.Unprotect(t, db)
	harness.Exec(t, db, `UPDATE events SET leaf = replace(leaf, 'orgkey.listed', 'orgkey.liste2') WHERE idx = 4`)
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if v := said(t, s, 1, "audit", "verify"); v.Event == nil || *v.Event != 4 || v.Error == "" {
		t.Errorf("a changed event: %+v", v)
	}
}

// A checkpoint is taken as the sink has it: a line, the note in it, the whole
// file, or any of them as a file or as text.
func TestCheckpointsAndKeysAreTakenAsTheyAre(t *testing.T) {
	t.Parallel()
	s, sink := used(t)
	text, err := os.ReadFile(sink)
	if err != nil {
		t.Fatal(err)
	}
	var line, note string
	for _, l := range strings.Split(strings.TrimSpace(string(text)), "\n") {
		var c struct{ Checkpoint string }
		if json.Unmarshal([]byte(l), &c) == nil && strings.Contains(c.Checkpoint, "\n\n") {
			line, note = l, c.Checkpoint
		}
	}
	if note == "" {
		t.Fatal("the sink has no signed checkpoint")
	}
	dir := t.TempDir()
	archive, key := filepath.Join(dir, "export.tar.gz"), ok(t, s, "audit", "key")
	ok(t, s, "audit", "export", archive)
	for name, checkpoint := range map[string]string{
		"the line": line, "the note": note, "the note from a shell": strings.TrimSpace(note), "the whole sink": string(text),
	} {
		file := filepath.Join(dir, strings.ReplaceAll(name, " ", "-"))
		if err := os.WriteFile(file, []byte(checkpoint), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, given := range []string{checkpoint, file} {
			for _, args := range [][]string{
				{"audit", "verify-export", archive, "--key", key}, {"audit", "verify", "--key", key}, {"audit", "verify"},
			} {
				if out := ok(t, s, append(args, "--checkpoint", given)...); !strings.Contains(out, "truncation excluded") {
					t.Errorf("%s, %q: %s", name, args[:2], out)
				}
			}
		}
	}
	for _, bad := range []string{"/nope", "{}", "hello\nworld\n", filepath.Join(dir, "export.tar.gz")} {
		if _, errs, code := s.Run(t, "audit", "verify", "--checkpoint", bad); code != 1 || !strings.Contains(errs, "--checkpoint: ") {
			t.Errorf("%q: %d %s", bad, code, errs)
		}
	}
}

// A server that has just started has signed nothing: what to do is said to who
// has a running one as well.
func TestTheKeyBeforeTheFirstCheckpoint(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	s.Generate(t, harness.Org())
	_, errs, code := s.Run(t, "audit", "key")
	if code == 0 || !strings.Contains(errs, "A running server signs the first one") || !strings.Contains(errs, "kill -USR1") {
		t.Errorf("exit code %d: %s", code, errs)
	}
	if err := syscall.Kill(s.PID(), syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, harness.Patience, "the key is there", func() bool { _, _, code := s.Run(t, "audit", "key"); return code == 0 })
}
