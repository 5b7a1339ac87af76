//go:build race

package e2e

import (
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// raceOption puts the race detector into the program too.
func raceOption(t testing.TB) []harness.Option { return []harness.Option{harness.Race(t)} }
