package e2e

import (
	"crypto/tls"
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/testca"
)

func serverTLS(t *testing.T, ca *testca.CA) *tls.Config {
	t.Helper()
	return &tls.Config{Certificates: []tls.Certificate{ca.Issue(t, "provider").Pair(t)}}
}

// TestTLSFilesAreReadAgainWhenTheyChange: new connections get the new
// certificate, and a broken file leaves the last good one in force.
func TestTLSFilesAreReadAgainWhenTheyChange(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	dir := t.TempDir()
	s := harness.Start(t, harness.TLS(ca, ca.IssueIn(t, dir, "first")))
	serving := func() string {
		conn, err := tls.Dial("tcp", strings.TrimPrefix(s.API, "https://"), &tls.Config{RootCAs: ca.Pool()})
		if err != nil {
			return err.Error()
		}
		defer conn.Close()
		return conn.ConnectionState().PeerCertificates[0].Subject.CommonName
	}
	if got := serving(); got != "first" {
		t.Fatalf("the certificate is %q", got)
	}
	ca.IssueIn(t, dir, "second")
	harness.Eventually(t, harness.Patience, "the second certificate is served", func() bool { return serving() == "second" })
	org := harness.Org()
	s.Generate(t, org)

	for _, version := range []uint16{tls.VersionTLS10, tls.VersionTLS11} {
		if conn, err := tls.Dial("tcp", strings.TrimPrefix(s.API, "https://"), &tls.Config{RootCAs: ca.Pool(), MinVersion: version, MaxVersion: version}); err == nil {
			conn.Close()
			t.Errorf("the server speaks %s", tls.VersionName(version))
		}
	}
	resp, err := http.Get("http" + strings.TrimPrefix(s.API, "https") + "/healthz")
	if err == nil && resp.StatusCode < 400 {
		t.Errorf("without TLS: status %d", resp.StatusCode)
	}
}

func TestClientCertificatesAreRequiredOfTheConfiguredAuthority(t *testing.T) {
	t.Parallel()
	ca, clients, strangers := testca.New(t), testca.New(t), testca.New(t)
	s := harness.Start(t, harness.TLS(ca, ca.Issue(t, "server")), harness.Set("ORGKEYS_TLS_CLIENT_CA_FILE", clients.File))
	get := func(certs ...tls.Certificate) (int, error) {
		c := http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: ca.Pool(), Certificates: certs}}}
		defer c.CloseIdleConnections()
		resp, err := c.Get(s.API + "/healthz")
		if err != nil {
			return 0, err
		}
		resp.Body.Close()
		return resp.StatusCode, nil
	}
	if status, err := get(clients.Issue(t, "client").Pair(t)); status != 200 {
		t.Errorf("with a certificate: status %d, %v", status, err)
	}
	if status, err := get(); err == nil {
		t.Errorf("without a certificate: status %d", status)
	}
	if status, err := get(strangers.Issue(t, "client").Pair(t)); err == nil {
		t.Errorf("with a stranger's certificate: status %d", status)
	}
}

func TestCORSIsAnExactList(t *testing.T) {
	t.Parallel()
	const origin = "https://app.test"
	s := harness.Start(t, harness.Set("ORGKEYS_CORS_ORIGINS", origin+",https://other.test:8443"))
	preflight := func(origin, method string, headers string) harness.Response {
		return s.Do(t, harness.Request{Method: "OPTIONS", Path: "/organization/acme/key", Header: http.Header{
			"Origin": {origin}, "Access-Control-Request-Method": {method}, "Access-Control-Request-Headers": {headers},
		}})
	}
	resp := preflight(origin, "POST", "accept,authorization")
	if resp.Status != 204 || resp.Header.Get("Access-Control-Allow-Origin") != origin {
		t.Errorf("status %d, headers %v", resp.Status, resp.Header)
	}
	if !strings.Contains(resp.Header.Get("Access-Control-Allow-Methods"), "POST") || !strings.Contains(strings.ToLower(resp.Header.Get("Access-Control-Allow-Headers")), "authorization") {
		t.Errorf("the documented browser sample's preflight gets %v", resp.Header)
	}
	if resp.Header.Get("Access-Control-Allow-Credentials") != "" {
		t.Error("credentials are allowed")
	}
	for _, evil := range []string{"https://evil.test", "http://app.test", "https://app.test.evil.test", "https://app.test:444", "null", "https://APP.test", "https://xapp.test"} {
		resp := preflight(evil, "POST", "authorization")
		if got := resp.Header.Get("Access-Control-Allow-Origin"); got != "" {
			t.Errorf("origin %s: Access-Control-Allow-Origin %q", evil, got)
		}
	}
	actual := s.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath("acme"), Token: s.Token(t, "acme", "OWNER"), Header: http.Header{"Origin": {origin}, "Accept": {"application/x-pem-file"}}})
	if actual.Status != 200 || actual.Header.Get("Access-Control-Allow-Origin") != origin {
		t.Fatalf("status %d, headers %v", actual.Status, actual.Header)
	}
	exposed := strings.ToLower(actual.Header.Get("Access-Control-Expose-Headers"))
	for _, name := range []string{"location", "x-key-id", "x-key-fingerprint", "x-request-id", "retry-after"} {
		if !strings.Contains(exposed, name) {
			t.Errorf("%s is not exposed: %q", name, exposed)
		}
	}
	if !strings.Contains(actual.Header.Get("Vary")+strings.Join(actual.Header.Values("Vary"), ","), "Origin") {
		t.Errorf("Vary is %q", actual.Header.Values("Vary"))
	}

	none := harness.Start(t)
	resp = none.Do(t, harness.Request{Method: "GET", Path: "/healthz", Header: http.Header{"Origin": {origin}}})
	if got := resp.Header.Get("Access-Control-Allow-Origin"); got != "" {
		t.Errorf("with no origins configured: Access-Control-Allow-Origin %q", got)
	}
}

// TestProxiesAreTrustedOnlyWhenNamed looks at the client's address as the
// audit log has it.
func TestProxiesAreTrustedOnlyWhenNamed(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name      string
		settings  map[string]string
		forwarded http.Header
		address   string
	}{
		{"no proxy is trusted by default", nil, http.Header{"X-Forwarded-For": {"203.0.113.7"}}, "127.0.0.1"},
		{"a trusted proxy's word counts", map[string]string{"ORGKEYS_TRUSTED_PROXIES": "127.0.0.0/8"}, http.Header{"X-Forwarded-For": {"203.0.113.7"}}, "203.0.113.7"},
		{"what the client put before the proxy's word does not", map[string]string{"ORGKEYS_TRUSTED_PROXIES": "127.0.0.1"}, http.Header{"X-Forwarded-For": {"198.51.100.1, 203.0.113.7"}}, "203.0.113.7"},
		{"another proxy's word does not", map[string]string{"ORGKEYS_TRUSTED_PROXIES": "192.0.2.1"}, http.Header{"X-Forwarded-For": {"203.0.113.7"}}, "127.0.0.1"},
		{"noise does not", map[string]string{"ORGKEYS_TRUSTED_PROXIES": "127.0.0.1"}, http.Header{"X-Forwarded-For": {"<script>, 999.1.1.1"}}, "127.0.0.1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var opts []harness.Option
			for k, v := range c.settings {
				opts = append(opts, harness.Set(k, v))
			}
			s := harness.Start(t, opts...)
			org := harness.Org()
			resp := s.Do(t, harness.Request{Method: "GET", Path: harness.KeyPath(org), Token: s.Token(t, org, "OWNER"), Header: c.forwarded})
			if resp.Status != 200 {
				t.Fatalf("status %d, body %.300q", resp.Status, resp.Body)
			}
			db := s.Database(t)
			var personal struct{ Address string }
			raw := harness.Strings(t, db, `SELECT personal FROM event_persons JOIN events ON events.id = event_id WHERE org_id = ?`, org)
			if len(raw) != 1 {
				t.Fatalf("%d personal parts", len(raw))
			}
			if err := json.Unmarshal([]byte(raw[0]), &personal); err != nil {
				t.Fatal(err)
			}
			if personal.Address != c.address {
				t.Errorf("the address is %q, want %q", personal.Address, c.address)
			}
		})
	}
}

// TestTLSByAProxy: behind a proxy that terminates TLS, what came to it without
// TLS is refused, and so is who is not the proxy.
func TestTLSByAProxy(t *testing.T) {
	t.Parallel()
	s := harness.Configure(t, harness.TrustedBy(harness.NewIssuer(t)), harness.Set("ORGKEYS_TLS_BY_PROXY", "true"))
	if _, stderr, code := s.Run(t, "serve"); code == 0 || !strings.Contains(stderr, "ORGKEYS_TRUSTED_PROXIES") {
		t.Errorf("TLS by a proxy that is not named: exit code %d\n%s", code, stderr)
	}
}
