package sqlstore

import (
	"context"
	"slices"

	"github.com/go-json-experiment/json"
)

// listSize is how many rows one statement changes, so that it ends well before
// statementTimeout.
const listSize = 5000

// elements is the rows, with one column named value, that the elements of the JSON array
// in a parameter are. As parameters of their own they would make a statement for each
// number of them, and SQLite takes longer for each name the more there are; a statement
// for each is a round trip to PostgreSQL for each.
func (d *DB) elements(param string) string {
	if d.postgres {
		return "jsonb_array_elements(" + param + "::jsonb) AS element (value)"
	}
	return "json_each(" + param + ")"
}

// texts is the list of texts in a parameter that list made.
func (d *DB) texts(param string) string {
	return "(SELECT value ->> 0 FROM " + d.elements(param) + ")"
}

// integers is texts of integers.
func (d *DB) integers(param string) string {
	return "(SELECT CAST(value ->> 0 AS BIGINT) FROM " + d.elements(param) + ")"
}

// list is values as a parameter for elements: rows of one column.
func list[T ~string | ~int64](values []T) (string, error) {
	rows := make([][1]T, len(values))
	for i, v := range values {
		rows[i] = [1]T{v}
	}
	text, err := json.Marshal(rows)
	return string(text), err
}

// execAll runs a statement over $1, a list of ids, and args.
func execAll(ctx context.Context, tx *txn, statement string, ids []string, args ...any) error {
	for batch := range slices.Chunk(ids, listSize) {
		some, err := list(batch)
		if err != nil {
			return err
		}
		if _, err := exec(ctx, tx, statement, append([]any{some}, args...)...); err != nil {
			return err
		}
	}
	return nil
}

// queryAll is query of a statement over $1, a list of ids, and args.
func queryAll[T any](ctx context.Context, q querier, scan func(scan func(...any) error) (T, error), statement string, ids []string, args ...any) ([]T, error) {
	var all []T
	for batch := range slices.Chunk(ids, listSize) {
		some, err := list(batch)
		if err != nil {
			return nil, err
		}
		found, err := query(ctx, q, scan, statement, append([]any{some}, args...)...)
		if err != nil {
			return nil, err
		}
		all = append(all, found...)
	}
	return all, nil
}
