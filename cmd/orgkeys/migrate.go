package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

func newMigrate() *cobra.Command {
	return &cobra.Command{
		Use:   "migrate",
		Short: "Bring the database's schema up to date",
		Long: `Brings the database's schema up to date and ends. "orgkeys serve" does the same
at its start; this is for those who give the server a database role that may not
change the schema. Migrations go forward only, may be started by several
replicas at once, and keep the previous version of orgkeys working.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := load(cmd)
			if err != nil {
				return err
			}
			if cfg.DatabaseURL == "" {
				dir, err := openDataDir(cfg.DataDir)
				if err != nil {
					return err
				}
				defer dir.close()
			}
			db, err := sqlstore.Open(cmd.Context(), databaseLocation(cfg))
			if err != nil {
				return err
			}
			if err := errors.Join(db.Migrate(cmd.Context()), db.Close()); err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), "the schema is up to date")
			return err
		},
	}
}
