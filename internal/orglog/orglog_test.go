package orglog

import (
	"context"
	"errors"
	"net/url"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/jsonbody"
	"github.com/orgkeys/orgkeys/internal/org"
)

func TestQueries(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 11, 25, 4, 26, 31, 0, time.UTC)
	for query, want := range map[string]Filter{
		"": {Take: usualTake},
		"type=orgkey.created&type=node.deleted&object=x&actor=u-7&from=2026-11-25T04:26:31Z&until=1764044791&before=7&take=1000": {
			Types: []string{"orgkey.created", "node.deleted"}, Object: "x", Actor: "u-7", From: at, Until: time.Unix(1764044791, 0), Before: 7, Take: 1000},
	} {
		if got, err := parse(query); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q is read as %+v, %v", query, got, err)
		}
	}
	for _, bad := range []string{
		"%zz", "a=1", "type=", "type=x", "type=DROP.TABLE", strings.Repeat("type=a.b&", maxTypes+1), "take=0", "take=1001", "take=x", "take=1&take=2",
		"before=0", "before=-1", "before=x", "from=yesterday", "from=", "until=2026", "object=", "actor=" + url.QueryEscape("a\x00b"), "actor=%ff", "object=a%c3", "object=" + strings.Repeat("x", 257),
		url.QueryEscape("<script>") + "=1",
	} {
		_, err := parse(bad)
		wrong, ok := errors.AsType[*jsonbody.Error](err)
		if !ok || strings.Contains(wrong.Error(), "<") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// long is the store of an organization with events 1 to long, of which only the first match.
type long struct {
	Store
	size, matching int64
	floors         int
}

func (l *long) OrgFloor(_ context.Context, f Filter, n int) (int64, error) {
	l.floors++
	top := l.size
	if f.Before > 0 {
		top = f.Before - 1
	}
	return max(top-int64(n)+1, 0), nil
}

func (l *long) OrgEvents(_ context.Context, f Filter) (found []Stored, err error) {
	for i := l.matching; i > 0 && i >= f.Floor && len(found) < f.Take; i-- {
		if f.Before == 0 || i < f.Before {
			found = append(found, Stored{Number: i})
		}
	}
	return found, nil
}

// A page is looked for in so many events and no more; the pages together have all that match.
func TestAPageIsLookedForInFewEvents(t *testing.T) {
	t.Parallel()
	store := &long{size: 3*MostCounted + 7, matching: 7}
	s := New(Config{Store: store})
	found, pages := 0, 0
	for f := (Filter{Org: "acme", Actor: "ada", Take: 3}); ; pages++ {
		page, err := s.page(t.Context(), f)
		if err != nil || pages > 10 {
			t.Fatalf("%d pages, %v", pages, err)
		}
		if pages < 3 && (len(page.Events) > 0 || page.Next == 0) {
			t.Errorf("page %d has %d events, next %d", pages, len(page.Events), page.Next)
		}
		found += len(page.Events)
		if f.Before = page.Next; f.Before == 0 {
			break
		}
	}
	if found != 7 || store.floors < 4 {
		t.Errorf("%d pages have %d events, with %d floors", pages, found, store.floors)
	}
	before := store.floors
	if page, err := s.page(t.Context(), Filter{Org: "acme", Take: 100}); err != nil || len(page.Events) != 7 || page.Next != 0 || store.floors != before {
		t.Errorf("without a filter there are %d events, next %d, %d floors, %v", len(page.Events), page.Next, store.floors-before, err)
	}
}

// The last page says that there are older events elsewhere, and no other.
func TestTheLastPageSaysWhatIsArchived(t *testing.T) {
	t.Parallel()
	s := New(Config{Store: &long{size: 5, matching: 5}})
	for take, want := range map[int]int64{3: 0, 5: 512} {
		if page, err := s.page(t.Context(), Filter{Org: "acme", Take: take}); err != nil || page.Archived != want {
			t.Errorf("of %d events: %d, %v; want %d", take, page.Archived, err, want)
		}
	}
}

func (*long) Archived(context.Context) (audit.Archived, error) {
	return audit.Archived{Moved: 512}, nil
}
func (one) Archived(context.Context) (audit.Archived, error) { return audit.Archived{}, nil }

// one is the store of an organization with one event.
type one struct {
	Store
	event Stored
}

func (o one) OrgEvents(context.Context, Filter) ([]Stored, error) { return []Stored{o.event}, nil }

func TestWhatIsKnownOfAStrangerIsNotShown(t *testing.T) {
	t.Parallel()
	for of, shown := range map[org.ID]bool{"acme": true, "": true, "other": false} {
		e := audit.New(audit.AccessDenied, "acme")
		e.Actor, e.ActorOrg, e.Personal = audit.Actor{Kind: authz.Person, ID: "eve"}, of, audit.Personal{Name: "Eve", Email: "eve@other.example", Address: "192.0.2.1"}
		record, err := e.Encode()
		if err != nil {
			t.Fatal(err)
		}
		page, err := New(Config{Store: one{event: Stored{Leaf: record.Leaf, Personal: record.Personal}}}).page(t.Context(), Filter{Org: "acme", Take: 1})
		if err != nil || len(page.Events) != 1 || (page.Events[0].Person == e.Personal) != shown || !shown && page.Events[0].Person != (audit.Personal{}) {
			t.Errorf("of a person of %q acme reads %+v, %v", of, page.Events, err)
		}
	}
}
