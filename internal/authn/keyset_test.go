package authn

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestMain makes the certificate of httptest's servers a root of the system,
// in the way that operators add their own: SSL_CERT_FILE.
func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	server := httptest.NewTLSServer(http.NotFoundHandler())
	server.Close()
	dir, err := os.MkdirTemp("", "authn")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	roots := filepath.Join(dir, "roots.pem")
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	if err := os.WriteFile(roots, certificate, 0o600); err != nil {
		panic(err)
	}
	if err := os.Setenv("SSL_CERT_FILE", roots); err != nil {
		panic(err)
	}
	return m.Run()
}

// provider is a real https server that publishes a JWK set and counts.
type provider struct {
	*httptest.Server
	fetches atomic.Int64
	answer  atomic.Pointer[http.HandlerFunc]
}

func newProvider(t *testing.T, answer http.HandlerFunc) *provider {
	t.Helper()
	p := &provider{}
	p.answer.Store(&answer)
	p.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.fetches.Add(1)
		(*p.answer.Load())(w, r)
	}))
	p.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	p.StartTLS()
	t.Cleanup(p.Close)
	return p
}

func (p *provider) change(answer http.HandlerFunc) { p.answer.Store(&answer) }

func publish(set []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(set) }
}

var quiet = slog.New(slog.DiscardHandler)

func verifierWith(keys *KeySet) *Verifier {
	v := must(New(nil, testIssuerWith(keys, DefaultMapping())))
	v.now = func() time.Time { return time.Unix(testNow, 0) }
	return v
}

// verifierFor is the tests' verifier with the key set at location.
func verifierFor(t *testing.T, location string, interval time.Duration) *Verifier {
	t.Helper()
	keys, err := OpenKeySet(location, KeySetConfig{Interval: interval, Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	return verifierWith(keys)
}

func tokenOf(kid string) string {
	return sign(keysForTests().ed, "EdDSA", fmt.Sprintf(`{"alg":"EdDSA","kid":%q}`, kid), goodClaims(nil))
}

func authenticate(t *testing.T, v *Verifier, token string) error {
	t.Helper()
	_, err := v.Authenticate(t.Context(), bearerHeader(token))
	return err
}

// eventually waits until token is answered with an error for which ok holds.
func eventually(t *testing.T, v *Verifier, token string, ok func(error) bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := authenticate(t, v, token)
		if ok(err) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("still answered with %v", err)
		}
		<-tick.C
	}
}

func accepted(err error) bool { return err == nil }

func refusedFor(reason string) func(error) bool {
	return func(err error) bool {
		var refusal *TokenError
		return errors.As(err, &refusal) && refusal.Reason == reason
	}
}

// refusedAsUnknown: there is no such key, or it cannot be known at the moment.
func refusedAsUnknown(err error) bool {
	return refusedFor(ReasonUnknownKey)(err) || errors.Is(err, ErrKeysUnavailable)
}

// TestUnknownKeyIDsCauseABurstOfFetches: 1,000 tokens at once, over real TLS,
// before the interval has passed.
func TestUnknownKeyIDsCauseABurstOfFetches(t *testing.T) {
	p := newProvider(t, publish(issuerSet()))
	v := verifierFor(t, p.URL, time.Hour)
	if err := authenticate(t, v, tokenOf("ed")); err != nil {
		t.Fatal(err)
	}
	var unavailable atomic.Int64
	var group sync.WaitGroup
	for i := range 1000 {
		group.Go(func() {
			err := authenticate(t, v, tokenOf(fmt.Sprintf("unknown-%d", i)))
			if !refusedAsUnknown(err) {
				t.Errorf("token %d: %v", i, err)
			}
			if errors.Is(err, ErrKeysUnavailable) {
				unavailable.Add(1)
			}
		})
	}
	group.Wait()
	for range 10 { // one after the other, so that no reading serves two
		if err := authenticate(t, v, tokenOf("unknown")); !refusedAsUnknown(err) {
			t.Error(err)
		}
	}
	if n := p.fetches.Load(); n != 1+unknownBurst { // the first brought new keys, and does not count
		t.Errorf("%d fetches, want %d", n, 1+unknownBurst)
	}
	if err := authenticate(t, v, tokenOf("unknown")); !errors.Is(err, ErrKeysUnavailable) {
		t.Errorf("nobody can look for the key at the moment: %v, want ErrKeysUnavailable", err)
	}
	if err := authenticate(t, v, tokenOf("ed")); err != nil {
		t.Errorf("a known key suffers: %v", err)
	}
}

// TestUnknownKeyIDsOverManyIntervals keeps asking for unknown keys, one token
// after the other in eight goroutines, while intervals pass.
func TestUnknownKeyIDsOverManyIntervals(t *testing.T) {
	const interval = 200 * time.Millisecond
	p := newProvider(t, publish(issuerSet()))
	v := verifierFor(t, p.URL, interval)
	start := time.Now()
	var asked atomic.Int64
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for time.Since(start) < 6*interval {
				if err := authenticate(t, v, tokenOf(fmt.Sprintf("unknown-%d", asked.Add(1)))); !refusedAsUnknown(err) {
					t.Error(err)
					return
				}
			}
		})
	}
	group.Wait()
	most := int64(time.Since(start)/interval) + 2 + unknownBurst
	if n := p.fetches.Load(); n > most || n < 2 {
		t.Errorf("%d fetches for %d tokens, want 2 to %d", n, asked.Load(), most)
	}
}

func TestRequestsWaitForTheFetchUnderWay(t *testing.T) {
	arrived, release := make(chan struct{}), make(chan struct{})
	p := newProvider(t, func(w http.ResponseWriter, _ *http.Request) {
		arrived <- struct{}{}
		<-release
		_, _ = w.Write(issuerSet())
	})
	v := verifierFor(t, p.URL, time.Nanosecond) // the interval does not hold fetches back
	results := make(chan error, 100)
	for range cap(results) {
		go func() { results <- authenticate(t, v, tokenOf("ed")) }()
	}
	<-arrived
	select {
	case err := <-results:
		t.Fatalf("answered before the keys were there: %v", err)
	default:
	}
	close(release)
	for range cap(results) {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	if n := p.fetches.Load(); n != 1 {
		t.Errorf("%d fetches, want 1", n)
	}
}

func TestKeyRotationWithoutRestart(t *testing.T) {
	k := keysForTests()
	p := newProvider(t, publish(jwks(publicJWK(k.ed.Public(), "old"))))
	v := verifierFor(t, p.URL, time.Millisecond)
	eventually(t, v, tokenOf("old"), accepted)
	if err := authenticate(t, v, tokenOf("new")); !refusedFor(ReasonUnknownKey)(err) {
		t.Fatalf("the new key before it is published: %v", err)
	}
	p.change(publish(jwks(publicJWK(k.ed.Public(), "new"))))
	eventually(t, v, tokenOf("new"), accepted)
	if err := authenticate(t, v, tokenOf("old")); !refusedFor(ReasonUnknownKey)(err) {
		t.Errorf("the removed key: %v", err)
	}
}

func TestRemovedKeyStopsWorkingByItself(t *testing.T) {
	k := keysForTests()
	p := newProvider(t, publish(jwks(publicJWK(k.ed.Public(), "old"))))
	keys := newKeySet(must(remote(p.URL, KeySetConfig{})), time.Millisecond, 5*time.Millisecond, quiet)
	v := verifierWith(keys)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { keys.Run(ctx); close(ended) }()
	eventually(t, v, tokenOf("old"), accepted)
	p.change(publish(jwks()))
	eventually(t, v, tokenOf("old"), refusedFor(ReasonUnknownKey))
	if err := keys.Ready(); !errors.Is(err, ErrKeysUnavailable) {
		t.Errorf("ready with an empty set: %v", err)
	}
	cancel()
	<-ended
}

func TestProviderDownAtStartAndBack(t *testing.T) {
	p := newProvider(t, publish(issuerSet()))
	p.change(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) })
	v := verifierFor(t, p.URL, time.Millisecond)
	if err := v.Ready(); !errors.Is(err, ErrKeysUnavailable) {
		t.Errorf("ready before any keys were read: %v", err)
	}
	if err := authenticate(t, v, tokenOf("ed")); !errors.Is(err, ErrKeysUnavailable) || errors.Is(err, ErrUnauthenticated) {
		t.Errorf("down: %v, want ErrKeysUnavailable", err)
	}
	p.change(publish(issuerSet()))
	eventually(t, v, tokenOf("ed"), accepted)
	if err := v.Ready(); err != nil {
		t.Errorf("back, and not ready: %v", err)
	}
	p.change(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) })
	if err := authenticate(t, v, tokenOf("unknown")); !errors.Is(err, ErrKeysUnavailable) {
		t.Errorf("down again, unknown key: %v", err)
	}
	if err := authenticate(t, v, tokenOf("ed")); err != nil {
		t.Errorf("down again, known key: %v", err)
	}
}

// TestUntrustworthyAnswers: none of these puts a key in force.
func TestUntrustworthyAnswers(t *testing.T) {
	good := issuerSet()
	elsewhere := newProvider(t, publish(good))
	large := append(bytes.TrimSuffix(bytes.Clone(good), []byte("}")), `,"x":"`+strings.Repeat("x", maxJWKS)+`"}`...)
	for name, answer := range map[string]http.HandlerFunc{
		"redirect to another server": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL, http.StatusFound)
		},
		"redirect with a good set in its body": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", elsewhere.URL)
			w.WriteHeader(http.StatusTemporaryRedirect)
			_, _ = w.Write(good)
		},
		"404 with a good set in its body": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusNotFound)
			_, _ = w.Write(good)
		},
		"206": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(good)
		},
		"more than the size cap": publish(large),
		"a set cut off": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(good)+1))
			_, _ = w.Write(good)
		},
		"compressed": func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Accept-Encoding") != "identity" {
				t.Errorf("compression was asked for: %q", r.Header.Get("Accept-Encoding"))
			}
			w.Header().Set("Content-Encoding", "gzip")
			_, _ = w.Write([]byte{0x1f, 0x8b})
		},
		"a login page":  publish([]byte("<html>")),
		"a private key": publish(jwks(publicJWK(keysForTests().ed, "ed"))),
	} {
		t.Run(name, func(t *testing.T) {
			p := newProvider(t, answer)
			v := verifierFor(t, p.URL, 30*time.Second)
			if err := authenticate(t, v, tokenOf("ed")); !errors.Is(err, ErrKeysUnavailable) {
				t.Errorf("answered with %v", err)
			}
			if n := p.fetches.Load(); n != 1 {
				t.Errorf("%d fetches, want 1", n)
			}
		})
	}
	if n := elsewhere.fetches.Load(); n != 0 {
		t.Errorf("the redirect was followed %d times", n)
	}
}

func TestProviderWithoutATrustedCertificate(t *testing.T) {
	key := keysForTests().ec
	p := httptest.NewUnstartedServer(publish(issuerSet()))
	p.TLS = &tls.Config{Certificates: []tls.Certificate{selfSigned(t, key)}}
	p.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	p.StartTLS()
	defer p.Close()
	v := verifierFor(t, p.URL, 30*time.Second)
	err := authenticate(t, v, tokenOf("ed"))
	var unknown x509.UnknownAuthorityError
	if !errors.Is(err, ErrKeysUnavailable) || !errors.As(err, &unknown) {
		t.Errorf("answered with %v", err)
	}
}

func TestProviderWithOldTLS(t *testing.T) {
	p := httptest.NewUnstartedServer(publish(issuerSet()))
	p.TLS = &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}
	p.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	p.StartTLS()
	defer p.Close()
	if err := authenticate(t, verifierFor(t, p.URL, 30*time.Second), tokenOf("ed")); !errors.Is(err, ErrKeysUnavailable) {
		t.Errorf("answered with %v", err)
	}
}

func selfSigned(t *testing.T, key *ecdsa.PrivateKey) tls.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, BasicConstraintsValid: true, IsCA: true,
	}
	der := must(x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key))
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// TestSlowProvider: the provider sends headers and then nothing more. The
// request that asks is bounded by its own context, the fetch by fetchTimeout.
func TestSlowProvider(t *testing.T) {
	gone := make(chan struct{})
	p := newProvider(t, func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		close(gone)
	})
	v := verifierFor(t, p.URL, 30*time.Second)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, err := v.Authenticate(ctx, bearerHeader(tokenOf("ed")))
	if !errors.Is(err, ErrKeysUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("answered with %v", err)
	}
	if err := authenticate(t, v, tokenOf("ed")); !errors.Is(err, ErrKeysUnavailable) {
		t.Errorf("answered with %v", err)
	}
	if d := time.Since(start); d > fetchTimeout+3*time.Second {
		t.Errorf("the fetch lasted %v", d)
	}
	<-gone
}

func TestLocationsThatAreRefused(t *testing.T) {
	for _, location := range []string{
		"http://127.0.0.1/jwks", "HTTP://issuer.example/jwks", "ftp://issuer.example/jwks", "file:///etc/jwks",
		"https://", "https:///jwks", "https://user:canary@issuer.example/jwks", "http://user:canary@issuer.example/jwks",
		"https://issuer.example/#canary", "https://issuer.example/%zz", "://", "",
	} {
		t.Run(location, func(t *testing.T) {
			if _, err := OpenKeySet(location, KeySetConfig{Interval: time.Second, Log: quiet}); err == nil || strings.Contains(err.Error(), "canary") {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestKeySetConfigsThatAreRefused(t *testing.T) {
	for _, c := range []KeySetConfig{{Log: quiet}, {Interval: -1, Log: quiet}, {Interval: time.Second}} {
		if _, err := OpenKeySet("https://issuer.example/", c); err == nil {
			t.Errorf("accepted %+v", c)
		}
	}
}

func writeFile(t *testing.T, path string, b []byte) {
	t.Helper()
	temporary := path + ".new"
	if err := errors.Join(os.WriteFile(temporary, b, 0o600), os.Rename(temporary, path)); err != nil {
		t.Fatal(err)
	}
}

func TestKeySetFileIsReadAgain(t *testing.T) {
	k := keysForTests()
	path := filepath.Join(t.TempDir(), "jwks.json")
	writeFile(t, path, jwks(publicJWK(k.ed.Public(), "old")))
	v := verifierWith(newKeySet(fileReader(path), time.Millisecond, time.Hour, quiet))
	if err := authenticate(t, v, tokenOf("old")); err != nil {
		t.Fatal(err)
	}
	writeFile(t, path, jwks(publicJWK(k.ed.Public(), "new")))
	eventually(t, v, tokenOf("new"), accepted)
	if err := authenticate(t, v, tokenOf("old")); !refusedFor(ReasonUnknownKey)(err) {
		t.Errorf("the removed key: %v", err)
	}
	for name, b := range map[string][]byte{"half a file": jwks()[:5], "a private key": jwks(publicJWK(k.ed, "ed"))} {
		writeFile(t, path, b)
		if err := authenticate(t, v, tokenOf("ed")); !errors.Is(err, ErrKeysUnavailable) {
			t.Errorf("%s: %v", name, err)
		}
		if err := authenticate(t, v, tokenOf("new")); err != nil {
			t.Errorf("%s: the last good set is not in force: %v", name, err)
		}
	}
}

// TestKeySetFileIsReadAgainSoon whatever the interval of URLs is.
func TestKeySetFileIsReadAgainSoon(t *testing.T) {
	k := keysForTests()
	path := filepath.Join(t.TempDir(), "jwks.json")
	writeFile(t, path, jwks(publicJWK(k.ed.Public(), "old")))
	v := verifierFor(t, path, time.Hour)
	writeFile(t, path, jwks(publicJWK(k.ed.Public(), "new")))
	eventually(t, v, tokenOf("new"), accepted)
}

func TestKeySetFilesThatAreRefused(t *testing.T) {
	k := keysForTests()
	good := jwks(publicJWK(k.ed.Public(), "ed"))
	dir := t.TempDir()
	file := func(name string, b []byte, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path, b, mode), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	if _, err := OpenKeySet(file("good", good, 0o644), KeySetConfig{Interval: time.Second, Log: quiet}); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, path, says string }{
		{"missing", filepath.Join(dir, "missing"), "no such file"},
		{"directory", dir, "is not a file"},
		{"device", "/dev/zero", "is not a file"},
		{"writable by everybody", file("open", good, 0o666), "written by everybody"},
		{"too large", file("large", bytes.Repeat([]byte(" "), maxJWKS+1), 0o600), "larger than"},
		{"not a set", file("text", []byte("hello"), 0o600), "not a JWK set"},
		{"no keys", file("none", jwks(), 0o600), "the set is empty"},
		{"no usable key", file("weak", jwks(publicJWK(&k.rsa1024.PublicKey, "a")), 0o600), "1024 bits"},
		{"private key", file("private", jwks(publicJWK(k.ed, "ed")), 0o600), "private key"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := OpenKeySet(tt.path, KeySetConfig{Interval: time.Second, Log: quiet}); err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error %v, want one that says %q", err, tt.says)
			}
		})
	}
}

// scriptedSource is a source whose answers a test decides, on a clock of its own.
type scriptedSource struct {
	reads atomic.Int64
	down  atomic.Bool
	set   atomic.Pointer[[]byte]
}

func (s *scriptedSource) read(context.Context) ([]byte, error) {
	s.reads.Add(1)
	if s.down.Load() {
		return nil, errors.New("the provider is down")
	}
	return *s.set.Load(), nil
}

// onAClock runs test with a URL's default times and a clock that the test moves.
func onAClock(t *testing.T, test func(t *testing.T, s *scriptedSource, k *KeySet)) {
	set := issuerSet()
	synctest.Test(t, func(t *testing.T) {
		s := &scriptedSource{}
		s.set.Store(&set)
		k := newKeySet(s.read, 30*time.Second, 5*time.Minute, quiet)
		test(t, s, k)
	})
}

func findKey(k *KeySet, kid string) error {
	return k.verify(context.Background(), must(parseToken(tokenOf(kid))))
}

func TestTimesOfReading(t *testing.T) {
	onAClock(t, func(t *testing.T, s *scriptedSource, k *KeySet) {
		ctx, cancel := context.WithCancel(t.Context())
		defer synctest.Wait()
		defer cancel()
		go k.Run(ctx)
		check := func(after time.Duration, want int64) {
			t.Helper()
			time.Sleep(after) // of the test's own clock
			synctest.Wait()
			if n := s.reads.Load(); n != want {
				t.Fatalf("%d readings, want %d", n, want)
			}
		}
		check(time.Second, 1)
		check(5*time.Minute, 2)
		check(time.Minute, 2)
		for i := range unknownBurst {
			_ = findKey(k, "unknown")
			check(time.Second, int64(3+i))
		}
		_ = findKey(k, "unknown") // the burst is over
		check(0, 7)
		time.Sleep(30 * time.Second)
		_ = findKey(k, "unknown")
		check(0, 8)
		_ = findKey(k, "unknown")
		check(0, 8)
		s.down.Store(true)
		check(204*time.Second, 9) // five minutes after what Run read last
		check(time.Second, 10)    // and then after a second, two, four, up to the interval
		check(2*time.Second, 11)
		check(4*time.Second, 12)
		s.down.Store(false)
		check(8*time.Second, 13)
		check(4*time.Minute, 13)
	})
}

func TestProviderDownForADay(t *testing.T) {
	onAClock(t, func(t *testing.T, s *scriptedSource, k *KeySet) {
		if err := findKey(k, "ed"); err != nil {
			t.Fatal(err)
		}
		s.down.Store(true)
		time.Sleep(MaxAge)
		if err := findKey(k, "ed"); err != nil {
			t.Errorf("after %v: %v", MaxAge, err)
		}
		time.Sleep(time.Second)
		if err := findKey(k, "ed"); !errors.Is(err, ErrKeysUnavailable) {
			t.Errorf("after more than %v: %v, want ErrKeysUnavailable", MaxAge, err)
		}
		if err := k.Ready(); !errors.Is(err, ErrKeysUnavailable) {
			t.Errorf("ready after more than %v: %v", MaxAge, err)
		}
		s.down.Store(false)
		time.Sleep(30 * time.Second)
		if err := findKey(k, "ed"); err != nil {
			t.Errorf("back: %v", err)
		}
	})
}
