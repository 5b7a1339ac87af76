package packaging

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/freeport"
	"github.com/orgkeys/orgkeys/internal/vault/vaulttest"
)

// patience bounds every wait for something that should take a second.
const patience = 60 * time.Second

func eventually(t *testing.T, what string, ok func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if err = ok(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}

// freePort returns a port that is free, and so are those that scripts/run takes
// beside it: the next one, and a thousand above both.
func freePort(t *testing.T) string {
	t.Helper()
	port, err := freeport.Find(1, 1000, 1001)
	if err != nil {
		t.Fatal(err)
	}
	return strconv.Itoa(port)
}

// background runs a server until the test ends, or until the function that it
// returns is called.
func background(t *testing.T, cmd *exec.Cmd) (stop func()) {
	t.Helper()
	var log strings.Builder
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.SysProcAttr = dieWithTest()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cmd.Process.Signal(os.Interrupt)
		guard := time.AfterFunc(patience, func() { cmd.Process.Kill() })
		cmd.Wait()
		guard.Stop()
		if t.Failed() {
			t.Logf("%s:\n%s", cmd.Path, log.String())
		}
	}
	t.Cleanup(stop)
	return stop
}

// TestComposeRedis runs the composition's Redis: whoever reaches it may ping,
// and the service may do what its lock needs, on its own keys.
func TestComposeRedis(t *testing.T) {
	d, port := deploy(t), freePort(t)
	var args []string
	for _, a := range d.Services["redis"].Command[1:] {
		args = append(args, replaceWhole(d.onHost(a), map[string]string{"6379": port, "/data": filepath.Join(d.dir, "redis")}))
	}
	background(t, exec.Command(d.Services["redis"].Command[0], args...))

	password, err := os.ReadFile(filepath.Join(d.dir, "secrets/redis-password"))
	if err != nil {
		t.Fatal(err)
	}
	ask := func(user string, command ...string) string {
		cli := exec.Command("redis-cli", append([]string{"--tls", "--cacert", d.Secrets["ca_cert"].File, "-h", "127.0.0.1", "-p", port}, command...)...)
		if user != "" {
			cli.Args = append(cli.Args[:1:1], append([]string{"--user", user, "--no-auth-warning"}, cli.Args[1:]...)...)
			cli.Env = append(os.Environ(), "REDISCLI_AUTH="+strings.TrimSpace(string(password)))
		}
		out, _ := cli.CombinedOutput() // a refusal is an answer here
		return strings.TrimSpace(string(out))
	}
	eventually(t, "Redis", func() error {
		if out := ask("", "ping"); out != "PONG" {
			return errors.New(out)
		}
		return nil
	})
	const key = "orgkeys:quota:{acme}"
	for _, c := range []struct{ name, user, answer, command string }{
		{"a stranger may not read", "", "NOPERM", "get " + key},
		{"the service takes a lock", "orgkeys", "OK", "set " + key + " token NX PX 5000"},
		{"the service finds it taken", "orgkeys", "", "set " + key + " token NX PX 5000"},
		{"the service gives it back by script", "orgkeys", "1", "eval return(redis.call('DEL',KEYS[1])) 1 " + key},
		{"the service may not touch other keys", "orgkeys", "NOPERM", "set else token NX PX 5000"},
		{"the service may not flush", "orgkeys", "NOPERM", "flushall"},
		{"the service may not reconfigure", "orgkeys", "NOPERM", "config get *"},
	} {
		if got := ask(c.user, strings.Fields(c.command)...); !strings.HasPrefix(got, c.answer) || c.answer == "" && got != "" {
			t.Errorf("%s: %s answered %q, want %q", c.name, c.command, got, c.answer)
		}
	}
}

func replaceWhole(s string, replacements map[string]string) string {
	if r, ok := replacements[s]; ok {
		return r
	}
	return s
}

// TestComposeVault runs the composition's Vault and its set-up step: twice,
// since a Vault that was restarted is sealed.
func TestComposeVault(t *testing.T) {
	d, port := deploy(t), freePort(t)
	binary, err := vaulttest.Binary()
	if err != nil {
		t.Fatal(err)
	}
	work := t.TempDir()
	if err := os.Symlink(binary, filepath.Join(work, "vault")); err != nil {
		t.Fatal(err)
	}
	hcl := strings.NewReplacer("/vault/file", filepath.Join(d.dir, "vault"), "0.0.0.0:8200", "127.0.0.1:"+port).
		Replace(d.onHost(read(t, "scripts/compose.d/vault.hcl")))
	write(t, filepath.Join(work, "server.hcl"), hcl, 0o600)

	setup, err := filepath.Abs(filepath.Join(root, "vault/setup"))
	if err != nil {
		t.Fatal(err)
	}
	step := strings.NewReplacer("/opt/orgkeys/vault/setup", setup, "/var/lib/vault-keys", filepath.Join(d.dir, "vault-keys"),
		"/vault/logs", filepath.Join(d.dir, "vault-logs")).Replace(d.onHost(read(t, "scripts/compose.d/vault-setup")))
	write(t, filepath.Join(work, "vault-setup"), step, 0o700)
	env := append(os.Environ(), "PATH="+work+":"+os.Getenv("PATH"), "HOME="+work,
		"VAULT_ADDR=https://127.0.0.1:"+port, "VAULT_CACERT="+d.Secrets["ca_cert"].File)

	keys, storage := filepath.Join(d.dir, "vault-keys/init.json"), filepath.Join(d.dir, "vault")
	move := func(from, to string) func() {
		return func() {
			if err := os.Rename(from, to); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, state := range []struct {
		name    string
		become  func()
		refused string
	}{
		{"new", func() {}, ""},
		{"restarted", func() {}, ""},
		{"interrupted before it named the keys", move(keys, keys+".new"), ""},
		{"without the keys", move(keys, keys+".away"), "Put init.json"},
		{"empty beside keys", func() { move(keys+".away", keys)(); move(storage, storage+".away")() }, "This Vault is empty"},
		{"put back", func() {
			if err := os.RemoveAll(storage); err != nil {
				t.Fatal(err)
			}
			move(storage+".away", storage)()
		}, ""},
	} {
		state.become()
		stop := background(t, exec.Command(binary, "server", "-config="+filepath.Join(work, "server.hcl")))
		eventually(t, "a Vault that is "+state.name, func() error {
			if code := exitCode(t.Context(), env, "vault", "status"); code != 2 {
				return errors.New("it does not say that it is sealed")
			}
			return nil
		})
		cmd := exec.CommandContext(t.Context(), filepath.Join(work, "vault-setup"))
		cmd.Env = env
		out, err := cmd.CombinedOutput()
		switch {
		case state.refused != "" && (err == nil || !strings.Contains(string(out), state.refused)):
			t.Errorf("a Vault that is %s: %v\n%s", state.name, err, out)
		case state.refused == "" && err != nil:
			t.Fatalf("setting up a Vault that is %s: %v\n%s", state.name, err, out)
		case state.refused == "" && exitCode(t.Context(), env, "vault", "status") != 0:
			t.Errorf("after the set-up step a Vault that is %s is still sealed", state.name)
		}
		stop()
	}
	for _, name := range []string{"approle/role_id", "approle/secret_id", "vault-keys/init.json", "vault-logs/audit.log"} {
		info, err := os.Stat(filepath.Join(d.dir, name))
		if err != nil || info.Size() == 0 || info.Mode().Perm() != 0o600 {
			t.Errorf("%s is missing, empty or not private (error: %v)", name, err)
		}
	}
	var init struct {
		Root string `json:"root_token"`
	}
	b, err := os.ReadFile(filepath.Join(d.dir, "vault-keys/init.json"))
	if err != nil || json.Unmarshal(b, &init) != nil || init.Root == "" {
		t.Errorf("init.json holds no root token (error: %v)", err)
	}
}

func exitCode(ctx context.Context, env []string, name string, args ...string) int {
	cmd := exec.CommandContext(ctx, "env", append([]string{name}, args...)...) // finds name in env's PATH
	cmd.Env = env
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		return -1
	}
	return cmd.ProcessState.ExitCode()
}

func write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}
