package console

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/login"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/session"
	"github.com/orgkeys/orgkeys/policies"
)

// empty has no session, and counts what it is asked for.
type empty struct{ read, dropped int }

func (*empty) KeepSession(context.Context, session.Stored, int) error { return nil }

func (e *empty) Session(context.Context, string) (session.Stored, bool, error) {
	e.read++
	return session.Stored{}, false, nil
}

func (e *empty) DropSession(context.Context, string) error {
	e.dropped++
	return nil
}

var stranger = netip.MustParseAddr("203.0.113.9")

func limited(t *testing.T) (*Console, *empty) {
	t.Helper()
	store := &empty{}
	c, err := New(Config{
		Sessions: store, Client: func(*http.Request) netip.Addr { return stranger }, Shared: func(netip.Addr) bool { return false },
		URL: "https://keys.example", Provider: &login.Web{}, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	return c, store
}

func ask(c *Console, ctx context.Context, method, path, cookie string) *httptest.ResponseRecorder {
	r := httptest.NewRequestWithContext(ctx, method, path, nil)
	r.Header.Set("Cookie", cookie)
	w := httptest.NewRecorder()
	c.handler.ServeHTTP(w, r)
	return w
}

// Whoever is not signed in causes few requests to the provider, few reads and no writes.
func TestWhoIsNotSignedInCausesLittle(t *testing.T) {
	t.Parallel()
	c, store := limited(t)
	secret := session.NewSecret()
	callback := "/console/callback?code=x&state=" + url.QueryEscape(attempt(secret).State)
	cookie := "__Host-orgkeys-sign-in-443=" + secret.Text() + "."
	var leave []func()
	for range maxExchanges / 2 {
		if leave = append(leave, c.exchanges.Take(stranger)); leave[len(leave)-1] == nil {
			t.Fatal("there are fewer places")
		}
	}
	if w := ask(c, t.Context(), "GET", callback, cookie); w.Code != http.StatusServiceUnavailable || !strings.Contains(w.Body.String(), "too many sign-ins at once") || len(w.Result().Cookies()) > 0 {
		t.Errorf("one sign-in too many gets %d %v", w.Code, w.Result().Cookies())
	}
	if from := netip.MustParseAddr("198.51.100.7"); c.exchanges.Take(from) == nil {
		t.Error("an address that holds all it may leaves others no place")
	}
	for _, l := range leave {
		l()
	}
	if w := ask(c, t.Context(), "GET", callback, cookie); strings.Contains(w.Body.String(), "too many") || len(w.Result().Cookies()) != 1 || c.exchanges.Taken() != 1 {
		t.Errorf("afterwards one gets %d %v, or its place is not given back", w.Code, w.Result().Cookies())
	}

	planted := "__Host-orgkeys-session-443=" + secret.Text()
	if w := ask(c, t.Context(), "POST", "/console/sign-out", planted); w.Code != http.StatusSeeOther || store.read != 1 || store.dropped != 0 {
		t.Errorf("signing out without a session: %d, %d reads, %d writes", w.Code, store.read, store.dropped)
	}
	if !c.lookups.TryAcquire(maxLookups) {
		t.Fatal("there are fewer places, or one is not given back")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if w := ask(c, ctx, "GET", "/console/keys", planted); w.Code != http.StatusServiceUnavailable || w.Header().Get("Retry-After") == "" || store.read != 1 {
		t.Errorf("one lookup too many gets %d %v, %d reads", w.Code, w.Header(), store.read)
	}
	// Not "signed_out", upon which the page offers to sign in.
	if w := ask(c, ctx, "GET", "/console/api/event/1/proof", planted); w.Code != http.StatusServiceUnavailable || w.Header().Get("Retry-After") == "" || !strings.Contains(w.Body.String(), `"unavailable"`) {
		t.Errorf("one lookup too many for a script gets %d %v %s", w.Code, w.Header(), w.Body)
	}
}

// All that a sign-in sends is its own, and none of it follows from the rest.
func TestSignInsAreApart(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	one, other := attempt(session.NewSecret()), attempt(session.NewSecret())
	for _, text := range []string{one.State, one.Nonce, one.Verifier, other.State, other.Nonce, other.Verifier} {
		if len(text) < 43 || seen[text] { // RFC 7636, 4.1
			t.Errorf("%q is short, or not its own", text)
		}
		seen[text] = true
	}
}

// HSTS speaks for all ports of a host, so only the console at the usual one has it.
func TestWhichHostsBrowsersReachOverTLSOnly(t *testing.T) {
	t.Parallel()
	for address, want := range map[string]string{"https://keys.example": "max-age=31536000", "https://keys.example:8443": "", "http://keys.example": "", "http://localhost:3000": ""} {
		c, err := New(Config{Sessions: &empty{}, URL: address, Provider: &login.Web{}, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{"/console/sign-in", "/console/keys", "/console/nowhere"} {
			if got := ask(c, t.Context(), "GET", path, "").Header().Get("Strict-Transport-Security"); got != want {
				t.Errorf("%s%s says %q, want %q", address, path, got, want)
			}
		}
	}
}

func TestExportsAreFewAndWholeOrBroken(t *testing.T) {
	t.Parallel()
	c, _ := limited(t)
	asked := 0
	c.Asking(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		switch asked++; r.URL.Query().Get("before") {
		case "":
			fmt.Fprint(w, `{"success":true,"data":[{"index":7,"event":"{\"v\":1}"}],"next":7}`)
		case "7":
			fmt.Fprint(w, `{"success":true,"data":[],"next":5}`)
		case "5":
			fmt.Fprint(w, `{"success":true,"data":[{"index":1,"event":"{\"v\":1}"}]}`)
		default:
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprint(w, `{"success":false,"message":"no","errorCode":"access_denied"}`)
		}
	}))
	export := func(query string) (w *httptest.ResponseRecorder, broken any, err error) {
		w = httptest.NewRecorder()
		defer func() { broken = recover() }()
		v := &visit{Console: c, signed: &signed{token: "x"}, w: w, r: httptest.NewRequest("GET", "/console/events/export?"+query, nil), org: "acme"}
		if v.api, err = v.client(); err == nil {
			err = v.export()
		}
		return w, broken, err
	}
	if w, broken, err := export(""); err != nil || broken != nil || w.Body.String() != "{\"v\":1}\n{\"v\":1}\n" || asked != 3 {
		t.Errorf("the export is %q after %d pages, %v, %v", w.Body, asked, broken, err)
	}
	if w, broken, err := export("before=9"); broken != nil || err == nil || w.Header().Get("Content-Disposition") != "" {
		t.Errorf("refused at once: %v, %v, %v", w.Header(), broken, err)
	}
	c.Asking(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if r.URL.Query().Get("before") == "" {
			fmt.Fprint(w, `{"success":true,"data":[{"index":7,"event":"{\"v\":1}"}],"next":7}`)
			return
		}
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprint(w, `{"success":false,"message":"no","errorCode":"access_denied"}`)
	}))
	if _, broken, _ := export(""); broken != http.ErrAbortHandler {
		t.Errorf("an export that fails on its way ends with %v", broken)
	}
	for range maxExports / 2 {
		if c.exports.Take(stranger) == nil {
			t.Fatal("there are fewer places, or one is not given back")
		}
	}
	if c.exports.Take(netip.MustParseAddr("198.51.100.7")) == nil {
		t.Error("an address that holds all it may leaves others no place")
	}
	_, _, err := export("")
	if status, f := explain(err); status != http.StatusServiceUnavailable || !strings.Contains(f.Message, "too many exports") {
		t.Errorf("one export too many gets %d %v", status, f)
	}
}

// sessions keeps them in memory.
type sessions map[string]session.Stored

func (s sessions) KeepSession(_ context.Context, one session.Stored, _ int) error {
	s[one.ID] = one
	return nil
}

func (s sessions) Session(_ context.Context, id string) (session.Stored, bool, error) {
	one, there := s[id]
	return one, there, nil
}

func (s sessions) DropSession(context.Context, string) error { return nil }

// slowBrowser does not read.
type slowBrowser struct {
	*httptest.ResponseRecorder
	status  chan int
	reading chan struct{}
}

func (w slowBrowser) WriteHeader(status int) { w.status <- status }

func (w slowBrowser) Write(b []byte) (int, error) {
	<-w.reading
	return w.ResponseRecorder.Write(b)
}

// Pages that browsers do not read take memory that has a bound, and so do pages that are
// being made. One organization leaves room for another.
func TestSlowBrowsersTakeBoundedMemory(t *testing.T) {
	t.Parallel()
	kept := sessions{}
	policy, err := authz.Load(t.Context(), policies.Files)
	if err != nil {
		t.Fatal(err)
	}
	c, err := New(Config{
		Sessions: kept, Policy: policy, URL: "https://keys.example", Provider: &login.Web{}, Log: slog.New(slog.DiscardHandler),
		Client: func(*http.Request) netip.Addr { return stranger }, Shared: func(netip.Addr) bool { return false },
		Authenticate: func(_ context.Context, h http.Header) (authz.Caller, error) {
			return authz.Caller{Kind: authz.Person, Subject: "ada", Org: org.ID(strings.TrimPrefix(h.Get("Authorization"), "Bearer ")), Roles: []authz.Role{authz.Owner}}, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	c.Asking(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if r.Method == http.MethodPost {
			w.WriteHeader(http.StatusCreated)
			fmt.Fprintf(w, `{"success":true,"data":{"id":"%s","token":"oke1.of-the-test","origin":"backend"}}`, someID)
			return
		}
		fmt.Fprintf(w, `{"success":true,"data":[{"name":"%s"}],"total":1}`, strings.Repeat("n", 4<<20))
	}))
	cookies := map[string]string{}
	for _, of := range []string{"acme", "other"} {
		secret := session.NewSecret()
		stored, err := secret.Seal(of, of, time.Now().Add(time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		kept[stored.ID] = stored
		cookies[of] = "__Host-orgkeys-session-443=" + secret.Text()
	}
	reading, held := make(chan struct{}), 0
	var readers sync.WaitGroup
	for {
		w := slowBrowser{httptest.NewRecorder(), make(chan int, 1), reading}
		readers.Go(func() {
			r := httptest.NewRequestWithContext(t.Context(), "GET", "/console/secrets", nil)
			r.Header.Set("Cookie", cookies["acme"])
			c.handler.ServeHTTP(w, r)
		})
		if <-w.status != http.StatusOK {
			break
		}
		held++
	}
	if taken := c.memory.Taken(); held < 2 || taken > pagesMemory/2 || taken < int64(held)*4<<20 {
		t.Errorf("%d pages take %d bytes", held, taken)
	}
	if n := c.making.Taken(); n != 0 {
		t.Errorf("%d pages that are being sent are still taken for such that are being made", n)
	}
	if w := ask(c, t.Context(), "GET", "/console/secrets", cookies["acme"]); w.Code != http.StatusServiceUnavailable || w.Header().Get("Retry-After") == "" || !strings.Contains(w.Body.String(), "Too many large pages") {
		t.Errorf("a page too many gets %d %v %.300s", w.Code, w.Header(), w.Body)
	}
	// What a form has done is shown in any case: a token is shown once.
	rest := c.memory.Take("acme", pagesMemory/2-c.memory.Taken())
	if w := ask(c, t.Context(), "POST", "/console/enrollments", cookies["acme"]); w.Code != http.StatusCreated || !strings.Contains(w.Body.String(), "oke1.of-the-test") {
		t.Errorf("minting beside them gets %d %.300s", w.Code, w.Body)
	}
	rest(0)
	if w := ask(c, t.Context(), "GET", "/console/secrets", cookies["other"]); w.Code != http.StatusOK {
		t.Errorf("another organization's page gets %d %.300s", w.Code, w.Body)
	}
	close(reading)
	readers.Wait()
	if n := c.memory.Taken(); n != 0 {
		t.Errorf("%d bytes are not given back", n)
	}

	for range maxPages / 2 {
		c.making.Take("acme", 1)
	}
	var asked sync.WaitGroup
	for _, path := range []string{"", "keys", "keys/" + someID, "enrollments", "enrollments/" + someID, "nodes", "devices", "secrets", "events", "policy"} {
		asked.Go(func() {
			if w := ask(c, t.Context(), "GET", "/console/"+path, cookies["acme"]); w.Code != http.StatusServiceUnavailable || !strings.Contains(w.Body.String(), "Too many pages") {
				t.Errorf("%s: a page too many gets %d %.300s", path, w.Code, w.Body)
			}
		})
	}
	asked.Wait()
	if w := ask(c, t.Context(), "GET", "/console/secrets", cookies["other"]); w.Code != http.StatusOK || c.making.Taken() != maxPages/2 {
		t.Errorf("another organization's page gets %d, or its turn is not given back", w.Code)
	}
}

const someID = "01234567-89ab-7cde-8f01-23456789abcd"

func TestWhoDidIt(t *testing.T) {
	t.Parallel()
	for want, e := range map[string]entry{
		"Ada (u-1)":             {Org: "acme", Of: "acme", Kind: "user", Actor: "u-1"},
		"Ada (u-2), of other":   {Org: "acme", Of: "other", Kind: "user", Actor: "u-2"},
		"key 01234567":          {Org: "acme", Of: "acme", Kind: "node", Actor: "0123456789"},
		"nobody known":          {Org: "acme"},
		"u-3":                   {Org: "acme", Actor: "u-3"},
		"Ada (u-4) (u-5)":       {Org: "acme", Actor: "u-5"},
		"Ada (u-6), of a third": {Org: "", Of: "a third", Actor: "u-6"},
	} {
		switch want {
		case "u-3":
		case "Ada (u-4) (u-5)":
			e.Name = "Ada (u-4)"
		default:
			e.Name = "Ada"
		}
		if got := e.By(); got != want {
			t.Errorf("%+v is by %q, want %q", e, got, want)
		}
	}
}
