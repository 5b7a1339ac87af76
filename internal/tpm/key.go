// Package tpm is the service's side of keys in a TPM 2.0: it reads public areas
// and endorsement keys that nodes send, and makes the challenges that only the
// TPM with both can answer (TPM 2.0 Library Specification, part 1, "Credential
// Protection"). It talks to no TPM.
package tpm

import (
	"bytes"
	"crypto/rsa"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// maxPublic is the longest public area that is read, in bytes: RSA-4096's has 534.
const maxPublic = 1024

// Error says what is wrong with what a node sent.
type Error struct{ Problem string }

func (e *Error) Error() string { return e.Problem }

func wrong(format string, args ...any) error { return &Error{fmt.Sprintf(format, args...)} }

// Use is what a key in a TPM is for.
type Use int

// The uses of keys.
const (
	Decrypting Use = iota // a recipient: it decrypts, and signs nothing
	Speaking              // a node's own key: it signs requests and decrypts boot secrets
)

// Key is a public area that says that its private half was made in a TPM and
// cannot leave it. Whether that is true, the answer to a challenge shows.
type Key struct {
	Public *rsa.PublicKey
	Name   []byte // of the object, with its algorithm in front
}

// ReadKey reads a TPMT_PUBLIC (part 2, 12.2.4), or reports *Error unless its
// attributes are those of a key that was made in the TPM, stays there, and has
// this use. fixedTPM carries the weight: a key that was imported can have every
// other attribute.
func ReadKey(text []byte, use Use) (Key, error) {
	public, err := parse(text)
	if err != nil {
		return Key{}, err
	}
	if err := checkAttributes(public, use); err != nil {
		return Key{}, err
	}
	key, err := publicKey(public)
	if err != nil {
		return Key{}, err
	}
	name, err := tpm2.ObjectName(public)
	if err != nil {
		return Key{}, wrong("has no Name")
	}
	return Key{key, name.Buffer}, nil
}

// parse reads a public area that is encoded in the one way that there is: the
// Name is a digest of its bytes.
func parse(text []byte) (*tpm2.TPMTPublic, error) {
	if len(text) > maxPublic {
		return nil, wrong("is longer than %d bytes", maxPublic)
	}
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](text)
	if err != nil {
		return nil, wrong("is not a TPMT_PUBLIC")
	}
	// Unmarshal says nothing of bytes behind it.
	if !bytes.Equal(tpm2.Marshal(public), text) {
		return nil, wrong("is not the TPMT_PUBLIC of one key, and nothing behind it")
	}
	return public, nil
}

func checkAttributes(public *tpm2.TPMTPublic, use Use) error {
	a := public.ObjectAttributes
	switch {
	case public.Type != tpm2.TPMAlgRSA:
		return wrong("is not an RSA key")
	case public.NameAlg != tpm2.TPMAlgSHA256:
		return wrong("has another Name algorithm than SHA-256")
	case !a.FixedTPM:
		return wrong("could be copied to another TPM: fixedTPM is not set")
	case !a.FixedParent:
		return wrong("could be moved: fixedParent is not set")
	case !a.SensitiveDataOrigin:
		return wrong("was not made in the TPM: sensitiveDataOrigin is not set")
	case a.EncryptedDuplication:
		return wrong("says how it is duplicated")
	case a.Restricted:
		return wrong("is restricted to what the TPM made")
	case !a.UserWithAuth || a.AdminWithPolicy || len(public.AuthPolicy.Buffer) > 0:
		return wrong("is used by a policy")
	case !a.Decrypt:
		return wrong("does not decrypt")
	case use == Speaking && !a.SignEncrypt:
		return wrong("does not sign")
	case use == Decrypting && a.SignEncrypt:
		return wrong("signs, and is to decrypt only")
	}
	return nil
}

func publicKey(public *tpm2.TPMTPublic) (*rsa.PublicKey, error) {
	parameters, err := public.Parameters.RSADetail()
	if err != nil {
		return nil, wrong("has no parameters of an RSA key")
	}
	unique, err := public.Unique.RSA()
	if err != nil {
		return nil, wrong("has no modulus")
	}
	if parameters.Scheme.Scheme != tpm2.TPMAlgNull || parameters.Symmetric.Algorithm != tpm2.TPMAlgNull {
		return nil, wrong("has a scheme of its own")
	}
	key, err := tpm2.RSAPub(parameters, unique)
	switch {
	case err != nil:
		return nil, wrong("is not an RSA key")
	case key.E != 65537: // 0 is the other form of it, with another Name
		return nil, wrong("has another exponent than 65537")
	case int(parameters.KeyBits) != key.N.BitLen() || len(unique.Buffer)*8 != key.N.BitLen():
		return nil, wrong("has another length than it says")
	}
	return key, nil
}
