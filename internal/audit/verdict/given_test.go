package verdict

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit/verify"
)

func file(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "given")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Keys come as text, or in files with comments; a misspelt file is no key.
func TestKeysAreTakenAsTextOrFromFiles(t *testing.T) {
	for _, c := range []struct {
		name  string
		given []string
		keys  []string
		fails string
	}{
		{"none", nil, nil, ""},
		{"text", []string{"log+1234+abc"}, []string{"log+1234+abc"}, ""},
		{"text and a file", []string{"log+1+a", file(t, "# the log's\n\n log+2+b \nlog+3+c\n")}, []string{"log+1+a", "log+2+b", "log+3+c"}, ""},
		{"no such file", []string{"/nowhere/keys"}, nil, "--key: neither a verifier key nor a file"},
		{"a file without keys", []string{file(t, "# nothing\n")}, nil, "--key: the file holds no key"},
	} {
		keys, err := Given{Keys: c.given}.keys()
		if !slices.Equal(keys, c.keys) || (err == nil) != (c.fails == "") || err != nil && !strings.Contains(err.Error(), c.fails) {
			t.Errorf("%s: %q, %v", c.name, keys, err)
		}
	}
	if _, err := (Given{}).requiredKeys(); !errors.Is(err, errNoKey) {
		t.Errorf("without a key: %v", err)
	}
}

// A time means something only for Vault's files.
func TestATimeNeedsVaultsFiles(t *testing.T) {
	at := time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		asOf  string
		files []string
		want  time.Time
		fails string
	}{
		{"", nil, time.Time{}, ""},
		{"2026-01-31T12:00:00Z", []string{"vault.log"}, at, ""},
		{"2026-01-31T12:00:00Z", nil, time.Time{}, "--as-of needs Vault's audit files"},
		{"yesterday", []string{"vault.log"}, time.Time{}, "--as-of: \"yesterday\" is not a time"},
	} {
		got, err := Given{AsOf: c.asOf, VaultFiles: c.files}.asOf()
		if !got.Equal(c.want) || (err == nil) != (c.fails == "") || err != nil && !strings.Contains(err.Error(), c.fails) {
			t.Errorf("%q: %s, %v", c.asOf, got, err)
		}
	}
}

// A copy counts as evidence if whoever can change the log could not change it.
func TestWhatCountsAsEvidenceFromOutside(t *testing.T) {
	gone := filepath.Join(t.TempDir(), "gone")
	checkpoint := "log\n0\n47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\n"
	for _, c := range []struct {
		name        string
		given       Given
		sink        Sink
		independent bool
		fails       string
	}{
		{"the sink beside the log", Given{}, Sink{file(t, ""), false}, false, ""},
		{"none beside the log", Given{}, Sink{gone, false}, false, ""},
		{"the sink elsewhere", Given{}, Sink{file(t, ""), true}, true, ""},
		{"none elsewhere", Given{}, Sink{gone, true}, false, "the file sink is gone"},
		{"a copy", Given{Sink: file(t, "")}, Sink{gone, true}, true, ""},
		{"a checkpoint", Given{Checkpoint: checkpoint}, Sink{gone, false}, true, ""},
		{"a copy that is not there", Given{Sink: gone}, Sink{}, false, "no such file"},
	} {
		_, independent, err := c.given.evidence(c.sink, nil)
		if independent != c.independent || (err == nil) != (c.fails == "") || err != nil && !strings.Contains(err.Error(), c.fails) {
			t.Errorf("%s: %t, %v", c.name, independent, err)
		}
	}
}

// The object says what the exit code does, and names the first bad event.
func TestTheObjectAgreesWithTheExitCode(t *testing.T) {
	for _, c := range []struct {
		name  string
		err   error
		json  []string
		lacks string
	}{
		{"verified", nil, []string{`"verified": true`, `"truncationExcluded": true`, `"exitCode": 0`}, `"error"`},
		{"not excluded", fmt.Errorf("closing: %w", notExcluded("no copy")), []string{`"verified": true`, `"truncationExcluded": false`, `"exitCode": 3`, `"notExcluded"`}, `"error"`},
		{"wrong", fmt.Errorf("the log: %w", &verify.Problem{Index: 7}), []string{`"verified": false`, `"truncationExcluded": false`, `"exitCode": 1`, `"error"`, `"event": 7`}, `"notExcluded"`},
	} {
		var out strings.Builder
		if err := Say(&out, true, nil, func(*Judge) error { return c.err }); err != c.err {
			t.Errorf("%s: %v", c.name, err)
		}
		for _, says := range append(c.json, `"format": "orgkeys-verify/1"`) {
			if !strings.Contains(out.String(), says) {
				t.Errorf("%s: %s is missing in %s", c.name, says, out.String())
			}
		}
		if strings.Contains(out.String(), c.lacks) {
			t.Errorf("%s: %s", c.name, out.String())
		}
	}
}
