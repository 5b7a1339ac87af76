package api

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/orgkeys/orgkeys/internal/authn"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

const keyID = "5b6f0c1e-8f0e-4c55-9d6d-0f7b6f9f4f7a"

// useCases stands for orgkey.Service and for the gate: it does what the edge under test has to
// cope with, and notes what it was asked for.
type useCases struct {
	mu       sync.Mutex
	err      error // what every use case reports
	rejects  error // what Reject reports
	keys     []orgkey.Key
	deleted  int
	before   func(ctx context.Context) // runs before a key is delivered
	private  []byte
	asked    []string // "generate acme", "reject acme orgkey.generate not_acceptable", …
	call     gate.Call
	delivery error // what deliver returned
	ended    chan struct{}
}

func (u *useCases) note(call gate.Call, words ...string) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.asked = append(u.asked, strings.Join(words, " "))
	u.call = call
	return u.err
}

func (u *useCases) log() []string {
	u.mu.Lock()
	defer u.mu.Unlock()
	return append([]string(nil), u.asked...)
}

func (u *useCases) Generate(ctx context.Context, call gate.Call, org org.ID, deliver func(context.Context, orgkey.Generated) error) error {
	if u.ended != nil {
		defer close(u.ended)
	}
	if err := u.note(call, "generate", string(org)); err != nil {
		return err
	}
	if u.before != nil {
		u.before(ctx)
	}
	err := deliver(ctx, orgkey.Generated{ID: keyID, Org: org, Fingerprint: strings.Repeat("f", 43), PEM: bytes.Clone(u.private)})
	u.mu.Lock()
	defer u.mu.Unlock()
	u.delivery = err
	return err
}

func (u *useCases) List(_ context.Context, call gate.Call, org org.ID) ([]orgkey.Key, error) {
	err := u.note(call, "list", string(org))
	return u.keys, err
}

func (u *useCases) Delete(_ context.Context, call gate.Call, org org.ID, id string) error {
	return u.note(call, "delete", string(org), id)
}

func (u *useCases) ListNodeKeys(_ context.Context, call gate.Call, org org.ID) ([]orgkey.Key, error) {
	err := u.note(call, "list_node_keys", string(org))
	return u.keys, err
}

func (u *useCases) DeleteAll(_ context.Context, call gate.Call, org org.ID, withNodeKeys bool) (orgkey.Ended, error) {
	if withNodeKeys {
		return orgkey.Ended{Keys: u.deleted, NodeKeys: u.deleted + 1}, u.note(call, "delete_all_with_node_keys", string(org))
	}
	return orgkey.Ended{Keys: u.deleted}, u.note(call, "delete_all", string(org))
}

func (u *useCases) Reject(_ context.Context, call gate.Call, org org.ID, action authz.Action, _, reason string) error {
	u.note(call, "reject", string(org), string(action), reason)
	return u.rejects
}

// testKey is one RSA key for all tests: making one takes a while.
var testKey = sync.OnceValue(func() *rsa.PrivateKey {
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return k
})

func testPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(testKey())})
}

// bench is an API on a real listener.
type bench struct {
	t       *testing.T
	api     *API
	keys    *useCases
	nodes   *nodeUseCases
	events  *eventUseCase
	url     string
	address string
	admin   string
	logs    *logs
	metrics *prometheus.Registry
	mu      sync.Mutex
	unknown []string // reasons counted for callers nobody knows
}

type logs struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

const token = "secret-token-of-the-test"

// newBench serves an API whose settings adjust may change.
func newBench(t *testing.T, adjust func(*Config)) *bench {
	t.Helper()
	b := &bench{t: t, keys: &useCases{private: testPEM()}, nodes: &nodeUseCases{}, events: &eventUseCase{}, logs: &logs{}, metrics: prometheus.NewRegistry()}
	c := Config{
		Keys: b.keys, Rejections: b.keys, Nodes: b.nodes, SystemEvents: b.events, Enrollments: noEnrollments{}, DryRuns: noDryRuns{}, OrgLog: noOrgLog{}, Log: slog.New(slog.NewJSONHandler(b.logs, nil)), Metrics: b.metrics,
		Unauthenticated: func(reason string) {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.unknown = append(b.unknown, reason)
		},
		Authenticate: func(_ context.Context, h http.Header) (authz.Caller, error) {
			switch h.Get("Authorization") {
			case "Bearer " + token:
				return authz.Caller{Kind: authz.Person, Subject: "alice", Org: "acme", Roles: []authz.Role{authz.Owner}}, nil
			case "":
				return authz.Caller{}, &authn.TokenError{Reason: authn.ReasonMissing}
			default:
				return authz.Caller{}, &authn.TokenError{Reason: authn.ReasonSignature}
			}
		},
	}
	if adjust != nil {
		adjust(&c)
	}
	a, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	b.api = a
	b.address = serve(t, ServerConfig{Address: "127.0.0.1:0", Log: c.Log, GenerationDeadline: 30 * time.Second}, a.Handler())
	b.url = "http://" + b.address
	admin := httptest.NewServer(a.Admin())
	t.Cleanup(admin.Close)
	b.admin = admin.URL
	return b
}

// serve runs a Server until the test ends, and returns its address.
func serve(t *testing.T, c ServerConfig, h http.Handler) string {
	t.Helper()
	s, err := Listen(c, h)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve() }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		_ = s.Shutdown(ctx) // tests leave connections open on purpose
		if err := <-done; err != nil {
			t.Error("serving:", err)
		}
	})
	return s.Addr().String()
}

type answer struct {
	*http.Response
	body []byte
}

// ask sends a request with the test's token; headers are pairs that add to it,
// and an empty value leaves the header out.
func (b *bench) ask(method, path string, headers ...string) answer {
	b.t.Helper()
	return b.send(method, b.url+path, nil, headers...)
}

func (b *bench) send(method, url string, sent []byte, headers ...string) answer {
	b.t.Helper()
	req, err := http.NewRequest(method, url, bytes.NewReader(sent))
	if err != nil {
		b.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	seen := map[string]bool{}
	for i := 0; i < len(headers); i += 2 {
		name, value := http.CanonicalHeaderKey(headers[i]), headers[i+1]
		switch {
		case value == "":
			req.Header.Del(name)
		case seen[name]:
			req.Header.Add(name, value)
		default:
			req.Header.Set(name, value)
			seen[name] = true
		}
	}
	client := &http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true, DisableCompression: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Timeout:       30 * time.Second,
	}
	resp, err := client.Do(req)
	if err != nil {
		b.t.Fatal(err)
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(resp.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	CheckExchange(b.t, req, sent, resp, content)
	return answer{resp, content}
}

// scrape returns what /metrics shows.
func (b *bench) scrape() string {
	b.t.Helper()
	resp, err := http.Get(b.admin + "/metrics")
	if err != nil {
		b.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 {
		b.t.Fatal(resp.Status, err)
	}
	return string(text)
}

func (b *bench) reasons() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]string(nil), b.unknown...)
}

// eventually waits for a condition that another goroutine brings about.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(15 * time.Second); !condition(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("never happened: ", what)
		}
	}
}

// newFuzzBench is an API that is called without a network.
func newFuzzBench(f *testing.F) *bench {
	keys := &useCases{}
	a, err := New(Config{
		Keys: keys, Rejections: keys, Nodes: &nodeUseCases{}, SystemEvents: &eventUseCase{}, Enrollments: noEnrollments{}, DryRuns: noDryRuns{}, OrgLog: noOrgLog{}, Log: slog.New(slog.DiscardHandler), Metrics: prometheus.NewRegistry(), Unauthenticated: func(string) {},
		Authenticate: func(context.Context, http.Header) (authz.Caller, error) { return authz.Caller{Subject: "alice"}, nil },
	})
	if err != nil {
		f.Fatal(err)
	}
	return &bench{api: a, keys: keys}
}

// serveURL has the API answer GET u, and returns the status and what use case was asked, if any.
func (b *bench) serveURL(t *testing.T, u *url.URL) (status int, asked string) {
	t.Helper()
	r := &http.Request{Method: "GET", URL: u, Header: http.Header{}, Body: http.NoBody, ProtoMajor: 1, ProtoMinor: 1}
	b.keys.asked = nil
	w := httptest.NewRecorder()
	b.api.Handler().ServeHTTP(w, r)
	return w.Code, strings.Join(b.keys.asked, ";")
}

// noEnrollments is never called: enrollment is tested with the real use case.
type noEnrollments struct{ Enrollments }

// noDryRuns is never called: dry runs are tested with the real use case.
type noDryRuns struct{ DryRuns }

// noOrgLog is never called: the log is tested with the real use case.
type noOrgLog struct{ OrgLog }
