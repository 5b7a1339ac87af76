// Package authz answers one question per request: may this caller do this?
//
// The answer comes from the Rego policy alone (package orgkeys.authz, the
// directory policies/). Go passes identifiers in as input, receives one
// decision object with a reason code, and only chooses the words for it; no
// role or organization is compared anywhere else in the code. Whatever is not
// a well-formed decision, an evaluation error or a result past its time limit
// included, is an error, and callers treat an error as "no".
package authz

import "github.com/orgkeys/orgkeys/internal/org"

// Role is a role of the platform within an organization, by its exact name.
type Role string

// The platform's roles, with the integers it also uses for them.
const (
	Owner         Role = "OWNER"         // 255
	Administrator Role = "ADMINISTRATOR" // 254, also written ADMINISTRATORS
	Workspaces    Role = "WORKSPACES"    // 2
	Billing       Role = "BILLING"       // 1
	User          Role = "USER"          // 0
)

// Kind says what kind of caller this is.
type Kind string

// The kinds of callers.
const (
	Person Kind = "user" // authenticated by a bearer token
	Node   Kind = "node" // authenticated by a request signed with an organization key or a node key

	Enrollment Kind = "enrollment" // authenticated by an enrollment token, or by a receipt that the enrolled key signed
)

// Caller is the authenticated maker of a request.
type Caller struct {
	Kind    Kind
	Subject string // a person's ID, of the claim "sub" or another; for a node, the ID of the key that verified
	Org     org.ID // the organization the caller belongs to
	Roles   []Role // any of which may match; empty for a node, and for who is known and may do nothing
	Name    string // for people who read the audit log; never used for a decision
	Email   string // likewise
	ActedBy string // the subject of who acts in this caller's name (RFC 8693, section 4.1), for the audit log; empty: nobody
}

// Action is the action that a request asks for.
type Action string

// The actions that the policy knows.
const (
	GenerateKey    Action = "orgkey.generate"
	ListKeys       Action = "orgkey.list"
	DeleteKey      Action = "orgkey.delete"
	DeleteAllKeys  Action = "orgkey.delete_all"
	ListNodes      Action = "node.list"
	DeleteNode     Action = "node.delete"
	RegisterNode   Action = "node.register"
	UnregisterNode Action = "node.unregister"
	FetchSecrets   Action = "secret.fetch"
	PutSecret      Action = "secret.put"
	ListSecrets    Action = "secret.list"
	DeleteSecret   Action = "secret.delete"
	ReadEvents     Action = "event.read"

	CreateEnrollment  Action = "enrollment.create"
	ListEnrollments   Action = "enrollment.list"
	ApproveEnrollment Action = "enrollment.approve"
	RevokeEnrollment  Action = "enrollment.revoke"
	FetchSealedKey    Action = "orgkey.fetch_sealed"
	AddKey            Action = "orgkey.add" // one that the caller made; the shipped policy lets nobody
	ListDevices       Action = "device.list"
	AllowDevice       Action = "device.allow"
	RemoveDevice      Action = "device.remove"
	ClaimEnrollment   Action = "enrollment.claim"
	ReceiveKey        Action = "enrollment.receive"
	MarkEvents        Action = "event.mark" // as read or unread, for the caller alone
	AskPolicy         Action = "policy.ask" // what it would say to the caller
)

// Actions returns every action.
func Actions() []Action {
	return []Action{
		GenerateKey, ListKeys, DeleteKey, DeleteAllKeys, ListNodes, DeleteNode, RegisterNode, UnregisterNode,
		FetchSecrets, PutSecret, ListSecrets, DeleteSecret, ReadEvents, MarkEvents, AskPolicy,
		CreateEnrollment, ListEnrollments, ApproveEnrollment, RevokeEnrollment, FetchSealedKey, ClaimEnrollment, ReceiveKey,
		AddKey, ListDevices, AllowDevice, RemoveDevice,
	}
}

// Request is everything a decision is made from.
type Request struct {
	Caller Caller
	Action Action
	Org    org.ID // the organization the request is about
}

// Reason is the policy's machine-readable reason for a decision.
type Reason string

// The reasons that the shipped policy gives.
const (
	Allowed           Reason = "allowed"
	OtherOrganization Reason = "other_organization"
	InsufficientRole  Reason = "insufficient_role"
	UnknownAction     Reason = "unknown_action"
	MalformedRequest  Reason = "malformed_request"
)

// Scope narrows what an allowed request is about.
type Scope string

// The scopes of an allowed request.
const (
	WholeOrganization Scope = "organization"
	OwnOnly           Scope = "own" // only what the caller did
)

// Decision is the policy's one answer to a request.
type Decision struct {
	Allow    bool
	Reason   Reason
	Scope    Scope  // of an allowed request; WholeOrganization unless the policy narrows it
	Revision string // identifies the policy that answered: "sha256:" and the hex digest of its files
}
