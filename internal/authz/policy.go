package authz

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/metrics"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/open-policy-agent/opa/v1/topdown"
)

// query is the policy's one answer.
const query = "data.orgkeys.authz.decision"

// How long one evaluation may take, and how many a decision has. A busy host
// occasionally stops a goroutine for longer than that, which should not fail a request;
// a slow policy is slow every time.
const (
	limit    = 50 * time.Millisecond
	attempts = 3
)

// What a policy remembers of its decisions: how many, and how long the requests may be
// whose decisions it does, in bytes.
const (
	decisionsKept  = 1 << 13
	longestRequest = 512
)

// Errors of decisions. Both mean "no".
var (
	ErrNoDecision = errors.New("the policy gave no well-formed decision")
	ErrTimeLimit  = errors.New("the policy took too long to decide")
)

// Policy is a compiled policy. It is safe for concurrent use.
type Policy struct {
	query    rego.PreparedEvalQuery
	claims   *rego.PreparedEvalQuery // nil: no claim rules
	revision string
	files    source
	decided  *lru.Cache[string, Decision] // by Request.text
}

// Load compiles the policy in fsys (its .rego files, and .json files as data),
// runs the tests that come with it, and asks it what no policy may allow. The error says what is wrong; a policy that did not load is not used.
func Load(ctx context.Context, fsys fs.FS) (*Policy, error) {
	files, err := readSource(fsys)
	if err != nil {
		return nil, fmt.Errorf("reading the policy: %w", err)
	}
	return load(ctx, files)
}

func load(ctx context.Context, files source) (*Policy, error) {
	modules, tests, err := files.modules()
	if err != nil {
		return nil, fmt.Errorf("parsing the policy: %w", err)
	}
	for _, all := range []map[string]*ast.Module{modules, tests} {
		if err := checkPackages(all); err != nil {
			return nil, err
		}
	}
	data, err := files.data()
	if err != nil {
		return nil, fmt.Errorf("parsing the policy's data: %w", err)
	}
	store := inmem.NewFromObjectWithOpts(data, inmem.OptReturnASTValuesOnRead(true))
	compiler := newCompiler()
	if compiler.Compile(modules); compiler.Failed() {
		return nil, fmt.Errorf("compiling the policy: %w", compiler.Errors)
	}
	prepare := func(query string) (rego.PreparedEvalQuery, error) {
		return rego.New(
			rego.Query(query),
			rego.Compiler(compiler),
			rego.Capabilities(capabilities()),
			rego.Store(store),
			rego.StrictBuiltinErrors(true),
			rego.GenerateJSON(func(term *ast.Term, _ *rego.EvalContext) (any, error) { return term.Value, nil }),
		).PrepareForEval(ctx)
	}
	decided, err := lru.New[string, Decision](decisionsKept)
	if err != nil {
		return nil, err
	}
	p := &Policy{revision: files.revision(), files: files, decided: decided}
	if p.query, err = prepare(query); err != nil {
		return nil, fmt.Errorf("preparing the policy: %w", err)
	}
	if hasPackage(modules, claimsPackage) {
		claims, err := prepare(claimsQuery)
		if err != nil {
			return nil, fmt.Errorf("preparing the claim rules: %w", err)
		}
		p.claims = &claims
	}
	if err := errors.Join(p.denyImpossible(ctx), p.refuseAnybody(ctx)); err != nil {
		return nil, fmt.Errorf("trying the policy: %w", err)
	}
	if err := runTests(ctx, modules, tests, store); err != nil {
		return nil, fmt.Errorf("testing the policy: %w", err)
	}
	return p, nil
}

// checkPackages refuses packages that nobody would ask: with claims.rego in the package
// orgkeys.claim, say, the settings would go on saying who is who, without a word.
func checkPackages(modules map[string]*ast.Module) error {
	for name, m := range modules {
		at := m.Package.Path.String()
		switch {
		case path.Base(name) == "claims.rego" && at != claimsPackage:
			return fmt.Errorf("%s is of the package %s, and claim rules are asked for in %s only", name, plain(at), plain(claimsPackage))
		case at != "data.orgkeys" && !strings.HasPrefix(at, "data.orgkeys."), asked(at):
			continue
		}
		return fmt.Errorf("%s is of the package %s: below orgkeys there are %s and %s, packages within them, and their tests with _test behind the name", name, plain(at), plain(authzPackage), plain(claimsPackage))
	}
	return nil
}

const authzPackage = "data.orgkeys.authz"

func asked(at string) bool {
	for _, p := range []string{authzPackage, claimsPackage} {
		if at == p || at == p+"_test" || strings.HasPrefix(at, p+".") || strings.HasPrefix(at, p+"_test.") {
			return true
		}
	}
	return false
}

// plain is a package as its file spells it.
func plain(at string) string { return strings.TrimPrefix(at, "data.") }

func hasPackage(modules map[string]*ast.Module, at string) bool {
	for _, m := range modules {
		if m.Package.Path.String() == at {
			return true
		}
	}
	return false
}

func newCompiler() *ast.Compiler {
	return ast.NewCompiler().WithStrict(true).WithCapabilities(capabilities()).WithDefaultRegoVersion(ast.RegoV1)
}

// capabilities leaves a policy only what computes a decision from its input.
// Without network and environment it can
// neither leak a request nor wait for another system. Without the clock and random numbers, the policy's text and a
// request suffice to recompute any decision in the audit log. print and trace
// stay: nothing listens to them here, and policies under development need them.
func capabilities() *ast.Capabilities {
	c := ast.CapabilitiesForThisVersion()
	c.Builtins = slices.DeleteFunc(c.Builtins, func(b *ast.Builtin) bool {
		return b.Nondeterministic || b.Name == "http.send" || b.Name == "opa.runtime" || strings.HasPrefix(b.Name, "net.")
	})
	c.AllowNet = []string{} // none, where nil would mean any: JSON schemas can refer to URLs
	return c
}

// Revision identifies the policy's files.
func (p *Policy) Revision() string { return p.revision }

// Files are the policy's files, by name, whose Revision is the policy's. They
// are not to be changed.
func (p *Policy) Files() map[string][]byte { return p.files }

// Decide decides r. An error means that the request is denied; its decision has only
// the revision of the policy that failed to decide: it wraps ErrNoDecision, or ErrTimeLimit
// when three evaluations of 50 ms each did not suffice, or is the reason why ctx
// ended, which is noticed between evaluations. A decision follows from the policy and the
// request alone, see capabilities, so it is evaluated once and remembered.
func (p *Policy) Decide(ctx context.Context, r Request) (Decision, error) {
	text := r.text()
	if d, ok := p.decided.Get(text); ok {
		return d, nil
	}
	d, err := p.evaluated(ctx, r)
	if err == nil && len(text) <= longestRequest {
		p.decided.Add(text, d)
	}
	return d, err
}

// text is everything a decision is made from: different requests have different texts.
func (r Request) text() string {
	b := make([]byte, 0, 128)
	add := func(s string) { b = append(binary.AppendUvarint(b, uint64(len(s))), s...) }
	for _, s := range []string{string(r.Caller.Kind), r.Caller.Subject, string(r.Caller.Org), string(r.Action), string(r.Org)} {
		add(s)
	}
	for _, role := range r.Caller.Roles {
		add(string(role))
	}
	return string(b)
}

func (p *Policy) evaluated(ctx context.Context, r Request) (Decision, error) {
	d, err := p.decide(ctx, input(r))
	if err != nil {
		return Decision{Revision: p.revision}, err
	}
	if d.Scope == OwnOnly && r.Action != ReadEvents && r.Action != MarkEvents {
		return Decision{Revision: p.revision}, fmt.Errorf("%w: scope %q for %s, which has no owner", ErrNoDecision, d.Scope, r.Action)
	}
	return d, nil
}

func (p *Policy) decide(ctx context.Context, input ast.Value) (d Decision, err error) {
	for range attempts {
		if d, err = p.evaluate(ctx, input); !errors.Is(err, ErrTimeLimit) {
			break
		}
	}
	return d, err
}

func (p *Policy) evaluate(ctx context.Context, input ast.Value) (Decision, error) {
	cancel := topdown.NewCancel()
	defer time.AfterFunc(limit, cancel.Cancel).Stop()
	results, err := p.query.Eval(ctx, rego.EvalParsedInput(input), rego.EvalExternalCancel(cancel), rego.EvalMetrics(metrics.NoOp()))
	switch {
	case ctx.Err() != nil:
		return Decision{}, context.Cause(ctx)
	case cancel.Cancelled():
		return Decision{}, fmt.Errorf("%w: more than %s", ErrTimeLimit, limit)
	case err != nil:
		return Decision{}, fmt.Errorf("%w: %w", ErrNoDecision, err)
	case len(results) != 1 || len(results[0].Expressions) != 1:
		return Decision{}, fmt.Errorf("%w: %s is undefined", ErrNoDecision, query)
	}
	d, err := parse(results[0].Expressions[0].Value)
	if err != nil {
		return Decision{}, fmt.Errorf("%w: %w", ErrNoDecision, err)
	}
	d.Revision = p.revision
	return d, nil
}
