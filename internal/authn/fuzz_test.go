package authn

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"math/big"
	"net/http"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/orgkeys/orgkeys/internal/authz"
)

// FuzzAuthenticate: whatever the header holds, there is no panic and no third
// kind of answer, and what is accepted verifies with the standard library alone.
func FuzzAuthenticate(f *testing.F) {
	k := keysForTests()
	good := goodClaims(nil)
	for _, seed := range []string{
		"", "Bearer", "Bearer ", "Bearer ..", "Bearer a.b.c",
		"Bearer " + edToken(good),
		"bearer " + sign(k.rsa, "RS256", `{"alg":"RS256","kid":"rsa"}`, good),
		"Bearer " + sign(k.rsaPS, "PS256", `{"alg":"PS256","kid":"rsa-ps"}`, good),
		"Bearer " + sign(k.ec, "ES256", `{"alg":"ES256"}`, good),
		"Bearer " + sign(k.attacker, "RS256", `{"alg":"RS256","kid":"rsa"}`, good),
		"Bearer " + unencoded(k.ed, edHeader(`,"b64":false`), good),
		"Bearer " + b64([]byte(`{"alg":"none"}`)) + "." + b64([]byte(good)) + ".",
		"Bearer " + sign(k.ed, "", edHeader(`,"jwk":{"kty":"RSA","n":"AQAB","e":"AQAB"},"x5c":["AAAA"]`), good),
		"Bearer " + edToken(goodClaims(map[string]any{"exp": raw("1e400")})),
	} {
		f.Add(seed)
	}
	v := newTestVerifier(f, issuerSet())
	f.Fuzz(func(t *testing.T, value string) {
		caller, err := v.Authenticate(t.Context(), http.Header{"Authorization": {value}})
		if err != nil {
			checkRefusal(t, caller, err)
			return
		}
		token := value[len("Bearer "):]
		payload, ok := verifiesIndependently(token)
		if !ok {
			t.Fatalf("accepted %q, which does not verify", token)
		}
		checkCaller(t, caller, payload)
	})
}

// FuzzClaims: the same for claims that the issuer did sign. The header comes
// along, since there it is signed as well.
func FuzzClaims(f *testing.F) {
	good := goodClaims(nil)
	for _, header := range []string{
		edHeader(""), edHeader(`,"typ":"JWT"`), edHeader(`,"b64":false`), edHeader(`,"crit":[]`),
		`{"alg":"EdDSA"}`, `{"alg":"none","kid":"ed"}`, edHeader(`,"\u0061lg":"none"`),
	} {
		f.Add(header, good)
	}
	for _, payload := range []string{
		`{}`, `null`, `[]`, good + `{}`, good[:len(good)-1] + `,"\u0073ub":"eve"}`,
		goodClaims(map[string]any{"org_role": []any{254, "USER"}, "aud": []string{"x", testAudience}, "nbf": 1, "iat": 1.5}),
		goodClaims(map[string]any{"org_role": raw("254.0")}), goodClaims(map[string]any{"exp": raw("1e400")}),
		goodClaims(map[string]any{"sub": "a\u202e"}), goodClaims(map[string]any{"name": "A", "email": "b\n"}),
	} {
		f.Add(edHeader(""), payload)
	}
	v := newTestVerifier(f, issuerSet())
	f.Fuzz(func(t *testing.T, header, payload string) {
		caller, err := v.Authenticate(t.Context(), bearerHeader(sign(keysForTests().ed, "EdDSA", header, payload)))
		if err != nil {
			checkRefusal(t, caller, err)
			return
		}
		if strings.Contains(header, `"crit"`) || strings.Contains(header, `"b64"`) {
			t.Errorf("accepted the header %q", header)
		}
		checkCaller(t, caller, []byte(payload))
	})
}

// FuzzJWKS: no panic, and no key that should not be usable.
func FuzzJWKS(f *testing.F) {
	k := keysForTests()
	f.Add(issuerSet())
	f.Add(jwks(publicJWK(k.rsa, "private")))
	f.Add(jwks(publicJWK(&k.rsa.PublicKey, "a").with("use", "enc").with("key_ops", []string{"verify"})))
	f.Add([]byte(`{"keys":[{"kty":"EC","crv":"P-256","x":"AA","y":"AA"},null,{}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		set, err := parseJWKS(b)
		if err != nil {
			return
		}
		for _, key := range set.usable {
			switch public := key.public.(type) {
			case *rsa.PublicKey:
				if n := public.N.BitLen(); n < 2048 || n > 4096 || public.E < 3 {
					t.Errorf("RSA of %d bits, exponent %d", n, public.E)
				}
			case *ecdsa.PublicKey:
				if _, err := public.ECDH(); err != nil || !slices.Contains([]int{256, 384, 521}, public.Params().BitSize) {
					t.Errorf("EC key on %s: %v", public.Params().Name, err)
				}
			case ed25519.PublicKey:
				if len(public) != ed25519.PublicKeySize {
					t.Errorf("Ed25519 key of %d bytes", len(public))
				}
			default:
				t.Errorf("a key of type %T", public)
			}
		}
	})
}

func checkRefusal(t *testing.T, caller authz.Caller, err error) {
	t.Helper()
	var refusal *TokenError
	if !errors.As(err, &refusal) || closed(refusal.Reason) != refusal.Reason || caller.Subject != "" || caller.Roles != nil {
		t.Errorf("refused with %+v, %v", caller, err)
	}
}

// checkCaller compares an accepted caller with the payload as the standard
// library's JSON reads it.
func checkCaller(t *testing.T, caller authz.Caller, payload []byte) {
	t.Helper()
	decoder := json.NewDecoder(bytes.NewReader(payload))
	decoder.UseNumber()
	var claims map[string]any
	if err := decoder.Decode(&claims); err != nil || decoder.More() || !utf8.Valid(payload) {
		t.Fatalf("accepted claims that are not JSON: %q, %v", payload, err)
	}
	if claims["iss"] != testIssuer || claims["sub"] != caller.Subject || claims["org_id"] != string(caller.Org) || caller.Subject == "" {
		t.Errorf("accepted %+v for %q", caller, payload)
	}
	if list, ok := claims["aud"].([]any); claims["aud"] != testAudience && (!ok || !slices.Contains(list, any(testAudience))) {
		t.Errorf("accepted another audience: %q", payload)
	}
	number, ok := claims["exp"].(json.Number)
	if exp, ok2 := new(big.Float).SetString(string(number)); !ok || !ok2 || exp.Cmp(big.NewFloat(testNow)) <= 0 {
		t.Errorf("accepted exp %v", claims["exp"])
	}
	for _, role := range caller.Roles {
		if _, ok := authz.ParseRole(string(role)); !ok {
			t.Errorf("accepted role %q", role)
		}
	}
	if len(caller.Org) > 128 || strings.ContainsAny(string(caller.Org), "/ \n\x00") {
		t.Errorf("accepted %+v", caller)
	}
}

// verifiesIndependently checks a token against the issuer's own keys, with
// neither go-jose nor the code under test.
func verifiesIndependently(token string) (payload []byte, ok bool) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return nil, false
	}
	var decoded [3][]byte
	for i, part := range parts {
		b, err := base64.RawURLEncoding.Strict().DecodeString(part)
		if err != nil {
			return nil, false
		}
		decoded[i] = b
	}
	var header map[string]any
	if json.Unmarshal(decoded[0], &header) != nil {
		return nil, false
	}
	algorithm, _ := header["alg"].(string)
	return decoded[1], signedByIssuer(algorithm, []byte(parts[0]+"."+parts[1]), decoded[2])
}

func signedByIssuer(algorithm string, input, signature []byte) bool {
	k := keysForTests()
	if algorithm == "EdDSA" || algorithm == "Ed25519" {
		return ed25519.Verify(k.ed.Public().(ed25519.PublicKey), input, signature)
	}
	if len(algorithm) != 5 {
		return false
	}
	hash, ok := map[string]crypto.Hash{"256": crypto.SHA256, "384": crypto.SHA384, "512": crypto.SHA512}[algorithm[2:]]
	if !ok {
		return false
	}
	digest := hash.New()
	digest.Write(input)
	sum := digest.Sum(nil)
	switch algorithm[:2] {
	case "RS":
		return rsa.VerifyPKCS1v15(&k.rsa.PublicKey, hash, sum, signature) == nil
	case "PS":
		return rsa.VerifyPSS(&k.rsa.PublicKey, hash, sum, signature, nil) == nil ||
			algorithm == "PS256" && rsa.VerifyPSS(&k.rsaPS.PublicKey, hash, sum, signature, nil) == nil
	case "ES":
		key := map[string]*ecdsa.PrivateKey{"256": k.ec, "384": k.ec384, "512": k.ec521}[algorithm[2:]]
		half := len(signature) / 2
		return half == (key.Params().BitSize+7)/8 && len(signature) == 2*half && ecdsa.Verify(&key.PublicKey, sum,
			new(big.Int).SetBytes(signature[:half]), new(big.Int).SetBytes(signature[half:]))
	}
	return false
}
