package authz

import (
	"errors"
	"fmt"
	"regexp"

	"github.com/open-policy-agent/opa/v1/ast"
)

// The names of the fields of the policy's input and answer.
var (
	callerField  = ast.StringTerm("caller")
	kindField    = ast.StringTerm("kind")
	subjectField = ast.StringTerm("subject")
	rolesField   = ast.StringTerm("roles")
	actionField  = ast.StringTerm("action")
	orgField     = ast.StringTerm("org")

	allowField  = ast.StringTerm("allow")
	reasonField = ast.StringTerm("reason")
	scopeField  = ast.StringTerm("scope")
)

// input is r as the policy sees it, without what must not be decided upon. It is
// built directly: a detour over JSON would cost as much as the decision.
func input(r Request) ast.Value {
	roles := make([]*ast.Term, len(r.Caller.Roles))
	for i, role := range r.Caller.Roles {
		roles[i] = ast.StringTerm(string(role))
	}
	return ast.NewObject(
		ast.Item(callerField, ast.ObjectTerm(
			ast.Item(kindField, ast.StringTerm(string(r.Caller.Kind))),
			ast.Item(subjectField, ast.StringTerm(r.Caller.Subject)),
			ast.Item(orgField, ast.StringTerm(string(r.Caller.Org))),
			ast.Item(rolesField, ast.ArrayTerm(roles...)),
		)),
		ast.Item(actionField, ast.StringTerm(string(r.Action))),
		ast.Item(orgField, ast.StringTerm(string(r.Org))),
	)
}

// reasonCode is what reasons look like, since they go into logs and metrics.
var reasonCode = regexp.MustCompile(`^[a-z][a-z0-9_]{0,63}$`)

// parse reads the policy's answer, which must have exactly the fields allow,
// reason and scope, and not contradict itself.
func parse(answer any) (Decision, error) {
	object, ok := answer.(ast.Object)
	if !ok || object.Len() != 3 {
		return Decision{}, errors.New("want an object of allow, reason and scope")
	}
	allow, okAllow := field[ast.Boolean](object, allowField)
	reason, okReason := field[ast.String](object, reasonField)
	scope, okScope := field[ast.String](object, scopeField)
	if !okAllow || !okReason || !okScope {
		return Decision{}, errors.New("want a boolean allow and strings reason and scope")
	}
	d := Decision{Allow: bool(allow), Reason: Reason(reason), Scope: Scope(scope)}
	return d, d.check()
}

func field[V ast.Value](object ast.Object, name *ast.Term) (V, bool) {
	term := object.Get(name)
	if term == nil {
		var none V
		return none, false
	}
	value, ok := term.Value.(V)
	return value, ok
}

func (d Decision) check() error {
	switch {
	case d.Reason != Allowed && !reasonCode.MatchString(string(d.Reason)):
		return errors.New("the reason is not a code of lower-case letters, digits and underscores")
	case d.Allow != (d.Reason == Allowed):
		return fmt.Errorf("allow is %t and the reason is %q", d.Allow, d.Reason)
	case d.Allow && d.Scope != WholeOrganization && d.Scope != OwnOnly:
		return fmt.Errorf("allow is true and the scope is %q", d.Scope)
	case !d.Allow && d.Scope != "":
		return fmt.Errorf("allow is false and the scope is %q", d.Scope)
	}
	return nil
}
