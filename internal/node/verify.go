package node

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// proof is what a valid signature establishes.
type proof struct {
	Signer
	public *rsa.PublicKey
	line   string // what was signed
}

// verifier finds the key that made a signature.
type verifier struct {
	store  Store
	opener *orgkey.Opener
	lanes  *lanes
	nobody *rsa.PublicKey // verifies for organizations that have no keys
}

func newVerifier(store Store, opener *orgkey.Opener, now func() time.Time) (*verifier, error) {
	lanes, err := newLanes(now)
	if err != nil {
		return nil, err
	}
	nobody, err := rsa.GenerateKey(rand.Reader, orgkey.Bits)
	if err != nil {
		return nil, fmt.Errorf("making the key for organizations without one: %w", err)
	}
	return &verifier{store: store, opener: opener, lanes: lanes, nobody: &nobody.PublicKey}, nil
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
		key := keys[c.ID]
		for _, line := range lines {
			if key != nil && verifies(key, line, r.signature) {
				return proof{c.Signer, key, line}, true, nil
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
