package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"
)

func newDevice(s *settings) *cobra.Command {
	cmd := &cobra.Command{Use: "device", Short: "TPMs that may have keys of nodes: allow, list, remove"}
	cmd.AddCommand(newDeviceAllow(s), newDeviceList(s), newDeviceRemove(s))
	return cmd
}

func newDeviceAllow(s *settings) *cobra.Command {
	var note string
	cmd := &cobra.Command{
		Use: "allow EK...", Short: "Allow TPMs, by what orgkeys-node ek prints on their machines",
		Long: `Allows TPMs, by the names that "orgkeys-node ek" prints on their machines. Enrollments let them
in from then on: create them with --tpm, so that nothing else gets in with the token.`,
		Args: cobra.MinimumNArgs(1),
		RunE: s.connected(func(ctx context.Context, c *connection, args []string) error {
			for _, ek := range args {
				if err := c.AllowDevice(ctx, c.Org, ek, note); err != nil {
					return fmt.Errorf("device %s: %w", ek, err)
				}
				if err := c.done("allowed device %s", ek); err != nil {
					return err
				}
			}
			return nil
		}),
	}
	cmd.Flags().StringVar(&note, "note", "", "a `text` for people")
	return cmd
}

func newDeviceList(s *settings) *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the TPMs that the organization allows, newest first", Args: cobra.NoArgs,
		RunE: s.connected(func(ctx context.Context, c *connection, _ []string) error {
			all, err := c.Devices(ctx, c.Org)
			if err != nil {
				return err
			}
			if c.json {
				return printJSON(c.out, all)
			}
			var rows [][]string
			for _, d := range all {
				rows = append(rows, []string{d.EK, instant(d.Created), d.Note})
			}
			return table(c.out, []string{"EK", "ALLOWED", "NOTE"}, rows, "no devices")
		}),
	}
}

func newDeviceRemove(s *settings) *cobra.Command {
	return &cobra.Command{
		Use: "remove EK...", Short: "Stop allowing TPMs; keys in them stay until they are deleted", Args: cobra.MinimumNArgs(1),
		RunE: s.connected(func(ctx context.Context, c *connection, args []string) error {
			for _, ek := range args {
				if err := c.RemoveDevice(ctx, c.Org, ek); err != nil {
					return fmt.Errorf("device %s: %w", ek, err)
				}
				if err := c.done("removed device %s", ek); err != nil {
					return err
				}
			}
			return nil
		}),
	}
}
