package server

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// PublicKeys opens public keys for an export, beside a server or without one. The
// back end is opened once there is something to open, and until close.
type PublicKeys struct {
	cfg     config.Config
	db      *sqlstore.DB
	log     *slog.Logger
	backend *backend
}

// NewPublicKeys returns what opens the public keys in db.
func NewPublicKeys(cfg config.Config, db *sqlstore.DB, log *slog.Logger) *PublicKeys {
	return &PublicKeys{cfg: cfg, db: db, log: log}
}

// Open implements archive.PublicKeys.
func (p *PublicKeys) Open(ctx context.Context, ids []string) (map[string][]byte, error) {
	sealed, err := p.db.SealedPublicKeys(ctx, ids)
	if err != nil || len(sealed) == 0 {
		return nil, err
	}
	if p.backend == nil {
		b, err := openBackend(ctx, p.cfg, p.cfg.DataDir, p.db, p.log)
		if err != nil {
			return nil, fmt.Errorf("opening public keys needs the HSM or Vault: %w", err)
		}
		p.backend = &b
	}
	items := make([]orgkey.Sealed, 0, len(sealed))
	for _, s := range sealed {
		items = append(items, s)
	}
	opened, err := p.backend.sealer.Open(ctx, items)
	if err != nil {
		return nil, fmt.Errorf("opening public keys: %w", err)
	}
	keys := make(map[string][]byte, len(items))
	for i, item := range items {
		keys[item.Binding.ID] = opened[i]
	}
	return keys, nil
}

// Close ends the use of the back end.
func (p *PublicKeys) Close() error {
	if p.backend == nil {
		return nil
	}
	return p.backend.close()
}
