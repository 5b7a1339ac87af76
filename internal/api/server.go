package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"time"
)

// Every time limit and bound of the listeners, and of this package.
const (
	readHeaderTimeout = 5 * time.Second  // for a request's headers, and for a TLS handshake
	readTimeout       = 10 * time.Second // for a whole request, body included
	idleTimeout       = 60 * time.Second // between requests of a connection
	releaseTimeout    = 5 * time.Second  // for writing a private key out
	secretsTimeout    = 15 * time.Second // for writing boot secrets out, which may be 6 MB
	answerTime        = 40 * time.Second // what a request may take beyond the generation deadline: a withdrawal (30 s) and its answer

	checkTimeout  = 2 * time.Second // for a round of readiness checks
	checkInterval = time.Second     // between rounds

	maxHeader      = 16 << 10      // a request's headers
	readHeader     = 2 * maxHeader // what net/http reads of them, so that most that are too large get an answer of ours
	maxStreams     = 16            // concurrent requests on an HTTP/2 connection
	maxConnections = 4096          // of a listener; further ones wait to be accepted
	maxReading     = 1024          // requests whose body is read before anybody vouches for them; further ones are 503
)

// ServerConfig configures a listener.
type ServerConfig struct {
	Address string // host:port
	TLS     TLSFiles
	Proxies Proxies
	// GenerationDeadline is how long generating a key may take; a response may
	// take that and answerTime.
	GenerationDeadline time.Duration
	Log                *slog.Logger
}

// Errors of CheckTransport.
var (
	ErrPlaintext   = errors.New("a listener that is not loopback needs ORGKEYS_TLS_CERT_FILE and ORGKEYS_TLS_KEY_FILE, or ORGKEYS_TLS_BY_PROXY=true with ORGKEYS_TRUSTED_PROXIES")
	ErrTLSFiles    = errors.New("ORGKEYS_TLS_CERT_FILE and ORGKEYS_TLS_KEY_FILE belong together, and ORGKEYS_TLS_CLIENT_CA_FILE needs both")
	ErrTwoTLS      = errors.New("ORGKEYS_TLS_BY_PROXY=true means that a proxy terminates TLS, but ORGKEYS_TLS_CERT_FILE means that the service does: unset one")
	ErrNoProxies   = errors.New("ORGKEYS_TLS_BY_PROXY=true needs ORGKEYS_TRUSTED_PROXIES; otherwise every client could claim to use TLS")
	ErrTrustingAll = errors.New("ORGKEYS_TRUSTED_PROXIES has a network that is wider than the private networks 10.0.0.0/8 and fc00::/7")
)

// CheckTransport refuses an unsafe transport. It checks the settings only; Listen calls
// it, and also checks the actual address.
func CheckTransport(c ServerConfig) error {
	for _, p := range c.Proxies.Trusted {
		if !p.IsValid() || p.Addr().Is4() && p.Bits() < 8 || p.Addr().Is6() && p.Bits() < 7 {
			return ErrTrustingAll
		}
	}
	switch {
	case (c.TLS.Cert == "") != (c.TLS.Key == ""), c.TLS.ClientCA != "" && c.TLS.Cert == "":
		return ErrTLSFiles
	case c.Proxies.TLS && c.TLS.Cert != "":
		return ErrTwoTLS
	case c.Proxies.TLS && len(c.Proxies.Trusted) == 0:
		return ErrNoProxies
	}
	host, _, err := net.SplitHostPort(c.Address)
	if err != nil {
		return fmt.Errorf("listen address %q: %w", c.Address, err)
	}
	if host == "localhost" {
		return nil // Listen checks the address it resolves to
	}
	ip, err := netip.ParseAddr(host)
	return c.checkPlaintext(err == nil && ip.Unmap().IsLoopback())
}

func (c ServerConfig) checkPlaintext(loopback bool) error {
	if loopback || c.TLS.Cert != "" || c.Proxies.TLS {
		return nil
	}
	return fmt.Errorf("%w (the address is %s)", ErrPlaintext, c.Address)
}

// Server is a bound listener and the HTTP server for it.
type Server struct {
	listener *fairListener
	server   *http.Server
}

// Listen binds c's address and makes ready to serve h on it, or refuses what
// CheckTransport refuses.
func Listen(c ServerConfig, h http.Handler) (*Server, error) {
	if err := CheckTransport(c); err != nil {
		return nil, err
	}
	s := &Server{server: newServer(c)}
	if c.TLS.Cert != "" {
		certs, err := openCertificates(c.TLS, c.Log)
		if err != nil {
			return nil, err
		}
		s.server.TLSConfig = certs.config()
	}
	listener, err := net.Listen("tcp", c.Address)
	if err != nil {
		return nil, fmt.Errorf("listening: %w", err)
	}
	at, ok := listener.Addr().(*net.TCPAddr)
	if err := c.checkPlaintext(ok && at.IP.IsLoopback()); err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	s.listener = newFairListener(listener, maxConnections, c.Proxies.Shared)
	s.server.Handler = s.listener.closing(h)
	return s, nil
}

func newServer(c ServerConfig) *http.Server {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true) // over TLS only
	return &http.Server{
		DisableGeneralOptionsHandler: true, // OPTIONS * is a wrong method like any other
		ReadHeaderTimeout:            readHeaderTimeout,
		ReadTimeout:                  readTimeout,
		WriteTimeout:                 c.GenerationDeadline + answerTime,
		IdleTimeout:                  idleTimeout,
		MaxHeaderBytes:               readHeader,
		Protocols:                    &protocols,
		HTTP2:                        &http.HTTP2Config{MaxConcurrentStreams: maxStreams},
		ErrorLog:                     slog.NewLogLogger(c.Log.Handler(), slog.LevelWarn),
	}
}

// Addr is the address that the listener got.
func (s *Server) Addr() net.Addr { return s.listener.Addr() }

// Serve accepts connections until Shutdown, and then returns nil.
func (s *Server) Serve() error {
	var err error
	if s.server.TLSConfig != nil {
		err = s.server.ServeTLS(s.listener, "", "")
	} else {
		err = s.server.Serve(s.listener)
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// Shutdown stops accepting and waits until requests in progress have ended. When ctx
// ends first, it aborts them and returns ctx's error.
func (s *Server) Shutdown(ctx context.Context) error {
	err := s.server.Shutdown(ctx)
	if err != nil {
		err = errors.Join(err, s.server.Close())
	}
	return err
}
