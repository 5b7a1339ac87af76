//go:build cgo

package hsm

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"testing"

	"github.com/miekg/pkcs11"
)

func newKey(t testing.TB) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, sampleBits)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func pkcs8(t testing.TB, key any) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestPKCS1OutOfPKCS8(t *testing.T) {
	key := newKey(t)
	want, good := x509.MarshalPKCS1PrivateKey(key), pkcs8(t, key)
	for name, der := range map[string][]byte{
		"as it is":                       good,
		"followed by SoftHSM's padding":  append(bytes.Clone(good), make([]byte, 7)...),
		"with an attribute after it all": nil, // made below
	} {
		if der == nil {
			// attributes [0] IMPLICIT SET, of RFC 5208: empty, the outer length two more
			der = append(bytes.Clone(good), 0xa0, 0)
			der[3] += 2
		}
		if got, err := rsaPrivateKey(der); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, der := range map[string][]byte{
		"empty":                    {},
		"PKCS#1 itself":            want,
		"a key on a curve":         pkcs8(t, ec),
		"cut short":                good[:len(good)-1],
		"followed by a block":      append(bytes.Clone(good), make([]byte, 8)...),
		"followed by another byte": append(bytes.Clone(good), 1),
	} {
		if _, err := rsaPrivateKey(der); !errors.Is(err, errPKCS8) {
			t.Errorf("%s: %v, want errPKCS8", name, err)
		}
	}
}

func FuzzPKCS8(f *testing.F) {
	f.Add(pkcs8(f, newKey(f)))
	f.Add([]byte{0x30, 0x80})
	f.Fuzz(func(t *testing.T, der []byte) {
		if key, err := rsaPrivateKey(der); err == nil && !bytes.Contains(der, key) {
			t.Error("returned what was not there")
		}
	})
}

func TestUnwrapCBC(t *testing.T) {
	key, iv := bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, aes.BlockSize)
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	encrypt := func(padded []byte) []byte {
		out := make([]byte, len(padded))
		cipher.NewCBCEncrypter(block, iv).CryptBlocks(out, padded)
		return out
	}
	good := append([]byte("thirteen byte"), 3, 3, 3)
	if got, err := unwrapCBC(key, iv, encrypt(good)); err != nil || string(got) != "thirteen byte" {
		t.Errorf("%q, %v", got, err)
	}
	for name, wrapped := range map[string][]byte{
		"empty":            {},
		"half a block":     make([]byte, 8),
		"padding of 0":     encrypt(make([]byte, 16)),
		"padding of 17":    encrypt(bytes.Repeat([]byte{17}, 32)),
		"padding of mixed": encrypt(append([]byte("thirteen byte"), 2, 3, 3)),
	} {
		if _, err := unwrapCBC(key, iv, wrapped); !errors.Is(err, errPadding) {
			t.Errorf("%s: %v, want errPadding", name, err)
		}
	}
}

// onAnchor runs f in a life that has just begun.
func onAnchor(t *testing.T, f func(token *Token, h pkcs11.SessionHandle)) {
	t.Helper()
	token := open(t, softHSM(t))
	if err := token.life.anchor.do(func(h pkcs11.SessionHandle) error { f(token, h); return nil }); err != nil {
		t.Fatal(err)
	}
}

// A token that takes no private keys from outside is tried with one of its own.
func TestEitherSampleTriesTheMechanisms(t *testing.T) {
	onAnchor(t, func(token *Token, h pkcs11.SessionHandle) {
		for name, make := range map[string]func(*module, pkcs11.SessionHandle) (*sample, error){
			"imported": importSample, "generated": generateSample,
		} {
			s, err := make(token.lib, h)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			der, err := token.courier.export(token.lib, h, token.life.wrappingAs, token.life.wrapping, s.private, s.public)
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			clear(der)
			s.destroy()
		}
		if found, err := find(token.lib, h, 10, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY)); err != nil || len(found) != 0 {
			t.Errorf("%d samples are left, %v", len(found), err)
		}
	})
}

func TestTokenWithoutTheMechanismsIsRefused(t *testing.T) {
	works := wrappings()[:1]
	for name, c := range map[string]struct {
		transports []oaep
		wraps      []wrapping
	}{
		"no OAEP":              {[]oaep{{"nonsense", 0xffff, 0xffff, oaeps()[0].hash, ""}}, works},
		"no key wrap":          {oaeps(), []wrapping{{"nonsense", 0x8000ffff, 0, true, unwrapKWP}}},
		"another key wrap":     {oaeps(), []wrapping{{"unlike", pkcs11.CKM_AES_KEY_WRAP_PAD, 0, true, func(_, _, w []byte) ([]byte, error) { return w, nil }}}},
		"a hash but not MGF's": {[]oaep{{"mixed", pkcs11.CKM_SHA_1, pkcs11.CKG_MGF1_SHA256, oaeps()[1].hash, ""}}, works},
	} {
		t.Run(name, func(t *testing.T) {
			onAnchor(t, func(token *Token, h pkcs11.SessionHandle) {
				recipient, err := newRecipient()
				if err != nil {
					t.Fatal(err)
				}
				chosen := &courier{key: recipient}
				key, err := chosen.chooseTransport(token.lib, h, token.life.wrappingAs, c.transports)
				if err == nil {
					err = chosen.chooseWrapping(token.lib, h, token.life.wrappingAs, key, c.wraps)
				}
				if err == nil {
					t.Error("it was accepted")
				}
			})
		})
	}
}
