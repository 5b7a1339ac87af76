package harness

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"io"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/api/openapitest"
)

// Request is one request to the public listener.
type Request struct {
	Method string
	Path   string
	Token  string // bearer token; none if empty
	Header http.Header
	Body   []byte
}

// Response is the whole answer.
type Response struct {
	Status int
	Header http.Header
	Body   []byte
	Took   time.Duration
}

var requestIDForm = regexp.MustCompile(`^[A-Za-z0-9-]{1,64}$`)

// Do sends a request and checks what every answer owes: the documented form of
// errors, a request ID, and agreement with the OpenAPI document.
func (s *Server) Do(t testing.TB, r Request) Response {
	t.Helper()
	resp, err := s.Try(context.Background(), r)
	if err != nil {
		t.Fatalf("%s %s: %v", r.Method, r.Path, err)
	}
	s.Check(t, r, resp)
	return resp
}

// Try sends a request that may fail, as those to a server about to be killed.
func (s *Server) Try(ctx context.Context, r Request) (Response, error) {
	req, err := s.request(ctx, r)
	if err != nil {
		return Response{}, err
	}
	start := time.Now()
	resp, err := s.HTTP.Do(req)
	if err != nil {
		return Response{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return Response{}, err
	}
	return Response{Status: resp.StatusCode, Header: resp.Header, Body: body, Took: time.Since(start)}, nil
}

// AskAdmin returns what the admin listener answers, whatever its status.
func (s *Server) AskAdmin(t testing.TB, path string) string {
	t.Helper()
	resp, err := http.Get(s.Admin + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func (s *Server) request(ctx context.Context, r Request) (*http.Request, error) {
	var body io.Reader
	if r.Body != nil {
		body = bytes.NewReader(r.Body)
	}
	req, err := http.NewRequestWithContext(ctx, r.Method, s.API+r.Path, body)
	if err != nil {
		return nil, err
	}
	if r.Header != nil {
		req.Header = r.Header.Clone()
	}
	if r.Token != "" {
		req.Header.Set("Authorization", "Bearer "+r.Token)
	}
	return req, nil
}

// Check fails the test unless the answer has what every answer owes.
func (s *Server) Check(t testing.TB, r Request, resp Response) {
	t.Helper()
	what := r.Method + " " + r.Path
	if id := resp.Header.Get("X-Request-Id"); !requestIDForm.MatchString(id) {
		t.Errorf("%s: X-Request-Id is %q", what, id)
	}
	if resp.Status >= 400 && r.Method != http.MethodHead {
		if ct := resp.Header.Get("Content-Type"); !strings.HasPrefix(ct, "application/json") {
			t.Errorf("%s: status %d has Content-Type %q", what, resp.Status, ct)
		}
		var e Failure
		if err := json.Unmarshal(resp.Body, &e); err != nil || e.Success == nil || *e.Success || e.Message == "" {
			t.Errorf("%s: status %d has the body %q", what, resp.Status, resp.Body)
		}
	}
	req, err := s.request(context.Background(), r)
	if err != nil {
		t.Fatal(err)
	}
	answer := http.Response{StatusCode: resp.Status, Header: resp.Header, Request: req}
	openapitest.Check(t, req, r.Body, &answer, resp.Body)
}

// Failure is the body of every error.
type Failure struct {
	Success   *bool  `json:"success"`
	Message   string `json:"message"`
	ErrorCode string `json:"errorCode"`
	RequestID string `json:"requestId"`
}

// Message is the message of an answer in the documented form.
func (r Response) Message(t testing.TB) string {
	t.Helper()
	var e Failure
	if err := json.Unmarshal(r.Body, &e); err != nil {
		t.Fatalf("body %q: %v", r.Body, err)
	}
	return e.Message
}

// Want fails the test unless the answer has the status and the message.
func (r Response) Want(t testing.TB, status int, message string) {
	t.Helper()
	if r.Status != status {
		t.Fatalf("status %d, want %d; body %q", r.Status, status, r.Body)
	}
	if got := r.Message(t); got != message {
		t.Errorf("message %q, want %q", got, message)
	}
}

// Org is an organization ID that no other test uses.
func Org() string {
	var b [6]byte
	rand.Read(b[:])
	return "org-" + hex.EncodeToString(b[:])
}

// KeyPath is the path of an organization's keys.
func KeyPath(org string) string { return "/organization/" + org + "/key" }

// Key is a released private key.
type Key struct {
	ID          string
	Org         string
	Fingerprint string
	Location    string
	PEM         []byte
	Private     *rsa.PrivateKey
}

// Client is the public client, for a member of org with the role. Each of its
// exchanges is checked as Do checks them.
func (s *Server) Client(t testing.TB, org, role string) *client.Client {
	t.Helper()
	token := s.Token(t, org, role)
	c, err := client.New(client.Config{
		Server: s.API, Transport: checked{t, s}, Attempt: 2 * Patience,
		Token: func(context.Context) (string, error) { return token, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// checked is the server's transport, and checks what every answer owes.
type checked struct {
	t testing.TB
	s *Server
}

func (c checked) RoundTrip(req *http.Request) (*http.Response, error) {
	var body []byte
	if req.Body != nil && req.Body != http.NoBody {
		var err error
		if body, err = io.ReadAll(req.Body); err != nil {
			return nil, err
		}
		req.Body.Close()
	}
	sent := req.Clone(req.Context())
	if body != nil {
		sent.Body = io.NopCloser(bytes.NewReader(body))
	}
	resp, err := c.s.HTTP.Transport.RoundTrip(sent)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	resp.Body = io.NopCloser(bytes.NewReader(answer))
	c.s.Check(c.t, Request{Method: req.Method, Path: req.URL.RequestURI(), Header: req.Header, Body: body},
		Response{Status: resp.StatusCode, Header: resp.Header, Body: answer})
	return resp, nil
}

// Generate has a key made for an organization by its owner.
func (s *Server) Generate(t testing.TB, org string) Key {
	t.Helper()
	key, err := s.Client(t, org, "OWNER").GenerateKey(context.Background(), org)
	if err != nil {
		t.Fatalf("generating a key: %v", err)
	}
	return Key{ID: key.ID, Org: org, Fingerprint: key.Fingerprint, Location: KeyPath(org) + "/" + key.ID, PEM: key.PEM, Private: ParsePrivate(t, key.PEM)}
}

// PutSecret stores a boot secret of an organization as its owner.
func (s *Server) PutSecret(t testing.TB, org, name string, value []byte) {
	t.Helper()
	if err := s.Client(t, org, "OWNER").PutSecret(context.Background(), org, name, value); err != nil {
		t.Fatalf("storing secret %s: %v", name, err)
	}
}

// ReadKey reads a released key from the answer that released it as PEM.
func ReadKey(t testing.TB, org string, resp Response) Key {
	t.Helper()
	return Key{
		ID: resp.Header.Get("X-Key-Id"), Org: org, Fingerprint: resp.Header.Get("X-Key-Fingerprint"),
		Location: resp.Header.Get("Location"), PEM: resp.Body, Private: ParsePrivate(t, resp.Body),
	}
}

// ParsePrivate reads the one PEM block of type RSA PRIVATE KEY that text is.
func ParsePrivate(t testing.TB, text []byte) *rsa.PrivateKey {
	t.Helper()
	block, rest := pem.Decode(text)
	if block == nil || block.Type != "RSA PRIVATE KEY" || len(rest) != 0 || len(block.Headers) != 0 {
		t.Fatalf("not one RSA PRIVATE KEY block: %d bytes, %d left over", len(text), len(rest))
	}
	key, err := x509.ParsePKCS1PrivateKey(block.Bytes)
	if err != nil {
		t.Fatalf("reading the private key: %v", err)
	}
	if err := key.Validate(); err != nil {
		t.Fatalf("the private key is not consistent: %v", err)
	}
	return key
}

// Listed is a key as the list shows it.
type Listed struct {
	ID        string            `json:"id"`
	OrgID     string            `json:"orgId"`
	PublicKey string            `json:"publicKey"`
	CreatedAt string            `json:"createdAt"`
	Delivery  string            `json:"delivery"`
	NodeKeys  []json.RawMessage `json:"nodeKeys"`
}

// Public is the listed public key.
func (l Listed) Public(t testing.TB) *rsa.PublicKey {
	t.Helper()
	block, rest := pem.Decode([]byte(l.PublicKey))
	if block == nil || block.Type != "PUBLIC KEY" || len(bytes.TrimSpace(rest)) != 0 {
		t.Fatalf("publicKey is not one PUBLIC KEY block: %q", l.PublicKey)
	}
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		t.Fatalf("reading publicKey: %v", err)
	}
	public, ok := key.(*rsa.PublicKey)
	if !ok {
		t.Fatalf("publicKey is a %T", key)
	}
	return public
}

// List is the organization's keys as its owner sees them.
func (s *Server) List(t testing.TB, org string) []Listed {
	t.Helper()
	resp := s.Do(t, Request{Method: "GET", Path: KeyPath(org), Token: s.Token(t, org, "OWNER")})
	if resp.Status != http.StatusOK {
		t.Fatalf("listing keys: status %d, body %q", resp.Status, resp.Body)
	}
	return ReadList(t, resp)
}

// ReadList reads the keys of a successful list answer.
func ReadList(t testing.TB, resp Response) []Listed {
	t.Helper()
	var l struct {
		Success bool      `json:"success"`
		Message *string   `json:"message"`
		Data    *[]Listed `json:"data"`
	}
	if err := json.Unmarshal(resp.Body, &l); err != nil {
		t.Fatalf("list %q: %v", resp.Body, err)
	}
	if !l.Success || l.Message == nil || l.Data == nil {
		t.Fatalf("list %q lacks success, message or data", resp.Body)
	}
	return *l.Data
}
