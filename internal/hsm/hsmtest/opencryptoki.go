// Package hsmtest runs PKCS#11 modules other than SoftHSM for tests, each with
// its state in a directory of the test's own.
package hsmtest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// Opencryptoki is a slot daemon of opencryptoki with one software token. It
// keeps its state under fixed paths, in shared memory and in semaphores, so it
// runs in namespaces of its own; what uses it is started by Command.
type Opencryptoki struct {
	Module string
	Slot   uint
	daemon *exec.Cmd
}

// OpencryptokiModule finds the module.
func OpencryptokiModule(t testing.TB) string {
	return find(t, "opencryptoki", "/usr/lib/*/opencryptoki/libopencryptoki.so.0", "/usr/lib/*/pkcs11/libopencryptoki.so", "/usr/lib64/opencryptoki/libopencryptoki.so")
}

// find returns the first file that matches.
func find(t testing.TB, pkg string, patterns ...string) string {
	t.Helper()
	for _, pattern := range patterns {
		if found, err := filepath.Glob(pattern); err == nil && len(found) > 0 {
			return found[0]
		}
	}
	t.Fatalf("%s is not installed: looked for %v (scripts/test installs Debian's package)", pkg, patterns)
	return ""
}

// setUp runs in the new namespaces. The daemon wants a group called pkcs11; in
// a user namespace only root's is there to be given that name. It ends, in order,
// when a program is killed to which it writes, and is started again.
const setUp = `set -eu
dir=$1
mkdir -p "$dir"/lib/swtok/TOK_OBJ "$dir"/etc
printf 'version opencryptoki-3.8\nslot 3\n{\nstdll = libpkcs11_sw.so\n}\n' >"$dir/etc/opencryptoki.conf"
{ grep -v '^pkcs11:' /etc/group || true; echo pkcs11:x:0:root; } >"$dir/group"
mount --bind "$dir/group" /etc/group
mount --bind "$dir/etc" /etc/opencryptoki
mount --bind "$dir/lib" /var/lib/opencryptoki
mount -t tmpfs -o mode=0755 run /run
mount -t tmpfs -o mode=1777 shm /dev/shm
mkdir -p /run/lock/opencryptoki/swtok
while :; do pkcsslotd -f || echo "pkcsslotd ends with $?"; sleep 0.1; done
`

// StartOpencryptoki starts the daemon with its state in dir, until the test ends.
func StartOpencryptoki(t testing.TB, dir string) *Opencryptoki {
	t.Helper()
	o := &Opencryptoki{Module: OpencryptokiModule(t), Slot: 3}
	args := []string{"--mount", "--ipc"}
	if os.Geteuid() != 0 {
		args = append(args, "--map-root-user")
	}
	o.daemon = exec.Command("unshare", append(args, "sh", "-c", setUp, "sh", dir)...)
	o.daemon.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	var out bytes.Buffer
	o.daemon.Stdout, o.daemon.Stderr = &out, &out
	o.daemon.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // the shell and the daemon
	if err := o.daemon.Start(); err != nil {
		t.Fatalf("starting opencryptoki's daemon: %v", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- o.daemon.Wait() }()
	t.Cleanup(func() {
		_ = syscall.Kill(-o.daemon.Process.Pid, syscall.SIGKILL)
		<-ended
		if t.Failed() {
			t.Logf("opencryptoki's daemon said\n%s", out.Bytes())
		}
	})
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if o.Command(t.Context(), "test", "-S", "/run/pkcsslotd.socket").Run() == nil {
			return o
		}
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("opencryptoki's daemon: %v\n%s", err, out.Bytes())
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("opencryptoki's daemon does not get ready\n%s", out.Bytes())
		}
	}
}

// Within starts a program where the token is: the program and its arguments
// come after it.
func (o *Opencryptoki) Within() []string {
	enter := []string{"nsenter", "--target", strconv.Itoa(o.daemon.Process.Pid), "--mount", "--ipc", "--wdns=/"}
	if os.Geteuid() != 0 {
		enter = append(enter, "--user", "--preserve-credentials")
	}
	return append(enter, "--")
}

// Command is a program that runs where the token is.
func (o *Opencryptoki) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	all := append(append(o.Within(), name), args...)
	return exec.CommandContext(ctx, all[0], all[1:]...)
}

// InitToken makes the token anew, empty, with label and PIN.
func (o *Opencryptoki) InitToken(t testing.TB, label, pin string) {
	t.Helper()
	const so = "87654321"
	slot := fmt.Sprint(o.Slot)
	for _, args := range [][]string{
		{"--slot", slot, "--init-token", "--label", label, "--so-pin", so},
		{"--slot", slot, "--login", "--login-type", "so", "--so-pin", so, "--init-pin", "--pin", pin},
	} {
		out, err := o.Command(t.Context(), "pkcs11-tool", append([]string{"--module", o.Module}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("initializing the token: %v\n%s", err, out)
		}
	}
}
