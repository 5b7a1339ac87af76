package main

import (
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"github.com/orgkeys/orgkeys/internal/version"
)

func newMan() *cobra.Command {
	return &cobra.Command{
		Use: "man DIRECTORY", Short: "Write manual pages of all commands into a directory", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return &failure{exit: exitCannotWrite, err: err}
			}
			root := cmd.Root()
			root.DisableAutoGenTag = true // pages of one version are the same on every day
			header := &doc.GenManHeader{Title: "ORGKEYSCTL", Section: "1", Source: version.Of("orgkeysctl")}
			if err := doc.GenManTree(root, header, args[0]); err != nil {
				return &failure{exit: exitCannotWrite, err: err}
			}
			return nil
		},
	}
}
