package node

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"fmt"
	"strings"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sync/singleflight"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

const (
	keysCached      = 1 << 15         // opened public keys, about 1 KiB each
	openingDeadline = 5 * time.Second // for unsealing an organization's keys
)

// proof is what a valid signature establishes.
type proof struct {
	key     string // the ID of the key that verified
	public  *rsa.PublicKey
	message [32]byte // SHA-256 of the line that was signed
}

// verifier finds the key that made a signature.
type verifier struct {
	store   Store
	sealer  orgkey.Sealer
	lanes   *lanes
	opened  *lru.Cache[keyRef, *rsa.PublicKey]
	opening singleflight.Group
	nobody  *rsa.PublicKey // verifies for organizations that have no keys
}

// keyRef has the organization in it so that a record moved to another one does
// not find its key opened already.
type keyRef struct{ org, id string }

func newVerifier(store Store, sealer orgkey.Sealer, now func() time.Time) (*verifier, error) {
	opened, err := lru.New[keyRef, *rsa.PublicKey](keysCached)
	if err != nil {
		return nil, err
	}
	lanes, err := newLanes(now)
	if err != nil {
		return nil, err
	}
	nobody, err := rsa.GenerateKey(rand.Reader, orgkey.Bits)
	if err != nil {
		return nil, fmt.Errorf("making the key for organizations without one: %w", err)
	}
	return &verifier{store: store, sealer: sealer, lanes: lanes, opened: opened, nobody: &nobody.PublicKey}, nil
}

// verify returns the proof of r's signature. A key found here was alive a
// moment ago; the transaction that acts has to look again.
func (v *verifier) verify(ctx context.Context, address string, r request) (proof, error) {
	leave, err := v.lanes.enter(ctx, address)
	if err != nil {
		return proof{}, err
	}
	p, ok, err := v.find(ctx, r)
	// Failing to look is no failure of the caller's.
	if refusal := leave(ok || err != nil); refusal != nil {
		return proof{}, refusal
	}
	return p, err
}

func (v *verifier) find(ctx context.Context, r request) (proof, bool, error) {
	sealed, err := v.store.LiveKeys(ctx, r.org, MaxKeys)
	if err != nil {
		return proof{}, false, fmt.Errorf("reading keys: %w", err)
	}
	public, err := v.open(ctx, r.org, sealed)
	if err != nil {
		return proof{}, false, err
	}
	var digests [][32]byte
	for _, line := range r.messages() {
		digests = append(digests, sha256.Sum256([]byte(line)))
	}
	for i, key := range public {
		for _, digest := range digests {
			if rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], r.signature) == nil {
				return proof{sealed[i].ID, key, digest}, true, nil
			}
		}
	}
	if len(public) == 0 {
		for _, digest := range digests {
			// Only the time that it takes matters.
			_ = rsa.VerifyPKCS1v15(v.nobody, crypto.SHA256, digest[:], r.signature)
		}
	}
	return proof{}, false, nil
}

// open returns the public keys, unsealing those that are not cached. Requests
// that miss the same keys share an unsealing, which outlives the one that began it.
func (v *verifier) open(ctx context.Context, org string, sealed []SealedKey) ([]*rsa.PublicKey, error) {
	public := make([]*rsa.PublicKey, len(sealed))
	var missing []orgkey.Sealed
	var names strings.Builder
	for i, k := range sealed {
		var ok bool
		if public[i], ok = v.opened.Get(keyRef{org, k.ID}); !ok {
			binding := orgkey.Binding{Purpose: orgkey.PublicKey, Org: org, ID: k.ID}
			missing = append(missing, orgkey.Sealed{Binding: binding, Ciphertext: k.Sealed})
			names.Write(binding.Context())
		}
	}
	if len(missing) == 0 {
		return public, nil
	}
	shared := v.opening.DoChan(names.String(), func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), openingDeadline)
		defer cancel()
		return v.unseal(ctx, missing)
	})
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case result := <-shared:
		if result.Err != nil {
			return nil, result.Err
		}
		opened := result.Val.(map[string]*rsa.PublicKey)
		for i, k := range sealed {
			if public[i] == nil {
				public[i] = opened[k.ID]
			}
		}
		return public, nil
	}
}

func (v *verifier) unseal(ctx context.Context, sealed []orgkey.Sealed) (map[string]*rsa.PublicKey, error) {
	opened, err := v.sealer.Open(ctx, sealed)
	if err != nil {
		return nil, fmt.Errorf("opening public keys: %w", err)
	}
	keys := make(map[string]*rsa.PublicKey, len(sealed))
	for i, der := range opened {
		binding := sealed[i].Binding
		key, err := orgkey.ParsePublic(der)
		if err != nil {
			return nil, fmt.Errorf("public key %s: %w", binding.ID, err)
		}
		keys[binding.ID] = key
		v.opened.Add(keyRef{binding.Org, binding.ID}, key)
	}
	return keys, nil
}
