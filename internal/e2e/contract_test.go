package e2e

import (
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"math/big"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

const (
	quotaMessage    = "Maximum number of organization keys (5) has been reached. Please delete existing keys before creating new ones."
	otherOrgMessage = "Access denied: you can only manage keys for your own organization"
	roleMessage     = "Insufficient permissions: only OWNER and ADMINISTRATOR roles can manage organization keys"
	notFoundMessage = "Organization key not found or does not belong to this organization"
)

var uuidForm = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

func TestKeysOfAnOrganization(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)

	t.Run("a released key is one PKCS#1 PEM of 2048 bits with its ID, fingerprint and location", func(t *testing.T) {
		t.Parallel()
		org := harness.Org()
		resp := s.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: s.Token(t, org, "OWNER")})
		if resp.Status != http.StatusOK {
			t.Fatalf("status %d, body %.300q", resp.Status, resp.Body)
		}
		key := harness.ReadKey(t, org, resp)
		if bits := key.Private.N.BitLen(); bits != 2048 {
			t.Errorf("%d bits", bits)
		}
		if !uuidForm.MatchString(key.ID) {
			t.Errorf("X-Key-Id is %q", key.ID)
		}
		for name, want := range map[string]string{
			"Content-Type": "application/x-pem-file", "Cache-Control": "no-store",
			"Content-Disposition": `attachment; filename="private_key.pem"`,
			"Location":            harness.KeyPath(org) + "/" + key.ID, "X-Key-Fingerprint": thumbprint(&key.Private.PublicKey),
		} {
			if got := resp.Header.Get(name); got != want {
				t.Errorf("%s is %q, want %q", name, got, want)
			}
		}

		listed := s.List(t, org)
		if len(listed) != 1 {
			t.Fatalf("%d keys listed", len(listed))
		}
		l := listed[0]
		if l.ID != key.ID || l.OrgID != org || l.NodeKeys == nil || len(l.NodeKeys) != 0 {
			t.Errorf("listed as %+v", l)
		}
		public := l.Public(t)
		if !public.Equal(&key.Private.PublicKey) {
			t.Error("the listed public key is not the released private key's")
		}
		if got := thumbprint(public); got != key.Fingerprint {
			t.Errorf("X-Key-Fingerprint is %q, the listed public key's thumbprint %q", key.Fingerprint, got)
		}
		created, err := time.Parse(time.RFC3339, l.CreatedAt)
		if err != nil || time.Since(created) > time.Minute || time.Until(created) > time.Second {
			t.Errorf("createdAt is %q (%v)", l.CreatedAt, err)
		}

		deleted := s.Do(t, harness.Request{Method: "DELETE", Path: key.Location, Token: s.Token(t, org, "OWNER")})
		wantSuccess(t, deleted, "Organization key deleted successfully")
		if left := s.List(t, org); len(left) != 0 {
			t.Errorf("%d keys listed after the deletion at Location", len(left))
		}
		s.Do(t, harness.Request{Method: "DELETE", Path: key.Location, Token: s.Token(t, org, "OWNER")}).Want(t, 404, notFoundMessage)
	})

	t.Run("keys are listed newest first, the sixth is refused, deleting all says how many", func(t *testing.T) {
		t.Parallel()
		org := harness.Org()
		var ids []string
		for range 5 {
			ids = append([]string{s.Generate(t, org).ID}, ids...)
		}
		var listed []string
		for _, l := range s.List(t, org) {
			listed = append(listed, l.ID)
		}
		if strings.Join(listed, " ") != strings.Join(ids, " ") {
			t.Errorf("listed %v, generated (newest first) %v", listed, ids)
		}
		owner := s.Token(t, org, "OWNER")
		s.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: owner}).Want(t, 400, quotaMessage)
		wantSuccess(t, s.Do(t, harness.Request{Method: "DELETE", Path: harness.KeyPath(org), Token: owner}), "Successfully deleted 5 organization key(s)")
		wantSuccess(t, s.Do(t, harness.Request{Method: "DELETE", Path: harness.KeyPath(org), Token: owner}), "Successfully deleted 0 organization key(s)")
		if left := s.List(t, org); len(left) != 0 {
			t.Errorf("%d keys left", len(left))
		}
	})

	t.Run("another organization's key answers exactly as one that never was", func(t *testing.T) {
		t.Parallel()
		mine, theirs := harness.Org(), harness.Org()
		key := s.Generate(t, theirs)
		owner := s.Token(t, mine, "OWNER")
		exists := s.Do(t, harness.Request{Method: "DELETE", Path: harness.KeyPath(mine) + "/" + key.ID, Token: owner})
		never := s.Do(t, harness.Request{Method: "DELETE", Path: harness.KeyPath(mine) + "/11111111-2222-4333-8444-555555555555", Token: owner})
		exists.Want(t, 404, notFoundMessage)
		never.Want(t, 404, notFoundMessage)
		if len(s.List(t, theirs)) != 1 {
			t.Error("the other organization's key is gone")
		}
	})

	t.Run("a key ID of another form is not found", func(t *testing.T) {
		t.Parallel()
		org := harness.Org()
		for _, id := range []string{"x", "..%2f..", "%00", strings.Repeat("9", 4000), "'%20OR%201=1--", "%F0%9F%98%80", "11111111-2222-4333-8444-55555555555Z"} {
			resp := s.Do(t, harness.Request{Method: "DELETE", Path: harness.KeyPath(org) + "/" + id, Token: s.Token(t, org, "OWNER")})
			if resp.Status != 404 && resp.Status != 400 {
				t.Errorf("key ID %.40q: status %d", id, resp.Status)
			}
		}
	})
}

// TestRolesAndOrganizations is the contract on who may do what, by example.
func TestRolesAndOrganizations(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	key := s.Generate(t, org)
	requests := []harness.Request{
		{Method: "GET", Path: harness.KeyPath(org)},
		{Method: "POST", Path: harness.KeyPath(org)},
		{Method: "DELETE", Path: harness.KeyPath(org) + "/" + key.ID},
		{Method: "DELETE", Path: harness.KeyPath(org)},
	}
	for _, role := range []string{"WORKSPACES", "BILLING", "USER"} {
		for _, r := range requests {
			r.Token = s.Token(t, org, role)
			s.Do(t, r).Want(t, 403, roleMessage)
		}
	}
	// The organization is checked before the role, so whoever is of another one hears that only.
	for _, role := range []string{"OWNER", "ADMINISTRATOR", "WORKSPACES", "BILLING", "USER"} {
		for _, r := range requests {
			r.Token = s.Token(t, harness.Org(), role)
			s.Do(t, r).Want(t, 403, otherOrgMessage)
		}
	}
	upper := strings.ToUpper(org)
	s.Do(t, harness.Request{Method: "GET", Path: harness.KeyPath(org), Token: s.Token(t, upper, "OWNER")}).Want(t, 403, otherOrgMessage)
	if left := s.List(t, org); len(left) != 1 {
		t.Fatalf("%d keys after requests that were all denied", len(left))
	}
	for _, role := range []string{"ADMINISTRATOR", "OWNER"} {
		r := harness.Request{Method: "GET", Path: harness.KeyPath(org), Token: s.Token(t, org, role)}
		if resp := s.Do(t, r); resp.Status != 200 {
			t.Errorf("%s: status %d", role, resp.Status)
		}
	}
	wantSuccess(t, s.Do(t, harness.Request{Method: "DELETE", Path: key.Location, Token: s.Token(t, org, "ADMINISTRATOR")}), "Organization key deleted successfully")
}

// TestPromise9_MalformedOrganizations: 400 to whoever is authenticated, and
// the ID reaches neither header nor log.
func TestPromise9_MalformedOrganizations(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	owner := s.Token(t, "acme", "OWNER")
	for _, id := range []string{
		"-acme", "_acme", "ac.me", "ac%20me", "%61cme%0d%0aX-Evil:1", "..", "%2e%2e", "acme%00", strings.Repeat("a", 129),
		"%D0%B0cme", "acme%E2%80%AE", "%FF%FE", "acme%2Fkey", "'", "%3Cscript%3E",
	} {
		resp := s.Do(t, harness.Request{Method: "POST", Path: "/organization/" + id + "/key", Token: owner})
		if resp.Status != 400 && resp.Status != 404 {
			t.Errorf("organization %q: status %d, body %.300q", id, resp.Status, resp.Body)
		}
		if resp.Header.Get("X-Evil") != "" || resp.Header.Get("Location") != "" {
			t.Errorf("organization %q reached a header: %v", id, resp.Header)
		}
	}
	longest := strings.Repeat("a", 128)
	if resp := s.Do(t, harness.Request{Method: "GET", Path: harness.KeyPath(longest), Token: s.Token(t, longest, "OWNER")}); resp.Status != 200 {
		t.Errorf("an organization ID of 128 characters: status %d", resp.Status)
	}
	if strings.Contains(string(s.Output()), "X-Evil") {
		t.Error("a malformed organization ID reached the log")
	}
}

func TestAnswersToWrongPathsAndMethods(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	owner := s.Token(t, "acme", "OWNER")
	for _, c := range []struct {
		method, path string
		status       int
		allow        string
	}{
		{"GET", "/", 404, ""},
		{"GET", "/organization/acme", 404, ""},
		{"GET", "/organization/acme/key/", 404, ""},
		{"GET", "//organization/acme/key", 404, ""},
		{"GET", "/Organization/acme/key", 404, ""},
		{"GET", "/organization/acme/KEY", 404, ""},
		{"GET", "/organization/acme/../acme/key", 404, ""},
		{"GET", "/metrics", 404, ""},
		{"PUT", "/organization/acme/key", 405, "DELETE, GET, HEAD, POST"},
		{"PATCH", "/organization/acme/key", 405, "DELETE, GET, HEAD, POST"},
		{"GET", "/organization/acme/key/11111111-2222-4333-8444-555555555555", 405, "DELETE"},
		{"POST", "/organization/acme/key/11111111-2222-4333-8444-555555555555", 405, "DELETE"},
		{"POST", "/readyz", 405, "GET, HEAD"},
		{"BREW", "/organization/acme/key", 405, "DELETE, GET, HEAD, POST"},
	} {
		t.Run(c.method+" "+c.path, func(t *testing.T) {
			resp := s.Do(t, harness.Request{Method: c.method, Path: c.path, Token: owner})
			if resp.Status != c.status {
				t.Fatalf("status %d, want %d; body %.300q", resp.Status, c.status, resp.Body)
			}
			if got := sorted(resp.Header.Get("Allow")); got != c.allow {
				t.Errorf("Allow is %q, want %q", got, c.allow)
			}
			if resp.Header.Get("Location") != "" {
				t.Errorf("redirects to %q", resp.Header.Get("Location"))
			}
		})
	}
}

func TestRequestIDs(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	for _, c := range []struct {
		sent string
		kept bool
	}{
		{"a", true}, {"Req-42", true}, {strings.Repeat("x", 64), true},
		{"", false}, {strings.Repeat("x", 65), false}, {"a b", false}, {"a_b", false}, {`{"a":1}`, false}, {"é", false}, {"a;b", false},
	} {
		resp := s.Do(t, harness.Request{Method: "GET", Path: "/healthz", Header: http.Header{"X-Request-Id": {c.sent}}})
		if got := resp.Header.Get("X-Request-Id"); (got == c.sent) != c.kept {
			t.Errorf("X-Request-Id %q came back as %q", c.sent, got)
		}
	}
	first := s.Do(t, harness.Request{Method: "GET", Path: "/healthz"}).Header.Get("X-Request-Id")
	second := s.Do(t, harness.Request{Method: "GET", Path: "/healthz"}).Header.Get("X-Request-Id")
	if first == second {
		t.Errorf("two requests have the ID %q", first)
	}
	for _, r := range []harness.Request{{Method: "GET", Path: "/nowhere"}, {Method: "PUT", Path: "/healthz"}, {Method: "GET", Path: "/organization/acme/key"}} {
		r.Header = http.Header{"X-Request-Id": {"mine-1"}}
		resp := s.Do(t, r)
		var e harness.Failure
		if err := json.Unmarshal(resp.Body, &e); err != nil {
			t.Fatal(err)
		}
		if resp.Header.Get("X-Request-Id") != "mine-1" || e.RequestID != "" && e.RequestID != "mine-1" {
			t.Errorf("%s %s: X-Request-Id %q, requestId %q", r.Method, r.Path, resp.Header.Get("X-Request-Id"), e.RequestID)
		}
	}
}

func TestHealthReadinessMetricsAndDocument(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	s.Generate(t, harness.Org())
	for _, path := range []string{"/healthz", "/readyz", "/openapi.yaml"} {
		resp := s.Do(t, harness.Request{Method: "GET", Path: path})
		if resp.Status != 200 {
			t.Errorf("%s: status %d", path, resp.Status)
		}
		for _, dependency := range []string{"sqlite", "softhsm", s.Dir} {
			if path != "/openapi.yaml" && strings.Contains(strings.ToLower(string(resp.Body)), strings.ToLower(dependency)) {
				t.Errorf("%s on the public listener tells of %s: %s", path, dependency, resp.Body)
			}
		}
	}
	for path, want := range map[string]string{"/metrics": "# TYPE", "/readyz": "", "/healthz": ""} {
		resp, err := http.Get(s.Admin + path)
		if err != nil {
			t.Fatal(err)
		}
		body := readAll(t, resp)
		if resp.StatusCode != 200 || !strings.Contains(body, want) {
			t.Errorf("%s on the admin listener: status %d, body %.200q", path, resp.StatusCode, body)
		}
	}
}

func wantSuccess(t *testing.T, resp harness.Response, message string) {
	t.Helper()
	var body struct {
		Success bool   `json:"success"`
		Message string `json:"message"`
	}
	if err := json.Unmarshal(resp.Body, &body); err != nil || resp.Status != 200 || !body.Success || body.Message != message {
		t.Errorf("status %d, body %.300q; want success with %q", resp.Status, resp.Body, message)
	}
}

// thumbprint is RFC 7638, section 3, written out for RSA.
func thumbprint(k *rsa.PublicKey) string {
	b64 := base64.RawURLEncoding
	e := b64.EncodeToString(big.NewInt(int64(k.E)).Bytes())
	sum := sha256.Sum256([]byte(`{"e":"` + e + `","kty":"RSA","n":"` + b64.EncodeToString(k.N.Bytes()) + `"}`))
	return b64.EncodeToString(sum[:])
}
