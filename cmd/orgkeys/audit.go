package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

func newAudit() *cobra.Command {
	cmd := &cobra.Command{Use: "audit", Short: "Read and verify the audit log"}
	cmd.AddCommand(newAuditVerify(), newAuditList(), newAcceptRollback())
	return cmd
}

// openLog opens the database that the settings name, without changing it.
func openLog(ctx context.Context, cfg config.Config) (*sqlstore.DB, error) {
	location := databaseLocation(cfg)
	if cfg.DatabaseURL == "" {
		if _, err := os.Stat(location); err != nil {
			return nil, fmt.Errorf("there is no log to read: %w (is ORGKEYS_DATA_DIR right?)", err)
		}
	}
	db, err := sqlstore.Open(ctx, location)
	if err != nil {
		return nil, err
	}
	if err := db.CheckMigrated(ctx); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return db, nil
}

func databaseLocation(cfg config.Config) string {
	if cfg.DatabaseURL != "" {
		return cfg.DatabaseURL
	}
	return filepath.Join(cfg.DataDir, "orgkeys.db")
}

const codeNotExcluded = 3

var errNotExcluded = errors.New("truncation not excluded: no copy of the log from outside the data directory was compared; keep the file sink elsewhere (ORGKEYS_AUDIT_FILE), or give --sink a copy or --checkpoint a checkpoint that was kept elsewhere")

func newAuditVerify() *cobra.Command {
	var sink, checkpoint string
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Verify the audit log offline",
		Long: `Verifies that every event is the one that the log's Merkle tree was built from,
that nothing is missing, inserted or out of order, that keys and events agree,
and that the log extends what a sink holds. It reads the database directly and
needs neither the server nor the HSM; the server may run meanwhile.

What whoever controls the database can do unseen without a copy from elsewhere
is cut off the log's end, or rewrite all of it consistently. So the file sink
counts only if it lies outside the data directory, or is given with --sink.

Exit code 0: verified, truncation excluded. 1: something is wrong, the first
bad event is named. 3: consistent, but truncation is not excluded.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := load(cmd)
			if err != nil {
				return err
			}
			db, err := openLog(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			err = verify(cmd, cfg, db, sink, checkpoint)
			return errors.Join(err, db.Close())
		},
	}
	cmd.Flags().StringVar(&sink, "sink", "", "a copy of the file sink, kept where the database's administrator cannot change it")
	cmd.Flags().StringVar(&checkpoint, "checkpoint", "", "a file with a checkpoint of the log, kept likewise")
	return cmd
}

func verify(cmd *cobra.Command, cfg config.Config, db *sqlstore.DB, sink, checkpoint string) error {
	evidence, independent, err := gatherEvidence(cfg, sink, checkpoint)
	if err != nil {
		return err
	}
	report, err := audit.Verify(cmd.Context(), db, evidence)
	if err != nil {
		return err
	}
	out := cmd.OutOrStdout()
	fmt.Fprintf(out, "log %s: %d events, each the one that the tree was built from\n", report.Log.Origin, report.Log.Size)
	fmt.Fprintf(out, "root hash %s\n", report.Log.Root)
	if report.Erased > 0 {
		fmt.Fprintf(out, "%d events had their personal part erased\n", report.Erased)
	}
	if report.Unsequenced > 0 {
		fmt.Fprintf(out, "%d events are recorded and not in the log yet: nothing vouches for them until the server runs\n", report.Unsequenced)
	}
	for _, r := range report.Rollbacks {
		fmt.Fprintf(out, "a rollback was accepted: %q\n", r.Reason)
	}
	if !independent {
		return &exitError{codeNotExcluded, errNotExcluded}
	}
	fmt.Fprintf(out, "truncation excluded: the copy vouches for %d of %d events\n", report.Covered, report.Log.Size)
	return nil
}

// gatherEvidence reads what to compare the log with, and says whether it comes
// from outside the data directory.
func gatherEvidence(cfg config.Config, sink, checkpoint string) (*audit.Copy, bool, error) {
	independent := sink != "" || checkpoint != ""
	if sink == "" {
		sink = cfg.AuditFile
		outside, err := outsideOf(cfg.DataDir, sink)
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
	evidence := &audit.Copy{}
	if sink != "" {
		f, err := os.Open(sink)
		if err != nil {
			return nil, false, err
		}
		evidence, err = audit.ReadCopy(f)
		if err := errors.Join(err, f.Close()); err != nil {
			return nil, false, fmt.Errorf("%s: %w", sink, err)
		}
	}
	if checkpoint != "" {
		text, err := os.ReadFile(checkpoint)
		if err != nil {
			return nil, false, err
		}
		c, err := audit.ParseCheckpoint(string(text))
		if err != nil {
			return nil, false, fmt.Errorf("%s: %w", checkpoint, err)
		}
		evidence.AddCheckpoint(c)
	}
	return evidence, independent, nil
}

// outsideOf reports whether file lies outside dir, links resolved.
func outsideOf(dir, file string) (bool, error) {
	dir, err := resolve(dir)
	if err != nil {
		return false, err
	}
	parent, err := resolve(filepath.Dir(file))
	if errors.Is(err, os.ErrNotExist) {
		return true, nil // and so opening it says
	}
	if err != nil {
		return false, err
	}
	return parent != dir && !strings.HasPrefix(parent, dir+string(filepath.Separator)), nil
}

func resolve(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(path)
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
			db, err := openLog(cmd.Context(), cfg)
			if err != nil {
				return err
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
			if org == "" || event.Org == org {
				fmt.Fprintf(out, `{"index":%d,"event":%s}`+"\n", e.Index, e.Leaf)
			}
		}
		from += int64(len(entries))
	}
}

func newAcceptRollback() *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use:   "accept-rollback --reason TEXT",
		Short: "Go on with a log that was set back, as after restoring a backup",
		Long: `The server refuses to start when the log does not extend what a sink has
acknowledged: events were lost, by a restored backup or by somebody's hand. Find
out which. If it was a backup, this records why in the log and in the sink, and
the server goes on from here. The sink keeps the events that the log has lost.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if strings.TrimSpace(reason) == "" {
				return errors.New("--reason: say why, for the auditors")
			}
			cfg, err := load(cmd)
			if err != nil {
				return err
			}
			dir, err := openDataDir(cfg.DataDir)
			if err != nil {
				return err
			}
			db, err := openLog(cmd.Context(), cfg)
			if err != nil {
				return errors.Join(err, dir.close())
			}
			err = acceptRollback(cmd.Context(), cmd.OutOrStdout(), cfg, db, reason)
			return errors.Join(err, db.Close(), dir.close())
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why the log was set back")
	return cmd
}

// acceptRollback writes the event before the sink's note: after a crash in
// between, the server still refuses, and the command can be run again.
func acceptRollback(ctx context.Context, out io.Writer, cfg config.Config, db *sqlstore.DB, reason string) error {
	sink := audit.NewFileSink(cfg.AuditFile)
	held, err := sink.Last(ctx)
	if err != nil {
		return err
	}
	head, err := db.Head(ctx)
	if err != nil {
		return err
	}
	if held.Size <= head.Size {
		then, err := db.At(ctx, held.Size)
		if err != nil {
			return err
		}
		if then == held {
			_, err := fmt.Fprintln(out, "nothing to accept: the log extends what the sink holds")
			return err
		}
	}
	event := audit.New(audit.RollbackAccepted, "")
	event.Actor = audit.Actor{Kind: audit.System, ID: "operator"}
	event.Reason = "accepted"
	event.Detail = map[string]string{"from": held.Text(), "to": head.Text(), "reason": reason}
	if err := db.Record(ctx, event); err != nil {
		return err
	}
	if err := sink.AcceptRollback(audit.Rollback{From: held.Text(), To: head.Text(), Reason: reason}); err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "accepted: the log goes on from %d events; the sink had acknowledged %d\n", head.Size, held.Size)
	return err
}
