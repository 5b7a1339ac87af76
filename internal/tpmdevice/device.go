// Package tpmdevice keeps a node's keys in the TPM 2.0 of its machine: it makes
// them, signs and decrypts with them, and answers challenges.
//
// Nothing stays in the TPM: a key is two blobs, in a file, which only that TPM
// loads. Every operation opens the device, loads what it needs and leaves the TPM
// as it was, so a reset between two of them changes nothing.
package tpmdevice

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rsa"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// The errors, each of which asks for something else to be done.
var (
	// ErrNoTPM: there is none at the path.
	ErrNoTPM = errors.New("no TPM can be opened")
	// ErrDenied: this user may not open it.
	ErrDenied = errors.New("the TPM may not be opened")
	// ErrNotTPM: what is at the path is something else, or a TPM 1.2.
	ErrNotTPM = errors.New("it is not a TPM 2.0")
	// ErrBusy: it may answer later.
	ErrBusy = errors.New("the TPM is busy")
	// ErrLockedOut: it saw too many wrong passwords, and refuses for a while.
	ErrLockedOut = errors.New("the TPM is locked out")
	// ErrOwned: a hierarchy of it has a password, or is disabled.
	ErrOwned = errors.New("a hierarchy of the TPM has a password, or is disabled")
	// ErrCleared: the key was made under another storage root key: the TPM was
	// cleared since, or it is another one. The key is gone for good.
	ErrCleared = errors.New("the TPM was cleared, or is another one")
	// ErrBlob: the TPM, which made the key, does not load what is in the file.
	ErrBlob = errors.New("the TPM does not load the key")
	// ErrFailed: it answers what it should not, or reports a failure of its own.
	ErrFailed = errors.New("the TPM fails")
)

// Device is a TPM by the path of its device, or of a Unix socket.
type Device struct{ Path string }

// Key is a key that only one TPM can use. It signs and decrypts by asking the TPM.
type Key struct {
	blob
	device Device
	public *rsa.PublicKey
	use    Use
}

var _ interface {
	crypto.Signer
	crypto.Decrypter
} = (*Key)(nil)

// Path is that of the TPM.
func (k *Key) Path() string { return k.device.Path }

// Use is what the key was made for.
func (k *Key) Use() Use { return k.use }

// PublicArea is the key's TPMT_PUBLIC.
func (k *Key) PublicArea() []byte { return k.blob.public[2:] } // behind the length

// Public is the key's public half, *rsa.PublicKey.
func (k *Key) Public() crypto.PublicKey { return k.public }

// Use is what a key is for.
type Use int

// The uses of keys.
const (
	Decrypting Use = iota // a recipient
	Speaking              // a node's own key: it signs and decrypts
)

// template is that of an RSA-2048 key which is made in the TPM and never leaves
// it. Its use is not counted for dictionary attacks: a power cut would be, and
// there is no password to guess.
func template(use Use) tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgRSA, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true,
			Decrypt: true, SignEncrypt: use == Speaking,
		},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{
			Symmetric: tpm2.TPMTSymDefObject{Algorithm: tpm2.TPMAlgNull},
			Scheme:    tpm2.TPMTRSAScheme{Scheme: tpm2.TPMAlgNull},
			KeyBits:   2048,
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{}),
	}
}

// Create makes a key.
func (d Device) Create(ctx context.Context, use Use) (*Key, error) {
	var key *Key
	err := d.with(ctx, func(t *session) error {
		created, err := tpm2.Create{
			ParentHandle: tpm2.AuthHandle{Handle: t.srk.ObjectHandle, Name: t.srk.Name, Auth: t.encrypted(tpm2.AESEncryption(128, tpm2.EncryptInOut))},
			InPublic:     tpm2.New2B(template(use)),
		}.Execute(t)
		if err != nil {
			return err
		}
		b := blob{parent: t.srk.Name.Buffer, public: tpm2.Marshal(created.OutPublic), private: tpm2.Marshal(created.OutPrivate)}
		key, err = d.key(b)
		return err
	})
	return key, err
}

// key reads what is public of a blob.
func (d Device) key(b blob) (*Key, error) {
	wrong := fmt.Errorf("%w: it is not a key of orgkeys-node", ErrBlob)
	outer, err := tpm2.Unmarshal[tpm2.TPM2BPublic](b.public)
	if err != nil || len(b.public) < 2 {
		return nil, wrong
	}
	area, err := outer.Contents()
	if err != nil || area.Type != tpm2.TPMAlgRSA {
		return nil, wrong
	}
	public, err := tpm2.Pub(*area)
	if err != nil {
		return nil, wrong
	}
	use := Decrypting
	if area.ObjectAttributes.SignEncrypt {
		use = Speaking
	}
	return &Key{b, d, public.(*rsa.PublicKey), use}, nil
}

// Sign implements crypto.Signer: RSASSA-PKCS1-v1_5 over a SHA-256 digest.
func (k *Key) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if _, pss := opts.(*rsa.PSSOptions); pss || opts.HashFunc() != crypto.SHA256 {
		return nil, errors.New("the TPM's key signs RSASSA-PKCS1-v1_5 with SHA-256 only")
	}
	var signature []byte
	err := k.load(context.Background(), func(t *session, h tpm2.TPMHandle, name tpm2.TPM2BName) error {
		signed, err := tpm2.Sign{
			KeyHandle: tpm2.AuthHandle{Handle: h, Name: name, Auth: t.encrypted(tpm2.AESEncryption(128, tpm2.EncryptIn))},
			Digest:    tpm2.TPM2BDigest{Buffer: digest},
			InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgRSASSA,
				Details: tpm2.NewTPMUSigScheme(tpm2.TPMAlgRSASSA, &tpm2.TPMSSchemeHash{HashAlg: tpm2.TPMAlgSHA256})},
			Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck, Hierarchy: tpm2.TPMRHNull},
		}.Execute(t)
		if err != nil {
			return err
		}
		parts, err := signed.Signature.Signature.RSASSA()
		if err != nil {
			return fmt.Errorf("%w: another signature than was asked for", ErrFailed)
		}
		signature = parts.Sig.Buffer
		return nil
	})
	if err != nil {
		return nil, err
	}
	if err := rsa.VerifyPKCS1v15(k.public, crypto.SHA256, digest, signature); err != nil {
		return nil, fmt.Errorf("%w: a signature that its own key did not make", ErrFailed)
	}
	return signature, nil
}

// ErrDecryption: the ciphertext is none of the key's.
var ErrDecryption = fmt.Errorf("the TPM's key does not decrypt it: %w", rsa.ErrDecryption)

var oaepHashes = map[crypto.Hash]tpm2.TPMAlgID{crypto.SHA256: tpm2.TPMAlgSHA256, crypto.SHA1: tpm2.TPMAlgSHA1}

// Decrypt implements crypto.Decrypter: RSAES-OAEP with SHA-256 or SHA-1, without a label.
func (k *Key) Decrypt(_ io.Reader, ciphertext []byte, opts crypto.DecrypterOpts) ([]byte, error) {
	oaep, ok := opts.(*rsa.OAEPOptions)
	if !ok || len(oaep.Label) > 0 || oaep.MGFHash != 0 && oaep.MGFHash != oaep.Hash {
		return nil, errors.New("the TPM's key decrypts RSAES-OAEP without a label only")
	}
	hash, ok := oaepHashes[oaep.Hash]
	if !ok {
		return nil, errors.New("the TPM's key decrypts RSAES-OAEP with SHA-256 or SHA-1 only")
	}
	var message []byte
	err := k.load(context.Background(), func(t *session, h tpm2.TPMHandle, name tpm2.TPM2BName) error {
		opened, err := tpm2.RSADecrypt{
			KeyHandle:  tpm2.AuthHandle{Handle: h, Name: name, Auth: t.encrypted(tpm2.AESEncryption(128, tpm2.EncryptInOut))},
			CipherText: tpm2.TPM2BPublicKeyRSA{Buffer: ciphertext},
			InScheme: tpm2.TPMTRSADecrypt{Scheme: tpm2.TPMAlgOAEP,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgOAEP, &tpm2.TPMSEncSchemeOAEP{HashAlg: hash})},
		}.Execute(t)
		switch {
		case err == nil:
			message = opened.Message.Buffer
			return nil
		case errors.Is(err, tpm2.TPMRCValue), errors.Is(err, tpm2.TPMRCSize), errors.Is(err, tpm2.TPMRCFailure) && t.sound():
			return ErrDecryption // libtpms says TPM_RC_FAILURE here, which elsewhere means a broken TPM
		}
		return err
	})
	return message, err
}

// Check reports why the TPM cannot use the key, or nothing.
func (k *Key) Check(ctx context.Context) error {
	return k.load(ctx, func(*session, tpm2.TPMHandle, tpm2.TPM2BName) error { return nil })
}

// Activate answers a challenge (TPM2_ActivateCredential). The caller clears what
// it returns.
func (k *Key) Activate(ctx context.Context, idObject, encSecret []byte) ([]byte, error) {
	var secret []byte
	err := k.load(ctx, func(t *session, h tpm2.TPMHandle, name tpm2.TPM2BName) error {
		auth, end, err := tpm2.HMACSession(t, tpm2.TPMAlgSHA256, 16, tpm2.Salted(t.srk.ObjectHandle, *t.srkPublic), tpm2.AESEncryption(128, tpm2.EncryptOut))
		if err != nil {
			return err
		}
		defer func() { _ = end() }() // a session that is gone already
		t.flush(t.srk.ObjectHandle)  // three objects are all that fit
		t.srk = nil
		ek, err := t.endorsement()
		if err != nil {
			return err
		}
		defer t.flushEK(ek)
		activated, err := tpm2.ActivateCredential{
			ActivateHandle: tpm2.AuthHandle{Handle: h, Name: name, Auth: auth},
			KeyHandle:      tpm2.AuthHandle{Handle: ek.handle, Name: ek.name, Auth: tpm2.Policy(tpm2.TPMAlgSHA256, 16, byEndorsement)},
			CredentialBlob: tpm2.TPM2BIDObject{Buffer: idObject},
			Secret:         tpm2.TPM2BEncryptedSecret{Buffer: encSecret},
		}.Execute(t)
		if errors.Is(err, tpm2.TPMRCFailure) && t.sound() || errors.Is(err, tpm2.TPMRCIntegrity) || errors.Is(err, tpm2.TPMRCValue) || errors.Is(err, tpm2.TPMRCSize) {
			return fmt.Errorf("%w: the challenge is not for this key and this TPM", ErrDecryption)
		}
		if err != nil {
			return err
		}
		secret = activated.CertInfo.Buffer
		return nil
	})
	return secret, err
}

// byEndorsement satisfies the policy of the TCG's templates for endorsement keys.
func byEndorsement(t transport.TPM, handle tpm2.TPMISHPolicy, nonce tpm2.TPM2BNonce) error {
	_, err := tpm2.PolicySecret{
		AuthHandle:    tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
		PolicySession: handle, NonceTPM: nonce,
	}.Execute(t)
	return err
}

// session is the TPM for one operation, with its storage root key loaded.
type session struct {
	*connection
	srk       *tpm2.CreatePrimaryResponse
	srkPublic *tpm2.TPMTPublic
}

// with opens the TPM for one operation.
func (d Device) with(ctx context.Context, do func(*session) error) error {
	c, err := open(ctx, d.Path)
	if err != nil {
		return err
	}
	defer c.close()
	t := &session{connection: c}
	if t.srk, err = (tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		InPublic:      tpm2.New2B(tpm2.ECCSRKTemplate),
	}).Execute(c); err != nil {
		return explain(err)
	}
	defer func() {
		if t.srk != nil {
			t.flush(t.srk.ObjectHandle)
		}
	}()
	if t.srkPublic, err = t.srk.OutPublic.Contents(); err != nil {
		return fmt.Errorf("%w: %w", ErrFailed, err)
	}
	return explain(do(t))
}

// load loads the key for one operation.
func (k *Key) load(ctx context.Context, do func(*session, tpm2.TPMHandle, tpm2.TPM2BName) error) error {
	return k.device.with(ctx, func(t *session) error {
		// A blob of another parent is refused like a damaged one.
		if !bytes.Equal(k.parent, t.srk.Name.Buffer) {
			return ErrCleared
		}
		private, err := tpm2.Unmarshal[tpm2.TPM2BPrivate](k.private)
		if err != nil {
			return ErrBlob
		}
		public, err := tpm2.Unmarshal[tpm2.TPM2BPublic](k.blob.public)
		if err != nil {
			return ErrBlob
		}
		loaded, err := tpm2.Load{
			ParentHandle: tpm2.AuthHandle{Handle: t.srk.ObjectHandle, Name: t.srk.Name, Auth: tpm2.PasswordAuth(nil)},
			InPrivate:    *private, InPublic: *public,
		}.Execute(t)
		if errors.Is(err, tpm2.TPMRCIntegrity) || errors.Is(err, tpm2.TPMRCBinding) || errors.Is(err, tpm2.TPMRCSize) {
			return fmt.Errorf("%w: %w", ErrBlob, err)
		}
		if err != nil {
			return err
		}
		defer t.flush(loaded.ObjectHandle)
		return do(t, loaded.ObjectHandle, loaded.Name)
	})
}

// encrypted is a session for one command, salted with the storage root key, so
// that who listens on the bus learns neither parameters nor answers.
func (t *session) encrypted(encryption tpm2.AuthOption) tpm2.Session {
	return tpm2.HMAC(tpm2.TPMAlgSHA256, 16, tpm2.Salted(t.srk.ObjectHandle, *t.srkPublic), encryption)
}

// flush unloads an object. One that a reset has ended is gone already.
func (t *session) flush(handle tpm2.TPMHandle) {
	_, _ = tpm2.FlushContext{FlushHandle: handle}.Execute(t)
}

// sound reports whether the TPM finds nothing wrong with itself.
func (t *session) sound() bool {
	// TPM2_GetTestResult (part 3, 10.4), which go-tpm has not: outData, testResult.
	response, err := t.Send([]byte{0x80, 0x01, 0, 0, 0, 10, 0, 0, 0x01, 0x7c})
	return err == nil && binary.BigEndian.Uint32(response[6:]) == 0 && len(response) >= 16 && binary.BigEndian.Uint32(response[len(response)-4:]) == 0
}

// explain gives a TPM's response code the identity of what is to be done about it.
func explain(err error) error {
	if err == nil {
		return nil
	}
	for _, known := range []struct {
		code tpm2.TPMRC
		is   error
	}{
		{tpm2.TPMRCLockout, ErrLockedOut},
		{tpm2.TPMRCBadAuth, ErrOwned}, {tpm2.TPMRCAuthFail, ErrOwned}, {tpm2.TPMRCHierarchy, ErrOwned},
		{tpm2.TPMRCObjectMemory, ErrBusy}, {tpm2.TPMRCSessionMemory, ErrBusy}, {tpm2.TPMRCObjectHandles, ErrBusy}, {tpm2.TPMRCSessionHandles, ErrBusy},
		{tpm2.TPMRCReferenceH0, ErrBusy}, {tpm2.TPMRCReferenceS0, ErrBusy}, // a reset between two commands
		{tpm2.TPMRCInitialize, ErrBusy},
	} {
		if errors.Is(err, known.code) {
			return fmt.Errorf("%w: it answers %w", known.is, err)
		}
	}
	for _, known := range []error{ErrNoTPM, ErrDenied, ErrNotTPM, ErrBusy, ErrLockedOut, ErrOwned, ErrCleared, ErrBlob, ErrFailed, ErrDecryption, context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, known) {
			return err
		}
	}
	return fmt.Errorf("%w: %w", ErrFailed, err)
}
