package authn

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/policies"
)

// shape is what a page of docs/identity promises of its token and settings.
type shape struct {
	page    string
	subject string
	org     org.ID
	role    authz.Role

	// One thing wrong: change spoils the token, which then is refused for reason
	// (empty: it is accepted and without a role), and explain has the words.
	change func(claims map[string]any)
	reason string
	words  string
}

var shapes = []shape{
	{"keycloak", "f3b1a0de-6d0c-4f1e-9a52-0a4f6f1c2b7e", "acme", authz.Administrator,
		set("organization", map[string]any{"acme": map[string]any{}, "beta": map[string]any{}}), ReasonOrganization, `as the only name of an object`},
	{"entra-id", "690222be-ff1a-4d56-abd1-7e4f7d38e474", "72f988bf-86f1-41af-91ab-2d7cd011db47", authz.Administrator,
		set("iss", "https://sts.windows.net/72f988bf-86f1-41af-91ab-2d7cd011db47/"), ReasonIssuer, `accepted is exactly "https://login.microsoftonline.com/`},
	{"auth0", "auth0|66f0c1d2e3a4b5c6d7e8f901", "org_9ybsU1dN2dKfDkBi", authz.Administrator,
		set("iss", "https://example.eu.auth0.com"), ReasonIssuer, `they differ in the slash at the end`},
	{"okta", "00u62bfdiuvFhVQ4T0h7", "acme", authz.Administrator,
		set("uid", nil), ReasonSubject, `uid is not there, and a subject is a text`},
	{"cognito", "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee", "acme", authz.Administrator,
		set("token_use", "id"), ReasonClaims, `claims.rego returns no caller for these claims`},
	{"google", "108734012345678901234", "acme", authz.Administrator,
		set("email", "mallory@acme-prod.iam.gserviceaccount.com"), ReasonClaims, `claims.rego returns no caller`},
	{"zitadel", "278849238472938472", "278000000000000001", authz.Administrator,
		set("urn:zitadel:iam:org:project:roles", map[string]any{"orgkeys-admin": map[string]any{"999": "other.example"}}), "", `none: urn:zitadel:iam:org:project:roles is {"orgkeys-admin"`},
	{"authentik", "5d9c7b1f0a2e4c6d8b9a7f6e5d4c3b2a1908f7e6d5c4b3a29180f7e6d5c4b3a2", "acme", authz.Administrator,
		set("org_id", nil), ReasonOrganization, `org_id is not there, and an organization is one ID`},
	{"dex", "CgNhZGESBGFjbWU", "acme", authz.Administrator,
		set("federated_claims", nil), ReasonOrganization, `/federated_claims/connector_id is not there`},
	{"hydra", "9d6f8b4e-1c2a-4f3b-8a7d-5e6f7a8b9c0d", "acme", authz.Administrator,
		set("aud", []string{}), ReasonAudience, `aud is [], and accepted is a text or list of texts with exactly "orgkeys"`},
	{"kubernetes", "system:serviceaccount:acme:orgkeys-admin", "acme", authz.Administrator,
		set("aud", []string{"https://kubernetes.default.svc.cluster.local"}), ReasonAudience, `with exactly "orgkeys"`},
	{"github-actions", "github:repo:acme@65/infra@74:environment:production", "acme", authz.Administrator,
		set("repository_owner", "mallory"), ReasonOrganization, `this issuer may not speak for that organization`},
	{"spiffe", "spiffe://example.org/org/acme/orgkeys-admin", "acme", authz.Administrator,
		set("sub", "spiffe://other.example/org/acme/orgkeys-admin"), ReasonClaims, `claims.rego returns no caller`},
	{"vault", "8d6a45e5-572f-8f13-d226-cd0d1ec57297", "acme", authz.Administrator,
		set("org_role", "ADMIN"), "", `no value of it is OWNER, ADMINISTRATOR`},
	{"platform", "95dbf81e-3298-4326-a2b1-bcdc84525f9a", "acme", authz.Administrator,
		set("org_role", "254"), "", `none: org_role is "254"`},
}

func set(claim string, value any) func(map[string]any) {
	return func(claims map[string]any) {
		if claims[claim] = value; value == nil {
			delete(claims, claim)
		}
	}
}

// TestEachProvidersTokenWithItsPagesSettings replays the token of each page under
// docs/identity with that page's settings.
func TestEachProvidersTokenWithItsPagesSettings(t *testing.T) {
	pages := pagesOfProviders(t)
	var tried []string
	for _, s := range shapes {
		tried = append(tried, s.page)
		t.Run(s.page, func(t *testing.T) {
			v, claims := openPage(t, s.page)
			caller, err := v.Authenticate(t.Context(), bearerHeader(signedAs(claims)))
			if err != nil || caller.Subject != s.subject || caller.Org != s.org || !slices.Equal(caller.Roles, []authz.Role{s.role}) {
				t.Errorf("Authenticate = %+v, %v, want %s of %s, %s", caller, err, s.subject, s.org, s.role)
			}
			if findings, err := v.Explain(t.Context(), signedAs(claims), config.PseudonymAddresses); err != nil || slices.ContainsFunc(findings, func(f Finding) bool { return f.Verdict != Passed }) {
				t.Errorf("Explain of a good token: %v, %+v", err, findings)
			}
			s.change(claims)
			s.checkSpoilt(t, v, signedAs(claims))
		})
	}
	slices.Sort(tried)
	if !slices.Equal(tried, pages) {
		t.Errorf("tried %q, and there are the pages %q", tried, pages)
	}
}

func (s shape) checkSpoilt(t *testing.T, v *Verifier, token string) {
	t.Helper()
	caller, err := v.Authenticate(t.Context(), bearerHeader(token))
	if s.reason == "" && (err != nil || caller.Org != s.org || caller.Roles != nil) || s.reason != "" && !refusedFor(s.reason)(err) {
		t.Errorf("with one thing wrong: %+v, %v, want reason %q", caller, err, s.reason)
	}
	findings, err := v.Explain(t.Context(), token, config.PseudonymAddresses)
	if (err == nil) != (s.reason == "") {
		t.Errorf("Explain: %v", err)
	}
	var words []string
	for _, f := range findings {
		if f.Verdict == Failed || f.Verdict == Doubted {
			words = append(words, f.Found)
		}
		if signature := token[strings.LastIndexByte(token, '.')+1:]; strings.Contains(f.Found, signature) {
			t.Errorf("%s: the signature is in %q", f.Check, f.Found)
		}
	}
	if !strings.Contains(strings.Join(words, "\n"), s.words) {
		t.Errorf("explained by\n%s\nwant %q", strings.Join(words, "\n"), s.words)
	}
}

// signedAs is a token with these claims by the tests' EC key.
func signedAs(claims map[string]any) string {
	return sign(keysForTests().ec, "ES256", `{"alg":"ES256","kid":"ec","typ":"JWT"}`, string(must(json.Marshal(claims))))
}

const pagesDir = "../../docs/identity"

func pagesOfProviders(t testing.TB) []string {
	t.Helper()
	files, err := filepath.Glob(pagesDir + "/*.md")
	if err != nil {
		t.Fatal(err)
	}
	var pages []string
	for _, f := range files {
		if name := strings.TrimSuffix(filepath.Base(f), ".md"); name != "README" {
			pages = append(pages, name)
		}
	}
	slices.Sort(pages)
	return pages
}

// openPage returns a verifier with a page's settings and the tests' keys, at the
// time of its token, and the token's claims.
func openPage(t testing.TB, page string) (*Verifier, map[string]any) {
	t.Helper()
	text := string(must(os.ReadFile(filepath.Join(pagesDir, page+".md"))))
	var claims map[string]any
	if err := json.Unmarshal([]byte(fenced(t, text, "The token")), &claims); err != nil {
		t.Fatalf("%s: the token: %v", page, err)
	}
	configs := configuredBy(t, fenced(t, text, "Settings"))
	jwks := filepath.Join(t.TempDir(), "jwks.json")
	if err := os.WriteFile(jwks, issuerSet(), 0o600); err != nil {
		t.Fatal(err)
	}
	for i := range configs {
		configs[i].JWKS, configs[i].JWKSCAFile = jwks, ""
	}
	issuers, err := Open(configs, time.Minute, quiet)
	if err != nil {
		t.Fatal(err)
	}
	for i := range issuers {
		issuers[i].Keys = must(fixedKeySet(issuerSet()))
	}
	v, err := New(rulesOf(t, text), issuers...)
	if err != nil {
		t.Fatal(err)
	}
	v.now = func() time.Time { return time.Unix(int64(claims["iat"].(float64))+1, 0) }
	return v, claims
}

// fenced returns the first fenced block behind a heading.
func fenced(t testing.TB, text, heading string) string {
	t.Helper()
	_, after, ok := strings.Cut(text, "\n## "+heading+"\n")
	parts := strings.SplitN(after, "\n```", 3)
	if !ok || len(parts) != 3 {
		t.Fatalf("no block behind %q", heading)
	}
	_, block, _ := strings.Cut(parts[1], "\n")
	return block
}

// configuredBy reads a page's settings as the server does: environment variables, or
// the file of issuers.
func configuredBy(t testing.TB, settings string) []IssuerConfig {
	t.Helper()
	environ := []string{"ORGKEYS_LISTEN=127.0.0.1:0"}
	if strings.HasPrefix(settings, "{") {
		path := filepath.Join(t.TempDir(), "issuers.json")
		if err := os.WriteFile(path, []byte(settings), 0o600); err != nil {
			t.Fatal(err)
		}
		environ = append(environ, "ORGKEYS_ISSUERS_FILE="+path)
	} else {
		// The directories of a page are not here.
		elsewhere := regexp.MustCompile(`(?m)^ORGKEYS_POLICY_DIR=.*$`)
		environ = append(environ, strings.Split(strings.TrimSpace(elsewhere.ReplaceAllString(settings, "ORGKEYS_MAX=5")), "\n")...)
	}
	c, err := config.Load(environ, "")
	if err != nil {
		t.Fatal(err)
	}
	configs, err := Configured(c)
	if err != nil {
		t.Fatal(err)
	}
	return configs
}

// rulesOf loads a page's claims.rego beside the shipped policy; nil if it has none.
func rulesOf(t testing.TB, text string) Rules {
	t.Helper()
	_, after, ok := strings.Cut(text, "\n```rego\n")
	if !ok {
		return nil
	}
	rules, _, _ := strings.Cut(after, "\n```")
	return loadRules(t, rules+"\n")
}

// loadRules loads claim rules beside the shipped policy.
func loadRules(t testing.TB, rules string) *authz.Policy {
	t.Helper()
	files := fstest.MapFS{"claims.rego": {Data: []byte(rules)}}
	err := fs.WalkDir(policies.Files, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := fs.ReadFile(policies.Files, name)
		files[name] = &fstest.MapFile{Data: b}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	p, err := authz.Load(context.Background(), files)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestHostileTokensUnderEachMapping: what is refused for its form, its key or its
// signature is refused whatever the settings say about claims.
func TestHostileTokensUnderEachMapping(t *testing.T) {
	for _, page := range pagesOfProviders(t) {
		t.Run(page, func(t *testing.T) {
			v, claims := openPage(t, page)
			good := string(must(json.Marshal(claims)))
			if _, err := v.Authenticate(t.Context(), bearerHeader(signedAs(claims))); err != nil {
				t.Fatalf("the token itself: %v", err)
			}
			for _, tt := range hostileTokens(good) {
				caller, err := v.Authenticate(t.Context(), bearerHeader(tt.token))
				if strings.Contains(tt.name, "org_id") && claims["org_id"] == nil || tt.name == "claim names in another case" && (*v.issuers.Load())[0].Mapping.Subject != "sub" {
					continue // nobody looks at that claim
				}
				if !errors.Is(err, ErrUnauthenticated) && !errors.Is(err, ErrKeysUnavailable) || !reflect.DeepEqual(caller, authz.Caller{}) {
					t.Errorf("%s: %+v, %v", tt.name, caller, err)
				}
			}
			for name, change := range spoiltClaims() {
				spoilt := maps.Clone(claims)
				change(spoilt)
				if caller, err := v.Authenticate(t.Context(), bearerHeader(signedAs(spoilt))); !errors.Is(err, ErrUnauthenticated) {
					t.Errorf("%s: %+v, %v", name, caller, err)
				}
			}
		})
	}
}

// TestBoundTokensAreNoBearerTokens: whatever proof of possession a token asks for, it is none that is
// checked here, so it is refused, with the words for that kind.
func TestBoundTokensAreNoBearerTokens(t *testing.T) {
	v := newTestVerifier(t, issuerSet())
	for cnf, words := range boundTokens() {
		token := edToken(goodClaims(map[string]any{"cnf": raw(cnf)}))
		if caller, err := v.Authenticate(t.Context(), bearerHeader(token)); !refusedFor(ReasonBound)(err) {
			t.Errorf("cnf %s: %+v, %v", cnf, caller, err)
		}
		findings, _ := v.Explain(t.Context(), token, config.PseudonymAddresses)
		at := slices.IndexFunc(findings, func(f Finding) bool { return f.Check == "binding" })
		if at < 0 || findings[at].Verdict != Failed || !strings.Contains(findings[at].Found, words) {
			t.Errorf("cnf %s: %+v, want %q", cnf, findings, words)
		}
	}
}

// boundTokens are values of cnf: each member that is registered for it, and what is none.
func boundTokens() map[string]string {
	const holder, certificate, proof = "a key of its holder (RFC 7800)", "its holder's client certificate (mutual TLS, RFC 8705)", "a key of its holder (DPoP, RFC 9449)"
	return map[string]string{
		`{"x5t#S256":"bwcK0esc3ACC3DB2Y5_lESsXE8o9ltc05O89jdN-dg2"}`:                           certificate,
		`{"jkt":"0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"}`:                                proof,
		`{"jwk":{"kty":"EC","crv":"P-256","x":"18wHLeIgW9wVN6VD1Txgpqy2LszYkMf6J8njVAibvhM"}}`: holder,
		`{"jwe":"eyJhbGciOiJSU0EtT0FFUCJ9"}`:                                                   holder,
		`{"kid":"dfd1aa97-6d8d-4575-a0fe-34b96de2bfad"}`:                                       holder,
		`{"jku":"https://keys.example/keys.json","kid":"2015-08-28"}`:                          holder,
		`{"osc":{"id":"0"}}`: holder,
		`{"x5t#S512":"AA"}`:  holder,
		`{}`:                 holder,
		`null`:               holder,
		`false`:              holder,
		`"none"`:             holder,
		`[]`:                 holder,
		`0`:                  holder,
	}
}

// spoiltClaims are changes after which no mapping may let a token in.
func spoiltClaims() map[string]func(map[string]any) {
	all := map[string]func(map[string]any){
		"another issuer":          set("iss", "https://mallory.example"),
		"no issuer":               set("iss", nil),
		"another audience":        set("aud", "somebody-else"),
		"audience null":           set("aud", raw("null")),
		"audience an object":      set("aud", map[string]any{"orgkeys": true}),
		"no expiry":               set("exp", nil),
		"expired":                 set("exp", 1),
		"not valid yet":           set("nbf", 99999999999),
		"an actor who is nobody":  set("act", map[string]any{}),
		"an actor that is a text": set("act", "mallory"),
		"an actor that is null":   set("act", raw("null")),
	}
	for cnf := range boundTokens() {
		all["bound by "+cnf] = set("cnf", raw(cnf))
	}
	return all
}
