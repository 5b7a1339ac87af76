package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"strings"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/keypem"
	"github.com/orgkeys/orgkeys/internal/tpmdevice"
)

// The origins of keys, as enrollments name them.
const (
	originBackend = "backend"
	originNode    = "node"
)

// usualTPM is Linux's device of a TPM that several programs share.
const usualTPM = "/dev/tpmrm0"

func (s settings) device() tpmdevice.Device {
	return tpmdevice.Device{Path: cmp.Or(s.tpm, usualTPM)}
}

// use is what the key that an enrollment begins with is for.
func (s settings) use() tpmdevice.Use {
	if s.origin == originNode {
		return tpmdevice.Speaking
	}
	return tpmdevice.Decrypting
}

// newKey makes the private key that an enrollment begins with: a recipient, or the
// node's own. It returns the text to store, too.
func (s settings) newKey(ctx context.Context) (client.PrivateKey, []byte, error) {
	if s.tpm != "" {
		key, err := s.device().Create(ctx, s.use())
		if err != nil {
			return nil, nil, err
		}
		text, err := key.PEM()
		return key, text, err
	}
	if s.origin == originNode {
		key, err := client.NewOwnKey()
		if err != nil {
			return nil, nil, cannotStore(s.recipientFile, err)
		}
		der := x509.MarshalPKCS1PrivateKey(key)
		defer clear(der)
		return key, keypem.Encode("RSA PRIVATE KEY", der), nil // the form in which the server hands keys out
	}
	key, err := client.NewRecipient()
	if err != nil {
		return nil, nil, cannotStore(s.recipientFile, err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, cannotStore(s.recipientFile, err)
	}
	defer clear(der)
	return key, keypem.Encode("PRIVATE KEY", der), nil
}

// suits reports an error if an earlier run made the key with other settings.
func (s settings) suits(key client.PrivateKey) error {
	made, inTPM := key.(*tpmdevice.Key)
	flag, what := "--tpm", ""
	switch {
	case inTPM && s.tpm == "":
		what = "a key in a TPM, and --tpm is not set"
	case !inTPM && s.tpm != "":
		what = "a key in a file, and --tpm is set"
	case inTPM && made.Use() != s.use():
		flag, what = "--origin", "a key in the TPM that was made for another --origin, not "+s.origin
	default:
		return nil
	}
	return &failure{exitUsage, "recipient " + s.recipientFile + " is " + what, "set " + flag + " as before, or remove the file if no enrollment was begun with it", nil}
}

// ek shows the name of the TPM.
func ek(ctx context.Context, s settings, r *report) error {
	d := s.device()
	e, err := d.Endorsement(ctx)
	if err != nil {
		return err
	}
	r.EK, r.Public, r.TPM = e.ID, e.PEM, d.Path
	certificate := "without a certificate"
	if e.Certificate != nil {
		certificate = "with a certificate of " + e.Certificate.Issuer.String()
	}
	r.add("endorsement key of " + d.Path + ", " + certificate)
	return nil
}

// cause is an error without the words of its kind, which the line before it has.
type cause struct{ kind, err error }

func (c *cause) Error() string {
	_, text, _ := strings.Cut(c.err.Error(), c.kind.Error()+": ")
	return text
}

func (c *cause) Unwrap() error { return c.err }

// tpmTrouble says what is wrong with a TPM, and what to do; nil for other errors.
func tpmTrouble(s settings, err error) *failure {
	path := s.device().Path
	because := func(kind error) error { return &cause{kind, err} }
	switch {
	case errors.Is(err, tpmdevice.ErrBusy):
		return &failure{exitTryLater, "the TPM at " + path + " is busy", "wait until the other program has done, or have both use " + usualTPM + ", which can be shared", because(tpmdevice.ErrBusy)}
	case errors.Is(err, tpmdevice.ErrDenied):
		return &failure{exitConfig, "this user may not open the TPM at " + path, "add it to the group of that device (on many systems tss); a systemd unit also needs PrivateDevices=no and DeviceAllow=" + path + " rw", because(tpmdevice.ErrDenied)}
	case errors.Is(err, tpmdevice.ErrNotTPM):
		return &failure{exitConfig, path + " is not a TPM 2.0", "check --tpm; Linux calls the device " + usualTPM, because(tpmdevice.ErrNotTPM)}
	case errors.Is(err, tpmdevice.ErrLockedOut):
		return &failure{exitTryLater, "the TPM at " + path + " is locked out after wrong passwords", "wait until it recovers, or end the lockout (tpm2_dictionarylockout --clear-lockout)", because(tpmdevice.ErrLockedOut)}
	case errors.Is(err, tpmdevice.ErrOwned):
		return &failure{exitConfig, "a hierarchy of the TPM at " + path + " has a password, or is disabled", "orgkeys-node uses those of the owner and of the endorsement without one (tpm2_changeauth): remove their passwords, or enable the hierarchies in the firmware", because(tpmdevice.ErrOwned)}
	case errors.Is(err, tpmdevice.ErrCleared):
		return &failure{exitConfig, "the TPM at " + path + " was cleared, or is not the one that made the key", "the key is gone: remove its file, and enroll this node again with a new token", because(tpmdevice.ErrCleared)}
	case errors.Is(err, tpmdevice.ErrBlob):
		return &failure{exitConfig, "the TPM at " + path + " does not load the key", "its file is damaged: remove it, and enroll this node again with a new token", because(tpmdevice.ErrBlob)}
	case errors.Is(err, tpmdevice.ErrNoTPM):
		return &failure{exitConfig, "there is no TPM at " + path, "check --tpm, and whether the firmware has the TPM switched on; in a systemd unit, PrivateDevices=no", because(tpmdevice.ErrNoTPM)}
	case errors.Is(err, tpmdevice.ErrDecryption):
		return &failure{exitProtocol, "the server's answer is not for the key in the TPM", "something between this node and " + s.server + " may be changing answers", because(tpmdevice.ErrDecryption)}
	case errors.Is(err, tpmdevice.ErrFailed):
		return &failure{exitConfig, "the TPM at " + path + " fails", "restart the machine; if that does not help, the TPM is broken", because(tpmdevice.ErrFailed)}
	}
	return nil
}
