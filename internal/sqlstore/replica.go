package sqlstore

import (
	"context"
	"fmt"
	"time"
)

// Replica describes a running process to the others. On SQLite there is only one process,
// so this does nothing.
type Replica struct {
	ID         string // fresh for each process
	Address    string // its host, and where it listens: no two replicas that live share it
	Version    string
	Policy     string        // the policy's revision
	Max        int           // keys that an organization may have
	ClockAhead time.Duration // of the database's clock, as found when it was announced
	Timeline   string        // of the database, under which its sinks were found to fit the log; empty: they are not known to

	Credentials string // a mark of those that it uses for the back end; empty: it is not known
}

// replicaLife is how long a replica counts that said nothing more, and
// replicaMemory how long its row stays.
const (
	replicaLife   = 30 * time.Second
	replicaMemory = time.Hour
)

const postgresNow = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"

// AnnounceReplica writes down what r says of itself, and that it lives. That it
// can is what Healthy goes by.
func (d *DB) AnnounceReplica(ctx context.Context, r Replica) error {
	if !d.postgres {
		return nil
	}
	d.replica.Store(r.ID)
	writing, cancel := context.WithTimeout(ctx, beatTimeout)
	defer cancel()
	err := d.transact(writing, func(ctx context.Context, tx *txn) error { return announce(ctx, tx, r) })
	if ctx.Err() == nil {
		d.evidence.beaten(err)
	}
	return err
}

func announce(ctx context.Context, tx *txn, r Replica) error {
	if _, err := exec(ctx, tx, "DELETE FROM replicas WHERE abs(seen_at - "+postgresNow+") > $1::bigint", replicaMemory.Microseconds()); err != nil {
		return fmt.Errorf("forgetting replicas: %w", err)
	}
	_, err := exec(ctx, tx, `INSERT INTO replicas (id, address, version, policy, max_keys, clock_ahead, seen_at, timeline, credentials)
		VALUES ($1, $2, $3, $4, $5, $6::bigint - `+postgresNow+", "+postgresNow+`, nullif($7, ''), nullif($8, '')) ON CONFLICT (id) DO UPDATE SET
		address = $2, version = $3, policy = $4, max_keys = $5, clock_ahead = excluded.clock_ahead, seen_at = excluded.seen_at, timeline = coalesce(excluded.timeline, replicas.timeline), credentials = excluded.credentials`,
		r.ID, r.Address, r.Version, r.Policy, r.Max, time.Now().UnixMicro(), r.Timeline, r.Credentials)
	return err
}

// ForgetReplica says that the replica has ended, and with it those that had its address
// before. Otherwise one that was killed would count again, as after a recovery to a
// point in time, which brings back its row with the timeline of then.
func (d *DB) ForgetReplica(ctx context.Context, id string) error {
	if !d.postgres {
		return nil
	}
	_, err := d.read.ExecContext(ctx, "DELETE FROM replicas r USING replicas own WHERE own.id = $1 AND r.address = own.address AND r.seen_at <= own.seen_at", id)
	return unavailable(err)
}

// Replicas returns the running replicas. Of several with one address only the newest is
// running: the others were killed.
func (d *DB) Replicas(ctx context.Context) ([]Replica, error) {
	if !d.postgres {
		return nil, nil
	}
	return query(ctx, d.read, func(scan func(...any) error) (r Replica, err error) {
		var micros int64
		err = scan(&r.ID, &r.Address, &r.Version, &r.Policy, &r.Max, &micros)
		r.ClockAhead = time.Duration(micros) * time.Microsecond
		return r, err
	}, liveReplicas("id, address, version, policy, max_keys, clock_ahead", 1), replicaLife.Microseconds())
}

// Connections is how many connections PostgreSQL gives to all who are not its
// superusers, of which each replica may take as many as LimitConnections says.
func (d *DB) Connections(ctx context.Context) (n int, err error) {
	err = d.read.QueryRowContext(ctx, "SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int").Scan(&n)
	return n, unavailable(err)
}

// ClockAhead is how far this process's clock is ahead of the database's.
func (d *DB) ClockAhead(ctx context.Context) (time.Duration, error) {
	if !d.postgres {
		return 0, nil
	}
	var now int64
	err := d.read.QueryRowContext(ctx, "SELECT "+postgresNow).Scan(&now)
	return time.Duration(time.Now().UnixMicro()-now) * time.Microsecond, unavailable(err)
}
