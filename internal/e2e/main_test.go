// Package e2e tests the contract of the service against the real
// program with a real SoftHSM. A test's name begins with the promise it keeps.
package e2e

import (
	"flag"
	"os"
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

var (
	kills = flag.Int("kills", 4, "how many times the crash test kills the server")
	seed  = flag.Uint64("seed", 1, "seed of the crash test")
)

func TestMain(m *testing.M) {
	flag.Parse()
	code := harness.Main(m)
	shared.end()
	os.Exit(code)
}
