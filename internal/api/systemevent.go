package api

import (
	"context"
	"net/http"

	"github.com/gin-gonic/gin"

	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/systemevent"
)

// SystemEvents is what the routes need of *systemevent.Service.
type SystemEvents interface {
	Read(ctx context.Context, call gate.Call, body []byte) (systemevent.Page, error)
	Mark(ctx context.Context, call gate.Call, body []byte, asRead bool) error
}

var _ SystemEvents = (*systemevent.Service)(nil)

func (a *API) routesSystemEvents(r gin.IRouter) {
	r.POST("/systemevent", a.whileServing, a.authenticate, a.ofCaller(authz.ReadEvents), a.systemEventBody, a.listing, a.readSystemEvents)
	r.POST("/systemevent/read", a.whileServing, a.authenticate, a.ofCaller(authz.MarkEvents), a.markSystemEvents(true))
	r.DELETE("/systemevent/read", a.whileServing, a.authenticate, a.ofCaller(authz.MarkEvents), a.markSystemEvents(false))
}

type eventPage struct {
	Events []eventEntry `json:"events"`
	Total  int          `json:"total"`
	Skip   int          `json:"skip"`
	Take   int          `json:"take"`
}

type eventEntry struct {
	ID          int64   `json:"id"`
	Timestamp   string  `json:"timestamp"`
	ContextID   string  `json:"contextId"` // the ID of the key or node
	Context     string  `json:"context"`
	Event       string  `json:"event"`
	OrgID       org.ID  `json:"orgId"`
	UserID      string  `json:"userId"` // the actor; for a node, the ID of its key
	UserName    string  `json:"userName"`
	UserEmail   string  `json:"userEmail"`
	WorkspaceID *string `json:"workspaceId"` // always null: keys and nodes belong to no workspace
	JSONData    string  `json:"jsonData"`    // the event as the audit log holds it
	ShowUnread  bool    `json:"showUnread"`  // the caller has not marked it as read
}

// systemEventBody is before listing: whoever sends a body slowly must not hold a turn.
func (a *API) systemEventBody(c *gin.Context) {
	exchangeOf(c).body, _ = a.adminBody(c)
}

func (a *API) readSystemEvents(c *gin.Context) {
	x := exchangeOf(c)
	page, err := a.SystemEvents.Read(c.Request.Context(), x.call(), x.body)
	if err != nil {
		a.fail(c, err)
		return
	}
	answer := eventPage{Events: make([]eventEntry, len(page.Events)), Total: page.Total, Skip: page.Skip, Take: page.Take}
	for i, e := range page.Events {
		answer.Events[i] = eventEntry{
			ID: e.Number, Timestamp: instant(e.Time), ContextID: e.Object, Context: e.Context.String(), Event: e.Change.String(),
			OrgID: e.Org, UserID: e.Actor.ID, UserName: e.Person.Name, UserEmail: e.Person.Email, JSONData: e.Leaf, ShowUnread: e.Unread,
		}
	}
	a.writeList(c, answer)
}

func (a *API) markSystemEvents(asRead bool) gin.HandlerFunc {
	return func(c *gin.Context) {
		body, refusal := readBody(c)
		if refusal != nil {
			a.reject(c, refusal.code, *refusal)
			return
		}
		if err := a.SystemEvents.Mark(c.Request.Context(), exchangeOf(c).call(), body, asRead); err != nil {
			a.fail(c, err)
			return
		}
		writeJSON(c, http.StatusOK, struct {
			Success bool `json:"success"`
		}{true})
	}
}
