// Package envelopetest wraps private keys as back ends do, with Go's own means.
package envelopetest

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"hash"
	"testing"

	kwp "github.com/tink-crypto/tink-go/v2/kwp/subtle"

	"github.com/orgkeys/orgkeys/internal/envelope"
)

// Wrap seals a private key's DER to a recipient, with one of envelope's algorithms.
func Wrap(t testing.TB, recipient *rsa.PublicKey, alg string, private []byte) envelope.SealedKey {
	t.Helper()
	hashes := map[string]func() hash.Hash{envelope.WrapSHA256: sha256.New, envelope.WrapSHA1: sha1.New}
	key := make([]byte, 32)
	rand.Read(key)
	head, err := rsa.EncryptOAEP(hashes[alg](), rand.Reader, recipient, key, nil)
	if err != nil {
		t.Fatal(err)
	}
	w, err := kwp.NewKWP(key)
	if err != nil {
		t.Fatal(err)
	}
	tail, err := w.Wrap(private)
	if err != nil {
		t.Fatal(err)
	}
	return envelope.SealedKey{Alg: alg, Value: append(head, tail...)}
}
