package login

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"
)

// How long a provider's metadata is used without asking again, how long one that did not
// answer is left alone, and how long an answer may take.
const (
	metadataLife    = 10 * time.Minute
	failureLife     = 5 * time.Second
	metadataTimeout = 5 * time.Second
)

// Web signs people in for pages that a server has: authorization code with PKCE,
// which comes back to an address of the server's.
type Web struct {
	Provider
	Secret   string // of a confidential client; empty: a public one
	Redirect string // where the provider sends browsers back to

	mu     sync.Mutex
	found  *endpoints
	fault  error
	until  time.Time
	asking chan struct{} // closed when the provider has answered; nil if nobody asks
}

// Attempt is one sign-in. All of it is known to the browser that began it, and to nobody else.
type Attempt struct{ State, Nonce, Verifier string }

// Begin returns the provider's address to send the browser to.
func (w *Web) Begin(ctx context.Context, a Attempt) (string, error) {
	_, e, err := w.endpoints(ctx)
	if err != nil {
		return "", err
	}
	return e.AuthCodeURL(a.State, append(w.target(), oauth2.S256ChallengeOption(a.Verifier), oidc.Nonce(a.Nonce))...), nil
}

// Finish makes a session of what the browser came back with, whose state the caller has compared.
func (w *Web) Finish(ctx context.Context, a Attempt, query url.Values) (Session, error) {
	ctx, e, err := w.endpoints(ctx)
	switch {
	case err != nil:
		return Session{}, err
	case (e.NamesItself || query.Has("iss")) && query.Get("iss") != w.Issuer:
		return Session{}, fmt.Errorf("%w: another issuer answered: %.100q", ErrProvider, query.Get("iss"))
	case query.Get("error") != "":
		return Session{}, fmt.Errorf("%w: %.100q %.100q", ErrDenied, query.Get("error"), query.Get("error_description"))
	case query.Get("code") == "":
		return Session{}, fmt.Errorf("%w: its answer has no code", ErrProvider)
	}
	token, err := e.Exchange(ctx, query.Get("code"), append(w.target(), oauth2.VerifierOption(a.Verifier))...)
	if err != nil {
		return Session{}, fmt.Errorf("%w: exchanging the code: %w", ErrProvider, withoutAnswer(err))
	}
	return w.granted(ctx, e, token, a.Nonce)
}

// LogOut returns the provider's address to end a person's session there, or an empty text
// where it has none (OpenID Connect RP-Initiated Logout 1.0). The provider asks the person
// first: no ID token is kept that would vouch for the request.
func (w *Web) LogOut(ctx context.Context) (string, error) {
	_, e, err := w.endpoints(ctx)
	if err != nil || e.EndSession == "" {
		return "", err
	}
	u, err := url.Parse(e.EndSession)
	if err != nil || !confidential(u) {
		return "", fmt.Errorf("%w: its end_session_endpoint is %.100q", ErrProvider, e.EndSession)
	}
	query := u.Query()
	query.Set("client_id", w.ClientID)
	u.RawQuery = query.Encode()
	return u.String(), nil
}

// withoutAnswer leaves out the body of a refusal, which may have anything in it.
func withoutAnswer(err error) error {
	if refusal, ok := errors.AsType[*oauth2.RetrieveError](err); ok {
		return fmt.Errorf("it answers %d %.100s", refusal.Response.StatusCode, cmp.Or(refusal.ErrorCode, "without an error code"))
	}
	return err
}

// endpoints are the provider's, asked for at most every metadataLife. Nobody waits for
// that but who comes before any were found.
func (w *Web) endpoints(ctx context.Context) (context.Context, *endpoints, error) {
	found, asking, fault := w.known(ctx)
	if found == nil && asking != nil {
		select {
		case <-asking:
		case <-ctx.Done():
			return ctx, nil, fmt.Errorf("%w: waiting for its metadata: %w", ErrProvider, ctx.Err())
		}
		w.mu.Lock()
		found, fault = w.found, w.fault
		w.mu.Unlock()
	}
	if fault != nil {
		return ctx, nil, fault
	}
	c, err := w.client()
	return oidc.ClientContext(ctx, c), found, err
}

// known is what is known now. If that is old the provider is asked, and asking is closed
// when it has answered; it is nil if nobody asks.
func (w *Web) known(ctx context.Context) (found *endpoints, asking <-chan struct{}, fault error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.asking == nil && !time.Now().Before(w.until) {
		w.asking = make(chan struct{})
		go w.renew(context.WithoutCancel(ctx))
	}
	return w.found, w.asking, w.fault
}

// renew asks for the metadata beside the sign-ins, which go on with what was found before.
// Many may wait for it, so it goes on when one of them gives up.
func (w *Web) renew(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, metadataTimeout)
	defer cancel()
	e, err := w.ask(ctx)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.keep(e, err)
	close(w.asking)
	w.asking = nil
}

func (w *Web) ask(ctx context.Context) (*endpoints, error) {
	_, e, err := w.discover(ctx)
	if err != nil {
		return nil, err
	}
	e.ClientSecret, e.RedirectURL = w.Secret, w.Redirect
	// Where a provider does not say, client_secret_basic is what it takes (OpenID Connect Discovery, 3).
	if w.Secret != "" && (len(e.AuthMethods) == 0 || slices.Contains(e.AuthMethods, "client_secret_basic")) {
		e.Endpoint.AuthStyle = oauth2.AuthStyleInHeader
	}
	return e, nil
}

// keep keeps what the provider answered. While its metadata cannot be had, what was found
// before is used on: it seldom changes, and without it nobody could sign in.
func (w *Web) keep(e *endpoints, err error) {
	if err != nil {
		if w.until = time.Now().Add(failureLife); w.found == nil {
			w.fault = err
		}
		return
	}
	w.found, w.fault, w.until = e, nil, time.Now().Add(metadataLife)
}
