package api

import (
	"cmp"
	"net/http"
	"net/url"
	"regexp"
	"unicode/utf8"

	"github.com/gin-gonic/gin"

	"github.com/orgkeys/orgkeys/internal/authn"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/jsonbody"
	"github.com/orgkeys/orgkeys/internal/org"
)

// whileServing refuses work that comes after Drain, before anything is spent on it.
func (a *API) whileServing(c *gin.Context) {
	if a.leaving.Load() {
		endConnection(c)
	}
	if a.draining.Load() {
		endConnection(c)
		a.refuse(c, draining)
	}
}

// authenticate establishes the caller. Unauthenticated callers are counted, and cost
// neither a decision nor an audit event.
func (a *API) authenticate(c *gin.Context) {
	c.Header("Cache-Control", "no-store")
	caller, err := a.Authenticate(c.Request.Context(), c.Request.Header)
	if err != nil {
		if reason := authn.CountedAs(err); reason != "" {
			a.countUnknown(reason)
		}
		a.fail(c, err)
		return
	}
	exchangeOf(c).caller = caller
}

func (a *API) countUnknown(reason string) {
	a.metrics.authnFailures.WithLabelValues(reason).Inc()
	a.Unauthenticated(reason)
}

// organization reads the organization from the path, for the given action. Handlers
// after it never see a malformed one.
func (a *API) organization(action authz.Action) gin.HandlerFunc {
	return func(c *gin.Context) {
		x := exchangeOf(c)
		x.action = action
		id, err := org.Parse(c.Param("idOrg"))
		if err != nil {
			a.reject(c, "malformed_organization", invalidOrg)
			return
		}
		x.org = id
	}
}

// ofCaller is organization for a path that names none: it is the caller's.
func (a *API) ofCaller(action authz.Action) gin.HandlerFunc {
	return func(c *gin.Context) {
		x := exchangeOf(c)
		x.org, x.action = x.caller.Org, action
	}
}

// reasonForm is what a client may say in a deletion's ?reason=. It is for people, and
// goes into the part of the event that can be erased.
var reasonForm = regexp.MustCompile(`\A[^\p{Cc}\p{Cf}\x{2028}\x{2029}]{1,200}\z`)

// reasoned reads the reason for a deletion, which may be left out.
func (a *API) reasoned(c *gin.Context) {
	query, err := url.ParseQuery(c.Request.URL.RawQuery)
	given, there := query["reason"]
	if err == nil && !there {
		return
	}
	if err != nil || len(given) != 1 || !utf8.ValidString(given[0]) || !reasonForm.MatchString(given[0]) {
		wrong := &jsonbody.Error{Field: "reason", Problem: "is not 1 to 200 characters without control characters"}
		a.reject(c, "invalid", problem{http.StatusBadRequest, "invalid_request", wrong.Error(), 0})
		return
	}
	exchangeOf(c).note = given[0]
}

// reject refuses an authenticated request at the edge, after the policy has decided and
// the audit log has the refusal.
func (a *API) reject(c *gin.Context, reason string, p problem) {
	x := exchangeOf(c)
	if err := a.Rejections.Reject(c.Request.Context(), x.call(), x.org, x.action, object(c), reason); err != nil {
		a.fail(c, err)
		return
	}
	a.refuse(c, p)
}

// object is what the path names within the organization, as it was sent.
func object(c *gin.Context) string {
	return cmp.Or(c.Param("idKey"), c.Param("idNode"), c.Param("name"), c.Param("ek"), c.Param("idEvent"))
}
