package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/server"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

func newAudit() *cobra.Command {
	cmd := &cobra.Command{Use: "audit", Short: "Read and verify the audit log"}
	cmd.AddCommand(newAuditVerify(), newVerifyExport(), newAuditList(), newAuditExport(), newAuditPublish(), newAuditArchive(), newVerifyTiles(), newAuditProve(), newVerifyProof(),
		newAuditKey(), newAuditCheckpoint(), newAuditErase(), newAcceptRollback())
	return cmd
}

// codeNotExcluded is the exit code of what is consistent, and may lack its end.
const codeNotExcluded = 3

// inFlight is how long an event may be on its way to the sinks before it
// counts as one that they do not have.
const inFlight = time.Minute

const notExcludedPrefix = "truncation not excluded: "

// notExcluded is the error when no evidence from outside excludes truncation.
func notExcluded(format string, args ...any) error {
	return &exitError{codeNotExcluded, fmt.Errorf(notExcludedPrefix+format, args...)}
}

var errNoCopy = notExcluded("no copy of the log from outside the data directory was compared; keep the file sink elsewhere (ORGKEYS_AUDIT_FILE), or give a copy with --sink or a checkpoint that was kept elsewhere with --checkpoint")

func newAuditVerify() *cobra.Command {
	var g given
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
			return judged(cmd, g.asJSON, func(out io.Writer, v *verdict) error {
				switch {
				case len(args) == 1 && g.sink != "":
					return errors.New("--sink is for the log in the database; an export is verified with --key, --checkpoint and --vault-audit")
				case len(args) == 1:
					return verifyExport(cmd, args[0], g, out, v)
				case len(g.vaultFiles) > 0 || g.asOf != "":
					return errors.New("--vault-audit is for an export: run \"orgkeys audit export FILE\", then \"orgkeys audit verify-export FILE --key … --vault-audit …\"")
				}
				cfg, err := load(cmd)
				if err != nil {
					return err
				}
				return withLog(cmd, func(_ context.Context, db *sqlstore.DB) error { return verifyLog(cmd, cfg, db, g, out, v) })
			})
		},
	}
	g.flags(cmd)
	cmd.Flags().StringVar(&g.sink, "sink", "", "a copy of the file sink, kept where the database's administrator cannot change it")
	for _, name := range []string{"vault-audit", "as-of"} {
		_ = cmd.Flags().MarkHidden(name) // there it is: no error
	}
	return cmd
}

const exitCodesHelp = `Exit code 0: verified, and truncation is excluded. 1: an error, or an event
that is known to be missing; the first such event is named. 3: verified, but
truncation is not excluded, for lack of evidence from elsewhere. --json prints
the result as one JSON object, with the same exit codes; see docs/audit.md.`

// given is what the caller of verify gave to compare the log with.
type given struct {
	sink, checkpoint, asOf string
	keys, vaultFiles       []string
	asJSON                 bool
}

func (g *given) flags(cmd *cobra.Command) {
	cmd.Flags().StringArrayVar(&g.keys, "key", nil, "a verifier key, as printed by \"orgkeys audit key\", or a file of keys; may be repeated")
	cmd.Flags().StringArrayVar(&g.vaultFiles, "vault-audit", nil, "Vault's audit file; repeat it for rotated files, and for every node that was ever active")
	cmd.Flags().StringVar(&g.asOf, "as-of", "", "a time such as 2026-01-31T12:00:00Z that Vault's audit files must reach")
	cmd.Flags().StringVar(&g.checkpoint, "checkpoint", "", "a checkpoint of the log that was kept elsewhere: a file, or the text, in any form in which a sink stores it")
	cmd.Flags().BoolVar(&g.asJSON, "json", false, "print one JSON object instead of lines")
}

func verifyLog(cmd *cobra.Command, cfg config.Config, db *sqlstore.DB, g given, out io.Writer, v *verdict) error {
	keys, err := keysGiven(g.keys)
	if err != nil {
		return err
	}
	g.keys = keys
	evidence, independent, err := gatherEvidence(cfg, g)
	if err != nil {
		return err
	}
	if err := evidence.AddKept(cmd.Context(), db, g.keys); err != nil {
		return err
	}
	var report verify.Report
	err = db.Snapshot(cmd.Context(), func(s verify.Snapshot) (err error) {
		report, err = verify.Verify(cmd.Context(), s, evidence, progressTo(cmd.ErrOrStderr(), "verified"))
		return err
	})
	if err != nil {
		return err
	}
	v.ofLog(report)
	fmt.Fprintf(out, "log %s: %d events, all match the tree\n", report.Log.Origin, report.Log.Size)
	fmt.Fprintf(out, "root hash %s\n", report.Log.Root)
	if report.Archived > 0 {
		fmt.Fprintln(out, archived(report))
	}
	if report.Signed > 0 {
		fmt.Fprintf(out, "the newest signed checkpoint covers %d of them%s\n", report.Signed, unlessGiven(g.keys))
	}
	if report.Receipts > 0 {
		fmt.Fprintf(out, "%d of them have a valid receipt\n", report.Receipts)
	}
	if report.Erased > 0 {
		fmt.Fprintf(out, "%d events had their personal part erased\n", report.Erased)
	}
	if report.Unsequenced > 0 {
		fmt.Fprintf(out, "%d recorded events have no index in the log yet: nothing protects them until the server runs\n", report.Unsequenced)
	}
	if report.Unauthenticated > 0 {
		fmt.Fprintf(out, "%d rows of the table events are not authentic: orgkeys did not record them, and they get no index in the log\n", report.Unauthenticated)
	}
	for _, r := range report.Rollbacks {
		fmt.Fprintln(out, accepted(r))
	}
	if report.Unexplained > 0 {
		fmt.Fprintf(out, "%d of these rollbacks are known from the copy alone: their events are in the part of the log that was not read\n", report.Unexplained)
	}
	switch {
	case report.Unread != nil:
		return &exitError{codeNotExcluded, fmt.Errorf("the first %d events are in an archive that was not read: their content, and keys that are older than the rest, were not verified: %w", report.Archived, report.Unread)}
	case !independent:
		return errNoCopy
	}
	return vouched(out, report)
}

// archived says what of the log is not in the database.
func archived(r verify.Report) string {
	said := fmt.Sprintf("the first %d of them are in the archive", r.Archived)
	if r.Removed > 0 {
		said += fmt.Sprintf("; entries below %d were removed by the policy of retention: their hashes are verified", r.Removed)
	}
	return said + "; the log says so itself"
}

// accepted says what was accepted.
func accepted(r audit.Rollback) string {
	said := fmt.Sprintf("a rollback was accepted: %q", r.Reason)
	if to, err := audit.ParseCheckpoint(r.To); err == nil && r.Kept < to.Size {
		said += fmt.Sprintf("; it kept the first %d of %d events, and the log was rewritten from event %d on", r.Kept, to.Size, r.Kept)
	}
	return said
}

// vouched prints how many events of the log a copy from outside covers. Events that are
// newer than the copy are usual while the server runs; those that nobody has
// taken for longer are as good as unprotected.
func vouched(out io.Writer, r verify.Report) error {
	newer := r.Log.Size - r.Covered
	switch {
	case r.Covered == 0:
		return notExcluded("the given copy or checkpoint holds no event of this log")
	case r.Before:
		return notExcluded("the copy is older than the last accepted rollback and covers %d of %d events; use a copy from after it", r.Covered, r.Log.Size)
	case newer == 0:
		_, err := fmt.Fprintf(out, "truncation excluded: the copy covers %d of %d events\n", r.Covered, r.Log.Size)
		return err
	case time.Since(r.Uncovered) > inFlight:
		return notExcluded("the copy covers %d of %d events; the %d newer events are not in it, and the oldest of these is of %s", r.Covered, r.Log.Size, newer, r.Uncovered.Format(time.RFC3339))
	}
	_, err := fmt.Fprintf(out, "truncation excluded: the copy covers %d of %d events; the %d newest, less than a minute old, are not in it yet\n", r.Covered, r.Log.Size, newer)
	return err
}

// gatherEvidence reads what to compare the log with, and says whether it comes
// from outside the data directory.
func gatherEvidence(cfg config.Config, g given) (*verify.Copy, bool, error) {
	sink := g.sink
	checkpoint, err := checkpointGiven(g.checkpoint, len(g.keys) > 0)
	if err != nil {
		return nil, false, err
	}
	independent := sink != "" || checkpoint != ""
	if sink == "" {
		sink = cfg.AuditFile
		outside, err := server.SinkOutside(cfg)
		if err != nil {
			return nil, false, err
		}
		independent = independent || outside
		if _, err := os.Stat(sink); errors.Is(err, os.ErrNotExist) {
			if outside {
				return nil, false, fmt.Errorf("the file sink is gone: %w", err)
			}
			sink = ""
		}
	}
	evidence := &verify.Copy{}
	if sink != "" {
		var err error
		if evidence, err = verify.ReadCopyFile(sink); err != nil {
			return nil, false, err
		}
	}
	if checkpoint != "" {
		c, err := readCheckpoint(checkpoint, g.keys)
		if err != nil {
			return nil, false, fmt.Errorf("--checkpoint: %w", err)
		}
		evidence.AddCheckpoint(c)
	}
	return evidence, independent, nil
}

func readCheckpoint(text string, vkeys []string) (audit.Checkpoint, error) {
	if len(vkeys) == 0 {
		return audit.ParseCheckpoint(text)
	}
	keys, err := audit.ParseKeys(vkeys...)
	if err != nil {
		return audit.Checkpoint{}, err
	}
	s, err := keys.Open(text)
	return s.Checkpoint, err
}

func unlessGiven(keys []string) string {
	if len(keys) == 0 {
		return "; its key was taken from the database, because no --key was given"
	}
	return ""
}

func newAuditList() *cobra.Command {
	var from int64
	var org string
	cmd := &cobra.Command{
		Use:   "list",
		Short: "Print the log's events as JSON lines",
		Long: `Prints the log's events in their order, each as the verbatim leaf that the tree
commits to, with its index in front.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := load(cmd)
			if err != nil {
				return err
			}
			db, err := server.OpenLog(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			if past, err := db.Archived(cmd.Context()); err == nil && from < past.Removed {
				from = past.Removed
			}
			return errors.Join(list(cmd.Context(), cmd.OutOrStdout(), db, from, org), db.Close())
		},
	}
	cmd.Flags().Int64Var(&from, "from", 0, "index of the first event")
	cmd.Flags().StringVar(&org, "org", "", "only this organization's events")
	return cmd
}

func list(ctx context.Context, w io.Writer, db *sqlstore.DB, from int64, org string) error {
	out := bufio.NewWriter(w)
	for {
		entries, err := db.Entries(ctx, from, 1000)
		if err != nil || len(entries) == 0 {
			return errors.Join(err, out.Flush())
		}
		for _, e := range entries {
			event, err := audit.Decode(e.Leaf)
			if err != nil {
				return fmt.Errorf("event %d: %w", e.Index, err)
			}
			if org == "" || string(event.Org) == org {
				fmt.Fprintf(out, `{"index":%d,"event":%s}`+"\n", e.Index, e.Leaf)
			}
		}
		from += int64(len(entries))
	}
}
