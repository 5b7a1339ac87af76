// Package api is the HTTP surface: Gin routes, decoding, and the one place
// where errors become responses (errors.go). It decides nothing itself. A
// request for an organization passes, in this order, the drain switch,
// authentication, the organization's syntax, its body, and then the use case,
// which asks the policy first; what the edge refuses on its own goes through
// the use case too, so that a stranger hears "no" and nothing else.
//
// Each area of the contract has one routes function (routesKeys,
// routesHealth, …), called from New.
package api

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"sync/atomic"

	"github.com/gin-gonic/gin"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/cors"

	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/shares"
)

// Keys is what the routes need of *orgkey.Service.
type Keys interface {
	Generate(ctx context.Context, call gate.Call, org org.ID, deliver func(context.Context, orgkey.Generated) error) error
	List(ctx context.Context, call gate.Call, org org.ID) ([]orgkey.Key, error)
	ListNodeKeys(ctx context.Context, call gate.Call, org org.ID) ([]orgkey.Key, error)
	Delete(ctx context.Context, call gate.Call, org org.ID, id string) error
	DeleteAll(ctx context.Context, call gate.Call, org org.ID, withNodeKeys bool) (orgkey.Ended, error)
}

var _ Keys = (*orgkey.Service)(nil)

// Rejections records authenticated requests that the edge refuses by itself. Its
// implementation is gate.Gate.
type Rejections interface {
	Reject(ctx context.Context, call gate.Call, org org.ID, action authz.Action, object, reason string) error
}

var _ Rejections = gate.Gate{}

// Authenticator returns the caller of a request from its headers. Its errors are those
// of authn.Verifier.Authenticate.
type Authenticator func(ctx context.Context, h http.Header) (authz.Caller, error)

// Config is what an API is made of. Only Console, CORSOrigins, Proxies and Checks may be left out.
type Config struct {
	Keys         Keys
	Nodes        Nodes
	SystemEvents SystemEvents
	Rejections   Rejections
	Enrollments  Enrollments
	DryRuns      DryRuns
	OrgLog       OrgLog
	Authenticate Authenticator
	// Unauthenticated counts a refused caller for the summaries in the audit log;
	// authn.Failures.Count does that.
	Unauthenticated func(reason string)
	// Console makes the pages under /console/, which are a client of the API: the
	// handler that it is given. nil: there are none.
	Console     func(api http.Handler) http.Handler
	Checks      []Check              // what readiness asks
	Metrics     *prometheus.Registry // gets this package's metrics, and is what /metrics shows
	Log         *slog.Logger
	CORSOrigins []string // exact origins that browsers may call from
	Proxies     Proxies
}

// API serves the contract. Its zero value is not usable; New makes one.
type API struct {
	Config
	metrics  metrics
	ready    *readiness
	cors     *cors.Cors     // nil without origins
	reading  *shares.Places // of bodies that are read before anybody vouches for them
	lists    lists
	leaving  atomic.Bool
	draining atomic.Bool
	public   *gin.Engine
	admin    *gin.Engine
}

// New returns an API, or an error that says what is wrong with c.
func New(c Config) (*API, error) {
	if c.Keys == nil || c.Nodes == nil || c.SystemEvents == nil || c.Enrollments == nil || c.DryRuns == nil || c.OrgLog == nil || c.Rejections == nil || c.Authenticate == nil || c.Unauthenticated == nil || c.Metrics == nil || c.Log == nil {
		return nil, errors.New("the API lacks its use cases, its gate, authentication, metrics or log")
	}
	crossOrigin, err := newCORS(c.CORSOrigins)
	if err != nil {
		return nil, err
	}
	ready := newReadiness(c.Checks)
	m, err := newMetrics(c.Metrics, ready)
	if err != nil {
		return nil, err
	}
	a := &API{Config: c, metrics: m, ready: ready, cors: crossOrigin, reading: shares.New(maxReading, c.Proxies.Shared), lists: newLists()}
	a.public = a.engine(a.checkProxy, a.crossOrigin)
	a.routesKeys(a.public)
	a.routesNodes(a.public)
	a.routesSystemEvents(a.public)
	a.routesEnrollments(a.public)
	a.routesDryRuns(a.public)
	a.routesOrgLog(a.public)
	a.routesHealth(a.public)
	get(a.public, "/openapi.yaml", serveDocument)
	if c.Console != nil {
		a.routesConsole(a.public, c.Console(a.public))
	}
	a.admin = a.engine()
	a.routesAdmin(a.admin)
	return a, nil
}

// Handler serves the public listener.
func (a *API) Handler() http.Handler { return a.public }

// Admin serves the admin listener: metrics, and readiness in detail.
func (a *API) Admin() http.Handler { return a.admin }

// Leave makes the API report that it is not ready and close connections after their
// next answer, but continue serving, so that load balancers can notice.
func (a *API) Leave() { a.leaving.Store(true) }

// Drain makes the API refuse new requests and report that it is not ready. Requests in
// progress continue.
func (a *API) Drain() { a.draining.Store(true) }

// get routes what is read. HEAD is answered as GET is, by the same handlers and with the
// same events; net/http leaves the body out.
func get(r gin.IRoutes, path string, handlers ...gin.HandlerFunc) {
	r.Match([]string{http.MethodGet, http.MethodHead}, path, handlers...)
}

// engine is Gin without opinions: a path matches as it was sent or not at all.
// Matching the escaped path keeps "%2F" from being a separator; parameters are
// unescaped only after it.
func (a *API) engine(more ...gin.HandlerFunc) *gin.Engine {
	gin.SetMode(gin.ReleaseMode) // anything else prints to standard output
	e := gin.New()
	e.RedirectTrailingSlash = false
	e.RedirectFixedPath = false
	e.RemoveExtraSlash = false
	e.HandleMethodNotAllowed = true
	e.ForwardedByClientIP = false // Proxies decides which proxies are trusted
	e.UseEscapedPath = true
	e.UnescapePathValues = true
	e.Use(a.observe, a.recoverPanic, a.checkHeader)
	e.Use(more...)
	e.NoRoute(func(c *gin.Context) { a.refuse(c, noRoute) })
	e.NoMethod(func(c *gin.Context) { a.refuse(c, noMethod) })
	return e
}
