//go:build cgo

package hsm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/orgkeys/orgkeys/internal/hsm/hsmtest"
)

// A real token that locks: opencryptoki's software token, after three wrong PINs.
func TestNoStartLocksOpencryptoki(t *testing.T) {
	dir := t.TempDir()
	o := hsmtest.StartOpencryptoki(t, filepath.Join(dir, "opencryptoki"))
	o.InitToken(t, "orgkeys", opencryptokiPIN)
	cfg := Config{Module: o.Module, TokenLabel: "orgkeys", PINFile: filepath.Join(dir, "pin"), AttemptFile: filepath.Join(dir, "attempt")}
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := o.Command(t.Context(), binary)
	cmd.Env = append(append(os.Environ(), child+"=pin states"), configEnv(cfg)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

const (
	opencryptokiPIN = "12345678"
	opencryptokiSO  = "87654321" // what a new token has
)

// pinStates takes the token through the states of its PIN.
func pinStates(cfg Config) error {
	start := func(pin string) error {
		if err := os.WriteFile(cfg.PINFile, []byte(pin), 0o600); err != nil {
			return err
		}
		token, err := Open(context.Background(), cfg)
		if err == nil {
			err = token.Close()
		}
		return err
	}
	byHand := func(pin string) error {
		if err := os.WriteFile(cfg.PINFile, []byte(pin), 0o600); err != nil {
			return err
		}
		return withSession(cfg, func(*module, pkcs11.SessionHandle) error { return nil })
	}
	for _, step := range []struct {
		what string
		do   func() error
		want error // nil: none of the PIN
	}{
		{"a wrong PIN", func() error { return start("wrong-1") }, ErrPINRefused},
		{"the same, 2", func() error { return start("wrong-1") }, ErrPINRefused},
		{"the same, 3", func() error { return start("wrong-1") }, ErrPINRefused},
		{"the same, 4", func() error { return start("wrong-1") }, ErrPINRefused},
		{"the right one", func() error { return start(opencryptokiPIN) }, nil},
		{"a wrong PIN", func() error { return start("wrong-2") }, ErrPINRefused},
		{"another wrong PIN", func() error { return start("wrong-3") }, ErrPINRefused},
		{"a third", func() error { return start("wrong-4") }, ErrPINFinalTry},
		{"the right one, before the last attempt", func() error { return start(opencryptokiPIN) }, ErrPINFinalTry},
		{"by hand", func() error { return byHand(opencryptokiPIN) }, nil},
		{"the right one, after that", func() error { return start(opencryptokiPIN) }, nil},
		{"locking it by hand", func() error { return errors.Join(byHand("wrong-5"), byHand("wrong-5"), byHand("wrong-5")) }, pkcs11.Error(pkcs11.CKR_PIN_INCORRECT)},
		{"the right one, locked", func() error { return start(opencryptokiPIN) }, ErrPINLocked},
		{"another, locked", func() error { return start("wrong-6") }, ErrPINLocked},
		{"initialized anew", func() error { return initOpencryptoki(cfg, "") }, nil},
		{"without a PIN", func() error { return start(opencryptokiPIN) }, ErrPINNotInitialized},
	} {
		err := step.do()
		if step.want == nil && errors.Is(err, ErrPIN) || !errors.Is(err, step.want) && step.want != nil {
			return fmt.Errorf("%s: %v, want %v", step.what, err, step.want)
		}
	}
	return nil
}

// initOpencryptoki makes the token anew; with no PIN, it gets none.
func initOpencryptoki(cfg Config, pin string) (err error) {
	lib, err := load(cfg.Module)
	if err != nil {
		return err
	}
	if err := lib.Initialize(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lib.Finalize()) }()
	slots, err := lib.GetSlotList(true)
	if err != nil {
		return err
	}
	if err := lib.InitToken(slots[0], opencryptokiSO, cfg.TokenLabel); err != nil || pin == "" {
		return err
	}
	h, err := lib.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return err
	}
	if err := lib.Login(h, pkcs11.CKU_SO, opencryptokiSO); err != nil {
		return err
	}
	return lib.InitPIN(h, pin)
}
