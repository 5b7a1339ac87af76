package main

import (
	"context"
	"errors"
	"strings"

	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/client"
)

func newCanI(s *settings) *cobra.Command {
	return &cobra.Command{
		Use: "can-i ACTION", Short: "Ask what the policy would say to you, and have nothing done",
		Long: `Asks the server's policy whether you may do something, and why, and has nothing done.
The actions are those of the policy, such as orgkey.generate, enrollment.create,
node.delete, secret.put and event.read. The exit code is 0 for yes and 1 for no.`,
		Args: cobra.ExactArgs(1),
		RunE: s.connected(func(ctx context.Context, c *connection, args []string) error {
			d, err := c.AskPolicy(ctx, c.Org, args[0])
			if stranger, ok := errors.AsType[*client.Error](err); ok && errors.Is(err, client.OtherOrganization) {
				d, err = &client.Decision{Action: args[0], Org: c.Org, Reason: string(stranger.Code)}, nil
			}
			if err != nil {
				return err
			}
			if err := showDecision(c, d); err != nil || d.Allow {
				return err
			}
			return &failure{exit: exitNo, what: "no: " + d.Reason}
		}),
	}
}

func showDecision(c *connection, d *client.Decision) error {
	if c.json {
		return printJSON(c.out, d)
	}
	answer := "no"
	if d.Allow {
		answer = "yes"
	}
	return fields(c.out, field{"answer", answer}, field{"reason", d.Reason}, field{"scope", d.Scope}, field{"action", d.Action},
		field{"organization", d.Org}, field{"subject", d.Subject}, field{"roles", strings.Join(d.Roles, ", ")}, field{"policy", d.Policy})
}
