package server

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"

	"log/slog"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// sealedKey is a secret key of the service itself. A log has one of each, which
// its processes share, and the database holds it sealed only.
type sealedKey struct {
	what    string // for messages
	purpose string // and the ID: its binding, with the log's origin
	id      string
	length  int // in bytes

	generate func() ([]byte, error)
	stored   func(ctx context.Context, origin string) (sealed []byte, err error) // nil: there is none
	// keep stores a new key, unless there is one.
	keep func(ctx context.Context, origin string, key, sealed []byte) error
}

// eventKey authenticates events until they have their place in the log.
func eventKey(db *sqlstore.DB) sealedKey {
	return sealedKey{
		what: "the key that authenticates events", purpose: orgkey.EventKey, length: len(audit.EventKey{}),
		generate: func() ([]byte, error) { k := audit.NewEventKey(); return k[:], nil },
		stored:   db.SealedEventKey,
		keep: func(ctx context.Context, origin string, _, sealed []byte) error {
			return db.KeepEventKey(ctx, origin, sealed)
		},
	}
}

// checkpointKey is the seed of the Ed25519 key that signs checkpoints where the
// HSM's module has no Ed25519.
func checkpointKey(db *sqlstore.DB) sealedKey {
	return sealedKey{
		what: "the checkpoint key", purpose: orgkey.CheckpointKey, id: "ed25519", length: ed25519.SeedSize,
		generate: func() ([]byte, error) {
			_, private, err := ed25519.GenerateKey(nil)
			if err != nil {
				return nil, err
			}
			defer clear(private)
			return private.Seed(), nil
		},
		stored: func(ctx context.Context, _ string) ([]byte, error) { return db.SealedCheckpointKey(ctx) },
		keep: func(ctx context.Context, origin string, seed, sealed []byte) error {
			private := ed25519.NewKeyFromSeed(seed)
			defer clear(private)
			vkey, err := audit.VerifierKey(origin, private.Public().(ed25519.PublicKey))
			if err != nil {
				return err
			}
			return db.KeepCheckpointKey(ctx, vkey, sealed)
		},
	}
}

// open opens the key of the log with that origin; nil if there is none yet. The
// caller clears it.
func (k sealedKey) open(ctx context.Context, sealer orgkey.Sealer, origin string) ([]byte, error) {
	sealed, err := k.stored(ctx, origin)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", k.what, err)
	}
	if sealed == nil {
		return nil, nil
	}
	opened, err := sealer.Open(ctx, []orgkey.Sealed{{Binding: k.binding(origin), Ciphertext: sealed}})
	if errors.Is(err, orgkey.ErrSealBroken) {
		err = fmt.Errorf("%w; the sealing key is not the one that sealed this database's records, or it is an older version of it: restore the newest backup of the HSM or Vault, or, if min_decryption_version of orgkeys-seal/keys/seal was raised in Vault, lower it and run orgkeys rewrap first", err)
	}
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", k.what, err)
	}
	if len(opened[0]) != k.length {
		clear(opened[0])
		return nil, fmt.Errorf("opening %s: it has %d bytes, not %d", k.what, len(opened[0]), k.length)
	}
	return opened[0], nil
}

// openOrMake opens the key, and makes it first if there is none. The caller
// clears it.
func (k sealedKey) openOrMake(ctx context.Context, sealer orgkey.Sealer, origin string) ([]byte, error) {
	key, err := k.open(ctx, sealer, origin)
	if err != nil || key != nil {
		return key, err
	}
	if err := k.make(ctx, sealer, origin); err != nil {
		return nil, fmt.Errorf("making %s: %w", k.what, err)
	}
	if key, err = k.open(ctx, sealer, origin); err == nil && key == nil { // another replica's, if that was first
		err = fmt.Errorf("%s was stored but cannot be found", k.what)
	}
	return key, err
}

func (k sealedKey) make(ctx context.Context, sealer orgkey.Sealer, origin string) error {
	key, err := k.generate()
	if err != nil {
		return err
	}
	defer clear(key)
	sealed, err := sealer.Seal(ctx, k.binding(origin), key)
	if err != nil {
		return err
	}
	return k.keep(ctx, origin, key, sealed)
}

func (k sealedKey) binding(origin string) orgkey.Binding {
	return orgkey.Binding{Purpose: k.purpose, Org: origin, ID: k.id}
}

// openEventKey opens the event key, or makes it, and gives it to db. Before, db
// records nothing.
func openEventKey(ctx context.Context, sealer orgkey.Sealer, db *sqlstore.DB) error {
	head, err := db.Head(ctx)
	if err != nil {
		return err
	}
	key, err := eventKey(db).openOrMake(ctx, sealer, head.Origin)
	if err != nil {
		return err
	}
	defer clear(key)
	db.UseEventKey(audit.EventKey(key))
	return nil
}

// openEventKeyIfAny is openEventKey without making one.
func openEventKeyIfAny(ctx context.Context, sealer orgkey.Sealer, db *sqlstore.DB) error {
	head, err := db.Head(ctx)
	if err != nil {
		return err
	}
	key, err := eventKey(db).open(ctx, sealer, head.Origin)
	if err != nil || key == nil {
		return err
	}
	defer clear(key)
	db.UseEventKey(audit.EventKey(key))
	return nil
}

// OpensEventKey reports whether the database holds an event key that the sealer
// opens; false without an error if it holds none.
func OpensEventKey(ctx context.Context, sealer orgkey.Sealer, db *sqlstore.DB) (bool, error) {
	head, err := db.Head(ctx)
	if err != nil {
		return false, err
	}
	key, err := eventKey(db).open(ctx, sealer, head.Origin)
	clear(key)
	return key != nil, err
}

// OpenToRecord lets a command record events beside a server or without one.
func OpenToRecord(ctx context.Context, cfg config.Config, db *sqlstore.DB, log *slog.Logger) error {
	b, err := openBackend(ctx, cfg, cfg.DataDir, db, log)
	if err != nil {
		return err
	}
	return errors.Join(openEventKey(ctx, b.sealer, db), b.close())
}

// unauthenticated reports events in the database that were refused a place in
// the log.
func unauthenticated(ctx context.Context, db *sqlstore.DB) error {
	n, err := db.Unauthenticated(ctx)
	if err == nil && n > 0 {
		err = &audit.UnauthenticatedError{Count: int(n)}
	}
	return err
}

// stillOpen reports whether the sealed records can be decrypted. It tests the key that
// authenticates events, which "orgkeys rewrap" rewraps last, so that the version of the
// sealing key that it needs is the oldest in use.
func stillOpen(ctx context.Context, sealer orgkey.Sealer, db *sqlstore.DB) error {
	head, err := db.Head(ctx)
	if err != nil {
		return err
	}
	key, err := eventKey(db).open(ctx, sealer, head.Origin)
	clear(key)
	return err
}
