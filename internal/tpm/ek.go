package tpm

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"time"

	"github.com/google/go-tpm/tpm2"
)

const (
	maxEK           = 16 << 10 // bytes of an endorsement key's PEM
	maxCertificates = 4        // of its chain, the endorsement key's own included
)

// SecretSize is the length of a challenge's secret, in bytes.
const SecretSize = 32

var ekForm = regexp.MustCompile(`^sha256-[0-9a-f]{64}$`)

// IsEK reports whether text has the form of an endorsement key's ID.
func IsEK(text string) bool { return ekForm.MatchString(text) }

// EK is the public half of a TPM's endorsement key, which names the TPM.
type EK struct {
	ID string // "sha256-" and lower-case hex of SHA-256 over its SubjectPublicKeyInfo

	public *tpm2.TPMTPublic
	rsa    *rsa.PublicKey      // nil: it is no RSA key
	chain  []*x509.Certificate // its own comes first; empty: it came without one
}

// RSA is the key, or nil if it is none of RSA.
func (k EK) RSA() *rsa.PublicKey { return k.rsa }

// ReadEK reads an endorsement key in PEM, or reports *Error: a block PUBLIC KEY,
// or its certificate and those between it and a root. The public area is built
// from the key and the TCG's template (EK Credential Profile 2.5, B.3 to B.4),
// so that nobody but the service decides how a challenge is encrypted.
func ReadEK(text string) (EK, error) {
	if len(text) > maxEK {
		return EK{}, wrong("is longer than %d bytes", maxEK)
	}
	var k EK
	var public any
	rest := []byte(text)
	for len(bytes.TrimSpace(rest)) > 0 {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return EK{}, wrong("is not PEM")
		}
		switch {
		case block.Type == "PUBLIC KEY" && public == nil:
			key, err := x509.ParsePKIXPublicKey(block.Bytes)
			if err != nil {
				return EK{}, wrong("is not a SubjectPublicKeyInfo")
			}
			public = key
		case block.Type == "CERTIFICATE" && len(k.chain) < maxCertificates && (public == nil || len(k.chain) > 0):
			certificate, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return EK{}, wrong("has a certificate that cannot be read")
			}
			if k.chain = append(k.chain, certificate); public == nil {
				public = certificate.PublicKey
			}
		default:
			return EK{}, wrong("is neither one public key nor a chain of at most %d certificates", maxCertificates)
		}
	}
	return k, k.of(public)
}

// of takes over the key.
func (k *EK) of(public any) error {
	switch key := public.(type) {
	case *rsa.PublicKey:
		if key.N.BitLen() != 2048 || key.E != 65537 {
			return wrong("is an RSA key of another kind than 2048 bits with exponent 65537")
		}
		k.public, k.rsa = rsaTemplate(key), key
	case *ecdsa.PublicKey:
		template, err := eccTemplate(key)
		if err != nil {
			return err
		}
		k.public = template
	default:
		return wrong("is neither RSA-2048 nor on P-256 or P-384")
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return wrong("cannot be encoded")
	}
	sum := sha256.Sum256(der)
	k.ID = "sha256-" + hex.EncodeToString(sum[:])
	return nil
}

func rsaTemplate(key *rsa.PublicKey) *tpm2.TPMTPublic {
	public := tpm2.RSAEKTemplate
	public.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: key.N.FillBytes(make([]byte, 256))})
	return &public
}

// eccTemplate builds P-256's public area with SHA-256 and AES-128, and P-384's
// with SHA-384 and AES-256.
func eccTemplate(key *ecdsa.PublicKey) (*tpm2.TPMTPublic, error) {
	public, curve, name, bits := tpm2.ECCEKTemplate, tpm2.TPMECCNistP256, tpm2.TPMAlgSHA256, tpm2.TPMKeyBits(128)
	switch key.Curve {
	case elliptic.P256():
	case elliptic.P384():
		curve, name, bits = tpm2.TPMECCNistP384, tpm2.TPMAlgSHA384, 256
	default:
		return nil, wrong("is neither RSA-2048 nor on P-256 or P-384")
	}
	point, err := key.Bytes() // refuses what is not on the curve
	if err != nil {
		return nil, wrong("is not on its curve")
	}
	half := (len(point) - 1) / 2
	public.NameAlg = name
	public.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
		CurveID: curve,
		Symmetric: tpm2.TPMTSymDefObject{
			Algorithm: tpm2.TPMAlgAES, KeyBits: tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, bits), Mode: tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB),
		},
	})
	public.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: point[1 : 1+half]}, Y: tpm2.TPM2BECCParameter{Buffer: point[1+half:]},
	})
	return &public, nil
}

// Challenge is what TPM2_ActivateCredential takes, without the lengths in front.
type Challenge struct {
	IDObject  []byte
	EncSecret []byte
}

// Challenge encrypts secret, SecretSize bytes, so that only the TPM with the
// endorsement key and an object of that Name, with its private half, decrypts it
// (TPM2_MakeCredential). It is another text each time.
func (k EK) Challenge(name, secret []byte) (Challenge, error) {
	if len(secret) != SecretSize {
		return Challenge{}, fmt.Errorf("a challenge's secret has %d bytes", len(secret))
	}
	key, err := tpm2.ImportEncapsulationKey(k.public)
	if err != nil {
		return Challenge{}, fmt.Errorf("importing an endorsement key: %w", err)
	}
	object, encrypted, err := tpm2.CreateCredential(rand.Reader, key, name, secret)
	if err != nil {
		return Challenge{}, fmt.Errorf("making a challenge: %w", err)
	}
	return Challenge{object, encrypted}, nil
}

// Roots are the authorities whose certificates of endorsement keys are believed.
type Roots struct{ pool *x509.CertPool }

// ReadRoots reads certificates in PEM.
func ReadRoots(text []byte) (Roots, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return Roots{}, errors.New("there is no certificate in it")
	}
	return Roots{pool}, nil
}

var (
	subjectAltName     = asn1.ObjectIdentifier{2, 5, 29, 17}
	ekCertificateUsage = asn1.ObjectIdentifier{2, 23, 133, 8, 1} // tcg-kp-EKCertificate
	tpmManufacturer    = asn1.ObjectIdentifier{2, 23, 133, 2, 1}
)

// Certified reports *Error unless the key is one of RSA and came with a certificate
// of an endorsement key that leads to one of the roots, at that time. A TPM that is
// sold with a key on a curve has one of RSA as well, and would be two.
func (k EK) Certified(r Roots, now time.Time) error {
	if len(k.chain) == 0 || r.pool == nil {
		return wrong("has no certificate")
	}
	if k.rsa == nil {
		return wrong("is not RSA: the organization has to list it")
	}
	own := *k.chain[0]
	if err := checkProfile(&own); err != nil {
		return err
	}
	// crypto/x509 reads no names of directories, and the profile makes the
	// extension critical. It was read above; any other one stays unknown.
	own.UnhandledCriticalExtensions = slices.DeleteFunc(slices.Clone(own.UnhandledCriticalExtensions), subjectAltName.Equal)
	between := x509.NewCertPool()
	for _, c := range k.chain[1:] {
		between.AddCert(c)
	}
	if _, err := own.Verify(x509.VerifyOptions{Roots: r.pool, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok && invalid.Reason == x509.Expired {
			return wrong("has a certificate that is expired or not valid yet")
		}
		return wrong("has a certificate that leads to none of the configured authorities")
	}
	return nil
}

// checkProfile checks what the EK Credential Profile, 3.2, asks of the certificate.
func checkProfile(c *x509.Certificate) error {
	if c.IsCA {
		return wrong("has a certificate of an authority")
	}
	if !slices.ContainsFunc(c.UnknownExtKeyUsage, ekCertificateUsage.Equal) {
		return wrong("has a certificate that is not for endorsement keys")
	}
	for _, e := range c.Extensions {
		if e.Id.Equal(subjectAltName) && namesTPM(e.Value) {
			return nil
		}
	}
	return wrong("has a certificate that names no TPM")
}

// namesTPM reports whether a SubjectAltName (RFC 5280, 4.2.1.6) has a directory
// name with a TPM's manufacturer in it.
func namesTPM(der []byte) bool {
	var names []asn1.RawValue
	if rest, err := asn1.Unmarshal(der, &names); err != nil || len(rest) > 0 {
		return false
	}
	type attribute struct {
		Type  asn1.ObjectIdentifier
		Value asn1.RawValue
	}
	for _, name := range names {
		if name.Class != asn1.ClassContextSpecific || name.Tag != 4 {
			continue
		}
		var sets []asn1.RawValue
		if rest, err := asn1.Unmarshal(name.Bytes, &sets); err != nil || len(rest) > 0 {
			return false
		}
		for _, set := range sets {
			var all []attribute
			if rest, err := asn1.UnmarshalWithParams(set.FullBytes, &all, "set"); err != nil || len(rest) > 0 {
				return false
			}
			for _, a := range all {
				if a.Type.Equal(tpmManufacturer) {
					return true
				}
			}
		}
	}
	return false
}
