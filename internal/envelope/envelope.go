// Package envelope is the format in which a boot secret travels to a bridge
// node: sealed to the public key that signed the node's request, and opened
// there by the private half, with this package or with openssl and jq.
//
// An envelope is a JSON object of four base64 strings (RFC 4648, section 4):
//
//	key  a fresh 256-bit key K under RSAES-OAEP (RFC 8017, 7.1) with SHA-256, MGF1-SHA-256 and an empty label
//	iv   16 random bytes
//	ct   the secret under AES-256 in counter mode (SP 800-38A, 6.5) with K, iv being the first counter block
//	mac  HMAC-SHA-256 over iv followed by ct, with K
//
// Deployed nodes speak this, so one key for cipher and MAC is part of the
// format. It does no harm: AES and HMAC-SHA-256 share no structure, and K is
// used once.
//
// The MAC shows that an envelope is whole. It does not show who made it: anybody
// who has the public key can make one. That comes from TLS.
package envelope

import (
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/go-json-experiment/json"
)

// MaxSecret is the longest secret, in bytes.
const MaxSecret = 64 << 10

// maxText is the longest envelope: four thirds of the secret, and the rest of
// it with a key of up to 8192 bits.
const maxText = MaxSecret/3*4 + 4096

const (
	keySize = 32 // AES-256
	ivSize  = aes.BlockSize
)

var (
	// ErrTooLong: the secret, or the envelope, is longer than the format allows.
	ErrTooLong = errors.New("longer than the format allows")
	// ErrFormat: not an envelope.
	ErrFormat = errors.New("not an envelope")
	// ErrNotAuthentic: not made for this key, or changed on the way.
	ErrNotAuthentic = errors.New("envelope was made for another key, or changed on the way")
	// ErrKeyFailed: nothing is known of the envelope, since the private key did not do
	// what it was asked for. What has it, such as a TPM, is not there, or fails.
	ErrKeyFailed = errors.New("the private key cannot be used")
)

type fields struct {
	Key []byte `json:"key"`
	IV  []byte `json:"iv"`
	CT  []byte `json:"ct"`
	MAC []byte `json:"mac"`
}

// Seal returns the JSON text of an envelope that only the holder of the
// private half of recipient can open.
func Seal(recipient *rsa.PublicKey, secret []byte) ([]byte, error) {
	if len(secret) > MaxSecret {
		return nil, ErrTooLong
	}
	key := make([]byte, keySize)
	defer clear(key)
	rand.Read(key) // never fails, crypto/rand
	f := fields{IV: make([]byte, ivSize), CT: make([]byte, len(secret))}
	rand.Read(f.IV)
	var err error
	if f.Key, err = rsa.EncryptOAEP(sha256.New(), rand.Reader, recipient, key, nil); err != nil {
		return nil, fmt.Errorf("wrapping the envelope's key: %w", err)
	}
	if err := applyCTR(key, f.IV, f.CT, secret); err != nil {
		return nil, err
	}
	f.MAC = mac(key, f.IV, f.CT)
	text, err := json.Marshal(f)
	if err != nil {
		return nil, fmt.Errorf("encoding an envelope: %w", err)
	}
	return text, nil
}

// Open returns the secret. The caller clears it. The recipient is an RSA key, whose Decrypt
// reports rsa.ErrDecryption for what does not open, and another error only for a failure of its
// own (ErrKeyFailed). A wrong key and a changed envelope are the same error, and nothing is
// decrypted before the MAC is right.
func Open(recipient crypto.Decrypter, text []byte) ([]byte, error) {
	if len(text) > maxText {
		return nil, ErrTooLong
	}
	var f fields
	if err := json.Unmarshal(text, &f); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	public, ok := recipient.Public().(*rsa.PublicKey)
	if !ok {
		return nil, ErrNotAuthentic
	}
	if err := f.check(public.Size()); err != nil {
		return nil, err
	}
	key, err := decrypt(recipient, f.Key, crypto.SHA256)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	if len(key) != keySize || !hmac.Equal(f.MAC, mac(key, f.IV, f.CT)) {
		return nil, ErrNotAuthentic
	}
	secret := make([]byte, len(f.CT))
	if err := applyCTR(key, f.IV, secret, f.CT); err != nil {
		return nil, err
	}
	return secret, nil
}

// decrypt asks recipient for RSAES-OAEP. Whatever it reports but rsa.ErrDecryption is
// about itself, and not about the ciphertext.
func decrypt(recipient crypto.Decrypter, ciphertext []byte, hash crypto.Hash) ([]byte, error) {
	key, err := recipient.Decrypt(nil, ciphertext, &rsa.OAEPOptions{Hash: hash})
	switch {
	case errors.Is(err, rsa.ErrDecryption):
		return nil, fmt.Errorf("%w: %w", ErrNotAuthentic, err)
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrKeyFailed, err)
	}
	return key, nil
}

func (f fields) check(modulus int) error {
	switch {
	case len(f.Key) != modulus:
		return fmt.Errorf("%w: key of %d bytes, want %d", ErrFormat, len(f.Key), modulus)
	case len(f.IV) != ivSize:
		return fmt.Errorf("%w: iv of %d bytes", ErrFormat, len(f.IV))
	case len(f.MAC) != sha256.Size:
		return fmt.Errorf("%w: mac of %d bytes", ErrFormat, len(f.MAC))
	case len(f.CT) > MaxSecret:
		return ErrTooLong
	}
	return nil
}

func applyCTR(key, iv, dst, src []byte) error {
	block, err := aes.NewCipher(key)
	if err != nil {
		return fmt.Errorf("preparing AES: %w", err)
	}
	cipher.NewCTR(block, iv).XORKeyStream(dst, src)
	return nil
}

func mac(key, iv, ct []byte) []byte {
	h := hmac.New(sha256.New, key)
	h.Write(iv)
	h.Write(ct)
	return h.Sum(nil)
}
