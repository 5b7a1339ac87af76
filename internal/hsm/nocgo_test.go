package hsm

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// A binary without cgo is built all the same, and says what it lacks.
func TestBuildWithoutCgo(t *testing.T) {
	program := filepath.Join("testdata", "nocgo")
	cmd := exec.CommandContext(t.Context(), "go", "run", "./"+program)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("go run: %v\n%s", err, out)
	}
	for _, say := range []string{"built without cgo", "CGO_ENABLED=1", "C compiler", "ORGKEYS_KEYSTORE=vault"} {
		if !strings.Contains(string(out), say) {
			t.Errorf("%q is not in: %s", say, out)
		}
	}
}
