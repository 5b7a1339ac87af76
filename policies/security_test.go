package policies_test

import (
	"os"
	"testing"

	"github.com/orgkeys/orgkeys/policies"
)

func TestDocumentsShowTheDecisionTableThatTheTestsRead(t *testing.T) {
	decisions, err := policies.Table()
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"../SECURITY.md": decisions.Summary(),
		"README.md":      decisions.Markdown(),
	} {
		document, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		_, shown, _, err := policies.Between(string(document))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if shown != want {
			t.Errorf("%s shows another decision table than policies/decisions.json: run go generate ./policies", name)
		}
	}
}

// What the summary leaves out of its table, it must say in words.
func TestSummaryOfTheDecisionTableLeavesNothingOut(t *testing.T) {
	own := map[string]policies.Organizations{"own": {Caller: "acme", Request: "acme"}, "another": {Caller: "acme", Request: "globex"}}
	got := policies.Decisions{
		Callers:       []policies.Caller{{Name: "OWNER"}, {Name: "USER"}, {Name: "stranger"}},
		Organizations: own,
		Rows: []policies.Row{
			{Action: "a", Organization: "own", Answers: []string{"organization", "insufficient_role", "malformed_request"}},
			{Action: "b", Organization: "own", Answers: []string{"unknown_action", "unknown_action", "malformed_request"}},
			{Action: "c", Organization: "own", Answers: []string{"unknown_action", "unknown_action", "malformed_request"}},
			{Action: "a", Organization: "another", Answers: []string{"other_organization", "other_organization", "malformed_request"}},
			{Action: "", Organization: "another", Answers: []string{"malformed_request", "malformed_request", "malformed_request"}},
		},
		Malformed: make([]policies.Malformed, 2),
	}.Summary()
	want := "| Action, organization | OWNER | USER |\n|---|---|---|\n" +
		"| `a`, own | **organization** | – |\n" +
		"\n–: `insufficient_role`. The rest is the same for all of these callers:\n\n" +
		"- own (\"acme\" about \"acme\"): `unknown_action` to `b`, `c`\n" +
		"- another (\"acme\" about \"globex\"): `other_organization` to `a`\n" +
		"- another (\"acme\" about \"globex\"): `malformed_request` to (no action)\n" +
		"- stranger: `malformed_request`, whatever is asked\n" +
		"- 2 kinds of malformed input: `malformed_request`, whatever else they say\n"
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}
