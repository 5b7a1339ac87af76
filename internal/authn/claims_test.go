package authn

import (
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/authz"
)

func TestAcceptedClaims(t *testing.T) {
	v := newTestVerifier(t, issuerSet())
	for name, changes := range map[string]map[string]any{
		"audience list":                {"aud": []string{"other", testAudience}},
		"exp one second ahead":         {"exp": testNow + 1},
		"exp with a fraction":          {"exp": float64(testNow) + 0.5},
		"nbf within the leeway":        {"nbf": testNow + 60},
		"nbf past":                     {"nbf": testNow - 1000},
		"iat within the leeway":        {"iat": testNow + 60},
		"iat with a fraction":          {"iat": float64(testNow) - 0.25},
		"nbf zero":                     {"nbf": 0},
		"claims nobody here knows":     {"https://x.example/y": map[string]any{"z": []int{1}}},
		"name that is not a string":    {"name": 17},
		"name with a control":          {"name": "a\nb"},
		"email that reads backwards":   {"email": "a\u202eb@example"},
		"name longer than is sensible": {"name": strings.Repeat("x", 257)},
		"empty email":                  {"email": ""},
	} {
		t.Run(name, func(t *testing.T) {
			caller, err := v.Authenticate(t.Context(), bearerHeader(edToken(goodClaims(changes))))
			want := authz.Caller{Kind: authz.Person, Subject: "alice", Org: "org-1", Roles: []authz.Role{authz.Owner}}
			if err != nil || !reflect.DeepEqual(caller, want) {
				t.Errorf("Authenticate = %+v, %v, want %+v", caller, err, want)
			}
		})
	}
}

func TestNameAndEmailAreCarried(t *testing.T) {
	v := newTestVerifier(t, issuerSet())
	caller, err := v.Authenticate(t.Context(), bearerHeader(edToken(goodClaims(map[string]any{"name": "Åsa Öst", "email": "asa@example.org"}))))
	if err != nil || caller.Name != "Åsa Öst" || caller.Email != "asa@example.org" {
		t.Errorf("Authenticate = %+v, %v", caller, err)
	}
}

func TestLimitsOfSubjectAndOrganization(t *testing.T) {
	v := newTestVerifier(t, issuerSet())
	for _, changes := range []map[string]any{
		{"sub": strings.Repeat("s", 256)},
		{"org_id": strings.Repeat("o", 128)},
		{"org_id": "7_-"},
	} {
		if _, err := v.Authenticate(t.Context(), bearerHeader(edToken(goodClaims(changes)))); err != nil {
			t.Errorf("%v: %v", changes, err)
		}
	}
}

func TestRefusedClaims(t *testing.T) {
	for _, tt := range []struct {
		name   string
		claim  string
		value  any // nil leaves the claim out
		reason string
	}{
		{"no issuer", "iss", nil, ReasonIssuer},
		{"another issuer", "iss", "https://other.example", ReasonIssuer},
		{"issuer with a slash more", "iss", testIssuer + "/", ReasonIssuer},
		{"issuer in another case", "iss", strings.ToUpper(testIssuer), ReasonIssuer},
		{"issuer as list", "iss", []string{testIssuer}, ReasonIssuer},
		{"issuer null", "iss", raw("null"), ReasonIssuer},

		{"no audience", "aud", nil, ReasonAudience},
		{"another audience", "aud", "other", ReasonAudience},
		{"audience that contains ours", "aud", testAudience + "-2", ReasonAudience},
		{"audience in another case", "aud", strings.ToUpper(testAudience), ReasonAudience},
		{"empty audience", "aud", "", ReasonAudience},
		{"empty audience list", "aud", []string{}, ReasonAudience},
		{"audience list of others", "aud", []string{"a", "b"}, ReasonAudience},
		{"audience list with a number", "aud", []any{testAudience, 1}, ReasonAudience},
		{"audience list with null", "aud", []any{testAudience, nil}, ReasonAudience},
		{"audience list in a list", "aud", []any{[]string{testAudience}}, ReasonAudience},
		{"audience object", "aud", map[string]string{testAudience: testAudience}, ReasonAudience},

		{"no exp", "exp", nil, ReasonClaims},
		{"exp null", "exp", raw("null"), ReasonClaims},
		{"exp string", "exp", fmt.Sprint(testNow + 600), ReasonClaims},
		{"exp now", "exp", testNow, ReasonExpired},
		{"exp a second ago: it has no leeway", "exp", testNow - 1, ReasonExpired},
		{"exp zero", "exp", 0, ReasonExpired},
		{"exp negative", "exp", -1, ReasonClaims},
		{"exp beyond the year 9999", "exp", raw("253402300800"), ReasonClaims},
		{"exp that overflows 64 bits", "exp", raw("18446744073709551617"), ReasonClaims},
		{"exp 1e30", "exp", raw("1e30"), ReasonClaims},
		{"exp 1e999", "exp", raw("1e999"), ReasonClaims},
		{"exp of a thousand digits", "exp", raw(strings.Repeat("9", 1000)), ReasonClaims},
		{"exp in milliseconds", "exp", raw("1800000600000"), ReasonClaims},

		{"nbf beyond the leeway", "nbf", testNow + 61, ReasonNotYetValid},
		{"nbf string", "nbf", "0", ReasonClaims},
		{"nbf null", "nbf", raw("null"), ReasonClaims},
		{"nbf 1e999", "nbf", raw("1e999"), ReasonClaims},
		{"iat beyond the leeway", "iat", testNow + 61, ReasonNotYetValid},
		{"iat true", "iat", true, ReasonClaims},

		{"no subject", "sub", nil, ReasonSubject},
		{"empty subject", "sub", "", ReasonSubject},
		{"subject null", "sub", raw("null"), ReasonSubject},
		{"subject number", "sub", 7, ReasonSubject},
		{"subject list", "sub", []string{"alice"}, ReasonSubject},
		{"subject of 257 bytes", "sub", strings.Repeat("s", 257), ReasonSubject},
		{"subject with a line break", "sub", "a\nb", ReasonSubject},
		{"subject with NUL", "sub", "a\x00", ReasonSubject},
		{"subject with C1 control", "sub", "a\u0085b", ReasonSubject},
		{"subject with right-to-left override", "sub", "a\u202eb", ReasonSubject},
		{"subject with an isolate", "sub", "a\u2066b", ReasonSubject},
		{"subject with line separator", "sub", "a\u2028b", ReasonSubject},

		{"no organization", "org_id", nil, ReasonOrganization},
		{"empty organization", "org_id", "", ReasonOrganization},
		{"organization null", "org_id", raw("null"), ReasonOrganization},
		{"organization number", "org_id", 1, ReasonOrganization},
		{"organization list", "org_id", []string{"org-1", "org-2"}, ReasonOrganization},
		{"organization with a slash", "org_id", "a/b", ReasonOrganization},
		{"organization with a space", "org_id", "a ", ReasonOrganization},
		{"organization with a line break", "org_id", "a\n", ReasonOrganization},
		{"organization that starts with -", "org_id", "-a", ReasonOrganization},
		{"organization with a letter that looks alike", "org_id", "оrg-1", ReasonOrganization},
		{"organization of 129 bytes", "org_id", strings.Repeat("o", 129), ReasonOrganization},
	} {
		t.Run(tt.name, func(t *testing.T) {
			checkRefused(t, newTestVerifier(t, issuerSet()), edToken(goodClaims(map[string]any{tt.claim: tt.value})), tt.reason)
		})
	}
}

// raw is JSON text that is written into claims as it is.
type raw string

func (r raw) MarshalJSON() ([]byte, error) { return []byte(r), nil }

func TestRoles(t *testing.T) {
	for _, tt := range []struct {
		role raw
		want []authz.Role // nil: known, and without a role
	}{
		{`"OWNER"`, []authz.Role{authz.Owner}},
		{`"ADMINISTRATOR"`, []authz.Role{authz.Administrator}},
		{`"ADMINISTRATORS"`, []authz.Role{authz.Administrator}},
		{`"WORKSPACES"`, []authz.Role{authz.Workspaces}},
		{`"BILLING"`, []authz.Role{authz.Billing}},
		{`"USER"`, []authz.Role{authz.User}},
		{`255`, []authz.Role{authz.Owner}},
		{`254`, []authz.Role{authz.Administrator}},
		{`2`, []authz.Role{authz.Workspaces}},
		{`1`, []authz.Role{authz.Billing}},
		{`0`, []authz.Role{authz.User}},
		{`["BILLING","OWNER"]`, []authz.Role{authz.Billing, authz.Owner}},
		{`[2,254]`, []authz.Role{authz.Workspaces, authz.Administrator}},
		{`["USER",255]`, []authz.Role{authz.User, authz.Owner}},
		{`["ADMINISTRATOR",254,"ADMINISTRATORS"]`, []authz.Role{authz.Administrator}},
		{`[ 254 ]`, []authz.Role{authz.Administrator}},

		{`254.0`, nil},
		{`2.54e2`, nil},
		{`254e0`, nil},
		{`0.0`, nil},
		{`-0`, nil},
		{`-1`, nil},
		{`253`, nil},
		{`256`, nil},
		{`4294967550`, nil},           // 254 modulo 2^32
		{`18446744073709551870`, nil}, // 254 modulo 2^64
		{`1e400`, nil},
		{`"254"`, nil},
		{`"0"`, nil},
		{`"owner"`, nil},
		{`"Owner"`, nil},
		{`" OWNER"`, nil},
		{`"OWNER "`, nil},
		{`"OWNER\u0000"`, nil},
		{`"OWNER,USER"`, nil},
		{`"OWNERS"`, nil},
		{`"ROOT"`, nil},
		{`""`, nil},
		{`null`, nil},
		{`true`, nil},
		{`{}`, nil},
		{`{"OWNER":true}`, nil},
		{`[]`, nil},
		{`[[]]`, nil},
		{`[["OWNER"]]`, nil},
		{`["OWNER","ROOT"]`, []authz.Role{authz.Owner}},
		{`["OWNER",254.0]`, []authz.Role{authz.Owner}},
		{`["OWNER",null]`, []authz.Role{authz.Owner}},
		{`["OWNER",{}]`, []authz.Role{authz.Owner}},
		{`["OWNER",""]`, []authz.Role{authz.Owner}},
	} {
		t.Run(string(tt.role), func(t *testing.T) {
			v := newTestVerifier(t, issuerSet())
			token := edToken(goodClaims(map[string]any{"org_role": tt.role}))
			// json.Marshal compacts but does not respell numbers.
			caller, err := v.Authenticate(t.Context(), bearerHeader(token))
			if err != nil || !reflect.DeepEqual(caller.Roles, tt.want) {
				t.Errorf("roles %v, %v, want %v", caller.Roles, err, tt.want)
			}
		})
	}
	t.Run("missing", func(t *testing.T) {
		caller, err := newTestVerifier(t, issuerSet()).Authenticate(t.Context(), bearerHeader(edToken(goodClaims(map[string]any{"org_role": nil}))))
		if err != nil || caller.Subject != "alice" || caller.Roles != nil {
			t.Errorf("Authenticate = %+v, %v, want alice without a role", caller, err)
		}
	})
}

func TestConfiguredClaimNames(t *testing.T) {
	const org, role = "https://platform.example/org", "platform_role"
	v := newMappedVerifier(t, issuerSet(), Mapping{Subject: "sub", Organization: org, Role: role})
	// The default names mean nothing then.
	checkRefused(t, v, edToken(goodClaims(nil)), ReasonOrganization)
	caller, err := v.Authenticate(t.Context(), bearerHeader(edToken(goodClaims(map[string]any{org: "org-2", role: "BILLING"}))))
	if err != nil || caller.Org != "org-2" || !reflect.DeepEqual(caller.Roles, []authz.Role{authz.Billing}) {
		t.Errorf("Authenticate = %+v, %v", caller, err)
	}
}
