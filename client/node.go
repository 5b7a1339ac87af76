package client

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/orgkeys/orgkeys/internal/envelope"
)

// Limits of an answer with boot secrets.
const (
	maxSecrets       = 64      // an organization has no more
	maxSecretsAnswer = 8 << 20 // 64 secrets of 64 KiB in base64, and room
)

// Node speaks for one node of an organization, by signing with a key of it.
// docs/nodes.md describes the protocol.
type Node struct {
	Client *Client
	Org    string // the organization's ID
	IP     string // the node's address, which identifies it
	Region string
	Key    PrivateKey
	// KeyID is the ID of Key. A node key that has not registered yet is found by it
	// only; the others are found without it, too.
	KeyID string
}

// Registration is what a node reports about itself. Version and Status are required.
type Registration struct {
	Version  string
	Status   string // free text, such as active
	URL      string
	Provider string // such as S3
	Services *int64 // a bit mask: 1 storage, 2 AI and language models, 4 chat; nil means not given
}

type signedFields struct {
	IP        string `json:"ip"`
	Region    string `json:"region"`
	Timestamp string `json:"timestamp"`
	Signature string `json:"signature"`
	Org       string `json:"id_org"`
	KeyID     string `json:"key_id,omitempty"`
}

type registerFields struct {
	signedFields
	Version  string `json:"version"`
	Status   string `json:"status"`
	URL      string `json:"url,omitempty"`
	Provider string `json:"provider,omitempty"`
	Services *int64 `json:"nodeServices,omitempty"`
}

// Register registers the node, or updates it. Repeating it is harmless.
func (n Node) Register(ctx context.Context, r Registration) error {
	return n.Client.do(ctx, n.request("/register", func(signed signedFields) any {
		return registerFields{signed, r.Version, r.Status, r.URL, r.Provider, r.Services}
	}, done("Node registered")))
}

// Unregister takes the node out of its organization. For a node that is not
// there it does nothing.
func (n Node) Unregister(ctx context.Context) error {
	err := n.Client.do(ctx, n.request("/unregister", nil, done("Node unregistered")))
	if errors.Is(err, NodeNotFound) {
		return nil
	}
	return err
}

// request is a signed call. Each attempt signs the present time, in
// milliseconds, so that no two attempts share a signature.
func (n Node) request(path string, more func(signedFields) any, read func(*answer) error) request {
	return request{method: http.MethodPost, path: path, typ: "application/json", read: read, body: func() ([]byte, error) {
		f := signedFields{IP: n.IP, Region: n.Region, Timestamp: strconv.FormatInt(time.Now().UnixMilli(), 10), Org: n.Org, KeyID: n.KeyID}
		var err error
		if f.Signature, err = sign(n.Key, f.IP+"|"+f.Region+"|"+f.Timestamp+"|"+f.Org); err != nil {
			return nil, err
		}
		if more == nil {
			return json.Marshal(f)
		}
		return json.Marshal(more(f))
	}}
}

// Secret is a boot secret. The holder clears its Value after use.
type Secret struct {
	Name  string // lower-case letters, digits and underscores, beginning with a letter
	Value []byte
}

// Secrets returns all boot secrets of the organization, sorted by name. If
// any part of an answer is invalid, the whole answer is an error.
func (n Node) Secrets(ctx context.Context) ([]Secret, error) {
	var all []Secret
	r := n.request("/secrets", nil, func(a *answer) (err error) {
		defer clear(a.body)
		all, err = n.open(a)
		return err
	})
	r.limit = maxSecretsAnswer
	return all, n.Client.do(ctx, r)
}

func (n Node) open(a *answer) ([]Secret, error) {
	var fields map[string]jsontext.Value
	if err := a.decode(&fields); err != nil {
		return nil, err
	}
	if err := a.wantSecrets(fields); err != nil {
		return nil, err
	}
	var all []Secret
	for field, value := range fields {
		name, ok := strings.CutSuffix(field, "_enc")
		if !ok {
			continue
		}
		opened, err := n.openOne(name, value)
		if err != nil {
			for _, s := range all {
				clear(s.Value)
			}
			if errors.Is(err, ErrKeyFailed) {
				return nil, err
			}
			return nil, fmt.Errorf("%w: %w", a.foreign(err.Error()), err)
		}
		all = append(all, Secret{name, opened})
	}
	slices.SortFunc(all, func(a, b Secret) int { return strings.Compare(a.Name, b.Name) })
	return all, nil
}

// wantSecrets reports an object that something other than orgkeys may have answered.
// Secrets are authentic if the node's key decrypts them. After an answer without any a
// node deletes those that it has, and a gateway may answer {} with an X-Request-Id of its
// own: so the header with the number of secrets must be there.
func (a *answer) wantSecrets(fields map[string]jsontext.Value) error {
	if success, ok := fields["success"]; fields == nil || ok && string(success) != "true" {
		return a.foreign("JSON without success")
	}
	secrets := 0
	for field := range fields {
		if strings.HasSuffix(field, "_enc") {
			secrets++
		}
	}
	switch {
	case secrets > maxSecrets:
		return a.foreign(fmt.Sprintf("more than %d secrets", maxSecrets))
	case len(a.header.Values("X-Secret-Count")) > 0 && a.header.Get("X-Secret-Count") != strconv.Itoa(secrets):
		return a.foreign(fmt.Sprintf("%d secrets, and X-Secret-Count is %.20q", secrets, a.header.Get("X-Secret-Count")))
	case secrets == 0 && len(a.header.Values("X-Secret-Count")) == 0:
		return a.foreign("JSON without any secret and without X-Secret-Count")
	}
	return nil
}

var secretName = regexp.MustCompile(`^[a-z][a-z0-9_]{0,63}$`)

func (n Node) openOne(name string, value jsontext.Value) ([]byte, error) {
	if !secretName.MatchString(name) {
		return nil, fmt.Errorf("a secret with the invalid name %.80q", name)
	}
	var text string
	if err := json.Unmarshal(value, &text); err != nil {
		return nil, fmt.Errorf("secret %s is not an envelope", name)
	}
	opened, err := envelope.Open(n.Key, []byte(text))
	if err != nil {
		return nil, fmt.Errorf("secret %s: %w", name, err)
	}
	return opened, nil
}
