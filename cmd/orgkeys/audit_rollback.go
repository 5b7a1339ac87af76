package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

func newAcceptRollback() *cobra.Command {
	var reason string
	var rewritten bool
	cmd := &cobra.Command{
		Use:   "accept-rollback --reason TEXT [--rewritten]",
		Short: "Go on with a log that was set back, as after restoring a backup",
		Long: `The server refuses to start when the log does not extend what a sink has
acknowledged, or its newest signed checkpoint: events were lost, by a restored
backup or by somebody's hand. Find out which. If it was a backup, this records
why in the log and in the sinks, and the server goes on from here. The sinks keep
the events that the log has lost.

A restored backup is the beginning of the log that was lost. If it is not, that
is: if an event in it is another one than the sinks hold, somebody rewrote the
log. The command names the first such event and refuses, unless --rewritten says
that this, too, is to be accepted; the log and the sinks then keep which event.
Of Vault only the checkpoint can be compared here, not the events: afterwards
verify an export with --vault-audit.

It is also the way on when somebody deleted the checkpoint in Vault or wrote
something else in its place.

It asks every sink in ORGKEYS_AUDIT_SINKS. With replicas, stop all of them first,
and run it with the data directory of each that has a file sink.`,
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
			b, err := openBackend(cmd.Context(), cfg, dir, db, newLogger(cfg))
			if err != nil {
				return errors.Join(err, db.Close(), dir.close())
			}
			if err = openEventKey(cmd.Context(), b.sealer, db); err == nil {
				err = acceptRollback(cmd.Context(), cmd.OutOrStdout(), cfg, db, b.sinks(cfg), reason, rewritten)
			}
			return errors.Join(err, b.close(), db.Close(), dir.close())
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why the log was set back")
	cmd.Flags().BoolVar(&rewritten, "rewritten", false, "accept a log that is not the beginning of the one that was lost")
	return cmd
}

// acceptRollback writes the event before a sink's note: after a crash in
// between, the server still refuses, and the command can be run again.
func acceptRollback(ctx context.Context, out io.Writer, cfg config.Config, db *sqlstore.DB, sinks []audit.Sink, reason string, rewritten bool) error {
	head, err := db.Head(ctx)
	if err != nil {
		return err
	}
	kept, err := keptOf(ctx, out, cfg, db, sinks, head, rewritten)
	if err != nil {
		return err
	}
	r := audit.Rollback{To: head.Text(), Kept: kept, Reason: reason}
	accepted := false
	for _, s := range sinks {
		done, err := acceptIn(ctx, out, db, s, head, r)
		if err != nil {
			return fmt.Errorf("sink %s: %w", s.Name(), err)
		}
		accepted = accepted || done
	}
	done, err := acceptSigned(ctx, out, db, head, r)
	if err != nil {
		return err
	}
	if !accepted && !done {
		_, err = fmt.Fprintln(out, "nothing to accept: the log extends what the sinks hold")
	}
	return err
}

// keptOf returns how many of the log's events are as the sinks and the signed
// checkpoints have them: all, unless it was rewritten.
func keptOf(ctx context.Context, out io.Writer, cfg config.Config, db *sqlstore.DB, sinks []audit.Sink, head audit.Checkpoint, rewritten bool) (int64, error) {
	held, err := heldOf(ctx, cfg, db, sinks)
	if err != nil {
		return 0, err
	}
	problem, err := held.Differs(ctx, head, db.Entries)
	switch {
	case err != nil:
		return 0, err
	case problem == nil:
		return head.Size, nil
	case !rewritten:
		return 0, fmt.Errorf("the log was not only set back, it was rewritten: %w; keep the database and the sinks as evidence, and find out who did it; only --rewritten accepts it", problem)
	}
	_, err = fmt.Fprintf(out, "rewritten: %v\n", problem)
	return problem.Index, err
}

// heldOf is all that can be compared with the log: the events in the sink's
// file, and every checkpoint.
func heldOf(ctx context.Context, cfg config.Config, db *sqlstore.DB, sinks []audit.Sink) (*audit.Copy, error) {
	held := &audit.Copy{}
	if slices.Contains(cfg.AuditSinks, config.SinkFile) {
		var err error
		if held, err = readCopy(cfg.AuditFile); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	for _, s := range sinks {
		last, err := s.Last(ctx)
		if errors.Is(err, audit.ErrCheckpointLost) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("sink %s: %w", s.Name(), err)
		}
		held.AddCheckpoint(last)
	}
	return held, eachSigned(ctx, db, func(s audit.Signed) error { held.AddCheckpoint(s.Checkpoint); return nil })
}

// extended reports whether the log, which is at head, extends held.
func extended(ctx context.Context, db *sqlstore.DB, head, held audit.Checkpoint) (bool, error) {
	if held.Size == 0 {
		return true, nil
	}
	if held.Size > head.Size {
		return false, nil
	}
	then, err := db.At(ctx, held.Size)
	return then == held, err
}

func acceptIn(ctx context.Context, out io.Writer, db *sqlstore.DB, s audit.Sink, head audit.Checkpoint, r audit.Rollback) (bool, error) {
	held, err := s.Last(ctx)
	had := fmt.Sprintf("had acknowledged %d", held.Size)
	switch {
	case errors.Is(err, audit.ErrCheckpointLost):
		had = "cannot say what it had acknowledged: " + err.Error()
		if held, err = db.At(ctx, 0); err != nil {
			return false, err
		}
	case err != nil:
		return false, err
	default:
		if ok, err := extended(ctx, db, head, held); ok || err != nil {
			return false, err
		}
	}
	r.From = held.Text()
	if err := recordRollback(ctx, db, r); err != nil {
		return false, err
	}
	if s.Shared() {
		// Progress goes first: if it stood higher than what the sink holds, a
		// replica would take it for done.
		if err := db.Acknowledge(ctx, s.Name(), 0, nil); err != nil {
			return false, err
		}
	}
	if err := s.AcceptRollback(ctx, r); err != nil {
		return false, err
	}
	_, err = fmt.Fprintf(out, "accepted: the log goes on from %d events; sink %s %s\n", head.Size, s.Name(), had)
	return true, err
}

// recordRollback gives the event its place in the log at once, for the sink's
// note refers to it and the server may be started much later.
func recordRollback(ctx context.Context, db *sqlstore.DB, r audit.Rollback) error {
	if err := db.Record(ctx, r.Event()); err != nil {
		return err
	}
	for {
		if n, err := db.Sequence(ctx, 1000); n == 0 || err != nil {
			return err
		}
	}
}

// acceptSigned sets the signed checkpoints aside that the log does not extend.
func acceptSigned(ctx context.Context, out io.Writer, db *sqlstore.DB, head audit.Checkpoint, r audit.Rollback) (bool, error) {
	last, err := db.LastSigned(ctx)
	if err != nil {
		return false, err
	}
	if ok, err := extended(ctx, db, head, last.Checkpoint); ok || err != nil {
		return false, err
	}
	first := last.Seq
	err = eachSigned(ctx, db, func(s audit.Signed) error {
		ok, err := extended(ctx, db, head, s.Checkpoint)
		if err == nil && !ok {
			first = min(first, s.Seq)
		}
		return err
	})
	if err != nil {
		return false, err
	}
	r.From = last.Text()
	if err := recordRollback(ctx, db, r); err != nil {
		return false, err
	}
	if err := db.Supersede(ctx, first); err != nil {
		return false, err
	}
	_, err = fmt.Fprintf(out, "accepted: the log goes on from %d events; the newest signed checkpoint covered %d\n", head.Size, last.Size)
	return true, err
}
