package e2e

import (
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/chaos/cluster"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/testca"
)

// eventTypes are all that the source declares.
func eventTypes(t *testing.T) []string {
	t.Helper()
	source, err := os.ReadFile(filepath.Join(harness.ModuleRoot(t), "internal", "audit", "event.go"))
	must(t, err)
	var types []string
	for _, m := range regexp.MustCompile(`(?m)^\s+\w+ +Type += +"([^"]+)"`).FindAllSubmatch(source, -1) {
		types = append(types, string(m[1]))
	}
	if len(types) < 20 {
		t.Fatalf("only %d types found in the source", len(types))
	}
	return types
}

// The verifier that auditors are handed verifies exports of the running program
// in which every kind of event that there is has happened, on both back ends.
func TestPromise5_TheIndependentVerifierKnowsEveryEventOfTheProgram(t *testing.T) {
	t.Run("pkcs11", func(t *testing.T) {
		// Nothing but Vault's sealing key has versions.
		allHappens(t, []string{"seal.rewrapped"}, nil)
	})
	t.Run("vault", func(t *testing.T) {
		v, _, settings := throughVault(t)
		allHappens(t, nil, func(t *testing.T) {
			_, err := root(t, v).WriteWithContext(context.WithoutCancel(t.Context()), "orgkeys-seal/keys/seal/rotate", nil)
			must(t, err)
		}, settings, harness.Set("ORGKEYS_RESERVATION_TTL", "10s"))
	})
}

// allHappens has every event but those of except happen, and verifies exports
// from the beginning on.
func allHappens(t *testing.T, except []string, rotate func(*testing.T), opts ...harness.Option) {
	ca := testca.New(t)
	opts = append(opts, harness.TLS(ca, ca.Issue(t, "orgkeys")), harness.Set("ORGKEYS_MAX", "2"), harness.Set("ORGKEYS_POOL", "1"), harness.Set("ORGKEYS_AUDIT_FILE", filepath.Join(t.TempDir(), "sink.jsonl")),
		harness.Set("ORGKEYS_AUDIT_ARCHIVE", filepath.Join(t.TempDir(), "archive")))
	s := harness.Start(t, opts...)
	org := harness.Org()
	s.Generate(t, org)
	s.Stop(t)
	python(t, s, 3)

	backup := harness.Copy(t, s.Dir)
	s.Start(t)
	s.List(t, org) // lost by the rollback
	s.Stop(t)
	must(t, os.RemoveAll(s.Dir))
	must(t, os.Rename(backup, s.Dir))
	succeeds(t, s, "audit", "accept-rollback", "--reason", "a test")

	s.Start(t)
	byEverybody(t, s, ca)
	byEnrollment(t, s)
	filled(t, s, 1)
	s.Stop(t) // writes the summary of callers whom nobody knows
	s.Start(t)
	succeeds(t, s, "audit", "erase", "--subject", "admin", "--reason", "a test")
	if rotate != nil {
		rotate(t)
		succeeds(t, s, "rewrap")
	}
	for range 256 { // a bundle of the archive
		s.List(t, org)
	}
	s.Stop(t)
	succeeds(t, s, "audit", "archive", "--before", time.Now().Format(time.RFC3339Nano))
	judged := python(t, s, 3)
	if len(judged.Enrolled) == 0 || judged.Enrolled[0]["receipt"] != "signed" || judged.Enrolled[0]["from"] != "127.0.0.1" {
		t.Errorf("of the node that enrolled it says %v", judged.Enrolled)
	}
	if want := (permitted{Enrollments: 5, Proofs: 1}); judged.permitted != want {
		t.Errorf("of enrollments it says %+v, want %+v", judged.permitted, want)
	}
	happened := judged.Types
	except = append(except, "log.database_changed") // wants a PostgreSQL that fails over: internal/chaos has its export verified
	except = append(except, "log.pruned")           // of a log whose first entries are removed there is no export
	for _, name := range eventTypes(t) {
		if happened[name] == 0 && !slices.Contains(except, name) {
			t.Errorf("%s did not happen: have this test bring it about", name)
		}
	}
}

func succeeds(t *testing.T, s *harness.Server, args ...string) string {
	t.Helper()
	out, errs, code := s.Run(t, args...)
	if code != 0 {
		t.Fatalf("orgkeys %s: exit code %d\n%s%s", strings.Join(args, " "), code, out, errs)
	}
	return out
}

// byEnrollment has everything happen that can happen to an enrollment.
func byEnrollment(t *testing.T, s *harness.Server) {
	t.Helper()
	org := harness.Org()
	owner := s.Token(t, org, "OWNER")
	recipient := newRecipient(t)
	received := mint(t, s, org, `{}`)
	fetched := enrollmentOver(t, s, received.Token, recipient)
	fetch(t, fetched)
	if _, err := enrollmentOver(t, s, mint(t, s, org, `{"bind":{"recipient":"`+strings.Repeat("0", 64)+`"}}`).Token, recipient).Fetch(t.Context()); !errors.Is(err, client.EnrollmentClaimed) {
		t.Errorf("a recipient that it is not bound to: %v", err)
	}
	waiting := mint(t, s, org, `{"approval":true}`)
	if _, err := enrollmentOver(t, s, waiting.Token, recipient).Fetch(t.Context()); !errors.Is(err, client.Pending) {
		t.Errorf("before its approval: %v", err)
	}
	public, err := x509.MarshalPKIXPublicKey(&recipient.PublicKey)
	must(t, err)
	at := "/organization/" + org + "/enrollment"
	approval := fmt.Appendf(nil, `{"recipient":"%x"}`, sha256.Sum256(public))
	do(t, s, 200, harness.Request{Method: "POST", Path: at + "/" + waiting.ID + "/approve", Token: owner, Body: approval, Header: http.Header{"Content-Type": {"application/json"}}})
	do(t, s, 200, harness.Request{Method: "DELETE", Path: at + "/" + waiting.ID, Token: owner})
	do(t, s, 200, harness.Request{Method: "DELETE", Path: at + "/" + waiting.ID, Token: owner}) // which is so already
	// An approval that changes nothing is none behind the revocation.
	do(t, s, 200, harness.Request{Method: "DELETE", Path: at + "/" + received.ID, Token: owner})
	do(t, s, 200, harness.Request{Method: "POST", Path: at + "/" + received.ID + "/approve", Token: owner, Body: approval, Header: http.Header{"Content-Type": {"application/json"}}})
	// An administrator's own, which another one fetches, too, behind the first.
	sealed, err := s.Client(t, org, "OWNER").SealedKey(t.Context(), org, newRecipient(t))
	must(t, err)
	do(t, s, 200, harness.Request{Method: "GET", Path: harness.KeyPath(org) + "/" + sealed.KeyID + "/sealed", Token: s.Token(t, org, "ADMINISTRATOR")})
	private, err := client.ParsePrivateKey(sealed.PEM)
	must(t, err)
	must(t, s.Client(t, org, "OWNER").Receipt(t.Context(), sealed.Delivery, private)) // else it holds the archive back
	do(t, s, 200, harness.Request{Method: "GET", Path: at, Token: owner})
	own, err := client.NewOwnKey()
	must(t, err)
	_, err = enrollmentOver(t, s, mint(t, s, org, `{"origin":"node"}`).Token, nil).Announce(t.Context(), own)
	must(t, err)
	device := "/organization/" + org + "/device/sha256-" + strings.Repeat("0", 64)
	for _, method := range []string{"PUT", "GET", "DELETE"} {
		do(t, s, 200, harness.Request{Method: method, Path: device, Token: owner})
	}
	late := mint(t, s, org, `{}`)
	db := s.Database(t)
	harness.Exec(t, db, "UPDATE enrollments SET expires_at = 1 WHERE id = '"+late.ID+"'")
	harness.Eventually(t, harness.Patience, "an enrollment expires", func() bool {
		return show(t, s, org, late.ID).State == "expired" && harness.Number(t, db, "SELECT count(*) FROM events WHERE type = 'enrollment.expired'") == 1
	})
}

// enrollmentOver is enrollment over the server's TLS.
func enrollmentOver(t *testing.T, s *harness.Server, token string, recipient *rsa.PrivateKey) *client.Enrollment {
	t.Helper()
	c, err := client.New(client.Config{Server: s.API, Transport: s.HTTP.Transport})
	must(t, err)
	e, err := client.NewEnrollment(c, []byte(token), recipient)
	must(t, err)
	return e
}

// byEverybody does what users, nodes and strangers can do, well and wrongly.
func byEverybody(t *testing.T, s *harness.Server, ca *testca.CA) {
	t.Helper()
	org := harness.Org()
	owner, user := s.Token(t, org, "OWNER"), s.Token(t, org, "USER")
	key := s.Generate(t, org)
	s.Generate(t, org)
	signed := func(path string) {
		t.Helper()
		body, err := cluster.Signed(key.Private, org, "192.0.2.7")
		must(t, err)
		do(t, s, 200, harness.Request{Method: "POST", Path: path, Body: body, Header: http.Header{"Content-Type": {"application/json"}}})
	}
	signed("/register")
	signed("/secrets")
	signed("/unregister")
	signed("/register")
	var nodes struct{ Data []struct{ ID string } }
	must(t, json.Unmarshal(do(t, s, 200, harness.Request{Method: "GET", Path: "/organization/" + org + "/nodes", Token: user}), &nodes))
	plain := http.Header{"Content-Type": {"application/octet-stream"}}
	inJSON := http.Header{"Content-Type": {"application/json"}}
	for _, r := range []struct {
		status int
		harness.Request
	}{
		{400, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: owner}},   // by the quota
		{403, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: user}},    // by the policy
		{401, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: "x.y.z"}}, // by nobody
		{400, harness.Request{Method: "POST", Path: "/systemevent", Token: user, Body: []byte(`{"take":0}`), Header: inJSON}},
		{200, harness.Request{Method: "POST", Path: "/systemevent", Token: user, Body: []byte(`{}`), Header: inJSON}},
		{200, harness.Request{Method: "POST", Path: "/systemevent/read", Token: user, Body: []byte(`{"ids":[1]}`), Header: inJSON}},
		{200, harness.Request{Method: "GET", Path: "/organization/" + org + "/decision/orgkey.generate", Token: user}},
		{200, harness.Request{Method: "PUT", Path: "/organization/" + org + "/secret/env_s3", Token: owner, Body: []byte("s"), Header: plain}},
		{200, harness.Request{Method: "GET", Path: "/organization/" + org + "/secret", Token: owner}},
		{200, harness.Request{Method: "DELETE", Path: "/organization/" + org + "/secret/env_s3", Token: owner}},
		{200, harness.Request{Method: "DELETE", Path: "/organization/" + org + "/node/" + nodes.Data[0].ID, Token: owner}},
		{200, harness.Request{Method: "GET", Path: harness.KeyPath(org), Token: owner}},
		{200, harness.Request{Method: "DELETE", Path: harness.KeyPath(org) + "/" + key.ID, Token: owner}},
		{200, harness.Request{Method: "DELETE", Path: harness.KeyPath(org), Token: owner}},
	} {
		do(t, s, r.status, r.Request)
	}
	// A caller who is gone before the key is written out.
	h := dialHTTP2(t, s, ca, 64)
	h.post(t, org, owner)
	h.data(t)
	h.conn.Close()
	withdrawnOnce(t, s, org, "write_failed")
}

func do(t *testing.T, s *harness.Server, status int, r harness.Request) []byte {
	t.Helper()
	resp := s.Do(t, r)
	if resp.Status != status {
		t.Fatalf("%s %s: status %d, want %d: %s", r.Method, r.Path, resp.Status, status, resp.Body)
	}
	return resp.Body
}

// verdict is what the independent verifier says with --json.
type verdict struct {
	Verified            bool
	TruncationExcluded  bool
	Events              int64
	Types               map[string]int64
	Checked, NotChecked []string
	Enrolled            []map[string]any
	Error               string
	permitted
}

// permitted is what both verifiers count of enrollments and of keys that their holders made.
type permitted struct{ Enrollments, TermsUnchecked, Proofs, ProofsUnchecked int64 }

// same compares two JSON texts by what they say; none is an empty list.
func same(t *testing.T, a, b []byte) bool {
	t.Helper()
	read := func(text []byte) (all []any) {
		if len(text) > 0 {
			must(t, json.Unmarshal(text, &all))
		}
		return all
	}
	x, y := read(a), read(b)
	return len(x) == 0 && len(y) == 0 || reflect.DeepEqual(x, y)
}

// python exports a stopped server's log, has the independent verifier judge it
// with and without the sink's copy, and with the key as text and as a file.
func python(t *testing.T, s *harness.Server, code int) verdict {
	t.Helper()
	dir := t.TempDir()
	archive, keys := filepath.Join(dir, "export.tar.gz"), filepath.Join(dir, "keys.txt")
	succeeds(t, s, "audit", "export", archive)
	key := succeeds(t, s, "audit", "key")
	must(t, os.WriteFile(keys, []byte(key), 0o600))
	if got := pythonSays(t, code, archive, "--key", keys); !got.Verified || got.TruncationExcluded {
		t.Errorf("without a checkpoint: %+v", got)
	}
	if got := pythonSays(t, 0, archive, "--key", strings.Split(key, "\n")[0], "--checkpoint", s.AuditFile()); !got.TruncationExcluded {
		t.Errorf("with the sink's file: %+v", got)
	}
	note := filepath.Join(dir, "note")
	must(t, os.WriteFile(note, []byte(newestNote(t, s.AuditFile())), 0o600))
	verdict := pythonSays(t, 0, archive, "--key", keys, "--checkpoint", note)
	told, err := json.Marshal(verdict.Enrolled)
	must(t, err)
	var ours struct {
		Enrolled json.RawMessage
		permitted
	}
	must(t, json.Unmarshal([]byte(succeeds(t, s, "audit", "verify-export", archive, "--key", keys, "--checkpoint", note, "--json")), &ours))
	if !same(t, told, ours.Enrolled) {
		t.Errorf("of sealed keys it says\n%s\nand the program\n%s", told, ours.Enrolled)
	}
	if verdict.permitted != ours.permitted {
		t.Errorf("of enrollments it says %+v, and the program %+v", verdict.permitted, ours.permitted)
	}
	if len(verdict.Checked) < 6 || len(verdict.NotChecked) < 2 || verdict.Events == 0 {
		t.Errorf("it says %+v", verdict)
	}
	return verdict
}

// newestNote is the last signed checkpoint that a file sink holds.
func newestNote(t *testing.T, sink string) string {
	t.Helper()
	text, err := os.ReadFile(sink)
	must(t, err)
	for _, line := range slices.Backward(strings.Split(string(text), "\n")) {
		var l struct{ Checkpoint string }
		if json.Unmarshal([]byte(line), &l) == nil && strings.Contains(l.Checkpoint, "\n\n") {
			return l.Checkpoint
		}
	}
	t.Fatal("the sink holds no signed checkpoint")
	return ""
}

func pythonSays(t *testing.T, code int, args ...string) verdict {
	t.Helper()
	cmd := exec.Command("python3", append([]string{filepath.Join(harness.ModuleRoot(t), "contrib", "verify_export.py"), "--json"}, args...)...)
	out, err := cmd.Output()
	if cmd.ProcessState == nil {
		t.Fatalf("python3 is needed: %v", err)
	}
	if got := cmd.ProcessState.ExitCode(); got != code {
		t.Fatalf("the independent verifier ends with %d, want %d: %s %v", got, code, out, err)
	}
	var v verdict
	must(t, json.Unmarshal(out, &v))
	return v
}
