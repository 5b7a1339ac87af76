package doctor

import (
	"context"
	"errors"
	"os"

	"github.com/orgkeys/orgkeys/internal/redislock"
	"github.com/orgkeys/orgkeys/internal/server"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

func (d *doctor) redis(ctx context.Context) {
	if d.cfg.RedisURL == "" {
		return
	}
	const without = "; until then replicas collide more often, but the quota holds"
	lock, err := redislock.Open(server.RedisConfig(d.cfg), d.log)
	if err != nil {
		d.fail("Redis", "correct ORGKEYS_REDIS_URL, or the TLS files", "%v", err)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	switch err := errors.Join(lock.Healthy(ctx), lock.Close()); {
	case err == nil:
		d.ok("Redis", "answers and grants locks")
	case errors.Is(err, redislock.ErrLogin):
		d.warn("Redis", "correct user and password in ORGKEYS_REDIS_URL"+without, "%v", err)
	case errors.Is(err, redislock.ErrPermission):
		d.warn("Redis", "ACL SETUSER … ~orgkeys:quota:* "+redislock.Commands+without, "%v", err)
	case errors.Is(err, redislock.ErrMoved):
		d.warn("Redis", "it is a cluster: name another node in ORGKEYS_REDIS_URL with ?addr=HOST:PORT"+without, "%v", err)
	case errors.Is(err, redislock.ErrMemory):
		d.warn("Redis", "raise maxmemory, or set maxmemory-policy to one that evicts (volatile-ttl)"+without, "%v", err)
	case errors.Is(err, redislock.ErrTLS):
		d.warn("Redis", "use rediss:// exactly if Redis listens with TLS; ORGKEYS_REDIS_CA_FILE names its certificate authority, ORGKEYS_REDIS_CERT_FILE a client certificate if Redis requires one"+without, "%v", err)
	case errors.Is(err, redislock.ErrReadOnly):
		d.warn("Redis", "set ORGKEYS_REDIS_URL to the primary, or to the sentinels that know it"+without, "%v", err)
	default:
		d.warn("Redis", "start Redis, or correct ORGKEYS_REDIS_URL (rediss:// only if Redis listens with TLS)"+without, "it does not answer, or not as expected: %v", err)
	}
}

// database returns the database, or nil if it cannot be used.
func (d *doctor) database(ctx context.Context) *sqlstore.DB {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	location, kind := server.DatabaseLocation(d.cfg), "PostgreSQL"
	if d.cfg.DatabaseURL == "" {
		kind = "SQLite"
		if _, err := os.Stat(location); errors.Is(err, os.ErrNotExist) {
			d.warn("database", "orgkeys serve makes it", "%s does not exist yet", location)
			return nil
		}
	}
	db, err := sqlstore.Open(ctx, location)
	if err != nil {
		d.fail("database", "make sure that it runs, that ORGKEYS_DATABASE_URL is its address, and that its commits are durable", "%v", err)
		return nil
	}
	switch err := db.CheckMigrated(ctx); {
	case errors.Is(err, sqlstore.ErrNotMigrated):
		d.fail("database", "run orgkeys migrate", "%v", err)
		_ = db.Close() // it was only read
		return nil
	case err != nil:
		d.fail("database", "see the database's own log", "%v", err)
		_ = db.Close() // it was only read
		return nil
	}
	if err := db.Healthy(ctx); err != nil {
		d.fail("database", "see the database's own log", "%v", err)
		_ = db.Close() // it was only read
		return nil
	}
	d.ok("database", "%s answers, is migrated, and its commits are durable", kind)
	return db
}
