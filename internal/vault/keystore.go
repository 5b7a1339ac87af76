package vault

import (
	"context"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// clockGrain is by how much a key's age may be mistaken that comes of Transit's
// time and the answer's date: one or both are given in whole seconds.
const clockGrain = 2 * time.Second

// abandonedPoll is how often Transit is asked whether it has finished an abandoned key.
const abandonedPoll = 100 * time.Millisecond

// uselessPatience is how long destroying a key may hold up the answer to a
// caller who does not get it.
const uselessPatience = time.Second

// nameForm is that of a key's name: a UUID in lower case.
var nameForm = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

// ErrNotFresh: Transit answered a creation with a key that is not a new one. Creating an
// existing key succeeds in Transit, so another client may hold that key.
var ErrNotFresh = errors.New("a key that Transit was to create is not new")

// errForeignForm: a success that Vault does not answer so, and something between
// orgkeys and Vault does. It quotes nothing: a private key may be in it.
var errForeignForm = fmt.Errorf("%w: the answer is not of Vault's form", orgkey.ErrUnavailable)

// errNoData: as with errForeignForm, unless the answer is Vault's 404.
var errNoData = fmt.Errorf("reading Vault's answer: %w: it holds no data", orgkey.ErrUnavailable)

// Keystore makes keys in Transit. It implements orgkey.Keystore.
type Keystore struct{ c *Client }

// Keystore returns the keystore.
func (c *Client) Keystore() *Keystore { return &Keystore{c} }

// transitKey is what Transit says of a key.
type transitKey struct {
	Type            string `json:"type"`
	LatestVersion   int    `json:"latest_version"`
	Exportable      bool   `json:"exportable"`
	DeletionAllowed bool   `json:"deletion_allowed"`
	PlaintextBackup bool   `json:"allow_plaintext_backup"`
	Imported        bool   `json:"imported_key"`
	// Keys are its versions: of an asymmetric key each as a keyVersion, of a symmetric
	// one the second of its creation.
	Keys map[string]jsontext.Value `json:"keys"`
}

// keyVersion is one version of an asymmetric key.
type keyVersion struct {
	PublicKey string    `json:"public_key"`
	Created   time.Time `json:"creation_time"`
}

// first is the version that a key is created with.
func (k transitKey) first() (v keyVersion, err error) {
	text := k.Keys["1"]
	if text.Kind() != '0' {
		err = json.Unmarshal(text, &v)
		return v, err
	}
	var second int64
	err = json.Unmarshal(text, &second)
	return keyVersion{Created: time.Unix(second, 0)}, err
}

// Create implements orgkey.Keystore. The key can be deleted from then on: a
// crash at any later point leaves nothing that the reaper could not remove.
func (k *Keystore) Create(ctx context.Context, name string) (orgkey.BackendKey, error) {
	if !nameForm.MatchString(name) {
		return nil, fmt.Errorf("creating a key: %q is not a UUID", name)
	}
	k.c.anticipate(ctx) // the check that Export needs, while Transit computes
	ctx = correlated(ctx, name)
	public, err := k.c.create(ctx, keysMount+"/keys/"+name)
	if err != nil {
		return nil, fmt.Errorf("creating a key: %w", err)
	}
	return &key{c: k.c, name: name, public: public}, nil
}

// create makes the key at path. It can be deleted from then on.
func (c *Client) create(ctx context.Context, path string) (orgkey.Public, error) {
	answer, err := c.do(ctx, request{method: http.MethodPut, path: path, body: []byte(`{"type":"rsa-2048","exportable":true}`)})
	if err != nil {
		if errors.Is(err, orgkey.ErrUnavailable) {
			c.abandon(ctx, path)
		}
		return orgkey.Public{}, err
	}
	public, err := freshKey(answer, c.config.CallTimeout)
	if err != nil {
		return orgkey.Public{}, err
	}
	if err := c.allowDeletion(ctx, path); err != nil {
		c.abandon(ctx, path)
		return orgkey.Public{}, err
	}
	return public, nil
}

// freshKey reads the answer to a creation and reports ErrNotFresh unless it
// speaks of the key that this very call made. Both times are Vault's.
func freshKey(answer response, callTimeout time.Duration) (orgkey.Public, error) {
	k, err := data[transitKey](answer.body)
	if err != nil {
		return orgkey.Public{}, fmt.Errorf("%w: %w", ErrNotFresh, err)
	}
	first, err := k.first()
	switch {
	case err != nil:
		return orgkey.Public{}, fmt.Errorf("%w: reading its first version: %w", ErrNotFresh, err)
	case k.Type != "rsa-2048" || !k.Exportable || k.Imported || k.PlaintextBackup:
		return orgkey.Public{}, fmt.Errorf("%w: it is of type %q, exportable %t, imported %t", ErrNotFresh, k.Type, k.Exportable, k.Imported)
	case k.LatestVersion != 1 || len(k.Keys) != 1:
		return orgkey.Public{}, fmt.Errorf("%w: its latest version is %d", ErrNotFresh, k.LatestVersion)
	case k.DeletionAllowed:
		return orgkey.Public{}, fmt.Errorf("%w: its configuration was changed", ErrNotFresh)
	case answer.date.Sub(first.Created).Abs() > callTimeout+clockGrain:
		return orgkey.Public{}, fmt.Errorf("%w: it was created %s before the answer, or the clocks of Vault's nodes differ by so much", ErrNotFresh, answer.date.Sub(first.Created))
	}
	return parsePublic([]byte(first.PublicKey))
}

func parsePublic(text []byte) (orgkey.Public, error) {
	block, _ := pem.Decode(text)
	if block == nil {
		return orgkey.Public{}, errors.New("reading the public key: it is not PEM")
	}
	parsed, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return orgkey.Public{}, fmt.Errorf("reading the public key: %w", err)
	}
	public, ok := parsed.(*rsa.PublicKey)
	if !ok || public.N.BitLen() != orgkey.Bits {
		return orgkey.Public{}, fmt.Errorf("reading the public key: it is not RSA of %d bits", orgkey.Bits)
	}
	return orgkey.NewPublic(public), nil
}

// key is a key in Transit.
type key struct {
	c      *Client
	name   string
	public orgkey.Public

	ahead bool // made ahead: Destroy succeeds only if its own call removed the key

	mu      sync.Mutex
	gone    bool
	useless bool // its private half could not be had
}

// Public implements orgkey.BackendKey.
func (k *key) Public() orgkey.Public { return k.public }

// Export implements orgkey.BackendKey. Every copy of the private key that this
// package made is cleared, but the one returned. What stays out of reach until
// it is overwritten: the buffers of net/http and crypto/tls that the answer
// came through, and what crypto/rsa computed while the key was checked.
func (k *key) Export(ctx context.Context) ([]byte, error) {
	ctx = correlated(ctx, k.name)
	var answer response
	err := k.c.audited(ctx) // before the audit devices get to see the key
	if err == nil {
		answer, err = k.c.do(ctx, request{method: http.MethodGet, path: keysMount + "/export/encryption-key/" + k.name + "/1"})
	}
	defer clear(answer.body)
	if err != nil {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.useless = true
		return nil, fmt.Errorf("exporting a key: %w", err)
	}
	der, err := privateKey(answer.body)
	if err != nil {
		return nil, fmt.Errorf("exporting a key: %w", err)
	}
	if err := k.public.CheckPrivate(der); err != nil {
		clear(der)
		return nil, fmt.Errorf("exporting a key: %w", err)
	}
	return der, nil
}

// privateKey takes the PKCS#1 DER out of the answer to an export, without
// making a string of any part of it. Its errors quote nothing.
func privateKey(body []byte) ([]byte, error) {
	var answer struct {
		Data struct {
			Keys struct {
				First jsontext.Value `json:"1"`
			} `json:"keys"`
		} `json:"data"`
	}
	err := json.Unmarshal(body, &answer)
	quoted := answer.Data.Keys.First
	defer clear(quoted)
	if err != nil || quoted.Kind() != '"' {
		return nil, errForeignForm
	}
	text, err := jsontext.AppendUnquote(make([]byte, 0, len(quoted)), quoted)
	defer clear(text)
	if err != nil {
		return nil, errForeignForm
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "RSA PRIVATE KEY" {
		if block != nil {
			clear(block.Bytes)
		}
		return nil, errors.New("the answer is not a PKCS#1 private key in PEM")
	}
	return block.Bytes, nil
}

// Destroy implements orgkey.BackendKey. It continues after ctx has ended, within the time
// limits of its calls. For a key that will not be released it waits only briefly: what a
// slow Vault has not removed by then is removed in the background, and reported as not
// confirmed.
func (k *key) Destroy(ctx context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.gone {
		return nil
	}
	ctx = correlated(context.WithoutCancel(ctx), k.name)
	remove := k.c.remove
	if k.ahead {
		remove = k.c.removeOwn
	}
	removed := make(chan error, 1)
	k.c.abandoned.Go(func() { removed <- remove(ctx, keysMount+"/keys/"+k.name) })
	var enough <-chan time.Time // never, unless the key is useless
	if k.useless {
		enough = time.After(uselessPatience)
	}
	select {
	case err := <-removed:
		if err != nil {
			return fmt.Errorf("destroying a key: %w", err)
		}
	case <-enough:
		return fmt.Errorf("destroying a key: %w: Vault does not answer in time", orgkey.ErrUnavailable)
	}
	k.gone = true
	return nil
}

// allowDeletion makes the key at path one that can be deleted.
func (c *Client) allowDeletion(ctx context.Context, path string) error {
	answer, err := c.do(ctx, request{method: http.MethodPut, path: path + "/config", body: []byte(`{"deletion_allowed":true}`)})
	if err == nil && answer.status != http.StatusNoContent { // as older versions answer
		var k transitKey
		if k, err = data[transitKey](answer.body); err == nil && !k.DeletionAllowed {
			err = errForeignForm
		}
	}
	if err != nil {
		return fmt.Errorf("allowing a key's deletion: %w", err)
	}
	return nil
}

// abandon removes, in the background, the key at path, whose creation may still be in
// progress in Transit. The reaper deletes what it misses.
func (c *Client) abandon(ctx context.Context, path string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.config.CallTimeout)
	c.abandoned.Go(func() {
		defer cancel()
		for ctx.Err() == nil {
			err := c.allowDeletion(ctx, path)
			if err == nil {
				err = c.remove(ctx, path)
			}
			if err == nil || errors.Is(err, orgkey.ErrUnavailable) {
				return
			}
			pause(ctx, abandonedPoll)
		}
	})
}

// data reads the field "data" of an answer. An answer in another form comes from a proxy
// in between, and counts as no answer.
func data[T any](body []byte) (T, error) {
	var answer struct {
		Data *T `json:"data"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return *new(T), fmt.Errorf("reading Vault's answer: %w: %w", orgkey.ErrUnavailable, err)
	}
	if answer.Data == nil {
		return *new(T), errNoData
	}
	return *answer.Data, nil
}
