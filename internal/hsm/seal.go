//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// A sealed value is
//
//	format (1 byte, 1) ‖ key version (1 byte, 1) ‖ IV (12 bytes) ‖ ciphertext ‖ tag (16 bytes)
//
// with AES-256-GCM (NIST SP 800-38D) under the sealing key, and the binding's
// Context as additional data. The key version is the number in the key's label.
// The IV is random, which allows 2^32 values under one key (SP 800-38D, 8.3).
// It needs to be unique, not secret, so it comes from crypto/rand rather than
// by one more call to the token; a token that insists on its own IV writes it
// back, and that one is stored.
const (
	sealFormat     = 1
	sealKeyVersion = 1
	sealKeyLabel   = "orgkeys-seal-v1"
	ivSize         = 12
	tagSize        = 16
	headerSize     = 2 + ivSize
)

// CKR_AEAD_DECRYPT_FAILED of PKCS#11 3.0, which the binding does not name.
const aeadDecryptFailed = pkcs11.Error(0x42)

// errSealingKey: the token's sealing key is not the one that it was, or not
// what it must be. Nothing gets better by trying again.
var errSealingKey = errors.New("the token's sealing key cannot be trusted")

// Seal encrypts plaintext in the token.
func (t *Token) Seal(ctx context.Context, b orgkey.Binding, plaintext []byte) ([]byte, error) {
	var sealed []byte
	err := t.seal(ctx, func(l *life, h pkcs11.SessionHandle) (err error) {
		sealed, err = encrypt(t.lib, h, l.sealingKey, b.Context(), plaintext)
		return err
	})
	if err != nil {
		return nil, sealFault("sealing", err)
	}
	return sealed, nil
}

// Open decrypts items in the token, on one session.
func (t *Token) Open(ctx context.Context, items []orgkey.Sealed) ([][]byte, error) {
	var opened [][]byte
	err := t.seal(ctx, func(l *life, h pkcs11.SessionHandle) error {
		values := make([][]byte, 0, len(items))
		for i, item := range items {
			value, err := t.openOne(ctx, l, h, item)
			if err != nil {
				for _, v := range values {
					clear(v)
				}
				return fmt.Errorf("item %d: %w", i, err)
			}
			values = append(values, value)
		}
		opened = values
		return nil
	})
	if err != nil {
		return nil, sealFault("opening", err)
	}
	return opened, nil
}

func (t *Token) openOne(ctx context.Context, l *life, h pkcs11.SessionHandle, item orgkey.Sealed) ([]byte, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	value, err := decrypt(t.lib, h, l.sealingKey, item.Binding.Context(), item.Ciphertext)
	if err == nil || errors.Is(err, orgkey.ErrSealBroken) || !is(err, pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED) {
		return value, err
	}
	// SoftHSM says CKR_GENERAL_ERROR of a wrong tag, as of a token that is
	// gone. If the session opens what is known to be good, it was the tag.
	if probed := t.checkProbe(h, l.sealingKey); probed != nil {
		return nil, err
	}
	return nil, fmt.Errorf("%w: %v", orgkey.ErrSealBroken, err)
}

// seal runs f on a sealing session, and once more in a new life if the library
// turns out to have lost the first one. f leaves nothing behind if it fails.
func (t *Token) seal(ctx context.Context, f func(*life, pkcs11.SessionHandle) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, t.limits.answer, errSlow)
	defer cancel()
	for attempt := 0; ; attempt++ {
		l, s, err := t.acquire(ctx, func(l *life) *pool { return l.seal })
		if err != nil {
			return err
		}
		running, err := s.call(ctx,
			func(h pkcs11.SessionHandle) error { return f(l, h) },
			func(error) { l.seal.put(s) })
		if !running {
			l.seal.put(s)
		}
		if err == nil || !lost(err) {
			return err
		}
		t.renew(l, err)
		if attempt > 0 {
			return err
		}
	}
}

// sealFault marks whatever the module reports as orgkey.ErrUnavailable.
func sealFault(doing string, err error) error {
	var rv pkcs11.Error
	if errors.As(err, &rv) {
		return fmt.Errorf("%s: %w: %w", doing, orgkey.ErrUnavailable, err)
	}
	return fault(doing, err)
}

// findSealingKey sets l's sealing key. The first life makes one if the token
// has none and it may; a later one must find the key of the first.
func (t *Token) findSealingKey(l *life, h pkcs11.SessionHandle) error {
	key, err := lookUpSealingKey(t.lib, h)
	first := t.probe == nil
	switch {
	case errors.Is(err, ErrNoSealingKey) && first && t.cfg.CreateSealingKey:
		if key, err = createSealingKey(t.lib, h); err != nil {
			return err
		}
		t.cfg.Log.Info("made the sealing key", "label", sealKeyLabel)
	case err != nil:
		return err
	}
	l.sealingKey = key
	if first {
		t.probe, err = encrypt(t.lib, h, key, probeContext(), probeText())
		return err
	}
	return t.checkSameKey(h, key)
}

// checkSameKey reports errSealingKey if key works but does not open what was
// sealed at start.
func (t *Token) checkSameKey(h pkcs11.SessionHandle, key pkcs11.ObjectHandle) error {
	err := t.checkProbe(h, key)
	if err == nil {
		return nil
	}
	fresh, works := encrypt(t.lib, h, key, probeContext(), probeText())
	if works == nil {
		_, works = decrypt(t.lib, h, key, probeContext(), fresh)
	}
	if works != nil {
		return err
	}
	return fmt.Errorf("%w: it is another one than at start: %w", errSealingKey, err)
}

// checkProbe opens what was sealed at start.
func (t *Token) checkProbe(h pkcs11.SessionHandle, key pkcs11.ObjectHandle) error {
	text, err := decrypt(t.lib, h, key, probeContext(), t.probe)
	if err == nil && !bytes.Equal(text, probeText()) {
		err = orgkey.ErrSealBroken
	}
	return err
}

// No binding has these bytes: they hold no NUL.
func probeContext() []byte { return []byte("orgkeys/v1/probe") }

func probeText() []byte { return []byte("known to be good") }

// lookUpSealingKey finds the sealing key and checks that it never left the token.
func lookUpSealingKey(lib *module, h pkcs11.SessionHandle) (pkcs11.ObjectHandle, error) {
	found, err := find(lib, h, 2,
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, sealKeyLabel))
	if err != nil {
		return 0, err
	}
	switch len(found) {
	case 0:
		return 0, ErrNoSealingKey
	case 1:
		return found[0], checkSealingKey(lib, h, found[0])
	}
	return 0, fmt.Errorf("%w: more than one has the label %s; delete those that sealed nothing", errSealingKey, sealKeyLabel)
}

func checkSealingKey(lib *module, h pkcs11.SessionHandle, key pkcs11.ObjectHandle) error {
	required := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32),
		pkcs11.NewAttribute(pkcs11.CKA_LOCAL, true),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_ALWAYS_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
		pkcs11.NewAttribute(pkcs11.CKA_NEVER_EXTRACTABLE, true),
	}
	actual, err := lib.GetAttributeValue(h, key, required)
	if err != nil {
		return fmt.Errorf("reading the sealing key's attributes: %w", err)
	}
	for i, want := range required {
		if !bytes.Equal(actual[i].Value, want.Value) {
			return fmt.Errorf("%w: its attribute 0x%x is %x, and must be %x", errSealingKey, want.Type, actual[i].Value, want.Value)
		}
	}
	return nil
}

// createSealingKey has the token make the sealing key, and refuses if another
// process has done the same meanwhile: neither can know which one the other uses.
func createSealingKey(lib *module, h pkcs11.SessionHandle) (pkcs11.ObjectHandle, error) {
	_, err := lib.GenerateKey(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, sealKeyLabel),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
		pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, true),
		pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true),
		pkcs11.NewAttribute(pkcs11.CKA_WRAP, false),
		pkcs11.NewAttribute(pkcs11.CKA_UNWRAP, false),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32),
	})
	if err != nil {
		return 0, fmt.Errorf("making the sealing key: %w", err)
	}
	return lookUpSealingKey(lib, h)
}

func encrypt(lib *module, h pkcs11.SessionHandle, key pkcs11.ObjectHandle, aad, plaintext []byte) ([]byte, error) {
	iv := make([]byte, ivSize)
	rand.Read(iv)
	params := pkcs11.NewGCMParams(iv, aad, tagSize*8)
	defer params.Free()
	if err := lib.EncryptInit(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, params)}, key); err != nil {
		return nil, fmt.Errorf("starting encryption: %w", err)
	}
	ciphertext, err := lib.Encrypt(h, plaintext)
	if err != nil {
		return nil, fmt.Errorf("encrypting: %w", err)
	}
	used := params.IV()
	if len(ciphertext) != len(plaintext)+tagSize || len(used) != ivSize {
		return nil, fmt.Errorf("encrypting: the module returned %d bytes for %d, with an IV of %d", len(ciphertext), len(plaintext), len(used))
	}
	sealed := make([]byte, 0, headerSize+len(ciphertext))
	sealed = append(sealed, sealFormat, sealKeyVersion)
	sealed = append(sealed, used...)
	return append(sealed, ciphertext...), nil
}

// decrypt reports orgkey.ErrSealBroken where the module is explicit about it.
// ErrSealBroken never has the module's return value in its chain, which would
// make it look like trouble with the module.
func decrypt(lib *module, h pkcs11.SessionHandle, key pkcs11.ObjectHandle, aad, sealed []byte) ([]byte, error) {
	if len(sealed) < headerSize+tagSize {
		return nil, fmt.Errorf("%w: %d bytes are too few", orgkey.ErrSealBroken, len(sealed))
	}
	if sealed[0] != sealFormat || sealed[1] != sealKeyVersion {
		return nil, fmt.Errorf("%w: unknown format %d or key version %d", orgkey.ErrSealBroken, sealed[0], sealed[1])
	}
	params := pkcs11.NewGCMParams(sealed[2:headerSize], aad, tagSize*8)
	defer params.Free()
	if err := lib.DecryptInit(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, params)}, key); err != nil {
		return nil, fmt.Errorf("starting decryption: %w", err)
	}
	plaintext, err := lib.Decrypt(h, sealed[headerSize:])
	if is(err, pkcs11.CKR_ENCRYPTED_DATA_INVALID, pkcs11.CKR_ENCRYPTED_DATA_LEN_RANGE, aeadDecryptFailed) {
		return nil, fmt.Errorf("%w: %v", orgkey.ErrSealBroken, err)
	}
	if err != nil {
		return nil, fmt.Errorf("decrypting: %w", err)
	}
	return plaintext, nil
}
