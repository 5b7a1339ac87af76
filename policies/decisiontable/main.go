// Decisiontable puts the decision table into a Markdown document, between the
// lines <!-- decisions:begin --> and <!-- decisions:end -->. Without a document
// it prints the table. With -summary, what says the same throughout is in words.
//
//	go run ./policies/decisiontable -summary SECURITY.md
package main

import (
	"flag"
	"fmt"
	"os"

	"github.com/orgkeys/orgkeys/policies"
)

func main() {
	summary := flag.Bool("summary", false, "put what says the same throughout in words")
	flag.Parse()
	if err := run(*summary, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "decisiontable:", err)
		os.Exit(1)
	}
}

func run(summary bool, documents []string) error {
	decisions, err := policies.Table()
	if err != nil {
		return err
	}
	text := decisions.Markdown()
	if summary {
		text = decisions.Summary()
	}
	if len(documents) == 0 {
		fmt.Print(text)
		return nil
	}
	for _, name := range documents {
		if err := replace(name, text); err != nil {
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
