package authz

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/metrics"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/topdown"
)

// The optional rules that map a token's claims, in the package orgkeys.claims.
const (
	claimsPackage = "data.orgkeys.claims"
	claimsQuery   = claimsPackage + ".caller"
)

// ErrNoIdentity: the claim rules make nothing of a token, or nothing well-formed.
var ErrNoIdentity = errors.New("the claim rules say nothing well-formed about the token")

// Token is what claim rules are told of a token whose signature was verified.
type Token struct {
	Issuer string
	Claims []byte // a JSON object
}

// Identity is what claim rules make of a token.
type Identity struct {
	Organization string
	Roles        []Role // by their canonical names; may be empty
	Subject      string // empty: as the settings say
	Audience     string // the audience of a token without "aud"; empty: none
}

// The names of the fields of the claim rules' input and answer.
var (
	issuerField       = ast.StringTerm("issuer")
	claimsField       = ast.StringTerm("claims")
	organizationField = ast.StringTerm("organization")
	audienceField     = ast.StringTerm("audience")
)

// HasClaimRules reports whether the policy maps claims.
func (p *Policy) HasClaimRules() bool { return p.claims != nil }

// HasClaimRules reports whether the current policy maps claims.
func (d *Directory) HasClaimRules() bool { return d.current.Load().HasClaimRules() }

// MapClaims maps claims by the current policy; see Policy.MapClaims.
func (d *Directory) MapClaims(ctx context.Context, t Token) (Identity, error) {
	return d.current.Load().MapClaims(ctx, t)
}

// MapClaims returns what the rules make of t. They have the limits of decisions.
// The error wraps ErrNoIdentity if they make nothing of it, and ErrTimeLimit.
func (p *Policy) MapClaims(ctx context.Context, t Token) (Identity, error) {
	if p.claims == nil {
		return Identity{}, ErrNoIdentity
	}
	claims, err := ast.ValueFromReader(bytes.NewReader(t.Claims))
	if err != nil {
		return Identity{}, fmt.Errorf("%w: reading the claims: %w", ErrNoIdentity, err)
	}
	input := ast.NewObject(ast.Item(issuerField, ast.StringTerm(t.Issuer)), ast.Item(claimsField, ast.NewTerm(claims)))
	var identity Identity
	for range attempts {
		if identity, err = p.mapOnce(ctx, input); !errors.Is(err, ErrTimeLimit) {
			break
		}
	}
	return identity, err
}

func (p *Policy) mapOnce(ctx context.Context, input ast.Value) (Identity, error) {
	cancel := topdown.NewCancel()
	defer time.AfterFunc(limit, cancel.Cancel).Stop()
	results, err := p.claims.Eval(ctx, rego.EvalParsedInput(input), rego.EvalExternalCancel(cancel), rego.EvalMetrics(metrics.NoOp()))
	switch {
	case cancel.Cancelled():
		return Identity{}, fmt.Errorf("%w: %w: more than %s", ErrNoIdentity, ErrTimeLimit, limit)
	case err != nil:
		return Identity{}, fmt.Errorf("%w: %w", ErrNoIdentity, err)
	case len(results) != 1 || len(results[0].Expressions) != 1:
		return Identity{}, fmt.Errorf("%w: %s is undefined", ErrNoIdentity, claimsQuery)
	}
	identity, err := parseIdentity(results[0].Expressions[0].Value)
	if err != nil {
		return Identity{}, fmt.Errorf("%w: %w", ErrNoIdentity, err)
	}
	return identity, nil
}

// parseIdentity reads the rules' answer: an object of organization and roles,
// and optionally
// subject and audience. An unknown field is an error.
func parseIdentity(answer any) (Identity, error) {
	object, ok := answer.(ast.Object)
	if !ok {
		return Identity{}, errors.New("want an object of organization and roles")
	}
	org, okOrg := field[ast.String](object, organizationField)
	roles, okRoles := parseRoles(object.Get(rolesField))
	if !okOrg || org == "" || !okRoles {
		return Identity{}, errors.New("want a non-empty string organization, and roles: an array or set of OWNER, ADMINISTRATOR, WORKSPACES, BILLING, USER")
	}
	identity := Identity{Organization: string(org), Roles: roles}
	known := 2
	for name, to := range map[*ast.Term]*string{subjectField: &identity.Subject, audienceField: &identity.Audience} {
		if object.Get(name) == nil {
			continue
		}
		value, ok := field[ast.String](object, name)
		if !ok || value == "" {
			return Identity{}, fmt.Errorf("%s is not a non-empty string", name)
		}
		*to = string(value)
		known++
	}
	if object.Len() != known {
		return Identity{}, errors.New("want no other fields than organization, roles, subject and audience")
	}
	return identity, nil
}

func parseRoles(term *ast.Term) (roles []Role, ok bool) {
	if term == nil {
		return nil, false
	}
	var members []*ast.Term
	switch v := term.Value.(type) {
	case *ast.Array:
		v.Foreach(func(m *ast.Term) { members = append(members, m) })
	case ast.Set:
		members = v.Slice()
	default:
		return nil, false
	}
	for _, m := range members {
		name, isString := m.Value.(ast.String)
		role, known := ParseRole(string(name))
		if !isString || !known {
			return nil, false
		}
		if !slices.Contains(roles, role) {
			roles = append(roles, role)
		}
	}
	return roles, true
}

// refuseAnybody tests the rules with tokens without claims: rules that accept one would
// accept any token.
func (p *Policy) refuseAnybody(ctx context.Context) error {
	if p.claims == nil {
		return nil
	}
	for _, claims := range []string{`{}`, `{"sub":"canary","aud":"canary"}`} {
		if _, err := p.MapClaims(ctx, Token{Issuer: "https://canary.invalid", Claims: []byte(claims)}); err == nil {
			return fmt.Errorf("%w: %s makes a caller of a token whose claims are %s; make one only where input.issuer and input.claims are as you expect", ErrUnsafe, claimsQuery, claims)
		}
	}
	return nil
}
