package main

import (
	"errors"
	"strings"

	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/internal/audit/rollback"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/server"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

func newAuditCheckpoint() *cobra.Command {
	return &cobra.Command{
		Use:   "checkpoint",
		Short: "Sign a checkpoint of the log while the server is stopped",
		Long: `Signs a checkpoint if the log has grown since the last one, and prints the newest.
A running server signs by itself, every ORGKEYS_CHECKPOINT_INTERVAL and at once
on SIGUSR1. Nothing is signed if the log does not extend the sinks' copies, or
while a sink does not answer.`,
		Args: cobra.NoArgs,
		RunE: configured(func(cmd *cobra.Command, cfg config.Config, _ []string) error {
			newest, err := server.SignCheckpoint(cmd.Context(), cfg, newLogger(cfg))
			if err != nil {
				return err
			}
			return say(cmd, "%s", newest.Note)
		}),
	}
}

func newAuditErase() *cobra.Command {
	var subject, reason string
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "erase --subject ID --reason TEXT",
		Short: "Erase a person's data from the audit log",
		Long: `Deletes names, e-mail addresses and network addresses of the events whose actor is
the subject, as in the token ("sub" or ORGKEYS_CLAIM_SUBJECT) or as in the events
(person-…), and the mapping from the pseudonym to the subject. The log itself does
not change and verifies as before. For a minute a running server may still record
events under the former pseudonym: if the person was active, run the command again,
with that. Backups, and pages that the database has not overwritten
yet, still hold the data; docs/audit.md lists what remains.`,
		Args: cobra.NoArgs,
		PreRunE: func(*cobra.Command, []string) error {
			if subject == "" || strings.TrimSpace(reason) == "" {
				return errors.New("--subject and --reason are required: the person, and the reason for the auditors")
			}
			return nil
		},
		RunE: onLog(func(cmd *cobra.Command, cfg config.Config, db *sqlstore.DB, _ []string) error {
			if dryRun {
				n, err := db.Erasable(cmd.Context(), subject)
				if err != nil {
					return err
				}
				return say(cmd, "dry run, nothing is erased: %d events hold personal data of %s\n", n, subject)
			}
			n, known, err := server.ErasePerson(cmd.Context(), cfg, db, subject, reason, newLogger(cfg))
			if err != nil {
				return err
			}
			err = say(cmd, "erased the personal data of %s in %d events\n", subject, n)
			for _, id := range known {
				if err == nil && id != subject {
					err = say(cmd, "events have the person as %s; if the person was active in the last minute, wait for one, and repeat with --subject %s\n", id, id)
				}
			}
			return err
		}),
	}
	cmd.Flags().StringVar(&subject, "subject", "", "the person's ID, in tokens or in the events")
	cmd.Flags().StringVar(&reason, "reason", "", "why")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "print how much would be erased, and change nothing")
	return cmd
}

func newAcceptRollback() *cobra.Command {
	var request rollback.Request
	cmd := &cobra.Command{
		Use:   "accept-rollback --reason TEXT [--rewritten] [--lost-sink HOLDER]",
		Short: "Accept a rollback of the log, for example after restoring a backup",
		Long: `The server refuses to start if the log does not extend what a sink has
acknowledged, or its newest signed checkpoint; a running server gives no event an
index then. Events were lost: by a failover to a standby that lacked them, by a
restored backup, or by manipulation. Find out which. For a failover or a backup,
this command lists the events that the file sink holds and the database has lost,
records the reason in the log and in the sinks, and lets the server continue. The
sinks keep the lost events.

After a failover or a restored backup the log is a prefix of the lost one. If an
event in it differs from the sinks' copies, the log was rewritten, unless that
event is log.database_changed: then the replica with this sink was unreachable
during a failover, and the others continued without it. The command names the
first event that differs and refuses, unless --rewritten accepts that too; the
log and the sinks then record which event. Vault's sink holds only a checkpoint,
so events cannot be compared with it here: afterwards verify an export with
--vault-audit.

Use it also after the checkpoint in Vault was deleted or overwritten.

It asks every sink in ORGKEYS_AUDIT_SINKS. With replicas, stop all of them first,
and run it with the data directory of each that has a file sink, with the same
--reason. After an interruption, run it again, with the same --reason too. While
the sink of another replica holds the log back, the command names that replica and
ends with exit code 1: run it there. If that replica's data directory is gone for
good, --lost-sink with the name that the command printed gives its sink up. An event
records that; what only that sink held is lost, and nothing names it. If the sink
turns up again, its replica is refused as before.`,
		Args: cobra.NoArgs,
		PreRunE: func(*cobra.Command, []string) error {
			if strings.TrimSpace(request.Reason) == "" {
				return errors.New("--reason is required: it is recorded for the auditors")
			}
			return nil
		},
		RunE: configured(func(cmd *cobra.Command, cfg config.Config, _ []string) error {
			return server.AcceptRollback(cmd.Context(), cfg, request, cmd.OutOrStdout(), newLogger(cfg))
		}),
	}
	cmd.Flags().StringVar(&request.Reason, "reason", "", "the reason for the rollback")
	cmd.Flags().BoolVar(&request.Rewritten, "rewritten", false, "accept a log that differs from the lost one")
	cmd.Flags().StringArrayVar(&request.LostSinks, "lost-sink", nil, "give up the sinks of this replica, whose data directory is gone for good; as printed by this command and by doctor (repeatable)")
	cmd.Flags().BoolVar(&request.DryRun, "dry-run", false, "print what would be accepted, and change nothing")
	return cmd
}
