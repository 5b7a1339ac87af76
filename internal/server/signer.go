package server

import (
	"context"
	"crypto/ed25519"
	"errors"
	"sync"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/hsm"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// hsmSigner signs checkpoints in the HSM or, if its module has no Ed25519, with a key
// that is stored sealed by the HSM.
type hsmSigner struct {
	token  audit.Signer
	sealer orgkey.Sealer
	db     *sqlstore.DB

	mu    sync.Mutex
	local audit.Signer
}

// SignCheckpoint implements audit.Signer.
func (s *hsmSigner) SignCheckpoint(ctx context.Context, text []byte) ([]byte, ed25519.PublicKey, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.local == nil {
		signature, public, err := s.token.SignCheckpoint(ctx, text)
		if !errors.Is(err, hsm.ErrNoEd25519) {
			return signature, public, err
		}
		if s.local, err = openLocalSigner(ctx, s.sealer, s.db); err != nil {
			return nil, nil, err
		}
	}
	return s.local.SignCheckpoint(ctx, text)
}

// openLocalSigner opens the sealed checkpoint key in the database, or makes it.
func openLocalSigner(ctx context.Context, sealer orgkey.Sealer, db *sqlstore.DB) (audit.Signer, error) {
	head, err := db.Head(ctx)
	if err != nil {
		return nil, err
	}
	seed, err := checkpointKey(db).openOrMake(ctx, sealer, head.Origin)
	if err != nil {
		return nil, err
	}
	defer clear(seed)
	return audit.LocalSigner{Private: ed25519.NewKeyFromSeed(seed)}, nil
}
