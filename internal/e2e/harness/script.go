package harness

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// Script runs the lines of a document's block as somebody does who has the
// server's settings, and its program, in a shell. extra are more variables.
func (s *Server) Script(t testing.TB, lines string, extra ...string) (output string, code int) {
	t.Helper()
	cmd := exec.Command("bash", "-euo", "pipefail", "-c", lines)
	cmd.Dir = t.TempDir()
	cmd.Env = append(append(s.environment(), extra...), "PATH="+filepath.Dir(s.binary)+":"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	if err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}
