package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// organizationsKept is of how many organizations the last signer, about 1 KiB, and the size of
// the secrets are remembered.
const organizationsKept = 1 << 13

// proof is what a valid signature establishes.
type proof struct {
	Signer
	public orgkey.Public
	line   string // what was signed
}

// signer is a key that a signature is tried against, and its public half.
type signer struct {
	Signer
	public orgkey.Public
}

// verifies returns the proof if the key made r's signature.
func (k signer) verifies(r request) (proof, bool) {
	for _, line := range r.messages() {
		if k.public.Verifies([]byte(line), r.signature) {
			return proof{k.Signer, k.public, line}, true
		}
	}
	return proof{}, false
}

// verifier finds the key that made a signature.
type verifier struct {
	store  Store
	opener *orgkey.Opener
	lanes  *lanes
	last   *lru.Cache[org.ID, signer] // the organization key that verified last
	decoy  orgkey.Public              // verifies for organizations that have no keys
}

func newVerifier(store Store, opener *orgkey.Opener, now func() time.Time) (*verifier, error) {
	lanes, err := newLanes(now)
	if err != nil {
		return nil, err
	}
	last, err := lru.New[org.ID, signer](organizationsKept)
	if err != nil {
		return nil, err
	}
	return &verifier{store: store, opener: opener, lanes: lanes, last: last, decoy: orgkey.NewDecoy()}, nil
}

// verify returns the proof of r's signature. A key found here was alive when it was
// read; the transaction that acts has to look again.
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
	last, known := v.last.Get(r.org)
	if known {
		if p, ok := last.verifies(r); ok {
			return p, true, nil
		}
	}
	live, err := v.live(ctx, r)
	if err != nil {
		return proof{}, false, err
	}
	for _, k := range live {
		if known && k.Key == last.Key {
			continue // twice would tell strangers of whom something is remembered
		}
		if p, ok := k.verifies(r); ok {
			if !k.OfNode {
				v.last.Add(r.org, k)
			}
			return p, true, nil
		}
	}
	if len(live) == 0 && !known {
		signer{public: v.decoy}.verifies(r) // only the time that it takes matters
	}
	return proof{}, false, nil
}

// live returns the keys that may have made r's signature, and can be opened.
func (v *verifier) live(ctx context.Context, r request) ([]signer, error) {
	candidates, err := v.store.LiveKeys(ctx, r.org, r.addr, r.named, MaxKeys)
	if err != nil {
		return nil, fmt.Errorf("reading keys: %w", err)
	}
	sealed := make([]orgkey.SealedKey, len(candidates))
	for i, c := range candidates {
		sealed[i] = orgkey.SealedKey{ID: c.Key, Sealed: c.Sealed}
	}
	keys, err := v.opener.Open(ctx, r.org, sealed)
	if err != nil && !errors.Is(err, orgkey.ErrSealBroken) { // one that does not open verifies nothing
		return nil, err
	}
	live := make([]signer, 0, len(candidates))
	for _, c := range candidates {
		if public, opened := keys[c.Key]; opened {
			live = append(live, signer{c, public})
		}
	}
	return live, nil
}

// forget has the next request of the organization read its keys.
func (v *verifier) forget(org org.ID) { v.last.Remove(org) }
