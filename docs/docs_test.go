// Package docs_test reads the documents and compares them with the code.
package docs_test

import (
	"flag"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
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

var update = flag.Bool("update", false, "write the settings into docs/settings.md, and the imports into docs/architecture.md")

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

// The table of docs/api.md has every errorCode that openapi.yaml declares, and
// no other, under the status that the code gives it.
func TestAPIDocumentHasEveryErrorCode(t *testing.T) {
	_, declared, _ := strings.Cut(read(t, "internal/api/openapi.yaml"), "description: Stable, for programs.\n")
	declared, _, _ = strings.Cut(declared, "requestId:")
	codes := regexp.MustCompile(`(?m)^ +- (\w+)$`).FindAllStringSubmatch(declared, -1)
	if len(codes) < 20 {
		t.Fatalf("openapi.yaml declares %d error codes", len(codes))
	}
	documented := map[string]string{} // code → status
	for _, row := range regexp.MustCompile(`(?m)^\| (\d{3}) \| ([^|]+) \|`).FindAllStringSubmatch(read(t, "docs/api.md"), -1) {
		for _, code := range regexp.MustCompile("`(\\w+)`").FindAllStringSubmatch(row[2], -1) {
			documented[code[1]] = row[1]
		}
	}
	for _, code := range codes {
		if documented[code[1]] == "" {
			t.Errorf("docs/api.md does not say what %s is", code[1])
		}
	}
	if len(documented) != len(codes) {
		t.Errorf("docs/api.md has %d error codes, openapi.yaml %d", len(documented), len(codes))
	}
	source := read(t, "internal/api/errors.go") + read(t, "internal/api/node.go")
	problems := regexp.MustCompile(`problem\{http\.Status(\w+), "(\w+)"`).FindAllStringSubmatch(source, -1)
	if len(problems) < 20 {
		t.Fatalf("%d problems were found in package api", len(problems))
	}
	for _, p := range problems {
		if status := documented[p[2]]; status != statusNamed(p[1]) {
			t.Errorf("docs/api.md gives %s the status %s; it is http.Status%s", p[2], status, p[1])
		}
	}
}

// statusNamed is the number of net/http's constant Status and name.
func statusNamed(name string) string {
	for status := 100; status < 600; status++ {
		if strings.ReplaceAll(http.StatusText(status), " ", "") == name {
			return strconv.Itoa(status)
		}
	}
	return "unknown"
}

func TestREADMENamesTheGoVersionThatIsNeeded(t *testing.T) {
	version := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindStringSubmatch(read(t, "go.mod"))
	if version == nil {
		t.Fatal("go.mod names no version")
	}
	if needed := "Go " + version[1] + " or newer"; !strings.Contains(read(t, "README.md"), needed) {
		t.Errorf("README.md does not say %q", needed)
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
	if promises != 15 {
		t.Errorf("%d promises in the table, want 15", promises)
	}
}

// Whoever has to know what is sealed under what reads it in SECURITY.md.
func TestTheTableOfSealedValuesHasEveryPurpose(t *testing.T) {
	var purposes, tabled []string
	for _, m := range regexp.MustCompile(`(?m)^\t\w+ += "(\w*)" +// bound to "`).FindAllStringSubmatch(read(t, "internal/orgkey/orgkey.go"), -1) {
		scheme := "orgkeys/v1"
		if m[1] != "" {
			scheme += "/" + m[1]
		}
		purposes = append(purposes, scheme)
	}
	for _, m := range regexp.MustCompile("(?m)^\\| [^|]+ \\| `(orgkeys/v1[a-z/]*)` \\|").FindAllStringSubmatch(read(t, "SECURITY.md"), -1) {
		tabled = append(tabled, m[1])
	}
	slices.Sort(purposes)
	slices.Sort(tabled)
	if len(purposes) < 8 || !slices.Equal(purposes, tabled) {
		t.Errorf("SECURITY.md has %q, the program seals under %q", tabled, purposes)
	}
}

func TestLinksLeadToFiles(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`)
	checked := 0
	documents, err := filepath.Glob("*.md")
	if err != nil {
		t.Fatal(err)
	}
	decisions, err := filepath.Glob("decisions/*.md")
	if err != nil {
		t.Fatal(err)
	}
	documents = append(documents, decisions...)
	for _, path := range append(documents, "../README.md", "../SECURITY.md", "../CHANGELOG.md", "../CONTRIBUTING.md", "../policies/README.md", "../vault/README.md") {
		if strings.HasPrefix(path, "contract-") {
			continue // the page as it was given
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllStringSubmatch(string(b), -1) {
			checked++
			target := filepath.Join(filepath.Dir(path), m[1])
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s links to %s: %v", path, m[1], err)
			} else if m[2] != "" && !slices.Contains(anchors(t, target), m[2]) {
				t.Errorf("%s links to %s%s, which has no such heading", path, m[1], m[2])
			}
		}
	}
	if checked == 0 {
		t.Error("no link was found to check")
	}
}

// anchors are the links that GitHub gives the headings of a document.
func anchors(t *testing.T, document string) []string {
	t.Helper()
	b, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, heading := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(string(b), -1) {
		kept := regexp.MustCompile(`[^\pL\pN _-]`).ReplaceAllString(strings.ToLower(heading[1]), "")
		all = append(all, "#"+strings.ReplaceAll(kept, " ", "-"))
	}
	return all
}
