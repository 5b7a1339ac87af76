package harness

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/testca"
)

// Patience bounds every wait for something that should take milliseconds. It
// is long because test machines are small and busy.
const Patience = 30 * time.Second

// Server is a running `orgkeys serve`.
type Server struct {
	Dir   string // the data directory
	API   string // base URL of the public listener
	Admin string // base URL of the admin listener
	HTTP  *http.Client

	within []string // what starts the program, where that is not the test
	binary string
	args   []string
	env    map[string]string
	issuer *Issuer

	mu     sync.Mutex
	cmd    *exec.Cmd
	done   chan struct{} // closed when the process has ended
	out    *Output       // stdout and stderr of all of this server's processes
	tokens map[string]string
}

// Option changes how a server is started.
type Option func(*Server)

// Set sets a setting or another environment variable.
func Set(name, value string) Option { return func(s *Server) { s.env[name] = value } }

// In puts the data directory at dir instead of a fresh one.
func In(dir string) Option { return func(s *Server) { s.Dir = dir } }

// Config gives the server a file of settings besides.
func Config(file string) Option {
	return func(s *Server) { s.args = append(s.args, "--config", file) }
}

// Within starts every process of the server by a command that gets the program and
// its arguments as its own last ones, and becomes the program.
func Within(command ...string) Option { return func(s *Server) { s.within = command } }

// Race runs the build with the race detector.
func Race(t testing.TB) Option {
	path := RaceBinary(t)
	return func(s *Server) { s.binary = path }
}

// Program runs the program at path instead of the present build.
func Program(path string) Option { return func(s *Server) { s.binary = path } }

// TrustedBy makes the server trust the issuer's tokens instead of the
// development issuer's.
func TrustedBy(i *Issuer) Option {
	return func(s *Server) {
		s.issuer = i
		maps.Copy(s.env, i.Settings())
	}
}

// TLS serves with the certificate, and makes the server's client trust its CA.
func TLS(ca *testca.CA, cert testca.Files) Option {
	return func(s *Server) {
		s.env["ORGKEYS_TLS_CERT_FILE"] = cert.Cert
		s.env["ORGKEYS_TLS_KEY_FILE"] = cert.Key
		s.HTTP = httpClient(&tls.Config{RootCAs: ca.Pool()})
	}
}

// Start starts a server and waits until it is ready. The test's end kills it.
func Start(t testing.TB, opts ...Option) *Server {
	t.Helper()
	s := Configure(t, opts...)
	s.Start(t)
	return s
}

// Configure prepares a server without starting it.
func Configure(t testing.TB, opts ...Option) *Server {
	t.Helper()
	s := newServer(Binary(t), filepath.Join(t.TempDir(), "data"), opts...)
	t.Cleanup(func() { s.cleanup(t) })
	return s
}

// newServer has no keys made ahead unless a test, or ORGKEYS_TEST_POOL, sets how many:
// many tests count what is in the back end, and each start would cost four keys.
func newServer(binary, dir string, opts ...Option) *Server {
	s := &Server{
		Dir: dir, binary: binary, args: []string{"serve"}, HTTP: httpClient(nil),
		env: map[string]string{"ORGKEYS_LISTEN": "127.0.0.1:0", "ORGKEYS_POOL": cmp.Or(os.Getenv("ORGKEYS_TEST_POOL"), "0")}, tokens: map[string]string{}, out: &Output{},
	}
	for _, o := range opts {
		o(s)
	}
	return s
}

func httpClient(c *tls.Config) *http.Client {
	return &http.Client{
		Transport:     &http.Transport{TLSClientConfig: c, DisableCompression: true, MaxIdleConnsPerHost: 64, ForceAttemptHTTP2: c != nil},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Timeout:       2 * Patience,
	}
}

// Environment is the environment of the server's processes: nothing of the
// test's own but what any program needs.
func (s *Server) environment() []string {
	env := []string{"PATH=" + os.Getenv("PATH"), "HOME=" + filepath.Dir(s.Dir), "TMPDIR=" + os.TempDir(), "ORGKEYS_DATA_DIR=" + s.Dir}
	for k, v := range s.env {
		env = append(env, k+"="+v)
	}
	return env
}

// Configured changes a setting for the next start; an empty value removes it.
func (s *Server) Configured(name, value string) {
	if value == "" {
		delete(s.env, name)
		return
	}
	s.env[name] = value
}

// Start starts the server's process, again if there was one before, and waits
// until it is ready.
func (s *Server) Start(t testing.TB) {
	t.Helper()
	if err := s.launch(); err != nil {
		t.Fatalf("starting orgkeys: %v\n%s", err, s.Output())
	}
}

// StartFor starts the server's process and kills it after a while, wherever it
// has come by then.
func (s *Server) StartFor(t testing.TB, life time.Duration) {
	t.Helper()
	if err := s.spawn(); err != nil {
		t.Fatalf("starting orgkeys: %v", err)
	}
	select {
	case <-s.done:
		t.Fatalf("orgkeys ended by itself with exit code %d\n%s", s.cmd.ProcessState.ExitCode(), s.Output())
	case <-time.After(life):
		s.Kill()
	}
}

func (s *Server) launch() error {
	from := s.out.Len()
	if err := s.spawn(); err != nil {
		return err
	}
	return s.awaitReady(from)
}

func (s *Server) command(ctx context.Context, args ...string) *exec.Cmd {
	all := append(append(slices.Clone(s.within), s.binary), args...)
	return exec.CommandContext(ctx, all[0], all[1:]...)
}

func (s *Server) spawn() error {
	cmd := s.command(context.Background(), s.args...)
	cmd.Env = s.environment()
	cmd.Stdout, cmd.Stderr = s.out, s.out
	// A group of its own, so that Children can tell what it left behind.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return err
	}
	done := make(chan struct{})
	go func() {
		cmd.Wait()
		close(done)
	}()
	s.mu.Lock()
	s.cmd, s.done = cmd, done
	s.mu.Unlock()
	return nil
}

func (s *Server) awaitReady(from int) error {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	for {
		select {
		case <-s.done:
			return fmt.Errorf("it ended with exit code %d", s.cmd.ProcessState.ExitCode())
		case <-ctx.Done():
			return errors.New("it was not ready in time")
		case <-time.After(5 * time.Millisecond):
		}
		api, admin, ok := listening(s.out.From(from))
		if !ok {
			continue
		}
		scheme := "http://"
		if s.env["ORGKEYS_TLS_CERT_FILE"] != "" {
			scheme = "https://"
		}
		s.API, s.Admin = scheme+api, "http://"+admin
		if s.env["ORGKEYS_TLS_CLIENT_CA_FILE"] != "" {
			return nil // the health check needs the client's certificate, which is the test's matter
		}
		resp, err := s.HTTP.Get(s.API + "/readyz")
		if err != nil {
			continue
		}
		resp.Body.Close()
		if resp.StatusCode == http.StatusOK {
			return nil
		}
	}
}

// listening finds the log line that says where the server listens.
func listening(log []byte) (api, admin string, ok bool) {
	for line := range bytes.Lines(log) {
		var l struct{ Msg, API, Admin string }
		if json.Unmarshal(line, &l) == nil && l.Msg == "listening" {
			return l.API, l.Admin, true
		}
	}
	return "", "", false
}

// PID is the server's process.
func (s *Server) PID() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cmd.Process.Pid
}

// Output is everything the server's processes have written to standard output
// and standard error.
func (s *Server) Output() []byte { return s.out.From(0) }

// Log is the server's output as seen by others of the harness.
func (s *Server) Log() *Output { return s.out }

// Running says whether the process has not ended yet.
func (s *Server) Running() bool {
	select {
	case <-s.done:
		return false
	default:
		return true
	}
}

// Kill ends the process as a power failure would. Any goroutine may call it.
func (s *Server) Kill() {
	s.mu.Lock()
	cmd, done := s.cmd, s.done
	s.mu.Unlock()
	cmd.Process.Kill()
	<-done
}

// Stop asks the process to end and returns its exit code.
func (s *Server) Stop(t testing.TB) int {
	t.Helper()
	s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.done:
	case <-time.After(Patience):
		s.Kill()
		t.Fatalf("orgkeys did not end within %s of SIGTERM\n%s", Patience, s.Output())
	}
	s.HTTP.CloseIdleConnections()
	return s.cmd.ProcessState.ExitCode()
}

// Ended waits until the process has ended by itself.
func (s *Server) Ended(t testing.TB, within time.Duration) int {
	t.Helper()
	select {
	case <-s.done:
	case <-time.After(within):
		t.Fatalf("orgkeys still runs after %s", within)
	}
	return s.cmd.ProcessState.ExitCode()
}

// Children are the processes that live in the server's process group, itself
// left out.
func (s *Server) Children() []int {
	group := s.PID()
	var left []int
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == group {
			continue
		}
		if g, err := syscall.Getpgid(pid); err == nil && g == group {
			left = append(left, pid)
		}
	}
	return left
}

func (s *Server) cleanup(t testing.TB) {
	if s.cmd != nil && s.Running() {
		s.Kill()
	}
	s.HTTP.CloseIdleConnections()
	s.inspect(t)
	if t.Failed() {
		t.Logf("output of orgkeys:\n%s", tail(s.Output(), 8<<10))
	}
}

// inspect fails the test for what no server may ever write.
func (s *Server) inspect(t testing.TB) {
	out := string(s.Output())
	for _, sign := range []string{"DATA RACE", "panic", "fatal error", "SIGSEGV"} {
		if i := strings.Index(out, sign); i >= 0 {
			t.Errorf("orgkeys wrote %q:\n%s", sign, out[max(0, i-200):min(len(out), i+4000)])
		}
	}
}

func tail(b []byte, n int) []byte { return b[max(0, len(b)-n):] }

// Run runs another of the program's commands with the server's settings and
// returns what it wrote to standard output, to standard error, and its exit
// code.
func (s *Server) Run(t testing.TB, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	return s.run(t, nil, args...)
}

// RunWith runs another command of the program with the given standard input.
func (s *Server) RunWith(t testing.TB, stdin string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	return s.runWith(t, stdin, nil, args...)
}

func (s *Server) run(t testing.TB, extra []string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	return s.runWith(t, "", extra, args...)
}

func (s *Server) runWith(t testing.TB, stdin string, extra []string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	var o, e bytes.Buffer
	cmd := s.command(ctx, args...)
	cmd.Env = append(s.environment(), extra...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &o, &e
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
		t.Fatalf("orgkeys %s: %v %v", strings.Join(args, " "), err, ctx.Err())
	}
	return o.String(), e.String(), cmd.ProcessState.ExitCode()
}

// RunUntil is Run of a command that is killed, as by a crash, when ctx ends.
// It reports whether that came before its own end.
func (s *Server) RunUntil(t testing.TB, ctx context.Context, args ...string) (killed bool) {
	t.Helper()
	cmd := s.command(ctx, args...)
	cmd.Env = s.environment()
	err := cmd.Run()
	if err != nil && cmd.ProcessState == nil {
		t.Fatalf("orgkeys %s: %v", strings.Join(args, " "), err)
	}
	return cmd.ProcessState.ExitCode() == -1
}

// Eventually waits until ok reports true, and fails the test if it never does.
func Eventually(t testing.TB, within time.Duration, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(within)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("within %s it did not come about that %s", within, what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// Output collects what a process writes, and may be read meanwhile.
type Output struct {
	mu  sync.Mutex
	buf []byte
}

// Write appends.
func (o *Output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.buf = append(o.buf, b...)
	return len(b), nil
}

// Len is the number of bytes so far.
func (o *Output) Len() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.buf)
}

// From is a copy of the output from an offset on.
func (o *Output) From(offset int) []byte {
	o.mu.Lock()
	defer o.mu.Unlock()
	return bytes.Clone(o.buf[offset:])
}
