package packaging

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/freeport"
	"golang.org/x/sys/unix"
)

// Whoever closes the terminal that scripts/run runs in has ended it, in an orderly
// way, and one interrupt typed there is one signal to the server.
func TestRunEndsWithItsTerminal(t *testing.T) {
	// A signal that was ignored when the tests were started, as by nohup, would be ignored by
	// what they start too; one that is handled is not.
	handled := make(chan os.Signal, 1)
	signal.Notify(handled, syscall.SIGHUP, syscall.SIGINT)
	t.Cleanup(func() { signal.Stop(handled) })
	run := shapes[:1]
	if long() {
		run = shapes
	}
	for _, shape := range run {
		for name, end := range map[string]func(*os.File) error{
			"closed":      (*os.File).Close,
			"interrupted": func(terminal *os.File) error { _, err := terminal.Write([]byte{3}); return err },
		} {
			t.Run(shape+" "+name, func(t *testing.T) {
				port, err := freeport.Find(1, 1000, 1001, 2440, 3390, 5210)
				if err != nil {
					t.Fatal(err)
				}
				dir := filepath.Join(t.TempDir(), "data")
				terminal, beside := openTerminal(t)
				cmd := exec.Command("scripts/run", map[string][]string{"vault": {"--vault"}, "replicas": {"--replicas", "2"}}[shape]...)
				cmd.Dir, cmd.Env = root, append(os.Environ(), fmt.Sprintf("ORGKEYS_LISTEN=127.0.0.1:%d", port), "ORGKEYS_DATA_DIR="+dir)
				cmd.Stdin, cmd.Stdout, cmd.Stderr = beside, beside, beside
				cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				beside.Close()
				ended := make(chan error, 1)
				go func() { ended <- cmd.Wait() }()
				t.Cleanup(func() { syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
				var shown lockedBuffer
				go io.Copy(&shown, terminal)
				deadline := time.Now().Add(building)
				for !pasteable.MatchString(strings.ReplaceAll(shown.String(), "\r\n", "\n")) {
					if time.Now().After(deadline) || len(ended) > 0 {
						t.Fatalf("it did not become ready:\n%s", shown.String())
					}
					time.Sleep(50 * time.Millisecond)
				}
				if err := end(terminal); err != nil {
					t.Fatal(err)
				}
				select {
				case <-ended:
				case <-time.After(patience):
					t.Errorf("it goes on:\n%s", shown.String())
				}
				nothingRunsBelow(t, dir)
				if left := leftBehind(t, dir); len(left) > 0 {
					t.Errorf("it did not end in an orderly way: %s are left", left)
				}
			})
		}
	}
}

// leftBehind are files that SQLite leaves when its process is killed.
func leftBehind(t *testing.T, dir string) (names []string) {
	t.Helper()
	for _, name := range []string{"orgkeys.db-wal", "orgkeys.db-shm"} {
		if info, err := os.Stat(filepath.Join(dir, name)); err == nil && info.Size() > 0 {
			names = append(names, name)
		}
	}
	return names
}

// openTerminal opens a terminal, from the side of who sits before it and from that
// of what runs in it.
func openTerminal(t *testing.T) (person, program *os.File) {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { person.Close() })
	raw, err := person.SyscallConn() // Fd would have Close wait for a Read
	if err != nil {
		t.Fatal(err)
	}
	var number int
	var unlocked, known error
	if err := raw.Control(func(fd uintptr) {
		unlocked = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0)
		number, known = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
	}); err != nil || unlocked != nil || known != nil {
		t.Fatal(err, unlocked, known)
	}
	program, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	return person, program
}
