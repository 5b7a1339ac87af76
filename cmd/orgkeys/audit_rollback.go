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
	"github.com/orgkeys/orgkeys/internal/audit/verify"
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
and run it with the data directory of each that has a file sink, with the same
--reason. After an interruption, run it again, with the same --reason too.`,
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

// acceptance is a rollback, from what the first sink held that the log does not
// extend, and whether the log has its event.
type acceptance struct {
	audit.Rollback
	recorded bool
}

// acceptRollback writes the event before a sink's note: after a crash in
// between, the server still refuses, and the command can be run again.
func acceptRollback(ctx context.Context, out io.Writer, cfg config.Config, db *sqlstore.DB, sinks []audit.Sink, reason string, rewritten bool) error {
	// What was recorded and has no place yet takes it before the rollback's event does.
	if err := sequence(ctx, db); err != nil {
		return err
	}
	head, err := db.Head(ctx)
	if err != nil {
		return err
	}
	a, err := newAcceptance(ctx, out, cfg, db, sinks, head, reason, rewritten)
	if err != nil {
		return err
	}
	accepted := false
	for _, s := range sinks {
		done, err := acceptIn(ctx, out, db, s, head, a)
		if err != nil {
			return fmt.Errorf("sink %s: %w", s.Name(), err)
		}
		accepted = accepted || done
	}
	done, err := acceptSigned(ctx, out, db, head, a)
	if err != nil {
		return err
	}
	if !accepted && !done {
		_, err = fmt.Fprintln(out, "nothing to accept: the log extends what the sinks hold")
	}
	return err
}

// newAcceptance says how many of the log's events are as the sinks and the
// signed checkpoints have them: all, unless it was rewritten. What was accepted
// before for the same reason, in another sink or by a run that was interrupted,
// is accepted again as it was.
func newAcceptance(ctx context.Context, out io.Writer, cfg config.Config, db *sqlstore.DB, sinks []audit.Sink, head audit.Checkpoint, reason string, rewritten bool) (*acceptance, error) {
	a := &acceptance{Rollback: audit.Rollback{To: head.Text(), Kept: head.Size, Reason: reason}}
	held, err := heldOf(ctx, cfg, db, sinks)
	if err != nil {
		return a, err
	}
	problem, err := held.Differs(ctx, head, db.Entries)
	if err != nil || problem == nil {
		return a, err
	}
	earlier, err := acceptedBefore(ctx, db, problem.Index)
	if err != nil {
		return a, err
	}
	for _, e := range earlier {
		if e.Reason == reason {
			return &acceptance{e.Rollback, true}, nil
		}
	}
	switch {
	case rewritten:
		a.Kept = problem.Index
		_, err = fmt.Fprintf(out, "rewritten: %v\n", problem)
		return a, err
	case len(earlier) > 0:
		return a, fmt.Errorf("a sink holds another log than this from event %d on: what this one lost by the rollback that event %d accepted, if you know of that one: then give the same --reason, %q; %w", problem.Index, earlier[0].Index, earlier[0].Reason, problem)
	}
	return a, fmt.Errorf("the log was not only set back, it was rewritten: %w; keep the database and the sinks as evidence, and find out who did it; only --rewritten accepts it", problem)
}

// acceptedBefore returns the accepted rollbacks that account for a sink's other
// event at an index.
func acceptedBefore(ctx context.Context, db *sqlstore.DB, differs int64) ([]verify.AcceptedRollback, error) {
	var all []verify.AcceptedRollback
	for row, err := range db.Rows(ctx) {
		if err != nil {
			return nil, err
		}
		if row.Type != audit.RollbackAccepted {
			continue
		}
		e, err := audit.Decode(row.Leaf)
		if err != nil {
			return nil, err
		}
		if r := verify.RollbackOf(e, row.Index); r.Accounts(differs) {
			all = append(all, r)
		}
	}
	return all, nil
}

// heldOf is all that can be compared with the log: the events in the sink's
// file, and every checkpoint.
func heldOf(ctx context.Context, cfg config.Config, db *sqlstore.DB, sinks []audit.Sink) (*verify.Copy, error) {
	held := &verify.Copy{}
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

// lastOf is what a sink holds, or ErrCheckpointLost.
func lastOf(ctx context.Context, db *sqlstore.DB, s audit.Sink) (audit.Checkpoint, error) {
	held, err := s.Last(ctx)
	if err != nil {
		return held, err
	}
	next, err := db.SinkNext(ctx, s.Name())
	if err != nil {
		return held, err
	}
	return held, audit.CheckHeld(s, held, next)
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

func acceptIn(ctx context.Context, out io.Writer, db *sqlstore.DB, s audit.Sink, head audit.Checkpoint, a *acceptance) (bool, error) {
	held, err := lastOf(ctx, db, s)
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
	if err := a.record(ctx, db, held); err != nil {
		return false, err
	}
	if s.Shared() {
		// Progress goes first: if it stood higher than what the sink holds, a
		// replica would take it for done.
		if err := db.Acknowledge(ctx, s.Name(), 0, nil); err != nil {
			return false, err
		}
	}
	if err := s.AcceptRollback(ctx, a.Rollback); err != nil {
		return false, err
	}
	_, err = fmt.Fprintf(out, "accepted: the log goes on from %d events; sink %s %s\n", head.Size, s.Name(), had)
	return true, err
}

// record has the log say that the rollback from what was held is accepted. The
// event gets its place in the log at once, for the sink's note refers to it and
// the server may be started much later.
func (a *acceptance) record(ctx context.Context, db *sqlstore.DB, held audit.Checkpoint) error {
	if a.recorded {
		return nil
	}
	a.From = held.Text()
	if err := db.Record(ctx, a.Event()); err != nil {
		return err
	}
	a.recorded = true
	return sequence(ctx, db)
}

// sequence gives all that is recorded its place in the log.
func sequence(ctx context.Context, db *sqlstore.DB) error {
	for {
		if n, err := db.Sequence(ctx, 1000); n == 0 || err != nil {
			return err
		}
	}
}

// acceptSigned sets the signed checkpoints aside that the log does not extend.
func acceptSigned(ctx context.Context, out io.Writer, db *sqlstore.DB, head audit.Checkpoint, a *acceptance) (bool, error) {
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
	if err := a.record(ctx, db, last.Checkpoint); err != nil {
		return false, err
	}
	if err := db.Supersede(ctx, first); err != nil {
		return false, err
	}
	_, err = fmt.Fprintf(out, "accepted: the log goes on from %d events; the newest signed checkpoint covered %d\n", head.Size, last.Size)
	return true, err
}
