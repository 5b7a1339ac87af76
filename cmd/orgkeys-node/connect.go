package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"os"
	"strings"
	"time"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/privatefile"
	"github.com/orgkeys/orgkeys/internal/tpmdevice"
)

// attemptTimeout bounds one request with its answer, and shortestAttempt and
// --wait together do if that is less.
const (
	attemptTimeout  = 30 * time.Second
	shortestAttempt = 5 * time.Second
	maxKeyFile      = 64 << 10
)

// connect reads the files that a connection is made of. They are read for each
// attempt: any of them may appear, or be corrected, later.
func connect(s settings) (*client.Client, error) {
	config := client.Config{Server: s.server, Attempt: min(attemptTimeout, shortestAttempt+min(time.Duration(s.wait), attemptTimeout)), UserAgent: "orgkeys-node"}
	var err error
	if strings.HasPrefix(s.server, "https:") {
		if config.RootCAs, err = readAuthorities(s.caFile); err != nil {
			return nil, err
		}
	}
	if config.Certificate, err = readCertificate(s); err != nil {
		return nil, err
	}
	c, err := client.New(config)
	if err != nil {
		return nil, usageError("--server: %s", err)
	}
	return c, nil
}

// identify reads the node's key, and what is known of it from its enrollment.
func identify(s settings) (client.Node, error) {
	key, err := readKey(s, s.keyFile)
	if err != nil {
		return client.Node{}, err
	}
	n := client.Node{Org: s.org, IP: s.ip, Region: s.region, Key: key}
	enrolled, err := readRecord(s.keyFile + recordSuffix)
	if err != nil {
		return client.Node{}, err
	}
	if d := enrolled.delivery(key); d != nil {
		n.KeyID = d.KeyID
		if n.Org == "" {
			n.Org = d.Org
		}
		if n.Org != d.Org {
			return client.Node{}, usageError("--org is %s, and the key was enrolled for %s", n.Org, d.Org)
		}
	}
	if n.Org == "" {
		return client.Node{}, usageError("--org is missing, and %s was not enrolled here", s.keyFile)
	}
	n.Client, err = connect(s)
	return n, err
}

// readKey reads the private key from a file that nobody but its owner may read, or
// from which the TPM can load it.
func readKey(s settings, path string) (client.PrivateKey, error) {
	wrong := func(err error, hint string) (client.PrivateKey, error) {
		return nil, &failure{exitConfig, "key file " + path, hint, err}
	}
	text, hint, err := readPrivateFile(path)
	defer clear(text)
	if errors.Is(err, os.ErrNotExist) {
		hint = "put the private key there, mode 0600"
	}
	if err != nil {
		return wrong(err, hint)
	}
	key, err := s.parseKey(text)
	if err != nil && tpmdevice.IsKey(text) {
		return wrong(err, "enroll this node again, with a new token")
	}
	if err != nil {
		return wrong(err, "copy the PEM again as it was handed out")
	}
	return key, nil
}

// parseKey reads the text of a private key, in a file or in the TPM.
func (s settings) parseKey(text []byte) (client.PrivateKey, error) {
	if tpmdevice.IsKey(text) {
		return s.device().Parse(text)
	}
	return client.ParsePrivateKey(text)
}

// readPrivateFile reads a file that nobody else may read, and that belongs to
// this user or root. Where its error does not, hint says what to do.
func readPrivateFile(path string) (text []byte, hint string, err error) {
	f, err := privatefile.Open(path, privatefile.Owner)
	if err != nil {
		return nil, "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, "", err
	}
	if err := checkOwner(info); err != nil {
		return nil, "chown it", err
	}
	// One buffer, which the caller clears: one that grows would leave copies.
	text = make([]byte, min(info.Size(), maxKeyFile))
	n, err := io.ReadFull(f, text)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) { // it was cut meanwhile
		err = nil
	}
	return text[:n], "", err
}

// readCertificate reads the client certificate, nil if there is to be none.
func readCertificate(s settings) (*tls.Certificate, error) {
	if s.tlsCert == "" {
		return nil, nil
	}
	certificate, err := os.ReadFile(s.tlsCert)
	if err != nil {
		return nil, &failure{exitConfig, "reading --tls-cert", "put the client certificate there", err}
	}
	key, hint, err := readPrivateFile(s.tlsKey)
	defer clear(key)
	if err != nil {
		return nil, &failure{exitConfig, "--tls-key " + s.tlsKey, hint, err}
	}
	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		return nil, &failure{exitConfig, "--tls-cert and --tls-key", "they must be a certificate and its own private key, in PEM", err}
	}
	return &pair, nil
}

// readAuthorities reads the certificates to trust. Without a file of its own
// they are the system's, which package crypto/x509 would read only once in a
// process, and so never see one that is installed later.
func readAuthorities(path string) (*x509.CertPool, error) {
	if path == "" {
		return systemAuthorities(), nil
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, &failure{exitConfig, "reading --ca-file", "put the certificates there", err}
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, &failure{exit: exitConfig, what: "there is no certificate in --ca-file " + path}
	}
	return pool, nil
}
