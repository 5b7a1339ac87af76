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
