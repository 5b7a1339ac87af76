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
}

var _ DryRuns = (*dryrun.Service)(nil)

func (a *API) routesDryRuns(r gin.IRouter) {
	r.GET("/organization/:idOrg/decision/:action", a.whileServing, a.authenticate, a.organization(authz.AskPolicy), a.withoutBody, a.askPolicy)
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
	roles := x.caller.Roles
	if roles == nil {
		roles = []authz.Role{}
	}
	writeJSON(c, http.StatusOK, decisionAnswer{true, decisionEntry{action, x.org, x.caller.Subject, roles, d.Allow, d.Reason, d.Scope, d.Revision}})
}
