#!/usr/bin/env bash
# Ory fosite 0.49.0 with go-jose 3.0.4: the header of a session goes into every JWT that is issued for it,
# over the header of the key that signs. An application that puts kid there, as it does for tokens
# that are issued at once (client credentials), stores it with the authorization code, and with
# every refresh token. After a rotation those tokens are signed by the new key and name the old one.
#
# Why it matters: the signature of such a token is wrong under the key that it names, for as long as the
# grant is refreshed, while tokens by client credentials are right; who verifies sees "bad signature",
# and not "unknown key", so a verifier that fetches the JWKS again for unknown keys alone never recovers. The JWK's
# own KeyID is enough: without kid in the session the header follows the key.
#
# Seen:
#   kid in the session:     signed by new, kid old
#   no kid in the session:  signed by new, kid new
#
# Needs Go. Exits with 1 if it behaves otherwise.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat >main.go <<'GO'
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"log"
	"net/http"
	"net/url"
	"strings"
	"time"

	jose "github.com/go-jose/go-jose/v3"
	"github.com/ory/fosite"
	"github.com/ory/fosite/compose"
	"github.com/ory/fosite/handler/oauth2"
	"github.com/ory/fosite/storage"
	"github.com/ory/fosite/token/jwt"
)

type plain struct{}

func (plain) Compare(context.Context, []byte, []byte) error        { return nil }
func (plain) Hash(_ context.Context, b []byte) ([]byte, error) { return b, nil }

func must[T any](v T, err error) T {
	if err != nil {
		log.Fatalf("%+v", err)
	}
	return v
}

func key(id string) *jose.JSONWebKey {
	return &jose.JSONWebKey{Key: must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)), KeyID: id, Algorithm: "ES256", Use: "sig"}
}

// signedAfterRotation gets a code while old signs, and a token for it when new does.
func signedAfterRotation(header *jwt.Headers) (by, kid string) {
	ctx := context.Background()
	old, fresh := key("old"), key("new")
	signing := old
	config := &fosite.Config{AccessTokenIssuer: "https://issuer.example", GlobalSecret: []byte("of the finding, 32 bytes or more"), ClientSecretsHasher: plain{}}
	store := storage.NewMemoryStore()
	store.Clients["c"] = &fosite.DefaultClient{ID: "c", Secret: []byte("s"), RedirectURIs: []string{"https://c.example/cb"},
		GrantTypes: []string{"authorization_code"}, ResponseTypes: []string{"code"}}
	get := func(context.Context) (any, error) { return signing, nil }
	strategy := &compose.CommonStrategy{CoreStrategy: compose.NewOAuth2JWTStrategy(get, compose.NewOAuth2HMACStrategy(config), config)}
	provider := compose.Compose(config, store, strategy, compose.OAuth2AuthorizeExplicitFactory)
	session := func() *oauth2.JWTSession {
		return &oauth2.JWTSession{JWTClaims: &jwt.JWTClaims{Subject: "ada", IssuedAt: time.Now()}, JWTHeader: header}
	}
	query := url.Values{"client_id": {"c"}, "response_type": {"code"}, "redirect_uri": {"https://c.example/cb"}, "state": {"eight or more"}}
	authorize := must(provider.NewAuthorizeRequest(ctx, must(http.NewRequest("GET", "https://issuer.example/?"+query.Encode(), nil))))
	code := must(provider.NewAuthorizeResponse(ctx, authorize, session())).GetCode()

	signing = fresh
	form := url.Values{"grant_type": {"authorization_code"}, "code": {code}, "redirect_uri": {"https://c.example/cb"}}
	r := must(http.NewRequest("POST", "https://issuer.example/token", strings.NewReader(form.Encode())))
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	r.SetBasicAuth("c", "s")
	response := must(provider.NewAccessResponse(ctx, must(provider.NewAccessRequest(ctx, r, &oauth2.JWTSession{}))))
	token := must(jose.ParseSigned(response.GetAccessToken()))
	for _, k := range []*jose.JSONWebKey{old, fresh} {
		if _, err := token.Verify(k.Key.(*ecdsa.PrivateKey).Public()); err == nil {
			by = k.KeyID
		}
	}
	return by, token.Signatures[0].Protected.KeyID
}

func main() {
	by, kid := signedAfterRotation(&jwt.Headers{Extra: map[string]any{"kid": "old"}})
	fmt.Printf("kid in the session:     signed by %s, kid %s\n", by, kid)
	by2, kid2 := signedAfterRotation(&jwt.Headers{})
	fmt.Printf("no kid in the session:  signed by %s, kid %s\n", by2, kid2)
	if by != "new" || kid != "old" || by2 != "new" || kid2 != "new" {
		log.Fatal("it behaves otherwise")
	}
}
GO
cat >go.mod <<'MOD'
module finding

go 1.24

require (
	github.com/go-jose/go-jose/v3 v3.0.4
	github.com/ory/fosite v0.49.0
)
MOD
GOFLAGS=-mod=mod go mod tidy >/dev/null 2>&1
go run .
