package authn

import (
	"crypto"
	"crypto/ed25519"
	"encoding/base64"
	"slices"
	"strings"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// maxKeyID bounds key IDs, in bytes. The longest in use are URLs.
const maxKeyID = 256

// token is a token that is well-formed and not yet verified.
type token struct {
	compact   string
	algorithm jose.SignatureAlgorithm
	keyID     string // empty if the token names no key
	payload   []byte // the signed part, not verified yet
}

// parseToken reads a token's header. go-jose parses the token again to verify
// it; this comes first because go-jose is more lenient: it honours b64 without
// crit (RFC 7797), takes line breaks and stray bits in base64, and leaves typ
// to its caller.
func parseToken(compact string) (token, error) {
	if len(compact) > MaxToken {
		return token{}, refused(ReasonMalformed)
	}
	parts := strings.Split(compact, ".")
	if len(parts) != 3 {
		return token{}, refused(ReasonMalformed)
	}
	var decoded [3][]byte
	for i, part := range parts {
		var ok bool
		if decoded[i], ok = decodeBase64(part); !ok {
			return token{}, refused(ReasonMalformed)
		}
	}
	t := token{compact: compact, payload: decoded[1]}
	if err := t.readHeader(decoded[0]); err != nil {
		return token{}, err
	}
	return t, nil
}

// decodeBase64 decodes base64url without padding (RFC 7515, section 2). Only
// the one canonical spelling of a non-empty value is accepted.
func decodeBase64(s string) ([]byte, bool) {
	// The standard library's decoder skips line breaks, strict or not.
	if s == "" || strings.ContainsAny(s, "\r\n") {
		return nil, false
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	return b, err == nil
}

// readHeader reads the header parameters that matter here (RFC 7515, section 4.1).
func (t *token) readHeader(b []byte) error {
	var header map[string]jsontext.Value
	if json.Unmarshal(b, &header) != nil {
		return refused(ReasonMalformed)
	}
	for _, name := range []string{"crit", "b64"} {
		if _, ok := header[name]; ok {
			return refused(ReasonMalformed)
		}
	}
	if typ, ok := header["typ"]; ok && !isTokenType(typ) {
		return refused(ReasonMalformed)
	}
	if kid, ok := header["kid"]; ok {
		t.keyID, ok = text(kid)
		if !ok || t.keyID == "" || len(t.keyID) > maxKeyID {
			return refused(ReasonMalformed)
		}
	}
	algorithm, ok := text(header["alg"])
	if !ok {
		return refused(ReasonMalformed)
	}
	t.algorithm = jose.SignatureAlgorithm(algorithm)
	if !slices.Contains(slices.Concat(rsaAlgorithms, ecAlgorithms, edAlgorithms), t.algorithm) {
		return refused(ReasonAlgorithm)
	}
	return nil
}

// isTokenType reports whether typ is that of a JWT, of an access token in
// particular (RFC 9068, section 2.1), or of any JWS in compact serialization, which
// SPIFFE allows (JWT-SVID, section 2.3). Issuers sign other things with the same
// keys (logout tokens, DPoP proofs) and give them other types.
func isTokenType(typ jsontext.Value) bool {
	s, ok := text(typ)
	if !ok {
		return false
	}
	// RFC 7515, section 4.1.9: media types know no case, and "application/" may be left out.
	s = strings.TrimPrefix(strings.ToLower(s), "application/")
	return s == "jwt" || s == "at+jwt" || s == "jose"
}

// verify reports whether key signed t. The algorithm has been matched
// against the key before, by publishedKeys.choose.
func (t token) verify(key crypto.PublicKey) error {
	if t.algorithm == ed25519Algorithm { // go-jose does not know it by this name, and takes it from the token
		return t.verifyEd25519(key)
	}
	jws, err := jose.ParseSignedCompact(t.compact, []jose.SignatureAlgorithm{t.algorithm})
	if err != nil {
		return refused(ReasonMalformed)
	}
	if _, err := jws.Verify(key); err != nil {
		return refused(ReasonSignature)
	}
	return nil
}

func (t token) signedBy(k publishedKey) bool {
	return slices.Contains(k.algorithms, t.algorithm) && t.verify(k.public) == nil
}

func (t token) verifyEd25519(key crypto.PublicKey) error {
	at := strings.LastIndexByte(t.compact, '.')
	signature, decoded := decodeBase64(t.compact[at+1:])
	public, ok := key.(ed25519.PublicKey)
	if !ok || !decoded || !ed25519.Verify(public, []byte(t.compact[:at]), signature) {
		return refused(ReasonSignature)
	}
	return nil
}

// text returns the value of a JSON string.
func text(v jsontext.Value) (string, bool) {
	if v.Kind() != '"' {
		return "", false
	}
	var s string
	err := json.Unmarshal(v, &s)
	return s, err == nil
}
