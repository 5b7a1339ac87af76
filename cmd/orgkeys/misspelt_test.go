package main

import (
	"slices"
	"testing"

	"github.com/spf13/cobra"
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
