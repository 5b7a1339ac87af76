package packaging

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/freeport"
)

// start is the command of README.md that is run first, and serves meanwhile.
const start = "./scripts/run\n"

// long reports whether the long forms of tests are asked for.
func long() bool { return os.Getenv("ORGKEYS_TEST_LONG") != "" }

// TestDocumentsCanBeFollowed runs the documents, block by block, in a fresh clone
// against what scripts/run serves, in one shell for each document, and compares
// what is seen with what the document shows. The short form is the default shape.
func TestDocumentsCanBeFollowed(t *testing.T) {
	in := shapes[:1]
	if long() {
		in = shapes
	}
	for _, shape := range in {
		t.Run(shape, func(t *testing.T) {
			r := reader{t: t, shape: shape, dir: freshClone(t)}
			r.serve()
			for _, document := range documents(t) {
				r.follow(document)
			}
		})
	}
}

// reader is somebody who follows the documents.
type reader struct {
	t         *testing.T
	shape     string
	dir       string // the clone
	addresses *strings.Replacer
}

// freshClone is what somebody gets who clones the repository as it is, with what
// is not committed yet.
func freshClone(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "orgkeys")
	script := `set -euo pipefail
		git clone --quiet --no-hardlinks . "$1"
		git ls-files -z --deleted | (cd "$1" && xargs -0 --no-run-if-empty rm -f --)
		git ls-files -z --modified --others --exclude-standard --deduplicate | while IFS= read -rd '' f; do
			if [[ -e $f ]]; then mkdir -p "$1/$(dirname "$f")" && cp --preserve=mode "$f" "$1/$f"; fi
		done`
	cmd := exec.Command("bash", "-c", script, "bash", dir)
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return dir
}

// serve starts what README.md starts, in the reader's shape, on free ports.
func (r *reader) serve() {
	r.t.Helper()
	port, err := freeport.Find(1, 2, 1000, 1001, 1002, 2440, 3390, 5210)
	if err != nil {
		r.t.Fatal(err)
	}
	r.addresses = strings.NewReplacer("127.0.0.1:3000", fmt.Sprint("127.0.0.1:", port), "127.0.0.1:4000", fmt.Sprint("127.0.0.1:", port+1000))
	args := map[string][]string{"vault": {"--vault"}, "replicas": {"--replicas", "3"}}[r.shape]
	// docs/audit.md waits for the first signed checkpoint, which comes a minute after the start otherwise.
	started := runIn(r.t, r.dir, append(os.Environ(), "ORGKEYS_LISTEN=127.0.0.1:"+strconv.Itoa(port),
		"ORGKEYS_CHECKPOINT_INTERVAL=5s"), args...)
	started.command(r.t)
}

// follow runs a document's blocks for the reader's shape in one shell.
func (r *reader) follow(document string) {
	r.t.Helper()
	var run []block
	all, _ := blocksOf(document, read(r.t, document)) // what is wrong another test says
	for _, b := range all {
		if b.runsIn(r.shape) && b.text != start {
			run = append(run, b)
		}
	}
	if len(run) == 0 {
		return
	}
	began := time.Now()
	outputs, err := r.shell(document, run)
	r.t.Logf("%s: %d blocks in %s", document, len(run), time.Since(began).Round(time.Millisecond))
	for i, output := range outputs {
		if b := run[i]; b.shown && (err == nil || i < len(outputs)-1) && !asShown(r.addresses.Replace(b.output), output) {
			r.t.Errorf("%s: the document shows\n%s\nand what is seen is\n%s", b, b.output, output)
		}
	}
	if err != nil {
		i := max(len(outputs)-1, 0)
		r.t.Errorf("%s: %v\n%s", run[i], err, strings.Join(outputs[i:], ""))
	}
}

// shell runs blocks, and returns what each that was begun has printed.
func (r *reader) shell(document string, blocks []block) ([]string, error) {
	const begins = "\n==== the next block ====\n"
	script := "set -euo pipefail\n"
	if document != "README.md" { // which says so itself
		script += ". .orgkeys/env\n"
	}
	for _, b := range blocks {
		script += "printf %s '" + begins + "'\n" + r.addresses.Replace(b.text)
	}
	cmd := exec.Command("bash", "-c", script)
	cmd.Dir, cmd.WaitDelay = r.dir, patience
	var seen bytes.Buffer
	cmd.Stdout, cmd.Stderr = &seen, &seen
	err := cmd.Run()
	before, rest, begun := strings.Cut(seen.String(), begins)
	if !begun {
		return nil, fmt.Errorf("%w\n%s", err, before)
	}
	return strings.Split(rest, begins), err
}

// What scripts/run prints can be pasted any number of times: it never replaces a
// key, makes none that it could not save, and shows why there is none.
func TestACommandThatSavesAKeyReplacesNone(t *testing.T) {
	r := run(t, append(os.Environ(), "ORGKEYS_LISTEN=127.0.0.1:"+freePort(t), "ORGKEYS_MAX=2", "ORGKEYS_DATA_DIR="+filepath.Join(t.TempDir(), "data")))
	command := r.command(t)
	pasted := func(dir string) (string, string, error) {
		cmd := exec.Command("bash", "-c", command)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		kept, _ := os.ReadFile(filepath.Join(dir, "private_key.pem"))
		return string(out), string(kept), err
	}
	dir := t.TempDir()
	_, first, err := pasted(dir)
	if err != nil || !strings.HasPrefix(first, "-----BEGIN RSA PRIVATE KEY-----") {
		t.Fatalf("%v, saved %.40q", err, first)
	}
	for range 3 { // more than the quota has places: a request would show
		out, kept, err := pasted(dir)
		if err == nil || kept != first || !strings.Contains(out, "cannot overwrite existing file") {
			t.Errorf("pasted again: %v\n%s", err, out)
		}
	}
	if _, second, err := pasted(t.TempDir()); err != nil || second == first {
		t.Errorf("elsewhere: %v", err)
	}
	out, kept, err := pasted(t.TempDir())
	if err == nil || kept != "" || !strings.Contains(out, "Maximum number of organization keys (2)") {
		t.Errorf("over the quota: %v, saved %q\n%s", err, kept, out)
	}
}

// curl in a document ends with an error when the server's answer is one.
func TestDocumentedRequestsFailOnErrors(t *testing.T) {
	command := regexp.MustCompile(`(?m)(^|[ (;|])curl ([^|;]|\\\n)*`)
	checked := 0
	for _, document := range documents(t) {
		all, _ := blocksOf(document, read(t, document))
		for _, b := range all {
			if !b.command() {
				continue
			}
			for _, c := range command.FindAllString(b.text, -1) {
				checked++
				if !strings.Contains(c, "--fail-with-body") {
					t.Errorf("%s: without --fail-with-body: %s", b, c)
				}
				if strings.Contains(c, ".pem") && strings.Contains(c, "-o ") || strings.Contains(c, "--output") {
					t.Errorf("%s: may replace a key: %s", b, c)
				}
			}
		}
	}
	if checked < 10 {
		t.Errorf("%d commands were found", checked)
	}
}
