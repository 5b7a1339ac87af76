// Package login signs a person in at an OpenID provider, from a command line:
// in the person's own browser on this machine (authorization code with PKCE,
// RFC 8252), or in one elsewhere (device authorization, RFC 8628). It keeps the
// session in a file and refreshes it. Web signs people in for a server's own pages.
//
// # Refreshing
//
// Providers rotate refresh tokens, and take a second use of an old one for
// theft: they end the whole session. So whoever refreshes has a file lock, and
// the answer is stored durably before any of it is used.
package login

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"
)

// Limits of an exchange with a provider.
const (
	exchangeTimeout = 30 * time.Second
	maxAnswer       = 1 << 20 // bytes
)

// The errors that ask for different things of the person.
var (
	// ErrProvider: the provider cannot be asked, or answers something of no use.
	ErrProvider = errors.New("the identity provider")
	// ErrOpaque: the access token is not a JWT, so the server cannot read it.
	ErrOpaque = errors.New("the provider's access token is not a JWT, which the server needs: name the API that it is for, with --resource URI (RFC 8707) or --audience NAME, as the provider knows it")
	// ErrDenied: the person, or the provider, said no.
	ErrDenied = errors.New("the login was denied")
)

// Provider is an OpenID provider, and what to ask it for.
type Provider struct {
	Issuer   string   `json:"issuer"`
	ClientID string   `json:"clientId"` // of a public client: a command line keeps no secret
	Resource string   `json:"resource,omitempty"`
	Audience string   `json:"audience,omitempty"`
	Scopes   []string `json:"scopes"`
	CAFile   string   `json:"caFile,omitempty"` // authorities to trust instead of the system's
}

// endpoints are what the provider's metadata says.
type endpoints struct {
	oauth2.Config
	provider    *oidc.Provider
	Revocation  string `json:"revocation_endpoint"`
	EndSession  string `json:"end_session_endpoint"`
	NamesItself bool   `json:"authorization_response_iss_parameter_supported"`

	AuthMethods []string `json:"token_endpoint_auth_methods_supported"`
}

// client is the HTTP client for the provider. It is not the server's: the two
// may have different authorities.
func (p Provider) client() (*http.Client, error) {
	t := &http.Transport{
		Proxy: http.ProxyFromEnvironment, TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout: exchangeTimeout, ForceAttemptHTTP2: true, DisableKeepAlives: true,
	}
	if p.CAFile != "" {
		text, err := os.ReadFile(p.CAFile)
		if err != nil {
			return nil, err
		}
		t.TLSClientConfig.RootCAs = x509.NewCertPool()
		if !t.TLSClientConfig.RootCAs.AppendCertsFromPEM(text) {
			return nil, fmt.Errorf("there is no certificate in %s", p.CAFile)
		}
	}
	return &http.Client{Transport: secure{t}, Timeout: exchangeTimeout}, nil
}

// secure refuses to send anything over a network in the clear, to whichever
// endpoint the metadata names.
type secure struct{ http.RoundTripper }

func (s secure) RoundTrip(req *http.Request) (*http.Response, error) {
	if !confidential(req.URL) {
		return nil, fmt.Errorf("%s is not https, and http is for this machine only", req.URL.Redacted())
	}
	return s.RoundTripper.RoundTrip(req)
}

func confidential(u *url.URL) bool {
	if u.Scheme == "https" {
		return true
	}
	addr, err := netip.ParseAddr(u.Hostname())
	return u.Scheme == "http" && (u.Hostname() == "localhost" || err == nil && addr.Unmap().IsLoopback())
}

// discover reads the provider's metadata. The context that it returns carries the HTTP client.
func (p Provider) discover(ctx context.Context) (context.Context, *endpoints, error) {
	if p.Issuer == "" || p.ClientID == "" {
		return ctx, nil, fmt.Errorf("%w: --issuer and --client-id say where to log in, and as which application", ErrProvider)
	}
	c, err := p.client()
	if err != nil {
		return ctx, nil, fmt.Errorf("%w: %w", ErrProvider, err)
	}
	ctx = oidc.ClientContext(ctx, c)
	found, err := oidc.NewProvider(ctx, p.Issuer)
	if err != nil {
		return ctx, nil, fmt.Errorf("%w %s: %w", ErrProvider, p.Issuer, err)
	}
	e := &endpoints{provider: found}
	if err := found.Claims(e); err != nil {
		return ctx, nil, fmt.Errorf("%w %s: %w", ErrProvider, p.Issuer, err)
	}
	// It is opened in a browser, by a program that opens anything.
	if u, err := url.Parse(found.Endpoint().AuthURL); err != nil || !confidential(u) {
		return ctx, nil, fmt.Errorf("%w %s: its authorization_endpoint is %.100q, and not https", ErrProvider, p.Issuer, found.Endpoint().AuthURL)
	}
	e.Config = oauth2.Config{ClientID: p.ClientID, Endpoint: found.Endpoint(), Scopes: p.Scopes}
	// Trying both ways of sending the client's ID doubles every poll, and earns slow_down.
	e.Endpoint.AuthStyle = oauth2.AuthStyleInParams
	return ctx, e, nil
}

// target names the API that tokens are to be for. Every request needs it: a
// token request without it gets an opaque token.
func (p Provider) target() []oauth2.AuthCodeOption {
	var all []oauth2.AuthCodeOption
	if p.Resource != "" {
		all = append(all, oauth2.SetAuthURLParam("resource", p.Resource))
	}
	if p.Audience != "" {
		all = append(all, oauth2.SetAuthURLParam("audience", p.Audience))
	}
	return all
}

// granted checks what a login brought and makes a session of it. nonce is empty
// where the flow has none.
func (p Provider) granted(ctx context.Context, e *endpoints, token *oauth2.Token, nonce string) (Session, error) {
	if slices.Contains(p.Scopes, oidc.ScopeOpenID) {
		raw, _ := token.Extra("id_token").(string)
		id, err := e.provider.Verifier(&oidc.Config{ClientID: p.ClientID}).Verify(ctx, raw)
		if err != nil {
			return Session{}, fmt.Errorf("%w: its ID token: %w", ErrProvider, err)
		}
		if id.Nonce != nonce && nonce != "" {
			return Session{}, fmt.Errorf("%w: its ID token is for another login", ErrProvider)
		}
	}
	return p.session(token.AccessToken, token.RefreshToken, token.Expiry)
}

// session is one with these tokens, if the server can read them.
func (p Provider) session(access, refresh string, expires time.Time) (Session, error) {
	claims, err := ReadClaims(access)
	if err != nil {
		return Session{}, err
	}
	if at := claims.Expires(); !at.IsZero() {
		expires = at // what the server goes by
	}
	return Session{Provider: p, Access: access, Refresh: refresh, Expires: expires}, nil
}

// refresh asks for new tokens. x/oauth2 cannot name the resource in this request. A session
// without an access token comes with the error where the provider may have rotated the
// refresh token, and has to be kept.
func (p Provider) refresh(ctx context.Context, token string) (Session, error) {
	ctx, e, err := p.discover(ctx)
	if err != nil {
		return Session{}, err
	}
	form := url.Values{"grant_type": {"refresh_token"}, "refresh_token": {token}, "client_id": {p.ClientID}}
	if p.Resource != "" {
		form.Set("resource", p.Resource)
	}
	if p.Audience != "" {
		form.Set("audience", p.Audience)
	}
	var answer Claims
	asked := time.Now()
	status, err := post(ctx, e.Endpoint.TokenURL, form, &answer)
	problem := cmp.Or(answer.Text("error_description"), answer.Text("error"))
	switch {
	case err != nil:
		return Session{}, fmt.Errorf("%w: refreshing: %w", ErrProvider, err)
	case answer.Text("error") == "invalid_grant":
		return Session{}, fmt.Errorf("%w: %s", ErrOver, problem)
	case status != http.StatusOK:
		return Session{}, fmt.Errorf("%w: refreshing: it answers %d %s", ErrProvider, status, problem)
	}
	// Whoever does not rotate refresh tokens sends none.
	rotated := cmp.Or(answer.Text("refresh_token"), token)
	access := answer.Text("access_token")
	if access == "" {
		return Session{Provider: p, Refresh: rotated}, fmt.Errorf("%w: refreshing: it answers without a token %s", ErrProvider, problem)
	}
	var expires time.Time // zero: it is not said
	if seconds, ok := answer.seconds("expires_in"); ok {
		expires = asked.Add(seconds)
	}
	fresh, err := p.session(access, rotated, expires)
	if err != nil {
		return Session{Provider: p, Refresh: rotated}, err
	}
	return fresh, nil
}

// revoke ends a refresh token at the provider (RFC 7009), if it takes that.
func (p Provider) revoke(ctx context.Context, token string) error {
	ctx, e, err := p.discover(ctx)
	if err != nil || e.Revocation == "" {
		return err
	}
	form := url.Values{"token": {token}, "token_type_hint": {"refresh_token"}, "client_id": {p.ClientID}}
	status, err := post(ctx, e.Revocation, form, nil)
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("it answers %d", status)
	}
	if err != nil {
		return fmt.Errorf("%w: revoking: %w", ErrProvider, err)
	}
	return nil
}

// post sends a form and reads the answer's JSON, whatever its status, into answer.
func post(ctx context.Context, to string, form url.Values, answer any) (status int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, to, strings.NewReader(form.Encode()))
	if err != nil {
		return 0, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Accept", "application/json")
	resp, err := ctx.Value(oauth2.HTTPClient).(*http.Client).Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if answer == nil {
		return resp.StatusCode, nil
	}
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return resp.StatusCode, err
	}
	if err := json.Unmarshal(text, answer); err != nil {
		return resp.StatusCode, fmt.Errorf("it answers %d without JSON", resp.StatusCode)
	}
	return resp.StatusCode, nil
}
