package sqlstore

import (
	"context"
	"database/sql"
	"errors"
)

// querier is a transaction, or the database for reads outside one.
type querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// bounded gives a query answerTimeout, but for one in a transaction that has a limit of its
// own: that may be longer.
func bounded(ctx context.Context, q querier) (context.Context, context.CancelFunc) {
	switch q.(type) {
	case *txn, *sql.Tx:
		if _, limited := ctx.Deadline(); limited {
			return ctx, func() {}
		}
	}
	return context.WithTimeout(ctx, answerTimeout)
}

// query returns one T for each row.
func query[T any](ctx context.Context, q querier, scan func(scan func(...any) error) (T, error), statement string, args ...any) ([]T, error) {
	ctx, cancel := bounded(ctx, q)
	defer cancel()
	var all []T
	err := each(ctx, q, func(dest func(...any) error) error {
		t, err := scan(dest)
		all = append(all, t)
		return err
	}, statement, args...)
	return all, err
}

// each calls do for each row.
func each(ctx context.Context, q querier, do func(scan func(...any) error) error, statement string, args ...any) error {
	rows, err := q.QueryContext(ctx, statement, args...)
	if err != nil {
		return unavailable(err)
	}
	for rows.Next() {
		if err := do(rows.Scan); err != nil {
			return errors.Join(err, rows.Close())
		}
	}
	return unavailable(errors.Join(rows.Err(), rows.Close()))
}

func scanInt(scan func(...any) error) (n int, err error) {
	err = scan(&n)
	return n, err
}
