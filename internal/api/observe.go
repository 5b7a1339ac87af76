package api

import (
	"log/slog"
	"net/http"
	"regexp"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/panics"
)

// exchange holds the state of one request that Gin does not hold. Fields are set as
// checks pass, so all of them may be logged.
type exchange struct {
	id      string
	address string // the client's, according to trusted proxies
	caller  authz.Caller
	org     org.ID // empty where the path names none, or a malformed one
	action  authz.Action
	note    string // why, in the client's words
	code    string // of the problem answered
	aborted bool   // aborted after the response had begun
	last    bool   // of its connection
	body    []byte // if it is read before the handler
	made    func() // of a list: it is made, and the next may be
}

const exchangeKey = "orgkeys.exchange"

func exchangeOf(c *gin.Context) *exchange { return c.MustGet(exchangeKey).(*exchange) }

func (x *exchange) call() gate.Call {
	return gate.Call{Caller: x.caller, Request: x.id, Address: x.address, Note: x.note}
}

var requestIDForm = regexp.MustCompile(`^[A-Za-z0-9-]{1,64}$`)

// requestID is the client's own if it sent exactly one that cannot do any
// harm in a log, a header or an audit event; otherwise a fresh one.
func requestID(h http.Header) string {
	if sent := h.Values("X-Request-Id"); len(sent) == 1 && requestIDForm.MatchString(sent[0]) {
		return sent[0]
	}
	return uuid.NewString()
}

// observe gives every request its ID and the headers that all answers have, and records
// its outcome.
func (a *API) observe(c *gin.Context) {
	started := time.Now()
	x := &exchange{id: requestID(c.Request.Header), last: c.Writer.Header().Get("Connection") == "close"}
	c.Set(exchangeKey, x)
	c.Header("X-Request-Id", x.id)
	c.Header("X-Content-Type-Options", "nosniff")
	expectBody(c)
	defer func() { a.record(c, x, time.Since(started)) }()
	c.Next()
}

// checkHeader refuses headers that are too large. net/http's own limit is
// further out, since over HTTP/2 a single header beyond it ends the connection
// and every request on it.
func (a *API) checkHeader(c *gin.Context) {
	r := c.Request
	size := len(r.Method) + len(r.RequestURI) + len(r.Host)
	for name, values := range r.Header {
		for _, value := range values {
			size += len(name) + len(": \r\n") + len(value)
		}
	}
	if size > maxHeader {
		a.refuse(c, headerTooLarge)
	}
}

// record logs a request by what the service made of it: the route's pattern
// and checked values, nothing as it was sent.
func (a *API) record(c *gin.Context, x *exchange, took time.Duration) {
	status := c.Writer.Status()
	if x.aborted {
		status = statusClientGone
	}
	method, pattern := knownMethod(c.Request.Method), route(c)
	a.metrics.observe(method, pattern, status, took)
	attrs := []slog.Attr{
		slog.String("request", x.id), slog.String("method", method), slog.String("route", pattern),
		slog.Int("status", status), slog.Float64("ms", float64(took.Microseconds())/1000),
	}
	if x.org != "" {
		attrs = append(attrs, slog.String("org", string(x.org)))
	}
	if x.code != "" {
		attrs = append(attrs, slog.String("code", x.code))
	}
	a.Log.LogAttrs(c.Request.Context(), slog.LevelInfo, "request", attrs...)
}

// route is the pattern that matched, or "none".
func route(c *gin.Context) string {
	if p := c.FullPath(); p != "" {
		return p
	}
	return "none"
}

// knownMethod keeps methods, which clients may make up, from growing logs and metrics.
func knownMethod(m string) string {
	switch m {
	case http.MethodGet, http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodHead,
		http.MethodOptions, http.MethodPatch, http.MethodConnect, http.MethodTrace:
		return m
	default:
		return "other"
	}
}

// recoverPanic answers 500 for a bug and keeps the process alive.
func (a *API) recoverPanic(c *gin.Context) {
	defer func() {
		v := recover()
		if v == nil {
			return
		}
		if v == http.ErrAbortHandler {
			panic(v)
		}
		panics.Log(a.Log, v, "request", exchangeOf(c).id, "route", route(c))
		a.refuse(c, internal)
	}()
	c.Next()
}
