//go:build cgo

package hsm

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

func writePIN(t testing.TB, cfg Config, pin string) {
	t.Helper()
	if err := os.WriteFile(cfg.PINFile, []byte(pin), 0o600); err != nil {
		t.Fatal(err)
	}
}

// tryPIN is a start with pin in the PIN file: whatever one process does with it.
func tryPIN(t testing.TB, cfg Config, pin string) error {
	t.Helper()
	writePIN(t, cfg, pin)
	token, err := Open(t.Context(), cfg)
	if err == nil {
		err = token.Close()
	}
	return err
}

// tokenFlags reads the token's flags past any Token.
func tokenFlags(t testing.TB, cfg Config) (flags uint) {
	t.Helper()
	lib := begin(t, cfg)
	slot, err := cfg.findToken(lib)
	if err == nil {
		var info pkcs11.TokenInfo
		info, err = lib.GetTokenInfo(slot)
		flags = info.Flags
	}
	if err := errors.Join(err, lib.Finalize()); err != nil {
		t.Fatal(err)
	}
	return flags
}

func rightPIN(t testing.TB, cfg Config) string {
	t.Helper()
	pin, err := os.ReadFile(cfg.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	return string(pin)
}

// logInByHand is what an operator does to set the token's count back.
func logInByHand(t testing.TB, cfg Config, pin string) {
	t.Helper()
	writePIN(t, cfg, pin)
	if err := withSession(cfg, func(*module, pkcs11.SessionHandle) error { return nil }); err != nil {
		t.Fatal(err)
	}
}

// A refused PIN costs one attempt, however often the service starts.
func TestARefusedPINIsOfferedOnce(t *testing.T) {
	cfg := freshToken(t)
	right := rightPIN(t, cfg)
	if err := tryPIN(t, cfg, "wrong-1"); !errors.Is(err, ErrPINRefused) || !errors.Is(err, ErrPIN) {
		t.Fatalf("a wrong PIN: %v, want ErrPINRefused", err)
	}
	logInByHand(t, cfg, right)
	for _, same := range []string{"wrong-1", "wrong-1", "wrong-1\n", "wrong-1\r\n"} {
		if err := tryPIN(t, cfg, same); !errors.Is(err, ErrPINRefused) || !strings.Contains(err.Error(), cfg.AttemptFile) {
			t.Errorf("the same PIN again, as %q: %v, want ErrPINRefused with the file's name", same, err)
		}
	}
	if flags := tokenFlags(t, cfg); flags&pkcs11.CKF_USER_PIN_COUNT_LOW != 0 {
		t.Error("it was offered again: the token counts a refusal")
	}
	if err := tryPIN(t, cfg, right); err != nil {
		t.Errorf("the right PIN afterwards: %v", err)
	}
	if err := tryPIN(t, cfg, right); err != nil {
		t.Errorf("and again: %v", err)
	}
}

// The file says nothing of a PIN that can be read off it.
func TestTheAttemptFileHoldsNoPIN(t *testing.T) {
	cfg := freshToken(t)
	if err := tryPIN(t, cfg, "wrong-1"); !errors.Is(err, ErrPINRefused) {
		t.Fatal(err)
	}
	kept, err := os.ReadFile(cfg.AttemptFile)
	if err != nil || len(kept) == 0 || bytes.Contains(kept, []byte("wrong-1")) {
		t.Errorf("the attempt file: %q, %v", kept, err)
	}
	if info, err := os.Stat(cfg.AttemptFile); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("its mode: %v, %v", info, err)
	}
}

// A login needs no new block on the disk: a full one would otherwise take the HSM away
// at the next change of sessions.
func TestTheAttemptFileKeepsItsLength(t *testing.T) {
	cfg := freshToken(t)
	right := rightPIN(t, cfg)
	for _, pin := range []string{right, "wrong-1", right} {
		if err := tryPIN(t, cfg, pin); err != nil && !errors.Is(err, ErrPINRefused) {
			t.Fatal(err)
		}
		if info, err := os.Stat(cfg.AttemptFile); err != nil || info.Size() != maxAttempt {
			t.Errorf("after %q: %v, %v", pin, info, err)
		}
	}
}

func TestTwoProcessesOfferAPINOnce(t *testing.T) {
	cfg := freshToken(t)
	writePIN(t, cfg, "wrong-1")
	binary := cfg
	var wg sync.WaitGroup
	var mu sync.Mutex
	counts := map[string]int{}
	for range 4 {
		wg.Go(func() {
			out, err := childCommand(t, "open", "", configEnv(binary)...).CombinedOutput()
			if err == nil || !strings.Contains(string(out), ErrPIN.Error()) {
				t.Errorf("a child with a wrong PIN: %v\n%s", err, out)
			}
			mu.Lock()
			defer mu.Unlock()
			if strings.Contains(string(out), "CKR_PIN_INCORRECT") {
				counts["offered"]++
			}
		})
	}
	wg.Wait()
	if counts["offered"] != 1 {
		t.Errorf("offered %d times by four processes at once", counts["offered"])
	}
}

// interrupted leaves the file as a process does that was killed after it offered pin.
func interrupted(t testing.TB, cfg Config, pin string, offer bool) {
	t.Helper()
	lib := begin(t, cfg)
	slot, err := cfg.findToken(lib)
	if err != nil {
		t.Fatal(err)
	}
	info, err := lib.GetTokenInfo(slot)
	if err != nil {
		t.Fatal(err)
	}
	made, err := newAttempt(offered, []byte(pin), info.SerialNumber)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(cfg.AttemptFile, []byte(made.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if offer {
		h, err := lib.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
		if err != nil {
			t.Fatal(err)
		}
		_ = lib.Login(h, pkcs11.CKU_USER, pin) // its answer is what the crash lost
	}
	if err := lib.Finalize(); err != nil {
		t.Fatal(err)
	}
}

func TestAnAttemptThatACrashInterrupted(t *testing.T) {
	cfg := freshToken(t)
	right := rightPIN(t, cfg)
	for name, test := range map[string]struct {
		pin   string
		offer bool
		want  error
	}{
		"killed before the right PIN was offered": {right, false, nil},
		"killed after the right PIN was accepted": {right, true, nil},
		"killed after a wrong PIN was refused":    {"wrong-1", true, ErrPINInterrupted},
		"killed before a wrong PIN was offered":   {"wrong-2", false, ErrPINRefused},
	} {
		t.Run(name, func(t *testing.T) {
			interrupted(t, cfg, test.pin, test.offer)
			if err := tryPIN(t, cfg, test.pin); !errors.Is(err, test.want) {
				t.Errorf("the next start: %v, want %v", err, test.want)
			}
			logInByHand(t, cfg, right)
			if err := tryPIN(t, cfg, right); err != nil {
				t.Errorf("the right PIN after that: %v", err)
			}
		})
	}
}

// Where a refusal could not be remembered, nothing is offered.
func TestNothingIsOfferedThatCannotBeRemembered(t *testing.T) {
	cfg := freshToken(t)
	cfg.AttemptFile = filepath.Join(t.TempDir(), "missing", "pin.attempt")
	if err := tryPIN(t, cfg, "wrong-1"); err == nil || errors.Is(err, ErrPIN) {
		t.Errorf("without a place for the attempt: %v", err)
	}
	cfg.AttemptFile = ""
	if err := tryPIN(t, cfg, "wrong-1"); err == nil || errors.Is(err, ErrPIN) {
		t.Errorf("without a name for it: %v", err)
	}
	if flags := tokenFlags(t, cfg); flags&pkcs11.CKF_USER_PIN_COUNT_LOW != 0 {
		t.Error("the PIN was offered")
	}
}

func TestWhatIsHardlyAPINIsNotOffered(t *testing.T) {
	cfg := freshToken(t)
	for name, pin := range map[string]string{
		"nothing": "", "a line's end": "\n", "two lines": "123456\n# the PIN", "a tab": "123\t456", "a byte order mark": "\ufeff123456", "NUL": "123456\x00",
	} {
		if err := tryPIN(t, cfg, pin); err == nil || errors.Is(err, ErrPIN) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if flags := tokenFlags(t, cfg); flags&pkcs11.CKF_USER_PIN_COUNT_LOW != 0 {
		t.Error("one of them was offered")
	}
}

// The PIN is changed at the token while the service runs: it is offered once
// more, and a corrected file ends that without a restart.
func TestPINChangedWhileRunning(t *testing.T) {
	cfg := freshToken(t)
	right := rightPIN(t, cfg)
	token := open(t, cfg)
	writePIN(t, cfg, "wrong-1")
	if err := token.lib.CloseAllSessions(slotOf(token)); err != nil {
		t.Fatal(err)
	}
	again := func() { // the pause between two renewals is over
		token.mu.Lock()
		token.failedAt = time.Time{}
		token.mu.Unlock()
	}
	for range 3 {
		if err := token.Healthy(bounded(t)); !errors.Is(err, ErrPINRefused) || !errors.Is(err, orgkey.ErrUnavailable) {
			t.Errorf("Healthy after the PIN was changed: %v, want ErrPINRefused", err)
		}
		again()
	}
	writePIN(t, cfg, right)
	if err := generateOne(bounded(t), token); err != nil {
		t.Errorf("with the PIN corrected: %v", err)
	}
}

func TestThePINFileMayGoAwayAfterTheStart(t *testing.T) {
	cfg := freshToken(t)
	token := open(t, cfg)
	if err := os.Remove(cfg.PINFile); err != nil {
		t.Fatal(err)
	}
	if err := token.lib.CloseAllSessions(slotOf(token)); err != nil {
		t.Fatal(err)
	}
	if err := generateOne(bounded(t), token); err != nil {
		t.Errorf("after a loss: %v", err)
	}
}

// While the token counts refusals, of whomever, a life that is logged in goes on.
func TestNoRecyclingWhileTheTokenCountsRefusals(t *testing.T) {
	cfg := freshToken(t)
	cfg.RecycleAge = time.Nanosecond
	token := open(t, cfg)
	other := cfg
	other.PINFile, other.AttemptFile = filepath.Join(t.TempDir(), "pin"), filepath.Join(t.TempDir(), "attempt")
	writePIN(t, other, "wrong-1")
	if out, err := childCommand(t, "open", "", configEnv(other)...).CombinedOutput(); err == nil {
		t.Fatalf("a wrong PIN was accepted\n%s", out)
	}
	for range 2 {
		if err := generateOne(bounded(t), token); err != nil {
			t.Fatal(err)
		}
	}
	if n := renewals(token); n != 0 {
		t.Errorf("%d renewals, with the PIN offered again", n)
	}
}

func TestFlagsThatForbidAnAttempt(t *testing.T) {
	const ready = pkcs11.CKF_TOKEN_INITIALIZED | pkcs11.CKF_USER_PIN_INITIALIZED | pkcs11.CKF_LOGIN_REQUIRED
	for _, test := range []struct {
		flags uint
		want  error
	}{
		{ready, nil},
		{ready | pkcs11.CKF_USER_PIN_COUNT_LOW, nil},
		{ready | pkcs11.CKF_USER_PIN_COUNT_LOW | pkcs11.CKF_USER_PIN_FINAL_TRY, ErrPINFinalTry},
		{ready | pkcs11.CKF_USER_PIN_FINAL_TRY, ErrPINFinalTry},
		{ready | pkcs11.CKF_USER_PIN_LOCKED, ErrPINLocked},
		{ready | pkcs11.CKF_USER_PIN_LOCKED | pkcs11.CKF_USER_PIN_FINAL_TRY | pkcs11.CKF_USER_PIN_COUNT_LOW, ErrPINLocked},
		{ready &^ pkcs11.CKF_USER_PIN_INITIALIZED, ErrPINNotInitialized},
		{ready &^ pkcs11.CKF_TOKEN_INITIALIZED, ErrTokenNotInitialized},
	} {
		if err := judgeFlags(test.flags); !errors.Is(err, test.want) || (err == nil) != (test.want == nil) {
			t.Errorf("flags 0x%x: %v, want %v", test.flags, err, test.want)
		}
	}
}
