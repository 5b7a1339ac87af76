//go:build !cgo

package sqlstore

import (
	"context"
	"errors"
)

var errNoCgo = errors.New("this binary was built without cgo; SQLite needs it: rebuild with CGO_ENABLED=1 and a C compiler, or set ORGKEYS_DATABASE_URL to a PostgreSQL database")

func openSQLite(context.Context, string) (*DB, error) { return nil, errNoCgo }

func fileFailure(error) bool { return false }
