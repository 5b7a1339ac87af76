package sqlstore_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// A binary without cgo is built all the same, and says what it lacks.
func TestBuildWithoutCgo(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "go", "run", "./testdata/nocgo")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("go run: %v\n%s", err, out)
	}
	for _, say := range []string{"built without cgo", "CGO_ENABLED=1", "C compiler", "ORGKEYS_DATABASE_URL"} {
		if !strings.Contains(string(out), say) {
			t.Errorf("%q is not in: %s", say, out)
		}
	}
}
