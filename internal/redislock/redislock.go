// Package redislock is the quota lock of several replicas, on Redis.
//
// It keeps concurrent reservations of one organization in order, so that they
// do not collide in the database. It decides nothing: a lock that expires
// during a pause, or that a failover forgets, may be granted twice, and
// without a lock requests continue. The database's constraint holds the
// quota in every case.
package redislock

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"net/url"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"

	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/privatefile"
)

const (
	life         = 5 * time.Second // of a lock whose holder died; holders need milliseconds
	dialTimeout  = time.Second
	ioTimeout    = 500 * time.Millisecond
	firstWait    = 5 * time.Millisecond // before a taken lock is tried again; doubles, with jitter
	longestWait  = 80 * time.Millisecond
	respite      = time.Second // how long a Redis that failed is not asked
	releaseLimit = time.Second
	quiet        = time.Minute // between warnings that locks are not available

	maxKeyFile = 64 << 10

	maxAuthorities = 1 << 20 // bytes of a file of authorities

	prefix = "orgkeys:quota:"
	probe  = prefix + "{.probe}:" // no organization's: their IDs begin with a letter or digit
)

// Outcomes of asking for a lock, and of giving it back.
const (
	held        = "held"
	timeout     = "timeout"     // another held it for longer than the caller waits
	unavailable = "unavailable" // Redis failed, or did so a moment ago
	unreleased  = "unreleased"  // it was held, and stays until it expires
)

// release deletes a lock only for the holder of its token.
var release = redis.NewScript(`if redis.call("GET", KEYS[1]) == ARGV[1] then return redis.call("DEL", KEYS[1]) else return 0 end`)

// Lock is a Locker on Redis.
type Lock struct {
	client    redis.UniversalClient
	encrypted bool
	log       *slog.Logger
	outcomes  *prometheus.CounterVec

	mu      sync.Mutex
	failed  time.Time // when Redis last failed
	failure error
	warned  time.Time
}

var _ orgkey.Locker = (*Lock)(nil)

// ErrResting: Redis failed a moment ago and is not asked.
var ErrResting = errors.New("the Redis server failed a moment ago")

// Errors of Healthy about a Redis that answers but grants no lock.
var (
	ErrLogin      = errors.New("the Redis server refuses the user or the password")
	ErrPermission = errors.New("the Redis user lacks a right that the lock needs")
	ErrReadOnly   = errors.New("the Redis server is a read-only replica")
	ErrMoved      = errors.New("the Redis server is a node of a cluster and does not hold the lock's keys")
	ErrMemory     = errors.New("the Redis server's memory is full")
	ErrTLS        = errors.New("the TLS connection to the Redis server fails")
)

// Commands are what Redis' access control list must allow, on keys that begin
// with orgkeys:quota:, with a server, sentinels or a cluster.
const Commands = "+set +get +del +eval +evalsha +hello +cluster|slots +command"

// Config says how Redis is reached.
type Config struct {
	URL      string // see Open
	CAFile   string // authorities of its certificate, PEM; empty: the system's
	CertFile string // a client certificate, PEM; empty: none
	KeyFile  string // its key
}

// Open reads a URL of one of go-redis' forms: redis://[user:password@]host:port[/db]
// (rediss:// for TLS), with ?addr=host:port&… further nodes of a cluster, or
// with ?master_name=NAME&addr=… sentinels. It does not connect.
func Open(c Config, log *slog.Logger) (*Lock, error) {
	trust, err := c.tls()
	if err != nil {
		return nil, err
	}
	client, err := newClient(c.URL, trust)
	if err != nil {
		// go-redis' own text may repeat the URL with its password.
		return nil, errors.New("ORGKEYS_REDIS_URL cannot be read: it has the form redis://[user:password@]host:port[/db], or rediss:// for TLS, with ?addr=host:port… for a cluster, with ?master_name=NAME&addr=host:port… for sentinels")
	}
	outcomes := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "orgkeys_quota_lock_total", Help: "Outcomes of quota locks on Redis.",
	}, []string{"outcome"})
	for _, outcome := range []string{held, timeout, unavailable, unreleased} {
		outcomes.WithLabelValues(outcome) // shown from the start, as 0
	}
	return &Lock{client: client, encrypted: strings.HasPrefix(c.URL, "rediss://"), log: log, outcomes: outcomes}, nil
}

// tls adds authorities and a client certificate to what a rediss:// URL says.
func (c Config) tls() (func(*tls.Config), error) {
	var roots *x509.CertPool
	if c.CAFile != "" {
		text, err := privatefile.Read(c.CAFile, maxAuthorities, privatefile.Everybody)
		if err != nil {
			return nil, fmt.Errorf("reading the authorities for Redis: %w", err)
		}
		roots = x509.NewCertPool()
		if !roots.AppendCertsFromPEM(text) {
			return nil, fmt.Errorf("reading the authorities for Redis: no certificate in %s", c.CAFile)
		}
	}
	var own []tls.Certificate
	if c.CertFile != "" {
		key, err := privatefile.Read(c.KeyFile, maxKeyFile, privatefile.Group)
		if err != nil {
			return nil, fmt.Errorf("reading the key of the client certificate for Redis: %w", err)
		}
		defer clear(key)
		chain, err := os.ReadFile(c.CertFile)
		if err != nil {
			return nil, fmt.Errorf("reading the client certificate for Redis: %w", err)
		}
		pair, err := tls.X509KeyPair(chain, key)
		if err != nil {
			return nil, fmt.Errorf("reading the client certificate for Redis: %w", err)
		}
		own = []tls.Certificate{pair}
	}
	return func(t *tls.Config) {
		if t != nil { // rediss://
			// go-redis sets the first node's name, and would check it for all nodes.
			t.MinVersion, t.RootCAs, t.Certificates, t.ServerName = tls.VersionTLS12, roots, own, ""
		}
	}, nil
}

func newClient(location string, trust func(*tls.Config)) (redis.UniversalClient, error) {
	redis.SetLogger(silent{}) // it would write to standard error whatever fails; errors are returned too
	parsed, err := url.Parse(location)
	if err != nil {
		return nil, err
	}
	switch query := parsed.Query(); {
	case query.Has("master_name"):
		return newFailoverClient(location, query.Has("username") || query.Has("password"), trust)
	case query.Has("addr"):
		return newClusterClient(location, trust)
	}
	o, err := redis.ParseURL(location)
	if err != nil {
		return nil, err
	}
	o.DialTimeout, o.ReadTimeout, o.WriteTimeout, o.MaxRetries, o.DialerRetries = dialTimeout, ioTimeout, ioTimeout, -1, 1
	o.DisableIdentity, o.MaintNotificationsConfig = true, unmaintained()
	trust(o.TLSConfig)
	return redis.NewClient(o), nil
}

// unmaintained keeps the client from asking about a managed server's maintenance, as
// DisableIdentity keeps it from naming itself: old servers lack these commands, and each
// would need one more right.
func unmaintained() *maintnotifications.Config {
	return &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
}

func newClusterClient(location string, trust func(*tls.Config)) (redis.UniversalClient, error) {
	o, err := redis.ParseClusterURL(location)
	if err != nil {
		return nil, err
	}
	o.DialTimeout, o.ReadTimeout, o.WriteTimeout, o.MaxRetries, o.DialerRetries = dialTimeout, ioTimeout, ioTimeout, -1, 1
	o.DisableIdentity, o.MaintNotificationsConfig = true, unmaintained()
	trust(o.TLSConfig)
	return redis.NewClusterClient(o), nil
}

// newFailoverClient asks sentinels for the primary. go-redis uses the URL's user for
// the sentinels. Here it is the primary's, as without sentinels, unless the primary's is
// given separately.
func newFailoverClient(location string, separate bool, trust func(*tls.Config)) (redis.UniversalClient, error) {
	o, err := redis.ParseFailoverURL(location)
	if err != nil {
		return nil, err
	}
	o.DialTimeout, o.ReadTimeout, o.WriteTimeout, o.MaxRetries, o.DialerRetries = dialTimeout, ioTimeout, ioTimeout, -1, 1
	o.DisableIdentity = true
	if !separate {
		o.Username, o.Password, o.SentinelUsername, o.SentinelPassword = o.SentinelUsername, o.SentinelPassword, "", ""
	}
	trust(o.TLSConfig)
	return redis.NewFailoverClient(o), nil
}

type silent struct{}

func (silent) Printf(context.Context, string, ...any) {}

// Close closes the connections.
func (l *Lock) Close() error { return l.client.Close() }

// Outcomes counts the outcomes of locks.
func (l *Lock) Outcomes() prometheus.Collector { return l.outcomes }

// Healthy reports whether a lock can be taken and released.
func (l *Lock) Healthy(ctx context.Context) error {
	token := rand.Text()
	key := probe + token
	err := l.client.SetNX(ctx, key, token, life).Err()
	if err == nil {
		err = release.Run(ctx, l.client, []string{key}, token).Err()
	}
	switch {
	case err == nil:
		return nil
	case redis.IsAuthError(err):
		return fmt.Errorf("%w: %w", ErrLogin, err)
	case redis.IsPermissionError(err), redis.HasErrorPrefix(err, "The user executing the script can't"): // NOPERM within a script
		return fmt.Errorf("%w: %w", ErrPermission, err)
	case redis.IsReadOnlyError(err):
		return fmt.Errorf("%w: %w", ErrReadOnly, err)
	case redis.HasErrorPrefix(err, "MOVED "), redis.HasErrorPrefix(err, "ASK "), redis.HasErrorPrefix(err, "CLUSTERDOWN"):
		return fmt.Errorf("%w: %w", ErrMoved, err)
	case redis.IsOOMError(err):
		return fmt.Errorf("%w: %w", ErrMemory, err)
	case l.tlsMismatch(err):
		return fmt.Errorf("%w: %w", ErrTLS, err)
	default:
		return err
	}
}

// tlsMismatch reports whether one side speaks TLS and the other does not, or one
// does not accept the other's certificate.
func (l *Lock) tlsMismatch(err error) bool {
	if _, ok := errors.AsType[tls.AlertError](err); ok {
		return true
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return true
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return true
	}
	// A server that requires TLS closes a connection that begins without it.
	return !l.encrypted && (errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET)) ||
		l.encrypted && strings.Contains(err.Error(), "remote error: tls:") // net.OpError hides the alert
}

// Lock implements orgkey.Locker.
func (l *Lock) Lock(ctx context.Context, org org.ID) (func(), error) {
	if err := l.resting(); err != nil {
		l.count(unavailable)
		return nil, err
	}
	key, token := prefix+"{"+string(org)+"}", rand.Text()
	answered := false
	for wait := firstWait; ; wait = min(2*wait, longestWait) {
		ok, err := l.client.SetNX(ctx, key, token, life).Result()
		if err != nil && answered && ctx.Err() != nil { // the caller's time is up, and Redis did not fail
			return nil, l.late(ctx)
		}
		if err != nil {
			return nil, l.fail(ctx, unavailable, err)
		}
		if ok {
			l.count(held)
			return func() { l.release(ctx, key, token) }, nil
		}
		answered = true
		select {
		case <-time.After(wait/2 + mathrand.N(wait)):
		case <-ctx.Done():
			return nil, l.late(ctx)
		}
	}
}

func (l *Lock) late(ctx context.Context) error {
	l.count(timeout)
	return fmt.Errorf("waiting for the quota lock: %w", ctx.Err())
}

// release gives the lock back; one that cannot be given back expires.
func (l *Lock) release(ctx context.Context, key, token string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseLimit)
	defer cancel()
	if err := release.Run(ctx, l.client, []string{key}, token).Err(); err != nil {
		_ = l.fail(ctx, unreleased, err)
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
func (l *Lock) fail(ctx context.Context, outcome string, err error) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return ctx.Err() // the caller's doing, not Redis'
	}
	l.count(outcome)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failed, l.failure = time.Now(), err
	if time.Since(l.warned) > quiet {
		l.warned = l.failed
		l.log.Warn("quota locks on Redis are not available; requests continue without them", "outcome", outcome, "error", err)
	}
	return err
}

func (l *Lock) count(outcome string) { l.outcomes.WithLabelValues(outcome).Inc() }
