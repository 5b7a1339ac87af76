package packaging

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func TestWorkflowPinsItsActionsByHash(t *testing.T) {
	workflows, err := filepath.Glob(filepath.Join(root, ".github/workflows/*.yml"))
	if err != nil || len(workflows) == 0 {
		t.Fatalf("no workflows (error: %v)", err)
	}
	pinned := regexp.MustCompile(`^[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$`)
	uses := regexp.MustCompile(`(?m)uses:\s*(.*)$`)
	for _, path := range workflows {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		text := string(b)
		for _, m := range uses.FindAllStringSubmatch(text, -1) {
			if !pinned.MatchString(m[1]) {
				t.Errorf("%s uses %q, not pinned by hash with its version beside it", filepath.Base(path), m[1])
			}
		}
		if !strings.Contains(text, "\npermissions:\n  contents: read\n") {
			t.Errorf("%s does not limit its token to reading", filepath.Base(path))
		}
		for _, needed := range []string{"./scripts/test", "govulncheck"} {
			if !strings.Contains(text, needed) {
				t.Errorf("%s does not run %s", filepath.Base(path), needed)
			}
		}
	}
}

func TestScriptsTeach(t *testing.T) {
	scripts, err := filepath.Glob(filepath.Join(root, "scripts/*"))
	if err != nil || len(scripts) == 0 {
		t.Fatalf("no scripts (error: %v)", err)
	}
	for _, path := range scripts {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.IsDir() {
			continue
		}
		name := filepath.Base(path)
		if info.Mode().Perm()&0o111 == 0 {
			t.Errorf("%s is not executable", name)
		}
		out, err := exec.Command(path, "--help").Output()
		if err != nil || !strings.HasPrefix(string(out), "Usage: scripts/"+name) {
			t.Errorf("%s --help: %v\n%s", name, err, out)
		}
		if err := exec.Command(path, "--no-such-option").Run(); err == nil || err.(*exec.ExitError).ExitCode() != 2 {
			t.Errorf("%s accepts an option that it does not have: %v", name, err)
		}
	}
}
