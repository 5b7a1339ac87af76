package dryrun

import (
	"context"
	"fmt"
	"slices"
	"strconv"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/org"
)

// Row is what the policy says of one action in the caller's organization: to the
// caller, and to a person with each role alone.
type Row struct {
	Action authz.Action
	Caller authz.Decision
	ByRole map[authz.Role]authz.Decision
}

// Roles are the columns of Row.ByRole.
func Roles() []authz.Role {
	return []authz.Role{authz.Owner, authz.Administrator, authz.Workspaces, authz.Billing, authz.User}
}

// AskAll is Ask for every action, with one event. Who a member with one role is does
// not matter to the shipped policy; to one that decides by subject, it is the caller.
func (s *Service) AskAll(ctx context.Context, call gate.Call, org org.ID) ([]Row, error) {
	pass, err := s.gate.Decide(ctx, call, authz.AskPolicy, org, "")
	if err != nil {
		return nil, err
	}
	var rows []Row
	allowed := 0
	for _, action := range authz.Actions() {
		row := Row{Action: action, ByRole: map[authz.Role]authz.Decision{}}
		if row.Caller, err = s.ask(ctx, pass, call.Caller, action); err != nil {
			return nil, err
		}
		if row.Caller.Allow {
			allowed++
		}
		for _, role := range Roles() {
			member := call.Caller
			member.Roles = []authz.Role{role}
			if slices.Equal(member.Roles, call.Caller.Roles) { // the same question
				row.ByRole[role] = row.Caller
				continue
			}
			if row.ByRole[role], err = s.ask(ctx, pass, member, action); err != nil {
				return nil, err
			}
		}
		rows = append(rows, row)
	}
	event := pass.Event(audit.PolicyAsked)
	event.Detail = map[string]string{"asked": "all", "allowed": strconv.Itoa(allowed)}
	return rows, s.gate.Record(ctx, event)
}

func (s *Service) ask(ctx context.Context, pass gate.Pass, caller authz.Caller, action authz.Action) (authz.Decision, error) {
	d, err := s.gate.Policy.Decide(ctx, authz.Request{Caller: caller, Action: action, Org: pass.Org})
	if err != nil {
		return d, s.gate.Failed(ctx, pass, audit.RequestFailed, "decision_failed", fmt.Errorf("deciding %s: %w", action, err))
	}
	return d, nil
}
