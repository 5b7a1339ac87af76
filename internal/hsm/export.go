//go:build cgo

package hsm

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"math/big"

	"github.com/miekg/pkcs11"
	kwp "github.com/tink-crypto/tink-go/v2/kwp/subtle"
	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// courier is how keys come out of the token: the wrapping key under RSA-OAEP,
// once a life; private keys under the wrapping key.
type courier struct {
	key  *rsa.PrivateKey // of this process, made at Open
	oaep oaep
	wrap wrapping
}

// courierBits is the strength of what it protects: organization keys.
const courierBits = orgkey.Bits

// wrappingKeySize is that of AES-256, in bytes.
const wrappingKeySize = 32

// oaep is RSA-OAEP with one hash function, for MGF1 as well.
type oaep struct {
	name      string
	mechanism uint
	mgf       uint
	hash      func() hash.Hash
	sealed    string // the algorithm of a key that is sealed with it
}

// oaeps in order of preference. SoftHSM before 2.7 has SHA-1 only, which OAEP
// does not ask collision resistance of (RFC 8017, appendix B.1).
func oaeps() []oaep {
	return []oaep{
		{"RSA-OAEP-SHA256", pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256, sha256.New, envelope.WrapSHA256},
		{"RSA-OAEP-SHA1", pkcs11.CKM_SHA_1, pkcs11.CKG_MGF1_SHA1, sha1.New, envelope.WrapSHA1},
	}
}

// wrapping is a mechanism that encrypts a private key, as PKCS#8, with an AES key.
type wrapping struct {
	name      string
	mechanism uint
	ivSize    int
	rfc5649   bool // what it makes is AES-KWP, which recipients of sealed keys can open
	unwrap    func(key, iv, wrapped []byte) ([]byte, error)
}

// Numbers that the binding does not name.
const (
	aesKeyWrapKWP    = 0x210B     // PKCS#11 3.0
	lunaKWP          = 0x80000171 // Thales Luna: CKM_AES_KWP
	cloudHSMZeroPad  = 0x8000216F // AWS CloudHSM: CKM_CLOUDHSM_AES_KEY_WRAP_ZERO_PAD
	cloudHSMPKCS5Pad = 0x8000210A // AWS CloudHSM: CKM_CLOUDHSM_AES_KEY_WRAP_PKCS5_PAD
	nssKeyWrapPad    = 0xCE534352 // NSS: CKM_NSS_AES_KEY_WRAP_PAD
)

// wrappings in order of preference: RFC 5649 under its numbers, RFC 3394 with
// the padding of PKCS#7, then CBC. CKM_AES_KEY_WRAP_PAD is the first in some
// modules and the second in others, which is why the choice is made by trying.
func wrappings() []wrapping {
	return []wrapping{
		{"CKM_AES_KEY_WRAP_KWP", aesKeyWrapKWP, 0, true, unwrapKWP},
		{"CKM_AES_KEY_WRAP_PAD", pkcs11.CKM_AES_KEY_WRAP_PAD, 0, true, unwrapKWP},
		{"Luna's CKM_AES_KWP", lunaKWP, 0, true, unwrapKWP},
		{"CKM_CLOUDHSM_AES_KEY_WRAP_ZERO_PAD", cloudHSMZeroPad, 0, true, unwrapKWP},
		{"CKM_AES_KEY_WRAP_PAD with PKCS#7 padding", pkcs11.CKM_AES_KEY_WRAP_PAD, 0, false, unwrapPaddedKW},
		{"CKM_NSS_AES_KEY_WRAP_PAD", nssKeyWrapPad, 0, false, unwrapPaddedKW},
		{"CKM_CLOUDHSM_AES_KEY_WRAP_PKCS5_PAD", cloudHSMPKCS5Pad, 0, false, unwrapPaddedKW},
		{"CKM_AES_CBC_PAD", pkcs11.CKM_AES_CBC_PAD, aes.BlockSize, false, unwrapCBC},
	}
}

func unwrapKWP(key, _, wrapped []byte) ([]byte, error) {
	w, err := kwp.NewKWP(key)
	if err != nil {
		return nil, err
	}
	return w.Unwrap(wrapped)
}

var errPadding = errors.New("padding is not well-formed")

func unwrapCBC(key, iv, wrapped []byte) ([]byte, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	if len(wrapped) == 0 || len(wrapped)%aes.BlockSize != 0 {
		return nil, errPadding
	}
	plain := make([]byte, len(wrapped))
	cipher.NewCBCDecrypter(block, iv).CryptBlocks(plain, wrapped)
	return unpad(plain, aes.BlockSize)
}

// unpad removes the padding of PKCS#7 (RFC 5652, section 6.3), or clears plain.
func unpad(plain []byte, block int) ([]byte, error) {
	pad := int(plain[len(plain)-1])
	if pad == 0 || pad > block || pad > len(plain) {
		clear(plain)
		return nil, errPadding
	}
	for _, b := range plain[len(plain)-pad:] {
		if int(b) != pad {
			clear(plain)
			return nil, errPadding
		}
	}
	return plain[:len(plain)-pad], nil
}

var errKeyWrap = errors.New("the wrapped key is not intact")

// unwrapPaddedKW is RFC 3394, section 2.2.2, of a plaintext padded as PKCS#7 has
// it, to blocks of 8 bytes.
func unwrapPaddedKW(key, _, wrapped []byte) ([]byte, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	n := len(wrapped)/8 - 1
	if len(wrapped)%8 != 0 || n < 2 {
		return nil, errKeyWrap
	}
	plain := bytes.Clone(wrapped[8:])
	var b [aes.BlockSize]byte
	copy(b[:8], wrapped[:8])
	for t := 6 * n; t > 0; t-- {
		r := plain[(t-1)%n*8:][:8]
		binary.BigEndian.PutUint64(b[:8], binary.BigEndian.Uint64(b[:8])^uint64(t))
		copy(b[8:], r)
		block.Decrypt(b[:], b[:])
		copy(r, b[8:])
	}
	defer clear(b[:])
	if subtle.ConstantTimeCompare(b[:8], bytes.Repeat([]byte{0xA6}, 8)) != 1 {
		clear(plain)
		return nil, errKeyWrap
	}
	return unpad(plain, 8)
}

// makeWrappingKey has the token make l's wrapping key and hand it over. The
// first life finds out how.
func (t *Token) makeWrappingKey(l *life, h pkcs11.SessionHandle) (err error) {
	if t.courier == nil {
		first := &trial{token: t, life: l, h: h}
		first.run()
		return first.err()
	}
	if l.wrappingAs, err = generateWrappingKey(t.lib, h); err != nil {
		return err
	}
	l.wrapping, err = t.courier.fetch(t.lib, h, l.wrappingAs)
	return err
}

func generateWrappingKey(lib *module, h pkcs11.SessionHandle) (pkcs11.ObjectHandle, error) {
	key, err := lib.GenerateKey(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true),
		pkcs11.NewAttribute(pkcs11.CKA_WRAP, true),
		pkcs11.NewAttribute(pkcs11.CKA_UNWRAP, false),
		pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, false),
		pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, false),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, wrappingKeySize),
	})
	if err != nil {
		return 0, fmt.Errorf("making the wrapping key by CKM_AES_KEY_GEN: %w", err)
	}
	return key, nil
}

// fetch returns the wrapping key, which the token encrypts for c's key.
func (c *courier) fetch(lib *module, h pkcs11.SessionHandle, wrappingKey pkcs11.ObjectHandle) ([]byte, error) {
	wrapped, err := c.oaep.transport(lib, h, &c.key.PublicKey, wrappingKey)
	if err != nil {
		return nil, fmt.Errorf("fetching the wrapping key by %s: %w", c.oaep.name, err)
	}
	key, err := rsa.DecryptOAEP(c.oaep.hash(), nil, c.key, wrapped, nil)
	if err != nil {
		return nil, fmt.Errorf("fetching the wrapping key by %s: %w", c.oaep.name, err)
	}
	if len(key) != wrappingKeySize {
		clear(key)
		return nil, fmt.Errorf("the wrapping key has %d bytes", len(key))
	}
	return key, nil
}

// transport returns an AES key of the token, encrypted for recipient.
func (o oaep) transport(lib *module, h pkcs11.SessionHandle, recipient *rsa.PublicKey, key pkcs11.ObjectHandle) ([]byte, error) {
	public, err := lib.CreateObject(h, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false),
		pkcs11.NewAttribute(pkcs11.CKA_WRAP, true),
		pkcs11.NewAttribute(pkcs11.CKA_MODULUS, recipient.N.Bytes()),
		pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, big.NewInt(int64(recipient.E)).Bytes()),
	})
	if err != nil {
		return nil, fmt.Errorf("importing the recipient: %w", err)
	}
	params := pkcs11.NewOAEPParams(o.mechanism, o.mgf, pkcs11.CKZ_DATA_SPECIFIED, nil)
	wrapped, err := lib.WrapKey(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_OAEP, params)}, public, key)
	return wrapped, errors.Join(err, lib.DestroyObject(h, public))
}

// newRecipient makes the key that the wrapping key is encrypted to.
func newRecipient() (*rsa.PrivateKey, error) {
	key, err := rsa.GenerateKey(rand.Reader, courierBits)
	if err != nil {
		return nil, fmt.Errorf("making the recipient of the wrapping key: %w", err)
	}
	return key, nil
}

func (c *courier) chooseTransport(lib *module, h pkcs11.SessionHandle, wrappingAs pkcs11.ObjectHandle, candidates []oaep) ([]byte, error) {
	var failures []error
	for _, c.oaep = range candidates {
		wrappingKey, err := c.fetch(lib, h, wrappingAs)
		if err == nil {
			return wrappingKey, nil
		}
		failures = append(failures, err)
	}
	return nil, errors.Join(append(failures, errNoneWorks)...)
}

func (c *courier) chooseWrapping(lib *module, h pkcs11.SessionHandle, wrappingAs pkcs11.ObjectHandle, wrappingKey []byte, candidates []wrapping) error {
	s, err := makeSample(lib, h)
	if err != nil {
		return err
	}
	defer s.destroy()
	var failures []error
	for _, c.wrap = range candidates {
		der, err := c.export(lib, h, wrappingAs, wrappingKey, s.private, s.public)
		if err == nil {
			clear(der)
			return nil
		}
		failures = append(failures, err)
	}
	return errors.Join(append(failures, errNoneWorks)...)
}

var errNoneWorks = errors.New("none works")

// sample is a private key in the token that is thrown away.
type sample struct {
	private pkcs11.ObjectHandle
	public  orgkey.Public
	destroy func()
}

// makeSample imports a key, which is quick, or has the token generate one if it
// takes none.
func makeSample(lib *module, h pkcs11.SessionHandle) (*sample, error) {
	if s, err := importSample(lib, h); err == nil {
		return s, nil
	}
	return generateSample(lib, h)
}

const sampleBits = 1024 // quick to make, and used for nothing

func importSample(lib *module, h pkcs11.SessionHandle) (*sample, error) {
	key, err := rsa.GenerateKey(rand.Reader, sampleBits)
	if err != nil {
		return nil, err
	}
	object, err := lib.CreateObject(h, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SIGN, true),
		pkcs11.NewAttribute(pkcs11.CKA_MODULUS, key.N.Bytes()),
		pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, big.NewInt(int64(key.E)).Bytes()),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE_EXPONENT, key.D.Bytes()),
		pkcs11.NewAttribute(pkcs11.CKA_PRIME_1, key.Primes[0].Bytes()),
		pkcs11.NewAttribute(pkcs11.CKA_PRIME_2, key.Primes[1].Bytes()),
		pkcs11.NewAttribute(pkcs11.CKA_EXPONENT_1, key.Precomputed.Dp.Bytes()),
		pkcs11.NewAttribute(pkcs11.CKA_EXPONENT_2, key.Precomputed.Dq.Bytes()),
		pkcs11.NewAttribute(pkcs11.CKA_COEFFICIENT, key.Precomputed.Qinv.Bytes()),
	})
	if err != nil {
		return nil, fmt.Errorf("importing a key to try: %w", err)
	}
	// A sample that stays is a worthless session object.
	return &sample{object, orgkey.NewPublic(&key.PublicKey), func() { _ = lib.DestroyObject(h, object) }}, nil
}

func generateSample(lib *module, h pkcs11.SessionHandle) (*sample, error) {
	p, err := generatePair(lib, h, "orgkeys-sample")
	if err != nil {
		return nil, err
	}
	return &sample{p.private, p.key, func() { _ = p.destroy(lib, h) }}, nil
}

// export returns a private key of the token as PKCS#1 DER, checked against its
// public half. It is encrypted while outside of the token and of this function.
func (c *courier) export(lib *module, h pkcs11.SessionHandle, wrappingAs pkcs11.ObjectHandle, wrappingKey []byte, private pkcs11.ObjectHandle, public orgkey.Public) ([]byte, error) {
	var iv []byte
	if c.wrap.ivSize > 0 {
		iv = make([]byte, c.wrap.ivSize)
		rand.Read(iv)
	}
	wrapped, err := lib.wrap(h, c.wrap.mechanism, iv, wrappingAs, private)
	if err != nil {
		return nil, fmt.Errorf("wrapping by %s: %w", c.wrap.name, err)
	}
	pkcs8, err := c.wrap.unwrap(wrappingKey, iv, wrapped)
	if err != nil {
		return nil, fmt.Errorf("unwrapping by %s: %w", c.wrap.name, err)
	}
	defer clear(pkcs8)
	pkcs1, err := rsaPrivateKey(pkcs8)
	if err != nil {
		return nil, err
	}
	if err := public.CheckPrivate(pkcs1); err != nil {
		return nil, err
	}
	return append(make([]byte, 0, len(pkcs1)), pkcs1...), nil
}

var errPKCS8 = errors.New("the token's private key is not PKCS#8 with an RSA key")

// rsaPrivateKey returns the part of a PKCS#8 PrivateKeyInfo (RFC 5208, section
// 5) that is the RSAPrivateKey, without copying it. SoftHSM 2.6 pads what it
// wraps to whole 8-byte blocks and takes the zeros for part of it, so up to 7
// may follow.
func rsaPrivateKey(pkcs8 []byte) ([]byte, error) {
	rsaEncryption := asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}
	input := cryptobyte.String(pkcs8)
	var info, algorithm, key cryptobyte.String
	var version int
	var oid asn1.ObjectIdentifier
	if !input.ReadASN1(&info, cbasn1.SEQUENCE) || len(input) > 7 || !isZero(input) ||
		!info.ReadASN1Integer(&version) || version != 0 ||
		!info.ReadASN1(&algorithm, cbasn1.SEQUENCE) || !algorithm.ReadASN1ObjectIdentifier(&oid) || !oid.Equal(rsaEncryption) ||
		!info.ReadASN1(&key, cbasn1.OCTET_STRING) {
		return nil, errPKCS8
	}
	return key, nil
}

func isZero(b []byte) bool {
	for _, x := range b {
		if x != 0 {
			return false
		}
	}
	return true
}
