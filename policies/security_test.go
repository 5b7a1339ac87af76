package policies_test

import (
	"os"
	"testing"

	"github.com/orgkeys/orgkeys/policies"
)

func TestSecurityDocumentShowsTheDecisionTableThatTheTestsRead(t *testing.T) {
	document, err := os.ReadFile("../SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	decisions, err := policies.Table()
	if err != nil {
		t.Fatal(err)
	}
	_, shown, _, err := policies.Between(string(document))
	if err != nil {
		t.Fatalf("SECURITY.md: %v", err)
	}
	if shown != decisions.Markdown() {
		t.Fatal("SECURITY.md shows another decision table than policies/decisions.json: run go generate ./policies")
	}
}
