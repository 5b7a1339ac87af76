package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/internal/audit/archive"
	"github.com/orgkeys/orgkeys/internal/audit/verdict"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/server"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

func newAudit() *cobra.Command {
	cmd := &cobra.Command{Use: "audit", Short: "Read and verify the audit log"}
	cmd.AddCommand(newAuditVerify(), newVerifyExport(), newAuditList(), newAuditExport(), newAuditPublish(), newAuditArchive(), newVerifyTiles(), newAuditProve(), newVerifyProof(),
		newAuditKey(), newAuditCheckpoint(), newAuditErase(), newAcceptRollback())
	return cmd
}

func newAuditVerify() *cobra.Command {
	var g verdict.Given
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Verify the audit log in the database, offline",
		Long: `Verifies that every event matches the log's Merkle tree, that none is missing,
inserted or out of order, that keys, policies, receipts, erasures and signed
checkpoints agree with the events, and that the log extends the sink's copy. It
reads the database directly and needs neither the server nor the HSM; the server
may be running. An export is verified with "orgkeys audit verify-export".

The log alone cannot show whether it was truncated or completely rewritten by
somebody who controls the database. That takes evidence from elsewhere: the file
sink, if it is outside the data directory or given with --sink, or --checkpoint.
Events of the last minute may be missing in a copy of the sink.

` + exitCodesHelp,
		Args: cobra.MaximumNArgs(1), // an export, as in older versions
		RunE: func(cmd *cobra.Command, args []string) error {
			return judge(cmd, asJSON, func(j *verdict.Judge) error {
				switch {
				case len(args) == 1 && g.Sink != "":
					return errors.New("--sink is for the log in the database; an export is verified with --key, --checkpoint and --vault-audit")
				case len(args) == 1:
					return j.Export(cmd.Context(), args[0], g)
				case len(g.VaultFiles) > 0 || g.AsOf != "":
					return errors.New("--vault-audit is for an export: run \"orgkeys audit export FILE\", then \"orgkeys audit verify-export FILE --key … --vault-audit …\"")
				}
				return onLog(func(cmd *cobra.Command, cfg config.Config, db *sqlstore.DB, _ []string) (err error) {
					sink := verdict.Sink{File: cfg.AuditFile}
					if g.Sink == "" {
						sink.Outside, err = server.SinkOutside(cfg)
					}
					if err != nil {
						return err
					}
					return j.Log(cmd.Context(), db, sink, g)
				})(cmd, args)
			})
		},
	}
	evidenceFlags(cmd, &g, &asJSON)
	cmd.Flags().StringVar(&g.Sink, "sink", "", "a copy of the file sink, kept where the database's administrator cannot change it")
	for _, name := range []string{"vault-audit", "as-of"} {
		_ = cmd.Flags().MarkHidden(name) // there it is: no error
	}
	return cmd
}

const exitCodesHelp = `Exit code 0: verified, and truncation is excluded. 1: an error, or an event
that is known to be missing; the first such event is named. 3: verified, but
truncation is not excluded, for lack of evidence from elsewhere, or because the
database holds rows that orgkeys did not record. --json prints
the result as one JSON object, with the same exit codes; see docs/audit.md.`

// evidenceFlags are those of whoever verifies the log or an export.
func evidenceFlags(cmd *cobra.Command, g *verdict.Given, asJSON *bool) {
	keyFlag(cmd, g)
	cmd.Flags().StringArrayVar(&g.VaultFiles, "vault-audit", nil, "Vault's audit file; repeat it for rotated files, and for every node that was ever active")
	cmd.Flags().StringVar(&g.AsOf, "as-of", "", "a time such as 2026-01-31T12:00:00Z that Vault's audit files must reach")
	cmd.Flags().StringVar(&g.Checkpoint, "checkpoint", "", "a checkpoint of the log that was kept elsewhere: a file, or the text, in any form in which a sink stores it")
	jsonFlag(cmd, asJSON)
}

func keyFlag(cmd *cobra.Command, g *verdict.Given) {
	cmd.Flags().StringArrayVar(&g.Keys, "key", nil, "a verifier key, as printed by \"orgkeys audit key\", or a file of keys; may be repeated")
}

func jsonFlag(cmd *cobra.Command, asJSON *bool) {
	cmd.Flags().BoolVar(asJSON, "json", false, "print one JSON object instead of lines")
}

// judge has do verify something, and prints what it finds.
func judge(cmd *cobra.Command, asJSON bool, do func(*verdict.Judge) error) error {
	return verdict.Say(cmd.OutOrStdout(), asJSON, progress(cmd), do)
}

// progress tells standard error how far a long run is.
func progress(cmd *cobra.Command) func(doing string) verify.Progress {
	return func(doing string) verify.Progress {
		return func(done, all int64) { fmt.Fprintf(cmd.ErrOrStderr(), "%s %d of %d events\n", doing, done, all) }
	}
}

// sayLog prints up to where a copy of the log, which is at place, goes.
func sayLog(cmd *cobra.Command, place, origin string, size int64, root string) error {
	return say(cmd, "%s: log %s, %d events, root hash %s\n", place, origin, size, root)
}

func newAuditList() *cobra.Command {
	var from int64
	var of string
	cmd := &cobra.Command{
		Use:   "list",
		Short: "Print the log's events as JSON lines",
		Long: `Prints the log's events in their order, each as the verbatim leaf that the tree
commits to, with its index in front.`,
		Args: cobra.NoArgs,
		RunE: onLog(func(cmd *cobra.Command, _ config.Config, db *sqlstore.DB, _ []string) error {
			if from < 0 {
				return errors.New("--from is the index of an event: 0 or more")
			}
			return archive.List(cmd.Context(), cmd.OutOrStdout(), db, from, org.ID(of))
		}),
	}
	cmd.Flags().Int64Var(&from, "from", 0, "index of the first event")
	cmd.Flags().StringVar(&of, "org", "", "only this organization's events")
	return cmd
}
