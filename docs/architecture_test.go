package docs_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/orgkeys/orgkeys/"

// goPackage is what go list says of a package.
type goPackage struct {
	ImportPath   string
	Imports      []string
	TestImports  []string
	XTestImports []string
	TestGoFiles  []string
	XTestGoFiles []string
}

func (p goPackage) name() string { return strings.TrimPrefix(p.ImportPath, module) }

// ours are the module's packages that it imports outside its tests.
func (p goPackage) ours() string {
	var all []string
	for _, path := range p.Imports {
		if name, ok := strings.CutPrefix(path, module); ok {
			short, internal := strings.CutPrefix(name, "internal/")
			if !internal {
				short = "/" + name // at the top: there are two packages called vault
			}
			all = append(all, short)
		}
	}
	return strings.Join(all, ", ")
}

func goList(t *testing.T) []goPackage {
	t.Helper()
	cmd := exec.Command("go", "list", "-json", "./...")
	cmd.Dir, cmd.Stderr = "..", os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var all []goPackage
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	if len(all) == 0 {
		t.Fatal("there are no packages")
	}
	return all
}

// row is a package in the tables of docs/architecture.md.
type row struct{ name, owns, imports string }

var rowForm = regexp.MustCompile("(?m)^\\| `([^`]+)` \\| (.*) \\| (.*)\\|$")

// packageTables returns the rows of both tables, in their order. What tests are
// made of stands above all that they test, and is read behind it.
func packageTables(t *testing.T, text string) []row {
	t.Helper()
	_, rest, begun := strings.Cut(text, "<!-- packages -->\n")
	tables, _, ended := strings.Cut(rest, "<!-- end of packages -->\n")
	if !begun || !ended {
		t.Fatal("docs/architecture.md has no tables of packages")
	}
	product, tests, _ := strings.Cut(tables, "\n\n")
	var rows []row
	for _, m := range rowForm.FindAllStringSubmatch(tests+"\n"+product, -1) {
		rows = append(rows, row{m[1], m[2], strings.TrimSpace(m[3])})
	}
	return rows
}

// compareTables says what is wrong with the tables: they name each package once,
// with its imports, and none imports what stands above it.
func compareTables(rows []row, packages []goPackage) []string {
	var wrong []string
	place, found := map[string]int{}, map[string]bool{}
	for i, r := range rows {
		if _, twice := place[r.name]; twice {
			wrong = append(wrong, r.name+" stands there twice")
		}
		place[r.name] = i
	}
	for _, p := range packages {
		i, named := place[p.name()]
		if !named {
			wrong = append(wrong, p.name()+" has no row: say what it owns, above all that it imports and below what imports it")
			continue
		}
		if rows[i].imports != p.ours() {
			wrong = append(wrong, fmt.Sprintf("%s imports %q, and its row says %q: run go test ./docs -update", p.name(), p.ours(), rows[i].imports))
		}
		for _, path := range p.Imports {
			if name, ok := strings.CutPrefix(path, module); ok && place[name] < i {
				wrong = append(wrong, fmt.Sprintf("%s imports %s, which stands above it: an import climbs, or the row is in the wrong place", p.name(), name))
			}
		}
		found[p.name()] = true
	}
	for _, r := range rows {
		if !found[r.name] {
			wrong = append(wrong, r.name+" is no package")
		}
	}
	return wrong
}

// The tables of docs/architecture.md are the packages and arrows that there are.
func TestArchitectureDrawsTheImportsThatThereAre(t *testing.T) {
	text, packages := read(t, "docs/architecture.md"), goList(t)
	if *update {
		byName := map[string]goPackage{}
		for _, p := range packages {
			byName[p.name()] = p
		}
		begun, ended := strings.Index(text, "<!-- packages -->"), strings.Index(text, "<!-- end of packages -->")
		tables := rowForm.ReplaceAllStringFunc(text[begun:ended], func(line string) string {
			m := rowForm.FindStringSubmatch(line)
			return strings.TrimRight(fmt.Sprintf("| `%s` | %s | %s", m[1], m[2], byName[m[1]].ours()), " ") + " |"
		})
		text = text[:begun] + tables + text[ended:]
		if err := os.WriteFile("architecture.md", []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, w := range compareTables(packageTables(t, text), packages) {
		t.Error(w)
	}
}

// The comparison above finds what it has to.
func TestDriftOfTheArchitectureIsFound(t *testing.T) {
	packages := []goPackage{
		{ImportPath: module + "cmd/x", Imports: []string{"fmt", module + "internal/a", module + "internal/b"}},
		{ImportPath: module + "internal/a", Imports: []string{module + "internal/b"}},
		{ImportPath: module + "internal/b"},
	}
	x, a, b := row{"cmd/x", "", "a, b"}, row{"internal/a", "", "b"}, row{"internal/b", "", ""}
	for _, c := range []struct {
		name string
		rows []row
		want string // empty: nothing is wrong
	}{
		{"as it is", []row{x, a, b}, ""},
		{"an import that is not drawn", []row{x, {"internal/a", "", ""}, b}, "internal/a imports"},
		{"an arrow that is not there", []row{x, a, {"internal/b", "", "a"}}, "internal/b imports"},
		{"a package that is not there", []row{x, a, b, {"internal/c", "", ""}}, "internal/c is no package"},
		{"a package without a row", []row{x, a}, "internal/b has no row"},
		{"a package twice", []row{x, a, b, b}, "twice"},
		{"an import that climbs", []row{x, b, a}, "internal/a imports internal/b, which stands above it"},
	} {
		wrong := compareTables(c.rows, packages)
		if found := slices.ContainsFunc(wrong, func(w string) bool { return strings.Contains(w, c.want) }); found != (c.want != "") || c.want == "" && len(wrong) > 0 {
			t.Errorf("%s: %q", c.name, wrong)
		}
	}
}

// servicesOf names what a test's import starts, or opens.
var servicesOf = map[string][]string{
	"internal/sqlstore/pgtest":     {"PostgreSQL"},
	"internal/redislock/redistest": {"Redis"},
	"internal/vault/vaulttest":     {"Vault"},
	"internal/hsm":                 {"SoftHSM"},
	"internal/hsm/hsmtest":         {"SoftHSM"},
	"internal/e2e/harness":         {"SoftHSM"},
	"internal/chaos/cluster":       {"SoftHSM", "Vault", "PostgreSQL", "Redis"},
	"internal/authn/providertest":  {"providers/build"},
}

// The table of tests names each package that has any, and the services that its
// tests import the starters of.
func TestArchitectureSaysWhatTestsNeed(t *testing.T) {
	_, table, _ := strings.Cut(read(t, "docs/architecture.md"), "## Tests: what they need\n")
	needs := map[string]string{}
	for _, m := range rowForm.FindAllStringSubmatch(table, -1) {
		needs[m[1]] = m[2]
	}
	tested := map[string]bool{}
	for _, p := range goList(t) {
		if len(p.TestGoFiles)+len(p.XTestGoFiles) > 0 {
			tested[p.name()] = true
			if _, ok := needs[p.name()]; !ok {
				t.Errorf("%s has tests, and no row says what they need", p.name())
			}
			for _, path := range slices.Concat(p.TestImports, p.XTestImports) {
				for _, service := range servicesOf[strings.TrimPrefix(path, module)] {
					if !strings.Contains(needs[p.name()], service) {
						t.Errorf("the tests of %s import %s, and its row does not name %s", p.name(), path, service)
					}
				}
			}
		}
	}
	for name := range needs {
		if !tested[name] {
			t.Errorf("%s has no tests", name)
		}
	}
}

var (
	namesThenFile = regexp.MustCompile(`([^\[]*)\[[^\]]+\]\(\.\./([^)]+)\)`)
	codeName      = regexp.MustCompile("`(?:\\w+\\.)?(\\w+)`")
)

// The names that the table of questions gives stand in the files that it links.
func TestArchitectureFindsWhatItNames(t *testing.T) {
	_, table, _ := strings.Cut(read(t, "docs/architecture.md"), "## Where to look\n")
	table, _, _ = strings.Cut(table, "\n## ")
	found := 0
	for row := range strings.Lines(table) {
		cells := strings.Split(row, " | ")
		if len(cells) != 3 {
			continue
		}
		var names []string // of the file before, where several files have them
		for _, m := range namesThenFile.FindAllStringSubmatch(cells[2], -1) {
			if !strings.Contains(m[1], "and in ") {
				names = nil
			}
			for _, name := range codeName.FindAllStringSubmatch(m[1], -1) {
				names = append(names, name[1])
			}
			if !strings.HasSuffix(m[2], ".go") {
				continue
			}
			text := read(t, m[2])
			for _, name := range names {
				found++
				if !regexp.MustCompile(`\b` + name + `\b`).MatchString(text) {
					t.Errorf("%s is not in %s", name, m[2])
				}
			}
		}
	}
	if found < 15 {
		t.Errorf("%d names were looked for", found)
	}
}

// A glossary that explains everything explains nothing.
func TestTheGlossaryIsShort(t *testing.T) {
	_, glossary, found := strings.Cut(read(t, "docs/architecture.md"), "## Glossary\n")
	if n := strings.Count(glossary, "\n| ") - 1; !found || n < 10 || n > 30 {
		t.Errorf("%d terms in the glossary of docs/architecture.md", n)
	}
}
