//go:build cgo

package hsm

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// A sealed value is one of
//
//	1 ‖ key version (1) ‖ IV (12 bytes) ‖ AES-GCM ciphertext ‖ tag (16)
//	2 ‖ key version (1) ‖ IV (16 bytes) ‖ AES-CBC ciphertext, PKCS#7 padded ‖ HMAC (32)
//
// Format 1 is AES-256-GCM (NIST SP 800-38D) with the binding's Context as
// additional data. Format 2 is for modules without it: encrypt-then-MAC with two
// keys, AES-256-CBC (SP 800-38A) and HMAC-SHA256 (FIPS 198-1) over
//
//	2 ‖ key version ‖ length of Context (8 bytes, big-endian) ‖ Context ‖ IV ‖ ciphertext
//
// IVs are random: unique for GCM, which allows 2^32 values under one key
// (SP 800-38D, 8.3), and unpredictable for CBC. They come from crypto/rand
// rather than by one more call to the token; a token that insists on its own IV
// for GCM writes it back, and that one is stored.
//
// A key belongs to one format for ever, which its objects in the token say: an
// HMAC key beside the AES key is format 2.
const (
	formatGCM     = 1
	formatCBCHMAC = 2

	sealKeyVersion = 1

	gcmIVSize  = 12
	gcmTagSize = 16
	cbcIVSize  = 16
	macSize    = 32
)

// CKR_AEAD_DECRYPT_FAILED of PKCS#11 3.0, which the binding does not name.
const aeadDecryptFailed = pkcs11.Error(0x42)

// sealingKey is the sealing key's objects in one life.
type sealingKey struct {
	format byte
	cipher pkcs11.ObjectHandle
	mac    pkcs11.ObjectHandle // format 2
}

func (k sealingKey) encrypt(lib *module, h pkcs11.SessionHandle, aad, plaintext []byte) ([]byte, error) {
	if k.format == formatCBCHMAC {
		return k.encryptCBC(lib, h, aad, plaintext)
	}
	return k.encryptGCM(lib, h, aad, plaintext)
}

// decrypt reports orgkey.ErrSealBroken where it is sure of it. ErrSealBroken
// never has the module's return value in its chain, which would make it look
// like trouble with the module.
func (k sealingKey) decrypt(lib *module, h pkcs11.SessionHandle, aad, sealed []byte) ([]byte, error) {
	if len(sealed) < 2 {
		return nil, fmt.Errorf("%w: %d bytes are too few", orgkey.ErrSealBroken, len(sealed))
	}
	if sealed[0] != k.format || sealed[1] != sealKeyVersion {
		return nil, fmt.Errorf("%w: format %d and key version %d are not this key's", orgkey.ErrSealBroken, sealed[0], sealed[1])
	}
	if k.format == formatCBCHMAC {
		return k.decryptCBC(lib, h, aad, sealed)
	}
	return k.decryptGCM(lib, h, aad, sealed)
}

func (k sealingKey) encryptGCM(lib *module, h pkcs11.SessionHandle, aad, plaintext []byte) ([]byte, error) {
	iv := make([]byte, gcmIVSize)
	rand.Read(iv)
	params := pkcs11.NewGCMParams(iv, aad, gcmTagSize*8)
	defer params.Free()
	if err := lib.EncryptInit(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, params)}, k.cipher); err != nil {
		return nil, fmt.Errorf("starting encryption by CKM_AES_GCM: %w", err)
	}
	ciphertext, err := lib.Encrypt(h, plaintext)
	if err != nil {
		return nil, fmt.Errorf("encrypting by CKM_AES_GCM: %w", err)
	}
	used := params.IV()
	if len(ciphertext) != len(plaintext)+gcmTagSize || len(used) != gcmIVSize {
		return nil, fmt.Errorf("encrypting by CKM_AES_GCM: the module returned %d bytes for %d, with an IV of %d", len(ciphertext), len(plaintext), len(used))
	}
	return join([]byte{formatGCM, sealKeyVersion}, used, ciphertext), nil
}

func (k sealingKey) decryptGCM(lib *module, h pkcs11.SessionHandle, aad, sealed []byte) ([]byte, error) {
	const header = 2 + gcmIVSize
	if len(sealed) < header+gcmTagSize {
		return nil, fmt.Errorf("%w: %d bytes are too few", orgkey.ErrSealBroken, len(sealed))
	}
	params := pkcs11.NewGCMParams(sealed[2:header], aad, gcmTagSize*8)
	defer params.Free()
	if err := lib.DecryptInit(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, params)}, k.cipher); err != nil {
		return nil, fmt.Errorf("starting decryption by CKM_AES_GCM: %w", err)
	}
	plaintext, err := lib.Decrypt(h, sealed[header:])
	if is(err, pkcs11.CKR_ENCRYPTED_DATA_INVALID, pkcs11.CKR_ENCRYPTED_DATA_LEN_RANGE, aeadDecryptFailed) {
		return nil, fmt.Errorf("%w: %v", orgkey.ErrSealBroken, err)
	}
	if err != nil {
		return nil, fmt.Errorf("decrypting by CKM_AES_GCM: %w", err)
	}
	return plaintext, nil
}

func (k sealingKey) encryptCBC(lib *module, h pkcs11.SessionHandle, aad, plaintext []byte) ([]byte, error) {
	iv := make([]byte, cbcIVSize)
	rand.Read(iv)
	if err := lib.EncryptInit(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_CBC_PAD, iv)}, k.cipher); err != nil {
		return nil, fmt.Errorf("starting encryption by CKM_AES_CBC_PAD: %w", err)
	}
	ciphertext, err := lib.Encrypt(h, plaintext)
	if err != nil {
		return nil, fmt.Errorf("encrypting by CKM_AES_CBC_PAD: %w", err)
	}
	if want := len(plaintext)/cbcIVSize*cbcIVSize + cbcIVSize; len(ciphertext) != want {
		return nil, fmt.Errorf("encrypting by CKM_AES_CBC_PAD: the module returned %d bytes for %d", len(ciphertext), len(plaintext))
	}
	mac, err := k.authenticate(lib, h, aad, iv, ciphertext)
	if err != nil {
		return nil, err
	}
	return join([]byte{formatCBCHMAC, sealKeyVersion}, iv, ciphertext, mac), nil
}

// decryptCBC decrypts nothing whose HMAC is wrong, so a padding says nothing to
// who made it up.
func (k sealingKey) decryptCBC(lib *module, h pkcs11.SessionHandle, aad, sealed []byte) ([]byte, error) {
	const header = 2 + cbcIVSize
	if len(sealed) < header+cbcIVSize+macSize || (len(sealed)-header-macSize)%cbcIVSize != 0 {
		return nil, fmt.Errorf("%w: it cannot have %d bytes", orgkey.ErrSealBroken, len(sealed))
	}
	iv, ciphertext, mac := sealed[2:header], sealed[header:len(sealed)-macSize], sealed[len(sealed)-macSize:]
	want, err := k.authenticate(lib, h, aad, iv, ciphertext)
	if err != nil {
		return nil, err
	}
	if subtle.ConstantTimeCompare(want, mac) != 1 {
		return nil, fmt.Errorf("%w: its HMAC is wrong", orgkey.ErrSealBroken)
	}
	if err := lib.DecryptInit(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_CBC_PAD, iv)}, k.cipher); err != nil {
		return nil, fmt.Errorf("starting decryption by CKM_AES_CBC_PAD: %w", err)
	}
	plaintext, err := lib.Decrypt(h, ciphertext)
	if err != nil {
		return nil, fmt.Errorf("decrypting by CKM_AES_CBC_PAD: %w", err)
	}
	return plaintext, nil
}

// authenticate returns the HMAC of a value in format 2.
func (k sealingKey) authenticate(lib *module, h pkcs11.SessionHandle, aad, iv, ciphertext []byte) ([]byte, error) {
	if err := lib.SignInit(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_SHA256_HMAC, nil)}, k.mac); err != nil {
		return nil, fmt.Errorf("starting a CKM_SHA256_HMAC: %w", err)
	}
	length := binary.BigEndian.AppendUint64(nil, uint64(len(aad)))
	mac, err := lib.Sign(h, join([]byte{formatCBCHMAC, sealKeyVersion}, length, aad, iv, ciphertext))
	if err != nil {
		return nil, fmt.Errorf("making a CKM_SHA256_HMAC: %w", err)
	}
	if len(mac) != macSize {
		return nil, fmt.Errorf("the module made a CKM_SHA256_HMAC of %d bytes", len(mac))
	}
	return mac, nil
}

func join(parts ...[]byte) []byte {
	var all []byte
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

// template is that of one of the key's objects, for C_GenerateKey.
func sealTemplate(label string, id []byte, token bool, uses ...uint) []*pkcs11.Attribute {
	all := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
		pkcs11.NewAttribute(pkcs11.CKA_ID, id),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, token),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
		pkcs11.NewAttribute(pkcs11.CKA_WRAP, false),
		pkcs11.NewAttribute(pkcs11.CKA_UNWRAP, false),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32),
	}
	for _, use := range uses {
		all = append(all, pkcs11.NewAttribute(use, true))
	}
	return all
}

// generateSealingKey has the token make a key for format, under id. If one of
// its objects cannot be made, none is left.
func generateSealingKey(lib *module, h pkcs11.SessionHandle, format byte, label string, id []byte, token bool) (key sealingKey, err error) {
	key.format = format
	key.cipher, err = lib.GenerateKey(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)},
		sealTemplate(label, id, token, pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT))
	if err != nil {
		return key, fmt.Errorf("making the sealing key by CKM_AES_KEY_GEN: %w", err)
	}
	if format == formatGCM {
		return key, nil
	}
	key.mac, err = lib.GenerateKey(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_GENERIC_SECRET_KEY_GEN, nil)},
		sealTemplate(sealMACLabel, macID(id), token, pkcs11.CKA_SIGN, pkcs11.CKA_VERIFY))
	if err != nil {
		err = fmt.Errorf("making the sealing key's HMAC key by CKM_GENERIC_SECRET_KEY_GEN: %w", err)
		return key, errors.Join(err, lib.DestroyObject(h, key.cipher))
	}
	return key, nil
}

func (k sealingKey) destroy(lib *module, h pkcs11.SessionHandle) error {
	err := lib.DestroyObject(h, k.cipher)
	if k.format == formatCBCHMAC {
		err = errors.Join(err, lib.DestroyObject(h, k.mac))
	}
	return err
}

// checkWorks reports an error unless k opens what it sealed, and nothing else.
func (k sealingKey) checkWorks(lib *module, h pkcs11.SessionHandle) error {
	sealed, err := k.encrypt(lib, h, probeContext(), probeText())
	if err != nil {
		return err
	}
	if text, err := k.decrypt(lib, h, probeContext(), sealed); err != nil || string(text) != string(probeText()) {
		return fmt.Errorf("what it seals does not open: %w", errors.Join(err, errSealingKey))
	}
	if _, err := k.decrypt(lib, h, append(probeContext(), '2'), sealed); err == nil {
		return fmt.Errorf("what it seals opens under another binding: %w", errSealingKey)
	}
	return nil
}
