// Package gate is the only way into a use case: it asks the policy, and makes
// sure that every request leaves its audit event, a denied one included.
//
// A use case begins with Decide and continues only with the Pass that it returns.
// Events are made from that Pass, so they name the caller, the organization, the
// policy and the request without the use case repeating them.
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

// ErrAudit: the audit log could not be written, or did not acknowledge in time.
var ErrAudit = errors.New("audit log not available")

// DeniedError: the policy denies the request.
type DeniedError struct {
	Action authz.Action
	Reason authz.Reason
}

func (e *DeniedError) Error() string { return fmt.Sprintf("%s denied: %s", e.Action, e.Reason) }

// Call is one authenticated request to a use case: the caller, and what the audit
// log records of the request.
type Call struct {
	Caller  authz.Caller
	Request string // the request's ID
	Address string // the client's address, as the transport observed it
	Note    string // why, in the caller's words; goes into the events' personal part
}

// objectForm is the form of the IDs of keys, nodes and devices and of the names of secrets.
// No other text that a caller sends as one reaches the log.
var objectForm = regexp.MustCompile(`^([0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[a-z][a-z0-9_]{0,63}|sha256-[0-9a-f]{64})$`)

// RecordDeadline bounds work that has to leave its event even if the caller is gone.
const RecordDeadline = 5 * time.Second

// Outlive returns a context for work that must leave its event. It does not end
// with ctx, so that nobody avoids the audit log by hanging up, but after
// RecordDeadline.
func Outlive(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), RecordDeadline)
}

// ReasonFor returns caller_gone if the caller hung up, and otherwise the given reason.
func ReasonFor(ctx context.Context, otherwise string) string {
	if errors.Is(ctx.Err(), context.Canceled) {
		return "caller_gone"
	}
	return otherwise
}

// AuditLog is what the gate needs of the audit log. Its implementation is audit.Log.
type AuditLog interface {
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

// Gate decides requests and records them.
type Gate struct {
	Policy   Policy
	AuditLog AuditLog
	Log      *slog.Logger
	Lost     interface{ Inc() } // counts requests whose event could not be recorded; may be nil
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
// that the request names, if any. A denial is a *DeniedError and leaves an
// event; a failure to record it does not change the answer. A policy that does
// not decide leaves an event too.
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

// Record makes an event durable, even if the caller is gone, or reports
// ErrAudit. It logs and counts a failure, because nothing else shows the lost
// event of a caller who was denied or got no answer.
func (g Gate) Record(ctx context.Context, event audit.Event) error {
	ctx, cancel := Outlive(ctx)
	defer cancel()
	err := g.AuditLog.Record(ctx, event)
	if err == nil {
		return nil
	}
	if g.Lost != nil {
		g.Lost.Inc()
	}
	g.Log.Warn("a request could not be recorded in the audit log", "request", event.Request, "event", event.Type, "error", err)
	return fmt.Errorf("%w: %w", ErrAudit, err)
}

// Failed records that a request failed, and returns why.
func (g Gate) Failed(ctx context.Context, p Pass, t audit.Type, reason string, why error) error {
	event := p.Event(t)
	event.Outcome, event.Reason = audit.Failure, reason
	if err := g.Record(ctx, event); err != nil {
		return errors.Join(err, why)
	}
	return why
}

// Reject records an authenticated request that the edge refuses, for a malformed
// organization or an unacceptable media type. The policy still decides first, so
// that a caller without rights learns only that; it is not asked without an
// organization (an empty org). Reject returns nil when the refusal is recorded.
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

// Event is a new event about the allowed request.
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
	e.Personal = audit.Personal{Name: caller.Name, Email: caller.Email, Address: p.Call.Address, Note: p.Call.Note}
	return e
}
