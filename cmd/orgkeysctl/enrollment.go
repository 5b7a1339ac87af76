package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/client"
)

func newEnrollment(s *settings) *cobra.Command {
	cmd := &cobra.Command{Use: "enrollment", Short: "Permissions for nodes to fetch keys of their own: create, list, show, approve, revoke"}
	cmd.AddCommand(newEnrollmentCreate(s), newEnrollmentList(s), newEnrollmentShow(s), newEnrollmentApprove(s), newEnrollmentRevoke(s))
	return cmd
}

func newEnrollmentCreate(s *settings) *cobra.Command {
	t := client.Terms{}
	var out, form string
	cmd := &cobra.Command{
		Use: "create", Short: "Permit a node to fetch a key of its own, with a token that is shown once",
		Long: `Permits a node to fetch a key of its own, with a token that is shown this once, or
written to a file with --token-out. Whoever has the token before the node does gets
the key: "orgkeysctl enrollment show" says who claimed it.

--for prints how to bring the token to the machine instead of a table: shell (to paste
there), cloud-init (user data), or systemd (the token as a credential of
orgkeys-node.service). The address and region of the node are left for you to say.`,
		Args: cobra.NoArgs,
		RunE: s.connected(func(ctx context.Context, c *connection, _ []string) error {
			write, known := snippets[form]
			if !known {
				return usage("--for is one of shell, cloud-init and systemd")
			}
			if out != "" && form != "" {
				return usage("--for and --token-out exclude each other: the snippet holds the token")
			}
			// The API takes 0 of either for its default.
			if t.Life < time.Second || t.Life%time.Second != 0 {
				return usage("--life is in whole seconds, from 1m to 720h")
			}
			if t.Uses < 1 {
				return usage("--uses is 1 to 1000")
			}
			return createEnrollment(ctx, c, t, out, write)
		}),
	}
	f := cmd.Flags()
	f.StringVar(&t.Scope, "scope", "node", "what the key speaks for: node or organization")
	f.StringVar(&t.Origin, "origin", "backend", "who makes the key: backend, or node, which sends only its public half")
	f.StringVar(&t.EK, "ek", "", "the only TPM that may claim it: the `name` that orgkeys-node ek prints")
	f.BoolVar(&t.TPM, "tpm", false, "let only TPMs claim it that the organization allows (device allow)")
	f.IntVar(&t.Uses, "uses", 1, "`number` of nodes that the token lets in, up to 1000: a thief can hide among several")
	f.DurationVar(&t.Life, "life", 24*time.Hour, "how long it may be claimed, a `duration` from 1m to 720h")
	f.StringVar(&t.Recipient, "recipient", "", "the only recipient that may claim it: the hex `SHA-256` of its public key")
	f.BoolVar(&t.Approval, "approval", false, "have each claim wait for enrollment approve")
	f.StringVar(&t.IP, "ip", "", "the only `address` that the node may register with at first")
	f.StringVar(&t.Note, "note", "", "a `text` for people")
	f.StringVar(&out, "token-out", "", "write the token to this new `file`, which nobody else may read, and do not show it")
	f.StringVar(&form, "for", "", "print how to use the token: shell, cloud-init or systemd")
	return cmd
}

func createEnrollment(ctx context.Context, c *connection, t client.Terms, out string, write printSnippet) error {
	store := func([]byte) error { return nil }
	if out != "" {
		file, err := newFile(out, rand.Text())
		if err != nil {
			return err
		}
		defer file.Discard()
		store = file.Write
	}
	minted, err := c.CreateEnrollment(ctx, c.Org, t)
	if err != nil {
		if !nothingCameOfIt(err) {
			c.warn(`there may be an enrollment now whose token nobody has: "orgkeysctl enrollment list" shows it, revoke it`)
		}
		return err
	}
	defer clear(minted.Token)
	if err := store(minted.Token); err != nil {
		return &failure{exitCannotWrite, "writing the token", "nobody has it now: revoke enrollment " + minted.ID, err}
	}
	switch {
	case write != nil:
		return write(c.out, c.server, minted)
	case c.json:
		return printJSON(c.out, withToken(minted, out))
	}
	token := field{"token", string(minted.Token)}
	if out != "" {
		token = field{"token", "in " + out}
	}
	return showPermission(c, minted.Permission, token)
}

// withToken is an enrollment for programs, with its token unless that is in a file.
func withToken(minted *client.MintedPermission, out string) any {
	v := struct {
		client.Permission
		Token string `json:"token,omitempty"`
	}{Permission: minted.Permission}
	if out == "" {
		v.Token = string(minted.Token)
	}
	return v
}

func newEnrollmentList(s *settings) *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List enrollments, newest first", Args: cobra.NoArgs,
		RunE: s.connected(func(ctx context.Context, c *connection, _ []string) error {
			all, err := c.Permissions(ctx, c.Org)
			if err != nil {
				return err
			}
			if c.json {
				return printJSON(c.out, all)
			}
			var rows [][]string
			for _, p := range all {
				rows = append(rows, []string{p.ID, p.State, p.Scope, fmt.Sprintf("%d of %d", max(p.Claimed, len(p.Claims)), p.Uses), strconv.Itoa(p.Conflicts), instant(p.Created), instant(p.Expires), p.Note})
			}
			return table(c.out, []string{"ID", "STATE", "SCOPE", "CLAIMED", "CONFLICTS", "CREATED", "EXPIRES", "NOTE"}, rows, "no enrollments")
		}),
	}
}

func newEnrollmentShow(s *settings) *cobra.Command {
	return &cobra.Command{
		Use: "show ID", Short: "Show an enrollment, and who claimed it", Args: cobra.ExactArgs(1),
		RunE: s.connected(func(ctx context.Context, c *connection, args []string) error {
			p, err := c.Permission(ctx, c.Org, args[0])
			if err != nil {
				return err
			}
			if c.json {
				return printJSON(c.out, p)
			}
			return showPermission(c, *p)
		}),
	}
}

func showPermission(c *connection, p client.Permission, more ...field) error {
	all := append([]field{{"enrollment", p.ID}, {"organization", p.Org}}, more...)
	all = append(all, field{"state", p.State}, field{"scope", p.Scope}, field{"uses", strconv.Itoa(p.Uses)})
	if p.Origin != "backend" {
		all = append(all, field{"origin", p.Origin})
	}
	if p.Bind != nil {
		all = append(all, field{"recipient", p.Bind.Recipient}, field{"tpm", p.Bind.EK})
		if p.Bind.TPM {
			all = append(all, field{"tpm", "any that is allowed"})
		}
	}
	if p.Approval {
		all = append(all, field{"approval", "each claim waits for it"})
	}
	all = append(all, field{"address", p.IP}, field{"note", p.Note}, field{"created", instant(p.Created)}, field{"expires", instant(p.Expires)},
		field{"revoked", instant(p.Revoked)}, field{"warning", p.Warning})
	if p.Conflicts > 0 {
		all = append(all, field{"conflicts", strconv.Itoa(p.Conflicts) + ": somebody else has the token, or a disk was cloned; revoke it, and find out"})
	}
	for _, recipient := range p.Refused {
		all = append(all, field{"refused", recipient})
	}
	if err := fields(c.out, all...); err != nil || len(p.Claims) == 0 {
		return err
	}
	var rows [][]string
	for _, claim := range p.Claims {
		rows = append(rows, []string{claim.KeyID, claim.State, claim.Address, instant(claim.Claimed), instant(claim.Received), claim.Recipient})
	}
	if _, err := fmt.Fprintln(c.out); err != nil {
		return err
	}
	return table(c.out, []string{"KEY", "STATE", "ADDRESS", "CLAIMED", "RECEIVED", "RECIPIENT"}, rows, "")
}

func newEnrollmentApprove(s *settings) *cobra.Command {
	return &cobra.Command{
		Use: "approve ID RECIPIENT", Short: "Let a claim go on, after comparing its recipient with the node's own", Args: cobra.ExactArgs(2),
		RunE: s.connected(func(ctx context.Context, c *connection, args []string) error {
			if err := c.ApproveEnrollment(ctx, c.Org, args[0], args[1]); err != nil {
				return err
			}
			return c.done("approved %s for enrollment %s", args[1], args[0])
		}),
	}
}

func newEnrollmentRevoke(s *settings) *cobra.Command {
	return &cobra.Command{
		Use: "revoke ID...", Short: "Revoke enrollments: what nobody received is withdrawn, what was received stays", Args: cobra.MinimumNArgs(1),
		RunE: s.connected(func(ctx context.Context, c *connection, args []string) error {
			for _, id := range args {
				if err := c.RevokeEnrollment(ctx, c.Org, id); err != nil {
					return fmt.Errorf("enrollment %s: %w", id, err)
				}
				if err := c.done("revoked enrollment %s", id); err != nil {
					return err
				}
			}
			return nil
		}),
	}
}
