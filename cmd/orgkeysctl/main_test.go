package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

var (
	binary string          // orgkeysctl, as it ships
	server *harness.Server // for tests that need no settings of their own
	update = flag.Bool("update", false, "write what tables look like into testdata")
)

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "orgkeysctl-")
	if err == nil {
		binary = filepath.Join(dir, "orgkeysctl")
		err = build(binary)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := harness.MainServing(m, func(s *harness.Server) { server = s })
	os.RemoveAll(dir)
	os.Exit(code)
}

// build builds the program as it ships, for this machine or as env says.
func build(path string, env ...string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, ".")
	cmd.Env = append(append(os.Environ(), "CGO_ENABLED=0"), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// person is somebody at a command line: a home directory, and settings.
type person struct {
	t      *testing.T
	home   string
	org    string
	server string
	env    []string
}

// owner is the owner of an organization of her own, logged in to the shared server.
func owner(t *testing.T) *person {
	t.Helper()
	p := newcomer(t, server.API)
	p.logIn("OWNER")
	return p
}

// newcomer is somebody who is not logged in.
func newcomer(t *testing.T, at string) *person {
	p := &person{t: t, home: t.TempDir(), org: harness.Org(), server: at}
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		for line := range strings.Lines(string(server.Output())) {
			if strings.Contains(line, string(p.org)) || strings.Contains(line, `"level":"ERROR"`) {
				t.Log("the server: " + line)
			}
		}
	})
	return p
}

func (p *person) logIn(role string) {
	p.t.Helper()
	if code, out, log := p.run(server.Token(p.t, p.org, role)+"\n", "login", "--token-file", "-"); code != 0 {
		p.t.Fatalf("login: %d, %s%s", code, out, log)
	}
}

func (p *person) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.Dir = p.home
	cmd.Env = append([]string{"HOME=" + p.home, "PATH=/nonexistent", "ORGKEYSCTL_SERVER=" + p.server, "ORGKEYSCTL_WAIT=0s"}, p.env...)
	return cmd
}

// run runs a command and returns its exit code and what it printed.
func (p *person) run(stdin string, args ...string) (code int, out, log string) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), 4*harness.Patience) // makes RSA keys of 3072 bits, on machines that do much else
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := p.command(ctx, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	err := cmd.Run()
	if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok || ctx.Err() != nil {
		p.t.Fatalf("orgkeysctl %q: %v, %v", args, err, ctx.Err())
	}
	return cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()
}

// does runs a command that must succeed, and returns what it printed.
func (p *person) does(args ...string) string {
	p.t.Helper()
	code, out, log := p.run("", args...)
	if code != 0 {
		p.t.Fatalf("orgkeysctl %q: %d\n%s%s", args, code, out, log)
	}
	return out
}

// fails runs a command that must end with the code, and say so; nothing is on
// standard output then.
func (p *person) fails(code int, text string, args ...string) {
	p.t.Helper()
	got, out, log := p.run("", args...)
	if got != code || !strings.Contains(log, text) || out != "" {
		p.t.Errorf("orgkeysctl %q: %d, %q, %q; want %d, %q", args, got, out, log, code, text)
	}
}

func (p *person) path(name string) string { return filepath.Join(p.home, name) }

// only fails the test unless the directory of logins and arrivals has these files,
// all of mode 0600.
func (p *person) only(patterns ...string) {
	p.t.Helper()
	entries, err := os.ReadDir(p.path(".config/orgkeysctl"))
	if err != nil {
		p.t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || info.Mode() != 0o600 {
			p.t.Errorf("%s: mode %v, %v", e.Name(), info.Mode(), err)
		}
		if !regexp.MustCompile(`^(` + strings.Join(patterns, "|") + `)-[0-9a-f]{16}\.json(\.lock)?$`).MatchString(e.Name()) {
			p.t.Errorf("%s is left", e.Name())
		}
	}
}

// varying is what differs between runs; what is put in its place has its width.
var varying = []struct {
	form *regexp.Regexp
	same string
}{
	{regexp.MustCompile(`oke1\.[0-9a-f-]{36}\.[A-Za-z0-9_-]{43}`), "oke1.ID.SECRET"},
	{regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`), "00000000-0000-4000-8000-000000000000"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ`), "2026-01-02 03:04:05Z"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)`), "2026-01-02T03:04:05Z"},
	{regexp.MustCompile(`\b[0-9a-f]{64}\b`), strings.Repeat("0", 64)},
	{regexp.MustCompile(`\b[A-Za-z0-9_-]{43}\b`), strings.Repeat("A", 43)},
	{regexp.MustCompile(`org-[0-9a-f]{12}`), "org-000000000000"},
	{regexp.MustCompile(`(?s)(-----BEGIN PUBLIC KEY-----\n).*(-----END)`), "${1}…\n$2"},
	{regexp.MustCompile(`(BEGIN PUBLIC KEY-----\\n)[^"]*`), "${1}…"},
	{regexp.MustCompile(`(https?)://127\.0\.0\.1:\d+`), "$1://127.0.0.1:3000"},
}

// looksLike compares an output with the file of that name in testdata.
func looksLike(t *testing.T, name, home, got string) {
	t.Helper()
	got = strings.ReplaceAll(got, home, "/home/ada")
	for _, v := range varying {
		got = v.form.ReplaceAllString(got, v.same)
	}
	path := filepath.Join("testdata", name+".txt")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil || string(want) != got {
		t.Errorf("%s: %v\n%s\nwant\n%s\n(go test ./cmd/orgkeysctl -update writes it)", path, err, got, want)
	}
}
