package sqlstore

import (
	"context"
	"time"

	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// traceLife is how long a trace is kept that nobody looks at, as with a back end whose keys
// end with their process.
const traceLife = 7 * 24 * time.Hour

// traceBatch is how many traces are looked at together.
const traceBatch = 100

// What is being made, by its name in the back end, as rows of key_traces. The places
// of enrollments, which nobody asked for, bear no such name: their keys are made in attempts.
const (
	traceKeys     = "INSERT INTO key_traces (name, use, due_at) SELECT id, '" + string(orgkey.UsePlain) + "', expires_at FROM org_keys WHERE asked IS NOT NULL AND state IN (" + reserved + ", " + pending + ") AND "
	traceAttempts = "INSERT INTO key_traces (name, use, due_at) SELECT attempt, '" + string(orgkey.UseSealed) + "', attempt_until FROM deliveries WHERE stage = 'claimed' AND attempt_until IS NOT NULL AND "
	unlessTraced  = " ON CONFLICT DO NOTHING"
)

// traceOrg notes what of org is being made.
func traceOrg(ctx context.Context, tx *txn, org org.ID) error {
	for _, statement := range []string{traceKeys, traceAttempts} {
		if _, err := exec(ctx, tx, statement+"org_id = $1"+unlessTraced, org); err != nil {
			return err
		}
	}
	return nil
}

// Traces returns the oldest names under which a process that died may have left something in
// the back end.
func (d *DB) Traces(ctx context.Context) ([]orgkey.Trace, error) {
	return query(ctx, d.read, func(scan func(...any) error) (t orgkey.Trace, err error) {
		err = scan(&t.Name, &t.Use)
		return t, err
	}, "SELECT name, use FROM key_traces WHERE due_at <= "+d.present()+" ORDER BY due_at, name LIMIT $1", traceBatch)
}

// ForgetTraces deletes names under which nothing is left.
func (d *DB) ForgetTraces(ctx context.Context, names []string) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		return execAll(ctx, tx, "DELETE FROM key_traces WHERE name IN "+d.texts("$1"), names)
	})
}
