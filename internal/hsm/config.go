// Package hsm makes organization keys in a PKCS#11 token and seals records
// with a key that never leaves it.
//
// A Token is both an orgkey.Keystore and an orgkey.Sealer. Three ideas carry it.
//
// Private keys leave the token encrypted. A key pair is a pair of session
// objects, sensitive and extractable. The token wraps the private one with an
// AES key of its own making, which it has handed to this process under
// RSA-OAEP; so neither the module's attributes nor a trace of the calls into it
// show a private key. What is unwrapped must match the public object.
//
// Handles mean something only between a C_Initialize and the C_Finalize that
// follows it, a span called a life here. After C_Initialize a library may give
// the same numbers out again. So when it has lost anything that it was given, no
// old handle is trusted: the life is drained and ended, and another one begins.
// The same path runs after every so many keys, because SoftHSM frees destroyed
// session objects only in C_Finalize.
//
// A call into the library cannot be interrupted. Each one runs in a goroutine
// of its own; a caller whose context ends goes away, and what the call still
// brings is cleaned up behind it. No session is given to anyone else before.
package hsm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// Config says which token to use and how.
type Config struct {
	Module   string // path of the PKCS#11 module, a shared library
	InitArgs string // given to C_Initialize as pReserved, for modules that want it; empty: nothing

	// Which token: one must agree with all that are given.
	TokenLabel        string
	TokenSerial       string
	TokenManufacturer string
	TokenModel        string
	Slot              *uint // nil: any

	// Which sealing key, where the register names none yet. KeyID is a CKA_ID;
	// with it, none is made.
	KeyLabel string // empty: orgkeys-seal-v1
	KeyID    string

	PINFile string // holds the user PIN; readable by its owner only

	// AttemptFile is where a PIN that the token refused is remembered, so that
	// it is offered once. Every process on this machine that uses the token
	// with this PIN file names the same one.
	AttemptFile string

	// CreateSealingKey lets Open make the sealing key in a token that has none.
	// Without it, Open reports ErrNoSealingKey.
	CreateSealingKey bool

	// Register says which keys in the token are in use, for all that share it.
	// nil: the token is this process's alone.
	Register Register
	// ChangeNothing has Open make, name and remove nothing in the token that
	// outlives this process.
	ChangeNothing bool

	Generations int // sessions that generate keys; 0: one for each CPU
	Sealings    int // sessions that seal and open; 0: one for each CPU, at least 2

	// A life ends before the first key after RecycleKeys have been made in it
	// (0: 20,000) or after RecycleAge (0: an hour). It bounds the library's
	// memory, about 2 KB a key with SoftHSM, and the use of one wrapping key.
	RecycleKeys int
	RecycleAge  time.Duration

	Log *slog.Logger // nil: nothing is logged

	noGCM, noWrap bool // of tests: as if the module had none
}

// Register is where the replicas that share a token agree on its keys, by their
// CKA_ID: the database. A purpose is "seal" or "checkpoint".
type Register interface {
	// ChosenKey returns the ID of the key that serves purpose; nil if none is chosen.
	ChosenKey(ctx context.Context, purpose string) ([]byte, error)
	// AnnounceKey writes down that a key with this ID is about to be made.
	AnnounceKey(ctx context.Context, purpose string, id []byte) error
	// ChooseKey makes id the key that serves purpose, unless one is chosen, and
	// returns which is.
	ChooseKey(ctx context.Context, purpose string, id []byte) ([]byte, error)
	// AnnouncedKeys returns every ID that was announced, the chosen one too.
	AnnouncedKeys(ctx context.Context, purpose string) ([][]byte, error)
	// SealedSample returns a value that is sealed and stored; false if there is none.
	SealedSample(ctx context.Context) (orgkey.Sealed, bool, error)
}

// Requirement is one thing that orgkeys wants of a token.
type Requirement struct {
	Name     string
	Optional bool // without it something is missing, and the rest works
	Met      bool
	Detail   string // what was found, or why it is not met
}

// LacksError says that the token lacks what is required of it.
type LacksError struct{ Requirements []Requirement }

func (e *LacksError) Error() string {
	var all []string
	for _, r := range e.Requirements {
		if !r.Met && !r.Optional {
			all = append(all, r.Name+": "+r.Detail)
		}
	}
	return "the token lacks what orgkeys needs: " + strings.Join(all, "; ")
}

// The errors of this package; the others are orgkey's.
var (
	// ErrNoCgo: the binary cannot load a PKCS#11 module.
	ErrNoCgo = errors.New("this binary was built without cgo; PKCS#11 needs it: rebuild with CGO_ENABLED=1 and a C compiler, or use ORGKEYS_KEYSTORE=vault")
	// ErrNoEd25519: the module does not sign with Ed25519.
	ErrNoEd25519 = errors.New("the PKCS#11 module has no Ed25519")
	// ErrNoSealingKey: the token has no sealing key, and Open was not told to make one.
	ErrNoSealingKey = errors.New("the token has no sealing key")

	// ErrPIN: a person must see to the token's PIN. Nothing gets better by
	// trying again, and a token that is tried again may lock.
	ErrPIN = errors.New("the token's user PIN cannot be used")
	// ErrPINRefused: the token refused this PIN, now or earlier.
	ErrPINRefused = fmt.Errorf("%w: the token refused it. It is not used again until the PIN file changes, because tokens lock: correct the PIN file and start again, or, if the token's PIN was changed to what the file holds, remove the file named here", ErrPIN)
	// ErrPINInterrupted: this PIN was offered, the answer was lost, and the token has refused one since.
	ErrPINInterrupted = fmt.Errorf("%w: an earlier attempt with it was interrupted, and the token has refused a PIN since. Correct the PIN file if it is wrong; if it is right, log in with it once by hand (pkcs11-tool --login --list-objects), or remove the file named here", ErrPIN)
	// ErrPINLocked: the token takes no PIN any more.
	ErrPINLocked = fmt.Errorf("%w: it is locked, because wrong PINs were used too often. No PIN is used: the token's security officer must set a new one (pkcs11-tool --login --login-type so --init-pin), then write it to the PIN file and start again", ErrPIN)
	// ErrPINFinalTry: one more refusal locks the token.
	ErrPINFinalTry = fmt.Errorf("%w: the token says that one more wrong PIN locks it, so none is used. Find out who uses wrong ones, log in once by hand with the right PIN (pkcs11-tool --login --list-objects), which resets the counter, and start again", ErrPIN)
	// ErrPINNotInitialized: the token has no user PIN yet.
	ErrPINNotInitialized = fmt.Errorf("%w: the token has none yet. Its security officer must set one (pkcs11-tool --login --login-type so --init-pin)", ErrPIN)
	// ErrPINExpired: the token wants another PIN to be set.
	ErrPINExpired = fmt.Errorf("%w: it has expired. Set a new one at the token (pkcs11-tool --login --change-pin), write it to the PIN file and start again", ErrPIN)
	// ErrTokenNotInitialized: the token is blank.
	ErrTokenNotInitialized = fmt.Errorf("%w: the token is not initialized. Initialize it and set its user PIN (pkcs11-tool --init-token, then --login --login-type so --init-pin)", ErrPIN)
)

// AttemptFile is the AttemptFile of who keeps its data in dir.
func AttemptFile(dir string) string { return filepath.Join(dir, "pin.attempt") }
