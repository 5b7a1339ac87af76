package sqlstore

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/enroll"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

var _ enroll.Store = (*DB)(nil)

// keyTable is where keys of a scope are. Its names are this package's own.
func keyTable(s enroll.Scope) string {
	if s == enroll.ForNode {
		return "keys_of_nodes"
	}
	return "org_keys"
}

// CreateEnrollment implements enroll.Store.
func (d *DB) CreateEnrollment(ctx context.Context, e enroll.Permission, life time.Duration, keys []string, limit int, event audit.Event) (enroll.Enrollment, error) {
	e.Origin = cmp.Or(e.Origin, enroll.FromBackend)
	made := e.Enrollment
	err := d.write(ctx, func(ctx context.Context, tx *txn) error {
		if err := d.lock(ctx, tx, "org:"+string(e.Org)); err != nil {
			return err
		}
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		expires := now + life.Microseconds()
		if err := d.takePlaces(ctx, tx, e.Enrollment, keys, limit, now, expires); err != nil {
			return err
		}
		made.Created, made.Expires = time.UnixMicro(now).UTC(), time.UnixMicro(expires).UTC()
		address := ""
		if e.Address.IsValid() {
			address = e.Address.String()
		}
		approval := 0
		if e.Approval {
			approval = 1
		}
		recipient := e.Recipient
		if e.Origin != enroll.FromBackend || e.TPM != "" {
			recipient = nobody
		}
		if _, err := exec(ctx, tx, `INSERT INTO enrollments (id, org_id, scope, uses, recipient, approval, address, note, secret, created_at, expires_at, origin, bind_tpm, bind_recipient, challenge)
			VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)`,
			e.ID, string(e.Org), string(e.Scope), e.Uses, recipient, approval, address, e.Note, e.K, now, expires, string(e.Origin), e.TPM, e.Recipient, e.Challenge); err != nil {
			return err
		}
		return d.record(ctx, tx, event)
	})
	return made, err
}

// takePlaces reserves a place in the quota for each key, and a delivery with it.
func (d *DB) takePlaces(ctx context.Context, tx *txn, e enroll.Enrollment, keys []string, limit int, now, expires int64) error {
	if err := d.sweepPlaces(ctx, tx, e.Org, e.Scope, now); err != nil {
		return err
	}
	slots, err := freeSlots(ctx, tx, keyTable(e.Scope), e.Org, len(keys), limit)
	if err != nil {
		return err
	}
	places := make([][]any, len(keys))
	for i, key := range keys {
		places[i] = []any{key, slots[i]}
	}
	rows, err := json.Marshal(places)
	if err != nil {
		return err
	}
	from := " FROM " + d.elements("$1")
	if _, err := exec(ctx, tx, "INSERT INTO "+keyTable(e.Scope)+" (id, org_id, slot, state, expires_at) SELECT value ->> 0, $2, CAST(value ->> 1 AS BIGINT), 'reserved', $3"+from,
		string(rows), string(e.Org), expires); err != nil {
		return err
	}
	if e.Address.IsValid() {
		if _, err := exec(ctx, tx, "UPDATE keys_of_nodes SET address = $2 WHERE id IN "+d.texts("$1"), string(rows), e.Address.String()); err != nil {
			return err
		}
	}
	_, err = exec(ctx, tx, "INSERT INTO deliveries (key_id, org_id, enrollment_id, scope, stage, origin) SELECT value ->> 0, $2, $3, $4, 'open', $5"+from,
		string(rows), string(e.Org), e.ID, string(e.Scope), string(e.Origin))
	return err
}

// freeSlots returns the n lowest free slots of org, or *orgkey.QuotaError.
func freeSlots(ctx context.Context, tx *txn, table string, org org.ID, n, limit int) ([]int, error) {
	taken, err := query(ctx, tx, scanInt, "SELECT slot FROM "+table+" WHERE org_id = $1 AND slot IS NOT NULL ORDER BY slot", org)
	if err != nil {
		return nil, err
	}
	if len(taken)+n > limit {
		return nil, &orgkey.QuotaError{Limit: limit, NodeKeys: table == keyTable(enroll.ForNode)}
	}
	free := make([]int, 0, n)
	for slot := 1; len(free) < n; slot++ {
		if len(taken) > 0 && taken[0] == slot {
			taken = taken[1:]
			continue
		}
		free = append(free, slot)
	}
	return free, nil
}

// sweepPlaces gives back the places of org in the scope's quota that have expired.
func (d *DB) sweepPlaces(ctx context.Context, tx *txn, org org.ID, scope enroll.Scope, now int64) error {
	if scope == enroll.ForOrganization {
		return d.sweepOrg(ctx, tx, org, now)
	}
	_, err := exec(ctx, tx, "DELETE FROM keys_of_nodes WHERE org_id = $1 AND state = "+reserved+" AND expires_at <= $2", org, now)
	return err
}

// nobody is what the column recipient has, which no recipient can be, where a
// program that knows neither origin nor TPMs would believe whoever has the token.
// bind_recipient says which recipient it really is.
const nobody = "another version"

const enrollmentColumns = "id, org_id, scope, origin, bind_tpm, uses, CASE WHEN recipient = '" + nobody + "' THEN bind_recipient ELSE recipient END, approval, address, note, created_at, expires_at, revoked_at, conflicts"

func scanEnrollment(scan func(...any) error, more ...any) (e enroll.Enrollment, err error) {
	var created, expires, revoked sql.NullInt64
	var approval int
	var address string
	err = scan(append([]any{&e.ID, &e.Org, &e.Scope, &e.Origin, &e.TPM, &e.Uses, &e.Recipient, &approval, &address, &e.Note, &created, &expires, &revoked, &e.Conflicts}, more...)...)
	if err != nil {
		return e, err
	}
	e.Approval = approval == 1
	e.Created, e.Expires, e.Revoked = micros(created), micros(expires), micros(revoked)
	if address != "" {
		e.Address, err = netip.ParseAddr(address)
	}
	return e, err
}

// Enrollments implements enroll.Store.
func (d *DB) Enrollments(ctx context.Context, org org.ID, limit int) ([]enroll.Enrollment, error) {
	return d.enrollments(ctx, "org_id = $1 ORDER BY created_at DESC, id LIMIT $2", org, limit)
}

// Enrollment implements enroll.Store.
func (d *DB) Enrollment(ctx context.Context, org org.ID, id string) (enroll.Enrollment, error) {
	found, err := d.enrollments(ctx, "org_id = $1 AND id = $2", org, id)
	if err == nil && len(found) == 0 {
		err = enroll.ErrNotFound
	}
	if err != nil {
		return enroll.Enrollment{}, err
	}
	return found[0], nil
}

func (d *DB) enrollments(ctx context.Context, where string, args ...any) ([]enroll.Enrollment, error) {
	found, err := query(ctx, d.read, func(scan func(...any) error) (e enroll.Enrollment, err error) {
		var over int
		e, err = scanEnrollment(scan, &over)
		e.Over = over == 1
		return e, err
	}, "SELECT "+enrollmentColumns+", CASE WHEN expires_at <= "+d.present()+" THEN 1 ELSE 0 END FROM enrollments WHERE "+where, args...)
	if err != nil || len(found) == 0 {
		return nil, err
	}
	places := make(map[string]*enroll.Enrollment, len(found))
	for i := range found {
		places[found[i].ID] = &found[i]
	}
	claimed := " WHERE d.recipient IS NOT NULL AND d.enrollment_id IN (SELECT id FROM enrollments WHERE " + where + ")"
	err = each(ctx, d.read, func(scan func(...any) error) error {
		var id string
		var all, waiting, unreceived int
		err := scan(&id, &all, &waiting, &unreceived)
		if e := places[id]; e != nil {
			e.Claimed, e.Waiting, e.Unreceived = all, waiting, unreceived
		}
		return err
	}, `SELECT id, count(*), sum(CASE WHEN stage IN ('claimed', 'stored', 'sealed') THEN 1 ELSE 0 END), sum(CASE WHEN stage = 'available' THEN 1 ELSE 0 END)
		FROM (SELECT d.enrollment_id AS id, `+deliveryStage+" AS stage"+deliveryTables+claimed+") AS c GROUP BY id", args...)
	if err != nil {
		return nil, err
	}
	// Neither keys nor recipients, which nobody is shown.
	columns := strings.NewReplacer("d.recipient_key", "NULL", "d.wrapped", "NULL", "coalesce(k.sealed, n.sealed)", "NULL").Replace(deliveryColumns)
	claims, err := query(ctx, d.read, scanDelivery, columns+claimed+" ORDER BY d.claimed_at DESC, d.key_id DESC LIMIT "+strconv.Itoa(enroll.MaxUses), args...)
	if err != nil {
		return nil, err
	}
	slices.Reverse(claims)
	for _, c := range claims {
		if e := places[c.Enrollment]; e != nil {
			e.Claims = append(e.Claims, c)
		}
	}
	if !slices.ContainsFunc(found, func(e enroll.Enrollment) bool { return e.Conflicts > 0 }) {
		return found, nil
	}
	refused, err := query(ctx, d.read, func(scan func(...any) error) (c [2]string, err error) {
		err = scan(&c[0], &c[1])
		return c, err
	},
		"SELECT enrollment_id, recipient FROM enrollment_conflicts WHERE enrollment_id IN (SELECT id FROM enrollments WHERE "+where+") ORDER BY recipient", args...)
	if err != nil {
		return nil, err
	}
	for _, c := range refused {
		if e := places[c[0]]; e != nil {
			e.Refused = append(e.Refused, c[1])
		}
	}
	return found, nil
}

// Permission implements enroll.Store.
func (d *DB) Permission(ctx context.Context, id string) (enroll.Permission, error) {
	found, err := query(ctx, d.read, func(scan func(...any) error) (p enroll.Permission, err error) {
		p.Enrollment, err = scanEnrollment(scan, &p.K, &p.Challenge)
		return p, err
	}, "SELECT "+enrollmentColumns+", secret, challenge FROM enrollments WHERE id = $1", id)
	if err == nil && len(found) == 0 {
		err = enroll.ErrNotFound
	}
	if err != nil {
		return enroll.Permission{}, err
	}
	return found[0], nil
}

// deliveryColumns reads deliveries with the state of their keys: one whose key
// was deleted is over, whatever its row says.
const deliveryColumns = `SELECT d.key_id, d.org_id, d.enrollment_id, d.scope, ` + deliveryStage + `,
	coalesce(d.recipient, ''), d.recipient_key, d.claimed_from, d.claimed_at, d.approved_at IS NOT NULL, d.attempt,
	d.origin, d.ek, d.evidence, d.alg, d.wrapped, d.digest, coalesce(k.sealed, n.sealed), d.fingerprint, d.event_id, d.until, d.answers, d.received_at` + deliveryTables

const (
	deliveryStage  = `CASE WHEN d.stage <> 'ended' AND coalesce(k.state, n.state, 'deleted') = 'deleted' THEN 'ended' ELSE d.stage END`
	deliveryTables = `
	FROM deliveries d
	LEFT JOIN org_keys k ON k.id = d.key_id AND d.scope = 'organization'
	LEFT JOIN keys_of_nodes n ON n.id = d.key_id AND d.scope = 'node'`
)

func scanDelivery(scan func(...any) error) (v enroll.Delivery, err error) {
	var claimed, until, received sql.NullInt64
	err = scan(&v.KeyID, &v.Org, &v.Enrollment, &v.Scope, &v.Stage, &v.Recipient, &v.DER, &v.From, &claimed, &v.Approved, &v.Attempt,
		&v.Origin, &v.Device.EK, &v.Device.Evidence, &v.Wrapped.Alg, &v.Wrapped.Value, &v.Wrapped.SHA256, &v.Public, &v.Fingerprint, &v.Event, &until, &v.Answers, &received)
	v.ClaimedAt, v.Until, v.ReceivedAt = micros(claimed), micros(until), micros(received)
	return v, err
}

func delivery(ctx context.Context, q querier, where string, args ...any) (enroll.Delivery, error) {
	found, err := query(ctx, q, scanDelivery, deliveryColumns+" WHERE "+where, args...)
	if err == nil && len(found) == 0 {
		err = enroll.ErrNotFound
	}
	if err != nil {
		return enroll.Delivery{}, err
	}
	return found[0], nil
}

// Delivery implements enroll.Store.
func (d *DB) Delivery(ctx context.Context, keyID string) (enroll.Delivery, error) {
	return delivery(ctx, d.read, "d.key_id = $1", keyID)
}

// DeliveryTo implements enroll.Store.
func (d *DB) DeliveryTo(ctx context.Context, id, recipient string) (enroll.Delivery, error) {
	return delivery(ctx, d.read, "d.enrollment_id = $1 AND d.recipient = $2", id, recipient)
}

// Claim implements enroll.Store. Claims of one enrollment come one at a time.
func (d *DB) Claim(ctx context.Context, id string, r enroll.Recipient, from string, deliverFor time.Duration, claimed func(string) audit.Event, conflict audit.Event) (enroll.Delivery, error) {
	var v enroll.Delivery
	refused := false
	err := d.write(ctx, func(ctx context.Context, tx *txn) error {
		refused = false
		if err := d.lock(ctx, tx, "enrollment:"+id); err != nil {
			return err
		}
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		e, err := enrollment(ctx, tx, id)
		if err != nil {
			return err
		}
		v, err = delivery(ctx, tx, "d.enrollment_id = $1 AND d.recipient = $2", id, r.ID)
		switch {
		case err == nil && (v.Stage == enroll.Received && v.Origin == enroll.FromBackend || v.Stage == enroll.Ended):
			return enroll.ErrClosed
		case err == nil:
			return nil
		case !errors.Is(err, enroll.ErrNotFound):
			return err
		case !e.Revoked.IsZero() || e.Expires.UnixMicro() <= now:
			return enroll.ErrClosed
		}
		key, err := openPlace(ctx, tx, e, now)
		if err != nil {
			return err
		}
		again, err := secondKey(ctx, tx, id, r.Device)
		if err != nil {
			return err
		}
		if key == "" || again || e.Recipient != "" && e.Recipient != r.ID {
			refused = true
			return d.conflict(ctx, tx, id, r.ID, conflict)
		}
		if err := d.checkUnused(ctx, tx, r); err != nil {
			return err
		}
		if err := claim(ctx, tx, e, key, r, from, now, deliverFor); err != nil {
			return err
		}
		if v, err = delivery(ctx, tx, "d.key_id = $1", key); err != nil {
			return err
		}
		tx.unhurried = true // the key's own events follow: one batch for the sinks in place of two
		return d.record(ctx, tx, claimed(key))
	})
	if err == nil && refused {
		err = enroll.ErrClaimed
	}
	return v, err
}

func enrollment(ctx context.Context, tx *txn, id string) (enroll.Enrollment, error) {
	found, err := query(ctx, tx, func(scan func(...any) error) (enroll.Enrollment, error) { return scanEnrollment(scan) },
		"SELECT "+enrollmentColumns+" FROM enrollments WHERE id = $1", id)
	if err == nil && len(found) == 0 {
		err = enroll.ErrNotFound
	}
	if err != nil {
		return enroll.Enrollment{}, err
	}
	return found[0], nil
}

// openPlace returns the key of an unclaimed use, or nothing.
func openPlace(ctx context.Context, tx *txn, e enroll.Enrollment, now int64) (string, error) {
	found, err := query(ctx, tx, scanText, "SELECT d.key_id FROM deliveries d JOIN "+keyTable(e.Scope)+` k ON k.id = d.key_id
		WHERE d.enrollment_id = $1 AND d.stage = 'open' AND k.state = `+reserved+` AND k.expires_at > $2 ORDER BY k.slot LIMIT 1`, e.ID, now)
	if err != nil || len(found) == 0 {
		return "", err
	}
	return found[0], nil
}

// claim gives key's delivery to the recipient. One that needs no approval keeps
// its place from now on until it could have been received.
func claim(ctx context.Context, tx *txn, e enroll.Enrollment, key string, r enroll.Recipient, from string, now int64, deliverFor time.Duration) error {
	until, approved := e.Expires.UnixMicro(), sql.NullInt64{}
	if !e.Approval {
		until, approved = now+deliverFor.Microseconds(), sql.NullInt64{Int64: now, Valid: true}
	}
	if err := one(exec(ctx, tx, `UPDATE deliveries SET stage = 'claimed', recipient = $2, recipient_key = $3, claimed_from = $4, claimed_at = $5, approved_at = $6, until = $7, ek = $8, evidence = $9
		WHERE key_id = $1 AND stage = 'open'`, key, r.ID, r.DER, from, now, approved, until, r.Device.EK, string(r.Device.Evidence))); err != nil {
		return err
	}
	return one(exec(ctx, tx, "UPDATE "+keyTable(e.Scope)+" SET expires_at = $2 WHERE id = $1 AND state = "+reserved, key, until))
}

// secondKey reports whether a TPM has a use of the enrollment already: a token
// for several machines gives one of them no more than one key.
func secondKey(ctx context.Context, tx *txn, id string, device enroll.Device) (bool, error) {
	if device.EK == "" {
		return false, nil
	}
	found, err := query(ctx, tx, scanInt, "SELECT count(*) FROM deliveries WHERE enrollment_id = $1 AND ek = $2", id, device.EK)
	return err == nil && found[0] > 0, err
}

// checkUnused reports enroll.ErrInUse if a key that its holder made is a live one
// already, or on its way to be one: deleting a key would not end it, and one line
// that it signed would speak for two organizations.
func (d *DB) checkUnused(ctx context.Context, tx *txn, r enroll.Recipient) error {
	if r.Origin != enroll.FromNode {
		return nil
	}
	if err := d.lock(ctx, tx, "key:"+r.ID); err != nil {
		return err
	}
	all, err := query(ctx, tx, scanDelivery, deliveryColumns+" WHERE d.recipient = $1 AND d.origin = 'node' OR d.fingerprint = $2 AND d.fingerprint <> ''",
		r.ID, orgkey.NewPublic(r.Public).Fingerprint())
	if err != nil {
		return err
	}
	for _, v := range all {
		if v.Stage != enroll.Ended {
			return enroll.ErrInUse
		}
	}
	return nil
}

// Conflict implements enroll.Store.
func (d *DB) Conflict(ctx context.Context, id, recipient string, event audit.Event) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		if err := d.lock(ctx, tx, "enrollment:"+id); err != nil {
			return err
		}
		return d.conflict(ctx, tx, id, recipient, event)
	})
}

// conflict counts a recipient that wanted what another has. The first ones leave
// an event, once each.
func (d *DB) conflict(ctx context.Context, tx *txn, id, recipient string, event audit.Event) error {
	if _, err := exec(ctx, tx, "UPDATE enrollments SET conflicts = conflicts + 1 WHERE id = $1", id); err != nil {
		return err
	}
	n, err := exec(ctx, tx, `INSERT INTO enrollment_conflicts (enrollment_id, recipient) SELECT $1, $2
		WHERE (SELECT count(*) FROM enrollment_conflicts WHERE enrollment_id = $1) < $3 ON CONFLICT DO NOTHING`, id, recipient, enroll.MaxConflicts)
	if err != nil || n == 0 {
		return err
	}
	return d.record(ctx, tx, event)
}

// ClaimOwn implements enroll.Store.
func (d *DB) ClaimOwn(ctx context.Context, org org.ID, keyID string, r enroll.Recipient, limit int, deliverFor time.Duration) (enroll.Delivery, error) {
	var v enroll.Delivery
	err := d.write(ctx, func(ctx context.Context, tx *txn) error {
		if err := d.lock(ctx, tx, "org:"+string(org)); err != nil {
			return err
		}
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		if v, err = ownKey(ctx, tx, org, r); err == nil {
			return nil
		}
		if !errors.Is(err, enroll.ErrNotFound) {
			return err
		}
		v, err = delivery(ctx, tx, "d.org_id = $1 AND d.recipient = $2 AND d.enrollment_id = '' AND d.stage NOT IN ('received', 'ended')", org, r.ID)
		if err == nil && v.Stage != enroll.Ended {
			return nil
		}
		if err == nil { // its key was deleted
			_, err = exec(ctx, tx, endDelivery, v.KeyID)
		}
		if err != nil && !errors.Is(err, enroll.ErrNotFound) {
			return err
		}
		if err := d.checkUnused(ctx, tx, r); err != nil {
			return err
		}
		if err := d.placeOwn(ctx, tx, org, keyID, r, limit, now, now+deliverFor.Microseconds()); err != nil {
			return err
		}
		v, err = delivery(ctx, tx, "d.key_id = $1", keyID)
		return err
	})
	return v, err
}

// ownKey returns what became of a key that its holder, an administrator, added.
func ownKey(ctx context.Context, tx *txn, org org.ID, r enroll.Recipient) (enroll.Delivery, error) {
	if r.Origin != enroll.FromNode {
		return enroll.Delivery{}, enroll.ErrNotFound
	}
	all, err := query(ctx, tx, scanDelivery, deliveryColumns+" WHERE d.org_id = $1 AND d.recipient = $2 AND d.enrollment_id = '' AND d.origin = 'node'", org, r.ID)
	if err != nil {
		return enroll.Delivery{}, err
	}
	for _, v := range all {
		if v.Stage != enroll.Ended {
			return v, nil
		}
	}
	return enroll.Delivery{}, enroll.ErrNotFound
}

// endDelivery ends delivery $1 and keeps nothing of the wrapped key.
const endDelivery = "UPDATE deliveries SET stage = 'ended', wrapped = NULL WHERE key_id = $1 AND stage NOT IN ('received', 'ended')"

func (d *DB) placeOwn(ctx context.Context, tx *txn, org org.ID, keyID string, r enroll.Recipient, limit int, now, until int64) error {
	if err := d.sweepOrg(ctx, tx, org, now); err != nil {
		return err
	}
	slots, err := freeSlots(ctx, tx, "org_keys", org, 1, limit)
	if err != nil {
		return err
	}
	if _, err := exec(ctx, tx, "INSERT INTO org_keys (id, org_id, slot, state, expires_at) VALUES ($1, $2, $3, 'reserved', $4)",
		keyID, org, slots[0], until); err != nil {
		return err
	}
	_, err = exec(ctx, tx, `INSERT INTO deliveries (key_id, org_id, enrollment_id, scope, stage, recipient, recipient_key, claimed_at, approved_at, until, origin)
		VALUES ($1, $2, '', 'organization', 'claimed', $3, $4, $5, $5, $6, $7)`, keyID, org, r.ID, r.DER, now, until, string(cmp.Or(r.Origin, enroll.FromBackend)))
	return err
}

// Begin implements enroll.Store.
func (d *DB) Begin(ctx context.Context, keyID, attempt string, life time.Duration) (bool, error) {
	mine := false
	err := d.write(ctx, func(ctx context.Context, tx *txn) error {
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		mine, err = begin(ctx, tx, keyID, attempt, now, life)
		return err
	})
	return err == nil && mine, err
}

func begin(ctx context.Context, tx *txn, keyID, attempt string, now int64, life time.Duration) (mine bool, err error) {
	// An attempt that would have the delivery for longer than any began before the clock was set back.
	n, err := exec(ctx, tx, `UPDATE deliveries SET attempt = $2, attempt_until = $4
		WHERE key_id = $1 AND stage = 'claimed' AND approved_at IS NOT NULL AND (attempt_until IS NULL OR attempt_until <= $3 OR attempt_until > $5)`,
		keyID, attempt, now, now+life.Microseconds(), now+(life+clockSlack).Microseconds())
	return n == 1, err
}

// GiveUp implements enroll.Store.
func (d *DB) GiveUp(ctx context.Context, keyID, attempt string) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		_, err := exec(ctx, tx, "UPDATE deliveries SET attempt = '', attempt_until = NULL WHERE key_id = $1 AND attempt = $2 AND stage = 'claimed'", keyID, attempt)
		return err
	})
}

// StoreWrapped implements enroll.Store. The attempt fences off one that was slow.
func (d *DB) StoreWrapped(ctx context.Context, keyID, attempt string, public []byte, w enroll.Wrapped, fingerprint string, created audit.Event) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		if err := one(exec(ctx, tx, `UPDATE deliveries SET stage = 'stored', alg = $4, wrapped = $5, digest = $6, fingerprint = $7, attempt_until = NULL
			WHERE key_id = $1 AND attempt = $2 AND stage = 'claimed' AND attempt_until > $3`,
			keyID, attempt, now, w.Alg, w.Value, w.SHA256, fingerprint)); err != nil {
			return err
		}
		return d.pend(ctx, tx, keyID, now, public, created)
	})
}

// pend makes a delivery's reserved key a pending one.
func (d *DB) pend(ctx context.Context, tx *txn, keyID string, now int64, public []byte, created audit.Event) error {
	v, err := delivery(ctx, tx, "d.key_id = $1", keyID)
	if err != nil {
		return err
	}
	if err := one(exec(ctx, tx, "UPDATE "+keyTable(v.Scope)+" SET state = "+pending+", sealed = $3, created_at = $2 WHERE id = $1 AND state = "+reserved+" AND expires_at > $2",
		keyID, now, public)); err != nil {
		return err
	}
	return d.record(ctx, tx, created)
}

// StoreOwn implements enroll.Store.
func (d *DB) StoreOwn(ctx context.Context, keyID string, public []byte, fingerprint string, created audit.Event) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		n, err := exec(ctx, tx, `UPDATE deliveries SET stage = 'sealed', wrapped = $2, fingerprint = $3, event_id = $4
			WHERE key_id = $1 AND stage = 'claimed' AND origin = 'node' AND approved_at IS NOT NULL`, keyID, []byte{}, fingerprint, created.ID)
		if err != nil || n == 0 {
			return err
		}
		tx.awaited = true
		return d.pend(ctx, tx, keyID, now, public, created)
	})
}

// Seal implements enroll.Store.
func (d *DB) Seal(ctx context.Context, keyID string, sealed audit.Event) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		n, err := exec(ctx, tx, "UPDATE deliveries SET stage = 'sealed', event_id = $2 WHERE key_id = $1 AND stage = 'stored'", keyID, sealed.ID)
		if err != nil || n == 0 {
			return err
		}
		tx.awaited = true
		return d.record(ctx, tx, sealed)
	})
}

// Offer implements enroll.Store.
func (d *DB) Offer(ctx context.Context, keyID string, deliverFor time.Duration) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		n, err := exec(ctx, tx, "UPDATE deliveries SET stage = 'available', until = $2 WHERE key_id = $1 AND stage = 'sealed'", keyID, now+deliverFor.Microseconds())
		if err != nil || n == 0 {
			return err
		}
		v, err := delivery(ctx, tx, "d.key_id = $1", keyID)
		if err != nil {
			return err
		}
		if err := one(exec(ctx, tx, "UPDATE "+keyTable(v.Scope)+" SET state = "+released+", released_at = $2, expires_at = NULL WHERE id = $1 AND state = "+pending+" AND expires_at > $2", keyID, now)); err != nil || v.Origin == enroll.FromBackend {
			return err
		}
		// Its holder has it, and came from where the event of its making says.
		if _, err := exec(ctx, tx, "UPDATE deliveries SET stage = 'received', wrapped = NULL, received_at = $2 WHERE key_id = $1", keyID, now); err != nil {
			return err
		}
		_, err = exec(ctx, tx, "UPDATE "+keyTable(v.Scope)+" SET delivered_at = $2, delivery_event = $3 WHERE id = $1", keyID, now, v.Event)
		return err
	})
}

// Answered implements enroll.Store.
func (d *DB) Answered(ctx context.Context, keyID string, delivered audit.Event) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		if _, err := exec(ctx, tx, "UPDATE deliveries SET answers = answers + 1 WHERE key_id = $1", keyID); err != nil {
			return err
		}
		first := int64(0)
		for _, scope := range []enroll.Scope{enroll.ForNode, enroll.ForOrganization} {
			n, err := exec(ctx, tx, "UPDATE "+keyTable(scope)+" SET delivered_at = $2, delivery_event = $3 WHERE id = $1 AND delivered_at IS NULL AND released_at IS NOT NULL", keyID, now, delivered.ID)
			if err != nil {
				return err
			}
			first += n
		}
		if first == 0 {
			return nil
		}
		tx.unhurried = true // the receipt follows
		return d.record(ctx, tx, delivered)
	})
}

// Receive implements enroll.Store.
func (d *DB) Receive(ctx context.Context, keyID string, received func(int) audit.Event) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		answers, err := query(ctx, tx, scanInt, "UPDATE deliveries SET stage = 'received', wrapped = NULL, received_at = $2 WHERE key_id = $1 AND stage = 'available' RETURNING answers", keyID, now)
		if err != nil {
			return err
		}
		if len(answers) == 0 {
			v, err := delivery(ctx, tx, "d.key_id = $1", keyID)
			if err == nil && v.Stage != enroll.Received {
				err = enroll.ErrClosed
			}
			return err
		}
		return d.record(ctx, tx, received(answers[0]))
	})
}

// Approve implements enroll.Store.
func (d *DB) Approve(ctx context.Context, org org.ID, id, recipient string, deliverFor time.Duration, event audit.Event) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		if err := d.lock(ctx, tx, "enrollment:"+id); err != nil {
			return err
		}
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		v, err := delivery(ctx, tx, "d.org_id = $1 AND d.enrollment_id = $2 AND d.recipient = $3", org, id, recipient)
		if err != nil {
			return err
		}
		if v.Stage == enroll.Ended {
			return enroll.ErrNotFound
		}
		if v.Approved {
			return nil
		}
		until := now + deliverFor.Microseconds()
		if err := one(exec(ctx, tx, "UPDATE deliveries SET approved_at = $2, until = $3 WHERE key_id = $1 AND approved_at IS NULL", v.KeyID, now, until)); err != nil {
			return err
		}
		if err := one(exec(ctx, tx, "UPDATE "+keyTable(v.Scope)+" SET expires_at = $2 WHERE id = $1 AND state = "+reserved, v.KeyID, until)); err != nil {
			return err
		}
		return d.record(ctx, tx, event)
	})
}

// Revoke implements enroll.Store.
func (d *DB) Revoke(ctx context.Context, of org.ID, id string, event audit.Event, withdrawn func(string) audit.Event) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		if err := d.lock(ctx, tx, "enrollment:"+id); err != nil {
			return err
		}
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		n, err := exec(ctx, tx, "UPDATE enrollments SET revoked_at = $3, ended_at = coalesce(ended_at, $3) WHERE id = $2 AND org_id = $1 AND revoked_at IS NULL", of, id, now)
		if err != nil {
			return err
		}
		if n == 0 {
			there, err := query(ctx, tx, scanInt, "SELECT 1 FROM enrollments WHERE id = $2 AND org_id = $1", of, id)
			if err == nil && len(there) == 0 {
				err = enroll.ErrNotFound
			}
			return err
		}
		if err := d.record(ctx, tx, event); err != nil {
			return err
		}
		open, err := query(ctx, tx, scanEnding, endingColumns+"d.enrollment_id = $1 AND d.stage NOT IN ('received', 'ended') AND d.used_at IS NULL ORDER BY d.key_id"+d.forUpdate(""), id)
		if err != nil {
			return err
		}
		return d.endDeliveries(ctx, tx, open, now, func(_ org.ID, key string) audit.Event { return withdrawn(key) })
	})
}

// ending is what must be known of a delivery to end it.
type ending struct {
	key        string
	org        org.ID
	enrollment string
	scope      enroll.Scope
}

const endingColumns = "SELECT d.key_id, d.org_id, d.enrollment_id, d.scope FROM deliveries d WHERE "

func scanEnding(scan func(...any) error) (e ending, err error) {
	err = scan(&e.key, &e.org, &e.enrollment, &e.scope)
	return e, err
}

// endDeliveries ends deliveries, which tx has locked, with their keys. A mere place is
// given back; a key that was made is withdrawn, with its event.
func (d *DB) endDeliveries(ctx context.Context, tx *txn, all []ending, now int64, withdrawn func(org.ID, string) audit.Event) error {
	orgs := make(map[string]org.ID, len(all))
	keys := map[enroll.Scope][]string{}
	for _, e := range all {
		orgs[e.key] = e.org
		keys[e.scope] = append(keys[e.scope], e.key)
	}
	var events []audit.Event
	for _, scope := range []enroll.Scope{enroll.ForOrganization, enroll.ForNode} {
		for _, statement := range []string{
			"DELETE FROM deliveries WHERE stage = 'open' AND key_id IN ",
			"UPDATE deliveries SET stage = 'ended', wrapped = NULL WHERE stage NOT IN ('received', 'ended') AND key_id IN ",
			"DELETE FROM " + keyTable(scope) + " WHERE state = " + reserved + " AND id IN ",
		} {
			if err := execAll(ctx, tx, statement+d.texts("$1"), keys[scope]); err != nil {
				return err
			}
		}
		ended, err := d.endKeys(ctx, tx, keyTable(scope), "state IN ("+pending+", "+released+")", keys[scope], now)
		if err != nil {
			return err
		}
		for _, key := range ended {
			events = append(events, withdrawn(orgs[key], key))
		}
	}
	return d.record(ctx, tx, events...)
}

// endKeys ends those of keys, in a table, of which a condition is true, and returns them.
func (d *DB) endKeys(ctx context.Context, tx *txn, table, condition string, keys []string, now int64) ([]string, error) {
	ended, err := queryAll(ctx, tx, scanText, "UPDATE "+table+endedAt+" WHERE "+condition+" AND id IN "+d.texts("$1")+" RETURNING id", keys, now)
	if err != nil {
		return nil, err
	}
	slices.Sort(ended)
	return ended, execAll(ctx, tx, "DELETE FROM node_keys WHERE key_id IN "+d.texts("$1"), ended)
}

// endedAt ends keys at $2, endedKey the key $1.
const (
	endedAt  = " SET state = " + deleted + ", slot = NULL, sealed = NULL, expires_at = NULL, deleted_at = $2"
	endedKey = endedAt + " WHERE id = $1"
)

// SweepDeliveries implements enroll.Store.
func (d *DB) SweepDeliveries(ctx context.Context, limit int, withdrawn, used func(org.ID, string) audit.Event) (int, error) {
	var n int
	err := d.write(ctx, func(ctx context.Context, tx *txn) error {
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		late, err := query(ctx, tx, scanEnding, endingColumns+`d.until <= $1 AND d.stage NOT IN ('open', 'received', 'ended')
			ORDER BY d.until LIMIT $2`+d.forUpdate(" SKIP LOCKED"), now, limit)
		if err != nil {
			return err
		}
		n = len(late)
		keys := make([]string, n)
		for i, e := range late {
			keys[i] = e.key
		}
		inUse, err := queryAll(ctx, tx, scanEnding, `UPDATE deliveries SET stage = 'received', wrapped = NULL, received_at = used_at
			WHERE stage = 'available' AND used_at IS NOT NULL AND key_id IN `+d.texts("$1")+" RETURNING key_id, org_id, enrollment_id, scope", keys)
		if err != nil {
			return err
		}
		events := make([]audit.Event, len(inUse))
		for i, e := range inUse {
			events[i] = used(e.org, e.key)
		}
		if err := d.record(ctx, tx, events...); err != nil {
			return err
		}
		return d.endDeliveries(ctx, tx, slices.DeleteFunc(late, func(e ending) bool { return slices.Contains(inUse, e) }), now, withdrawn)
	})
	if err != nil {
		return 0, err
	}
	return n, nil
}

// ExpiredEnrollments implements enroll.Store.
func (d *DB) ExpiredEnrollments(ctx context.Context, limit int) ([]string, error) {
	return query(ctx, d.read, scanText, "SELECT id FROM enrollments WHERE expires_at <= "+d.present()+" AND ended_at IS NULL ORDER BY expires_at, id LIMIT $1", limit)
}

// EndExpired implements enroll.Store. A claim that began in time is waited for.
func (d *DB) EndExpired(ctx context.Context, id string, expired func(org.ID, int) audit.Event) (places int, err error) {
	err = d.write(ctx, func(ctx context.Context, tx *txn) error {
		places = 0
		if err := d.lock(ctx, tx, "enrollment:"+id); err != nil {
			return err
		}
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		n, err := exec(ctx, tx, "UPDATE enrollments SET ended_at = $2 WHERE id = $1 AND ended_at IS NULL AND expires_at <= $2", id, now)
		if err != nil || n == 0 {
			return err
		}
		e, err := enrollment(ctx, tx, id)
		if err != nil {
			return err
		}
		const open = " FROM deliveries WHERE enrollment_id = $1 AND stage = 'open'"
		if _, err := exec(ctx, tx, "DELETE FROM "+keyTable(e.Scope)+" WHERE state = "+reserved+" AND id IN (SELECT key_id"+open+")", id); err != nil {
			return err
		}
		n, err = exec(ctx, tx, "DELETE"+open, id)
		if err != nil || n == 0 {
			return err
		}
		places = int(n)
		return d.record(ctx, tx, expired(e.Org, places))
	})
	if err != nil {
		return 0, err
	}
	return places, nil
}

// Leaf implements enroll.Store.
func (d *DB) Leaf(ctx context.Context, keyID string) ([]byte, error) {
	var leaf []byte
	err := d.read.QueryRowContext(ctx, "SELECT coalesce(e.leaf, v.leaf) FROM deliveries v LEFT JOIN events e ON e.id = v.event_id WHERE v.key_id = $1", keyID).Scan(&leaf)
	if errors.Is(err, sql.ErrNoRows) || err == nil && leaf == nil {
		return nil, enroll.ErrNotFound
	}
	return slices.Clone(leaf), unavailable(err)
}
