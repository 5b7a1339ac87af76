package authn

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

const (
	minRSABits = 2048
	maxRSABits = 4096 // beyond it one verification costs too much; go-jose has the same limit
	maxKeys    = 1024 // in a set
)

// ed25519Algorithm is EdDSA with Ed25519 by its fully specified name (RFC 9864, section 2.2).
const ed25519Algorithm jose.SignatureAlgorithm = "Ed25519"

// The algorithms by type of key. They are read only.
var (
	rsaAlgorithms = []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512}
	ecAlgorithms  = []jose.SignatureAlgorithm{jose.ES256, jose.ES384, jose.ES512} // each with a curve of its own
	edAlgorithms  = []jose.SignatureAlgorithm{jose.EdDSA, ed25519Algorithm}       // two names of one
)

// publishedKey is a key of the issuer's set that may verify tokens.
type publishedKey struct {
	id         string // empty if the set gives it none
	algorithms []jose.SignatureAlgorithm
	public     crypto.PublicKey // *rsa.PublicKey, *ecdsa.PublicKey, or ed25519.PublicKey
}

// publishedKeys is one version of the issuer's set.
type publishedKeys struct {
	usable  []publishedKey
	ignored []ignoredKey
}

// ignoredKey is a key of the issuer's set that is not usable.
type ignoredKey struct {
	place int    // in the set
	id    string // empty if it has none that can be read
	why   error
}

func (k ignoredKey) Error() string {
	if k.id == "" {
		return fmt.Sprintf("key %d: %v", k.place, k.why)
	}
	return fmt.Sprintf("key %d, %q: %v", k.place, k.id, k.why)
}

// parseJWKS reads a JWK set (RFC 7517, section 5). Keys that are not usable
// here are ignored, as the standard asks for: symmetric ones, which could only
// verify what they can also forge, are among them. A set that holds a private
// key is refused as a whole: whoever can read the set can forge tokens.
func parseJWKS(b []byte) (publishedKeys, error) {
	var document struct {
		Keys []map[string]jsontext.Value `json:"keys"`
	}
	if err := json.Unmarshal(b, &document); err != nil || document.Keys == nil {
		return publishedKeys{}, fmt.Errorf("not a JWK set, which is a JSON object with a list \"keys\" and no name twice: %s", describe(b))
	}
	if len(document.Keys) > maxKeys {
		return publishedKeys{}, fmt.Errorf("the JWK set has %d keys, and at most %d are accepted", len(document.Keys), maxKeys)
	}
	var set publishedKeys
	for i, jwk := range document.Keys {
		// Null is nothing: some providers write every member that they know.
		maps.DeleteFunc(jwk, func(_ string, value jsontext.Value) bool { return value.Kind() == 'n' })
		if isPrivate(jwk) {
			return publishedKeys{}, fmt.Errorf("key %d of the JWK set is a private key; only public keys belong there, and this one must not be used any more", i)
		}
		key, err := parseJWK(jwk)
		if err != nil {
			id, _ := text(jwk["kid"])
			set.ignored = append(set.ignored, ignoredKey{i, id, err})
			continue
		}
		set.usable = append(set.usable, key)
	}
	return set, nil
}

// describe says what b, which is not a JWK set, may be instead.
func describe(b []byte) string {
	var object struct {
		URI    string         `json:"jwks_uri"`
		Type   string         `json:"kty"`
		Errors jsontext.Value `json:"error"`
	}
	start := bytes.TrimSpace(b)
	switch err := json.Unmarshal(b, &object); {
	case len(start) == 0:
		return "it is empty"
	case start[0] == '<':
		return "it is a page of HTML or XML, perhaps of a login or a proxy"
	case bytes.HasPrefix(start, []byte("-----BEGIN")):
		return "it is PEM, which has to be converted to JWK first"
	case bytes.HasPrefix(start, []byte("\xef\xbb\xbf")):
		return "it begins with a byte order mark, which JSON has not"
	case err != nil:
		return "it is no such JSON object"
	case object.URI != "":
		return fmt.Sprintf("it is a provider's metadata, which says that the keys are at %q; give that, or leave ORGKEYS_JWKS out to have them found through the issuer", object.URI)
	case object.Type != "":
		return `it is a single key, which belongs into {"keys":[…]}`
	case object.Errors != nil:
		return "it is an error message of the provider's"
	}
	return `it has no "keys"`
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
			return publishedKey{}, errors.New("kid is not a string, or is too long")
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
		if !slices.Contains(edAlgorithms, algorithm) {
			algorithms = []jose.SignatureAlgorithm{algorithm}
		}
	}
	return publishedKey{id: id, algorithms: algorithms, public: public}, nil
}

// checkUse refuses keys that are meant for something else (RFC 7517, sections
// 4.2 and 4.3). SPIFFE's bundles call those of JWT-SVIDs jwt-svid (SPIFFE Trust Domain and Bundle, section 4.2.2).
func checkUse(jwk map[string]jsontext.Value) error {
	if value, ok := jwk["use"]; ok {
		if use, _ := text(value); use != "sig" && use != "jwt-svid" {
			return errors.New("use is neither sig nor jwt-svid")
		}
	}
	if value, ok := jwk["key_ops"]; ok {
		var operations []string
		if json.Unmarshal(value, &operations) != nil || !slices.Contains(operations, "verify") {
			return errors.New("key_ops does not contain verify")
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
		return key, rsaAlgorithms, checkRSA(key)
	case *ecdsa.PublicKey:
		algorithm, err := ecAlgorithm(key)
		return key, []jose.SignatureAlgorithm{algorithm}, err
	case ed25519.PublicKey:
		return key, edAlgorithms, nil
	default:
		return nil, nil, errors.New("the type of key is not accepted")
	}
}

// ecAlgorithm is the one algorithm of a curve (RFC 7518, section 3.4).
func ecAlgorithm(key *ecdsa.PublicKey) (jose.SignatureAlgorithm, error) {
	switch key.Curve {
	case elliptic.P256():
		return jose.ES256, nil
	case elliptic.P384():
		return jose.ES384, nil
	case elliptic.P521():
		return jose.ES512, nil
	}
	return "", errors.New("the curve is none of P-256, P-384 and P-521")
}

func checkRSA(key *rsa.PublicKey) error {
	if bits := key.N.BitLen(); bits < minRSABits || bits > maxRSABits {
		return fmt.Errorf("the RSA modulus has %d bits, not %d to %d", bits, minRSABits, maxRSABits)
	}
	if key.N.Bit(0) == 0 || key.E < 3 || key.E%2 == 0 || key.E > math.MaxInt32 {
		return errors.New("the RSA modulus or exponent is not that of a secure key")
	}
	return nil
}

// has reports whether the set has a usable key with this ID.
func (s publishedKeys) has(id string) bool {
	return slices.ContainsFunc(s.usable, func(k publishedKey) bool { return k.id == id })
}

// choose returns the one key that t can mean: of the key ID it names, or of
// the whole set if it names none. Where several fit none is chosen, so that no
// token is tried against key after key; one key that is listed twice is one.
func (s publishedKeys) choose(t token) (crypto.PublicKey, error) {
	var fitting []publishedKey
	for _, k := range s.usable {
		if (t.keyID == "" || k.id == t.keyID) && slices.Contains(k.algorithms, t.algorithm) &&
			!slices.ContainsFunc(fitting, k.sameMaterial) {
			fitting = append(fitting, k)
		}
	}
	switch {
	case len(fitting) == 1:
		return fitting[0].public, nil
	case len(fitting) == 0 && t.keyID != "" && s.has(t.keyID):
		return nil, refused(ReasonAlgorithm)
	default:
		return nil, refused(ReasonUnknownKey)
	}
}

// verify checks the signature of t with the key that it means.
func (s publishedKeys) verify(t token) error {
	key, err := s.choose(t)
	if err != nil {
		return err
	}
	return t.verify(key)
}

func (k publishedKey) sameMaterial(other publishedKey) bool {
	public, ok := k.public.(interface{ Equal(crypto.PublicKey) bool })
	return ok && public.Equal(other.public)
}

func (k publishedKey) same(other publishedKey) bool {
	return k.id == other.id && slices.Equal(k.algorithms, other.algorithms) && k.sameMaterial(other)
}

// without returns the keys of s that other does not have.
func (s publishedKeys) without(other publishedKeys) []publishedKey {
	return slices.DeleteFunc(slices.Clone(s.usable), func(k publishedKey) bool {
		return slices.ContainsFunc(other.usable, k.same)
	})
}
