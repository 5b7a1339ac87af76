package main

import (
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// misspelt are words that somebody may type in place of a name.
func misspelt(name string) []string {
	return []string{name[:len(name)-1], name + name[len(name)-1:], name[1:2] + name[:1] + name[2:], "x" + name, name + "-", "nonsense"}
}

// Exit code 0 is what "audit verify" says of a sound log. No word that is no
// command, wherever it stands, may say so too.
func TestNoMisspeltCommandSucceeds(t *testing.T) {
	t.Setenv("ORGKEYS_DATA_DIR", t.TempDir())
	root := newCommand()
	fails := func(args ...string) {
		t.Helper()
		if code := run(args); code == 0 {
			t.Errorf("orgkeys %q succeeds", args)
		}
	}
	commands := 0
	var walk func(cmd *cobra.Command, path []string)
	walk = func(cmd *cobra.Command, path []string) {
		commands++
		at := func(more ...string) []string { return append(slices.Clone(path), more...) }
		if !cmd.HasSubCommands() {
			if cmd.ValidateArgs([]string{"a", "b", "c", "d", "e"}) == nil {
				t.Errorf("orgkeys %q takes any arguments", path)
				return
			}
			fails(at("a", "b", "c", "d", "e")...)
			return
		}
		fails(path...) // by itself it does nothing
		var names []string
		for _, below := range cmd.Commands() {
			names = append(names, below.Name())
			walk(below, at(below.Name()))
		}
		for _, name := range names {
			for _, word := range misspelt(name) {
				if slices.Contains(names, word) {
					continue
				}
				fails(at(word)...)
				fails(at(word, "--help")...)
				fails(at("--help", word)...)
				fails(at("--config", "x", word)...)
				fails(at("--config=x", word, "-h")...)
				fails(at(word, name)...)
				fails(append([]string{"help"}, at(word)...)...)
			}
		}
	}
	walk(root, nil)
	if commands < 15 {
		t.Errorf("only %d commands were found", commands)
	}
	fails("help", "help", "nonsense")
	fails("audit", "help")
	fails("version", "nonsense")
	fails("--nonsense")
	fails("audit", "verify", "--nonsense")
}

func TestRightlySpeltCommandsSucceed(t *testing.T) {
	t.Setenv("ORGKEYS_DATA_DIR", t.TempDir())
	for _, args := range [][]string{
		{"--help"}, {"-h"}, {"help"}, {"help", "audit"}, {"help", "audit", "verify"}, {"help", "help"}, {"audit", "--help"}, {"audit", "-h"},
		{"audit", "verify", "--help"}, {"--config", "x", "audit", "verify", "--help"}, {"version"}, {"--version"}, {"help", "version"},
	} {
		if code := run(args); code != 0 {
			t.Errorf("orgkeys %q ends with %d", args, code)
		}
	}
}

// Every shell gets a script that the shell itself accepts, and bash completes by it.
func TestCompletion(t *testing.T) {
	orgkeys := harness.Binary(t)
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		out, err := exec.Command(orgkeys, "completion", shell).Output()
		if err != nil || !strings.Contains(string(out), "orgkeys") {
			t.Errorf("%s: %v, %d bytes", shell, err, len(out))
		}
	}
	script := `set -euo pipefail
		source <("$1" completion bash)
		"$1" __complete audit ver`
	out, err := exec.Command("bash", "-c", script, "bash", orgkeys).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "verify-export") {
		t.Errorf("audit ver<TAB>: %v\n%s", err, out)
	}
	if err := exec.Command(orgkeys, "completion", "bsh").Run(); err == nil {
		t.Error("completion for a shell that is none succeeds")
	}
}
