package orgkey

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"testing"
	"time"
)

func newKey(t *testing.T) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, Bits)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func TestExportedKeyMustMatch(t *testing.T) {
	key, other := newKey(t), newKey(t)
	der := x509.MarshalPKCS1PrivateKey(key)
	if err := NewPublic(&key.PublicKey).CheckPrivate(der); err != nil {
		t.Errorf("its own public key: %v", err)
	}
	if err := NewPublic(&other.PublicKey).CheckPrivate(der); err == nil {
		t.Error("another public key was accepted")
	}
	if err := NewPublic(&rsa.PublicKey{N: key.N, E: 3}).CheckPrivate(der); err == nil {
		t.Error("another exponent was accepted")
	}
	if err := NewPublic(&key.PublicKey).CheckPrivate(append(bytes.Clone(der), 0)); err == nil {
		t.Error("a byte after the key was accepted")
	}
}

func TestWipe(t *testing.T) {
	key := newKey(t)
	words := [][]byte{key.D.Bytes(), key.Primes[0].Bytes()}
	d, p := key.D.Bits(), key.Primes[0].Bits()
	wipe(key)
	for i := range d {
		if d[i] != 0 {
			t.Fatal("the private exponent is still there")
		}
	}
	for i := range p {
		if p[i] != 0 {
			t.Fatal("a prime is still there")
		}
	}
	clear(words[0])
	clear(words[1])
}

// An organization without keys is not told from one with keys by the time that its refusal takes.
func TestVerifyingWithADecoyTakesAsLong(t *testing.T) {
	real, decoy, text, signature := NewPublic(&newKey(t).PublicKey), NewDecoy(), []byte("text"), make([]byte, Bits/8)
	signature[1] = 1
	if n := decoy.key.N.BitLen(); n != Bits {
		t.Errorf("its modulus has %d bits", n)
	}
	shortest := func(p Public) time.Duration {
		least := time.Hour
		for range 200 {
			begun := time.Now()
			if p.Verifies(text, signature) {
				t.Fatal("it verified")
			}
			least = min(least, time.Since(begun))
		}
		return least
	}
	if a, b := shortest(real), shortest(decoy); a > 2*b || b > 2*a {
		t.Errorf("a key takes %s, a decoy %s", a, b)
	}
}
