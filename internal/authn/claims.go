package authn

import (
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

// caller judges the claims of a verified token. Every check fails closed on a
// value of the wrong JSON type.
func (v *Verifier) caller(payload []byte) (authz.Caller, error) {
	var claims claimSet
	if json.Unmarshal(payload, &claims) != nil {
		return authz.Caller{}, refused(ReasonClaims)
	}
	if issuer, ok := text(claims["iss"]); !ok || issuer != v.config.Issuer {
		return authz.Caller{}, refused(ReasonIssuer)
	}
	if !claims.isFor(v.config.Audience) {
		return authz.Caller{}, refused(ReasonAudience)
	}
	if err := claims.checkTime(v.now()); err != nil {
		return authz.Caller{}, err
	}
	subject, okSubject := claims.text("sub")
	named, okOrg := text(claims[v.config.ClaimOrg])
	own, err := org.Parse(named)
	roles, okRoles := parseRoles(claims[v.config.ClaimRole])
	if !okSubject || !okOrg || !okRoles || err != nil {
		return authz.Caller{}, refused(ReasonClaims)
	}
	// These two are for people's eyes: a token is good without them.
	name, _ := claims.text("name")
	email, _ := claims.text("email")
	return authz.Caller{
		Kind: authz.Person, Subject: subject, Org: own, Roles: roles, Name: name, Email: email,
	}, nil
}

// isFor reports whether aud, a string or a list of strings, has audience in it.
func (c claimSet) isFor(audience string) bool {
	aud := c["aud"]
	if aud.Kind() != '[' {
		one, ok := text(aud)
		return ok && one == audience
	}
	var list []jsontext.Value
	if json.Unmarshal(aud, &list) != nil {
		return false
	}
	found := false
	for _, member := range list {
		one, ok := text(member)
		if !ok {
			return false
		}
		found = found || one == audience
	}
	return found
}

// checkTime judges exp, which is required, and nbf and iat, which are not
// (RFC 7519, section 4.1).
func (c claimSet) checkTime(now time.Time) error {
	expiry, ok := numericDate(c["exp"])
	if !ok {
		return refused(ReasonClaims)
	}
	if !now.Before(expiry) {
		return refused(ReasonExpired)
	}
	for _, name := range []string{"nbf", "iat"} {
		value, ok := c[name]
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

// parseRoles reads a role or a non-empty list of roles, each once.
func parseRoles(v jsontext.Value) ([]authz.Role, bool) {
	values := []jsontext.Value{v}
	if v.Kind() == '[' && json.Unmarshal(v, &values) != nil {
		return nil, false
	}
	var roles []authz.Role
	for _, value := range values {
		role, ok := parseRole(value)
		if !ok {
			return nil, false
		}
		if !slices.Contains(roles, role) {
			roles = append(roles, role)
		}
	}
	return roles, len(roles) > 0
}

// parseRole reads a role's name or integer. The integer must be spelled as
// one: 254.0, 2.54e2 and -0 are numbers that other readers may take otherwise.
func parseRole(v jsontext.Value) (authz.Role, bool) {
	switch v.Kind() {
	case '"':
		name, ok := text(v)
		if !ok {
			return "", false
		}
		return authz.ParseRole(name)
	case '0':
		n, err := strconv.ParseUint(string(v), 10, 31)
		if err != nil {
			return "", false
		}
		return authz.RoleFromInteger(int64(n))
	default:
		return "", false
	}
}
