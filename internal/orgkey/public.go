package orgkey

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"

	"github.com/orgkeys/orgkeys/internal/envelope"
)

// Algorithm is that of every key, as events and answers name it.
const Algorithm = "rsa-2048"

// Bits is the modulus length of every key.
const Bits = 2048

// Public is an organization's public key. What it can do depends on its
// algorithm, and only this file knows how: enrollment, nodes and the API use
// the methods.
type Public struct{ key *rsa.PublicKey }

// NewPublic is the public key that a back end reported.
func NewPublic(key *rsa.PublicKey) Public { return Public{key} }

// ParsePublic reads an opened public key (PKIX DER).
func ParsePublic(der []byte) (Public, error) {
	parsed, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return Public{}, fmt.Errorf("%w: %w", ErrSealBroken, err)
	}
	key, ok := parsed.(*rsa.PublicKey)
	if !ok {
		return Public{}, fmt.Errorf("%w: not an RSA key", ErrSealBroken)
	}
	return Public{key}, nil
}

// NewDecoy returns what has the form of a public key. Verifying with it takes as long as with
// any other, and the answer means nothing: its modulus is an odd number by chance, which need not
// be hard to factor. To look for primes would take a tenth of a second of every start.
func NewDecoy() Public {
	n := make([]byte, Bits/8)
	rand.Read(n)
	n[0] |= 0x80 // as long as any other
	n[len(n)-1] |= 1
	return Public{&rsa.PublicKey{N: new(big.Int).SetBytes(n), E: 65537}}
}

// DER is the key as PKIX SubjectPublicKeyInfo.
func (p Public) DER() ([]byte, error) { return x509.MarshalPKIXPublicKey(p.key) }

// Fingerprint is the key's RFC 7638 thumbprint: base64url, unpadded, of SHA-256
// over the JWK's required members in lexicographic order.
func (p Public) Fingerprint() string {
	b64 := base64.RawURLEncoding.EncodeToString
	e := b64(big.NewInt(int64(p.key.E)).Bytes())
	sum := sha256.Sum256([]byte(`{"e":"` + e + `","kty":"RSA","n":"` + b64(p.key.N.Bytes()) + `"}`))
	return b64(sum[:])
}

// Verifies reports whether the key's private half made the signature of text,
// RSASSA-PKCS1-v1_5 (RFC 8017, 8.2) with SHA-256.
func (p Public) Verifies(text, signature []byte) bool {
	digest := sha256.Sum256(text)
	return rsa.VerifyPKCS1v15(p.key, crypto.SHA256, digest[:], signature) == nil
}

// Envelope encrypts a secret to the key, in the form of package envelope.
func (p Public) Envelope(secret []byte) ([]byte, error) { return envelope.Seal(p.key, secret) }

// CheckPrivate reports an error unless der is a valid private key (PKCS#1,
// RFC 8017, A.1.2) whose public half is p.
func (p Public) CheckPrivate(der []byte) error {
	private, err := x509.ParsePKCS1PrivateKey(der)
	if err != nil {
		return fmt.Errorf("checking the exported key: %w", err)
	}
	defer wipe(private)
	if !private.PublicKey.Equal(p.key) {
		return errors.New("the exported key is not the private half of the public key")
	}
	return nil
}

// wipe clears the numbers of a key. Copies inside crypto/rsa are out of reach.
func wipe(key *rsa.PrivateKey) {
	numbers := []*big.Int{key.D, key.Precomputed.Dp, key.Precomputed.Dq, key.Precomputed.Qinv}
	for _, n := range append(numbers, key.Primes...) {
		if n != nil {
			clear(n.Bits())
		}
	}
}
