package harness

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// Interference is strace acting on the system calls that a server makes on one
// file. The shipped program holds no code for injecting faults.
type Interference struct {
	cmd *exec.Cmd
	pid int
	log string
}

// Interfere makes every one of the system calls that the server makes on the
// file behave as what says, in the words of strace's inject option
// (delay_enter=MICROSECONDS, error=ENOSPC), until Stop.
func (s *Server) Interfere(t testing.TB, file string, calls []string, what string) *Interference {
	t.Helper()
	list := strings.Join(calls, ",")
	i := &Interference{pid: s.PID(), log: filepath.Join(t.TempDir(), "strace")}
	i.cmd = privileged("strace", "-f", "-ttt", "-T", "-o", i.log, "-P", file,
		"-e", "trace="+list, "-e", "inject="+list+":"+what, "-p", strconv.Itoa(i.pid))
	var errors Output
	i.cmd.Stderr = &errors
	if err := i.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { i.Stop(t) })
	// Work in the background may make the call at once, and what says may be to kill.
	Eventually(t, Patience, fmt.Sprintf("strace is attached (%s)", errors.From(0)), func() bool { return !s.Running() || traced(i.pid) })
	return i
}

// Stop lets the server go on undisturbed and returns what strace saw.
func (i *Interference) Stop(t testing.TB) string {
	t.Helper()
	if i.cmd.ProcessState == nil {
		privileged("kill", "-INT", strconv.Itoa(i.cmd.Process.Pid)).Run()
		i.cmd.Wait()
	}
	b, err := os.ReadFile(i.log)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// traced says whether all threads of a process have a tracer.
func traced(pid int) bool {
	status, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(status) == 0 {
		return false
	}
	for _, path := range status {
		b, err := os.ReadFile(path)
		if err == nil && strings.Contains(string(b), "TracerPid:\t0\n") {
			return false
		}
	}
	return true
}

// SmallDisk mounts a file system of the given size, in bytes, and unmounts it
// at the test's end.
func SmallDisk(t testing.TB, size int) string {
	t.Helper()
	dir := t.TempDir()
	mount := privileged("mount", "-t", "tmpfs", "-o", fmt.Sprintf("size=%d,mode=0700,uid=%d", size, os.Getuid()), "orgkeys-test", dir)
	if out, err := mount.CombinedOutput(); err != nil {
		t.Fatalf("mounting a small disk: %v\n%s", err, out)
	}
	t.Cleanup(func() {
		if out, err := privileged("umount", "-l", dir).CombinedOutput(); err != nil {
			t.Errorf("unmounting the small disk: %v\n%s", err, out)
		}
	})
	return dir
}

// Fill writes a file that takes all the space there is.
func Fill(t testing.TB, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, size := range []int{1 << 16, 1 << 12, 1} {
		block := make([]byte, size)
		for {
			if _, err := f.Write(block); err != nil {
				break
			}
		}
	}
}

// privileged is a command run as root: tracing a process that is not dumpable
// and mounting both need it.
func privileged(name string, args ...string) *exec.Cmd {
	if os.Geteuid() == 0 {
		return exec.Command(name, args...)
	}
	return exec.Command("sudo", append([]string{"-n", name}, args...)...)
}
