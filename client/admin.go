package client

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"
)

// GeneratedKey is a new organization key with its private half, which the server
// hands out once. The caller clears PEM after storing it.
type GeneratedKey struct {
	ID          string
	Org         string
	Fingerprint string // RFC 7638
	PEM         []byte // PKCS#1
}

// ErrKeyDamaged means that a private key was handed out and arrived incomplete or
// changed. The server does not hand it out again: the error's text names the key to delete.
var ErrKeyDamaged = errors.New("the private key arrived incomplete or changed")

// GenerateKey has a key made for the organization. If there is no answer, the
// key may exist nevertheless: [Client.Keys] shows it, and nobody has its private half.
func (c *Client) GenerateKey(ctx context.Context, org string) (*GeneratedKey, error) {
	var key *GeneratedKey
	err := c.do(ctx, request{
		method: http.MethodPost, path: orgPath(org, "key"), token: true, accept: "application/x-pem-file", temporary: nothingMade,
		read: func(a *answer) (err error) {
			key, err = a.generatedKey(org)
			return err
		},
	})
	return key, err
}

// nothingMade reports a temporary refusal that says that no key was made.
func nothingMade(err error) bool {
	e, ok := errors.AsType[*Error](err)
	return ok && (e.Status == http.StatusServiceUnavailable || e.Status == http.StatusTooManyRequests)
}

func (a *answer) generatedKey(org string) (*GeneratedKey, error) {
	if err := a.wantType("application/x-pem-file"); err != nil {
		return nil, err
	}
	key := &GeneratedKey{ID: a.header.Get("X-Key-Id"), Org: org, Fingerprint: a.header.Get("X-Key-Fingerprint"), PEM: a.body}
	if key.ID == "" {
		return nil, a.foreign("without X-Key-Id")
	}
	private, err := ParsePrivateKey(key.PEM)
	if err != nil || Fingerprint(private.Public()) != key.Fingerprint {
		clear(key.PEM)
		return nil, fmt.Errorf("%w: delete key %s of organization %s and generate another", ErrKeyDamaged, key.ID, org)
	}
	return key, nil
}

// Key is an organization key, or a node key, as the list shows it.
type Key struct {
	ID          string    `json:"id"`
	Org         string    `json:"orgId"`
	PublicKey   string    `json:"publicKey"`   // PKIX (SubjectPublicKeyInfo), PEM
	Fingerprint string    `json:"fingerprint"` // RFC 7638
	Created     time.Time `json:"createdAt"`
	LastUsed    time.Time `json:"lastUsed,omitzero"`  // when a node signed with it last; zero if none did
	Delivery    string    `json:"delivery,omitempty"` // "unconfirmed" if nobody knows whether the private half arrived
	// When the private half was written out last without an error, and to what address;
	// no proof that it was read. Zero and empty if it never was.
	DeliveredAt time.Time  `json:"deliveredAt,omitzero"`
	DeliveredTo string     `json:"deliveredTo,omitempty"`
	Scope       string     `json:"scope"`                // "organization" or "node": what the key speaks for
	Enrollment  string     `json:"enrollment,omitempty"` // by which it was fetched
	Nodes       []KeyOwner `json:"nodeKeys"`
}

// KeyOwner is a node that has, or may have, a key.
type KeyOwner struct {
	KeyID     string `json:"keyId"`
	NodeIP    string `json:"nodeId"`
	Confirmed bool   `json:"confirmed"` // the node has signed with the key
}

// Keys lists the organization's keys, newest first.
func (c *Client) Keys(ctx context.Context, org string) ([]Key, error) {
	return list[Key](ctx, c, orgPath(org, "key"))
}

// NodeKeys lists the keys that speak for one node of the organization, newest first.
func (c *Client) NodeKeys(ctx context.Context, org string) ([]Key, error) {
	return list[Key](ctx, c, orgPath(org, "key")+"?scope=node")
}

// DeleteKey deletes a key. No node can use it from then on.
func (c *Client) DeleteKey(ctx context.Context, org, id string) error {
	return c.remove(ctx, orgPath(org, "key", id), "Organization key deleted", KeyNotFound)
}

// DeleteKeys deletes all keys of the organization.
func (c *Client) DeleteKeys(ctx context.Context, org string) error {
	return c.remove(ctx, orgPath(org, "key"), "Successfully deleted ", "")
}

// RegisteredNode is a node as the list shows it.
type RegisteredNode struct {
	ID          string    `json:"id"`
	IP          string    `json:"ip"`
	Region      string    `json:"region"`
	Version     string    `json:"version"`
	Status      string    `json:"status"`
	URL         string    `json:"url"`
	Org         string    `json:"id_org"`
	Services    int64     `json:"nodeServices"`      // a bit mask, as in Registration
	LastUpdated time.Time `json:"lastUpdated"`       // when it registered last
	LastSeen    time.Time `json:"lastSeen,omitzero"` // when it last signed a request, accurate to some seconds
	Provider    string    `json:"provider,omitempty"`
}

// Nodes lists the organization's nodes, newest first, without deleted ones.
func (c *Client) Nodes(ctx context.Context, org string) ([]RegisteredNode, error) {
	return list[RegisteredNode](ctx, c, orgPath(org, "nodes"))
}

// DeleteNode removes a node from the organization. It may register again: to end its
// access, delete its key.
func (c *Client) DeleteNode(ctx context.Context, org, id string) error {
	return c.remove(ctx, orgPath(org, "node", id), "Node deleted", NodeAlreadyDeleted)
}

// StoredSecret is a boot secret without its value, which nobody can read back.
type StoredSecret struct {
	Name    string    `json:"name"`
	Created time.Time `json:"createdAt"`
	Updated time.Time `json:"updatedAt"`
}

// StoredSecrets lists the organization's boot secrets.
func (c *Client) StoredSecrets(ctx context.Context, org string) ([]StoredSecret, error) {
	return list[StoredSecret](ctx, c, orgPath(org, "secret"))
}

// PutSecret stores a boot secret of at most 64 KiB under a name, in place of an
// older one. The caller clears value.
func (c *Client) PutSecret(ctx context.Context, org, name string, value []byte) error {
	return c.do(ctx, request{
		method: http.MethodPut, path: orgPath(org, "secret", name), token: true, typ: "application/octet-stream",
		body: func() ([]byte, error) { return value, nil }, read: done("Secret stored"),
	})
}

// DeleteSecret deletes a boot secret. Nodes remove it the next time they fetch secrets.
func (c *Client) DeleteSecret(ctx context.Context, org, name string) error {
	return c.remove(ctx, orgPath(org, "secret", name), "Secret deleted", SecretNotFound)
}

// Health asks whether the server is there. It needs no token.
func (c *Client) Health(ctx context.Context) (Health, error) {
	var h Health
	return h, c.do(ctx, request{method: http.MethodGet, path: "/healthz", read: func(a *answer) error {
		var body struct {
			Status string `json:"status"`
		}
		if err := a.decode(&body); err != nil {
			return err
		}
		if body.Status != "ok" {
			return a.foreign("JSON without the status of a server")
		}
		h.ClockOffset = a.clockOffset
		return nil
	}})
}

// Health is the answer of a server that runs.
type Health struct {
	// ClockOffset is how far the local clock is ahead of the server's.
	ClockOffset time.Duration
}

// orgPath is the path of something of an organization. Each part is escaped, so
// that none can lead to another path.
func orgPath(org string, parts ...string) string {
	path := "/organization/" + url.PathEscape(org)
	for _, p := range parts {
		path += "/" + url.PathEscape(p)
	}
	return path
}

// list reads the elements of an answer's data.
func list[T any](ctx context.Context, c *Client, path string) ([]T, error) {
	data, err := get[[]T](ctx, c, path)
	if err != nil {
		return nil, err
	}
	return *data, nil
}

// get reads an answer's data.
func get[T any](ctx context.Context, c *Client, path string) (data *T, err error) {
	err = c.do(ctx, request{method: http.MethodGet, path: path, token: true, limit: maxList, read: func(a *answer) error {
		var body struct {
			Success bool `json:"success"`
			Data    *T   `json:"data"`
		}
		if err := a.decode(&body); err != nil {
			return err
		}
		if !body.Success || body.Data == nil {
			return a.foreign("JSON without data")
		}
		data = body.Data
		return nil
	}})
	return data, err
}

// remove deletes what path names. A repeated deletion gets the code gone; after an
// answer that may have been lost it means that the earlier attempt succeeded.
func (c *Client) remove(ctx context.Context, path, message string, gone Code) error {
	attempts, lost := 0, false
	temporary := func(err error) bool {
		attempts++
		lost = lost || mayBeDone(err)
		return Temporary(err)
	}
	err := c.do(ctx, request{method: http.MethodDelete, path: path + c.reason, token: true, read: done(message), temporary: temporary})
	if lost && attempts > 1 && errors.Is(err, gone) {
		return nil
	}
	return err
}

// mayBeDone reports whether the server may have done what was asked although err is
// what came back. Redirects and refusals of something in between never reached it; a
// proxy that answers with 5xx, or a 200 that was cut, says nothing of that. Nor do the
// server's own answers when its database did not say how a change ended, or it failed.
func mayBeDone(err error) bool {
	if refused, ok := errors.AsType[*Error](err); ok {
		return refused.Code == Unavailable || refused.Code == Internal
	}
	if Unsent(err) {
		return false
	}
	foreign, ok := errors.AsType[*ForeignError](err)
	return !ok || foreign.Status < 300 || foreign.Status >= 500
}
