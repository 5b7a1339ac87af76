package sqlstore

import (
	"cmp"
	"context"
	"database/sql"
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
	if err != nil {
		return enroll.Enrollment{}, err // not what a change that was left behind may still set
	}
	return made, nil
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
		var all, waiting, unreceived, lost int
		err := scan(&id, &all, &waiting, &unreceived, &lost)
		if e := places[id]; e != nil {
			e.Claimed, e.Waiting, e.Unreceived, e.Lost = all, waiting, unreceived, lost
		}
		return err
	}, `SELECT id, count(*), sum(CASE WHEN stage IN ('claimed', 'stored', 'sealed') THEN 1 ELSE 0 END), sum(CASE WHEN stage = 'available' THEN 1 ELSE 0 END),
		sum(CASE WHEN stage = 'ended' AND arrived IS NULL THEN 1 ELSE 0 END)
		FROM (SELECT d.enrollment_id AS id, coalesce(d.received_at, d.used_at) AS arrived, `+deliveryStage+" AS stage"+deliveryTables+claimed+") AS c GROUP BY id", args...)
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
