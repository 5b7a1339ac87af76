package tpm_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/orgkeys/orgkeys/internal/tpm"
	"github.com/orgkeys/orgkeys/internal/tpm/tpmtest"
	"github.com/orgkeys/orgkeys/internal/tpmdevice"
)

func wantWrong(t *testing.T, what string, err error, text string) {
	t.Helper()
	if _, ok := errors.AsType[*tpm.Error](err); !ok || !strings.Contains(err.Error(), text) {
		t.Errorf("%s: %v, want %q", what, err, text)
	}
}

// A TPM as it is sold is believed by its certificate, and only by its maker's.
func TestACertificateOfTheMaker(t *testing.T) {
	t.Parallel()
	sold, authorities := tpmtest.Manufacture(t)
	e, err := tpmdevice.Device{Path: sold.Socket}.Endorsement(t.Context())
	if err != nil || e.Certificate == nil {
		t.Fatalf("%+v, %v", e, err)
	}
	ek, err := tpm.ReadEK(e.PEM)
	if err != nil || ek.ID != e.ID {
		t.Fatalf("%v, %v", ek, err)
	}
	roots, err := tpm.ReadRoots(authorities)
	if err != nil {
		t.Fatal(err)
	}
	if err := ek.Certified(roots, time.Now()); err != nil {
		t.Error(err)
	}
	wantWrong(t, "before its time", ek.Certified(roots, time.Now().Add(-48*time.Hour)), "expired or not valid yet")
	_, others := tpmtest.Manufacture(t)
	strangers, err := tpm.ReadRoots(others)
	if err != nil {
		t.Fatal(err)
	}
	wantWrong(t, "of another maker", ek.Certified(strangers, time.Now()), "none of the configured authorities")
	wantWrong(t, "without authorities", ek.Certified(tpm.Roots{}, time.Now()), "has no certificate")
}

// authority issues certificates of endorsement keys, as a test wants them.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "maker"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return authority{c, key}
}

func (a authority) roots(t *testing.T) tpm.Roots {
	t.Helper()
	roots, err := tpm.ReadRoots(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.certificate.Raw}))
	if err != nil {
		t.Fatal(err)
	}
	return roots
}

func (a authority) issue(t *testing.T, key any, change func(*x509.Certificate)) string {
	t.Helper()
	name, err := asn1.Marshal(pkix.Name{ExtraNames: []pkix.AttributeTypeAndValue{{Type: asn1.ObjectIdentifier{2, 23, 133, 2, 1}, Value: "id:00001014"}}}.ToRDNSequence())
	if err != nil {
		t.Fatal(err)
	}
	san, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 4, IsCompound: true, Bytes: name}})
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC),
		KeyUsage: x509.KeyUsageKeyEncipherment, UnknownExtKeyUsage: []asn1.ObjectIdentifier{{2, 23, 133, 8, 1}}, BasicConstraintsValid: true,
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: san}},
	}
	change(template)
	der, err := x509.CreateCertificate(rand.Reader, template, a.certificate, key, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func TestCertificatesThatAreNotBelieved(t *testing.T) {
	t.Parallel()
	maker := newAuthority(t)
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what   string
		change func(*x509.Certificate)
		text   string
	}{
		{"good", func(*x509.Certificate) {}, ""},
		{"expired", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }, "expired"},
		{"of an authority", func(c *x509.Certificate) { c.IsCA = true }, "of an authority"},
		{"of a web server", func(c *x509.Certificate) { c.UnknownExtKeyUsage = nil }, "not for endorsement keys"},
		{"without a TPM's name", func(c *x509.Certificate) { c.ExtraExtensions = nil }, "names no TPM"},
		{"another critical extension", func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}})
		}, "none of the configured authorities"},
	} {
		text := maker.issue(t, &key.PublicKey, c.change)
		ek, err := tpm.ReadEK(text)
		if err != nil {
			t.Fatalf("%s: %v", c.what, err)
		}
		err = ek.Certified(maker.roots(t), time.Now())
		if c.text == "" {
			if err != nil {
				t.Errorf("%s: %v", c.what, err)
			}
			wantWrong(t, "another maker", ek.Certified(newAuthority(t).roots(t), time.Now()), "none of the configured authorities")
			continue
		}
		wantWrong(t, c.what, err, c.text)
	}
}

// A TPM with certificates of two endorsement keys is one.
func TestACertificateOfAKeyOnACurve(t *testing.T) {
	t.Parallel()
	maker := newAuthority(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ek, err := tpm.ReadEK(maker.issue(t, &key.PublicKey, func(*x509.Certificate) {}))
	if err != nil {
		t.Fatal(err)
	}
	wantWrong(t, "P-256", ek.Certified(maker.roots(t), time.Now()), "is not RSA: the organization has to list it")
}

func TestEndorsementKeysThatAreNotRead(t *testing.T) {
	t.Parallel()
	maker := newAuthority(t)
	long, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		t.Fatal(err)
	}
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := public(t, &p256.PublicKey)
	certificate := maker.issue(t, &p256.PublicKey, func(*x509.Certificate) {})
	for what, text := range map[string]string{
		"nothing": "", "no PEM": "x", "RSA-3072": public(t, &long.PublicKey), "P-521": public(t, &p521.PublicKey), "two keys": good + good,
		"a key and a certificate": good + certificate, "a certificate and a key": certificate + good, "five certificates": strings.Repeat(certificate, 5), "too long": strings.Repeat(" ", 17<<10),
		"a private key": "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "something behind": good + "x",
	} {
		if _, err := tpm.ReadEK(text); err == nil {
			t.Errorf("%s was read", what)
		} else {
			wantWrong(t, what, err, "")
		}
	}
}

func public(t testing.TB, key any) string {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

// The P-384 endorsement key that swtpm_setup makes answers its challenge, too; its
// authorization is an empty password.
func TestAChallengeForP384(t *testing.T) {
	t.Parallel()
	sold, authorities := tpmtest.Manufacture(t)
	key, err := tpmdevice.Device{Path: sold.Socket}.Create(t.Context(), tpmdevice.Decrypting)
	if err != nil {
		t.Fatal(err)
	}
	area, err := tpm.ReadKey(key.PublicArea(), tpm.Decrypting)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tpm.ReadKey(key.PublicArea(), tpm.Speaking)
	wantWrong(t, "a recipient as a node's key", err, "does not sign")
	roots, err := tpm.ReadRoots(authorities)
	if err != nil {
		t.Fatal(err)
	}
	sold.Do(t, func(raw transport.TPM) {
		const handle = tpm2.TPMHandle(0x81010016)
		read, err := tpm2.ReadPublic{ObjectHandle: handle}.Execute(raw)
		if err != nil {
			t.Fatal(err)
		}
		contents, err := read.OutPublic.Contents()
		if err != nil {
			t.Fatal(err)
		}
		their, err := tpm2.Pub(*contents)
		if err != nil {
			t.Fatal(err)
		}
		ek, err := tpm.ReadEK(public(t, their))
		if err != nil {
			t.Fatal(err)
		}
		wantWrong(t, "a bare key", ek.Certified(roots, time.Now()), "has no certificate")
		secret := bytes.Repeat([]byte{3}, tpm.SecretSize)
		challenge, err := ek.Challenge(area.Name, secret)
		if err != nil {
			t.Fatal(err)
		}
		srk, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(raw)
		if err != nil {
			t.Fatal(err)
		}
		loaded := load(t, raw, srk, key)
		got, err := tpm2.ActivateCredential{
			ActivateHandle: tpm2.AuthHandle{Handle: loaded.ObjectHandle, Name: loaded.Name, Auth: tpm2.PasswordAuth(nil)},
			KeyHandle:      tpm2.AuthHandle{Handle: handle, Name: read.Name, Auth: tpm2.PasswordAuth(nil)},
			CredentialBlob: tpm2.TPM2BIDObject{Buffer: challenge.IDObject}, Secret: tpm2.TPM2BEncryptedSecret{Buffer: challenge.EncSecret},
		}.Execute(raw)
		if err != nil || !bytes.Equal(got.CertInfo.Buffer, secret) {
			t.Errorf("%v, %v", got, err)
		}
	})
}

func load(t *testing.T, raw transport.TPM, srk *tpm2.CreatePrimaryResponse, key *tpmdevice.Key) *tpm2.LoadResponse {
	t.Helper()
	text, err := key.PEM()
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	var f struct {
		Type            asn1.ObjectIdentifier
		EmptyAuth       bool `asn1:"optional,explicit,tag:0"`
		Parent          int64
		Public, Private []byte
	}
	if _, err := asn1.Unmarshal(block.Bytes, &f); err != nil {
		t.Fatal(err)
	}
	public, err := tpm2.Unmarshal[tpm2.TPM2BPublic](f.Public)
	if err != nil {
		t.Fatal(err)
	}
	private, err := tpm2.Unmarshal[tpm2.TPM2BPrivate](f.Private)
	if err != nil {
		t.Fatal(err)
	}
	loaded, err := tpm2.Load{ParentHandle: tpm2.AuthHandle{Handle: srk.ObjectHandle, Name: srk.Name, Auth: tpm2.PasswordAuth(nil)}, InPrivate: *private, InPublic: *public}.Execute(raw)
	if err != nil {
		t.Fatal(err)
	}
	return loaded
}

// FuzzReadKey: whatever a node says is read or refused, and what is read has one
// encoding and one Name.
func FuzzReadKey(f *testing.F) {
	for _, seed := range []string{realSpeaking, realDecrypting} {
		f.Add(unhex(f, seed))
	}
	f.Add(tpm2.Marshal(tpm2.RSAEKTemplate))
	f.Add(tpm2.Marshal(tpm2.ECCEKTemplate))
	f.Fuzz(func(t *testing.T, text []byte) {
		for _, use := range []tpm.Use{tpm.Decrypting, tpm.Speaking} {
			key, err := tpm.ReadKey(text, use)
			if err != nil {
				if _, ok := errors.AsType[*tpm.Error](err); !ok {
					t.Errorf("%x: %v", text, err)
				}
				continue
			}
			if key.Public.E != 65537 || len(key.Name) != 34 {
				t.Errorf("%x is read as %+v", text, key)
			}
			if _, err := tpm.ReadKey(append(bytes.Clone(text), 0), use); err == nil {
				t.Errorf("%x is read with a byte behind it", text)
			}
		}
	})
}

// FuzzReadEK: as FuzzReadKey, for endorsement keys; what is read can be
// encrypted to.
func FuzzReadEK(f *testing.F) {
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(public(f, &p384.PublicKey))
	f.Add(realCertificate)
	name := append([]byte{0, 0x0b}, make([]byte, 32)...)
	f.Fuzz(func(t *testing.T, text string) {
		ek, err := tpm.ReadEK(text)
		if err != nil {
			if _, ok := errors.AsType[*tpm.Error](err); !ok {
				t.Errorf("%q: %v", text, err)
			}
			return
		}
		if !tpm.IsEK(ek.ID) {
			t.Errorf("%q has the ID %q", text, ek.ID)
		}
		_ = ek.Certified(tpm.Roots{}, time.Now()) // must not panic
		if _, err := ek.Challenge(name, make([]byte, tpm.SecretSize)); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	})
}
