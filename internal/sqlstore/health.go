package sqlstore

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgconn"
)

// Health is judged by writes: a database that answers but accepts none, because its disk
// is full or its standby is unreachable, is unusable. On PostgreSQL the evidence is the row
// that a replica writes about itself every few seconds, on SQLite a test write for each
// check; on both, also the outcome of the requests' own writes.
const (
	beatTimeout = 5 * time.Second  // for a replica's row; commits that take longer fail requests, too
	beatOverdue = 15 * time.Second // after which silence is bad news
	probeSize   = 2000             // bytes of a row that needs room of its own
)

// evidence is how the last writes ended.
type evidence struct {
	mu      sync.Mutex
	beat    time.Time // the last row of this replica that was written; zero: it writes none
	failed  error     // why the newest was not
	storage error     // why a request's write found no room, or none that lasts, until one does
}

// beaten notes how the writing of this replica's row ended.
func (e *evidence) beaten(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.failed = err
	if err == nil || e.beat.IsZero() {
		e.beat = time.Now()
	}
}

// wrote notes how a write ended. recorded: it put events into the log, which need room.
func (e *evidence) wrote(err error, recorded bool) {
	if !storageFailure(err) && (err != nil || !recorded) {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.storage = err
}

// trouble is why the last writes failed, and whether a replica's rows are written
// at all.
func (e *evidence) trouble() (storage, beat error, beating bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	beat = e.failed
	if silent := time.Since(e.beat); beat == nil && !e.beat.IsZero() && silent > beatOverdue {
		beat = fmt.Errorf("nothing was written for %s", silent.Round(time.Second))
	}
	return e.storage, beat, !e.beat.IsZero()
}

// storageFailure reports whether a write failed because of the storage, so that later
// writes will fail too.
func storageFailure(err error) bool {
	if errors.Is(err, errCommitWait) || errors.Is(err, ErrNotReplicated) {
		return true
	}
	if failure, ok := errors.AsType[*pgconn.PgError](err); ok {
		switch failure.Code {
		case "53100", "58030", "25006", "53000": // disk full, I/O error, read-only, no resources
			return true
		}
	}
	return fileFailure(err)
}

// Healthy reports whether the database answers, and takes writes: a disk may be
// full, a standby away, another process may hold SQLite's file, a role may lack a
// right, and after a fail-over a connection may lead to the server that is a standby now.
func (d *DB) Healthy(ctx context.Context) error {
	storage, beat, beating := d.evidence.trouble()
	if storage != nil {
		if d.probe(ctx) != nil {
			return unavailable(fmt.Errorf("a request's write failed: %w", storage))
		}
		d.evidence.wrote(nil, true)
	}
	if !d.postgres {
		return d.write(ctx, rewriteHead)
	}
	if err := d.allowed(ctx); err != nil {
		return err
	}
	if beat != nil {
		return unavailable(fmt.Errorf("this replica's last write failed: %w", beat))
	}
	if !beating {
		return d.acknowledges(ctx)
	}
	return nil
}

// allowed looks at what PostgreSQL says of the connection and the role.
func (d *DB) allowed(ctx context.Context) error {
	var readOnly bool
	var missing, standbys string
	if err := d.read.QueryRowContext(ctx, cannotWrite).Scan(&readOnly, &missing, &standbys); err != nil {
		return unavailable(err)
	}
	d.standbys.Store(standbys)
	switch {
	case readOnly:
		return unavailable(errReadOnly)
	case missing != "":
		return unavailable(fmt.Errorf("the database role lacks %s", missing))
	}
	return nil
}

// acknowledges reports an error unless PostgreSQL acknowledges a commit.
func (d *DB) acknowledges(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, beatTimeout)
	defer cancel()
	return d.transact(ctx, func(ctx context.Context, tx *txn) error {
		_, err := exec(ctx, tx, barrier)
		return err
	})
}

var errProbe = errors.New("a probe leaves nothing")

// probe writes what needs room, and takes it back. PostgreSQL makes the room when
// it is asked, SQLite when it commits.
func (d *DB) probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, beatTimeout)
	defer cancel()
	id, filling := "probe-"+uuid.NewString(), make([]byte, probeSize)
	rand.Read(filling)
	if d.postgres {
		err := d.transact(ctx, func(ctx context.Context, tx *txn) error {
			_, err := exec(ctx, tx, "INSERT INTO events (id, occurred_at, type, org_id, actor, object, leaf, mac) VALUES ($1, 0, '', '', '', '', $2, '')", id, filling)
			if err == nil {
				err = errProbe
			}
			return err
		})
		if errors.Is(err, errProbe) {
			err = d.acknowledges(ctx)
		}
		return err
	}
	for _, statement := range []string{
		"INSERT INTO replicas (id, address, version, policy, max_keys, clock_ahead, seen_at) VALUES ($1, hex($2), '', '', 0, 0, 0)",
		"DELETE FROM replicas WHERE id = $1 OR address = hex($2) OR id LIKE 'probe-%'", // also what a crash left between the two
	} {
		err := d.transact(ctx, func(ctx context.Context, tx *txn) error {
			_, err := exec(ctx, tx, statement, id, filling)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}
