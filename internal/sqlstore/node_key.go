package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"net/netip"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/node"
	"github.com/orgkeys/orgkeys/internal/org"
)

// nodeOf returns the ID of the node that a node key belongs to, which is empty
// until it registered, and then stays, even if the node is forgotten. It reports
// node.ErrAddressInUse or ErrAddressNotAllowed unless the key may speak for ip, and
// ErrKeyGone if it ended meanwhile. An organization key may speak for any.
func (d *DB) nodeOf(ctx context.Context, tx *txn, org org.ID, k node.Signer, ip netip.Addr) (string, error) {
	if !k.OfNode {
		return "", nil
	}
	// Registrations with node keys come one at a time, so that no two take one address.
	if err := d.lock(ctx, tx, "nodes:"+string(org)); err != nil {
		return "", err
	}
	var own, allowed string
	err := tx.QueryRowContext(ctx, "SELECT coalesce(node_id, ''), coalesce(address, '') FROM keys_of_nodes WHERE id = $1 AND "+isLive, k.Key).Scan(&own, &allowed)
	if errors.Is(err, sql.ErrNoRows) {
		return "", node.ErrKeyGone
	}
	if err != nil {
		return "", unavailable(err)
	}
	if allowed != "" && allowed != ip.String() {
		return "", node.ErrAddressNotAllowed
	}
	var there string
	var keyed bool
	err = tx.QueryRowContext(ctx, `SELECT n.id, EXISTS (SELECT 1 FROM keys_of_nodes k WHERE k.node_id = n.id AND k.id <> $3 AND `+isLive+`)
		FROM nodes n WHERE n.org_id = $1 AND n.ip = $2 AND n.deleted_at IS NULL`, org, ip.String(), k.Key).Scan(&there, &keyed)
	if errors.Is(err, sql.ErrNoRows) || err == nil && there == own {
		return own, nil
	}
	if err != nil {
		return "", unavailable(err)
	}
	// A node without a key of its own may be given one; but a key that has its
	// node cannot take another's place.
	if keyed || own != "" {
		return "", node.ErrAddressInUse
	}
	return "", nil
}

// makeRoom lets the node of a node key be at ip: it moves there, and a deleted
// node that was there is forgotten, so that two nodes are never one. The keys of
// that one keep its ID, by which they register and are deleted. It returns the ID
// of the key's node, as nodeOf does.
func (d *DB) makeRoom(ctx context.Context, tx *txn, u node.Use, ip netip.Addr) (own string, err error) {
	own, err = d.nodeOf(ctx, tx, u.Org, u.Signer, ip)
	if err != nil || !u.OfNode {
		return own, err
	}
	const former = "SELECT id FROM nodes WHERE org_id = $1 AND ip = $2 AND deleted_at IS NOT NULL AND id <> $3"
	for _, statement := range []string{
		"DELETE FROM node_keys WHERE node_id IN (" + former + ") AND key_id IN (SELECT id FROM org_keys WHERE org_id = $1" +
			" UNION ALL SELECT id FROM keys_of_nodes WHERE node_id IN (" + former + "))", // as signersOf
		"DELETE FROM nodes WHERE id IN (" + former + ")",
	} {
		if _, err := exec(ctx, tx, statement, u.Org, ip.String(), own); err != nil {
			return "", err
		}
	}
	_, err = exec(ctx, tx, "UPDATE nodes SET ip = $2 WHERE id = $3 AND org_id = $1 AND ip <> $2", u.Org, ip.String(), own)
	return own, err
}

// signedBy notes that a key signed: its node, if it is a node key that registered as
// one, and that it arrived, if nobody has signed a receipt for it.
func (d *DB) signedBy(ctx context.Context, tx *txn, k node.Signer, id string) error {
	if k.OfNode && id != "" {
		if _, err := exec(ctx, tx, "UPDATE keys_of_nodes SET node_id = $2, address = NULL WHERE id = $1 AND (node_id IS NULL OR node_id <> $2)", k.Key, id); err != nil {
			return err
		}
	}
	if !k.Unreceived {
		return nil
	}
	now, err := d.now(ctx, tx)
	if err != nil {
		return err
	}
	// One that an accepted rollback has left without a deadline is the sweeper's from now on.
	_, err = exec(ctx, tx, "UPDATE deliveries SET used_at = $2, until = CASE WHEN stage = 'available' THEN coalesce(until, $2) ELSE until END WHERE key_id = $1 AND used_at IS NULL", k.Key, now)
	return err
}

// endNodeKeys ends the node keys of org's node id, and returns their events.
func (d *DB) endNodeKeys(ctx context.Context, tx *txn, org org.ID, id string, deleted func(string) audit.Event) ([]audit.Event, error) {
	now, err := d.now(ctx, tx)
	if err != nil {
		return nil, err
	}
	keys, err := query(ctx, tx, scanText, "SELECT id FROM keys_of_nodes WHERE org_id = $1 AND node_id = $2 AND "+isLive+" ORDER BY id"+d.forUpdate(""), org, id)
	if err != nil {
		return nil, err
	}
	if _, err := d.endKeys(ctx, tx, "keys_of_nodes", isLive, keys, now); err != nil {
		return nil, err
	}
	if err := execAll(ctx, tx, "UPDATE deliveries SET stage = 'ended', wrapped = NULL WHERE stage NOT IN ('received', 'ended') AND key_id IN "+d.texts("$1"), keys); err != nil {
		return nil, err
	}
	events := make([]audit.Event, len(keys))
	for i, key := range keys {
		events[i] = deleted(key)
	}
	return events, nil
}
