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
			JWTScopeClaimKey: jwt.JWTScopeFieldList,
		}
		store := storage.NewMemoryStore()
		store.Clients["client"] = &fosite.DefaultClient{
			ID: "client", Secret: []byte("secret"), GrantTypes: []string{"client_credentials"}, Scopes: []string{"keys"}, Audience: []string{"orgkeys"},
		}
		signing := func(ctx context.Context) (any, error) {
			k := ctx.Value(theKey{}).(provider.Key)
			return &jose.JSONWebKey{Key: k.Private, KeyID: k.ID, Algorithm: "ES256", Use: "sig"}, nil
		}
		strategy := &compose.CommonStrategy{CoreStrategy: compose.NewOAuth2JWTStrategy(signing, compose.NewOAuth2HMACStrategy(config), config)}
		oauth := compose.Compose(config, store, strategy, compose.OAuth2ClientCredentialsGrantFactory)
		mux := http.NewServeMux()
		mux.HandleFunc("GET /.well-known/oauth-authorization-server", func(w http.ResponseWriter, _ *http.Request) {
			answer(w, map[string]any{"issuer": issuer, "jwks_uri": issuer + "/jwks", "token_endpoint": issuer + "/token"})
		})
		mux.HandleFunc("GET /jwks", func(w http.ResponseWriter, _ *http.Request) {
			var set jose.JSONWebKeySet
			for _, k := range keys.All() {
				set.Keys = append(set.Keys, jose.JSONWebKey{Key: k.Private.Public(), KeyID: k.ID, Algorithm: "ES256", Use: "sig"})
			}
			answer(w, set)
		})
		mux.HandleFunc("POST /token", func(w http.ResponseWriter, r *http.Request) { token(w, r, oauth, keys) })
		return mux
	})
}

// theKey is the context's key that signs: header and signature must be of one.
type theKey struct{}

func token(w http.ResponseWriter, r *http.Request, oauth fosite.OAuth2Provider, keys *provider.Keys) {
	now, k := time.Now(), keys.All()[0]
	ctx := context.WithValue(r.Context(), theKey{}, k)
	session := &oauth2.JWTSession{
		JWTClaims: &jwt.JWTClaims{
			Subject: "client", IssuedAt: now, NotBefore: now,
			Extra: map[string]any{"ext": map[string]any{"org_id": "acme", "org_role": []string{"ADMINISTRATOR"}}},
		},
		JWTHeader: &jwt.Headers{Extra: map[string]any{"kid": k.ID}},
	}
	request, err := oauth.NewAccessRequest(ctx, r, session)
	if err != nil {
		oauth.WriteAccessError(ctx, w, request, err)
		return
	}
	for _, audience := range request.GetRequestedAudience() {
		request.GrantAudience(audience)
	}
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
