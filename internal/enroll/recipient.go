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

// closePrimes tries Fermat's method: n = a² - b² = (a+b)(a-b), with a from the
// square root of n upwards. From one a to the next, a² - n grows by 2a+1.
func closePrimes(n *big.Int) bool {
	one := big.NewInt(1)
	a := new(big.Int).Sqrt(n)
	rest := new(big.Int).Mul(a, a)
	rest.Sub(rest, n)
	step := new(big.Int).Lsh(a, 1)
	step.Add(step, one)
	two, root, square := big.NewInt(2), new(big.Int), new(big.Int)
	for range fermatRounds {
		if rest.Sign() >= 0 && maySquare(rest, root) {
			if root.Sqrt(rest); square.Mul(root, root).Cmp(rest) == 0 {
				return true
			}
		}
		rest.Add(rest, step)
		step.Add(step, two)
	}
	return false
}

// squaresModulo64 has the bit of each number below 64 that a square can be modulo 64.
const squaresModulo64 uint64 = 0x202021202030213

// squareModuli have no common factor, and their product fits in 64 bits. Of numbers that are no
// squares one in 1,600 has the remainders of one by all of them and 64.
var squareModuli = [...]uint64{63, 65, 11, 17, 19, 23, 31}

// squareRemainders says by each of squareModuli which remainders squares have, and has the product.
var squareRemainders = sync.OnceValues(func() (may [len(squareModuli)][65]bool, product *big.Int) {
	product = big.NewInt(1)
	for i, m := range squareModuli {
		for n := range m {
			may[i][n*n%m] = true
		}
		product.Mul(product, new(big.Int).SetUint64(m))
	}
	return may, product
})

// maySquare reports false for most numbers that are no squares, whose root need not be drawn then.
// It overwrites scratch.
func maySquare(n, scratch *big.Int) bool {
	if squaresModulo64>>(n.Uint64()%64)&1 == 0 {
		return false
	}
	may, product := squareRemainders()
	remainder := scratch.Mod(n, product).Uint64()
	for i, m := range squareModuli {
		if !may[i][remainder%m] {
			return false
		}
	}
	return true
}
