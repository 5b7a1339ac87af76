package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// migrateTimeout is for a migration that has to go through millions of rows, or
// wait for the replica that does.
const migrateTimeout = 10 * time.Minute

// openDatabase opens the database and brings its schema up to date.
func openDatabase(ctx context.Context, cfg config.Config) (*sqlstore.DB, error) {
	opening, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	db, err := sqlstore.Open(opening, databaseLocation(cfg))
	if err != nil {
		return nil, err
	}
	migrating, cancel := context.WithTimeout(ctx, migrateTimeout)
	defer cancel()
	if err := db.Migrate(migrating); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return db, nil
}

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
			db, err := openDatabase(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			if err := db.Close(); err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), "the schema is up to date")
			return err
		},
	}
}
