// Package systemd boots machines for tests: the real systemd as process 1 of
// private namespaces, with a private root. Only root has machines.
package systemd

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

//go:embed machine.sh
var script string

// Machine is a machine whose process 1 is the real systemd (machine.sh).
type Machine struct {
	t   *testing.T
	dir string // what it is made of
	pid int    // its process 1, seen from here
}

// AsRoot runs the test by another process as root, unless this one is, and
// reports whether it did.
func AsRoot(t *testing.T) bool {
	t.Helper()
	if os.Geteuid() == 0 {
		return false
	}
	cmd := exec.Command("sudo", "-n", "env", "PATH="+os.Getenv("PATH"), "HOME="+os.Getenv("HOME"), "GOFLAGS="+os.Getenv("GOFLAGS"),
		"ORGKEYS_TEST_LONG="+os.Getenv("ORGKEYS_TEST_LONG"), os.Args[0], "-test.v", "-test.run=^"+t.Name()+"$")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return true
}

// User is a system user of a machine, and the only one of its group.
type User struct {
	Name string
	ID   int
}

// New prepares a machine that is switched off, with these users, and with units to
// start when it boots.
func New(t *testing.T, users []User, wants ...string) *Machine {
	t.Helper()
	m := &Machine{t: t, dir: t.TempDir()}
	passwd, group := "root:x:0:0::/root:/bin/sh\n", "root:x:0:\n"
	for _, u := range users {
		passwd += fmt.Sprintf("%s:x:%d:%d::/nonexistent:/usr/sbin/nologin\n", u.Name, u.ID, u.ID)
		group += fmt.Sprintf("%s:x:%d:\n", u.Name, u.ID)
	}
	for path, text := range map[string]string{
		"passwd": passwd, "group": group,
		"machine-id": "0123456789abcdef0123456789abcdef\n",
		"hosts":      "127.0.0.1 localhost\n",
		"systemd/system/machine.target": "[Unit]\nWants=systemd-journald.service systemd-journald.socket systemd-journald-dev-log.socket\n" +
			"Wants=" + strings.Join(wants, " ") + "\n",
	} {
		m.Put(path, text, 0o644, 0)
	}
	return m
}

// Path is a path on the machine, seen from here; only /etc has something before it boots.
func (m *Machine) Path(path string) string {
	if m.pid == 0 {
		return filepath.Join(m.dir, path)
	}
	return fmt.Sprintf("/proc/%d/root%s", m.pid, path)
}

// Put writes a file under /etc, whole or not at all, before the machine boots or while it runs.
func (m *Machine) Put(path, text string, mode fs.FileMode, owner int) {
	m.t.Helper()
	to := m.Path("/etc/" + path)
	if err := errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to+".new", []byte(text), mode), os.Chmod(to+".new", mode),
		os.Chown(to+".new", owner, owner), os.Rename(to+".new", to)); err != nil {
		m.t.Fatal(err)
	}
}

// Remove removes a file under /etc.
func (m *Machine) Remove(path string) {
	m.t.Helper()
	if err := os.Remove(m.Path("/etc/" + path)); err != nil {
		m.t.Fatal(err)
	}
}

// Boot starts the machine, with a program in /usr/local/bin. The test's end takes
// its power away.
func (m *Machine) Boot(program, name string) {
	m.t.Helper()
	if err := errors.Join(os.Mkdir(filepath.Join(m.dir, "root"), 0o755), os.Mkdir(filepath.Join(m.dir, "bin"), 0o755), install(program, filepath.Join(m.dir, "bin", name))); err != nil {
		m.t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child", "--", "bash", "-c", script, "machine.sh", m.dir, controlGroup(m.t))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() {
		var log string
		if m.t.Failed() && m.pid != 0 {
			log, _ = m.Inside("journalctl", "--no-pager", "--output=short-monotonic")
		}
		cmd.Process.Kill() // takes its child along, and that all processes of the machine
		cmd.Wait()
		if m.t.Failed() {
			m.t.Logf("%s\n%s", log, out.String())
		}
	})
	harness.Eventually(m.t, 2*harness.Patience, "systemd answers", func() bool {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", cmd.Process.Pid, cmd.Process.Pid))
		if _, scanErr := fmt.Sscan(string(text), &m.pid); err != nil || scanErr != nil {
			return false
		}
		_, err = m.Inside("systemctl", "show", "--property=Version")
		return err == nil
	})
}

// install links a program, or copies it where it is on another file system.
func install(from, to string) error {
	if err := os.Link(from, to); err == nil || !errors.Is(err, syscall.EXDEV) {
		return err
	}
	text, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, text, 0o755)
}

// controlGroup makes a control group for a machine, and removes it with what
// systemd made in it.
func controlGroup(t *testing.T) string {
	t.Helper()
	parent := "/sys/fs/cgroup"
	if _, err := os.Stat(parent + "/unified"); err == nil { // beside version 1
		parent += "/unified"
	}
	group, err := os.MkdirTemp(parent, "orgkeys-machine-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		var all []string
		filepath.WalkDir(group, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				all = append(all, path)
			}
			return nil
		})
		for _, path := range slices.Backward(all) {
			harness.Eventually(t, harness.Patience, path+" is removed", func() bool { return syscall.Rmdir(path) == nil })
		}
	})
	return group
}

// Inside runs a program on the machine.
func (m *Machine) Inside(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--target", fmt.Sprint(m.pid), "--mount", "--pid", "--ipc", "--cgroup", "--root", "--"}, args...)...)
	cmd.Env = []string{"PATH=/usr/local/bin:/usr/sbin:/usr/bin"}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// Property is a property of a unit.
func (m *Machine) Property(unit, name string) string {
	out, _ := m.Inside("systemctl", "show", "--value", "--property="+name, unit)
	return strings.TrimSpace(out)
}
