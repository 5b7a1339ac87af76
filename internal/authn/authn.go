// Package authn turns a request's bearer token into the authz.Caller it speaks for.
//
// A token is a JWT (RFC 7519) in JWS compact serialization (RFC 7515, section
// 7.1), signed with RS256, PS256, ES256 or EdDSA by a key of the issuer's JWK
// set (RFC 7517). The set decides what a key may do; the token only names one
// of its keys. Whatever else a token says about keys (jku, jwk, x5u, x5c) is
// never fetched and never trusted; a jwk, x5c or nonce that is malformed refuses
// the token, since go-jose reads it before it verifies anything. A token that
// declares anything critical (crit) is refused, since nothing of the kind is
// understood here.
//
// What one token can mean is settled before it is believed: JSON with
// duplicate names, invalid UTF-8 or trailing data is refused, names are
// compared byte for byte, and base64 has one spelling.
//
// All failures are one of two things: ErrUnauthenticated, the caller's fault,
// as *TokenError with a reason out of a closed set; or ErrKeysUnavailable, the
// issuer's keys cannot be had at the moment. Neither holds any part of a token.
package authn

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/orgkeys/orgkeys/internal/authz"
)

var (
	// ErrUnauthenticated: the request carries no token, or an unusable one (401).
	ErrUnauthenticated = errors.New("not authenticated")
	// ErrKeysUnavailable: there is no trustworthy set of the issuer's keys at the moment (503).
	ErrKeysUnavailable = errors.New("the token issuer's keys are not available")
)

// Why a token is refused.
const (
	ReasonMissing     = "missing"       // no Authorization header
	ReasonMalformed   = "malformed"     // not one well-formed bearer token, or one that declares something not understood
	ReasonAlgorithm   = "algorithm"     // an algorithm that is never accepted, or not that key's
	ReasonUnknownKey  = "unknown_key"   // the issuer has no such key, or it is not clear which one is meant
	ReasonSignature   = "signature"     // the key did not make this signature
	ReasonExpired     = "expired"       // exp has come
	ReasonNotYetValid = "not_yet_valid" // nbf or iat is in the future
	ReasonIssuer      = "issuer"        // another issuer's token
	ReasonAudience    = "audience"      // meant for another service
	ReasonClaims      = "claims"        // a claim is missing, malformed or has an unknown value
)

// TokenError is ErrUnauthenticated with its reason.
type TokenError struct{ Reason string }

func (e *TokenError) Error() string { return "bearer token refused: " + e.Reason }

// Unwrap returns ErrUnauthenticated.
func (e *TokenError) Unwrap() error { return ErrUnauthenticated }

func refused(reason string) error { return &TokenError{Reason: reason} }

// MaxToken is the size of the longest token accepted, in bytes.
const MaxToken = 8 << 10

// Leeway is how far nbf and iat may lie in the future, since the issuer's
// clock and ours differ. exp has none: an expired token is expired.
const Leeway = 60 * time.Second

// Config says whose tokens are accepted. Every field is required.
type Config struct {
	Issuer    string  // iss must be exactly this
	Audience  string  // aud must be or contain exactly this
	Keys      *KeySet // the issuer's keys
	ClaimOrg  string  // the claim that names the caller's organization
	ClaimRole string  // the claim with the caller's role or roles
}

// Verifier accepts the tokens of one issuer for one audience. It may be used
// by several goroutines.
type Verifier struct {
	config Config
	now    func() time.Time
}

// New returns a verifier, or an error that says what is doubtful about c.
func New(c Config) (*Verifier, error) {
	if c.Issuer == "" {
		return nil, errors.New("the token issuer is empty")
	}
	if c.Audience == "" {
		return nil, errors.New("the token audience is empty")
	}
	if c.Keys == nil {
		return nil, errors.New("there is no key set for the token issuer")
	}
	if c.ClaimOrg == "" || c.ClaimRole == "" {
		return nil, errors.New("the claim of the organization or role has no name")
	}
	if err := checkClaimNames(c.ClaimOrg, c.ClaimRole); err != nil {
		return nil, err
	}
	return &Verifier{config: c, now: time.Now}, nil
}

// checkClaimNames refuses names with a meaning of their own (RFC 7519, section
// 4.1): an organization read out of aud, say, would be one that callers share.
func checkClaimNames(org, role string) error {
	if org == role {
		return fmt.Errorf("organization and role have the same claim %q", org)
	}
	for _, name := range []string{org, role} {
		switch name {
		case "iss", "sub", "aud", "exp", "nbf", "iat", "jti":
			return fmt.Errorf("claim %q is a registered one and cannot hold an organization or role", name)
		}
	}
	return nil
}

// Authenticate returns the caller that the request's headers speak for. Its
// error wraps ErrUnauthenticated or ErrKeysUnavailable. It may wait for the
// issuer's keys to be fetched, no longer than ctx lasts.
func (v *Verifier) Authenticate(ctx context.Context, h http.Header) (authz.Caller, error) {
	compact, err := bearer(h)
	if err != nil {
		return authz.Caller{}, err
	}
	t, err := parseToken(compact)
	if err != nil {
		return authz.Caller{}, err
	}
	key, err := v.config.Keys.find(ctx, t)
	if err != nil {
		return authz.Caller{}, err
	}
	payload, err := t.verify(key)
	if err != nil {
		return authz.Caller{}, err
	}
	return v.caller(payload)
}

// bearer returns the token of the one Authorization header (RFC 6750, section
// 2.1), with the scheme in any case and one space. A second header is refused,
// since proxies and servers do not agree on which of two counts.
func bearer(h http.Header) (string, error) {
	values := h.Values("Authorization")
	if len(values) == 0 {
		return "", refused(ReasonMissing)
	}
	scheme, token, _ := strings.Cut(values[0], " ")
	if len(values) > 1 || !strings.EqualFold(scheme, "Bearer") {
		return "", refused(ReasonMalformed)
	}
	return token, nil
}
