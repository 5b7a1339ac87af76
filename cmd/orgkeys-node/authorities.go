package main

import (
	"cmp"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
)

// Where Linux distributions keep the certificates that they trust: the first
// file there is and all files of the directories, as in crypto/x509.
var (
	bundles = []string{
		"/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem",
		"/etc/pki/tls/cacert.pem", "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", "/etc/ssl/cert.pem",
	}
	directories = "/etc/ssl/certs:/etc/pki/tls/certs"
)

// systemAuthorities reads the system's certificates as they are now. SSL_CERT_FILE
// and SSL_CERT_DIR replace its places, as for any Go program.
func systemAuthorities() *x509.CertPool {
	pool := x509.NewCertPool()
	files := bundles
	if file := os.Getenv("SSL_CERT_FILE"); file != "" {
		files = []string{file}
	}
	for _, file := range files {
		if text, err := os.ReadFile(file); err == nil {
			pool.AppendCertsFromPEM(text)
			break
		}
	}
	for dir := range strings.SplitSeq(cmp.Or(os.Getenv("SSL_CERT_DIR"), directories), ":") {
		entries, _ := os.ReadDir(dir) // one that is not there has no certificates
		for _, e := range entries {
			if text, err := os.ReadFile(filepath.Join(dir, e.Name())); err == nil {
				pool.AppendCertsFromPEM(text)
			}
		}
	}
	return pool
}
