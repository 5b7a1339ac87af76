package enroll

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"strings"
	"testing"
)

func publicPEM(t testing.TB, k *rsa.PublicKey) string {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

func prime(t *testing.T, bits int) *big.Int {
	t.Helper()
	p, err := rand.Prime(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// nextPrime is the first prime behind p.
func nextPrime(p *big.Int) *big.Int {
	q := new(big.Int).Add(p, big.NewInt(2))
	for !q.ProbablyPrime(20) {
		q.Add(q, big.NewInt(2))
	}
	return q
}

func TestRecipients(t *testing.T) {
	good, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		t.Fatal(err)
	}
	short, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	text := publicPEM(t, &good.PublicKey)
	r, err := ParseRecipient(text)
	if err != nil || r.Check() != nil {
		t.Fatalf("%v, %v", err, r.Check())
	}
	p := prime(t, 1536)
	small := new(big.Int).Mul(prime(t, 3072-9), big.NewInt(509))
	for small.BitLen() != 3072 {
		small.Mul(prime(t, 3072-9), big.NewInt(509))
	}
	for name, c := range map[string]struct{ text, problem string }{
		"none":           {"", "PEM"},
		"2048 bits":      {publicPEM(t, &short.PublicKey), "3072 or 4096"},
		"two blocks":     {text + text, "one PEM block"},
		"a private key":  {string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(short)})), "PUBLIC KEY"},
		"long":           {text + strings.Repeat("\n", 4096), "2 KiB"},
		"exponent 3":     {publicPEM(t, &rsa.PublicKey{N: good.N, E: 3}), "65537"},
		"close primes":   {publicPEM(t, &rsa.PublicKey{N: new(big.Int).Mul(p, nextPrime(p)), E: 65537}), "close"},
		"a small factor": {publicPEM(t, &rsa.PublicKey{N: small, E: 65537}), "small factor"},
	} {
		r, err := ParseRecipient(c.text)
		if err == nil {
			err = r.Check()
		}
		wrong, ok := errors.AsType[*RecipientError](err)
		if !ok || !strings.Contains(wrong.Problem, c.problem) {
			t.Errorf("%s: %v, want a problem with %q", name, err, c.problem)
		}
	}
}

// The terms that an administrator may ask for, at their limits.
func TestTerms(t *testing.T) {
	zero := strings.Repeat("0", 64)
	for _, good := range []string{
		``, `{}`, `{"uses":1000}`, `{"ttlSeconds":60}`, `{"ttlSeconds":2592000}`, `{"scope":"organization"}`,
		`{"bind":{"recipient":"` + zero + `"}}`, `{"ip":"::ffff:192.0.2.1"}`, `{"origin":"backend"}`, `{"origin":"node","scope":"organization"}`,
		`{"bind":{"ek":"sha256-` + zero + `"}}`, `{"bind":{"tpm":true},"uses":1000}`, `{"note":"rack 12"}`,
	} {
		if _, err := parseTerms([]byte(good)); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
	for _, bad := range []string{
		`{"unknown":1}`, `{"aproval":true}`, `{"Approval":true}`, `{"bind":{"recipent":"x"}}`,
		`[]`, `null`, `{"uses":0}`, `{"uses":1001}`, `{"uses":1.5}`, `{"uses":"2"}`, `{"ttlSeconds":59}`, `{"ttlSeconds":2592001}`, `{"ttlSeconds":-1}`,
		`{"scope":"Node"}`, `{"scope":"organization","uses":2}`, `{"origin":"moon"}`, `{"bind":{}}`, `{"bind":{"tpm":false}}`, `{"bind":{"tpm":true,"recipient":"` + zero + `"}}`, `{"uses":2,"bind":{"ek":"sha256-` + zero + `"}}`, `{"bind":{"recipient":"X"}}`, `{"bind":{"ek":"sha256-x"}}`,
		`{"uses":2,"bind":{"recipient":"` + zero + `"}}`, `{"ip":"fe80::1%eth0"}`, `{"ip":"host"}`, `{"uses":2,"ip":"192.0.2.1"}`, `{"note":"a\u202eb"}`,
		`{"note":"` + strings.Repeat("x", 257) + `"}`, `{"uses":1,"uses":1}`,
	} {
		if _, err := parseTerms([]byte(bad)); !errors.As(err, new(*InputError)) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

// Primes that are found in any of the rounds are found, and others are not.
func TestClosePrimes(t *testing.T) {
	middle := prime(t, 1536)
	for _, bits := range []int{1536, 40} {
		a := new(big.Int).Rsh(middle, uint(1536-bits))
		for _, rounds := range []int64{0, 1, 2, 3, 17, 64, fermatRounds - 2, fermatRounds - 1, fermatRounds, fermatRounds + 1, fermatRounds + 64} {
			// n = (a+b)(a-b), and b² is 2a·rounds: its root is that much below a.
			b := new(big.Int).Mul(a, big.NewInt(2*rounds))
			b.Sqrt(b)
			n := new(big.Int).Mul(new(big.Int).Add(a, b), new(big.Int).Sub(a, b))
			if got, want := closePrimes(n), plainFermat(n); got != want {
				t.Errorf("%d bits, some %d rounds: %t, want %t", bits, rounds, got, want)
			}
		}
	}
	for n := range uint64(64) {
		if squaresModulo64>>(n*n%64)&1 == 0 {
			t.Errorf("%d² is taken for no square", n)
		}
	}
}

// plainFermat is the method as it is described.
func plainFermat(n *big.Int) bool {
	a := new(big.Int).Sqrt(n)
	for range fermatRounds {
		b := new(big.Int).Mul(a, a)
		if b.Sub(b, n); b.Sign() >= 0 {
			if root := new(big.Int).Sqrt(b); root.Mul(root, root).Cmp(b) == 0 {
				return true
			}
		}
		a.Add(a, big.NewInt(1))
	}
	return false
}
