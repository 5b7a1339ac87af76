package api

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestCheckTransport(t *testing.T) {
	files := TLSFiles{Cert: "c", Key: "k"}
	byProxy := Proxies{Trusted: prefixes("10.0.0.0/8"), TLS: true}
	for _, c := range []struct {
		name   string
		config ServerConfig
		want   error
	}{
		{"loopback", ServerConfig{Address: "127.0.0.1:3000"}, nil},
		{"another loopback address", ServerConfig{Address: "127.9.9.9:0"}, nil},
		{"IPv6 loopback", ServerConfig{Address: "[::1]:3000"}, nil},
		{"localhost", ServerConfig{Address: "localhost:3000"}, nil},
		{"any address", ServerConfig{Address: "0.0.0.0:3000"}, ErrPlaintext},
		{"no address", ServerConfig{Address: ":3000"}, ErrPlaintext},
		{"a private address", ServerConfig{Address: "192.168.1.1:3000"}, ErrPlaintext},
		{"a name", ServerConfig{Address: "orgkeys.example:3000"}, ErrPlaintext},
		{"trusted proxies alone", ServerConfig{Address: ":3000", Proxies: Proxies{Trusted: byProxy.Trusted}}, ErrPlaintext},
		{"TLS files", ServerConfig{Address: ":3000", TLS: files}, nil},
		{"TLS by a trusted proxy", ServerConfig{Address: ":3000", Proxies: byProxy}, nil},
		{"TLS by nobody in particular", ServerConfig{Address: ":3000", Proxies: Proxies{TLS: true}}, ErrNoProxies},
		{"TLS by nobody in particular, on loopback", ServerConfig{Address: "127.0.0.1:3000", Proxies: Proxies{TLS: true}}, ErrNoProxies},
		{"TLS by both", ServerConfig{Address: ":3000", TLS: files, Proxies: byProxy}, ErrTwoTLS},
		{"a certificate without its key", ServerConfig{Address: "127.0.0.1:1", TLS: TLSFiles{Cert: "c"}}, ErrTLSFiles},
		{"a key without its certificate", ServerConfig{Address: "127.0.0.1:1", TLS: TLSFiles{Key: "k"}}, ErrTLSFiles},
		{"a client CA without TLS", ServerConfig{Address: "127.0.0.1:1", TLS: TLSFiles{ClientCA: "a"}}, ErrTLSFiles},
		{"everybody is a proxy", ServerConfig{Address: ":3000", TLS: files, Proxies: Proxies{Trusted: prefixes("0.0.0.0/0")}}, ErrTrustingAll},
		{"everybody is a proxy, in two halves", ServerConfig{Address: ":3000", TLS: files, Proxies: Proxies{Trusted: prefixes("0.0.0.0/1", "128.0.0.0/1")}}, ErrTrustingAll},
		{"an IPv6 network of too many", ServerConfig{Address: ":3000", TLS: files, Proxies: Proxies{Trusted: prefixes("2000::/3")}}, ErrTrustingAll},
		{"private networks", ServerConfig{Address: ":3000", TLS: files, Proxies: Proxies{Trusted: prefixes("10.0.0.0/8", "fc00::/7")}}, nil},
		{"everybody is a proxy in IPv6", ServerConfig{Address: ":3000", TLS: files, Proxies: Proxies{Trusted: prefixes("::/0")}}, ErrTrustingAll},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := CheckTransport(c.config); !errors.Is(err, c.want) {
				t.Errorf("%v", err)
			}
			if c.want != nil {
				c.config.Log = slog.New(slog.DiscardHandler)
				if _, err := Listen(c.config, http.NotFoundHandler()); !errors.Is(err, c.want) {
					t.Errorf("Listen: %v", err)
				}
			}
		})
	}
	if err := CheckTransport(ServerConfig{Address: "3000"}); err == nil {
		t.Error("an address without a host was accepted")
	}
}

// authority issues certificates for one test.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	a.cert, a.key = a.sign(template)
	return a
}

func (a *authority) sign(template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, key
}

func (a *authority) issue(name string) (*x509.Certificate, *ecdsa.PrivateKey) {
	return a.sign(&x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}})
}

func writePEM(t *testing.T, path, kind string, der []byte) {
	t.Helper()
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

func writePair(t *testing.T, files TLSFiles, cert *x509.Certificate, key *ecdsa.PrivateKey) {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	writePEM(t, files.Key, "PRIVATE KEY", der)
	writePEM(t, files.Cert, "CERTIFICATE", cert.Raw)
}

func hello(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Proto) }

// get asks over TLS with a connection of its own, and returns the body and the server's name.
func (a *authority) get(address string, certs []tls.Certificate, version uint16) (body, server string, err error) {
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	transport := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: "localhost", Certificates: certs, MaxVersion: version, MinVersion: tls.VersionTLS10}}
	defer transport.CloseIdleConnections()
	resp, err := (&http.Client{Transport: transport, Timeout: 20 * time.Second}).Get("https://" + address)
	if err != nil {
		return "", "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), resp.TLS.PeerCertificates[0].Subject.CommonName, err
}

func TestTLSFilesAreReadAgain(t *testing.T) {
	ca := newAuthority(t)
	dir := t.TempDir()
	files := TLSFiles{Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem")}
	cert, key := ca.issue("first")
	writePair(t, files, cert, key)
	log := &logs{}
	address := serve(t, ServerConfig{Address: "127.0.0.1:0", TLS: files, Log: slog.New(slog.NewJSONHandler(log, nil))}, http.HandlerFunc(hello))

	body, name, err := ca.get(address, nil, 0)
	if err != nil || body != "HTTP/2.0" || name != "first" {
		t.Fatal(body, name, err)
	}
	if _, _, err := ca.get(address, nil, tls.VersionTLS11); err == nil {
		t.Error("TLS 1.1 was spoken")
	}
	if body, _, err := ca.get(address, nil, tls.VersionTLS12); err != nil || body != "HTTP/2.0" {
		t.Error("TLS 1.2:", body, err)
	}

	// A new certificate before its key: the old pair stays in force.
	cert, key = ca.issue("second")
	writePEM(t, files.Cert, "CERTIFICATE", cert.Raw)
	eventually(t, "a complaint about the new certificate", func() bool {
		_, name, err := ca.get(address, nil, 0)
		if err != nil || name != "first" {
			t.Fatal(name, err)
		}
		return strings.Contains(log.String(), "cannot be used")
	})
	waited := time.Now()
	eventually(t, "two more looks", func() bool {
		_, _, err := ca.get(address, nil, 0)
		return err == nil && time.Since(waited) > 2*lookInterval+lookInterval/2
	})
	if n := strings.Count(log.String(), "cannot be used"); n != 1 {
		t.Errorf("one bad change was reported %d times", n)
	}
	writePair(t, files, cert, key)
	eventually(t, "the new certificate", func() bool {
		_, name, err := ca.get(address, nil, 0)
		return err == nil && name == "second"
	})

	// Gone, world-readable, nonsense: likewise.
	for _, spoil := range []func() error{
		func() error { return os.Remove(files.Cert) },
		func() error { return os.Chmod(files.Key, 0o644) },
		func() error { return os.WriteFile(files.Cert, []byte("nonsense"), 0o600) },
	} {
		before := strings.Count(log.String(), "cannot be used")
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "a complaint", func() bool {
			if _, name, err := ca.get(address, nil, 0); err != nil || name != "second" {
				t.Fatal(name, err)
			}
			return strings.Count(log.String(), "cannot be used") > before
		})
		if err := os.Chmod(files.Key, 0o600); err != nil {
			t.Fatal(err)
		}
		writePair(t, files, cert, key)
		eventually(t, "recovery", func() bool {
			_, _, err := ca.get(address, nil, 0)
			return err == nil && strings.HasSuffix(strings.TrimSpace(log.String()), `"msg":"TLS files read again"}`)
		})
	}
}

func TestMutualTLS(t *testing.T) {
	ca, stranger := newAuthority(t), newAuthority(t)
	dir := t.TempDir()
	files := TLSFiles{Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem"), ClientCA: filepath.Join(dir, "ca.pem")}
	cert, key := ca.issue("server")
	writePair(t, files, cert, key)
	writePEM(t, files.ClientCA, "CERTIFICATE", ca.cert.Raw)
	address := serve(t, ServerConfig{Address: "127.0.0.1:0", TLS: files, Log: slog.New(slog.DiscardHandler)}, http.HandlerFunc(hello))

	own, ownKey := ca.issue("client")
	if _, _, err := ca.get(address, []tls.Certificate{{Certificate: [][]byte{own.Raw}, PrivateKey: ownKey}}, 0); err != nil {
		t.Error("a client of the authority:", err)
	}
	other, otherKey := stranger.issue("client")
	if _, _, err := ca.get(address, []tls.Certificate{{Certificate: [][]byte{other.Raw}, PrivateKey: otherKey}}, 0); err == nil {
		t.Error("a client of another authority was let in")
	}
	if _, _, err := ca.get(address, nil, 0); err == nil {
		t.Error("a client without a certificate was let in")
	}
	// The authority is replaced: its clients are out.
	writePEM(t, files.ClientCA, "CERTIFICATE", stranger.cert.Raw)
	eventually(t, "the new authority", func() bool {
		_, _, err := ca.get(address, []tls.Certificate{{Certificate: [][]byte{other.Raw}, PrivateKey: otherKey}}, 0)
		return err == nil
	})
	if _, _, err := ca.get(address, []tls.Certificate{{Certificate: [][]byte{own.Raw}, PrivateKey: ownKey}}, 0); err == nil {
		t.Error("a client of the former authority was let in")
	}
}

func TestListenRefusesBadTLSFiles(t *testing.T) {
	ca := newAuthority(t)
	dir := t.TempDir()
	files := TLSFiles{Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem")}
	listen := func(f TLSFiles) error {
		_, err := Listen(ServerConfig{Address: "127.0.0.1:0", TLS: f, Log: slog.New(slog.DiscardHandler)}, http.NotFoundHandler())
		return err
	}
	if err := listen(files); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing files: %v", err)
	}
	cert, key := ca.issue("a")
	writePair(t, files, cert, key)
	other, _ := ca.issue("b")
	writePEM(t, files.Cert, "CERTIFICATE", other.Raw)
	if err := listen(files); err == nil {
		t.Error("another key's certificate was accepted")
	}
	writePair(t, files, cert, key)
	if err := os.Chmod(files.Key, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := listen(files); err == nil || !strings.Contains(err.Error(), "readable by everybody") {
		t.Errorf("a world-readable key: %v", err)
	}
	for _, mode := range []os.FileMode{0o660, 0o620, 0o602} {
		if err := os.Chmod(files.Key, mode); err != nil {
			t.Fatal(err)
		}
		if err := listen(files); err == nil || !strings.Contains(err.Error(), "may be written by others") {
			t.Errorf("a key of mode %04o: %v", mode, err)
		}
	}
	if err := os.Chmod(files.Key, 0o640); err != nil {
		t.Fatal(err)
	}
	writable := files
	writable.ClientCA = filepath.Join(dir, "ca.pem")
	writePEM(t, writable.ClientCA, "CERTIFICATE", ca.cert.Raw)
	if err := os.Chmod(writable.ClientCA, 0o666); err != nil {
		t.Fatal(err)
	}
	if err := listen(writable); err == nil || !strings.Contains(err.Error(), "may be changed by others") {
		t.Errorf("client authorities that everybody may write: %v", err)
	}
	files.ClientCA = files.Key // PEM, and no certificate
	if err := listen(files); err == nil {
		t.Error("a client CA without certificates was accepted")
	}
}

func TestShutdownWaitsForWhatIsUnderWay(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	s, err := Listen(ServerConfig{Address: "127.0.0.1:0", Log: slog.New(slog.DiscardHandler)}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(entered)
		<-leave
		hello(w, r)
	}))
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve() }()
	answered := make(chan error, 1)
	go func() {
		resp, err := http.Get("http://" + s.Addr().String())
		if err == nil {
			resp.Body.Close()
		}
		answered <- err
	}()
	<-entered
	down := make(chan error, 1)
	go func() { down <- s.Shutdown(context.Background()) }()
	if err := <-served; err != nil {
		t.Error("Serve:", err)
	}
	close(leave)
	if err := <-answered; err != nil {
		t.Error("the request under way:", err)
	}
	if err := <-down; err != nil {
		t.Error("Shutdown:", err)
	}
}
