package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/login"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/privatefile"
)

const maxKeyFile = 64 << 10 // bytes of a client certificate's key

// connection is a server that somebody is logged in to, and where to print.
type connection struct {
	*settings
	*client.Client
	Org      string
	out, log io.Writer
}

// action is what a command does once it is connected.
type action func(ctx context.Context, c *connection, args []string) error

// connected makes a command's RunE of do.
func (s *settings) connected(do action) func(*cobra.Command, []string) error {
	return s.explained(func(cmd *cobra.Command, args []string) error {
		if err := s.load(cmd); err != nil {
			return err
		}
		c, err := s.connect(cmd.Context(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		if err != nil {
			return err
		}
		return do(cmd.Context(), c, args)
	})
}

// explained has do's errors say what they mean to whoever runs the command.
func (s *settings) explained(do func(*cobra.Command, []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		if err := do(cmd, args); err != nil {
			return diagnose(cmd.Context(), s, err)
		}
		return nil
	}
}

func (s *settings) connect(ctx context.Context, out, log io.Writer) (*connection, error) {
	config := client.Config{Server: s.server, UserAgent: "orgkeysctl", Token: s.token, Retry: client.Retry{For: s.wait, Waiting: func(err error, pause time.Duration) {
		fmt.Fprintf(log, "orgkeysctl: %s; trying again in %s\n", oneLine(err.Error()), pause.Round(time.Second/10))
	}}}
	var err error
	if config.RootCAs, err = s.authorities(); err != nil {
		return nil, err
	}
	if config.Certificate, err = s.certificate(); err != nil {
		return nil, err
	}
	if s.server == "" {
		return nil, usage("which server? --server https://… or %s", variable("server"))
	}
	c, err := client.New(config)
	if err != nil {
		return nil, usage("--server: %w", err)
	}
	token, err := s.token(ctx)
	if err != nil {
		return nil, err
	}
	id, err := s.organization(token)
	return &connection{s, c, id, out, log}, err
}

// token returns a token for the server. No login's error is worth another attempt.
func (s *settings) token(ctx context.Context) (string, error) {
	var token string
	var err error
	if s.tokenFile != "" {
		token, err = login.ReadTokenFile(s.tokenFile)
	} else {
		token, err = login.Sessions{Dir: s.dir}.Token(ctx, s.server)
	}
	if err != nil {
		return "", &tokenError{err}
	}
	return token, nil
}

// tokenError is why there is no token. The client does not repeat it.
type tokenError struct{ err error }

func (e *tokenError) Error() string        { return e.err.Error() }
func (e *tokenError) Unwrap() error        { return e.err }
func (e *tokenError) Is(target error) bool { return target == client.ErrRequest }

// organization is the one that was named, or else the token's own.
func (s *settings) organization(token string) (string, error) {
	name := s.org
	if name == "" {
		claims, err := login.ReadClaims(token)
		if err == nil {
			name = claims.Text("org_id")
		}
		if name == "" {
			return "", usage("which organization? The token has no org_id that says so: --org ID or %s", variable("org"))
		}
	}
	id, err := org.Parse(name)
	if err != nil {
		return "", usage("--org: %w", err)
	}
	return string(id), nil
}

// authorities are the certificates of --ca-file, nil for the system's.
func (s *settings) authorities() (*x509.CertPool, error) {
	if s.caFile == "" {
		return nil, nil
	}
	text, err := os.ReadFile(s.caFile)
	if err != nil {
		return nil, &failure{exit: exitConfig, what: "--ca-file", err: err}
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, &failure{exit: exitConfig, what: "there is no certificate in --ca-file " + s.caFile}
	}
	return pool, nil
}

// certificate is the client certificate, nil if there is to be none.
func (s *settings) certificate() (*tls.Certificate, error) {
	if s.tlsCert == "" && s.tlsKey == "" {
		return nil, nil
	}
	if s.tlsCert == "" || s.tlsKey == "" {
		return nil, usage("--tls-cert and --tls-key belong together")
	}
	certificate, err := os.ReadFile(s.tlsCert)
	if err != nil {
		return nil, &failure{exit: exitConfig, what: "--tls-cert", err: err}
	}
	key, err := privatefile.Read(s.tlsKey, maxKeyFile, privatefile.Owner)
	if err != nil {
		return nil, &failure{exit: exitConfig, what: "--tls-key", err: err}
	}
	defer clear(key)
	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		return nil, &failure{exit: exitConfig, what: "--tls-cert and --tls-key must be a certificate and its own private key", err: err}
	}
	return &pair, nil
}
