package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/orgkeys/orgkeys/internal/audit"
)

// A PostgreSQL with a synchronous standby commits locally first and then waits
// for the standby. When that wait is cancelled (a deadline of the client's, an
// administrator's pg_cancel_backend, a restart of the primary) the transaction
// stays, everybody sees it, and a failover loses it. So what was read may be lost
// until a commit that was made after the reading is acknowledged: the standby
// has the write-ahead log in its order.

// ErrNotReplicated: PostgreSQL gave up waiting for its synchronous standby. The
// change is made, and a failover may lose it.
var ErrNotReplicated = errors.New("PostgreSQL committed without its synchronous standby, and a failover may lose that commit")

// errCommitWait is a commit that PostgreSQL did not answer in time.
var errCommitWait = errors.New("PostgreSQL did not acknowledge a commit in time")

// notReplicated is the entry in a connection's data that noteNotice leaves.
const notReplicated = "orgkeys: not replicated"

// noteNotice remembers the warning that a wait for a standby was cancelled. It
// is known by the function that gives it, since its text is translated.
func noteNotice(conn *pgconn.PgConn, n *pgconn.Notice) {
	if n.Routine == "SyncRepWaitForLSN" {
		conn.CustomData()[notReplicated] = true
	}
}

// replicated reports ErrNotReplicated if the wait for a standby was cancelled in
// the commit that conn has just made.
func replicated(conn *sql.Conn) error {
	return conn.Raw(func(driver any) error {
		data := driver.(interface{ Conn() *pgx.Conn }).Conn().PgConn().CustomData()
		if _, cancelled := data[notReplicated]; cancelled {
			delete(data, notReplicated)
			return unavailable(ErrNotReplicated)
		}
		return nil
	})
}

// commit commits tx, which conn has, and reports an error unless PostgreSQL has
// acknowledged that it keeps the change.
func (d *DB) commit(ctx context.Context, conn *sql.Conn, tx *sql.Tx) error {
	if err := tx.Commit(); err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("%w%s: %w", errCommitWait, d.awaitedStandbys(), err)
		}
		return unavailable(err)
	}
	return replicated(conn)
}

// barrier makes the transaction write something if commits wait for a standby, so that
// its own commit waits too.
const barrier = `SELECT CASE WHEN current_setting('synchronous_standby_names') <> '' THEN pg_logical_emit_message(true, 'orgkeys', '')::text END`

// Durable implements audit.Store. On SQLite what can be read is durable.
func (d *DB) Durable(ctx context.Context, held audit.Checkpoint, limit int) (entries []audit.Entry, after audit.Checkpoint, err error) {
	if !d.postgres {
		tx, err := d.read.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
		if err != nil {
			return nil, held, unavailable(err)
		}
		entries, after, err = d.over(reading{tx, d.read}).entriesBehind(ctx, held, limit)
		return entries, after, errors.Join(err, ignoreDone(tx.Rollback()))
	}
	err = d.transact(ctx, func(ctx context.Context, tx *txn) error {
		if _, err := exec(ctx, tx, barrier); err != nil {
			return err
		}
		var err error
		entries, after, err = d.over(tx).entriesBehind(ctx, held, limit)
		return err
	})
	if err != nil {
		return nil, held, fmt.Errorf("seeing to it that the log is durable: %w", err)
	}
	return entries, after, nil
}

type reader interface {
	querier
	rowQuerier
}

// entriesBehind reads at most limit entries behind held, and the checkpoint that
// covers them. It reports *audit.RollbackError unless the log extends held. Who holds nothing
// gets what is still in the database, with a checkpoint that covers what was moved too.
func (s snapshot) entriesBehind(ctx context.Context, held audit.Checkpoint, limit int) ([]audit.Entry, audit.Checkpoint, error) {
	head, err := readHead(ctx, s.q)
	if err != nil {
		return nil, held, err
	}
	if err := s.extends(ctx, head, held); err != nil {
		return nil, held, err
	}
	first := held.Size
	if first == 0 {
		a, err := s.Archived(ctx)
		if err != nil {
			return nil, held, err
		}
		first = a.Moved
	}
	if first >= head.Size {
		return nil, held, nil
	}
	entries, err := s.entries(ctx, first, int(min(int64(limit), head.Size-first)))
	if errors.Is(err, ErrRemoved) {
		err = fmt.Errorf("%w: move the sink's file aside, and keep it; a new one begins behind what was moved to the archive", err)
	}
	if err != nil || len(entries) == 0 {
		return nil, held, err
	}
	after, err := s.below(ctx, head, first+int64(len(entries)))
	return entries, after, err
}

// extends reports *audit.RollbackError unless the log, whose head is given, extends held.
func (s snapshot) extends(ctx context.Context, head, held audit.Checkpoint) error {
	if held.Size == 0 || head == held {
		return nil
	}
	if head.Size < held.Size {
		return &audit.RollbackError{Held: held, Log: head}
	}
	then, err := s.below(ctx, head, held.Size)
	if err == nil && then != held {
		err = &audit.RollbackError{Held: held, Log: then}
	}
	return err
}

// awaitedStandbys describes the standbys for which PostgreSQL may be waiting.
func (d *DB) awaitedStandbys() string {
	names, _ := d.standbys.Load().(string)
	if names == "" {
		return ""
	}
	return fmt.Sprintf(": it waits for a synchronous standby (synchronous_standby_names is %q); start the standby, or set others", names)
}
