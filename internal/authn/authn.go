// Package authn turns a request's bearer token into the authz.Caller it speaks for.
//
// A token is a JWT (RFC 7519) in JWS compact serialization (RFC 7515, section
// 7.1), signed with RS, PS or ES and 256, 384 or 512, with EdDSA or with Ed25519
// (RFC 9864), by a key of its issuer's JWK set (RFC 7517). The set decides what a
// key may do; the token only names one of its keys. Whatever else a token says
// about keys (jku, jwk, x5u, x5c) is never fetched and never trusted; a jwk, x5c or
// nonce that is malformed refuses the token, since go-jose reads it before it
// verifies anything. A token that declares anything critical (crit) is refused,
// since nothing of the kind is understood here; so is one that is bound to a
// key of its holder (cnf, RFC 7800), since nobody here checks that proof.
//
// What one token can mean is settled before it is believed: JSON with
// duplicate names, invalid UTF-8 or trailing data is refused, names are
// compared byte for byte, and base64 has one spelling.
//
// Which claims hold subject, organization and roles is the issuer's Mapping, or
// the rules of claims.rego. Verifier.Explain says for one token what each check found.
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
	"sync"
	"sync/atomic"
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
	ReasonMissing      = "missing"       // no Authorization header
	ReasonMalformed    = "malformed"     // not one well-formed bearer token, or one that declares something not understood
	ReasonAlgorithm    = "algorithm"     // an algorithm that is never accepted, or not that key's
	ReasonUnknownKey   = "unknown_key"   // the issuer has no such key, or it is not clear which one is meant
	ReasonSignature    = "signature"     // the key did not make this signature
	ReasonExpired      = "expired"       // exp has come
	ReasonNotYetValid  = "not_yet_valid" // nbf or iat is in the future
	ReasonIssuer       = "issuer"        // another issuer's token
	ReasonAudience     = "audience"      // meant for another service
	ReasonBound        = "bound"         // bound to a key of its holder, whose proof is not checked
	ReasonSubject      = "subject"       // no usable subject, or no usable actor (act)
	ReasonOrganization = "organization"  // no usable organization, or one that the issuer may not speak for
	ReasonClaims       = "claims"        // the claims are malformed: not JSON, or a date that is none
)

// TokenError is ErrUnauthenticated with its reason.
type TokenError struct{ Reason string }

func (e *TokenError) Error() string { return "bearer token refused: " + e.Reason }

// Unwrap returns ErrUnauthenticated.
func (e *TokenError) Unwrap() error { return ErrUnauthenticated }

// Description says the reason in words, for clients: printable ASCII without
// quotes, as WWW-Authenticate needs it (RFC 6750, section 3).
func (e *TokenError) Description() string {
	switch e.Reason {
	case ReasonMalformed:
		return "not one well-formed bearer token"
	case ReasonAlgorithm:
		return "the algorithm is not accepted, or not the key's"
	case ReasonUnknownKey:
		return "the issuer has no such key"
	case ReasonSignature:
		return "the signature is wrong"
	case ReasonExpired:
		return "the token has expired"
	case ReasonNotYetValid:
		return "the token is not valid yet"
	case ReasonIssuer:
		return "the issuer is not accepted"
	case ReasonAudience:
		return "the token is for another audience"
	case ReasonBound:
		return "the token is bound to a key, and is not accepted as a bearer token"
	case ReasonSubject:
		return "the token has no usable subject"
	case ReasonOrganization:
		return "the token has no usable organization"
	default:
		return "the claims are malformed"
	}
}

func refused(reason string) error { return &TokenError{Reason: reason} }

// MaxToken is the size of the longest token accepted, in bytes. All headers of
// a request together may have 16 KiB.
const MaxToken = 14 << 10

// Leeway is how far nbf and iat may lie in the future, since the issuer's
// clock and ours differ. exp has none: an expired token is expired.
const Leeway = 60 * time.Second

// Rules map claims in ways that no setting can. They are authz.Directory's and
// authz.Policy's: the optional claims.rego.
type Rules interface {
	// HasClaimRules reports whether there is a claims.rego now. If so, it alone
	// says which organization and roles a token has.
	HasClaimRules() bool
	// MapClaims returns what the rules make of a token whose signature was
	// verified. Its error means that they make nothing of it.
	MapClaims(ctx context.Context, t authz.Token) (authz.Identity, error)
}

// Verifier accepts the tokens of its issuers. It may be used by several goroutines.
type Verifier struct {
	issuers atomic.Pointer[[]Issuer]
	changed chan struct{} // holds an element when Run has other issuers' keys to keep
	rules   Rules
	persons *persons // nil: nobody appears under a pseudonym
	now     func() time.Time
}

// New returns a verifier of the issuers' tokens, or an error that says what is
// doubtful about them. rules may be nil.
func New(rules Rules, issuers ...Issuer) (*Verifier, error) {
	if err := checkIssuers(issuers); err != nil {
		return nil, err
	}
	v := &Verifier{rules: rules, changed: make(chan struct{}, 1), now: time.Now}
	v.issuers.Store(&issuers)
	return v, nil
}

// replace puts other issuers in the place of those there are. Who is being
// judged is judged by the ones before.
func (v *Verifier) replace(issuers []Issuer) {
	v.issuers.Store(&issuers)
	select {
	case v.changed <- struct{}{}:
	default: // Run has not seen the last change either
	}
}

// Run keeps the issuers' keys up to date until ctx ends.
func (v *Verifier) Run(ctx context.Context) {
	var running sync.WaitGroup
	defer running.Wait()
	kept := map[*KeySet]context.CancelFunc{}
	for ctx.Err() == nil {
		now := map[*KeySet]bool{}
		for _, i := range *v.issuers.Load() {
			now[i.Keys] = true
			if kept[i.Keys] != nil {
				continue
			}
			keeping, end := context.WithCancel(ctx)
			kept[i.Keys] = end
			running.Go(func() { i.Keys.Run(keeping) })
		}
		for keys, end := range kept {
			if !now[keys] {
				end()
				delete(kept, keys)
			}
		}
		select {
		case <-v.changed:
		case <-ctx.Done():
		}
	}
	for _, end := range kept {
		end()
	}
}

// Ready returns nil if the tokens of some issuer can be verified now, and what
// AllReady returns if not: an issuer without keys fails its own people only, and
// must not be able to keep out everybody else.
func (v *Verifier) Ready() error {
	issuers := *v.issuers.Load()
	if failures := unready(issuers); len(failures) == len(issuers) {
		return errors.Join(failures...)
	}
	return nil
}

// AllReady returns nil if the tokens of every issuer can be verified now, and an
// error that wraps ErrKeysUnavailable and names the others if not.
func (v *Verifier) AllReady() error { return errors.Join(unready(*v.issuers.Load())...) }

func unready(issuers []Issuer) (failures []error) {
	for _, i := range issuers {
		if err := i.Keys.Ready(); err != nil {
			failures = append(failures, fmt.Errorf("issuer %s: %w", i.Name, err))
		}
	}
	return failures
}

// Authenticate returns the caller that the request's headers speak for. A caller
// may have no roles: known, and allowed nothing. Its
// error wraps ErrUnauthenticated or ErrKeysUnavailable, or is one of the store of pseudonyms. It may wait for the
// issuer's keys to be fetched, no longer than ctx lasts.
func (v *Verifier) Authenticate(ctx context.Context, h http.Header) (authz.Caller, error) {
	compact, err := bearer(h)
	if err != nil {
		return authz.Caller{}, err
	}
	x := v.examine(compact)
	for _, c := range checks {
		if err := c.run(x, ctx); err != nil {
			return authz.Caller{}, err
		}
	}
	if err := v.persons.hide(ctx, &x.caller); err != nil {
		return authz.Caller{}, err
	}
	return x.caller, nil
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
