package backendtest

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"hash"
	"math/big"
	"testing"

	"github.com/google/uuid"
	kwp "github.com/tink-crypto/tink-go/v2/kwp/subtle"

	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// Sealed tests ks, of a back end that has the mechanisms. gone is Keystore's.
func Sealed(t *testing.T, ks orgkey.SealedKeystore, gone func(t *testing.T, name string)) {
	t.Run("a key opens for its recipient, and is the public key's other half", func(t *testing.T) { sealedOpens(t, ks) })
	t.Run("each value has a key of its own", func(t *testing.T) { sealedDiffers(t, ks) })
	t.Run("a recipient that is too weak or odd is refused", func(t *testing.T) { sealedRecipients(t, ks) })
	t.Run("a destroyed key is not sealed", func(t *testing.T) { sealedDestroyed(t, ks, gone) })
	t.Run("what is left under a name is removed by it", func(t *testing.T) { sealedRemoved(t, ks, gone) })
	t.Run("nothing is sealed for a request that is over", func(t *testing.T) { sealedCancelled(t, ks) })
}

// NoSealed tests ks, of a back end that lacks the mechanisms.
func NoSealed(t *testing.T, ks orgkey.SealedKeystore) {
	key, err := ks.CreateSealed(bounded(t), uuid.NewString())
	if !errors.Is(err, orgkey.ErrSealedUnavailable) || errors.Is(err, orgkey.ErrUnavailable) {
		t.Errorf("CreateSealed: %v, want ErrSealedUnavailable", err)
	}
	if err == nil {
		_ = key.Destroy(context.Background())
	}
}

func createSealed(t *testing.T, ks orgkey.SealedKeystore) (orgkey.SealableKey, string) {
	t.Helper()
	name := uuid.NewString()
	key, err := ks.CreateSealed(bounded(t), name)
	if err != nil {
		t.Fatalf("CreateSealed: %v", err)
	}
	t.Cleanup(func() {
		if err := key.Destroy(context.Background()); err != nil {
			t.Errorf("Destroy at the end: %v", err)
		}
	})
	return key, name
}

func newRecipient(t *testing.T, bits int) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// OpenSealed opens a sealed key as a node does.
func OpenSealed(sealed envelope.SealedKey, recipient *rsa.PrivateKey) (*rsa.PrivateKey, error) {
	hashes := map[string]func() hash.Hash{envelope.WrapSHA256: sha256.New, envelope.WrapSHA1: sha1.New}
	if hashes[sealed.Alg] == nil || len(sealed.Value) <= recipient.Size() {
		return nil, fmt.Errorf("%d bytes of %q", len(sealed.Value), sealed.Alg)
	}
	aes, err := rsa.DecryptOAEP(hashes[sealed.Alg](), nil, recipient, sealed.Value[:recipient.Size()], nil)
	if err != nil {
		return nil, err
	}
	unwrapper, err := kwp.NewKWP(aes)
	if err != nil || len(aes) != 32 {
		return nil, fmt.Errorf("an AES key of %d bytes: %w", len(aes), err)
	}
	der, err := unwrapper.Unwrap(sealed.Value[recipient.Size():])
	if err != nil {
		return nil, err
	}
	var first asn1.RawValue // SoftHSM 2.6 leaves zeros behind it
	if rest, err := asn1.Unmarshal(der, &first); err != nil || len(bytes.Trim(rest, "\x00")) > 0 || len(rest) > 7 {
		return nil, fmt.Errorf("not one structure: %w", err)
	}
	key, err := x509.ParsePKCS8PrivateKey(first.FullBytes)
	if err != nil {
		return nil, err
	}
	private, ok := key.(*rsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("a %T", key)
	}
	return private, private.Validate()
}

func sealedOpens(t *testing.T, ks orgkey.SealedKeystore) {
	key, _ := createSealed(t, ks)
	for _, bits := range []int{2048, 3072, 4096} {
		recipient := newRecipient(t, bits)
		sealed, err := key.Seal(bounded(t), &recipient.PublicKey)
		if err != nil {
			t.Fatalf("%d bits: Seal: %v", bits, err)
		}
		private, err := OpenSealed(sealed, recipient)
		if err != nil || orgkey.NewPublic(&private.PublicKey).Fingerprint() != key.Public().Fingerprint() {
			t.Errorf("%d bits: what opens is not the key: %v", bits, err)
		}
		if _, err := OpenSealed(sealed, newRecipient(t, bits)); err == nil {
			t.Errorf("%d bits: it opens for another recipient", bits)
		}
	}
}

func sealedDiffers(t *testing.T, ks orgkey.SealedKeystore) {
	key, _ := createSealed(t, ks)
	recipient := newRecipient(t, 3072)
	seen := map[string]bool{}
	for range 3 {
		sealed, err := key.Seal(bounded(t), &recipient.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		aes, err := rsa.DecryptOAEP(map[string]func() hash.Hash{envelope.WrapSHA256: sha256.New, envelope.WrapSHA1: sha1.New}[sealed.Alg](), nil, recipient, sealed.Value[:recipient.Size()], nil)
		if err != nil || seen[string(aes)] {
			t.Errorf("an AES key came twice, or does not open: %v", err)
		}
		seen[string(aes)] = true
	}
}

func sealedRecipients(t *testing.T, ks orgkey.SealedKeystore) {
	key, _ := createSealed(t, ks)
	good := &newRecipient(t, 3072).PublicKey
	for name, recipient := range map[string]*rsa.PublicKey{
		"none": nil, "no modulus": {E: 65537}, "1024 bits": {N: new(big.Int).Rsh(good.N, 2048), E: 65537},
		"3071 bits": {N: new(big.Int).Rsh(good.N, 1), E: 65537}, "exponent 3": {N: good.N, E: 3}, "exponent 1": {N: good.N, E: 1},
		"8192 bits": {N: new(big.Int).Lsh(good.N, 5120), E: 65537},
	} {
		if sealed, err := key.Seal(bounded(t), recipient); err == nil || sealed.Value != nil || errors.Is(err, orgkey.ErrUnavailable) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func sealedDestroyed(t *testing.T, ks orgkey.SealedKeystore, gone func(*testing.T, string)) {
	key, name := createSealed(t, ks)
	if err := key.Destroy(bounded(t)); err != nil {
		t.Fatal(err)
	}
	gone(t, name)
	if sealed, err := key.Seal(bounded(t), &newRecipient(t, 3072).PublicKey); err == nil || sealed.Value != nil {
		t.Error("a destroyed key was sealed")
	}
}

func sealedRemoved(t *testing.T, ks orgkey.SealedKeystore, gone func(*testing.T, string)) {
	key, name := createSealed(t, ks)
	for i := range 2 { // the second time there is nothing
		if err := ks.DestroySealed(bounded(t), name); err != nil {
			t.Errorf("DestroySealed number %d: %v", i+1, err)
		}
		gone(t, name)
	}
	if sealed, err := key.Seal(bounded(t), &newRecipient(t, 3072).PublicKey); err == nil || sealed.Value != nil {
		t.Error("a removed key was sealed")
	}
}

func sealedCancelled(t *testing.T, ks orgkey.SealedKeystore) {
	key, _ := createSealed(t, ks)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if sealed, err := key.Seal(ctx, &newRecipient(t, 3072).PublicKey); !errors.Is(err, context.Canceled) || sealed.Value != nil {
		t.Errorf("Seal: %v, want context.Canceled", err)
	}
}
