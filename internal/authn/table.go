package authn

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/org"
)

// anyOrganization lets an issuer of the file speak for every organization.
const anyOrganization = "*"

// IssuerConfig is one issuer as the file of issuers describes it, or the
// settings for a single one. docs/identity/README.md describes the file.
type IssuerConfig struct {
	Issuer        string            `json:"issuer"`
	Audiences     []string          `json:"audiences"`
	Organizations []string          `json:"organizations"` // "*" alone: any
	JWKS          string            `json:"jwks"`          // empty: found through the issuer
	JWKSCAFile    string            `json:"jwksCaFile"`
	ClaimSubject  string            `json:"claimSubject"`
	ClaimOrg      string            `json:"claimOrg"`
	ClaimRole     string            `json:"claimRole"`
	RoleMap       map[string]string `json:"roleMap"`
	RoleDefault   string            `json:"roleDefault"`
	SubjectPrefix string            `json:"subjectPrefix"`
}

// Configured returns the issuers that the settings name: those of the file, or
// the single one. Errors name the setting.
func Configured(c config.Config) ([]IssuerConfig, error) {
	if c.IssuersFile != "" {
		issuers, err := readIssuers(c.IssuersFile)
		if err != nil {
			return nil, fmt.Errorf("ORGKEYS_ISSUERS_FILE: %w", err)
		}
		return issuers, nil
	}
	single := IssuerConfig{
		Issuer: c.Issuer, Audiences: []string{c.Audience}, Organizations: []string{anyOrganization},
		JWKS: c.JWKS, JWKSCAFile: c.JWKSCAFile,
		ClaimSubject: c.ClaimSubject, ClaimOrg: c.ClaimOrg, ClaimRole: c.ClaimRole, RoleDefault: c.RoleDefault,
	}
	if c.RoleMap != "" {
		var err error
		if single.RoleMap, err = parseRoleMap(c.RoleMap); err != nil {
			return nil, fmt.Errorf("ORGKEYS_ROLE_MAP: %w", err)
		}
	}
	return []IssuerConfig{single}, nil
}

// Open opens the issuers and the key sets of all of them. Interval and log are
// those of KeySetConfig.
func Open(issuers []IssuerConfig, interval time.Duration, log *slog.Logger) ([]Issuer, error) {
	return open(issuers, nil, interval, log)
}

// open is Open, except that an issuer of there whose keys are at the same place keeps its key set.
func open(issuers []IssuerConfig, there []Issuer, interval time.Duration, log *slog.Logger) ([]Issuer, error) {
	var opened []Issuer
	for _, c := range issuers {
		i, err := c.open(there, interval, log)
		if err != nil {
			return nil, fmt.Errorf("issuer %s: %w", c.Issuer, err)
		}
		opened = append(opened, i)
	}
	return opened, checkIssuers(opened)
}

// IsRemote reports whether the issuer's keys come from a server, and not from a file.
func (c IssuerConfig) IsRemote() bool { return c.JWKS == "" || isURL(c.JWKS) }

// hasKeysOf reports whether both have the same key set.
func (c IssuerConfig) hasKeysOf(o IssuerConfig) bool {
	return c.Issuer == o.Issuer && c.JWKS == o.JWKS && c.JWKSCAFile == o.JWKSCAFile
}

func (c IssuerConfig) open(there []Issuer, interval time.Duration, log *slog.Logger) (Issuer, error) {
	mapping, err := c.mapping()
	if err != nil {
		return Issuer{}, err
	}
	var keys *KeySet
	if at := slices.IndexFunc(there, func(i Issuer) bool { return c.hasKeysOf(i.described) }); at >= 0 {
		keys = there[at].Keys
	} else if keys, err = OpenKeySet(c.JWKS, KeySetConfig{Interval: interval, Log: log, CAFile: c.JWKSCAFile, Issuer: c.Issuer}); err != nil {
		return Issuer{}, fmt.Errorf("opening its keys (ORGKEYS_JWKS, or jwks in the file of issuers, is a URL or a file): %w", err)
	}
	organizations, err := c.organizations()
	if err != nil {
		return Issuer{}, err
	}
	i := Issuer{Name: c.Issuer, Audiences: c.Audiences, Keys: keys, Mapping: mapping, Organizations: organizations, SubjectPrefix: c.SubjectPrefix, described: c}
	return i, i.check()
}

// organizations are those that the issuer may speak for; nil: any.
func (c IssuerConfig) organizations() ([]org.ID, error) {
	if slices.Equal(c.Organizations, []string{anyOrganization}) {
		return nil, nil
	}
	ids := []org.ID{}
	for _, name := range c.Organizations {
		id, err := org.Parse(name)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", name, err)
		}
		ids = append(ids, id)
	}
	return ids, nil
}

func (c IssuerConfig) mapping() (Mapping, error) {
	defaults := DefaultMapping()
	m := Mapping{
		Subject:      cmp.Or(c.ClaimSubject, defaults.Subject),
		Organization: cmp.Or(c.ClaimOrg, defaults.Organization),
		Role:         cmp.Or(c.ClaimRole, defaults.Role),
	}
	if c.RoleMap != nil {
		m.RoleMap = map[string]authz.Role{}
	}
	for value, name := range c.RoleMap {
		role, ok := authz.ParseRole(name)
		if !ok {
			return Mapping{}, fmt.Errorf("the role map: %w", unknownRole(name))
		}
		m.RoleMap[value] = role
	}
	if c.RoleDefault != "" {
		role, ok := authz.ParseRole(c.RoleDefault)
		if !ok {
			return Mapping{}, fmt.Errorf("the default role: %w", unknownRole(c.RoleDefault))
		}
		m.RoleDefault = role
	}
	return m, m.check()
}

func unknownRole(name string) error {
	return fmt.Errorf("%q is none of OWNER, ADMINISTRATOR, WORKSPACES, BILLING, USER", name)
}

// readIssuers reads the file of issuers: a JSON object with a list "issuers".
func readIssuers(path string) ([]IssuerConfig, error) {
	b, err := readGuarded(path)
	if err != nil {
		return nil, err
	}
	return parseIssuers(path, b)
}

func parseIssuers(path string, b []byte) ([]IssuerConfig, error) {
	var file struct {
		Issuers []IssuerConfig `json:"issuers"`
	}
	if err := json.Unmarshal(b, &file, json.RejectUnknownMembers(true)); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if len(file.Issuers) == 0 {
		return nil, fmt.Errorf("%s has no issuers", path)
	}
	for _, c := range file.Issuers {
		if len(c.Organizations) == 0 {
			return nil, fmt.Errorf(`%s: issuer %s: say in "organizations" for which ones it may speak, or ["*"] for all`, path, c.Issuer)
		}
	}
	return file.Issuers, nil
}

// parseRoleMap reads a role map as the setting writes it: value=ROLE, separated by
// commas. A value may hold = but no comma; the file of issuers has room for those.
func parseRoleMap(s string) (map[string]string, error) {
	parsed := map[string]string{}
	for _, item := range strings.Split(s, ",") {
		item = strings.TrimSpace(item)
		at := strings.LastIndex(item, "=")
		if at < 1 {
			return nil, errors.New("is not of the form value=ROLE,value=ROLE")
		}
		value := item[:at]
		if _, twice := parsed[value]; twice {
			return nil, fmt.Errorf("%q is given twice", value)
		}
		parsed[value] = item[at+1:]
	}
	return parsed, nil
}
