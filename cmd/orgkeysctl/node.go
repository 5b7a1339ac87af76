package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

func newNode(s *settings) *cobra.Command {
	cmd := &cobra.Command{Use: "node", Short: "Bridge nodes: list, delete"}
	cmd.AddCommand(newNodeList(s), newNodeDelete(s))
	return cmd
}

func newNodeList(s *settings) *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the organization's nodes, newest first", Args: cobra.NoArgs,
		RunE: s.connected(func(ctx context.Context, c *connection, _ []string) error {
			nodes, err := c.Nodes(ctx, c.Org)
			if err != nil {
				return err
			}
			if c.json {
				return printJSON(c.out, nodes)
			}
			var rows [][]string
			for _, n := range nodes {
				rows = append(rows, []string{n.ID, n.IP, n.Region, n.Status, n.Version, servicesOf(n.Services), instant(n.LastSeen), n.Provider, n.URL})
			}
			return table(c.out, []string{"ID", "ADDRESS", "REGION", "STATUS", "VERSION", "SERVICES", "LAST SEEN", "PROVIDER", "URL"}, rows, "no nodes")
		}),
	}
}

// servicesOf names the bits of a node's services.
func servicesOf(mask int64) string {
	var names []string
	for i, name := range []string{"storage", "ai", "chat"} {
		if mask>>i&1 != 0 {
			names = append(names, name)
		}
	}
	return strings.Join(names, "+")
}

func newNodeDelete(s *settings) *cobra.Command {
	return &cobra.Command{
		Use: "delete ID...", Short: "Delete nodes, and the keys of their own that they have",
		Long: `Deletes nodes, and with each the key of its own that it has. A node that signs with an
organization key registers again as long as that key is there: delete the key too.`,
		Args: cobra.MinimumNArgs(1),
		RunE: s.connected(func(ctx context.Context, c *connection, args []string) error {
			for _, id := range args {
				if err := c.DeleteNode(ctx, c.Org, id); err != nil {
					return fmt.Errorf("node %s: %w", id, err)
				}
				if err := c.done("deleted node %s", id); err != nil {
					return err
				}
			}
			return nil
		}),
	}
}
