package api

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gin-gonic/gin"

	"github.com/orgkeys/orgkeys/internal/authn"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// errorOf reads an error and holds it to the form that every error has.
func errorOf(t *testing.T, a answer) errorBody {
	t.Helper()
	var e errorBody
	if err := json.Unmarshal(a.body, &e); err != nil {
		t.Fatalf("not JSON: %q", a.body)
	}
	if e.Success || e.Message == "" || e.ErrorCode == "" || e.RequestID != a.Header.Get("X-Request-Id") {
		t.Errorf("not the form of an error: %s", a.body)
	}
	if got := a.Header.Get("Content-Type"); got != "application/json" {
		t.Errorf("Content-Type %q", got)
	}
	return e
}

// TestErrorsToResponses is the table of the contract, message by message.
func TestErrorsToResponses(t *testing.T) {
	deny := func(action authz.Action, reason authz.Reason) error {
		return &gate.DeniedError{Action: action, Reason: reason}
	}
	secret := errors.New("dial tcp 10.1.2.3:8200: connection refused")
	const generate, list, deleteAll, deleteOne = "POST /organization/acme/key", "GET /organization/acme/key", "DELETE /organization/acme/key", "DELETE /organization/acme/key/" + keyID
	for _, c := range []struct {
		request    string
		err        error
		status     int
		message    string
		retryAfter bool
	}{
		{generate, &orgkey.QuotaError{Limit: 5}, 400, "Maximum number of organization keys (5) has been reached. Please delete existing keys before creating new ones.", false},
		{generate, fmt.Errorf("reserving: %w", &orgkey.QuotaError{Limit: 17}), 400, "Maximum number of organization keys (17) has been reached. Please delete existing keys before creating new ones.", false},
		{generate, deny(authz.GenerateKey, authz.OtherOrganization), 403, "Access denied: you can only manage keys for your own organization", false},
		{generate, deny(authz.GenerateKey, authz.InsufficientRole), 403, "Insufficient permissions: only OWNER and ADMINISTRATOR roles can manage organization keys", false},
		{generate, deny(authz.GenerateKey, "invented_by_a_policy"), 403, "Access denied", false},
		{generate, errors.New("CKR_DEVICE_ERROR"), 500, "Key generation failed", false},
		{generate, fmt.Errorf("making: %w", orgkey.ErrGone), 500, "Key generation failed", false},
		{generate, fmt.Errorf("making: %w: %w: %w", orgkey.ErrBackend, orgkey.ErrUnavailable, secret), 503, "The service cannot answer at the moment. Please try again later.", true},
		{generate, fmt.Errorf("making: %w: %w", orgkey.ErrBackend, secret), 500, "Key generation failed", false},
		{generate, fmt.Errorf("storing: %w: %w", orgkey.ErrUnavailable, secret), 503, "The service cannot answer at the moment. Please try again later.", true},
		{generate, context.DeadlineExceeded, 500, "Key generation failed", false},
		{generate, orgkey.ErrOverloaded, 503, "Too many key generations in progress. Please try again shortly.", true},
		{generate, fmt.Errorf("%w: %w", gate.ErrAudit, secret), 503, "The audit log cannot be written at the moment. Nothing was released; please try again later.", true},
		{generate, errors.Join(gate.ErrAudit, &orgkey.QuotaError{Limit: 5}), 503, "The audit log cannot be written at the moment. Nothing was released; please try again later.", true},
		{list, deny(authz.ListKeys, authz.OtherOrganization), 403, "Access denied: you can only manage keys for your own organization", false},
		{list, deny(authz.ListKeys, authz.InsufficientRole), 403, "Insufficient permissions: only OWNER and ADMINISTRATOR roles can manage organization keys", false},
		{list, fmt.Errorf("%w: %w", orgkey.ErrUnavailable, secret), 503, "The service cannot answer at the moment. Please try again later.", true},
		{list, gate.ErrAudit, 503, "The audit log cannot be written at the moment. Nothing was released; please try again later.", true},
		{list, fmt.Errorf("opening: %w", orgkey.ErrSealBroken), 500, "Internal error", false},
		{list, secret, 500, "Internal error", false},
		{deleteAll, deny(authz.DeleteAllKeys, authz.InsufficientRole), 403, "Insufficient permissions: only OWNER and ADMINISTRATOR roles can manage organization keys", false},
		{deleteAll, secret, 500, "Internal error", false},
		{deleteOne, deny(authz.DeleteKey, authz.OtherOrganization), 403, "Access denied: you can only manage keys for your own organization", false},
		{deleteOne, fmt.Errorf("deleting: %w", orgkey.ErrNotFound), 404, "Organization key not found or does not belong to this organization", false},
	} {
		t.Run(fmt.Sprintf("%s, %v", c.request, c.err), func(t *testing.T) {
			b := newBench(t, nil)
			b.keys.err = c.err
			method, path, _ := strings.Cut(c.request, " ")
			a := b.ask(method, path)
			e := errorOf(t, a)
			if a.StatusCode != c.status || e.Message != c.message {
				t.Errorf("%d %q", a.StatusCode, e.Message)
			}
			if (a.Header.Get("Retry-After") != "") != c.retryAfter {
				t.Errorf("Retry-After: %q", a.Header.Get("Retry-After"))
			}
			if strings.Contains(string(a.body), "10.1.2.3") || strings.Contains(string(a.body), "CKR_") {
				t.Errorf("internal text reached the client: %s", a.body)
			}
			if a.Header.Get("Cache-Control") != "no-store" {
				t.Error("an authenticated answer may be cached")
			}
		})
	}
}

func TestDeniedWordsGoByTheAction(t *testing.T) {
	for action, message := range map[authz.Action]string{
		authz.DeleteNode: "Insufficient permissions: only OWNER and ADMINISTRATOR roles can manage nodes",
		authz.PutSecret:  "Insufficient permissions: only OWNER and ADMINISTRATOR roles can manage secrets",
	} {
		if p := problemFor(&gate.DeniedError{Action: action, Reason: authz.InsufficientRole}); p.status != 403 || p.message != message {
			t.Errorf("%s: %d %s", action, p.status, p.message)
		}
	}
}

func TestGenerateReleasesThePEM(t *testing.T) {
	b := newBench(t, nil)
	a := b.ask("POST", "/organization/acme/key", "Accept", "application/x-pem-file")
	if a.StatusCode != 200 || string(a.body) != string(testPEM()) {
		t.Fatalf("%d %s", a.StatusCode, a.body)
	}
	for name, value := range map[string]string{
		"Content-Type": "application/x-pem-file", "Content-Disposition": `attachment; filename="private_key.pem"`,
		"Cache-Control": "no-store", "Location": "/organization/acme/key/" + keyID, "X-Key-Id": keyID,
		"X-Key-Fingerprint": strings.Repeat("f", 43), "Content-Length": fmt.Sprint(len(testPEM())),
		"Vary": "Accept, Sec-Fetch-Mode", "X-Content-Type-Options": "nosniff",
	} {
		if got := a.Header.Get(name); got != value {
			t.Errorf("%s: %q", name, got)
		}
	}
	if got := b.keys.call; got.Caller.Subject != "alice" || got.Address != "127.0.0.1" || got.Request != a.Header.Get("X-Request-Id") {
		t.Errorf("the use case was called for %+v", got)
	}
}

func TestGenerateReleasesTheSamePEMAsJSON(t *testing.T) {
	b := newBench(t, nil)
	a := b.ask("POST", "/organization/acme/key", "Accept", "application/json")
	var text string
	if err := json.Unmarshal(a.body, &text); err != nil || text != string(testPEM()) {
		t.Fatalf("%v: %s", err, a.body)
	}
	if block, rest := pem.Decode([]byte(text)); block == nil || block.Type != "RSA PRIVATE KEY" || len(rest) > 0 {
		t.Errorf("not one PKCS#1 block: %q", text)
	}
	if a.Header.Get("Content-Type") != "application/json" || a.Header.Get("Content-Disposition") != "" || a.Header.Get("X-Key-Id") != keyID ||
		a.Header.Get("Content-Length") != fmt.Sprint(len(a.body)) {
		t.Errorf("headers: %v", a.Header)
	}
}

// keepingWriter keeps the slice that was last written, not a copy.
type keepingWriter struct {
	gin.ResponseWriter
	written []byte
}

func (w *keepingWriter) Write(b []byte) (int, error) {
	w.written = b
	return w.ResponseWriter.Write(b)
}

func (w *keepingWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// The PEM is the use case's to clear; its JSON form is made here.
func TestPromise1_TheJSONFormIsCleared(t *testing.T) {
	w := &keepingWriter{}
	server := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		c, _ := gin.CreateTestContext(rw)
		w.ResponseWriter = c.Writer
		c.Writer = w
		if err := release(r.Context(), c, jsonString, orgkey.Generated{ID: keyID, Org: "acme", PEM: testPEM()}); err != nil {
			t.Error(err)
		}
	}))
	defer server.Close()
	resp, err := http.Get(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || !bytes.Contains(body, []byte("RSA PRIVATE KEY")) {
		t.Fatalf("%v: %s", err, body)
	}
	server.Close() // the handler has returned
	if len(w.written) != len(body) || bytes.ContainsFunc(w.written, func(r rune) bool { return r != 0 }) {
		t.Errorf("%d bytes were written, and are still in memory", len(w.written))
	}
}

func TestJSONStringEscapes(t *testing.T) {
	text := []byte("a\"b\\c\r\nd")
	var back string
	if err := json.Unmarshal(appendJSONString(nil, text), &back); err != nil || back != string(text) {
		t.Errorf("%v: %q", err, back)
	}
}

func TestUnsupportedAcceptGeneratesNothing(t *testing.T) {
	b := newBench(t, nil)
	a := b.ask("POST", "/organization/acme/key", "Accept", "text/html")
	e := errorOf(t, a)
	if a.StatusCode != 406 || !strings.Contains(e.Message, "application/x-pem-file") || !strings.Contains(e.Message, "application/json") {
		t.Errorf("%d %s", a.StatusCode, e.Message)
	}
	if got := b.keys.log(); !slices.Equal(got, []string{"reject acme orgkey.generate not_acceptable"}) {
		t.Errorf("use cases asked: %q", got)
	}
}

func TestStrangersHearNoBeforeAnythingElse(t *testing.T) {
	b := newBench(t, nil)
	b.keys.rejects = &gate.DeniedError{Action: authz.GenerateKey, Reason: authz.OtherOrganization}
	if a := b.ask("POST", "/organization/globex/key", "Accept", "text/html"); a.StatusCode != 403 {
		t.Errorf("an unsupported Accept: %d", a.StatusCode)
	}
	if a := b.ask("DELETE", "/organization/globex/key/not-a-key"); a.StatusCode != 403 {
		t.Errorf("a malformed key ID: %d", a.StatusCode)
	}
}

func TestRefusalAtTheEdgeWaitsForTheAuditTrail(t *testing.T) {
	b := newBench(t, nil)
	b.keys.rejects = gate.ErrAudit
	if a := b.ask("POST", "/organization/acme/key", "Accept", "text/html"); a.StatusCode != 503 {
		t.Errorf("%d", a.StatusCode)
	}
}

func TestList(t *testing.T) {
	b := newBench(t, nil)
	const otherID = "00000000-0000-4000-8000-000000000000"
	fingerprint := orgkey.NewPublic(&testKey().PublicKey).Fingerprint()
	created := time.Date(2026, 3, 1, 13, 0, 0, 5_600_000, time.FixedZone("", 3600))
	b.keys.keys = []orgkey.Key{
		{ID: keyID, Org: "acme", Public: orgkey.NewPublic(&testKey().PublicKey), Fingerprint: fingerprint, Created: created, Delivered: created.Add(time.Second), DeliveredTo: "192.0.2.9", LastUsed: created.Add(time.Minute),
			Nodes: []orgkey.NodeKey{{KeyID: keyID, NodeID: "203.0.113.7", Confirmed: true}}},
		{ID: otherID, Org: "acme", Public: orgkey.NewPublic(&testKey().PublicKey), Fingerprint: fingerprint, Created: created},
	}
	a := b.ask("GET", "/organization/acme/key")
	var got map[string]any
	if err := json.Unmarshal(a.body, &got); err != nil {
		t.Fatal(err)
	}
	keys := got["data"].([]any)
	first, second := keys[0].(map[string]any), keys[1].(map[string]any)
	public := first["publicKey"].(string)
	delete(first, "publicKey")
	delete(second, "publicKey")
	if block, rest := pem.Decode([]byte(public)); block == nil || block.Type != "PUBLIC KEY" || len(rest) > 0 {
		t.Errorf("not PKIX PEM: %q", public)
	}
	want := map[string]any{"id": keyID, "orgId": "acme", "fingerprint": fingerprint, "createdAt": "2026-03-01T12:00:00.005Z", "lastUsed": "2026-03-01T12:01:00.005Z",
		"deliveredAt": "2026-03-01T12:00:01.005Z", "deliveredTo": "192.0.2.9", "scope": "organization",
		"nodeKeys": []any{map[string]any{"keyId": keyID, "nodeId": "203.0.113.7", "confirmed": true}}}
	if fmt.Sprint(first) != fmt.Sprint(want) {
		t.Errorf("got  %v\nwant %v", first, want)
	}
	want = map[string]any{"id": otherID, "orgId": "acme", "fingerprint": fingerprint, "createdAt": "2026-03-01T12:00:00.005Z", "delivery": "unconfirmed", "scope": "organization", "nodeKeys": []any{}}
	if fmt.Sprint(second) != fmt.Sprint(want) {
		t.Errorf("got  %v\nwant %v", second, want)
	}
	if !strings.Contains(string(a.body), `"nodeKeys":[]`) {
		t.Error("an empty nodeKeys is not []")
	}
}

func TestEmptyListIsAnArray(t *testing.T) {
	b := newBench(t, nil)
	if a := b.ask("GET", "/organization/acme/key"); string(a.body) != `{"success":true,"message":"Organization keys retrieved successfully","data":[]}` {
		t.Errorf("%s", a.body)
	}
}

func TestDeletes(t *testing.T) {
	b := newBench(t, nil)
	b.keys.deleted = 3
	if a := b.ask("DELETE", "/organization/acme/key"); a.StatusCode != 200 || string(a.body) != `{"success":true,"message":"Successfully deleted 3 organization key(s)"}` {
		t.Errorf("%d %s", a.StatusCode, a.body)
	}
	if a := b.ask("DELETE", "/organization/acme/key/"+keyID); a.StatusCode != 200 || string(a.body) != `{"success":true,"message":"Organization key deleted successfully"}` {
		t.Errorf("%d %s", a.StatusCode, a.body)
	}
	if a := b.ask("DELETE", "/organization/acme/key?scope=all"); a.StatusCode != 200 || string(a.body) != `{"success":true,"message":"Successfully deleted 3 organization key(s) and 4 node key(s)"}` {
		t.Errorf("%d %s", a.StatusCode, a.body)
	}
	b.keys.asked = b.keys.asked[:2]
	for _, id := range []string{"nope", strings.ToUpper(keyID), "%7B" + keyID + "%7D", "a%0Ab", strings.Repeat("a", 4000), "%2e%2e"} {
		a := b.ask("DELETE", "/organization/acme/key/"+id)
		if e := errorOf(t, a); a.StatusCode != 404 || e.Message != "Organization key not found or does not belong to this organization" {
			t.Errorf("%.40q: %d %s", id, a.StatusCode, e.Message)
		}
	}
	for _, asked := range b.keys.log()[2:] {
		if asked != "reject acme orgkey.delete not_found" {
			t.Errorf("a malformed ID reached the use case: %.80q", asked)
		}
	}
}

// Whoever does not say which keys means the organization's, as the contract
// does; and a scope that is not known means nothing.
func TestScopesOfKeys(t *testing.T) {
	b := newBench(t, nil)
	for _, c := range []struct {
		request, asked string
		status         int
	}{
		{"GET ", "list acme", 200},
		{"GET ?scope=organization", "list acme", 200},
		{"GET ?scope=node", "list_node_keys acme", 200},
		{"GET ?scope=all", "reject acme orgkey.list invalid", 400},
		{"GET ?scope=node&scope=node", "reject acme orgkey.list invalid", 400},
		{"GET ?scope=%zz", "reject acme orgkey.list invalid", 400},
		{"DELETE ", "delete_all acme", 200},
		{"DELETE ?scope=organization", "delete_all acme", 200},
		{"DELETE ?scope=all", "delete_all_with_node_keys acme", 200},
		{"DELETE ?scope=node", "reject acme orgkey.delete_all invalid", 400},
		{"DELETE ?scope=", "reject acme orgkey.delete_all invalid", 400},
		{"DELETE ?scope=ALL", "reject acme orgkey.delete_all invalid", 400},
	} {
		method, query, _ := strings.Cut(c.request, " ")
		a := b.ask(method, "/organization/acme/key"+query)
		if asked := b.keys.log(); a.StatusCode != c.status || asked[len(asked)-1] != c.asked {
			t.Errorf("%s: %d, asked for %q", c.request, a.StatusCode, asked[len(asked)-1])
		}
	}
}

func TestUnknownCallers(t *testing.T) {
	b := newBench(t, nil)
	for _, c := range []struct{ name, authorization, message, challenge string }{
		{"no token", "", "Authentication required", "Bearer"},
		{"a bad token", "Bearer forged", "Invalid or expired token", `Bearer error="invalid_token", error_description="the signature is wrong"`},
	} {
		for _, request := range []string{"POST /organization/acme/key", "GET /organization/-/key", "DELETE /organization/acme/key", "DELETE /organization/acme/key/x"} {
			method, path, _ := strings.Cut(request, " ")
			a := b.ask(method, path, "Authorization", c.authorization, "Accept", "text/html")
			e := errorOf(t, a)
			if a.StatusCode != 401 || e.Message != c.message || a.Header.Get("WWW-Authenticate") != c.challenge || a.Header.Get("Cache-Control") != "no-store" {
				t.Errorf("%s, %s: %d %s %v", c.name, request, a.StatusCode, e.Message, a.Header)
			}
		}
	}
	if got := b.keys.log(); len(got) > 0 {
		t.Errorf("an unknown caller reached the use cases: %q", got)
	}
	want := []string{"missing", "missing", "missing", "missing", "signature", "signature", "signature", "signature"}
	if got := b.reasons(); !slices.Equal(got, want) {
		t.Errorf("counted %q", got)
	}
	if text := b.scrape(); !strings.Contains(text, `orgkeys_authn_failures_total{reason="missing"} 4`) {
		t.Error("the failures are not in the metrics")
	}
}

func TestAuthenticationThatCannotBeDone(t *testing.T) {
	for _, c := range []struct {
		err     error
		status  int
		counted []string
	}{
		{authn.ErrKeysUnavailable, 503, nil},
		{&authn.UnsureError{Refusal: &authn.TokenError{Reason: authn.ReasonUnknownKey}}, 503, []string{"unknown_key"}},
		{errors.New("a bug"), 500, nil},
	} {
		b := newBench(t, func(config *Config) {
			config.Authenticate = func(context.Context, http.Header) (authz.Caller, error) { return authz.Caller{}, c.err }
		})
		a := b.ask("GET", "/organization/acme/key")
		if a.StatusCode != c.status || len(b.keys.log()) > 0 || !slices.Equal(b.reasons(), c.counted) {
			t.Errorf("%v: %d, asked %q, counted %q", c.err, a.StatusCode, b.keys.log(), b.reasons())
		}
	}
}

func TestMalformedOrganizations(t *testing.T) {
	b := newBench(t, nil)
	for _, org := range []string{"-acme", "_acme", "ac.me", "acme%20", "ac%2Fme", "acme%00", "..%2fadmin", "%2e%2e", "%C3%A9", "a+b", strings.Repeat("a", 129), "%0d%0aX-Evil:1"} {
		for _, method := range []string{"POST", "GET", "DELETE"} {
			a := b.ask(method, "/organization/"+org+"/key")
			if e := errorOf(t, a); a.StatusCode != 400 || e.ErrorCode != "invalid_organization" {
				t.Errorf("%s %.20q: %d %s", method, org, a.StatusCode, a.body)
			}
		}
	}
	for _, asked := range b.keys.log() {
		if !strings.HasPrefix(asked, "reject  orgkey.") || !strings.HasSuffix(asked, " malformed_organization") {
			t.Errorf("a malformed organization reached a use case: %q", asked)
		}
	}
	if strings.Contains(b.logs.String(), "admin") || strings.Contains(b.logs.String(), "X-Evil") {
		t.Errorf("a malformed organization reached the log:\n%s", b.logs)
	}
	if a := b.ask("GET", "/organization/"+strings.Repeat("a", 128)+"/key"); a.StatusCode != 200 {
		t.Errorf("128 characters: %d", a.StatusCode)
	}
}

func TestDraining(t *testing.T) {
	b := newBench(t, nil)
	b.api.Drain()
	for _, request := range []string{"POST /organization/acme/key", "GET /organization/acme/key", "DELETE /organization/acme/key/" + keyID} {
		method, path, _ := strings.Cut(request, " ")
		a := b.ask(method, path)
		if e := errorOf(t, a); a.StatusCode != 503 || e.ErrorCode != "draining" || a.Header.Get("Retry-After") == "" || !a.Close {
			t.Errorf("%s: %d %s %v", request, a.StatusCode, e.ErrorCode, a.Header)
		}
	}
	if a := b.ask("GET", "/readyz"); a.StatusCode != 503 {
		t.Errorf("readyz: %d", a.StatusCode)
	}
	if a := b.ask("GET", "/healthz"); a.StatusCode != 200 {
		t.Errorf("healthz: %d", a.StatusCode)
	}
	if got := b.keys.log(); len(got) > 0 {
		t.Errorf("use cases asked: %q", got)
	}
}
