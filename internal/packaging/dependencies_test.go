package packaging

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/mod/modfile"
)

// The sections of docs/dependencies.md.
const (
	inPrograms = "In the server, the node's program and the command line"
	inTests    = "In tests only"
	asTools    = "Tools"
)

// toolsFile lists the tools. Nothing else is in its module.
const toolsFile = "scripts/tools/go.mod"

func TestEveryDependencyIsDocumentedWithItsLicence(t *testing.T) {
	mod, toolsMod := goMod(t, "go.mod"), goMod(t, toolsFile)
	documented := documentedModules(t)
	programs := modulesOf(t, mod, imports(t, "{{range .Imports}}{{.}}\n{{end}}", "-deps", "./cmd/..."))
	everywhere := modulesOf(t, mod, imports(t,
		"{{range .Imports}}{{.}}\n{{end}}{{range .TestImports}}{{.}}\n{{end}}{{range .XTestImports}}{{.}}\n{{end}}", "./..."))
	tests := slices.DeleteFunc(everywhere, func(m string) bool { return slices.Contains(programs, m) })
	var tools []string
	for _, tool := range toolsMod.Tool {
		tools = append(tools, tool.Path)
	}
	for section, want := range map[string][]string{inPrograms: programs, inTests: tests, asTools: modulesOf(t, toolsMod, tools)} {
		var got []string
		for _, m := range documented[section] {
			got = append(got, m.path)
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("section %q of docs/dependencies.md\n has %q\nneeds %q", section, got, want)
		}
	}
	for title, section := range documented {
		file := "go.mod"
		if title == asTools {
			file = toolsFile
		}
		for _, m := range section {
			if got := licence(t, file, m.path); got != m.licence {
				t.Errorf("%s ships the licence %s; docs/dependencies.md says %s", m.path, got, m.licence)
			}
			if m.reason == "" {
				t.Errorf("%s: docs/dependencies.md gives no reason", m.path)
			}
		}
	}
}

type module struct{ path, licence, reason string }

// documentedModules reads the tables of docs/dependencies.md by section.
func documentedModules(t *testing.T) map[string][]module {
	t.Helper()
	row := regexp.MustCompile("^\\| `([^`]+)` \\| ([^|]+) \\| ([^|]*) \\|$")
	sections := map[string][]module{}
	section := ""
	for line := range strings.Lines(read(t, "docs/dependencies.md")) {
		line = strings.TrimSpace(line)
		if title, ok := strings.CutPrefix(line, "## "); ok {
			section = title
		}
		if m := row.FindStringSubmatch(line); m != nil {
			sections[section] = append(sections[section], module{m[1], m[2], m[3]})
		}
	}
	return sections
}

func goMod(t *testing.T, path string) *modfile.File {
	t.Helper()
	f, err := modfile.Parse(path, []byte(read(t, path)), nil)
	if err != nil {
		t.Fatalf("parsing %s: %v", path, err)
	}
	return f
}

// imports lists what the format finds in the packages that go list selects,
// leaving out packages of other modules.
func imports(t *testing.T, format string, selection ...string) []string {
	t.Helper()
	format = fmt.Sprintf("{{with .Module}}{{if .Main}}{{with $}}%s{{end}}{{end}}{{end}}", format)
	return strings.Fields(goTool(t, append([]string{"list", "-f", format}, selection...)...))
}

// modulesOf maps packages to the modules that provide them, each once, sorted;
// packages of the standard library and of this module are left out.
func modulesOf(t *testing.T, mod *modfile.File, packages []string) []string {
	t.Helper()
	var modules []string
	for _, p := range packages {
		if first, _, _ := strings.Cut(p, "/"); !strings.Contains(first, ".") || within(p, mod.Module.Mod.Path) {
			continue
		}
		longest := ""
		for _, r := range mod.Require {
			if within(p, r.Mod.Path) && len(r.Mod.Path) > len(longest) {
				longest = r.Mod.Path
			}
		}
		if longest == "" {
			t.Errorf("go.mod requires no module for %s", p)
		}
		modules = append(modules, longest)
	}
	slices.Sort(modules)
	return slices.Compact(modules)
}

func within(pkg, module string) bool { return pkg == module || strings.HasPrefix(pkg, module+"/") }

// licence names the licence whose text is in the module's own licence file. The
// module is one that the go.mod at file requires.
func licence(t *testing.T, file, path string) string {
	t.Helper()
	dir := strings.TrimSpace(goTool(t, "list", "-m", "-modfile="+file, "-f", "{{.Dir}}", path))
	for _, name := range []string{"LICENSE", "LICENSE.txt", "LICENSE.md"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			continue
		}
		text := strings.Join(strings.Fields(string(b)), " ")
		// The text that tells a licence from the others, most specific first.
		for _, l := range []struct{ name, telltale string }{
			{"Apache-2.0", "Apache License Version 2.0"},
			{"MPL-2.0", "Mozilla Public License"},
			{"BSD-3-Clause", "may be used to endorse or promote products"},
			{"BSD-2-Clause", "Redistributions in binary form must reproduce"},
			{"MIT", "Permission is hereby granted, free of charge"},
		} {
			if strings.Contains(text, l.telltale) {
				return l.name
			}
		}
	}
	return "unknown"
}

func goTool(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.Command("go", args...)
	cmd.Dir = root
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, &stderr)
	}
	return string(out)
}

func TestThePolicyIsCheckedByTheVersionThatEvaluatesIt(t *testing.T) {
	const opa = "github.com/open-policy-agent/opa"
	versions := map[string]string{}
	for _, file := range []string{"go.mod", toolsFile} {
		for _, r := range goMod(t, file).Require {
			if r.Mod.Path == opa {
				versions[file] = r.Mod.Version
			}
		}
	}
	if versions["go.mod"] == "" || versions["go.mod"] != versions[toolsFile] {
		t.Errorf("versions of %s: %v", opa, versions)
	}
}
