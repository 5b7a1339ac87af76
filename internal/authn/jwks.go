package authn

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

const (
	minRSABits = 2048
	maxRSABits = 4096 // beyond it one verification costs too much; go-jose has the same limit
	maxKeys    = 256  // in a set
)

// publishedKey is a key of the issuer's set that may verify tokens.
type publishedKey struct {
	id         string // empty if the set gives it none
	algorithms []jose.SignatureAlgorithm
	public     crypto.PublicKey // *rsa.PublicKey, *ecdsa.PublicKey on P-256, or ed25519.PublicKey
}

// publishedKeys is one version of the issuer's set.
type publishedKeys struct {
	usable  []publishedKey
	ignored []error // why the other keys of the set are not usable
}

// parseJWKS reads a JWK set (RFC 7517, section 5). Keys that are not usable
// here are ignored, as the standard asks for: symmetric ones, which could only
// verify what they can also forge, are among them. A set that holds a private
// key is refused as a whole: whoever can read the set can forge tokens.
func parseJWKS(b []byte) (publishedKeys, error) {
	var document struct {
		Keys []map[string]jsontext.Value `json:"keys"`
	}
	if err := json.Unmarshal(b, &document); err != nil {
		return publishedKeys{}, errors.New("not a JWK set: no JSON object with a list of objects \"keys\", or with duplicate names")
	}
	if document.Keys == nil || len(document.Keys) > maxKeys {
		return publishedKeys{}, fmt.Errorf("not a JWK set: it needs \"keys\", with at most %d of them", maxKeys)
	}
	var set publishedKeys
	for i, jwk := range document.Keys {
		if isPrivate(jwk) {
			return publishedKeys{}, fmt.Errorf("key %d of the JWK set is a private key; only public keys belong there, and this one must not be used any more", i)
		}
		key, err := parseJWK(jwk)
		if err != nil {
			set.ignored = append(set.ignored, fmt.Errorf("key %d: %w", i, err))
			continue
		}
		set.usable = append(set.usable, key)
	}
	return set, nil
}

// isPrivate reports whether jwk has a private member (RFC 7518, sections 6.2.2
// and 6.3.2; RFC 8037, section 2).
func isPrivate(jwk map[string]jsontext.Value) bool {
	for _, name := range []string{"d", "p", "q", "dp", "dq", "qi", "oth", "priv"} {
		if _, ok := jwk[name]; ok {
			return true
		}
	}
	return false
}

func parseJWK(jwk map[string]jsontext.Value) (publishedKey, error) {
	var id string
	if kid, ok := jwk["kid"]; ok {
		if id, ok = text(kid); !ok || len(id) > maxKeyID {
			return publishedKey{}, errors.New("kid is not a string of a reasonable length")
		}
	}
	if err := checkUse(jwk); err != nil {
		return publishedKey{}, err
	}
	public, algorithms, err := publicKey(jwk)
	if err != nil {
		return publishedKey{}, err
	}
	if value, ok := jwk["alg"]; ok {
		name, _ := text(value)
		algorithm := jose.SignatureAlgorithm(name)
		if !slices.Contains(algorithms, algorithm) {
			return publishedKey{}, errors.New("alg is not one that is accepted with this type of key")
		}
		algorithms = []jose.SignatureAlgorithm{algorithm}
	}
	return publishedKey{id: id, algorithms: algorithms, public: public}, nil
}

// checkUse refuses keys that are meant for something else (RFC 7517, sections 4.2 and 4.3).
func checkUse(jwk map[string]jsontext.Value) error {
	if value, ok := jwk["use"]; ok {
		if use, _ := text(value); use != "sig" {
			return errors.New("use is not sig")
		}
	}
	if value, ok := jwk["key_ops"]; ok {
		var operations []string
		if json.Unmarshal(value, &operations) != nil || !slices.Contains(operations, "verify") {
			return errors.New("key_ops does not have verify")
		}
	}
	return nil
}

// publicKey returns the key and the algorithms that its type allows. go-jose
// sees only the members that make up the key: certificates in the set are
// neither needed nor trusted, and one that does not parse must not cost the key.
func publicKey(jwk map[string]jsontext.Value) (crypto.PublicKey, []jose.SignatureAlgorithm, error) {
	material := make(map[string]jsontext.Value)
	for _, name := range []string{"kty", "crv", "x", "y", "n", "e"} {
		if value, ok := jwk[name]; ok {
			material[name] = value
		}
	}
	b, err := json.Marshal(material)
	if err != nil {
		return nil, nil, fmt.Errorf("reading the key: %w", err)
	}
	var parsed jose.JSONWebKey
	if err := parsed.UnmarshalJSON(b); err != nil {
		return nil, nil, fmt.Errorf("reading the key: %w", err)
	}
	switch key := parsed.Key.(type) {
	case *rsa.PublicKey:
		return key, []jose.SignatureAlgorithm{jose.RS256, jose.PS256}, checkRSA(key)
	case *ecdsa.PublicKey:
		if key.Curve != elliptic.P256() {
			return nil, nil, errors.New("the curve is not P-256")
		}
		return key, []jose.SignatureAlgorithm{jose.ES256}, nil
	case ed25519.PublicKey:
		return key, []jose.SignatureAlgorithm{jose.EdDSA}, nil
	default:
		return nil, nil, errors.New("the type of key is not accepted")
	}
}

func checkRSA(key *rsa.PublicKey) error {
	if bits := key.N.BitLen(); bits < minRSABits || bits > maxRSABits {
		return fmt.Errorf("the RSA modulus has %d bits, not %d to %d", bits, minRSABits, maxRSABits)
	}
	if key.N.Bit(0) == 0 || key.E < 3 || key.E%2 == 0 || key.E > math.MaxInt32 {
		return errors.New("the RSA modulus or exponent is not one of a sound key")
	}
	return nil
}

// has reports whether the set has a usable key with this ID.
func (s publishedKeys) has(id string) bool {
	return slices.ContainsFunc(s.usable, func(k publishedKey) bool { return k.id == id })
}

// choose returns the one key that t can mean: of the key ID it names, or of
// the whole set if it names none. Where several fit none is chosen, so that no
// token is tried against key after key.
func (s publishedKeys) choose(t token) (crypto.PublicKey, error) {
	var fitting []crypto.PublicKey
	for _, k := range s.usable {
		if (t.keyID == "" || k.id == t.keyID) && slices.Contains(k.algorithms, t.algorithm) {
			fitting = append(fitting, k.public)
		}
	}
	switch {
	case len(fitting) == 1:
		return fitting[0], nil
	case len(fitting) == 0 && t.keyID != "" && s.has(t.keyID):
		return nil, refused(ReasonAlgorithm)
	default:
		return nil, refused(ReasonUnknownKey)
	}
}
