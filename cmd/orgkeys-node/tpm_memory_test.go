package main_test

import (
	"bufio"
	"bytes"
	"crypto/rsa"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/tpm/tpmtest"
	"github.com/orgkeys/orgkeys/internal/tpmdevice"
)

// The memory of a node whose key is in a TPM has no factor of that key's modulus,
// after it signed and opened with it. That of a node with its key in a file has.
func TestPromise11_NoPrivateKeyIsInTheMemoryOfANodeWithATPM(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	s.PutSecret(t, org, "env_s3", []byte("A=1"))
	device := tpmtest.Start(t)
	for _, c := range []struct {
		ip   string
		more []string
		want bool
	}{
		{"192.0.2.61", nil, true},
		{"192.0.2.62", []string{"--tpm", device.Socket}, false},
	} {
		e := newEnrolling(t, s.API, mint(t, s, org, `{"origin":"node"}`).Token)
		if c.more != nil {
			allow(t, s, org, ekOf(t, device))
		}
		flags := append([]string{"--origin", "node", "--ip", c.ip}, c.more...)
		e.run(0, "registered", "boot", flags...)
		text, err := os.ReadFile(e.key)
		if err != nil {
			t.Fatal(err)
		}
		var public *rsa.PublicKey
		if key, err := client.ParsePrivateKey(text); err == nil {
			public = key.Public().(*rsa.PublicKey)
		} else if key, err := (tpmdevice.Device{Path: device.Socket}).Parse(text); err == nil {
			public = key.Public().(*rsa.PublicKey)
		} else {
			t.Fatal(err)
		}
		// It has signed a request whose answer does not come.
		asked := make(chan struct{}, 1)
		stuck := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			select {
			case asked <- struct{}{}:
			default:
			}
			<-r.Context().Done()
		}))
		t.Cleanup(stuck.Close)
		e.server = stuck.URL
		if err := os.Remove(filepath.Join(e.dir, "env_s3")); err != nil {
			t.Fatal(err)
		}
		cmd := e.command("register", flags[2:]...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-asked:
		case <-time.After(2 * time.Minute):
			t.Error("the node asks nothing")
		}
		found := hasFactor(t, cmd.Process.Pid, public)
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed
		if found != c.want {
			t.Errorf("%q: a factor of the key's modulus is in the node's memory: %t", flags, found)
		}
	}
}

// hasFactor reports whether a process's memory has a prime factor of the modulus, as
// big-endian bytes or as math/big's words, at any multiple of 8 bytes.
func hasFactor(t *testing.T, pid int, key *rsa.PublicKey) bool {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	size := key.Size() / 2
	looked := 0
	x, rest := new(big.Int), new(big.Int)
	lines := bufio.NewScanner(bytes.NewReader(maps))
	for lines.Scan() {
		var from, to int64
		var mode string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s", &from, &to, &mode); err != nil || !strings.HasPrefix(mode, "rw") {
			continue
		}
		region := make([]byte, to-from)
		n, _ := mem.ReadAt(region, from) // what cannot be read is not the program's
		region = region[:n]
		zero := make([]byte, size)
		for i := 0; i+size <= len(region); i += 8 {
			window := region[i : i+size]
			if bytes.Equal(window[:16], zero[:16]) {
				continue
			}
			looked++
			for _, candidate := range [][]byte{window, reversed(window)} {
				if candidate[0] < 0x80 || candidate[size-1]&1 == 0 {
					continue
				}
				if rest.Mod(key.N, x.SetBytes(candidate)); rest.Sign() == 0 {
					return true
				}
			}
		}
	}
	if looked == 0 {
		t.Error("no memory was looked at")
	}
	return false
}

func reversed(b []byte) []byte {
	r := slices.Clone(b)
	slices.Reverse(r)
	return r
}
