package authn

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/org"
)

// Finding is what one check makes of a token.
type Finding struct {
	Check   string
	Verdict Verdict
	Found   string // in words, with the claims that were looked at
	Setting string // that decides; empty: none
}

// Verdict is how a check ended.
type Verdict string

// The verdicts.
const (
	Passed  Verdict = "ok"
	Doubted Verdict = "warn" // the token passes, and its holder may not get what they expect
	Failed  Verdict = "fail"
	Skipped Verdict = "skip" // not looked at, because of an earlier check
)

// Explain puts a token through the checks of Authenticate, goes on after one
// that fails where that makes sense, and says what each found. The error is
// Authenticate's answer to the token. No finding holds the token's signature.
func (v *Verifier) Explain(ctx context.Context, compact string) ([]Finding, error) {
	x := v.examine(compact)
	var findings []Finding
	var first error
	over := false
	for _, c := range checks {
		if over {
			findings = append(findings, Finding{c.name, Skipped, "not looked at", ""})
			continue
		}
		err := c.run(x, ctx)
		if first == nil {
			first = err
		}
		if f := x.finding(c.name, err); f.Found != "" {
			findings = append(findings, f)
		}
		over = err != nil && x.endsWith(c.name)
	}
	return findings, first
}

// endsWith reports whether nothing can be said after a check that failed.
func (x *examination) endsWith(check string) bool {
	if check == "issuer" && len(x.issuers) == 1 {
		x.issuer = &x.issuers[0] // whom else could be meant
		return false
	}
	return check == "form" || check == "claims" || check == "issuer"
}

func (x *examination) finding(check string, err error) Finding {
	f := Finding{Check: check, Verdict: Passed}
	if err != nil {
		f.Verdict = Failed
	}
	switch check {
	case "form":
		f.Found = x.explainForm(err)
	case "claims":
		f.Found = "a JSON object without a name twice"
		if err != nil {
			f.Found = "the claims are not one JSON object in UTF-8 without a name twice"
		}
	case "issuer":
		f.Found, f.Setting = x.explainIssuer(), "ORGKEYS_ISSUER"
	case "signature":
		f.Found, f.Setting = x.explainSignature(err), "ORGKEYS_JWKS"
	case "time":
		f.Found = x.explainTime(err)
	case "binding":
		if err != nil {
			f.Found = explainBinding(x.claims["cnf"])
		}
	case "rules":
		f.Found, f.Setting = x.explainRules(err), "ORGKEYS_POLICY_DIR"
	case "audience":
		f.Found, f.Setting = x.explainAudience(err), "ORGKEYS_AUDIENCE"
	case "subject":
		f.Found, f.Setting = x.explainSubject(err), "ORGKEYS_CLAIM_SUBJECT"
	case "actor":
		f.Found = x.explainActor(err)
	case "organization":
		f.Found, f.Setting = x.explainOrganization(err), "ORGKEYS_CLAIM_ORG"
	case "role":
		f.Found, f.Setting = x.explainRoles(), "ORGKEYS_CLAIM_ROLE, ORGKEYS_ROLE_MAP and ORGKEYS_ROLE_DEFAULT"
		if len(x.caller.Roles) == 0 {
			f.Verdict = Doubted
		}
	}
	if f.Verdict == Passed {
		f.Setting = ""
	}
	return f
}

func (x *examination) explainForm(err error) string {
	if err == nil {
		return fmt.Sprintf("a signed JWT of %d bytes (at most %d), alg %s, kid %q", len(x.compact), MaxToken, x.token.algorithm, x.token.keyID)
	}
	parts := strings.Split(x.compact, ".")
	switch {
	case len(x.compact) > MaxToken:
		return fmt.Sprintf("the token has %d bytes, and at most %d are accepted: have the provider leave claims out", len(x.compact), MaxToken)
	case len(parts) == 5:
		return "the token is encrypted (JWE), and only signed ones (JWS) are accepted"
	case len(parts) != 3:
		return fmt.Sprintf("the token has %d parts and not three: it is not a JWT. If it is an opaque access token, have the provider issue JWTs", len(parts))
	}
	header, ok := decodeBase64(parts[0])
	if !ok {
		return "a part of the token is not base64url without padding"
	}
	if hasReason(err, ReasonAlgorithm) {
		return fmt.Sprintf("the header is %s: alg is none of RS, PS or ES with 256, 384 or 512, EdDSA and Ed25519", clip(string(header)))
	}
	return fmt.Sprintf("the header is %s: it needs alg, and if they are there kid as a non-empty text of at most %d bytes and typ as JWT, at+jwt or JOSE; crit and b64 are refused", clip(string(header)), maxKeyID)
}

func hasReason(err error, reason string) bool {
	var refusal *TokenError
	return errors.As(err, &refusal) && refusal.Reason == reason
}

func (x *examination) explainIssuer() string {
	var names []string
	for _, i := range x.issuers {
		names = append(names, fmt.Sprintf("%q", i.Name))
	}
	if x.issuer != nil {
		return fmt.Sprintf("iss is %q", x.issuer.Name)
	}
	found := fmt.Sprintf("iss is %s, and accepted is exactly %s", show(x.claims["iss"]), strings.Join(names, " or "))
	name, _ := text(x.claims["iss"])
	for _, i := range x.issuers {
		if strings.TrimSuffix(i.Name, "/") == strings.TrimSuffix(name, "/") {
			found += ": they differ in the slash at the end"
		}
	}
	return found
}

func (x *examination) explainSignature(err error) string {
	unverified := "; the lines below show what the token says, unverified"
	switch {
	case err == nil:
		return fmt.Sprintf("made by the issuer's key %q", x.token.keyID)
	case errors.Is(err, ErrKeysUnavailable):
		return err.Error() + unverified
	case hasReason(err, ReasonUnknownKey) && x.token.keyID == "":
		return "the token names no key (kid), and the number of the issuer's keys that fit is not one" + unverified
	case hasReason(err, ReasonUnknownKey):
		return fmt.Sprintf("the issuer's set has no usable key %q, or more than one: it has %s%s", x.token.keyID, x.issuer.Keys.names(), unverified)
	case hasReason(err, ReasonAlgorithm):
		return fmt.Sprintf("alg is %s, and the issuer's key %q is for another algorithm%s", x.token.algorithm, x.token.keyID, unverified)
	}
	return fmt.Sprintf("the issuer's key %q did not make this signature%s", x.token.keyID, unverified)
}

// names are the IDs of the usable keys.
func (k *KeySet) names() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	var names []string
	for _, key := range k.keys.usable {
		names = append(names, fmt.Sprintf("%q", key.id))
	}
	if names == nil {
		return "none"
	}
	return strings.Join(names, ", ")
}

func (x *examination) explainTime(err error) string {
	now := x.verifier.now().UTC().Truncate(time.Second)
	found := fmt.Sprintf("exp is %s, nbf %s, iat %s, and it is %s", showDate(x.claims["exp"]), showDate(x.claims["nbf"]), showDate(x.claims["iat"]), now.Format(time.RFC3339))
	switch {
	case hasReason(err, ReasonExpired):
		return found + ": expired; exp has no leeway"
	case hasReason(err, ReasonNotYetValid):
		return found + fmt.Sprintf(": not valid yet; nbf and iat have a leeway of %v", Leeway)
	case err != nil:
		return found + ": exp is required, and dates are numbers, of seconds since 1970"
	}
	return found
}

// explainBinding says by which proof the token wants to be its holder's.
func explainBinding(cnf jsontext.Value) string {
	to := "a key of its holder (RFC 7800)"
	proofs := members(cnf)
	switch {
	case proofs["x5t#S256"] != nil:
		to = "its holder's client certificate (mutual TLS, RFC 8705)"
	case proofs["jkt"] != nil:
		to = "a key of its holder (DPoP, RFC 9449)"
	}
	return fmt.Sprintf("cnf is %s: the token is bound to %s. orgkeys checks no such proof, also not with ORGKEYS_TLS_CLIENT_CA_FILE, and without the proof anybody who stole the token could use it. Have the provider issue bearer tokens for this client", show(cnf), to)
}

func (x *examination) explainRules(err error) string {
	switch {
	case err != nil:
		return "claims.rego returns no caller for these claims: data.orgkeys.claims.caller is undefined, fails, or is not an object of organization, roles and perhaps subject and audience; try it with opa eval"
	case x.identity != nil:
		return "claims.rego decides organization and roles, and the settings for them are not used"
	}
	return ""
}

func (x *examination) explainAudience(err error) string {
	found := "aud is " + show(x.claims["aud"])
	if x.identity != nil && x.identity.Audience != "" && x.claims["aud"] == nil {
		found = fmt.Sprintf("there is no aud, and claims.rego says %q", x.identity.Audience)
	}
	if err == nil {
		return found
	}
	return fmt.Sprintf("%s, and accepted is a text or list of texts with exactly %s", found, quoted(x.issuer.Audiences))
}

func (x *examination) explainSubject(err error) string {
	claim := x.issuer.Mapping.Subject
	if err != nil {
		return fmt.Sprintf("%s is %s, and a subject is a text of 1 to %d bytes without control characters%s", claim, show(x.claims.at(claim)), maxText, x.elsewhere())
	}
	found := fmt.Sprintf("%q, from %s", x.caller.Subject, claim)
	if IsPersonal(config.PseudonymAddresses, x.caller.Subject) {
		found += "; it is an address, so events have a pseudonym in its place (ORGKEYS_SUBJECT_PSEUDONYMS). Better is a claim that is an ID"
	}
	return found
}

func (x *examination) explainActor(err error) string {
	switch {
	case err != nil:
		return fmt.Sprintf("act is %s, and must be an object with a text sub", show(x.claims["act"]))
	case x.caller.ActedBy != "":
		return fmt.Sprintf("%q acts for the subject; events name both", x.caller.ActedBy)
	}
	return ""
}

func (x *examination) explainOrganization(err error) string {
	claim, value := x.issuer.Mapping.Organization, show(x.claims.at(x.issuer.Mapping.Organization))
	if x.identity != nil {
		claim, value = "claims.rego", fmt.Sprintf("%q", x.identity.Organization)
	}
	if err == nil {
		return fmt.Sprintf("%q, from %s", x.caller.Org, claim)
	}
	named, ok := organization(x.claims.at(x.issuer.Mapping.Organization))
	if _, malformed := org.Parse(named); ok && malformed == nil && x.identity == nil {
		return fmt.Sprintf("%s is %s, and this issuer may not speak for that organization: the file of issuers says for which", claim, value)
	}
	return fmt.Sprintf("%s is %s, and an organization is one ID of 1 to 128 letters, digits, _ or - (beginning with a letter or digit), alone, in a list of one or as the only name of an object, which holds an object or null%s", claim, value, x.elsewhere())
}

func (x *examination) explainRoles() string {
	m := x.issuer.Mapping
	claim := m.Role
	if x.identity != nil {
		claim = "claims.rego"
	}
	var roles []string
	for _, r := range x.caller.Roles {
		roles = append(roles, string(r))
	}
	value := x.claims.at(m.Role)
	if len(roles) > 0 {
		found := fmt.Sprintf("%s, from %s", strings.Join(roles, ", "), claim)
		if x.identity == nil && m.RoleDefault != "" && slices.Equal(x.caller.Roles, []authz.Role{m.RoleDefault}) {
			found += fmt.Sprintf(" (%s), or by default", show(value))
		}
		return found
	}
	found := fmt.Sprintf("none: %s is %s", claim, show(value))
	switch {
	case x.identity != nil:
		return "none, says claims.rego: every request is 403, insufficient_role"
	case m.RoleMap != nil:
		found += ", and no value of it is in the role map"
	default:
		found += ", and no value of it is OWNER, ADMINISTRATOR, WORKSPACES, BILLING or USER"
	}
	return found + ": every request is 403, insufficient_role" + x.elsewhere()
}

// elsewhere lists the claims there are, for who looks for the right one.
func (x *examination) elsewhere() string {
	var names []string
	for name := range x.claims {
		names = append(names, name)
	}
	slices.Sort(names)
	return clip(". The token has the claims " + quoted(names))
}

func quoted(texts []string) string {
	var all []string
	for _, t := range texts {
		all = append(all, fmt.Sprintf("%q", t))
	}
	return strings.Join(all, ", ")
}

// show writes a claim's value for people.
func show(v jsontext.Value) string {
	if v == nil {
		return "not there"
	}
	return clip(strings.ToValidUTF8(string(v), "?"))
}

func showDate(v jsontext.Value) string {
	date, ok := numericDate(v)
	if !ok {
		return show(v)
	}
	return date.UTC().Format(time.RFC3339)
}

// clip shortens what is long, and leaves out what could change how a line reads.
func clip(s string) string {
	const most = 300
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return strings.Map(func(r rune) rune {
		if isPlain(string(r)) {
			return r
		}
		return '?'
	}, s)
}
