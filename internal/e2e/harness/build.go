// Package harness runs the shipped orgkeys program for end-to-end tests: it
// builds it once, starts it on a fresh data directory, speaks HTTP to it, and
// reads what it leaves behind. It knows the program by its contract only
// (documents, settings, log lines, tables) and imports none of its code but the
// public client and the checker of its OpenAPI document, so that a test cannot share a mistake with
// what it tests.
package harness

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/orgkeys/orgkeys/internal/sourcetree"
)

// A build is the program, compiled once for a test process.
type build struct {
	dir  string
	once map[string]func() (string, error)
}

var program build

// Main runs a package's tests and removes what the harness built. TestMain
// calls it and exits with what it returns.
func Main(m *testing.M) int { return main(m.Run) }

// MainServing is Main with a server that the package's tests and examples
// share. They use organizations of their own.
func MainServing(m *testing.M, use func(*Server)) int {
	return main(func() int {
		path, err := program.once["orgkeys"]()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		s := newServer(path, filepath.Join(program.dir, "data"))
		if err := s.launch(); err != nil {
			fmt.Fprintf(os.Stderr, "starting orgkeys: %v\n%s", err, s.Output())
			return 1
		}
		defer s.Kill()
		use(s)
		return m.Run()
	})
}

func main(run func() int) int {
	dir, err := os.MkdirTemp("", "orgkeys-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	program.dir = dir
	program.once = map[string]func() (string, error){
		"orgkeys":      sync.OnceValues(func() (string, error) { return compile(dir, "orgkeys", "orgkeys") }),
		"orgkeys-race": sync.OnceValues(func() (string, error) { return compile(dir, "orgkeys-race", "orgkeys", "-race") }),
		"orgkeys-node": sync.OnceValues(func() (string, error) { return compile(dir, "orgkeys-node", "orgkeys-node") }),
	}
	return run()
}

// Binary is the path of the program.
func Binary(t testing.TB) string { return built(t, "orgkeys") }

// RaceBinary is the path of the program with the race detector in it. A server
// that reports a race fails its test.
func RaceBinary(t testing.TB) string { return built(t, "orgkeys-race") }

// NodeBinary is the path of orgkeys-node.
func NodeBinary(t testing.TB) string { return built(t, "orgkeys-node") }

func built(t testing.TB, name string) string {
	t.Helper()
	path, err := program.once[name]()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func compile(dir, name, command string, flags ...string) (string, error) {
	root, err := sourcetree.Root()
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, name)
	cmd := exec.Command("go", append(append([]string{"build"}, flags...), "-o", path, "./cmd/"+command)...)
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building %s: %w\n%s", name, err, out)
	}
	return path, nil
}

// ModuleRoot is the directory of go.mod.
func ModuleRoot(t testing.TB) string {
	t.Helper()
	root, err := sourcetree.Root()
	if err != nil {
		t.Fatal(err)
	}
	return root
}
