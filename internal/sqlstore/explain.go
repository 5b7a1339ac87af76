package sqlstore

import (
	"database/sql/driver"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5/pgconn"
)

// advice says what to do about what PostgreSQL, or a pooler, answers with
// (PostgreSQL's documentation, appendix A).
var advice = map[string]string{
	"28P01": "the user or the password in ORGKEYS_DATABASE_URL is wrong",
	"28000": "pg_hba.conf does not allow this user from this address, or not with this method (TLS, password): compare ORGKEYS_DATABASE_URL with it",
	"3D000": "the database that ORGKEYS_DATABASE_URL names does not exist: create it (createdb), or correct the name",
	"3F000": "the search_path, of the role, the database or the URL, names no schema that exists: CREATE SCHEMA, or correct it",
	"42501": "the database role lacks a right: to migrate it needs GRANT USAGE, CREATE ON SCHEMA, and it should own its tables",
	"42P01": "a table is missing: run orgkeys migrate, and make sure that search_path is the same for migrate and serve",
	"25006": "the server is a standby, or read-only: ORGKEYS_DATABASE_URL must lead to the primary (name several hosts, or change the pooler's target)",
	"53100": "the server's disk is full",
	"53300": "the server has no connection left: raise max_connections, or lower ORGKEYS_DATABASE_CONNECTIONS",
	"55P03": "another transaction kept a table for too long: if it is a verification or an export, wait until that has ended",
	"57014": "a statement took longer than the time limit, or waited so long for another transaction",
	"57P01": "an administrator or a failover ended the connection",
	"57P03": "the server is starting or stopping: wait",
	"25P03": "the transaction was idle for too long, for example because the process was stopped, and PostgreSQL ended it",
	"42P05": "prepared statements do not work behind this pooler: remove default_query_exec_mode from the URL",
	"26000": "prepared statements do not work behind this pooler: remove default_query_exec_mode from the URL",
	"08P01": "the pooler refuses a request of orgkeys: docs/operations.md has a working pgbouncer.ini",
}

// explain adds to a driver's error what it means and what to do.
func explain(err error) error {
	if failure, ok := errors.AsType[*pgconn.PgError](err); ok {
		if text := advice[failure.Code]; text != "" {
			return fmt.Errorf("%w: %s", err, text)
		}
		return err
	}
	if _, ok := errors.AsType[*pgconn.ConnectError](err); ok && pgconn.Timeout(err) {
		return fmt.Errorf("%w: PostgreSQL accepted no connection within %s: is it running, and, behind a pooler, is a server connection free (pool sizes in docs/operations.md)?", err, connectTimeout)
	}
	if errors.Is(err, driver.ErrBadConn) {
		return fmt.Errorf("%w: PostgreSQL, or a pooler, closed the connection while it was in use (a restart, a failover, a time limit)", err)
	}
	return err
}
