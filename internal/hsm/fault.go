//go:build cgo

package hsm

import (
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// errRetired: the session's life has ended, or is about to.
var errRetired = errors.New("the session's life has ended")

// vendorDefined is CKR_VENDOR_DEFINED, from which on each vendor has return
// values of its own; the binding does not name it.
const vendorDefined = pkcs11.Error(0x80000000)

// lost reports whether err says that the library has lost a session, a login,
// an object or the token, or may have: what a new life can put right.
func lost(err error) bool {
	if errors.Is(err, errRetired) || errors.Is(err, errNoCheckpointKey) {
		return true // SoftHSM may miss for good what another process made; a new life reads anew
	}
	var rv pkcs11.Error
	if !errors.As(err, &rv) {
		return false
	}
	if rv >= vendorDefined {
		return true // how network HSMs report a connection that is gone
	}
	switch rv {
	case pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_OPERATION_ACTIVE,
		pkcs11.CKR_OPERATION_NOT_INITIALIZED, pkcs11.CKR_USER_NOT_LOGGED_IN, pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED,
		pkcs11.CKR_OBJECT_HANDLE_INVALID, pkcs11.CKR_KEY_HANDLE_INVALID,
		pkcs11.CKR_WRAPPING_KEY_HANDLE_INVALID, pkcs11.CKR_SLOT_ID_INVALID,
		pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_DEVICE_MEMORY, pkcs11.CKR_HOST_MEMORY,
		pkcs11.CKR_TOKEN_NOT_PRESENT, pkcs11.CKR_TOKEN_NOT_RECOGNIZED,
		pkcs11.CKR_FUNCTION_FAILED, pkcs11.CKR_GENERAL_ERROR:
		return true
	}
	return false
}

// pinRefused reports whether err is a token's "no" to the PIN itself.
func pinRefused(err error) bool {
	var rv pkcs11.Error
	if !errors.As(err, &rv) {
		return false
	}
	switch rv {
	case pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE, pkcs11.CKR_PIN_EXPIRED,
		pkcs11.CKR_PIN_LOCKED, pkcs11.CKR_USER_PIN_NOT_INITIALIZED:
		return true
	}
	return false
}

// is reports whether err is one of the return values given.
func is(err error, values ...pkcs11.Error) bool {
	for _, rv := range values {
		if errors.Is(err, rv) {
			return true
		}
	}
	return false
}

// fault says what was being done, and marks what may pass as orgkey.ErrUnavailable.
func fault(doing string, err error) error {
	if lost(err) {
		return fmt.Errorf("%s: %w: %w", doing, orgkey.ErrUnavailable, err)
	}
	return fmt.Errorf("%s: %w", doing, err)
}
