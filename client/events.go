package client

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/go-json-experiment/json"
)

// The contexts and changes of events, as EventFilter names them.
const (
	OfNodes = "node"
	OfKeys  = "key"

	WasCreated = "created"
	WasUpdated = "updated"
	WasDeleted = "deleted"
)

// What the API calls contexts and changes in requests. A context may have the name, too,
// that Event.Context has.
var (
	contextNumbers = map[string]int{OfNodes: 9, "flashbacknode": 9, OfKeys: 10, "orgkey": 10}
	changeNumbers  = map[string]int{WasCreated: 0, WasUpdated: 1, WasDeleted: 2}
)

// EventFilter says which events to list. The zero value is the last day's. A name that is
// none is an error, ErrRequest, and not taken for no restriction.
type EventFilter struct {
	From, To time.Time // zero: the last 24 hours, and no end
	Context  string    // OfNodes, OfKeys, or both if empty
	Change   string    // WasCreated, WasUpdated, WasDeleted, or all if empty
	Object   string    // the ID of a key or node; any if empty
	By       string    // who did it; anybody if empty
	Unread   bool      // only what the caller has not marked as read
	Skip     int
	Take     int // 1 to 100; 20 if 0
}

type eventFields struct {
	Org     string     `json:"orgId"`
	From    *time.Time `json:"from_timestamp,omitempty"`
	To      *time.Time `json:"to_timestamp,omitempty"`
	Context *int       `json:"context,omitempty"`
	Change  *int       `json:"event,omitempty"`
	Object  string     `json:"contextId,omitempty"`
	By      string     `json:"userId,omitempty"`
	Unread  bool       `json:"showUnread,omitzero"`
	Skip    int        `json:"skip,omitzero"`
	Take    int        `json:"take,omitzero"`
}

func (f EventFilter) fields(org string) (eventFields, error) {
	e := eventFields{Org: org, Object: f.Object, By: f.By, Unread: f.Unread, Skip: f.Skip, Take: f.Take}
	instant := func(at time.Time) *time.Time {
		if at.IsZero() {
			return nil
		}
		return &at
	}
	number := func(what, name string, of map[string]int) (*int, error) {
		if name == "" {
			return nil, nil
		}
		n, known := of[name]
		if !known {
			return nil, fmt.Errorf("%w: there is no %s %q", ErrRequest, what, name)
		}
		return &n, nil
	}
	e.From, e.To = instant(f.From), instant(f.To)
	var err error
	if e.Context, err = number("context", f.Context, contextNumbers); err != nil {
		return e, err
	}
	e.Change, err = number("change", f.Change, changeNumbers)
	return e, err
}

// Event is a change in an organization.
type Event struct {
	ID      int64     `json:"id"`
	Time    time.Time `json:"timestamp"`
	Object  string    `json:"contextId"` // the ID of the key or node
	Context string    `json:"context"`   // flashbacknode or orgkey
	Change  string    `json:"event"`     // created, updated or deleted
	Org     string    `json:"orgId"`
	By      string    `json:"userId"` // a person's subject; for a node the ID of the key that it signed with
	Name    string    `json:"userName"`
	Email   string    `json:"userEmail"`
	Leaf    string    `json:"jsonData"`   // as the audit log holds it, byte for byte
	Unread  bool      `json:"showUnread"` // the caller has not marked it as read
}

// EventPage is a page of events, newest first.
type EventPage struct {
	Events []Event `json:"events"`
	Total  int     `json:"total"` // on all pages
}

// Events lists changes in the organization: all for its administrators, for
// other members their own.
func (c *Client) Events(ctx context.Context, org string, f EventFilter) (EventPage, error) {
	var page EventPage
	fields, err := f.fields(org)
	if err != nil {
		return page, err
	}
	return page, c.do(ctx, request{
		method: http.MethodPost, path: "/systemevent", token: true, typ: "application/json", limit: maxList,
		body: func() ([]byte, error) { return json.Marshal(fields) },
		read: func(a *answer) error {
			if err := a.decode(&page); err != nil {
				return err
			}
			if page.Events == nil {
				return a.foreign("JSON without events")
			}
			return nil
		},
	})
}
