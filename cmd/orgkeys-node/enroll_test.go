package main_test

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/tpm/tpmtest"
)

// minted is an enrollment as its administrator gets it.
type minted struct{ ID, Token string }

func mint(t *testing.T, s *harness.Server, org, terms string) minted {
	t.Helper()
	resp := s.Do(t, harness.Request{Method: "POST", Path: "/organization/" + org + "/enrollment", Token: s.Token(t, org, "OWNER"), Body: []byte(terms)})
	resp.Want(t, http.StatusCreated, "Enrollment created. The token is shown only once.")
	var answer struct{ Data minted }
	if err := json.Unmarshal(resp.Body, &answer); err != nil {
		t.Fatal(err)
	}
	return answer.Data
}

var inJSON = http.Header{"Content-Type": {"application/json"}}

// enrollments is the list that an administrator sees, or one entry of it.
func enrollments(t *testing.T, s *harness.Server, org, id string) string {
	t.Helper()
	return string(s.Do(t, harness.Request{Method: "GET", Path: "/organization/" + org + "/enrollment/" + id, Token: s.Token(t, org, "OWNER")}).Body)
}

// enrolling is a node that has a token and no key.
type enrolling struct {
	*machine
	token string // the token's file
}

func newEnrolling(t *testing.T, server, token string) *enrolling {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "node")
	e := &enrolling{&machine{t: t, key: filepath.Join(dir, "key.pem"), dir: dir, server: server}, filepath.Join(t.TempDir(), "token")}
	e.put(token)
	return e
}

func (e *enrolling) put(token string) {
	e.t.Helper()
	if err := os.WriteFile(e.token, []byte(token+"\n"), 0o600); err != nil {
		e.t.Fatal(err)
	}
}

// command has neither organization nor key file: both come with the token.
func (e *enrolling) command(command string, more ...string) *exec.Cmd {
	args := append([]string{command, "--server", e.server, "--ip", "192.0.2.7", "--region", "eu", "--dir", e.dir, "--token-file", e.token}, more...)
	cmd := exec.Command(binary, args...)
	cmd.Env = []string{"PATH=/nonexistent"}
	return cmd
}

func (e *enrolling) run(want int, text, command string, more ...string) string {
	e.t.Helper()
	out, err := e.command(command, more...).CombinedOutput()
	if code := exitCode(err); code != want || !strings.Contains(string(out), text) {
		e.t.Errorf("%s %q: exit code %d, printed %s; want %d and %q", command, more, code, out, want, text)
	}
	return string(out)
}

func (e *enrolling) fingerprint() string {
	e.t.Helper()
	text, err := os.ReadFile(e.key)
	if err != nil {
		e.t.Fatal(err)
	}
	return client.Fingerprint(&harness.ParsePrivate(e.t, text).PublicKey)
}

// has checks which files are there, beside those of secrets.
func (e *enrolling) has(names ...string) {
	e.t.Helper()
	for _, name := range []string{"key.pem", "key.pem.recipient", "key.pem.enrollment", "token"} {
		path := filepath.Join(e.dir, name)
		if name == "token" {
			path = e.token
		}
		want := false
		for _, n := range names {
			want = want || n == name
		}
		info, err := os.Lstat(path)
		if there := err == nil; there != want || there && info.Mode() != 0o600 {
			e.t.Errorf("%s: there %t, want %t (%v)", name, there, want, info)
		}
	}
}

// A node boots for the first time with nothing but a token, and at any later
// time without it.
func TestFirstBootWithAToken(t *testing.T) {
	s := harness.Start(t)
	org := harness.Org()
	s.PutSecret(t, org, "env_s3", []byte("A=1"))
	m := mint(t, s, org, `{"note":"rack 12"}`)
	e := newEnrolling(t, s.API, m.Token)
	e.run(78, "there is no key yet, but a token of enrollment "+m.ID, "status")
	e.run(0, "1 secrets written, 0 unchanged, registered 192.0.2.7", "boot")
	e.has("key.pem", "key.pem.enrollment")
	if text, err := os.ReadFile(filepath.Join(e.dir, "env_s3")); err != nil || string(text) != "A=1" {
		t.Errorf("env_s3 holds %q, %v", text, err)
	}
	shown := enrollments(t, s, org, m.ID)
	if !strings.Contains(shown, `"state":"received"`) || !strings.Contains(shown, e.fingerprint()) {
		t.Errorf("the administrator sees %s", shown)
	}
	e.run(0, "0 secrets written, 1 unchanged, registered 192.0.2.7", "boot")
	e.run(0, "(enrolled), 1 secrets in ", "status")
	e.run(0, "was enrolled before", "enroll")
	var outcome struct{ KeyID, Enrollment, State, KeyFingerprint string }
	if out := e.run(0, "", "status", "--json"); json.Unmarshal([]byte(out), &outcome) != nil || outcome.Enrollment != m.ID || outcome.State != "enrolled" ||
		outcome.KeyFingerprint != e.fingerprint() || !strings.Contains(shown, outcome.KeyID) {
		t.Errorf("status says %+v", outcome)
	}
	keys, err := s.Client(t, org, "OWNER").NodeKeys(t.Context(), org)
	if err != nil || len(keys) != 1 || keys[0].ID != outcome.KeyID || keys[0].Scope != "node" || keys[0].Enrollment != m.ID ||
		keys[0].DeliveredTo != "127.0.0.1" || keys[0].DeliveredAt.IsZero() {
		t.Errorf("node keys %+v, %v", keys, err)
	}
	// The token's setting may go, too: the node knows that it is enrolled.
	cmd := exec.Command(binary, "boot", "--server", s.API, "--ip", "192.0.2.7", "--region", "eu", "--dir", e.dir)
	cmd.Env = []string{"PATH=/nonexistent"}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("without --token-file: %v %s", err, out)
	}
	e.run(64, "the key was enrolled for "+org, "boot", "--org", "globex")
	e.run(0, "unregistered", "unregister")
	s.Do(t, harness.Request{Method: "DELETE", Path: harness.KeyPath(org) + "/" + outcome.KeyID, Token: s.Token(t, org, "OWNER")}).
		Want(t, 200, "Organization key deleted successfully")
	e.run(77, "does not accept this key", "boot", "--wait", "forever")

	// A new token beside the key that is over brings another one.
	before := e.fingerprint()
	next := mint(t, s, org, `{}`)
	e.put(next.Token)
	e.run(0, "(enrolled, and a token for another key)", "status")
	e.run(0, "registered 192.0.2.7", "boot")
	e.has("key.pem", "key.pem.enrollment")
	if e.fingerprint() == before || !strings.Contains(enrollments(t, s, org, next.ID), e.fingerprint()) {
		t.Error("the new token brought no new key")
	}
}

// A run that was cut off between record and key of another enrollment leaves the key
// that was there as good as it was, whatever became of that enrollment.
func TestTheKeyBeforeIsGoodUntilTheNextOneIsThere(t *testing.T) {
	s := harness.Start(t)
	org := harness.Org()
	target, err := url.Parse(s.API)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(target)
	var named sync.Map // the keys that requests name
	between := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		var fields struct {
			Key string `json:"key_id"`
		}
		if json.Unmarshal(body, &fields) == nil {
			named.Store(r.URL.Path, fields.Key)
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		proxy.ServeHTTP(w, r)
	}))
	defer between.Close()
	e := newEnrolling(t, between.URL, mint(t, s, org, `{}`).Token)
	e.run(0, "registered", "boot")
	var first struct{ KeyID string }
	key, record := read(t, e.key), e.key+".enrollment"
	if err := json.Unmarshal([]byte(read(t, record)), &first); err != nil || first.KeyID == "" {
		t.Fatalf("%v %+v", err, first)
	}
	next := mint(t, s, org, `{}`)
	e.put(next.Token)
	e.run(0, "enrolled key", "enroll")
	// As if the run had ended before it stored the key; and the token is taken away.
	cut := strings.Replace(read(t, record), `"received":true`, `"received":false`, 1)
	if err := errors.Join(os.WriteFile(e.key, []byte(key), 0o600), os.WriteFile(record, []byte(cut), 0o600)); err != nil || !strings.Contains(cut, `"received":false`) {
		t.Fatalf("%v %s", err, cut)
	}
	for range 2 {
		for _, command := range []string{"boot", "secrets", "register"} {
			named.Clear()
			e.run(0, "", command, "--wait", "30s")
			for _, path := range []string{"/secrets", "/register"} {
				if id, asked := named.Load(path); asked && id != first.KeyID {
					t.Errorf("%s: %s names the key %v, want %s", command, path, id, first.KeyID)
				}
			}
		}
		e.run(0, first.KeyID, "enroll")
		e.run(0, "(enrolled), ", "status")
	}
	e.run(64, "was enrolled for "+org, "boot", "--org", "globex")
	// A third token brings a third key.
	e.put(mint(t, s, org, `{}`).Token)
	e.run(0, "enrolled key", "enroll")
	e.has("key.pem", "key.pem.enrollment")
	if now := read(t, e.key); now == key {
		t.Error("the new token brought no new key")
	}
}

// A link to the token is not the token.
func TestATokenThatIsALinkIsSaidToStay(t *testing.T) {
	s := harness.Start(t)
	e := newEnrolling(t, s.API, mint(t, s, harness.Org(), `{"uses":3}`).Token)
	real := e.token
	e.token += ".link"
	if err := os.Symlink(real, e.token); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		e.run(0, e.token+" is a link, and what it leads to is not removed", "enroll")
	}
	if _, err := os.Stat(real); err != nil {
		t.Error(err)
	}
}

// Secrets have the names that people give them, and none becomes the node's token or
// key, or has one removed: the node boots at any later time too.
func TestNoSecretTakesThePlaceOfANodesOwnFile(t *testing.T) {
	s := harness.Start(t)
	org := harness.Org()
	s.PutSecret(t, org, "env_s3", []byte("A=1"))
	s.PutSecret(t, org, "token", []byte("of another service"))
	first := mint(t, s, org, `{}`).Token
	e := newEnrolling(t, s.API, first)
	if err := os.Mkdir(e.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	e.token = filepath.Join(e.dir, "token")
	e.put(first)
	e.run(0, "1 secrets written, 0 unchanged, token not written", "boot", "--wait", "30s")
	e.has("key.pem", "key.pem.enrollment")
	e.run(0, "0 secrets written, 1 unchanged, token not written", "boot", "--wait", "30s")
	e.run(0, "(enrolled), 1 secrets in ", "status")
	e.put(mint(t, s, org, `{}`).Token)
	e.run(0, "token not written", "secrets") // leaves the token where it is
	e.run(0, "enrolled key", "enroll")
}

// A node of an older version wrote such secrets, and may remember them as its own.
func TestTheNodesOwnFilesAreNoSecretsOfEarlierRuns(t *testing.T) {
	for name, place := range map[string]func(t *testing.T, m *machine) (keyFile string){
		"in the directory": func(t *testing.T, m *machine) string {
			if err := os.Rename(m.key, filepath.Join(m.dir, "key")); err != nil {
				t.Fatal(err)
			}
			return filepath.Join(m.dir, "key")
		},
		"by a link": func(t *testing.T, m *machine) string {
			if err := errors.Join(os.Rename(m.key, filepath.Join(m.dir, "key")), os.Symlink(filepath.Join(m.dir, "key"), m.key)); err != nil {
				t.Fatal(err)
			}
			return m.key
		},
	} {
		t.Run(name, func(t *testing.T) {
			var answer atomic.Value
			m := newMachine(t, stub(t, func(w http.ResponseWriter, r *http.Request) { serving(answer.Load().([]byte))(w, r) }))
			key := read(t, m.key)
			if err := errors.Join(os.Mkdir(m.dir, 0o700), os.WriteFile(filepath.Join(m.dir, ".orgkeys-node.json"), []byte(`{"secrets":["env_s3","key"]}`), 0o600)); err != nil {
				t.Fatal(err)
			}
			m.key = place(t, m)
			answer.Store(sealed(t, map[string]string{"env_s3": "A=1"}))
			m.want(0, "1 secrets written, 0 unchanged, registered", "boot")
			m.holds(map[string]string{"env_s3": "A=1", "key": key})
			answer.Store(sealed(t, map[string]string{"env_s3": "A=1", "key": "another's"}))
			m.want(0, "0 secrets written, 1 unchanged, key not written", "boot")
			m.holds(map[string]string{"env_s3": "A=1", "key": key})
		})
	}
}

// What is in the way of an enrollment and passes is waited for.
func TestEnrollmentWaitsForWhatPasses(t *testing.T) {
	s := harness.Start(t)
	org := harness.Org()
	m := mint(t, s, org, `{"approval":true}`)
	e := newEnrolling(t, s.API, m.Token)
	if err := os.Rename(e.token, e.token+".away"); err != nil {
		t.Fatal(err)
	}
	e.run(78, "put the token there, mode 0600", "boot", "--wait", "0s")
	e.has()
	if err := os.Rename(e.token+".away", e.token); err != nil {
		t.Fatal(err)
	}
	for mode, text := range map[os.FileMode]string{0o644: "may be read or written by others", 0o640: "chmod 600"} {
		if err := os.Chmod(e.token, mode); err != nil {
			t.Fatal(err)
		}
		e.run(78, text, "boot", "--wait", "0s")
	}
	e.put("oke1.half")
	os.Chmod(e.token, 0o600)
	e.run(78, "copy the token again", "boot", "--wait", "0s")
	e.put(m.Token)
	server := e.server
	e.server = "http://127.0.0.1:1"
	e.run(69, "cannot be reached", "boot", "--wait", "0s")
	e.server = server
	for _, c := range passing {
		e.server = stub(t, c.h)
		e.run(c.code, "", "boot", "--wait", "0s")
	}
	e.server = server
	e.has("key.pem.recipient", "token")

	out := e.run(75, "approves recipient ", "boot", "--wait", "0s")
	recipient := regexp.MustCompile(`recipient ([0-9a-f]{64})`).FindStringSubmatch(out)
	if recipient == nil {
		t.Fatalf("it does not say which recipient: %s", out)
	}
	e.run(78, "enrollment "+m.ID+" was begun", "status")
	cmd := e.command("boot", "--wait", "2m")
	var waited bytes.Buffer
	cmd.Stdout, cmd.Stderr = &waited, &waited
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s.Do(t, harness.Request{Method: "POST", Path: "/organization/" + org + "/enrollment/" + m.ID + "/approve", Token: s.Token(t, org, "OWNER"),
		Header: inJSON, Body: fmt.Appendf(nil, `{"recipient":%q}`, recipient[1])}).Want(t, 200, "Claim approved")
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v %s", err, waited.String())
	}
	e.has("key.pem", "key.pem.enrollment")
}

// What the server refuses ends a run, with what to do about it.
func TestEnrollmentRefusals(t *testing.T) {
	s := harness.Start(t)
	org := harness.Org()
	t.Run("unknown", func(t *testing.T) {
		m := mint(t, s, org, `{}`)
		e := newEnrolling(t, s.API, m.Token[:len(m.Token)-3]+"AAA")
		e.run(77, "does not accept the token", "boot", "--wait", "forever")
		e.has("key.pem.recipient", "token")
	})
	t.Run("revoked", func(t *testing.T) {
		m := mint(t, s, org, `{}`)
		s.Do(t, harness.Request{Method: "DELETE", Path: "/organization/" + org + "/enrollment/" + m.ID, Token: s.Token(t, org, "OWNER")})
		newEnrolling(t, s.API, m.Token).run(77, "is over", "boot", "--wait", "forever")
	})
	t.Run("a stolen token", func(t *testing.T) {
		m := mint(t, s, org, `{}`)
		newEnrolling(t, s.API, m.Token).run(0, "registered", "boot")
		e := newEnrolling(t, s.API, m.Token)
		e.run(77, "the token was stolen or a disk was cloned", "boot", "--wait", "forever")
		e.has("key.pem.recipient", "token")
		if shown := enrollments(t, s, org, m.ID); !strings.Contains(shown, `"conflicts":1`) {
			t.Errorf("the administrator sees %s", shown)
		}
	})
	t.Run("withdrawn before the receipt", func(t *testing.T) {
		m := mint(t, s, org, `{}`)
		target, err := url.Parse(s.API)
		if err != nil {
			t.Fatal(err)
		}
		proxy := httputil.NewSingleHostReverseProxy(target)
		between := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, "/receipt") {
				refusing(503, "unavailable")(w, r)
				return
			}
			proxy.ServeHTTP(w, r)
		}))
		t.Cleanup(between.Close)
		e := newEnrolling(t, between.URL, m.Token)
		e.run(69, "answers 503", "boot", "--wait", "0s")
		e.has("key.pem", "key.pem.recipient", "key.pem.enrollment", "token")
		e.server = s.API
		e.run(0, "(enrolled, receipt not sent yet)", "status")
		s.Do(t, harness.Request{Method: "DELETE", Path: "/organization/" + org + "/enrollment/" + m.ID, Token: s.Token(t, org, "OWNER")})
		e.run(77, "was withdrawn before its receipt arrived", "boot", "--wait", "forever")
		e.put(mint(t, s, org, `{}`).Token)
		e.run(0, "registered", "boot", "--ip", "192.0.2.77")
	})
	for code, text := range map[string]string{
		"sealed_unavailable":     "the server's HSM cannot seal keys",
		"recipient_unacceptable": "does not accept the recipient in",
		"a_code_of_the_future":   "refuses (400)",
	} {
		t.Run(code, func(t *testing.T) {
			e := newEnrolling(t, stub(t, refusing(400, code)), mint(t, s, org, `{}`).Token)
			e.run(77, text, "enroll", "--wait", "forever")
			e.has("key.pem.recipient", "token")
		})
	}
	t.Run("the server's own mistake", func(t *testing.T) {
		e := newEnrolling(t, stub(t, refusing(500, "internal")), mint(t, s, org, `{}`).Token)
		e.run(69, "answers 500", "enroll", "--wait", "0s")
	})
	t.Run("another organization", func(t *testing.T) {
		e := newEnrolling(t, s.API, mint(t, s, org, `{}`).Token)
		e.run(64, "--org is globex, and the token is one of "+org, "boot", "--org", "globex")
		e.has("key.pem.recipient", "token")
		e.run(0, "registered", "boot", "--org", org, "--ip", "192.0.2.78")
	})
	t.Run("without a token", func(t *testing.T) {
		cmd := exec.Command(binary, "enroll", "--server", s.API, "--dir", t.TempDir())
		cmd.Env = []string{"PATH=/nonexistent"}
		if out, err := cmd.CombinedOutput(); exitCode(err) != 64 || !strings.Contains(string(out), "enroll needs --token-file") {
			t.Errorf("%v %s", err, out)
		}
	})
}

// A key that was put there by hand is nobody's to overwrite.
func TestAKeyThatWasNotEnrolledIsKept(t *testing.T) {
	s := harness.Start(t)
	org := harness.Org()
	e := newEnrolling(t, s.API, mint(t, s, org, `{}`).Token)
	given := s.Generate(t, org)
	if err := errors.Join(os.Mkdir(e.dir, 0o700), os.WriteFile(e.key, given.PEM, 0o600)); err != nil {
		t.Fatal(err)
	}
	e.run(78, "would be overwritten; move it away", "boot", "--wait", "0s")
	if text, err := os.ReadFile(e.key); err != nil || !bytes.Equal(text, given.PEM) {
		t.Errorf("the key that was there: %v", err)
	}
	e.has("key.pem", "token")
	e.run(0, "(not enrolled)", "status")
	// Without the token it is used as ever.
	if err := os.Rename(e.token, e.token+".away"); err != nil {
		t.Fatal(err)
	}
	e.run(0, "registered", "boot", "--org", org)
	if err := errors.Join(os.Rename(e.token+".away", e.token), os.Rename(e.key, e.key+".away")); err != nil {
		t.Fatal(err)
	}
	e.run(0, "registered", "boot", "--ip", "192.0.2.8")
	// Nor is one that was put in the place of an enrolled one.
	if err := os.WriteFile(e.key, given.PEM, 0o600); err != nil {
		t.Fatal(err)
	}
	e.run(0, "registered", "boot", "--org", org)
	e.put(mint(t, s, org, `{}`).Token)
	e.run(78, "would be overwritten", "enroll", "--wait", "0s")
}

// Two runs at once make one recipient between them.
func TestTwoEnrollmentsAtOnce(t *testing.T) {
	s := harness.Start(t)
	org := harness.Org()
	m := mint(t, s, org, `{}`)
	e := newEnrolling(t, s.API, m.Token)
	ended := make(chan struct{})
	for range 4 {
		go func() {
			e.run(0, "registered", "boot")
			ended <- struct{}{}
		}()
	}
	for range 4 {
		<-ended
	}
	e.has("key.pem", "key.pem.enrollment")
	if shown := enrollments(t, s, org, m.ID); !strings.Contains(shown, `"conflicts":0`) || !strings.Contains(shown, `"state":"received"`) {
		t.Errorf("the administrator sees %s", shown)
	}
}

// A token may be a credential that systemd hands over, which cannot be removed.
func TestTokenAsACredential(t *testing.T) {
	s := harness.Start(t)
	org := harness.Org()
	dir := filepath.Join(t.TempDir(), "credentials")
	file := filepath.Join(dir, "orgkeys-node.token")
	if err := errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(file, []byte(mint(t, s, org, `{}`).Token), 0o400)); err != nil {
		t.Fatal(err)
	}
	readOnly(t, dir)
	e := newEnrolling(t, s.API, "")
	boot := func(want int, text string) {
		t.Helper()
		cmd := exec.Command(binary, "boot", "--server", s.API, "--ip", "192.0.2.7", "--region", "eu", "--dir", e.dir)
		cmd.Env = []string{"PATH=/nonexistent", "CREDENTIALS_DIRECTORY=" + dir}
		if out, err := cmd.CombinedOutput(); exitCode(err) != want || !strings.Contains(string(out), text) {
			t.Errorf("%v %s; want %q", err, out, text)
		}
	}
	boot(0, "cannot be removed here; remove its source")
	fingerprint := e.fingerprint()
	boot(0, "registered") // with the token still there
	if e.fingerprint() != fingerprint {
		t.Error("the second boot has another key")
	}
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
	// A file that cannot be removed is said, too.
	other := newEnrolling(t, s.API, "")
	other.token = filepath.Join(dir, "elsewhere")
	writable(t, dir)
	other.put(mint(t, s, org, `{}`).Token)
	readOnly(t, dir)
	other.run(0, "cannot be removed", "boot", "--ip", "192.0.2.9")
}

// readOnly has the directory be one that nobody can remove files from, root included.
func readOnly(t *testing.T, dir string) {
	t.Helper()
	if out, err := privileged("mount", "--bind", dir, dir).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	t.Cleanup(func() { writable(t, dir) })
	if out, err := privileged("mount", "-o", "remount,bind,ro", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
}

func writable(t *testing.T, dir string) {
	t.Helper()
	_ = privileged("umount", dir).Run() // once is enough
}

func privileged(name string, args ...string) *exec.Cmd {
	if os.Geteuid() == 0 {
		return exec.Command(name, args...)
	}
	return exec.Command("sudo", append([]string{"-n", name}, args...)...)
}

// An administrator's sealed key is opened by unseal, and by openssl as
// docs/enrollment.md says.
func TestUnseal(t *testing.T) {
	s := harness.Start(t)
	org, dir := harness.Org(), t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	run := func(want int, text string, args ...string) string {
		t.Helper()
		cmd := exec.Command(binary, args...)
		cmd.Env, cmd.Dir = []string{"PATH=/nonexistent"}, dir
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if code := exitCode(cmd.Run()); code != want || !strings.Contains(stdout.String()+stderr.String(), text) {
			t.Errorf("%q: exit code %d, printed %s%s; want %d and %q", args, code, &stdout, &stderr, want, text)
		}
		return stdout.String()
	}
	public := run(0, "recipient ", "recipient", "--recipient-file", "recipient.pem")
	if block, _ := pem.Decode([]byte(public)); block == nil || block.Type != "PUBLIC KEY" {
		t.Fatalf("the public half is %q", public)
	}
	if again := run(0, "", "recipient", "--recipient-file", "recipient.pem"); again != public {
		t.Error("the second run shows another recipient")
	}
	body, err := json.Marshal(map[string]string{"recipient": public})
	if err != nil {
		t.Fatal(err)
	}
	owner := s.Token(t, org, "OWNER")
	// Another answer than the rest of this path's: harness.Server.Do compares with those.
	resp, err := s.Try(t.Context(), harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: owner, Header: http.Header{"Accept": {"application/vnd.orgkeys.sealed+json"}}, Body: body})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(in("sealed.json"), resp.Body, 0o600); err != nil || resp.Status != 200 {
		t.Fatalf("%v %d %s", err, resp.Status, resp.Body)
	}
	run(64, "unseal needs --sealed-file and --key-file", "unseal")
	run(64, "unseal needs", "unseal", "--sealed-file", "sealed.json")
	unseal := []string{"unseal", "--sealed-file", "sealed.json", "--recipient-file", "recipient.pem", "--key-file"}
	run(0, "is in key.pem", append(unseal, "key.pem", "--receipt-file", "receipt.json")...)
	run(0, "is in key.pem", append(unseal, "key.pem")...)
	text, err := os.ReadFile(in("key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	key := harness.ParsePrivate(t, text)
	var answer struct{ KeyID, Fingerprint string }
	if err := json.Unmarshal(resp.Body, &answer); err != nil || answer.Fingerprint != client.Fingerprint(&key.PublicKey) {
		t.Errorf("%v: the answer says %+v", err, answer)
	}

	script := regexp.MustCompile("(?s)<!-- openssl -->\n(?:<!-- [^\n]*\n)?```sh\n(.*?)```").FindStringSubmatch(read(t, "../../docs/enrollment.md"))
	if script == nil {
		t.Fatal("docs/enrollment.md has no openssl lines")
	}
	cmd := exec.Command("bash", "-euo", "pipefail", "-c", script[1])
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("openssl: %v %s", err, out)
	}
	if opened, err := os.ReadFile(in("opened.pem")); err != nil || !bytes.Equal(opened, text) {
		t.Errorf("openssl opened %d bytes, unseal %d: %v", len(opened), len(text), err)
	}

	receipt, err := os.ReadFile(in("receipt.json"))
	if err != nil {
		t.Fatal(err)
	}
	s.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(org) + "/" + answer.KeyID + "/receipt", Token: owner, Header: inJSON, Body: receipt}).Want(t, 200, "Receipt recorded")
	s.Do(t, harness.Request{Method: "GET", Path: harness.KeyPath(org) + "/" + answer.KeyID + "/sealed", Token: owner}).Want(t, 410, "This key is not handed out any more: it was received, withdrawn or deleted. If you do not have it, create another one.")

	// Neither another key is overwritten, nor anything written that does not open.
	if err := os.WriteFile(in("other.pem"), s.Generate(t, org).PEM, 0o600); err != nil {
		t.Fatal(err)
	}
	run(64, "is there already, and is another key", append(unseal, "other.pem")...)
	run(0, "", "recipient", "--recipient-file", "second.pem")
	run(78, "is sealed to another recipient", "unseal", "--sealed-file", "sealed.json", "--recipient-file", "second.pem", "--key-file", "new.pem")
	for name, changed := range map[string][]byte{
		"changed":          bytes.Replace(resp.Body, []byte(`"value":"`), []byte(`"value":"AAAA`), 1),
		"of an enrollment": bytes.Replace(resp.Body, []byte(`{`), []byte(`{"id":"x",`), 1),
		"something else":   []byte("{}"),
		"empty":            nil,
	} {
		if err := os.WriteFile(in("sealed.json"), changed, 0o600); err != nil {
			t.Fatal(err)
		}
		run(78, "--sealed-file", append(unseal, "new.pem")...)
		if _, err := os.Stat(in("new.pem")); !os.IsNotExist(err) {
			t.Errorf("%s: something was written", name)
		}
	}
	for code, want := range map[string]string{
		"pending":                `holds no key, but the answer "pending"; the key was not ready yet: send the same request again`,
		"recipient_unacceptable": `holds no key, but the answer "recipient_unacceptable"; it is the server's refusal`,
	} {
		said := `{"success":false,"message":"The key is not ready yet. Please ask again.","errorCode":"` + code + `","requestId":"r"}`
		if err := os.WriteFile(in("sealed.json"), []byte(said), 0o600); err != nil {
			t.Fatal(err)
		}
		run(78, want, append(unseal, "new.pem")...)
	}
	run(78, "save the server's answer there", "unseal", "--sealed-file", "nowhere", "--recipient-file", "recipient.pem", "--key-file", "new.pem")
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// A token may be bound to the recipient that a node made before.
func TestATokenBoundToARecipient(t *testing.T) {
	s := harness.Start(t)
	org := harness.Org()
	e := newEnrolling(t, s.API, "")
	out := e.run(0, "recipient ", "recipient")
	named := regexp.MustCompile(`recipient ([0-9a-f]{64})`).FindStringSubmatch(out)
	if named == nil {
		t.Fatal(out)
	}
	m := mint(t, s, org, `{"bind":{"recipient":"`+named[1]+`"}}`)
	thief := newEnrolling(t, s.API, m.Token)
	thief.run(77, "another recipient", "boot", "--wait", "0s")
	e.put(m.Token)
	e.run(0, "registered", "boot")
}

// A recipient may be there before its token is, or while a token for another key waits for
// its approval: boots of the timer in between leave it, and take away no other.
func TestABootLeavesTheRecipientOfAnotherEnrollment(t *testing.T) {
	s := harness.Start(t)
	device := tpmtest.Start(t)
	for name, more := range map[string][]string{"in a file": nil, "in the TPM": {"--tpm", device.Socket}, "its own key": {"--origin", "node"}} {
		t.Run(name, func(t *testing.T) {
			org := harness.Org()
			terms := `{"scope":"organization",` // else an address belongs to the key that it was registered with first
			if len(more) > 0 && more[0] == "--origin" {
				terms += `"origin":"node",`
			}
			if len(more) > 0 && more[0] == "--tpm" {
				allow(t, s, org, ekOf(t, device))
			}
			flags := func(f ...string) []string { return append(f, more...) }
			e := newEnrolling(t, s.API, mint(t, s, org, terms+`"note":"first"}`).Token)
			e.run(0, "registered", "boot", flags()...)
			e.has("key.pem", "key.pem.enrollment")
			named := func(out string) string {
				m := regexp.MustCompile(`recipient ([0-9a-f]{64})`).FindStringSubmatch(out)
				if m == nil {
					t.Fatalf("it does not say which recipient: %s", out)
				}
				return m[1]
			}

			bound := named(e.run(0, "recipient ", "recipient", flags()...))
			e.run(0, "registered", "boot", flags()...)
			e.has("key.pem", "key.pem.enrollment", "key.pem.recipient")
			e.put(mint(t, s, org, terms+`"bind":{"recipient":"`+bound+`"}}`).Token)
			e.run(0, "enrolled key", "boot", flags()...)
			e.has("key.pem", "key.pem.enrollment")

			waiting := mint(t, s, org, terms+`"approval":true}`)
			e.put(waiting.Token)
			claimed := named(e.run(75, "approves recipient ", "boot", flags("--wait", "0s")...))
			if err := os.Rename(e.token, e.token+".away"); err != nil {
				t.Fatal(err)
			}
			e.run(0, "registered", "boot", flags()...)
			e.has("key.pem", "key.pem.enrollment", "key.pem.recipient")
			s.Do(t, harness.Request{Method: "POST", Path: "/organization/" + org + "/enrollment/" + waiting.ID + "/approve", Token: s.Token(t, org, "OWNER"),
				Header: inJSON, Body: fmt.Appendf(nil, `{"recipient":%q}`, claimed)}).Want(t, 200, "Claim approved")
			if err := os.Rename(e.token+".away", e.token); err != nil {
				t.Fatal(err)
			}
			mine := read(t, e.key+".recipient")
			e.run(0, "enrolled key", "boot", flags()...)
			e.has("key.pem", "key.pem.enrollment")

			// The key's own goes, if the run that took the receipt was killed before it removed it.
			if err := os.WriteFile(e.key+".recipient", []byte(mine), 0o600); err != nil {
				t.Fatal(err)
			}
			e.run(0, "registered", "boot", flags()...)
			e.has("key.pem", "key.pem.enrollment")
		})
	}
}

// A token that is of no use says so, and keeps no node from working with the key that it has.
func TestARefusedTokenBesideAGoodKey(t *testing.T) {
	s := harness.Start(t)
	org := harness.Org()
	owner := s.Client(t, org, "OWNER")
	s.PutSecret(t, org, "env_s3", []byte("A=1"))
	e := newEnrolling(t, s.API, mint(t, s, org, `{}`).Token)
	e.run(0, "registered", "boot")
	key := e.fingerprint()
	revoked, stolen, cut := mint(t, s, org, `{}`), mint(t, s, org, `{}`), mint(t, s, org, `{}`)
	if err := owner.RevokeEnrollment(t.Context(), org, revoked.ID); err != nil {
		t.Fatal(err)
	}
	newEnrolling(t, s.API, stolen.Token).run(0, "enrolled key", "enroll")
	for i, c := range []struct{ token, text string }{
		{revoked.Token, "enrollment " + revoked.ID + " is over"},
		{stolen.Token, "the token was stolen or a disk was cloned"},
		{cut.Token[:len(cut.Token)-3] + "AAA", "does not accept the token"},
	} {
		s.PutSecret(t, org, "env_s3", fmt.Appendf(nil, "A=%d", i+2))
		e.put(c.token)
		out := e.run(65, "1 secrets written, 0 unchanged, registered 192.0.2.7, with the key that was there: ", "boot", "--wait", "forever")
		if strings.Count(out, c.text) != 2 { // when it is refused, and in the end
			t.Errorf("it does not say %q, but %s", c.text, out)
		}
		e.has("key.pem", "key.pem.enrollment", "key.pem.recipient", "token")
		if text := read(t, filepath.Join(e.dir, "env_s3")); text != fmt.Sprintf("A=%d", i+2) || e.fingerprint() != key {
			t.Errorf("%s: the secret is %q, and the key %s", c.text, text, e.fingerprint())
		}
		var outcome struct {
			OK                    bool
			ExitCode              int
			State, KeyFingerprint string
		}
		cmd := e.command("boot", "--json")
		if said, err := cmd.Output(); exitCode(err) != 65 || json.Unmarshal(said, &outcome) != nil || outcome.OK || outcome.ExitCode != 65 ||
			outcome.State != "enrolled, and a token for another key" || outcome.KeyFingerprint != key {
			t.Errorf("as JSON: %v %s", err, said)
		}
		e.run(77, c.text, "enroll", "--wait", "forever")
	}
	// What else is in the way is what the run ends with.
	keys, err := owner.NodeKeys(t.Context(), org)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range keys {
		if k.Fingerprint == key {
			err = owner.DeleteKey(t.Context(), org, k.ID)
		}
	}
	if out := e.run(77, "does not accept this key", "boot", "--wait", "forever"); err != nil || !strings.Contains(out, "does not accept the token") {
		t.Errorf("beside a key that was deleted (%v) it says %s", err, out)
	}
}

// No misspelt word, at any depth, is taken for success.
func TestMisspeltWordsFail(t *testing.T) {
	for _, c := range []struct {
		args string
		text string
	}{
		{"", "Usage:"},
		{"bot", "did you mean boot?"},
		{"bot --help", "did you mean boot?"},
		{"statsu --json", "did you mean status?"},
		{"--sever x", "there is no command"},
		{"-x", "there is no command"},
		{"help bot", "did you mean boot?"},
		{"help boot now", "one argument too many"},
		{"--help boot now", "one argument too many"},
		{"version now", "one argument too many"},
		{"--version now", "one argument too many"},
		{"completion", "needs a shell"},
		{"completion bsh", "did you mean bash?"},
		{"completion tcsh", "bash, zsh and fish have one"},
		{"completion bash now", "one argument too many"},
		{"completion --shell bash", "one argument too many"},
		{"help completion bash", "one argument too many"},
	} {
		out, err := exec.Command(binary, strings.Fields(c.args)...).CombinedOutput()
		if exitCode(err) != 64 || !strings.Contains(string(out), c.text) {
			t.Errorf("%q: %v, printed %s", c.args, err, out)
		}
	}
	for _, command := range commandNames(t) {
		for _, flags := range []string{"--sever x", "--tokenfile x", "-wiat 1s", "now", "help", "--json=maybe"} {
			out, err := exec.Command(binary, append([]string{command}, strings.Fields(flags)...)...).CombinedOutput()
			if exitCode(err) != 64 || len(out) == 0 {
				t.Errorf("%s %s: %v, printed %s", command, flags, err, out)
			}
		}
		out, err := exec.Command(binary, command, "--help").CombinedOutput()
		if err != nil || !strings.HasPrefix(string(out), "orgkeys-node "+command+": ") || !strings.Contains(string(out), "Exit codes:") {
			t.Errorf("%s --help: %v, printed %s", command, err, out)
		}
		if again, err := exec.Command(binary, "help", command).Output(); err != nil || !bytes.Equal(again, out) {
			t.Errorf("help %s is not %s --help: %v", command, command, err)
		}
	}
}

// commandNames are the commands that --help lists and that do something.
func commandNames(t *testing.T) (names []string) {
	t.Helper()
	out, err := exec.Command(binary, "--help").Output()
	if err != nil {
		t.Fatal(err)
	}
	_, list, _ := strings.Cut(string(out), "Commands:\n")
	list, _, _ = strings.Cut(list, "\n\n")
	for _, m := range regexp.MustCompile(`(?m)^  ([a-z]+) `).FindAllStringSubmatch(list, -1) {
		if m[1] != "completion" && m[1] != "version" {
			names = append(names, m[1])
		}
	}
	if len(names) < 9 {
		t.Fatalf("--help lists %q", names)
	}
	return names
}

// A flag of a command's help exists, and each flag is in the help of some command.
func TestEveryFlagIsInTheHelpOfACommand(t *testing.T) {
	flags := func(args ...string) map[string]bool {
		out, err := exec.Command(binary, args...).Output()
		if err != nil {
			t.Fatal(err)
		}
		all := map[string]bool{}
		for _, m := range regexp.MustCompile(`(?m)^  -([a-z-]+)`).FindAllStringSubmatch(string(out), -1) {
			all[m[1]] = true
		}
		return all
	}
	all, used := flags("--help"), map[string]bool{}
	for _, command := range commandNames(t) {
		for name := range flags(command, "--help") {
			used[name] = true
		}
	}
	if len(all) < 15 || len(used) != len(all) {
		t.Errorf("there are the flags %v, and commands use %v", all, used)
	}
}

// Completion is tried in the shell that the tests have.
func TestCompletionInBash(t *testing.T) {
	complete := func(words string) []string {
		cmd := exec.Command("bash", "-euc", `eval "$("$1" completion bash)"
			COMP_WORDS=($2) COMP_CWORD=$(($(wc -w <<<"$2") - 1))
			[[ $2 != *' ' ]] || { COMP_WORDS+=(''); COMP_CWORD=$((COMP_CWORD + 1)); }
			_orgkeys_node
			printf '%s\n' "${COMPREPLY[@]}"`, "bash", binary, words)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v %s", err, out)
		}
		return strings.Fields(string(out))
	}
	for words, want := range map[string]string{
		"orgkeys-node ":                    "boot enroll secrets register unregister status ek recipient unseal completion version help",
		"orgkeys-node un":                  "unregister unseal",
		"orgkeys-node boot --to":           "--token-file",
		"orgkeys-node unseal --re":         "--recipient-file --receipt-file",
		"orgkeys-node completion ":         "bash zsh fish",
		"orgkeys-node help enr":            "enroll",
		"orgkeys-node secrets --wait 1s -": "--server --ca-file --tls-cert --tls-key --org --ip --region --key-file --dir --tpm --config --wait --json --help",
	} {
		if got := strings.Join(complete(words), " "); got != want {
			t.Errorf("%q completes to %q, want %q", words, got, want)
		}
	}
	if got := complete("orgkeys-node boot --key-file main_t"); strings.Join(got, " ") != "main_test.go" {
		t.Errorf("files complete to %q", got)
	}
	for shell, has := range map[string]string{"zsh": "#compdef orgkeys-node\n", "fish": "complete -c orgkeys-node -n '__fish_seen_subcommand_from boot' -l token-file -r -F"} {
		out, err := exec.Command(binary, "completion", shell).Output()
		if err != nil || !strings.Contains(string(out), has) {
			t.Errorf("%s: %v %s", shell, err, out)
		}
	}
}
