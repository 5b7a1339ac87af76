package harness

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// Token is a token for a member of org with the role, from whichever issuer
// the server trusts. Its subject is "admin".
func (s *Server) Token(t testing.TB, org, role string) string {
	t.Helper()
	if s.issuer != nil {
		return s.issuer.Token(t, Claims{"org_id": org, "org_role": role})
	}
	s.mu.Lock()
	token, known := s.tokens[org+" "+role]
	s.mu.Unlock()
	if known {
		return token
	}
	token, err := s.DevelopmentToken(org, role)
	if err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	s.tokens[org+" "+role] = token
	s.mu.Unlock()
	return token
}

// DevelopmentToken is a fresh token of the development issuer for "admin".
func (s *Server) DevelopmentToken(org, role string) (string, error) {
	cmd := s.command(context.Background(), "token", "--org", org, "--role", role, "--subject", "admin")
	cmd.Env = s.environment()
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("orgkeys token: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}

// Claims are the claims of a token.
type Claims map[string]any

// Issuer is an OIDC provider of the test's own: a JWKS and the keys to it.
type Issuer struct {
	Name, Audience string
	JWKS           string // path of the JWKS file, or an URL that the test set

	set  jose.JSONWebKeySet
	keys map[string]jose.JSONWebKey
	last string
}

// NewIssuer makes an issuer with one ES256 key and writes its JWKS to a file.
func NewIssuer(t testing.TB) *Issuer {
	t.Helper()
	i := &Issuer{
		Name: "https://issuer.test/realm", Audience: "orgkeys-test",
		JWKS: filepath.Join(t.TempDir(), "jwks.json"), keys: map[string]jose.JSONWebKey{},
	}
	i.Add(t, "first", jose.ES256, NewECKey(t))
	i.Publish(t)
	return i
}

// NewECKey is a P-256 key.
func NewECKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// Settings are the settings that make a server trust the issuer.
func (i *Issuer) Settings() map[string]string {
	return map[string]string{"ORGKEYS_ISSUER": i.Name, "ORGKEYS_AUDIENCE": i.Audience, "ORGKEYS_JWKS": i.JWKS}
}

// Add adds a signing key, which later tokens use.
func (i *Issuer) Add(t testing.TB, kid string, alg jose.SignatureAlgorithm, key crypto.Signer) {
	t.Helper()
	i.keys[kid] = jose.JSONWebKey{Key: key, KeyID: kid, Algorithm: string(alg), Use: "sig"}
	i.set.Keys = append(i.set.Keys, jose.JSONWebKey{Key: key.Public(), KeyID: kid, Algorithm: string(alg), Use: "sig"})
	i.last = kid
}

// Forget takes a key out of the set; Publish makes it known.
func (i *Issuer) Forget(kid string) {
	var left []jose.JSONWebKey
	for _, k := range i.set.Keys {
		if k.KeyID != kid {
			left = append(left, k)
		}
	}
	i.set.Keys = left
}

// Document is the JWKS.
func (i *Issuer) Document(t testing.TB) []byte {
	t.Helper()
	b, err := json.Marshal(i.set)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Publish writes the JWKS file, by renaming as an operator would.
func (i *Issuer) Publish(t testing.TB) {
	t.Helper()
	if err := os.WriteFile(i.JWKS+".new", i.Document(t), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(i.JWKS+".new", i.JWKS); err != nil {
		t.Fatal(err)
	}
}

// Claims are the claims of a good token, changed by the given ones; a nil
// value takes a claim out.
func (i *Issuer) Claims(change Claims) Claims {
	now := time.Now()
	c := Claims{
		"iss": i.Name, "aud": i.Audience, "sub": "admin", "iat": now.Unix(), "exp": now.Add(time.Hour).Unix(),
		"org_id": "org-none", "org_role": "OWNER",
	}
	maps.Copy(c, change)
	for k, v := range change {
		if v == nil {
			delete(c, k)
		}
	}
	return c
}

// Token is a good token but for the changed claims, signed by the newest key.
func (i *Issuer) Token(t testing.TB, change Claims) string {
	t.Helper()
	payload, err := json.Marshal(i.Claims(change))
	if err != nil {
		t.Fatal(err)
	}
	return i.Sign(t, i.last, nil, payload)
}

// Sign signs any payload with the named key under the given further header
// fields.
func (i *Issuer) Sign(t testing.TB, kid string, header map[string]any, payload []byte) string {
	t.Helper()
	k, ok := i.keys[kid]
	if !ok {
		t.Fatalf("the issuer has no key %q", kid)
	}
	token, err := sign(jose.SignatureAlgorithm(k.Algorithm), k.Key, kid, header, payload)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// SignAs signs with any key under any key ID.
func SignAs(t testing.TB, alg jose.SignatureAlgorithm, key any, kid string, payload []byte) string {
	t.Helper()
	token, err := sign(alg, key, kid, nil, payload)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func sign(alg jose.SignatureAlgorithm, key any, kid string, header map[string]any, payload []byte) (string, error) {
	opts := (&jose.SignerOptions{}).WithType("JWT").WithHeader("kid", kid)
	for k, v := range header {
		opts = opts.WithHeader(jose.HeaderKey(k), v)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, opts)
	if err != nil {
		return "", fmt.Errorf("signing a token: %w", err)
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		return "", fmt.Errorf("signing a token: %w", err)
	}
	return signed.CompactSerialize()
}
