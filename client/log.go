package client

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// LogFilter says which of the organization's events to return. Events match it if
// they match every field that is not empty.
type LogFilter struct {
	Types       []string // such as orgkey.created; any of them
	Object      string   // the ID of a key, node or enrollment, or the name of a secret
	Actor       string
	From, Until time.Time // until is exclusive
	Before      int64     // LogPage.Next of the page before
	Take        int       // 1 to 1000; 100 if 0
}

func (f LogFilter) query() string {
	q := url.Values{}
	set := func(name, value string) {
		if value != "" {
			q.Set(name, value)
		}
	}
	q["type"] = f.Types
	set("object", f.Object)
	set("actor", f.Actor)
	if !f.From.IsZero() {
		set("from", f.From.UTC().Format(time.RFC3339Nano))
	}
	if !f.Until.IsZero() {
		set("until", f.Until.UTC().Format(time.RFC3339Nano))
	}
	if f.Before != 0 {
		set("before", strconv.FormatInt(f.Before, 10))
	}
	if f.Take != 0 {
		set("take", strconv.Itoa(f.Take))
	}
	if encoded := q.Encode(); encoded != "" {
		return "?" + encoded
	}
	return ""
}

// LogEntry is one event of the audit log, and what is known of the person outside it.
type LogEntry struct {
	Index   *int64 `json:"index"` // in the log; nil until it has one, for some hundred milliseconds
	Leaf    string `json:"event"` // as the log holds it, byte for byte
	Name    string `json:"name"`
	Email   string `json:"email"`
	Address string `json:"address"`
	Note    string `json:"note"` // why, in the words of who did it
}

// LogPage is a part of the organization's events, newest first.
type LogPage struct {
	Entries []LogEntry `json:"data"` // may be empty although there is a next page
	Next    int64      `json:"next"` // LogFilter.Before of the next page; 0: there is none
	// Archived is how many first events of the log, of all organizations, are in the
	// operator's archive, where this is the last page: older events are there.
	Archived int64 `json:"archived"`
}

// Log returns the organization's events, or the caller's own, as the policy says.
func (c *Client) Log(ctx context.Context, org string, f LogFilter) (LogPage, error) {
	var page LogPage
	return page, c.do(ctx, request{method: http.MethodGet, path: orgPath(org, "event") + f.query(), token: true, limit: maxList, read: func(a *answer) error {
		if err := a.decode(&page); err != nil {
			return err
		}
		if page.Entries == nil {
			return a.foreign("JSON without events")
		}
		return nil
	}})
}

// Summary is an overview of an organization.
type Summary struct {
	Keys         Quota      `json:"keys"`
	NodeKeys     Quota      `json:"nodeKeys"`
	Occupants    []Occupant `json:"occupants"` // of the quota of organization keys
	Nodes        int        `json:"nodes"`
	Secrets      int        `json:"secrets"`
	Unconfirmed  int        `json:"unconfirmed"` // live keys that nobody knows to have arrived
	Unreceived   int        `json:"unreceived"`  // sealed keys whose receipt is awaited
	Enrollments  int        `json:"enrollments"` // that can still be claimed
	Approvals    int        `json:"approvals"`   // claims that wait for an administrator
	Conflicts    int        `json:"conflicts"`   // recipients that were refused because another has the claim
	EventsFrom   time.Time  `json:"eventsFrom"`
	EventsByHour []int      `json:"eventsByHour"` // from EventsFrom on
	Log          LogState   `json:"log"`
}

// Quota is how much of a quota is used.
type Quota struct {
	Used  int `json:"used"`
	Limit int `json:"limit"`
}

// Occupant is what has a place in the quota.
type Occupant struct {
	ID         string    `json:"id"`    // of the key, made or not
	State      string    `json:"state"` // reserved, pending or released
	Since      time.Time `json:"since,omitzero"`
	Enrollment string    `json:"enrollment"` // whose it is; empty for an administrator's own
	Sealed     bool      `json:"sealed"`     // it goes out sealed
}

// LogState is how far the log, its checkpoints and its sinks are, for all organizations.
type LogState struct {
	Origin  string      `json:"origin"`
	Size    int64       `json:"size"`
	Signed  int64       `json:"signed"` // events that the newest signed checkpoint covers
	Covered time.Time   `json:"covered,omitzero"`
	Sinks   []SinkState `json:"sinks"`
}

// SinkState is how far one audit sink is.
type SinkState struct {
	Name     string    `json:"name"`
	Next     int64     `json:"next"` // the first index that it lacks
	Going    bool      `json:"going"`
	CaughtUp time.Time `json:"caughtUp,omitzero"`
}

// Summary returns an overview of the organization.
func (c *Client) Summary(ctx context.Context, org string) (*Summary, error) {
	return get[Summary](ctx, c, orgPath(org, "summary"))
}

// PolicyRow is what the policy says of one action.
type PolicyRow struct {
	Decision
	ByRole map[string]RoleDecision `json:"byRole"`
}

// RoleDecision is what the policy says to a person with one role.
type RoleDecision struct {
	Allow  bool   `json:"allow"`
	Reason string `json:"reason"`
	Scope  string `json:"scope"`
}

// Policy returns what the policy says of every action in the organization.
func (c *Client) Policy(ctx context.Context, org string) ([]PolicyRow, error) {
	return list[PolicyRow](ctx, c, orgPath(org, "decision"))
}

// Because returns a client whose deletions and revocations are recorded with that
// reason: 1 to 200 characters, for people. It is in the part of the events that can be erased.
func (c *Client) Because(reason string) *Client {
	other := *c
	other.reason = "?" + url.Values{"reason": {reason}}.Encode()
	return &other
}
