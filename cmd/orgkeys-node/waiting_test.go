package main_test

import (
	"crypto/tls"
	"encoding/pem"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/testca"
)

// passing are answers that say nothing about this node, and how a run ends that
// waited for another one long enough.
var passing = map[string]struct {
	h    http.HandlerFunc
	code int
	text string
}{
	"clock ahead":                {dated(-62, "stale_timestamp"), 75, "clock is off by 1h2m, ahead of the server's; set it"},
	"clock behind":               {dated(62, "stale_timestamp"), 75, "clock is off by 1h2m, behind the server's; set it"},
	"clock, older codes":         {dated(-62, "invalid_request"), 75, "clock is off by 1h2m"},
	"stale":                      {refusing(400, "stale_timestamp"), 75, "timestamp as stale"},
	"signature used":             {refusing(400, "signature_reused"), 69, "answers 400"},
	"TLS ends before it":         {refusing(400, "tls_required"), 69, "answers 400"},
	"too many":                   {refusing(429, "too_many_failures"), 69, "answers 429"},
	"draining":                   {refusing(503, "draining"), 69, "answers 503"},
	"secret broken":              {refusing(500, "secret_broken"), 69, "answers 500"},
	"redirect":                   {answering(302, "text/html", "", "Location", "https://portal.example/"), 76, `a redirect to "https://portal.example/"`},
	"redirect in our form":       {refusing(307, "bad_signature", "Location", "/x"), 76, "a redirect"},
	"nothing":                    {answering(204, "", ""), 76, "something that is not orgkeys answers at http://127.0.0.1"},
	"a page":                     {answering(200, "text/html", "<html>"), 76, `of Content-Type "text/html"`},
	"a page called JSON":         {answering(200, "application/json", "<html>"), 76, "JSON of another form"},
	"empty object":               {answering(200, "application/json", "{}"), 76, "something that is not orgkeys"},
	"empty object by a gateway":  {answering(200, "application/json", "{}", "X-Request-Id", "r"), 76, "without X-Secret-Count"},
	"another's 400":              {answering(400, "text/html", "The plain HTTP request was sent to HTTPS port"), 76, "400"},
	"401":                        {answering(401, "text/html", ""), 76, "401"},
	"402":                        {answering(402, "text/html", ""), 76, "402"},
	"403":                        {answering(403, "application/json", `{"message":"Forbidden"}`), 76, "403, JSON without an errorCode"},
	"404":                        {answering(404, "text/plain", "default backend - 404"), 76, "404"},
	"405":                        {answering(405, "text/html", ""), 76, "405"},
	"410":                        {answering(410, "text/html", ""), 76, "410"},
	"421":                        {answering(421, "text/html", ""), 76, "421"},
	"425":                        {answering(425, "", ""), 76, "425"},
	"429":                        {answering(429, "text/html", ""), 76, "429"},
	"451":                        {answering(451, "text/html", ""), 76, "451"},
	"502":                        {answering(502, "text/html", ""), 76, "502"},
	"511":                        {answering(511, "text/html", ""), 76, "511"},
	"another's code":             {answering(403, "application/json", `{"success":false,"message":"x","errorCode":"E42"}`), 76, "JSON without an errorCode"},
	"another's code of our form": {answering(403, "application/json", `{"success":false,"message":"x","errorCode":"forbidden"}`), 76, "an errorCode without a requestId"},
	"another's success":          {answering(200, "application/json", `{"success":true,"data":{}}`), 76, "something that is not orgkeys"},
	"success by a gateway":       {answering(200, "application/json", `{"success":true,"message":"OK"}`, "X-Request-Id", "r"), 76, "without X-Secret-Count"},
	"HTTP/1.0":                   {saying("HTTP/1.0 200 OK\r\nContent-Type: text/html\r\n\r\n<html>"), 76, "of Content-Type"},
	"closed in the middle":       {saying("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{\"env_s3_enc\":"), 69, "unexpected EOF"},
	"broken chunks":              {saying("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n{}\r\n"), 69, "chunk"},
	"no HTTP":                    {saying("SSH-2.0-OpenSSH_9.2\r\n"), 69, "malformed HTTP response"},
	"gzip that nobody asked for": {answering(200, "application/json", "\x1f\x8b\x08\x00", "Content-Encoding", "gzip"), 76, "JSON of another form"},
}

// saying sends text as it is, and closes the connection.
func saying(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			panic(err)
		}
		io.WriteString(conn, text)
		conn.Close()
	}
}

// dated refuses by a clock that is so many minutes ahead of this one.
func dated(ahead time.Duration, code string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Date", time.Now().Add(ahead*time.Minute).UTC().Format(http.TimeFormat))
		refusing(400, code)(w, r)
	}
}

func TestWhatMayPassIsWaitedFor(t *testing.T) {
	for name, c := range passing {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var asked atomic.Int64
			m := newMachine(t, stub(t, func(w http.ResponseWriter, r *http.Request) {
				if asked.Add(1) <= 2 {
					c.h(w, r)
					return
				}
				serving(sealed(t, map[string]string{"env_s3": "A=1"}))(w, r)
			}))
			m.wantAtOnce(c.code, c.text, "boot")
			m.holds(nil)
			m.want(0, "1 secrets written, 0 unchanged, registered", "boot", "--wait", "1m")
			if n := asked.Load(); n != 4 {
				t.Errorf("%d requests, want 4", n)
			}
		})
	}
}

// Nobody else's success counts for registered, or unregistered.
func TestNoForeignAnswerRegisters(t *testing.T) {
	for name, c := range passing {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var foreign atomic.Bool
			m := newMachine(t, stub(t, func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/secrets" || !foreign.Load() {
					serving([]byte("{}"))(w, r)
					return
				}
				c.h(w, r)
			}))
			m.want(0, "registered", "boot", "--wait", "0s")
			m.want(0, "unregistered", "unregister", "--wait", "0s")
			foreign.Store(true)
			for _, command := range []string{"boot", "register", "unregister"} {
				if code, out := m.run(command, "--wait", "0s"); code != c.code {
					t.Errorf("%s: exit code %d, want %d, printed %s", command, code, c.code, out)
				}
			}
		})
	}
}

// What is registered is not fetched again for the registration's sake.
func TestStepThatIsDoneIsNotRepeated(t *testing.T) {
	var fetched, registered atomic.Int64
	m := newMachine(t, stub(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/secrets" {
			fetched.Add(1)
		} else if registered.Add(1) <= 2 {
			refusing(503, "unavailable")(w, r)
			return
		}
		serving([]byte("{}"))(w, r)
	}))
	m.want(0, "registered", "boot")
	if fetched.Load() != 1 || registered.Load() != 3 {
		t.Errorf("fetched %d times, registered %d times", fetched.Load(), registered.Load())
	}
}

// started starts a run, and returns a function that waits for its end and its
// exit code.
func (m *machine) started(command string, more ...string) (ended func() (int, string)) {
	m.t.Helper()
	cmd := m.command("acme", command, more...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	return func() (int, string) { return exitCode(cmd.Wait()), out.String() }
}

// A machine's files come one after the other while it boots. A run that finds
// one missing, half written or not yet its own waits for it.
func TestFilesMayComeLater(t *testing.T) {
	server := httptest.NewTLSServer(serving(sealed(t, map[string]string{"env_s3": "A=1"})))
	t.Cleanup(server.Close)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	for name, c := range map[string]struct {
		begin func(t *testing.T, m *machine, ca string) (end func() error)
		code  int
		text  string
	}{
		"no key": {func(t *testing.T, m *machine, _ string) func() error {
			return renamed(t, m.key)
		}, 78, "no such file"},
		"no directory for the key": {func(t *testing.T, m *machine, _ string) func() error {
			return renamed(t, filepath.Dir(m.key))
		}, 78, "no such file"},
		"empty key": {func(t *testing.T, m *machine, _ string) func() error {
			return rewritten(t, m.key, nil, 0o600)
		}, 78, "not an RSA private key"},
		"key that others may read": {func(t *testing.T, m *machine, _ string) func() error {
			if err := os.Chmod(m.key, 0o644); err != nil {
				t.Fatal(err)
			}
			return func() error { return os.Chmod(m.key, 0o600) }
		}, 78, "chmod 600"},
		"no authority": {func(t *testing.T, _ *machine, ca string) func() error {
			return renamed(t, ca)
		}, 78, "reading --ca-file"},
		"empty authority": {func(t *testing.T, _ *machine, ca string) func() error {
			return rewritten(t, ca, nil, 0o644)
		}, 78, "no certificate in --ca-file"},
		"another authority": {func(t *testing.T, _ *machine, ca string) func() error {
			other, err := os.ReadFile(testca.New(t).File)
			if err != nil {
				t.Fatal(err)
			}
			return rewritten(t, ca, other, 0o644)
		}, 78, "certificate is not trusted"},
		"a file in the directory's place": {func(t *testing.T, m *machine, _ string) func() error {
			if err := os.WriteFile(m.dir, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			return func() error { return os.Remove(m.dir) }
		}, 73, "directory"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, server.URL)
			file := filepath.Join(t.TempDir(), "ca.pem")
			if err := os.WriteFile(file, ca, 0o644); err != nil {
				t.Fatal(err)
			}
			end := c.begin(t, m, file)
			m.wantAtOnce(c.code, c.text, "boot", "--ca-file", file)
			ended := m.started("boot", "--ca-file", file, "--wait", "2m")
			time.Sleep(1500 * time.Millisecond) // what is not there for a while is the test
			if err := end(); err != nil {
				t.Fatal(err)
			}
			if code, out := ended(); code != 0 || !strings.Contains(out, "waiting: ") || !strings.Contains(out, c.text) {
				t.Errorf("exit code %d, printed %q", code, out)
			}
			m.holds(map[string]string{"env_s3": "A=1"})
		})
	}
}

func renamed(t *testing.T, path string) (back func() error) {
	t.Helper()
	if err := os.Rename(path, path+".away"); err != nil {
		t.Fatal(err)
	}
	return func() error { return os.Rename(path+".away", path) }
}

func rewritten(t *testing.T, path string, text []byte, mode os.FileMode) (back func() error) {
	t.Helper()
	before, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, text, mode)
	}
	if err != nil {
		t.Fatal(err)
	}
	return func() error { return os.WriteFile(path, before, mode) }
}

// The system's certificates are read by crypto/x509 once in a process; an
// authority that is installed while a run waits counts all the same.
func TestAuthorityThatIsInstalledLaterIsTrusted(t *testing.T) {
	server := httptest.NewTLSServer(serving([]byte("{}")))
	t.Cleanup(server.Close)
	m, file := newMachine(t, server.URL), filepath.Join(t.TempDir(), "system.pem")
	cmd := m.command("acme", "boot", "--wait", "2m")
	cmd.Env = append(cmd.Env, "SSL_CERT_FILE="+file, "SSL_CERT_DIR="+t.TempDir())
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1500 * time.Millisecond)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	if err := os.WriteFile(file, ca, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil || !strings.Contains(out.String(), "waiting: the server's certificate is not trusted") {
		t.Errorf("%v, printed %q", err, out.String())
	}
}

// A server with ORGKEYS_TLS_CLIENT_CA_FILE is reached with a certificate, and a
// node without one is told what is missing.
func TestClientCertificates(t *testing.T) {
	ca := testca.New(t)
	s := harness.Start(t, harness.TLS(ca, ca.Issue(t, "server")), harness.Set("ORGKEYS_TLS_CLIENT_CA_FILE", ca.File))
	s.HTTP.Transport.(*http.Transport).TLSClientConfig.Certificates = []tls.Certificate{ca.Issue(t, "administrator").Pair(t)}
	// Probes, which have no certificate, ask the admin listener.
	harness.Eventually(t, harness.Patience, "the admin listener says that the server is ready", func() bool {
		return strings.Contains(s.AskAdmin(t, "/readyz"), `"status":"ready"`)
	})
	org := harness.Org()
	m := newMachine(t, s.API)
	m.install(s.Generate(t, org).PEM)
	own, foreign := ca.Issue(t, "node"), testca.New(t).Issue(t, "node")
	run := func(more ...string) (int, string) {
		out, err := m.command(org, "boot", append([]string{"--ca-file", ca.File, "--wait", "0s"}, more...)...).CombinedOutput()
		return exitCode(err), string(out)
	}
	if code, out := run("--tls-cert", own.Cert, "--tls-key", own.Key); code != 0 {
		t.Errorf("exit code %d, printed %s", code, out)
	}
	for name, flags := range map[string][]string{"none": nil, "another authority's": {"--tls-cert", foreign.Cert, "--tls-key", foreign.Key}} {
		// 69 where the server's alert is lost with the connection.
		if code, out := run(flags...); code != 78 && code != 69 || !strings.Contains(out, "--tls-cert and --tls-key") {
			t.Errorf("%s: exit code %d, printed %s", name, code, out)
		}
	}
	if code, out := run("--tls-cert", own.Cert, "--tls-key", foreign.Key); code != 78 || !strings.Contains(out, "its own private key") {
		t.Errorf("exit code %d, printed %s", code, out)
	}
	if code, out := run("--tls-cert", own.Cert); code != 64 || !strings.Contains(out, "belong together") {
		t.Errorf("exit code %d, printed %s", code, out)
	}
	if err := os.Chmod(own.Key, 0o644); err != nil {
		t.Fatal(err)
	}
	if code, out := run("--tls-cert", own.Cert, "--tls-key", own.Key); code != 78 || !strings.Contains(out, "may be read or written by others") {
		t.Errorf("exit code %d, printed %s", code, out)
	}
}

// status believes an orgkeys server alone.
func TestStatusTellsOrgkeysFromOthers(t *testing.T) {
	for name, h := range map[string]http.HandlerFunc{
		"a page":    answering(200, "text/html", "<html>"),
		"JSON":      answering(200, "application/json", `{"status":"up"}`),
		"no status": answering(200, "application/json", `{}`),
		"a text":    answering(200, "text/plain", `{"status":"ok"}`),
		"redirect":  answering(302, "", "", "Location", "/login"),
		"404":       answering(404, "text/html", ""),
	} {
		m := newMachine(t, stub(t, h))
		started := time.Now()
		if m.want(76, "something that is not orgkeys", "status"); time.Since(started) > 20*time.Second {
			t.Errorf("%s: status waited", name)
		}
	}
}

// A secret that was deleted at the server goes from the nodes; what others put
// into the directory stays.
func TestDeletedSecretsGo(t *testing.T) {
	var answer atomic.Value
	answers := func(secrets map[string]string) { answer.Store(sealed(t, secrets)) }
	m := newMachine(t, stub(t, func(w http.ResponseWriter, r *http.Request) { serving(answer.Load().([]byte))(w, r) }))
	answers(map[string]string{"env_s3": "A=1", "env_gcs": "B=2"})
	m.want(0, "2 secrets written", "boot")
	if err := os.WriteFile(filepath.Join(m.dir, "operators_own"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	m.want(0, "2 secrets in ", "status")
	answers(map[string]string{"env_s3": "A=1"})
	m.want(0, "0 secrets written, 1 unchanged, 1 removed", "boot")
	m.holds(map[string]string{"env_s3": "A=1", "operators_own": "x"})
	m.want(0, "1 secrets in ", "status")
	answers(nil)
	m.want(0, "0 secrets written, 0 unchanged, 1 removed", "boot")
	m.holds(map[string]string{"operators_own": "x"})
	m.want(0, "0 secrets in ", "status")

	answers(map[string]string{"env_s3": "A=1"})
	m.want(0, "1 secrets written", "boot")
	if err := os.Remove(filepath.Join(m.dir, "env_s3")); err != nil {
		t.Fatal(err)
	}
	m.want(0, "0 secrets in "+m.dir+" and 1 missing", "status")
}

// Nothing that might be somebody else's answer empties the directory.
func TestNoForeignAnswerRemovesSecrets(t *testing.T) {
	good := serving(sealed(t, map[string]string{"env_s3": "A=1"}))
	for name, c := range passing {
		var asked atomic.Bool
		m := newMachine(t, stub(t, func(w http.ResponseWriter, r *http.Request) {
			if asked.CompareAndSwap(false, true) {
				good(w, r)
				return
			}
			c.h(w, r)
		}))
		m.want(0, "1 secrets written", "secrets")
		if code, _ := m.run("secrets", "--wait", "0s"); code == 0 {
			t.Errorf("%s was taken for an answer", name)
		}
		m.holds(map[string]string{"env_s3": "A=1"})
	}
}

// withEnvironment runs a command with nothing but variables.
func (m *machine) withEnvironment(command string, variables ...string) (int, string) {
	cmd := m.command("acme", command)
	cmd.Args = cmd.Args[:2]
	cmd.Env = append(cmd.Env, variables...)
	out, err := cmd.CombinedOutput()
	return exitCode(err), string(out)
}

func (m *machine) variables() []string {
	return []string{
		"ORGKEYS_NODE_SERVER=" + m.server, "ORGKEYS_NODE_ORG=acme", "ORGKEYS_NODE_IP=192.0.2.7", "ORGKEYS_NODE_REGION=eu",
		"ORGKEYS_NODE_KEY_FILE=" + m.key, "ORGKEYS_NODE_DIR=" + m.dir,
	}
}

// Every flag is a variable that has an effect, and what is no variable is refused.
func TestVariablesAreSettings(t *testing.T) {
	m := newMachine(t, stub(t, serving([]byte("{}"))))
	if code, out := m.withEnvironment("boot", append(m.variables(), "ORGKEYS_NODE_JSON=true")...); code != 0 || !strings.HasPrefix(out, `{"command":"boot"`) {
		t.Errorf("exit code %d, printed %s", code, out)
	}
	dead := newMachine(t, "http://127.0.0.1:1")
	started := time.Now()
	if code, out := dead.withEnvironment("boot", append(dead.variables(), "ORGKEYS_NODE_WAIT=1s")...); code != 69 || time.Since(started) > 30*time.Second {
		t.Errorf("exit code %d after %s, printed %s", code, time.Since(started), out)
	}
	for variable, text := range map[string]string{
		"ORGKEYS_NODE_CAFILE=/x":  "did you mean ORGKEYS_NODE_CA_FILE?",
		"ORGKEYS_NODE_WAITT=1s":   "did you mean ORGKEYS_NODE_WAIT?",
		"ORGKEYS_NODE_SERVERS=x":  "did you mean ORGKEYS_NODE_SERVER?",
		"ORGKEYS_NODE_tls_cert=x": "did you mean ORGKEYS_NODE_TLS_CERT?",
		"ORGKEYS_NODE_=x":         "is no setting",
		"ORGKEYS_NODE_WAIT=soon":  `ORGKEYS_NODE_WAIT is "soon"`,
		"ORGKEYS_NODE_WAIT=-1s":   "want a duration",
		"ORGKEYS_NODE_WAIT=":      "want a duration",
		"ORGKEYS_NODE_JSON=maybe": "ORGKEYS_NODE_JSON",
	} {
		if code, out := m.withEnvironment("boot", append(m.variables(), variable)...); code != 64 || !strings.Contains(out, text) {
			t.Errorf("%s: exit code %d, printed %s", variable, code, out)
		}
	}
	// Kubernetes tells every pod of a Service called orgkeys-node.
	of := []string{"SERVICE_HOST=10.0.0.1", "SERVICE_PORT=443", "SERVICE_PORT_HTTPS=443", "PORT=tcp://10.0.0.1:443", "PORT_443_TCP=tcp://10.0.0.1:443",
		"PORT_443_TCP_PROTO=tcp", "PORT_443_TCP_PORT=443", "PORT_443_TCP_ADDR=10.0.0.1", "METRICS_SERVICE_HOST=10.0.0.2", "METRICS_PORT=tcp://10.0.0.2:1"}
	injected := m.variables()
	for _, v := range of {
		injected = append(injected, "ORGKEYS_NODE_"+v)
	}
	if code, out := m.withEnvironment("boot", injected...); code != 0 {
		t.Errorf("exit code %d, printed %s", code, out)
	}
}

// The settings file gives what neither flags nor environment do.
func TestSettingsFile(t *testing.T) {
	m := newMachine(t, stub(t, serving([]byte("{}"))))
	file := filepath.Join(t.TempDir(), "env")
	write := func(lines ...string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(strings.Join(lines, "\n")+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write(append(m.variables(), "# a comment", "; another", "", `ORGKEYS_NODE_STATUS="on # line"`, "HTTPS_PROXY=http://127.0.0.1:1")...)
	if code, out := m.withEnvironment("boot", "ORGKEYS_NODE_CONFIG="+file); code != 0 {
		t.Errorf("exit code %d, printed %s", code, out)
	}
	if code, out := m.withEnvironment("boot", "ORGKEYS_NODE_CONFIG="+file, "ORGKEYS_NODE_ORG=a|b"); code != 64 || !strings.Contains(out, `"a|b"`) {
		t.Errorf("the file won over the environment: exit code %d, printed %s", code, out)
	}
	for line, text := range map[string]string{"ORGKEYS_NODE_CAFILE=x": "did you mean ORGKEYS_NODE_CA_FILE?", "nonsense": "line 7: not NAME=VALUE"} {
		write(append(m.variables(), line)...)
		if code, out := m.withEnvironment("boot", "ORGKEYS_NODE_CONFIG="+file); code != 64 || !strings.Contains(out, text) {
			t.Errorf("%s: exit code %d, printed %s", line, code, out)
		}
	}
	if code, out := m.withEnvironment("boot", "ORGKEYS_NODE_CONFIG="+file+".not", "ORGKEYS_NODE_WAIT=1s"); code != 78 || !strings.Contains(out, "waiting: settings file") {
		t.Errorf("exit code %d, printed %s", code, out)
	}
}

// A settings file comes late, by pieces, or for root alone, as keys do.
func TestTheSettingsFileIsWaitedFor(t *testing.T) {
	for name, c := range map[string]struct {
		first  string // of the file: the rest comes later
		mode   os.FileMode
		moving bool // it is being written
		waited string
	}{
		"empty":             {"", 0o644, false, "it is empty"},
		"half a line":       {"ORGKEYS_NODE_SERVER=http://127.0.0", 0o644, true, "may not be whole yet"},
		"half the settings": {"ORGKEYS_NODE_IP=192.0.2.7\n", 0o644, true, "may not be whole yet"},
		"for root alone":    {"ORGKEYS_NODE_IP=192.0.2.7\n", 0, false, "permission denied"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, stub(t, serving([]byte("{}"))))
			file := filepath.Join(t.TempDir(), "env")
			old := time.Now().Add(-time.Hour)
			if err := errors.Join(os.WriteFile(file, []byte(c.first), 0o600), os.Chmod(file, c.mode), os.Chtimes(file, old, old)); err != nil {
				t.Fatal(err)
			}
			said, err := os.Create(filepath.Join(t.TempDir(), "said"))
			if err != nil {
				t.Fatal(err)
			}
			defer said.Close()
			cmd := m.command("acme", "boot")
			cmd.Args, cmd.Stdout, cmd.Stderr = cmd.Args[:2], said, said
			cmd.Env = append(cmd.Env, "ORGKEYS_NODE_CONFIG="+file, "ORGKEYS_NODE_WAIT=2m")
			asNobody(t, cmd, c.mode == 0, m.key, m.dir, file)
			write := func(text string) bool {
				if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
					t.Error(err)
				}
				return true
			}
			if c.moving {
				write(c.first)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			harness.Eventually(t, harness.Patience, "it says what it waits for", func() bool {
				return (!c.moving || write(c.first)) && strings.Contains(read(t, said.Name()), c.waited)
			})
			if err := os.Chmod(file, 0o644); err != nil {
				t.Error(err)
			}
			write(strings.Join(m.variables(), "\n") + "\n")
			if code := exitCode(cmd.Wait()); code != 0 {
				t.Errorf("exit code %d, printed %s", code, read(t, said.Name()))
			}
		})
	}
}

// Under systemd the file's variables are in the environment already, read as root.
func TestASettingsFileForRootAloneIsNotNeededTwice(t *testing.T) {
	m := newMachine(t, stub(t, serving([]byte("{}"))))
	file := filepath.Join(t.TempDir(), "env")
	if err := os.WriteFile(file, []byte(strings.Join(m.variables(), "\n")+"\n"), 0); err != nil {
		t.Fatal(err)
	}
	cmd := m.command("acme", "boot")
	cmd.Args = cmd.Args[:2]
	cmd.Env = append(append(cmd.Env, m.variables()...), "ORGKEYS_NODE_CONFIG="+file, "ORGKEYS_NODE_WAIT=1s")
	asNobody(t, cmd, true, m.key, m.dir, file)
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "cannot be read by user") {
		t.Errorf("%v, printed %s", err, out)
	}
}

// asNobody has a command run as another user than root, whom no mode stops. Key and
// directory are made that user's, and the file's directory one that it may enter.
func asNobody(t *testing.T, cmd *exec.Cmd, do bool, key, dir, file string) {
	t.Helper()
	if !do || os.Geteuid() != 0 {
		return
	}
	const nobody = 65534
	if err := errors.Join(os.MkdirAll(dir, 0o700), os.Chown(dir, nobody, nobody), os.Chown(key, nobody, nobody)); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{dir, key, file, binary} {
		for up := filepath.Dir(p); up != "/" && up != os.TempDir(); up = filepath.Dir(up) {
			if err := os.Chmod(up, 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
}

func TestVersion(t *testing.T) {
	m := newMachine(t, "")
	for _, args := range [][]string{{"version"}, {"--version"}} {
		cmd := m.command("acme", "")
		cmd.Args = append(cmd.Args[:1], args...)
		if out, err := cmd.CombinedOutput(); err != nil || !strings.HasPrefix(string(out), "orgkeys-node ") || !strings.Contains(string(out), " go1.") {
			t.Errorf("%q: %v, printed %s", args, err, out)
		}
	}
}
