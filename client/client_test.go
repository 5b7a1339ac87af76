package client_test

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/envelope"
)

// administrator is a client for an owner of org at the shared server.
func administrator(t *testing.T, org string) *client.Client {
	t.Helper()
	token := server.Token(t, org, "OWNER")
	return newClient(t, client.Config{Server: server.API, Token: func(context.Context) (string, error) { return token, nil }})
}

func newClient(t *testing.T, c client.Config) *client.Client {
	t.Helper()
	made, err := client.New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(made.CloseIdleConnections)
	return made
}

// must is for calls that the test needs to succeed.
func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func TestEverythingThatAdministratorsAndNodesDo(t *testing.T) {
	ctx, org := t.Context(), harness.Org()
	admin := administrator(t, org)
	generated := must[*client.GeneratedKey](t)(admin.GenerateKey(ctx, org))
	key := must[client.PrivateKey](t)(client.ParsePrivateKey(generated.PEM))
	listed := must[[]client.Key](t)(admin.Keys(ctx, org))
	if len(listed) != 1 || listed[0].ID != generated.ID || listed[0].Fingerprint != client.Fingerprint(key.Public()) || listed[0].Created.IsZero() {
		t.Errorf("keys %+v", listed)
	}

	if err := admin.PutSecret(ctx, org, "env_s3", []byte("A\x00=1")); err != nil {
		t.Fatal(err)
	}
	stored := must[[]client.StoredSecret](t)(admin.StoredSecrets(ctx, org))
	if len(stored) != 1 || stored[0].Name != "env_s3" {
		t.Errorf("stored secrets %+v", stored)
	}
	node := client.Node{Client: newClient(t, client.Config{Server: server.API}), Org: org, IP: "192.0.2.7", Region: "eu", Key: key}
	secrets := must[[]client.Secret](t)(node.Secrets(ctx))
	if len(secrets) != 1 || secrets[0].Name != "env_s3" || string(secrets[0].Value) != "A\x00=1" {
		t.Errorf("secrets %q", secrets)
	}
	services := int64(5)
	registration := client.Registration{Version: "1.0", Status: "active", URL: "https://n", Services: &services}
	if err := node.Register(ctx, registration); err != nil {
		t.Fatal(err)
	}
	nodes := must[[]client.RegisteredNode](t)(admin.Nodes(ctx, org))
	if len(nodes) != 1 || nodes[0].IP != node.IP || nodes[0].Services != 5 || nodes[0].URL != "https://n" {
		t.Errorf("nodes %+v", nodes)
	}

	for what, err := range map[string]error{
		"delete node":   admin.DeleteNode(ctx, org, nodes[0].ID),
		"unregister":    node.Unregister(ctx),
		"delete secret": admin.DeleteSecret(ctx, org, "env_s3"),
		"health":        func() error { _, err := node.Client.Health(ctx); return err }(),
	} {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	if secrets := must[[]client.Secret](t)(node.Secrets(ctx)); len(secrets) != 0 {
		t.Errorf("secrets %q after the deletion", secrets)
	}
	if err := admin.DeleteKey(ctx, org, generated.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := node.Secrets(ctx); !errors.Is(err, client.BadSignature) || client.Temporary(err) {
		t.Errorf("secrets with a deleted key: %v", err)
	}
	if err := admin.DeleteKeys(ctx, org); err != nil {
		t.Error(err)
	}
}

func TestRefusalsAreTypedByTheirCode(t *testing.T) {
	ctx, org := t.Context(), harness.Org()
	admin := administrator(t, org)
	for code, call := range map[client.Code]func() error{
		client.OtherOrganization: func() error { return admin.DeleteKeys(ctx, "another") },
		client.KeyNotFound:       func() error { return admin.DeleteKey(ctx, org, "../../healthz") },
		client.SecretNotFound:    func() error { return admin.DeleteSecret(ctx, org, "env_s3") },
		client.InvalidRequest:    func() error { return admin.PutSecret(ctx, org, "UPPER", nil) },
		client.BodyTooLarge:      func() error { return admin.PutSecret(ctx, org, "env_s3", make([]byte, 65<<10)) },
		client.InvalidToken: func() error {
			stranger := newClient(t, client.Config{Server: server.API, Token: func(context.Context) (string, error) { return "x", nil }})
			return stranger.DeleteKeys(ctx, org)
		},
	} {
		err := call()
		e, ok := errors.AsType[*client.Error](err)
		if !ok || !errors.Is(err, code) || e.Status < 400 || e.Message == "" || e.RequestID == "" || client.Temporary(err) {
			t.Errorf("%s: %v", code, err)
		}
	}
}

// The package knows every code of the API, and no other.
func TestCodesAreThoseOfTheAPI(t *testing.T) {
	source, err := os.ReadFile("errors.go")
	if err != nil {
		t.Fatal(err)
	}
	document, err := os.ReadFile("../internal/api/openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	_, enum, _ := strings.Cut(string(document), "description: Stable, for programs.\n")
	enum, _, _ = strings.Cut(enum, "requestId:")
	var known, documented []string
	for _, m := range regexp.MustCompile(`Code = "(\w+)"`).FindAllStringSubmatch(string(source), -1) {
		known = append(known, m[1])
	}
	for _, m := range regexp.MustCompile(`(?m)^ +- (\w+)$`).FindAllStringSubmatch(enum, -1) {
		documented = append(documented, m[1])
	}
	slices.Sort(known)
	slices.Sort(documented)
	if len(known) == 0 || !slices.Equal(known, documented) {
		t.Errorf("known %q\ndocumented %q", known, documented)
	}
}

// foreignAnswers are what things in between are seen to answer.
var foreignAnswers = map[string]http.HandlerFunc{
	"a page":               answering(200, "text/html", "<html>log in"),
	"a page as JSON":       answering(200, "application/json", "<html>log in"),
	"JSON as text":         answering(200, "text/plain", `{"success":true,"message":"","data":[],"status":"ok"}`),
	"JSON without a type":  answering(200, "", `{"success":true,"data":[]}`),
	"other JSON":           answering(200, "application/json", `{"ok":true}`),
	"an empty object":      answering(200, "application/json", `{}`),
	"a gateway's {}":       answering(200, "application/json", `{}`, "X-Request-Id", "r"),
	"a gateway's success":  answering(200, "application/json", `{"success":true,"message":"OK","data":null}`, "X-Request-Id", "r", "X-Secret-Count", "1"),
	"null":                 answering(200, "application/json", `null`),
	"a list":               answering(200, "application/json", `[]`),
	"a failure as success": answering(200, "application/json", `{"success":false,"message":"x","errorCode":"bad_signature"}`),
	"nothing":              answering(204, "", ""),
	"accepted":             answering(202, "application/json", `{"success":true}`),
	"a redirect":           answering(302, "text/html", "", "Location", "https://portal.example/"),
	"401":                  answering(401, "text/html", "log in"),
	"403":                  answering(403, "application/json", `{"message":"Forbidden"}`),
	"404":                  answering(404, "text/plain", "default backend - 404"),
	"404 in JSON":          answering(404, "application/json", `{"success":false,"message":"no Route matched"}`),
	"no requestId":         answering(403, "application/json", `{"success":false,"message":"no","errorCode":"forbidden"}`),
	"another's code":       answering(400, "application/json", `{"success":false,"message":"x","errorCode":"NO_ROUTE"}`),
	"407":                  answering(407, "text/html", ""),
	"421":                  answering(421, "", ""),
	"425":                  answering(425, "", ""),
	"429":                  answering(429, "text/html", "slow down"),
	"500":                  answering(500, "text/html", "oops"),
	"503":                  answering(503, "text/html", "maintenance"),
	"511":                  answering(511, "text/html", "log in"),
	"no end": func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		for {
			if _, err := io.WriteString(w, strings.Repeat(" ", 1<<16)); err != nil {
				return
			}
		}
	},
}

func answering(status int, mediaType, body string, header ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header()["Content-Type"] = nil // no guessing
		if mediaType != "" {
			w.Header().Set("Content-Type", mediaType)
		}
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(status)
		io.WriteString(w, body)
	}
}

func stub(t *testing.T, h http.Handler) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}

var testKey = func() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return key
}()

func anyToken(context.Context) (string, error) { return "t", nil }

func nodeAt(t *testing.T, server string) client.Node {
	return client.Node{Client: newClient(t, client.Config{Server: server}), Org: "acme", IP: "192.0.2.7", Region: "eu", Key: testKey}
}

// Nothing that something in between says is taken for an answer of orgkeys, by
// any call, and none of it is final.
func TestForeignAnswersAreToldApart(t *testing.T) {
	for name, h := range foreignAnswers {
		url := stub(t, h)
		c, node := newClient(t, client.Config{Server: url, Token: anyToken}), nodeAt(t, url)
		for call, do := range map[string]func() error{
			"register":      func() error { return node.Register(t.Context(), client.Registration{Version: "1", Status: "s"}) },
			"unregister":    func() error { return node.Unregister(t.Context()) },
			"secrets":       func() error { _, err := node.Secrets(t.Context()); return err },
			"generate key":  func() error { _, err := c.GenerateKey(t.Context(), "acme"); return err },
			"keys":          func() error { _, err := c.Keys(t.Context(), "acme"); return err },
			"nodes":         func() error { _, err := c.Nodes(t.Context(), "acme"); return err },
			"delete key":    func() error { return c.DeleteKey(t.Context(), "acme", "k") },
			"delete keys":   func() error { return c.DeleteKeys(t.Context(), "acme") },
			"delete node":   func() error { return c.DeleteNode(t.Context(), "acme", "n") },
			"put secret":    func() error { return c.PutSecret(t.Context(), "acme", "s", nil) },
			"delete secret": func() error { return c.DeleteSecret(t.Context(), "acme", "s") },
			"revoke":        func() error { return c.RevokeEnrollment(t.Context(), "acme", "e") },
			"approve":       func() error { return c.ApproveEnrollment(t.Context(), "acme", "e", "r") },
			"allow":         func() error { return c.AllowDevice(t.Context(), "acme", "sha256-0", "") },
			"remove device": func() error { return c.RemoveDevice(t.Context(), "acme", "sha256-0") },
			"receipt":       func() error { return c.Receipt(t.Context(), client.Delivery{Enrollment: "e"}, testKey) },
			"own receipt":   func() error { return c.Receipt(t.Context(), client.Delivery{Org: "acme", KeyID: "k"}, testKey) },
			"health":        func() error { _, err := c.Health(t.Context()); return err },
		} {
			err := do()
			if foreign, ok := errors.AsType[*client.ForeignError](err); !ok || !client.Temporary(err) || foreign.Status == 0 {
				t.Errorf("%s, %s: %v", name, call, err)
			}
		}
	}
}

func sealed(t *testing.T, name, value string) string {
	t.Helper()
	text, err := envelope.Seal(&testKey.PublicKey, []byte(value))
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%q:%s", name+"_enc", must[[]byte](t)(json.Marshal(string(text))))
}

func TestAnswersWithADoubtfulSecretAreRefusedAsAWhole(t *testing.T) {
	good := sealed(t, "env_s3", "A=1")
	many := []string{}
	for i := range 65 {
		many = append(many, sealed(t, fmt.Sprintf("s%d", i), "x"))
	}
	for name, body := range map[string]string{
		"a name that leads out": good + "," + sealed(t, "../evil", "x"),
		"a name in capitals":    good + "," + sealed(t, "Evil", "x"),
		"no name":               good + "," + sealed(t, "", "x"),
		"no envelope":           good + `,"b_enc":"x"`,
		"an object":             good + `,"b_enc":{"key":""}`,
		"changed":               strings.Replace(good, `\"ct\":\"`, `\"ct\":\"AAAA`, 1),
		"twice":                 good + "," + good,
		"too many":              strings.Join(many, ","),
		"a failure":             good + `,"success":false`,
	} {
		node := nodeAt(t, stub(t, answering(200, "application/json", "{"+body+"}", "X-Request-Id", "r", "X-Secret-Count", strconv.Itoa(strings.Count(body, `_enc":`)))))
		secrets, err := node.Secrets(t.Context())
		if _, ok := errors.AsType[*client.ForeignError](err); !ok || secrets != nil {
			t.Errorf("%s: %q, %v", name, secrets, err)
		}
	}
	if _, err := nodeAt(t, stub(t, answering(200, "application/json", "{"+good+"}", "X-Secret-Count", "2"))).Secrets(t.Context()); err == nil {
		t.Error("a secret that was lost on the way is not missed")
	}
	// Answers may gain fields.
	node := nodeAt(t, stub(t, answering(200, "application/json", "{"+good+`,"more":1}`)))
	if secrets := must[[]client.Secret](t)(node.Secrets(t.Context())); len(secrets) != 1 {
		t.Errorf("secrets %q", secrets)
	}
}

// failing is a key in a device that fails at first.
type failing struct {
	*rsa.PrivateKey
	signs, decrypts atomic.Int64 // how often it fails
}

var errDevice = errors.New("open /dev/tpmrm0: no such file or directory")

func (k *failing) Sign(r io.Reader, digest []byte, o crypto.SignerOpts) ([]byte, error) {
	if k.signs.Add(-1) >= 0 {
		return nil, errDevice
	}
	return k.PrivateKey.Sign(r, digest, o)
}

func (k *failing) Decrypt(r io.Reader, text []byte, o crypto.DecrypterOpts) ([]byte, error) {
	if k.decrypts.Add(-1) >= 0 {
		return nil, errDevice
	}
	return k.PrivateKey.Decrypt(r, text, o)
}

// A device may not be there yet, or fail once. Nothing that was asked for, and nothing
// that the server said, is to blame for that.
func TestAKeyThatFailsIsAskedAgain(t *testing.T) {
	answers := map[string]http.HandlerFunc{
		"/register": answering(200, "application/json", `{"success":true,"message":"Node registered successfully"}`),
		"/secrets":  answering(200, "application/json", "{"+sealed(t, "env_s3", "A=1")+"}", "X-Secret-Count", "1"),
		"/receipt":  answering(200, "application/json", `{"success":true,"message":"Receipt recorded"}`),
	}
	server := stub(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answers[r.URL.Path[strings.LastIndex(r.URL.Path, "/"):]](w, r)
	}))
	for name, c := range map[string]struct {
		signs, decrypts int64
		do              func(ctx context.Context, n client.Node, key client.PrivateKey) error
	}{
		"register": {2, 0, func(ctx context.Context, n client.Node, _ client.PrivateKey) error {
			return n.Register(ctx, client.Registration{Version: "1", Status: "s"})
		}},
		"secrets": {1, 1, func(ctx context.Context, n client.Node, _ client.PrivateKey) error {
			_, err := n.Secrets(ctx)
			return err
		}},
		"secrets that came": {0, 2, func(ctx context.Context, n client.Node, _ client.PrivateKey) error {
			_, err := n.Secrets(ctx)
			return err
		}},
		"receipt": {2, 0, func(ctx context.Context, n client.Node, key client.PrivateKey) error {
			return n.Client.Receipt(ctx, client.Delivery{Enrollment: "e"}, key)
		}},
	} {
		for _, patient := range []bool{false, true} {
			key := &failing{PrivateKey: testKey}
			key.signs.Store(c.signs)
			key.decrypts.Store(c.decrypts)
			config := client.Config{Server: server}
			if patient {
				config.Retry.For = time.Minute
			}
			err := c.do(t.Context(), client.Node{Client: newClient(t, config), Org: "acme", IP: "192.0.2.7", Region: "eu", Key: key}, key)
			if patient && err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if foreign := new(client.ForeignError); !patient && (!errors.Is(err, client.ErrKeyFailed) || !errors.Is(err, errDevice) ||
				!client.Temporary(err) || errors.Is(err, client.ErrRequest) || errors.As(err, &foreign)) {
				t.Errorf("%s, once: %v", name, err)
			}
		}
	}
}

// counted answers each request with the next handler, and the rest with the last.
func counted(n *atomic.Int64, all ...http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		i := int(n.Add(1)) - 1
		all[min(i, len(all)-1)](w, r)
	}
}

func refusing(status int, code string) http.HandlerFunc {
	return answering(status, "application/json", fmt.Sprintf(`{"success":false,"message":"m","errorCode":%q,"requestId":"r"}`, code))
}

func lost(w http.ResponseWriter, _ *http.Request) { panic(http.ErrAbortHandler) }

// A second POST makes a second key: so it is sent only if the first made none.
func TestGenerateKeyIsRepeatedOnlyIfNothingWasMade(t *testing.T) {
	pemText := string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(testKey)}))
	made := answering(200, "application/x-pem-file", pemText, "X-Key-Id", "k", "X-Key-Fingerprint", client.Fingerprint(&testKey.PublicKey))
	for name, c := range map[string]struct {
		first http.HandlerFunc
		want  int64
	}{
		"overloaded":    {refusing(503, "overloaded"), 2},
		"answer lost":   {lost, 1},
		"a page":        {foreignAnswers["a page"], 1},
		"a gateway's":   {foreignAnswers["503"], 1},
		"back end":      {refusing(500, "generation_failed"), 1},
		"quota":         {refusing(400, "quota_exceeded"), 1},
		"not even once": {made, 1},
	} {
		var n atomic.Int64
		cl := newClient(t, client.Config{Server: stub(t, counted(&n, c.first, made)), Token: anyToken, Retry: client.Retry{For: time.Minute}})
		key, err := cl.GenerateKey(t.Context(), "acme")
		if n.Load() != c.want || (err == nil) != (c.want == 2 || name == "not even once") || err == nil && string(key.PEM) != pemText {
			t.Errorf("%s: %d requests, %v", name, n.Load(), err)
		}
	}
}

// What cannot be said in a request is an error, and not taken for nothing said.
func TestARestrictionThatIsNotKnownIsNoneTaken(t *testing.T) {
	var n atomic.Int64
	c := newClient(t, client.Config{Server: stub(t, counted(&n, answering(200, "application/json", `{"events":[],"total":0}`))), Token: anyToken})
	for _, f := range []client.EventFilter{{Context: "nodes"}, {Change: "delete"}, {Context: client.WasDeleted}, {Change: client.OfKeys}} {
		if _, err := c.Events(t.Context(), "acme", f); !errors.Is(err, client.ErrRequest) {
			t.Errorf("%+v: %v", f, err)
		}
	}
	for _, life := range []time.Duration{time.Millisecond, -time.Hour, 90*time.Minute + 1} {
		if _, err := c.CreateEnrollment(t.Context(), "acme", client.Terms{Life: life}); !errors.Is(err, client.ErrRequest) {
			t.Errorf("a life of %s: %v", life, err)
		}
	}
	if n.Load() != 0 {
		t.Errorf("%d requests", n.Load())
	}
	// As Event has them.
	for _, f := range []client.EventFilter{{Context: "orgkey"}, {Context: "flashbacknode", Change: "updated"}} {
		if _, err := c.Events(t.Context(), "acme", f); err != nil {
			t.Errorf("%+v: %v", f, err)
		}
	}
	asked := make(chan string, 1)
	c = newClient(t, client.Config{Server: stub(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- r.URL.RawQuery
		refusing(400, "invalid_request")(w, r)
	})), Token: anyToken})
	if _, err := c.Log(t.Context(), "acme", client.LogFilter{Take: -1, Before: -2}); !errors.Is(err, client.InvalidRequest) {
		t.Errorf("negative numbers: %v", err)
	} else if query := <-asked; query != "before=-2&take=-1" {
		t.Errorf("the server is asked for %q", query)
	}
}

func TestDamagedKeyIsNamed(t *testing.T) {
	for _, body := range []string{"-----BEGIN RSA PRIVATE KEY-----\nAA==\n-----END RSA PRIVATE KEY-----\n", "", "x"} {
		c := newClient(t, client.Config{Server: stub(t, answering(200, "application/x-pem-file", body, "X-Key-Id", "k-1")), Token: anyToken})
		if _, err := c.GenerateKey(t.Context(), "acme"); !errors.Is(err, client.ErrKeyDamaged) || !strings.Contains(err.Error(), "k-1") {
			t.Errorf("%q: %v", body, err)
		}
	}
}

// After a lost answer "not found" means that the first attempt did it.
func TestDeletionWhoseAnswerWasLostIsDone(t *testing.T) {
	for name, c := range map[string]struct {
		first http.HandlerFunc
		done  bool
	}{
		"lost":       {lost, true},
		"unknown":    {refusing(503, "unavailable"), true}, // to the server itself
		"failed":     {refusing(500, "internal"), true},
		"overloaded": {refusing(503, "overloaded"), false},
		"no trail":   {refusing(503, "audit_unavailable"), false},
		"not found":  {refusing(404, "key_not_found"), false},
	} {
		var n atomic.Int64
		cl := newClient(t, client.Config{Server: stub(t, counted(&n, c.first, refusing(404, "key_not_found"))), Token: anyToken, Retry: client.Retry{For: time.Minute}})
		if err := cl.DeleteKey(t.Context(), "acme", "k"); (err == nil) != c.done || err != nil && !errors.Is(err, client.KeyNotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A list that is longer than this package reads is the server's all the same, and
// asking again makes it no shorter.
func TestALongListIsNoForeignAnswer(t *testing.T) {
	long := func(length string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set("Content-Length", length)
			io.WriteString(w, `{"success":true,"message":"Keys","data":[{"id"`)
		}
	}
	c := newClient(t, client.Config{Server: stub(t, long("268435457")), Token: anyToken, Retry: client.Retry{For: time.Minute}})
	_, err := c.NodeKeys(t.Context(), "acme")
	if foreign := new(client.ForeignError); !errors.Is(err, client.ErrListTooLong) || errors.As(err, &foreign) || client.Temporary(err) {
		t.Errorf("a list of more than 256 MiB: %v", err)
	}
	if err := c.DeleteKey(t.Context(), "acme", "k"); !errors.As(err, new(*client.ForeignError)) {
		t.Errorf("what is no list: %v", err)
	}

	entry := `{"id":"` + strings.Repeat("k", 1000) + `"}`
	list := `{"success":true,"data":[` + strings.Repeat(entry+",", 17<<10) + entry + `]}`
	c = newClient(t, client.Config{Server: stub(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		io.WriteString(w, list)
	})), Token: anyToken})
	if keys, err := c.NodeKeys(t.Context(), "acme"); err != nil || len(keys) != 17<<10+1 {
		t.Errorf("a list of 17 MiB: %d keys, %v", len(keys), err)
	}
}

// What never reached the server did nothing there: a deletion of something that is not
// there fails, whatever it is.
func TestDeletionThatNeverReachedTheServerIsNotDone(t *testing.T) {
	deletions := map[client.Code]func(context.Context, *client.Client) error{
		client.KeyNotFound:        func(ctx context.Context, c *client.Client) error { return c.DeleteKey(ctx, "acme", "k") },
		client.SecretNotFound:     func(ctx context.Context, c *client.Client) error { return c.DeleteSecret(ctx, "acme", "s") },
		client.DeviceNotFound:     func(ctx context.Context, c *client.Client) error { return c.RemoveDevice(ctx, "acme", "sha256-0") },
		client.NodeAlreadyDeleted: func(ctx context.Context, c *client.Client) error { return c.DeleteNode(ctx, "acme", "n") },
	}
	for gone, remove := range deletions {
		server := stub(t, refusing(404, string(gone)))
		t.Run("a refused connection, "+string(gone), func(t *testing.T) {
			var dials atomic.Int64
			transport := &http.Transport{DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
				if dials.Add(1) == 1 {
					address = "127.0.0.1:1"
				}
				return new(net.Dialer).DialContext(ctx, network, address)
			}}
			t.Cleanup(transport.CloseIdleConnections)
			c := newClient(t, client.Config{Server: server, Token: anyToken, Retry: client.Retry{For: time.Minute}, Transport: transport})
			if err := remove(t.Context(), c); !errors.Is(err, gone) || dials.Load() < 2 {
				t.Errorf("%v after %d connections", err, dials.Load())
			}
		})
		t.Run("no token, "+string(gone), func(t *testing.T) {
			var asked atomic.Int64
			token := func(context.Context) (string, error) {
				if asked.Add(1) == 1 {
					return "", errors.New("the provider is away")
				}
				return "t", nil
			}
			c := newClient(t, client.Config{Server: server, Token: token, Retry: client.Retry{For: time.Minute}})
			if err := remove(t.Context(), c); !errors.Is(err, gone) || asked.Load() < 2 {
				t.Errorf("%v after %d attempts", err, asked.Load())
			}
		})
		t.Run("a portal, "+string(gone), func(t *testing.T) {
			var n atomic.Int64
			portal := func(w http.ResponseWriter, r *http.Request) {
				http.Redirect(w, r, "http://portal.example/", http.StatusFound)
			}
			c := newClient(t, client.Config{Server: stub(t, counted(&n, portal, refusing(404, string(gone)))), Token: anyToken, Retry: client.Retry{For: time.Minute}})
			if err := remove(t.Context(), c); !errors.Is(err, gone) || n.Load() < 2 {
				t.Errorf("%v after %d attempts", err, n.Load())
			}
		})
	}
}

func TestRequestsGoOverTLSOrStayOnThisMachine(t *testing.T) {
	for _, s := range []string{
		"", "orgkeys.example", "http://orgkeys.example", "http://192.0.2.1", "ftp://127.0.0.1", "https://", "https://:443",
		"https://user:pass@host", "https://host?a", "https://host#a", "http://127.0.0.1.example",
	} {
		if _, err := client.New(client.Config{Server: s}); !errors.Is(err, client.ErrServer) {
			t.Errorf("%q: %v", s, err)
		}
	}
	for _, s := range []string{"https://host", "https://host:1/prefix/", "http://127.0.0.1:3000", "http://[::1]", "http://localhost"} {
		if _, err := client.New(client.Config{Server: s}); err != nil {
			t.Errorf("%q: %v", s, err)
		}
	}
}

// Programs that use the client must stay small, and build without cgo: of this
// module it needs the envelope, and of others the JSON library and AES key wrap.
func TestImports(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range strings.Fields(string(out)) {
		switch {
		case path == "github.com/orgkeys/orgkeys/client", path == "github.com/orgkeys/orgkeys/internal/envelope", path == "github.com/orgkeys/orgkeys/internal/keypem":
		case strings.HasPrefix(path, "github.com/go-json-experiment/json"):
		case path == "github.com/tink-crypto/tink-go/v2/kwp/subtle": // AES key wrap of sealed keys
		default:
			t.Errorf("the client needs %s", path)
		}
	}
}
