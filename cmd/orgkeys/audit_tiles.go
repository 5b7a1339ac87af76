package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/bucket"
	"github.com/orgkeys/orgkeys/internal/audit/tiles"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/server"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

func newAuditPublish() *cobra.Command {
	return &cobra.Command{
		Use:   "publish DIR",
		Short: "Write the log as C2SP tlog-tiles, or what is new of it",
		Long: `Writes the log up to its newest signed checkpoint into DIR as C2SP tlog-tiles
(https://c2sp.org/tlog-tiles): entry bundles, hash tiles and the checkpoint. The
clients of others read it there, or from a web server that serves DIR. Run it
again, for example daily, to add what is new; nothing but the checkpoint ever changes.
It may be interrupted at any time, and the server may be running. The log stays in the
database: "orgkeys audit archive" moves it.

The entries are the events as the log holds them: identifiers, without names and
addresses of people, so that erasing a person needs no change in DIR.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return withLog(cmd, func(ctx context.Context, db *sqlstore.DB) error {
				store, err := tilesAt(cmd, args[0])
				if err != nil {
					return err
				}
				head, err := tiles.Publish(ctx, store, db, progressTo(cmd.ErrOrStderr(), "published"))
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: log %s, %d events, root hash %s\n", args[0], head.Origin, head.Size, head.Root)
				return err
			})
		},
	}
}

// tilesAt opens a directory, or the place in a bucket that the settings have the key for.
func tilesAt(cmd *cobra.Command, place string) (tiles.Store, error) {
	if !bucket.IsPlace(place) {
		return server.OpenTiles(config.Config{}, place)
	}
	cfg, err := load(cmd)
	if err != nil {
		return nil, err
	}
	return server.OpenTiles(cfg, place)
}

func newVerifyTiles() *cobra.Command {
	var given []string
	var checkpoint string
	cmd := &cobra.Command{
		Use:   "verify-tiles DIR --key KEY",
		Short: "Verify what \"orgkeys audit publish\" has written, anywhere and offline",
		Long: `Verifies the files of a directory that "orgkeys audit publish" has written, or of a
copy: that the checkpoint is signed by a key given with --key, that the entry bundles
hold its events and no others, and that every hash tile belongs to them. It needs no
settings, except for a place such as s3://bucket/prefix. It does not compare receipts, policies and keys: an export has these.

Files alone cannot show whether the log was truncated: give --checkpoint. Exit code 0:
verified, and the given checkpoint covers all events. 1: an error. 3: verified, but
truncation is not excluded.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return verifyTiles(cmd, args[0], given, checkpoint)
		},
	}
	cmd.Flags().StringArrayVar(&given, "key", nil, "a verifier key, as printed by \"orgkeys audit key\", or a file of keys; may be repeated")
	cmd.Flags().StringVar(&checkpoint, "checkpoint", "", "a signed checkpoint of the log that was kept elsewhere: a file, or the text, in any form in which a sink stores it")
	return cmd
}

func verifyTiles(cmd *cobra.Command, dir string, given []string, checkpoint string) error {
	vkeys, err := keysGiven(given)
	if err != nil {
		return err
	}
	if len(vkeys) == 0 {
		return errNoKey
	}
	keys, err := audit.ParseKeys(vkeys...)
	if err != nil {
		return err
	}
	text, err := checkpointGiven(checkpoint, true)
	if err != nil {
		return err
	}
	var kept audit.Signed
	if text != "" {
		if kept, err = keys.Open(text); err != nil {
			return fmt.Errorf("--checkpoint: %w", err)
		}
	}
	store, err := tilesAt(cmd, dir)
	if err != nil {
		return err
	}
	head, removed, err := tiles.Check(cmd.Context(), store, keys, kept.Checkpoint, progressTo(cmd.ErrOrStderr(), "verified"))
	if err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	out := cmd.OutOrStdout()
	fmt.Fprintf(out, "log %s: %d events, each covered by the signed checkpoint\nroot hash %s\n", head.Origin, head.Size, head.Root)
	if removed > 0 {
		fmt.Fprintf(out, "entries below %d were removed by the policy of retention: their hashes are verified\n", removed)
	}
	switch {
	case kept.Size == 0:
		return notExcluded("the files end with the signed checkpoint of %d events and cannot show whether there is a newer one; give one that was kept elsewhere with --checkpoint", head.Size)
	case kept.Size < head.Size:
		return notExcluded("the given checkpoint covers %d of %d events; give a newer one with --checkpoint", kept.Size, head.Size)
	}
	_, err = fmt.Fprintf(out, "truncation excluded: the given checkpoint covers %d of %d events\n", kept.Size, head.Size)
	return err
}
