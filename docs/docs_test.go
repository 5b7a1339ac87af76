// Package docs_test reads the documents and compares them with the code.
package docs_test

import (
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/config"
)

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", path))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// settingsTable is the table of docs/settings.md as it must be.
func settingsTable() string {
	var b strings.Builder
	b.WriteString("| Setting | Default | |\n|---|---|---|\n")
	for _, s := range config.Settings() {
		name, def := "`"+s.Name+"`", ""
		if s.Secret {
			name += ", `" + s.Name + "_FILE`"
		}
		if s.Default != "" {
			def = "`" + s.Default + "`"
		}
		fmt.Fprintf(&b, "| %s | %s | %s |\n", name, def, s.Doc)
	}
	return b.String()
}

var update = flag.Bool("update", false, "write the settings' table into docs/settings.md")

func TestSettingsDocumentIsTheSettingsTable(t *testing.T) {
	text, table, found := strings.Cut(read(t, "docs/settings.md"), "<!-- settings -->\n")
	if *update {
		if err := os.WriteFile("settings.md", []byte(text+"<!-- settings -->\n"+settingsTable()), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if !found || table != settingsTable() {
		t.Error("docs/settings.md has not the settings that there are: run go test ./docs -update")
	}
}

// testNames are the names of all test functions in the tree.
func testNames(t *testing.T) map[string]bool {
	t.Helper()
	names := map[string]bool{}
	definition := regexp.MustCompile(`(?m)^func (Test\w+)\(t \*testing\.T\)`)
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		b, err := os.ReadFile(path)
		for _, m := range definition.FindAllStringSubmatch(string(b), -1) {
			names[m[1]] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestEveryPromiseNamesTestsThatExist(t *testing.T) {
	_, rest, ok := strings.Cut(read(t, "SECURITY.md"), "<!-- promises:begin -->")
	table, _, ok2 := strings.Cut(rest, "<!-- promises:end -->")
	if !ok || !ok2 {
		t.Fatal("SECURITY.md has no table of promises between its markers")
	}
	existing := testNames(t)
	promises := 0
	kept := map[string]string{} // by test, the promise in whose row it stands
	for _, row := range strings.Split(table, "\n") {
		if !regexp.MustCompile(`^\| \d+\. `).MatchString(row) {
			continue
		}
		promises++
		number := regexp.MustCompile(`\d+`).FindString(row)
		named := regexp.MustCompile("`(Test\\w+)`").FindAllStringSubmatch(row, -1)
		if len(named) == 0 {
			t.Errorf("no test keeps this promise: %s", row)
		}
		for _, n := range named {
			kept[n[1]] = number
			if !existing[n[1]] {
				t.Errorf("there is no test %s, which is to keep: %.60s…", n[1], row)
			}
		}
	}
	for name := range existing {
		if m := regexp.MustCompile(`^TestPromise(\d+)_`).FindStringSubmatch(name); m != nil && kept[name] != m[1] {
			t.Errorf("SECURITY.md does not name %s in the row of promise %s", name, m[1])
		}
	}
	if promises != 10 {
		t.Errorf("%d promises in the table, want 10", promises)
	}
}

func TestLinksLeadToFiles(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`)
	checked := 0
	documents, err := filepath.Glob("*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range append(documents, "../README.md", "../SECURITY.md", "../CHANGELOG.md") {
		if strings.HasPrefix(path, "contract-") {
			continue // the page as it was given
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllStringSubmatch(string(b), -1) {
			checked++
			if _, err := os.Stat(filepath.Join(filepath.Dir(path), m[1])); err != nil {
				t.Errorf("%s links to %s: %v", path, m[1], err)
			}
		}
	}
	if checked == 0 {
		t.Error("no link was found to check")
	}
}

// The packages' table in docs/architecture.md names every package there is.
func TestArchitectureNamesEveryPackage(t *testing.T) {
	text := read(t, "docs/architecture.md")
	packages, err := filepath.Glob("../internal/*")
	if err != nil || len(packages) == 0 {
		t.Fatal(err)
	}
	for _, p := range packages {
		if name := filepath.Base(p); !strings.Contains(text, "`internal/"+name+"`") {
			t.Errorf("docs/architecture.md does not say what internal/%s is", name)
		}
	}
}
