package client

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Terms are those of an enrollment that an administrator creates. The zero
// value lets one node fetch a key of its own within a day.
type Terms struct {
	Scope     string        // "node" or "organization"; node if empty
	Origin    string        // who makes the key, "backend" or "node"; backend if empty
	EK        string        // the only TPM that may claim it, sha256-…; any if empty
	TPM       bool          // only a TPM that the organization allows may claim it
	Uses      int           // nodes that it lets in; 1 if 0
	Life      time.Duration // how long it may be claimed, in whole seconds; a day if 0
	Recipient string        // the only recipient that may claim it, lower-case hex; any if empty
	Approval  bool          // each claim waits for an administrator
	IP        string        // the only address that the node may register with at first; any if empty
	Note      string        // for people
}

type termsFields struct {
	Scope    string `json:"scope,omitempty"`
	Origin   string `json:"origin,omitempty"`
	Uses     int    `json:"uses,omitzero"`
	Seconds  int64  `json:"ttlSeconds,omitzero"`
	Bind     *Bound `json:"bind,omitempty"`
	Approval bool   `json:"approval,omitzero"`
	IP       string `json:"ip,omitempty"`
	Note     string `json:"note,omitempty"`
}

// Recipient names a recipient: the lower-case hex SHA-256 of its SubjectPublicKeyInfo.
type Recipient struct {
	Recipient string `json:"recipient"`
}

// Bound says who alone may claim an enrollment.
type Bound struct {
	Recipient string `json:"recipient,omitempty"`
	EK        string `json:"ek,omitempty"` // a TPM's endorsement key
	TPM       bool   `json:"tpm,omitzero"` // any TPM that the organization allows
}

// InTPM reports whether only a key in a TPM may be enrolled.
func (b *Bound) InTPM() bool { return b != nil && (b.EK != "" || b.TPM) }

func (t Terms) fields() (termsFields, error) {
	if t.Life < 0 || t.Life%time.Second != 0 {
		return termsFields{}, fmt.Errorf("%w: a life of %s is not in whole seconds", ErrRequest, t.Life)
	}
	f := termsFields{Scope: t.Scope, Origin: t.Origin, Uses: t.Uses, Seconds: int64(t.Life / time.Second), Approval: t.Approval, IP: t.IP, Note: t.Note}
	if bound := (Bound{t.Recipient, t.EK, t.TPM}); bound != (Bound{}) {
		f.Bind = &bound
	}
	return f, nil
}

// Permission is an enrollment as administrators see it: for one node, or
// several, to fetch a key.
type Permission struct {
	ID        string    `json:"id"`
	Org       string    `json:"orgId"`
	State     string    `json:"state"` // open, waiting, sealed, received, expired or revoked
	Scope     string    `json:"scope"`
	Origin    string    `json:"origin"`
	Uses      int       `json:"uses"`
	Bind      *Bound    `json:"bind,omitempty"`
	Approval  bool      `json:"approval"`
	IP        string    `json:"ip,omitempty"`
	Note      string    `json:"note,omitempty"`
	Created   time.Time `json:"createdAt"`
	Expires   time.Time `json:"expiresAt"`
	Revoked   time.Time `json:"revokedAt,omitzero"`
	Conflicts int       `json:"conflicts"`                   // above 0: a stolen token, or a cloned disk
	Refused   []string  `json:"refusedRecipients,omitempty"` // the recipients that were refused, the first 20
	Claimed   int       `json:"claimed"`                     // how many uses were claimed
	Claims    []Claim   `json:"claims"`                      // a list has the newest thousand of all its enrollments
	Warning   string    `json:"warning,omitempty"`
}

// Claim is one node's claim of an enrollment.
type Claim struct {
	KeyID        string    `json:"keyId"`
	State        string    `json:"state"` // waiting, sealed, received or ended
	Recipient    string    `json:"recipient"`
	Address      string    `json:"address"` // where it came from
	Claimed      time.Time `json:"claimedAt"`
	Approved     bool      `json:"approved"`
	EK           string    `json:"ek,omitempty"`       // the TPM that the key, or its recipient, is in
	Evidence     string    `json:"evidence,omitempty"` // why that was believed: enrollment, list or certificate
	Fingerprint  string    `json:"fingerprint,omitempty"`
	SHA256       string    `json:"sha256,omitempty"`
	Answers      int       `json:"answers"` // how often the sealed key went out
	DeliverUntil time.Time `json:"deliverUntil,omitzero"`
	Received     time.Time `json:"receivedAt,omitzero"`
}

// MintedPermission is a new enrollment with its token, which is shown once. The
// holder clears Token.
type MintedPermission struct {
	Permission
	Token []byte
}

// CreateEnrollment permits nodes to fetch keys of their own. If there is no
// answer, the enrollment may exist all the same, and nobody has its token:
// [Client.Permissions] shows it.
func (c *Client) CreateEnrollment(ctx context.Context, org string, t Terms) (*MintedPermission, error) {
	fields, err := t.fields()
	if err != nil {
		return nil, err
	}
	var minted *MintedPermission
	err = c.do(ctx, request{
		method: http.MethodPost, path: orgPath(org, "enrollment"), token: true, typ: "application/json", status: http.StatusCreated, temporary: nothingMade,
		body: func() ([]byte, error) { return json.Marshal(fields) },
		read: func(a *answer) (err error) {
			minted, err = a.minted()
			return err
		},
	})
	return minted, err
}

func (a *answer) minted() (*MintedPermission, error) {
	defer clear(a.body)
	var body struct {
		Success bool `json:"success"`
		Data    struct {
			Permission
			Token jsontext.Value `json:"token"`
		} `json:"data"`
	}
	if err := a.decode(&body); err != nil {
		return nil, err
	}
	defer clear(body.Data.Token)
	token, err := jsontext.AppendUnquote(nil, body.Data.Token)
	if err != nil || !body.Success || len(token) == 0 {
		clear(token)
		return nil, a.foreign("JSON without a token")
	}
	return &MintedPermission{body.Data.Permission, token}, nil
}

// Permissions lists the organization's enrollments, newest first.
func (c *Client) Permissions(ctx context.Context, org string) ([]Permission, error) {
	return list[Permission](ctx, c, orgPath(org, "enrollment"))
}

// Permission returns one of the organization's enrollments.
func (c *Client) Permission(ctx context.Context, org, id string) (*Permission, error) {
	return get[Permission](ctx, c, orgPath(org, "enrollment", id))
}

// RevokeEnrollment ends an enrollment: what was not claimed gives its place in
// the quota back, and what nobody received is withdrawn. Keys that were received stay.
func (c *Client) RevokeEnrollment(ctx context.Context, org, id string) error {
	return c.remove(ctx, orgPath(org, "enrollment", id), "Enrollment revoked", "")
}

// ApproveEnrollment lets a recipient's claim go on.
func (c *Client) ApproveEnrollment(ctx context.Context, org, id, recipient string) error {
	return c.do(ctx, request{
		method: http.MethodPost, path: orgPath(org, "enrollment", id, "approve"), token: true, typ: "application/json", read: done("Claim approved"),
		body: func() ([]byte, error) { return json.Marshal(Recipient{recipient}) },
	})
}
