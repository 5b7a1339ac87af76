// Package orgkey holds the use cases of organization keys: a key is made in a back
// end, its private half is released once, its public half is stored sealed, and
// the quota is enforced.
//
// A key has four states:
//
//	reserved → pending → released → deleted
//
// reserved is a place in the quota with an expiry. pending is a record whose
// event is committed; it is neither usable nor listed. One conditional update
// makes it released, after every required audit sink has acknowledged the event
// and the back end's copy is destroyed, and before the first byte of the private
// key is written out. Service.Generate follows that order.
//
// The package declares the interfaces of back ends and imports none.
package orgkey

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/org"
)

// The errors of the use cases. Each has one translation, at the edge.
var (
	// ErrNotFound: no such key, or one of another organization, or one not released.
	ErrNotFound = errors.New("organization key not found")
	// ErrOverloaded: as many generations are under way as the back end can do.
	ErrOverloaded = errors.New("too many key generations in progress")
	// ErrBackend: the back end failed to make, export, seal or destroy a key.
	ErrBackend = errors.New("the back end failed")
	// ErrGone: the reservation or pending record expired or was cancelled.
	ErrGone = errors.New("the key's reservation is gone")
	// ErrUnavailable: the store or the back end cannot be reached.
	ErrUnavailable = errors.New("back end not available")
	// ErrSealBroken: a stored value does not decrypt under its binding.
	ErrSealBroken = errors.New("a sealed record does not decrypt")
)

// QuotaError says that an organization has as many keys as it may have.
type QuotaError struct {
	Limit    int
	NodeKeys bool // the quota of node keys, not of organization keys
}

func (e *QuotaError) Error() string { return fmt.Sprintf("quota of %d keys reached", e.Limit) }

// Key is an organization key as its administrators see it.
type Key struct {
	ID          string
	Org         org.ID
	Public      Public
	Fingerprint string // RFC 7638 thumbprint, base64url
	Created     time.Time
	Delivered   time.Time // when the private key was first written out without an error; zero if that is not known
	DeliveredTo string    // the address that it went to; empty if that is not known, or was erased
	Enrollment  string    // by which it was fetched; empty if by none
	OfNode      bool      // it speaks for one node
	LastUsed    time.Time // zero if a node never signed with it
	Nodes       []NodeKey
}

// Ended is how many released keys a deletion ended.
type Ended struct {
	Keys     int // of the organization
	NodeKeys int
}

// State is the state of a key.
type State string

// The states, in their order.
const (
	Reserved State = "reserved"
	Pending  State = "pending"
	Released State = "released"
	Deleted  State = "deleted"
)

// NodeKey is the association of a key with a registered node.
type NodeKey struct {
	KeyID     string
	NodeID    string // the node's IP
	Confirmed bool   // the node has signed with this key
}

// Keystore makes keys in a back end. Its implementations are hsm and vault.
type Keystore interface {
	// Create makes a key of Algorithm in the back end. name is fresh, 128 bits
	// of randomness in the form of a UUID, and already written into the
	// reservation, so that it identifies what a crash leaves behind.
	// Waiting for capacity in the back end ends with ctx.
	Create(ctx context.Context, name string) (BackendKey, error)
}

// BackendKey is a key that exists in a back end. Destroy must be called, even if
// another call fails.
type BackendKey interface {
	// Public is the public half, as reported by the back end.
	Public() Public
	// Export returns the private key as PKCS#1 DER (RFC 8017, A.1.2), checked
	// against Public. The caller clears it.
	Export(ctx context.Context) ([]byte, error)
	// Destroy removes the back end's copy and confirms that it is gone. It may
	// be called again; after a success it does nothing.
	Destroy(ctx context.Context) error
}

// Binding ties a sealed value to its owner and purpose. A value decrypts only
// under the binding that it was sealed under.
type Binding struct {
	Purpose string // one of those below
	Org     string // the organization's ID; for EventKey and CheckpointKey, the log's origin; for PoolKey, the use
	ID      string // the key's ID, or the secret's name; empty for EventKey
}

// What is sealed.
const (
	PublicKey     = ""           // bound to "orgkeys/v1" NUL org NUL key ID
	BootSecret    = "secret"     // bound to "orgkeys/v1/secret" NUL org NUL name
	EventKey      = "event"      // bound to "orgkeys/v1/event" NUL origin NUL
	CheckpointKey = "checkpoint" // bound to "orgkeys/v1/checkpoint" NUL origin NUL "ed25519"

	EnrollmentToken = "enrollment" // bound to "orgkeys/v1/enrollment" NUL org NUL enrollment ID
	ChallengeSecret = "challenge"  // bound to "orgkeys/v1/challenge" NUL org NUL enrollment ID
	WrappedKey      = "delivery"   // bound to "orgkeys/v1/delivery" NUL org NUL key ID "/" R

	PoolKey = "pool" // bound to "orgkeys/v1/pool" NUL use NUL the key's name in the back end
)

// PublicKeyOf is the binding of an organization's public key.
func PublicKeyOf(org org.ID, id string) Binding {
	return Binding{Purpose: PublicKey, Org: string(org), ID: id}
}

// Context is the binding as bytes: AES-GCM's additional data, or Transit's
// key derivation context. Organization IDs and names hold no NUL, so no two
// bindings have the same bytes.
func (b Binding) Context() []byte {
	scheme := "orgkeys/v1"
	if b.Purpose != "" {
		scheme += "/" + b.Purpose
	}
	return []byte(scheme + "\x00" + b.Org + "\x00" + b.ID)
}

// Sealed is a value as it is stored.
type Sealed struct {
	Binding    Binding
	Ciphertext []byte
}

// Unsealed is a value as it is to be sealed.
type Unsealed struct {
	Binding   Binding
	Plaintext []byte
}

// Sealer encrypts values for storage, bound to their owner. Its implementations
// are hsm and vault.
type Sealer interface {
	Seal(ctx context.Context, b Binding, plaintext []byte) ([]byte, error)
	// SealAll is Seal of several values in one call to the back end: all or none.
	SealAll(ctx context.Context, values []Unsealed) ([][]byte, error)
	// Open decrypts all values or none. An item that does not decrypt under its
	// binding is an error that wraps ErrSealBroken; an unreachable back end is one
	// that wraps ErrUnavailable.
	Open(ctx context.Context, items []Sealed) ([][]byte, error)
}

// Locker keeps concurrent reservations of one organization from colliding. It is
// optional: the store's constraint enforces the quota, and Generate continues
// without the lock. Its implementations are LocalLock and redislock.
type Locker interface {
	// Lock waits for org's lock until ctx ends. unlock gives it back.
	Lock(ctx context.Context, org org.ID) (unlock func(), err error)
}

// Record is a key as the store holds it.
type Record struct {
	ID        string
	Org       org.ID
	Sealed    []byte // the public key, PKIX DER, sealed
	Created   time.Time
	Delivered time.Time
	// DeliveredTo is what the personal part of the delivery's event says, if it is there still.
	DeliveredTo string
	Enrollment  string
	LastUsed    time.Time
	Nodes       []NodeKey
}

// Store keeps reservations and records. Every method is one transaction, and
// the events given are committed in it or nothing is. Its implementation is
// sqlstore.
type Store interface {
	// Reserve takes a place for key asked in org's quota until life has passed, or
	// reports *QuotaError. It succeeds only while fewer than limit places are
	// taken, counting every state. asked, which is used once, stays the reservation's
	// own ID, also where a pool's Reserve has given its place to a pool key.
	Reserve(ctx context.Context, org org.ID, asked string, limit int, life time.Duration) error
	// Exchange has a live reservation be for key asked instead of a pool key, until life
	// has passed, or reports ErrGone.
	Exchange(ctx context.Context, asked string, life time.Duration) error
	// Cancel gives a reservation back; a missing one is no error.
	Cancel(ctx context.Context, asked string) error
	// StorePending turns a live reservation for key id into a pending record, or reports ErrGone.
	StorePending(ctx context.Context, id, asked string, sealed []byte, created audit.Event) error
	// Release turns a live pending record into a released one, or reports ErrGone.
	Release(ctx context.Context, id string) error
	// Delivered marks a released key's private half as written out.
	Delivered(ctx context.Context, id string, event audit.Event) error
	// Withdraw ends a pending or released key, if it is there, and reports whether it was;
	// a missing one leaves no event.
	Withdraw(ctx context.Context, id string, event audit.Event) (bool, error)
	// RecordOnce records events of their own, unless they are recorded already.
	RecordOnce(ctx context.Context, events ...audit.Event) error
	// Keys returns org's released keys, newest first.
	Keys(ctx context.Context, org org.ID) ([]Record, error)
	// NodeKeys returns the released keys of org's nodes, newest first.
	NodeKeys(ctx context.Context, org org.ID) ([]Record, error)
	// DeleteKey ends org's released key id, or reports ErrNotFound and does not record event.
	DeleteKey(ctx context.Context, org org.ID, id string, event audit.Event) error
	// DeleteKeys ends all of org's keys, those of its nodes only withNodeKeys. It
	// cancels what is reserved or pending, and revokes the enrollments for such
	// keys, each with what over returns: for one that had expired before, with how many claims
	// whose key was not made, and is not any more; for any other with 0. It records request once with the
	// number of released keys, and also what each returns for every ended key.
	DeleteKeys(ctx context.Context, org org.ID, withNodeKeys bool, request audit.Event, each func(id string, released bool) audit.Event, over func(enrollment string, unmade int) audit.Event) (Ended, error)
	// Sweep ends every reservation and pending record past its expiry, at most
	// limit of them, and records withdrawn(org, id) for each pending one. life is how
	// long a reservation lasts.
	Sweep(ctx context.Context, limit int, life time.Duration, withdrawn func(org org.ID, id string) audit.Event) (int, error)
}
