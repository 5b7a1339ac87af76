package policies

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
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

// Markdown renders the whole table, as policies/README.md shows it: what is
// allowed in bold, by its scope, and what is denied by its reason.
func (d Decisions) Markdown() string {
	var b strings.Builder
	header := []string{"Action", "Organization"}
	for _, c := range d.Callers {
		header = append(header, c.Name)
	}
	tableHeader(&b, header)
	for _, row := range d.Rows {
		cells := []string{row.name(), row.Organization}
		for _, answer := range row.Answers {
			cells = append(cells, emphasized(answer))
		}
		tableRow(&b, cells)
	}
	names := make([]string, len(d.Malformed))
	for i, m := range d.Malformed {
		names[i] = m.Name
	}
	fmt.Fprintf(&b, "\nInput that is denied as malformed_request whatever the rest says: %s.\n", strings.Join(names, "; "))
	return b.String()
}

// Summary renders what differs between callers as a table, and the rows and
// columns that say the same throughout in words, as SECURITY.md shows it.
func (d Decisions) Summary() string {
	var b strings.Builder
	callers, always := d.callersThatDiffer()
	header := []string{"Action, organization"}
	for _, c := range callers {
		header = append(header, d.Callers[c].Name)
	}
	tableHeader(&b, header)
	var uniform []Row
	for _, row := range d.Rows {
		cells := []string{row.name() + ", " + row.Organization}
		for _, c := range callers {
			cells = append(cells, short(row.Answers[c]))
		}
		if len(slices.Compact(slices.Clone(cells[1:]))) == 1 {
			uniform = append(uniform, row)
			continue
		}
		tableRow(&b, cells)
	}
	b.WriteString("\n–: `" + insufficientRole + "`. The rest is the same for all of these callers:\n\n")
	for _, line := range d.inWords(uniform, callers[0]) {
		b.WriteString("- " + line + "\n")
	}
	for _, line := range always {
		fmt.Fprintf(&b, "- %s, whatever is asked\n", line)
	}
	fmt.Fprintf(&b, "- %d kinds of malformed input: `malformed_request`, whatever else they say\n", len(d.Malformed))
	return b.String()
}

// inWords says what caller, as everybody, is answered in rows: one line for
// the organizations in which the same actions get the same answer.
func (d Decisions) inWords(rows []Row, caller int) []string {
	var order []string
	actions := map[string][]string{} // organization: answer → actions
	for _, row := range rows {
		whose, answer := d.Organizations[row.Organization], row.Answers[caller]
		key := fmt.Sprintf("%s (%q about %q): `%s`", row.Organization, whose.Caller, whose.Request, answer)
		if actions[key] == nil {
			order = append(order, key)
		}
		actions[key] = append(actions[key], row.name())
	}
	for i, key := range order {
		order[i] = key + " to " + strings.Join(actions[key], ", ")
	}
	return order
}

// insufficientRole is the reason that most denials in one's own organization have.
const insufficientRole = "insufficient_role"

// callersThatDiffer are the indices of callers to whom the answer depends on
// the request. always says what the others get.
func (d Decisions) callersThatDiffer() (indices []int, always []string) {
	for i, c := range d.Callers {
		answer := d.Rows[0].Answers[i]
		if slices.ContainsFunc(d.Rows, func(r Row) bool { return r.Answers[i] != answer }) {
			indices = append(indices, i)
			continue
		}
		always = append(always, fmt.Sprintf("%s: `%s`", c.Name, answer))
	}
	return indices, always
}

func (r Row) name() string {
	if r.Action == "" {
		return "(no action)"
	}
	return "`" + r.Action + "`"
}

func emphasized(answer string) string {
	if Allows(answer) {
		return "**" + answer + "**"
	}
	return answer
}

func short(answer string) string {
	if answer == insufficientRole {
		return "–"
	}
	return emphasized(answer)
}

func tableHeader(b *strings.Builder, cells []string) {
	tableRow(b, cells)
	b.WriteString("|" + strings.Repeat("---|", len(cells)) + "\n")
}

func tableRow(b *strings.Builder, cells []string) {
	b.WriteString("| " + strings.Join(cells, " | ") + " |\n")
}

// The markers in a document between which the table stands.
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
