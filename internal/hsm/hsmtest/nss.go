package hsmtest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// NSS's softoken has its state in a directory, which it is told in what is
// passed to C_Initialize. Its token is called label.
func NSS(t testing.TB, label, pin string) (module, initArgs string) {
	t.Helper()
	dir := t.TempDir()
	pinFile := filepath.Join(dir, "new-pin")
	if err := os.WriteFile(pinFile, []byte(pin+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("certutil", "-N", "-d", "sql:"+dir, "-f", pinFile).CombinedOutput(); err != nil {
		t.Fatalf("making NSS's database: %v\n%s", err, out)
	}
	if err := os.Remove(pinFile); err != nil {
		t.Fatal(err)
	}
	module = find(t, "libnss3", "/usr/lib/*/libsoftokn3.so", "/usr/lib/*/nss/libsoftokn3.so", "/usr/lib64/libsoftokn3.so")
	return module, fmt.Sprintf("configdir='sql:%s' certPrefix='' keyPrefix='' secmod='secmod.db' dbTokenDescription='%s' flags=", dir, label)
}

// modulesDir is where p11-kit looks for what modules there are.
const modulesDir = "/usr/share/p11-kit/modules"

// WithinProxy starts a program where p11-kit's modules are those of a directory:
// the program and its arguments come after it.
func WithinProxy(dir string) []string {
	enter := []string{"unshare", "--mount"}
	if os.Geteuid() != 0 {
		enter = append(enter, "--map-root-user")
	}
	const script = `mount --bind "$1" ` + modulesDir + ` && shift && exec "$@"`
	return append(enter, "sh", "-c", script, "sh", dir)
}

// ProxyCommand is a program that runs where Proxy may say which modules there are.
func ProxyCommand(t testing.TB, name string, args ...string) *exec.Cmd {
	t.Helper()
	all := append(append(WithinProxy(t.TempDir()), name), args...)
	return exec.CommandContext(t.Context(), all[0], all[1:]...)
}

// Proxy returns p11-kit's proxy module, and has it lead to module alone.
func Proxy(t testing.TB, module, initArgs string) string {
	t.Helper()
	return ProxyIn(t, modulesDir, module, initArgs)
}

// ProxyIn is Proxy for programs that WithinProxy starts with that directory.
func ProxyIn(t testing.TB, dir, module, initArgs string) string {
	t.Helper()
	text := "module: " + module + "\nx-init-reserved: " + initArgs + "\n"
	if err := os.WriteFile(filepath.Join(dir, "only.module"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return find(t, "p11-kit", "/usr/lib/*/p11-kit-proxy.so", "/usr/lib64/p11-kit-proxy.so")
}
