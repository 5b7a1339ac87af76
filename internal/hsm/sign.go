//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/asn1"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/orgkeys/orgkeys/internal/audit"
)

// The key that signs checkpoints of the audit log: an Ed25519 pair made in the
// token, whose private half never leaves it.
const checkpointKeyLabel = "orgkeys-checkpoint-v1"

// What PKCS#11 3.0 numbers and the binding does not name.
const (
	ckkECEdwards          = 0x40
	ckmECEdwardsKeyPairGn = 0x1055
	ckmEdDSA              = 0x1057
)

var _ audit.Signer = (*Token)(nil)

// SignCheckpoint implements audit.Signer. The token makes the key when it is
// first asked; one that has no Ed25519 is ErrNoEd25519.
func (t *Token) SignCheckpoint(ctx context.Context, text []byte) (signature []byte, public ed25519.PublicKey, err error) {
	err = t.seal(ctx, func(_ *life, h pkcs11.SessionHandle) error {
		s, p, err := t.signCheckpoint(h, text)
		signature, public = s, p
		return err
	})
	if err != nil {
		return nil, nil, sealFault("signing a checkpoint", err)
	}
	return signature, public, nil
}

func (t *Token) signCheckpoint(h pkcs11.SessionHandle, text []byte) ([]byte, ed25519.PublicKey, error) {
	private, err := findCheckpointKey(t.lib, h, pkcs11.CKO_PRIVATE_KEY)
	if err != nil {
		return nil, nil, err
	}
	if len(private) == 0 {
		if err := createCheckpointKey(t.lib, h); err != nil {
			return nil, nil, err
		}
		t.cfg.Log.Info("made the checkpoint key", "label", checkpointKeyLabel)
		if private, err = findCheckpointKey(t.lib, h, pkcs11.CKO_PRIVATE_KEY); err != nil {
			return nil, nil, err
		}
	}
	if len(private) != 1 {
		return nil, nil, fmt.Errorf("%d private keys have the label %s; delete those that signed nothing", len(private), checkpointKeyLabel)
	}
	public, err := t.checkpointKey(h)
	if err != nil {
		return nil, nil, err
	}
	if err := t.lib.SignInit(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(ckmEdDSA, nil)}, private[0]); err != nil {
		return nil, nil, fmt.Errorf("starting a signature: %w", err)
	}
	signature, err := t.lib.Sign(h, text)
	if err != nil {
		return nil, nil, fmt.Errorf("signing: %w", err)
	}
	if !ed25519.Verify(public, text, signature) {
		return nil, nil, fmt.Errorf("the token's signature does not verify under the public key labelled %s", checkpointKeyLabel)
	}
	return signature, public, nil
}

// findCheckpointKey returns the objects of class that have the key's label, at most two.
func findCheckpointKey(lib *module, h pkcs11.SessionHandle, class uint) ([]pkcs11.ObjectHandle, error) {
	return find(lib, h, 2,
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, class),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, checkpointKeyLabel))
}

// checkpointKey reads the public half: an octet string of 32 bytes, which some
// modules give without its DER header.
func (t *Token) checkpointKey(h pkcs11.SessionHandle) (ed25519.PublicKey, error) {
	found, err := findCheckpointKey(t.lib, h, pkcs11.CKO_PUBLIC_KEY)
	if err != nil {
		return nil, err
	}
	if len(found) != 1 {
		return nil, fmt.Errorf("%d public keys have the label %s, where there is one private key: delete those that are not its other half", len(found), checkpointKeyLabel)
	}
	attributes, err := t.lib.GetAttributeValue(h, found[0], []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, nil)})
	if err != nil {
		return nil, fmt.Errorf("reading the checkpoint key: %w", err)
	}
	point := attributes[0].Value
	if len(point) == ed25519.PublicKeySize {
		return bytes.Clone(point), nil
	}
	var raw []byte
	if rest, err := asn1.Unmarshal(point, &raw); err != nil || len(rest) > 0 || len(raw) != ed25519.PublicKeySize {
		return nil, fmt.Errorf("the checkpoint key has %d bytes and is not an Ed25519 key", len(point))
	}
	return raw, nil
}

// createCheckpointKey has the token make the pair. Modules differ in how they
// want the curve named: by its OID (RFC 8410, as PKCS#11 3.1 has it), or by
// its name, as in 3.0. SoftHSM stores the public half first, so a crash leaves
// one that nothing can be signed for; it goes.
func createCheckpointKey(lib *module, h pkcs11.SessionHandle) error {
	halves, err := findCheckpointKey(lib, h, pkcs11.CKO_PUBLIC_KEY)
	if err != nil {
		return err
	}
	for _, half := range halves {
		if err := lib.DestroyObject(h, half); err != nil {
			return fmt.Errorf("removing the public half of a checkpoint key that has no private one: %w", err)
		}
	}
	named, err := asn1.MarshalWithParams("edwards25519", "printable")
	if err != nil {
		return err
	}
	oid, err := asn1.Marshal(asn1.ObjectIdentifier{1, 3, 101, 112})
	if err != nil {
		return err
	}
	var refused []error
	for _, curve := range [][]byte{oid, named} {
		if err = generateCheckpointKey(lib, h, curve); err == nil {
			return nil
		}
		refused = append(refused, err)
	}
	if is(err, pkcs11.CKR_MECHANISM_INVALID, pkcs11.CKR_MECHANISM_PARAM_INVALID, pkcs11.CKR_FUNCTION_NOT_SUPPORTED,
		pkcs11.CKR_ATTRIBUTE_VALUE_INVALID, pkcs11.CKR_TEMPLATE_INCONSISTENT, pkcs11.CKR_CURVE_NOT_SUPPORTED, pkcs11.CKR_DOMAIN_PARAMS_INVALID) {
		return fmt.Errorf("%w: %v", ErrNoEd25519, errors.Join(refused...))
	}
	return fmt.Errorf("making the checkpoint key: %w", errors.Join(refused...))
}

func generateCheckpointKey(lib *module, h pkcs11.SessionHandle, curve []byte) error {
	_, _, err := lib.GenerateKeyPair(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(ckmECEdwardsKeyPairGn, nil)},
		[]*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, checkpointKeyLabel),
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
			pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, ckkECEdwards),
			pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, curve),
			pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true),
		},
		[]*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, checkpointKeyLabel),
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
			pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
			pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
			pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
			pkcs11.NewAttribute(pkcs11.CKA_SIGN, true),
		})
	return err
}
