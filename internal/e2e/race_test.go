//go:build !race

package e2e

import (
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// raceOption leaves the program as it ships, unless the tests themselves run
// under the race detector.
func raceOption(testing.TB) []harness.Option { return nil }
