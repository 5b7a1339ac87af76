// Package orglog is what an organization reads of the audit log: its events, byte
// for byte, the proof that the log holds one of them, the newest signed checkpoint,
// and a summary of how the organization stands. What a proof proves is for its
// reader to check: nothing here verifies anything for anybody.
package orglog

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"strconv"
	"time"
	"unicode/utf8"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/jsonbody"
	"github.com/orgkeys/orgkeys/internal/org"
)

// Limits of one answer.
const (
	usualTake = 100
	maxTake   = 1000
	maxTypes  = 64
	// MostCounted bounds the events that a summary counts by hour, the newest ones, and
	// those that one page of a query is looked for in.
	MostCounted = 20_000
	// Day is what a summary's plot covers, in hours.
	Day = 24
)

var (
	// ErrNotFound: the organization has no such event, or not one that the caller may see.
	ErrNotFound = errors.New("the organization has no such event")
	// ErrNotCovered: no signed checkpoint covers the event yet.
	ErrNotCovered = errors.New("no signed checkpoint covers the event yet")
)

// Stored is an event as the store holds it.
type Stored struct {
	Number   int64 // orders events, and is no part of the log
	Index    int64 // in the log; -1 until it has one
	Leaf     []byte
	Personal []byte // nil if there is none, or it was erased
}

// Event is a stored event with its personal part opened.
type Event struct {
	Stored
	Person audit.Personal
}

// Filter says which events to return. Events match it if they match every field
// that is not empty.
type Filter struct {
	Org    org.ID   // required
	Types  []string // any of which
	Object string
	Actor  string
	From   time.Time
	Until  time.Time // exclusive
	Person string    // the subject whose events alone the caller may see
	Before int64     // only numbers below this
	Take   int
	Floor  int64 // only numbers from this on
}

// sparse reports whether those that match may be few of those that an index leads to.
func (f Filter) sparse() bool {
	return len(f.Types) > 0 || f.Actor != "" || f.Person != "" || !f.From.IsZero() || !f.Until.IsZero()
}

// Page is a part of what was asked for, newest first.
type Page struct {
	Events []Event // may be empty although there is a next page
	Next   int64   // Before of the next page; 0: there is none
	// Archived is how many first events of the log, of all organizations, are in the
	// operator's archive, where this is the last page: older events are there.
	Archived int64
}

// Proof shows that the log holds an event. Its JSON is that of "orgkeys audit prove".
type Proof struct {
	Format     string   `json:"format"`
	Index      int64    `json:"index"`
	Event      string   `json:"event"`      // the leaf, verbatim
	Path       []string `json:"path"`       // the inclusion proof (RFC 6962, 2.1.1), base64, from the leaf up
	Checkpoint string   `json:"checkpoint"` // the signed checkpoint that it leads to
}

// Occupant is what has a place in the quota.
type Occupant struct {
	ID         string // of the key, made or not
	State      string // reserved, pending or released
	Since      time.Time
	Enrollment string // whose it is, where it is not an administrator's own
	Sealed     bool   // it goes out sealed
}

// Counts are how an organization stands.
type Counts struct {
	Occupants    []Occupant // of the quota of organization keys
	NodeKeys     int        // places taken in the quota of node keys
	Nodes        int
	Secrets      int
	Unconfirmed  int // live keys that nobody knows to have arrived
	Unreceived   int // sealed keys whose receipt is awaited
	Enrollments  int // that can still be claimed
	Approvals    int // claims that wait for an administrator
	Conflicts    int // recipients that wanted what another has
	EventsByHour [Day]int
}

// Summary is Counts and the state of the log.
type Summary struct {
	Counts
	Limit, NodeLimit int
	First            time.Time // when the first hour of EventsByHour begins
	Origin           string
	Size             int64 // events in the log, of all organizations
	Signed           int64 // events that the newest signed checkpoint covers
	Covered          time.Time
	Sinks            []audit.SinkStatus
}

// Store is what this package needs of the database. Its implementation is sqlstore.DB.
type Store interface {
	// OrgEvents returns at most f.Take events that match f, newest first.
	OrgEvents(ctx context.Context, f Filter) ([]Stored, error)
	// OrgFloor returns the number of the n-th newest event of f.Org, with f.Object if that
	// is not empty, below f.Before; 0 if there are fewer.
	OrgFloor(ctx context.Context, f Filter, n int) (int64, error)
	// OrgEvent returns the organization's event with the ID, or false. person is as in Filter.
	OrgEvent(ctx context.Context, org org.ID, id, person string) (Stored, bool, error)
	// OrgCounts returns how the organization stands; first is the beginning of the first hour.
	OrgCounts(ctx context.Context, org org.ID, first time.Time) (Counts, error)
	// Archived returns what is no longer in the database.
	Archived(ctx context.Context) (audit.Archived, error)
	Head(ctx context.Context) (audit.Checkpoint, error)
	LastSigned(ctx context.Context) (audit.Signed, error)
	Inclusion(ctx context.Context, size, index int64) (tlog.RecordProof, error)
}

// Config is what a Service is made of.
type Config struct {
	Gate             gate.Gate
	Store            Store
	Limit, NodeLimit int // the quotas
	Sinks            func() []audit.SinkStatus
	Covered          func() audit.CheckpointStatus
}

// Service is the use case. Every read leaves its own audit event.
type Service struct{ c Config }

// New returns a Service.
func New(c Config) *Service { return &Service{c} }

var (
	typeForm = regexp.MustCompile(`^[a-z]{1,32}\.[a-z_]{1,32}$`)
	textForm = regexp.MustCompile(`^[^\x00-\x1f\x7f]{1,256}$`)
	idForm   = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
)

// Events answers a query for the organization's events, as far as the policy says.
// What is wrong with the query is a *jsonbody.Error.
func (s *Service) Events(ctx context.Context, call gate.Call, org org.ID, query string) (Page, error) {
	pass, err := s.c.Gate.Decide(ctx, call, authz.ReadEvents, org, "")
	if err != nil {
		return Page{}, err
	}
	f, err := parse(query)
	if err != nil {
		return Page{}, s.c.Gate.Failed(ctx, pass, audit.RequestFailed, "invalid", err)
	}
	f.Org, f.Person = org, onlyOf(pass)
	page, err := s.page(ctx, f)
	if err != nil {
		return Page{}, s.failed(ctx, pass, audit.EventsRead, err)
	}
	e := pass.Event(audit.EventsRead)
	e.Add(map[string]string{"returned": strconv.Itoa(len(page.Events))})
	return page, s.c.Gate.Record(ctx, e)
}

func (s *Service) page(ctx context.Context, f Filter) (Page, error) {
	take := f.Take
	f.Take++ // one more tells whether there is a next page
	if f.sparse() {
		floor, err := s.c.Store.OrgFloor(ctx, f, MostCounted)
		if err != nil {
			return Page{}, err
		}
		f.Floor = floor
	}
	stored, err := s.c.Store.OrgEvents(ctx, f)
	if err != nil {
		return Page{}, err
	}
	page := Page{Next: f.Floor}
	if len(stored) > take {
		stored = stored[:take]
		page.Next = stored[take-1].Number
	}
	if page.Next == 0 {
		archived, err := s.c.Store.Archived(ctx)
		if err != nil {
			return Page{}, err
		}
		page.Archived = archived.Moved
	}
	page.Events = make([]Event, len(stored))
	for i, one := range stored {
		page.Events[i].Stored = one
		if one.Personal == nil || ofAnother(one.Leaf, f.Org) {
			continue
		}
		if page.Events[i].Person, err = audit.DecodePersonal(one.Personal); err != nil {
			return Page{}, err
		}
	}
	return page, nil
}

// ofAnother reports whether somebody of another organization did what leaf says:
// what is known of that person is not this organization's. So is that of a leaf
// that cannot be read.
func ofAnother(leaf []byte, org org.ID) bool {
	e, err := audit.Decode(leaf)
	return err != nil || e.ActorOrg != "" && e.ActorOrg != org
}

// failed records that what the caller may read could not be read.
func (s *Service) failed(ctx context.Context, pass gate.Pass, t audit.Type, err error) error {
	return s.c.Gate.Failed(ctx, pass, t, gate.ReasonFor(ctx, "unavailable"), fmt.Errorf("reading the log: %w", err))
}

// onlyOf is the person whose events alone pass allows, or empty. Any scope but
// the whole organization is the narrow one.
func onlyOf(pass gate.Pass) string {
	if pass.Decision.Scope == authz.WholeOrganization {
		return ""
	}
	return pass.Call.Caller.Subject
}

// parse reads a query: type (repeated), object, actor, from, until, before, take.
func parse(query string) (Filter, error) {
	f := Filter{Take: usualTake}
	values, err := url.ParseQuery(query)
	if err != nil {
		return f, &jsonbody.Error{Field: "query", Problem: "is malformed"}
	}
	for name, given := range values {
		if name != "type" && len(given) > 1 {
			return f, &jsonbody.Error{Field: name, Problem: "is given twice"}
		}
		if wrong := f.set(name, given); wrong != "" {
			return f, &jsonbody.Error{Field: printable(name), Problem: wrong}
		}
	}
	return f, nil
}

// set sets what the parameter with that name says, and returns what is wrong with it, if anything.
func (f *Filter) set(name string, given []string) (wrong string) {
	var err error
	switch value := given[0]; name {
	case "type":
		if f.Types = given; len(given) > maxTypes {
			return fmt.Sprintf("is given more than %d times", maxTypes)
		}
		for _, one := range given {
			if !typeForm.MatchString(one) {
				return "is not a type of events, such as orgkey.created"
			}
		}
	case "object":
		f.Object, wrong = value, notText(value)
	case "actor":
		f.Actor, wrong = value, notText(value)
	case "from":
		f.From, wrong = instant(value)
	case "until":
		f.Until, wrong = instant(value)
	case "before":
		if f.Before, err = strconv.ParseInt(value, 10, 64); err != nil || f.Before < 1 {
			return "is not what an answer said as next"
		}
	case "take":
		if f.Take, err = strconv.Atoi(value); err != nil || f.Take < 1 || f.Take > maxTake {
			return fmt.Sprintf("is not a number from 1 to %d", maxTake)
		}
	default:
		return "is not known"
	}
	return wrong
}

func notText(value string) string {
	if utf8.ValidString(value) && textForm.MatchString(value) {
		return ""
	}
	return "is not 1 to 256 characters without control characters"
}

func instant(value string) (time.Time, string) {
	at, ok := jsonbody.ParseTimestamp(value)
	if !ok {
		return at, "is not a time, such as 2026-11-25T04:26:31Z"
	}
	return at, ""
}

// printable keeps what a client made up out of messages.
func printable(name string) string {
	if len(name) > 32 || !regexp.MustCompile(`^[A-Za-z_]+$`).MatchString(name) {
		return "query"
	}
	return name
}

const proofFormat = "orgkeys-proof/1"

// Prove returns the proof of one of the organization's events, by its ID, under the
// newest signed checkpoint. It is ErrNotFound, or ErrNotCovered for some seconds.
func (s *Service) Prove(ctx context.Context, call gate.Call, org org.ID, id string) (Proof, error) {
	pass, err := s.c.Gate.Decide(ctx, call, authz.ReadEvents, org, id)
	if err != nil {
		return Proof{}, err
	}
	if !idForm.MatchString(id) {
		return Proof{}, s.c.Gate.Failed(ctx, pass, audit.RequestFailed, "not_found", ErrNotFound)
	}
	proof, err := s.prove(ctx, pass, id)
	switch {
	case errors.Is(err, ErrNotFound):
		return Proof{}, s.c.Gate.Failed(ctx, pass, audit.RequestFailed, "not_found", err)
	case errors.Is(err, ErrNotCovered):
		return Proof{}, s.c.Gate.Failed(ctx, pass, audit.EventsRead, "pending", err)
	case err != nil:
		return Proof{}, s.failed(ctx, pass, audit.EventsRead, err)
	}
	e := pass.Event(audit.EventsRead)
	e.Add(map[string]string{"returned": "1", "proof": strconv.FormatInt(proof.Index, 10)})
	return proof, s.c.Gate.Record(ctx, e)
}

func (s *Service) prove(ctx context.Context, pass gate.Pass, id string) (Proof, error) {
	event, there, err := s.c.Store.OrgEvent(ctx, pass.Org, id, onlyOf(pass))
	if err == nil && !there {
		err = ErrNotFound
	}
	if err != nil {
		return Proof{}, err
	}
	head, err := s.c.Store.LastSigned(ctx)
	if err != nil {
		return Proof{}, err
	}
	if event.Index < 0 || event.Index >= head.Size {
		return Proof{}, ErrNotCovered
	}
	path, err := s.c.Store.Inclusion(ctx, head.Size, event.Index)
	if err != nil {
		return Proof{}, err
	}
	p := Proof{Format: proofFormat, Index: event.Index, Event: string(event.Leaf), Path: make([]string, len(path)), Checkpoint: head.Note}
	for i, h := range path {
		p.Path[i] = base64.StdEncoding.EncodeToString(h[:])
	}
	return p, nil
}

// Checkpoint returns the newest signed checkpoint. It is ErrNotCovered while there is none.
func (s *Service) Checkpoint(ctx context.Context, call gate.Call, org org.ID) (audit.Signed, error) {
	pass, err := s.c.Gate.Decide(ctx, call, authz.ReadEvents, org, "")
	if err != nil {
		return audit.Signed{}, err
	}
	signed, err := s.c.Store.LastSigned(ctx)
	if err != nil {
		return audit.Signed{}, s.failed(ctx, pass, audit.EventsRead, err)
	}
	if signed.Note == "" {
		return audit.Signed{}, s.c.Gate.Failed(ctx, pass, audit.EventsRead, "pending", ErrNotCovered)
	}
	e := pass.Event(audit.EventsRead)
	e.Add(map[string]string{"returned": "0", "checkpoint": strconv.FormatInt(signed.Size, 10)})
	return signed, s.c.Gate.Record(ctx, e)
}

// Summarize returns how the organization stands. Whoever may list its keys may read it.
func (s *Service) Summarize(ctx context.Context, call gate.Call, org org.ID) (Summary, error) {
	pass, err := s.c.Gate.Decide(ctx, call, authz.ListKeys, org, "")
	if err != nil {
		return Summary{}, err
	}
	summary, err := s.summary(ctx, org)
	if err != nil {
		return Summary{}, s.failed(ctx, pass, audit.KeysListed, err)
	}
	e := pass.Event(audit.KeysListed)
	e.Add(map[string]string{"as": "summary"})
	return summary, s.c.Gate.Record(ctx, e)
}

func (s *Service) summary(ctx context.Context, org org.ID) (Summary, error) {
	first := time.Now().UTC().Truncate(time.Hour).Add(-(Day - 1) * time.Hour)
	counts, err := s.c.Store.OrgCounts(ctx, org, first)
	if err != nil {
		return Summary{}, err
	}
	head, err := s.c.Store.Head(ctx)
	if err != nil {
		return Summary{}, err
	}
	covered := s.c.Covered()
	return Summary{
		Counts: counts, Limit: s.c.Limit, NodeLimit: s.c.NodeLimit, First: first, Origin: head.Origin, Size: head.Size,
		Signed: covered.Size, Covered: covered.Covered, Sinks: s.c.Sinks(),
	}, nil
}
