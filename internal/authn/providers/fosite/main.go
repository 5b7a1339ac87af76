// Command fosite is an authorization server made of Ory fosite, with JWTs as Hydra gives them out.
package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"net/http"
	"time"

	jose "github.com/go-jose/go-jose/v3"
	"github.com/ory/fosite"
	"github.com/ory/fosite/compose"
	"github.com/ory/fosite/handler/oauth2"
	"github.com/ory/fosite/storage"
	"github.com/ory/fosite/token/jwt"

	"github.com/orgkeys/orgkeys/internal/authn/providers/provider"
)

func main() {
	keys := &provider.Keys{}
	keys.Serve(func(issuer string) http.Handler {
		secret := sha256.Sum256([]byte("of the test"))
		config := &fosite.Config{
			AccessTokenIssuer: issuer, AccessTokenLifespan: time.Hour, GlobalSecret: secret[:], ClientSecretsHasher: plain{},
			JWTScopeClaimKey: jwt.JWTScopeFieldList, EnforcePKCE: true,
		}
		store := storage.NewMemoryStore()
		store.Clients["client"] = &fosite.DefaultClient{
			ID: "client", Secret: []byte("secret"), Scopes: []string{"keys"}, Audience: []string{"orgkeys"},
			GrantTypes: []string{"client_credentials", "authorization_code"}, ResponseTypes: []string{"code"}, RedirectURIs: []string{issuer + "/callback"},
		}
		signing := func(ctx context.Context) (any, error) {
			k := ctx.Value(theKey{}).(provider.Key)
			return &jose.JSONWebKey{Key: k.Private, KeyID: k.ID, Algorithm: "ES256", Use: "sig"}, nil
		}
		strategy := &compose.CommonStrategy{CoreStrategy: compose.NewOAuth2JWTStrategy(signing, compose.NewOAuth2HMACStrategy(config), config)}
		oauth := compose.Compose(config, store, strategy,
			compose.OAuth2ClientCredentialsGrantFactory, compose.OAuth2AuthorizeExplicitFactory, compose.OAuth2PKCEFactory)
		mux := http.NewServeMux()
		mux.HandleFunc("GET /.well-known/oauth-authorization-server", func(w http.ResponseWriter, _ *http.Request) {
			answer(w, map[string]any{"issuer": issuer, "jwks_uri": issuer + "/jwks", "token_endpoint": issuer + "/token", "authorization_endpoint": issuer + "/authorize"})
		})
		mux.HandleFunc("GET /jwks", func(w http.ResponseWriter, _ *http.Request) {
			var set jose.JSONWebKeySet
			for _, k := range keys.All() {
				set.Keys = append(set.Keys, jose.JSONWebKey{Key: k.Private.Public(), KeyID: k.ID, Algorithm: "ES256", Use: "sig"})
			}
			answer(w, set)
		})
		mux.HandleFunc("GET /authorize", func(w http.ResponseWriter, r *http.Request) { authorize(w, r, oauth) })
		mux.HandleFunc("POST /token", func(w http.ResponseWriter, r *http.Request) { token(w, r, oauth, keys) })
		return mux
	})
}

// theKey is the context's key that signs: header and signature must be of one.
type theKey struct{}

func sessionOf(subject string) *oauth2.JWTSession {
	now := time.Now()
	return &oauth2.JWTSession{
		JWTClaims: &jwt.JWTClaims{
			Subject: subject, IssuedAt: now, NotBefore: now,
			Extra: map[string]any{"ext": map[string]any{"org_id": "acme", "org_role": []string{"ADMINISTRATOR"}}},
		},
		JWTHeader: &jwt.Headers{},
	}
}

// authorize takes the one user for logged in, and for agreed.
func authorize(w http.ResponseWriter, r *http.Request, oauth fosite.OAuth2Provider) {
	ctx := r.Context()
	request, err := oauth.NewAuthorizeRequest(ctx, r)
	if err != nil {
		oauth.WriteAuthorizeError(ctx, w, request, err)
		return
	}
	for _, scope := range request.GetRequestedScopes() {
		request.GrantScope(scope)
	}
	for _, audience := range request.GetRequestedAudience() {
		request.GrantAudience(audience)
	}
	response, err := oauth.NewAuthorizeResponse(ctx, request, sessionOf("ada-1"))
	if err != nil {
		oauth.WriteAuthorizeError(ctx, w, request, err)
		return
	}
	oauth.WriteAuthorizeResponse(ctx, w, request, response)
}

func token(w http.ResponseWriter, r *http.Request, oauth fosite.OAuth2Provider, keys *provider.Keys) {
	k := keys.All()[0]
	ctx := context.WithValue(r.Context(), theKey{}, k)
	request, err := oauth.NewAccessRequest(ctx, r, sessionOf("client"))
	if err != nil {
		oauth.WriteAccessError(ctx, w, request, err)
		return
	}
	if request.GetGrantTypes().ExactOne("client_credentials") {
		for _, audience := range request.GetRequestedAudience() {
			request.GrantAudience(audience)
		}
	}
	// By a code, the session is the one of its authorization, which may be older than the key.
	request.GetSession().(*oauth2.JWTSession).JWTHeader.Add("kid", k.ID)
	response, err := oauth.NewAccessResponse(ctx, request)
	if err != nil {
		oauth.WriteAccessError(ctx, w, request, err)
		return
	}
	oauth.WriteAccessResponse(ctx, w, request, response)
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v)
}

// plain compares secrets as they are: this is a test.
type plain struct{}

func (plain) Compare(_ context.Context, hash, data []byte) error {
	if string(hash) != string(data) {
		return fosite.ErrInvalidClient
	}
	return nil
}
func (plain) Hash(_ context.Context, data []byte) ([]byte, error) { return data, nil }
