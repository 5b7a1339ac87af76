package policies

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// Decisions is the decision table: who gets which answer.
type Decisions struct {
	Callers       []Caller                 `json:"callers"`
	Organizations map[string]Organizations `json:"organizations"`
	Rows          []Row                    `json:"rows"`
	Malformed     []Malformed              `json:"malformed"`
}

// Caller is a column of the table.
type Caller struct {
	Name  string   `json:"name"`
	Kind  string   `json:"kind"`
	Roles []string `json:"roles"`
}

// Organizations is the caller's organization and the one the request is about.
type Organizations struct {
	Caller  string `json:"caller"`
	Request string `json:"request"`
}

// Row is the answers to one action in one of the Organizations, in the order of
// the callers. An answer is the scope of what is allowed ("organization",
// "own"), or the reason why it is denied.
type Row struct {
	Action       string   `json:"action"`
	Organization string   `json:"organization"`
	Answers      []string `json:"answers"`
}

// Malformed is an input that Go would not send, and that is denied as
// malformed_request.
type Malformed struct {
	Name  string          `json:"name"`
	Input json.RawMessage `json:"input"`
}

// Allows says whether an answer of the table is a "yes".
func Allows(answer string) bool { return answer == "organization" || answer == "own" }

// Table reads the embedded decision table. An empty or ragged one is an error.
func Table() (Decisions, error) {
	content, err := Files.ReadFile("decisions.json")
	if err != nil {
		return Decisions{}, fmt.Errorf("reading the decision table: %w", err)
	}
	var file struct {
		Decisions Decisions `json:"decisions"`
	}
	decoder := json.NewDecoder(bytes.NewReader(content))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&file); err != nil {
		return Decisions{}, fmt.Errorf("decoding the decision table: %w", err)
	}
	d := file.Decisions
	if len(d.Callers) == 0 || len(d.Rows) == 0 || len(d.Malformed) == 0 {
		return Decisions{}, errors.New("the decision table is empty")
	}
	for _, row := range d.Rows {
		if _, known := d.Organizations[row.Organization]; !known {
			return Decisions{}, fmt.Errorf("the decision table: %s: organization %q is not explained", row.Action, row.Organization)
		}
		if len(row.Answers) != len(d.Callers) {
			return Decisions{}, fmt.Errorf("the decision table: %s, %s organization: %d answers for %d callers",
				row.Action, row.Organization, len(row.Answers), len(d.Callers))
		}
	}
	return d, nil
}

// Markdown renders the table as SECURITY.md shows it: what is allowed in bold,
// by its scope, and what is denied by its reason.
func (d Decisions) Markdown() string {
	var b strings.Builder
	b.WriteString("| Action | Organization |")
	for _, c := range d.Callers {
		fmt.Fprintf(&b, " %s |", c.Name)
	}
	b.WriteString("\n|---|---|" + strings.Repeat("---|", len(d.Callers)) + "\n")
	for _, row := range d.Rows {
		action := "(empty)"
		if row.Action != "" {
			action = "`" + row.Action + "`"
		}
		fmt.Fprintf(&b, "| %s | %s |", action, row.Organization)
		for _, answer := range row.Answers {
			if Allows(answer) {
				answer = "**" + answer + "**"
			}
			fmt.Fprintf(&b, " %s |", answer)
		}
		b.WriteByte('\n')
	}
	names := make([]string, len(d.Malformed))
	for i, m := range d.Malformed {
		names[i] = m.Name
	}
	fmt.Fprintf(&b, "\nInput that is denied as malformed_request whatever the rest says: %s.\n", strings.Join(names, "; "))
	return b.String()
}

// The markers in SECURITY.md between which the table stands.
const (
	Begin = "<!-- decisions:begin -->\n"
	End   = "<!-- decisions:end -->\n"
)

// ErrMarkers says that a document has not exactly one pair of markers.
var ErrMarkers = errors.New("the document needs one line <!-- decisions:begin --> and after it one line <!-- decisions:end -->")

// Between returns what stands before, between and after the markers of document.
func Between(document string) (before, table, after string, err error) {
	before, rest, begins := strings.Cut(document, Begin)
	table, after, ends := strings.Cut(rest, End)
	if !begins || !ends || strings.Contains(table+after, Begin) || strings.Contains(before+after, End) {
		return "", "", "", ErrMarkers
	}
	return before, table, after, nil
}
