package server

import (
	"fmt"
	"time"

	"github.com/orgkeys/orgkeys/internal/authn"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/org"
)

// IssueToken makes a token of the development issuer, where cfg has no other.
func IssueToken(cfg config.Config, subject string, id org.ID, roles []authz.Role, ttl time.Duration) (string, error) {
	if !cfg.Development() && cfg.IssuersFile != "" {
		return "", fmt.Errorf("ORGKEYS_ISSUERS_FILE is %s: tokens come from the issuers there", cfg.IssuersFile)
	}
	if !cfg.Development() {
		return "", fmt.Errorf("ORGKEYS_ISSUER is %s: tokens come from there", cfg.Issuer)
	}
	dir, err := MakeDataDir(cfg.DataDir)
	if err != nil {
		return "", err
	}
	issuer, err := authn.OpenDevIssuer(dir)
	if err != nil {
		return "", err
	}
	return issuer.Issue(subject, id, roles, ttl)
}
