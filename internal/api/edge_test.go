package api

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gin-gonic/gin"

	"github.com/orgkeys/orgkeys/internal/org"
)

func TestRequestIDs(t *testing.T) {
	b := newBench(t, nil)
	for _, c := range []struct {
		name string
		sent []string
		kept bool
	}{
		{"a UUID", []string{"0b0c7a4e-6a52-4d0b-9a43-8b9f0f7d2c11"}, true},
		{"64 characters", []string{strings.Repeat("a", 64)}, true},
		{"65 characters", []string{strings.Repeat("a", 65)}, false},
		{"an underscore", []string{"a_b"}, false},
		{"a quote", []string{`a"b`}, false},
		{"a space", []string{"a b"}, false},
		{"two of them", []string{"a", "b"}, false},
		{"the same twice", []string{"a", "a"}, false},
		{"none", nil, false},
	} {
		var headers []string
		for _, s := range c.sent {
			headers = append(headers, "X-Request-Id", s)
		}
		a := b.ask("GET", "/organization/acme/key", headers...)
		got := a.Header.Values("X-Request-Id")
		if len(got) != 1 || !requestIDForm.MatchString(got[0]) || (c.kept && got[0] != c.sent[0]) || (!c.kept && slices.Contains(c.sent, got[0])) {
			t.Errorf("%s: answered %q", c.name, got)
		}
		if b.keys.call.Request != got[0] {
			t.Errorf("%s: the use case was told %q", c.name, b.keys.call.Request)
		}
	}
}

func FuzzRequestID(f *testing.F) {
	f.Add("abc")
	f.Add("a\nb")
	f.Add(strings.Repeat("-", 65))
	f.Fuzz(func(t *testing.T, sent string) {
		got := requestID(http.Header{"X-Request-Id": {sent}})
		if !requestIDForm.MatchString(got) || strings.ContainsAny(got, "\r\n\"\\ ") || len(got) > 64 {
			t.Errorf("%q became %q", sent, got)
		}
	})
}

func TestPathsAndMethods(t *testing.T) {
	b := newBench(t, nil)
	const keys, key = "/organization/acme/key", "/organization/acme/key/" + keyID
	for _, c := range []struct {
		method, path string
		status       int
		allow        string
	}{
		{"PUT", keys, 405, "DELETE, GET, HEAD, POST"},
		{"PATCH", keys, 405, "DELETE, GET, HEAD, POST"},
		{"OPTIONS", keys, 405, "DELETE, GET, HEAD, POST"},
		{"TRACE", keys, 405, "DELETE, GET, HEAD, POST"},
		{"PROPFIND", keys, 405, "DELETE, GET, HEAD, POST"},
		{"GET", key, 405, "DELETE"},
		{"POST", "/readyz", 405, "GET, HEAD"},
		{"HEAD", "/nowhere", 404, ""},
		{"GET", "/", 404, ""},
		{"GET", "/organization", 404, ""},
		{"GET", "/organization/acme", 404, ""},
		{"GET", "/organization//key", 400, ""}, // an empty organization is a malformed one
		{"GET", "/organization/acme/key/", 404, ""},
		{"GET", "//organization/acme/key", 404, ""},
		{"GET", "/organization/acme//key", 404, ""},
		{"GET", "/organization/acme/keys", 404, ""},
		{"GET", "/Organization/acme/key", 404, ""},
		{"GET", "/organization/acme/key%2F", 404, ""},
		{"GET", "/organization%2Facme%2Fkey", 404, ""},
		{"GET", "/organization/acme%2Fkey", 404, ""},
		{"GET", "/organization/acme/../globex/key", 404, ""},
		{"GET", "/organization/acme/./key", 404, ""},
		{"GET", "/organization/acme%2F..%2Fglobex/key", 400, ""},
		{"GET", "/organization/acme/k%65y", 404, ""},
		{"GET", "/metrics", 404, ""},
		{"GET", "/healthz/", 404, ""},
	} {
		a := b.ask(c.method, c.path)
		allow := strings.Split(a.Header.Get("Allow"), ", ")
		slices.Sort(allow)
		if a.StatusCode != c.status || strings.Join(allow, ", ") != c.allow || a.Header.Get("Location") != "" {
			t.Errorf("%s %s: %d, Allow %q, Location %q", c.method, c.path, a.StatusCode, allow, a.Header.Get("Location"))
		}
		if c.method != "HEAD" {
			errorOf(t, a)
		}
	}
	for _, asked := range b.keys.log() {
		if !strings.HasPrefix(asked, "reject ") {
			t.Errorf("a path that does not exist reached %q", asked)
		}
	}
}

// HEAD is routed wherever GET is, but not where reading hands a key out.
func TestHEADIsGETWithoutABody(t *testing.T) {
	b := newBench(t, nil)
	routes := map[string][]string{}
	for _, e := range []*gin.Engine{b.api.public, b.api.admin} {
		for _, r := range e.Routes() {
			routes[r.Method] = append(routes[r.Method], r.Path)
		}
	}
	const handsOut = "/organization/:idOrg/key/:idKey/sealed"
	without := slices.DeleteFunc(slices.Clone(routes["GET"]), func(path string) bool { return path == handsOut })
	slices.Sort(without)
	slices.Sort(routes["HEAD"])
	if len(without) != len(routes["GET"])-1 || !slices.Equal(without, routes["HEAD"]) {
		t.Errorf("GET has %q, HEAD has %q", routes["GET"], routes["HEAD"])
	}
	for _, path := range []string{"/organization/acme/key", "/organization/acme/nodes", "/organization/a%20b/key", "/healthz", "/readyz", "/openapi.yaml"} {
		get, head := b.ask("GET", path), b.ask("HEAD", path)
		if head.StatusCode != get.StatusCode || len(head.body) > 0 || len(get.body) == 0 {
			t.Errorf("%s: GET %d with %d bytes, HEAD %d with %d", path, get.StatusCode, len(get.body), head.StatusCode, len(head.body))
		}
		for _, name := range []string{"Content-Type", "Cache-Control", "X-Content-Type-Options"} {
			if head.Header.Get(name) != get.Header.Get(name) {
				t.Errorf("%s: %s is %q by HEAD, and %q by GET", path, name, head.Header.Get(name), get.Header.Get(name))
			}
		}
	}
	if listed := slices.DeleteFunc(b.keys.log(), func(asked string) bool { return asked != "list acme" }); len(listed) != 2 {
		t.Errorf("two lists, one by HEAD, asked for %q", b.keys.log())
	}
	if a := b.ask("HEAD", "/organization/acme/key/"+keyID+"/sealed"); a.StatusCode != 405 || a.Header.Get("Allow") != "GET" {
		t.Errorf("HEAD of a key that is handed out: %d, Allow %q", a.StatusCode, a.Header.Get("Allow"))
	}
}

func TestDeletingWithATrailingSlashIsNotDeletingAll(t *testing.T) {
	b := newBench(t, nil)
	if a := b.ask("DELETE", "/organization/acme/key/"); a.StatusCode != 404 {
		t.Errorf("%d", a.StatusCode)
	}
	if slices.Contains(b.keys.log(), "delete_all acme") {
		t.Error("all keys deleted")
	}
}

func FuzzOrganizationInPath(f *testing.F) {
	for _, seed := range []string{"acme", "a/b", "..", "%2e", "a b", "é", "\x00", "a+b", "", ":", "*", "acme/key", "acme/key/x"} {
		f.Add(seed)
	}
	b := newFuzzBench(f)
	f.Fuzz(func(t *testing.T, text string) {
		u := url.URL{Scheme: "http", Host: "h", Path: "/organization/" + text + "/key", RawPath: "/organization/" + url.PathEscape(text) + "/key"}
		status, asked := b.serveURL(t, &u)
		_, err := org.Parse(text)
		fine := err == nil
		switch {
		case fine && (status != 200 || asked != "list "+text):
			t.Errorf("%q: %d, asked %q", text, status, asked)
		case !fine && status != 400 && status != 404:
			t.Errorf("%q: %d, asked %q", text, status, asked)
		case !fine && strings.HasPrefix(asked, "list"):
			t.Errorf("%q reached the use case: %q", text, asked)
		}
	})
}

func TestCORS(t *testing.T) {
	const origin = "https://console.example.com"
	b := newBench(t, func(c *Config) { c.CORSOrigins = []string{origin, "http://localhost:8080"} })
	preflight := func(path, from string, headers ...string) answer {
		return b.ask("OPTIONS", path, append([]string{"Origin", from, "Access-Control-Request-Method", "POST", "Authorization", ""}, headers...)...)
	}
	a := preflight("/organization/acme/key", origin, "Access-Control-Request-Headers", "authorization")
	if a.StatusCode != 204 || a.Header.Get("Access-Control-Allow-Origin") != origin || a.Header.Get("Access-Control-Allow-Methods") != "POST" ||
		a.Header.Get("Access-Control-Allow-Headers") != "authorization" || a.Header.Get("Access-Control-Allow-Credentials") != "" || a.Header.Get("X-Request-Id") == "" {
		t.Errorf("the documented browser sample's preflight: %d %v", a.StatusCode, a.Header)
	}
	if a := preflight("/organization/acme/key", origin, "Access-Control-Request-Headers", "x-evil"); a.Header.Get("Access-Control-Allow-Origin") != "" {
		t.Errorf("a header nobody allowed: %v", a.Header)
	}
	for _, other := range []string{"https://console.example.com.evil.net", "https://evil-console.example.com", "HTTPS://console.example.com", "https://console.example.com:443", "http://console.example.com", "null"} {
		if a := preflight("/organization/acme/key", other); a.StatusCode != 405 || a.Header.Get("Access-Control-Allow-Origin") != "" || a.Header.Get("Allow") == "" {
			t.Errorf("preflight from %s: %d %v", other, a.StatusCode, a.Header)
		}
		if a := b.ask("GET", "/organization/acme/key", "Origin", other); a.StatusCode != 200 || a.Header.Get("Access-Control-Allow-Origin") != "" {
			t.Errorf("request from %s: %d %v", other, a.StatusCode, a.Header)
		}
	}
	if a := preflight("/nowhere", origin); a.StatusCode != 404 {
		t.Errorf("preflight for no path: %d", a.StatusCode)
	}
	for _, method := range []string{"OPTIONS", "GET"} {
		two := b.ask(method, "/organization/acme/key", "Origin", origin, "Origin", "https://evil.example", "Access-Control-Request-Method", "POST")
		if two.StatusCode == 204 || two.Header.Get("Access-Control-Allow-Origin") != "" || !slices.Contains(two.Header.Values("Vary"), "Origin") {
			t.Errorf("%s of two origins: %s %v", method, two.Status, two.Header)
		}
	}
	if a := b.ask("OPTIONS", "/organization/acme/key", "Origin", origin); a.StatusCode != 405 {
		t.Errorf("OPTIONS that is no preflight: %d", a.StatusCode)
	}
	a = b.ask("POST", "/organization/acme/key", "Origin", origin)
	if a.StatusCode != 200 || a.Header.Get("Access-Control-Allow-Origin") != origin ||
		a.Header.Get("Access-Control-Expose-Headers") != "Location, X-Key-Id, X-Key-Fingerprint, X-Request-Id, Retry-After" ||
		!slices.Contains(a.Header.Values("Vary"), "Origin") || !slices.Contains(a.Header.Values("Vary"), "Accept, Sec-Fetch-Mode") {
		t.Errorf("an allowed origin's request: %d %v", a.StatusCode, a.Header)
	}
	if a := b.ask("POST", "/organization/acme/key", "Origin", origin, "Authorization", ""); a.StatusCode != 401 || a.Header.Get("Access-Control-Allow-Origin") != origin {
		t.Errorf("scripts cannot read a 401: %v", a.Header)
	}
	if len(b.reasons()) != 1 {
		t.Errorf("preflights were counted as unknown callers: %q", b.reasons())
	}
}

func TestWithoutOriginsNothingIsCrossOrigin(t *testing.T) {
	b := newBench(t, nil)
	a := b.ask("OPTIONS", "/organization/acme/key", "Origin", "https://a.example", "Access-Control-Request-Method", "POST")
	if a.StatusCode != 405 || a.Header.Get("Access-Control-Allow-Origin") != "" {
		t.Errorf("%d %v", a.StatusCode, a.Header)
	}
}

func TestDoubtfulOriginsAreRefused(t *testing.T) {
	for _, origin := range []string{"*", "null", "", "https://*.example.com", "example.com", "https://example.com/", "https://example.com/x", "https://Example.com",
		"https://example.com:443", "http://example.com:80", "https://example.com:", "ftp://example.com", "https://u@example.com", "https://", "https://a b", "file:///x"} {
		if _, err := newCORS([]string{"https://fine.example", origin}); err == nil {
			t.Errorf("accepted %q", origin)
		}
	}
	for _, origin := range []string{"https://example.com", "https://example.com:8443", "http://127.0.0.1:8080", "http://[::1]:8080"} {
		if _, err := newCORS([]string{origin}); err != nil {
			t.Error(err)
		}
	}
}

func TestPanicsAnswer500AndTheProcessLives(t *testing.T) {
	b := newBench(t, nil)
	b.keys.before = func(context.Context) { panic("key material " + token) }
	a := b.ask("POST", "/organization/acme/key")
	if e := errorOf(t, a); a.StatusCode != 500 || e.Message != "Internal error" {
		t.Errorf("%d %s", a.StatusCode, a.body)
	}
	var index []int
	b.keys.before = func(context.Context) { _ = index[3] }
	b.ask("POST", "/organization/acme/key")
	if log := b.logs.String(); strings.Contains(log, token) || !strings.Contains(log, `"msg":"panic"`) || !strings.Contains(log, "index out of range [3]") {
		t.Errorf("the log:\n%s", log)
	}
	b.keys.before = nil
	if a := b.ask("POST", "/organization/acme/key"); a.StatusCode != 200 {
		t.Errorf("afterwards: %d", a.StatusCode)
	}
}

func TestAccessLogHoldsNothingThatWasSent(t *testing.T) {
	b := newBench(t, nil)
	const marker = "MARKER"
	b.ask("GET", "/organization/acme/key?q="+marker, "User-Agent", marker, "Referer", marker, "Cookie", marker, "X-Request-Id", marker+"\"}{")
	b.ask("GET", "/organization/"+marker+"%0a%22/key")
	b.ask("GET", "/"+marker)
	b.ask("GET", "/organization/acme/key", "Authorization", "Bearer "+marker)
	b.ask(marker, "/organization/acme/key")
	b.ask("POST", "/organization/acme/key")
	lines := func() []string { return strings.Split(strings.TrimSpace(b.logs.String()), "\n") }
	eventually(t, "every answer has its line", func() bool { return len(lines()) >= 6 }) // written after the answer
	log := b.logs.String()
	if strings.Contains(log, marker) || strings.Contains(log, token) || strings.Contains(log, "PRIVATE KEY") {
		t.Errorf("the log:\n%s", log)
	}
	if len(lines()) != 6 {
		t.Fatalf("%d lines:\n%s", len(lines()), log)
	}
	var first map[string]any
	if err := json.Unmarshal([]byte(lines()[0]), &first); err != nil {
		t.Fatal(err)
	}
	for k, want := range map[string]string{"msg": "request", "method": "GET", "route": "/organization/:idOrg/key", "status": "200", "org": "acme"} {
		if got := fmt.Sprint(first[k]); got != want {
			t.Errorf("%s: %q", k, got)
		}
	}
	if first["request"] == nil || first["ms"] == nil {
		t.Errorf("the request's ID or duration is missing: %s", lines()[0])
	}
	metrics := b.scrape()
	if strings.Contains(metrics, marker) || !strings.Contains(metrics, `orgkeys_http_requests_total{method="other",route="none",status="405"} 1`) ||
		!strings.Contains(metrics, `orgkeys_http_requests_total{method="POST",route="/organization/:idOrg/key",status="200"} 1`) {
		t.Errorf("the metrics:\n%s", metrics)
	}
}

func TestHealth(t *testing.T) {
	b := newBench(t, nil)
	for path, body := range map[string]string{"/healthz": `{"status":"ok"}`, "/readyz": `{"status":"ready"}`} {
		if a := b.ask("GET", path, "Authorization", ""); a.StatusCode != 200 || string(a.body) != body {
			t.Errorf("%s: %d %s", path, a.StatusCode, a.body)
		}
	}
	if a := b.ask("GET", "/openapi.yaml", "Authorization", ""); a.StatusCode != 200 || string(a.body) != string(Document) {
		t.Errorf("openapi.yaml: %d", a.StatusCode)
	}
}

func TestReadinessDetailsAreForOperatorsOnly(t *testing.T) {
	stuck := make(chan struct{})
	defer close(stuck)
	b := newBench(t, func(c *Config) {
		c.Checks = []Check{
			{Name: "database", Ask: func(context.Context) error { return nil }},
			{Name: "redis", Ask: func(context.Context) error { return fmt.Errorf("gone") }, Optional: true},
			{Name: "vault", Ask: func(context.Context) error { return fmt.Errorf("sealed") }},
			{Name: "hsm", Ask: func(context.Context) error { <-stuck; return nil }}, // does not know of contexts
		}
	})
	started := time.Now()
	a := b.ask("GET", "/readyz", "Authorization", "")
	if took := time.Since(started); took > checkTimeout+3*time.Second {
		t.Errorf("took %s", took)
	}
	if e := errorOf(t, a); a.StatusCode != 503 || e.Message != "Not ready" || strings.Contains(string(a.body), "vault") || a.Header.Get("Retry-After") == "" {
		t.Errorf("public: %d %s", a.StatusCode, a.body)
	}
	resp, err := http.Get(b.admin + "/readyz")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var got detailedHealth
	if err := json.NewDecoder(resp.Body).Decode(&got); err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != 503 || got.Status != "unavailable" || len(got.Checks) != 4 || !got.Checks[0].OK || got.Checks[1].Error != "gone" ||
		got.Checks[2].Error != "sealed" || got.Checks[3].OK {
		t.Errorf("admin: %d %+v", resp.StatusCode, got)
	}
}

func TestWhatIsOptionalLeavesTheServiceReady(t *testing.T) {
	b := newBench(t, func(c *Config) {
		c.Checks = []Check{{Name: "redis", Ask: func(context.Context) error { return fmt.Errorf("gone") }, Optional: true}}
	})
	if a := b.ask("GET", "/readyz"); a.StatusCode != 200 {
		t.Errorf("%d", a.StatusCode)
	}
	resp, err := http.Get(b.admin + "/readyz")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var got detailedHealth
	if err := json.NewDecoder(resp.Body).Decode(&got); err != nil || resp.StatusCode != 200 || got.Status != "ready" || got.Checks[0].OK {
		t.Errorf("admin: %d %+v %v", resp.StatusCode, got, err)
	}
}

func TestDependenciesShowInTheMetrics(t *testing.T) {
	b := newBench(t, func(c *Config) {
		c.Checks = []Check{
			{Name: "database", Ask: func(context.Context) error { return nil }},
			{Name: "redis", Ask: func(context.Context) error { return fmt.Errorf("gone") }, Optional: true},
		}
	})
	metrics := b.scrape() // without anybody having asked for /readyz
	for _, want := range []string{`orgkeys_dependency_up{name="database"} 1`, `orgkeys_dependency_up{name="redis"} 0`} {
		if !strings.Contains(metrics, want) {
			t.Errorf("%s is not in the metrics:\n%s", want, metrics)
		}
	}
}

func TestReadinessRecovers(t *testing.T) {
	down := make(chan struct{}, 1)
	down <- struct{}{}
	b := newBench(t, func(c *Config) {
		c.Checks = []Check{{Name: "database", Ask: func(context.Context) error {
			select {
			case <-down:
				return fmt.Errorf("down")
			default:
				return nil
			}
		}}}
	})
	if a := b.ask("GET", "/readyz"); a.StatusCode != 503 {
		t.Errorf("%d", a.StatusCode)
	}
	eventually(t, "ready", func() bool { return b.ask("GET", "/readyz").StatusCode == 200 })
}

func TestManyProbesAreOneRoundOfChecks(t *testing.T) {
	asked := make(chan struct{}, 1000)
	b := newBench(t, func(c *Config) {
		c.Checks = []Check{{Name: "database", Ask: func(context.Context) error { asked <- struct{}{}; return nil }}}
	})
	started := time.Now()
	for range 50 {
		b.api.ready.ask(context.Background())
	}
	if rounds := int(time.Since(started)/checkInterval) + 1; len(asked) > rounds {
		t.Errorf("%d rounds", len(asked))
	}
}

func TestAdminListenerHasNoKeys(t *testing.T) {
	b := newBench(t, nil)
	resp, err := http.Get(b.admin + "/organization/acme/key")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 404 {
		t.Errorf("%d", resp.StatusCode)
	}
}

func TestNewRefusesWhatIsMissing(t *testing.T) {
	if _, err := New(Config{}); err == nil {
		t.Error("an empty configuration makes an API")
	}
}
