package api

import (
	"context"
	"net/http"
	"time"

	"github.com/gin-gonic/gin"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orglog"
)

// OrgLog is what the routes need of *orglog.Service.
type OrgLog interface {
	Events(ctx context.Context, call gate.Call, org org.ID, query string) (orglog.Page, error)
	Prove(ctx context.Context, call gate.Call, org org.ID, id string) (orglog.Proof, error)
	Checkpoint(ctx context.Context, call gate.Call, org org.ID) (audit.Signed, error)
	Summarize(ctx context.Context, call gate.Call, org org.ID) (orglog.Summary, error)
}

var _ OrgLog = (*orglog.Service)(nil)

func (a *API) routesOrgLog(r gin.IRouter) {
	of := r.Group("/organization/:idOrg", a.whileServing, a.authenticate)
	get(of, "/event", a.organization(authz.ReadEvents), a.withoutBody, a.listing, a.listEvents)
	get(of, "/event/:idEvent/proof", a.organization(authz.ReadEvents), a.withoutBody, a.proveEvent)
	get(of, "/checkpoint", a.organization(authz.ReadEvents), a.withoutBody, a.newestCheckpoint)
	get(of, "/summary", a.organization(authz.ListKeys), a.withoutBody, a.summarize)
}

type logPage struct {
	Success bool       `json:"success"`
	Data    []logEntry `json:"data"`
	Next    int64      `json:"next,omitempty"`
	// Archived is how many first events of the log are in the operator's archive.
	Archived int64 `json:"archived,omitempty"`
}

type logEntry struct {
	Index   *int64 `json:"index"` // null until it has one
	Event   string `json:"event"` // the leaf, verbatim: a string, since proofs are about its bytes
	Name    string `json:"name,omitempty"`
	Email   string `json:"email,omitempty"`
	Address string `json:"address,omitempty"`
	Note    string `json:"note,omitempty"`
}

func (a *API) listEvents(c *gin.Context) {
	x := exchangeOf(c)
	page, err := a.OrgLog.Events(c.Request.Context(), x.call(), x.org, c.Request.URL.RawQuery)
	if err != nil {
		a.fail(c, err)
		return
	}
	answer := logPage{true, make([]logEntry, len(page.Events)), page.Next, page.Archived}
	for i, e := range page.Events {
		answer.Data[i] = logEntry{Event: string(e.Leaf), Name: e.Person.Name, Email: e.Person.Email, Address: e.Person.Address, Note: e.Person.Note}
		if e.Index >= 0 {
			answer.Data[i].Index = &e.Index
		}
	}
	a.writeList(c, answer)
}

func (a *API) proveEvent(c *gin.Context) {
	x := exchangeOf(c)
	proof, err := a.OrgLog.Prove(c.Request.Context(), x.call(), x.org, c.Param("idEvent"))
	if err != nil {
		a.fail(c, err)
		return
	}
	writeJSON(c, http.StatusOK, proof)
}

type checkpointAnswer struct {
	Success bool            `json:"success"`
	Data    checkpointEntry `json:"data"`
}

type checkpointEntry struct {
	Origin     string `json:"origin"`
	Size       int64  `json:"size"`
	Checkpoint string `json:"checkpoint"` // the signed note
}

func (a *API) newestCheckpoint(c *gin.Context) {
	x := exchangeOf(c)
	signed, err := a.OrgLog.Checkpoint(c.Request.Context(), x.call(), x.org)
	if err != nil {
		a.fail(c, err)
		return
	}
	writeJSON(c, http.StatusOK, checkpointAnswer{true, checkpointEntry{signed.Origin, signed.Size, signed.Note}})
}

type summaryAnswer struct {
	Success bool         `json:"success"`
	Data    summaryEntry `json:"data"`
}

type summaryEntry struct {
	OrgID        org.ID          `json:"orgId"`
	Keys         quotaEntry      `json:"keys"`
	NodeKeys     quotaEntry      `json:"nodeKeys"`
	Occupants    []occupantEntry `json:"occupants"`
	Nodes        int             `json:"nodes"`
	Secrets      int             `json:"secrets"`
	Unconfirmed  int             `json:"unconfirmed"`
	Unreceived   int             `json:"unreceived"`
	Enrollments  int             `json:"enrollments"`
	Approvals    int             `json:"approvals"`
	Conflicts    int             `json:"conflicts"`
	EventsFrom   string          `json:"eventsFrom"`
	EventsByHour []int           `json:"eventsByHour"`
	Log          logState        `json:"log"`
}

type quotaEntry struct {
	Used  int `json:"used"`
	Limit int `json:"limit"`
}

type occupantEntry struct {
	ID         string `json:"id"`
	State      string `json:"state"`
	Since      string `json:"since,omitempty"`
	Enrollment string `json:"enrollment,omitempty"`
	Sealed     bool   `json:"sealed"`
}

type logState struct {
	Origin  string      `json:"origin"`
	Size    int64       `json:"size"`
	Signed  int64       `json:"signed"`
	Covered string      `json:"covered,omitempty"`
	Sinks   []sinkState `json:"sinks"`
}

type sinkState struct {
	Name     string `json:"name"`
	Next     int64  `json:"next"`
	Going    bool   `json:"going"`
	CaughtUp string `json:"caughtUp,omitempty"`
}

func (a *API) summarize(c *gin.Context) {
	x := exchangeOf(c)
	s, err := a.OrgLog.Summarize(c.Request.Context(), x.call(), x.org)
	if err != nil {
		a.fail(c, err)
		return
	}
	entry := summaryEntry{
		OrgID: x.org, Keys: quotaEntry{len(s.Occupants), s.Limit}, NodeKeys: quotaEntry{s.NodeKeys, s.NodeLimit},
		Occupants: make([]occupantEntry, len(s.Occupants)), Nodes: s.Nodes, Secrets: s.Secrets, Unconfirmed: s.Unconfirmed, Unreceived: s.Unreceived,
		Enrollments: s.Enrollments, Approvals: s.Approvals, Conflicts: s.Conflicts, EventsFrom: instant(s.First), EventsByHour: s.EventsByHour[:],
		Log: logState{Origin: s.Origin, Size: s.Size, Signed: s.Signed, Covered: known(s.Covered), Sinks: make([]sinkState, len(s.Sinks))},
	}
	for i, o := range s.Occupants {
		entry.Occupants[i] = occupantEntry{o.ID, o.State, known(o.Since), o.Enrollment, o.Sealed}
	}
	for i, sink := range s.Sinks {
		entry.Log.Sinks[i] = sinkState{sink.Name, sink.Next, sink.Err == nil, known(sink.CaughtUp)}
	}
	writeJSON(c, http.StatusOK, summaryAnswer{true, entry})
}

// known is empty for a time that is not known.
func known(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return instant(t)
}
