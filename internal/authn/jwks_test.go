package authn

import (
	"encoding/json"
	"math/big"
	"strings"
	"testing"
)

func TestUsableKeys(t *testing.T) {
	k := keysForTests()
	rsaKey := func() jwk { return publicJWK(&k.rsa.PublicKey, "a") }
	ecKey := func() jwk { return publicJWK(&k.ec.PublicKey, "a") }
	edKey := func() jwk { return publicJWK(k.ed.Public(), "a") }
	modulus := func(bits uint, low int64) jwk {
		n := new(big.Int).Lsh(big.NewInt(1), bits-1)
		return jwk{"kty": "RSA", "n": b64(n.Add(n, big.NewInt(low)).Bytes()), "e": "AQAB"}
	}
	exponent := func(e ...byte) jwk { return rsaKey().with("e", b64(e)) }
	for _, tt := range []struct {
		name   string
		key    jwk
		usable string // the algorithms, empty if the key is ignored
	}{
		{"RSA", rsaKey(), "RS256 RS384 RS512 PS256 PS384 PS512"},
		{"RSA bound to RS256", rsaKey().with("alg", "RS256"), "RS256"},
		{"RSA bound to PS256", rsaKey().with("alg", "PS256"), "PS256"},
		{"EC", ecKey(), "ES256"},
		{"EC bound to ES256", ecKey().with("alg", "ES256"), "ES256"},
		{"Ed25519", edKey().with("alg", "EdDSA"), "EdDSA Ed25519"},
		{"use sig", rsaKey().with("use", "sig"), "RS256 RS384 RS512 PS256 PS384 PS512"},
		{"key_ops verify", rsaKey().with("key_ops", []string{"verify"}), "RS256 RS384 RS512 PS256 PS384 PS512"},
		{"no kid", publicJWK(k.ed.Public(), ""), "EdDSA Ed25519"},
		{"certificates that do not parse", rsaKey().with("x5c", []string{"!"}).with("x5t", "!").with("x5u", ":"), "RS256 RS384 RS512 PS256 PS384 PS512"},
		{"members nobody knows", rsaKey().with("issuer", "x"), "RS256 RS384 RS512 PS256 PS384 PS512"},
		{"RSA of 4096 bits", modulus(4096, 1), "RS256 RS384 RS512 PS256 PS384 PS512"},

		{"RSA of 1024 bits", publicJWK(&k.rsa1024.PublicKey, "a"), ""},
		{"RSA of 2047 bits", modulus(2047, 1), ""},
		{"RSA of 4097 bits", modulus(4097, 1), ""},
		{"RSA with an even modulus", modulus(2048, 0), ""},
		{"RSA with exponent 1", exponent(1), ""},
		{"RSA with exponent 0", exponent(0), ""},
		{"RSA with an even exponent", exponent(1, 0, 0), ""},
		{"RSA with an exponent of 33 bits", exponent(1, 0, 0, 0, 1), ""},
		{"RSA with an exponent of 65 bits", exponent(1, 0, 0, 0, 0, 0, 0, 0, 3), ""},
		{"RSA without exponent", jwk{"kty": "RSA", "n": rsaKey()["n"]}, ""},
		{"P-384", publicJWK(&k.ec384.PublicKey, "a"), "ES384"},
		{"P-384 bound to ES256", publicJWK(&k.ec384.PublicKey, "a").with("alg", "ES256"), ""},
		{"P-521", publicJWK(&k.ec521.PublicKey, "a"), "ES512"},
		{"Ed25519 by its new name", edKey().with("alg", "Ed25519"), "EdDSA Ed25519"},
		{"Ed25519 bound to Ed448", edKey().with("alg", "Ed448"), ""},
		{"EC off the curve", ecKey().with("y", ecKey()["x"]), ""},
		{"secp256k1", ecKey().with("crv", "secp256k1"), ""},
		{"X25519", edKey().with("crv", "X25519"), ""},
		{"Ed25519 of 31 bytes", edKey().with("x", b64(make([]byte, 31))), ""},
		{"symmetric", jwk{"kty": "oct", "kid": "a", "k": "AAAA", "alg": "HS256"}, ""},
		{"RSA bound to RS512", rsaKey().with("alg", "RS512"), "RS512"},
		{"RSA bound to RSA-OAEP", rsaKey().with("alg", "RSA-OAEP"), ""},
		{"RSA bound to HS256", rsaKey().with("alg", "HS256"), ""},
		{"RSA bound to ES256", rsaKey().with("alg", "ES256"), ""},
		{"alg null", rsaKey().with("alg", nil), "RS256 RS384 RS512 PS256 PS384 PS512"},
		{"use enc", rsaKey().with("use", "enc"), ""},
		{"use null", rsaKey().with("use", nil), "RS256 RS384 RS512 PS256 PS384 PS512"},
		{"use of SPIFFE's JWTs", rsaKey().with("use", "jwt-svid"), "RS256 RS384 RS512 PS256 PS384 PS512"},
		{"use of SPIFFE's certificates", rsaKey().with("use", "x509-svid"), ""},
		{"everything else null", rsaKey().with("key_ops", nil).with("kid", nil).with("x5c", nil).with("d", nil).with("k", nil), "RS256 RS384 RS512 PS256 PS384 PS512"},
		{"use empty", rsaKey().with("use", ""), ""},
		{"key_ops sign", rsaKey().with("key_ops", []string{"sign"}), ""},
		{"key_ops empty", rsaKey().with("key_ops", []string{}), ""},
		{"key_ops string", rsaKey().with("key_ops", "verify"), ""},
		{"kid number", rsaKey().with("kid", 1), ""},
		{"kid very long", rsaKey().with("kid", strings.Repeat("k", 257)), ""},
		{"no kty", jwk{"kid": "a", "n": rsaKey()["n"], "e": "AQAB"}, ""},
		{"kty in lower case", rsaKey().with("kty", "rsa"), ""},
		{"empty", jwk{}, ""},
		{"null", nil, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			set, err := parseJWKS(jwks(tt.key))
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, key := range set.usable {
				for _, algorithm := range key.algorithms {
					got = append(got, string(algorithm))
				}
			}
			if strings.Join(got, " ") != tt.usable {
				t.Errorf("usable for %q, want %q; ignored: %v", got, tt.usable, set.ignored)
			}
			if len(set.usable)+len(set.ignored) != 1 {
				t.Errorf("%d keys usable and %d ignored, out of one", len(set.usable), len(set.ignored))
			}
		})
	}
}

func TestRefusedSets(t *testing.T) {
	k := keysForTests()
	good := string(jwks(publicJWK(&k.rsa.PublicKey, "a")))
	many := make([]jwk, maxKeys+1)
	for name, set := range map[string]string{
		"empty":                        ``,
		"not JSON":                     `<html>`,
		"null":                         `null`,
		"a list":                       `[]`,
		"without keys":                 `{}`,
		"keys null":                    `{"keys":null}`,
		"keys an object":               `{"keys":{}}`,
		"keys of strings":              `{"keys":["a"]}`,
		"keys in another case":         `{"Keys":[]}`,
		"one JWK":                      string(must(json.Marshal(publicJWK(&k.rsa.PublicKey, "a")))),
		"duplicate keys":               good[:len(good)-1] + `,"keys":[]}`,
		"duplicate member of a key":    `{"keys":[{"kty":"RSA","kty":"oct"}]}`,
		"trailing data":                good + good,
		"cut short":                    good[:len(good)-2],
		"invalid UTF-8":                "{\"keys\":[],\"x\":\"\xff\"}",
		"more keys than is sensible":   string(jwks(many...)),
		"a private RSA key":            string(jwks(publicJWK(&k.ec.PublicKey, "a"), publicJWK(k.rsa, "b"))),
		"a private EC key":             string(jwks(publicJWK(k.ec, "a"))),
		"a private Ed25519 key":        string(jwks(publicJWK(k.ed, "a"))),
		"a private key's factor alone": string(jwks(publicJWK(&k.rsa.PublicKey, "a").with("p", "AAAA"))),
	} {
		t.Run(name, func(t *testing.T) {
			parsed, err := parseJWKS([]byte(set))
			if err == nil {
				t.Fatalf("accepted with %d usable keys", len(parsed.usable))
			}
			if strings.Contains(name, "private") && !strings.Contains(err.Error(), "private key") {
				t.Errorf("the message does not say what is wrong: %v", err)
			}
		})
	}
}
