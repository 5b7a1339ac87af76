package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"

	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/server"
)

// maxExplained is how much of standard input is read: more than any token that
// is accepted, so that one that is too long can be told so.
const maxExplained = 256 << 10

var errTokenRefused = errors.New("the server refuses this token")

func newTokenExplain() *cobra.Command {
	return &cobra.Command{
		Use:   "explain",
		Short: "Explain check by check why a token is accepted or refused",
		Long: `Reads a bearer token from standard input and runs the server's own checks on it,
with the server's settings. Each line says ok, warn, fail or skip, what was
checked, and which setting decides. The issuer's keys are fetched. The signature
is never printed, but the claims are; they may be personal data.

The exit code is 1 if the server would refuse the token (401, or 503 without the
issuer's keys).`,
		Example: `  orgkeys token explain < token
  orgkeys token --org acme --role OWNER | orgkeys token explain`,
		Args: cobra.NoArgs,
		RunE: configured(func(cmd *cobra.Command, cfg config.Config, _ []string) error {
			token, err := readToken(cmd.InOrStdin())
			if err != nil {
				return err
			}
			verifier, err := server.OpenVerifier(cmd.Context(), cfg, slog.New(slog.DiscardHandler))
			if err != nil {
				return err
			}
			findings, refusal := verifier.Explain(cmd.Context(), token, cfg.Pseudonyms)
			for _, f := range findings {
				if err := sayCheck(cmd, 12, string(f.Verdict), f.Check, f.Found, f.SettingIn(cfg)); err != nil {
					return err
				}
			}
			if refusal != nil {
				return errTokenRefused
			}
			return nil
		}),
	}
}

// readToken reads a token, alone or as an Authorization header has it.
func readToken(r io.Reader) (string, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxExplained))
	if err != nil {
		return "", fmt.Errorf("reading the token: %w", err)
	}
	defer clear(b)
	token := strings.TrimSpace(string(b))
	for _, before := range []string{"Authorization:", "Bearer"} {
		if len(token) > len(before) && strings.EqualFold(token[:len(before)], before) {
			token = strings.TrimSpace(token[len(before):])
		}
	}
	if token == "" {
		return "", errors.New("standard input is empty: orgkeys token explain < token")
	}
	return token, nil
}
