//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// makeTries is how often a start makes a key if the token loses it.
const makeTries = 5

// errMade: a key was made, which another life has to look at.
var errMade = errors.New("a sealing key was made")

func newKeyID() []byte {
	id := make([]byte, keyIDSize)
	rand.Read(id)
	return id
}

// alone is the register of a process that has none: it shares its token with nobody.
type alone struct{}

func (alone) ChosenKey(context.Context, string) ([]byte, error)                { return nil, nil }
func (alone) AnnounceKey(context.Context, string, []byte) error                { return nil }
func (alone) AnnouncedKeys(context.Context, string) ([][]byte, error)          { return nil, nil }
func (alone) ChooseKey(_ context.Context, _ string, id []byte) ([]byte, error) { return id, nil }
func (alone) SealedSample(context.Context) (orgkey.Sealed, bool, error) {
	return orgkey.Sealed{}, false, nil
}

// onlyRead is a register in which nothing is changed.
type onlyRead struct{ Register }

func (onlyRead) AnnounceKey(context.Context, string, []byte) error                { return errOnlyRead }
func (onlyRead) ChooseKey(_ context.Context, _ string, id []byte) ([]byte, error) { return id, nil }

var errOnlyRead = errors.New("nothing is to be changed")

// chooseSealingKey has the register choose a key, where none is chosen yet:
// the one that opens what the database holds; the one that somebody put there;
// or a new one.
func (t *Token) chooseSealingKey(ctx context.Context, h pkcs11.SessionHandle) ([]byte, error) {
	if t.made != nil {
		return t.chooseMade(ctx, h)
	}
	found, err := t.labelledKeys(h)
	if err != nil {
		return nil, err
	}
	sample, sealed, err := t.cfg.Register.SealedSample(ctx)
	if err != nil {
		return nil, err
	}
	if sealed {
		found, err = t.thatOpen(h, found, sample)
	} else {
		found, err = t.notAnnounced(ctx, h, found)
	}
	switch {
	case err != nil:
		return nil, err
	case len(found) == 1:
		id := found[0].id
		if len(id) == 0 {
			id = newKeyID()
		}
		return t.cfg.Register.ChooseKey(ctx, purposeSeal, id)
	case len(found) > 1:
		return nil, fmt.Errorf("%w: %d have the label %s, and the database holds nothing that shows which is meant; delete those that sealed nothing", errSealingKey, len(found), t.cfg.KeyLabel)
	case !t.cfg.CreateSealingKey:
		return nil, ErrNoSealingKey
	}
	return nil, t.makeSealingKey(ctx, h)
}

// thatOpen returns the first of keys that opens sample; none is an error if there are keys.
func (t *Token) thatOpen(h pkcs11.SessionHandle, keys []labelledKey, sample orgkey.Sealed) ([]labelledKey, error) {
	var failures []error
	for _, k := range keys {
		text, err := k.key.decrypt(t.lib, h, sample.Binding.Context(), sample.Ciphertext)
		if err == nil {
			clear(text)
			return []labelledKey{k}, t.checkSealingKey(h, k.key)
		}
		failures = append(failures, err)
	}
	if len(keys) == 0 {
		return nil, nil
	}
	return nil, fmt.Errorf("%w: of the %d with the label %s none opens what the database holds: %w", errSealingKey, len(keys), t.cfg.KeyLabel, errors.Join(failures...))
}

// notAnnounced leaves out the keys that other starts have made and that were
// not chosen. They were announced before they were made, so who finds one finds
// its announcement.
func (t *Token) notAnnounced(ctx context.Context, h pkcs11.SessionHandle, keys []labelledKey) ([]labelledKey, error) {
	announced, err := t.cfg.Register.AnnouncedKeys(ctx, purposeSeal)
	if err != nil {
		return nil, err
	}
	var rest []labelledKey
	for _, k := range keys {
		if contains(announced, k.id) {
			continue
		}
		if k.half != nil {
			return nil, k.half
		}
		if err := t.checkSealingKey(h, k.key); err != nil {
			return nil, err
		}
		rest = append(rest, k)
	}
	return rest, nil
}

func contains(ids [][]byte, id []byte) bool {
	for _, other := range ids {
		if bytes.Equal(other, id) {
			return true
		}
	}
	return false
}

// makeSealingKey has the token make a key, and reports errMade: chooseMade goes on.
func (t *Token) makeSealingKey(ctx context.Context, h pkcs11.SessionHandle) error {
	id := newKeyID()
	if err := t.cfg.Register.AnnounceKey(ctx, purposeSeal, id); err != nil {
		return err
	}
	if _, err := generateSealingKey(t.lib, h, t.format, t.cfg.KeyLabel, id, true); err != nil {
		return err
	}
	_, err := t.lib.CreateObject(h, append(spareTemplate(id), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_APPLICATION, "orgkeys"), pkcs11.NewAttribute(pkcs11.CKA_VALUE, "spare")))
	if err != nil { // as NSS, which has no need of it
		t.cfg.Log.Debug("the token makes no data objects", "error", err)
	}
	t.made = id
	t.makes++
	return errMade
}

// spareTemplate is what the spare object behind a key is found by.
func spareTemplate(id []byte) []*pkcs11.Attribute {
	return []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_DATA), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, spareLabel+hex.EncodeToString(id)),
	}
}

// chooseMade has the register choose the key that an earlier life made. One that
// does not work is destroyed; one that the token has lost is made again.
func (t *Token) chooseMade(ctx context.Context, h pkcs11.SessionHandle) ([]byte, error) {
	id := t.made
	t.made = nil
	if err := t.destroyMatching(h, spareTemplate(id)); err != nil {
		return nil, err
	}
	key, err := t.keyByID(h, id)
	gone := errors.Is(err, ErrNoSealingKey) || errors.Is(err, errHalfKey)
	if err == nil {
		err = errors.Join(t.checkSealingKey(h, key), key.checkWorks(t.lib, h))
	}
	if err == nil {
		t.cfg.Log.Info("made a sealing key", "label", t.cfg.KeyLabel, "id", hex.EncodeToString(id), "format", t.format)
		return t.cfg.Register.ChooseKey(ctx, purposeSeal, id) // if another is chosen, removeUnchosen removes it
	}
	if err := errors.Join(err, t.destroyByID(h, id)); !gone || t.makes == makeTries {
		return nil, err
	}
	t.cfg.Log.Warn("the token has lost the sealing key that it had just made, as opencryptoki does when another program begins to use it meanwhile; making another", "id", hex.EncodeToString(id), "error", err)
	return nil, t.makeSealingKey(ctx, h)
}

// removeUnchosen removes what starts that died, or were slower, have made.
func (t *Token) removeUnchosen(ctx context.Context, h pkcs11.SessionHandle, purpose string, chosen []byte) error {
	announced, err := t.cfg.Register.AnnouncedKeys(ctx, purpose)
	if err != nil {
		return err
	}
	for _, id := range announced {
		if bytes.Equal(id, chosen) {
			continue
		}
		if err := t.destroyByID(h, id); err != nil {
			return err
		}
	}
	return nil
}

// destroyByID destroys every token object with that CKA_ID, and the HMAC key and
// the spare object that belong to it. Another process may be at it too.
func (t *Token) destroyByID(h pkcs11.SessionHandle, id []byte) error {
	for _, template := range [][]*pkcs11.Attribute{
		{pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_ID, id)},
		{pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_ID, macID(id))},
		spareTemplate(id),
	} {
		if err := t.destroyMatching(h, template); err != nil {
			return err
		}
	}
	return nil
}

func (t *Token) destroyMatching(h pkcs11.SessionHandle, template []*pkcs11.Attribute) error {
	found, err := find(t.lib, h, maxLabelled, template...)
	if err != nil {
		return err
	}
	for _, object := range found {
		if err := t.lib.DestroyObject(h, object); err != nil && !is(err, pkcs11.CKR_OBJECT_HANDLE_INVALID) {
			return fmt.Errorf("destroying what a start has made: %w", err)
		}
	}
	return nil
}
