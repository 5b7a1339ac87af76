package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/orgkeys/orgkeys/internal/audit"
)

// timelineID is the first part of the name of the file that PostgreSQL writes its
// log to. (pg_control_checkpoint() has it too, and is late after a promotion.)
const timelineID = "substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)"

// unknownTimeline is used if PostgreSQL does not report it.
const unknownTimeline = "''"

// timelineExpression finds out whether PostgreSQL reports its timeline: a managed server
// may lack the functions, or the right to call them.
func timelineExpression(ctx context.Context, q rowQuerier) (string, error) {
	var now string
	err := q.QueryRowContext(ctx, "SELECT "+timelineID).Scan(&now)
	switch {
	case err == nil:
		return timelineID, nil
	case untold(err):
		return unknownTimeline, nil
	}
	return "", unavailable(fmt.Errorf("asking PostgreSQL for its timeline: %w", err))
}

// historyExpression names the database's history: which initdb made it, where
// PostgreSQL tells that, and its timeline.
func historyExpression(ctx context.Context, q rowQuerier, timeline string) (string, error) {
	const system = "(SELECT system_identifier::text FROM pg_control_system())"
	var now string
	err := q.QueryRowContext(ctx, "SELECT "+system).Scan(&now)
	switch {
	case timeline == unknownTimeline:
		return unknownTimeline, nil
	case err == nil:
		return system + " || '/' || " + timeline, nil
	case untold(err):
		return timeline, nil
	}
	return "", unavailable(fmt.Errorf("asking PostgreSQL which system it is: %w", err))
}

// untold reports whether PostgreSQL has no such function, does not support it, or
// gives no right to it.
func untold(err error) bool {
	failure, ok := errors.AsType[*pgconn.PgError](err)
	return ok && (failure.Code == "42501" || failure.Code == "42883" || failure.Code == "0A000")
}

// noteChange has the log say that it goes on in another database than the one in
// which its last event got its index. tx has the sequencer's lock.
//
// A replica that was away during a failover may have a sink that is ahead of the
// log, and nobody knows: the log goes on. This event is then where the sink and
// the log part, which tells the failover from a forgery.
func (d *DB) noteChange(ctx context.Context, tx *txn) error {
	if !d.postgres {
		return nil
	}
	var now string
	var before sql.NullString
	if err := tx.QueryRowContext(ctx, "SELECT history, "+d.history+" FROM log_head").Scan(&before, &now); err != nil {
		return unavailable(fmt.Errorf("asking which database the log is in: %w", err))
	}
	if now == "" || before.String == now {
		return nil
	}
	if before.Valid {
		head, err := readHead(ctx, tx)
		if err != nil {
			return err
		}
		if d.eventKey == nil {
			return errNoEventKey
		}
		if err := d.recordNext(ctx, tx, d.eventKey.DatabaseChange(head, before.String, now)); err != nil {
			return err
		}
	}
	return one(exec(ctx, tx, "UPDATE log_head SET history = $1", now))
}

// ChangedAt reports whether the log's event at an index says that the log went on
// in another database from there, as noteChange had it.
func (d *DB) ChangedAt(ctx context.Context, index int64) (bool, error) {
	if d.eventKey == nil {
		return false, nil // no key, no such word
	}
	entries, err := d.Entries(ctx, index, 1)
	if err != nil || len(entries) == 0 {
		return false, err
	}
	e, err := audit.Decode(entries[0].Leaf)
	if err != nil || e.Type != audit.DatabaseChanged {
		return false, err
	}
	then, err := d.At(ctx, index)
	return err == nil && d.eventKey.Changed(then, e), err
}

// Timeline implements audit.Store. SQLite's file has none.
func (d *DB) Timeline(ctx context.Context) (now string, err error) {
	if !d.postgres {
		return "", nil
	}
	err = d.read.QueryRowContext(ctx, "SELECT "+d.timeline).Scan(&now)
	return now, unavailable(err)
}

// UseHolder sets the name under which other replicas see this one's sinks. No other call
// may be in progress.
func (d *DB) UseHolder(name string) { d.holder = name }

// Holder is a name for the sinks of a process, by its host and data directory, and what is
// that directory's alone: machines from one image may have one name.
func Holder(dataDir, own string) (string, error) {
	host, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("naming this host: %w", err)
	}
	return host + ":" + dataDir + " " + own, nil
}

// SinkAhead implements audit.Store.
func (d *DB) SinkAhead(ctx context.Context, sink string, size int64) error {
	if !d.postgres {
		return nil
	}
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		now, err := d.now(ctx, tx)
		if err != nil {
			return err
		}
		_, err = exec(ctx, tx, `INSERT INTO sinks_ahead (holder, sink, size, found_at) VALUES ($1, $2, $3, $4)
			ON CONFLICT (holder, sink) DO UPDATE SET size = excluded.size WHERE sinks_ahead.size <> excluded.size`, d.holder, sink, size, now)
		return err
	})
}

// SinkFits implements audit.Store.
func (d *DB) SinkFits(ctx context.Context, sink string) error {
	there, err := query(ctx, d.read, scanInt, "SELECT count(*) FROM sinks_ahead WHERE holder = $1 AND sink = $2", d.holder, sink)
	if err != nil || there[0] == 0 {
		return err
	}
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		_, err := exec(ctx, tx, "DELETE FROM sinks_ahead WHERE holder = $1 AND sink = $2", d.holder, sink)
		return err
	})
}

// SinksAhead returns the sinks for which the log is held back. SQLite's one process asks
// its sinks itself.
func (d *DB) SinksAhead(ctx context.Context) ([]audit.AheadSink, error) {
	if !d.postgres {
		return nil, nil
	}
	return query(ctx, d.read, func(scan func(...any) error) (s audit.AheadSink, err error) {
		var found sql.NullInt64
		err = scan(&s.Holder, &s.Sink, &s.Size, &found)
		s.Found = micros(found)
		return s, err
	}, "SELECT holder, sink, size, found_at FROM sinks_ahead ORDER BY found_at, holder, sink")
}

// ForgetAhead implements rollback.Store.
func (d *DB) ForgetAhead(ctx context.Context, s audit.AheadSink) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error { return forgetAhead(ctx, tx, s) })
}

func forgetAhead(ctx context.Context, tx *txn, s audit.AheadSink) error {
	_, err := exec(ctx, tx, "DELETE FROM sinks_ahead WHERE holder = $1 AND sink = $2", s.Holder, s.Sink)
	return err
}

// mayGrow reports an error unless the condition is met.
func (d *DB) mayGrow(ctx context.Context, q reader, only audit.Condition) error {
	if err := d.heldBack(ctx, q, only); err != nil {
		return err
	}
	if len(only.Held) == 0 {
		return nil
	}
	head, err := readHead(ctx, q)
	if err != nil {
		return err
	}
	for _, s := range only.Held {
		err := d.over(q).extends(ctx, head, s.Checkpoint)
		if setBack, ok := errors.AsType[*audit.RollbackError](err); ok {
			setBack.Sink = s.Sink
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// heldBack looks at what other replicas say of their sinks, and whether the
// database is the one that the sinks were compared with.
func (d *DB) heldBack(ctx context.Context, q reader, only audit.Condition) error {
	if !d.postgres || only.Timeline == "" && len(only.Held) == 0 {
		return nil // SQLite's one process knows all sinks
	}
	var timeline, ahead, silent string
	err := q.QueryRowContext(ctx, "SELECT "+d.timeline+`,
		coalesce((SELECT string_agg('sink ' || sink || ' of ' || holder || ' holds ' || size || ' events that the log does not extend', '; ' ORDER BY holder, sink) FROM sinks_ahead), ''),
		coalesce((SELECT string_agg(address, ', ' ORDER BY address) FROM (`+liveReplicas("address, id, timeline", 2)+`) AS live WHERE timeline <> `+d.timeline+` AND id <> $1), '')`,
		d.replicaID(), replicaLife.Microseconds()).Scan(&timeline, &ahead, &silent)
	switch {
	case err != nil:
		return unavailable(fmt.Errorf("asking whether the log may grow: %w", err))
	case timeline != only.Timeline:
		return &audit.TimelineError{Timeline: timeline}
	case ahead != "":
		return &audit.HaltError{Why: ahead, SetBack: true}
	case silent != "":
		return &audit.HaltError{Why: "the database has failed over, and these replicas have not confirmed yet that their sinks agree with it: " + silent}
	}
	return nil
}

// replicaID is this process's among the replicas, empty before it announced itself.
func (d *DB) replicaID() string {
	id, _ := d.replica.Load().(string)
	return id
}

// liveReplicas is the statement that selects columns of the replicas that live;
// $n is for how long one counts that said nothing more. A row from the future
// was written by a clock that was set back since, and counts no longer.
func liveReplicas(columns string, n int) string {
	life := "$" + strconv.Itoa(n) + "::bigint"
	return "SELECT DISTINCT ON (address) " + columns + " FROM replicas WHERE abs(seen_at - " + postgresNow + ") < " + life + " ORDER BY address, seen_at DESC"
}
