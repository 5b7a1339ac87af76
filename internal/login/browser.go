package login

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"
)

const (
	loginTime = 10 * time.Minute // for a person
	farewell  = time.Second      // for the browser to have its answer, once the command knows
)

// ByBrowser signs a person in by an authorization code with PKCE (RFC 7636),
// which comes back to a port of this machine (RFC 8252). show is told the address
// to open.
func (p Provider) ByBrowser(ctx context.Context, show func(address string)) (Session, error) {
	ctx, cancel := context.WithTimeout(ctx, loginTime)
	defer cancel()
	ctx, e, err := p.discover(ctx)
	if err != nil {
		return Session{}, err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return Session{}, fmt.Errorf("listening for the browser: %w", err)
	}
	e.RedirectURL = "http://" + listener.Addr().String() + "/callback"
	back := &callback{host: listener.Addr().String(), state: rand.Text(), issuer: p.Issuer, named: e.NamesItself, codes: make(chan redirected, 1)}
	server := &http.Server{Handler: back, ReadHeaderTimeout: exchangeTimeout, MaxHeaderBytes: 16 << 10}
	go func() { _ = server.Serve(listener) }() // until Close
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), farewell)
		defer cancel()
		if server.Shutdown(ctx) != nil {
			_ = server.Close()
		}
	}()

	verifier, nonce := oauth2.GenerateVerifier(), rand.Text()
	asked := append(p.target(), oauth2.S256ChallengeOption(verifier), oidc.Nonce(nonce))
	if slices.Contains(p.Scopes, oidc.ScopeOfflineAccess) {
		asked = append(asked, oauth2.SetAuthURLParam("prompt", "consent")) // else it is left out (OpenID Connect Core, 11)
	}
	show(e.AuthCodeURL(back.state, asked...))
	var answer redirected
	select {
	case <-ctx.Done():
		return Session{}, fmt.Errorf("waiting for the browser: %w", ctx.Err())
	case answer = <-back.codes:
	}
	if answer.err != nil {
		return Session{}, answer.err
	}
	token, err := e.Exchange(ctx, answer.code, append(p.target(), oauth2.VerifierOption(verifier))...)
	if err != nil {
		return Session{}, fmt.Errorf("%w: exchanging the code: %w", ErrProvider, err)
	}
	return p.granted(ctx, e, token, nonce)
}

// redirected is what a browser came back with.
type redirected struct {
	code string
	err  error
}

// callback is where the browser comes back to. It takes the one redirect that
// has the login's state; anything else on this machine may ask here too, and is refused.
type callback struct {
	host   string
	state  string
	issuer string
	named  bool // whether the answer must name the issuer (RFC 9207)
	codes  chan redirected
}

func (c *callback) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Content-Type", "text/plain; charset=utf-8")
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Security-Policy", "default-src 'none'")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	query := r.URL.Query()
	if r.Method != http.MethodGet || r.URL.Path != "/callback" || r.Host != c.host ||
		subtle.ConstantTimeCompare([]byte(query.Get("state")), []byte(c.state)) != 1 {
		w.WriteHeader(http.StatusBadRequest)
		_, _ = io.WriteString(w, "This is not the answer to a login that was asked for here.\n")
		return
	}
	answer := redirected{code: query.Get("code")}
	switch {
	case (c.named || query.Has("iss")) && query.Get("iss") != c.issuer:
		answer.err = fmt.Errorf("%w: another issuer answered: %q", ErrProvider, query.Get("iss"))
	case query.Get("error") != "":
		answer.err = fmt.Errorf("%w: %q %q", ErrDenied, query.Get("error"), query.Get("error_description"))
	case answer.code == "":
		answer.err = errors.Join(ErrProvider, errors.New("its answer has no code"))
	}
	text := "You are logged in. Go back to the command line; this page can be closed.\n"
	if answer.err != nil {
		w.WriteHeader(http.StatusForbidden)
		text = "The login failed. The command line says why; this page can be closed.\n"
	}
	_, _ = io.WriteString(w, text)
	select {
	case c.codes <- answer:
	default: // a second answer changes nothing
	}
}
