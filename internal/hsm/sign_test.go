//go:build cgo

package hsm

import (
	"bytes"
	"crypto/ed25519"
	"testing"

	"github.com/miekg/pkcs11"
)

// The key that signs checkpoints is made once, in the token, and stays there.
func TestTheTokenSignsCheckpoints(t *testing.T) {
	cfg := softHSM(t)
	text := []byte("orgkeys/x\n7\nAAAA\n")
	var keys []ed25519.PublicKey
	for range 2 { // the second time, what was made before
		token := open(t, cfg)
		for range 2 {
			signature, public, err := token.SignCheckpoint(t.Context(), text)
			if err != nil {
				t.Fatal(err)
			}
			if !ed25519.Verify(public, text, signature) {
				t.Error("the signature does not verify")
			}
			keys = append(keys, public)
		}
		if err := token.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for _, k := range keys {
		if !bytes.Equal(k, keys[0]) {
			t.Error("another key signed")
		}
	}
	inToken(t, cfg, func(lib *module, h pkcs11.SessionHandle) {
		found, err := find(lib, h, 2,
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, checkpointKeyLabel))
		if err != nil || len(found) != 1 {
			t.Fatalf("%d keys, %v", len(found), err)
		}
		for _, want := range []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true), pkcs11.NewAttribute(pkcs11.CKA_ALWAYS_SENSITIVE, true),
			pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false), pkcs11.NewAttribute(pkcs11.CKA_NEVER_EXTRACTABLE, true),
		} {
			got, err := lib.GetAttributeValue(h, found[0], []*pkcs11.Attribute{pkcs11.NewAttribute(want.Type, nil)})
			if err != nil || !bytes.Equal(got[0].Value, want.Value) {
				t.Errorf("attribute 0x%x is %x, %v; want %x", want.Type, got[0].Value, err, want.Value)
			}
		}
	})
}

// A process killed while the token makes the pair leaves the public half alone,
// which must not keep the next one from signing.
func TestHalfACheckpointKeyIsMadeAnew(t *testing.T) {
	cfg := softHSM(t)
	token := open(t, cfg)
	if _, _, err := token.SignCheckpoint(t.Context(), []byte("a")); err != nil {
		t.Fatal(err)
	}
	if err := token.Close(); err != nil {
		t.Fatal(err)
	}
	inToken(t, cfg, func(lib *module, h pkcs11.SessionHandle) {
		private, err := find(lib, h, 2, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), pkcs11.NewAttribute(pkcs11.CKA_LABEL, checkpointKeyLabel))
		if err != nil || len(private) != 1 {
			t.Fatal(private, err)
		}
		if err := lib.DestroyObject(h, private[0]); err != nil {
			t.Fatal(err)
		}
	})
	token = open(t, cfg)
	defer token.Close()
	signature, public, err := token.SignCheckpoint(t.Context(), []byte("b"))
	if err != nil || !ed25519.Verify(public, []byte("b"), signature) {
		t.Errorf("signature %x, %v", signature, err)
	}
}
