package authz

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"sort"
	"testing"
	"testing/fstest"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/policies"
)

func shipped(t testing.TB) *Policy {
	t.Helper()
	p, err := Load(t.Context(), policies.Files)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func table(t testing.TB) policies.Decisions {
	t.Helper()
	decisions, err := policies.Table()
	if err != nil {
		t.Fatal(err)
	}
	return decisions
}

func TestEveryAnswerOfTheDecisionTable(t *testing.T) {
	p, decisions := shipped(t), table(t)
	for _, row := range decisions.Rows {
		for i, c := range decisions.Callers {
			t.Run(fmt.Sprintf("%s/%s/%s", row.Action, row.Organization, c.Name), func(t *testing.T) {
				orgs := decisions.Organizations[row.Organization]
				caller := Caller{Kind: Kind(c.Kind), Subject: "u-1", Org: org.ID(orgs.Caller)}
				for _, role := range c.Roles {
					caller.Roles = append(caller.Roles, Role(role))
				}
				got, err := p.Decide(t.Context(), Request{caller, Action(row.Action), org.ID(orgs.Request)})
				if err != nil {
					t.Fatal(err)
				}
				if want := answer(row.Answers[i], p.Revision()); got != want {
					t.Errorf("got %+v, want %+v", got, want)
				}
			})
		}
	}
}

func answer(cell, revision string) Decision {
	if policies.Allows(cell) {
		return Decision{Allow: true, Reason: Allowed, Scope: Scope(cell), Revision: revision}
	}
	return Decision{Reason: Reason(cell), Revision: revision}
}

func TestEveryActionOfTheCodeIsInTheDecisionTable(t *testing.T) {
	decisions := table(t)
	for _, action := range Actions() {
		for _, organization := range []string{"own", "another"} {
			if !slices.ContainsFunc(decisions.Rows, func(r policies.Row) bool {
				return r.Action == string(action) && r.Organization == organization
			}) {
				t.Errorf("no row for %s, %s organization", action, organization)
			}
		}
	}
}

// Which actions there are, the code says a second time, as constants.
func TestActionsAreAllOfThem(t *testing.T) {
	source, err := os.ReadFile("authz.go")
	if err != nil {
		t.Fatal(err)
	}
	var constants []Action
	for _, m := range regexp.MustCompile(`(?m)^\t\w+ +Action = "([^"]+)"`).FindAllSubmatch(source, -1) {
		constants = append(constants, Action(m[1]))
	}
	all := Actions()
	slices.Sort(all)
	slices.Sort(constants)
	if len(constants) < 20 || !slices.Equal(all, constants) {
		t.Errorf("Actions has %q, the constants are %q", all, constants)
	}
}

func TestMalformedInputIsDeniedAndNeverAnError(t *testing.T) {
	p := shipped(t)
	for _, m := range table(t).Malformed {
		t.Run(m.Name, func(t *testing.T) {
			term, err := ast.ParseTerm(string(m.Input))
			if err != nil {
				t.Fatal(err)
			}
			got, err := p.decide(t.Context(), term.Value)
			if err != nil {
				t.Fatal(err)
			}
			if want := (Decision{Reason: MalformedRequest, Revision: p.Revision()}); got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
		})
	}
}

// oracle states the rules a second time, in another language and another way.
func oracle(r Request) Decision {
	no := func(reason Reason) Decision { return Decision{Reason: reason} }
	yes := func(scope Scope) Decision { return Decision{Allow: true, Reason: Allowed, Scope: scope} }
	c := r.Caller
	if r.Action == "" || r.Org == "" || c.Org == "" || c.Subject == "" {
		return no(MalformedRequest)
	}
	if c.Kind != Person && c.Kind != Node && c.Kind != Enrollment || c.Kind != Person && len(c.Roles) > 0 || slices.Contains(c.Roles, "") {
		return no(MalformedRequest)
	}
	if !slices.Contains(Actions(), r.Action) {
		return no(UnknownAction)
	}
	if c.Org != r.Org {
		return no(OtherOrganization)
	}
	manager, member := false, false
	for _, role := range c.Roles {
		_, known := ParseRole(string(role))
		member = member || known && role != "ADMINISTRATORS"
		manager = manager || role == Owner || role == Administrator
	}
	byNode := r.Action == RegisterNode || r.Action == UnregisterNode || r.Action == FetchSecrets
	byEnrollment := r.Action == ClaimEnrollment || r.Action == ReceiveKey
	switch {
	case byNode && c.Kind == Node, byEnrollment && c.Kind == Enrollment, !byNode && !byEnrollment && manager && r.Action != AddKey, (r.Action == ListNodes || r.Action == AskPolicy) && member:
		return yes(WholeOrganization)
	case (r.Action == ReadEvents || r.Action == MarkEvents) && member:
		return yes(OwnOnly)
	}
	return no(InsufficientRole)
}

func agree(t *testing.T, p *Policy, r Request) Decision {
	t.Helper()
	got, err := p.Decide(t.Context(), r)
	if err != nil {
		t.Fatalf("%q: %v", r, err)
	}
	want := oracle(r)
	want.Revision = p.Revision()
	if got != want {
		t.Fatalf("%q: the policy says %+v, the oracle %+v", r, got, want)
	}
	return got
}

func TestPolicyAgreesWithTheOracleOnRandomRequests(t *testing.T) {
	p := shipped(t)
	random := rand.New(rand.NewPCG(1, 2))
	reasons := map[Reason]int{}
	for range 20000 {
		reasons[agree(t, p, randomRequest(random)).Reason]++
	}
	for _, reason := range []Reason{Allowed, OtherOrganization, InsufficientRole, UnknownAction, MalformedRequest} {
		if reasons[reason] < 100 {
			t.Errorf("%s was the answer to %d of the random requests: too few to mean anything", reason, reasons[reason])
		}
	}
}

func randomRequest(random *rand.Rand) Request {
	orgs := []org.ID{"acme", "acme", "acme", "acme", "Acme", "globex", "acme ", ""}
	roles := []Role{Owner, Administrator, Workspaces, Billing, User, User, "ADMINISTRATORS", "owner", "node", "", "*"}
	actions := append(Actions(), "orgkey", "ORGKEY.LIST", "")
	r := Request{
		Caller: Caller{
			Kind: pick(random, []Kind{Person, Person, Person, Node, Node, Enrollment, "service", ""}), Subject: pick(random, []string{"u-1", "u-2", "x", "y", ""}),
			Org: pick(random, orgs), Name: "OWNER", Email: "OWNER",
		},
		Action: pick(random, actions), Org: pick(random, orgs),
	}
	if r.Caller.Kind == Person || random.IntN(4) == 0 {
		for range random.IntN(4) {
			r.Caller.Roles = append(r.Caller.Roles, pick(random, roles))
		}
	}
	return r
}

func pick[T any](random *rand.Rand, from []T) T { return from[random.IntN(len(from))] }

func FuzzPolicyAgreesWithTheOracle(f *testing.F) {
	p := shipped(f)
	for _, action := range Actions() {
		f.Add("user", "u-1", "acme", "OWNER", "BILLING", uint8(2), string(action), "acme")
		f.Add("user", "u-1", "acme", "USER", "", uint8(1), string(action), "globex")
		f.Add("node", "k-1", "acme", "", "", uint8(0), string(action), "acme")
		f.Add("enrollment", "e-1", "acme", "", "", uint8(0), string(action), "acme")
	}
	f.Add("user", "u-1", "", "OWNER", "", uint8(1), "orgkey.list", "")
	f.Add("user", "u-1", "a\xff", "OWNER", "", uint8(1), "orgkey.list", "a\ufffd")
	f.Fuzz(func(t *testing.T, kind, subject, callerOrg, role1, role2 string, roles uint8, action, about string) {
		caller := Caller{Kind: Kind(kind), Subject: subject, Org: org.ID(callerOrg), Roles: []Role{Role(role1), Role(role2)}[:roles%3]}
		agree(t, p, Request{caller, Action(action), org.ID(about)})
	})
}

func TestDecisionsCarryTheRevisionOfThePolicysFiles(t *testing.T) {
	p := shipped(t)
	d, err := p.Decide(t.Context(), Request{person("acme"), ListKeys, "acme"})
	if err != nil || d.Revision == "" || d.Revision != p.Revision() {
		t.Errorf("got %q, %v, want %q", d.Revision, err, p.Revision())
	}
}

// rules makes a policy of rules that are asked after a default "no".
func rules(rules string) fs.FS {
	return only(`default decision := {"allow": false, "reason": "malformed_request", "scope": ""}` + "\n" + rules)
}

func only(rules string) fs.FS {
	return fstest.MapFS{"p.rego": {Data: []byte("package orgkeys.authz\n\n" + rules + "\n")}}
}

func decideWith(t *testing.T, fsys fs.FS, action Action) (Decision, error) {
	t.Helper()
	p, err := Load(t.Context(), fsys)
	if err != nil {
		t.Fatal(err)
	}
	return p.Decide(t.Context(), Request{person("acme"), action, "acme"})
}

func TestAnythingButOneWellFormedDecisionIsAnError(t *testing.T) {
	for name, decision := range map[string]string{
		"true":                      `true`,
		"a string":                  `"allowed"`,
		"an empty object":           `{}`,
		"a set":                     `{"allow", "reason", "scope"}`,
		"no allow":                  `{"reason": "allowed", "scope": "organization"}`,
		"no reason":                 `{"allow": true, "scope": "organization"}`,
		"no scope":                  `{"allow": true, "reason": "allowed"}`,
		"an unknown field":          `{"allow": true, "reason": "allowed", "scope": "organization", "deny": true}`,
		"a field by another name":   `{"allow": true, "reasons": "allowed", "scope": "organization"}`,
		"allow is a string":         `{"allow": "true", "reason": "allowed", "scope": "organization"}`,
		"allow is a number":         `{"allow": 1, "reason": "allowed", "scope": "organization"}`,
		"a denial by a string":      `{"allow": "false", "reason": "insufficient_role", "scope": ""}`,
		"a denial by null":          `{"allow": null, "reason": "insufficient_role", "scope": ""}`,
		"allow is null":             `{"allow": null, "reason": "allowed", "scope": "organization"}`,
		"the reason is a list":      `{"allow": true, "reason": ["allowed"], "scope": "organization"}`,
		"the reason is empty":       `{"allow": false, "reason": "", "scope": ""}`,
		"the reason is a sentence":  `{"allow": false, "reason": "Not today!", "scope": ""}`,
		"the reason has a newline":  `{"allow": false, "reason": "no\n", "scope": ""}`,
		"yes for a reason to deny":  `{"allow": true, "reason": "insufficient_role", "scope": "organization"}`,
		"no for being allowed":      `{"allow": false, "reason": "allowed", "scope": ""}`,
		"yes to nothing":            `{"allow": true, "reason": "allowed", "scope": ""}`,
		"yes to an unknown scope":   `{"allow": true, "reason": "allowed", "scope": "everything"}`,
		"no with a scope":           `{"allow": false, "reason": "insufficient_role", "scope": "own"}`,
		"own where nothing is own":  `{"allow": true, "reason": "allowed", "scope": "own"}`,
		"a conflict of two answers": `{"allow": false, "reason": r, "scope": ""}`,
	} {
		t.Run(name, func(t *testing.T) {
			rule := `decision := ` + decision + ` if { some r in ["a", "b"]; r != ""; input.action == "orgkey.list"; input.org != "" }`
			d, err := decideWith(t, rules(rule), ListKeys)
			if !errors.Is(err, ErrNoDecision) || d != (Decision{Revision: d.Revision}) || d.Revision == "" {
				t.Errorf("got %+v, %v, want %v", d, err, ErrNoDecision)
			}
		})
	}
}

func TestUndefinedDecisionIsAnError(t *testing.T) {
	d, err := decideWith(t, only(`decision := {"allow": false, "reason": "other", "scope": ""} if not input.action == "orgkey.list"
decision := {"allow": false, "reason": "other", "scope": ""} if input.org == ""`), ListKeys)
	if !errors.Is(err, ErrNoDecision) || d != (Decision{Revision: d.Revision}) || d.Revision == "" {
		t.Errorf("got %+v, %v, want %v", d, err, ErrNoDecision)
	}
}

func TestErrorOfABuiltInFunctionIsAnErrorAndNotAFalseCondition(t *testing.T) {
	d, err := decideWith(t, rules(`decision := {"allow": true, "reason": "allowed", "scope": "organization"} if {
	input.action == "orgkey.list"
	input.org != ""
	not startswith(input.caller.roles, "B")
}`), ListKeys)
	if !errors.Is(err, ErrNoDecision) || d != (Decision{Revision: d.Revision}) || d.Revision == "" {
		t.Errorf("got %+v, %v, want %v", d, err, ErrNoDecision)
	}
}

const slow = `decision := {"allow": true, "reason": "allowed", "scope": "organization"} if {
	input.action == "orgkey.list"
	input.org != ""
	n := numbers.range(1, 100000)
	count([1 | some i in n; some j in n; i * j < 0]) == 0
}`

func TestDecisionThatTakesTooLongIsAnError(t *testing.T) {
	p, err := Load(t.Context(), rules(slow))
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	d, err := p.Decide(t.Context(), Request{person("acme"), ListKeys, "acme"})
	if !errors.Is(err, ErrTimeLimit) || d != (Decision{Revision: p.Revision()}) {
		t.Errorf("got %+v, %v, want %v", d, err, ErrTimeLimit)
	}
	if took := time.Since(start); took < limit || took > 40*limit {
		t.Errorf("it took %s", took)
	}
}

func TestDecisionEndsWithItsContext(t *testing.T) {
	for name, p := range map[string]fs.FS{"slow": rules(slow), "shipped": policies.Files} {
		t.Run(name, func(t *testing.T) {
			p, err := Load(t.Context(), p)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			d, err := p.Decide(ctx, Request{person("acme"), ListKeys, "acme"})
			if !errors.Is(err, context.Canceled) || d != (Decision{Revision: p.Revision()}) {
				t.Errorf("got %+v, %v, want %v", d, err, context.Canceled)
			}
		})
	}
}

func BenchmarkDecide(b *testing.B) {
	p := shipped(b)
	for name, r := range map[string]Request{
		"owner generates":        {Caller{Kind: Person, Subject: "u-1", Org: "acme", Roles: []Role{Owner}}, GenerateKey, "acme"},
		"user is denied":         {Caller{Kind: Person, Subject: "u-1", Org: "acme", Roles: []Role{User}}, GenerateKey, "acme"},
		"user reads own events":  {Caller{Kind: Person, Subject: "u-1", Org: "acme", Roles: []Role{User}}, ReadEvents, "acme"},
		"node registers":         {Caller{Kind: Node, Subject: "k-1", Org: "acme"}, RegisterNode, "acme"},
		"another organization's": {Caller{Kind: Person, Subject: "u-1", Org: "acme", Roles: []Role{Owner}}, ListKeys, "globex"},
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			var took []time.Duration
			for b.Loop() {
				start := time.Now()
				if _, err := p.Decide(b.Context(), r); err != nil {
					b.Fatal(err)
				}
				took = append(took, time.Since(start))
			}
			sort.Slice(took, func(i, j int) bool { return took[i] < took[j] })
			b.ReportMetric(float64(took[len(took)/2].Nanoseconds()), "p50-ns")
			b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds()), "p99-ns")
		})
	}
}

func BenchmarkLoad(b *testing.B) {
	for b.Loop() {
		if _, err := Load(b.Context(), policies.Files); err != nil {
			b.Fatal(err)
		}
	}
}

// What was decided once is decided the same, and for no other request: not for one that
// differs in one field, nor for one in which the same letters are divided otherwise.
func TestADecisionIsRememberedForItsRequestOnly(t *testing.T) {
	p, err := Load(t.Context(), fstest.MapFS{"authz.rego": {Data: []byte(`package orgkeys.authz

default decision := {"allow": false, "reason": "malformed_request", "scope": ""}

words := array.concat([input.caller.kind, input.caller.subject, input.caller.org, input.action, input.org], input.caller.roles)

decision := {"allow": false, "reason": concat("_", ["r", concat("_", words)]), "scope": ""} if input.caller.kind in {"a", "x", "ab"}
`)}})
	if err != nil {
		t.Fatal(err)
	}
	request := func(kind Kind, subject string, of org.ID, action Action, about org.ID, roles ...Role) Request {
		return Request{Caller: Caller{Kind: kind, Subject: subject, Org: of, Roles: roles}, Action: action, Org: about}
	}
	all := map[string]Request{
		"r_a_b_c_d_e":     request("a", "b", "c", "d", "e"),
		"r_x_b_c_d_e":     request("x", "b", "c", "d", "e"),
		"r_a_x_c_d_e":     request("a", "x", "c", "d", "e"),
		"r_a_b_x_d_e":     request("a", "b", "x", "d", "e"),
		"r_a_b_c_x_e":     request("a", "b", "c", "x", "e"),
		"r_a_b_c_d_x":     request("a", "b", "c", "d", "x"),
		"r_a_b_c_d_e_f_g": request("a", "b", "c", "d", "e", "f", "g"),
		"r_a_b_c_d_e_g_f": request("a", "b", "c", "d", "e", "g", "f"),
		"r_a_b_c_d_e_fg":  request("a", "b", "c", "d", "e", "fg"),
		"r_ab_c_d_e_f":    request("ab", "c", "d", "e", "f"),
		"r_a_bc_d_e_f":    request("a", "bc", "d", "e", "f"),
		"r_a_b_c_de_f":    request("a", "b", "c", "de", "f"),
		"r_a_b_cd_e_f":    request("a", "b", "cd", "e", "f"),
		"r_a_b_c_d_ef":    request("a", "b", "c", "d", "ef"),
	}
	for range 2 {
		for want, r := range all {
			if d, err := p.Decide(t.Context(), r); err != nil || string(d.Reason) != want || d.Revision != p.Revision() {
				t.Errorf("%+v: %+v, %v; want %s", r, d, err, want)
			}
		}
	}
}
