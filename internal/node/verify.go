package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// proof is what a valid signature establishes.
type proof struct {
	Signer
	public orgkey.Public
	line   string // what was signed
}

// verifier finds the key that made a signature.
type verifier struct {
	store  Store
	opener *orgkey.Opener
	lanes  *lanes
	decoy  orgkey.Public // verifies for organizations that have no keys
}

func newVerifier(store Store, opener *orgkey.Opener, now func() time.Time) (*verifier, error) {
	lanes, err := newLanes(now)
	if err != nil {
		return nil, err
	}
	decoy, err := orgkey.NewDecoy()
	return &verifier{store: store, opener: opener, lanes: lanes, decoy: decoy}, err
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
	candidates, err := v.store.LiveKeys(ctx, r.org, r.addr, r.named, MaxKeys)
	if err != nil {
		return proof{}, false, fmt.Errorf("reading keys: %w", err)
	}
	sealed := make([]orgkey.SealedKey, len(candidates))
	for i, c := range candidates {
		sealed[i] = c.SealedKey
	}
	keys, err := v.opener.Open(ctx, r.org, sealed)
	if err != nil && !errors.Is(err, orgkey.ErrSealBroken) { // one that does not open verifies nothing
		return proof{}, false, err
	}
	lines := r.messages()
	for _, c := range candidates {
		key, opened := keys[c.ID]
		for _, line := range lines {
			if opened && key.Verifies([]byte(line), r.signature) {
				return proof{c.Signer, key, line}, true, nil
			}
		}
	}
	if len(keys) == 0 {
		for _, line := range lines {
			v.decoy.Verifies([]byte(line), r.signature) // only the time that it takes matters
		}
	}
	return proof{}, false, nil
}
