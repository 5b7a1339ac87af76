//go:build cgo

package hsm

import (
	"errors"
	"fmt"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

func TestLost(t *testing.T) {
	for err, want := range map[error]bool{
		errRetired: true,
		pkcs11.Error(pkcs11.CKR_SESSION_HANDLE_INVALID): true,
		pkcs11.Error(pkcs11.CKR_DEVICE_REMOVED):         true,
		pkcs11.Error(0x80000000):                        true, // a vendor's own, the first
		pkcs11.Error(0x80000384):                        true,
		errors.New("something else"):                    false,
		errSlow:                                         false,
		pkcs11.Error(pkcs11.CKR_PIN_INCORRECT):          false,
		pkcs11.Error(pkcs11.CKR_MECHANISM_INVALID):      false,
		pkcs11.Error(0x7fffffff):                        false,
	} {
		if got := lost(fmt.Errorf("doing something: %w", err)); got != want {
			t.Errorf("lost(%v) is %v", err, got)
		}
		if want && !errors.Is(fault("doing something", err), orgkey.ErrUnavailable) {
			t.Errorf("%v is not passed on as ErrUnavailable", err)
		}
	}
}
