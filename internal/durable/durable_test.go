package durable_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/durable"
)

// wantFiles fails the test unless dir has these files alone, mode 0600.
func wantFiles(t *testing.T, dir string, want map[string]string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		content, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if text, known := want[e.Name()]; err != nil || !known || text != string(content) || info.Mode() != 0o600 {
			t.Errorf("%s, mode %v, holds %q, %v; want %q", e.Name(), info.Mode(), content, err, want)
		}
	}
	if len(entries) != len(want) {
		t.Errorf("%d files, want %q", len(entries), want)
	}
}

func TestANewFileTakesNoOthersPlace(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "key.pem")
	n, err := durable.Create(path, "writer")
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Write([]byte("first")); err != nil {
		t.Fatal(err)
	}
	wantFiles(t, dir, map[string]string{"key.pem": "first"})
	if _, err := durable.Create(path, "writer"); !errors.Is(err, fs.ErrExist) {
		t.Errorf("Create over a file: %v", err)
	}

	late := filepath.Join(dir, "late.pem")
	if n, err = durable.Create(late, "writer"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(late, []byte("somebody else's"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := n.Write([]byte("mine")); !errors.Is(err, fs.ErrExist) {
		t.Errorf("Write over a file that came meanwhile: %v", err)
	}
	if err := os.Symlink("nowhere", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if _, err := durable.Create(filepath.Join(dir, "link"), "writer"); !errors.Is(err, fs.ErrExist) {
		t.Errorf("Create through a link that leads nowhere: %v", err)
	}
	if err := durable.Remove(filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	wantFiles(t, dir, map[string]string{"key.pem": "first", "late.pem": "somebody else's"})
}

// withoutLinks is set where strace has every hard link fail, as on a USB stick.
const withoutLinks = "DURABLE_TEST_WITHOUT_LINKS"

func TestAFileSystemWithoutLinksIsNoticedBeforehand(t *testing.T) {
	if dir := os.Getenv(withoutLinks); dir != "" {
		if _, err := durable.Create(filepath.Join(dir, "key.pem"), "writer"); !errors.Is(err, fs.ErrPermission) {
			t.Errorf("Create where Write will fail: %v", err)
		}
		return
	}
	dir := t.TempDir()
	cmd := exec.Command("strace", "-f", "-o", filepath.Join(t.TempDir(), "strace"), "-e", "trace=linkat", "-e", "inject=linkat:error=EPERM",
		os.Args[0], "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), withoutLinks+"="+dir)
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "PASS") {
		t.Errorf("%v\n%s", err, out)
	}
	wantFiles(t, dir, nil)
}

func TestWhatIsDiscardedLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	n, err := durable.Create(filepath.Join(dir, "key.pem"), "writer")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(n.Discard(), n.Discard()); err != nil {
		t.Error(err)
	}
	wantFiles(t, dir, nil)
	if _, err := durable.Create(filepath.Join(dir, "none", "key.pem"), "writer"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("in a directory that is not there: %v", err)
	}
}

func TestWhatACrashLeftIsRemoved(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "key.pem")
	for name, content := range map[string]string{".key.pem.writer": "half a k", ".key.pem.writer.link": "", ".key.pem.another": "not mine"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	n, err := durable.Create(path, "writer")
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Write([]byte("key")); err != nil {
		t.Fatal(err)
	}
	wantFiles(t, dir, map[string]string{"key.pem": "key", ".key.pem.another": "not mine"})
}

func TestReplaceAndRemove(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "session")
	for _, content := range []string{"one", "two"} {
		if err := durable.Replace(path, []byte(content)); err != nil {
			t.Fatal(err)
		}
		wantFiles(t, dir, map[string]string{"session": content})
	}
	if err := errors.Join(durable.Remove(path), durable.Remove(path)); err != nil {
		t.Error(err)
	}
	wantFiles(t, dir, nil)
}

func TestReplaceRemovesWhatACrashLeft(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, ".session.new"), []byte("an old token"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := durable.Replace(filepath.Join(dir, "session"), []byte("new")); err != nil {
		t.Fatal(err)
	}
	wantFiles(t, dir, map[string]string{"session": "new"})
}

func TestDirectoriesAreMade(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "b")
	for range 2 {
		if err := durable.MkdirAll(path); err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("%v, %v", info, err)
		}
	}
	if err := os.WriteFile(filepath.Join(path, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := durable.MkdirAll(filepath.Join(path, "file", "below")); err == nil {
		t.Error("a directory below a file was made")
	}
}

func TestALockIsWaitedFor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	unlock, err := durable.Lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := durable.Lock(short, path); !errors.Is(err, durable.ErrLocked) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a lock that another has: %v", err)
	}
	time.AfterFunc(100*time.Millisecond, func() {
		if err := unlock(); err != nil {
			t.Error(err)
		}
	})
	second, err := durable.Lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if err := second(); err != nil {
		t.Error(err)
	}
}
