package vault

import (
	"context"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

var _ orgkey.SealedKeystore = (*Keystore)(nil)

// CreateSealed implements orgkey.SealedKeystore, in a mount of its own whose keys
// the policy does not let the service export but to an imported public key. The creation is sent once; if its outcome is unknown, the key is abandoned.
func (k *Keystore) CreateSealed(ctx context.Context, name string) (orgkey.SealableKey, error) {
	if !nameForm.MatchString(name) {
		return nil, fmt.Errorf("creating a key to seal: %q is not a UUID", name)
	}
	public, err := k.c.create(once(correlated(ctx, name)), sealedMount+"/keys/"+name)
	if err != nil {
		return nil, fmt.Errorf("creating a key to seal: %w", err)
	}
	return &sealableKey{c: k.c, name: name, public: public}, nil
}

// DestroySealed implements orgkey.SealedKeystore. A key whose creation was interrupted may
// not allow its deletion yet.
func (k *Keystore) DestroySealed(ctx context.Context, name string) error {
	if !nameForm.MatchString(name) {
		return fmt.Errorf("destroying what was left of a sealed key: %q is not a UUID", name)
	}
	ctx = correlated(ctx, name)
	if err := k.c.removeAllowing(ctx, sealedMount+"/keys/"+name); err != nil {
		return fmt.Errorf("destroying what was left of a sealed key: %w", err)
	}
	return nil
}

// sealableKey is a key in the mount of sealed keys.
type sealableKey struct {
	c      *Client
	name   string
	public orgkey.Public
	ahead  bool // as of key

	mu   sync.Mutex
	gone bool
}

// Public implements orgkey.SealableKey.
func (k *sealableKey) Public() orgkey.Public { return k.public }

// Seal implements orgkey.SealableKey. The recipient is in Transit under a name of its
// own for as long as that takes; it is removed while the caller goes on.
func (k *sealableKey) Seal(ctx context.Context, recipient *rsa.PublicKey) (envelope.SealedKey, error) {
	body, err := importBody(recipient)
	if err != nil {
		return envelope.SealedKey{}, fmt.Errorf("sealing a key: %w", err)
	}
	ctx = once(correlated(ctx, k.name))
	if err := errors.Join(k.c.audited(ctx), k.c.cached(ctx)); err != nil {
		return envelope.SealedKey{}, fmt.Errorf("sealing a key: %w", err)
	}
	name := uuid.NewString()
	place := sealedMount + "/keys/" + name
	answer, err := k.c.do(ctx, request{method: http.MethodPut, path: place + "/import", body: body})
	if err == nil && answer.status != http.StatusNoContent {
		err = fmt.Errorf("%w: importing answers %d", errForeignForm, answer.status)
	}
	if err != nil {
		k.c.abandon(ctx, place)
		return envelope.SealedKey{}, fmt.Errorf("importing the recipient into Transit: %w", err)
	}
	defer k.c.dropRecipient(ctx, place)
	sealed, err := k.export(ctx, name, recipient)
	if err != nil {
		return envelope.SealedKey{}, fmt.Errorf("sealing a key: %w", err)
	}
	return sealed, nil
}

// dropRecipient removes, in the background, a recipient that was imported, in two calls: an
// import cannot allow deletion. It believes
// Vault that it has deleted it: one that stayed would be a public key, in which there is
// no secret, and the reaper's.
func (c *Client) dropRecipient(ctx context.Context, path string) {
	ctx = context.WithoutCancel(ctx)
	c.abandoned.Go(func() {
		err := c.allowDeletion(ctx, path)
		if err == nil {
			var answer response
			if answer, err = c.do(ctx, request{method: http.MethodDelete, path: path}); err == nil && answer.status == http.StatusNoContent {
				return
			}
		}
		c.abandon(ctx, path)
	})
}

// importBody is the request to import a recipient. Transit answers 500 to an invalid one,
// so it is checked before.
func importBody(recipient *rsa.PublicKey) ([]byte, error) {
	if err := orgkey.CheckRecipient(recipient); err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKIXPublicKey(recipient)
	if err != nil {
		return nil, fmt.Errorf("encoding the recipient: %w", err)
	}
	return json.Marshal(map[string]string{
		"type":       fmt.Sprintf("rsa-%d", recipient.N.BitLen()),
		"public_key": string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})),
	})
}

// export wraps the key for the recipient that Transit has under the name given.
// The hash is Transit's default, SHA-256: the policy forbids naming another.
func (k *sealableKey) export(ctx context.Context, recipientName string, recipient *rsa.PublicKey) (envelope.SealedKey, error) {
	answer, err := k.c.do(ctx, request{method: http.MethodGet, path: sealedMount + "/byok-export/" + recipientName + "/" + k.name + "/1"})
	if err != nil {
		return envelope.SealedKey{}, err
	}
	exported, err := data[struct {
		Keys map[string][]byte `json:"keys"` // base64 in JSON
	}](answer.body)
	if err != nil {
		return envelope.SealedKey{}, err
	}
	// RFC 5649: the wrapped key has whole blocks of 8 bytes, one more than what is wrapped.
	value := exported.Keys["1"]
	if tail := len(value) - recipient.Size(); tail < 3*8 || tail%8 != 0 {
		return envelope.SealedKey{}, fmt.Errorf("%w: a sealed key of %d bytes", errForeignForm, len(value))
	}
	return envelope.SealedKey{Alg: envelope.WrapSHA256, Value: value}, nil
}

// Destroy implements orgkey.SealableKey. It continues after ctx has ended, within the time
// limits of its calls.
func (k *sealableKey) Destroy(ctx context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.gone {
		return nil
	}
	remove := k.c.remove
	if k.ahead {
		remove = k.c.removeOwn
	}
	if err := remove(correlated(context.WithoutCancel(ctx), k.name), sealedMount+"/keys/"+k.name); err != nil {
		return fmt.Errorf("destroying a sealed key: %w", err)
	}
	k.gone = true
	return nil
}

// errCacheDisabled: the server's configuration has disable_cache, with which an
// export to another key may wait for a lock for ever.
var errCacheDisabled = fmt.Errorf("%w: this Vault runs with disable_cache=true, with which byok-export can make it hang: remove that from its configuration", orgkey.ErrSealedUnavailable)

// cacheCheck is when Vault was last found to have its cache.
type cacheCheck struct {
	mu sync.Mutex
	at time.Time
}

// cached asks once in auditCheckLife: after a failover another server answers. What it
// refuses is asked again each time.
func (c *Client) cached(ctx context.Context) error {
	c.cacheCheck.mu.Lock()
	at := c.cacheCheck.at
	c.cacheCheck.mu.Unlock()
	if time.Since(at) < auditCheckLife {
		return nil
	}
	at = time.Now()
	answer, err := c.do(ctx, request{method: http.MethodGet, path: "sys/config/state/sanitized"})
	if err != nil {
		return fmt.Errorf("reading whether Vault's cache is enabled: %w", err)
	}
	state, err := data[struct {
		DisableCache bool `json:"disable_cache"`
	}](answer.body)
	if err == nil && state.DisableCache {
		err = errCacheDisabled
	}
	if err != nil {
		return err
	}
	c.cacheCheck.mu.Lock()
	defer c.cacheCheck.mu.Unlock()
	c.cacheCheck.at = at
	return nil
}
