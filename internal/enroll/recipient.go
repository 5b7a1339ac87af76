package enroll

import (
	"bytes"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/titanous/rocacheck"

	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// What makes a recipient unacceptable, after what CAs check (CA/Browser Forum,
// Baseline Requirements 6.1.6, and Debian's and Infineon's weak keys).
const (
	recipientExponent = 65537
	smallPrimes       = 1 << 12 // no prime below this may divide the modulus
	fermatRounds      = 128     // primes so close that this many rounds of Fermat's method find them
	maxRecipientPEM   = 2 << 10 // bytes
)

// Recipient is a public key to which a private key is sealed.
type Recipient struct {
	Public *rsa.PublicKey
	DER    []byte // its SubjectPublicKeyInfo, encoded anew
	ID     string // R: hex of SHA-256 over DER
	Origin KeyOrigin
	Device Device
}

// ParseRecipient reads a recipient's PEM, or reports *RecipientError. The caller
// calls Check before anything is sealed to it.
func ParseRecipient(text string) (Recipient, error) {
	return parseKey(text, FromBackend, 3072, 4096)
}

// parseInTPM is ParseRecipient for one in a TPM, of which many make no longer keys.
func parseInTPM(text string) (Recipient, error) {
	return parseKey(text, FromBackend, 2048, 3072, 4096)
}

// parseOwnKey is ParseRecipient for a key that its holder made.
func parseOwnKey(text string) (Recipient, error) { return parseKey(text, FromNode, orgkey.Bits) }

func parseKey(text string, origin KeyOrigin, sizes ...int) (Recipient, error) {
	if len(text) > maxRecipientPEM {
		return Recipient{}, &RecipientError{"is longer than 2 KiB"}
	}
	block, rest := pem.Decode([]byte(text))
	if block == nil || block.Type != "PUBLIC KEY" || len(bytes.TrimSpace(rest)) > 0 {
		return Recipient{}, &RecipientError{"is not one PEM block PUBLIC KEY"}
	}
	parsed, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return Recipient{}, &RecipientError{"is not a SubjectPublicKeyInfo"}
	}
	public, ok := parsed.(*rsa.PublicKey)
	if !ok {
		return Recipient{}, &RecipientError{"is not an RSA key"}
	}
	if !slices.Contains(sizes, public.N.BitLen()) {
		return Recipient{}, &RecipientError{"is not RSA of " + list(sizes) + " bits"}
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return Recipient{}, fmt.Errorf("encoding a recipient: %w", err)
	}
	id, err := envelope.Recipient(public)
	return Recipient{Public: public, DER: der, ID: id, Origin: origin}, err
}

func list(sizes []int) string {
	texts := make([]string, len(sizes))
	for i, n := range sizes {
		texts[i] = strconv.Itoa(n)
	}
	return strings.Join(texts, " or ")
}

// Check reports *RecipientError if the key is one that others can break. It
// takes some milliseconds, so it comes after the asker is known.
func (r Recipient) Check() error {
	if wrong := weakness(r.Public); wrong != "" {
		return &RecipientError{wrong}
	}
	return nil
}

// weakness says why a private key must not be sealed to k, or nothing.
func weakness(k *rsa.PublicKey) string {
	switch {
	case k.E != recipientExponent:
		return "has another exponent than 65537"
	case new(big.Int).GCD(nil, nil, k.N, primorial()).Cmp(big.NewInt(1)) != 0:
		return "has a small factor"
	case closePrimes(k.N):
		return "has two primes that are close to each other"
	case rocacheck.IsWeak(k):
		return "was made by a generator whose keys can be factored (ROCA, CVE-2017-15361)"
	default:
		return ""
	}
}

// primorial is the product of the primes below smallPrimes.
var primorial = sync.OnceValue(func() *big.Int {
	product := big.NewInt(1)
	for n := int64(2); n < smallPrimes; n++ {
		if p := big.NewInt(n); p.ProbablyPrime(0) { // exact below 2^64
			product.Mul(product, p)
		}
	}
	return product
})

// squaresModulo64 has the bit of each number below 64 that a square can be modulo 64.
const squaresModulo64 uint64 = 0x202021202030213

// closePrimes tries Fermat's method: n = a² - b² = (a+b)(a-b), with a from the
// square root of n upwards.
func closePrimes(n *big.Int) bool {
	a := new(big.Int).Sqrt(n)
	square, b, root := new(big.Int), new(big.Int), new(big.Int)
	for range fermatRounds {
		b.Sub(square.Mul(a, a), n)
		// A square is one of twelve numbers modulo 64; most others need no root.
		if b.Sign() >= 0 && squaresModulo64>>(b.Uint64()%64)&1 == 1 {
			if root.Sqrt(b); square.Mul(root, root).Cmp(b) == 0 {
				return true
			}
		}
		a.Add(a, big.NewInt(1))
	}
	return false
}
