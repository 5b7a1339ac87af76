package packaging

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/snippet"
)

// Whoever pastes a snippet sits before a shell of the node, in one of their own
// machine. Whatever goes wrong ends neither: what is left of the text would be
// the other shell's to run.
func TestAPastedSnippetIsRunByOneShell(t *testing.T) {
	for _, kind := range []string{"shell", "systemd"} {
		// zsh, too, runs no command of which a word that is a pattern matches no file.
		for _, inner := range []string{"sh -i", "bash --norc -i", "bash --norc -O failglob -i"} {
			t.Run(kind+" in "+inner, func(t *testing.T) { pasteSnippet(t, kind, inner) })
		}
	}
}

func pasteSnippet(t *testing.T, kind, inner string) {
	home := t.TempDir()
	in := func(name string) string { return filepath.Join(home, name) }
	for _, program := range []string{"orgkeys-node", "systemctl"} {
		script := "#!/bin/sh\necho \"$*\" >>" + in("ran") + "\nexit 75\n"
		if err := os.WriteFile(in(program), []byte(script), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	var text strings.Builder
	if err := snippet.Write(&text, kind, snippet.Enrollment{Server: "http://[::1]:1", ID: "ID", Token: "oke1.ID.SECRET", OwnKey: true, TPM: true}); err != nil {
		t.Fatal(err)
	}
	pasted := strings.ReplaceAll(text.String(), "/etc/", in("etc")+"/")
	token := map[string]string{"shell": in("node/enroll.token"), "systemd": in("etc/credstore/orgkeys-node.token")}[kind]

	s := openSession(t, "PATH="+home+":"+os.Getenv("PATH"), "HOME="+home, "HISTFILE=/dev/null", "DIR="+in("node"), "WHERE=own", "PS1=> ")
	if where, options := s.shell(); where != "own" {
		t.Fatalf("the first shell says %q, with options %q", where, options)
	}
	s.types("WHERE=node " + inner)
	_, before := s.shell()

	s.types(pasted) // with neither IP nor REGION
	if where, options := s.shell(); where != "node" || options != before {
		t.Errorf("without an address: now in the shell of %q with options %q, before in node's with %q", where, options, before)
	}
	for _, path := range []string{token, in("ran")} {
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("without an address: %s, %v", path, err)
		}
	}

	s.types("IP=192.0.2.7 REGION=eu")
	s.types(pasted) // and a program that fails
	if where, options := s.shell(); where != "node" || options != before {
		t.Errorf("after a failure: now in the shell of %q with options %q, before in node's with %q", where, options, before)
	}
	want := map[string]string{
		"shell":   "boot --server http://[::1]:1 --ip 192.0.2.7 --region eu --dir " + in("node") + " --token-file " + token + " --origin node --tpm /dev/tpmrm0\n",
		"systemd": "enable orgkeys-node.service\n",
	}[kind]
	if ran, err := os.ReadFile(in("ran")); string(ran) != want {
		t.Errorf("the program that fails ran with %q, %v; want %q", ran, err, want)
	}
	if kind == "systemd" {
		if env, err := os.ReadFile(in("etc/orgkeys-node/env")); err != nil || !strings.HasPrefix(string(env), "ORGKEYS_NODE_SERVER=http://[::1]:1\n") {
			t.Errorf("the unit's settings are %q, %v", env, err)
		}
	}
	held, err := os.ReadFile(token)
	if err != nil || string(held) != "oke1.ID.SECRET\n" {
		t.Errorf("the token's file: %q, %v", held, err)
	}
	if info, err := os.Stat(token); err == nil && info.Mode() != 0o600 {
		t.Errorf("the token's file: %v", info.Mode())
	}
}

// The example of user data and the snippet are one text, but for the comments.
func TestTheCloudInitSnippetIsTheExample(t *testing.T) {
	example, err := os.ReadFile("../../examples/cloud-init.yaml")
	if err != nil {
		t.Fatal(err)
	}
	const server, token = "https://orgkeys.example", "oke1.00000000-0000-4000-8000-000000000000.AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
	var text strings.Builder
	if err := snippet.Write(&text, "cloud-init", snippet.Enrollment{Server: server, ID: "ID", Token: token}); err != nil {
		t.Fatal(err)
	}
	bare := func(text string) string { return regexp.MustCompile(`(?m)^(#.*)?\n`).ReplaceAllString(text, "") }
	got := bare(strings.NewReplacer("=ADDRESS", "=192.0.2.7", "=REGION", "=eu-west-1").Replace(text.String()))
	if want := bare(string(example)); got != want {
		t.Errorf("the snippet is\n%s\nand the example\n%s", got, want)
	}
}

// session is a terminal with a shell in it.
type session struct {
	t        *testing.T
	terminal io.Writer
	shown    lockedBuffer
	ended    chan struct{} // no shell is left
	asked    int
}

func openSession(t *testing.T, env ...string) *session {
	t.Helper()
	terminal, beside := openTerminal(t)
	s := &session{t: t, terminal: terminal, ended: make(chan struct{})}
	cmd := exec.Command("bash", "--norc", "-i")
	cmd.Env = env
	cmd.Stdin, cmd.Stdout, cmd.Stderr = beside, beside, beside
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	beside.Close()
	go func() {
		io.Copy(&s.shown, terminal)
		close(s.ended)
	}()
	t.Cleanup(func() {
		terminal.Close() // hangs up
		cmd.Process.Kill()
		cmd.Wait()
	})
	return s
}

func (s *session) types(text string) {
	s.t.Helper()
	if _, err := io.WriteString(s.terminal, strings.TrimSuffix(text, "\n")+"\n"); err != nil {
		s.t.Fatal(err)
	}
}

// shell waits until everything that was typed is done, and says whose shell it
// was that did the last of it, and with which options.
func (s *session) shell() (where, options string) {
	s.t.Helper()
	s.asked++
	s.types(fmt.Sprintf(`echo "an""swer %d: $WHERE $-."`, s.asked)) // what is typed is shown, too
	answer := regexp.MustCompile(fmt.Sprintf(`answer %d: (\S*) (\S*)\.`, s.asked))
	waiting, deadline := true, time.After(patience)
	for waiting {
		select {
		case <-s.ended:
			waiting = false
		case <-deadline:
			waiting = false
		case <-time.After(10 * time.Millisecond):
		}
		if m := answer.FindStringSubmatch(s.shown.String()); m != nil {
			return m[1], m[2]
		}
	}
	s.t.Fatalf("no shell answers:\n%s", s.shown.String())
	return "", ""
}
