package audit

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/org"
)

// Type says what happened, in the past tense.
type Type string

// The types of events.
const (
	KeyCreated   Type = "orgkey.created"   // record committed, private key not yet released
	KeyDelivered Type = "orgkey.delivered" // private key written out without an error
	KeyWithdrawn Type = "orgkey.withdrawn" // a created key that will never be usable
	KeyRefused   Type = "orgkey.refused"   // generation refused or failed; no key was made
	KeyDeleted   Type = "orgkey.deleted"
	KeysDeleted  Type = "orgkey.all_deleted" // the request; each key also has its own KeyDeleted
	KeysListed   Type = "orgkey.listed"
	KeySealed    Type = "orgkey.sealed"   // wrapped to its recipient, and destroyed in the back end; not yet released
	KeyReceived  Type = "orgkey.received" // its holder signed for it, or used it; a signature may follow a use
	KeyFetched   Type = "orgkey.fetched"  // sealed, delivered before, and handed out again, to an administrator

	EnrollmentCreated  Type = "enrollment.created"
	EnrollmentsListed  Type = "enrollment.listed"
	EnrollmentClaimed  Type = "enrollment.claimed"
	EnrollmentConflict Type = "enrollment.conflict" // a recipient other than the one that claimed it, or may claim it
	EnrollmentApproved Type = "enrollment.approved"
	EnrollmentExpired  Type = "enrollment.expired" // with uses that brought no key: unclaimed, or claimed and never made
	EnrollmentRevoked  Type = "enrollment.revoked"

	DeviceAllowed Type = "device.allowed" // a TPM may have keys of the organization
	DeviceRemoved Type = "device.removed"
	DevicesListed Type = "device.listed"

	NodeRegistered   Type = "node.registered"
	NodeUnregistered Type = "node.unregistered"
	NodeDeleted      Type = "node.deleted"
	NodesListed      Type = "node.listed"
	SecretsFetched   Type = "secret.fetched"
	SecretPut        Type = "secret.put"
	SecretDeleted    Type = "secret.deleted"
	SecretsListed    Type = "secret.listed"
	EventsRead       Type = "event.read"
	EventsMarked     Type = "event.marked"
	PolicyAsked      Type = "policy.asked" // what it would say to the caller

	RequestFailed    Type = "request.failed"   // an authenticated request that was malformed or impossible, or on which the policy did not decide
	RequestRepeated  Type = "request.repeated" // an authenticated request for what was so already
	AccessDenied     Type = "access.denied"    // the policy denied it
	UnknownCallers   Type = "authn.failed"     // one summary per reason and minute
	RollbackAccepted Type = "log.rollback_accepted"
	DatabaseChanged  Type = "log.database_changed" // the log continues in another database: after a failover, a recovery or a move
	SealsRewrapped   Type = "seal.rewrapped"       // a run of "orgkeys rewrap"
	PersonErased     Type = "person.erased"        // a person's data was deleted
	LogArchived      Type = "log.archived"         // the first events may be moved out of the database
	LogPruned        Type = "log.pruned"           // the first entries may be removed from the archive, by the policy of retention
	PoolFilled       Type = "pool.filled"          // keys were made ahead, or destroyed; in totals
)

// Outcome says how it ended.
type Outcome string

// The outcomes.
const (
	Success Outcome = "success"
	Denied  Outcome = "denied"
	Failure Outcome = "failure"
)

// System is the actor of the service's own actions, such as the sweeper's.
const System authz.Kind = "system"

// Event is one thing that happened. Its leaf in the log holds identifiers only;
// names and addresses of people are in Personal, which is stored outside the log
// and can be erased.
type Event struct {
	ID       string // a UUID, made by New
	Time     time.Time
	Type     Type
	Outcome  Outcome
	Reason   string // a short code: why denied, refused, withdrawn
	Org      org.ID
	Actor    Actor
	ActorOrg org.ID       // the organization that the actor belongs to
	Roles    []authz.Role // the actor's
	Action   authz.Action // the action that the policy was asked about, if it was
	Object   string       // the ID of the key, node or secret it is about
	Request  string       // the request's ID
	Policy   string       // the revision of the policy that decided
	Scope    authz.Scope  // of an allowed request
	Detail   map[string]string
	Personal Personal
}

// Actor is the one who did it.
type Actor struct {
	Kind authz.Kind
	ID   string
}

// Personal is an event's personal data, stored outside the log.
type Personal struct {
	Name    string `json:"name,omitempty"`
	Email   string `json:"email,omitempty"`
	Address string `json:"address,omitempty"`
	Note    string `json:"note,omitempty"` // why, in the words of who did it
}

// New returns an event with a fresh ID and the present time.
func New(t Type, org org.ID) Event {
	return Event{ID: NewID(), Time: time.Now().UTC(), Type: t, Outcome: Success, Org: org}
}

// NewID returns a UUID that sorts by time (version 7, RFC 9562, section 5.7). Rows
// with such IDs share the pages of their indices with those before, so that a
// commit has fewer to write: with random ones it was a page a row and index.
func NewID() string { return uuid.Must(uuid.NewV7()).String() } // crypto/rand never fails

// Add adds to the event's details, without changing a map that other events share.
func (e *Event) Add(detail map[string]string) {
	added := maps.Clone(e.Detail)
	if added == nil {
		added = map[string]string{}
	}
	maps.Copy(added, detail)
	e.Detail = added
}

// Leaf is an event as the log holds it: the field order is the order of the
// bytes, and verifiers depend on the names. docs/audit.md describes it.
type Leaf struct {
	Version  int               `json:"v"`
	ID       string            `json:"id"`
	Time     string            `json:"time"`
	Type     Type              `json:"type"`
	Outcome  Outcome           `json:"outcome"`
	Reason   string            `json:"reason,omitempty"`
	Org      org.ID            `json:"org,omitempty"`
	Kind     authz.Kind        `json:"actorKind,omitempty"`
	Actor    string            `json:"actor,omitempty"`
	ActorOrg org.ID            `json:"actorOrg,omitempty"`
	Roles    []authz.Role      `json:"roles,omitempty"`
	Action   authz.Action      `json:"action,omitempty"`
	Object   string            `json:"object,omitempty"`
	Request  string            `json:"request,omitempty"`
	Policy   string            `json:"policy,omitempty"`
	Scope    authz.Scope       `json:"scope,omitempty"`
	Detail   map[string]string `json:"detail,omitempty"`
	Personal string            `json:"personal,omitempty"`
}

// TimeFormat is how leaves write time: UTC, to the microsecond.
const TimeFormat = "2006-01-02T15:04:05.000000Z"

// MaxLeaf is the size of the largest leaf, in bytes: what an entry bundle of
// C2SP tlog-tiles takes.
const MaxLeaf = 1<<16 - 1

// ErrLeafTooLarge: an event would have a leaf of more than MaxLeaf bytes.
var ErrLeafTooLarge = errors.New("the event is too large for the log")

// Record is an event in the form in which it is stored.
type Record struct {
	ID       string
	Time     time.Time
	Type     Type
	Reason   string
	Org      org.ID
	Kind     authz.Kind // of the actor
	Actor    string
	Object   string
	Leaf     []byte // the bytes to which the log commits
	Personal []byte // JSON, salted; empty if the event has no personal data
}

// Encode returns the event in the form in which it is stored. The leaf commits to the personal part by
// a salted digest: a change is detected, and after an erasure the digest cannot be
// used to test a guess. It reports ErrLeafTooLarge.
func (e Event) Encode() (Record, error) {
	l := Leaf{
		Version: 1, ID: e.ID, Time: e.Time.UTC().Format(TimeFormat), Type: e.Type, Outcome: e.Outcome,
		Reason: e.Reason, Org: e.Org, Kind: e.Actor.Kind, Actor: e.Actor.ID, ActorOrg: e.ActorOrg, Roles: e.Roles, Action: e.Action,
		Object: e.Object, Request: e.Request, Policy: e.Policy, Scope: e.Scope, Detail: e.Detail,
	}
	r := Record{ID: e.ID, Time: e.Time, Type: e.Type, Reason: e.Reason, Org: e.Org, Kind: e.Actor.Kind, Actor: e.Actor.ID, Object: e.Object}
	if e.Personal != (Personal{}) {
		p, err := encodePersonal(e.Personal)
		if err != nil {
			return Record{}, err
		}
		r.Personal = p
		l.Personal = PersonalDigest(p)
	}
	var plain bool
	if r.Leaf, plain = l.plain(); !plain {
		var err error
		if r.Leaf, err = json.Marshal(l, json.Deterministic(true)); err != nil {
			return Record{}, fmt.Errorf("encoding event %s: %w", e.ID, err)
		}
	}
	if len(r.Leaf) > MaxLeaf {
		return Record{}, fmt.Errorf("encoding event %s of type %s: %w", e.ID, e.Type, ErrLeafTooLarge)
	}
	return r, nil
}

// salted is a personal part as it is stored.
type salted struct {
	Salt string `json:"salt"`
	Personal
}

func encodePersonal(p Personal) ([]byte, error) {
	salt := make([]byte, SaltSize)
	rand.Read(salt) // never fails, crypto/rand
	s := salted{base64.StdEncoding.EncodeToString(salt), p}
	if b, plain := s.plain(); plain {
		return b, nil
	}
	b, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("encoding the personal part of an event: %w", err)
	}
	return b, nil
}

const (
	// SaltSize is the size of a personal part's salt, in bytes.
	SaltSize = 16

	saltKey = `{"salt":"` // begins every stored personal part
)

// CutSalt cuts the salt out of a stored personal part, which packs badly in the letters in
// which it is written. The rest begins with the quote behind them. It
// reports whether JoinSalt makes the same bytes of both again.
func CutSalt(stored []byte) (salt, rest []byte, ok bool) {
	text, ok := bytes.CutPrefix(stored, []byte(saltKey))
	n := base64.StdEncoding.EncodedLen(SaltSize)
	if !ok || len(text) <= n || text[n] != '"' {
		return nil, nil, false
	}
	salt, err := base64.StdEncoding.AppendDecode(nil, text[:n])
	if err != nil || len(salt) != SaltSize || !bytes.Equal(JoinSalt(salt, text[n:]), stored) {
		return nil, nil, false
	}
	return salt, text[n:], true
}

// JoinSalt undoes CutSalt.
func JoinSalt(salt, rest []byte) []byte {
	stored := make([]byte, 0, len(saltKey)+base64.StdEncoding.EncodedLen(len(salt))+len(rest))
	return append(base64.StdEncoding.AppendEncode(append(stored, saltKey...), salt), rest...)
}

// DecodePersonal reads a stored personal part.
func DecodePersonal(stored []byte) (Personal, error) {
	var p Personal
	if err := json.Unmarshal(stored, &p); err != nil {
		return Personal{}, fmt.Errorf("decoding the personal part of an event: %w", err)
	}
	return p, nil
}

// PersonalDigest is the digest by which a leaf commits to the stored bytes of
// its personal part: base64 of SHA-256.
func PersonalDigest(stored []byte) string {
	sum := sha256.Sum256(stored)
	return base64.StdEncoding.EncodeToString(sum[:])
}

// Decode reads a leaf back. The personal part stays empty.
func Decode(leafBytes []byte) (Event, error) {
	var l Leaf
	if err := json.Unmarshal(leafBytes, &l, json.RejectUnknownMembers(true)); err != nil {
		return Event{}, fmt.Errorf("decoding a leaf: %w", err)
	}
	if l.Version != 1 {
		return Event{}, fmt.Errorf("decoding a leaf: version %d is not known", l.Version)
	}
	t, err := time.Parse(TimeFormat, l.Time)
	if err != nil {
		return Event{}, fmt.Errorf("decoding a leaf: %w", err)
	}
	return Event{
		ID: l.ID, Time: t, Type: l.Type, Outcome: l.Outcome, Reason: l.Reason, Org: l.Org,
		Actor: Actor{l.Kind, l.Actor}, ActorOrg: l.ActorOrg, Roles: l.Roles, Action: l.Action, Object: l.Object, Request: l.Request,
		Policy: l.Policy, Scope: l.Scope, Detail: l.Detail,
	}, nil
}
