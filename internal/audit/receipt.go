package audit

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"regexp"
	"strconv"
)

// ErrReceipt: a receipt is not the key's signature of the leaf.
var ErrReceipt = errors.New("receipt does not verify")

// ReceiptKey is the Ed25519 public key behind a sink's receipts of one version.
type ReceiptKey struct {
	Sink    string `json:"sink"`
	Version int    `json:"version"`
	Public  []byte `json:"public"`
}

// Receipt is a sink's signature of a leaf.
type Receipt struct {
	Index   int64
	Receipt []byte
}

// ReceiptKeys are the public keys behind a sink's receipts, by version. A
// receipt is in Transit's form, "vault:vVERSION:" and base64 of the Ed25519
// signature (RFC 8032, pure) of the leaf.
type ReceiptKeys map[int]ed25519.PublicKey

// Verify reports an error that wraps ErrReceipt unless receipt is the signature of
// leaf under the key version that it names. It works offline.
func (keys ReceiptKeys) Verify(leaf, receipt []byte) error {
	version, signature, err := ParseReceipt(receipt)
	if err != nil {
		return err
	}
	public, ok := keys[version]
	if !ok {
		return fmt.Errorf("%w: no key of version %d is known", ErrReceipt, version)
	}
	if len(public) != ed25519.PublicKeySize || !ed25519.Verify(public, leaf, signature) {
		return ErrReceipt
	}
	return nil
}

// Replace refuses to replace a sink's known keys if a version would get a different
// key, under which no earlier receipt verifies.
func (keys ReceiptKeys) Replace(sink string, known []ReceiptKey) error {
	for _, k := range known {
		if now, there := keys[k.Version]; k.Sink == sink && there && !bytes.Equal(now, k.Public) {
			return fmt.Errorf("version %d of the receipt key of sink %s is a different key than before: it was deleted and made again. Restore Vault from its backup; without one, see docs/operations.md, Backup and restore", k.Version, sink)
		}
	}
	return nil
}

var receiptForm = regexp.MustCompile(`^vault:v([1-9][0-9]{0,8}):([A-Za-z0-9+/]+={0,2})$`)

// ParseReceipt returns the version of the key that a receipt names, and the
// signature, unverified, or an error that wraps ErrReceipt.
func ParseReceipt(receipt []byte) (version int, signature []byte, err error) {
	m := receiptForm.FindSubmatch(receipt)
	if m == nil {
		return 0, nil, fmt.Errorf("%w: it is not of the form vault:v1:base64", ErrReceipt)
	}
	if version, err = strconv.Atoi(string(m[1])); err != nil {
		return 0, nil, fmt.Errorf("%w: %w", ErrReceipt, err)
	}
	signature, err = base64.StdEncoding.Strict().DecodeString(string(m[2]))
	if err != nil || len(signature) != ed25519.SignatureSize {
		return 0, nil, fmt.Errorf("%w: it holds no Ed25519 signature", ErrReceipt)
	}
	return version, signature, nil
}
