package console

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/authz"
)

// visit is one request of somebody who is signed in.
type visit struct {
	*Console
	*signed
	w     http.ResponseWriter
	r     *http.Request
	api   *client.Client
	org   string
	asked map[string]bool // what the policy has answered to may
	made  func()          // the page is made, and the next may be
}

// signedIn serves h to people who are signed in, and sends others to the sign-in page.
func (c *Console) signedIn(h func(*visit) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		who, err := c.session(r)
		if errors.Is(err, errSignedOut) {
			to := home
			if r.Method == http.MethodGet || r.Method == http.MethodHead {
				to = r.URL.RequestURI()
			}
			http.Redirect(w, r, "/console/sign-in?"+url.Values{"to": {destination(to)}}.Encode(), http.StatusSeeOther)
			return
		}
		if err != nil {
			c.Log.Error("the session of the console could not be read", "error", err)
			c.problem(w, r, http.StatusServiceUnavailable, "Not available", "The service cannot answer at the moment. Please try again shortly.")
			return
		}
		v := &visit{Console: c, signed: who, w: w, r: r, org: string(who.caller.Org), asked: map[string]bool{}, made: func() {}}
		if v.api, err = v.client(); err == nil {
			err = h(v)
		}
		if err != nil {
			v.fail(err)
		}
	}
}

// inTurn has pages, each with the lists that it is made of, wait for their turn.
func inTurn(h func(*visit) error) func(*visit) error {
	return func(v *visit) error {
		waiting, cancel := context.WithTimeout(v.r.Context(), pagePatience)
		defer cancel()
		turn := v.making.Await(waiting, v.caller.Org, 1)
		if turn == nil {
			return &client.Error{Status: http.StatusServiceUnavailable, Code: client.Overloaded, Message: "Too many pages are being made. Please try again shortly."}
		}
		v.made = func() { turn(0) }
		defer v.made()
		return h(v)
	}
}

// client is a client of the API in this process.
func (v *visit) client() (*client.Client, error) {
	return client.New(client.Config{Server: "http://localhost", Token: v.bearer, Transport: inside{v.Console.api, v.r}, UserAgent: "orgkeys-console"})
}

func (v *visit) bearer(context.Context) (string, error) { return v.token, nil }

// inside has requests answered by a handler of this process, as of the same client
// that asks for the page.
type inside struct {
	handler http.Handler
	of      *http.Request
}

// handedOn are the headers by which the API tells where a request came from.
var handedOn = []string{"X-Forwarded-For", "X-Forwarded-Proto", "X-Request-Id"}

func (i inside) RoundTrip(req *http.Request) (*http.Response, error) {
	i.prepare(req)
	answer := &recorder{header: http.Header{}, status: http.StatusOK}
	i.handler.ServeHTTP(answer, req)
	return &http.Response{
		StatusCode: answer.status, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: answer.header, Request: req,
		Body: body{bytes.NewReader(answer.text.Bytes())}, ContentLength: int64(answer.text.Len()),
	}, nil
}

func (i inside) prepare(req *http.Request) {
	req.RequestURI, req.RemoteAddr, req.TLS, req.Host = req.URL.RequestURI(), i.of.RemoteAddr, i.of.TLS, i.of.Host
	req.Proto, req.ProtoMajor, req.ProtoMinor = i.of.Proto, i.of.ProtoMajor, i.of.ProtoMinor
	for _, name := range handedOn {
		if given, there := i.of.Header[name]; there {
			req.Header[name] = given
		}
	}
	if req.Body == nil {
		req.Body = http.NoBody
	}
}

type body struct{ *bytes.Reader }

func (body) Close() error { return nil }

// recorder is an answer that stays in the process.
type recorder struct {
	header http.Header
	status int
	text   bytes.Buffer
}

func (r *recorder) Header() http.Header              { return r.header }
func (r *recorder) WriteHeader(status int)           { r.status = status }
func (r *recorder) Write(b []byte) (int, error)      { return r.text.Write(b) }
func (r *recorder) Flush()                           {}
func (r *recorder) SetWriteDeadline(time.Time) error { return nil }

// forward answers a script of a page with what the API answers, in the person's name.
// It goes to the caller's own organization, and no token comes back.
func (c *Console) forward(w http.ResponseWriter, r *http.Request) {
	who, err := c.session(r)
	if err != nil {
		status, code, message := http.StatusServiceUnavailable, "unavailable", "The service cannot answer at the moment. Please try again shortly."
		if errors.Is(err, errSignedOut) {
			status, code, message = http.StatusUnauthorized, "signed_out", "You are signed out. Sign in again, and repeat this."
		} else {
			w.Header().Set("Retry-After", retryAfter)
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_, _ = w.Write([]byte(`{"success":false,"message":"` + message + `","errorCode":"` + code + `"}`))
		return
	}
	req := r.Clone(r.Context())
	// A key is only asked for in its sealed form: whatever the browser accepts, no
	// private key in clear comes from here.
	req.Header = http.Header{"Authorization": {"Bearer " + who.token}, "Accept": {"application/vnd.orgkeys.sealed+json"}}
	for _, name := range []string{"Content-Type", "Content-Length", "User-Agent"} {
		if given, there := r.Header[name]; there {
			req.Header[name] = given
		}
	}
	organization := "/organization/" + string(who.caller.Org)
	req.URL = &url.URL{
		Path:    organization + strings.TrimPrefix(r.URL.Path, "/console/api"),
		RawPath: organization + strings.TrimPrefix(r.URL.EscapedPath(), "/console/api"),
	}
	inside{c.api, r}.prepare(req)
	c.api.ServeHTTP(w, req)
}

// may reports whether the policy lets the person do something now: which buttons to
// show. The API decides when one is pressed.
func (v *visit) may(action string) bool {
	allowed, known := v.asked[action]
	if !known {
		d, err := v.Policy.Decide(v.r.Context(), authz.Request{Caller: v.caller, Action: authz.Action(action), Org: v.caller.Org})
		allowed = err == nil && d.Allow
		v.asked[action] = allowed
	}
	return allowed
}

// show renders a page for the person.
func (v *visit) show(status int, name, title string, data any) error {
	page := &view{Title: title, Page: name, Static: v.version, Version: v.Version, Data: data, visit: v}
	if fromHere(v.r) {
		page.Done = done[v.r.URL.Query().Get("done")]
	}
	v.render(v.w, status, name, page)
	return nil
}

// done are what a page says after something was done, by what its address says.
var done = map[string]string{
	"key-deleted":    "The key is deleted. Requests signed with it are refused from now on.",
	"revoked":        "The enrollment is revoked.",
	"approved":       "The claim is approved. The node gets its key the next time it asks.",
	"node-deleted":   "The node is deleted.",
	"device-allowed": "The device is allowed. Enrollments that want an allowed TPM let it in from now on.",
	"device-removed": "The device is removed. It enrolls no more.",
	"secret-stored":  "The boot secret is stored. Nodes get it the next time they fetch.",
	"secret-deleted": "The boot secret is deleted.",
}

// fromHere reports whether a page of the console led to the request. No other site's
// link has it say that something was done.
func fromHere(r *http.Request) bool {
	site := r.Header.Get("Sec-Fetch-Site")
	return site == "same-origin" || site == ""
}

// then sends the browser to a page after something was done, so that reloading does
// not do it again.
func (v *visit) then(page, what string) error {
	http.Redirect(v.w, v.r, page+"?"+url.Values{"done": {what}}.Encode(), http.StatusSeeOther)
	return nil
}

// form reads what was sent.
func (v *visit) form() (url.Values, error) {
	if err := v.r.ParseForm(); err != nil {
		return nil, errForm
	}
	return v.r.PostForm, nil
}

// failure is what a page says of something that failed.
type failure struct {
	Message, Code, Request string
}

func explain(err error) (int, failure) {
	refused, ok := errors.AsType[*client.Error](err)
	switch {
	case ok:
		return refused.Status, failure{refused.Message, string(refused.Code), refused.RequestID}
	case errors.Is(err, errForm):
		return http.StatusBadRequest, failure{Message: "The form could not be read, or is too large. Nothing was done."}
	}
	return http.StatusInternalServerError, failure{Message: "The page could not be made. The server's log says why."}
}

func (v *visit) fail(err error) {
	status, f := explain(err)
	if f.Code == "" {
		v.Log.Error("a page of the console failed", "path", v.r.Pattern, "error", err)
	}
	if status == http.StatusUnauthorized { // the token ended in between
		http.Redirect(v.w, v.r, "/console/sign-in", http.StatusSeeOther)
		return
	}
	if status < http.StatusBadRequest {
		status = http.StatusServiceUnavailable
	}
	title := "That did not work"
	if status == http.StatusForbidden {
		title = "You may not do that"
	}
	_ = v.show(status, "failure", title, f) // show has no error
}
