package main

import (
	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/internal/audit/bucket"
	"github.com/orgkeys/orgkeys/internal/audit/tiles"
	"github.com/orgkeys/orgkeys/internal/audit/verdict"
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
		RunE: onLog(func(cmd *cobra.Command, cfg config.Config, db *sqlstore.DB, args []string) error {
			store, err := server.OpenTiles(cfg, args[0])
			if err != nil {
				return err
			}
			head, err := tiles.Publish(cmd.Context(), store, db, progress(cmd)("published"))
			if err != nil {
				return err
			}
			return sayLog(cmd, args[0], head.Origin, head.Size, head.Root.String())
		}),
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
	var g verdict.Given
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
			store, err := tilesAt(cmd, args[0])
			if err != nil {
				return err
			}
			return judge(cmd, false, func(j *verdict.Judge) error { return j.Tiles(cmd.Context(), store, args[0], g) })
		},
	}
	keyFlag(cmd, &g)
	cmd.Flags().StringVar(&g.Checkpoint, "checkpoint", "", "a signed checkpoint of the log that was kept elsewhere: a file, or the text, in any form in which a sink stores it")
	return cmd
}
