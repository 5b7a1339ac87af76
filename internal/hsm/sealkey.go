//go:build cgo

package hsm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/miekg/pkcs11"
)

// Which of a token's objects are ours, the register says, by CKA_ID: a token may
// be shared by replicas that start for the first time at once, and a label is
// not unique. Who makes a key announces its random ID first, makes it, and then
// asks the register to choose it. One of those that ask is chosen; the others
// destroy what they made and use that one. A crash leaves an announced key
// that was not chosen and has sealed nothing; the next start removes it.
//
// A key that was just made may be gone again: opencryptoki's next object, of
// whatever program, can get its file (findings/opencryptoki-next-object-takes-a-keys-file.sh).
// The library of who made it does not see that, and destroying one of the two
// objects destroys the other. So a new key is looked at in another life before
// it is chosen, and destroyed in no earlier one; and a spare object is made behind it,
// which gets the file if any does. Processes of orgkeys take turns (takeTurn).
const (
	purposeSeal  = "seal"
	sealKeyLabel = "orgkeys-seal-v1"
	sealMACLabel = "orgkeys-seal-mac-v1" // the HMAC key, in format 2
	spareLabel   = "orgkeys-spare-"      // and the CKA_ID of the key behind which it is made, in hex
	keyIDSize    = 16
)

// maxLabelled bounds a search for keys by label.
const maxLabelled = 100

// macID is the CKA_ID of the HMAC key that belongs to the AES key with this one.
// Some tokens, such as AWS CloudHSM's, give no CKA_ID to two keys.
func macID(id []byte) []byte { return join(id, []byte("-mac")) }

// findSealingKey sets l's sealing key. The first life makes one if the token
// has none and it may; a later one must find the key of the first.
func (t *Token) findSealingKey(ctx context.Context, l *life, h pkcs11.SessionHandle) (err error) {
	if t.probe != nil {
		if l.sealingKey, err = t.sealingKeyAgain(h); err != nil {
			return err
		}
		return t.checkSameKey(h, l.sealingKey)
	}
	if l.sealingKey, err = t.firstSealingKey(ctx, h); err != nil {
		return err
	}
	t.probe, err = l.sealingKey.encrypt(t.lib, h, probeContext(), probeText())
	return err
}

// sealingKeyAgain finds the key that an earlier life used.
func (t *Token) sealingKeyAgain(h pkcs11.SessionHandle) (sealingKey, error) {
	key, err := t.sealingKeyByID(h, t.sealID)
	if errors.Is(err, ErrNoSealingKey) {
		return t.unnamedKey(h, func(k sealingKey) bool { return t.checkProbe(h, k) == nil })
	}
	return key, err
}

func (t *Token) firstSealingKey(ctx context.Context, h pkcs11.SessionHandle) (sealingKey, error) {
	chosen, err := t.cfg.Register.ChosenKey(ctx, purposeSeal)
	if given := []byte(t.cfg.KeyID); err == nil && chosen == nil && len(given) > 0 {
		chosen, err = t.adoptKey(ctx, h, given)
	} else if err == nil && chosen == nil {
		chosen, err = t.chooseSealingKey(ctx, h)
	}
	if err != nil {
		return sealingKey{}, err
	}
	if t.cfg.KeyID != "" && t.cfg.KeyID != string(chosen) {
		return sealingKey{}, fmt.Errorf("%w: the database names the one with CKA_ID %x, and the settings %x", errSealingKey, chosen, t.cfg.KeyID)
	}
	t.sealID = chosen
	key, err := t.awaitSealingKey(ctx, h, chosen)
	if errors.Is(err, ErrNoSealingKey) {
		err = fmt.Errorf("%w: the database names the one with CKA_ID %x", ErrNoSealingKey, chosen)
	}
	if err != nil {
		return sealingKey{}, err
	}
	if t.cfg.ChangeNothing {
		return key, nil
	}
	return key, t.removeUnchosen(ctx, h, purposeSeal, chosen)
}

// adoptKey has the register choose the key that the settings name.
func (t *Token) adoptKey(ctx context.Context, h pkcs11.SessionHandle, id []byte) ([]byte, error) {
	key, err := t.sealingKeyByID(h, id)
	if err != nil {
		return nil, fmt.Errorf("the settings name the sealing key with CKA_ID %x: %w", id, err)
	}
	sample, sealed, err := t.cfg.Register.SealedSample(ctx)
	if err == nil && sealed {
		_, err = t.thatOpen(h, []labelledKey{{id: id, key: key}}, sample)
	}
	if err != nil {
		return nil, err
	}
	return t.cfg.Register.ChooseKey(ctx, purposeSeal, id)
}

// Another process may have made the chosen key a moment ago, and some libraries
// take theirs to see it.
const (
	appearPause = 100 * time.Millisecond
	appearTries = 5
)

// awaitSealingKey finds the key that was chosen, by its CKA_ID or as the one from
// before IDs were recorded.
func (t *Token) awaitSealingKey(ctx context.Context, h pkcs11.SessionHandle, id []byte) (key sealingKey, err error) {
	for range appearTries {
		if key, err = t.sealingKeyByID(h, id); errors.Is(err, ErrNoSealingKey) {
			key, err = t.nameKey(ctx, h, id)
		}
		if !errors.Is(err, ErrNoSealingKey) {
			return key, err
		}
		time.Sleep(appearPause)
	}
	return key, err
}

// sealingKeyByID finds the key with that CKA_ID and checks that it never left the token.
func (t *Token) sealingKeyByID(h pkcs11.SessionHandle, id []byte) (sealingKey, error) {
	key, err := t.keyByID(h, id)
	if err != nil {
		return sealingKey{}, err
	}
	return key, t.checkSealingKey(h, key)
}

func (t *Token) keyByID(h pkcs11.SessionHandle, id []byte) (sealingKey, error) {
	named := func(keyType uint, id []byte) ([]pkcs11.ObjectHandle, error) {
		return find(t.lib, h, 2, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
			pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, keyType), pkcs11.NewAttribute(pkcs11.CKA_ID, id))
	}
	ciphers, err := named(pkcs11.CKK_AES, id)
	if err != nil {
		return sealingKey{}, err
	}
	macs, err := named(pkcs11.CKK_GENERIC_SECRET, macID(id))
	if err == nil && len(macs) == 0 { // older ones, and an operator's, have the AES key's
		macs, err = named(pkcs11.CKK_GENERIC_SECRET, id)
	}
	if err != nil {
		return sealingKey{}, err
	}
	switch {
	case len(ciphers) == 0:
		return sealingKey{}, ErrNoSealingKey
	case len(ciphers) > 1 || len(macs) > 1:
		return sealingKey{}, fmt.Errorf("%w: more than one has the CKA_ID %x; delete those that sealed nothing", errSealingKey, id)
	}
	key := sealingKey{format: formatGCM, cipher: ciphers[0]}
	switch {
	case len(macs) == 1:
		key.format, key.mac = formatCBCHMAC, macs[0]
	case t.format == formatCBCHMAC:
		return key, fmt.Errorf("%w: the one with CKA_ID %x has no HMAC key, without which a token that has no CKM_AES_GCM opens nothing. docs/hsm.md, opencryptoki, has the way back where its file is still there; else restore the token's backup", errHalfKey, id)
	}
	return key, nil
}

// errHalfKey: of the two keys of format 2 one is there.
var errHalfKey = fmt.Errorf("%w: half of it", errSealingKey)

// labelledKey is a key of the sealing key's label.
type labelledKey struct {
	id   []byte
	key  sealingKey
	half error // why it is of no use
}

func (t *Token) labelledKeys(h pkcs11.SessionHandle) ([]labelledKey, error) {
	found, err := find(t.lib, h, maxLabelled, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_LABEL, t.cfg.KeyLabel))
	if err != nil {
		return nil, err
	}
	var all []labelledKey
	for _, cipher := range found {
		k, err := t.labelled(h, cipher)
		// A key that was not chosen goes away while others look.
		if is(err, pkcs11.CKR_OBJECT_HANDLE_INVALID) || errors.Is(err, ErrNoSealingKey) {
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, k)
	}
	return all, nil
}

// labelled checks nothing of the key: one that a crash left half made is to be
// removed, and not to be reported.
func (t *Token) labelled(h pkcs11.SessionHandle, cipher pkcs11.ObjectHandle) (k labelledKey, err error) {
	if k.id, err = readAttribute(t.lib, h, cipher, pkcs11.CKA_ID); err != nil {
		return k, err
	}
	k.key = sealingKey{format: formatGCM, cipher: cipher}
	if len(k.id) > 0 {
		k.key, err = t.keyByID(h, k.id)
	}
	if errors.Is(err, errHalfKey) { // another start may be about to make the rest
		k.half, err = err, nil
	}
	return k, err
}

// unnamedKey returns the one key that has the label, no CKA_ID, and is accepted.
func (t *Token) unnamedKey(h pkcs11.SessionHandle, accept func(sealingKey) bool) (sealingKey, error) {
	found, err := t.labelledKeys(h)
	if err != nil {
		return sealingKey{}, err
	}
	var accepted []sealingKey
	for _, k := range found {
		if len(k.id) == 0 && accept(k.key) {
			accepted = append(accepted, k.key)
		}
	}
	switch len(accepted) {
	case 0:
		return sealingKey{}, ErrNoSealingKey
	case 1:
		return accepted[0], t.checkSealingKey(h, accepted[0])
	}
	return sealingKey{}, fmt.Errorf("%w: %d have the label %s and no CKA_ID; delete those that sealed nothing", errSealingKey, len(accepted), t.cfg.KeyLabel)
}

// nameKey gives the CKA_ID that was chosen to the key from before IDs were
// recorded. Two replicas do this with the same ID.
func (t *Token) nameKey(ctx context.Context, h pkcs11.SessionHandle, id []byte) (sealingKey, error) {
	sample, sealed, err := t.cfg.Register.SealedSample(ctx)
	if err != nil {
		return sealingKey{}, err
	}
	key, err := t.unnamedKey(h, func(k sealingKey) bool {
		if !sealed {
			return true
		}
		text, err := k.decrypt(t.lib, h, sample.Binding.Context(), sample.Ciphertext)
		clear(text)
		return err == nil
	})
	if err != nil || t.cfg.ChangeNothing {
		return key, err
	}
	if err := t.lib.SetAttributeValue(h, key.cipher, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_ID, id)}); err != nil {
		t.cfg.Log.Warn("the sealing key cannot be given its CKA_ID; it is found by its label", "error", err)
	}
	return key, nil
}
