package api

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/jsonbody"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/systemevent"
)

// eventUseCase stands for systemevent.Service, whose own tests run it for real.
type eventUseCase struct {
	mu    sync.Mutex
	page  systemevent.Page
	err   error
	asked []string
	call  gate.Call
}

func (u *eventUseCase) Read(_ context.Context, call gate.Call, body []byte) (systemevent.Page, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.asked, u.call = append(u.asked, string(body)), call
	return u.page, u.err
}

func (u *eventUseCase) Mark(_ context.Context, call gate.Call, body []byte, asRead bool) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.asked, u.call = append(u.asked, fmt.Sprintf("read=%v %s", asRead, body)), call
	return u.err
}

func TestMarkingSystemEvents(t *testing.T) {
	b := newBench(t, nil)
	for method, want := range map[string]string{"POST": `read=true {"id":7}`, "DELETE": `read=false {"id":7}`} {
		a := b.send(method, b.url+"/systemevent/read", []byte(`{"id":7}`), "Content-Type", "application/json")
		if a.StatusCode != 200 || string(a.body) != `{"success":true}` {
			t.Errorf("%s: %d %s", method, a.StatusCode, a.body)
		}
		if asked := b.events.asked[len(b.events.asked)-1]; asked != want {
			t.Errorf("asked %q, want %q", asked, want)
		}
	}
	b.events.err = &jsonbody.Error{Field: "id", Problem: "or ids is needed, and not both"}
	if a := b.send("POST", b.url+"/systemevent/read", []byte(`{}`)); a.StatusCode != 400 {
		t.Errorf("without id: %d", a.StatusCode)
	}
	if a := b.ask("POST", "/systemevent/read", "Authorization", ""); a.StatusCode != 401 {
		t.Errorf("without a token: %d", a.StatusCode)
	}
	if a := b.ask("GET", "/systemevent/read"); a.StatusCode != 405 || a.Header.Get("Allow") != "POST, DELETE" {
		t.Errorf("GET: %d, Allow %q", a.StatusCode, a.Header.Get("Allow"))
	}
}

func TestAnswersAboutSystemEvents(t *testing.T) {
	b := newBench(t, nil)
	b.events.page = systemevent.Page{Total: 7, Skip: 3, Take: 2, Events: []systemevent.Event{{
		Event: audit.Event{
			ID: "8f0e6a52-3c1d-4d0b-9a43-8b9f0f7d2c11", Time: time.Date(2026, 3, 1, 12, 0, 0, 123456789, time.UTC),
			Org: "acme", Actor: audit.Actor{Kind: authz.Person, ID: "u-1"}, Object: keyID,
		},
		Number: 1<<53 - 1, Unread: true, Context: systemevent.OrgKey, Change: systemevent.Deleted, Person: audit.Personal{Name: "Ada", Email: "ada@example.org", Address: "192.0.2.1"}, Leaf: `{"v":1,"reason":"\"<é>"}`,
	}}}
	const want = `{"events":[{"id":9007199254740991,"timestamp":"2026-03-01T12:00:00.123Z","contextId":"` + keyID + `","context":"orgkey","event":"deleted",` +
		`"orgId":"acme","userId":"u-1","userName":"Ada","userEmail":"ada@example.org","workspaceId":null,"jsonData":"{\"v\":1,\"reason\":\"\\\"\u003cé\u003e\"}","showUnread":true}],"total":7,"skip":3,"take":2}`
	for _, body := range []string{"", `{"take":2}`} {
		a := b.send("POST", b.url+"/systemevent", []byte(body), "Content-Type", "application/json")
		if a.StatusCode != 200 || string(a.body) != want || a.Header.Get("Cache-Control") != "no-store" {
			t.Errorf("%d %s", a.StatusCode, a.body)
		}
		if asked := b.events.asked[len(b.events.asked)-1]; asked != body {
			t.Errorf("asked %q", asked)
		}
	}
	if c := b.events.call; c.Caller.Subject != "alice" || c.Request == "" || c.Address != "127.0.0.1" {
		t.Errorf("call %+v", c)
	}
	b.events.page = systemevent.Page{Take: 20}
	if a := b.ask("POST", "/systemevent", "Content-Type", "application/json"); string(a.body) != `{"events":[],"total":0,"skip":0,"take":20}` {
		t.Errorf("without events: %s", a.body)
	}
}

func TestRefusalsAboutSystemEvents(t *testing.T) {
	for _, c := range []struct {
		name   string
		err    error
		status int
		code   string
	}{
		{"another organization", &gate.DeniedError{Action: authz.ReadEvents, Reason: authz.OtherOrganization}, 403, "other_organization"},
		{"no role", &gate.DeniedError{Action: authz.ReadEvents, Reason: authz.InsufficientRole}, 403, "insufficient_role"},
		{"a bad body", &jsonbody.Error{Field: "take", Problem: "is not from 1 to 100"}, 400, "invalid_request"},
		{"a bad body, not recorded", errors.Join(gate.ErrAudit, &jsonbody.Error{Field: "take"}), 503, "audit_unavailable"},
		{"a read that was not recorded", fmt.Errorf("%w: disk", gate.ErrAudit), 503, "audit_unavailable"},
		{"no database", fmt.Errorf("reading: %w", orgkey.ErrUnavailable), 503, "unavailable"},
		{"something else", errors.New("SELECT"), 500, "internal"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t, nil)
			b.events.err = c.err
			a := b.send("POST", b.url+"/systemevent", nil)
			if e := errorOf(t, a); a.StatusCode != c.status || e.ErrorCode != c.code {
				t.Errorf("%d %+v", a.StatusCode, e)
			}
		})
	}
}

func TestSystemEventsAtTheEdge(t *testing.T) {
	b := newBench(t, nil)
	if a := b.ask("POST", "/systemevent", "Authorization", ""); a.StatusCode != 401 {
		t.Errorf("without a token: %d", a.StatusCode)
	}
	if a := b.ask("GET", "/systemevent"); a.StatusCode != 405 || a.Header.Get("Allow") != "POST" {
		t.Errorf("GET: %d, Allow %q", a.StatusCode, a.Header.Get("Allow"))
	}
	a := b.send("POST", b.url+"/systemevent", []byte(`{"x":"`+strings.Repeat("x", maxBody)+`"}`))
	if e := errorOf(t, a); a.StatusCode != 413 || e.ErrorCode != "body_too_large" {
		t.Errorf("over 64 KiB: %d %+v", a.StatusCode, e)
	}
	if got := b.keys.log(); len(got) != 1 || got[0] != "reject acme event.read body_too_large" {
		t.Errorf("recorded %q", got)
	}
	if len(b.events.asked) != 0 {
		t.Errorf("%d reads", len(b.events.asked))
	}
}
