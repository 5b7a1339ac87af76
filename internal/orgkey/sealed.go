package orgkey

import (
	"context"
	"crypto/rsa"
	"errors"
	"slices"

	"github.com/orgkeys/orgkeys/internal/envelope"
)

// ErrSealedUnavailable: the back end cannot wrap a private key to a recipient.
var ErrSealedUnavailable = errors.New("the back end cannot seal a private key to a recipient")

// CheckRecipient reports an error unless a back end can seal a key to recipient.
// Whether the recipient's key is weak is for its owner to check.
func CheckRecipient(recipient *rsa.PublicKey) error {
	if recipient == nil || recipient.N == nil || recipient.E != 65537 || !slices.Contains([]int{2048, 3072, 4096}, recipient.N.BitLen()) {
		return errors.New("the recipient is not an RSA key of 2048, 3072 or 4096 bits with exponent 65537")
	}
	return nil
}

// SealedKeystore makes keys whose private half leaves the back end only wrapped
// to a recipient. Its implementations are hsm and vault.
type SealedKeystore interface {
	// CreateSealed makes a key of Algorithm. name is fresh for this attempt, 128
	// bits of randomness in the form of a UUID, and stored already, so that what
	// a crash leaves behind can be found by it. It is never the ID of a key.
	CreateSealed(ctx context.Context, name string) (SealableKey, error)
	// DestroySealed removes what a dead process may have left under name, and
	// confirms that it is gone. What is not there is no error.
	DestroySealed(ctx context.Context, name string) error
}

// SealableKey is such a key. Destroy must be called, whatever else fails.
type SealableKey interface {
	// Public is the public half, as the back end itself reported it.
	Public() Public
	// Seal has the back end wrap the private key, as PKCS#8 DER, to recipient.
	// Neither the private key nor the AES key of the wrap is ever outside the
	// back end. Whether recipient may be trusted to be one is the caller's to
	// check. It may be called again, and then answers with other bytes.
	Seal(ctx context.Context, recipient *rsa.PublicKey) (envelope.SealedKey, error)
	// Destroy removes the back end's copy and confirms that it is gone. It may
	// be called again, and after it succeeded once it does nothing.
	Destroy(ctx context.Context) error
}
