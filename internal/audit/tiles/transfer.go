package tiles

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
)

// Transfer makes an archive hold what another, of which log reads what was moved, holds of
// that log: for one that was set back, which the other cannot follow. Each bundle is compared
// with its root hash in the database; the checkpoint comes last.
func Transfer(ctx context.Context, from, to Archive, log Log, progress func(doing string) verify.Progress) (signed audit.Signed, err error) {
	unlock, err := to.Lock(ctx)
	if err != nil {
		return audit.Signed{}, err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	if err := transferReceipts(ctx, from, to, log, progress("receipts copied").Ticking()); err != nil {
		return audit.Signed{}, err
	}
	signed, err = publish(ctx, to, log, progress("published"))
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%s lacks what the log says is there; what retention removed after the backup was made is in a copy of the archive alone: %w", from, err)
	}
	return signed, err
}

func transferReceipts(ctx context.Context, from, to Archive, log Log, tick func(done, all int64)) error {
	now, err := log.Archived(ctx)
	if err != nil {
		return err
	}
	sinks, err := log.ReceiptSinksOf(ctx)
	if err != nil {
		return err
	}
	for n := now.Removed; n < now.Moved; n += width {
		for _, sink := range sinks {
			receipts, err := from.Receipts(ctx, sink, n/width)
			if errors.Is(err, fs.ErrNotExist) { // it gave none then
				continue
			}
			if err == nil {
				err = to.Keep(ctx, sink, n/width, receipts)
			}
			if err != nil {
				return err
			}
		}
		tick(n+width, now.Moved)
	}
	return to.Flush(ctx)
}
