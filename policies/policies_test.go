package policies_test

import (
	"errors"
	"io/fs"
	"strings"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/cover"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/open-policy-agent/opa/v1/tester"
	"github.com/open-policy-agent/opa/v1/util"

	"github.com/orgkeys/orgkeys/policies"
)

func TestRegoTestsPassAndCoverThePolicyCompletely(t *testing.T) {
	modules := modules(t)
	content, err := fs.ReadFile(policies.Files, "decisions.json")
	if err != nil {
		t.Fatal(err)
	}
	var data map[string]any
	if err := util.UnmarshalJSON(content, &data); err != nil {
		t.Fatal(err)
	}
	store := inmem.NewFromObjectWithOpts(data, inmem.OptReturnASTValuesOnRead(true))
	txn, err := store.NewTransaction(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer store.Abort(t.Context(), txn)

	coverage := cover.New()
	results, err := tester.NewRunner().SetStore(store).SetModules(modules).
		RaiseBuiltinErrors(true).SetCoverageQueryTracer(coverage).RunTests(t.Context(), txn)
	if err != nil {
		t.Fatal(err)
	}
	passed := 0
	for r := range results {
		if !r.Pass() {
			t.Errorf("%s: %v", r.Name, r.Error)
			continue
		}
		passed++
	}
	if passed < 5 {
		t.Errorf("%d Rego tests passed, of 5", passed)
	}
	checkCoverage(t, coverage.Report(modules).Files["authz.rego"])
}

func checkCoverage(t *testing.T, report *cover.FileReport) {
	t.Helper()
	if report == nil || report.CoveredLines < 30 {
		t.Fatal("no coverage was measured")
	}
	for _, r := range report.NotCovered {
		t.Errorf("authz.rego:%d is not covered", r.Start.Row)
	}
	if report.Coverage != 100 {
		t.Errorf("the policy is covered to %.1f %%", report.Coverage)
	}
}

func modules(t *testing.T) map[string]*ast.Module {
	t.Helper()
	names, err := fs.Glob(policies.Files, "*.rego")
	if err != nil {
		t.Fatal(err)
	}
	modules := make(map[string]*ast.Module)
	for _, name := range names {
		content, err := fs.ReadFile(policies.Files, name)
		if err != nil {
			t.Fatal(err)
		}
		modules[name], err = ast.ParseModuleWithOpts(name, string(content), ast.ParserOptions{RegoVersion: ast.RegoV1})
		if err != nil {
			t.Fatal(err)
		}
	}
	return modules
}

func TestDecisionTableIsFoundOnlyBetweenOnePairOfMarkers(t *testing.T) {
	for name, document := range map[string]string{
		"no markers":     "# Security\n",
		"no end":         policies.Begin + "table\n",
		"no beginning":   "table\n" + policies.End,
		"wrong order":    policies.End + "table\n" + policies.Begin,
		"two beginnings": policies.Begin + policies.Begin + policies.End,
		"two ends":       policies.Begin + policies.End + policies.End,
		"twice":          strings.Repeat(policies.Begin+"table\n"+policies.End, 2),
	} {
		t.Run(name, func(t *testing.T) {
			if _, _, _, err := policies.Between(document); !errors.Is(err, policies.ErrMarkers) {
				t.Errorf("got %v, want %v", err, policies.ErrMarkers)
			}
		})
	}
	before, table, after, err := policies.Between("a\n" + policies.Begin + "b\n" + policies.End + "c\n")
	if err != nil || before != "a\n" || table != "b\n" || after != "c\n" {
		t.Errorf("got %q, %q, %q, %v", before, table, after, err)
	}
}
