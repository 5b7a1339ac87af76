//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/orgkeys/orgkeys/internal/audit"
)

// The key that signs checkpoints of the audit log: an Ed25519 pair made in the
// token, whose private half never leaves it. Like the sealing key it is agreed
// on by its CKA_ID.
const (
	purposeCheckpoint  = "checkpoint"
	checkpointKeyLabel = "orgkeys-checkpoint-v1"
)

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
		s, p, err := t.signCheckpoint(ctx, h, text)
		signature, public = s, p
		return err
	}, func() {})
	if err != nil {
		return nil, nil, sealFault("signing a checkpoint", err)
	}
	return signature, public, nil
}

func (t *Token) signCheckpoint(ctx context.Context, h pkcs11.SessionHandle, text []byte) ([]byte, ed25519.PublicKey, error) {
	id, err := t.checkpointID(ctx, h)
	if err != nil {
		return nil, nil, err
	}
	private, err := t.checkpointHalf(h, pkcs11.CKO_PRIVATE_KEY, id)
	if err != nil {
		return nil, nil, err
	}
	half, err := t.checkpointHalf(h, pkcs11.CKO_PUBLIC_KEY, id)
	if err != nil {
		return nil, nil, err
	}
	public, err := readEd25519(t.lib, h, half)
	if err != nil {
		return nil, nil, err
	}
	signature, err := signEd25519(t.lib, h, private, text)
	if err != nil {
		return nil, nil, err
	}
	if !ed25519.Verify(public, text, signature) {
		return nil, nil, fmt.Errorf("the token's signature does not verify under the public key with CKA_ID %x", id)
	}
	return signature, public, nil
}

// checkpointID returns the CKA_ID of the key in use, and has it made if there is none.
func (t *Token) checkpointID(ctx context.Context, h pkcs11.SessionHandle) (_ []byte, err error) {
	t.signing.Lock()
	defer t.signing.Unlock()
	if t.signID != nil {
		return t.signID, nil
	}
	id, err := t.cfg.Register.ChosenKey(ctx, purposeCheckpoint)
	if err == nil && id == nil {
		id, err = t.chooseCheckpointKey(ctx, h)
	}
	if err == nil {
		err = t.awaitCheckpointKey(h, id)
	}
	if err == nil {
		err = t.removeUnchosen(ctx, h, purposeCheckpoint, id)
	}
	if err != nil {
		return nil, err
	}
	t.signID = id
	return id, nil
}

// awaitCheckpointKey waits until both halves are seen here: another process may
// have made them a moment ago.
func (t *Token) awaitCheckpointKey(h pkcs11.SessionHandle, id []byte) (err error) {
	for range appearTries {
		_, private := t.checkpointHalf(h, pkcs11.CKO_PRIVATE_KEY, id)
		_, public := t.checkpointHalf(h, pkcs11.CKO_PUBLIC_KEY, id)
		if err = errors.Join(private, public); !errors.Is(err, errNoCheckpointKey) {
			return err
		}
		time.Sleep(appearPause)
	}
	return err
}

// errNoCheckpointKey: the token lacks a half of the key.
var errNoCheckpointKey = errors.New("the token lacks the checkpoint key")

// chooseCheckpointKey has the register choose the key that is there, from before
// IDs were recorded, or a new one.
func (t *Token) chooseCheckpointKey(ctx context.Context, h pkcs11.SessionHandle) ([]byte, error) {
	labelled, err := find(t.lib, h, maxLabelled, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_LABEL, checkpointKeyLabel))
	if err != nil {
		return nil, err
	}
	var ids [][]byte
	for _, private := range labelled {
		id, err := readAttribute(t.lib, h, private, pkcs11.CKA_ID)
		if is(err, pkcs11.CKR_OBJECT_HANDLE_INVALID) {
			continue // it was not chosen, and has gone
		}
		if err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	announced, err := t.cfg.Register.AnnouncedKeys(ctx, purposeCheckpoint)
	if err != nil {
		return nil, err
	}
	var old [][]byte
	for _, id := range ids {
		if !contains(announced, id) {
			old = append(old, id)
		}
	}
	switch {
	case len(old) == 0:
		return t.makeCheckpointKey(ctx, h)
	case len(old) > 1:
		return nil, fmt.Errorf("%d private keys have the label %s; delete those that signed nothing", len(old), checkpointKeyLabel)
	case len(old[0]) == 0:
		return t.nameCheckpointKey(ctx, h)
	}
	return t.cfg.Register.ChooseKey(ctx, purposeCheckpoint, old[0])
}

// nameCheckpointKey gives a chosen CKA_ID to both halves of a key that has
// none. Where the module does not let it, they are found by their label.
func (t *Token) nameCheckpointKey(ctx context.Context, h pkcs11.SessionHandle) ([]byte, error) {
	id, err := t.cfg.Register.ChooseKey(ctx, purposeCheckpoint, newKeyID())
	if err != nil {
		return nil, err
	}
	for _, class := range []uint{pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_PUBLIC_KEY} {
		half, err := t.checkpointHalf(h, class, id)
		if err == nil {
			err = t.lib.SetAttributeValue(h, half, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_ID, id)})
		}
		if err != nil {
			t.cfg.Log.Warn("the checkpoint key cannot be given its CKA_ID; it is found by its label", "error", err)
		}
	}
	return id, nil
}

// makeCheckpointKey has the token make a pair, and the register choose. What the
// token cannot do is found out on session objects.
func (t *Token) makeCheckpointKey(ctx context.Context, h pkcs11.SessionHandle) ([]byte, error) {
	tried := &trial{token: t, h: h}
	if err := tried.signing(); err != nil {
		if lost(err) {
			return nil, err
		}
		return nil, fmt.Errorf("%w: %v", ErrNoEd25519, err)
	}
	id := newKeyID()
	if err := t.cfg.Register.AnnounceKey(ctx, purposeCheckpoint, id); err != nil {
		return nil, err
	}
	if _, _, err := generateEd25519(t.lib, h, id, true); err != nil {
		return nil, fmt.Errorf("making the checkpoint key: %w", err)
	}
	chosen, err := t.cfg.Register.ChooseKey(ctx, purposeCheckpoint, id)
	if err != nil {
		return nil, err // it is announced: the next start removes it
	}
	if !bytes.Equal(chosen, id) {
		return chosen, t.destroyByID(h, id)
	}
	t.cfg.Log.Info("made the checkpoint key", "label", checkpointKeyLabel, "id", hex.EncodeToString(id))
	return chosen, nil
}

// checkpointHalf returns the object of class that has the ID, or else the one
// that has the label and no ID.
func (t *Token) checkpointHalf(h pkcs11.SessionHandle, class uint, id []byte) (pkcs11.ObjectHandle, error) {
	for _, mark := range [][]*pkcs11.Attribute{
		{pkcs11.NewAttribute(pkcs11.CKA_ID, id)},
		{pkcs11.NewAttribute(pkcs11.CKA_LABEL, checkpointKeyLabel), pkcs11.NewAttribute(pkcs11.CKA_ID, []byte{})},
	} {
		found, err := find(t.lib, h, 2, append(mark, pkcs11.NewAttribute(pkcs11.CKA_CLASS, class), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true))...)
		if err != nil {
			return 0, err
		}
		switch len(found) {
		case 1:
			return found[0], nil
		case 2:
			return 0, fmt.Errorf("the checkpoint key with CKA_ID %x is there more than once", id)
		}
	}
	return 0, fmt.Errorf("%w with CKA_ID %x, which the database names: restore the token's backup", errNoCheckpointKey, id)
}

// readEd25519 reads a public key: an octet string of 32 bytes, which some
// modules give without its DER header.
func readEd25519(lib *module, h pkcs11.SessionHandle, public pkcs11.ObjectHandle) (ed25519.PublicKey, error) {
	attributes, err := lib.GetAttributeValue(h, public, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, nil)})
	if err != nil {
		return nil, fmt.Errorf("reading an Ed25519 key's CKA_EC_POINT: %w", err)
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

func signEd25519(lib *module, h pkcs11.SessionHandle, private pkcs11.ObjectHandle, text []byte) ([]byte, error) {
	if err := lib.SignInit(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(ckmEdDSA, nil)}, private); err != nil {
		return nil, fmt.Errorf("starting a signature by CKM_EDDSA: %w", err)
	}
	signature, err := lib.Sign(h, text)
	if err != nil {
		return nil, fmt.Errorf("signing by CKM_EDDSA: %w", err)
	}
	return signature, nil
}

// generateEd25519 has the token make a pair. Modules differ in how they want
// the curve named: by its OID (RFC 8410, as PKCS#11 3.1 has it), or by its name,
// as in 3.0.
func generateEd25519(lib *module, h pkcs11.SessionHandle, id []byte, token bool) (public, private pkcs11.ObjectHandle, err error) {
	named, err := asn1.MarshalWithParams("edwards25519", "printable")
	if err != nil {
		return 0, 0, err
	}
	oid, err := asn1.Marshal(asn1.ObjectIdentifier{1, 3, 101, 112})
	if err != nil {
		return 0, 0, err
	}
	var refused []error
	for _, curve := range [][]byte{oid, named} {
		public, private, err = lib.GenerateKeyPair(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(ckmECEdwardsKeyPairGn, nil)},
			[]*pkcs11.Attribute{
				pkcs11.NewAttribute(pkcs11.CKA_LABEL, checkpointKeyLabel),
				pkcs11.NewAttribute(pkcs11.CKA_ID, id),
				pkcs11.NewAttribute(pkcs11.CKA_TOKEN, token),
				pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, ckkECEdwards),
				pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, curve),
				pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true),
			},
			[]*pkcs11.Attribute{
				pkcs11.NewAttribute(pkcs11.CKA_LABEL, checkpointKeyLabel),
				pkcs11.NewAttribute(pkcs11.CKA_ID, id),
				pkcs11.NewAttribute(pkcs11.CKA_TOKEN, token),
				pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
				pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
				pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
				pkcs11.NewAttribute(pkcs11.CKA_SIGN, true),
			})
		if err == nil {
			return public, private, nil
		}
		refused = append(refused, err)
	}
	return 0, 0, fmt.Errorf("generating by CKM_EC_EDWARDS_KEY_PAIR_GEN: %w", errors.Join(refused...))
}
