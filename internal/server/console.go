package server

import (
	"cmp"
	"fmt"
	"log/slog"
	"net/http"

	"github.com/orgkeys/orgkeys/internal/api"
	"github.com/orgkeys/orgkeys/internal/authn"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/console"
	"github.com/orgkeys/orgkeys/internal/login"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// newConsole returns what makes the console, or nil where there is none.
func newConsole(cfg config.Config, version string, tokens *authn.Verifier, failures *authn.Failures, proxies api.Proxies, p policy, db *sqlstore.DB, log *slog.Logger) (func(http.Handler) http.Handler, error) {
	if !cfg.HasConsole() {
		return nil, nil
	}
	provider, err := consoleProvider(cfg)
	if err != nil {
		return nil, err
	}
	c, err := console.New(console.Config{
		Authenticate: tokens.Authenticate, Unauthenticated: failures.Count, Policy: p, Sessions: db,
		Client: proxies.Client, Shared: proxies.Shared,
		URL: cfg.ConsoleURL, Provider: provider, Version: version, Log: log,
	})
	if err != nil {
		return nil, err
	}
	return c.Asking, nil
}

// consoleProvider is where people sign in; nil with the development issuer.
func consoleProvider(cfg config.Config) (*login.Web, error) {
	if cfg.Development() {
		return nil, nil
	}
	issuer, caFile := cmp.Or(cfg.ConsoleIssuer, cfg.Issuer), cfg.JWKSCAFile
	if cfg.IssuersFile != "" {
		issuers, err := authn.Configured(cfg)
		if err != nil {
			return nil, err
		}
		known := false
		for _, one := range issuers {
			if one.Issuer == issuer {
				known, caFile = true, one.JWKSCAFile
			}
		}
		if !known {
			return nil, fmt.Errorf("ORGKEYS_CONSOLE_ISSUER: %s is not one of ORGKEYS_ISSUERS_FILE", issuer)
		}
	}
	return &login.Web{
		Provider: login.Provider{
			Issuer: issuer, ClientID: cfg.ConsoleClientID, Resource: cfg.ConsoleResource, Audience: cfg.ConsoleAudience,
			Scopes: cfg.ConsoleScopes, CAFile: caFile,
		},
		Secret: cfg.ConsoleClientSecret, Redirect: cfg.ConsoleURL + "/console/callback",
	}, nil
}
