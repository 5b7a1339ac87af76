package sqlstore

import (
	"context"
	"encoding/hex"
	"fmt"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

func scanKeyID(scan func(...any) error) ([]byte, error) {
	var text string
	if err := scan(&text); err != nil {
		return nil, err
	}
	id, err := hex.DecodeString(text)
	if err != nil || len(id) == 0 {
		return nil, fmt.Errorf("the database names a key of the token by %q, which is no CKA_ID", text)
	}
	return id, nil
}

// ChosenKey implements hsm.Register.
func (d *DB) ChosenKey(ctx context.Context, purpose string) ([]byte, error) {
	found, err := query(ctx, d.read, scanKeyID, "SELECT cka_id FROM token_keys WHERE purpose = $1", purpose)
	if err != nil || len(found) == 0 {
		return nil, err
	}
	return found[0], nil
}

// AnnounceKey implements hsm.Register.
func (d *DB) AnnounceKey(ctx context.Context, purpose string, id []byte) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		return one(exec(ctx, tx, "INSERT INTO token_keys_announced (purpose, cka_id) VALUES ($1, $2)", purpose, hex.EncodeToString(id)))
	})
}

// ChooseKey implements hsm.Register.
func (d *DB) ChooseKey(ctx context.Context, purpose string, id []byte) ([]byte, error) {
	return outcome(ctx, d, func(ctx context.Context, tx *txn) ([]byte, error) {
		if _, err := exec(ctx, tx, "INSERT INTO token_keys (purpose, cka_id) VALUES ($1, $2) ON CONFLICT DO NOTHING", purpose, hex.EncodeToString(id)); err != nil {
			return nil, err
		}
		found, err := query(ctx, tx, scanKeyID, "SELECT cka_id FROM token_keys WHERE purpose = $1", purpose)
		if err != nil {
			return nil, err
		}
		return found[0], nil
	})
}

// AnnouncedKeys implements hsm.Register.
func (d *DB) AnnouncedKeys(ctx context.Context, purpose string) ([][]byte, error) {
	return query(ctx, d.read, scanKeyID, "SELECT cka_id FROM token_keys_announced WHERE purpose = $1", purpose)
}

// SealedSample implements hsm.Register: the key that authenticates events where
// there is one, since it is the first that is sealed, or else a public key or a
// boot secret.
func (d *DB) SealedSample(ctx context.Context) (orgkey.Sealed, bool, error) {
	found, err := query(ctx, d.read, func(scan func(...any) error) (s orgkey.Sealed, err error) {
		err = scan(&s.Binding.Purpose, &s.Binding.Org, &s.Binding.ID, &s.Ciphertext)
		return s, err
	}, `SELECT purpose, org, id, sealed FROM (
		SELECT CAST($1 AS TEXT) AS purpose, origin AS org, '' AS id, sealed, 1 AS place FROM event_keys
		UNION ALL SELECT CAST($2 AS TEXT), org_id, id, sealed, 2 FROM org_keys WHERE sealed IS NOT NULL
		UNION ALL SELECT CAST($3 AS TEXT), org_id, name, sealed, 3 FROM boot_secrets WHERE sealed IS NOT NULL) AS every
		ORDER BY place LIMIT 1`, orgkey.EventKey, orgkey.PublicKey, orgkey.BootSecret)
	if err != nil || len(found) == 0 {
		return orgkey.Sealed{}, false, err
	}
	return found[0], true, nil
}
