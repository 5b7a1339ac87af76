package console

import (
	"context"
	"encoding/base64"
	"errors"
	"net/http"
	"net/url"
	"path"
	"strings"
	"time"

	"crypto/subtle"

	"github.com/orgkeys/orgkeys/internal/authn"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/login"
	"github.com/orgkeys/orgkeys/internal/session"
)

// attemptLife is how long a person may take to sign in at the provider.
const attemptLife = 10 * time.Minute

// home is where a person goes who was not on the way anywhere.
const home = "/console/"

// cookieName is the name of a cookie. Browsers send cookies to every port of a host,
// so two servers on one machine need two names; over TLS, __Host- keeps other hosts
// of the domain from setting it.
func (c *Console) cookieName(r *http.Request, kind string) string {
	origin := c.origin(r)
	port := origin.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[origin.Scheme]
	}
	name := "orgkeys-" + kind + "-" + port
	if c.secure(r) {
		name = "__Host-" + name
	}
	return name
}

func (c *Console) setCookie(w http.ResponseWriter, r *http.Request, kind, value string, life time.Duration) {
	seconds := int(life / time.Second)
	if value == "" {
		seconds = -1
	}
	http.SetCookie(w, &http.Cookie{
		Name: c.cookieName(r, kind), Value: value, Path: "/", MaxAge: seconds,
		HttpOnly: true, Secure: c.secure(r), SameSite: http.SameSiteLaxMode,
	})
}

// cookie is the value of the one cookie of that kind. Of two, one was planted.
func (c *Console) cookie(r *http.Request, kind string) (string, bool) {
	all := r.CookiesNamed(c.cookieName(r, kind))
	if len(all) != 1 {
		return "", false
	}
	return all[0].Value, true
}

// signed is who is signed in, by a browser's cookie.
type signed struct {
	secret  session.Secret
	token   string
	caller  authz.Caller
	expires time.Time
}

// errSignedOut: the browser has no session, or one that is over.
var errSignedOut = errors.New("nobody is signed in")

// session returns who is signed in, or errSignedOut. The token is verified anew for
// every request: an issuer that is not believed any more has no sessions.
func (c *Console) session(r *http.Request) (*signed, error) {
	text, there := c.cookie(r, "session")
	if !there {
		return nil, errSignedOut
	}
	secret, err := session.ParseSecret(text)
	if err != nil {
		return nil, errSignedOut
	}
	stored, there, err := c.lookup(r.Context(), secret)
	if err != nil {
		return nil, err
	}
	if !there {
		return nil, errSignedOut
	}
	token, err := secret.Open(stored)
	if err != nil {
		c.Log.Warn("a session of the console does not open under its own cookie: its row was changed", "error", err)
		return nil, errSignedOut
	}
	caller, err := c.authenticate(r, token)
	if errors.Is(err, authn.ErrUnauthenticated) {
		// By this replica's clock and its copy of the keys; the row is everybody's, and ends by the database's clock.
		err = errSignedOut
	}
	if err != nil {
		return nil, err
	}
	return &signed{secret, token, caller, stored.Expires}, nil
}

// lookup reads a session. Any cookie of the right form asks for one, so few read at once.
func (c *Console) lookup(ctx context.Context, secret session.Secret) (session.Stored, bool, error) {
	if err := c.lookups.Acquire(ctx, 1); err != nil {
		return session.Stored{}, false, err
	}
	defer c.lookups.Release(1)
	return c.Sessions.Session(ctx, secret.ID())
}

func (c *Console) authenticate(r *http.Request, token string) (authz.Caller, error) {
	return c.Authenticate(r.Context(), http.Header{"Authorization": {"Bearer " + token}})
}

// start begins a session with a token, and ends the one that the browser had.
func (c *Console) start(w http.ResponseWriter, r *http.Request, token string) error {
	caller, err := c.authenticate(r, token)
	if err != nil {
		if reason := authn.CountedAs(err); reason != "" {
			c.Unauthenticated(reason)
		}
		return err
	}
	expires := time.Now().Add(session.MaxLife)
	claims, err := login.ReadClaims(token)
	if err != nil {
		return err
	}
	if at := claims.Expires(); !at.IsZero() && at.Before(expires) {
		expires = at
	}
	c.end(r)
	secret := session.NewSecret()
	stored, err := secret.Seal(token, session.Holder(string(caller.Org), caller.Subject), expires)
	if err != nil {
		return err
	}
	if err := c.Sessions.KeepSession(r.Context(), stored, session.PerPerson); err != nil {
		return err
	}
	c.setCookie(w, r, "session", secret.Text(), time.Until(expires))
	return nil
}

// end ends the session that the browser has, if it has one. Only then is anything written.
func (c *Console) end(r *http.Request) {
	text, _ := c.cookie(r, "session")
	secret, err := session.ParseSecret(text)
	if err != nil {
		return
	}
	_, there, err := c.lookup(r.Context(), secret)
	if err == nil && there {
		err = c.Sessions.DropSession(r.Context(), secret.ID())
	}
	if err != nil {
		c.Log.Warn("a session of the console could not be ended before its time", "error", err)
	}
}

// destination is a page of the console that a person may be sent to: nothing that a
// browser could take for another site's address.
func destination(to string) string {
	u, err := url.Parse(to)
	if err != nil || u.Scheme != "" || u.Opaque != "" || u.Host != "" || u.User != nil || u.Fragment != "" || len(to) > 1024 ||
		!strings.HasPrefix(to, home) || strings.ContainsAny(to, "\\\t\r\n") || path.Clean(u.Path) != strings.TrimSuffix(u.Path, "/") ||
		strings.HasPrefix(u.Path, "/console/sign-") || u.Path == "/console/callback" || strings.HasPrefix(u.Path, "/console/api/") {
		return home
	}
	return u.RequestURI()
}

// signInView is the sign-in page.
type signInView struct {
	Provider string // whose; empty: a token is pasted
	Begin    string // where the provider's sign-in begins
	To       string
	Problem  string
	Out      bool   // the person has just signed out
	End      string // where the session at the provider is ended; empty: nowhere
}

func (c *Console) showSignIn(w http.ResponseWriter, r *http.Request) {
	c.signInPage(w, r, http.StatusOK, destination(r.URL.Query().Get("to")), "", r.URL.Query().Has("out") && fromHere(r))
}

func (c *Console) signInPage(w http.ResponseWriter, r *http.Request, status int, to, problem string, out bool) {
	v := signInView{To: to, Problem: problem, Out: out}
	if c.Provider != nil {
		v.Provider = strings.TrimPrefix(c.Provider.Issuer, "https://")
		v.Begin = "/console/sign-in/begin?" + url.Values{"to": {to}}.Encode()
	}
	if c.Provider != nil && out {
		var err error
		if v.End, err = c.Provider.LogOut(r.Context()); err != nil {
			c.Log.Warn("the console does not know where people sign out at the provider", "error", err)
		}
	}
	c.render(w, status, "sign-in", &view{Title: "Sign in", Data: v, Static: c.version})
}

// signInByToken is for the development issuer: whoever can read its key can make a
// token, and nobody else on this machine gets in.
func (c *Console) signInByToken(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil {
		c.signInPage(w, r, http.StatusBadRequest, home, "The form could not be read.", false)
		return
	}
	to := destination(r.PostForm.Get("to"))
	err := c.start(w, r, strings.TrimSpace(r.PostForm.Get("token")))
	if err != nil {
		c.refused(w, r, to, err)
		return
	}
	http.Redirect(w, r, to, http.StatusSeeOther)
}

// refused shows why a sign-in failed, as far as it is the person's business.
func (c *Console) refused(w http.ResponseWriter, r *http.Request, to string, err error) {
	token, bad := errors.AsType[*authn.TokenError](err)
	switch {
	case bad:
		c.signInPage(w, r, http.StatusForbidden, to, "The token was refused: "+token.Description()+".", false)
	case errors.Is(err, login.ErrDenied):
		c.signInPage(w, r, http.StatusForbidden, to, "The identity provider did not sign you in.", false)
	case errors.Is(err, login.ErrOpaque):
		c.Log.Error("the console's access tokens are opaque: set ORGKEYS_CONSOLE_RESOURCE or ORGKEYS_CONSOLE_AUDIENCE to the API as the provider knows it")
		c.signInPage(w, r, http.StatusServiceUnavailable, to, "The identity provider is not set up for the console yet. The server's log says what is missing.", false)
	default:
		c.Log.Warn("a sign-in to the console failed", "error", err)
		c.signInPage(w, r, http.StatusServiceUnavailable, to, "You cannot be signed in at the moment. Please try again.", false)
	}
}

// attempt is one sign-in at the provider: everything follows from the secret in the
// browser's cookie, so that only this browser can finish it, and nothing is stored here.
func attempt(s session.Secret) login.Attempt {
	text := func(purpose string) string { return base64.RawURLEncoding.EncodeToString(s.Derive(purpose)) }
	return login.Attempt{State: text("state"), Nonce: text("nonce"), Verifier: text("verifier")}
}

func (c *Console) begin(w http.ResponseWriter, r *http.Request) {
	to := destination(r.URL.Query().Get("to"))
	secret := session.NewSecret()
	address, err := c.Provider.Begin(r.Context(), attempt(secret))
	if err != nil {
		c.refused(w, r, to, err)
		return
	}
	c.setCookie(w, r, "sign-in", secret.Text()+"."+base64.RawURLEncoding.EncodeToString([]byte(to)), attemptLife)
	http.Redirect(w, r, address, http.StatusSeeOther)
}

func (c *Console) callback(w http.ResponseWriter, r *http.Request) {
	value, _ := c.cookie(r, "sign-in")
	text, encoded, _ := strings.Cut(value, ".")
	secret, err := session.ParseSecret(text)
	asked := attempt(secret)
	state := r.URL.Query()["state"]
	if err != nil || len(state) != 1 || subtle.ConstantTimeCompare([]byte(state[0]), []byte(asked.State)) != 1 {
		c.signInPage(w, r, http.StatusBadRequest, home, "This sign-in was begun in another tab or browser, or too long ago. Please begin again.", false)
		return
	}
	leave := c.exchanges.Take(c.Client(r))
	if leave == nil {
		c.signInPage(w, r, http.StatusServiceUnavailable, home, "There are too many sign-ins at once. Please reload this page.", false)
		return
	}
	defer leave()
	c.setCookie(w, r, "sign-in", "", 0)
	to := home
	if decoded, err := base64.RawURLEncoding.DecodeString(encoded); err == nil {
		to = destination(string(decoded))
	}
	found, err := c.Provider.Finish(r.Context(), asked, r.URL.Query())
	if err == nil {
		err = c.start(w, r, found.Access)
	}
	if err != nil {
		c.refused(w, r, to, err)
		return
	}
	http.Redirect(w, r, to, http.StatusSeeOther)
}

func (c *Console) signOut(w http.ResponseWriter, r *http.Request) {
	c.end(r)
	c.setCookie(w, r, "session", "", 0)
	http.Redirect(w, r, "/console/sign-in?out", http.StatusSeeOther)
}
