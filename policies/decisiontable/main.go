// Decisiontable puts the decision table into a Markdown document, between the
// lines <!-- decisions:begin --> and <!-- decisions:end -->. Without a document
// it prints the table.
//
//	go run ./policies/decisiontable SECURITY.md
package main

import (
	"fmt"
	"os"

	"github.com/orgkeys/orgkeys/policies"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "decisiontable:", err)
		os.Exit(1)
	}
}

func run(documents []string) error {
	decisions, err := policies.Table()
	if err != nil {
		return err
	}
	if len(documents) == 0 {
		fmt.Print(decisions.Markdown())
		return nil
	}
	for _, name := range documents {
		if err := replace(name, decisions.Markdown()); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func replace(name, table string) error {
	document, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	before, _, after, err := policies.Between(string(document))
	if err != nil {
		return err
	}
	return os.WriteFile(name, []byte(before+policies.Begin+table+policies.End+after), 0o644)
}
