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
when it gets SIGUSR1. It signs nothing that does not extend what the sinks hold,
or while one of them cannot be asked.`,
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
		Short: "Erase what the audit trail knows of a person",
		Long: `Deletes names, e-mail addresses and network addresses of the events whose actor is
the subject, as the token has it ("sub" or ORGKEYS_CLAIM_SUBJECT), and the pseudonym
under which events know a subject that is an address. The log itself stays as it is,
and verifies as before. Backups, and files that the database has not
overwritten yet, are yours to see to; docs/audit.md says what remains.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if subject == "" || strings.TrimSpace(reason) == "" {
				return errors.New("--subject and --reason: say whom, and why, for the auditors")
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
					_, err = fmt.Fprintf(cmd.OutOrStdout(), "dry run, nothing is erased: %d events know something of %s\n", n, subject)
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
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "erased what %d events knew of %s\n", n, subject)
				return err
			})
		},
	}
	cmd.Flags().StringVar(&subject, "subject", "", "the person's ID in the events")
	cmd.Flags().StringVar(&reason, "reason", "", "why")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "say how much would be erased, and change nothing")
	return cmd
}

func newAcceptRollback() *cobra.Command {
	var request rollback.Request
	cmd := &cobra.Command{
		Use:   "accept-rollback --reason TEXT [--rewritten]",
		Short: "Go on with a log that was set back, as after restoring a backup",
		Long: `The server refuses to start when the log does not extend what a sink has
acknowledged, or its newest signed checkpoint; one that runs gives no event its
place in the log. Events were lost: by a failover to a standby that lacked them,
by a restored backup, or by somebody's hand. Find out which. If it was one of the
first two, this names what the file sink holds and the database has lost, records
why in the log and in the sinks, and the server goes on from here. The sinks keep
the events that the log has lost.

What a failover or a restored backup leaves is the beginning of the log that was
lost. If it is not, that is: if an event in it is another one than the sinks
hold, somebody rewrote the log, unless that event is log.database_changed: then
the replica with this sink was away during a failover, and the others went on
without it. The command names the first other event and refuses, unless --rewritten says that this, too, is to be accepted; the log and
the sinks then keep which event.
Of Vault only the checkpoint can be compared here, not the events: afterwards
verify an export with --vault-audit.

It is also the way on when somebody deleted the checkpoint in Vault or wrote
something else in its place.

It asks every sink in ORGKEYS_AUDIT_SINKS. With replicas, stop all of them first,
and run it with the data directory of each that has a file sink, with the same
--reason. After an interruption, run it again, with the same --reason too.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if strings.TrimSpace(request.Reason) == "" {
				return errors.New("--reason: say why, for the auditors")
			}
			cfg, err := load(cmd)
			if err != nil {
				return err
			}
			return server.AcceptRollback(cmd.Context(), cfg, request, cmd.OutOrStdout(), newLogger(cfg))
		},
	}
	cmd.Flags().StringVar(&request.Reason, "reason", "", "why the log was set back")
	cmd.Flags().BoolVar(&request.Rewritten, "rewritten", false, "accept a log that is not the beginning of the one that was lost")
	cmd.Flags().BoolVar(&request.DryRun, "dry-run", false, "say what would be accepted, and change nothing")
	return cmd
}
