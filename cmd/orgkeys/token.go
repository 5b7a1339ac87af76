package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/server"
)

func newToken() *cobra.Command {
	var name, subject string
	var roles []string
	var ttl time.Duration
	cmd := &cobra.Command{
		Use:   "token --org ORG --role ROLE",
		Short: "Print a token of the development issuer",
		Long: `Prints a bearer token of the development issuer, whose key is in the data
directory. Such tokens work only with a server that uses the same data
directory, listens on a loopback address, and has no ORGKEYS_ISSUER.`,
		Example: `  orgkeys token --org acme --role OWNER
  curl -H "Authorization: Bearer $(orgkeys token --org acme --role OWNER)" http://127.0.0.1:3000/organization/acme/key`,
		Args: cobra.NoArgs,
		RunE: configured(func(cmd *cobra.Command, cfg config.Config, _ []string) error {
			id, err := org.Parse(name)
			if err != nil {
				return fmt.Errorf("--org: %w", err)
			}
			parsed, err := parseRoles(roles)
			if err != nil {
				return err
			}
			token, err := server.IssueToken(cfg, subject, id, parsed, ttl)
			if err != nil {
				return err
			}
			return say(cmd, "%s\n", token)
		}),
	}
	cmd.AddCommand(newTokenExplain())
	cmd.Flags().StringVar(&name, "org", "", "the organization's ID")
	cmd.Flags().StringSliceVar(&roles, "role", nil, "OWNER, ADMINISTRATOR, WORKSPACES, BILLING or USER; may be given more than once")
	cmd.Flags().StringVar(&subject, "subject", "dev", "the caller's ID")
	cmd.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long the token is valid")
	for _, flag := range []string{"org", "role"} {
		if err := cmd.MarkFlagRequired(flag); err != nil {
			panic(err) // the flag is defined above
		}
	}
	return cmd
}

func parseRoles(names []string) ([]authz.Role, error) {
	var roles []authz.Role
	for _, name := range names {
		role, ok := authz.ParseRole(strings.TrimSpace(name))
		if !ok {
			return nil, fmt.Errorf("--role: %q is none of OWNER, ADMINISTRATOR, WORKSPACES, BILLING, USER", name)
		}
		roles = append(roles, role)
	}
	return roles, nil
}
