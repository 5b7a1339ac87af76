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
	"errors"
	"log/slog"
	"time"
)

// Config says which token to use and how.
type Config struct {
	Module     string // path of the PKCS#11 module, a shared library
	TokenLabel string // CKA label of the token; one token must have it
	PINFile    string // holds the user PIN; readable by its owner only

	// CreateSealingKey lets Open make the sealing key in a token that has none.
	// Without it, Open reports ErrNoSealingKey.
	CreateSealingKey bool

	Generations int // sessions that generate keys; 0: one for each CPU
	Sealings    int // sessions that seal and open; 0: one for each CPU, at least 2

	// A life ends before the first key after RecycleKeys have been made in it
	// (0: 20,000) or after RecycleAge (0: an hour). It bounds the library's
	// memory, about 2 KB a key with SoftHSM, and the use of one wrapping key.
	RecycleKeys int
	RecycleAge  time.Duration

	Log *slog.Logger // nil: nothing is logged
}

// The errors of this package; the others are orgkey's.
var (
	// ErrNoCgo: the binary cannot load a PKCS#11 module.
	ErrNoCgo = errors.New("this binary was built without cgo; PKCS#11 needs it: rebuild with CGO_ENABLED=1 and a C compiler, or use ORGKEYS_KEYSTORE=vault")
	// ErrNoEd25519: the module does not sign with Ed25519.
	ErrNoEd25519 = errors.New("the PKCS#11 module has no Ed25519")
	// ErrNoSealingKey: the token has no sealing key, and Open was not told to make one.
	ErrNoSealingKey = errors.New("the token has no sealing key")
	// ErrPIN: the token refused the PIN. It is not offered again, since tokens lock.
	ErrPIN = errors.New("the token refused the PIN; it is not offered again, so that the token does not lock: correct the PIN file and restart")
)
