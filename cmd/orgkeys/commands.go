package main

import (
	"errors"
	"slices"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/doctor"
	"github.com/orgkeys/orgkeys/internal/server"
	"github.com/orgkeys/orgkeys/internal/version"
)

func newServe() *cobra.Command {
	return &cobra.Command{
		Use:   "serve",
		Short: "Serve the API",
		Long: `Serves the API until interrupted. Without settings it uses SoftHSM, SQLite and a
development issuer, all in the data directory, and listens on loopback.

It exits with 77 if an operator must correct the HSM's PIN: the token refused it,
is locked, or would be locked by one more wrong PIN. A restart does not help,
because a refused PIN is not used again until its file changes.

Settings, as environment variables or as lines of the --config file:

` + settingsHelp(),
		Args: cobra.NoArgs,
		RunE: configured(func(cmd *cobra.Command, cfg config.Config, _ []string) error {
			return server.Serve(cmd.Context(), cfg, version.Of("orgkeys"), newLogger(cfg))
		}),
	}
}

func newMigrate() *cobra.Command {
	return &cobra.Command{
		Use:   "migrate",
		Short: "Bring the database's schema up to date",
		Long: `Brings the database's schema up to date and ends. "orgkeys serve" does the same
at its start; use this command if the server's database role may not change the
schema. Migrations go forward only, may be started by several
replicas at once, and keep the previous version of orgkeys working.`,
		Args: cobra.NoArgs,
		RunE: configured(func(cmd *cobra.Command, cfg config.Config, _ []string) error {
			if cfg.DatabaseURL == "" {
				dir, err := server.OpenDataDir(cfg.DataDir)
				if err != nil {
					return err
				}
				defer dir.Close()
			}
			db, err := server.OpenDatabase(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			if err := db.Close(); err != nil {
				return err
			}
			return say(cmd, "the schema is up to date\n")
		}),
	}
}

var errUnwell = errors.New("at least one check failed: see the lines that say fail")

func newDoctor() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check everything that the server needs, and print what to do",
		Long: `Checks the configuration, the database, Redis, Vault or the HSM, the policy, the
token keys, the audit sinks, the clocks, and whether the replicas that run agree
with each other and with this configuration. It changes nothing, with one
exception: it records a PIN that the HSM refuses in the data directory, as the
server does, so that it is not used again. It may run beside a server, with the
server's settings.

Each line says ok, warn or fail, what was found, and what to do. The exit code
is 1 if any line says fail.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			found := examine(cmd)
			if asJSON {
				if err := json.MarshalWrite(cmd.OutOrStdout(), found, jsontext.WithIndent("  ")); err != nil {
					return err
				}
			} else {
				for _, d := range found {
					if err := sayCheck(cmd, 14, d.State, d.What, d.Found, d.Remedy); err != nil {
						return err
					}
				}
			}
			if slices.ContainsFunc(found, func(d doctor.Diagnosis) bool { return d.State == doctor.Fail }) {
				return errUnwell
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON array instead of lines")
	return cmd
}

func examine(cmd *cobra.Command) []doctor.Diagnosis {
	cfg, err := load(cmd)
	if err != nil {
		return doctor.Misconfigured(err)
	}
	return doctor.Examine(cmd.Context(), cfg, version.Of("orgkeys"))
}

func newRewrap() *cobra.Command {
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "rewrap",
		Short: "Seal every stored record again under the newest version of Vault's key",
		Long: `Seals every stored public key and boot secret, and the key that authenticates
events, again under the newest version of the sealing key in Vault, inside Vault.
Run it after "vault write -f orgkeys-seal/keys/seal/rotate".

The server may be running. An interrupted run can be completed by another:
records of the newest version are skipped, and so are records that change during
the run. A record that does not decrypt is named and does not stop the run.
Progress goes to standard error.

Sealing operations in progress at the moment of the rotation may be stored under
the old version a little later. So a run soon after a rotation checks all records
again when the version is old enough: after ORGKEYS_RESERVATION_TTL. When a run
has ended without an error, only backups of the database need the older versions,
and min_decryption_version may be raised as far as your backups allow. If it was
raised too early, lower it and run this again: nothing is lost.`,
		Args: cobra.NoArgs,
		RunE: configured(func(cmd *cobra.Command, cfg config.Config, _ []string) error {
			if cfg.Keystore != config.KeystoreVault {
				return errors.New("records are sealed by the HSM, whose key has no versions: rewrap is for ORGKEYS_KEYSTORE=vault")
			}
			return server.Rewrap(cmd.Context(), cfg, dryRun, cmd.ErrOrStderr(), newLogger(cfg))
		}),
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "print how many records would be sealed again and which do not decrypt; store nothing")
	return cmd
}
