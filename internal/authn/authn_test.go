package authn

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/orgkeys/orgkeys/internal/authz"
)

const (
	testIssuer   = "https://issuer.example"
	testAudience = "orgkeys-test"
	testNow      = 1_800_000_000 // the verifier's clock stands still here
)

// testKeys are the private keys of the tests' issuer, and an attacker's.
type testKeys struct {
	rsa, rsaPS, attacker *rsa.PrivateKey
	rsa1024              *rsa.PrivateKey
	ec, ec384, ec521     *ecdsa.PrivateKey
	ed                   ed25519.PrivateKey
}

var keysForTests = sync.OnceValue(func() testKeys {
	newRSA := func(bits int) *rsa.PrivateKey { return must(rsa.GenerateKey(rand.Reader, bits)) }
	// Fixed, so that tokens in a fuzzer's corpus verify in all of its processes.
	fixed := bytes.Repeat([]byte{7}, 32)
	return testKeys{
		rsa: newRSA(2048), rsaPS: newRSA(2048), attacker: newRSA(2048), rsa1024: newRSA(1024),
		ec:    must(ecdsa.ParseRawPrivateKey(elliptic.P256(), fixed)),
		ec384: must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader)),
		ec521: must(ecdsa.GenerateKey(elliptic.P521(), rand.Reader)),
		ed:    ed25519.NewKeyFromSeed(fixed),
	}
})

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// jwk is a JWK as tests write it.
type jwk map[string]any

func b64(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

func publicJWK(key crypto.PublicKey, kid string) jwk {
	var j jwk
	if err := json.Unmarshal(must(jose.JSONWebKey{Key: key, KeyID: kid}.MarshalJSON()), &j); err != nil {
		panic(err)
	}
	return j
}

func (j jwk) with(name string, value any) jwk {
	j[name] = value
	return j
}

func jwks(keys ...jwk) []byte {
	return must(json.Marshal(map[string]any{"keys": append([]jwk{}, keys...)}))
}

// issuerSet is the set that the tests' verifier trusts.
func issuerSet() []byte {
	k := keysForTests()
	return jwks(
		publicJWK(&k.rsa.PublicKey, "rsa"),
		publicJWK(&k.rsaPS.PublicKey, "rsa-ps").with("alg", "PS256"),
		publicJWK(&k.ec.PublicKey, "ec"),
		publicJWK(k.ed.Public(), "ed"),
		publicJWK(&k.rsa1024.PublicKey, "rsa-1024"),
		publicJWK(&k.ec384.PublicKey, "ec-384"),
		publicJWK(&k.ec521.PublicKey, "ec-521"),
		jwk{"kty": "oct", "kid": "oct", "k": b64([]byte("0123456789abcdef0123456789abcdef")), "alg": "HS256"},
	)
}

func newTestVerifier(t testing.TB, set []byte) *Verifier {
	t.Helper()
	return newMappedVerifier(t, set, DefaultMapping())
}

func newMappedVerifier(t testing.TB, set []byte, m Mapping) *Verifier {
	t.Helper()
	keys, err := fixedKeySet(set)
	if err != nil {
		t.Fatal(err)
	}
	v, err := New(nil, testIssuerWith(keys, m))
	if err != nil {
		t.Fatal(err)
	}
	v.now = func() time.Time { return time.Unix(testNow, 0) }
	return v
}

func testIssuerWith(keys *KeySet, m Mapping) Issuer {
	return Issuer{Name: testIssuer, Audiences: []string{testAudience}, Keys: keys, Mapping: m}
}

func bearerHeader(token string) http.Header {
	return http.Header{"Authorization": {"Bearer " + token}}
}

// sign makes a token out of header and payload as they are, with the standard
// library alone. A signer that does not fit alg signs in its own way.
func sign(key any, alg, header, payload string) string {
	input := b64([]byte(header)) + "." + b64([]byte(payload))
	return input + "." + b64(signature(key, alg, input))
}

func signature(key any, alg, input string) []byte {
	hash := crypto.SHA256
	switch {
	case strings.HasSuffix(alg, "384"):
		hash = crypto.SHA384
	case strings.HasSuffix(alg, "512"):
		hash = crypto.SHA512
	}
	digest := hash.New()
	digest.Write([]byte(input))
	sum := digest.Sum(nil)
	switch key := key.(type) {
	case *rsa.PrivateKey:
		if strings.HasPrefix(alg, "PS") {
			return must(rsa.SignPSS(rand.Reader, key, hash, sum, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}))
		}
		return must(rsa.SignPKCS1v15(nil, key, hash, sum))
	case *ecdsa.PrivateKey:
		r, s := signECDSA(key, sum)
		size := (key.Params().BitSize + 7) / 8
		return append(r.FillBytes(make([]byte, size)), s.FillBytes(make([]byte, size))...)
	case ed25519.PrivateKey:
		return ed25519.Sign(key, []byte(input))
	case []byte:
		mac := hmac.New(sha256.New, key)
		mac.Write([]byte(input))
		return mac.Sum(nil)
	default:
		return nil
	}
}

func signECDSA(key *ecdsa.PrivateKey, sum []byte) (r, s *big.Int) {
	var parsed struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(must(ecdsa.SignASN1(rand.Reader, key, sum)), &parsed); err != nil {
		panic(err)
	}
	return parsed.R, parsed.S
}

// goodClaims are claims that the tests' verifier accepts, as changed: a nil
// value leaves the claim out.
func goodClaims(changes map[string]any) string {
	claims := map[string]any{
		"iss": testIssuer, "aud": testAudience, "sub": "alice", "exp": testNow + 600,
		"org_id": "org-1", "org_role": "OWNER",
	}
	for name, value := range changes {
		if claims[name] = value; value == nil {
			delete(claims, name)
		}
	}
	return string(must(json.Marshal(claims)))
}

func edHeader(more string) string { return `{"alg":"EdDSA","kid":"ed"` + more + `}` }

// edToken is a token with these claims, correctly signed.
func edToken(payload string) string {
	return sign(keysForTests().ed, "EdDSA", edHeader(""), payload)
}

func checkRefused(t *testing.T, v *Verifier, token, reason string) {
	t.Helper()
	caller, err := v.Authenticate(t.Context(), bearerHeader(token))
	var refusal *TokenError
	if !errors.As(err, &refusal) || !errors.Is(err, ErrUnauthenticated) {
		t.Fatalf("Authenticate = %+v, %v, want a *TokenError", caller, err)
	}
	if refusal.Reason != reason {
		t.Errorf("reason %q, want %q", refusal.Reason, reason)
	}
	if !reflect.DeepEqual(caller, authz.Caller{}) {
		t.Errorf("a refused token has the caller %+v", caller)
	}
}

func TestNewRefusesDoubtfulConfiguration(t *testing.T) {
	keys := must(fixedKeySet(issuerSet()))
	good := func() Issuer { return testIssuerWith(keys, DefaultMapping()) }
	if _, err := New(nil, good()); err != nil {
		t.Fatalf("New(%+v): %v", good(), err)
	}
	for name, change := range map[string]func(*Issuer){
		"no issuer":                         func(i *Issuer) { i.Name = "" },
		"no audience":                       func(i *Issuer) { i.Audiences = nil },
		"an empty audience":                 func(i *Issuer) { i.Audiences = []string{"a", ""} },
		"no keys":                           func(i *Issuer) { i.Keys = nil },
		"no claim for the organization":     func(i *Issuer) { i.Mapping.Organization = "" },
		"no claim for the role":             func(i *Issuer) { i.Mapping.Role = "" },
		"no claim for the subject":          func(i *Issuer) { i.Mapping.Subject = "" },
		"organization out of the audience":  func(i *Issuer) { i.Mapping.Organization = "aud" },
		"organization out of an audience":   func(i *Issuer) { i.Mapping.Organization = "/aud/0" },
		"organization out of the subject":   func(i *Issuer) { i.Mapping.Organization = "sub" },
		"organization out of the actor":     func(i *Issuer) { i.Mapping.Organization = "/act/sub" },
		"role out of the issuer":            func(i *Issuer) { i.Mapping.Role = "iss" },
		"role out of the subject, unmapped": func(i *Issuer) { i.Mapping.Role = "sub" },
		"subject out of the token's ID":     func(i *Issuer) { i.Mapping.Subject = "jti" },
		"organization and role in one":      func(i *Issuer) { i.Mapping.Organization, i.Mapping.Role = "x", "x" },
		"role where the organization is":    func(i *Issuer) { i.Mapping.Role = "org_id" },
		"subject where the organization is": func(i *Issuer) { i.Mapping.Subject = "org_id" },
		"a pointer that is none":            func(i *Issuer) { i.Mapping.Role = "/a~2b" },
		"an unknown role in the map":        func(i *Issuer) { i.Mapping.RoleMap = map[string]authz.Role{"a": "ROOT"} },
		"an empty value in the map":         func(i *Issuer) { i.Mapping.RoleMap = map[string]authz.Role{"": authz.Owner} },
		"an unknown default role":           func(i *Issuer) { i.Mapping.RoleDefault = "ROOT" },
		"a subject prefix without a colon":  func(i *Issuer) { i.SubjectPrefix = "ci" },
	} {
		t.Run(name, func(t *testing.T) {
			i := good()
			change(&i)
			if v, err := New(nil, i); err == nil {
				t.Errorf("New accepted %+v as %+v", i, v)
			}
		})
	}
	other := good()
	other.Name = "https://other.example"
	for name, issuers := range map[string][]Issuer{"none": {}, "one twice": {good(), good()}, "two with one subject prefix": {good(), other}} {
		if _, err := New(nil, issuers...); err == nil {
			t.Errorf("%s: New accepted it", name)
		}
	}
}

func TestEachAcceptedAlgorithm(t *testing.T) {
	k := keysForTests()
	v := newTestVerifier(t, issuerSet())
	for _, tt := range []struct {
		alg, kid string
		key      any
	}{
		{"RS256", "rsa", k.rsa},
		{"PS256", "rsa", k.rsa}, // the set does not bind this key to one of the two
		{"PS256", "rsa-ps", k.rsaPS},
		{"ES256", "ec", k.ec},
		{"EdDSA", "ed", k.ed},
		{"Ed25519", "ed", k.ed},
		{"RS384", "rsa", k.rsa},
		{"RS512", "rsa", k.rsa},
		{"PS384", "rsa", k.rsa},
		{"PS512", "rsa", k.rsa},
		{"ES384", "ec-384", k.ec384},
		{"ES512", "ec-521", k.ec521},
	} {
		t.Run(tt.alg+" by "+tt.kid, func(t *testing.T) {
			token := sign(tt.key, tt.alg, fmt.Sprintf(`{"alg":%q,"kid":%q}`, tt.alg, tt.kid), goodClaims(nil))
			caller, err := v.Authenticate(t.Context(), bearerHeader(token))
			want := authz.Caller{Kind: authz.Person, Subject: "alice", Org: "org-1", Roles: []authz.Role{authz.Owner}}
			if err != nil || !reflect.DeepEqual(caller, want) {
				t.Errorf("Authenticate = %+v, %v, want %+v", caller, err, want)
			}
		})
	}
}

func TestAuthorizationHeader(t *testing.T) {
	token := edToken(goodClaims(nil))
	v := newTestVerifier(t, issuerSet())
	for _, tt := range []struct {
		name   string
		values []string
		reason string // empty if accepted
	}{
		{"Bearer", []string{"Bearer " + token}, ""},
		{"lower case", []string{"bearer " + token}, ""},
		{"upper case", []string{"BEARER " + token}, ""},
		{"none", nil, ReasonMissing},
		{"two headers", []string{"Bearer " + token, "Bearer " + token}, ReasonMalformed},
		{"good header after an empty one", []string{"", "Bearer " + token}, ReasonMalformed},
		{"empty", []string{""}, ReasonMalformed},
		{"scheme alone", []string{"Bearer"}, ReasonMalformed},
		{"scheme and space", []string{"Bearer "}, ReasonMalformed},
		{"no scheme", []string{token}, ReasonMalformed},
		{"other scheme", []string{"Basic " + token}, ReasonMalformed},
		{"DPoP", []string{"DPoP " + token}, ReasonMalformed},
		{"scheme with a longer name", []string{"Bearers " + token}, ReasonMalformed},
		{"two spaces", []string{"Bearer  " + token}, ReasonMalformed},
		{"tab", []string{"Bearer\t" + token}, ReasonMalformed},
		{"no-break space", []string{"Bearer\u00a0" + token}, ReasonMalformed},
		{"leading space", []string{" Bearer " + token}, ReasonMalformed},
		{"trailing space", []string{"Bearer " + token + " "}, ReasonMalformed},
		{"trailing line break", []string{"Bearer " + token + "\n"}, ReasonMalformed},
		{"line break in the token", []string{"Bearer " + token[:9] + "\r\n" + token[9:]}, ReasonMalformed},
		{"space in the token", []string{"Bearer " + token[:9] + " " + token[9:]}, ReasonMalformed},
		{"NUL in the token", []string{"Bearer " + token[:9] + "\x00" + token[9:]}, ReasonMalformed},
		{"two tokens", []string{"Bearer " + token + " " + token}, ReasonMalformed},
		{"two tokens by comma", []string{"Bearer " + token + "," + token}, ReasonMalformed},
		{"two credentials by comma", []string{"Bearer " + token + ", Bearer " + token}, ReasonMalformed},
		{"in quotes", []string{`Bearer "` + token + `"`}, ReasonMalformed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := v.Authenticate(t.Context(), http.Header{"Authorization": tt.values})
			var refusal *TokenError
			switch {
			case tt.reason == "" && err != nil:
				t.Errorf("refused: %v", err)
			case tt.reason != "" && (!errors.As(err, &refusal) || refusal.Reason != tt.reason):
				t.Errorf("error %v, want reason %s", err, tt.reason)
			}
		})
	}
}

func TestTokenSizeLimit(t *testing.T) {
	v := newTestVerifier(t, issuerSet())
	padded := func(n int) string { return edToken(goodClaims(map[string]any{"padding": strings.Repeat("x", n)})) }
	n := 5000
	for len(padded(n+1)) <= MaxToken {
		n++
	}
	if _, err := v.Authenticate(t.Context(), bearerHeader(padded(n))); err != nil {
		t.Errorf("a token of %d bytes: %v", len(padded(n)), err)
	}
	checkRefused(t, v, padded(n+1), ReasonMalformed)
}

// TestHostileTokens is the corpus: every one of these is refused, and for the
// reason that it was made for.
func TestHostileTokens(t *testing.T) {
	v := newTestVerifier(t, issuerSet())
	for _, tt := range hostileTokens(goodClaims(nil)) {
		t.Run(tt.name, func(t *testing.T) { checkRefused(t, v, tt.token, tt.reason) })
	}
}

type hostileToken struct{ name, token, reason string }

// hostileTokens are tokens with the claims good that nobody may accept.
func hostileTokens(good string) []hostileToken {
	k := keysForTests()
	attackersJWK := string(must(json.Marshal(publicJWK(&k.attacker.PublicKey, "rsa"))))
	spki := must(x509.MarshalPKIXPublicKey(&k.rsa.PublicKey))
	spkiPEM := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki})
	parts := strings.Split(edToken(good), ".")
	header := func(alg, kid string) string { return fmt.Sprintf(`{"alg":%q,"kid":%q}`, alg, kid) }
	kid := func(raw string) string { return sign(k.ed, "EdDSA", `{"alg":"EdDSA","kid":`+raw+`}`, good) }

	return []hostileToken{
		// Algorithms.
		{"alg none, no signature", b64([]byte(`{"alg":"none"}`)) + "." + b64([]byte(good)) + ".", ReasonMalformed},
		{"alg none, a signature", sign(k.ed, "", header("none", "ed"), good), ReasonAlgorithm},
		{"alg None", sign(k.ed, "", header("None", "ed"), good), ReasonAlgorithm},
		{"alg NONE", sign(k.ed, "", header("NONE", "ed"), good), ReasonAlgorithm},
		{"alg nOnE", sign(k.ed, "", header("nOnE", "ed"), good), ReasonAlgorithm},
		{"alg empty", sign(k.ed, "", header("", "ed"), good), ReasonAlgorithm},
		{"alg missing", sign(k.ed, "", `{"kid":"ed"}`, good), ReasonMalformed},
		{"alg null", sign(k.ed, "", `{"alg":null,"kid":"ed"}`, good), ReasonMalformed},
		{"alg list", sign(k.ed, "", `{"alg":["EdDSA"],"kid":"ed"}`, good), ReasonMalformed},
		{"alg in lower case", sign(k.ed, "", header("eddsa", "ed"), good), ReasonAlgorithm},
		{"alg with a space", sign(k.ed, "", header("EdDSA ", "ed"), good), ReasonAlgorithm},
		{"alg under another name", sign(k.ed, "", `{"Alg":"EdDSA","kid":"ed"}`, good), ReasonMalformed},
		{"HS256 with the public key as PEM", sign(spkiPEM, "HS256", header("HS256", "rsa"), good), ReasonAlgorithm},
		{"HS256 with the public key as DER", sign(spki, "HS256", header("HS256", "rsa"), good), ReasonAlgorithm},
		{"HS256 with the public key as JWK", sign(must(json.Marshal(publicJWK(&k.rsa.PublicKey, "rsa"))), "HS256", header("HS256", "rsa"), good), ReasonAlgorithm},
		{"HS256 with the set's symmetric key", sign([]byte("0123456789abcdef0123456789abcdef"), "HS256", header("HS256", "oct"), good), ReasonAlgorithm},
		{"RS512 with the digest of RS256", sign(k.rsa, "RS256", header("RS512", "rsa"), good), ReasonSignature},
		{"ES256 named for an RSA key", sign(k.ec, "ES256", header("ES256", "rsa"), good), ReasonAlgorithm},
		{"RS256 named for an EC key", sign(k.rsa, "RS256", header("RS256", "ec"), good), ReasonAlgorithm},
		{"EdDSA named for an RSA key", sign(k.ed, "EdDSA", header("EdDSA", "rsa"), good), ReasonAlgorithm},
		{"RS256 by a key bound to PS256", sign(k.rsaPS, "RS256", header("RS256", "rsa-ps"), good), ReasonAlgorithm},
		{"PS256 signature called RS256", sign(k.rsa, "PS256", header("RS256", "rsa"), good), ReasonSignature},
		{"RS256 signature called PS256", sign(k.rsa, "RS256", header("PS256", "rsa"), good), ReasonSignature},
		{"RSA key of 1024 bits", sign(k.rsa1024, "RS256", header("RS256", "rsa-1024"), good), ReasonUnknownKey},
		{"RS384 by a key bound to PS256", sign(k.rsaPS, "RS384", header("RS384", "rsa-ps"), good), ReasonAlgorithm},
		{"PS512 by a key bound to PS256", sign(k.rsaPS, "PS512", header("PS512", "rsa-ps"), good), ReasonAlgorithm},
		{"ES384 named for a P-256 key", sign(k.ec, "ES384", header("ES384", "ec"), good), ReasonAlgorithm},
		{"ES512 named for a P-384 key", sign(k.ec384, "ES512", header("ES512", "ec-384"), good), ReasonAlgorithm},
		{"Ed25519 named for an EC key", sign(k.ed, "Ed25519", header("Ed25519", "ec"), good), ReasonAlgorithm},
		{"Ed25519 by another key", sign(ed25519.NewKeyFromSeed(make([]byte, 32)), "Ed25519", header("Ed25519", "ed"), good), ReasonSignature},
		{"Ed25519 signature cut short", withSignature(header("Ed25519", "ed"), good, make([]byte, 63)), ReasonSignature},
		{"Ed448", sign(k.ed, "Ed448", header("Ed448", "ed"), good), ReasonAlgorithm},
		{"ES256K", sign(k.ec, "ES256K", header("ES256K", "ec"), good), ReasonAlgorithm},
		{"P-384 key with ES256", sign(k.ec384, "ES256", header("ES256", "ec-384"), good), ReasonAlgorithm},

		// Key IDs.
		{"kid of another key", sign(k.attacker, "RS256", header("RS256", "rsa"), good), ReasonSignature},
		{"kid unknown", kid(`"nobody"`), ReasonUnknownKey},
		{"kid a path", kid(`"../../../../dev/null"`), ReasonUnknownKey},
		{"kid SQL", kid(`"ed' OR '1'='1"`), ReasonUnknownKey},
		{"kid a command", kid(`"|/usr/bin/id"`), ReasonUnknownKey},
		{"kid a URL", kid(`"https://attacker.example/key"`), ReasonUnknownKey},
		{"kid in another case", kid(`"ED"`), ReasonUnknownKey},
		{"kid with a NUL", kid(`"ed\u0000"`), ReasonUnknownKey},
		{"kid very long", kid(`"` + strings.Repeat("k", 4000) + `"`), ReasonMalformed},
		{"kid empty", kid(`""`), ReasonMalformed},
		{"kid number", kid(`1`), ReasonMalformed},
		{"kid null", kid(`null`), ReasonMalformed},
		{"kid list", kid(`["ed"]`), ReasonMalformed},
		{"kid object", kid(`{"ed":1}`), ReasonMalformed},

		// Keys and declarations that a token brings along.
		{"jwk of the attacker", sign(k.attacker, "RS256", `{"alg":"RS256","kid":"rsa","jwk":`+attackersJWK+`}`, good), ReasonSignature},
		{"jwk of the attacker, no kid", sign(k.attacker, "PS256", `{"alg":"PS256","jwk":`+attackersJWK+`}`, good), ReasonUnknownKey},
		{"jku of the attacker", sign(k.attacker, "RS256", `{"alg":"RS256","kid":"rsa","jku":"https://127.0.0.1:1/jwks"}`, good), ReasonSignature},
		{"x5u of the attacker", sign(k.attacker, "RS256", `{"alg":"RS256","kid":"rsa","x5u":"https://127.0.0.1:1/cert"}`, good), ReasonSignature},
		{"crit unknown", sign(k.ed, "", edHeader(`,"crit":["exp"],"exp":1`), good), ReasonMalformed},
		{"crit empty", sign(k.ed, "", edHeader(`,"crit":[]`), good), ReasonMalformed},
		{"crit null", sign(k.ed, "", edHeader(`,"crit":null`), good), ReasonMalformed},
		{"b64 false, critical", unencoded(k.ed, edHeader(`,"b64":false,"crit":["b64"]`), good), ReasonMalformed},
		{"b64 false, not critical", unencoded(k.ed, edHeader(`,"b64":false`), good), ReasonMalformed},
		{"typ of a logout token", sign(k.ed, "", edHeader(`,"typ":"logout+jwt"`), good), ReasonMalformed},
		{"typ of a DPoP proof", sign(k.ed, "", edHeader(`,"typ":"dpop+jwt"`), good), ReasonMalformed},
		{"typ of another tree", sign(k.ed, "", edHeader(`,"typ":"text/jwt"`), good), ReasonMalformed},
		{"typ null", sign(k.ed, "", edHeader(`,"typ":null`), good), ReasonMalformed},

		// Form.
		{"duplicate alg", sign(k.ed, "", edHeader(`,"alg":"none"`), good), ReasonMalformed},
		{"duplicate alg, escaped", sign(k.ed, "", edHeader(`,"\u0061lg":"none"`), good), ReasonMalformed},
		{"duplicate kid", sign(k.ed, "", edHeader(`,"kid":"rsa"`), good), ReasonMalformed},
		{"header not an object", sign(k.ed, "", `["EdDSA"]`, good), ReasonMalformed},
		{"header null", sign(k.ed, "", `null`, good), ReasonMalformed},
		{"header with trailing data", sign(k.ed, "", edHeader("")+`{}`, good), ReasonMalformed},
		{"header with invalid UTF-8", sign(k.ed, "", edHeader(",\"x\":\"\xff\""), good), ReasonMalformed},
		{"header with a byte order mark", sign(k.ed, "", "\ufeff"+edHeader(""), good), ReasonMalformed},
		{"JWE", strings.Join([]string{b64([]byte(`{"alg":"RSA-OAEP","enc":"A256GCM"}`)), "AAAA", "AAAA", "AAAA", "AAAA"}, "."), ReasonMalformed},
		{"a token in a token", edToken(edToken(good)), ReasonClaims},
		{"JSON serialization", fmt.Sprintf(`{"protected":%q,"payload":%q,"signature":%q}`, parts[0], parts[1], parts[2]), ReasonMalformed},
		{"two parts", parts[0] + "." + parts[1], ReasonMalformed},
		{"four parts", strings.Join(parts, ".") + ".AAAA", ReasonMalformed},
		{"trailing dot", strings.Join(parts, ".") + ".", ReasonMalformed},
		{"no header", "." + parts[1] + "." + parts[2], ReasonMalformed},
		{"detached payload", parts[0] + ".." + parts[2], ReasonMalformed},
		{"no signature", parts[0] + "." + parts[1] + ".", ReasonMalformed},
		{"padded base64", parts[0] + "." + parts[1] + "." + parts[2] + "==", ReasonMalformed},
		{"standard base64", strings.Join(parts, ".") + "+/", ReasonMalformed},
		{"stray bits in base64", parts[0] + "." + parts[1] + "." + strayBits(parts[2]), ReasonMalformed},
		{"signature of another token", parts[0] + "." + b64([]byte(goodClaims(map[string]any{"sub": "eve"}))) + "." + parts[2], ReasonSignature},
		{"signature cut short", parts[0] + "." + parts[1] + "." + parts[2][:80], ReasonSignature},
		{"signature of zeros, ES256", withSignature(header("ES256", "ec"), good, make([]byte, 64)), ReasonSignature},
		{"signature in ASN.1, ES256", asn1Signature(k.ec, header("ES256", "ec"), good), ReasonSignature},
		{"signature with r + n, ES256", overflowingSignature(k.ec, header("ES256", "ec"), good), ReasonSignature},

		// Claims as JSON.
		{"duplicate sub", edToken(good[:len(good)-1] + `,"sub":"eve"}`), ReasonClaims},
		{"duplicate sub, escaped", edToken(good[:len(good)-1] + `,"\u0073ub":"eve"}`), ReasonClaims},
		{"duplicate org_id", edToken(good[:len(good)-1] + `,"org_id":"org-2"}`), ReasonClaims},
		{"duplicate names deep inside", edToken(good[:len(good)-1] + `,"x":[{"a":1,"a":2}]}`), ReasonClaims},
		{"claims with trailing data", edToken(good + `{}`), ReasonClaims},
		{"claims with a trailing comma", edToken(good[:len(good)-1] + `,}`), ReasonClaims},
		{"claims with invalid UTF-8", edToken(good[:len(good)-1] + ",\"x\":\"\xff\"}"), ReasonClaims},
		{"claims with half a surrogate pair", edToken(good[:len(good)-1] + `,"x":"\ud800"}`), ReasonClaims},
		{"claims a list", edToken(`[` + good + `]`), ReasonClaims},
		{"claims null", edToken(`null`), ReasonIssuer},
		{"claims nested very deeply", edToken(`{"x":` + strings.Repeat("[", 2000) + strings.Repeat("]", 2000) + `}`), ReasonIssuer},
		{"claim names in another case", edToken(strings.Replace(good, `"sub"`, `"Sub"`, 1)), ReasonSubject},
	}
}

func withSignature(header, payload string, signature []byte) string {
	return b64([]byte(header)) + "." + b64([]byte(payload)) + "." + b64(signature)
}

// unencoded signs the payload itself instead of its base64 (RFC 7797).
func unencoded(key ed25519.PrivateKey, header, payload string) string {
	return withSignature(header, payload, ed25519.Sign(key, []byte(b64([]byte(header))+"."+payload)))
}

// strayBits changes bits of the last character that decoding drops.
func strayBits(s string) string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	last := strings.IndexByte(alphabet, s[len(s)-1])
	return s[:len(s)-1] + string(alphabet[last^1])
}

func asn1Signature(key *ecdsa.PrivateKey, header, payload string) string {
	sum := sha256.Sum256([]byte(b64([]byte(header)) + "." + b64([]byte(payload))))
	return withSignature(header, payload, must(ecdsa.SignASN1(rand.Reader, key, sum[:])))
}

// overflowingSignature writes s as s + n, which is the same modulo n. It does
// not fit into 32 bytes for most s; then n itself stands in for r.
func overflowingSignature(key *ecdsa.PrivateKey, header, payload string) string {
	sum := sha256.Sum256([]byte(b64([]byte(header)) + "." + b64([]byte(payload))))
	r, s := signECDSA(key, sum[:])
	n := key.Params().N
	if sn := new(big.Int).Add(s, n); sn.BitLen() <= 256 {
		s = sn
	} else {
		r = n
	}
	raw := make([]byte, 64)
	r.FillBytes(raw[:32])
	s.FillBytes(raw[32:])
	return withSignature(header, payload, raw)
}

// TestMalleatedES256SignatureIsTheSameToken: (r, n-s) is a valid signature of
// the same bytes by the same key. It is accepted, since issuers send either,
// and means the same; nothing here identifies a token by its signature.
func TestMalleatedES256SignatureIsTheSameToken(t *testing.T) {
	key := keysForTests().ec
	header, payload := `{"alg":"ES256","kid":"ec"}`, goodClaims(nil)
	raw := signature(key, "ES256", b64([]byte(header))+"."+b64([]byte(payload)))
	s := new(big.Int).Sub(key.Params().N, new(big.Int).SetBytes(raw[32:]))
	v := newTestVerifier(t, issuerSet())
	first, err := v.Authenticate(t.Context(), bearerHeader(withSignature(header, payload, raw)))
	if err != nil {
		t.Fatal(err)
	}
	s.FillBytes(raw[32:])
	second, err := v.Authenticate(t.Context(), bearerHeader(withSignature(header, payload, raw)))
	if err != nil || !reflect.DeepEqual(first, second) {
		t.Errorf("the other signature gives %+v, %v, want %+v", second, err, first)
	}
}

// TestMalformedHeaderParametersOfKeysRefuseTheToken: go-jose reads them first.
func TestMalformedHeaderParametersOfKeysRefuseTheToken(t *testing.T) {
	v := newTestVerifier(t, issuerSet())
	for _, more := range []string{`,"jwk":5`, `,"jwk":{"kty":"RSA"}`, `,"x5c":["AAAA"]`, `,"nonce":5`} {
		_, err := v.Authenticate(t.Context(), bearerHeader(sign(keysForTests().ed, "", edHeader(more), goodClaims(nil))))
		if !refusedFor(ReasonMalformed)(err) {
			t.Errorf("%s: %v", more, err)
		}
	}
}

func TestIgnoredHeaderParametersDoNotMatter(t *testing.T) {
	k := keysForTests()
	v := newTestVerifier(t, issuerSet())
	attackersJWK := string(must(json.Marshal(publicJWK(&k.attacker.PublicKey, "a"))))
	for name, more := range map[string]string{
		"typ JWT":                `,"typ":"JWT"`,
		"typ application/jwt":    `,"typ":"application/jwt"`,
		"typ at+jwt":             `,"typ":"at+jwt"`,
		"typ JOSE":               `,"typ":"JOSE"`,
		"typ application/at+jwt": `,"typ":"application/AT+JWT"`,
		"jwk":                    `,"jwk":` + attackersJWK,
		"jku":                    `,"jku":"https://127.0.0.1:1/jwks"`,
		"x5u":                    `,"x5u":"https://127.0.0.1:1/cert"`,
		"x5t":                    `,"x5t":"AAAA"`,
		"something else":         `,"something":{"else":[1,2]}`,
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := v.Authenticate(t.Context(), bearerHeader(sign(k.ed, "", edHeader(more), goodClaims(nil)))); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestErrorsHoldNothingOfTheToken(t *testing.T) {
	k := keysForTests()
	v := newTestVerifier(t, issuerSet())
	for name, token := range map[string]string{
		"algorithm": sign(k.ed, "", `{"alg":"canary-alg","kid":"ed"}`, goodClaims(nil)),
		"kid":       sign(k.ed, "", `{"alg":"EdDSA","kid":"canary-kid"}`, goodClaims(nil)),
		"jwk":       sign(k.ed, "", edHeader(`,"jwk":{"kty":"canary"}`), goodClaims(nil)),
		"claims":    edToken(goodClaims(map[string]any{"org_id": "canary!"})),
		"base64":    "canary!.canary.canary",
	} {
		t.Run(name, func(t *testing.T) {
			_, err := v.Authenticate(t.Context(), bearerHeader(token))
			if err == nil || strings.Contains(err.Error(), "canary") || strings.Contains(err.Error(), token[:6]) {
				t.Errorf("error %q", err)
			}
		})
	}
}

func TestTokenWithoutKeyID(t *testing.T) {
	k := keysForTests()
	token := sign(k.rsa, "RS256", `{"alg":"RS256"}`, goodClaims(nil))
	for _, tt := range []struct {
		name   string
		set    []byte
		reason string
	}{
		{"one key", jwks(publicJWK(&k.rsa.PublicKey, "a")), ""},
		{"one key that fits", jwks(publicJWK(&k.ec.PublicKey, "a"), publicJWK(&k.rsa.PublicKey, "b")), ""},
		{"two that fit", jwks(publicJWK(&k.rsa.PublicKey, "a"), publicJWK(&k.attacker.PublicKey, "b")), ReasonUnknownKey},
		{"none that fits", jwks(publicJWK(&k.ec.PublicKey, "a")), ReasonUnknownKey},
	} {
		t.Run(tt.name, func(t *testing.T) {
			v := newTestVerifier(t, tt.set)
			if tt.reason != "" {
				checkRefused(t, v, token, tt.reason)
				return
			}
			if _, err := v.Authenticate(t.Context(), bearerHeader(token)); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestDuplicateKeyIDs(t *testing.T) {
	k := keysForTests()
	token := sign(k.rsa, "RS256", `{"alg":"RS256","kid":"a"}`, goodClaims(nil))
	// RFC 7517, section 4.5, lets keys of different types share an ID.
	v := newTestVerifier(t, jwks(publicJWK(&k.ec.PublicKey, "a"), publicJWK(&k.rsa.PublicKey, "a")))
	if _, err := v.Authenticate(t.Context(), bearerHeader(token)); err != nil {
		t.Errorf("one of the two fits: %v", err)
	}
	v = newTestVerifier(t, jwks(publicJWK(&k.attacker.PublicKey, "a"), publicJWK(&k.rsa.PublicKey, "a")))
	checkRefused(t, v, token, ReasonUnknownKey)
}

func TestWaitingEndsWithTheRequest(t *testing.T) {
	block := make(chan struct{})
	defer close(block)
	keys := newKeySet(func(context.Context) ([]byte, error) { <-block; return nil, errors.New("late") }, time.Minute, time.Hour, quiet)
	v := must(New(nil, testIssuerWith(keys, DefaultMapping())))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := v.Authenticate(ctx, bearerHeader(edToken(goodClaims(nil))))
	if !errors.Is(err, ErrKeysUnavailable) || !errors.Is(err, context.Canceled) {
		t.Errorf("Authenticate: %v, want ErrKeysUnavailable and context.Canceled", err)
	}
}

// TestOneIssuerOfSeveralIsEnoughToBeReady: what one of them publishes, or does not, is
// no reason to turn away the others' people, and is said all the same.
func TestOneIssuerOfSeveralIsEnoughToBeReady(t *testing.T) {
	good := testIssuerWith(must(fixedKeySet(issuerSet())), DefaultMapping())
	never := newKeySet(func(context.Context) ([]byte, error) { return nil, errors.New("no route") }, time.Hour, time.Hour, quiet)
	for name, keys := range map[string]*KeySet{"an empty set": must(fixedKeySet(jwks())), "not read yet": never} {
		t.Run(name, func(t *testing.T) {
			bad := Issuer{Name: "https://ci.example", Audiences: []string{"orgkeys-ci"}, Keys: keys, Mapping: DefaultMapping(), SubjectPrefix: "ci:"}
			both := must(New(nil, bad, good))
			if err := both.Ready(); err != nil {
				t.Errorf("one of two issuers keeps everybody out: %v", err)
			}
			if err := both.AllReady(); !errors.Is(err, ErrKeysUnavailable) || !strings.Contains(err.Error(), bad.Name) || strings.Contains(err.Error(), good.Name) {
				t.Errorf("AllReady = %v, want it to name %s alone", err, bad.Name)
			}
			alone := must(New(nil, bad))
			if err := alone.Ready(); !errors.Is(err, ErrKeysUnavailable) {
				t.Errorf("ready without any issuer's keys: %v", err)
			}
		})
	}
}
