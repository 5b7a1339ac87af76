package hsmtest

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/freeport"
)

// TPM is tpm2-pkcs11 with a software TPM (swtpm), and one token.
func TPM(t testing.TB, label, pin string) (module string, env []string) {
	t.Helper()
	module = find(t, "libtpm2-pkcs11-1", "/usr/lib/*/pkcs11/libtpm2_pkcs11.so", "/usr/lib64/pkcs11/libtpm2_pkcs11.so")
	port, err := freeport.Find(1)
	if err != nil {
		t.Fatal(err)
	}
	control := port + 1
	tpm := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+t.TempDir(), "--flags", "not-need-init,startup-clear",
		"--server", fmt.Sprintf("type=tcp,port=%d,bindaddr=127.0.0.1", port), "--ctrl", fmt.Sprintf("type=tcp,port=%d,bindaddr=127.0.0.1", control))
	start(t, tpm)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", control))
		if err == nil {
			_ = conn.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("swtpm does not get ready: %v", err)
		}
	}
	env = []string{"TPM2_PKCS11_STORE=" + t.TempDir(), fmt.Sprintf("TPM2_PKCS11_TCTI=swtpm:host=127.0.0.1,port=%d", port)}
	const so = "87654321"
	for _, args := range [][]string{
		{"--slot-index", "0", "--init-token", "--label", label, "--so-pin", so},
		{"--token-label", label, "--login", "--login-type", "so", "--so-pin", so, "--init-pin", "--pin", pin},
	} {
		cmd := exec.Command("pkcs11-tool", append([]string{"--module", module}, args...)...)
		cmd.Env = append(os.Environ(), env...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("initializing the token: %v\n%s", err, out)
		}
	}
	return module, env
}

// start runs a program until the test ends.
func start(t testing.TB, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
}

// Remoting is p11-kit's client module, which reaches module through p11-kit's
// server. What it has of mechanisms is what that client passes on.
func Remoting(t testing.TB, module, label string, env ...string) (client string, clientEnv []string) {
	t.Helper()
	client = find(t, "p11-kit-modules", "/usr/lib/*/pkcs11/p11-kit-client.so", "/usr/lib64/pkcs11/p11-kit-client.so")
	socket := filepath.Join(t.TempDir(), "socket")
	server := exec.Command("p11-kit", "server", "--foreground", "--name", socket, "--provider", module, "pkcs11:token="+label)
	server.Env = append(os.Environ(), env...)
	var out strings.Builder
	server.Stdout, server.Stderr = &out, &out
	start(t, server)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			return client, []string{"P11_KIT_SERVER_ADDRESS=unix:path=" + socket}
		}
		if time.Now().After(deadline) {
			t.Fatal("p11-kit server does not get ready")
		}
	}
}
