package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/internal/audit/tiles"
	"github.com/orgkeys/orgkeys/internal/audit/verdict"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/server"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

func newAuditArchive() *cobra.Command {
	var before string
	var at time.Time
	var from server.Before
	var given verdict.Given
	var dryRun, vacuum bool
	cmd := &cobra.Command{
		Use:   "archive --before T",
		Short: "Move old events out of the database into an archive",
		Long: `Moves the events that happened before T to ORGKEYS_AUDIT_ARCHIVE: a time such as
2026-01-31T12:00:00Z, or an age such as 90d or 2160h. The archive is what
"orgkeys audit publish" writes, C2SP tlog-tiles, and the receipts of Vault beside it:
in a directory, or in a bucket of an S3-compatible store (s3://bucket/prefix).

It does this, in this order:
 1. publishes the log up to its newest signed checkpoint;
 2. records the event log.archived: how many events may be moved, and where to;
 3. waits until a signed checkpoint covers that event: the running server signs one
    every ORGKEYS_CHECKPOINT_INTERVAL, or at once on SIGUSR1; without a server this
    command signs one. So nobody can pass off deleted events as archived ones;
 4. for each bundle of 256 events: reads back what the archive holds, compares it byte
    for byte, and deletes the bundle from the database;
 5. gives the space that is free then back to the file system (SQLite).
It may be interrupted at any moment: the next run goes on, and nothing is moved twice.
The server may be running. Repeat it, for example every night.

What stays in the database: the hashes that proofs and checkpoints need, the newest
events, and what events knew of people, so that "orgkeys audit erase" reaches all of it.
Give the server and all other commands the same ORGKEYS_AUDIT_ARCHIVE: they read
archived events there, and compare them with the hashes in the database. The server
starts and serves without it, unless a file sink lacks events that were moved.

With ORGKEYS_AUDIT_RETENTION it also removes entries from the archive that are
older, whole bundles, after an event log.pruned that says so. Hash tiles stay for ever.

When the log was set back, by a restored backup or a failover that lost events, the archive
is ahead of it and takes no more. Run "orgkeys audit accept-rollback" with the archive as
it was; then set ORGKEYS_AUDIT_ARCHIVE to an empty place, here, for the server and for all
other commands, and name the one before once with --from: what was moved, the receipts, and
the hashes of what was removed are copied, each bundle compared with its root hash in the
database. Remove the one before when "orgkeys audit verify" has verified the new one.
If retention removed entries after the backup was made, the restored log does not know
that; the lost part of the log does, in the archive before. Give the log's verifier
key, which was kept elsewhere, with --key: then the archive before is verified by it, and
what it says of removed entries is announced in the restored log, too.

SQLite: above ` + strconv.Itoa(sqlstore.QuickVacuum>>20) + ` MiB in use the file keeps its size, and what is free is used
again, unless --vacuum is given: stop the server for that. PostgreSQL uses the
space again; to make its files smaller, run in psql, at a quiet moment:
VACUUM (FULL, ANALYZE) events, log_hashes, event_persons, event_receipts, event_reads`,
		Args: cobra.NoArgs,
		PreRunE: func(*cobra.Command, []string) (err error) {
			if at, err = pastTime(before, time.Now()); err != nil {
				return fmt.Errorf("--before: %w", err)
			}
			if len(given.Keys) > 0 && from.Place == "" {
				return errors.New("--key: it is for --from")
			}
			from.Keys, err = given.Trusted()
			return err
		},
		RunE: onLog(func(cmd *cobra.Command, cfg config.Config, db *sqlstore.DB, _ []string) error {
			if dryRun {
				return archiveDryRun(cmd.Context(), cmd.OutOrStdout(), cfg, db, at)
			}
			return archiveLog(cmd, cfg, db, at, from, vacuum)
		}),
	}
	cmd.Flags().StringVar(&before, "before", "", "a time, or an age such as 90d: which events are moved")
	cmd.Flags().StringVar(&from.Place, "from", "", "where the archive was before: what is there is copied first, when the log was set back")
	cmd.Flags().StringArrayVar(&given.Keys, "key", nil, "with --from: a verifier key, as printed by \"orgkeys audit key\", or a file of keys; may be repeated")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "print how many events would be moved, and change nothing")
	cmd.Flags().BoolVar(&vacuum, "vacuum", false, "SQLite: give free space back however large the database is, while writes wait")
	return cmd
}

// pastTime reads a time, or an age.
func pastTime(text string, now time.Time) (time.Time, error) {
	if at, err := time.Parse(time.RFC3339, text); err == nil {
		if at.After(now) {
			err = fmt.Errorf("%s is in the future: by this machine's clock it is %s", text, now.UTC().Format(time.RFC3339))
		}
		return at, err
	}
	age, err := time.ParseDuration(text)
	if days, isDays := strings.CutSuffix(text, "d"); isDays {
		var n int
		n, err = strconv.Atoi(days)
		age = time.Duration(n) * 24 * time.Hour
	}
	if err != nil || age <= 0 || age > maxAge {
		return now, fmt.Errorf("%q is neither a time such as 2026-01-31T12:00:00Z nor an age such as 90d or 2160h", text)
	}
	return now.Add(-age), nil
}

const maxAge = 100 * 365 * 24 * time.Hour

func archiveDryRun(ctx context.Context, out io.Writer, cfg config.Config, db *sqlstore.DB, before time.Time) error {
	head, err := db.LastSigned(ctx)
	if err != nil {
		return err
	}
	now, err := db.Archived(ctx)
	if err != nil {
		return err
	}
	n, err := db.Movable(ctx, before, head.Size)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "dry run, nothing is moved: %d events, after %d that were moved before\n", n-now.Moved, now.Moved)
	return printHeldBack(ctx, out, cfg, db, n, before, head.Size, n > now.Moved)
}

// printHeldBack says why events stay in the database that are old enough or, where none were moved, which is not.
func printHeldBack(ctx context.Context, out io.Writer, cfg config.Config, db *sqlstore.DB, index int64, before time.Time, size int64, some bool) error {
	holders, err := db.HeldBack(ctx, index, before, size)
	for _, h := range holders {
		switch {
		case !h.At.IsZero() && some: // as every night
		case h.At.After(time.Now()):
			fmt.Fprintf(out, "not old enough: event %d is from %s, which is in the future: the clock was wrong. It will be moved when more of what was recorded behind it is old enough\n", h.Next, h.At.UTC().Format(time.RFC3339))
		case !h.At.IsZero():
			fmt.Fprintf(out, "not old enough: event %d is from %s\n", h.Next, h.At.UTC().Format(time.RFC3339))
		case h.Sink == "":
			fmt.Fprintf(out, "held back: the delivery of key %s of organization %s, which is under way, needs event %d\n", h.Key, h.Org, h.Next)
		case slices.Contains(cfg.AuditSinks, h.Sink):
			fmt.Fprintf(out, "held back: the sink %q has acknowledged %d events; what it has not stays in the database\n", h.Sink, h.Next)
		default:
			fmt.Fprintf(out, "held back: the sink %q has acknowledged %d events, and ORGKEYS_AUDIT_SINKS does not name it: name it again, "+
				"or, if it is retired, delete its row of the table sink_progress\n", h.Sink, h.Next)
		}
	}
	return err
}

func archiveLog(cmd *cobra.Command, cfg config.Config, db *sqlstore.DB, at time.Time, from server.Before, vacuum bool) error {
	ctx, out := cmd.Context(), cmd.OutOrStdout()
	done, err := server.ArchiveLog(ctx, cfg, db, tiles.Move{Before: at, Progress: progress(cmd)}, from, newLogger(cfg))
	if p := done.Published; p.Size > 0 {
		_ = sayLog(cmd, cfg.AuditArchive, p.Origin, p.Size, p.Root.String()) // what moved is said below
	}
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "moved %d events; the first %d are no longer in the database\n", done.Events, done.Moved)
	if done.Removed > 0 {
		fmt.Fprintf(out, "removed %d entries; the first %d are no longer in the archive\n", done.Entries, done.Removed)
	}
	if err := printHeldBack(ctx, out, cfg, db, done.Moved, at, done.Published.Size, done.Events > 0); err != nil {
		return err
	}
	if done.Events == 0 && !vacuum {
		return nil
	}
	space, err := db.Shrink(ctx, vacuum)
	if err != nil {
		return errors.Join(errors.New("everything is moved, and the free space was not given back: run the command again with --vacuum"), err)
	}
	switch {
	case cfg.DatabaseURL != "":
		return say(cmd, "the database takes %d bytes, and will use free space again; to make it smaller, see orgkeys audit archive --help\n", space.Size)
	case space.Kept:
		return say(cmd, "the database takes %d bytes, of which %d are free and will be used again; to give them back, stop the server and run the command with --vacuum\n", space.Size, space.Free)
	}
	return say(cmd, "the database takes %d bytes\n", space.Size)
}
