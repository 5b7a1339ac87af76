package authz

import (
	"errors"
	"reflect"
	"strings"
	"testing"
	"testing/fstest"
)

// withClaimRules is a policy that denies all, and these claim rules.
func withClaimRules(text string) fstest.MapFS {
	return fstest.MapFS{
		"authz.rego":  {Data: []byte(denyAll)},
		"claims.rego": {Data: []byte("package orgkeys.claims\n\n" + text + "\n")},
	}
}

const ofACustomer = `caller := {"organization": input.claims.tenant, "roles": {"OWNER"}} if input.issuer == "https://i.example"`

func TestClaimRules(t *testing.T) {
	for name, c := range map[string]struct {
		rules, claims string
		want          *Identity // nil: nothing
	}{
		"a set of roles":           {ofACustomer, `{"tenant":"acme"}`, &Identity{Organization: "acme", Roles: []Role{Owner}}},
		"no roles":                 {`caller := {"organization": input.claims.tenant, "roles": []}`, `{"tenant":"acme"}`, &Identity{Organization: "acme"}},
		"roles each once":          {`caller := {"organization": input.claims.tenant, "roles": ["ADMINISTRATORS", "ADMINISTRATOR"]}`, `{"tenant":"acme"}`, &Identity{Organization: "acme", Roles: []Role{Administrator}}},
		"all there is":             {`caller := {"organization": input.claims.t, "roles": [], "subject": input.claims.s, "audience": input.claims.a}`, `{"t":"acme","s":"x","a":"y"}`, &Identity{Organization: "acme", Subject: "x", Audience: "y"}},
		"undefined":                {ofACustomer, `{}`, nil},
		"an unknown role":          {`caller := {"organization": input.claims.tenant, "roles": ["OWNER", "ROOT"]}`, `{"tenant":"acme"}`, nil},
		"a role that is a number":  {`caller := {"organization": input.claims.tenant, "roles": [255]}`, `{"tenant":"acme"}`, nil},
		"roles that are a text":    {`caller := {"organization": input.claims.tenant, "roles": "OWNER"}`, `{"tenant":"acme"}`, nil},
		"no roles at all":          {`caller := {"organization": input.claims.tenant}`, `{"tenant":"acme"}`, nil},
		"an empty organization":    {ofACustomer, `{"tenant":""}`, nil},
		"an organization of lists": {ofACustomer, `{"tenant":["acme"]}`, nil},
		"an unknown field":         {`caller := {"organization": input.claims.tenant, "roles": [], "org": "x"}`, `{"tenant":"acme"}`, nil},
		"an empty audience":        {`caller := {"organization": input.claims.tenant, "roles": [], "audience": ""}`, `{"tenant":"acme"}`, nil},
		"a subject of numbers":     {`caller := {"organization": input.claims.tenant, "roles": [], "subject": 1}`, `{"tenant":"acme"}`, nil},
		"a failing builtin":        {`caller := {"organization": input.claims.tenant, "roles": []} if not startswith(input.claims.x, "a")`, `{"tenant":"acme","x":1}`, nil},
		"two callers":              {`caller := {"organization": input.claims.tenant, "roles": []} if input.claims.x` + "\n\n" + `caller := {"organization": input.claims.x, "roles": []} if input.claims.tenant`, `{"tenant":"acme","x":"beta"}`, nil},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := Load(t.Context(), withClaimRules(c.rules))
			if err != nil {
				t.Fatal(err)
			}
			got, err := p.MapClaims(t.Context(), Token{Issuer: "https://i.example", Claims: []byte(c.claims)})
			if c.want == nil {
				if !errors.Is(err, ErrNoIdentity) || !reflect.DeepEqual(got, Identity{}) {
					t.Errorf("got %+v, %v", got, err)
				}
				return
			}
			if err != nil || !reflect.DeepEqual(got, *c.want) {
				t.Errorf("got %+v, %v, want %+v", got, err, *c.want)
			}
		})
	}
}

func TestAPolicyWithoutClaimRulesMapsNothing(t *testing.T) {
	p, err := Load(t.Context(), fstest.MapFS{"authz.rego": {Data: []byte(denyAll)}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.MapClaims(t.Context(), Token{Claims: []byte(`{}`)}); p.HasClaimRules() || !errors.Is(err, ErrNoIdentity) {
		t.Errorf("has rules: %t, %v", p.HasClaimRules(), err)
	}
}

// TestClaimRulesThatDoNotLoad: what makes anybody a caller, and what the policy
// may not do either.
func TestClaimRulesThatDoNotLoad(t *testing.T) {
	for name, c := range map[string]struct{ rules, says string }{
		"a caller for every token": {`caller := {"organization": "acme", "roles": ["OWNER"]}`, "makes a caller of a token"},
		"a caller by default":      {`default caller := {"organization": "acme", "roles": []}`, "makes a caller of a token"},
		"a caller for any subject": {`caller := {"organization": "acme", "roles": []} if input.claims.sub`, "makes a caller of a token"},
		"the network":              {`caller := http.send({"method": "get", "url": "https://x.example"}).body`, "undefined function"},
		"the clock":                {`caller := {"organization": "acme", "roles": []} if time.now_ns() > 0`, "undefined function"},
		"the environment":          {`caller := opa.runtime().env`, "undefined function"},
		"an unused variable":       {`caller := {"organization": input.claims.x, "roles": []} if { y := 1 }`, "unused"},
	} {
		t.Run(name, func(t *testing.T) {
			if p, err := Load(t.Context(), withClaimRules(c.rules)); err == nil || p != nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want %q", err, c.says)
			}
		})
	}
}

func TestClaimRulesHaveATimeLimit(t *testing.T) {
	p, err := Load(t.Context(), withClaimRules(`caller := {"organization": input.claims.x, "roles": []} if count([1 | some i in numbers.range(1, 3000); some j in numbers.range(1, 3000); i == j]) > 0`))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.MapClaims(t.Context(), Token{Claims: []byte(`{"x":"acme"}`)}); !errors.Is(err, ErrTimeLimit) {
		t.Errorf("got %v, want %v", err, ErrTimeLimit)
	}
}
