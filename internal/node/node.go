// Package node is what bridge nodes do with their organization's key: they
// sign a line of text, and by that register, unregister, and fetch their boot
// secrets. It is also what administrators do with nodes and secrets.
//
// # Signed requests
//
// Deployed nodes sign
//
//	ip|region|timestamp    or    ip|region|timestamp|id_org
//
// with RSASSA-PKCS1-v1_5 (RFC 8017, 8.2) and SHA-256, over the text of the
// fields as they were sent; unregister may leave the region out. The signature
// is base64 (RFC 4648, section 4), padded, with nothing before, in or after it.
//
// The line names neither the endpoint nor the other fields, and the scheme is
// deterministic. So a use of a signature that changes something is recorded in
// the transaction of the change, under the key's ID and the digest of the
// line, until nobody can present it any more: the same request again gets the
// same answer and changes nothing, another request under it is refused. What
// fails records nothing. Fetching secrets neither uses a signature up nor is
// refused by one; only the key's holder can read the answer. What is left: a
// captured signature of a fetch can register that node once, within the window.
//
// Whoever holds an organization key speaks for every node of its organization,
// whoever holds a node key for its own node only: the one that registered with
// it first. The claimed address is never compared with the one that a request
// came from. A request may name its key (key_id, not signed); it only selects.
//
// # What strangers can cause
//
// Verification is all that a caller without a key can make the service do. An
// unknown organization costs as much as a known one with one key and gets the
// same answer. Opened public keys are remembered (orgkey.Opener), so that a
// request costs an unsealing only when its organization was not heard of for a
// long time; that a damaged one does not open is remembered for a minute.
// The organization key that verified last is tried first, without reading keys, so that
// a fleet's requests do not read them each time. Whether a key lives, and is the one that is stored, is never
// cached, but read in the transaction that acts; if it is not so, the request is verified once more. At most MaxKeys keys of an organization are tried.
//
// Verifications under way are bounded, in two lanes. A source address (IPv6 by
// its /64) whose signatures failed too often lately is moved to the narrow
// lane, shared by all such addresses, and hears "too many failures" where it
// would have heard "bad signature". Its good signatures are still served:
// behind one NAT, a stranger can make its neighbours wait, but can lock out
// neither them nor, from elsewhere, anybody. Only failures count, and nothing
// is counted by organization.
package node

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/jsonbody"
	"github.com/orgkeys/orgkeys/internal/org"
)

const (
	// MaxKeys is how many of an organization's keys, the newest, a signature is tried against.
	MaxKeys = 64
	// MaxSecrets is how many boot secrets an organization may have.
	MaxSecrets = 64
)

// The errors of the use cases. Each has one translation, at the edge.
var (
	// ErrStale: the timestamp is further from the present than the window.
	ErrStale = errors.New("timestamp is outside the accepted window")
	// ErrSignature: unknown organization, unknown key or wrong signature; the caller does not learn which.
	ErrSignature = errors.New("signature is not valid")
	// ErrTooManyFailures: ErrSignature, from an address that causes many, or no place in its lane.
	ErrTooManyFailures = errors.New("too many failed signatures from this address")
	// ErrBusy: too many verifications under way, or too much memory taken by answers.
	ErrBusy = errors.New("too many signed requests in progress")
	// ErrReused: the signature was used for another request.
	ErrReused = errors.New("signature was used for another request")
	// ErrKeyGone: the key that verified was deleted, or sealed anew, before the request could act. The service then verifies once more.
	ErrKeyGone = errors.New("the key that verified was deleted or changed")
	// ErrLarger: an organization's secrets are larger than there was memory reserved for. Callers of the service do not see it.
	ErrLarger = errors.New("the secrets are larger than expected")
	// ErrAddressInUse: a node key named the address of another node.
	ErrAddressInUse = errors.New("the address belongs to another node")
	// ErrAddressNotAllowed: a node key named another address than its enrollment allows.
	ErrAddressNotAllowed = errors.New("the key was enrolled for another address")
	// ErrNodeNotFound: no such node, or one of another organization.
	ErrNodeNotFound = errors.New("node not found")
	// ErrAlreadyDeleted: the node is deleted already.
	ErrAlreadyDeleted = errors.New("node is already deleted")
	// ErrSecretNotFound: no such boot secret.
	ErrSecretNotFound = errors.New("secret not found")
	// ErrSecretBroken: a stored boot secret does not open for its organization and name.
	ErrSecretBroken = errors.New("a boot secret does not decrypt")
	// ErrTooManySecrets: the organization has MaxSecrets boot secrets.
	ErrTooManySecrets = fmt.Errorf("an organization may have %d secrets", MaxSecrets)
)

// InputError says what is wrong with a request, in words for its sender.
type InputError = jsonbody.Error

// Origin is where a signed request came from.
type Origin struct {
	Request string // the request's ID
	Address string // the client's IP address, as the transport observed it
}

// Node is a bridge node as it described itself.
type Node struct {
	ID         string
	Org        org.ID
	IP         netip.Addr // identifies the node within Org; never an IPv4-mapped IPv6 address, never zoned
	Region     string
	Version    string
	Status     string
	URL        string
	Provider   string // as sent; empty if it was not
	Services   int64
	Registered time.Time // when it registered first, or came back after a deletion
	Updated    time.Time // when it registered last
	Seen       time.Time // when it last signed anything, to within the interval of Service.Keep
}

// Secret is a boot secret as administrators see it.
type Secret struct {
	Name    string
	Created time.Time
	Updated time.Time
}

// SealedSecret is a boot secret as the store holds it.
type SealedSecret struct {
	Name   string
	Sealed []byte
}

// Signer is a key that a signature is tried against, or that verified one.
type Signer struct {
	Key        string // its ID
	Sealed     []byte // its public half, as it is stored
	OfNode     bool   // a node key, which speaks for its node only
	Unreceived bool   // it was delivered sealed and nobody signed a receipt: this use stands for one
}

// Use is one use of a signature.
type Use struct {
	Org org.ID
	Signer
	Message [32]byte  // SHA-256 of the line that was signed
	Request [32]byte  // SHA-256 of the endpoint and the decoded fields
	Stamp   time.Time // the latest time that the line can be read to name, whatever request presents it
	Until   time.Time // when nobody can present the signature any more
}

// Change says what a signed request did.
type Change string

// What a signed request can do.
const (
	Created  Change = "created"  // a node registered for the first time, or after its deletion
	Updated  Change = "updated"  // a registered node registered again
	Deleted  Change = "deleted"  // a node unregistered
	Repeated Change = "repeated" // nothing: the same request was served before
)

// Ref names a node the way nodes do.
type Ref struct {
	Org org.ID
	IP  netip.Addr
}

// Contact identifies a node and the key that it signed with.
type Contact struct {
	Ref
	Key string
}

// Store keeps nodes, secrets and the uses of signatures. Every method is one
// transaction, and the event given is committed in it or nothing is. Its
// implementation is sqlstore.
//
// Register, Unregister and Secrets report ErrKeyGone, before anything else,
// unless the key is a released one of the organization, and stored as the Signer has it.
type Store interface {
	// LiveKeys returns org's released organization keys, newest first, at most
	// limit; and of its node keys the named one, and those whose node is at ip or
	// is to be there.
	LiveKeys(ctx context.Context, org org.ID, ip netip.Addr, named string, limit int) ([]Signer, error)
	// Register records the use and stores n, n.ID being used for a node that
	// was never there, and associates the node with use.Key. The use's being
	// there already is no change if it was for the same request, else ErrReused.
	// event is given the node's ID (empty if Repeated and gone).
	Register(ctx context.Context, use Use, n Node, event func(id string, c Change) audit.Event) error
	// Unregister records the use, deletes the node at ip and its associations,
	// or reports ErrNodeNotFound. Uses are treated as by Register.
	Unregister(ctx context.Context, use Use, ip netip.Addr, event func(id string, c Change) audit.Event) error
	// SecretsSize returns how many bytes org's sealed secrets are.
	SecretsSize(ctx context.Context, org org.ID) (int64, error)
	// Secrets returns org's secrets, by name, to the node at ip. It reports ErrLarger,
	// without an event, if all together are more than size bytes.
	Secrets(ctx context.Context, org org.ID, by Signer, ip netip.Addr, size int64, event func(names []string) audit.Event) ([]SealedSecret, error)
	// Nodes returns org's nodes that are not deleted, the newest registration first.
	Nodes(ctx context.Context, org org.ID) ([]Node, error)
	// DeleteNode deletes org's node id, its associations and its node keys, which may
	// outlive it. If there is neither it reports ErrNodeNotFound or ErrAlreadyDeleted.
	DeleteNode(ctx context.Context, org org.ID, id string, event audit.Event, keyDeleted func(keyID string) audit.Event) error
	// PutSecret stores a new or changed secret, or reports ErrTooManySecrets.
	PutSecret(ctx context.Context, org org.ID, s SealedSecret, limit int, event audit.Event) error
	// SecretNames returns org's secrets, by name.
	SecretNames(ctx context.Context, org org.ID) ([]Secret, error)
	// DeleteSecret ends org's secret, or reports ErrSecretNotFound.
	DeleteSecret(ctx context.Context, org org.ID, name string, event audit.Event) error
	// Seen moves last uses of keys and last contacts of nodes forward, each given by
	// how long ago it was, and associates nodes with the keys they signed with; what
	// is not there is no error.
	Seen(ctx context.Context, keys map[string]time.Duration, nodes map[Contact]time.Duration) error
	// ForgetUses removes at most limit uses whose Until has passed by the store's
	// clock, by which Register and Unregister refuse such a use with ErrStale.
	ForgetUses(ctx context.Context, limit int) (int, error)
}
