package audit

import (
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

// docs/audit.md describes every field that a leaf can have, and every type; the
// independent verifier knows them.
func TestTheDocumentAndTheVerifierKnowEveryFieldAndType(t *testing.T) {
	verifier, err := os.ReadFile("../../contrib/verify_export.py")
	if err != nil {
		t.Fatal(err)
	}
	known := func(set, name string) bool {
		members := regexp.MustCompile(`(?s)\n` + set + ` = \{(.*?)\n\}`).FindSubmatch(verifier)
		return members != nil && strings.Contains(string(members[1]), `"`+name+`"`)
	}
	document, err := os.ReadFile("../../docs/audit.md")
	if err != nil {
		t.Fatal(err)
	}
	for f := range reflect.TypeFor[Leaf]().Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if !strings.Contains(string(document), "\n| `"+name+"` | ") {
			t.Errorf("field %s is not in the table", name)
		}
		if !known("FIELDS", name) {
			t.Errorf("contrib/verify_export.py does not know the field %s", name)
		}
	}
	source, err := os.ReadFile("event.go")
	if err != nil {
		t.Fatal(err)
	}
	types := regexp.MustCompile(`(?m)^\s+\w+ +Type += +"([^"]+)"`).FindAllStringSubmatch(string(source), -1)
	if len(types) < 20 {
		t.Fatalf("only %d types found in the source", len(types))
	}
	for _, m := range types {
		if !strings.Contains(string(document), "`"+m[1]+"`") {
			t.Errorf("type %s is not in the table", m[1])
		}
		if !known("TYPES", m[1]) {
			t.Errorf("contrib/verify_export.py does not know the type %s", m[1])
		}
	}
}
