package e2e

import (
	"os"
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// Commands that read what a server has stored make nothing where there was none: a wrong
// ORGKEYS_DATA_DIR leaves no directory behind, and nobody's key but the server's.
func TestCommandsThatReadMakeNothing(t *testing.T) {
	t.Parallel()
	for _, made := range []bool{false, true} {
		s := harness.Configure(t)
		if made {
			if err := os.Mkdir(s.Dir, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		for _, command := range [][]string{{"token", "explain"}, {"audit", "checkpoint"}, {"audit", "verify"}, {"audit", "key"}, {"audit", "list"}, {"audit", "erase", "--subject", "x", "--reason", "y"}, {"doctor"}} {
			stdout, stderr, code := s.RunWith(t, "e30.e30.e30", command...)
			if (code == 0) != (command[0] == "doctor") {
				t.Errorf("%q exits with %d: %s%s", command, code, stdout, stderr)
			}
			left, err := os.ReadDir(s.Dir)
			if len(left) > 0 || made != (err == nil) {
				t.Fatalf("%q leaves %v, %v: %s", command, left, err, stderr)
			}
		}
	}
}
