//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/orgkeys/orgkeys/internal/orgkey"
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

// makeTries is how often a start makes a key if the token loses it.
const makeTries = 5

// errMade: a key was made, which another life has to look at.
var errMade = errors.New("a sealing key was made")

// maxLabelled bounds a search for keys by label.
const maxLabelled = 100

// macID is the CKA_ID of the HMAC key that belongs to the AES key with this one.
// Some tokens, such as AWS CloudHSM's, give no CKA_ID to two keys.
func macID(id []byte) []byte { return join(id, []byte("-mac")) }

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

// checkSealingKey reports errSealingKey unless k never left the token.
func (t *Token) checkSealingKey(h pkcs11.SessionHandle, k sealingKey) error {
	err := t.checkSecret(h, k.cipher)
	if k.format == formatCBCHMAC {
		err = errors.Join(err, t.checkSecret(h, k.mac))
	}
	return err
}

// checkSecret judges by what PKCS#11 defines for it: CKA_ALWAYS_SENSITIVE and
// CKA_NEVER_EXTRACTABLE, which are false for a key that was imported. CKA_LOCAL
// says the same in other words, and is wrong in NSS.
func (t *Token) checkSecret(h pkcs11.SessionHandle, object pkcs11.ObjectHandle) error {
	for _, want := range []struct {
		attribute uint
		value     any
	}{
		{pkcs11.CKA_VALUE_LEN, 32},
		{pkcs11.CKA_PRIVATE, true},
		{pkcs11.CKA_SENSITIVE, true},
		{pkcs11.CKA_EXTRACTABLE, false},
		{pkcs11.CKA_ALWAYS_SENSITIVE, true},
		{pkcs11.CKA_NEVER_EXTRACTABLE, true},
	} {
		value, err := readAttribute(t.lib, h, object, want.attribute)
		if err != nil {
			return err
		}
		if wanted := pkcs11.NewAttribute(want.attribute, want.value).Value; !bytes.Equal(value, wanted) {
			return fmt.Errorf("%w: its %s is %v, and must be %v", errSealingKey, attributeName(want.attribute), plain(value), want.value)
		}
	}
	if local, err := readAttribute(t.lib, h, object, pkcs11.CKA_LOCAL); err != nil || !bytes.Equal(local, []byte{1}) {
		t.cfg.Log.Warn("the module does not say that the token made its sealing key (CKA_LOCAL); that the key never left it is judged by CKA_ALWAYS_SENSITIVE and CKA_NEVER_EXTRACTABLE", "error", err)
	}
	return nil
}

func readAttribute(lib *module, h pkcs11.SessionHandle, object pkcs11.ObjectHandle, attribute uint) ([]byte, error) {
	found, err := lib.GetAttributeValue(h, object, []*pkcs11.Attribute{pkcs11.NewAttribute(attribute, nil)})
	if err != nil {
		return nil, fmt.Errorf("reading a key's %s: %w", attributeName(attribute), err)
	}
	return found[0].Value, nil
}

func attributeName(attribute uint) string {
	names := map[uint]string{
		pkcs11.CKA_ID: "CKA_ID", pkcs11.CKA_VALUE_LEN: "CKA_VALUE_LEN", pkcs11.CKA_PRIVATE: "CKA_PRIVATE", pkcs11.CKA_LOCAL: "CKA_LOCAL",
		pkcs11.CKA_SENSITIVE: "CKA_SENSITIVE", pkcs11.CKA_ALWAYS_SENSITIVE: "CKA_ALWAYS_SENSITIVE",
		pkcs11.CKA_EXTRACTABLE: "CKA_EXTRACTABLE", pkcs11.CKA_NEVER_EXTRACTABLE: "CKA_NEVER_EXTRACTABLE",
	}
	if name, ok := names[attribute]; ok {
		return name
	}
	return fmt.Sprintf("attribute 0x%x", attribute)
}

// plain is an attribute's value as people write it.
func plain(value []byte) string {
	if len(value) == 1 {
		return fmt.Sprint(value[0] != 0)
	}
	return "0x" + hex.EncodeToString(value)
}
