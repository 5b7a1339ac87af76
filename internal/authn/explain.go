package authn

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
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

// SettingIn names what decides where cfg has it: with a file of issuers its fields, instead of
// the settings for one issuer.
func (f Finding) SettingIn(cfg config.Config) string {
	if cfg.IssuersFile == "" {
		return f.Setting
	}
	fields := strings.NewReplacer(
		"ORGKEYS_ISSUER", "issuer", "ORGKEYS_AUDIENCE", "audiences", "ORGKEYS_JWKS", "jwks",
		"ORGKEYS_CLAIM_SUBJECT", "claimSubject", "ORGKEYS_CLAIM_ORG", "claimOrg and organizations", "ORGKEYS_CLAIM_ROLE", "claimRole",
		"ORGKEYS_ROLE_MAP", "roleMap", "ORGKEYS_ROLE_DEFAULT", "roleDefault",
	).Replace(f.Setting)
	if fields == f.Setting {
		return f.Setting
	}
	return fields + " in " + cfg.IssuersFile
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
// Authenticate's answer to the token. No finding holds the token's signature. Pseudonyms is
// ORGKEYS_SUBJECT_PSEUDONYMS: none is looked up.
func (v *Verifier) Explain(ctx context.Context, compact, pseudonyms string) ([]Finding, error) {
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
		if f := x.finding(c.name, pseudonyms, err); f.Found != "" {
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

func (x *examination) finding(check, pseudonyms string, err error) Finding {
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
		f.Found, f.Setting = x.explainSubject(pseudonyms, err), "ORGKEYS_CLAIM_SUBJECT"
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
	for _, part := range parts {
		if _, ok := decodeBase64(part); !ok {
			return "a part of the token is not base64url without padding"
		}
	}
	header, _ := decodeBase64(parts[0])
	return fmt.Sprintf("the header is %s: %s", clip(string(header)), explainHeader(header, err))
}

// explainHeader says which parameter of a refused header is the reason.
func explainHeader(b []byte, err error) string {
	var header map[string]jsontext.Value
	if json.Unmarshal(b, &header) != nil {
		return "it is not one JSON object in UTF-8 without a name twice"
	}
	if hasReason(err, ReasonAlgorithm) {
		return fmt.Sprintf("alg is %s, and accepted are RS, PS or ES with 256, 384 or 512, EdDSA and Ed25519", show(header["alg"]))
	}
	for _, name := range []string{"crit", "b64"} {
		if header[name] != nil {
			return name + " declares something that the recipient must understand, and none of it is understood here"
		}
	}
	if typ := header["typ"]; typ != nil && !isTokenType(typ) {
		return fmt.Sprintf("typ is %s, and must be JWT, at+jwt or JOSE where it is there: this is another kind of token", show(typ))
	}
	if _, ok := text(header["alg"]); !ok {
		return fmt.Sprintf("alg is %s, and must be a text", show(header["alg"]))
	}
	return fmt.Sprintf("kid is %s, and must be a text of 1 to %d bytes where it is there", show(header["kid"]), maxKeyID)
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
		switch {
		case differInSlash(i.Name, name):
			found += ": they differ in the slash at the end"
		case i.Name == "https://"+name:
			found += ": they differ in https:// at the beginning"
		}
	}
	if subject, _ := text(x.claims["sub"]); x.claims["iss"] == nil && strings.HasPrefix(subject, "spiffe://") {
		found += ": a JWT-SVID has an issuer only if the SPIFFE server is told to write one; SPIRE's setting is jwt_issuer"
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
		return "the token names no key (kid), and the number of the issuer's keys that fit is not one: it has " + x.issuer.Keys.names("") + unverified
	case hasReason(err, ReasonUnknownKey):
		return fmt.Sprintf("the issuer's set has no usable key %q, or more than one: it has %s%s", x.token.keyID, x.issuer.Keys.names(x.token.keyID), unverified)
	case hasReason(err, ReasonAlgorithm):
		return fmt.Sprintf("alg is %s, and the issuer's key %q is for another algorithm%s", x.token.algorithm, x.token.keyID, unverified)
	}
	header := x.header()
	switch {
	case hasReason(err, ReasonMalformed):
		return "jwk, x5c or nonce in the header is malformed" + unverified
	case header["nonce"] != nil:
		unverified = ". The header has a nonce, as tokens for Microsoft's own services have (Graph), which nobody else can verify: ask for a token for your own API" + unverified
	}
	return fmt.Sprintf("the issuer's key %q did not make this signature%s", x.token.keyID, unverified)
}

// header is that of a token whose form was found good.
func (x *examination) header() (header map[string]jsontext.Value) {
	encoded, _, _ := strings.Cut(x.compact, ".")
	b, _ := decodeBase64(encoded)
	if json.Unmarshal(b, &header) != nil {
		return nil
	}
	return header
}

// names are the IDs of the usable keys, and why those that are called id, or all if it is empty, are not usable.
func (k *KeySet) names(id string) string {
	k.mu.Lock()
	defer k.mu.Unlock()
	var names, unusable []string
	for _, key := range k.keys.usable {
		name := "one without kid"
		if key.id != "" {
			name = fmt.Sprintf("%q", key.id)
		}
		names = append(names, name)
	}
	for _, key := range k.keys.ignored {
		if id == "" || key.id == id {
			unusable = append(unusable, key.Error())
		}
	}
	found := "none"
	if names != nil {
		found = clip(strings.Join(names, ", "))
	}
	if unusable != nil {
		found += "; not usable: " + clip(strings.Join(unusable, ", "))
	}
	return found
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
	found = fmt.Sprintf("%s, and accepted is a text or list of texts with exactly %s", found, quoted(x.issuer.Audiences))
	for _, name := range []string{"azp", "client_id", "cid", "appid"} {
		if client, ok := text(x.claims[name]); ok && slices.Contains(x.issuer.Audiences, client) {
			found += fmt.Sprintf(". %s is %q, but that is for whom the token was issued, and not where it may be used", name, client)
			break
		}
	}
	if x.claims["aud"] == nil {
		found += ". Have the provider write aud; if it cannot, claims.rego can say for whom a token is"
	}
	return found
}

func (x *examination) explainSubject(pseudonyms string, err error) string {
	claim := x.issuer.Mapping.Subject
	if err != nil {
		return fmt.Sprintf("%s is %s, and a subject is a text of 1 to %d bytes without control characters%s", claim, show(x.claims.at(claim)), maxText, x.elsewhere(claim))
	}
	found := fmt.Sprintf("%q, from %s", x.caller.Subject, claim)
	isAddress := IsPersonal(config.PseudonymAddresses, x.caller.Subject)
	switch {
	case pseudonyms == config.PseudonymAlways:
		return found + "; ORGKEYS_SUBJECT_PSEUDONYMS is always, so events have a pseudonym in its place"
	case isAddress && pseudonyms == config.PseudonymNever:
		return found + "; it is an address, and stays in events as it is (ORGKEYS_SUBJECT_PSEUDONYMS is never). Better is a claim that is an ID"
	case isAddress:
		return found + "; it is an address, so events have a pseudonym in its place (ORGKEYS_SUBJECT_PSEUDONYMS). Better is a claim that is an ID"
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
	found := fmt.Sprintf("%s is %s, and an organization is one ID of 1 to 128 letters, digits, _ or - (beginning with a letter or digit), alone, in a list of one or as the only name of an object, which holds an object", claim, value)
	if x.identity != nil {
		return found
	}
	if x.claims.at(claim).Kind() == '0' {
		found += ". This one is a number: have the provider write a text"
	}
	return found + x.elsewhere(claim)
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
	switch scopes, isText := text(value); {
	case isText && strings.Contains(scopes, " ") && !m.rolesAreScopes():
		found += " (it is one value, with spaces: only scope and scp are lists when they are texts)"
	case value == nil && x.claims["_claim_names"] != nil:
		found += " (_claim_names says that the provider left claims out, as Entra ID does with more than 200 groups)"
	}
	return found + ": every request is 403, insufficient_role" + x.elsewhere(m.Role)
}

// elsewhere lists the claims there are, for who looks for the right one.
func (x *examination) elsewhere(claim string) string {
	found := ". The token has the claims " + quoted(slices.Sorted(maps.Keys(x.claims)))
	if pointer := asPointer(claim); !strings.HasPrefix(claim, "/") && x.claims.at(claim) == nil && x.claims.at(pointer) != nil {
		found = fmt.Sprintf(". A path into a claim is written as a JSON pointer, %q", pointer) + found
	}
	for parent := jsontext.Pointer(claim).Parent(); strings.HasPrefix(claim, "/") && parent != ""; parent = parent.Parent() {
		if within := members(x.claims.at(string(parent))); within != nil {
			found = fmt.Sprintf(". %s has %s", parent, quoted(slices.Sorted(maps.Keys(within)))) + found
			break
		}
	}
	return clip(found)
}

// asPointer reads a path as other programs write them.
func asPointer(claim string) string {
	path := strings.TrimPrefix(strings.TrimPrefix(claim, "$."), "#/")
	return "/" + strings.ReplaceAll(path, ".", "/")
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
