package packaging

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/config"
	"github.com/orgkeys/orgkeys/internal/freeport"
)

// lockedBuffer may be read while a process writes to it.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// building is how long scripts/run may take with an empty build cache.
const building = 15 * time.Minute

// running is scripts/run in a process group of its own.
type running struct {
	cmd          *exec.Cmd
	stdout, logs lockedBuffer
	ended        chan struct{}
}

func run(t *testing.T, environ []string, args ...string) *running {
	t.Helper()
	return runIn(t, root, environ, args...)
}

// runIn runs the script of the tree at dir.
func runIn(t *testing.T, dir string, environ []string, args ...string) *running {
	t.Helper()
	r := &running{cmd: exec.Command("scripts/run", args...), ended: make(chan struct{})}
	r.cmd.Dir, r.cmd.Env = dir, environ
	r.cmd.Stdout, r.cmd.Stderr = &r.stdout, &r.logs
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		r.cmd.Wait()
		close(r.ended)
	}()
	t.Cleanup(func() {
		r.stop(t)
		if t.Failed() {
			t.Logf("scripts/run:\n%s%s", r.stdout.String(), r.logs.String())
		}
	})
	return r
}

var pasteable = regexp.MustCompile(`(?s)\n(\(umask 077; .*curl .* exit 1; }\))\n`)

// command waits for the command that scripts/run prints when it is ready.
func (r *running) command(t *testing.T) string {
	t.Helper()
	deadline := time.After(building)
	for {
		if m := pasteable.FindStringSubmatch(r.stdout.String()); m != nil {
			return m[1]
		}
		select {
		case <-r.ended:
			t.Fatal("scripts/run ended before it was ready")
		case <-deadline:
			t.Fatal("scripts/run did not become ready")
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// stop interrupts the process group, as a terminal does, and finds that nothing
// of it is left.
func (r *running) stop(t *testing.T) {
	t.Helper()
	group := -r.cmd.Process.Pid
	if err := syscall.Kill(group, syscall.SIGINT); err != nil && !errors.Is(err, syscall.ESRCH) {
		t.Error(err)
	}
	select {
	case <-r.ended:
	case <-time.After(patience):
		t.Error("scripts/run does not end when it is interrupted")
	}
	eventually(t, "the process group", func() error {
		if err := syscall.Kill(group, 0); !errors.Is(err, syscall.ESRCH) {
			return errors.New("some of its processes are left")
		}
		return nil
	})
}

func TestRunPrintsACommandThatSavesAKey(t *testing.T) {
	address := "127.0.0.1:" + freePort(t)
	environ := append(os.Environ(), "ORGKEYS_LISTEN="+address, "ORGKEYS_DATA_DIR="+filepath.Join(t.TempDir(), "data"))

	first := run(t, environ)
	paste(t, first.command(t))
	first.stop(t)

	second := run(t, environ)
	paste(t, second.command(t))
	token := regexp.MustCompile(`Bearer (\S+)"`).FindStringSubmatch(second.stdout.String())[1]
	if n := countKeys(t, "http://"+address, token); n != 2 {
		t.Errorf("started again, the organization has %d keys, not the 2 that were made", n)
	}
}

// TestRunReplicasShareTheirOrganizations starts two processes on PostgreSQL,
// Redis and Vault, and kills the script the second time, when the data directory
// was moved and the first run had not yet named the file with Vault's keys.
func TestRunReplicasShareTheirOrganizations(t *testing.T) {
	port, dir := freePort(t), filepath.Join(t.TempDir(), "data")
	n, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	environ := append(os.Environ(), "ORGKEYS_LISTEN=127.0.0.1:"+port, "ORGKEYS_DATA_DIR="+dir)

	first := run(t, environ, "--replicas", "2")
	paste(t, first.command(t))
	token := regexp.MustCompile(`Bearer (\S+)"`).FindStringSubmatch(first.stdout.String())[1]
	if got := countKeys(t, fmt.Sprintf("http://127.0.0.1:%d", n+1), token); got != 1 {
		t.Errorf("the second process lists %d keys, not the one that the first made", got)
	}
	inEnvironment(t, dir, n)
	first.stop(t)
	nothingRunsBelow(t, dir)

	before := dir
	dir = filepath.Join(t.TempDir(), "moved")
	if err := os.Rename(before, dir); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, "vault/init.json"), filepath.Join(dir, "vault/init.json.new")); err != nil {
		t.Fatal(err)
	}
	second := run(t, append(os.Environ(), "ORGKEYS_LISTEN=127.0.0.1:"+port, "ORGKEYS_DATA_DIR="+dir), "--replicas", "2")
	second.command(t)
	// What Vault writes before it can be told is there all the same.
	if b, err := os.ReadFile(filepath.Join(before, "vault/audit.log")); err == nil && bytes.Contains(b, []byte("orgkeys-audit/sign/receipt")) {
		t.Error("Vault's audit device still writes events to where the data directory was")
	}
	if got := countKeys(t, "http://127.0.0.1:"+port, token); got != 1 {
		t.Errorf("started again, the organization has %d keys, not the 1 that was made", got)
	}
	if err := second.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	nothingRunsBelow(t, dir)
}

// inEnvironment runs what follows in README.md in a shell that has read the file
// that scripts/run writes: every command meets the running service.
func inEnvironment(t *testing.T, data string, port int) {
	t.Helper()
	cmd := exec.Command("bash", "-c", `set -euo pipefail
		. "$1/env"
		test "$(command -v orgkeys)" = "$2/bin/orgkeys"
		curl -sS --fail-with-body "http://127.0.0.1:$3/organization/demo/key" -H "Authorization: Bearer $(orgkeys token --org demo --role OWNER)"
		sleep 1
		cp "$ORGKEYS_DATA_DIR/audit.jsonl" copy
		orgkeys audit verify --sink copy
		orgkeys doctor
		vault status -format=json`, "bash", data, absolute(t, root), strconv.Itoa(port))
	cmd.Dir = t.TempDir()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("with the environment file: %v\n%s", err, out)
	}
}

func absolute(t *testing.T, path string) string {
	t.Helper()
	path, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// With a file of issuers, tokens are not the script's to print, whatever it starts.
func TestRunServesWithAFileOfIssuers(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	point, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	b64 := base64.RawURLEncoding.EncodeToString
	set := fmt.Sprintf(`{"keys":[{"kty":"EC","crv":"P-256","kid":"k","alg":"ES256","use":"sig","x":%q,"y":%q}]}`, b64(point[1:33]), b64(point[33:]))
	issuers := fmt.Sprintf(`{"issuers":[{"issuer":"https://issuer.example","audiences":["orgkeys"],"organizations":["*"],"jwks":%q}]}`, filepath.Join(dir, "jwks.json"))
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "jwks.json"), []byte(set), 0o600), os.WriteFile(filepath.Join(dir, "issuers.json"), []byte(issuers), 0o600)); err != nil {
		t.Fatal(err)
	}
	address := "127.0.0.1:" + freePort(t)
	r := run(t, append(os.Environ(), "ORGKEYS_LISTEN="+address, "ORGKEYS_DATA_DIR="+filepath.Join(dir, "data"), "ORGKEYS_ISSUERS_FILE="+filepath.Join(dir, "issuers.json")), "--vault")
	deadline := time.Now().Add(building)
	for served := false; !served; time.Sleep(100 * time.Millisecond) {
		select {
		case <-r.ended:
			t.Fatal("scripts/run ended")
		default:
		}
		if time.Now().After(deadline) {
			t.Fatal("nothing serves")
		}
		if resp, err := http.Get("http://" + address + "/readyz"); err == nil {
			resp.Body.Close()
			served = resp.StatusCode == http.StatusOK
		}
	}
	if said := r.logs.String(); strings.Contains(said, "tokens come from") {
		t.Error("it asked for a token that is another issuer's")
	}
}

// The file for other terminals holds no secret: what a setting says to be one is left out.
func TestRunWritesNoSecretDown(t *testing.T) {
	left := regexp.MustCompile(`(?m)^\t\t\t(ORGKEYS_\S+(?: \| \S+)*)\)\n\t\t\t\techo "# \$name was given too`).FindStringSubmatch(read(t, "scripts/run"))
	if left == nil {
		t.Fatal("scripts/run leaves nothing out")
	}
	found := false
	for _, s := range config.Settings() {
		found = found || s.Secret
		if s.Secret && !slices.Contains(strings.Split(left[1], " | "), s.Name) {
			t.Errorf("scripts/run writes %s into a file", s.Name)
		}
	}
	if !found {
		t.Error("no setting is a secret")
	}
}

// What ends by itself is named, and what is left goes on serving, until nothing is.
func TestRunGoesOnWithoutAReplica(t *testing.T) {
	port, err := freeport.Find(1, 1000, 1001, 2440, 3390, 5210)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "data")
	r := run(t, append(os.Environ(), fmt.Sprintf("ORGKEYS_LISTEN=127.0.0.1:%d", port), "ORGKEYS_DATA_DIR="+dir), "--replicas", "2")
	r.command(t)
	token := regexp.MustCompile(`Bearer (\S+)"`).FindStringSubmatch(r.stdout.String())[1]

	kill(t, fmt.Sprintf("ORGKEYS_LISTEN=127.0.0.1:%d\x00", port))
	named := fmt.Sprintf("Process 1, which served on 127.0.0.1:%d, has ended", port)
	eventually(t, "the message", func() error {
		if !strings.Contains(r.logs.String(), named) {
			return errors.New("nothing names the process that was killed")
		}
		return nil
	})
	if got := countKeys(t, fmt.Sprintf("http://127.0.0.1:%d", port+1), token); got != 0 {
		t.Errorf("the other process lists %d keys", got)
	}
	kill(t, fmt.Sprintf("ORGKEYS_LISTEN=127.0.0.1:%d\x00", port+1))
	select {
	case <-r.ended:
	case <-time.After(patience):
		t.Fatal("scripts/run goes on although nothing serves any more")
	}
	if code := r.cmd.ProcessState.ExitCode(); code != 1 {
		t.Errorf("exit code %d", code)
	}
	nothingRunsBelow(t, dir)
}

// kill ends the serving process that has the text in its environment.
func kill(t *testing.T, text string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		process := filepath.Dir(file)
		environ, _ := os.ReadFile(file) // others' processes cannot be read
		name, _ := os.ReadFile(filepath.Join(process, "comm"))
		if !bytes.Contains(environ, []byte(text)) || string(name) != "orgkeys\n" {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(process))
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatalf("no process has %q in its environment", text)
}

// nothingRunsBelow waits until no process has a file or directory below dir in
// its arguments or in its environment.
func nothingRunsBelow(t *testing.T, dir string) {
	t.Helper()
	eventually(t, "the processes of scripts/run", func() error {
		var left []error
		for _, name := range []string{"cmdline", "environ"} {
			files, err := filepath.Glob("/proc/[0-9]*/" + name)
			if err != nil {
				return err
			}
			for _, file := range files {
				// A process that has ended meanwhile has no such file.
				if b, err := os.ReadFile(file); err == nil && bytes.Contains(b, []byte(dir)) {
					left = append(left, fmt.Errorf("%s mentions %s", file, dir))
				}
			}
		}
		return errors.Join(left...)
	})
}

// paste runs a command as a shell does and checks the key that it saves.
func paste(t *testing.T, command string) {
	t.Helper()
	cmd := exec.Command("bash", "-c", command)
	cmd.Dir = t.TempDir()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	saved := filepath.Join(cmd.Dir, "private_key.pem")
	b, err := os.ReadFile(saved)
	if err != nil {
		t.Fatal(err)
	}
	// orgkeys-node takes no other mode.
	if info, err := os.Stat(saved); err != nil || info.Mode() != 0o600 {
		t.Errorf("the key is saved with mode %v, %v", info.Mode(), err)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		t.Fatalf("what was saved is no PEM: %s", b)
	}
	key, err := x509.ParsePKCS1PrivateKey(block.Bytes)
	if err != nil || key.N.BitLen() != 2048 {
		t.Errorf("what was saved is no RSA key of 2048 bits: %v", err)
	}
}

func countKeys(t *testing.T, url, token string) int {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url+"/organization/demo/key", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var list struct{ Data []json.RawMessage }
	if err := json.NewDecoder(resp.Body).Decode(&list); err != nil {
		t.Fatal(err)
	}
	return len(list.Data)
}
