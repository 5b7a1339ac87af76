package authz

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/tester"

	"github.com/orgkeys/orgkeys/internal/org"
)

// testPatience is how long a policy's own tests may take together.
const testPatience = 10 * time.Second

// ErrUnsafe says that a policy allows what no policy may allow, or fails its own tests.
var ErrUnsafe = errors.New("the policy is not safe to use")

// denyImpossible asks p what has to be denied under any policy, and with a
// well-formed answer: a policy that stumbles over incomplete input was not
// written to deny by default.
func (p *Policy) denyImpossible(ctx context.Context) error {
	for name, input := range impossible() {
		d, err := p.decide(ctx, input)
		if err != nil {
			return fmt.Errorf("%w: asked with %s: %w; give decision a default of "+
				`{"allow": false, "reason": "malformed_request", "scope": ""}, and check the types of the input first`, ErrUnsafe, name, err)
		}
		if d.Allow {
			return fmt.Errorf("%w: it allows a request with %s; allow only what is present, non-empty and known", ErrUnsafe, name)
		}
	}
	return nil
}

func impossible() map[string]ast.Value {
	inputs := map[string]ast.Value{
		"null as input":          ast.NullValue,
		"an empty input":         ast.NewObject(),
		"an empty caller":        ast.NewObject(ast.Item(callerField, ast.ObjectTerm())),
		"an action nobody knows": input(Request{person("acme"), "canary.unknown", "acme"}),
	}
	for _, action := range Actions() {
		for _, caller := range []Caller{person(""), {Kind: Node, Subject: "canary"}, {Kind: Enrollment, Subject: "canary"}} {
			name := fmt.Sprintf("two empty organizations (%s, %s)", caller.Kind, action)
			inputs[name] = input(Request{caller, action, ""})
		}
	}
	return inputs
}

func person(org org.ID) Caller {
	return Caller{Kind: Person, Subject: "canary", Org: org, Roles: []Role{Owner, Administrator}}
}

// runTests runs the tests that come with a policy, under its own restrictions.
func runTests(ctx context.Context, policy, tests map[string]*ast.Module, store storage.Store) error {
	if len(tests) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, testPatience)
	defer cancel()
	txn, err := store.NewTransaction(ctx)
	if err != nil {
		return err
	}
	defer store.Abort(ctx, txn)
	modules := maps.Clone(policy)
	maps.Copy(modules, tests)
	results, err := tester.NewRunner().SetCompiler(newCompiler()).SetStore(store).SetModules(modules).
		SetTimeout(testPatience).RaiseBuiltinErrors(true).CapturePrintOutput(false).RunTests(ctx, txn)
	if err != nil {
		return err
	}
	var failures []error
	passed := 0
	for r := range results {
		switch {
		case r.Pass():
			passed++
		case r.Error != nil:
			failures = append(failures, fmt.Errorf("%s, %s: %w", r.Location, r.Name, r.Error))
		default:
			failures = append(failures, fmt.Errorf("%s, %s fails", r.Location, r.Name))
		}
	}
	if err := errors.Join(failures...); err != nil {
		return fmt.Errorf("%w: its tests say otherwise; change the tests and their data with it: %w", ErrUnsafe, err)
	}
	if passed == 0 {
		return fmt.Errorf("%w: its test files hold no test that ran (were they stopped?)", ErrUnsafe)
	}
	return nil
}
