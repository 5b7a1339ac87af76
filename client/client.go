// Package client is the Go client of the orgkeys API, for bridge nodes and for
// administrators.
//
// # Nodes
//
// A [Node] speaks for one node. It signs each request with the private key that
// its organization was given, so it needs no token:
//
//	c, err := client.New(client.Config{Server: "https://orgkeys.example"})
//	key, err := client.ParsePrivateKey(pem)
//	node := client.Node{Client: c, Org: "acme", IP: "192.0.2.7", Region: "eu", Key: key}
//	secrets, err := node.Secrets(ctx)
//	err = node.Register(ctx, client.Registration{Version: "1.0", Status: "active"})
//
// The key is any [PrivateKey], so it may live in a TPM or another device. An
// [Enrollment] fetches it at the first boot, with a one-time token.
//
// # Administrators
//
// A [Client] with a Token has the administrators' methods: [Client.GenerateKey],
// [Client.Keys], [Client.DeleteKey] and the others. The token decides what they may do.
//
// # Errors
//
// There are three kinds, told apart with errors.Is and errors.As:
//
//   - The server refused: [*Error], with the stable code that the API calls
//     errorCode. Each [Code] is an error too: errors.Is(err, client.QuotaExceeded).
//   - Something else answered, such as a captive portal, an ingress without
//     routes or a proxy: [*ForeignError]. Nothing can be concluded from what it
//     says about the key or the organization.
//   - There was no answer: the error of net/http.
//
// A private key in a device may fail before there is a request, or after the answer:
// [ErrKeyFailed].
//
// Sealed keys are verified before any part of them is used: [ErrForged] and
// [ErrSealedDamaged] come with a [*ForeignError], since something in between made or
// changed the answer; [ErrSealedUseless] is final.
//
// [Temporary] reports whether the same call may succeed later without anybody
// changing anything here. Only the server's own codes are ever final.
//
// # Retries
//
// [Retry] says how long to repeat a failed call. Pauses grow, and follow the server's
// Retry-After. Its zero value makes one attempt. A call that
// changes something is repeated only where a repetition is harmless.
// [Client.GenerateKey] is repeated only after an answer that says that no key was made.
//
// # Secrets in memory
//
// Private keys and boot secrets are []byte, never string. Whoever receives one
// clears it (with the built-in clear) after use. The package keeps no copy of its own.
//
// # Compatibility
//
// The package follows semantic versioning, together with the module: within a
// major version nothing exported is removed or changes its meaning. Structs gain
// fields, so write literals with field names. Servers may send codes and fields
// that this version does not know; it passes codes on and ignores fields.
package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"syscall"
	"time"
)

// Limits of one attempt.
const (
	defaultAttempt = 30 * time.Second // for a request and its whole answer
	connectTimeout = 10 * time.Second // for a connection, and for its TLS handshake
	maxHeaders     = 64 << 10         // bytes of an answer's headers
	maxAnswer      = 64 << 10         // bytes of an answer without a list in it
	maxList        = 256 << 20        // bytes of an answer with a list in it: of 100,000 node keys, at most 2.5 kB each
)

// Config says which server to ask and how. Only Server is required.
type Config struct {
	// Server is the server's URL, as https://host, https://host:port or with a
	// path in front of the API's own. http is for loopback addresses only.
	Server string
	// Token returns the bearer token of an administrator, for each attempt anew.
	// Nodes need none.
	Token func(context.Context) (string, error)
	// RootCAs are the authorities to trust; nil means the system's.
	RootCAs *x509.CertPool
	// Certificate is for servers that ask clients for one.
	Certificate *tls.Certificate
	// Retry says how long to repeat a call after a temporary failure.
	Retry Retry
	// Attempt bounds one request with its answer; 0 means 30 seconds.
	Attempt time.Duration
	// UserAgent is sent with each request; "orgkeys-client" if empty.
	UserAgent string
	// Transport replaces the HTTP transport that New makes, with its limits and
	// RootCAs and Certificate. It tells net/http/httptrace of connections, as an
	// http.Transport does; else a deletion whose answer was lost is not known as done.
	Transport http.RoundTripper
}

// Client asks one server. It is safe for concurrent use. New makes one.
type Client struct {
	config Config
	base   string
	reason string // of deletions, as a query
	http   *http.Client
}

// ErrServer means that Config.Server is not a URL that requests may be sent to.
var ErrServer = errors.New("not the URL of a server")

// New returns a client. It does not ask the server anything.
func New(c Config) (*Client, error) {
	base, err := parseServer(c.Server)
	if err != nil {
		return nil, err
	}
	if c.Attempt <= 0 {
		c.Attempt = defaultAttempt
	}
	if c.UserAgent == "" {
		c.UserAgent = "orgkeys-client"
	}
	if c.Transport == nil {
		c.Transport = transport(c, base)
	}
	return &Client{config: c, base: base.String(), http: &http.Client{
		Transport: c.Transport,
		// A redirect comes from something in between: the API has none.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// CloseIdleConnections closes connections that are kept for later requests. The
// server limits their number, and another client may need one.
func (c *Client) CloseIdleConnections() { c.http.CloseIdleConnections() }

// parseServer refuses to send secrets or signatures over a network in the clear.
func parseServer(server string) (*url.URL, error) {
	u, err := url.Parse(server)
	if err != nil || u.Host == "" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" {
		return nil, fmt.Errorf("%w: %q is not of the form https://host or https://host:port", ErrServer, server)
	}
	u.Path = strings.TrimRight(u.Path, "/")
	switch u.Scheme {
	case "https":
		return u, nil
	case "http":
		addr, err := netip.ParseAddr(u.Hostname())
		if u.Hostname() == "localhost" || (err == nil && addr.Unmap().IsLoopback()) {
			return u, nil
		}
	}
	return nil, fmt.Errorf("%w: %q is not https, and http is accepted for loopback addresses only", ErrServer, server)
}

func transport(c Config, base *url.URL) *http.Transport {
	dialer := &net.Dialer{Timeout: connectTimeout}
	t := &http.Transport{
		Proxy: http.ProxyFromEnvironment, DialContext: dialer.DialContext,
		TLSClientConfig:     &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: c.RootCAs},
		TLSHandshakeTimeout: connectTimeout, IdleConnTimeout: 30 * time.Second,
		ForceAttemptHTTP2: true, DisableCompression: true, MaxResponseHeaderBytes: maxHeaders,
	}
	if c.Certificate != nil {
		t.TLSClientConfig.Certificates = []tls.Certificate{*c.Certificate}
	}
	if base.Scheme == "http" {
		t.Proxy = nil
		dialer.Control = loopbackOnly
	}
	return t
}

// loopbackOnly refuses a name that resolves to another machine.
func loopbackOnly(_, address string, _ syscall.RawConn) error {
	at, err := netip.ParseAddrPort(address)
	if err != nil || !at.Addr().Unmap().IsLoopback() {
		return fmt.Errorf("%w: the http URL leads to %s, which is not a loopback address", ErrServer, address)
	}
	return nil
}
