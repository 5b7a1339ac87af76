package systemevent

import (
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/orgkeys/orgkeys/internal/jsonbody"
	"github.com/orgkeys/orgkeys/internal/org"
)

const (
	defaultWindow = 24 * time.Hour
	defaultTake   = 20
	maxTake       = 100
	// maxSkip bounds the work on a page. Beyond it, to_timestamp leads further.
	maxSkip = 100_000
	// mostCounted is the most that a page's total says: as many events as skip and take reach.
	mostCounted = maxSkip + maxTake
	// maxMarks bounds what one request marks: ten of the longest pages.
	maxMarks = 10 * maxTake
	// maxNumber is the largest integer that JavaScript has exactly.
	maxNumber = 1<<53 - 1
)

type fields struct {
	OrgID     *string        `json:"orgId"`
	From      jsontext.Value `json:"from_timestamp"`
	To        jsontext.Value `json:"to_timestamp"`
	Context   *Context       `json:"context"`
	Event     *Change        `json:"event"`
	ContextID *string        `json:"contextId"`
	UserID    *string        `json:"userId"`
	Workspace *string        `json:"workspaceId"`
	Unread    *bool          `json:"showUnread"`
	Skip      *int           `json:"skip"`
	Take      *int           `json:"take"`
}

// parse reads a body; an empty one asks for everything of the last 24 hours.
// With an error, which is a *jsonbody.Error, the filter's organization is still
// the one to decide about.
func parse(body []byte, own org.ID, now time.Time) (Filter, error) {
	f := Filter{Org: own, Count: mostCounted}
	var sent fields
	if len(body) > 0 {
		if err := jsonbody.Decode(body, &sent); err != nil {
			return f, err
		}
	}
	if sent.OrgID != nil {
		named, err := org.Parse(*sent.OrgID)
		if err != nil {
			return f, &jsonbody.Error{Field: "orgId", Problem: "is not an organization ID"}
		}
		f.Org = named
	}
	if err := sent.window(&f, now); err != nil {
		return f, err
	}
	if err := sent.selection(&f); err != nil {
		return f, err
	}
	return f, sent.part(&f)
}

// window is from one millisecond to another, both included: answers give times
// to the millisecond, and an event must be found by the time it is shown with.
func (sent fields) window(f *Filter, now time.Time) error {
	fromText, from, err := jsonbody.Timestamp("from_timestamp", sent.From)
	if err != nil {
		return err
	}
	toText, to, err := jsonbody.Timestamp("to_timestamp", sent.To)
	if err != nil {
		return err
	}
	if fromText != "" && toText != "" && from.After(to) {
		return &jsonbody.Error{Field: "from_timestamp", Problem: "is after to_timestamp"}
	}
	if toText != "" {
		f.Before = to.Truncate(time.Millisecond).Add(time.Millisecond)
		now = to
	}
	if fromText == "" {
		from = now.Add(-defaultWindow)
	}
	f.From = from.Truncate(time.Millisecond)
	return nil
}

func (sent fields) selection(f *Filter) error {
	if c := sent.Context; c != nil && (*c < 0 || int(*c) >= len(contexts)) {
		return &jsonbody.Error{Field: "context", Problem: "is not from 0 to 13"}
	}
	if e := sent.Event; e != nil && (*e < 0 || int(*e) >= len(changes)) {
		return &jsonbody.Error{Field: "event", Problem: "is none of 0, 1, 2"}
	}
	f.Kinds = kinds(sent.Context, sent.Event)
	workspace, err := jsonbody.Text("workspaceId", sent.Workspace)
	if err != nil {
		return err
	}
	if workspace != "" { // keys and nodes belong to none
		f.Kinds = nil
	}
	f.Unread = sent.Unread != nil && *sent.Unread
	if f.Object, err = jsonbody.Text("contextId", sent.ContextID); err != nil {
		return err
	}
	f.Actor, err = jsonbody.Text("userId", sent.UserID)
	return err
}

func (sent fields) part(f *Filter) error {
	f.Take = defaultTake
	if sent.Take != nil {
		f.Take = *sent.Take
	}
	if sent.Skip != nil {
		f.Skip = *sent.Skip
	}
	if f.Take < 1 || f.Take > maxTake {
		return &jsonbody.Error{Field: "take", Problem: "is not from 1 to 100"}
	}
	if f.Skip < 0 || f.Skip > maxSkip {
		return &jsonbody.Error{Field: "skip", Problem: "is not from 0 to 100000: further back, ask with an earlier to_timestamp"}
	}
	return nil
}

// parseMarks reads the numbers of the events to mark: one as id, or any as ids.
func parseMarks(body []byte) ([]int64, error) {
	var sent struct {
		ID  *int64  `json:"id"`
		IDs []int64 `json:"ids"`
	}
	if err := jsonbody.Decode(body, &sent); err != nil {
		return nil, err
	}
	numbers := sent.IDs
	switch {
	case (sent.ID == nil) == (sent.IDs == nil):
		return nil, &jsonbody.Error{Field: "id", Problem: "or ids is needed, and not both"}
	case sent.ID != nil:
		numbers = []int64{*sent.ID}
	case len(numbers) > maxMarks:
		return nil, &jsonbody.Error{Field: "ids", Problem: "has more than 1000 numbers: mark them in several requests"}
	}
	for _, n := range numbers {
		if n < 1 || n > maxNumber {
			return nil, &jsonbody.Error{Field: "id", Problem: "is not the id of an event"}
		}
	}
	return numbers, nil
}
