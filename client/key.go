package client

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"

	"github.com/orgkeys/orgkeys/internal/envelope"
)

// PrivateKey is an RSA private key that signs (RSASSA-PKCS1-v1_5, SHA-256) and
// decrypts (RSAES-OAEP, SHA-256). *rsa.PrivateKey is one; a key in a device can be another.
// Like that one, it reports rsa.ErrDecryption for what it does not open; any other error is
// taken for a failure of the device, ErrKeyFailed.
type PrivateKey interface {
	crypto.Signer
	crypto.Decrypter
}

// ErrKey means that a text is not an RSA private key in PEM.
var ErrKey = errors.New("not an RSA private key in PEM")

// ErrKeyFailed means that a private key did not sign or decrypt: what has it, such as a
// TPM, is not there or fails. Asking again may help.
var ErrKeyFailed = envelope.ErrKeyFailed

// ParsePrivateKey reads a private key in PEM, PKCS#1 (as the server hands keys
// out) or PKCS#8. The caller clears text.
func ParsePrivateKey(text []byte) (PrivateKey, error) {
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, ErrKey
	}
	defer clear(block.Bytes)
	switch block.Type {
	case "RSA PRIVATE KEY":
		key, err := x509.ParsePKCS1PrivateKey(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrKey, err)
		}
		return key, nil
	case "PRIVATE KEY":
		parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrKey, err)
		}
		if key, ok := parsed.(*rsa.PrivateKey); ok {
			return key, nil
		}
	}
	return nil, ErrKey
}

// Fingerprint is a public key's RFC 7638 thumbprint, as the server shows it: base64url
// of SHA-256 over the JWK's required members in lexicographic order. It is empty for
// what is not an RSA key.
func Fingerprint(public crypto.PublicKey) string {
	key, ok := public.(*rsa.PublicKey)
	if !ok {
		return ""
	}
	b64 := base64.RawURLEncoding.EncodeToString
	sum := sha256.Sum256([]byte(`{"e":"` + b64(big.NewInt(int64(key.E)).Bytes()) + `","kty":"RSA","n":"` + b64(key.N.Bytes()) + `"}`))
	return b64(sum[:])
}

// sign is RSASSA-PKCS1-v1_5 with SHA-256 over a line (RFC 8017, 8.2), in base64.
func sign(key crypto.Signer, line string) (string, error) {
	digest := sha256.Sum256([]byte(line))
	signature, err := key.Sign(nil, digest[:], crypto.SHA256)
	if err != nil {
		return "", fmt.Errorf("signing: %w: %w", ErrKeyFailed, err)
	}
	return base64.StdEncoding.EncodeToString(signature), nil
}
