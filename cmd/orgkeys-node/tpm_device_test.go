package main_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What is wrong with the device that --tpm names is told apart. How the kernel
// answers when it is opened, strace says in its place.
func TestWhatIsWrongWithTheDeviceOfATPM(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	device := unnamedDevice(t)
	for _, c := range []struct {
		path, kernel string
		code         int
		text         []string
	}{
		{"/nonexistent", "", 78, []string{"there is no TPM at /nonexistent: stat /nonexistent: no such file or directory; check --tpm"}},
		{file, "", 78, []string{file + " is not a TPM 2.0: it is neither a device nor a socket; check --tpm"}},
		{"/dev/null", "", 78, []string{"/dev/null is not a TPM 2.0: it is a device of class mem; check --tpm"}},
		{device, "EACCES", 78, []string{"this user may not open the TPM at " + device + ": open " + device + ": permission denied; ", "tss", "DeviceAllow=" + device}},
		{device, "EPERM", 78, []string{"this user may not open the TPM at " + device + ": open " + device + ": operation not permitted; "}},
		{device, "ENXIO", 78, []string{"there is no TPM at " + device + ": open " + device + ": no such device or address; check --tpm"}},
		{device, "EBUSY", 75, []string{"the TPM at " + device + " is busy: another program has it open; wait until the other program has done, or have both use /dev/tpmrm0, which can be shared"}},
	} {
		args := []string{binary, "ek", "--tpm", c.path}
		if c.kernel != "" {
			args = append([]string{"strace", "-f", "-o", "/dev/null", "-P", c.path, "-e", "trace=openat", "-e", "inject=openat:error=" + c.kernel}, args...)
		}
		out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
		if code := exitCode(err); code != c.code {
			t.Errorf("%s %s: exit code %d, want %d: %s", c.path, c.kernel, code, c.code, out)
		}
		for _, text := range c.text {
			if !strings.Contains(string(out), text) {
				t.Errorf("%s %s: it says %s, want %q", c.path, c.kernel, out, text)
			}
		}
	}
}

// unnamedDevice is a character device of which Linux says no class, as it does of
// terminals.
func unnamedDevice(t *testing.T) string {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = master.Close() })
	raw, err := master.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	number := 0
	if e := raw.Control(func(fd uintptr) { number, err = unix.IoctlGetInt(int(fd), unix.TIOCGPTN) }); e != nil || err != nil {
		t.Fatal(e, err)
	}
	return fmt.Sprintf("/dev/pts/%d", number)
}
