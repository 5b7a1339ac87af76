package packaging

import (
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/config"
)

// afterTimeout is what a stopping server may take after ORGKEYS_SHUTDOWN_TIMEOUT:
// its log and its sinks are made complete.
const afterTimeout = 5 * time.Second

// timeToStop is what a stopping server may take by default.
func timeToStop(t *testing.T) time.Duration {
	t.Helper()
	needed := afterTimeout
	for _, s := range config.Settings() {
		if s.Name == "ORGKEYS_SHUTDOWN_NOTICE" || s.Name == "ORGKEYS_SHUTDOWN_TIMEOUT" {
			d, err := time.ParseDuration(s.Default)
			if err != nil {
				t.Fatal(err)
			}
			needed += d
		}
	}
	return needed
}

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
	if needed := timeToStop(t); timeout <= needed {
		t.Errorf("the unit kills a server that stops after %s; it may take %s", timeout, needed)
	}
	known := map[string]bool{}
	for _, s := range config.Settings() {
		known[s.Name] = true
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

// Whatever path below /var or /run a document or the unit's own comments advise for
// the service to write to, the unit's sandbox lets it.
func TestUnitLetsTheServiceWriteWhereDocumentsSay(t *testing.T) {
	unit := read(t, "cmd/orgkeys/orgkeys.service")
	var writable []string
	for _, m := range regexp.MustCompile(`(?m)^(StateDirectory|LogsDirectory|ReadWritePaths)=(.*)$`).FindAllStringSubmatch(unit, -1) {
		for _, path := range strings.Fields(m[2]) {
			below := map[string]string{"StateDirectory": "/var/lib/", "LogsDirectory": "/var/log/"}[m[1]]
			writable = append(writable, below+strings.TrimPrefix(path, "-"))
		}
	}
	// Paths of other programs and of the node, whose unit is another.
	others := regexp.MustCompile(`^(/var/log/vault|/var/lib/orgkeys-node|/run/credentials|/var/run/secrets)(/|$)`)
	advised := regexp.MustCompile(`/(var|run)/[a-z][\w./-]*\w`)
	checked := 0
	text := unit
	for _, document := range documents(t) {
		if document != "CHANGELOG.md" {
			text += read(t, document)
		}
	}
	for _, path := range advised.FindAllString(text, -1) {
		if others.MatchString(path) {
			continue
		}
		checked++
		if !slices.ContainsFunc(writable, func(w string) bool { return path == w || strings.HasPrefix(path, w+"/") }) {
			t.Errorf("a document advises %s, and the unit lets the service write to %q only", path, writable)
		}
	}
	if checked < 6 {
		t.Errorf("%d paths were found", checked)
	}
}
