package gate_test

import (
	"context"
	"database/sql"
	"errors"
	"log/slog"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"testing/fstest"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/policies"
)

// undecided decides nothing about the caller "nobody".
const undecided = `package orgkeys.authz

decision := {"allow": false, "reason": "malformed_request", "scope": ""} if not input.caller.subject == "nobody"
`

// world is a gate over a real database and policy.
type world struct {
	gate.Gate
	db   *sqlstore.DB
	raw  *sql.DB
	lost counter
}

type counter struct{ atomic.Int64 }

func (c *counter) Inc() { c.Add(1) }

func newWorld(t *testing.T, policy gate.Policy) *world {
	t.Helper()
	path := filepath.Join(t.TempDir(), "orgkeys.db")
	db, err := sqlstore.Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	if err := db.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	db.UseEventKey(audit.EventKey{})
	raw, err := sql.Open("sqlite3", "file:"+path+"?_busy_timeout=5000")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Close() })
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	w := &world{db: db, raw: raw}
	w.Gate = gate.Gate{Policy: policy, AuditLog: audit.NewLog(db, log), Log: log, Lost: &w.lost}
	return w
}

func shipped(t *testing.T) *authz.Policy {
	t.Helper()
	p, err := authz.Load(t.Context(), policies.Files)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// last returns the newest event, of n in all.
func (w *world) last(t *testing.T, n int) audit.Event {
	t.Helper()
	var leaf []byte
	var count int
	if err := w.raw.QueryRow("SELECT (SELECT count(*) FROM events), leaf FROM events ORDER BY seq DESC LIMIT 1").Scan(&count, &leaf); err != nil {
		t.Fatalf("no event: %v", err)
	}
	if count != n {
		t.Fatalf("%d events, want %d", count, n)
	}
	e, err := audit.Decode(leaf)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func call(subject string, org org.ID, roles ...authz.Role) gate.Call {
	return gate.Call{Caller: authz.Caller{Kind: authz.Person, Subject: subject, Org: org, Roles: roles}, Request: "r-1", Address: "192.0.2.7"}
}

func gone(t *testing.T) context.Context {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}

// Promise 5: a policy that fails to decide hides nobody.
func TestPromise5_AFailedDecisionLeavesItsEvent(t *testing.T) {
	policy, err := authz.Load(t.Context(), fstest.MapFS{"authz.rego": {Data: []byte(undecided)}})
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, policy)
	id := uuid.NewString()
	if _, err := w.Decide(t.Context(), call("nobody", "acme", authz.Owner), authz.DeleteKey, "acme", id); !errors.Is(err, authz.ErrNoDecision) {
		t.Errorf("the answer is %v", err)
	}
	e := w.last(t, 1)
	if e.Type != audit.RequestFailed || e.Outcome != audit.Failure || e.Reason != "decision_failed" || e.Actor.ID != "nobody" ||
		e.Object != id || e.Policy != policy.Revision() {
		t.Errorf("event %+v", e)
	}
}

// Promise 5: nobody escapes the log by hanging up.
func TestPromise5_ACallerWhoHangsUpLeavesItsEvent(t *testing.T) {
	w := newWorld(t, shipped(t))
	denied := new(gate.DeniedError)
	if _, err := w.Decide(gone(t), call("u-1", "evil", authz.Owner), authz.DeleteAllKeys, "acme", ""); !errors.As(err, &denied) || denied.Reason != authz.OtherOrganization {
		t.Errorf("the answer is %v", err)
	}
	if e := w.last(t, 1); e.Type != audit.AccessDenied || e.Org != "acme" {
		t.Errorf("event %+v", e)
	}
	pass, err := w.Decide(gone(t), call("u-1", "acme", authz.Owner), authz.ListKeys, "acme", "")
	if err != nil {
		t.Fatal(err)
	}
	why := errors.New("why")
	if err := w.Failed(gone(t), pass, audit.KeysListed, "unavailable", why); err != why {
		t.Errorf("the answer is %v", err)
	}
	if e := w.last(t, 2); e.Type != audit.KeysListed || e.Outcome != audit.Failure {
		t.Errorf("event %+v", e)
	}
	if err := w.Record(gone(t), pass.Event(audit.KeysListed)); err != nil {
		t.Error(err)
	}
	if e := w.last(t, 3); e.Outcome != audit.Success {
		t.Errorf("event %+v", e)
	}
}

// Promise 5: an event says on what, denied ones too, and holds everything that
// its decision can be recomputed from.
func TestPromise5_ADecisionCanBeRecomputedFromItsEvent(t *testing.T) {
	policy := shipped(t)
	w := newWorld(t, policy)
	id := uuid.NewString()
	for i, c := range []struct {
		call   gate.Call
		action authz.Action
		object string
		want   string // the event's object
	}{
		{call("u-1", "evil", authz.Owner), authz.DeleteKey, id, id},
		{call("u-1", "acme", authz.Billing, authz.User), authz.DeleteNode, id, id},
		{call("u-1", "acme", authz.User), authz.DeleteSecret, "env_s3", "env_s3"},
		{call("u-1", "acme", authz.User), authz.DeleteSecret, "somebody@example.org\n", ""},
		{call("u-1", "acme", authz.User), authz.ReadEvents, "", ""},
		{call("u-1", "acme", authz.Administrator), authz.ListKeys, "", ""},
	} {
		pass, err := w.Decide(t.Context(), c.call, c.action, "acme", c.object)
		if err == nil {
			err = w.Record(t.Context(), pass.Event(audit.EventsRead))
		} else if errors.As(err, new(*gate.DeniedError)) {
			err = nil
		}
		if err != nil {
			t.Fatal(err)
		}
		e := w.last(t, i+1)
		if e.Object != c.want || e.ActorOrg != c.call.Caller.Org || !slices.Equal(e.Roles, c.call.Caller.Roles) {
			t.Errorf("event %+v", e)
		}
		again, err := policy.Decide(t.Context(), authz.Request{
			Caller: authz.Caller{Kind: e.Actor.Kind, Subject: e.Actor.ID, Org: e.ActorOrg, Roles: e.Roles}, Action: e.Action, Org: e.Org,
		})
		if err != nil {
			t.Fatal(err)
		}
		if again.Allow != (e.Outcome == audit.Success) || again.Scope != e.Scope || again.Revision != e.Policy || !again.Allow && string(again.Reason) != e.Reason {
			t.Errorf("decided anew: %+v; the event: %+v", again, e)
		}
	}
}

// A denial that could not be recorded stays a denial, and is counted.
func TestALostDenialIsCounted(t *testing.T) {
	w := newWorld(t, shipped(t))
	if err := w.db.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Decide(t.Context(), call("u-1", "evil", authz.Owner), authz.ListKeys, "acme", ""); !errors.As(err, new(*gate.DeniedError)) {
		t.Errorf("the answer is %v", err)
	}
	if n := w.lost.Load(); n != 1 {
		t.Errorf("%d counted", n)
	}
}
