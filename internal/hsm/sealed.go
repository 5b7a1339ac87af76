//go:build cgo

package hsm

import (
	"context"
	"crypto/rsa"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

var (
	_ orgkey.SealedKeystore = (*Token)(nil)
	_ orgkey.SealableKey    = (*key)(nil)
)

// checkSealed reports orgkey.ErrSealedUnavailable if the module lacks the mechanism.
func (t *Token) checkSealed() error {
	if !t.courier.wrap.rfc5649 {
		return fmt.Errorf("%w: its PKCS#11 module has no AES key wrap with padding (RFC 5649)", orgkey.ErrSealedUnavailable)
	}
	return nil
}

// CreateSealed implements orgkey.SealedKeystore. The key is a pair of session
// objects, as Create's is, and ends with this process.
func (t *Token) CreateSealed(ctx context.Context, name string) (orgkey.SealableKey, error) {
	if err := t.checkSealed(); err != nil {
		return nil, err
	}
	return t.create(ctx, name)
}

// DestroySealed implements orgkey.SealedKeystore. What a dead process made has
// gone with it, so there is something to remove only if this one made it.
func (t *Token) DestroySealed(ctx context.Context, name string) error {
	err := t.seal(ctx, func(_ *life, h pkcs11.SessionHandle) error {
		found, err := find(t.lib, h, 10, pkcs11.NewAttribute(pkcs11.CKA_ID, name))
		for _, object := range found {
			err = errors.Join(err, t.lib.DestroyObject(h, object))
		}
		return errors.Join(err, checkAbsent(t.lib, h, name))
	}, func() {})
	if err != nil {
		return fault("removing a key that was to be sealed", err)
	}
	return nil
}

// Seal implements orgkey.SealableKey. The AES key is one that the token makes
// for this call and hands to nobody but the recipient; the wrapping key of
// Export, which this process knows, has no part in it.
func (k *key) Seal(ctx context.Context, recipient *rsa.PublicKey) (envelope.SealedKey, error) {
	if err := orgkey.CheckRecipient(recipient); err != nil {
		return envelope.SealedKey{}, err
	}
	if err := k.token.checkSealed(); err != nil {
		return envelope.SealedKey{}, err
	}
	var value []byte
	err := k.use(ctx, func(h pkcs11.SessionHandle) (err error) {
		value, err = k.token.courier.sealTo(k.token.lib, h, recipient, k.pair.private)
		return err
	}, func() {})
	if err != nil {
		return envelope.SealedKey{}, fault("sealing the key to its recipient", err)
	}
	return envelope.SealedKey{Alg: k.token.courier.oaep.sealed, Value: value}, nil
}

func (c *courier) sealTo(lib *module, h pkcs11.SessionHandle, recipient *rsa.PublicKey, private pkcs11.ObjectHandle) (_ []byte, err error) {
	delivery, err := generateWrappingKey(lib, h)
	if err != nil {
		return nil, err
	}
	defer func() {
		if destroyed := lib.DestroyObject(h, delivery); destroyed != nil {
			err = errors.Join(err, fmt.Errorf("destroying the delivery's key: %w", destroyed))
		}
	}()
	transported, err := c.oaep.transport(lib, h, recipient, delivery)
	if err != nil {
		return nil, fmt.Errorf("wrapping by %s: %w", c.oaep.name, err)
	}
	if len(transported) != recipient.Size() {
		return nil, fmt.Errorf("wrapping by %s: %d bytes came of a recipient with %d", c.oaep.name, len(transported), recipient.Size())
	}
	wrapped, err := lib.wrap(h, c.wrap.mechanism, nil, delivery, private)
	if err != nil {
		return nil, fmt.Errorf("wrapping by %s: %w", c.wrap.name, err)
	}
	return append(transported, wrapped...), nil
}
