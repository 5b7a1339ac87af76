// Package tpmtest runs a real TPM 2.0 implementation, swtpm, for tests.
package tpmtest

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// TPM is a running swtpm with a state of its own.
type TPM struct {
	Socket string // its Unix socket
	state  string
	cmd    *exec.Cmd
}

// Start starts a TPM that ends with the test.
func Start(t testing.TB) *TPM {
	t.Helper()
	return start(t, t.TempDir())
}

func start(t testing.TB, state string) *TPM {
	t.Helper()
	dir, err := os.MkdirTemp("", "tpm") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	p := &TPM{Socket: filepath.Join(dir, "s"), state: state}
	p.run(t)
	t.Cleanup(func() {
		p.Stop(t)
		_ = os.RemoveAll(dir)
	})
	return p
}

func (p *TPM) run(t testing.TB) {
	t.Helper()
	_ = os.Remove(p.Socket)
	p.cmd = exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+p.state, "--flags", "not-need-init,startup-clear",
		"--server", "type=unixio,path="+p.Socket)
	if err := p.cmd.Start(); err != nil {
		t.Fatalf("swtpm is needed (Debian: swtpm): %v", err)
	}
	for until := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		c, err := net.Dial("unix", p.Socket)
		if err == nil {
			_ = c.Close()
			return
		}
		if time.Now().After(until) {
			t.Fatalf("swtpm does not get ready: %v", err)
		}
	}
}

// Stop takes the power away.
func (p *TPM) Stop(t testing.TB) {
	t.Helper()
	if p.cmd == nil {
		return
	}
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait() // killed
	p.cmd = nil
}

// Restart takes the power away and gives it back.
func (p *TPM) Restart(t testing.TB) {
	t.Helper()
	p.Stop(t)
	p.run(t)
}

// Do calls do with the TPM itself.
func (p *TPM) Do(t testing.TB, do func(transport.TPM)) {
	t.Helper()
	c, err := net.Dial("unix", p.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	do(transport.FromReadWriter(c))
}

// Clear is TPM2_Clear: keys of its owner are gone, and the endorsement key stays.
func (p *TPM) Clear(t testing.TB) {
	t.Helper()
	p.Do(t, func(tpm transport.TPM) {
		if _, err := (tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(nil)}}).Execute(tpm); err != nil {
			t.Fatal(err)
		}
	})
}
