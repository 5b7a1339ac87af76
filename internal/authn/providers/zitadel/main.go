// Command zitadel is the OpenID provider of zitadel/oidc with the storage of its example, which gives
// out JWTs here and rotates its key.
package main

import (
	"context"
	"io"
	"log/slog"
	"net/http"

	jose "github.com/go-jose/go-jose/v4"
	"github.com/zitadel/oidc/v3/example/server/exampleop"
	"github.com/zitadel/oidc/v3/example/server/storage"
	"github.com/zitadel/oidc/v3/pkg/op"

	"github.com/orgkeys/orgkeys/internal/authn/providers/provider"
)

func main() {
	keys := &provider.Keys{}
	keys.Serve(func(issuer string) http.Handler {
		storage.RegisterClients(storage.WebClient("client", "secret", issuer+"/callback"))
		s := rotating{storage.NewStorage(storage.NewUserStore(issuer)), keys}
		return exampleop.SetupServer(issuer, s, slog.New(slog.NewTextHandler(io.Discard, nil)), false)
	})
}

// rotating is the example's storage with keys that rotate and claims of an organization.
type rotating struct {
	*storage.Storage
	keys *provider.Keys
}

func (r rotating) SigningKey(context.Context) (op.SigningKey, error) {
	return key{r.keys.All()[0]}, nil
}

func (r rotating) KeySet(context.Context) ([]op.Key, error) {
	var all []op.Key
	for _, k := range r.keys.All() {
		all = append(all, public{k})
	}
	return all, nil
}

func (r rotating) SignatureAlgorithms(context.Context) ([]jose.SignatureAlgorithm, error) {
	return []jose.SignatureAlgorithm{jose.ES256}, nil
}

func (r rotating) GetPrivateClaimsFromScopes(context.Context, string, string, []string) (map[string]any, error) {
	return map[string]any{
		"urn:zitadel:iam:user:resourceowner:id": "278000000000000001",
		"urn:zitadel:iam:org:project:roles":     map[string]any{"orgkeys-admin": map[string]any{"278000000000000001": "acme.example"}},
	}, nil
}

func (r rotating) GetClientByClientID(ctx context.Context, id string) (op.Client, error) {
	c, err := r.Storage.GetClientByClientID(ctx, id)
	return withJWTs{c}, err
}

func (r rotating) ClientCredentials(ctx context.Context, id, secret string) (op.Client, error) {
	c, err := r.Storage.ClientCredentials(ctx, id, secret)
	return withJWTs{c}, err
}

type withJWTs struct{ op.Client }

func (withJWTs) AccessTokenType() op.AccessTokenType { return op.AccessTokenTypeJWT }

// key is a signing key as the OP wants it.
type key struct{ k provider.Key }

func (k key) SignatureAlgorithm() jose.SignatureAlgorithm { return jose.ES256 }
func (k key) Key() any                                    { return k.k.Private }
func (k key) ID() string                                  { return k.k.ID }

// public is a published key.
type public struct{ k provider.Key }

func (p public) ID() string                         { return p.k.ID }
func (p public) Algorithm() jose.SignatureAlgorithm { return jose.ES256 }
func (p public) Use() string                        { return "sig" }
func (p public) Key() any                           { return p.k.Private.Public() }
