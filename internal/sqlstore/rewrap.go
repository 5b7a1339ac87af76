package sqlstore

import (
	"context"
	"fmt"
	"strings"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// CountSealed is how many values of a purpose are stored sealed.
func (d *DB) CountSealed(ctx context.Context, purpose string) (int, error) {
	statement := "SELECT (SELECT count(*) FROM org_keys WHERE sealed IS NOT NULL) + (SELECT count(*) FROM keys_of_nodes WHERE sealed IS NOT NULL)"
	switch purpose {
	case orgkey.BootSecret:
		statement = "SELECT count(*) FROM boot_secrets"
	case orgkey.EventKey:
		statement = "SELECT count(*) FROM event_keys"
	case orgkey.EnrollmentToken:
		statement = "SELECT count(*) FROM enrollments"
	case orgkey.ChallengeSecret:
		statement = "SELECT count(*) FROM enrollments WHERE challenge IS NOT NULL"
	case orgkey.WrappedKey:
		statement = "SELECT count(*) FROM deliveries WHERE length(wrapped) > 0"
	}
	found, err := query(ctx, d.read, scanInt, statement)
	if err != nil {
		return 0, fmt.Errorf("counting sealed records: %w", err)
	}
	return found[0], nil
}

// SealedAfter returns, in a lasting order, at most limit sealed values of
// after's purpose that come after it. A binding with nothing but a purpose
// comes before all of them.
func (d *DB) SealedAfter(ctx context.Context, after orgkey.Binding, limit int) ([]orgkey.Sealed, error) {
	statement, args := publicKeysAfter, []any{after.ID, limit}
	switch after.Purpose {
	case orgkey.BootSecret:
		statement = "SELECT org_id, name, sealed FROM boot_secrets WHERE (org_id, name) > ($1, $2) ORDER BY org_id, name LIMIT $3"
		args = []any{after.Org, after.ID, limit}
	case orgkey.EventKey:
		statement, args = "SELECT origin, '', sealed FROM event_keys WHERE origin > $1 ORDER BY origin LIMIT $2", []any{after.Org, limit}
	case orgkey.EnrollmentToken:
		statement = "SELECT org_id, id, secret FROM enrollments WHERE id > $1 ORDER BY id LIMIT $2"
	case orgkey.ChallengeSecret:
		statement = "SELECT org_id, id, challenge FROM enrollments WHERE challenge IS NOT NULL AND id > $1 ORDER BY id LIMIT $2"
	case orgkey.WrappedKey:
		statement = wrappedKeysAfter
		args[0], _, _ = strings.Cut(after.ID, "/")
	}
	found, err := query(ctx, d.read, func(scan func(...any) error) (s orgkey.Sealed, err error) {
		s.Binding.Purpose = after.Purpose
		err = scan(&s.Binding.Org, &s.Binding.ID, &s.Ciphertext)
		return s, err
	}, statement, args...)
	if err != nil {
		return nil, fmt.Errorf("reading sealed records: %w", err)
	}
	return found, nil
}

// wrappedKeysAfter goes by the primary key; a binding's ID has the recipient behind it.
const wrappedKeysAfter = "SELECT org_id, key_id || '/' || recipient, wrapped FROM deliveries WHERE length(wrapped) > 0 AND key_id > $1 ORDER BY key_id LIMIT $2"

// publicKeysAfter reads both kinds of keys, whose IDs are all different.
const publicKeysAfter = `SELECT org_id, id, sealed FROM (
		SELECT * FROM (SELECT org_id, id, sealed FROM org_keys WHERE sealed IS NOT NULL AND id > $1 ORDER BY id LIMIT $2) AS o
		UNION ALL SELECT * FROM (SELECT org_id, id, sealed FROM keys_of_nodes WHERE sealed IS NOT NULL AND id > $1 ORDER BY id LIMIT $2) AS n
	) AS k ORDER BY id LIMIT $2`

// Reseal replaces old[i] by fresh[i] and returns how many it replaced. A record that was
// deleted or resealed in the meantime is skipped.
func (d *DB) Reseal(ctx context.Context, old []orgkey.Sealed, fresh [][]byte) (n int, err error) {
	err = d.write(ctx, func(ctx context.Context, tx *txn) error {
		n = 0
		for i, s := range old {
			args := []any{s.Binding.Org, s.Binding.ID, s.Ciphertext, fresh[i]}
			if s.Binding.Purpose == orgkey.WrappedKey {
				key, _, _ := strings.Cut(s.Binding.ID, "/")
				args = append(args, key)
			}
			for _, statement := range resealStatements(s.Binding.Purpose) {
				touched, err := exec(ctx, tx, statement, args...)
				if err != nil {
					return err
				}
				n += int(touched)
			}
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("storing sealed records: %w", err)
	}
	return n, nil
}

func resealStatements(purpose string) []string {
	switch purpose {
	case orgkey.BootSecret:
		return []string{"UPDATE boot_secrets SET sealed = $4 WHERE org_id = $1 AND name = $2 AND sealed = $3"}
	case orgkey.EventKey:
		return []string{"UPDATE event_keys SET sealed = $4 WHERE origin = $1 AND $2 = '' AND sealed = $3"}
	case orgkey.EnrollmentToken:
		return []string{"UPDATE enrollments SET secret = $4 WHERE org_id = $1 AND id = $2 AND secret = $3"}
	case orgkey.ChallengeSecret:
		return []string{"UPDATE enrollments SET challenge = $4 WHERE org_id = $1 AND id = $2 AND challenge = $3"}
	case orgkey.WrappedKey:
		return []string{"UPDATE deliveries SET wrapped = $4 WHERE key_id = $5 AND org_id = $1 AND key_id || '/' || recipient = $2 AND wrapped = $3"}
	}
	return []string{
		"UPDATE org_keys SET sealed = $4 WHERE org_id = $1 AND id = $2 AND sealed = $3",
		"UPDATE keys_of_nodes SET sealed = $4 WHERE org_id = $1 AND id = $2 AND sealed = $3",
	}
}
