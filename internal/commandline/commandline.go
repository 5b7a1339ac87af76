// Package commandline runs trees of cobra commands that fail on a word that is
// no command. Cobra itself answers "audit verfy" and "help nonsense" with a help
// text and success, which scripts take for the command's own.
package commandline

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Execute runs the command that args name below root.
func Execute(ctx context.Context, root *cobra.Command, args []string) error {
	root.SetHelpCommand(newHelp(root))
	root.SetVersionTemplate("{{.Version}}\n")
	root.InitDefaultCompletionCmd(args...) // before group, so that its words are known too
	group(root)
	if err := check(root, args); err != nil {
		return err
	}
	root.SetArgs(args)
	return root.ExecuteContext(ctx)
}

// group gives commands that only hold others an answer of their own: by
// themselves they do nothing.
func group(cmd *cobra.Command) {
	for _, below := range cmd.Commands() {
		group(below)
	}
	if cmd.HasSubCommands() && !cmd.Runnable() {
		cmd.Args = cobra.ArbitraryArgs
		cmd.RunE = func(cmd *cobra.Command, _ []string) error {
			return fmt.Errorf("%s needs a command: %s", cmd.CommandPath(), seeHelp(cmd))
		}
	}
}

// check reports a word in the place of a command that is none. It comes before
// cobra, which looks at --help first.
func check(cmd *cobra.Command, args []string) error {
	for len(args) > 0 && cmd.HasSubCommands() {
		word := args[0]
		args = args[1:]
		switch {
		case word == "--":
			return nil
		case strings.HasPrefix(word, "-"):
			if takesValue(cmd, word) && len(args) > 0 {
				args = args[1:]
			}
		case word == cobra.ShellCompRequestCmd || word == cobra.ShellCompNoDescRequestCmd:
			return nil
		case find(cmd, word) == nil:
			return unknown(cmd, word)
		default:
			cmd = find(cmd, word)
		}
	}
	return nil
}

func find(cmd *cobra.Command, word string) *cobra.Command {
	for _, below := range cmd.Commands() {
		if below.Name() == word || below.HasAlias(word) {
			return below
		}
	}
	if cmd == cmd.Root() && word == "help" {
		return newHelp(cmd)
	}
	return nil
}

// takesValue reports whether a flag's value is the word behind it.
func takesValue(cmd *cobra.Command, word string) bool {
	name := strings.TrimLeft(word, "-")
	if strings.Contains(name, "=") {
		return false
	}
	var flag *pflag.Flag
	if strings.HasPrefix(word, "--") {
		flag = cmd.Flag(name)
	} else if len(name) == 1 {
		flag = cmd.Flags().ShorthandLookup(name)
	}
	return flag != nil && flag.NoOptDefVal == ""
}

func unknown(cmd *cobra.Command, word string) error {
	cmd.SuggestionsMinimumDistance = max(cmd.SuggestionsMinimumDistance, 2)
	meant := ""
	if near := cmd.SuggestionsFor(word); len(near) > 0 {
		meant = fmt.Sprintf("; did you mean %s?", strings.Join(near, " or "))
	}
	return fmt.Errorf("%s has no command %q%s %s", cmd.CommandPath(), word, meant, seeHelp(cmd))
}

func seeHelp(cmd *cobra.Command) string {
	return fmt.Sprintf("(%q lists them)", cmd.CommandPath()+" --help")
}

// NewVersion is a command that prints the root's version, as --version does.
func NewVersion() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version and how the program was built",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), cmd.Root().Version)
			return err
		},
	}
}

func newHelp(root *cobra.Command) *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND]",
		Short: "Help about a command",
		RunE: func(_ *cobra.Command, args []string) error {
			cmd := root
			for _, word := range args {
				below := find(cmd, word)
				if below == nil {
					return unknown(cmd, word)
				}
				cmd = below
			}
			return cmd.Help()
		},
	}
}
