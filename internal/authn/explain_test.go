package authn

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/org"
)

// TestEachKindOfWrongHasItsWords: whatever is wrong with a token, one line says which claim it is,
// what was found in it and what is accepted, and, where a setting decides, which one.
func TestEachKindOfWrongHasItsWords(t *testing.T) {
	k := keysForTests()
	set := jwks(
		publicJWK(k.ed.Public(), "ed"), publicJWK(&k.ec.PublicKey, ""), publicJWK(&k.rsa.PublicKey, "twice"), publicJWK(&k.attacker.PublicKey, "twice"),
		publicJWK(&k.rsa.PublicKey, "enc").with("use", "enc"), jwk{"kty": "RSA", "kid": "x5c", "x5c": []string{"MIIB"}},
	)
	issuer := testIssuerWith(must(fixedKeySet(set)), Mapping{
		Subject: "uid", Organization: "organization", Role: "/realm_access/roles", RoleMap: map[string]authz.Role{"org-admins": authz.Administrator},
	})
	issuer.Organizations = []org.ID{"acme"}
	v := must(New(nil, issuer))
	v.now = func() time.Time { return time.Unix(testNow, 0) }
	claims := func(changes map[string]any) string {
		all := map[string]any{"uid": "u-1", "sub": nil, "org_id": nil, "org_role": nil, "organization": "acme", "realm_access": map[string]any{"roles": []string{"org-admins"}}}
		maps.Copy(all, changes)
		return goodClaims(all)
	}
	by := func(header string) func(string) string {
		return func(payload string) string { return sign(k.ed, "EdDSA", header, payload) }
	}
	good := by(`{"alg":"EdDSA","kid":"ed","typ":"JWT"}`)
	longList := make([]string, 500)
	for i := range longList {
		longList[i] = fmt.Sprintf("group-%03d-of-the-directory", i)
	}
	for name, c := range map[string]struct {
		sign    func(string) string
		changes map[string]any
		reason  string // empty: it is accepted, and without a role
		check   string
		setting string
		words   []string
	}{
		"typ of a DPoP proof":   {by(`{"alg":"EdDSA","kid":"ed","typ":"dpop+jwt"}`), nil, ReasonMalformed, "form", "", []string{`typ is "dpop+jwt"`, "JWT, at+jwt or JOSE"}},
		"typ that is a number":  {by(`{"alg":"EdDSA","kid":"ed","typ":1}`), nil, ReasonMalformed, "form", "", []string{`typ is 1`, "JWT, at+jwt or JOSE"}},
		"crit":                  {by(`{"alg":"EdDSA","kid":"ed","crit":["exp"]}`), nil, ReasonMalformed, "form", "", []string{"crit declares something"}},
		"kid that is a number":  {by(`{"alg":"EdDSA","kid":7}`), nil, ReasonMalformed, "form", "", []string{"kid is 7", "text of 1 to 256 bytes"}},
		"alg that is a number":  {by(`{"alg":7,"kid":"ed"}`), nil, ReasonMalformed, "form", "", []string{"alg is 7", "must be a text"}},
		"alg none":              {by(`{"alg":"none","kid":"ed"}`), nil, ReasonAlgorithm, "form", "", []string{`alg is "none"`, "RS, PS or ES"}},
		"alg HS256":             {by(`{"alg":"HS256","kid":"ed"}`), nil, ReasonAlgorithm, "form", "", []string{`alg is "HS256"`, "EdDSA and Ed25519"}},
		"a header twice":        {by(`{"alg":"EdDSA","kid":"ed","alg":"EdDSA"}`), nil, ReasonMalformed, "form", "", []string{"the header is", "without a name twice"}},
		"a claim twice":         {func(p string) string { return good(p[:len(p)-1] + `,"uid":"u-2"}`) }, nil, ReasonClaims, "claims", "", []string{"without a name twice"}},
		"a line break":          {func(p string) string { return good(p) + "\n" }, nil, ReasonMalformed, "form", "", []string{"not base64url"}},
		"500 groups":            {good, map[string]any{"groups": longList}, ReasonMalformed, "form", "", []string{"bytes, and at most 14336", "leave claims out"}},
		"another issuer":        {good, map[string]any{"iss": "https://other.example"}, ReasonIssuer, "issuer", "ORGKEYS_ISSUER", []string{`iss is "https://other.example"`, `exactly "https://issuer.example"`}},
		"a slash more":          {good, map[string]any{"iss": testIssuer + "/"}, ReasonIssuer, "issuer", "ORGKEYS_ISSUER", []string{"differ in the slash at the end"}},
		"no https://":           {good, map[string]any{"iss": "issuer.example"}, ReasonIssuer, "issuer", "ORGKEYS_ISSUER", []string{"differ in https:// at the beginning"}},
		"no issuer":             {good, map[string]any{"iss": nil}, ReasonIssuer, "issuer", "ORGKEYS_ISSUER", []string{"iss is not there"}},
		"a JWT-SVID without":    {good, map[string]any{"iss": nil, "sub": "spiffe://example.org/x"}, ReasonIssuer, "issuer", "ORGKEYS_ISSUER", []string{"iss is not there", "jwt_issuer"}},
		"kid unknown":           {by(`{"alg":"EdDSA","kid":"new"}`), nil, ReasonUnknownKey, "signature", "ORGKEYS_JWKS", []string{`no usable key "new"`, `it has "ed", one without kid, "twice"`}},
		"kid of two keys":       {by(`{"alg":"RS256","kid":"twice"}`), nil, ReasonUnknownKey, "signature", "ORGKEYS_JWKS", []string{`no usable key "twice", or more than one`}},
		"kid of one to encrypt": {by(`{"alg":"RS256","kid":"enc"}`), nil, ReasonUnknownKey, "signature", "ORGKEYS_JWKS", []string{`no usable key "enc"`, `not usable: key 4, "enc": use is neither sig`}},
		"kid of a certificate":  {by(`{"alg":"RS256","kid":"x5c"}`), nil, ReasonUnknownKey, "signature", "ORGKEYS_JWKS", []string{`not usable: key 5, "x5c": reading the key`}},
		"no kid, two that fit":  {by(`{"alg":"RS256"}`), nil, ReasonUnknownKey, "signature", "ORGKEYS_JWKS", []string{"names no key (kid)", "is not one", `"twice"`}},
		"another algorithm":     {by(`{"alg":"RS256","kid":"ed"}`), nil, ReasonAlgorithm, "signature", "ORGKEYS_JWKS", []string{"alg is RS256", `key "ed" is for another algorithm`}},
		"a wrong signature":     {func(p string) string { return sign(k.attacker, "EdDSA", `{"alg":"EdDSA","kid":"ed"}`, p) }, nil, ReasonSignature, "signature", "ORGKEYS_JWKS", []string{`key "ed" did not make this signature`}},
		"a token for Graph":     {func(p string) string { return sign(k.attacker, "EdDSA", `{"alg":"EdDSA","kid":"ed","nonce":"x"}`, p) }, nil, ReasonSignature, "signature", "ORGKEYS_JWKS", []string{"did not make this signature", "nonce", "your own API"}},
		"a malformed jwk":       {by(`{"alg":"EdDSA","kid":"ed","jwk":5}`), nil, ReasonMalformed, "signature", "ORGKEYS_JWKS", []string{"jwk, x5c or nonce in the header is malformed"}},
		"expired":               {good, map[string]any{"exp": testNow}, ReasonExpired, "time", "", []string{"exp is 2027-01-15T08:00:00Z", "it is 2027-01-15T08:00:00Z", "expired; exp has no leeway"}},
		"no expiry":             {good, map[string]any{"exp": nil}, ReasonClaims, "time", "", []string{"exp is not there", "exp is required"}},
		"expiry in ms":          {good, map[string]any{"exp": testNow * 1000}, ReasonClaims, "time", "", []string{"exp is 1800000000000", "numbers, of seconds"}},
		"expiry as a text":      {good, map[string]any{"exp": "1900000000"}, ReasonClaims, "time", "", []string{`exp is "1900000000"`, "dates are numbers"}},
		"not valid yet":         {good, map[string]any{"nbf": testNow + 61}, ReasonNotYetValid, "time", "", []string{"nbf 2027-01-15T08:01:01Z", "leeway of 1m0s"}},
		"issued in the future":  {good, map[string]any{"iat": testNow + 61}, ReasonNotYetValid, "time", "", []string{"iat 2027-01-15T08:01:01Z", "leeway of 1m0s"}},
		"bound":                 {good, map[string]any{"cnf": map[string]any{"jkt": "x"}}, ReasonBound, "binding", "", []string{`cnf is {"jkt":"x"}`, "DPoP", "bearer tokens"}},
		"another audience":      {good, map[string]any{"aud": []string{"account"}}, ReasonAudience, "audience", "ORGKEYS_AUDIENCE", []string{`aud is ["account"]`, `exactly "orgkeys-test"`}},
		"no audience, but azp":  {good, map[string]any{"aud": nil, "azp": testAudience}, ReasonAudience, "audience", "ORGKEYS_AUDIENCE", []string{"aud is not there", `azp is "orgkeys-test", but that is for whom the token was issued`, "claims.rego"}},
		"an audience of 1":      {good, map[string]any{"aud": []any{testAudience, 1}}, ReasonAudience, "audience", "ORGKEYS_AUDIENCE", []string{`aud is ["orgkeys-test",1]`, "list of texts"}},
		"no subject":            {good, map[string]any{"uid": nil, "sub": "alice"}, ReasonSubject, "subject", "ORGKEYS_CLAIM_SUBJECT", []string{"uid is not there", "a text of 1 to 256 bytes", `The token has the claims "aud"`, `"sub"`}},
		"a subject of 1":        {good, map[string]any{"uid": 1}, ReasonSubject, "subject", "ORGKEYS_CLAIM_SUBJECT", []string{"uid is 1", "a subject is a text"}},
		"act without sub":       {good, map[string]any{"act": map[string]any{"client_id": "x"}}, ReasonSubject, "actor", "", []string{`act is {"client_id":"x"}`, "an object with a text sub"}},
		"no organization":       {good, map[string]any{"organization": nil, "org": "acme"}, ReasonOrganization, "organization", "ORGKEYS_CLAIM_ORG", []string{"organization is not there", `"org"`}},
		"a foreign one":         {good, map[string]any{"organization": "beta"}, ReasonOrganization, "organization", "ORGKEYS_CLAIM_ORG", []string{`organization is "beta"`, "this issuer may not speak for that organization"}},
		"two organizations":     {good, map[string]any{"organization": []string{"acme", "beta"}}, ReasonOrganization, "organization", "ORGKEYS_CLAIM_ORG", []string{`organization is ["acme","beta"]`, "in a list of one"}},
		"an organization of 42": {good, map[string]any{"organization": 42}, ReasonOrganization, "organization", "ORGKEYS_CLAIM_ORG", []string{"organization is 42", "a number: have the provider write a text"}},
		"a domain":              {good, map[string]any{"organization": "acme.example"}, ReasonOrganization, "organization", "ORGKEYS_CLAIM_ORG", []string{`organization is "acme.example"`, "letters, digits, _ or -"}},
		"one without an ID":     {good, map[string]any{"organization": raw(`{"id":null}`)}, ReasonOrganization, "organization", "ORGKEYS_CLAIM_ORG", []string{`organization is {"id":null}`, "which holds an object"}},
		"an unknown role":       {good, map[string]any{"realm_access": map[string]any{"roles": []string{"x"}}}, "", "role", "ORGKEYS_ROLE_MAP", []string{`/realm_access/roles is ["x"]`, "role map", "403, insufficient_role"}},
		"no role":               {good, map[string]any{"realm_access": map[string]any{"role": "org-admins"}}, "", "role", "ORGKEYS_CLAIM_ROLE", []string{`/realm_access/roles is not there`, `/realm_access has "role"`}},
		"roles in one text":     {good, map[string]any{"realm_access": map[string]any{"roles": "x org-admins"}}, "", "role", "ORGKEYS_CLAIM_ROLE", []string{`is "x org-admins"`, "one value, with spaces"}},
		"groups left out":       {good, map[string]any{"realm_access": nil, "_claim_names": map[string]any{"groups": "src1"}}, "", "role", "ORGKEYS_CLAIM_ROLE", []string{"/realm_access/roles is not there", "_claim_names says that the provider left claims out"}},
	} {
		t.Run(name, func(t *testing.T) {
			token := c.sign(claims(c.changes))
			_, refusal := v.Authenticate(t.Context(), bearerHeader(token))
			if c.reason == "" && refusal != nil || c.reason != "" && !refusedFor(c.reason)(refusal) {
				t.Errorf("Authenticate: %v, want reason %q", refusal, c.reason)
			}
			findings, err := v.Explain(t.Context(), token, config.PseudonymAddresses)
			if fmt.Sprint(err) != fmt.Sprint(refusal) {
				t.Errorf("Explain: %v, and Authenticate: %v", err, refusal)
			}
			at := slices.IndexFunc(findings, func(f Finding) bool { return f.Verdict == Failed || f.Verdict == Doubted })
			if at < 0 || findings[at].Check != c.check || !strings.Contains(findings[at].Setting, c.setting) {
				t.Fatalf("the first complaint is not about %s with %q: %+v", c.check, c.setting, findings)
			}
			for _, words := range c.words {
				if !strings.Contains(findings[at].Found, words) {
					t.Errorf("%q is not in %q", words, findings[at].Found)
				}
			}
			for _, f := range findings {
				if len(f.Found) > 1500 || strings.Contains(f.Found, "%!") || strings.ContainsAny(f.Found, "\n\x00") {
					t.Errorf("%s is said in an unreadable way: %q", f.Check, f.Found)
				}
			}
		})
	}
}

// TestPathsAsOtherProgramsWriteThem are names of claims here, and the explanation says how a path is written.
func TestPathsAsOtherProgramsWriteThem(t *testing.T) {
	for _, claim := range []string{"realm_access.roles", "realm_access/roles", "#/realm_access/roles", "$.realm_access.roles"} {
		m := DefaultMapping()
		m.Role = claim
		v := newMappedVerifier(t, issuerSet(), m)
		nested := map[string]any{"realm_access": map[string]any{"roles": []string{"OWNER"}}}
		findings, err := v.Explain(t.Context(), edToken(goodClaims(nested)), config.PseudonymAddresses)
		last := findings[len(findings)-1]
		if err != nil || last.Verdict != Doubted || !strings.Contains(last.Found, `written as a JSON pointer, "/realm_access/roles"`) {
			t.Errorf("%s: %v, %+v", claim, err, last)
		}
		caller, err := v.Authenticate(t.Context(), bearerHeader(edToken(goodClaims(map[string]any{claim: "OWNER"}))))
		if err != nil || !slices.Equal(caller.Roles, []authz.Role{authz.Owner}) {
			t.Errorf("%s as a name: %+v, %v", claim, caller, err)
		}
	}
}

// TestASetOfManyKeys: the explanation names as many as can be read.
func TestASetOfManyKeys(t *testing.T) {
	k := keysForTests()
	many := []jwk{publicJWK(k.ed.Public(), "ed")}
	for i := range 300 {
		many = append(many, publicJWK(&k.rsa.PublicKey, fmt.Sprintf("key-%03d", i)))
	}
	v := newTestVerifier(t, jwks(many...))
	if _, err := v.Authenticate(t.Context(), bearerHeader(edToken(goodClaims(nil)))); err != nil {
		t.Errorf("one of 301 keys: %v", err)
	}
	findings, err := v.Explain(t.Context(), sign(k.rsa, "RS256", `{"alg":"RS256","kid":"x"}`, goodClaims(nil)), config.PseudonymAddresses)
	at := slices.IndexFunc(findings, func(f Finding) bool { return f.Check == "signature" })
	if !refusedFor(ReasonUnknownKey)(err) || len(findings[at].Found) > 600 || !strings.Contains(findings[at].Found, `"key-000"`) {
		t.Errorf("Explain: %v, %+v", err, findings[at])
	}
}

// TestTheSettingForPseudonymsIsExplained: what is said of a subject is what the setting has done to it.
func TestTheSettingForPseudonymsIsExplained(t *testing.T) {
	v := newMappedVerifier(t, issuerSet(), DefaultMapping())
	for _, c := range []struct{ which, subject, says, not string }{
		{config.PseudonymAddresses, "alice@example.org", "so events have a pseudonym in its place", "always"},
		{config.PseudonymAddresses, "u-1", `"u-1", from sub`, "pseudonym"},
		{config.PseudonymAlways, "alice@example.org", "ORGKEYS_SUBJECT_PSEUDONYMS is always, so events have a pseudonym in its place", "it is an address"},
		{config.PseudonymAlways, "u-1", "ORGKEYS_SUBJECT_PSEUDONYMS is always, so events have a pseudonym in its place", "it is an address"},
		{config.PseudonymNever, "alice@example.org", "it is an address, and stays in events as it is", "have a pseudonym"},
		{config.PseudonymNever, "u-1", `"u-1", from sub`, "pseudonym"},
	} {
		findings, err := v.Explain(t.Context(), edToken(goodClaims(map[string]any{"sub": c.subject})), c.which)
		at := slices.IndexFunc(findings, func(f Finding) bool { return f.Check == "subject" })
		if err != nil || at < 0 || !strings.Contains(findings[at].Found, c.says) || strings.Contains(findings[at].Found, c.not) {
			t.Errorf("%s, %s: %v, %+v", c.which, c.subject, err, findings)
		}
	}
}
