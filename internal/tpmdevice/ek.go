package tpmdevice

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// Where the TCG's EK Credential Profile (2.2.1.4) has things.
const (
	persistentEK   = tpm2.TPMHandle(0x81010001) // an endorsement key that the platform made
	rsaCertificate = tpm2.TPMHandle(0x01c00002) // that of an RSA-2048 endorsement key
	eccCertificate = tpm2.TPMHandle(0x01c0000a) // that of one on P-256
	maxCertificate = 8 << 10                    // bytes
	nvPart         = 512                        // bytes that any TPM reads at once
)

// Endorsement is the public half of the key by which a TPM is known.
type Endorsement struct {
	ID          string // "sha256-" and hex of SHA-256 over the SubjectPublicKeyInfo
	PEM         string // the certificate if there is one, or the public key
	Certificate *x509.Certificate
}

type endorsement struct {
	handle      tpm2.TPMHandle
	name        tpm2.TPM2BName
	public      crypto.PublicKey
	certificate tpm2.TPMHandle // where it may be
}

// endorsement loads the TPM's endorsement key: RSA-2048, or on P-256 if it makes
// no other.
func (t *session) endorsement() (*endorsement, error) {
	if e := t.persistent(); e != nil {
		return e, nil
	}
	e, err := t.createEndorsement(tpm2.RSAEKTemplate, rsaCertificate)
	if errors.Is(err, tpm2.TPMRCValue) || errors.Is(err, tpm2.TPMRCType) || errors.Is(err, tpm2.TPMRCAsymmetric) {
		return t.createEndorsement(tpm2.ECCEKTemplate, eccCertificate)
	}
	return e, err
}

func (t *session) createEndorsement(template tpm2.TPMTPublic, certificate tpm2.TPMHandle) (*endorsement, error) {
	created, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
		InPublic:      tpm2.New2B(template),
	}.Execute(t)
	if err != nil {
		return nil, err
	}
	area, err := created.OutPublic.Contents()
	if err != nil {
		return nil, err
	}
	public, err := tpm2.Pub(*area)
	return &endorsement{created.ObjectHandle, created.Name, public, certificate}, err
}

// persistent returns the RSA endorsement key that the platform keeps in the TPM,
// nil if there is none by the TCG's template: making one anew takes seconds.
func (t *session) persistent() *endorsement {
	read, err := tpm2.ReadPublic{ObjectHandle: persistentEK}.Execute(t)
	if err != nil {
		return nil
	}
	area, err := read.OutPublic.Contents()
	if err != nil || area.Type != tpm2.TPMAlgRSA || area.NameAlg != tpm2.TPMAlgSHA256 || !bytes.Equal(area.AuthPolicy.Buffer, tpm2.RSAEKTemplate.AuthPolicy.Buffer) {
		return nil
	}
	public, err := tpm2.Pub(*area)
	if err != nil {
		return nil
	}
	return &endorsement{persistentEK, read.Name, public, rsaCertificate}
}

func (t *session) flushEK(e *endorsement) {
	if e.handle != persistentEK {
		t.flush(e.handle)
	}
}

// Endorsement reads the public half of the TPM's endorsement key, and its
// certificate where the TPM has one for that key.
func (d Device) Endorsement(ctx context.Context) (*Endorsement, error) {
	var e Endorsement
	err := d.with(ctx, func(t *session) error {
		ek, err := t.endorsement()
		if err != nil {
			return err
		}
		defer t.flushEK(ek)
		der, err := x509.MarshalPKIXPublicKey(ek.public)
		if err != nil {
			return err
		}
		sum := sha256.Sum256(der)
		e.ID = "sha256-" + hex.EncodeToString(sum[:])
		e.PEM = string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
		e.Certificate = t.certificate(ek, der)
		if e.Certificate != nil {
			e.PEM = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: e.Certificate.Raw}))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &e, nil
}

// EK implements client.TPM.
func (k *Key) EK(ctx context.Context) (string, error) {
	e, err := k.device.Endorsement(ctx)
	if err != nil {
		return "", err
	}
	return e.PEM, nil
}

// certificate returns the certificate of the endorsement key, nil if the TPM has
// none, or one of another key: a list by the key itself does without.
func (t *session) certificate(ek *endorsement, public []byte) *x509.Certificate {
	text, err := t.readNV(ek.certificate)
	if err != nil {
		return nil
	}
	// Some makers fill the rest with what is no certificate.
	var first asn1.RawValue
	if _, err := asn1.Unmarshal(text, &first); err != nil {
		return nil
	}
	certificate, err := x509.ParseCertificate(first.FullBytes)
	if err != nil {
		return nil
	}
	der, err := x509.MarshalPKIXPublicKey(certificate.PublicKey)
	if err != nil || !bytes.Equal(der, public) {
		return nil
	}
	return certificate
}

func (t *session) readNV(index tpm2.TPMHandle) ([]byte, error) {
	read, err := tpm2.NVReadPublic{NVIndex: index}.Execute(t)
	if err != nil {
		return nil, err
	}
	area, err := read.NVPublic.Contents()
	if err != nil || area.DataSize > maxCertificate {
		return nil, fmt.Errorf("%w: an index of the wrong size", ErrFailed)
	}
	var all []byte
	for len(all) < int(area.DataSize) {
		part, err := tpm2.NVRead{
			AuthHandle: tpm2.AuthHandle{Handle: index, Name: read.NVName, Auth: tpm2.PasswordAuth(nil)},
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: read.NVName},
			Size:       uint16(min(nvPart, int(area.DataSize)-len(all))), Offset: uint16(len(all)),
		}.Execute(t)
		if err != nil {
			return nil, err
		}
		if len(part.Data.Buffer) == 0 {
			return nil, fmt.Errorf("%w: an index without its data", ErrFailed)
		}
		all = append(all, part.Data.Buffer...)
	}
	return all, nil
}
