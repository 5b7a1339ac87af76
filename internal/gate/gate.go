// Package gate is the one way into every use case: it asks the policy, and
// sees to it that what was asked leaves its audit event, a "no" included.
//
// A use case begins with Decide and goes on only with the Pass it returns;
// events are made from that Pass, so they say who, for whom, by which policy
// and for which request without the use case repeating it.
package gate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"regexp"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/org"
)

// ErrAudit: the audit trail could not be written, or not acknowledged in time.
var ErrAudit = errors.New("audit trail not available")

// DeniedError is a "no" of the policy.
type DeniedError struct {
	Action authz.Action
	Reason authz.Reason
}

func (e *DeniedError) Error() string { return fmt.Sprintf("%s denied: %s", e.Action, e.Reason) }

// Call is one authenticated request to a use case: who asks, and what of it
// belongs in the audit trail.
type Call struct {
	Caller  authz.Caller
	Request string // the request's ID
	Address string // the client's address, as the transport observed it
}

// objectForm is what the IDs of keys and nodes, and the names of secrets, look
// like. No other text that a caller sends in their place reaches the log.
var objectForm = regexp.MustCompile(`^([0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[a-z][a-z0-9_]{0,63})$`)

// RecordDeadline bounds what has to leave its event although the caller may be gone.
const RecordDeadline = 5 * time.Second

// Outlive returns a context for what must leave its event: it does not end
// with ctx, so that nobody escapes the trail by hanging up, but after a time.
func Outlive(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), RecordDeadline)
}

// ReasonFor is the caller's absence where that is why something failed.
func ReasonFor(ctx context.Context, otherwise string) string {
	if errors.Is(ctx.Err(), context.Canceled) {
		return "caller_gone"
	}
	return otherwise
}

// Trail is what the gate needs of the audit log. Its implementation is audit.Log.
type Trail interface {
	// Record makes events durable in a transaction of their own.
	Record(ctx context.Context, events ...audit.Event) error
	// Acknowledged waits until the event has its index in the log and every
	// required sink has acknowledged it, or ctx ends.
	Acknowledged(ctx context.Context, eventID string) error
}

// Policy decides. Its implementation is authz.Policy.
type Policy interface {
	Decide(ctx context.Context, r authz.Request) (authz.Decision, error)
}

// Gate lets requests through, or not.
type Gate struct {
	Policy Policy
	Trail  Trail
	Log    *slog.Logger
	Lost   interface{ Inc() } // counts requests whose event could not be recorded; nil: nobody does
}

// Pass is an allowed request.
type Pass struct {
	Call     Call
	Org      org.ID
	Action   authz.Action
	Object   string // the ID of what it is about, where the request names one
	Decision authz.Decision
	Detail   map[string]string // goes with every event of the request
}

// Decide asks the policy whether call may do action for org; object is the ID
// of what in org it names, if it does. A "no" is a *DeniedError and leaves an
// event; that event is best effort, since the answer stays "no" without it. A
// policy that does not decide leaves one too.
func (g Gate) Decide(ctx context.Context, call Call, action authz.Action, org org.ID, object string) (Pass, error) {
	pass := Pass{Call: call, Org: org, Action: action}
	if objectForm.MatchString(object) {
		pass.Object = object
	}
	ctx, cancel := Outlive(ctx)
	defer cancel()
	var err error
	pass.Decision, err = g.Policy.Decide(ctx, authz.Request{Caller: call.Caller, Action: action, Org: org})
	if err != nil {
		return Pass{}, g.Failed(ctx, pass, audit.RequestFailed, "decision_failed", fmt.Errorf("deciding %s: %w", action, err))
	}
	if pass.Decision.Allow {
		return pass, nil
	}
	event := pass.Event(audit.AccessDenied)
	event.Outcome, event.Reason = audit.Denied, string(pass.Decision.Reason)
	_ = g.Record(ctx, event) // which has logged and counted its failure
	return Pass{}, &DeniedError{action, pass.Decision.Reason}
}

// Record makes an event durable, also when the caller has gone, or reports
// ErrAudit. It logs and counts a failure, since nothing else shows the lost
// event of a caller who heard "no" or nothing.
func (g Gate) Record(ctx context.Context, event audit.Event) error {
	ctx, cancel := Outlive(ctx)
	defer cancel()
	err := g.Trail.Record(ctx, event)
	if err == nil {
		return nil
	}
	if g.Lost != nil {
		g.Lost.Inc()
	}
	g.Log.Warn("a request is not in the audit trail", "request", event.Request, "event", event.Type, "error", err)
	return fmt.Errorf("%w: %w", ErrAudit, err)
}

// Failed records that a request came to nothing, and returns why.
func (g Gate) Failed(ctx context.Context, p Pass, t audit.Type, reason string, why error) error {
	event := p.Event(t)
	event.Outcome, event.Reason = audit.Failure, reason
	if err := g.Record(ctx, event); err != nil {
		return errors.Join(err, why)
	}
	return why
}

// Reject records an authenticated request that the edge refuses: a malformed
// organization, an answer that nobody can give. The policy still decides
// first, so that a stranger hears "no" and not what was wrong; it is not asked
// where there is no organization to ask about (an empty org). Reject returns
// nil when the refusal is recorded.
func (g Gate) Reject(ctx context.Context, call Call, org org.ID, action authz.Action, object, reason string) error {
	if org == "" {
		return g.Failed(ctx, Pass{Call: call, Action: action}, audit.RequestFailed, reason, nil)
	}
	pass, err := g.Decide(ctx, call, action, org, object)
	if err != nil {
		return err
	}
	return g.Failed(ctx, pass, audit.RequestFailed, reason, nil)
}

// Event is a new event about the request that p lets through.
func (p Pass) Event(t audit.Type) audit.Event {
	caller := p.Call.Caller
	e := audit.New(t, p.Org)
	e.Actor = audit.Actor{Kind: caller.Kind, ID: caller.Subject}
	e.ActorOrg, e.Roles = caller.Org, caller.Roles
	e.Action, e.Object = p.Action, p.Object
	e.Request = p.Call.Request
	e.Policy, e.Scope = p.Decision.Revision, p.Decision.Scope
	e.Detail = maps.Clone(p.Detail)
	if caller.ActedBy != "" {
		e.Add(map[string]string{"actedBy": caller.ActedBy})
	}
	e.Personal = audit.Personal{Name: caller.Name, Email: caller.Email, Address: p.Call.Address}
	return e
}
