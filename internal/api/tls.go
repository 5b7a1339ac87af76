package api

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/orgkeys/orgkeys/internal/privatefile"
)

// TLSFiles are PEM files, read again when they change.
type TLSFiles struct {
	Cert     string // the certificate chain
	Key      string // its private key, not readable by everybody
	ClientCA string // if set, clients must have a certificate of one of these authorities
}

func (f TLSFiles) names() []string {
	if f.ClientCA == "" {
		return []string{f.Cert, f.Key}
	}
	return []string{f.Cert, f.Key, f.ClientCA}
}

// certificates holds the last good content of the files. A replacement that
// cannot be used, such as a certificate whose key has not been written yet,
// changes nothing until it can.
type certificates struct {
	files TLSFiles
	log   *slog.Logger

	mu      sync.Mutex
	looked  time.Time
	seen    []os.FileInfo
	current *tls.Config
}

// maxAuthorities is the longest file of client authorities, in bytes.
const maxAuthorities = 1 << 20

// lookInterval is the time between two looks at the files.
const lookInterval = time.Second

func openCertificates(files TLSFiles, log *slog.Logger) (*certificates, error) {
	c := &certificates{files: files, log: log, looked: time.Now()}
	var err error
	if c.seen, err = files.stat(); err != nil {
		return nil, err
	}
	if c.current, err = files.load(); err != nil {
		return nil, err
	}
	return c, nil
}

// config is for a server that follows the files.
func (c *certificates) config() *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS12,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return c.latest(), nil },
	}
}

func (c *certificates) latest() *tls.Config {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.looked) < lookInterval {
		return c.current
	}
	c.looked = time.Now()
	found, err := c.files.stat()
	if same(found, c.seen) {
		return c.current
	}
	c.seen = found // the present content is reported once, whether or not it can be used
	var replacement *tls.Config
	if err == nil {
		replacement, err = c.files.load()
	}
	if err != nil {
		c.log.Error("the changed TLS files cannot be used; the previous ones stay in use", "error", err)
		return c.current
	}
	c.log.Info("TLS files read again")
	c.current = replacement
	return c.current
}

func (f TLSFiles) stat() ([]os.FileInfo, error) {
	var all []os.FileInfo
	for _, name := range f.names() {
		info, err := os.Stat(name)
		if err != nil {
			return nil, fmt.Errorf("TLS file: %w", err)
		}
		all = append(all, info)
	}
	switch mode := all[1].Mode().Perm(); {
	case mode&0o004 != 0:
		return all, fmt.Errorf("TLS key file %s is readable by everybody", f.Key)
	case mode&0o022 != 0:
		return all, fmt.Errorf("TLS key file %s may be written by others (mode %04o): chmod 640 it", f.Key, mode)
	}
	return all, nil
}

func same(a, b []os.FileInfo) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !os.SameFile(a[i], b[i]) || !a[i].ModTime().Equal(b[i].ModTime()) || a[i].Size() != b[i].Size() || a[i].Mode() != b[i].Mode() {
			return false
		}
	}
	return true
}

func (f TLSFiles) load() (*tls.Config, error) {
	pair, err := tls.LoadX509KeyPair(f.Cert, f.Key)
	if err != nil {
		return nil, fmt.Errorf("reading the TLS certificate: %w", err)
	}
	config := &tls.Config{
		MinVersion:   tls.VersionTLS12,
		Certificates: []tls.Certificate{pair},
		NextProtos:   []string{"h2", "http/1.1"},
	}
	if f.ClientCA == "" {
		return config, nil
	}
	authorities, err := privatefile.Read(f.ClientCA, maxAuthorities, privatefile.Everybody)
	if err != nil {
		return nil, fmt.Errorf("reading the client authorities: %w", err)
	}
	config.ClientCAs = x509.NewCertPool()
	if !config.ClientCAs.AppendCertsFromPEM(authorities) {
		return nil, errors.New("reading the client authorities: no certificate in " + f.ClientCA)
	}
	config.ClientAuth = tls.RequireAndVerifyClientCert
	// A resumed session would outlive the authority that issued its certificate.
	config.SessionTicketsDisabled = true
	return config, nil
}
