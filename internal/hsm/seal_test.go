//go:build cgo

package hsm

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// inToken is withSession for tests.
func inToken(t *testing.T, cfg Config, f func(lib *module, h pkcs11.SessionHandle)) {
	t.Helper()
	err := withSession(cfg, func(lib *module, h pkcs11.SessionHandle) error {
		f(lib, h)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// lookUpSealingKey returns the AES key that has the sealing key's label.
func lookUpSealingKey(lib *module, h pkcs11.SessionHandle) (pkcs11.ObjectHandle, error) {
	found, err := find(lib, h, 2, pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_LABEL, sealKeyLabel))
	if err == nil && len(found) != 1 {
		err = fmt.Errorf("%d keys have the label %s", len(found), sealKeyLabel)
	}
	if err != nil {
		return 0, err
	}
	return found[0], nil
}

func removeSealingKey(t *testing.T, lib *module, h pkcs11.SessionHandle) {
	t.Helper()
	key, err := lookUpSealingKey(lib, h)
	if err != nil {
		t.Fatal(err)
	}
	if err := lib.DestroyObject(h, key); err != nil {
		t.Fatalf("C_DestroyObject: %v", err)
	}
}

// plantSealingKey makes a key with the sealing key's label.
func plantSealingKey(t *testing.T, lib *module, h pkcs11.SessionHandle, sensitive, extractable bool) {
	t.Helper()
	_, err := lib.GenerateKey(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, sealKeyLabel),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, sensitive),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, extractable),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32),
	})
	if err != nil {
		t.Fatalf("C_GenerateKey: %v", err)
	}
}

// importSealingKey puts a key that somebody knows in the sealing key's place.
func importSealingKey(t *testing.T, lib *module, h pkcs11.SessionHandle) {
	t.Helper()
	_, err := lib.CreateObject(h, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, sealKeyLabel),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE, make([]byte, 32)),
	})
	if err != nil {
		t.Fatalf("C_CreateObject: %v", err)
	}
}

func TestSealingKeyThatCannotBeTrusted(t *testing.T) {
	for name, plant := range map[string]func(*testing.T, *module, pkcs11.SessionHandle){
		"extractable": func(t *testing.T, lib *module, h pkcs11.SessionHandle) {
			removeSealingKey(t, lib, h)
			plantSealingKey(t, lib, h, true, true)
		},
		"not sensitive": func(t *testing.T, lib *module, h pkcs11.SessionHandle) {
			removeSealingKey(t, lib, h)
			plantSealingKey(t, lib, h, false, false)
		},
		"brought in from outside": func(t *testing.T, lib *module, h pkcs11.SessionHandle) {
			removeSealingKey(t, lib, h)
			importSealingKey(t, lib, h)
		},
		"two of the name": func(t *testing.T, lib *module, h pkcs11.SessionHandle) {
			plantSealingKey(t, lib, h, true, false)
		},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := softHSM(t)
			cfg.CreateSealingKey = true
			inToken(t, cfg, func(lib *module, h pkcs11.SessionHandle) { plant(t, lib, h) })
			if token, err := Open(t.Context(), cfg); !errors.Is(err, errSealingKey) {
				t.Errorf("Open: %v, want errSealingKey", err)
				if err == nil {
					_ = token.Close()
				}
			}
		})
	}
}

func TestSealingKeyIsMadeOnlyWhereAllowed(t *testing.T) {
	cfg := softHSM(t)
	inToken(t, cfg, func(lib *module, h pkcs11.SessionHandle) { removeSealingKey(t, lib, h) })
	if _, err := Open(t.Context(), cfg); !errors.Is(err, ErrNoSealingKey) {
		t.Fatalf("Open without CreateSealingKey: %v, want ErrNoSealingKey", err)
	}
	cfg.CreateSealingKey = true
	item := orgkey.Sealed{Binding: orgkey.Binding{Org: "acme", ID: "one"}}
	for i := range 2 { // the second time it is found, not made again
		token, err := Open(t.Context(), cfg)
		if err != nil {
			t.Fatalf("Open number %d: %v", i+1, err)
		}
		if i == 0 {
			item.Ciphertext, err = token.Seal(t.Context(), item.Binding, []byte("value"))
		} else {
			_, err = token.Open(t.Context(), []orgkey.Sealed{item})
		}
		if err := errors.Join(err, token.Close()); err != nil {
			t.Error(err)
		}
	}
}

// SoftHSM reports a wrong tag with the value that it also has for trouble of
// its own. If not even a good value opens, the record is not called broken.
func TestModuleTroubleIsNotABrokenRecord(t *testing.T) {
	token := open(t, softHSM(t))
	b := orgkey.Binding{Org: "acme", ID: "one"}
	sealed, err := token.Seal(bounded(t), b, []byte("value"))
	if err != nil {
		t.Fatal(err)
	}
	sealed[len(sealed)-1] ^= 1
	token.probe[len(token.probe)-1] ^= 1 // as if the module opened nothing
	_, err = token.Open(bounded(t), []orgkey.Sealed{{Binding: b, Ciphertext: sealed}})
	if !errors.Is(err, orgkey.ErrUnavailable) || errors.Is(err, orgkey.ErrSealBroken) {
		t.Errorf("Open: %v, want ErrUnavailable", err)
	}
}

// The AES key and the HMAC key of format 2 have different CKA_IDs, since tokens may
// give none twice. Those that older versions made, or an operator, have the same.
func TestTheTwoKeysOfFormat2(t *testing.T) {
	cfg := freshToken(t)
	if os.Getenv(kind) == "" {
		if err := dropSealingKey(cfg); err != nil {
			t.Fatal(err)
		}
	}
	cfg.noGCM, cfg.CreateSealingKey = true, true
	with := func(do func(*Token) error) (id []byte) {
		t.Helper()
		token, err := Open(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		id = token.SealingKeyID()
		if err := errors.Join(do(token), token.Close()); err != nil {
			t.Fatal(err)
		}
		return id
	}
	binding := orgkey.Binding{Org: "acme", ID: "one"}
	var sealed []byte
	id := with(func(token *Token) (err error) {
		sealed, err = token.Seal(t.Context(), binding, []byte("value"))
		return err
	})
	inToken(t, cfg, func(lib *module, h pkcs11.SessionHandle) {
		for _, want := range []struct {
			keyType uint
			id      []byte
		}{{pkcs11.CKK_AES, id}, {pkcs11.CKK_GENERIC_SECRET, append(bytes.Clone(id), "-mac"...)}} {
			found, err := find(lib, h, 2, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
				pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, want.keyType))
			if err != nil || len(found) != 1 {
				t.Fatalf("%d keys of type %d, %v", len(found), want.keyType, err)
			}
			if got, err := readAttribute(lib, h, found[0], pkcs11.CKA_ID); err != nil || !bytes.Equal(got, want.id) {
				t.Errorf("the key of type %d has CKA_ID %q, %v, want %q", want.keyType, got, err, want.id)
			}
			if err := lib.SetAttributeValue(h, found[0], []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_ID, id)}); err != nil {
				t.Fatal(err)
			}
		}
	})
	same := with(func(token *Token) error {
		opened, err := token.Open(t.Context(), []orgkey.Sealed{{Binding: binding, Ciphertext: sealed}})
		if err == nil && string(opened[0]) != "value" {
			t.Errorf("opened %q", opened[0])
		}
		return err
	})
	if !bytes.Equal(same, id) {
		t.Errorf("the sealing key is %x, and was %x", same, id)
	}
}

// A token that does not have what is needed is left as it was.
func TestNothingLastingIsMadeWithoutTheMechanisms(t *testing.T) {
	cfg := freshToken(t)
	before := 0
	count := func(n *int) func(*module, pkcs11.SessionHandle) {
		return func(lib *module, h pkcs11.SessionHandle) {
			found, err := find(lib, h, 100, pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true))
			if err != nil {
				t.Fatal(err)
			}
			*n = len(found)
		}
	}
	inToken(t, cfg, count(&before))
	cfg.CreateSealingKey, cfg.noWrap = true, true
	token, err := Open(t.Context(), cfg)
	var lacks *LacksError
	if !errors.As(err, &lacks) || !strings.Contains(err.Error(), "private keys wrapped") {
		t.Errorf("Open: %v, want a LacksError that names it", err)
	}
	if err == nil {
		_ = token.Close()
	}
	after := 0
	inToken(t, cfg, count(&after))
	if after != before {
		t.Errorf("%d objects in the token, there were %d", after, before)
	}
}
