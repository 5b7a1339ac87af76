package sqlstore_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// How much the full database holds: five keys an organization, and an event
// for each key.
const (
	millionOrgs = 200_000
	millionKeys = 5 * millionOrgs
)

// BenchmarkMillionKeys measures what requests do in PostgreSQL, over an empty
// database and over one with 1,000,000 keys in 200,000 organizations, by turns,
// so that whatever else the machine does is shared by both. It reports medians:
//
//	go test ./internal/sqlstore -run '^$' -bench MillionKeys -benchtime 1000x
func BenchmarkMillionKeys(b *testing.B) {
	empty, full := newDatabase(b, postgres), newDatabase(b, postgres)
	dbs := []*sqlstore.DB{open(b, empty), open(b, full)}
	fillMillion(b, raw(b, full))
	for _, measured := range []struct {
		name string
		do   func(ctx context.Context, db *sqlstore.DB) error
	}{
		{"generate and delete", generateAndDelete},
		{"list", func(ctx context.Context, db *sqlstore.DB) error {
			records, err := db.Keys(ctx, "acme")
			return wantFive(len(records), err)
		}},
		{"verify", func(ctx context.Context, db *sqlstore.DB) error { // what the check of a node's signature reads
			keys, err := db.LiveKeys(ctx, "acme", netip.MustParseAddr("192.0.2.1"), "", 5)
			return wantFive(len(keys), err)
		}},
		{"record and sequence", func(ctx context.Context, db *sqlstore.DB) error {
			err := db.Record(ctx, event(audit.KeysListed, "acme", ""))
			_, sequenceErr := db.Sequence(ctx, 5000, audit.Condition{})
			return errors.Join(err, sequenceErr)
		}},
	} {
		for _, db := range dbs {
			for range 5 {
				released(b, db, "acme", 5)
			}
		}
		b.Run(measured.name, func(b *testing.B) { byTurns(b, dbs, measured.do) })
		for _, db := range dbs {
			if _, err := db.DeleteKeys(b.Context(), "acme", false, event(audit.KeysDeleted, "acme", ""), func(id string, _ bool) audit.Event { return event(audit.KeyDeleted, "acme", id) }, enrollmentRevoked); err != nil {
				b.Fatal(err)
			}
		}
	}
}

// generateAndDelete is what generating and deleting a key does in the database.
func generateAndDelete(ctx context.Context, db *sqlstore.DB) error {
	id := uuid.NewString()
	return errors.Join(
		db.Reserve(ctx, "other", id, 5, life),
		db.StorePending(ctx, id, id, []byte("sealed"), event(audit.KeyCreated, "other", id)),
		db.Release(ctx, id),
		db.DeleteKey(ctx, "other", id, event(audit.KeyDeleted, "other", id)))
}

func wantFive(n int, err error) error {
	if err == nil && n != 5 {
		err = fmt.Errorf("%d keys", n)
	}
	return err
}

// byTurns times do on the empty and on the full database.
func byTurns(b *testing.B, dbs []*sqlstore.DB, do func(context.Context, *sqlstore.DB) error) {
	took := make([][]time.Duration, len(dbs))
	for b.Loop() {
		for i, db := range dbs {
			started := time.Now()
			if err := do(b.Context(), db); err != nil {
				b.Fatal(err)
			}
			took[i] = append(took[i], time.Since(started))
		}
	}
	for i := range took {
		slices.Sort(took[i])
	}
	empty, full := took[0][len(took[0])/2], took[1][len(took[1])/2]
	b.ReportMetric(float64(empty.Microseconds()), "µs-empty")
	b.ReportMetric(float64(full.Microseconds()), "µs-full")
	b.ReportMetric(float64(full)/float64(empty), "full/empty")
}

// fillMillion puts in the keys, and a log as long. The tree's hashes are not those of
// the events: what is measured does not depend on what they are.
func fillMillion(b *testing.B, db *sql.DB) {
	b.Helper()
	for _, text := range []string{
		fmt.Sprintf(`INSERT INTO org_keys (id, org_id, slot, state, sealed, created_at, released_at, delivered_at)
			SELECT gen_random_uuid(), 'org-' || (n / 5), n %% 5 + 1, 'released', decode(repeat('5a', 340), 'hex'), 1767225600000000 + n, 1767225600000000 + n, 1767225600000000 + n
			FROM generate_series(0, %d) AS n`, millionKeys-1),
		fmt.Sprintf(`INSERT INTO events (idx, id, occurred_at, type, org_id, actor, object, leaf, mac)
			SELECT n, gen_random_uuid(), 1767225600000000 + n, 'orgkey.created', 'org-' || (n / 5), 'admin', gen_random_uuid(), convert_to(repeat('x', 300), 'UTF8'), ''
			FROM generate_series(0, %d) AS n`, millionKeys-1),
		fmt.Sprintf(`INSERT INTO log_hashes (idx, hash) SELECT n, sha256(convert_to(n::text, 'UTF8')) FROM generate_series(0, %d) AS n`, tlog.StoredHashCount(millionKeys)-1),
		fmt.Sprintf(`UPDATE log_head SET size = %d`, millionKeys),
		`VACUUM ANALYZE`,
	} {
		if _, err := db.Exec(text); err != nil {
			b.Fatalf("%.60s: %v", text, err)
		}
	}
}
