package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// document reads a file of docs/.
func document(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", "docs", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// The check by hand that docs/audit.md prints, run as it stands there, with
// sha256sum and openssl, for every event of a real log; and on altered ones.
func TestTheCheckByHandInTheDocumentWorks(t *testing.T) {
	script := regexp.MustCompile("(?s)<!-- worked check -->\n```bash\n(.*?)```").FindStringSubmatch(document(t, "audit.md"))
	if script == nil {
		t.Fatal("docs/audit.md has no worked check")
	}
	s := harness.Start(t)
	org := harness.Org()
	s.Generate(t, org)
	s.List(t, org)
	s.List(t, org)
	s.List(t, org)
	s.Stop(t)
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	write := func(name, text string) {
		if err := os.WriteFile(in(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	check := func() (string, error) {
		cmd := exec.Command("bash", "-c", script[1])
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	write("key.txt", ok(t, s, "audit", "key"))
	ok(t, s, "audit", "export", in("export.tar.gz"))
	for index := range 5 {
		proof := ok(t, s, "audit", "prove", string(rune('0'+index)))
		write("proof.json", proof)
		if out, err := check(); err != nil || !strings.Contains(out, "is in the log of 5 events") {
			t.Fatalf("event %d: %v\n%s", index, err, out)
		}
		for name, altered := range map[string]string{
			"another event":     strings.Replace(proof, `"index": `+string(rune('0'+index)), `"index": `+string(rune('0'+(index+1)%5)), 1),
			"another size":      strings.Replace(proof, `\n5\n`, `\n6\n`, 1),
			"another signature": regexp.MustCompile(`....\\n"`).ReplaceAllString(proof, `AAA=\n"`),
		} {
			if altered == proof {
				t.Fatalf("%s: the case changes nothing", name)
			}
			write("proof.json", altered)
			if out, err := check(); err == nil {
				t.Errorf("event %d, %s: passed\n%s", index, name, out)
			}
		}
	}
}
