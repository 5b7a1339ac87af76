package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// What docs/operations.md says of a data directory that is put back as a whole:
// with the only sink in it nobody notices, and the start warns of that set-up.
func TestADataDirectoryThatIsPutBackWhole(t *testing.T) {
	t.Parallel()
	for _, outside := range []bool{false, true} {
		var opts []harness.Option
		if outside {
			opts = append(opts, harness.Set("ORGKEYS_AUDIT_FILE", filepath.Join(t.TempDir(), "sink.jsonl")))
		}
		s := harness.Start(t, opts...)
		s.Generate(t, harness.Org())
		s.Stop(t)
		backup := harness.Copy(t, s.Dir)
		s.Start(t)
		s.Generate(t, harness.Org())
		s.Stop(t)
		kept := filepath.Join(t.TempDir(), "copy.jsonl")
		text, err := os.ReadFile(s.AuditFile())
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(kept, text, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(s.Dir); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(backup, s.Dir); err != nil {
			t.Fatal(err)
		}
		for _, args := range [][]string{{"--sink", kept}, {"--checkpoint", kept}} {
			if _, errs, code := s.Run(t, append([]string{"audit", "verify"}, args...)...); code != 1 {
				t.Errorf("sink outside: %t; %q: exit code %d\n%s", outside, args, code, errs)
			}
		}
		warns := strings.Contains(string(s.Output()), "the only audit sink is in the data directory")
		said, _, _ := s.Run(t, "doctor")
		if told := strings.Contains(said, "the only audit sink is in the data directory"); told == outside || warns == outside {
			t.Errorf("sink outside: %t; the start warns: %t; doctor: %s", outside, warns, said)
		}
		if outside {
			if _, errs, code := s.Run(t, "serve"); code != 1 || !strings.Contains(errs, "accept-rollback") {
				t.Errorf("with the sink outside it starts: %d %s", code, errs)
			}
			continue
		}
		s.Start(t)
		s.Stop(t)
	}
}
