package authn

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/org"
)

// callerOf maps the claims of a good token, changed, by m.
func callerOf(t *testing.T, m Mapping, changes map[string]any) (authz.Caller, error) {
	t.Helper()
	return newMappedVerifier(t, issuerSet(), m).Authenticate(t.Context(), bearerHeader(edToken(goodClaims(changes))))
}

func TestOrganizationOfAMapping(t *testing.T) {
	for _, tt := range []struct {
		claim  string
		claims raw    // of x
		want   string // empty if refused
	}{
		{"x", `"acme"`, "acme"},
		{"x", `["acme"]`, "acme"},
		{"x", `{"acme":{}}`, "acme"},
		{"x", `{"acme":{"id":"0d1e","sites":["a"]}}`, "acme"},
		{"/x", `"acme"`, "acme"},
		{"/x/y/0/z", `{"y":[{"z":["acme"]}]}`, "acme"},
		{"/x/a~1b/c~0d", `{"a/b":{"c~d":"acme"}}`, "acme"},
		{"/x/", `{"":"acme"}`, "acme"},
		{"/x/é", `{"é":"acme"}`, "acme"},
		{"/x/1", `["beta","acme"]`, "acme"},
		{"/x/a.b", `{"a.b":"acme"}`, "acme"},

		{"x", `["acme","beta"]`, ""},
		{"x", `["acme","acme"]`, ""},
		{"x", `{"acme":{},"beta":{}}`, ""},
		{"x", `{"id":"acme"}`, ""},
		{"x", `{"id":["acme"]}`, ""},
		{"x", `{"id":1}`, ""},
		{"x", `{"id":null}`, ""},
		{"x", `{"acme":null}`, ""},
		{"x", `{"acme":true}`, ""},
		{"/x/y", `{"y":{"name":"acme"}}`, ""},
		{"x", `[["acme"]]`, ""},
		{"x", `[{"acme":{}}]`, ""},
		{"x", `[]`, ""},
		{"x", `{}`, ""},
		{"x", `[null]`, ""},
		{"x", `[1]`, ""},
		{"x", `1`, ""},
		{"x", `null`, ""},
		{"x", `true`, ""},
		{"x", `"acme.example"`, ""},
		{"x", `{"acme.example":{}}`, ""},
		{"x", `{"":{}}`, ""},
		{"/x/01", `["beta","acme"]`, ""},
		{"/x/-", `["acme"]`, ""},
		{"/x/+0", `["acme"]`, ""},
		{"/x/2", `["beta","acme"]`, ""},
		{"/x/y", `"acme"`, ""},
		{"/x/y", `null`, ""},
		{"/X", `"acme"`, ""},
		{"/x/Y", `{"y":"acme"}`, ""},
		{"x/y", `{"y":"acme"}`, ""},
		{"x.y", `{"y":"acme"}`, ""},
	} {
		t.Run(tt.claim+" "+string(tt.claims), func(t *testing.T) {
			m := DefaultMapping()
			m.Organization = tt.claim
			caller, err := callerOf(t, m, map[string]any{"x": tt.claims})
			if tt.want == "" && !refusedFor(ReasonOrganization)(err) || tt.want != "" && (err != nil || string(caller.Org) != tt.want) {
				t.Errorf("organization %q, %v, want %q", caller.Org, err, tt.want)
			}
		})
	}
}

func TestRolesOfAMapping(t *testing.T) {
	roleMap := map[string]authz.Role{"org-admins": authz.Administrator, "OWNER": authz.Billing, "a=b,c": authz.Owner}
	for _, tt := range []struct {
		name    string
		mapping func(*Mapping)
		x       raw
		want    []authz.Role
	}{
		{"a map", func(m *Mapping) { m.RoleMap = roleMap }, `["offline_access","org-admins"]`, []authz.Role{authz.Administrator}},
		{"a map, one value", func(m *Mapping) { m.RoleMap = roleMap }, `"org-admins"`, []authz.Role{authz.Administrator}},
		{"a map decides what a role's own name means", func(m *Mapping) { m.RoleMap = roleMap }, `["OWNER"]`, []authz.Role{authz.Billing}},
		{"a map's value with = and a comma", func(m *Mapping) { m.RoleMap = roleMap }, `["a=b,c"]`, []authz.Role{authz.Owner}},
		{"a map knows no other names", func(m *Mapping) { m.RoleMap = roleMap }, `["ADMINISTRATOR","org-Admins"," org-admins","org-admins,x",255,null,{},["org-admins"]]`, nil},
		{"an empty map knows none", func(m *Mapping) { m.RoleMap = map[string]authz.Role{} }, `["OWNER",255]`, nil},
		{"a pointer", func(m *Mapping) { m.Role = "/x/roles" }, `{"roles":["OWNER","uma_authorization"]}`, []authz.Role{authz.Owner}},
		{"a pointer to nothing", func(m *Mapping) { m.Role = "/x/roles" }, `["OWNER"]`, nil},
		{"an object of objects, here", func(m *Mapping) {}, `{"OWNER":{"org-1":"org-1.example"},"USER":{"org-2":"x"}}`, []authz.Role{authz.Owner}},
		{"an object of objects, elsewhere", func(m *Mapping) {}, `{"OWNER":{"org-2":"org-1"}}`, nil},
		{"an object of anything else", func(m *Mapping) {}, `{"OWNER":true,"ADMINISTRATOR":["org-1"],"BILLING":"org-1","USER":{}}`, nil},
		{"an object of objects and a map", func(m *Mapping) { m.RoleMap = roleMap }, `{"org-admins":{"org-1":"x"}}`, []authz.Role{authz.Administrator}},
		{"a default for who has none", func(m *Mapping) { m.RoleDefault = authz.User }, `["something"]`, []authz.Role{authz.User}},
		{"a default for a claim that is not there", func(m *Mapping) { m.RoleDefault, m.Role = authz.User, "y" }, `0`, []authz.Role{authz.User}},
		{"no default for who has one", func(m *Mapping) { m.RoleDefault = authz.User }, `["BILLING"]`, []authz.Role{authz.Billing}},
		{"a scope", func(m *Mapping) { m.Role, m.RoleMap = "/x/scope", roleMap }, `{"scope":"openid org-admins"}`, []authz.Role{authz.Administrator}},
		{"a scope of one", func(m *Mapping) { m.Role, m.RoleMap = "/x/scp", roleMap }, `{"scp":"org-admins"}`, []authz.Role{authz.Administrator}},
		{"a scope that is a list", func(m *Mapping) { m.Role, m.RoleMap = "/x/scp", roleMap }, `{"scp":["openid","org-admins"]}`, []authz.Role{authz.Administrator}},
		{"a list's texts are not divided, not even a scope's", func(m *Mapping) { m.Role, m.RoleMap = "/x/scp", roleMap }, `{"scp":["openid org-admins"]}`, nil},
		{"a scope divided by something else", func(m *Mapping) { m.Role, m.RoleMap = "/x/scope", roleMap }, `{"scope":"openid,org-admins\torg-admins\u00a0org-admins"}`, nil},
		{"no scope, with spaces", func(m *Mapping) { m.Role, m.RoleMap = "/x/groups", roleMap }, `{"groups":"openid org-admins"}`, nil},
		{"something in a scope", func(m *Mapping) { m.Role, m.RoleMap = "/x/scope/roles", roleMap }, `{"scope":{"roles":"openid org-admins"}}`, nil},
		{"out of the subject", func(m *Mapping) { m.Role, m.RoleMap = "sub", map[string]authz.Role{"alice": authz.Owner} }, `0`, []authz.Role{authz.Owner}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := DefaultMapping()
			m.Role = "x"
			tt.mapping(&m)
			caller, err := callerOf(t, m, map[string]any{"x": tt.x})
			if err != nil || !slices.Equal(caller.Roles, tt.want) {
				t.Errorf("roles %v, %v, want %v", caller.Roles, err, tt.want)
			}
		})
	}
}

func TestSubjectOfAMapping(t *testing.T) {
	m := DefaultMapping()
	m.Subject = "userId"
	caller, err := callerOf(t, m, map[string]any{"userId": "u-1", "sub": "alice@example.org"})
	if err != nil || caller.Subject != "u-1" {
		t.Errorf("Authenticate = %+v, %v", caller, err)
	}
	if _, err := callerOf(t, m, nil); !refusedFor(ReasonSubject)(err) {
		t.Errorf("sub stands in for userId: %v", err)
	}
}

func TestWhoActsForTheSubject(t *testing.T) {
	caller, err := callerOf(t, DefaultMapping(), map[string]any{"act": raw(`{"sub":"bob","iss":"https://x.example","act":{"sub":"eve"}}`)})
	if err != nil || caller.Subject != "alice" || caller.ActedBy != "bob" {
		t.Errorf("Authenticate = %+v, %v, want alice, and bob acting", caller, err)
	}
	for _, act := range []raw{`null`, `{}`, `"bob"`, `["bob"]`, `[{"sub":"bob"}]`, `{"sub":1}`, `{"sub":""}`, `{"sub":"b\nob"}`, `{"Sub":"bob"}`, `1`} {
		if _, err := callerOf(t, DefaultMapping(), map[string]any{"act": act}); !refusedFor(ReasonSubject)(err) {
			t.Errorf("act %s: %v", act, err)
		}
	}
}

// TestSeveralIssuers: each is believed about its own organizations, with its own
// keys and mapping, and nobody's subject passes for another issuer's.
func TestSeveralIssuers(t *testing.T) {
	k := keysForTests()
	ci := Issuer{
		Name: "https://ci.example", Audiences: []string{"orgkeys-ci"}, Keys: must(fixedKeySet(jwks(publicJWK(&k.ec.PublicKey, "ci")))),
		Mapping: DefaultMapping(), Organizations: []org.ID{"org-1"}, SubjectPrefix: "ci:",
	}
	v := must(New(nil, testIssuerWith(must(fixedKeySet(jwks(publicJWK(k.ed.Public(), "ed")))), DefaultMapping()), ci))
	v.now = newTestVerifier(t, issuerSet()).now
	byCI := func(changes map[string]any) string {
		claims := map[string]any{"iss": ci.Name, "aud": "orgkeys-ci"}
		for name, value := range changes {
			claims[name] = value
		}
		return sign(k.ec, "ES256", `{"alg":"ES256","kid":"ci"}`, goodClaims(claims))
	}
	for name, tt := range map[string]struct {
		token, subject, reason string
	}{
		"a person":                           {edToken(goodClaims(nil)), "alice", ""},
		"a person of another organization":   {edToken(goodClaims(map[string]any{"org_id": "org-2"})), "alice", ""},
		"automation":                         {byCI(nil), "ci:alice", ""},
		"automation, another organization":   {byCI(map[string]any{"org_id": "org-2"}), "", ReasonOrganization},
		"automation with people's audience":  {byCI(map[string]any{"aud": testAudience}), "", ReasonAudience},
		"automation that says it is people":  {byCI(map[string]any{"iss": testIssuer, "aud": testAudience}), "", ReasonUnknownKey},
		"automation that acts for somebody":  {byCI(map[string]any{"act": map[string]any{"sub": "x"}}), "ci:alice", ""},
		"people's key under automation's ID": {sign(k.ed, "EdDSA", `{"alg":"EdDSA","kid":"ci"}`, goodClaims(map[string]any{"iss": ci.Name, "aud": "orgkeys-ci"})), "", ReasonAlgorithm},
		"a person called like automation":    {edToken(goodClaims(map[string]any{"sub": "ci:alice"})), "", ReasonSubject},
		"acting for a person":                {edToken(goodClaims(map[string]any{"act": map[string]any{"sub": "ci:alice"}})), "", ReasonSubject},
		"a third issuer":                     {edToken(goodClaims(map[string]any{"iss": "https://third.example"})), "", ReasonIssuer},
	} {
		caller, err := v.Authenticate(t.Context(), bearerHeader(tt.token))
		if tt.reason == "" && (err != nil || caller.Subject != tt.subject) || tt.reason != "" && !refusedFor(tt.reason)(err) {
			t.Errorf("%s: %+v, %v, want %q, reason %q", name, caller, err, tt.subject, tt.reason)
		}
	}
}

// mappings that the fuzzer tries with all claims.
var mappings = []Mapping{
	DefaultMapping(),
	{Subject: "userId", Organization: "/a/b", Role: "/a/c"},
	{Subject: "sub", Organization: "o", Role: "r", RoleMap: map[string]authz.Role{"admins": authz.Administrator, "OWNER": authz.User}},
	{Subject: "sub", Organization: "o", Role: "r", RoleDefault: authz.User},
	{Subject: "sub", Organization: "/o/0", Role: "sub", RoleMap: map[string]authz.Role{"alice": authz.Owner}},
	{Subject: "/a~1b", Organization: "/o/x~0y", Role: "urn:x:roles"},
	{Subject: "sub", Organization: "o", Role: "scope", RoleMap: map[string]authz.Role{"keys:admin": authz.Administrator}},
	{Subject: "sub", Organization: "org_id", Role: "/r/scp"},
}

// FuzzMapping: whatever the claims, a caller has no subject, organization or
// role but what the mapping says, as the standard library's JSON reads the claims.
func FuzzMapping(f *testing.F) {
	for _, seed := range []string{
		goodClaims(nil),
		goodClaims(map[string]any{"userId": "u", "a": map[string]any{"b": []string{"acme"}, "c": []any{"x", 254, "OWNER"}}}),
		goodClaims(map[string]any{"o": map[string]any{"acme": 1}, "r": []any{"admins", "OWNER", 255, nil}}),
		goodClaims(map[string]any{"o": []any{"acme"}, "r": map[string]any{"OWNER": map[string]any{"acme": 1}}}),
		goodClaims(map[string]any{"o": map[string]any{"x~y": "acme"}, "a/b": "u", "urn:x:roles": map[string]any{"USER": map[string]any{"acme": ""}}}),
		goodClaims(map[string]any{"o": raw(`["acme","acme"]`), "r": raw(`254.0`)}),
		goodClaims(map[string]any{"o": "acme", "scope": "openid keys:admin", "r": map[string]any{"scp": "OWNER USER"}}),
	} {
		for i := range mappings {
			f.Add(uint8(i), seed)
		}
	}
	verifiers := make([]*Verifier, len(mappings))
	for i, m := range mappings {
		verifiers[i] = newMappedVerifier(f, issuerSet(), m)
	}
	f.Fuzz(func(t *testing.T, n uint8, payload string) {
		m := mappings[int(n)%len(mappings)]
		caller, err := verifiers[int(n)%len(mappings)].Authenticate(t.Context(), bearerHeader(edToken(payload)))
		if err != nil {
			checkRefusal(t, caller, err)
			return
		}
		decoder := json.NewDecoder(bytes.NewReader([]byte(payload)))
		decoder.UseNumber()
		var claims map[string]any
		if err := decoder.Decode(&claims); err != nil {
			t.Fatalf("accepted what is not JSON: %q", payload)
		}
		if caller.Subject != lookUp(claims, m.Subject) {
			t.Errorf("subject %q of %s", caller.Subject, payload)
		}
		if !slices.Contains(organizationsIn(lookUp(claims, m.Organization)), string(caller.Org)) {
			t.Errorf("organization %q of %s", caller.Org, payload)
		}
		allowed := rolesIn(m, lookUp(claims, m.Role), string(caller.Org))
		for _, role := range caller.Roles {
			if !slices.Contains(allowed, role) {
				t.Errorf("role %q of %s, allowed %v", role, payload, allowed)
			}
		}
	})
}

// lookUp is another reading of names and pointers, over other types.
func lookUp(claims map[string]any, claim string) any {
	if !strings.HasPrefix(claim, "/") {
		return claims[claim]
	}
	var value any = claims
	for _, name := range strings.Split(claim[1:], "/") {
		name = strings.ReplaceAll(strings.ReplaceAll(name, "~1", "/"), "~0", "~")
		switch within := value.(type) {
		case map[string]any:
			value = within[name]
		case []any:
			value = nil
			for i, member := range within {
				if fmt.Sprint(i) == name {
					value = member
				}
			}
		default:
			return nil
		}
	}
	return value
}

func organizationsIn(value any) []string {
	switch v := value.(type) {
	case string:
		return []string{v}
	case []any:
		if len(v) == 1 {
			if s, ok := v[0].(string); ok {
				return []string{s}
			}
		}
	case map[string]any:
		if len(v) == 1 {
			for name := range v {
				return []string{name}
			}
		}
	}
	return nil
}

// rolesIn are the roles that a mapping can mean by a value, generously: one
// that is there in any form counts.
func rolesIn(m Mapping, value any, org string) []authz.Role {
	allowed := []authz.Role{}
	add := func(v any) {
		switch v := v.(type) {
		case string:
			if m.RoleMap != nil {
				allowed = append(allowed, m.RoleMap[v])
			} else if role, ok := authz.ParseRole(v); ok {
				allowed = append(allowed, role)
			}
		case json.Number:
			roles := map[string]authz.Role{"255": authz.Owner, "254": authz.Administrator, "2": authz.Workspaces, "1": authz.Billing, "0": authz.User}
			if m.RoleMap == nil {
				allowed = append(allowed, roles[v.String()])
			}
		}
	}
	switch v := value.(type) {
	case []any:
		for _, member := range v {
			add(member)
		}
	case map[string]any:
		for name, where := range v {
			if within, ok := where.(map[string]any); ok && reflect.ValueOf(within).MapIndex(reflect.ValueOf(org)).IsValid() {
				add(name)
			}
		}
	case string:
		add(v)
		if name := m.Role[strings.LastIndexByte(m.Role, '/')+1:]; name == "scope" || name == "scp" {
			for _, scope := range strings.Fields(v) {
				add(scope)
			}
		}
	default:
		add(v)
	}
	if len(allowed) == 0 && m.RoleDefault != "" {
		allowed = append(allowed, m.RoleDefault)
	}
	return allowed
}

// TestClaimsThatHaveTwoMeanings: the subject may tell the role, and nothing else may share a claim.
func TestClaimsThatHaveTwoMeanings(t *testing.T) {
	byName := map[string]authz.Role{"alice": authz.Owner}
	for _, c := range []struct {
		m    Mapping
		good bool
	}{
		{Mapping{Subject: "sub", Organization: "o", Role: "sub", RoleMap: byName}, true},
		{Mapping{Subject: "sub", Organization: "o", Role: "/sub", RoleMap: byName}, true},
		{Mapping{Subject: "uid", Organization: "uid", Role: "sub", RoleMap: byName}, false},
		{Mapping{Subject: "/sub", Organization: "/sub", Role: "/sub", RoleMap: byName}, false},
		{Mapping{Subject: "uid", Organization: "o", Role: "uid", RoleMap: byName}, false},
		{Mapping{Subject: "sub", Organization: "o", Role: "o", RoleMap: byName}, false},
	} {
		if err := c.m.check(); (err == nil) != c.good {
			t.Errorf("%+v: %v", c.m, err)
		}
	}
}
