// Package enroll is how a node fetches its own key, and how an administrator
// gets one that nobody in between can read: the private key leaves the back end
// wrapped to a recipient, a public key whose private half only the asker has.
//
// # One delivery
//
// An administrator's permission, an enrollment, has as many deliveries as it has
// uses; an administrator's own sealed key is one delivery without an
// enrollment. Each has its place in the quota from the start, and goes through
//
//	open → claimed → sealed → available → received
//
// claimed: a recipient has the use, by one conditional update. sealed: the back
// end's copy is gone, and the wrapped key, the record and the events that say so are
// committed. (An older version committed the last event by itself; until then the
// delivery was stored.) available: every required
// audit sink has that event; the key is released, and the wrapped bytes go out,
// always the same, as often as they are asked for. received: the holder of the
// private key has signed for it; the wrapped bytes are deleted.
//
// Every step is taken by whoever asks next, on whichever replica, from what the
// database says; so a crash between any two of them is mended by asking again.
//
// # The token
//
// An enrollment's token holds a secret K that is never sent. The asker's
// recipient and the answer carry MACs with K, so that nothing between node and
// service, a proxy that ends TLS included, can put in a recipient or a key of
// its own. The texts are in package envelope.
package enroll

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/jsonbody"
	"github.com/orgkeys/orgkeys/internal/org"
)

// The errors of the use cases. Each has one translation, at the edge.
var (
	// ErrUnknown: no such enrollment, or a MAC that K did not make; the caller is not told which.
	ErrUnknown = errors.New("enrollment not known")
	// ErrClaimed: every use belongs to another recipient, or the enrollment is bound to another.
	ErrClaimed = errors.New("enrollment is claimed by another recipient")
	// ErrClosed: the enrollment expired, was revoked, or the key was received or withdrawn.
	ErrClosed = errors.New("enrollment is closed")
	// ErrOver: ErrClosed of an administrator's own sealed key, which came by no enrollment.
	ErrOver = errors.New("sealed key is over")
	// ErrNotFound: an administrator named an enrollment, delivery or claim that is not there.
	ErrNotFound = errors.New("enrollment not found")
	// ErrSignature: a receipt that the delivered key did not sign.
	ErrSignature = errors.New("receipt's signature is not valid")
	// ErrProof: a key of which the asker did not prove to have the private half, or
	// to have it in the TPM.
	ErrProof = errors.New("possession of the key is not proven")
	// ErrOrigin: the enrollment is for keys that the other side makes.
	ErrOrigin = errors.New("enrollment is for keys of another origin")
	// ErrDevice: the key must be in a TPM that is allowed, and is not.
	ErrDevice = errors.New("device is not allowed")
	// ErrDeviceNotFound: an administrator named a device that the organization does not allow.
	ErrDeviceNotFound = errors.New("device not found")
	// ErrTooManyDevices: the organization allows as many devices as it may.
	ErrTooManyDevices = errors.New("too many devices")
	// ErrUnchanged: what is asked for was so already. Whoever asks is told that it is so.
	ErrUnchanged = errors.New("nothing was left to do")
	// ErrPending: approval, or somebody else's work on the same delivery, is awaited; ask again.
	ErrPending = errors.New("the key is not ready yet")
)

// RecipientError says why a private key is not sealed to a recipient, or a key
// that its holder made is not taken.
type RecipientError struct{ Problem string }

func (e *RecipientError) Error() string { return "recipient " + e.Problem }

// ErrInUse: a key that its holder made is a live key already, of this or another
// organization. Its holder has the private half, and may learn that.
var ErrInUse = &RecipientError{"is a key that is in use already; make another one"}

// InputError says what is wrong with a request, in words for its sender.
type InputError = jsonbody.Error

// MaxUses is how many nodes one enrollment lets in.
const MaxUses = 1000

// MaxConflicts is how many of an enrollment's conflicts leave an event; the rest
// are counted.
const MaxConflicts = 20

// Scope is what a key speaks for.
type Scope string

// The scopes of keys.
const (
	ForNode         Scope = "node"         // one node of the organization
	ForOrganization Scope = "organization" // every node of the organization
)

// KeyOrigin is who makes a key.
type KeyOrigin string

// The origins of keys.
const (
	FromBackend KeyOrigin = "backend" // the HSM or Vault; it is delivered sealed
	FromNode    KeyOrigin = "node"    // its holder, who sends only the public half
)

// AnyAllowedTPM is an enrollment's TPM if it is any that the organization allows.
const AnyAllowedTPM = "allowed"

// Evidence is why a TPM was believed to be one that may have keys.
type Evidence string

// The evidence.
const (
	ByEnrollment  Evidence = "enrollment"  // the enrollment is bound to it
	ByList        Evidence = "list"        // the organization allows it
	ByCertificate Evidence = "certificate" // an authority that the operator trusts
)

// Device is the TPM that a key is in. The zero value is none.
type Device struct {
	EK       string // its ID, see package tpm
	Evidence Evidence
}

// AllowedDevice is a TPM that may have keys of an organization.
type AllowedDevice struct {
	EK      string
	Note    string
	Created time.Time
}

// Stage is how far a delivery is.
type Stage string

// The stages of a delivery.
const (
	Open      Stage = "open"      // a place in the quota, for whoever has the token
	Claimed   Stage = "claimed"   // a recipient has it
	Stored    Stage = "stored"    // by an older version: wrapped key and record are committed, and the event of that is not
	Sealed    Stage = "sealed"    // the back end's copy is gone; wrapped key, record and events are committed
	Available Stage = "available" // the sinks have the event; the wrapped key goes out
	Received  Stage = "received"  // its holder has signed for it, or used it
	Ended     Stage = "ended"     // withdrawn, revoked, expired, or the key was deleted
)

// Enrollment is an administrator's permission for Uses nodes to have a key.
type Enrollment struct {
	ID         string
	Org        org.ID
	Scope      Scope
	Uses       int
	Origin     KeyOrigin
	TPM        string     // the only TPM that may claim it, or AnyAllowedTPM; empty: none is needed
	Recipient  string     // the only recipient that may claim it; empty: any
	Approval   bool       // each claim waits for an administrator
	Address    netip.Addr // where the node registers first; zero: anywhere
	Note       string
	Created    time.Time
	Expires    time.Time  // for who has not claimed by then
	Over       bool       // whether that has come, by the database's clock
	Revoked    time.Time  // zero: it was not
	Conflicts  int        // claims by other recipients that were refused
	Refused    []string   // those recipients, no more than MaxConflicts of them, sorted
	Claimed    int        // uses that were claimed
	Waiting    int        // of those, whose key is not made or not released yet
	Unreceived int        // of those, whose key waits for its receipt
	Lost       int        // of those, whose key never arrived, and will not any more
	Claims     []Delivery // the newest MaxUses of all enrollments that were asked for, oldest first; without what is sealed
}

// Delivery is one key on its way to one recipient.
type Delivery struct {
	KeyID       string
	Org         org.ID
	Enrollment  string // empty: an administrator's own
	Scope       Scope
	Stage       Stage
	Origin      KeyOrigin
	Device      Device // that the recipient, or the node's own key, is in
	Recipient   string // R, see envelope.Recipient; empty while open
	DER         []byte // the recipient's SubjectPublicKeyInfo
	From        string // the address that claimed it
	ClaimedAt   time.Time
	Approved    bool      // or needs no approval
	Attempt     string    // names the key in the back end that was or is being made
	Begun       bool      // by the call that returned the delivery: the attempt is its caller's
	Made        bool      // by the call that stored it: the event of a key that its holder made is its caller's
	Wrapped     Wrapped   // from Sealed until Received
	Public      []byte    // the public key, sealed; from Sealed on
	Fingerprint string    // RFC 7638 thumbprint
	Event       string    // the ID of orgkey.sealed; from Sealed on
	Until       time.Time // when it is withdrawn unless it was received; zero: never, since a rollback was accepted
	Answers     int       // how often the wrapped key was written out
	ReceivedAt  time.Time
}

// Attempt is one to have the back end make a key. Whoever has begun it has the
// delivery for its life. The zero value is none.
type Attempt struct {
	Name string // the key's in the back end
	Life time.Duration
}

// Wrapped is a wrapped private key as the store holds it.
type Wrapped struct {
	Alg    string // of envelope.SealedKey
	Value  []byte // the wrapped bytes, sealed at rest
	SHA256 string // lower-case hex, of the wrapped bytes
}

// Permission is what the service needs of an enrollment to judge a claim.
type Permission struct {
	Enrollment
	K         []byte // the token's secret, sealed
	Challenge []byte // the secret of challenges to TPMs, sealed; nil: it has none
}

// Store keeps enrollments and deliveries. Every method is one transaction, and
// the events given are committed in it or nothing is. Its implementation is
// sqlstore. Times are the database's.
type Store interface {
	// CreateEnrollment stores e, whose K is sealed, and takes a place in the
	// quota of its scope for each of keys, or reports *orgkey.QuotaError.
	CreateEnrollment(ctx context.Context, e Permission, life time.Duration, keys []string, limit int, event audit.Event) (Enrollment, error)
	// Enrollments returns org's enrollments, newest first, with the newest claims of them all.
	Enrollments(ctx context.Context, org org.ID, limit int) ([]Enrollment, error)
	// Enrollment returns one of them, with all its claims, or ErrNotFound.
	Enrollment(ctx context.Context, org org.ID, id string) (Enrollment, error)
	// Permission returns an enrollment by its ID alone, or ErrNotFound.
	Permission(ctx context.Context, id string) (Permission, error)
	// Claim gives recipient an open use of enrollment id for deliverFor, and
	// records claimed(keyID) if it is the first time. If the back end has to make the
	// key and may do so, attempt is begun as Begin does. Another recipient than
	// may have it is ErrClaimed, and so is a second key in one TPM; conflict is recorded once a recipient, and for
	// no more than MaxConflicts of them. An enrollment that is over is ErrClosed. With
	// another error the delivery says only what attempt may have begun, if the answer was lost.
	Claim(ctx context.Context, id string, recipient Recipient, from string, deliverFor time.Duration, attempt Attempt, claimed func(keyID string) audit.Event, conflict audit.Event) (Delivery, error)
	// ClaimOwn begins an administrator's own delivery under keyID, a reserved
	// place in the organization's quota, or returns the unreceived one of the
	// same recipient.
	ClaimOwn(ctx context.Context, org org.ID, keyID string, recipient Recipient, limit int, deliverFor time.Duration) (Delivery, error)
	// GiveBackOwn removes an administrator's own delivery with its place in the quota, records
	// refused and reports true, if it is claimed and no attempt has it. Any other is let be.
	GiveBackOwn(ctx context.Context, org org.ID, keyID string, refused audit.Event) (bool, error)
	// Delivery returns a delivery as it is now, or ErrNotFound.
	Delivery(ctx context.Context, keyID string) (Delivery, error)
	// Conflict records that a claim of enrollment id was refused, as Claim does.
	Conflict(ctx context.Context, id, recipient string, conflict audit.Event) error
	// DeliveryTo returns enrollment id's delivery to a recipient, or ErrNotFound.
	DeliveryTo(ctx context.Context, id, recipient string) (Delivery, error)
	// Begin gives attempt the claimed delivery for life, and reports false while
	// another attempt has it.
	Begin(ctx context.Context, keyID, attempt string, life time.Duration) (bool, error)
	// GiveUp ends an attempt that came to nothing; one that is over is no error.
	GiveUp(ctx context.Context, keyID, attempt string) error
	// StoreWrapped makes the delivery sealed and its key pending, if attempt still
	// has it, or reports orgkey.ErrGone.
	StoreWrapped(ctx context.Context, keyID, attempt string, public []byte, w Wrapped, fingerprint string, created, sealed audit.Event) (Delivery, error)
	// StoreOwn makes a claimed delivery of a key that its holder made sealed, and
	// the key pending; one that is further is let be, and one that is gone is ErrNotFound.
	StoreOwn(ctx context.Context, keyID string, public []byte, fingerprint string, created audit.Event) (Delivery, error)
	// Seal makes a stored delivery sealed; one that is further is let be.
	Seal(ctx context.Context, keyID string, sealed audit.Event) (Delivery, error)
	// Offer makes a sealed delivery available for deliverFor and its key
	// released; one of a key that its holder made is received at once. One that is further is let be.
	Offer(ctx context.Context, keyID string, deliverFor time.Duration) (Delivery, error)
	// Answered counts an answer, and records delivered and reports true if it is the first.
	Answered(ctx context.Context, keyID string, delivered audit.Event) (first bool, err error)
	// Receive makes an available delivery received and deletes the wrapped key. Once,
	// it also records received of one that is received because it was used; any other
	// that was received before is ErrUnchanged. One that has
	// ended meanwhile is ErrClosed: its key will not be accepted.
	Receive(ctx context.Context, keyID string, received func(answers int) audit.Event) error
	// Approve lets recipient's claim of org's enrollment id go on, or reports ErrNotFound, or
	// ErrUnchanged of one that could go on already.
	Approve(ctx context.Context, org org.ID, id, recipient string, deliverFor time.Duration, event audit.Event) error
	// Revoke ends org's enrollment id: what was not claimed gives its place
	// back, what was not received is withdrawn. It reports ErrNotFound, or
	// ErrUnchanged of one that was ended before.
	Revoke(ctx context.Context, org org.ID, id string, event audit.Event, withdrawn func(keyID string) audit.Event) error
	// SweepDeliveries ends deliveries past their time, at most limit, and returns how
	// many: one that was used without a receipt is received, others are withdrawn. Of
	// those whose key was never made, expired is recorded once an enrollment.
	SweepDeliveries(ctx context.Context, limit int, withdrawn, used func(org org.ID, keyID string) audit.Event, expired func(org org.ID, id string, places int) audit.Event) (int, error)
	// ExpiredEnrollments returns at most limit that EndExpired is to be called for.
	ExpiredEnrollments(ctx context.Context, limit int) ([]string, error)
	// EndExpired gives back what nobody claimed of enrollment id, which expired, and
	// returns how many places; if there are any, expired(org, places) is recorded.
	EndExpired(ctx context.Context, id string, expired func(org org.ID, places int) audit.Event) (places int, err error)
	// AllowDevice lets keys of org be in a TPM, or reports ErrTooManyDevices. Again
	// it changes the note.
	AllowDevice(ctx context.Context, org org.ID, ek, note string, limit int, event audit.Event) (AllowedDevice, error)
	// Devices returns those of org, newest first.
	Devices(ctx context.Context, org org.ID) ([]AllowedDevice, error)
	// Device returns one of them, or ErrDeviceNotFound.
	Device(ctx context.Context, org org.ID, ek string) (AllowedDevice, error)
	// RemoveDevice ends it, or reports ErrDeviceNotFound. Keys stay.
	RemoveDevice(ctx context.Context, org org.ID, ek string, event audit.Event) error
	// Leaf returns the leaf of the event of a key's delivery.
	Leaf(ctx context.Context, keyID string) ([]byte, error)
}
