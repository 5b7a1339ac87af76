package packaging

import (
	"fmt"
	"io/fs"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// block is a fenced block of a document.
type block struct {
	document string
	line     int
	kind     string // the info string: sh and bash are commands
	text     string
	shapes   []string // in which it is run; empty: in all
	notRun   string   // the reason why it is not run
	output   string   // what the document shows of its output
	shown    bool     // whether the document shows any
}

func (b block) String() string { return fmt.Sprintf("%s:%d", b.document, b.line) }

func (b block) command() bool { return b.kind == "sh" || b.kind == "bash" }

func (b block) runsIn(shape string) bool {
	return b.command() && b.notRun == "" && (len(b.shapes) == 0 || slices.Contains(b.shapes, shape))
}

var (
	fence  = regexp.MustCompile("^( *)(```+)([\\w-]*)$")
	mark   = regexp.MustCompile(`^ *<!-- (not run|run with): (.*) -->$`)
	shapes = []string{"default", "vault", "replicas"}
	// data are the kinds of blocks that are no commands and claim nothing to run.
	data = []string{"json", "yaml", "text", "http", "hcl", "rego", "ini", "mermaid"}
	// reasons are why a block may not be run, as CONTRIBUTING.md explains them.
	reasons = []string{"systemd", "docker", "kubernetes", "another machine", "your own values", "destructive"}
)

// documents are the documents that people follow, in the order in which README.md
// names those that build on each other.
func documents(t *testing.T) []string {
	t.Helper()
	first := []string{"README.md", "docs/api.md", "docs/nodes.md", "docs/audit.md", "docs/operations.md"}
	var rest []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") && name != "." || d.Name() == "node_modules") {
			return filepath.SkipDir
		}
		// The page as it was given has samples that scripts/samples runs.
		given := name == "docs/contract-generate-organization-key.md"
		if strings.HasSuffix(name, ".md") && !given && !slices.Contains(first, name) {
			rest = append(rest, name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return append(first, rest...)
}

// blocksOf returns a document's blocks, and what is wrong with its marks.
func blocksOf(document, text string) (all []block, wrong []error) {
	var open *block
	var closing, indent, marked string
	var previous string // the last line that is not empty
	for i, line := range strings.Split(text, "\n") {
		m := fence.FindStringSubmatch(line)
		switch {
		case open != nil && strings.TrimSpace(line) == closing:
			if err := add(&all, *open); err != nil {
				wrong = append(wrong, err)
			}
			open = nil
		case open != nil:
			open.text += strings.TrimPrefix(line, indent) + "\n"
		case m != nil:
			open, indent, closing = &block{document: document, line: i + 1, kind: m[3]}, m[1], m[2]
			open.mark(marked)
			marked = ""
		case mark.MatchString(line):
			marked = line
		case strings.HasPrefix(line, "    ") && previous == "" && line != "":
			wrong = append(wrong, fmt.Errorf("%s:%d: an indented block: fence it", document, i+1))
		case line != "" && marked != "" && !strings.HasPrefix(line, "<!--"):
			wrong = append(wrong, fmt.Errorf("%s:%d: no block follows the mark %s", document, i+1, marked))
			marked = ""
		}
		if strings.TrimSpace(line) != "" || !strings.HasPrefix(previous, " ") && !list.MatchString(previous) {
			previous = line
		}
	}
	if open != nil {
		wrong = append(wrong, fmt.Errorf("%s: the block is not closed", open))
	}
	return all, wrong
}

// list is a line of a list: what is indented below it belongs to it.
var list = regexp.MustCompile(`^ *([-*]|\d+\.) `)

func (b *block) mark(line string) {
	switch m := mark.FindStringSubmatch(line); {
	case m == nil:
	case m[1] == "not run":
		b.notRun = m[2]
	default:
		b.shapes = strings.Split(m[2], ", ")
	}
}

// add appends b, or, if it is what the block before it prints, gives it to that one.
func add(all *[]block, b block) error {
	switch {
	case b.command():
		for _, s := range b.shapes {
			if !slices.Contains(shapes, s) {
				return fmt.Errorf("%s: %q is not one of %q", b, s, shapes)
			}
		}
		if b.notRun != "" && !slices.Contains(reasons, b.notRun) {
			return fmt.Errorf("%s: %q is not one of %q", b, b.notRun, reasons)
		}
	case b.kind == "":
		if n := len(*all); n > 0 && (*all)[n-1].command() && !(*all)[n-1].shown {
			(*all)[n-1].output, (*all)[n-1].shown = b.text, true
			return nil
		}
		return fmt.Errorf("%s: not commands (sh), not the output of the block before, not data (%s)", b, strings.Join(data, ", "))
	case !slices.Contains(data, b.kind) && b.notRun == "":
		return fmt.Errorf("%s: a block of %s is neither run nor marked", b, b.kind)
	}
	*all = append(*all, b)
	return nil
}

// Every block of every document is run by TestDocumentsCanBeFollowed, is what one
// prints, is data, or says why it is none of these.
func TestEveryBlockOfTheDocumentsIsRunOrSaysWhyNot(t *testing.T) {
	run, not := 0, 0
	for _, document := range documents(t) {
		all, wrong := blocksOf(document, read(t, document))
		for _, err := range wrong {
			t.Error(err)
		}
		for _, b := range all {
			switch {
			case b.notRun != "":
				not++
			case b.command():
				run++
			}
		}
	}
	t.Logf("%d blocks are run, %d are not", run, not)
	if run < 20 || not > run {
		t.Errorf("%d blocks are run and %d are not: most must be", run, not)
	}
}

func TestMarksOfBlocks(t *testing.T) {
	for name, c := range map[string]struct {
		text  string
		wrong string // part of the error, or empty
		shown string
	}{
		"commands":                   {"```sh\necho a\n```\n", "", ""},
		"commands and their output":  {"```sh\necho a\n```\n\nSo:\n\n```\na\n```\n", "", "a\n"},
		"in a list":                  {"1. one\n\n   ```sh\n   echo a\n   ```\n", "", ""},
		"data":                       {"```json\n{}\n```\n", "", ""},
		"unmarked":                   {"```\norgkeys x\n```\n", "not commands", ""},
		"output of nothing":          {"```sh\necho a\n```\n```\na\n```\n```\nb\n```\n", "not commands", "a\n"},
		"a language that is not run": {"```go\nx()\n```\n", "neither run nor marked", ""},
		"marked":                     {"<!-- not run: systemd -->\n```sh\nsystemctl\n```\n", "", ""},
		"marked for no reason":       {"<!-- not run: too slow -->\n```sh\nsleep 9\n```\n", "is not one of", ""},
		"in some shapes":             {"<!-- run with: vault, replicas -->\n```sh\nvault\n```\n", "", ""},
		"in an unknown shape":        {"<!-- run with: cloud -->\n```sh\nvault\n```\n", "is not one of", ""},
		"indented":                   {"So:\n\n    orgkeys x\n", "fence it", ""},
		"a list's second paragraph":  {"1. So:\n\n    more\n", "", ""},
		"a mark without a block":     {"<!-- not run: systemd -->\nText\n", "no block follows", ""},
		"not closed":                 {"```sh\necho\n", "not closed", ""},
	} {
		all, wrong := blocksOf("d.md", c.text)
		if c.wrong == "" && len(wrong) != 0 || c.wrong != "" && (len(wrong) != 1 || !strings.Contains(wrong[0].Error(), c.wrong)) {
			t.Errorf("%s: %v, want %q", name, wrong, c.wrong)
		}
		if len(all) > 0 && all[0].output != c.shown {
			t.Errorf("%s: shows %q, want %q", name, all[0].output, c.shown)
		}
	}
}

// varying matches what is another text in each run: UUIDs, times, keys and hashes,
// and the length of a private key.
var varying = regexp.MustCompile(strings.Join(forms, "|"))

var forms = []string{
	`[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}`,
	`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z`,
	`[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT`,
	`[A-Za-z0-9+/_-]{40,}={0,2}`,
	`Content-Length: \d+`,
}

// asShown reports whether seen is what a document shows, where … stands for
// anything, and what varies for anything of the same form.
func asShown(shown, seen string) bool {
	shown, seen = strings.TrimRight(shown, "\n"), strings.TrimRight(strings.ReplaceAll(seen, "\r", ""), "\n")
	form, rest := "", shown
	for _, at := range varying.FindAllStringIndex(shown, -1) {
		one := shown[at[0]:at[1]]
		before, after, _ := strings.Cut(rest, one)
		form += literal(before) + formOf(one)
		rest = after
	}
	return regexp.MustCompile(`(?s)^` + form + literal(rest) + `$`).MatchString(seen)
}

func literal(text string) string { return strings.ReplaceAll(regexp.QuoteMeta(text), "…", ".*") }

func formOf(text string) string {
	i := slices.IndexFunc(forms, func(form string) bool { return regexp.MustCompile(`^(?:` + form + `)$`).MatchString(text) })
	return forms[i]
}

func TestOutputIsCompared(t *testing.T) {
	for _, c := range []struct {
		shown, seen string
		want        bool
	}{
		{"3 events\n", "3 events\n", true},
		{"3 events\n", "4 events\n", false},
		{"3 events\n", "3 events\nand more\n", false},
		{"3 events\n…\n", "3 events\nand more\n", true},
		{`{"id":"95dbf81e-3298-4326-a2b1-bcdc84525f9a"}`, `{"id":"11ea7a05-6cc2-495a-a581-466cc1cd2067"}`, true},
		{`{"id":"95dbf81e-3298-4326-a2b1-bcdc84525f9a"}`, `{"id":""}`, false},
		{"Date: Wed, 25 Nov 2026 04:26:30 GMT", "Date: Sun, 29 Nov 2026 04:00:00 GMT\r\n", true},
		{"(5)", "55", false},
		{`"-----\nMIIB…\n-----\n"`, `"-----\nMIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEA6CHVitREUxh0Lrr0FdUX\nAB==\n-----\n"`, true},
		{"root hash TelEoPuFl9SsOAFgE37XnYK+vPqhAW/Xkwzp19zYW/k=", "root hash uxnNwaFqVaIl+8u2/kO3kLgnuSXi8nXsc6KiBym7A5U=", true},
	} {
		if asShown(c.shown, c.seen) != c.want {
			t.Errorf("shown %q, seen %q: want %v", c.shown, c.seen, c.want)
		}
	}
}
