//go:build cgo

package hsm

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"
)

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
