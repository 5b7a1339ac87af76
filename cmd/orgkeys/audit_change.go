package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/rollback"
	"github.com/orgkeys/orgkeys/internal/authn"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/server"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/spf13/cobra"
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
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := load(cmd)
			if err != nil {
				return err
			}
			newest, err := server.SignCheckpoint(cmd.Context(), cfg, newLogger(cfg))
			if err != nil {
				return err
			}
			_, err = fmt.Fprint(cmd.OutOrStdout(), newest.Note)
			return err
		},
	}
}

func newAuditErase() *cobra.Command {
	var subject, reason string
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "erase --subject ID --reason TEXT",
		Short: "Erase a person's data from the audit log",
		Long: `Deletes names, e-mail addresses and network addresses of the events whose actor is
the subject, as in the token ("sub" or ORGKEYS_CLAIM_SUBJECT), and the mapping from
the pseudonym to a subject that is an address. The log itself does not change and
verifies as before. Backups, and pages that the database has not overwritten
yet, still hold the data; docs/audit.md lists what remains.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if subject == "" || strings.TrimSpace(reason) == "" {
				return errors.New("--subject and --reason are required: the person, and the reason for the auditors")
			}
			cfg, err := load(cmd)
			if err != nil {
				return err
			}
			return withLog(cmd, func(ctx context.Context, db *sqlstore.DB) error {
				if dryRun {
					n, err := db.Erasable(ctx, subject)
					if err != nil {
						return err
					}
					_, err = fmt.Fprintf(cmd.OutOrStdout(), "dry run, nothing is erased: %d events hold personal data of %s\n", n, subject)
					return err
				}
				// Not locked: the server may run.
				if err := server.OpenToRecord(ctx, cfg, db, newLogger(cfg)); err != nil {
					return err
				}
				n, err := db.Erase(ctx, subject, func(id string, n int64) audit.Event {
					e := audit.New(audit.PersonErased, "")
					e.Actor = audit.Actor{Kind: audit.System, ID: "operator"}
					if n > 0 || !authn.IsPersonal(config.PseudonymAddresses, id) {
						e.Object = id // an address that the log does not have yet must not come into it
					}
					e.Detail = map[string]string{"events": fmt.Sprint(n), "reason": reason}
					return e
				})
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "erased the personal data of %s in %d events\n", subject, n)
				return err
			})
		},
	}
	cmd.Flags().StringVar(&subject, "subject", "", "the person's ID in the events")
	cmd.Flags().StringVar(&reason, "reason", "", "why")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "print how much would be erased, and change nothing")
	return cmd
}

func newAcceptRollback() *cobra.Command {
	var request rollback.Request
	cmd := &cobra.Command{
		Use:   "accept-rollback --reason TEXT [--rewritten]",
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
--reason. After an interruption, run it again, with the same --reason too.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if strings.TrimSpace(request.Reason) == "" {
				return errors.New("--reason is required: it is recorded for the auditors")
			}
			cfg, err := load(cmd)
			if err != nil {
				return err
			}
			return server.AcceptRollback(cmd.Context(), cfg, request, cmd.OutOrStdout(), newLogger(cfg))
		},
	}
	cmd.Flags().StringVar(&request.Reason, "reason", "", "the reason for the rollback")
	cmd.Flags().BoolVar(&request.Rewritten, "rewritten", false, "accept a log that differs from the lost one")
	cmd.Flags().BoolVar(&request.DryRun, "dry-run", false, "print what would be accepted, and change nothing")
	return cmd
}
