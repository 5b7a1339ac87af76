package api

import (
	"context"
	"net/http"

	"github.com/gin-gonic/gin"

	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/dryrun"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/org"
)

// DryRuns is what the route needs of *dryrun.Service.
type DryRuns interface {
	Ask(ctx context.Context, call gate.Call, org org.ID, action string) (authz.Decision, error)
	AskAll(ctx context.Context, call gate.Call, org org.ID) ([]dryrun.Row, error)
}

var _ DryRuns = (*dryrun.Service)(nil)

func (a *API) routesDryRuns(r gin.IRouter) {
	get(r, "/organization/:idOrg/decision/:action", a.whileServing, a.authenticate, a.organization(authz.AskPolicy), a.withoutBody, a.askPolicy)
	get(r, "/organization/:idOrg/decision", a.whileServing, a.authenticate, a.organization(authz.AskPolicy), a.withoutBody, a.askWholePolicy)
}

type decisionAnswer struct {
	Success bool          `json:"success"`
	Data    decisionEntry `json:"data"`
}

type decisionEntry struct {
	Action  string       `json:"action"`
	OrgID   org.ID       `json:"orgId"`
	Subject string       `json:"subject"`
	Roles   []authz.Role `json:"roles"`
	Allow   bool         `json:"allow"`
	Reason  authz.Reason `json:"reason"`
	Scope   authz.Scope  `json:"scope"` // empty unless allowed
	Policy  string       `json:"policy"`
}

func (a *API) askPolicy(c *gin.Context) {
	x := exchangeOf(c)
	action := c.Param("action")
	d, err := a.DryRuns.Ask(c.Request.Context(), x.call(), x.org, action)
	if err != nil {
		a.fail(c, err)
		return
	}
	writeJSON(c, http.StatusOK, decisionAnswer{true, x.decided(action, d)})
}

func (x *exchange) decided(action string, d authz.Decision) decisionEntry {
	roles := x.caller.Roles
	if roles == nil {
		roles = []authz.Role{}
	}
	return decisionEntry{action, x.org, x.caller.Subject, roles, d.Allow, d.Reason, d.Scope, d.Revision}
}

type decisionList struct {
	Success bool          `json:"success"`
	Data    []decisionRow `json:"data"`
}

type decisionRow struct {
	decisionEntry
	ByRole map[authz.Role]roleDecision `json:"byRole"`
}

type roleDecision struct {
	Allow  bool         `json:"allow"`
	Reason authz.Reason `json:"reason"`
	Scope  authz.Scope  `json:"scope"`
}

func (a *API) askWholePolicy(c *gin.Context) {
	x := exchangeOf(c)
	rows, err := a.DryRuns.AskAll(c.Request.Context(), x.call(), x.org)
	if err != nil {
		a.fail(c, err)
		return
	}
	list := decisionList{true, make([]decisionRow, len(rows))}
	for i, row := range rows {
		d := row.Caller
		list.Data[i] = decisionRow{x.decided(string(row.Action), d), map[authz.Role]roleDecision{}}
		for role, d := range row.ByRole {
			list.Data[i].ByRole[role] = roleDecision{d.Allow, d.Reason, d.Scope}
		}
	}
	writeJSON(c, http.StatusOK, list)
}
