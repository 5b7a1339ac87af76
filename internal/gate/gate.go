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
	"regexp"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
)

var (
	// ErrBadOrg: the organization ID is not of the documented form.
	ErrBadOrg = errors.New("organization ID is not well-formed")
	// ErrAudit: the audit trail could not be written, or not acknowledged in time.
	ErrAudit = errors.New("audit trail not available")
)

// DeniedError is a "no" of the policy.
type DeniedError struct {
	Action authz.Action
	Reason authz.Reason
}

func (e *DeniedError) Error() string { return fmt.Sprintf("%s denied: %s", e.Action, e.Reason) }

var orgForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,127}$`)

// CheckOrg reports ErrBadOrg unless id is a well-formed organization ID. It
// comes before id reaches any header, log or label.
func CheckOrg(id string) error {
	if !orgForm.MatchString(id) {
		return ErrBadOrg
	}
	return nil
}

// Call is one authenticated request to a use case: who asks, and what of it
// belongs in the audit trail.
type Call struct {
	Caller  authz.Caller
	Request string // the request's ID
	Address string // the client's address, as the transport observed it
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
}

// Pass is an allowed request.
type Pass struct {
	Call     Call
	Org      string
	Action   authz.Action
	Decision authz.Decision
}

// Decide asks the policy whether call may do action for org. A "no" is a
// *DeniedError and leaves an event; that event is best effort, since the
// answer stays "no" without it.
func (g Gate) Decide(ctx context.Context, call Call, action authz.Action, org string) (Pass, error) {
	if err := CheckOrg(org); err != nil {
		return Pass{}, err
	}
	d, err := g.Policy.Decide(ctx, authz.Request{Caller: call.Caller, Action: action, Org: org})
	if err != nil {
		return Pass{}, fmt.Errorf("deciding %s: %w", action, err)
	}
	pass := Pass{call, org, action, d}
	if d.Allow {
		return pass, nil
	}
	event := pass.Event(audit.AccessDenied)
	event.Outcome, event.Reason = audit.Denied, string(d.Reason)
	if err := g.Trail.Record(ctx, event); err != nil {
		g.Log.Warn("a denied request is not in the audit trail", "request", call.Request, "error", err)
	}
	return Pass{}, &DeniedError{action, d.Reason}
}

// Failed records that an allowed request came to nothing, and returns why.
func (g Gate) Failed(ctx context.Context, p Pass, t audit.Type, reason string, why error) error {
	event := p.Event(t)
	event.Outcome, event.Reason = audit.Failure, reason
	if err := g.Trail.Record(ctx, event); err != nil {
		return errors.Join(fmt.Errorf("%w: %w", ErrAudit, err), why)
	}
	return why
}

// Reject records an authenticated request that the edge refuses: a malformed
// organization, an answer that nobody can give. The policy still decides
// first, so that a stranger hears "no" and not what was wrong. It returns nil
// when the refusal is recorded.
func (g Gate) Reject(ctx context.Context, call Call, org string, action authz.Action, reason string) error {
	if CheckOrg(org) != nil {
		return g.Failed(ctx, Pass{Call: call, Action: action}, audit.RequestFailed, reason, nil)
	}
	pass, err := g.Decide(ctx, call, action, org)
	if err != nil {
		return err
	}
	return g.Failed(ctx, pass, audit.RequestFailed, reason, nil)
}

// Event is a new event about the request that p lets through.
func (p Pass) Event(t audit.Type) audit.Event {
	e := audit.New(t, p.Org)
	e.Actor = audit.Actor{Kind: p.Call.Caller.Kind, ID: p.Call.Caller.Subject}
	e.Action = p.Action
	e.Request = p.Call.Request
	e.Policy = p.Decision.Revision
	e.Personal = audit.Personal{Name: p.Call.Caller.Name, Email: p.Call.Caller.Email, Address: p.Call.Address}
	return e
}
