package node

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sync/singleflight"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

const (
	keysCached      = 1 << 15         // opened public keys, about 1 KiB each
	openingDeadline = 5 * time.Second // for unsealing an organization's keys
	brokenFor       = time.Minute     // before a key that did not open is tried again
)

// proof is what a valid signature establishes.
type proof struct {
	key    string // the ID of the key that verified
	public *rsa.PublicKey
	line   string // what was signed
}

// verifier finds the key that made a signature.
type verifier struct {
	store   Store
	sealer  orgkey.Sealer
	lanes   *lanes
	log     *slog.Logger
	now     func() time.Time
	opened  *lru.Cache[keyRef, opened]
	opening singleflight.Group
	nobody  *rsa.PublicKey // verifies for organizations that have no keys
}

// opened is a public key, or that there is none before a time because the
// record does not open.
type opened struct {
	public *rsa.PublicKey
	broken time.Time
}

// keyRef has the organization in it so that a record moved to another one does
// not find its key opened already.
type keyRef struct{ org, id string }

func newVerifier(store Store, sealer orgkey.Sealer, log *slog.Logger, now func() time.Time) (*verifier, error) {
	cache, err := lru.New[keyRef, opened](keysCached)
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
	return &verifier{store: store, sealer: sealer, lanes: lanes, log: log, now: now, opened: cache, nobody: &nobody.PublicKey}, nil
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
	keys, err := v.open(ctx, r.org, sealed)
	if err != nil {
		return proof{}, false, err
	}
	lines := r.messages()
	for _, k := range sealed {
		key := keys[k.ID]
		for _, line := range lines {
			if key != nil && verifies(key, line, r.signature) {
				return proof{k.ID, key, line}, true, nil
			}
		}
	}
	if len(keys) == 0 {
		for _, line := range lines {
			verifies(v.nobody, line, r.signature) // only the time that it takes matters
		}
	}
	return proof{}, false, nil
}

func verifies(key *rsa.PublicKey, line string, signature []byte) bool {
	digest := sha256.Sum256([]byte(line))
	return rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], signature) == nil
}

// open returns the public keys by ID, unsealing those that are not cached.
// Those that do not open are left out. Requests that miss the same keys share
// an unsealing, which outlives the one that began it.
func (v *verifier) open(ctx context.Context, org string, sealed []SealedKey) (map[string]*rsa.PublicKey, error) {
	keys := make(map[string]*rsa.PublicKey, len(sealed))
	var missing []orgkey.Sealed
	var names strings.Builder
	for _, k := range sealed {
		switch cached, ok := v.opened.Get(keyRef{org, k.ID}); {
		case cached.public != nil:
			keys[k.ID] = cached.public
		case !ok || !v.now().Before(cached.broken):
			binding := orgkey.Binding{Purpose: orgkey.PublicKey, Org: org, ID: k.ID}
			missing = append(missing, orgkey.Sealed{Binding: binding, Ciphertext: k.Sealed})
			names.Write(binding.Context())
		}
	}
	if len(missing) == 0 {
		return keys, nil
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
		maps.Copy(keys, result.Val.(map[string]*rsa.PublicKey))
		return keys, nil
	}
}

// unseal opens and caches public keys. The sealer opens all or none; one
// damaged record must not take an organization's other keys with it, nor have
// every stranger's request ask the sealer again.
func (v *verifier) unseal(ctx context.Context, sealed []orgkey.Sealed) (map[string]*rsa.PublicKey, error) {
	keys, err := v.unsealAll(ctx, sealed)
	if !errors.Is(err, orgkey.ErrSealBroken) {
		return keys, err
	}
	if len(sealed) == 1 {
		binding := sealed[0].Binding
		v.log.Error("a public key does not open and cannot verify", "org", binding.Org, "key", binding.ID, "error", err)
		v.opened.Add(keyRef{binding.Org, binding.ID}, opened{broken: v.now().Add(brokenFor)})
		return nil, nil
	}
	keys = make(map[string]*rsa.PublicKey, len(sealed))
	for i := range sealed {
		one, err := v.unseal(ctx, sealed[i:i+1])
		if err != nil {
			return nil, err
		}
		maps.Copy(keys, one)
	}
	return keys, nil
}

func (v *verifier) unsealAll(ctx context.Context, sealed []orgkey.Sealed) (map[string]*rsa.PublicKey, error) {
	ders, err := v.sealer.Open(ctx, sealed)
	if err != nil {
		return nil, fmt.Errorf("opening public keys: %w", err)
	}
	keys := make(map[string]*rsa.PublicKey, len(sealed))
	for i, der := range ders {
		binding := sealed[i].Binding
		key, err := orgkey.ParsePublic(der)
		if err != nil {
			return nil, fmt.Errorf("public key %s: %w", binding.ID, err)
		}
		keys[binding.ID] = key
		v.opened.Add(keyRef{binding.Org, binding.ID}, opened{public: key})
	}
	return keys, nil
}
