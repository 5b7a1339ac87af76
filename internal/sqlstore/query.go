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

// query returns one T for each row.
func query[T any](ctx context.Context, q querier, scan func(scan func(...any) error) (T, error), statement string, args ...any) ([]T, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
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
