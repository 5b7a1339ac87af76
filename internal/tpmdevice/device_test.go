package tpmdevice_test

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"os"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/orgkeys/orgkeys/internal/tpm"
	"github.com/orgkeys/orgkeys/internal/tpm/tpmtest"
	"github.com/orgkeys/orgkeys/internal/tpmdevice"
)

// A key signs, decrypts and answers challenges, and its file is enough to go on
// after the TPM was restarted.
func TestAKeyInTheTPM(t *testing.T) {
	t.Parallel()
	software := tpmtest.Start(t)
	d := tpmdevice.Device{Path: software.Socket}
	key, err := d.Create(t.Context(), tpmdevice.Speaking)
	if err != nil {
		t.Fatal(err)
	}
	text, err := key.PEM()
	if err != nil {
		t.Fatal(err)
	}
	secret := bytes.Repeat([]byte{7}, tpm.SecretSize)
	for range 2 {
		if key, err = d.Parse(text); err != nil {
			t.Fatal(err)
		}
		digest := sha256.Sum256([]byte("line"))
		if _, err := key.Sign(nil, digest[:], crypto.SHA256); err != nil {
			t.Fatal(err)
		}
		for hash, h := range map[crypto.Hash]func() ([]byte, error){
			crypto.SHA256: func() ([]byte, error) {
				return rsa.EncryptOAEP(crypto.SHA256.New(), rand.Reader, key.Public().(*rsa.PublicKey), []byte("secret"), nil)
			},
			crypto.SHA1: func() ([]byte, error) {
				return rsa.EncryptOAEP(crypto.SHA1.New(), rand.Reader, key.Public().(*rsa.PublicKey), []byte("secret"), nil)
			},
		} {
			sealed, err := h()
			if err != nil {
				t.Fatal(err)
			}
			if got, err := key.Decrypt(nil, sealed, &rsa.OAEPOptions{Hash: hash}); err != nil || string(got) != "secret" {
				t.Errorf("%v: %q, %v", hash, got, err)
			}
			sealed[9]++
			if _, err := key.Decrypt(nil, sealed, &rsa.OAEPOptions{Hash: hash}); !errors.Is(err, tpmdevice.ErrDecryption) {
				t.Errorf("%v, changed: %v", hash, err)
			}
		}
		e, err := d.Endorsement(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		ek, err := tpm.ReadEK(e.PEM)
		if err != nil || ek.ID != e.ID {
			t.Fatalf("%s, %v", e.PEM, err)
		}
		area, err := tpm.ReadKey(key.PublicArea(), tpm.Speaking)
		if err != nil || !area.Public.Equal(key.Public()) {
			t.Fatal(err)
		}
		c, err := ek.Challenge(area.Name, secret)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := key.Activate(t.Context(), c.IDObject, c.EncSecret); err != nil || !bytes.Equal(got, secret) {
			t.Errorf("activating: %x, %v", got, err)
		}
		other := bytes.Clone(area.Name)
		other[5]++
		if c, err = ek.Challenge(other, secret); err != nil {
			t.Fatal(err)
		}
		if _, err := key.Activate(t.Context(), c.IDObject, c.EncSecret); !errors.Is(err, tpmdevice.ErrDecryption) {
			t.Errorf("activating another's: %v", err)
		}
		software.Restart(t)
	}
}

// A TPM whose owner has a password is not broken.
func TestATPMWithAPassword(t *testing.T) {
	t.Parallel()
	for _, hierarchy := range []tpm2.TPMHandle{tpm2.TPMRHOwner, tpm2.TPMRHEndorsement} {
		software := tpmtest.Start(t)
		d := tpmdevice.Device{Path: software.Socket}
		software.Do(t, func(raw transport.TPM) {
			if _, err := (tpm2.HierarchyChangeAuth{
				AuthHandle: tpm2.AuthHandle{Handle: hierarchy, Auth: tpm2.PasswordAuth(nil)}, NewAuth: tpm2.TPM2BAuth{Buffer: []byte("password")},
			}).Execute(raw); err != nil {
				t.Fatal(err)
			}
		})
		_, err := d.Endorsement(t.Context())
		if hierarchy == tpm2.TPMRHOwner {
			_, err = d.Create(t.Context(), tpmdevice.Speaking)
		}
		if !errors.Is(err, tpmdevice.ErrOwned) {
			t.Errorf("hierarchy %#x: %v", hierarchy, err)
		}
	}
}

// What is wrong with a TPM is told apart.
func TestTrouble(t *testing.T) {
	t.Parallel()
	software := tpmtest.Start(t)
	d := tpmdevice.Device{Path: software.Socket}
	key, err := d.Create(t.Context(), tpmdevice.Decrypting)
	if err != nil {
		t.Fatal(err)
	}
	if err := key.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	text, err := key.PEM()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Parse(bytes.Replace(text, []byte("Parent: 0"), []byte("Parent: 1"), 1)); err != nil {
		t.Error(err)
	}
	for _, damaged := range [][]byte{nil, text[:100], bytes.Replace(text, []byte("Parent"), []byte("parent"), 1)} {
		if _, err := d.Parse(damaged); !errors.Is(err, tpmdevice.ErrBlob) {
			t.Errorf("%q: %v", damaged, err)
		}
	}
	another := tpmdevice.Device{Path: tpmtest.Start(t).Socket}
	moved, err := another.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	if err := moved.Check(t.Context()); !errors.Is(err, tpmdevice.ErrCleared) {
		t.Errorf("in another TPM: %v", err)
	}
	before, err := d.Endorsement(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	software.Clear(t)
	if err := key.Check(t.Context()); !errors.Is(err, tpmdevice.ErrCleared) {
		t.Errorf("cleared: %v", err)
	}
	if after, err := d.Endorsement(t.Context()); err != nil || after.ID != before.ID {
		t.Errorf("the endorsement key of a cleared TPM is another, or %v", err)
	}
	file := t.TempDir() + "/file"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]error{
		"/nonexistent": tpmdevice.ErrNoTPM, file + "/below": tpmdevice.ErrNoTPM, t.TempDir(): tpmdevice.ErrNotTPM, file: tpmdevice.ErrNotTPM,
		"/dev/null": tpmdevice.ErrNotTPM, "/dev/zero": tpmdevice.ErrNotTPM, "/dev/tty": tpmdevice.ErrNotTPM,
	} {
		if _, err := (tpmdevice.Device{Path: path}).Endorsement(t.Context()); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", path, err, want)
		}
	}
}
