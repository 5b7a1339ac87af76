// Package console is the web pages for the people of an organization, under
// /console/: Go templates, a few ES modules, no library.
//
// It is one more client of the API, in the same process: each page and each form
// asks the API's own handler, with the access token of whoever is signed in. So the
// policy, the audit events and the limits are those of every other client, and a
// stolen session can do what its token can, and no more. The policy is asked here,
// too, but only for which buttons to show.
//
// No page has an access token in it. A private key is sealed to a recipient that the
// page makes (static/generate.js), and is opened in the browser: neither this
// package nor anything else of the service holds it.
package console

import (
	"bytes"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"io/fs"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"path"
	"strings"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/login"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/session"
	"github.com/orgkeys/orgkeys/internal/shares"
)

// maxForm is the size of the largest form, in bytes: a boot secret of 64 KiB, with
// room around it.
const maxForm = 96 << 10

// What goes on at once, at most.
const (
	maxExchanges = 16 // codes at the provider for tokens, shared out among addresses; more are refused
	maxLookups   = 8  // sessions in the database; more wait
	maxExports   = 16 // of events, shared out likewise
	maxPages     = 32 // that are being made, shared out among organizations; more wait for pagePatience
)

const (
	pagePatience = 2 * time.Second
	pagesMemory  = 96 << 20 // bytes of the pages that are being sent, shared out likewise; more are refused
)

// contentPolicy lets a page load what this package serves and nothing else. No script
// can turn text into markup or code (Trusted Types).
const contentPolicy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; " +
	"base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"

// Policy decides which buttons a page shows. Its implementation is authz.Policy.
type Policy interface {
	Decide(ctx context.Context, r authz.Request) (authz.Decision, error)
}

// Config is what a Console is made of.
type Config struct {
	// Authenticate is the API's: who the Authorization header of these headers speaks for.
	Authenticate func(ctx context.Context, h http.Header) (authz.Caller, error)
	// Unauthenticated counts a refused sign-in for the summaries in the audit log.
	Unauthenticated func(reason string)
	Policy          Policy
	Sessions        session.Store
	// URL is where browsers reach the service, as scheme://host. Empty: with the
	// development issuer, which is for browsers on this machine.
	URL string
	// Provider signs people in. nil: they paste a token of the development issuer.
	Provider *login.Web
	// Client is the address that a request came from; Shared reports whether many clients
	// may have it.
	Client  func(*http.Request) netip.Addr
	Shared  func(netip.Addr) bool
	Version string // of the program
	Log     *slog.Logger
}

// Console serves the pages.
type Console struct {
	Config
	api     http.Handler // set by Asking
	handler http.Handler
	// What anybody may cause without being signed in, and what is large.
	exchanges, exports *shares.Places
	lookups            *semaphore.Weighted
	making, memory     *shares.Amount[org.ID] // of pages for those who are
	static             map[string]asset
	version            string // of the static files, in their address
}

//go:embed static
var staticFiles embed.FS

type asset struct {
	mediaType string
	text      []byte
}

// New returns the pages, which ask nothing before Asking.
func New(c Config) (*Console, error) {
	con := &Console{
		Config: c, static: map[string]asset{},
		exchanges: shares.New(maxExchanges, c.Shared), lookups: semaphore.NewWeighted(maxLookups), exports: shares.New(maxExports, c.Shared),
		making: shares.NewAmount[org.ID](maxPages), memory: shares.NewAmount[org.ID](pagesMemory),
	}
	digest := sha256.New()
	err := fs.WalkDir(staticFiles, "static", func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		text, err := staticFiles.ReadFile(name)
		if err != nil {
			return err
		}
		digest.Write(text)
		con.static[path.Base(name)] = asset{mediaType(name), text}
		return nil
	})
	if err != nil {
		return nil, err
	}
	con.version = hex.EncodeToString(digest.Sum(nil)[:8])
	con.handler = con.protected(con.routes())
	return con, nil
}

// Asking returns the handler of the pages, which ask api.
func (c *Console) Asking(api http.Handler) http.Handler {
	c.api = api
	return c.handler
}

// mediaType does not depend on what the machine's tables say.
func mediaType(name string) string {
	switch path.Ext(name) {
	case ".js":
		return "text/javascript; charset=utf-8"
	case ".css":
		return "text/css; charset=utf-8"
	case ".svg":
		return "image/svg+xml"
	}
	return mime.TypeByExtension(path.Ext(name))
}

func (c *Console) routes() *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /console/static/{version}/{file}", c.serveStatic)
	mux.HandleFunc("GET /console/sign-in", c.showSignIn)
	mux.HandleFunc("POST /console/sign-out", c.signOut)
	if c.Provider == nil {
		mux.HandleFunc("POST /console/sign-in", c.signInByToken)
	} else {
		mux.HandleFunc("GET /console/sign-in/begin", c.begin)
		mux.HandleFunc("GET /console/callback", c.callback)
	}
	page := func(pattern string, h func(*visit) error) {
		if strings.HasPrefix(pattern, http.MethodGet) { // no turn waits for a form
			h = inTurn(h)
		}
		mux.HandleFunc(pattern, c.signedIn(h))
	}
	page("GET /console/{$}", (*visit).overview)
	page("GET /console/keys", (*visit).keys)
	page("GET /console/keys/{id}", (*visit).key)
	page("POST /console/keys/{id}/delete", (*visit).deleteKey)
	page("GET /console/enrollments", (*visit).enrollments)
	page("POST /console/enrollments", (*visit).mint)
	page("GET /console/enrollments/{id}", (*visit).enrollment)
	page("POST /console/enrollments/{id}/approve", (*visit).approve)
	page("POST /console/enrollments/{id}/revoke", (*visit).revoke)
	page("GET /console/nodes", (*visit).nodes)
	page("POST /console/nodes/{id}/delete", (*visit).deleteNode)
	page("GET /console/devices", (*visit).devices)
	page("POST /console/devices", (*visit).allowDevice)
	page("POST /console/devices/{ek}/remove", (*visit).removeDevice)
	page("GET /console/secrets", (*visit).secrets)
	page("POST /console/secrets", (*visit).putSecret)
	page("POST /console/secrets/{name}/delete", (*visit).deleteSecret)
	page("GET /console/events", (*visit).events)
	mux.HandleFunc("GET /console/events/export", c.signedIn((*visit).export)) // which has its own places
	page("GET /console/verify", (*visit).verify)
	page("GET /console/policy", (*visit).policy)
	// What scripts ask for; the path behind /console/api is the API's behind the organization.
	mux.HandleFunc("POST /console/api/key", c.forward)
	mux.HandleFunc("POST /console/api/key/{id}/receipt", c.forward)
	mux.HandleFunc("GET /console/api/event/{id}/proof", c.forward)
	mux.HandleFunc("/", c.notFound)
	return mux
}

// protected is around every request. A browser's request that changes something comes
// from a page of this origin, or is refused (Sec-Fetch-Site, or else Origin).
func (c *Console) protected(next http.Handler) http.Handler {
	crossOrigin := http.NewCrossOriginProtection()
	crossOrigin.SetDenyHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.problem(w, r, http.StatusForbidden, "Refused", "This request was sent by a page of another site. Nothing was done.")
	}))
	guarded := crossOrigin.Handler(c.unlessEmbedded(next))
	strict := c.ownsHost()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", contentPolicy)
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Permissions-Policy", "camera=(), geolocation=(), microphone=(), payment=(), usb=()")
		h.Set("Referrer-Policy", "same-origin") // no-referrer would make forms send Origin: null
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Frame-Options", "DENY")
		h.Set("Cache-Control", "no-store")
		if strict {
			h.Set("Strict-Transport-Security", "max-age=31536000")
		}
		// A name that somebody else's DNS resolves to this machine would make their page one of this origin.
		if c.URL == "" && !loopback(r.Host) {
			c.problem(w, r, http.StatusForbidden, "Refused", "With the development issuer the console is for this machine only: open it at 127.0.0.1 or localhost.")
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxForm)
		guarded.ServeHTTP(w, r)
	})
}

// unlessEmbedded refuses what a page of another site loads without showing it as a page:
// reading leaves events in the name of whoever is signed in. Links lead here as ever.
func (c *Console) unlessEmbedded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		site := r.Header.Get("Sec-Fetch-Site")
		if (site == "same-site" || site == "cross-site") && r.Header.Get("Sec-Fetch-Dest") != "document" {
			c.problem(w, r, http.StatusForbidden, "Refused", "This page was asked for by a page of another site.")
			return
		}
		next.ServeHTTP(w, r)
	})
}

// loopback reports whether a Host header names this machine, whatever DNS says.
func loopback(host string) bool {
	name := host
	if split, _, err := net.SplitHostPort(host); err == nil {
		name = split
	}
	addr, err := netip.ParseAddr(strings.Trim(name, "[]"))
	return strings.EqualFold(name, "localhost") || err == nil && addr.Unmap().IsLoopback()
}

// secure reports whether browsers reach the console over TLS.
func (c *Console) secure(r *http.Request) bool {
	if c.URL == "" {
		return r.TLS != nil
	}
	return strings.HasPrefix(c.URL, "https:")
}

// ownsHost reports whether browsers may be told never to use http for the console's host
// name again. That speaks for every port of it, so only from the usual one of https.
func (c *Console) ownsHost() bool {
	u, err := url.Parse(c.URL)
	return err == nil && u.Scheme == "https" && u.Port() == ""
}

// origin is the address that browsers know the service by.
func (c *Console) origin(r *http.Request) *url.URL {
	if c.URL != "" {
		u, err := url.Parse(c.URL)
		if err == nil { // the settings were checked
			return u
		}
	}
	scheme := "http"
	if c.secure(r) {
		scheme = "https"
	}
	return &url.URL{Scheme: scheme, Host: r.Host}
}

// serveStatic serves a file under an address that changes with the files.
func (c *Console) serveStatic(w http.ResponseWriter, r *http.Request) {
	file, known := c.static[r.PathValue("file")]
	if !known || r.PathValue("version") != c.version {
		c.notFound(w, r)
		return
	}
	h := w.Header()
	h.Set("Content-Type", file.mediaType)
	h.Set("Cache-Control", "public, max-age=31536000, immutable")
	h.Del("Content-Security-Policy") // it is for documents
	if path.Ext(r.PathValue("file")) == ".svg" {
		h.Set("Content-Security-Policy", "default-src 'none'")
	}
	_, _ = w.Write(file.text) // nobody is there any more
}

func (c *Console) notFound(w http.ResponseWriter, r *http.Request) {
	c.problem(w, r, http.StatusNotFound, "Not found", "There is no such page.")
}

// problem shows a page that needs nobody to be signed in.
func (c *Console) problem(w http.ResponseWriter, r *http.Request, status int, title, message string) {
	c.render(w, status, "problem", &view{Title: title, Data: message, Static: c.version})
}

// render writes a page, whole or not at all.
func (c *Console) render(w http.ResponseWriter, status int, name string, v *view) {
	var text bytes.Buffer
	if err := pages()[name].ExecuteTemplate(&text, "layout", v); err != nil {
		c.Log.Error("a page of the console could not be made", "page", name, "error", err)
		http.Error(w, "Internal error", http.StatusInternalServerError)
		return
	}
	if v.visit != nil {
		v.visit.made()
	}
	// The answer to a form is small, and may show what is shown once.
	if v.visit != nil && v.visit.r.Method == http.MethodGet {
		keep := c.memory.Take(v.visit.caller.Org, shares.Counted(int64(text.Cap())))
		if keep == nil {
			c.problem(w, v.visit.r, http.StatusServiceUnavailable, "Not available", "Too many large pages are being sent. Please try again shortly.")
			return
		}
		defer keep(0)
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	if status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", retryAfter)
	}
	w.WriteHeader(status)
	_, _ = w.Write(text.Bytes()) // nobody is there any more
}

// retryAfter is when to try again what is not available, in seconds.
const retryAfter = "5"

// errForm: a form is not what a page of the console sends.
var errForm = errors.New("the form is malformed")
