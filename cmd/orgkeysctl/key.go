package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/client"
)

func newKey(s *settings) *cobra.Command {
	cmd := &cobra.Command{Use: "key", Short: "Organization keys: create, list, show, delete"}
	cmd.AddCommand(newKeyCreate(s), newKeyList(s), newKeyShow(s), newKeyDelete(s))
	return cmd
}

func newKeyList(s *settings) *cobra.Command {
	var scope string
	cmd := &cobra.Command{
		Use: "list", Short: "List the organization's keys, newest first", Args: cobra.NoArgs,
		RunE: s.connected(func(ctx context.Context, c *connection, _ []string) error {
			read := map[string]func(context.Context, string) ([]client.Key, error){"organization": c.Keys, "node": c.NodeKeys}[scope]
			if read == nil {
				return usage("--scope is %q, neither organization nor node", scope)
			}
			keys, err := read(ctx, c.Org)
			if err != nil {
				return err
			}
			if c.json {
				return printJSON(c.out, keys)
			}
			var rows [][]string
			for _, k := range keys {
				rows = append(rows, []string{k.ID, instant(k.Created), instant(k.LastUsed), nodesOf(k), deliveryOf(k), k.Fingerprint})
			}
			return table(c.out, []string{"ID", "CREATED", "LAST USED", "NODES", "DELIVERY", "FINGERPRINT"}, rows, "no keys")
		}),
	}
	cmd.Flags().StringVar(&scope, "scope", "organization", "keys that speak for the whole `organization`, or for one node each: node")
	return cmd
}

// deliveryOf says when a key was handed out and to what address.
func deliveryOf(k client.Key) string {
	if k.DeliveredAt.IsZero() {
		return k.Delivery
	}
	if k.DeliveredTo == "" { // the person was erased
		return instant(k.DeliveredAt)
	}
	return instant(k.DeliveredAt) + " to " + k.DeliveredTo
}

// nodesOf counts the nodes that have a key, and those that have signed with it.
func nodesOf(k client.Key) string {
	confirmed := 0
	for _, n := range k.Nodes {
		if n.Confirmed {
			confirmed++
		}
	}
	return fmt.Sprintf("%d of %d", confirmed, len(k.Nodes))
}

func newKeyShow(s *settings) *cobra.Command {
	return &cobra.Command{
		Use: "show ID", Short: "Show a key with its nodes and its public half", Args: cobra.ExactArgs(1),
		RunE: s.connected(func(ctx context.Context, c *connection, args []string) error {
			for _, read := range []func(context.Context, string) ([]client.Key, error){c.Keys, c.NodeKeys} {
				keys, err := read(ctx, c.Org)
				if err != nil {
					return err
				}
				for _, k := range keys {
					if k.ID == args[0] {
						return showKey(c, k)
					}
				}
			}
			return &failure{exit: exitNotFound, what: fmt.Sprintf("organization %s has no key %q", c.Org, args[0]), hint: "orgkeysctl key list shows them"}
		}),
	}
}

func showKey(c *connection, k client.Key) error {
	if c.json {
		return printJSON(c.out, k)
	}
	all := []field{
		{"key", k.ID}, {"organization", k.Org}, {"scope", k.Scope}, {"enrollment", k.Enrollment}, {"fingerprint", k.Fingerprint}, {"created", instant(k.Created)},
		{"last used", instant(k.LastUsed)}, {"delivery", deliveryOf(k)},
	}
	for _, n := range k.Nodes {
		has := "may have it"
		if n.Confirmed {
			has = "has signed with it"
		}
		all = append(all, field{"node", n.NodeIP + ", " + has})
	}
	if err := fields(c.out, all...); err != nil {
		return err
	}
	public, err := publicPEM(k.PublicKey)
	if err != nil {
		return err
	}
	_, err = c.out.Write(public)
	return err
}

func newKeyDelete(s *settings) *cobra.Command {
	var all string
	cmd := &cobra.Command{
		Use: "delete ID...", Short: "Delete keys: no node can use them from then on",
		Long: `Deletes keys. No request that begins after the answer can use them, on any replica.
--all ORGANIZATION deletes every organization key, revokes the enrollments for such
keys, and wants the organization's ID so that it is meant.`,
		Args: func(_ *cobra.Command, args []string) error {
			if (len(args) == 0) == (all == "") {
				return usage("key delete takes the keys' IDs, or --all ORGANIZATION")
			}
			return nil
		},
		RunE: s.connected(func(ctx context.Context, c *connection, args []string) error {
			if all != "" {
				return deleteAll(ctx, c, all)
			}
			for _, id := range args {
				if err := c.DeleteKey(ctx, c.Org, id); err != nil {
					return fmt.Errorf("key %s: %w", id, err)
				}
				if err := c.done("deleted key %s", id); err != nil {
					return err
				}
			}
			return nil
		}),
	}
	cmd.Flags().StringVar(&all, "all", "", "delete all keys of this `organization`")
	return cmd
}

func deleteAll(ctx context.Context, c *connection, named string) error {
	if named != c.Org {
		return usage("--all names organization %q, and this is about %q", named, c.Org)
	}
	if err := c.DeleteKeys(ctx, c.Org); err != nil {
		return err
	}
	return c.done("deleted all keys of organization %s", c.Org)
}

// done says what was done. Programs go by the exit code.
func (c *connection) done(format string, args ...any) error {
	if c.json {
		return nil
	}
	_, err := fmt.Fprintln(c.out, shown(fmt.Sprintf(format, args...)))
	return err
}
