package systemevent_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/jsonbody"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/internal/systemevent"
	"github.com/orgkeys/orgkeys/policies"
)

// feed is a service over a real database and policy.
type feed struct {
	t       *testing.T
	db      *sqlstore.DB
	service *systemevent.Service
	gate    gate.Gate
}

func newFeed(t *testing.T) feed {
	t.Helper()
	db, err := sqlstore.Open(t.Context(), filepath.Join(t.TempDir(), "orgkeys.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	if err := db.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	db.UseEventKey(audit.EventKey{})
	policy, err := authz.Load(t.Context(), policies.Files)
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	g := gate.Gate{Policy: policy, AuditLog: audit.NewLog(db, log), Log: log}
	return feed{t, db, systemevent.New(g, db), g}
}

// happened records an event of acme's, some time ago.
func (f feed) happened(ago time.Duration, kind audit.Type, reason, actor, object string) audit.Event {
	f.t.Helper()
	e := audit.New(kind, "acme")
	e.Time, e.Reason, e.Object = e.Time.Add(-ago), reason, object
	e.Actor = audit.Actor{Kind: authz.Person, ID: actor}
	e.Personal = audit.Personal{Name: "Name of " + actor, Email: actor + "@example.org", Address: "192.0.2.1"}
	if err := f.db.Record(f.t.Context(), e); err != nil {
		f.t.Fatal(err)
	}
	return e
}

func by(subject string, org org.ID, role authz.Role) gate.Call {
	return gate.Call{Caller: authz.Caller{Kind: authz.Person, Subject: subject, Org: org, Roles: []authz.Role{role}}, Request: "r-1", Address: "192.0.2.9"}
}

// objects are what a page's events are about.
func objects(p systemevent.Page) string {
	var all []string
	for _, e := range p.Events {
		all = append(all, fmt.Sprintf("%s:%d/%d", e.Object, e.Context, e.Change))
	}
	return strings.Join(all, " ")
}

func TestWhoSeesWhoseEvents(t *testing.T) {
	f := newFeed(t)
	f.happened(3*time.Minute, audit.KeyCreated, "", "ada", "k-1")
	f.happened(2*time.Minute, audit.KeyCreated, "", "bob", "k-2")
	for _, c := range []struct {
		name string
		call gate.Call
		body string
		want string // or the reason of the denial
	}{
		{"an owner sees all", by("eve", "acme", authz.Owner), ``, "k-2:10/0 k-1:10/0"},
		{"an administrator sees all", by("eve", "acme", authz.Administrator), `{"orgId":"acme"}`, "k-2:10/0 k-1:10/0"},
		{"an owner asks for one actor's", by("eve", "acme", authz.Owner), `{"userId":"bob"}`, "k-2:10/0"},
		{"a user sees his own", by("bob", "acme", authz.User), ``, "k-2:10/0"},
		{"billing sees its own", by("ada", "acme", authz.Billing), ``, "k-1:10/0"},
		{"a user without events sees none", by("eve", "acme", authz.Workspaces), ``, ""},
		{"a user does not see another's by asking", by("bob", "acme", authz.User), `{"userId":"ada"}`, ""},
		{"nor by a key", by("bob", "acme", authz.User), `{"contextId":"k-1"}`, ""},
		{"another organization's owner sees his own organization", by("eve", "other", authz.Owner), ``, ""},
		{"and not this one", by("eve", "other", authz.Owner), `{"orgId":"acme"}`, "other_organization"},
		{"nor with its key", by("eve", "other", authz.Owner), `{"contextId":"k-1"}`, ""},
		{"a stranger hears no before what is wrong", by("eve", "other", authz.Owner), `{"orgId":"acme","take":0}`, "other_organization"},
		{"no role", by("ada", "acme", "GUEST"), ``, "insufficient_role"},
		{"a node", gate.Call{Caller: authz.Caller{Kind: authz.Node, Subject: "k-1", Org: "acme"}}, ``, "insufficient_role"},
	} {
		t.Run(c.name, func(t *testing.T) {
			page, err := f.service.Read(t.Context(), c.call, []byte(c.body))
			got := objects(page)
			if denied, ok := errors.AsType[*gate.DeniedError](err); ok {
				got = string(denied.Reason)
			} else if err != nil {
				t.Fatal(err)
			}
			if got != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}

func TestWhatTheFeedHolds(t *testing.T) {
	f := newFeed(t)
	i := time.Duration(0)
	for _, e := range []struct {
		kind   audit.Type
		reason string
	}{
		{audit.KeyCreated, ""}, {audit.KeyDelivered, ""}, {audit.KeyWithdrawn, "expired"}, {audit.KeyDeleted, ""},
		{audit.NodeRegistered, "created"}, {audit.NodeRegistered, "updated"}, {audit.NodeRegistered, "repeated"},
		{audit.NodeUnregistered, "deleted"}, {audit.NodeUnregistered, "repeated"}, {audit.NodeDeleted, ""},
		{audit.KeyRefused, "quota"}, {audit.KeysDeleted, ""}, {audit.KeysListed, ""}, {audit.NodesListed, ""}, {audit.SecretsFetched, ""},
		{audit.SecretPut, ""}, {audit.SecretDeleted, ""}, {audit.SecretsListed, ""}, {audit.EventsRead, ""}, {audit.RequestFailed, "invalid"}, {audit.AccessDenied, "x"},
	} {
		i++
		f.happened(time.Hour-i*time.Second, e.kind, e.reason, "ada", strings.TrimSpace(string(e.kind)+" "+e.reason))
	}
	keys := []string{"orgkey.deleted:10/2", "orgkey.withdrawn expired:10/2", "orgkey.delivered:10/1", "orgkey.created:10/0"}
	nodes := []string{"node.deleted:9/2", "node.unregistered deleted:9/2", "node.registered updated:9/1", "node.registered created:9/0"}
	for body, want := range map[string][]string{
		``:              slices.Concat(nodes, keys),
		`{}`:            slices.Concat(nodes, keys),
		`{"context":9}`: nodes, `{"context":10}`: keys,
		`{"event":0}`:              {nodes[3], keys[3]},
		`{"event":1}`:              {nodes[2], keys[2]},
		`{"event":2}`:              {nodes[0], nodes[1], keys[0], keys[1]},
		`{"context":9,"event":1}`:  {nodes[2]},
		`{"context":10,"event":2}`: keys[:2],
		`{"context":null,"event":null,"contextId":"","userId":null,"skip":null,"take":null,"workspaceId":"","showUnread":false}`: slices.Concat(nodes, keys),
		`{"contextId":"orgkey.deleted"}`: keys[:1],
		`{"contextId":"orgkey.delete"}`:  {},
		`{"userId":"eve"}`:               {},
		`{"skip":2,"take":3}`:            {nodes[2], nodes[3], keys[0]},
		`{"skip":100000}`:                {},
		`{"workspaceId":"w-1"}`:          {},
		`{"context":0}`:                  {},
		`{"context":13,"event":0}`:       {},
		`{"showUnread":true}`:            slices.Concat(nodes, keys),
	} {
		page, err := f.service.Read(t.Context(), by("o", "acme", authz.Owner), []byte(body))
		if err != nil {
			t.Errorf("%s: %v", body, err)
			continue
		}
		if got := objects(page); got != strings.Join(want, " ") {
			t.Errorf("%s: %s, want %s", body, got, want)
		}
	}
	var paged []string
	for skip := 0; skip < 9; skip += 3 {
		page, err := f.service.Read(t.Context(), by("o", "acme", authz.Owner), fmt.Appendf(nil, `{"take":3,"skip":%d}`, skip))
		if err != nil || page.Total != 8 || page.Skip != skip || page.Take != 3 {
			t.Errorf("page at %d: %+v, %v", skip, page, err)
		}
		paged = append(paged, objects(page))
	}
	if got, want := strings.Join(paged, " "), strings.Join(slices.Concat(nodes, keys), " "); got != want {
		t.Errorf("by pages: %s", got)
	}
}

func TestTheWindow(t *testing.T) {
	f := newFeed(t)
	f.happened(24*time.Hour+30*time.Minute, audit.KeyCreated, "", "ada", "yesterday")
	hour := f.happened(time.Hour, audit.KeyCreated, "", "ada", "hour")
	now := f.happened(0, audit.KeyCreated, "", "ada", "now")
	f.happened(-time.Minute, audit.KeyCreated, "", "ada", "ahead") // by a replica whose clock is
	const millis = "2006-01-02T15:04:05.000Z"
	for body, want := range map[string]string{
		``: "ahead now hour",
		fmt.Sprintf(`{"from_timestamp":%d}`, now.Time.Add(-26*time.Hour).Unix()):                     "ahead now hour yesterday",
		`{"from_timestamp":"1970-01-01T00:00:00Z"}`:                                                  "ahead now hour yesterday",
		fmt.Sprintf(`{"from_timestamp":%d}`, now.Time.UnixMilli()):                                   "ahead now",
		fmt.Sprintf(`{"from_timestamp":"%d"}`, now.Time.UnixMilli()+1):                               "ahead",
		fmt.Sprintf(`{"to_timestamp":%q}`, now.Time.Format(millis)):                                  "now hour",
		fmt.Sprintf(`{"to_timestamp":%d}`, now.Time.UnixMilli()-1):                                   "hour",
		fmt.Sprintf(`{"to_timestamp":%d}`, hour.Time.UnixMilli()-1):                                  "yesterday",
		fmt.Sprintf(`{"from_timestamp":%d,"to_timestamp":%[1]d}`, hour.Time.UnixMilli()):             "hour",
		fmt.Sprintf(`{"from_timestamp":%q,"to_timestamp":null}`, hour.Time.Format(time.RFC3339Nano)): "ahead now hour",
	} {
		page, err := f.service.Read(t.Context(), by("o", "acme", authz.Owner), []byte(body))
		if got := strings.ReplaceAll(objects(page), ":10/0", ""); err != nil || got != want {
			t.Errorf("%s: %q, %v; want %q", body, got, err, want)
		}
	}
}

func TestAnEventIsWhatTheLogHolds(t *testing.T) {
	f := newFeed(t)
	made := f.happened(time.Minute, audit.KeyCreated, "", "ada", "k-1")
	read := func() systemevent.Event {
		page, err := f.service.Read(t.Context(), by("o", "acme", authz.Owner), nil)
		if err != nil || len(page.Events) != 1 {
			t.Fatal(page, err)
		}
		return page.Events[0]
	}
	e := read()
	if e.ID != made.ID || !e.Time.Equal(made.Time.Truncate(time.Microsecond)) || e.Org != "acme" || e.Actor.ID != "ada" || e.Person.Name != "Name of ada" || e.Person.Email != "ada@example.org" {
		t.Errorf("%+v", e)
	}
	if again, err := audit.Decode([]byte(e.Leaf)); err != nil || again.ID != made.ID || !json.Valid([]byte(e.Leaf)) || strings.Contains(e.Leaf, "example.org") {
		t.Errorf("leaf %s, %v", e.Leaf, err)
	}
}

func (f feed) numbers(call gate.Call, body string) []int64 {
	f.t.Helper()
	page, err := f.service.Read(f.t.Context(), call, []byte(body))
	if err != nil {
		f.t.Fatal(err)
	}
	var all []int64
	for _, e := range page.Events {
		all = append(all, e.Number)
	}
	if page.Total != len(all) {
		f.t.Errorf("%s: %d events of %d", body, len(all), page.Total)
	}
	return all
}

func (f feed) mark(call gate.Call, asRead bool, numbers ...int64) {
	f.t.Helper()
	body, err := json.Marshal(map[string]any{"ids": append([]int64{}, numbers...)})
	if err != nil {
		f.t.Fatal(err)
	}
	if err := f.service.Mark(f.t.Context(), call, body, asRead); err != nil {
		f.t.Fatal(err)
	}
}

func TestMarksAreTheReadersOwn(t *testing.T) {
	f := newFeed(t)
	f.happened(3*time.Minute, audit.KeyCreated, "", "bob", "k-1")
	f.happened(2*time.Minute, audit.KeyDeleted, "", "ada", "k-1")
	f.happened(time.Minute, audit.KeysListed, "", "ada", "") // no event of the feed
	ada, eve, bob := by("ada", "acme", authz.Owner), by("eve", "acme", authz.Owner), by("bob", "acme", authz.User)
	stranger := by("ada", "other", authz.Owner) // of the same name
	all := f.numbers(ada, ``)
	if len(all) != 2 || all[0] <= all[1] {
		t.Fatalf("numbers %v", all)
	}
	unread := func(call gate.Call) []int64 { return f.numbers(call, `{"showUnread":true}`) }

	for range 2 { // the second time changes nothing
		f.mark(ada, true, all[0], all[0], all[0]+1, 1<<53-1)
		if got := unread(ada); !slices.Equal(got, all[1:]) {
			t.Errorf("unread %v, want %v", got, all[1:])
		}
	}
	if e := f.last(); e.Type != audit.EventsRead {
		t.Errorf("the last event is %s", e.Type)
	}
	f.mark(ada, true, all[0])
	if e := f.last(); e.Type != audit.EventsMarked || e.Action != authz.MarkEvents || e.Org != "acme" || e.Detail["as"] != "read" || e.Detail["asked"] != "1" || e.Detail["changed"] != "0" {
		t.Errorf("%+v", e)
	}
	if got := unread(eve); !slices.Equal(got, all) {
		t.Errorf("another owner's are %v, want %v", got, all)
	}
	f.mark(bob, true, all...) // who sees only the older one
	if got := f.last().Detail["changed"]; got != "1" {
		t.Errorf("a member marked %s events, one of which is his to see", got)
	}
	f.mark(stranger, true, all...)
	if got := f.last().Detail["changed"]; got != "0" {
		t.Errorf("another organization's owner marked %s events", got)
	}
	f.mark(ada, false, all...)
	if got := unread(ada); !slices.Equal(got, all) {
		t.Errorf("unmarked, unread are %v", got)
	}
	f.mark(ada, false, []int64{}...)
}

func TestMarksThatAreRefused(t *testing.T) {
	f := newFeed(t)
	for _, body := range []string{
		``, `{}`, `null`, `{"id":null}`, `{"id":1,"ids":[2]}`, `{"id":"1"}`, `{"id":1.5}`, `{"id":0}`, `{"id":-1}`, `{"id":9007199254740992}`,
		`{"ids":1}`, `{"ids":["1"]}`, `{"ids":[1,null,0]}`, `{"ids":[1],"ids":[2]}`, `{"ids":[1` + strings.Repeat(",1", 1000) + `]}`,
	} {
		err := f.service.Mark(t.Context(), by("o", "acme", authz.Owner), []byte(body), true)
		if _, ok := errors.AsType[*jsonbody.Error](err); !ok {
			t.Errorf("%.40s: %v", body, err)
		}
		if e := f.last(); e.Type != audit.RequestFailed || e.Action != authz.MarkEvents {
			t.Errorf("%.40s: the last event is %s", body, e.Type)
		}
	}
	err := f.service.Mark(t.Context(), by("o", "acme", "GUEST"), []byte(`{"id":1}`), true)
	if _, ok := errors.AsType[*gate.DeniedError](err); !ok {
		t.Errorf("without a role: %v", err)
	}
}

func TestAnErasedPersonsMarksAreForgotten(t *testing.T) {
	f := newFeed(t)
	f.happened(time.Minute, audit.KeyCreated, "", "eve", "k-1")
	ada := by("ada", "acme", authz.Owner)
	f.mark(ada, true, f.numbers(ada, ``)...)
	if _, err := f.db.Erase(t.Context(), "ada", func(string, int64) audit.Event { return audit.New(audit.PersonErased, "acme") }); err != nil {
		t.Fatal(err)
	}
	if got := f.numbers(ada, `{"showUnread":true}`); len(got) != 1 {
		t.Errorf("unread %v", got)
	}
}

func TestBodiesThatAreRefused(t *testing.T) {
	f := newFeed(t)
	for _, body := range []string{
		`null`, `[]`, `7`, `{`, `{}{}`, ` `, "\x00", `{"take":1,"take":2}`, `{"x":{"y":1,"y":2}}`, "{\"userId\":\"\xff\"}",
		`{"take":0}`, `{"take":101}`, `{"take":-1}`, `{"take":"20"}`, `{"take":1.5}`, `{"take":1e400}`, `{"take":[]}`,
		`{"skip":-1}`, `{"skip":100001}`, `{"skip":9223372036854775808}`, `{"skip":true}`,
		`{"context":-1}`, `{"context":14}`, `{"context":"10"}`, `{"context":[9,10]}`, `{"event":3}`, `{"event":-1}`, `{"event":"created"}`,
		`{"from_timestamp":"yesterday"}`, `{"from_timestamp":0}`, `{"from_timestamp":{}}`, `{"to_timestamp":"2026-03-01"}`, `{"to_timestamp":true}`, `{"to_timestamp":""}`,
		`{"from_timestamp":1700000001,"to_timestamp":1700000000}`,
		`{"workspaceId":3}`, `{"workspaceId":"a\u0000"}`, `{"showUnread":"true"}`, `{"showUnread":1}`,
		`{"orgId":""}`, `{"orgId":"a b"}`, `{"orgId":7}`, `{"orgId":"` + strings.Repeat("a", 129) + `"}`,
		`{"contextId":7}`, `{"contextId":"a\u0000"}`, `{"userId":"\u202e"}`, `{"userId":"` + strings.Repeat("a", 257) + `"}`,
		`{"x":` + strings.Repeat("[", 60000),
	} {
		_, err := f.service.Read(t.Context(), by("o", "acme", authz.Owner), []byte(body))
		if _, ok := errors.AsType[*jsonbody.Error](err); !ok {
			t.Errorf("%.60s: %v", body, err)
		}
	}
}

// Promise 5: every read has its own event, and so has one that is refused.
func TestEveryReadLeavesItsOwnEvent(t *testing.T) {
	f := newFeed(t)
	f.happened(time.Minute, audit.KeyCreated, "", "ada", "k-1")
	for _, c := range []struct {
		call gate.Call
		body string
		want string
	}{
		{by("ada", "acme", authz.User), `{"userId":"ada@example.org"}`, "event.read success  acme own 0"},
		{by("o", "acme", authz.Owner), `{}`, "event.read success  acme organization 1"},
		{by("o", "acme", authz.Owner), `{"take":0}`, "request.failed failure invalid acme organization "},
		{by("o", "acme", authz.Owner), `{"orgId":"a b"}`, "request.failed failure invalid acme organization "},
		{by("o", "other", authz.Owner), `{"orgId":"acme"}`, "access.denied denied other_organization acme  "},
	} {
		_, _ = f.service.Read(t.Context(), c.call, []byte(c.body)) // the other tests look at the answers
		e := f.last()
		got := fmt.Sprintf("%s %s %s %s %s %s", e.Type, e.Outcome, e.Reason, e.Org, e.Scope, e.Detail["returned"])
		if got != c.want || e.Action != authz.ReadEvents || e.Actor.ID != c.call.Caller.Subject || e.Request != "r-1" || e.Policy == "" {
			t.Errorf("%s: %s, want %s; %+v", c.body, got, c.want, e)
		}
		if strings.Contains(fmt.Sprint(e.Detail), "@") {
			t.Errorf("what was asked for is in the log: %v", e.Detail)
		}
	}
}

// last is the newest event in the log.
func (f feed) last() audit.Event {
	f.t.Helper()
	if _, err := f.db.Sequence(f.t.Context(), 1000, audit.Condition{}); err != nil {
		f.t.Fatal(err)
	}
	head, err := f.db.Head(f.t.Context())
	if err != nil {
		f.t.Fatal(err)
	}
	entries, err := f.db.Entries(f.t.Context(), head.Size-1, 1)
	if err != nil {
		f.t.Fatal(err)
	}
	e, err := audit.Decode(entries[0].Leaf)
	if err != nil {
		f.t.Fatal(err)
	}
	return e
}

// noLog is a log that cannot be written.
type noLog struct{ gate.AuditLog }

func (noLog) Record(context.Context, ...audit.Event) error { return orgkey.ErrUnavailable }

func TestNothingIsReadWithoutItsEvent(t *testing.T) {
	f := newFeed(t)
	f.happened(time.Minute, audit.KeyCreated, "", "ada", "k-1")
	f.gate.AuditLog = noLog{}
	f.service = systemevent.New(f.gate, f.db)
	page, err := f.service.Read(t.Context(), by("o", "acme", authz.Owner), nil)
	if !errors.Is(err, gate.ErrAudit) || len(page.Events) != 0 {
		t.Errorf("%d events, %v", len(page.Events), err)
	}
}

// A replaced policy that narrows by a name we do not know narrows all the same.
func TestAnUnknownScopeIsTheNarrowOne(t *testing.T) {
	f := newFeed(t)
	f.happened(time.Minute, audit.KeyCreated, "", "ada", "k-1")
	f.gate.Policy = scope("workspace")
	f.service = systemevent.New(f.gate, f.db)
	page, err := f.service.Read(t.Context(), by("o", "acme", authz.Owner), nil)
	if err != nil || len(page.Events) != 0 {
		t.Errorf("%d events, %v", len(page.Events), err)
	}
}

type scope authz.Scope

func (s scope) Decide(context.Context, authz.Request) (authz.Decision, error) {
	return authz.Decision{Allow: true, Reason: authz.Allowed, Scope: authz.Scope(s)}, nil
}

func TestAnErasedPersonHasNoName(t *testing.T) {
	f := newFeed(t)
	e := audit.New(audit.KeyCreated, "acme")
	e.Actor = audit.Actor{Kind: authz.Person, ID: "ada"}
	if err := f.db.Record(t.Context(), e); err != nil {
		t.Fatal(err)
	}
	page, err := f.service.Read(t.Context(), by("o", "acme", authz.Owner), nil)
	if err != nil || len(page.Events) != 1 || page.Events[0].Person != (audit.Personal{}) {
		t.Errorf("%+v, %v", page, err)
	}
}
