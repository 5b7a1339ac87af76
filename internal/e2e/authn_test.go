package e2e

import (
	"bufio"
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/testca"
)

// TestUnusableCallersHear401 is the contract on authentication through the real program:
// what passes, and what does not.
func TestUnusableCallersHear401(t *testing.T) {
	t.Parallel()
	issuer := harness.NewIssuer(t)
	rsaKey := newRSAKey(t)
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	issuer.Add(t, "rs", jose.RS256, rsaKey)
	issuer.Add(t, "ps", jose.PS256, newRSAKey(t))
	issuer.Add(t, "ed", jose.EdDSA, edKey)
	issuer.Add(t, "es", jose.ES256, harness.NewECKey(t))
	issuer.Publish(t)
	s := harness.Start(t, harness.TrustedBy(issuer))
	org := harness.Org()
	good := harness.Claims{"org_id": org}
	payload := func(change harness.Claims) []byte {
		c := issuer.Claims(good)
		for k, v := range change {
			if v == nil {
				delete(c, k)
				continue
			}
			c[k] = v
		}
		b, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	with := func(change harness.Claims) string { return issuer.Sign(t, "es", nil, payload(change)) }

	accepted := map[string]string{
		"RS256":                           issuer.Sign(t, "rs", nil, payload(nil)),
		"PS256":                           issuer.Sign(t, "ps", nil, payload(nil)),
		"EdDSA":                           issuer.Sign(t, "ed", nil, payload(nil)),
		"ES256":                           issuer.Sign(t, "es", nil, payload(nil)),
		"ADMINISTRATORS":                  with(harness.Claims{"org_role": "ADMINISTRATORS"}),
		"the platform's 255":              with(harness.Claims{"org_role": 255}),
		"the platform's 254":              with(harness.Claims{"org_role": 254}),
		"a list with one that matches":    with(harness.Claims{"org_role": []any{"USER", 254}}),
		"an audience among others":        with(harness.Claims{"aud": []string{"somebody-else", issuer.Audience}}),
		"jku, jwk and x5u that lead away": issuer.Sign(t, "es", map[string]any{"jku": "https://127.0.0.1:1/evil", "x5u": "https://127.0.0.1:1/evil"}, payload(nil)),
	}
	for name, token := range accepted {
		if resp := s.Do(t, harness.Request{Method: "GET", Path: harness.KeyPath(org), Token: token}); resp.Status != 200 {
			t.Errorf("%s: status %d, body %.300q", name, resp.Status, resp.Body)
		}
	}

	refused := hostileTokens(t, issuer, rsaKey, payload)
	maps.Copy(refused, map[string]string{
		"no subject":                        with(harness.Claims{"sub": nil}),
		"an empty subject":                  with(harness.Claims{"sub": ""}),
		"no organization":                   with(harness.Claims{"org_id": nil}),
		"an empty organization":             with(harness.Claims{"org_id": ""}),
		"an organization that is a list":    with(harness.Claims{"org_id": []string{org, org}}),
		"an organization that is a number":  with(harness.Claims{"org_id": 1}),
		"an organization that is an object": with(harness.Claims{"org_id": map[string]string{"$ne": ""}}),
		"a duplicate organization":          issuer.Sign(t, "es", nil, replaced(payload(nil), `"org_role"`, `"org_id":"`+org+`","org_role"`)),
		"a duplicate role":                  issuer.Sign(t, "es", nil, replaced(payload(nil), `"org_role":"OWNER"`, `"org_role":"USER","org_role":"OWNER"`)),
	})
	for name, token := range refused {
		for _, r := range []harness.Request{{Method: "POST", Path: harness.KeyPath(org)}} {
			r.Token = token
			want401(t, name, s.Do(t, r))
		}
	}
	unauthenticated := map[string]http.Header{
		"no Authorization":       {},
		"an empty one":           {"Authorization": {""}},
		"Basic":                  {"Authorization": {"Basic YTpi"}},
		"Bearer without a token": {"Authorization": {"Bearer"}},
		"Bearer and a space":     {"Authorization": {"Bearer "}},
		"two of them":            {"Authorization": {"Bearer " + with(nil), "Bearer " + with(nil)}},
		"two tokens in one":      {"Authorization": {"Bearer " + with(nil) + " " + with(nil)}},
		"a token without Bearer": {"Authorization": {with(nil)}},
		"a token as a parameter": {},
	}
	for name, h := range unauthenticated {
		path := harness.KeyPath(org)
		if name == "a token as a parameter" {
			path += "?access_token=" + with(nil)
		}
		want401(t, name, s.Do(t, harness.Request{Method: "GET", Path: path, Header: h}))
	}
	for name, token := range map[string]string{
		"role 254.0":              issuer.Sign(t, "es", nil, replaced(payload(nil), `"org_role":"OWNER"`, `"org_role":254.0`)),
		"role 2.54e2":             issuer.Sign(t, "es", nil, replaced(payload(nil), `"org_role":"OWNER"`, `"org_role":2.54e2`)),
		"role as a quoted number": with(harness.Claims{"org_role": "254"}),
		"no role":                 with(harness.Claims{"org_role": nil}),
	} {
		if resp := s.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: token}); resp.Status != 403 || !strings.Contains(string(resp.Body), "insufficient_role") {
			t.Errorf("%s: status %d, body %.300q", name, resp.Status, resp.Body)
		}
	}
	if n := len(s.List(t, org)); n != 0 {
		t.Errorf("%d keys after requests that were all refused", n)
	}
	events := s.Sink(t).Find(func(l harness.Leaf) bool {
		return l.Type != "orgkey.listed" && l.Type != "authn.failed" && l.Type != "access.denied"
	})
	if len(events) != 0 {
		t.Errorf("callers nobody knows cost a log entry each: %+v", events)
	}
}

// hostileTokens are tokens that nobody may accept, whatever the settings say about
// claims. The issuer has the keys rs, which is rsaKey, and es; payload is a good
// token's, changed.
func hostileTokens(t *testing.T, issuer *harness.Issuer, rsaKey *rsa.PrivateKey, payload func(harness.Claims) []byte) map[string]string {
	t.Helper()
	with := func(change harness.Claims) string { return issuer.Sign(t, "es", nil, payload(change)) }
	now := time.Now().Unix()
	parts := strings.Split(with(nil), ".")
	stranger := harness.NewECKey(t)
	public, err := x509.MarshalPKIXPublicKey(&rsaKey.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	publicPEM := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public})
	return map[string]string{
		"alg none":                                  raw(`{"alg":"none","typ":"JWT"}`, payload(nil), nil),
		"alg None with a key ID":                    raw(`{"alg":"None","kid":"es"}`, payload(nil), nil),
		"alg none with a good signature":            raw(`{"alg":"none","kid":"es"}`, payload(nil), []byte(parts[2])),
		"HS256 with the public key's PEM as secret": hs256(`{"alg":"HS256","kid":"rs"}`, payload(nil), publicPEM),
		"HS256 with the public key's DER as secret": hs256(`{"alg":"HS256","kid":"rs"}`, payload(nil), public),
		"HS256 with an empty secret":                hs256(`{"alg":"HS256"}`, payload(nil), nil),
		"RS512 by a key published for RS256":        harness.SignAs(t, jose.RS512, rsaKey, "rs", payload(nil)),
		"PS256 by a key published for RS256":        harness.SignAs(t, jose.PS256, rsaKey, "rs", payload(nil)),
		"ES256 under an RSA key's ID":               harness.SignAs(t, jose.ES256, stranger, "rs", payload(nil)),
		"a stranger's key under a known ID":         harness.SignAs(t, jose.ES256, stranger, "es", payload(nil)),
		"a stranger's key that came along as jwk":   embedded(t, stranger, payload(nil)),
		"a critical header nobody understands":      critical(t, issuer, payload(nil)),
		"a key ID that is a path":                   harness.SignAs(t, jose.ES256, stranger, "../../etc/passwd", payload(nil)),
		"a key ID that is SQL":                      harness.SignAs(t, jose.ES256, stranger, "' OR '1'='1", payload(nil)),
		"an empty key ID":                           harness.SignAs(t, jose.ES256, stranger, "", payload(nil)),
		"expired":                                   with(harness.Claims{"exp": now - 3600}),
		"no expiry":                                 with(harness.Claims{"exp": nil}),
		"an expiry that is a string":                with(harness.Claims{"exp": fmt.Sprint(now + 3600)}),
		"not valid yet":                             with(harness.Claims{"nbf": now + 3600}),
		"another audience":                          with(harness.Claims{"aud": "somebody-else"}),
		"no audience":                               with(harness.Claims{"aud": nil}),
		"an empty audience":                         with(harness.Claims{"aud": ""}),
		"an empty list of audiences":                with(harness.Claims{"aud": []string{}}),
		"another issuer":                            with(harness.Claims{"iss": "https://evil.test"}),
		"no issuer":                                 with(harness.Claims{"iss": nil}),
		"the issuer with a slash more":              with(harness.Claims{"iss": issuer.Name + "/"}),
		"a token that is bound to a key":            with(harness.Claims{"cnf": map[string]string{"jkt": "x"}}),
		"an actor who is nobody":                    with(harness.Claims{"act": map[string]string{}}),
		"a payload that is no JSON":                 issuer.Sign(t, "es", nil, []byte("no JSON")),
		"a payload that is a list":                  issuer.Sign(t, "es", nil, []byte("[]")),
		"a payload nested without end":              issuer.Sign(t, "es", nil, []byte(strings.Repeat("[", 9000))),
		"trailing data after the payload":           issuer.Sign(t, "es", nil, append(payload(nil), "{}"...)),
		"a changed payload":                         parts[0] + "." + base64.RawURLEncoding.EncodeToString(payload(harness.Claims{"sub": "other"})) + "." + parts[2],
		"a signature cut short":                     strings.Join(parts[:2], ".") + "." + parts[2][:20],
		"no signature":                              parts[0] + "." + parts[1] + ".",
		"two parts":                                 parts[0] + "." + parts[1],
		"four parts":                                strings.Join(parts, ".") + "." + parts[2],
		"five parts, as an encrypted token has":     "e30.e30.e30.e30.e30",
		"nothing at all":                            ".",
		"only dots":                                 "..",
		"text":                                      "secret",
		"a token of 14,000 bytes":                   strings.Repeat("a", 14000),
	}
}

// TestRolesNobodyKnowsAreDenied: well-formed, and worth nothing.
func TestRolesNobodyKnowsAreDenied(t *testing.T) {
	t.Parallel()
	issuer := harness.NewIssuer(t)
	s := harness.Start(t, harness.TrustedBy(issuer))
	org := harness.Org()
	for _, role := range []any{"owner", "Owner", " OWNER", "OWNER ", "OWNERS", "ADMIN", "ADMINISTRATOR,OWNER", "", 256, -1, 3, 2, 1, 0, []any{}, []any{"USER", "nobody"}, nil, true, map[string]any{"OWNER": true}} {
		token := issuer.Token(t, harness.Claims{"org_id": org, "org_role": role})
		resp := s.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: token})
		if resp.Status != 403 {
			t.Errorf("role %#v: status %d, body %.300q", role, resp.Status, resp.Body)
		}
	}
}

// TestUnknownKeyIDsCauseFewFetches serves the JWKS over https and sends 1,000
// tokens under key IDs that it does not have.
func TestUnknownKeyIDsCauseFewFetches(t *testing.T) {
	t.Parallel()
	issuer := harness.NewIssuer(t)
	var fetches atomic.Int64
	var document atomic.Value
	document.Store(issuer.Document(t))
	ca := testca.New(t)
	provider := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fetches.Add(1)
		w.Header().Set("Content-Type", "application/json")
		w.Write(document.Load().([]byte))
	}))
	provider.TLS = serverTLS(t, ca)
	provider.StartTLS()
	defer provider.Close()
	issuer.JWKS = provider.URL + "/jwks"
	const interval = 20 * time.Second
	s := harness.Start(t, harness.TrustedBy(issuer), harness.Set("SSL_CERT_FILE", ca.File), harness.Set("ORGKEYS_JWKS_INTERVAL", interval.String()))
	org := harness.Org()
	if resp := s.Do(t, harness.Request{Method: "GET", Path: harness.KeyPath(org), Token: s.Token(t, org, "OWNER")}); resp.Status != 200 {
		t.Fatalf("status %d, body %.300q", resp.Status, resp.Body)
	}
	before, start := fetches.Load(), time.Now()
	key := harness.NewECKey(t)
	payload, err := json.Marshal(issuer.Claims(harness.Claims{"org_id": org}))
	if err != nil {
		t.Fatal(err)
	}
	inParallel(8, func(worker int) {
		for i := range 125 {
			token := harness.SignAs(t, jose.ES256, key, fmt.Sprintf("unknown-%d-%d", worker, i), payload)
			resp := s.Do(t, harness.Request{Method: "GET", Path: harness.KeyPath(org), Token: token})
			if resp.Status == 503 && resp.Header.Get("Retry-After") != "" {
				continue // nobody can look for the key at the moment
			}
			want401(t, "an unknown key ID", resp)
		}
	})
	if got, allowed := fetches.Load()-before, 6+int64(time.Since(start)/interval); got > allowed {
		t.Errorf("1,000 tokens with unknown key IDs caused %d fetches in %s, %d allowed", got, time.Since(start), allowed)
	}
	if resp := s.Do(t, harness.Request{Method: "GET", Path: harness.KeyPath(org), Token: s.Token(t, org, "OWNER")}); resp.Status != 200 {
		t.Errorf("a good token meanwhile: status %d", resp.Status)
	}
}

// TestKeysRotateWithoutARestart uses the JWKS as a file.
func TestKeysRotateWithoutARestart(t *testing.T) {
	t.Parallel()
	issuer := harness.NewIssuer(t)
	s := harness.Start(t, harness.TrustedBy(issuer), harness.Set("ORGKEYS_JWKS_INTERVAL", "1s"))
	org := harness.Org()
	old := s.Token(t, org, "OWNER")
	get := func(token string) int {
		return s.Do(t, harness.Request{Method: "GET", Path: harness.KeyPath(org), Token: token}).Status
	}
	if got := get(old); got != 200 {
		t.Fatalf("status %d", got)
	}
	issuer.Add(t, "second", jose.ES256, harness.NewECKey(t))
	issuer.Forget("first")
	issuer.Publish(t)
	fresh := s.Token(t, org, "OWNER")
	harness.Eventually(t, harness.Patience, "the new key's tokens are good", func() bool { return get(fresh) == 200 })
	harness.Eventually(t, harness.Patience, "the removed key's are not", func() bool { return get(old) == 401 })
}

// TestPromise9_HostileRequests sends what no client sends. Every answer is a
// 4xx or a closed connection, and the server goes on.
func TestPromise9_HostileRequests(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	owner := s.Token(t, "acme", "OWNER")
	auth := "Authorization: Bearer " + owner + "\r\n"
	line := "POST /organization/acme/key HTTP/1.1\r\nHost: h\r\n"
	nonsense := " HTTP/1.1\r\nHost: h\r\n" + auth + "Content-Type: application/json\r\nContent-Length: 8\r\n\r\n{nonsens"
	for name, request := range map[string]string{
		"nothing but a line end":         "\r\n\r\n",
		"noise":                          "\x00\x01\x02\xff\xfe\r\n\r\n",
		"a TLS hello":                    "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
		"an unknown version":             "GET /healthz HTTP/9.9\r\nHost: h\r\n\r\n",
		"no Host":                        "GET /healthz HTTP/1.1\r\n\r\n",
		"two Hosts":                      "GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
		"a header of 20 KiB":             line + "X-Long: " + strings.Repeat("a", 20<<10) + "\r\n\r\n",
		"5,000 headers":                  line + strings.Repeat("X-Many: 1\r\n", 5000) + "\r\n",
		"a path of 20 KiB":               "GET /" + strings.Repeat("a", 20<<10) + " HTTP/1.1\r\nHost: h\r\n\r\n",
		"a header name with a space":     line + "X Evil: 1\r\n\r\n",
		"a folded header":                line + "X-Folded: a\r\n b\r\n\r\n",
		"a length that is negative":      line + auth + "Content-Length: -1\r\n\r\n",
		"two lengths that differ":        line + auth + "Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
		"a length and chunks":            line + auth + "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"an encoding nobody knows":       line + auth + "Transfer-Encoding: cow\r\n\r\n",
		"a chunk that is no number":      line + auth + "Transfer-Encoding: chunked\r\n\r\nzz\r\n",
		"a body over 64 KiB":             line + auth + "Content-Length: 70000\r\n\r\n" + strings.Repeat("a", 70000),
		"an escape that is none":         "GET /organization/%zz/key HTTP/1.1\r\nHost: h\r\n" + auth + "\r\n",
		"a NUL in the path":              "GET /organization/a\x00b/key HTTP/1.1\r\nHost: h\r\n" + auth + "\r\n",
		"an absolute URL as the target":  "GET http://evil.test/organization/acme/key HTTP/1.1\r\nHost: h\r\n\r\n",
		"an asterisk as the target":      "OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n",
		"CONNECT":                        "CONNECT evil.test:443 HTTP/1.1\r\nHost: h\r\n\r\n",
		"a line end in a header's value": line + "X-Request-Id: a\nX-Evil: b\r\n\r\n",
		"an HTTP/2 preface":              "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"Expect that cannot be met":      line + auth + "Expect: the unexpected\r\n\r\n",
		"a registration that is no JSON": "POST /register" + nonsense,
		"a claim that is no JSON":        "POST /enroll/00000000-0000-4000-8000-000000000000" + nonsense,
		"a receipt that is no JSON":      "POST /enroll/00000000-0000-4000-8000-000000000000/receipt" + nonsense,
		"a permission that is no JSON":   "POST /organization/acme/enrollment" + nonsense,
		"a filter that is no JSON":       "POST /systemevent" + nonsense,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			status := sendRaw(t, s, request)
			// 501 and 505 are HTTP's own words for what the request asked for.
			if status >= 500 && status != 501 && status != 505 || status >= 200 && status < 300 {
				t.Errorf("status %d", status)
			}
		})
	}
	t.Cleanup(func() {
		if !s.Running() {
			t.Error("the server ended")
		}
	})
}

// TestPromise9_SlowRequestsEnd: neither a header nor a body that never comes
// keeps a connection for long.
func TestPromise9_SlowRequestsEnd(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	owner := s.Token(t, "acme", "OWNER")
	for name, request := range map[string]string{
		"half a header":           "POST /organization/acme/key HTTP/1.1\r\nHost: h\r\nX-Ne",
		"a body that never comes": "POST /organization/acme/key HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer " + owner + "\r\nContent-Length: 100\r\n\r\nab",
		"a chunk that never ends": "POST /organization/acme/key HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer " + owner + "\r\nTransfer-Encoding: chunked\r\n\r\n64\r\nab",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn, err := net.Dial("tcp", strings.TrimPrefix(s.API, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := conn.Write([]byte(request)); err != nil {
				t.Fatal(err)
			}
			conn.SetReadDeadline(time.Now().Add(harness.Patience))
			answer, err := io.ReadAll(conn)
			if ne, ok := err.(net.Error); ok && ne.Timeout() {
				t.Fatalf("the connection is still open after %s", harness.Patience)
			}
			if strings.Contains(string(answer), "PRIVATE KEY") || strings.HasPrefix(string(answer), "HTTP/1.1 5") {
				t.Errorf("answered %.200q", answer)
			}
		})
	}
}

// sendRaw sends bytes and returns the answer's status, 0 if the connection was
// closed without one.
func sendRaw(t *testing.T, s *harness.Server, request string) int {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.API, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(harness.Patience))
	conn.Write([]byte(request)) // may be refused half-way, which the answer tells
	conn.(*net.TCPConn).CloseWrite()
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		if ne, ok := err.(net.Error); ok && ne.Timeout() {
			t.Error("the server neither answered nor closed the connection")
		}
		return 0
	}
	resp.Body.Close()
	return resp.StatusCode
}

func want401(t *testing.T, name string, resp harness.Response) {
	t.Helper()
	if resp.Status != 401 || !strings.HasPrefix(resp.Header.Get("WWW-Authenticate"), "Bearer") {
		t.Errorf("%s: status %d, WWW-Authenticate %q, body %.300q", name, resp.Status, resp.Header.Get("WWW-Authenticate"), resp.Body)
	}
}

func newRSAKey(t *testing.T) *rsa.PrivateKey {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func raw(header string, payload, signature []byte) string {
	b64 := base64.RawURLEncoding
	return b64.EncodeToString([]byte(header)) + "." + b64.EncodeToString(payload) + "." + string(signature)
}

func hs256(header string, payload, secret []byte) string {
	signed := raw(header, payload, nil)
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte(strings.TrimSuffix(signed, ".")))
	return signed + base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// embedded is a token signed by a key that it brings along.
func embedded(t *testing.T, key crypto.Signer, payload []byte) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, &jose.SignerOptions{EmbedJWK: true})
	if err != nil {
		t.Fatal(err)
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	text, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func critical(t *testing.T, issuer *harness.Issuer, payload []byte) string {
	t.Helper()
	return issuer.Sign(t, "es", map[string]any{"crit": []string{"exp"}, "exp": 1}, payload)
}

func replaced(payload []byte, old, new string) []byte {
	return bytes.Replace(payload, []byte(old), []byte(new), 1)
}
