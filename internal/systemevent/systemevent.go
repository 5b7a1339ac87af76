// Package systemevent is the platform's feed of what changed in an
// organization: its keys made, delivered, withdrawn and deleted, its nodes
// registered and gone. It is a view of the audit log. Reads, denials, failures
// and boot secrets are in the log too, and not in the feed: the platform has no
// context for them.
package systemevent

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/org"
)

// Context is what an event is about. The platform's client asks by number, and
// is answered with the name.
type Context int

// The contexts that this service has events of.
const (
	FlashbackNode Context = 9
	OrgKey        Context = 10
)

// contexts are the platform's names of its contexts, by their numbers.
var contexts = []string{
	"workspace", "bucket", "repo", "user", "org", "workspaceuser", "apikey", "usersettings", "orgsettings",
	"flashbacknode", "orgkey", "aillm", "aillmapikey", "conversation",
}

// String is the platform's name.
func (c Context) String() string { return contexts[c] }

// Change is the kind of change, as a number in requests and a name in answers.
type Change int

// The changes.
const (
	Created Change = 0
	Updated Change = 1
	Deleted Change = 2
)

var changes = []string{"created", "updated", "deleted"}

// String is the platform's name.
func (c Change) String() string { return changes[c] }

// Event is one change.
type Event struct {
	audit.Event
	Number  int64 // identifies it in this database, and fits a JavaScript number
	Unread  bool  // the caller has not marked it as read
	Context Context
	Change  Change
	Person  audit.Personal // empty if the event has no personal data, or it was erased
	Leaf    string         // the event as the audit log holds it, verbatim
}

// Page is a part of what was asked for.
type Page struct {
	Events     []Event // newest first
	Total      int     // matching events, on all pages
	Skip, Take int     // as they applied
}

// Stored is an event as the store holds it.
type Stored struct {
	Number   int64
	Unread   bool
	Leaf     []byte
	Personal []byte // nil if there is none
}

// Filter says which events to return. Events match it if they match every
// field that is not empty.
type Filter struct {
	Org    org.ID // required
	Reader string // required: the reader whose marks decide what is unread
	Unread bool   // only what Reader has not marked as read
	Kinds  []Kind // any of which; without one nothing matches
	From   time.Time
	Before time.Time // exclusive
	Object string
	Actor  string
	Person string // the subject of the person who did it
	Skip   int
	Take   int
	Count  int // the most that the total says
}

// Marks says which events a reader has read, or has not.
type Marks struct {
	Org     org.ID
	Reader  string
	Numbers []int64 // of Events; those that are not the reader's to see are passed over
	Person  string  // as in Filter
	Read    bool
}

// Kind selects events by their type, and by their reason unless that is empty.
type Kind struct {
	Type   audit.Type
	Reason string
}

// Store is what the feed needs of the database. Its implementation is sqlstore.
type Store interface {
	// SystemEvents returns f.Take events that match f, newest first, after
	// f.Skip others, and how many match in all. Whether they have their place
	// in the log yet does not matter: the changes are made.
	SystemEvents(ctx context.Context, f Filter) (events []Stored, total int, err error)
	// MarkSystemEvents sets or removes m's marks, and commits with them the event
	// that it is given how many that changed.
	MarkSystemEvents(ctx context.Context, m Marks, kinds []Kind, event func(changed int64) audit.Event) error
}

// feed lists every type of event in the feed, with its name on the platform. A
// node's request that was served before changed nothing (reason "repeated"),
// and orgkey.all_deleted comes with an event of its own for each key.
var feed = []struct {
	Kind
	Context Context
	Change  Change
}{
	{Kind{audit.KeyCreated, ""}, OrgKey, Created},
	{Kind{audit.KeyDelivered, ""}, OrgKey, Updated},
	{Kind{audit.KeyWithdrawn, ""}, OrgKey, Deleted},
	{Kind{audit.KeyDeleted, ""}, OrgKey, Deleted},
	{Kind{audit.NodeRegistered, "created"}, FlashbackNode, Created},
	{Kind{audit.NodeRegistered, "updated"}, FlashbackNode, Updated},
	{Kind{audit.NodeUnregistered, "deleted"}, FlashbackNode, Deleted},
	{Kind{audit.NodeDeleted, ""}, FlashbackNode, Deleted},
}

// kinds returns the kinds in the feed, of one context and change unless those are nil.
func kinds(c *Context, change *Change) []Kind {
	var all []Kind
	for _, k := range feed {
		if (c == nil || *c == k.Context) && (change == nil || *change == k.Change) {
			all = append(all, k.Kind)
		}
	}
	return all
}

// read makes an Event of what the store returned.
func read(s Stored) (Event, error) {
	leaf, err := audit.Decode(s.Leaf)
	if err != nil {
		return Event{}, err
	}
	e := Event{Event: leaf, Number: s.Number, Unread: s.Unread, Leaf: string(s.Leaf)}
	if s.Personal != nil {
		if e.Person, err = audit.DecodePersonal(s.Personal); err != nil {
			return Event{}, err
		}
	}
	for _, k := range feed {
		if k.Type == leaf.Type && (k.Reason == "" || k.Reason == leaf.Reason) {
			e.Context, e.Change = k.Context, k.Change
			return e, nil
		}
	}
	return Event{}, fmt.Errorf("event %s (%s) is not one of the feed: its columns are not those of its leaf", leaf.ID, leaf.Type)
}

// Service is the use case. Every read leaves its own audit event.
type Service struct {
	gate  gate.Gate
	store Store
}

// New returns a Service.
func New(g gate.Gate, store Store) *Service { return &Service{g, store} }

// Read answers a request for events: of the caller's organization, or of the
// one that the body names, as far as the policy says. What is wrong with body
// is a *jsonbody.Error.
func (s *Service) Read(ctx context.Context, call gate.Call, body []byte) (Page, error) {
	f, wrong := parse(body, call.Caller.Org, time.Now())
	pass, err := s.gate.Decide(ctx, call, authz.ReadEvents, f.Org, "")
	if err != nil {
		return Page{}, err
	}
	if wrong != nil {
		return Page{}, s.gate.Failed(ctx, pass, audit.RequestFailed, "invalid", wrong)
	}
	f.Reader, f.Person = call.Caller.Subject, onlyOf(pass)
	page, err := s.page(ctx, f)
	if err != nil {
		return Page{}, s.gate.Failed(ctx, pass, audit.EventsRead, gate.ReasonFor(ctx, "unavailable"), fmt.Errorf("reading events: %w", err))
	}
	if err := s.gate.Record(ctx, readEvent(pass, f, page)); err != nil {
		return Page{}, err
	}
	return page, nil
}

// onlyOf is the person whose events alone pass allows, or empty. Any scope but
// the whole organization is the narrow one.
func onlyOf(pass gate.Pass) string {
	if pass.Decision.Scope == authz.WholeOrganization {
		return ""
	}
	return pass.Call.Caller.Subject
}

// Mark marks events of the caller's organization as read or unread, for the
// caller alone. Numbers of events that the caller may not see, or that there are
// not, are passed over, so that nobody learns which there are. What is wrong with
// body is a *jsonbody.Error.
func (s *Service) Mark(ctx context.Context, call gate.Call, body []byte, asRead bool) error {
	numbers, wrong := parseMarks(body)
	pass, err := s.gate.Decide(ctx, call, authz.MarkEvents, call.Caller.Org, "")
	if err != nil {
		return err
	}
	if wrong != nil {
		return s.gate.Failed(ctx, pass, audit.RequestFailed, "invalid", wrong)
	}
	m := Marks{Org: pass.Org, Reader: call.Caller.Subject, Person: onlyOf(pass), Numbers: numbers, Read: asRead}
	err = s.store.MarkSystemEvents(ctx, m, kinds(nil, nil), func(changed int64) audit.Event { return markEvent(pass, m, changed) })
	if err != nil {
		return s.gate.Failed(ctx, pass, audit.EventsMarked, gate.ReasonFor(ctx, "unavailable"), fmt.Errorf("marking events: %w", err))
	}
	return nil
}

func markEvent(pass gate.Pass, m Marks, changed int64) audit.Event {
	e := pass.Event(audit.EventsMarked)
	e.Detail = map[string]string{"asked": strconv.Itoa(len(m.Numbers)), "changed": strconv.FormatInt(changed, 10), "as": "unread"}
	if m.Read {
		e.Detail["as"] = "read"
	}
	return e
}

func (s *Service) page(ctx context.Context, f Filter) (Page, error) {
	stored, total, err := s.store.SystemEvents(ctx, f)
	if err != nil {
		return Page{}, err
	}
	page := Page{Events: make([]Event, len(stored)), Total: total, Skip: f.Skip, Take: f.Take}
	for i, one := range stored {
		if page.Events[i], err = read(one); err != nil {
			return Page{}, err
		}
	}
	return page, nil
}

// readEvent records a read. It does not contain the texts of the request: callers may
// send any text, and an event cannot be removed from the log.
func readEvent(pass gate.Pass, f Filter, page Page) audit.Event {
	e := pass.Event(audit.EventsRead)
	e.Add(map[string]string{
		"from":     f.From.UTC().Format(audit.TimeFormat),
		"returned": strconv.Itoa(len(page.Events)), "total": strconv.Itoa(page.Total), "skip": strconv.Itoa(page.Skip),
	})
	if !f.Before.IsZero() {
		e.Detail["before"] = f.Before.UTC().Format(audit.TimeFormat)
	}
	return e
}
