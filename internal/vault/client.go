// Package vault is the production back end. Transit makes the organizations'
// keys and seals what is stored, and Vault's audit device acknowledges every
// audit event before a private key leaves.
//
// What it uses in Vault is set up by vault/setup and allowed by
// vault/service.hcl and vault/reaper.hcl, five mounts each with one purpose:
//
//	orgkeys/         Transit; each key lives there from Create to Destroy only, or waits in the pool before
//	orgkeys-sealed/  Transit; keys that leave it only wrapped, and their recipients
//	orgkeys-seal/    Transit; the key "seal" from which a key per binding is derived
//	orgkeys-audit/   Transit; the key "receipt" that signs audit events
//	orgkeys-state/   KV version 2; one entry, the newest checkpoint
//
// Every call to Vault here may be sent twice, but those that make or import
// what a sealed key needs. A call that failed with a 5xx or
// a broken connection is repeated once, and one that was refused because the
// token had ended is repeated after logging in again. That is harmless:
// reading is; configuring, deleting and writing the checkpoint come out the
// same; sealing and signing leave nothing behind but an audit entry; and a key
// is created under a name that was never used before, so that a repeated
// creation answers with the very key that the first one made.
package vault

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-retryablehttp"
	"github.com/hashicorp/vault/api"
)

const (
	keysMount   = "orgkeys"
	sealedMount = "orgkeys-sealed"
	sealMount   = "orgkeys-seal"
	auditMount  = "orgkeys-audit"
	stateMount  = "orgkeys-state"

	sealKey       = sealMount + "/keys/seal"
	receiptKey    = auditMount + "/keys/receipt"
	checkpoint    = stateMount + "/data/checkpoint"
	idleConns     = 64
	minRetryWait  = 50 * time.Millisecond
	maxRetryWait  = 150 * time.Millisecond
	maxBody       = 64 << 20
	correlationID = "X-Correlation-Id"
)

// Config says how Vault is reached and how to log in. The address, CA,
// namespace and the like are the Vault client's own environment variables.
type Config struct {
	// Address is Vault's URL; VAULT_AGENT_ADDR or VAULT_ADDR when empty.
	Address string
	// Login is how a token is had: AppRole or TokenFile.
	Login Login
	// CallTimeout bounds one call, its repetition included; 5 s when zero.
	CallTimeout time.Duration
	// ReapGrace is the age below which Reap leaves a key alone; 5 min when zero.
	ReapGrace time.Duration
	// BlankAge is how long a blank stays in the place of a key that was deleted; six times
	// CallTimeout when zero. See remove.
	BlankAge time.Duration
	// Live is which keys Check takes for needed; none when nil.
	Live Live
	// Traces are where else Reap looks for what a crash left; nowhere when nil.
	Traces Traces
	// Log receives logins and their failures; slog.Default() when nil.
	Log *slog.Logger
}

// Client is a connection to Vault that stays logged in. Its back ends are
// Keystore, Sealer and Sink.
type Client struct {
	config     Config
	log        *slog.Logger
	base       *api.Client // without a token
	current    atomic.Pointer[session]
	login      chan struct{} // held by the one that logs in
	failure    failure       // guarded by login
	stop       context.CancelFunc
	stopped    chan struct{}
	auditCheck auditCheck
	cacheCheck cacheCheck

	abandoned sync.WaitGroup // removals under way in the background
	doubts    doubts
}

// ErrInsecure: the client's settings would send tokens and keys where others
// can read them.
var ErrInsecure = errors.New("connection to Vault would not be protected")

// Open checks the settings, logs in, and keeps the login alive until Close. A
// Vault that cannot be asked right now is no error: the calls report
// orgkey.ErrUnavailable until it can, and Check says why. A login that Vault
// refuses is an error that wraps ErrLogin.
func Open(ctx context.Context, config Config) (*Client, error) {
	if config.CallTimeout == 0 {
		config.CallTimeout = 5 * time.Second
	}
	if config.ReapGrace == 0 {
		config.ReapGrace = 5 * time.Minute
	}
	if config.BlankAge == 0 {
		config.BlankAge = blankAge * config.CallTimeout
	}
	if config.Log == nil {
		config.Log = slog.Default()
	}
	base, err := newAPI(config)
	if err != nil {
		return nil, err
	}
	if config.Login == nil {
		return nil, fmt.Errorf("%w: no way to log in is configured", ErrLogin)
	}
	if err := config.Login.check(); err != nil {
		return nil, err
	}
	background, stop := context.WithCancel(context.Background())
	c := &Client{
		config: config, log: config.Log, base: base, login: make(chan struct{}, 1),
		stop: stop, stopped: make(chan struct{}),
	}
	if _, err := c.replace(ctx, nil); errors.Is(err, ErrLogin) {
		stop()
		return nil, fmt.Errorf("%w: %s", err, loginRemedy(err))
	}
	go c.stayLoggedIn(background)
	return c, nil
}

// Close finishes what is under way in the background, ends the login, revokes a token of its own, and closes idle connections.
func (c *Client) Close() {
	c.abandoned.Wait()
	c.stop()
	<-c.stopped
	if s := c.current.Load(); s != nil && s.secret != nil {
		ctx, cancel := context.WithTimeout(context.Background(), c.config.CallTimeout)
		defer cancel()
		if _, err := c.send(ctx, s, request{method: http.MethodPut, path: "auth/token/revoke-self"}); err != nil {
			c.log.Warn("revoking the token", "error", err)
		}
	}
	c.base.CloneConfig().HttpClient.CloseIdleConnections()
}

func newAPI(config Config) (*api.Client, error) {
	settings := api.DefaultConfig()
	if settings.Error != nil {
		return nil, fmt.Errorf("reading the Vault client's settings: %w", settings.Error)
	}
	if config.Address != "" {
		settings.Address, settings.AgentAddress = config.Address, ""
	}
	transport := settings.HttpClient.Transport.(*http.Transport)
	if err := checkProtected(cmp.Or(settings.AgentAddress, settings.Address), transport); err != nil {
		return nil, err
	}
	// HTTP/1.1 only. With HTTP/2 all calls share one connection, and when its
	// peer vanishes they all wait for the same timeout again and again.
	transport.Protocols = new(http.Protocols)
	transport.Protocols.SetHTTP1(true)
	transport.TLSNextProto = nil
	transport.ForceAttemptHTTP2 = false
	transport.TLSClientConfig.NextProtos = nil
	transport.MaxIdleConns = 2 * idleConns
	transport.MaxIdleConnsPerHost = idleConns
	settings.MaxRetries = 1
	settings.MinRetryWait = minRetryWait
	settings.MaxRetryWait = maxRetryWait
	settings.Backoff = retryablehttp.LinearJitterBackoff
	settings.CheckRetry = again
	// The client's own timeout would cancel a raw call's context before its
	// body is read. Every call here brings its own deadline.
	settings.Timeout = 0
	client, err := api.NewClient(settings)
	if err != nil {
		return nil, fmt.Errorf("making the Vault client: %w", err)
	}
	client.ClearToken() // VAULT_TOKEN would be used instead of the configured login
	client.SetCloneHeaders(true)
	client.SetWrappingLookupFunc(unwrapped)
	return client, nil
}

func checkProtected(address string, transport *http.Transport) error {
	if transport.TLSClientConfig.InsecureSkipVerify {
		return fmt.Errorf("%w: unset VAULT_SKIP_VERIFY and name Vault's CA in VAULT_CACERT", ErrInsecure)
	}
	u, err := url.Parse(address)
	if err != nil {
		return fmt.Errorf("reading Vault's address: %w", err)
	}
	if u.Scheme != "http" {
		return nil
	}
	if u.Hostname() != "localhost" && !net.ParseIP(u.Hostname()).IsLoopback() {
		return fmt.Errorf("%w: Vault's address %s is not https", ErrInsecure, u.Redacted())
	}
	proxy, err := transport.Proxy(&http.Request{URL: u})
	if err != nil {
		return fmt.Errorf("reading the proxy's address: %w", err)
	}
	if proxy != nil {
		return fmt.Errorf("%w: Vault's address %s is not https, and would be asked through the proxy %s: unset VAULT_PROXY_ADDR and VAULT_HTTP_PROXY", ErrInsecure, u.Redacted(), proxy.Redacted())
	}
	return nil
}
