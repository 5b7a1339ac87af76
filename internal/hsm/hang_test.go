//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// hanging is a token behind testdata/hang.c.
type hanging struct {
	*Token
	file string
}

// openHanging opens a token whose calls hang on demand, with limits that a test
// can wait for.
func openHanging(t *testing.T) hanging {
	t.Helper()
	cfg := softHSM(t)
	dir := t.TempDir()
	h := hanging{file: filepath.Join(dir, "hang")}
	t.Setenv("HANG_FILE", h.file)
	t.Setenv("HANG_MODULE", cfg.Module)
	cfg.Module = filepath.Join(dir, "hang.so")
	if out, err := exec.CommandContext(t.Context(), "cc", "-shared", "-fPIC", "-o", cfg.Module, "testdata/hang.c", "-ldl").CombinedOutput(); err != nil {
		t.Fatalf("cc: %v\n%s", err, out)
	}
	cfg.Generations, cfg.Sealings = 2, 2
	h.Token = open(t, cfg)
	h.limits = limits{answer: 2 * time.Second, generate: 5 * time.Second, held: time.Second, closing: time.Minute, pause: 10 * time.Millisecond}
	for p, limit := range map[*pool]time.Duration{h.life.generate: h.limits.generate, h.life.seal: h.limits.answer} {
		p.limit = limit
	}
	t.Cleanup(func() { h.hang(t) }) // before Close, which waits
	return h
}

// hang lets the calls named hang from now on, and all others return.
func (h hanging) hang(t *testing.T, calls ...string) {
	t.Helper()
	if err := os.WriteFile(h.file+".new", []byte(strings.Join(calls, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(h.file+".new", h.file); err != nil {
		t.Fatal(err)
	}
}

// soon is more than the limits of a test add up to, for all that waits on them.
const soon = 20 * time.Second

// unavailable wants f to report ErrUnavailable soon.
func unavailable(t *testing.T, what string, f func(context.Context) error) {
	t.Helper()
	began := time.Now()
	done := make(chan error, 1)
	go func() { done <- f(context.WithoutCancel(t.Context())) }()
	select {
	case err := <-done:
		if !errors.Is(err, orgkey.ErrUnavailable) {
			t.Errorf("%s: %v after %s, want ErrUnavailable", what, err, time.Since(began))
		}
	case <-time.After(soon):
		t.Errorf("%s: no answer after %s", what, time.Since(began))
	}
}

func (h hanging) recovers(t *testing.T) {
	t.Helper()
	h.hang(t)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		healthy, generated := h.Healthy(bounded(t)), generateOne(bounded(t), h)
		if healthy == nil && generated == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("does not come back: healthy: %v, generating: %v", healthy, generated)
		}
	}
}

// Whatever call hangs: each use of the token is told so in time, also those that
// wait for another; Healthy fails; and all is well again when the call returns.
func TestPromise9_CallThatHangs(t *testing.T) {
	for _, call := range []string{"C_Decrypt", "C_GenerateKeyPair", "C_WrapKey", "C_GetSessionInfo", "C_Login"} {
		t.Run(call, func(t *testing.T) {
			token := openHanging(t)
			item := orgkey.Sealed{Binding: orgkey.Binding{Org: "acme", ID: "one"}}
			var err error
			if item.Ciphertext, err = token.Seal(bounded(t), item.Binding, []byte("value")); err != nil {
				t.Fatal(err)
			}
			token.hang(t, call)
			if call == "C_Login" {
				token.renew(token.life, errors.New("for the test"))
			}
			generate := func(ctx context.Context) error { return generateOne(ctx, token) }
			open := func(ctx context.Context) error { _, err := token.Open(ctx, []orgkey.Sealed{item}); return err }
			var all sync.WaitGroup
			for range 3 { // more than there are sessions
				if call != "C_Decrypt" {
					all.Go(func() { unavailable(t, "generating", generate) })
				}
				if call == "C_Decrypt" || call == "C_Login" {
					all.Go(func() { unavailable(t, "opening", open) })
				}
			}
			all.Wait()
			unavailable(t, "health", token.Healthy)
			token.recovers(t)
			if err := open(bounded(t)); err != nil {
				t.Errorf("opening afterwards: %v", err)
			}
		})
	}
}

// What the token opens after its caller has been told that it is late is nobody's.
func TestWhatIsOpenedLateIsCleared(t *testing.T) {
	token := openHanging(t)
	items := make([]orgkey.Sealed, 2)
	for i := range items {
		items[i].Binding = orgkey.Binding{Org: "acme", ID: "one"}
		var err error
		if items[i].Ciphertext, err = token.Seal(bounded(t), items[i].Binding, []byte("value")); err != nil {
			t.Fatal(err)
		}
	}
	token.hang(t, "C_Decrypt")
	var opened values
	if err := token.open(bounded(t), items[:1], &opened); err == nil {
		t.Fatal("the call did not hang")
	}
	token.recovers(t)
	if len(opened) != 1 || !bytes.Equal(opened[0], make([]byte, len("value"))) {
		t.Errorf("opened late: %q, want zeros", opened)
	}
}

// A request that waits behind calls that hang is told before its own time ends.
func TestWaitingBehindCallsThatHang(t *testing.T) {
	token := openHanging(t)
	token.hang(t, "C_GenerateKeyPair")
	done := make(chan error, 6)
	for range cap(done) {
		go func() { _, err := token.Create(context.Background(), uuid.NewString()); done <- err }()
	}
	deadline := time.After(soon)
	for i := range cap(done) {
		select {
		case err := <-done:
			if !errors.Is(err, orgkey.ErrUnavailable) {
				t.Errorf("Create: %v, want ErrUnavailable", err)
			}
		case <-deadline:
			t.Fatalf("%d of %d have no answer", cap(done)-i, cap(done))
		}
	}
	token.recovers(t)
	if n := privateKeys(t, token.Token); n != 0 {
		t.Errorf("%d private keys are left", n)
	}
}

// However often it is asked, Healthy leaves one call waiting.
func TestHealthyLeavesOneCallWaiting(t *testing.T) {
	token := openHanging(t)
	token.hang(t, "C_GetSessionInfo")
	before := runtime.NumGoroutine()
	for range 20 {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		if err := token.Healthy(ctx); err == nil {
			t.Error("healthy while a call hangs")
		}
		cancel()
	}
	if more := runtime.NumGoroutine() - before; more > 2 {
		t.Errorf("%d goroutines are left", more)
	}
}

func TestCloseGivesUpOnACallThatHangs(t *testing.T) {
	token := openHanging(t)
	token.limits.held = time.Hour // is not what Close waits for
	token.limits.closing = time.Second
	token.hang(t, "C_GenerateKeyPair")
	unavailable(t, "generating", func(ctx context.Context) error { return generateOne(ctx, token) })
	closed := make(chan error, 1)
	go func() { closed <- token.Close() }()
	select {
	case err := <-closed:
		if err == nil {
			t.Error("Close with a call in the library reported success")
		}
	case <-time.After(soon):
		t.Fatal("Close waits for ever")
	}
	token.limits.closing = time.Minute // for the one that follows the call's return
}

// The login outlives the token's files; what is sealed does not.
func TestHealthyNoticesThatTheTokenIsGone(t *testing.T) {
	cfg := softHSM(t)
	token := open(t, cfg)
	tokens := filepath.Join(filepath.Dir(cfg.PINFile), softHSMTokens)
	if err := os.RemoveAll(tokens); err != nil {
		t.Fatal(err)
	}
	if err := token.Healthy(bounded(t)); !errors.Is(err, orgkey.ErrUnavailable) {
		t.Errorf("Healthy without the token's files: %v, want ErrUnavailable", err)
	}
}
