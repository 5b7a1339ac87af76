package authn

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// signer is the key that a rotating provider signs with at the moment.
type signer struct {
	key *ecdsa.PrivateKey
	kid string
}

func newSigner(kid string) *signer {
	return &signer{must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)), kid}
}

func (s *signer) token() string {
	return sign(s.key, "ES256", fmt.Sprintf(`{"alg":"ES256","kid":%q}`, s.kid), goodClaims(nil))
}

func (s *signer) jwk() jwk { return publicJWK(&s.key.PublicKey, s.kid) }

// TestRotationLosesNoRequest: a provider over https rotates 30 times, far faster than
// the interval, while eight clients use the newest key. A request fails only
// if its key was replaced, without staying in the set, before the answer.
func TestRotationLosesNoRequest(t *testing.T) {
	for name, style := range map[string]struct {
		kid   string // with the number of the key
		stays bool
	}{
		"the old key stays":      {"key-%d", true},
		"the old key goes":       {"key-%d", false},
		"the key ID is the same": {"key%.0d", false},
	} {
		t.Run(name, func(t *testing.T) {
			first := newSigner(fmt.Sprintf(style.kid, 0))
			p := newProvider(t, publish(jwks(first.jwk())))
			v := verifierFor(t, p.URL, time.Hour)
			var current atomic.Pointer[signer]
			current.Store(first)
			// changes is odd between the provider's change of keys and the first token by the new one.
			var good, changes atomic.Int64
			ended := make(chan struct{})
			var clients sync.WaitGroup
			for range 8 {
				clients.Go(func() {
					for {
						select {
						case <-ended:
							return
						default:
						}
						before := changes.Load()
						err := authenticate(t, v, current.Load().token())
						switch {
						case err == nil:
							good.Add(1)
						case style.stays || before%2 == 0 && changes.Load() == before:
							t.Errorf("a good token: %v", err)
							return
						}
					}
				})
			}
			previous := first
			for i := range 30 {
				next := newSigner(fmt.Sprintf(style.kid, i+1))
				set := jwks(next.jwk())
				if style.stays {
					set = jwks(previous.jwk(), next.jwk())
				}
				before := good.Load()
				changes.Add(1)
				p.change(publish(set))
				current.Store(next)
				changes.Add(1)
				previous = next
				for good.Load() < before+10 && !t.Failed() {
					time.Sleep(time.Millisecond)
				}
			}
			close(ended)
			clients.Wait()
			if n := p.fetches.Load(); n > 100 {
				t.Errorf("%d fetches for 30 rotations", n)
			}
		})
	}
}

// TestRotationRightAfterAFetch is one rotation 2 s after the last fetch, on a
// clock of the test's own: the new key is accepted at once, by ID or not.
func TestRotationRightAfterAFetch(t *testing.T) {
	for _, kid := range []string{"new", "old"} {
		synctest.Test(t, func(t *testing.T) {
			old, fresh := newSigner("old"), newSigner(kid)
			set := jwks(old.jwk())
			k := newKeySet(func(context.Context) ([]byte, error) { return set, nil }, 30*time.Second, 5*time.Minute, quiet)
			verify := func(s *signer) error { return k.verify(context.Background(), must(parseToken(s.token()))) }
			if err := verify(old); err != nil {
				t.Fatal(err)
			}
			time.Sleep(2 * time.Second)
			set = jwks(fresh.jwk())
			if err := verify(fresh); err != nil {
				t.Errorf("%s: the new key: %v", kid, err)
			}
			if err := verify(old); !errors.Is(err, ErrUnauthenticated) {
				t.Errorf("%s: the replaced key: %v", kid, err)
			}
		})
	}
}

// TestForgedSignaturesCauseOneFetchAnInterval: anybody can send them.
func TestForgedSignaturesCauseOneFetchAnInterval(t *testing.T) {
	onAClock(t, func(t *testing.T, s *scriptedSource, k *KeySet) {
		if err := findKey(k, "ed"); err != nil {
			t.Fatal(err)
		}
		forged := must(parseToken(sign(keysForTests().attacker, "RS256", `{"alg":"RS256","kid":"rsa"}`, goodClaims(nil))))
		before := s.reads.Load()
		for range 100 {
			if err := k.verify(context.Background(), forged); !refusedFor(ReasonSignature)(err) {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		if n := s.reads.Load() - before; n < 3 || n > 5 {
			t.Errorf("%d readings in 100 s", n)
		}
	})
}

// TestAProviderWhoseReplicasDisagree shows two sets in turn: seeing one again is
// nothing new, and so does not pay for readings without end.
func TestAProviderWhoseReplicasDisagree(t *testing.T) {
	onAClock(t, func(t *testing.T, s *scriptedSource, k *KeySet) {
		a, b := jwks(newSigner("a").jwk()), jwks(newSigner("b").jwk())
		for i := range 100 {
			s.set.Store(&a)
			if i%2 == 0 {
				s.set.Store(&b)
			}
			_ = findKey(k, fmt.Sprintf("unknown-%d", i))
			time.Sleep(time.Second)
		}
		// The burst, three more in 100 s, and those that first showed a key.
		if n := s.reads.Load(); n > unknownBurst+3+3 {
			t.Errorf("%d readings", n)
		}
	})
}

func TestKeysFoundThroughTheIssuer(t *testing.T) {
	set := issuerSet()
	for _, c := range []struct {
		name     string
		metadata func(base string) string // of OpenID Connect; empty: 404
		oauth    func(base string) string
		says     string // empty: it works
	}{
		{"OpenID Connect", func(base string) string {
			return fmt.Sprintf(`{"issuer":%q,"jwks_uri":%q}`, base+"/realm", base+"/keys")
		}, nil, ""},
		{"OAuth alone", nil, func(base string) string {
			return fmt.Sprintf(`{"issuer":%q,"jwks_uri":%q}`, base+"/realm", base+"/keys")
		}, ""},
		{"a slash more", func(base string) string {
			return fmt.Sprintf(`{"issuer":%q,"jwks_uri":%q}`, base+"/realm/", base+"/keys")
		}, nil, "They differ in the slash at the end"},
		{"a pattern for many tenants", func(base string) string {
			return fmt.Sprintf(`{"issuer":%q,"jwks_uri":%q}`, base+"/{tenantid}/v2.0", base+"/keys")
		}, nil, "give your tenant's own address"},
		{"another issuer", func(base string) string {
			return fmt.Sprintf(`{"issuer":"https://mallory.example","jwks_uri":%q}`, base+"/keys")
		}, nil, "must be the same to the byte"},
		{"no issuer", func(base string) string { return fmt.Sprintf(`{"jwks_uri":%q}`, base+"/keys") }, nil, "must be the same to the byte"},
		{"keys by http", func(base string) string {
			return fmt.Sprintf(`{"issuer":%q,"jwks_uri":"http://127.0.0.1/keys"}`, base+"/realm")
		}, nil, "jwks_uri of the issuer's metadata must be https"},
		{"no keys", func(base string) string { return fmt.Sprintf(`{"issuer":%q}`, base+"/realm") }, nil, "jwks_uri of the issuer's metadata must be https"},
		{"a login page", func(string) string { return "<html>" }, nil, "a page of HTML"},
		{"nothing", nil, nil, "status 404"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var p *provider
			p = newProvider(t, func(w http.ResponseWriter, r *http.Request) {
				documents := map[string]func(string) string{
					"/realm/.well-known/openid-configuration":       c.metadata,
					"/.well-known/oauth-authorization-server/realm": c.oauth,
					"/keys": func(string) string { return string(set) },
				}
				document := documents[r.URL.Path]
				if document == nil {
					http.NotFound(w, r)
					return
				}
				_, _ = w.Write([]byte(document(p.URL)))
			})
			keys, err := OpenKeySet("", KeySetConfig{Interval: time.Hour, Log: quiet, Issuer: p.URL + "/realm"})
			if err != nil {
				t.Fatal(err)
			}
			err = keys.Read(t.Context())
			if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
				t.Errorf("reading: %v, want %q", err, c.says)
			}
		})
	}
	for _, issuer := range []string{"", "urn:issuer", "http://issuer.example", "https://a:b@issuer.example"} {
		if _, err := OpenKeySet("", KeySetConfig{Interval: time.Hour, Log: quiet, Issuer: issuer}); err == nil {
			t.Errorf("issuer %q is searched for keys", issuer)
		}
	}
}

func TestAuthoritiesOfTheKeySet(t *testing.T) {
	p := newProvider(t, publish(issuerSet())) // its certificate is a root of the system here
	dir := t.TempDir()
	file := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	certificate := func(der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}) }
	other := certificate(selfSigned(t, keysForTests().ec).Certificate[0])
	read := func(ca string) error {
		keys, err := OpenKeySet(p.URL, KeySetConfig{Interval: time.Hour, Log: quiet, CAFile: ca})
		if err != nil {
			t.Fatal(err)
		}
		return keys.Read(t.Context())
	}
	if err := read(file("its", certificate(p.Certificate().Raw))); err != nil {
		t.Errorf("its own authority: %v", err)
	}
	if err := read(file("other", other)); err == nil || !strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("another authority: %v", err)
	}
	for _, ca := range []string{filepath.Join(dir, "missing"), file("text", []byte("hello")), dir} {
		if _, err := OpenKeySet(p.URL, KeySetConfig{Interval: time.Hour, Log: quiet, CAFile: ca}); err == nil {
			t.Errorf("%s is an authority", ca)
		}
	}
	if _, err := OpenKeySet(file("set", issuerSet()), KeySetConfig{Interval: time.Hour, Log: quiet, CAFile: file("x", other)}); err == nil {
		t.Error("authorities of a file")
	}
}

// TestWhatProvidersPublishInstead: what can be read is, and the rest is called by its name.
func TestWhatProvidersPublishInstead(t *testing.T) {
	k := keysForTests()
	set := issuerSet()
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	if _, err := w.Write(set); err != nil || w.Close() != nil {
		t.Fatal(err)
	}
	var bomb bytes.Buffer
	w = gzip.NewWriter(&bomb)
	if _, err := w.Write(bytes.Repeat([]byte(" "), 20*maxJWKS)); err != nil || w.Close() != nil {
		t.Fatal(err)
	}
	encoded := func(encoding string, b []byte) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", encoding)
			_, _ = w.Write(b)
		}
	}
	twice := publicJWK(k.ed.Public(), "ed")
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		says   string // empty: the keys are read
	}{
		"gzip unasked":          {encoded("gzip", packed.Bytes()), ""},
		"GZIP":                  {encoded("GZIP", packed.Bytes()), ""},
		"identity":              {encoded("identity", set), ""},
		"one key listed twice":  {publish(jwks(twice, twice)), ""},
		"one key for two algs":  {publish(jwks(twice, publicJWK(k.ed.Public(), "ed").with("alg", "EdDSA"))), ""},
		"members that are null": {publish(jwks(publicJWK(k.ed.Public(), "ed").with("use", nil).with("alg", nil).with("key_ops", nil).with("d", nil))), ""},
		"a key nobody knows":    {publish(jwks(twice, jwk{"kty": "AKP", "alg": "ML-DSA-44", "kid": "x"}, nil)), ""},
		"brotli unasked":        {encoded("br", set), `compressed with "br"`},
		"a gzip bomb":           {encoded("gzip", bomb.Bytes()), "larger than"},
		"gzip cut short":        {encoded("gzip", packed.Bytes()[:packed.Len()/2]), "EOF"},
		"no keys":               {publish(jwks()), "the set is empty"},
		"no usable key":         {publish(jwks(publicJWK(&k.rsa1024.PublicKey, "a"))), "1024 bits"},
		"metadata":              {publish([]byte(`{"issuer":"https://x.example","jwks_uri":"https://x.example/keys"}`)), `the keys are at "https://x.example/keys"`},
		"a single key":          {publish(must(json.Marshal(twice))), "a single key"},
		"a login page":          {publish([]byte("\n <!DOCTYPE html><html>")), "a page of HTML"},
		"PEM":                   {publish([]byte("-----BEGIN CERTIFICATE-----\n")), "PEM"},
		"a byte order mark":     {publish(append([]byte("\xef\xbb\xbf"), set...)), "byte order mark"},
		"nothing":               {publish(nil), "it is empty"},
		"an error":              {publish([]byte(`{"error":"not_found"}`)), "an error message"},
		"keys null":             {publish([]byte(`{"keys":null}`)), `it has no "keys"`},
		"a redirect": {func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/elsewhere", http.StatusFound) },
			`leads to "/elsewhere"`},
	} {
		t.Run(name, func(t *testing.T) {
			p := newProvider(t, c.answer)
			keys := newKeySet(must(remote(p.URL, KeySetConfig{})), time.Hour, time.Hour, quiet)
			err := keys.Read(t.Context())
			if err != nil && strings.Contains(err.Error(), "%!") {
				t.Errorf("the message has a formatting error: %v", err)
			}
			if c.says != "" {
				if !errors.Is(err, ErrKeysUnavailable) || !strings.Contains(err.Error(), c.says) {
					t.Errorf("reading: %v, want %q", err, c.says)
				}
				return
			}
			if err := authenticate(t, verifierWith(keys), tokenOf("ed")); err != nil {
				t.Error(err)
			}
		})
	}
}
