package main_test

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	program "github.com/orgkeys/orgkeys/cmd/orgkeys-node"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/node"
)

var (
	binary  string // orgkeys-node, as it ships
	private *rsa.PrivateKey
)

func TestMain(m *testing.M) {
	if text := os.Getenv(program.FleetPart); text != "" {
		if err := program.BootPart(text); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	dir, err := os.MkdirTemp("", "orgkeys-node-")
	if err == nil {
		defer os.RemoveAll(dir)
		err = build(dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := harness.Main(m)
	os.RemoveAll(dir)
	os.Exit(code)
}

func build(dir string) error {
	binary = filepath.Join(dir, "orgkeys-node")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", binary, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	var err error
	private, err = rsa.GenerateKey(rand.Reader, 2048)
	return err
}

// machine is a node's disk and settings.
type machine struct {
	t      *testing.T
	key    string
	dir    string
	server string
}

func newMachine(t *testing.T, server string) *machine {
	t.Helper()
	m := &machine{t, filepath.Join(t.TempDir(), "key.pem"), filepath.Join(t.TempDir(), "secrets"), server}
	m.install(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(private)}))
	return m
}

func (m *machine) install(key []byte) {
	m.t.Helper()
	if err := os.WriteFile(m.key, key, 0o600); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) command(org, command string, more ...string) *exec.Cmd {
	args := append([]string{command, "--server", m.server, "--org", org, "--ip", "192.0.2.7", "--region", "eu", "--key-file", m.key, "--dir", m.dir}, more...)
	cmd := exec.Command(binary, args...)
	cmd.Env = []string{"PATH=/nonexistent"}
	return cmd
}

// run returns the exit code and all that was printed.
func (m *machine) run(command string, more ...string) (int, string) {
	m.t.Helper()
	out, err := m.command("acme", command, more...).CombinedOutput()
	if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		m.t.Fatal(err)
	}
	if code := 0; err != nil {
		code = err.(*exec.ExitError).ExitCode()
		return code, string(out)
	}
	return 0, string(out)
}

// want checks a run's exit code and outcome, which is its last line. Those
// before it say what it waited for.
func (m *machine) want(code int, text, command string, more ...string) {
	m.t.Helper()
	got, out := m.run(command, more...)
	lines := strings.SplitAfter(strings.TrimSuffix(out, "\n"), "\n")
	for _, line := range lines[:len(lines)-1] {
		if !strings.HasPrefix(line, "orgkeys-node: "+command+": waiting: ") {
			m.t.Errorf("%s %q printed %q", command, more, line)
		}
	}
	if last := lines[len(lines)-1]; got != code || !strings.Contains(last+"\n", text) {
		m.t.Errorf("%s %q: exit code %d, printed %q; want %d and %q on the last line", command, more, got, out, code, text)
	}
}

// wantAtOnce is want of a run that makes one attempt.
func (m *machine) wantAtOnce(code int, text, command string, more ...string) {
	m.t.Helper()
	m.want(code, text, command, append([]string{"--wait", "0s"}, more...)...)
}

// holds checks that the secrets directory has exactly these files, whole and 0600.
func (m *machine) holds(files map[string]string) {
	m.t.Helper()
	entries, err := os.ReadDir(m.dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		m.t.Fatal(err)
	}
	found := 0
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".orgkeys-node.") {
			continue
		}
		found++
		path := filepath.Join(m.dir, e.Name())
		text, err := os.ReadFile(path)
		info, statErr := os.Lstat(path)
		if want, ok := files[e.Name()]; err != nil || statErr != nil || !ok || string(text) != want || info.Mode() != 0o600 {
			m.t.Errorf("%s holds %q, mode %v, %v", e.Name(), text, info.Mode(), errors.Join(err, statErr))
		}
	}
	if found != len(files) {
		m.t.Errorf("%d files, want %d", found, len(files))
	}
}

// stub is a server that is not orgkeys and does as it is told.
func stub(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// net/http notices that a client has gone only after its body was read.
		io.Copy(io.Discard, r.Body)
		h(w, r)
	}))
	t.Cleanup(s.Close)
	return s.URL
}

func sealed(t *testing.T, secrets map[string]string) []byte {
	t.Helper()
	fields := map[string]string{}
	for name, value := range secrets {
		text, err := envelope.Seal(&private.PublicKey, []byte(value))
		if err != nil {
			t.Fatal(err)
		}
		fields[name+"_enc"] = string(text)
	}
	text, err := json.Marshal(fields)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// serving answers as orgkeys does where all is well.
func serving(answer []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("X-Request-Id", "r")
		switch r.URL.Path {
		case "/secrets":
			w.Header().Set("X-Secret-Count", strconv.Itoa(bytes.Count(answer, []byte(`_enc":`))))
			w.Write(answer)
		case "/healthz":
			fmt.Fprint(w, `{"status":"ok"}`)
		case "/register":
			fmt.Fprint(w, `{"success":true,"message":"Node registered successfully"}`)
		case "/unregister":
			fmt.Fprint(w, `{"success":true,"message":"Node unregistered successfully"}`)
		}
	}
}

// refusing answers as orgkeys does when it refuses.
func refusing(status int, code string, headers ...string) http.HandlerFunc {
	return answering(status, "application/json", fmt.Sprintf(`{"success":false,"message":"as told\nsecond line","errorCode":%q,"requestId":"r"}`, code), headers...)
}

func answering(status int, mediaType, body string, headers ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header()["Content-Type"] = nil // no guessing
		if mediaType != "" {
			w.Header().Set("Content-Type", mediaType)
		}
		for i := 0; i < len(headers); i += 2 {
			w.Header().Set(headers[i], headers[i+1])
		}
		w.WriteHeader(status)
		io.WriteString(w, body)
	}
}

func TestBootAgainstTheRealServer(t *testing.T) {
	s := harness.Start(t)
	org := harness.Org()
	owner := s.Token(t, org, "OWNER")
	k := s.Generate(t, org)
	put := func(name, value string) {
		t.Helper()
		s.PutSecret(t, org, name, []byte(value))
	}
	nodes := func() string {
		t.Helper()
		return string(s.Do(t, harness.Request{Method: "GET", Path: "/organization/" + org + "/nodes", Token: owner}).Body)
	}
	m := newMachine(t, s.API)
	m.install(k.PEM)
	run := func(want int, text, command string, more ...string) {
		t.Helper()
		out, err := m.command(org, command, more...).CombinedOutput()
		if code := exitCode(err); code != want || !strings.Contains(string(out), text) {
			t.Fatalf("%s: exit code %d, printed %q", command, code, out)
		}
	}
	put("env_s3", "A=1")
	put("env_gcs", "B=2")
	run(0, "2 secrets written, 0 unchanged, registered 192.0.2.7", "boot")
	m.holds(map[string]string{"env_s3": "A=1", "env_gcs": "B=2"})
	if list := nodes(); !strings.Contains(list, `"ip":"192.0.2.7"`) {
		t.Errorf("nodes %s", list)
	}
	before := modified(t, m.dir, "env_s3")
	put("env_gcs", "B=3")
	run(0, "1 secrets written, 1 unchanged", "boot")
	m.holds(map[string]string{"env_s3": "A=1", "env_gcs": "B=3"})
	if modified(t, m.dir, "env_s3") != before {
		t.Error("an unchanged secret was written again")
	}
	run(0, "server answers", "status")
	run(0, "unregistered", "unregister")
	run(0, "unregistered", "unregister")
	if list := nodes(); strings.Contains(list, "192.0.2.7") {
		t.Errorf("nodes %s", list)
	}
	s.Do(t, harness.Request{Method: "DELETE", Path: harness.KeyPath(org), Token: owner}).Want(t, 200, "Successfully deleted 1 organization key(s)")
	run(77, "does not accept this key", "boot")
}

func exitCode(err error) int {
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exit.ExitCode()
	}
	return 0
}

func modified(t *testing.T, dir, name string) time.Time {
	t.Helper()
	info, err := os.Stat(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return info.ModTime()
}

// What deployed nodes do: no Go, only openssl, jq and curl.
func TestShellClientAgainstTheRealServer(t *testing.T) {
	s := harness.Start(t)
	org, dir := harness.Org(), t.TempDir()
	k := s.Generate(t, org)
	key := filepath.Join(dir, "key.pem")
	if err := os.WriteFile(key, k.PEM, 0o600); err != nil {
		t.Fatal(err)
	}
	value := "A='1'\nB=\x00\xff\n"
	s.PutSecret(t, org, "env_s3", []byte(value))
	cmd := exec.Command("../../internal/node/testdata/client.sh", s.API, org, key, "192.0.2.9", "eu-west-1", dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "env_s3")); err != nil || string(got) != value {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestKilledAtAnyMomentAndRunAgain(t *testing.T) {
	secrets := map[string]string{}
	for i := range 20 {
		secrets[fmt.Sprintf("env_%d", i)] = strings.Repeat(string(rune('a'+i)), 20000)
	}
	m := newMachine(t, stub(t, serving(sealed(t, secrets))))
	for range 25 {
		cmd := m.command("acme", "boot")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(time.Duration(mathrand.IntN(60))*time.Millisecond, func() { cmd.Process.Kill() })
		cmd.Wait() // killed or done: either is the point
		entries, _ := os.ReadDir(m.dir)
		for _, e := range entries {
			text, err := os.ReadFile(filepath.Join(m.dir, e.Name()))
			if want, ok := secrets[e.Name()]; ok && (err != nil || string(text) != want) {
				t.Fatalf("%s has %d bytes, %v", e.Name(), len(text), err)
			}
		}
		if mathrand.IntN(2) == 0 {
			os.Remove(filepath.Join(m.dir, "env_1"))
		}
	}
	m.want(0, "registered", "boot")
	m.holds(secrets)
}

func TestTwoRunsAtOnce(t *testing.T) {
	secrets := map[string]string{"env_s3": "A=1", "env_gcs": "B=2"}
	m := newMachine(t, stub(t, serving(sealed(t, secrets))))
	var wg sync.WaitGroup
	for range 5 {
		wg.Go(func() { m.want(0, "registered", "boot") })
	}
	wg.Wait()
	m.holds(secrets)
}

func TestServerThatComesUpLater(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	m := newMachine(t, "http://"+address)
	go func() {
		time.Sleep(3 * time.Second) // the server's absence is the test
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Error(err)
			return
		}
		s := &httptest.Server{Listener: l, Config: &http.Server{Handler: serving([]byte(`{}`))}}
		s.Start()
		t.Cleanup(s.Close)
	}()
	m.want(0, "registered", "boot", "--wait", "60s")
	dead := newMachine(t, "http://127.0.0.1:1")
	dead.want(69, "connection refused; check the network", "boot", "--wait", "1s")
}

func TestRetryAfterIsHonoured(t *testing.T) {
	var first atomic.Int64
	m := newMachine(t, stub(t, func(w http.ResponseWriter, r *http.Request) {
		if first.CompareAndSwap(0, time.Now().UnixNano()) {
			refusing(503, "overloaded", "Retry-After", "2")(w, r)
			return
		}
		if waited := time.Since(time.Unix(0, first.Load())); waited < 2*time.Second {
			t.Errorf("came back after %s", waited)
		}
		serving(nil)(w, r)
	}))
	m.want(0, "registered", "register")
}

// A Retry-After beyond --wait does not end the run at once: a supervisor would
// start it again all the sooner. It is tried once more at the end.
func TestRetryAfterBeyondWait(t *testing.T) {
	var attempts atomic.Int64
	m := newMachine(t, stub(t, func(w http.ResponseWriter, r *http.Request) {
		if attempts.Add(1) == 2 {
			serving(nil)(w, r)
			return
		}
		refusing(429, "too_many_failures", "Retry-After", "100000")(w, r)
	}))
	started := time.Now()
	m.want(0, "registered", "register", "--wait", "2s")
	if waited := time.Since(started); waited < 2*time.Second {
		t.Errorf("came back after %s", waited)
	}
	m.want(69, "answers 429", "register", "--wait", "1s")
	if attempts.Load() != 4 {
		t.Errorf("%d attempts, want 4", attempts.Load())
	}
}

// What the server itself refuses is final, and said with what to do about it.
func TestRefusalsAreFinalAndSayWhatToDo(t *testing.T) {
	message := func(text string) http.HandlerFunc {
		return answering(403, "application/json", `{"success":false,"errorCode":"access_denied","requestId":"r","message":"`+text+`"}`)
	}
	for name, c := range map[string]struct {
		h    http.HandlerFunc
		text string
	}{
		"key deleted":           {refusing(400, "bad_signature"), "does not accept this key for organization acme"},
		"refused":               {refusing(403, "access_denied"), "refuses (403): as told second line"},
		"path":                  {refusing(404, "not_found"), "is the path of --server right?"},
		"invalid":               {refusing(400, "invalid_request"), "refuses (400)"},
		"a code of the future":  {refusing(409, "a_new_code"), "refuses (409)"},
		"address in use":        {refusing(409, "address_in_use"), "belongs to another node with a key of its own"},
		"another address":       {refusing(403, "address_not_allowed"), "was enrolled for another address than 192.0.2.7"},
		"a long message":        {message("x" + strings.Repeat("ü", 200)), ": x" + strings.Repeat("ü", 149) + "\n"},
		"a message in disguise": {message("a\u202eb\u2028c"), ": a b c\n"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, stub(t, c.h))
			m.want(77, c.text, "boot", "--wait", "forever")
			m.want(77, c.text, "register", "--wait", "forever")
			m.holds(nil)
		})
	}
}

func TestHostileServer(t *testing.T) {
	good := string(sealed(t, map[string]string{"env_s3": "A=1"}))
	with := func(field, value string) []byte {
		encoded, err := json.Marshal(value)
		if err != nil {
			t.Fatal(err)
		}
		return []byte(strings.Replace(good, "{", `{"`+field+`":`+string(encoded)+`,`, 1))
	}
	var envelopes map[string]string
	if err := json.Unmarshal([]byte(good), &envelopes); err != nil {
		t.Fatal(err)
	}
	e := envelopes["env_s3_enc"]
	for name, answer := range map[string][]byte{
		"name that leads out":    with("../evil_enc", e),
		"absolute name":          with("/etc/evil_enc", e),
		"name in capitals":       with("Evil_enc", e),
		"hidden name":            with(".evil_enc", e),
		"no name":                with("_enc", e),
		"name with a line break": with(`evil\n_enc`, e),
		"no envelope":            with("evil_enc", "x"),
		"changed envelope":       with("evil_enc", strings.Replace(e, `"ct":"`, `"ct":"AAAA`, 1)),
		"envelope as an object":  []byte(strings.Replace(good, "{", `{"evil_enc":{"key":"","iv":"","ct":"","mac":""},`, 1)),
		"name twice":             []byte(strings.Replace(good, "{", `{"env_s3_enc":"x",`, 1)),
		"null":                   []byte("null"),
		"an array":               []byte("[]"),
		"a failure":              []byte(`{"success":false,"message":"as told"}`),
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, stub(t, serving(answer)))
			m.wantAtOnce(76, "something that is not orgkeys", "boot")
			m.holds(nil)
		})
	}
	m := newMachine(t, stub(t, serving(with("something", "else"))))
	m.want(0, "1 secrets written", "boot")
}

func TestAnswerMayHaveAsManySecretsAsTheServerKeeps(t *testing.T) {
	secrets := map[string]string{}
	for i := range node.MaxSecrets {
		secrets[fmt.Sprintf("env_%d", i)] = "A=1"
	}
	m := newMachine(t, stub(t, serving(sealed(t, secrets))))
	m.want(0, "64 secrets written", "secrets")
	secrets["one_more"] = "A=1"
	over := newMachine(t, stub(t, serving(sealed(t, secrets))))
	over.wantAtOnce(76, "more than 64 secrets", "secrets")
	over.holds(nil)
}

func TestAnswersWithoutEndAreCutOff(t *testing.T) {
	endless := stub(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		chunk := bytes.Repeat([]byte(" "), 1<<20)
		for range 1 << 10 {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	})
	m := newMachine(t, endless)
	// Linux counts what this process had at the fork too, which is much under
	// the race detector.
	memory := func(cmd *exec.Cmd) int64 { return cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss }
	idle := m.command("acme", "--help")
	_ = idle.Run() // only for its memory
	for _, command := range []string{"secrets", "register", "status"} {
		cmd := m.command("acme", command, "--wait", "0s")
		out, err := cmd.CombinedOutput()
		if exitCode(err) != 76 || !strings.Contains(string(out), "longer than") {
			t.Errorf("%s: %v, %q", command, err, out)
		}
		if used := memory(cmd); used > memory(idle)+60<<10 {
			t.Errorf("%s: %d KiB of memory, idle %d", command, used, memory(idle))
		}
	}
	headers := newMachine(t, stub(t, func(w http.ResponseWriter, _ *http.Request) {
		for i := range 1000 {
			w.Header().Add("X-Long", strings.Repeat("x", 1000)+fmt.Sprint(i))
		}
	}))
	headers.want(69, "exceeded", "register", "--wait", "0s")
}

func TestAnswersThatTrickleAreCutOff(t *testing.T) {
	for name, first := range map[string]func(w http.ResponseWriter){
		"no header": func(http.ResponseWriter) {},
		"slow body": func(w http.ResponseWriter) { w.WriteHeader(200) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, stub(t, func(w http.ResponseWriter, r *http.Request) {
				first(w)
				for r.Context().Err() == nil {
					if name == "slow body" {
						io.WriteString(w, " ")
						w.(http.Flusher).Flush()
					}
					select {
					case <-r.Context().Done():
					case <-time.After(100 * time.Millisecond):
					}
				}
			}))
			started := time.Now()
			m.want(69, "cannot be reached", "secrets", "--wait", "0s")
			if took := time.Since(started); took > 20*time.Second {
				t.Errorf("took %s", took)
			}
		})
	}
}

func TestDoubtfulSettingsAreRefused(t *testing.T) {
	m := newMachine(t, "http://127.0.0.1:1")
	for _, c := range []struct {
		text string
		args []string
	}{
		{"not https", []string{"--server", "http://192.0.2.1:3000"}},
		{"not https", []string{"--server", "http://orgkeys.example"}},
		{"not https", []string{"--server", "ftp://127.0.0.1"}},
		{"not of the form", []string{"--server", "https://host/a?"}},
		{"not of the form", []string{"--server", "https://user:pass@host"}},
		{"not of the form", []string{"--server", ""}},
		{"not an organization ID", []string{"--org", "a|b"}},
		{"not an IP address", []string{"--ip", "fe80::1%eth0"}},
		{"has a | in it", []string{"--region", "a|b"}},
		{"not a number", []string{"--services", "x"}},
		{`--region "M\xfcnchen" is not UTF-8`, []string{"--region", "M\xfcnchen"}},
		{"is not UTF-8", []string{"--status", "\xff"}},
		{"is not UTF-8", []string{"--version", "1\xff"}},
		{"is not UTF-8", []string{"--url", "https://\xff"}},
		{"is not UTF-8", []string{"--provider", "\xff"}},
		{"flag provided but not defined", []string{"--sever", "x"}},
		{"one argument too many", []string{"now"}},
	} {
		m.want(64, c.text, "boot", c.args...)
	}
	m.want(64, "no command", "bot")
	for _, mode := range []os.FileMode{0o644, 0o640, 0o604} {
		if err := os.Chmod(m.key, mode); err != nil {
			t.Fatal(err)
		}
		m.wantAtOnce(78, "chmod 600", "boot")
	}
	for _, text := range []string{"", "x", "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"} {
		os.Remove(m.key)
		m.install([]byte(text))
		m.wantAtOnce(78, "copy the PEM again", "boot")
	}
	os.Remove(m.key)
	m.wantAtOnce(78, "put the private key there", "boot")
	if err := syscall.Mkfifo(m.key, 0o600); err != nil {
		t.Fatal(err)
	}
	m.wantAtOnce(78, "not a regular file", "boot")
}

// Numbers are sent as numbers, however they were written.
func TestServicesAreSentAsANumber(t *testing.T) {
	var got atomic.Value
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		got.Store(string(body))
		serving(nil)(w, r)
	}))
	t.Cleanup(s.Close)
	m := newMachine(t, s.URL)
	for text, want := range map[string]string{"3": "3", "007": "7", "+5": "5", "-1": "-1", "9007199254740991": "9007199254740991"} {
		m.want(0, "registered", "register", "--services", text)
		if body, _ := got.Load().(string); !strings.Contains(body, `"nodeServices":`+want+`}`) {
			t.Errorf("--services %s: sent %s", text, body)
		}
	}
}

// Whatever a run waits for, a second signal ends it. Reading a pipe is the
// example: nothing but a signal's default action gets a process out of that.
func TestSecondSignalEndsTheProgram(t *testing.T) {
	m := newMachine(t, "https://127.0.0.1:1")
	pipe := filepath.Join(t.TempDir(), "ca.pem")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := m.command("acme", "boot", "--ca-file", pipe)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// Opening the pipe succeeds once the program is there to read it.
	w, err := os.OpenFile(pipe, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for deadline := time.Now().Add(10 * time.Second); ; {
		cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
			return
		case <-time.After(50 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			cmd.Process.Kill()
			t.Fatal("many signals did not end it")
		}
	}
}

// The owner of a file can change it, and its mode, at any time. A test has
// files of other users only as root; as another user, what belongs to the
// system's root is what it may trust.
func TestOwnersAreChecked(t *testing.T) {
	m := newMachine(t, stub(t, serving([]byte(`{}`))))
	m.want(0, "registered", "boot")
	if os.Geteuid() != 0 {
		m.key = "/etc/passwd"
		m.wantAtOnce(78, "may be read or written by others", "boot")
		return
	}
	for path, want := range map[string]int{m.dir: 73, m.key: 78} {
		if err := os.Chown(path, 65534, 65534); err != nil {
			t.Fatal(err)
		}
		m.wantAtOnce(want, "belongs to user 65534, and this runs as user 0", "boot")
		if err := os.Chown(path, 0, 0); err != nil {
			t.Fatal(err)
		}
	}
}

func TestUntrustedCertificateIsWaitedFor(t *testing.T) {
	s := httptest.NewTLSServer(serving(nil))
	t.Cleanup(s.Close)
	m := newMachine(t, s.URL)
	m.wantAtOnce(78, "certificate is not trusted", "register")
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o644); err != nil {
		t.Fatal(err)
	}
	m.want(0, "registered", "register", "--ca-file", ca)
	t.Run("another host", func(t *testing.T) {
		m.server = strings.Replace(s.URL, "127.0.0.1", "localhost", 1)
		m.wantAtOnce(78, "certificate is not trusted", "register", "--ca-file", ca)
	})
}

// certificate is a self-signed one for 127.0.0.1, and a file that has it in it.
func certificate(t *testing.T, from, until time.Time) (tls.Certificate, string) {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: from, NotAfter: until, IsCA: true, BasicConstraintsValid: true,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644); err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: private}, file
}

// A node often boots with a wrong clock and has it set a little later: to it
// the server's certificate is out of date first and good then.
func TestWrongClockOverTLSIsWaitedFor(t *testing.T) {
	now := time.Now()
	good, goodFile := certificate(t, now.Add(-time.Hour), now.Add(time.Hour))
	for name, c := range map[string]struct{ from, until time.Time }{
		"future":  {now.Add(time.Hour), now.Add(2 * time.Hour)},
		"expired": {now.Add(-2 * time.Hour), now.Add(-time.Hour)},
	} {
		t.Run(name, func(t *testing.T) {
			wrong, file := certificate(t, c.from, c.until)
			var seen, mends atomic.Int64
			s := httptest.NewUnstartedServer(serving([]byte(`{}`)))
			s.Config.ErrorLog = log.New(t.Output(), "", 0)
			s.Listener = tls.NewListener(s.Listener, &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
				if n := seen.Add(1); mends.Load() > 0 && n > mends.Load() {
					return &good, nil
				}
				return &wrong, nil
			}})
			s.Start()
			t.Cleanup(s.Close)
			m := newMachine(t, strings.Replace(s.URL, "http:", "https:", 1))
			m.want(75, "not yet valid by this node's clock", "boot", "--ca-file", file, "--wait", "1s")
			if seen.Load() < 2 {
				t.Errorf("%d attempts", seen.Load())
			}
			mends.Store(seen.Load() + 1)
			m.want(0, "registered", "boot", "--ca-file", goodFile, "--wait", "60s")
		})
	}
}

func TestFilesThatAreNotAsTheyMustBeAreReplaced(t *testing.T) {
	m := newMachine(t, stub(t, serving(sealed(t, map[string]string{"env_s3": "A=1"}))))
	outside := filepath.Join(t.TempDir(), "outside")
	for name, prepare := range map[string]func(path string) error{
		"readable by others": func(path string) error { return os.WriteFile(path, []byte("A=1"), 0o644) },
		"a link elsewhere": func(path string) error {
			return errors.Join(os.WriteFile(outside, []byte("A=1"), 0o600), os.Symlink(outside, path))
		},
		"an older value":     func(path string) error { return os.WriteFile(path, []byte("A=0"), 0o600) },
		"left by a kill":     func(path string) error { return os.WriteFile(filepath.Join(m.dir, ".env_s3.new"), []byte("A"), 0o600) },
		"a link left behind": func(path string) error { return os.Symlink(outside, filepath.Join(m.dir, ".env_s3.new")) },
	} {
		if err := errors.Join(os.RemoveAll(m.dir), os.Mkdir(m.dir, 0o700), prepare(filepath.Join(m.dir, "env_s3"))); err != nil {
			t.Fatal(err)
		}
		m.want(0, "1 secrets written", "secrets")
		m.holds(map[string]string{"env_s3": "A=1"})
		t.Log(name)
	}
	if text, err := os.ReadFile(outside); err != nil || string(text) != "A=1" {
		t.Errorf("the file that a link led to holds %q, %v", text, err)
	}
	if err := os.Chmod(m.dir, 0o777); err != nil {
		t.Fatal(err)
	}
	m.wantAtOnce(73, "others may write to it", "secrets")
}

func TestOutcomeAsJSON(t *testing.T) {
	m := newMachine(t, stub(t, serving(sealed(t, map[string]string{"env_s3": "A=1"}))))
	type outcome struct {
		Command  string
		OK       bool
		ExitCode int
		Message  string
		Changed  []string
	}
	parse := func(out string) (o outcome) {
		t.Helper()
		if err := json.Unmarshal([]byte(out), &o); err != nil || strings.Count(out, "\n") != 1 {
			t.Errorf("%q: %v", out, err)
		}
		return o
	}
	if _, out := m.run("boot", "--json"); !parse(out).OK || parse(out).Changed[0] != "env_s3" {
		t.Errorf("printed %s", out)
	}
	m.server = "http://127.0.0.1:1"
	if code, out := m.run("boot", "--json", "--wait", "0s"); code != 69 || parse(out).ExitCode != 69 || parse(out).OK {
		t.Errorf("printed %s", out)
	}
}

// A unit file that names an exit code this program does not have would not restart as it says.
func TestUnitFileNamesExitCodesThatMendingNeeds(t *testing.T) {
	unit, err := os.ReadFile("orgkeys-node.service")
	if err != nil || !bytes.Contains(unit, []byte("RestartPreventExitStatus=64 77\n")) {
		t.Errorf("the unit restarts on other codes: %v", err)
	}
	out, err := exec.Command(binary, "help").Output()
	code, help := exitCode(err), string(out)
	for _, want := range []string{"64", "65", "69", "73", "75", "76", "77", "78", "ORGKEYS_NODE_SERVER"} {
		if code != 0 || !strings.Contains(help, want) {
			t.Errorf("help does not mention %s", want)
		}
	}
}

// The exit codes in docs/nodes.md are those of the program's help, and the unit
// starts again for the codes that the table says.
func TestDocumentedExitCodes(t *testing.T) {
	text, err := os.ReadFile("../../docs/nodes.md")
	if err != nil {
		t.Fatal(err)
	}
	unit, err := os.ReadFile("orgkeys-node.service")
	if err != nil {
		t.Fatal(err)
	}
	setting := func(name string) []string {
		_, value, _ := strings.Cut(string(unit), "\n"+name+"=")
		value, _, _ = strings.Cut(value, "\n")
		return strings.Fields(value)
	}
	ending := append(setting("RestartPreventExitStatus"), setting("SuccessExitStatus")...)
	out, err := exec.Command(binary, "help").Output()
	if err != nil {
		t.Fatal(err)
	}
	_, help, _ := strings.Cut(string(out), "Exit codes:\n")
	codes := regexp.MustCompile(`(?m)^  (\d+) +(.*)$`).FindAllStringSubmatch(help, -1)
	rows := regexp.MustCompile(`(?m)^\| (\d+) \| (.*) \| (?:(yes|no) )?\|$`).FindAllStringSubmatch(string(text), -1)
	if len(codes) == 0 || len(rows) != len(codes) {
		t.Fatalf("%d exit codes in the help, %d in the document", len(codes), len(rows))
	}
	for i, row := range rows {
		code, meaning, again := row[1], row[2], row[3]
		if code != codes[i][1] || !strings.HasPrefix(codes[i][2], meaning) {
			t.Errorf("the document says %s %s, the help %s %s", code, meaning, codes[i][1], codes[i][2])
		}
		if ends := slices.Contains(ending, code); code != "0" && ends != (again == "no") {
			t.Errorf("the document says that the unit starts again after %s: %s; it has %q", code, again, ending)
		}
	}
}
