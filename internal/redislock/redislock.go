// Package redislock is the quota lock of several replicas, on Redis.
//
// It keeps concurrent reservations of one organization in order, so that they
// do not collide in the database. It decides nothing: a lock that expires
// during a pause, or that a failover forgets, may be granted twice, and one
// that cannot be had is done without. The database's constraint holds the
// quota in every case.
package redislock

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net/url"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

const (
	life         = 5 * time.Second // of a lock whose holder died; holders need milliseconds
	dialTimeout  = time.Second
	ioTimeout    = 500 * time.Millisecond
	firstWait    = 5 * time.Millisecond // before a taken lock is tried again; doubles, with jitter
	longestWait  = 80 * time.Millisecond
	respite      = time.Second // how long a Redis that failed is left alone
	releaseLimit = time.Second
)

// release deletes a lock only for the holder of its token.
var release = redis.NewScript(`if redis.call("GET", KEYS[1]) == ARGV[1] then return redis.call("DEL", KEYS[1]) else return 0 end`)

// Lock is a Locker on Redis.
type Lock struct {
	client redis.UniversalClient

	mu      sync.Mutex
	failed  time.Time // when Redis last failed
	failure error
}

var _ orgkey.Locker = (*Lock)(nil)

// ErrResting: Redis failed a moment ago and is left alone.
var ErrResting = errors.New("the Redis server failed a moment ago")

// Open reads a URL of one of go-redis' forms: redis://[user:password@]host:port[/db]
// (rediss:// for TLS), with ?addr=host:port&… further nodes of a cluster, or
// with ?master_name=NAME&addr=… sentinels. It does not connect.
func Open(location string) (*Lock, error) {
	client, err := newClient(location)
	if err != nil {
		// go-redis' own text may repeat the URL with its password.
		return nil, errors.New("the Redis URL cannot be read: it has the form redis://[user:password@]host:port[/db], or rediss:// for TLS")
	}
	return &Lock{client: client}, nil
}

func newClient(location string) (redis.UniversalClient, error) {
	redis.SetLogger(silent{}) // it would write to standard error whatever fails; errors are returned too
	parsed, err := url.Parse(location)
	if err != nil {
		return nil, err
	}
	switch query := parsed.Query(); {
	case query.Has("master_name"):
		o, err := redis.ParseFailoverURL(location)
		if err != nil {
			return nil, err
		}
		o.DialTimeout, o.ReadTimeout, o.WriteTimeout, o.MaxRetries, o.DialerRetries = dialTimeout, ioTimeout, ioTimeout, -1, 1
		return redis.NewFailoverClient(o), nil
	case query.Has("addr"):
		o, err := redis.ParseClusterURL(location)
		if err != nil {
			return nil, err
		}
		o.DialTimeout, o.ReadTimeout, o.WriteTimeout, o.MaxRetries, o.DialerRetries = dialTimeout, ioTimeout, ioTimeout, -1, 1
		return redis.NewClusterClient(o), nil
	default:
		o, err := redis.ParseURL(location)
		if err != nil {
			return nil, err
		}
		o.DialTimeout, o.ReadTimeout, o.WriteTimeout, o.MaxRetries, o.DialerRetries = dialTimeout, ioTimeout, ioTimeout, -1, 1
		return redis.NewClient(o), nil
	}
}

type silent struct{}

func (silent) Printf(context.Context, string, ...any) {}

// Close closes the connections.
func (l *Lock) Close() error { return l.client.Close() }

// Healthy reports whether Redis answers.
func (l *Lock) Healthy(ctx context.Context) error { return l.client.Ping(ctx).Err() }

// Lock implements orgkey.Locker.
func (l *Lock) Lock(ctx context.Context, org string) (func(), error) {
	if err := l.resting(); err != nil {
		return nil, err
	}
	key, token := "orgkeys:quota:{"+org+"}", rand.Text()
	for wait := firstWait; ; wait = min(2*wait, longestWait) {
		ok, err := l.client.SetNX(ctx, key, token, life).Result()
		if err != nil {
			return nil, l.fail(ctx, err)
		}
		if ok {
			return func() { l.release(ctx, key, token) }, nil
		}
		select {
		case <-time.After(wait/2 + mathrand.N(wait)):
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for the quota lock: %w", ctx.Err())
		}
	}
}

// release gives the lock back; one that cannot be given back expires.
func (l *Lock) release(ctx context.Context, key, token string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseLimit)
	defer cancel()
	if err := release.Run(ctx, l.client, []string{key}, token).Err(); err != nil {
		_ = l.fail(ctx, err)
	}
}

func (l *Lock) resting() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Since(l.failed) < respite {
		return fmt.Errorf("%w: %w", ErrResting, l.failure)
	}
	return nil
}

// fail notes Redis' failure, so that the next requests do not wait for it too.
func (l *Lock) fail(ctx context.Context, err error) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return ctx.Err() // the caller's doing, not Redis'
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failed, l.failure = time.Now(), err
	return err
}
