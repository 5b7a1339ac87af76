package sqlstore

import (
	"bytes"
	"cmp"
	"context"
	"database/sql"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/node"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

var _ node.Store = (*DB)(nil)

// seenBatch is how many rows a statement of Seen moves forward.
const seenBatch = 1000

// liveKeys are those of the organization $1, liveNodeKeys those of its nodes.
const (
	liveKeys     = "FROM org_keys WHERE org_id = $1 AND " + isLive
	liveNodeKeys = "FROM keys_of_nodes WHERE org_id = $1 AND " + isLive
)

// LiveKeys implements node.Store.
func (d *DB) LiveKeys(ctx context.Context, org org.ID, ip netip.Addr, named string, limit int) ([]node.Signer, error) {
	return query(ctx, d.read, func(scan func(...any) error) (k node.Signer, err error) {
		err = scan(&k.Key, &k.Sealed, &k.OfNode, &k.Unreceived)
		return k, err
	}, candidates, org, limit, ip.String(), named)
}

// candidates are the live keys of organization $1 that may speak for address $3:
// at most $2 organization keys, and of its node keys the one that $4 names, those whose
// node is there, and at most $2 of those whose node is to be there.
const candidates = `SELECT k.id, k.sealed, false, ` + unreceived + ` FROM (
		SELECT id, sealed ` + liveKeys + ` ORDER BY created_at DESC, id LIMIT $2) AS k
	UNION ALL SELECT k.id, k.sealed, true, ` + unreceived + ` FROM keys_of_nodes k WHERE k.org_id = $1 AND ` + isLive + ` AND k.id IN (
		SELECT $4 UNION SELECT b.id FROM nodes n JOIN keys_of_nodes b ON b.node_id = n.id WHERE n.org_id = $1 AND n.ip = $3
		UNION SELECT id FROM (SELECT id ` + liveNodeKeys + ` AND address = $3 ORDER BY created_at DESC, id LIMIT $2) AS a)`

// unreceived is true of a key k that was delivered sealed, and whose receipt
// or first use is awaited.
const unreceived = "EXISTS (SELECT 1 FROM deliveries v WHERE v.key_id = k.id AND v.stage = 'available' AND v.used_at IS NULL)"

// liveAs is liveKeys of the keys that k is one of.
func liveAs(k node.Signer) string {
	if k.OfNode {
		return liveNodeKeys
	}
	return liveKeys
}

// checkLive reports node.ErrKeyGone unless key is a released one of org, and stored as
// it was when it verified.
func checkLive(ctx context.Context, tx *txn, org org.ID, key node.Signer) error {
	live, err := query(ctx, tx, scanInt, "SELECT 1 "+liveAs(key)+" AND id = $2 AND sealed = $3", org, key.Key, key.Sealed)
	if err == nil && len(live) == 0 {
		return node.ErrKeyGone
	}
	return err
}

// use records the use of a signature and reports whether it is the first. A
// key that is not live gets no use recorded, in the same statement. A use that is
// already outside its time window by the database's clock is refused: the replica's own
// clock may be behind. Uses are ordered by what their lines say of the time, so that those of
// one moment share pages; of uses from before that was stored, stamp is 0.
func (d *DB) use(ctx context.Context, tx *txn, u node.Use) (first bool, err error) {
	now, err := d.now(ctx, tx)
	if err != nil {
		return false, err
	}
	if u.Until.UnixMicro() < now {
		return false, node.ErrStale
	}
	n, err := exec(ctx, tx, `INSERT INTO signature_uses (key_id, stamp, message, request, until)
		SELECT id, $3, $4, $5, $6 `+liveAs(u.Signer)+` AND id = $2 AND sealed = $7
		AND NOT EXISTS (SELECT 1 FROM signature_uses WHERE key_id = $2 AND stamp = 0 AND message = $4) ON CONFLICT DO NOTHING`,
		u.Org, u.Key, u.Stamp.UnixMicro(), u.Message[:], u.Request[:], u.Until.UnixMicro(), u.Sealed)
	if err != nil || n == 1 {
		return n == 1, err
	}
	if err := checkLive(ctx, tx, u.Org, u.Signer); err != nil {
		return false, err
	}
	var earlier []byte
	err = tx.QueryRowContext(ctx, "SELECT request FROM signature_uses WHERE key_id = $1 AND stamp IN (0, $2) AND message = $3",
		u.Key, u.Stamp.UnixMicro(), u.Message[:]).Scan(&earlier)
	if err != nil {
		return false, unavailable(err)
	}
	if !bytes.Equal(earlier, u.Request[:]) {
		return false, node.ErrReused
	}
	return false, nil
}

// repeated records that a request was served before.
func (d *DB) repeated(ctx context.Context, tx *txn, org org.ID, ip netip.Addr, event func(string, node.Change) audit.Event) error {
	var id string
	err := tx.QueryRowContext(ctx, "SELECT id FROM nodes WHERE org_id = $1 AND ip = $2", org, ip.String()).Scan(&id)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return unavailable(err)
	}
	return d.record(ctx, tx, event(id, node.Repeated))
}

// Register implements node.Store.
func (d *DB) Register(ctx context.Context, u node.Use, n node.Node, event func(string, node.Change) audit.Event) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		first, err := d.use(ctx, tx, u)
		if err != nil {
			return err
		}
		if !first {
			return d.repeated(ctx, tx, u.Org, n.IP, event)
		}
		own, err := d.makeRoom(ctx, tx, u, n.IP)
		if err != nil {
			return err
		}
		n.ID = cmp.Or(own, n.ID)
		id, change, err := d.upsertNode(ctx, tx, u.Org, n)
		if err != nil {
			return err
		}
		if own != "" && id != own { // an organization key registered another node there meanwhile
			return node.ErrAddressInUse
		}
		if err := d.signedBy(ctx, tx, u.Signer, id); err != nil {
			return err
		}
		if _, err := exec(ctx, tx, "INSERT INTO node_keys (node_id, key_id) VALUES ($1, $2) ON CONFLICT DO NOTHING", id, u.Key); err != nil {
			return err
		}
		return d.record(ctx, tx, event(id, change))
	})
}

func (d *DB) upsertNode(ctx context.Context, tx *txn, org org.ID, n node.Node) (id string, change node.Change, err error) {
	now, err := d.now(ctx, tx)
	if err != nil {
		return "", "", err
	}
	var registered int64
	err = tx.QueryRowContext(ctx, `INSERT INTO nodes (id, org_id, ip, region, version, status, url, provider, services, registered_at, updated_at, seen_at)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $10, $10)
		ON CONFLICT (org_id, ip) DO UPDATE SET
			region = excluded.region, version = excluded.version, status = excluded.status, url = excluded.url,
			provider = excluded.provider, services = excluded.services, updated_at = excluded.updated_at, seen_at = excluded.seen_at,
			registered_at = CASE WHEN nodes.deleted_at IS NULL THEN nodes.registered_at ELSE excluded.registered_at END,
			deleted_at = NULL
		RETURNING id, registered_at`,
		n.ID, org, n.IP.String(), n.Region, n.Version, n.Status, n.URL, n.Provider, n.Services, now).Scan(&id, &registered)
	if err != nil {
		return "", "", unavailable(err)
	}
	if registered == now {
		return id, node.Created, nil
	}
	return id, node.Updated, nil
}

// Unregister implements node.Store.
func (d *DB) Unregister(ctx context.Context, u node.Use, ip netip.Addr, event func(string, node.Change) audit.Event) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		first, err := d.use(ctx, tx, u)
		if err != nil {
			return err
		}
		if !first {
			return d.repeated(ctx, tx, u.Org, ip, event)
		}
		own, err := d.nodeOf(ctx, tx, u.Org, u.Signer, ip)
		if err != nil {
			return err
		}
		if err := d.signedBy(ctx, tx, u.Signer, ""); err != nil {
			return err
		}
		id, err := d.deleteNode(ctx, tx, "org_id = $2 AND ip = $3", u.Org, ip.String())
		if err != nil {
			return err
		}
		if u.OfNode && id != own { // a key without a node may become this one, but not delete it
			return node.ErrNodeNotFound
		}
		return d.record(ctx, tx, event(id, node.Deleted))
	})
}

// deleteNode deletes the one node that where, over $2 and $3, selects.
func (d *DB) deleteNode(ctx context.Context, tx *txn, where string, args ...any) (string, error) {
	now, err := d.now(ctx, tx)
	if err != nil {
		return "", err
	}
	var id string
	err = tx.QueryRowContext(ctx, "UPDATE nodes SET deleted_at = $1 WHERE deleted_at IS NULL AND "+where+" RETURNING id",
		append([]any{now}, args...)...).Scan(&id)
	if errors.Is(err, sql.ErrNoRows) {
		return "", node.ErrNodeNotFound
	}
	if err != nil {
		return "", unavailable(err)
	}
	_, err = exec(ctx, tx, "DELETE FROM node_keys WHERE node_id = $1 AND key_id IN ("+signersOf+")", id)
	return id, err
}

// signersOf are the keys by which node $1 can have signed, by which SQLite finds its node_keys.
const signersOf = `SELECT k.id FROM nodes n JOIN org_keys k ON k.org_id = n.org_id WHERE n.id = $1
	UNION ALL SELECT id FROM keys_of_nodes WHERE node_id = $1`

// SecretsSize implements node.Store.
func (d *DB) SecretsSize(ctx context.Context, org org.ID) (size int64, err error) {
	err = d.read.QueryRowContext(ctx, "SELECT coalesce(sum(length(sealed)), 0) FROM boot_secrets WHERE org_id = $1", org).Scan(&size)
	return size, unavailable(err)
}

// Secrets implements node.Store.
func (d *DB) Secrets(ctx context.Context, org org.ID, by node.Signer, ip netip.Addr, size int64, event func([]string) audit.Event) ([]node.SealedSecret, error) {
	var secrets []node.SealedSecret
	err := d.write(ctx, func(ctx context.Context, tx *txn) error {
		if err := checkLive(ctx, tx, org, by); err != nil {
			return err
		}
		if _, err := d.nodeOf(ctx, tx, org, by, ip); err != nil {
			return err
		}
		if err := d.signedBy(ctx, tx, by, ""); err != nil {
			return err
		}
		left := size
		var err error
		secrets, err = query(ctx, tx, func(scan func(...any) error) (s node.SealedSecret, err error) {
			if err = scan(&s.Name, &s.Sealed); err == nil {
				left -= int64(len(s.Sealed))
			}
			if left < 0 {
				err = node.ErrLarger
			}
			return s, err
		}, "SELECT name, sealed FROM boot_secrets WHERE org_id = $1 ORDER BY name", org)
		if err != nil {
			return err
		}
		names := make([]string, len(secrets))
		for i, s := range secrets {
			names[i] = s.Name
		}
		tx.awaited = true
		return d.record(ctx, tx, event(names))
	})
	if err != nil {
		return nil, err
	}
	return secrets, nil
}

// Nodes implements node.Store.
func (d *DB) Nodes(ctx context.Context, org org.ID) ([]node.Node, error) {
	return query(ctx, d.read, func(scan func(...any) error) (node.Node, error) {
		n := node.Node{Org: org}
		var ip string
		var registered, updated, seen sql.NullInt64
		if err := scan(&n.ID, &ip, &n.Region, &n.Version, &n.Status, &n.URL, &n.Provider, &n.Services, &registered, &updated, &seen); err != nil {
			return n, err
		}
		n.Registered, n.Updated, n.Seen = micros(registered), micros(updated), micros(seen)
		var err error
		n.IP, err = netip.ParseAddr(ip)
		return n, err
	}, `SELECT id, ip, region, version, status, url, provider, services, registered_at, updated_at, `+d.past("seen_at")+`
		FROM nodes WHERE org_id = $1 AND deleted_at IS NULL ORDER BY registered_at DESC, id`, org)
}

// DeleteNode implements node.Store.
func (d *DB) DeleteNode(ctx context.Context, org org.ID, id string, event audit.Event, keyDeleted func(string) audit.Event) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		// A registration with one of its keys comes before all this, or after it and is refused.
		if err := d.lock(ctx, tx, "nodes:"+string(org)); err != nil {
			return err
		}
		_, gone := d.deleteNode(ctx, tx, "org_id = $2 AND id = $3", org, id)
		if gone != nil && !errors.Is(gone, node.ErrNodeNotFound) {
			return gone
		}
		events, err := d.endNodeKeys(ctx, tx, org, id, keyDeleted)
		if err != nil {
			return err
		}
		if gone != nil && len(events) == 0 {
			there, err := query(ctx, tx, scanInt, "SELECT 1 FROM nodes WHERE org_id = $1 AND id = $2", org, id)
			if err != nil {
				return err
			}
			if len(there) > 0 {
				return node.ErrAlreadyDeleted
			}
			return gone
		}
		return d.record(ctx, tx, append(events, event)...)
	})
}

// PutSecret implements node.Store.
func (d *DB) PutSecret(ctx context.Context, org org.ID, s node.SealedSecret, limit int, event audit.Event) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		if err := d.lock(ctx, tx, "secrets:"+string(org)); err != nil {
			return err
		}
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		if _, err := exec(ctx, tx, `INSERT INTO boot_secrets (org_id, name, sealed, created_at, updated_at) VALUES ($1, $2, $3, $4, $4)
			ON CONFLICT (org_id, name) DO UPDATE SET sealed = excluded.sealed, updated_at = excluded.updated_at`, org, s.Name, s.Sealed, now); err != nil {
			return err
		}
		count, err := query(ctx, tx, scanInt, "SELECT count(*) FROM boot_secrets WHERE org_id = $1", org)
		if err != nil {
			return err
		}
		if count[0] > limit {
			return node.ErrTooManySecrets
		}
		return d.record(ctx, tx, event)
	})
}

// SecretNames implements node.Store.
func (d *DB) SecretNames(ctx context.Context, org org.ID) ([]node.Secret, error) {
	return query(ctx, d.read, func(scan func(...any) error) (s node.Secret, err error) {
		var created, updated sql.NullInt64
		err = scan(&s.Name, &created, &updated)
		s.Created, s.Updated = micros(created), micros(updated)
		return s, err
	}, "SELECT name, created_at, updated_at FROM boot_secrets WHERE org_id = $1 ORDER BY name", org)
}

// DeleteSecret implements node.Store.
func (d *DB) DeleteSecret(ctx context.Context, org org.ID, name string, event audit.Event) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		n, err := exec(ctx, tx, "DELETE FROM boot_secrets WHERE org_id = $1 AND name = $2", org, name)
		if err != nil {
			return err
		}
		if n == 0 {
			return node.ErrSecretNotFound
		}
		return d.record(ctx, tx, event)
	})
}

// ForgetUses implements node.Store.
func (d *DB) ForgetUses(ctx context.Context, limit int) (int, error) {
	var n int64
	err := d.write(ctx, func(ctx context.Context, tx *txn) error {
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		n, err = exec(ctx, tx, `DELETE FROM signature_uses WHERE (key_id, stamp, message) IN (
			SELECT key_id, stamp, message FROM signature_uses WHERE until < $1 LIMIT $2`+d.forUpdate(" SKIP LOCKED")+`)`, now, limit)
		return err
	})
	if err != nil {
		return 0, err
	}
	return int(n), nil
}

// Seen implements node.Store. Rows that another
// transaction has locked are skipped: a last use is not worth waiting or a deadlock. A
// time in the future was written by a clock that was set back since, and is replaced.
func (d *DB) Seen(ctx context.Context, keys map[string]time.Duration, nodes map[node.Contact]time.Duration) error {
	ids := slices.Collect(maps.Keys(keys))
	for batch := range slices.Chunk(ids, seenBatch) {
		err := d.writeAt(ctx, func(ctx context.Context, tx *txn, now int64) error { return d.used(ctx, tx, now, batch, keys) })
		if err != nil {
			return err
		}
	}
	contacts := slices.Collect(maps.Keys(nodes))
	for batch := range slices.Chunk(contacts, seenBatch) {
		err := d.writeAt(ctx, func(ctx context.Context, tx *txn, now int64) error {
			return d.storeContacts(ctx, tx, now, batch, nodes)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// writeAt is write, with the database's clock.
func (d *DB) writeAt(ctx context.Context, do func(ctx context.Context, tx *txn, now int64) error) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		return do(ctx, tx, now)
	})
}

func (d *DB) used(ctx context.Context, tx *txn, now int64, ids []string, ago map[string]time.Duration) error {
	rows := make([][]any, len(ids))
	for i, id := range ids {
		rows[i] = []any{id, now - ago[id].Microseconds()}
	}
	list, err := json.Marshal(rows)
	if err != nil {
		return err
	}
	with := "WITH v(id, at) AS MATERIALIZED (SELECT value ->> 0, CAST(value ->> 1 AS BIGINT) FROM " + d.elements("$1") + ")"
	for _, table := range []string{"org_keys", "keys_of_nodes"} {
		if _, err := exec(ctx, tx, with+` UPDATE `+table+` SET last_used_at = v.at FROM v
			WHERE `+table+`.id = v.id AND (coalesce(last_used_at, 0) < v.at OR last_used_at > $2)
			AND `+table+`.id IN (SELECT id FROM `+table+` WHERE id IN (SELECT id FROM v)`+d.forUpdate(" SKIP LOCKED")+")", string(list), now); err != nil {
			return err
		}
	}
	return nil
}

// storeContacts leaves a node that it leaves out unassociated, too: it may be about to be
// deleted.
func (d *DB) storeContacts(ctx context.Context, tx *txn, now int64, contacts []node.Contact, ago map[node.Contact]time.Duration) error {
	rows := make([][]any, len(contacts))
	for i, c := range contacts {
		rows[i] = []any{c.Org, c.IP.String(), c.Key, now - ago[c].Microseconds()}
	}
	list, err := json.Marshal(rows)
	if err != nil {
		return err
	}
	with := "WITH v(org_id, ip, key_id, at) AS MATERIALIZED (SELECT value ->> 0, value ->> 1, value ->> 2, CAST(value ->> 3 AS BIGINT) FROM " + d.elements("$1") + ") "
	// A node key that fetched secrets under the address of another node, as it may before it registers, is no contact of that node.
	if _, err := exec(ctx, tx, with+`UPDATE nodes SET seen_at = last.at FROM (
			SELECT v.org_id, v.ip, max(v.at) AS at FROM v LEFT JOIN keys_of_nodes k ON k.id = v.key_id LEFT JOIN nodes own ON own.id = k.node_id
			WHERE k.id IS NULL OR own.org_id = v.org_id AND own.ip = v.ip GROUP BY v.org_id, v.ip) AS last
		WHERE nodes.org_id = last.org_id AND nodes.ip = last.ip AND (seen_at < last.at OR seen_at > $2)
		AND nodes.id IN (SELECT id FROM nodes WHERE (org_id, ip) IN (SELECT org_id, ip FROM v)`+d.forUpdate(" SKIP LOCKED")+")", string(list), now); err != nil {
		return err
	}
	_, err = exec(ctx, tx, with+`INSERT INTO node_keys (node_id, key_id) SELECT n.id, k.id FROM v
		JOIN nodes n ON n.org_id = v.org_id AND n.ip = v.ip AND n.deleted_at IS NULL AND n.seen_at >= v.at
		JOIN org_keys k ON k.id = v.key_id AND k.org_id = v.org_id AND `+isLive+`
		WHERE true ON CONFLICT DO NOTHING`, string(list))
	return err
}

// dissociate removes the associations of a key that ends. One
// that a concurrent registration adds stays and has no effect: every reader joins with
// released keys.
func dissociate(ctx context.Context, tx *txn, key string) error {
	_, err := exec(ctx, tx, "DELETE FROM node_keys WHERE key_id = $1", key)
	return err
}

// nodeKeys gives each record the nodes that are associated with its key: those
// that signed with it, and, unconfirmed, those that were registered
// already when it was released.
func (d *DB) nodeKeys(ctx context.Context, org org.ID, records []orgkey.Record) error {
	return associate(ctx, d.read, records, `SELECT k.id, n.ip, c.key_id IS NOT NULL FROM org_keys k
		JOIN nodes n ON n.org_id = k.org_id AND n.deleted_at IS NULL
		LEFT JOIN node_keys c ON c.node_id = n.id AND c.key_id = k.id
		WHERE k.org_id = $1 AND `+isLive+`
		AND (c.key_id IS NOT NULL OR n.registered_at <= k.released_at)
		ORDER BY n.registered_at DESC, n.id`, org)
}

// associate gives each record the nodes that a statement returns for its key.
func associate(ctx context.Context, q querier, records []orgkey.Record, statement string, org org.ID) error {
	byID := make(map[string]*orgkey.Record, len(records))
	for i := range records {
		byID[records[i].ID] = &records[i]
	}
	return each(ctx, q, func(scan func(...any) error) error {
		var k orgkey.NodeKey
		if err := scan(&k.KeyID, &k.NodeID, &k.Confirmed); err != nil {
			return err
		}
		if r := byID[k.KeyID]; r != nil {
			r.Nodes = append(r.Nodes, k)
		}
		return nil
	}, statement, org)
}
