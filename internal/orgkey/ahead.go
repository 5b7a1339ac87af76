package orgkey

import (
	"context"
	"time"

	"github.com/orgkeys/orgkeys/internal/org"
)

// MaxAge is how long a key that was made ahead may wait in the pool.
const MaxAge = 24 * time.Hour

// Use is what a key is made ahead for. In Vault each use has a mount of its own.
type Use string

// The uses.
const (
	UsePlain  Use = "plain"  // exported once
	UseSealed Use = "sealed" // leaves the back end only wrapped to a recipient
	UseAny    Use = "any"    // either: with a PKCS#11 module the key can do both
)

// Ahead is a pool key as the store holds it.
type Ahead struct {
	ID      string // its name in the back end
	Use     Use
	Sealed  []byte // its record; nil while it is being made
	Expired bool
}

// Taken is a key out of the pool that one transaction has taken for one caller. Nobody
// else can take it, and it never returns to the pool. Open must be called, and the
// key's Destroy if Open succeeds: the key may be released only if Destroy succeeds.
type Taken[K any] struct {
	// ID is the key's name in the back end. It has taken the place of the ID that the
	// transaction was given.
	ID string
	// Open returns the key and when it was made. If it fails, the key is destroyed.
	Open func(context.Context) (K, time.Time, error)
}

// Pool has keys that were made ahead. Its implementations are keypool.Shared and
// keypool.Local.
type Pool interface {
	// Reserve does what Store.Reserve does. If there is a key in the pool, the same
	// transaction takes it; the reservation is for that key then.
	Reserve(ctx context.Context, org org.ID, asked string, limit int, life time.Duration) (*Taken[BackendKey], error)
}

// Trace is a name in the back end under which a process that died may have left something
// that no list there shows.
type Trace struct {
	Name string
	Use  Use
}

// AheadOf is the binding of a pool key's record.
func AheadOf(use Use, id string) Binding { return Binding{Purpose: PoolKey, Org: string(use), ID: id} }

// AheadDetail is what the event of a key's creation says of the pool.
func AheadDetail(made time.Time) map[string]string {
	return map[string]string{"pool": "true", "made": made.UTC().Format(time.RFC3339)}
}

// HeldKey is a key that was made ahead and ends with its process. It serves both uses.
type HeldKey interface {
	BackendKey
	SealableKey
	// CanSeal reports whether the back end has the mechanism of Seal.
	CanSeal() bool
	// Alive reports whether the back end still has it, as far as that is known.
	Alive() bool
}
