package sqlstore

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// How long PostgreSQL leaves a lock to an idle holder, which may be stopped, and how
// often a holder that is busy elsewhere sends something.
const (
	holderIdle  = 2 * time.Second
	holderTouch = 500 * time.Millisecond
)

// tryLock is lock without waiting. The transaction does not outlive its
// holder's silence by more than idle.
func (d *DB) tryLock(ctx context.Context, tx *txn, name string, idle time.Duration) (bool, error) {
	if !d.postgres {
		return true, nil
	}
	var mine bool
	err := tx.QueryRowContext(ctx, `SELECT pg_try_advisory_xact_lock(hashtextextended($1, 0))
		FROM set_config('idle_in_transaction_session_timeout', $2, true)`, name, strconv.FormatInt(idle.Milliseconds(), 10)).Scan(&mine)
	return mine, unavailable(err)
}

// Exclusive implements audit.Store. On PostgreSQL the lock belongs to a
// transaction, so it goes with a process that dies, and with one that is
// stopped; then do's context ends when that process goes on.
func (d *DB) Exclusive(ctx context.Context, name string, do func(context.Context) error) (bool, error) {
	return d.exclusive(ctx, name, holderIdle, do)
}

func (d *DB) exclusive(ctx context.Context, name string, idle time.Duration, do func(context.Context) error) (bool, error) {
	if !d.postgres {
		return true, do(ctx)
	}
	begun, err := d.read.BeginTx(ctx, nil)
	if err != nil {
		return false, unavailable(err)
	}
	tx := &txn{Tx: begun}
	mine, err := d.tryLock(ctx, tx, name, idle)
	if err != nil || !mine {
		return false, errors.Join(err, ignoreDone(tx.Rollback()))
	}
	holding, stop := context.WithCancel(ctx)
	kept := make(chan error, 1)
	go func() {
		defer stop()
		kept <- keep(holding, tx)
	}()
	err = do(holding)
	stop()
	return true, errors.Join(err, <-kept, unavailable(ignoreDone(tx.Rollback())))
}

// keep sends something in tx at intervals, so that PostgreSQL does not end it, until ctx
// ends or PostgreSQL has ended it.
func keep(ctx context.Context, tx *txn) error {
	ticker := time.NewTicker(holderTouch)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
			if err := ignoreDone(touch(context.WithoutCancel(ctx), tx)); err != nil {
				return fmt.Errorf("keeping a lock: %w", err)
			}
		}
	}
}

func touch(ctx context.Context, tx *txn) error {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	_, err := exec(ctx, tx, "SELECT 1")
	return err
}
