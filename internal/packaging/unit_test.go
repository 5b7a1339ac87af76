package packaging

import (
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/config"
)

// afterTimeout is what a stopping server may take after ORGKEYS_SHUTDOWN_TIMEOUT:
// its log and its sinks are made complete.
const afterTimeout = 5 * time.Second

func TestUnitGivesAStoppingServerItsTime(t *testing.T) {
	unit := read(t, "cmd/orgkeys/orgkeys.service")
	given := regexp.MustCompile(`(?m)^TimeoutStopSec=(\d+)$`).FindStringSubmatch(unit)
	if given == nil {
		t.Fatal("the unit has no TimeoutStopSec in seconds")
	}
	timeout, err := time.ParseDuration(given[1] + "s")
	if err != nil {
		t.Fatal(err)
	}
	known, needed := map[string]bool{}, afterTimeout
	for _, s := range config.Settings() {
		known[s.Name] = true
		if s.Name == "ORGKEYS_SHUTDOWN_NOTICE" || s.Name == "ORGKEYS_SHUTDOWN_TIMEOUT" {
			d, err := time.ParseDuration(s.Default)
			if err != nil {
				t.Fatal(err)
			}
			needed += d
		}
	}
	if timeout <= needed {
		t.Errorf("the unit kills a server that stops after %s; it may take %s", timeout, needed)
	}
	for _, name := range regexp.MustCompile(`ORGKEYS_\w+`).FindAllString(unit, -1) {
		if !known[name] {
			t.Errorf("the unit names %s, which is no setting", name)
		}
	}
	if !strings.Contains(unit, "\nStateDirectoryMode=0700\n") {
		t.Error("the data directory would be one that the server refuses")
	}
}

// 77 is what the server exits with when the HSM's PIN needs a person (see
// TestARefusedPINIsOfferedOnceByAllCommands): each start may cost an attempt.
func TestUnitDoesNotRestartOnARefusedPIN(t *testing.T) {
	if !strings.Contains(read(t, "cmd/orgkeys/orgkeys.service"), "\nRestartPreventExitStatus=77\n") {
		t.Error("the unit starts the server again after the token refused its PIN")
	}
}
