package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// The commands publish a running server's log, add to it, and verify what is published.
func TestTheLogIsPublishedAndVerifiedAsTiles(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org, dir := harness.Org(), filepath.Join(t.TempDir(), "log")
	run := func(want int, args ...string) (string, string) {
		t.Helper()
		out, errs, code := s.Run(t, append([]string{"audit"}, args...)...)
		if code != want {
			t.Fatalf("%q: exit code %d, want %d: %s%s", args, code, want, out, errs)
		}
		return out, errs
	}
	run(1, "verify-tiles", dir, "--key", "x")
	s.List(t, org)
	s.Stop(t)
	run(0, "checkpoint")
	key, _ := run(0, "key")
	key = strings.TrimSpace(key)
	run(0, "publish", dir)
	first, err := os.ReadFile(filepath.Join(dir, "checkpoint"))
	if err != nil {
		t.Fatal(err)
	}
	s.Start(t)
	s.List(t, org)
	s.Stop(t)
	run(0, "checkpoint")
	run(0, "publish", dir)
	newest := filepath.Join(dir, "checkpoint")
	if _, errs := run(3, "verify-tiles", dir, "--key", key); !strings.Contains(errs, "truncation not excluded") {
		t.Errorf("without evidence: %s", errs)
	}
	if out, _ := run(0, "verify-tiles", dir, "--key", key, "--checkpoint", newest); !strings.Contains(out, "truncation excluded") {
		t.Errorf("with the newest checkpoint: %s", out)
	}
	run(3, "verify-tiles", dir, "--key", key, "--checkpoint", string(first))
	if _, errs := run(1, "verify-tiles", dir); !strings.Contains(errs, "--key") {
		t.Errorf("without a key: %s", errs)
	}
	bundles, err := filepath.Glob(filepath.Join(dir, "tile/entries/000.p/*"))
	if err != nil || len(bundles) != 2 {
		t.Fatalf("%q, %v", bundles, err)
	}
	for _, name := range bundles {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		b[len(b)-10] ^= 1
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	run(1, "verify-tiles", dir, "--key", key)
}
