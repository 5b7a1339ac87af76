package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/node"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

const nodeID = "0d2a1c57-31c9-4b8e-9a55-0c2b1a7d9e10"

// nodeUseCases stands for node.Service, whose own tests run it for real.
type nodeUseCases struct {
	mu        sync.Mutex
	err       error // what every use case reports
	envelopes []node.Envelope
	nodes     []node.Node
	secrets   []node.Secret
	asked     []string
	from      node.Origin
}

func (u *nodeUseCases) note(words ...string) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.asked = append(u.asked, strings.Join(words, " "))
	return u.err
}

func (u *nodeUseCases) Register(_ context.Context, from node.Origin, body []byte) error {
	u.from = from
	return u.note("register", string(body))
}

func (u *nodeUseCases) Unregister(_ context.Context, _ node.Origin, body []byte) error {
	return u.note("unregister", string(body))
}

func (u *nodeUseCases) Secrets(_ context.Context, _ node.Origin, body []byte, deliver func([]node.Envelope) error) error {
	if err := u.note("secrets", string(body)); err != nil {
		return err
	}
	return deliver(u.envelopes)
}

func (u *nodeUseCases) List(_ context.Context, _ gate.Call, org org.ID) ([]node.Node, error) {
	return u.nodes, u.note("list", string(org))
}

func (u *nodeUseCases) Delete(_ context.Context, _ gate.Call, org org.ID, id string) error {
	return u.note("delete", string(org), id)
}

func (u *nodeUseCases) PutSecret(_ context.Context, _ gate.Call, org org.ID, name string, value []byte) error {
	return u.note("put", string(org), name, string(value))
}

func (u *nodeUseCases) ListSecrets(_ context.Context, _ gate.Call, org org.ID) ([]node.Secret, error) {
	return u.secrets, u.note("secrets", string(org))
}

func (u *nodeUseCases) DeleteSecret(_ context.Context, _ gate.Call, org org.ID, name string) error {
	return u.note("delete secret", string(org), name)
}

const (
	someRegistration = `{"ip":"192.0.2.7","region":"eu","timestamp":1700000000,"signature":"AA==","id_org":"acme","version":"1","status":"active"}`
	listedNodes      = `{"success":true,"data":[{"id":"0d2a1c57-31c9-4b8e-9a55-0c2b1a7d9e10","ip":"192.0.2.7","region":"eu","version":"1","status":"active","url":"","id_org":"acme","nodeServices":0,"lastUpdated":"2026-03-01T12:00:00.000Z","lastSeen":"2026-03-01T12:01:00.000Z"}],"total":1}`
)

func TestAnswersAboutNodesAndSecrets(t *testing.T) {
	b := newBench(t, nil)
	at := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	b.nodes.nodes = []node.Node{{
		ID: nodeID, Org: "acme", IP: netip.MustParseAddr("192.0.2.7"), Region: "eu", Version: "1", Status: "active",
		Updated: at, Seen: at.Add(time.Minute),
	}}
	b.nodes.secrets = []node.Secret{{Name: "env_s3", Created: at, Updated: at}}
	b.nodes.envelopes = []node.Envelope{{Name: "env_s3", Text: []byte(`{"key":"a+/=","iv":"b","ct":"c","mac":"d"}`)}}
	for _, c := range []struct{ request, body, want, asked string }{
		{"POST /register", someRegistration, `{"success":true,"message":"Node registered successfully"}`, "register " + someRegistration},
		{"POST /unregister", someRegistration, `{"success":true,"message":"Node unregistered successfully"}`, "unregister " + someRegistration},
		{"POST /secrets", someRegistration, `{"env_s3_enc":"{\"key\":\"a+/=\",\"iv\":\"b\",\"ct\":\"c\",\"mac\":\"d\"}"}`, "secrets " + someRegistration},
		{"GET /organization/acme/nodes", "", listedNodes, "list acme"},
		{"DELETE /organization/acme/node/" + nodeID, "", `{"success":true,"message":"Node deleted successfully"}`, "delete acme " + nodeID},
		{"PUT /organization/acme/secret/env_s3", "A=1", `{"success":true,"message":"Secret stored successfully"}`, "put acme env_s3 A=1"},
		{"GET /organization/acme/secret", "", `{"success":true,"data":[{"name":"env_s3","createdAt":"2026-03-01T12:00:00.000Z","updatedAt":"2026-03-01T12:00:00.000Z"}],"total":1}`, "secrets acme"},
		{"DELETE /organization/acme/secret/env_s3", "", `{"success":true,"message":"Secret deleted successfully"}`, "delete secret acme env_s3"},
	} {
		method, path, _ := strings.Cut(c.request, " ")
		media := "application/json"
		if method == http.MethodPut {
			media = "application/octet-stream"
		}
		a := b.send(method, b.url+path, []byte(c.body), "Content-Type", media)
		if a.StatusCode != 200 || string(a.body) != c.want || a.Header.Get("Cache-Control") != "no-store" {
			t.Errorf("%s: %d %s", c.request, a.StatusCode, a.body)
		}
		if n := a.Header.Get("X-Secret-Count"); (n == "1") != (c.request == "POST /secrets") {
			t.Errorf("%s: X-Secret-Count %q", c.request, n)
		}
		if last := b.nodes.asked[len(b.nodes.asked)-1]; last != c.asked {
			t.Errorf("%s: asked %q", c.request, last)
		}
	}
	if b.nodes.from.Address != "127.0.0.1" || b.nodes.from.Request == "" {
		t.Errorf("origin %+v", b.nodes.from)
	}
}

func TestRefusalsAboutNodesAndSecrets(t *testing.T) {
	denied := &gate.DeniedError{Action: authz.DeleteNode, Reason: authz.InsufficientRole}
	strange := &gate.DeniedError{Action: authz.ListNodes, Reason: authz.OtherOrganization}
	for _, c := range []struct {
		request string
		err     error
		status  int
		code    string
		message string
		counted string
	}{
		{"POST /register", &node.InputError{Field: "ip", Problem: "is required"}, 400, "invalid_request", "ip is required", "node_request"},
		{"POST /register", node.ErrStale, 400, "stale_timestamp", "", "node_timestamp"},
		{"POST /secrets", node.ErrSignature, 400, "bad_signature", "Invalid signature", "node_signature"},
		{"POST /unregister", node.ErrTooManyFailures, 429, "too_many_failures", "", "too_many"},
		{"POST /register", node.ErrReused, 400, "signature_reused", "", ""},
		{"POST /register", node.ErrBusy, 503, "overloaded", "", ""},
		{"POST /register", fmt.Errorf("writing: %w", orgkey.ErrUnavailable), 503, "unavailable", "", ""},
		{"POST /register", errors.New("SQL"), 500, "internal", "Internal error", ""},
		{"POST /secrets", fmt.Errorf("%w: %w", node.ErrSecretBroken, orgkey.ErrSealBroken), 500, "secret_broken", "", ""},
		{"POST /secrets", node.ErrBusy, 503, "overloaded", "", ""},
		{"POST /unregister", node.ErrNodeNotFound, 404, "node_not_found", "Node not found", ""},
		{"POST /secrets", fmt.Errorf("%w: sink", gate.ErrAudit), 503, "audit_unavailable", "", ""},
		{"POST /unregister", errors.Join(gate.ErrAudit, node.ErrNodeNotFound), 503, "audit_unavailable", "", ""},
		{"GET /organization/acme/nodes", strange, 403, "other_organization", "", ""},
		{"DELETE /organization/acme/node/" + nodeID, denied, 403, "insufficient_role", "Insufficient permissions: only OWNER and ADMINISTRATOR roles can manage nodes", ""},
		{"DELETE /organization/acme/node/" + nodeID, node.ErrAlreadyDeleted, 400, "node_already_deleted", "Node is already deleted", ""},
		{"DELETE /organization/acme/node/x", nil, 404, "node_not_found", "Node not found", ""},
		{"GET /organization/a%20b/nodes", nil, 400, "invalid_organization", "", ""},
		{"PUT /organization/acme/secret/A", &node.InputError{Field: "name", Problem: "is wrong"}, 400, "invalid_request", "name is wrong", ""},
		{"PUT /organization/acme/secret/a", node.ErrTooManySecrets, 400, "too_many_secrets", "", ""},
		{"DELETE /organization/acme/secret/a", node.ErrSecretNotFound, 404, "secret_not_found", "", ""},
	} {
		t.Run(c.request+" "+c.code, func(t *testing.T) {
			b := newBench(t, nil)
			b.nodes.err = c.err
			method, path, _ := strings.Cut(c.request, " ")
			a := b.send(method, b.url+path, []byte(someRegistration))
			e := errorOf(t, a)
			if a.StatusCode != c.status || e.ErrorCode != c.code || (c.message != "" && e.Message != c.message) {
				t.Errorf("%d %+v", a.StatusCode, e)
			}
			var want []string
			if c.counted != "" {
				want = []string{c.counted}
			}
			if got := b.reasons(); !slices.Equal(got, want) {
				t.Errorf("counted %q", got)
			}
			if (a.Header.Get("Retry-After") != "") != (c.status == 503 || c.status == 429) {
				t.Errorf("Retry-After %q", a.Header.Get("Retry-After"))
			}
		})
	}
}

func TestBodiesOver64KiBReachNoUseCase(t *testing.T) {
	b := newBench(t, nil)
	for _, request := range []string{"POST /register", "POST /unregister", "POST /secrets", "PUT /organization/acme/secret/a"} {
		method, path, _ := strings.Cut(request, " ")
		for _, size := range []int{maxBody + 1, 2 << 20} {
			a := b.send(method, b.url+path, make([]byte, size))
			if e := errorOf(t, a); a.StatusCode != 413 || e.ErrorCode != "body_too_large" {
				t.Errorf("%s of %d bytes: %d %+v", request, size, a.StatusCode, e)
			}
		}
		media, padded := "application/octet-stream", make([]byte, maxBody)
		if method == http.MethodPost {
			media, padded = "application/json", []byte(someRegistration+strings.Repeat(" ", maxBody-len(someRegistration)))
		}
		if a := b.send(method, b.url+path, padded, "Content-Type", media); a.StatusCode != 200 {
			t.Errorf("%s of 64 KiB: %d", request, a.StatusCode)
		}
	}
	if len(b.nodes.asked) != 4 {
		t.Errorf("%d use cases were asked", len(b.nodes.asked))
	}
	if got := b.reasons(); len(got) != 6 {
		t.Errorf("counted %q", got)
	}
}

func TestNodesNeedNoTokenAndPeopleDo(t *testing.T) {
	b := newBench(t, nil)
	for request, want := range map[string]int{
		"POST /register": 200, "POST /secrets": 200, "GET /organization/acme/nodes": 401,
		"PUT /organization/acme/secret/a": 401, "GET /organization/acme/secret": 401, "DELETE /organization/acme/node/" + nodeID: 401,
	} {
		method, path, _ := strings.Cut(request, " ")
		if a := b.send(method, b.url+path, []byte(someRegistration), "Authorization", "", "Content-Type", "application/json"); a.StatusCode != want {
			t.Errorf("%s without a token: %d", request, a.StatusCode)
		}
	}
}

func TestTheQueryForServices(t *testing.T) {
	for query, want := range map[string]int64{
		"": 0, "nodeServices=0": 0, "nodeServices=7": 7, "other=1": 0, "nodeServices=2147483647": 2147483647,
		"nodeServices=": -1, "nodeServices=-1": -1, "nodeServices=1.5": -1, "nodeServices=0x1": -1, "nodeServices=2147483648": -1,
		"nodeServices=1&nodeServices=2": -1, "nodeServices=%zz": -1, "nodeServices=+1": -1, "a;b=1": -1,
	} {
		got, err := servicesAsked(query)
		if err != nil {
			got = -1
		}
		if got != want {
			t.Errorf("%q: %d, want %d", query, got, want)
		}
	}
}
