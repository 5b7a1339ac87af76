// Package dryrun says what the policy would answer a caller, and has nothing done.
package dryrun

import (
	"context"
	"fmt"
	"regexp"
	"strconv"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/jsonbody"
	"github.com/orgkeys/orgkeys/internal/org"
)

// actionForm is what actions look like; the policy says whether there is one. No
// other text reaches policy or log.
var actionForm = regexp.MustCompile(`^[a-z][a-z0-9_]{0,31}\.[a-z][a-z0-9_]{0,31}$`)

// Service asks the policy for callers.
type Service struct{ gate gate.Gate }

// New returns a Service behind the gate.
func New(g gate.Gate) *Service { return &Service{g} }

// Ask returns what the policy would answer if the caller did action in org. To
// ask is itself an action, so another organization's rules stay unknown. The answer
// leaves an event of its own type: a "no" in it is not a denied access.
func (s *Service) Ask(ctx context.Context, call gate.Call, org org.ID, action string) (authz.Decision, error) {
	pass, err := s.gate.Decide(ctx, call, authz.AskPolicy, org, "")
	if err != nil {
		return authz.Decision{}, err
	}
	if !actionForm.MatchString(action) {
		return authz.Decision{}, s.gate.Failed(ctx, pass, audit.RequestFailed, "invalid", &jsonbody.Error{Field: "action", Problem: "is not a name such as orgkey.generate"})
	}
	d, err := s.gate.Policy.Decide(ctx, authz.Request{Caller: call.Caller, Action: authz.Action(action), Org: org})
	if err != nil {
		return authz.Decision{}, s.gate.Failed(ctx, pass, audit.RequestFailed, "decision_failed", fmt.Errorf("deciding %s: %w", action, err))
	}
	event := pass.Event(audit.PolicyAsked)
	event.Detail = map[string]string{"asked": action, "allowed": strconv.FormatBool(d.Allow), "answer": string(d.Reason)}
	return d, s.gate.Record(ctx, event)
}
