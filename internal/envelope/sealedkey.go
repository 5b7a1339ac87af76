package envelope

import (
	"crypto"
	"crypto/rsa"
	_ "crypto/sha1" // for RSA_AES_KEY_WRAP_SHA_1
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"

	kwp "github.com/tink-crypto/tink-go/v2/kwp/subtle"
)

// The algorithms of sealed keys, as Google Cloud KMS and AWS KMS name them.
const (
	WrapSHA256 = "RSA_AES_KEY_WRAP_SHA_256"
	WrapSHA1   = "RSA_AES_KEY_WRAP_SHA_1" // of modules that have no other, as SoftHSM 2.6.1
)

// maxSealedKey is the longest sealed key, in bytes: an RSA-4096 private key
// under an RSA-4096 recipient has about 2.9 KiB.
const maxSealedKey = 4 << 10

// SealedKey is a private key (PKCS#8 DER, RFC 5958) wrapped to a recipient: the
// bytes of PKCS#11's CKM_RSA_AES_KEY_WRAP, an AES-256 key under RSAES-OAEP
// (RFC 8017, 7.1; empty label, MGF1 with the same hash) followed by the private
// key under AES key wrap with padding (RFC 5649).
type SealedKey struct {
	Alg   string `json:"alg"` // WrapSHA256 or WrapSHA1
	Value []byte `json:"value"`
}

// ErrAlg: the algorithm of a sealed key is not known.
var ErrAlg = errors.New("the algorithm of the sealed key is not known")

// Hash is the hash of the algorithm's OAEP, or ErrAlg.
func (k SealedKey) Hash() (crypto.Hash, error) {
	switch k.Alg {
	case WrapSHA256:
		return crypto.SHA256, nil
	case WrapSHA1:
		return crypto.SHA1, nil
	default:
		return 0, ErrAlg
	}
}

// Open returns the PKCS#8 DER of the private key; the caller clears it.
// recipient's Decrypt is asked for OAEP with the algorithm's hash. A wrong
// recipient and changed bytes are the same error, ErrNotAuthentic; a recipient that fails
// is ErrKeyFailed, as with Open. That the private key is the expected one is for the caller
// to check.
func (k SealedKey) Open(recipient crypto.Decrypter) ([]byte, error) {
	hash, err := k.Hash()
	if err != nil {
		return nil, err
	}
	public, ok := recipient.Public().(*rsa.PublicKey)
	if !ok {
		return nil, errors.New("the recipient is not an RSA key")
	}
	if len(k.Value) > maxSealedKey {
		return nil, ErrTooLong
	}
	if len(k.Value) <= public.Size() {
		return nil, fmt.Errorf("%w: a sealed key of %d bytes for a recipient of %d bits", ErrFormat, len(k.Value), public.N.BitLen())
	}
	key, err := decrypt(recipient, k.Value[:public.Size()], hash)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	if len(key) != keySize {
		return nil, ErrNotAuthentic
	}
	wrap, err := kwp.NewKWP(key)
	if err != nil {
		return nil, fmt.Errorf("preparing AES key wrap: %w", err)
	}
	private, err := wrap.Unwrap(k.Value[public.Size():])
	if err != nil {
		return nil, ErrNotAuthentic
	}
	return private, nil
}

// Recipient identifies a recipient's public key: lower-case hex of SHA-256 over
// its SubjectPublicKeyInfo, encoded anew as DER (RFC 5280, 4.1.2.7).
func Recipient(public *rsa.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return "", fmt.Errorf("encoding the recipient: %w", err)
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}
