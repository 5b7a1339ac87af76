package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"

	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/internal/vault"
)

func newAcceptRollback() *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use:   "accept-rollback --reason TEXT",
		Short: "Go on with a log that was set back, as after restoring a backup",
		Long: `The server refuses to start when the log does not extend what a sink has
acknowledged, or its newest signed checkpoint: events were lost, by a restored
backup or by somebody's hand. Find out which. If it was a backup, this records
why in the log and in the sinks, and the server goes on from here. The sinks keep
the events that the log has lost.

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
			if err = openToRecord(cmd.Context(), cfg, dir, db); err == nil {
				err = acceptRollback(cmd.Context(), cmd.OutOrStdout(), cfg, db, reason)
			}
			return errors.Join(err, db.Close(), dir.close())
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why the log was set back")
	return cmd
}

// rollbackSink is a sink that can be told that the log was set back.
type rollbackSink struct {
	name   string
	last   func(context.Context) (audit.Checkpoint, error)
	accept func(context.Context, audit.Rollback) error
}

// acceptRollback writes the event before a sink's note: after a crash in
// between, the server still refuses, and the command can be run again.
func acceptRollback(ctx context.Context, out io.Writer, cfg config.Config, db *sqlstore.DB, reason string) error {
	sinks, closeSinks, err := rollbackSinks(ctx, cfg, db)
	if err != nil {
		return err
	}
	defer closeSinks()
	head, err := db.Head(ctx)
	if err != nil {
		return err
	}
	accepted := false
	for _, s := range sinks {
		done, err := acceptIn(ctx, out, db, s, head, reason)
		if err != nil {
			return fmt.Errorf("sink %s: %w", s.name, err)
		}
		accepted = accepted || done
	}
	done, err := acceptSigned(ctx, out, db, head, reason)
	if err != nil {
		return err
	}
	if !accepted && !done {
		_, err = fmt.Fprintln(out, "nothing to accept: the log extends what the sinks hold")
	}
	return err
}

func rollbackSinks(ctx context.Context, cfg config.Config, db *sqlstore.DB) ([]rollbackSink, func(), error) {
	var sinks []rollbackSink
	closeSinks := func() {}
	for _, name := range cfg.AuditSinks {
		if name == config.SinkFile {
			file := audit.NewFileSink(cfg.AuditFile)
			sinks = append(sinks, rollbackSink{name, file.Last, func(_ context.Context, r audit.Rollback) error { return file.AcceptRollback(r) }})
			continue
		}
		client, err := vault.Open(ctx, vault.Config{Login: vaultLogin(cfg), ReapGrace: cfg.ReservationTTL, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			return nil, closeSinks, err
		}
		closeSinks = client.Close
		sink := client.Sink()
		sinks = append(sinks, rollbackSink{name, sink.Last, func(ctx context.Context, r audit.Rollback) error {
			// Progress goes first: if it stood higher than what Vault holds, a
			// replica would take it for done.
			if err := db.SetSinkNext(ctx, sink.Name(), 0); err != nil {
				return err
			}
			return sink.AcceptRollback(ctx, r)
		}})
	}
	return sinks, closeSinks, nil
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

func acceptIn(ctx context.Context, out io.Writer, db *sqlstore.DB, s rollbackSink, head audit.Checkpoint, reason string) (bool, error) {
	held, err := s.last(ctx)
	if err != nil {
		return false, err
	}
	if ok, err := extended(ctx, db, head, held); ok || err != nil {
		return false, err
	}
	if err := recordRollback(ctx, db, held, head, reason); err != nil {
		return false, err
	}
	if err := s.accept(ctx, audit.Rollback{From: held.Text(), To: head.Text(), Reason: reason}); err != nil {
		return false, err
	}
	_, err = fmt.Fprintf(out, "accepted: the log goes on from %d events; sink %s had acknowledged %d\n", head.Size, s.name, held.Size)
	return true, err
}

func recordRollback(ctx context.Context, db *sqlstore.DB, held, head audit.Checkpoint, reason string) error {
	event := audit.New(audit.RollbackAccepted, "")
	event.Actor = audit.Actor{Kind: audit.System, ID: "operator"}
	event.Reason = "accepted"
	event.Detail = map[string]string{"from": held.Text(), "to": head.Text(), "reason": reason}
	return db.Record(ctx, event)
}

// acceptSigned sets the signed checkpoints aside that the log does not extend.
func acceptSigned(ctx context.Context, out io.Writer, db *sqlstore.DB, head audit.Checkpoint, reason string) (bool, error) {
	last, err := db.LastSigned(ctx)
	if err != nil {
		return false, err
	}
	if ok, err := extended(ctx, db, head, last.Checkpoint); ok || err != nil {
		return false, err
	}
	first := last.Seq
	for seq := int64(0); ; {
		page, err := db.SignedAfter(ctx, seq)
		if err != nil {
			return false, err
		}
		if len(page) == 0 {
			break
		}
		for _, s := range page {
			ok, err := extended(ctx, db, head, s.Checkpoint)
			if err != nil {
				return false, err
			}
			if !ok {
				first = min(first, s.Seq)
			}
			seq = s.Seq
		}
	}
	if err := recordRollback(ctx, db, last.Checkpoint, head, reason); err != nil {
		return false, err
	}
	if err := db.Supersede(ctx, first); err != nil {
		return false, err
	}
	_, err = fmt.Fprintf(out, "accepted: the log goes on from %d events; the newest signed checkpoint covered %d\n", head.Size, last.Size)
	return true, err
}
