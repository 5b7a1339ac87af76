package authn

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/org"
)

// maxText bounds the subject, name and email, in bytes.
const maxText = 256

// latestDate is the last second of the year 9999. A NumericDate beyond it is
// no date but an attempt at an overflow.
const latestDate = 253402300799

type claimSet map[string]jsontext.Value

// examination is one token on its way through the checks.
type examination struct {
	verifier *Verifier
	issuers  []Issuer // in force when it began
	compact  string

	token    token
	claims   claimSet
	issuer   *Issuer
	identity *authz.Identity // what claims.rego makes of the token; nil where the settings say
	caller   authz.Caller
}

func (v *Verifier) examine(compact string) *examination {
	return &examination{verifier: v, issuers: *v.issuers.Load(), compact: compact}
}

// check is one condition that tokens meet.
type check struct {
	name string
	run  func(*examination, context.Context) error
}

// checks, in the order in which tokens pass them. It is read only.
var checks = []check{
	{"form", (*examination).checkForm},
	{"claims", (*examination).checkClaims},
	{"issuer", (*examination).checkIssuer},
	{"signature", (*examination).checkSignature},
	{"time", (*examination).checkTime},
	{"binding", (*examination).checkBinding},
	{"rules", (*examination).applyRules},
	{"audience", (*examination).checkAudience},
	{"subject", (*examination).checkSubject},
	{"actor", (*examination).checkActor},
	{"organization", (*examination).checkOrganization},
	{"role", (*examination).readRoles},
}

func (x *examination) checkForm(context.Context) (err error) {
	x.token, err = parseToken(x.compact)
	return err
}

func (x *examination) checkClaims(context.Context) error {
	if json.Unmarshal(x.token.payload, &x.claims) != nil {
		return refused(ReasonClaims)
	}
	return nil
}

// checkIssuer finds the issuer whose keys and settings apply. The claims are
// trusted once the signature has been verified with these keys.
func (x *examination) checkIssuer(context.Context) error {
	name, ok := text(x.claims["iss"])
	at := slices.IndexFunc(x.issuers, func(i Issuer) bool { return ok && i.Name == name })
	if at < 0 {
		return refused(ReasonIssuer)
	}
	x.issuer = &x.issuers[at]
	return nil
}

func (x *examination) checkSignature(ctx context.Context) error {
	return x.issuer.Keys.verify(ctx, x.token)
}

// checkTime judges exp, which is required, and nbf and iat, which are not
// (RFC 7519, section 4.1).
func (x *examination) checkTime(context.Context) error {
	now := x.verifier.now()
	expiry, ok := numericDate(x.claims["exp"])
	if !ok {
		return refused(ReasonClaims)
	}
	if !now.Before(expiry) {
		return refused(ReasonExpired)
	}
	for _, name := range []string{"nbf", "iat"} {
		value, ok := x.claims[name]
		if !ok {
			continue
		}
		start, ok := numericDate(value)
		if !ok {
			return refused(ReasonClaims)
		}
		if now.Add(Leeway).Before(start) {
			return refused(ReasonNotYetValid)
		}
	}
	return nil
}

// checkBinding refuses a token that its holder must prove to be theirs (RFC
// 7800; by mutual TLS, RFC 8705, or DPoP, RFC 9449): without that proof, whoever stole it could use it.
func (x *examination) checkBinding(context.Context) error {
	if _, bound := x.claims["cnf"]; bound {
		return refused(ReasonBound)
	}
	return nil
}

// applyRules asks claims.rego, where there is one.
func (x *examination) applyRules(ctx context.Context) error {
	rules := x.verifier.rules
	if rules == nil || !rules.HasClaimRules() {
		return nil
	}
	identity, err := rules.MapClaims(ctx, authz.Token{Issuer: x.issuer.Name, Claims: x.token.payload})
	if errors.Is(err, authz.ErrTimeLimit) {
		return fmt.Errorf("mapping the claims: %w", err)
	}
	if err != nil {
		return refused(ReasonClaims)
	}
	x.identity = &identity
	return nil
}

// checkAudience requires aud to be or to contain one of the issuer's audiences. Of
// a token without aud, claims.rego may say whom it is for.
func (x *examination) checkAudience(context.Context) error {
	aud, present := x.claims["aud"]
	if !present && x.identity != nil && slices.Contains(x.issuer.Audiences, x.identity.Audience) {
		return nil
	}
	values := []jsontext.Value{aud}
	if aud.Kind() == '[' {
		values = list(aud)
	}
	found := false
	for _, value := range values {
		one, ok := text(value)
		if !ok {
			return refused(ReasonAudience)
		}
		found = found || slices.Contains(x.issuer.Audiences, one)
	}
	if !found {
		return refused(ReasonAudience)
	}
	return nil
}

func (x *examination) checkSubject(context.Context) error {
	subject, ok := text(x.claims.at(x.issuer.Mapping.Subject))
	if x.identity != nil && x.identity.Subject != "" {
		subject, ok = x.identity.Subject, true
	}
	if !ok || !isPlain(subject) {
		return refused(ReasonSubject)
	}
	if x.caller.Subject, ok = x.named(subject); !ok {
		return refused(ReasonSubject)
	}
	x.caller.Kind = authz.Person
	// These two are only shown to people: a token is valid without them.
	x.caller.Name, _ = x.claims.text("name")
	x.caller.Email, _ = x.claims.text("email")
	return nil
}

// checkActor reads who acts for the subject (RFC 8693, section 4.1). Earlier
// actors, nested in it, are informational there and left out here.
func (x *examination) checkActor(context.Context) error {
	act, delegated := x.claims["act"]
	if !delegated {
		return nil
	}
	actor, ok := claimSet(members(act)).text("sub")
	if !ok || act.Kind() != '{' {
		return refused(ReasonSubject)
	}
	if x.caller.ActedBy, ok = x.named(actor); !ok {
		return refused(ReasonSubject)
	}
	return nil
}

func (x *examination) checkOrganization(context.Context) error {
	named, ok := organization(x.claims.at(x.issuer.Mapping.Organization))
	if x.identity != nil {
		named, ok = x.identity.Organization, true
	}
	own, err := org.Parse(named)
	if !ok || err != nil || !x.issuer.maySpeakFor(own) {
		return refused(ReasonOrganization)
	}
	x.caller.Org = own
	return nil
}

// readRoles refuses nobody: a caller without a role is known, and allowed nothing.
func (x *examination) readRoles(context.Context) error {
	if x.identity != nil {
		x.caller.Roles = x.identity.Roles
		return nil
	}
	x.caller.Roles = x.issuer.Mapping.roles(x.claims.at(x.issuer.Mapping.Role), string(x.caller.Org))
	return nil
}

// numericDate reads seconds since 1970, which may have a fraction (RFC 7519,
// section 2), to the millisecond.
func numericDate(v jsontext.Value) (time.Time, bool) {
	if v.Kind() != '0' {
		return time.Time{}, false
	}
	seconds, err := strconv.ParseFloat(string(v), 64)
	if err != nil || seconds < 0 || seconds > latestDate {
		return time.Time{}, false
	}
	return time.UnixMilli(int64(seconds * 1000)), true
}

// text returns a claim that is a non-empty string of at most maxText bytes
// without control or bidirectional characters, which could forge log lines or
// change how a line reads.
func (c claimSet) text(name string) (string, bool) {
	s, ok := text(c[name])
	if !ok || !isPlain(s) {
		return "", false
	}
	return s, true
}

func isPlain(s string) bool {
	if s == "" || len(s) > maxText || !utf8.ValidString(s) {
		return false
	}
	for _, r := range s {
		if unicode.In(r, unicode.Cc, unicode.Zl, unicode.Zp, unicode.Bidi_Control) {
			return false
		}
	}
	return true
}
