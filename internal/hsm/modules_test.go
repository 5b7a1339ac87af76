//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

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

// Another program begins to use opencryptoki's token while a sealing key is made, so that
// the next object gets the file of the HMAC key. No object that comes later takes a half of the key.
func TestNothingReplacesANewKeyOfOpencryptoki(t *testing.T) {
	dir := t.TempDir()
	o := hsmtest.StartOpencryptoki(t, filepath.Join(dir, "opencryptoki"))
	o.InitToken(t, "orgkeys", opencryptokiPIN)
	cfg := Config{Module: o.Module, TokenLabel: "orgkeys", PINFile: filepath.Join(dir, "pin"), AttemptFile: AttemptFile(dir), CreateSealingKey: true}
	writePIN(t, cfg, opencryptokiPIN)
	waits, now := filepath.Join(dir, "flock.so"), filepath.Join(dir, "go")
	if out, err := exec.Command("cc", "-shared", "-fPIC", "-D_GNU_SOURCE", "-o", waits, "testdata/flock.c").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	start := func(env ...string) (*exec.Cmd, *bytes.Buffer) {
		t.Helper()
		var out bytes.Buffer
		cmd := o.Command(t.Context(), "env", append(append(env, child+"=open"), append(configEnv(cfg), binary)...)...)
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd, &out
	}
	another := func(args ...string) {
		t.Helper()
		if out, err := o.Command(t.Context(), "pkcs11-tool", append([]string{"--module", o.Module, "--slot", fmt.Sprint(o.Slot)}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	index := filepath.Join(dir, "opencryptoki", "lib", "swtok", "TOK_OBJ", "OBJ.IDX")
	first, said := start("LD_PRELOAD="+waits, "INDEX="+index, "GO="+now)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if text, _ := os.ReadFile(index); bytes.Count(text, []byte("\n")) == 2 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("no key is made\n%s", said)
		}
	}
	another("--list-slots")
	if err := os.WriteFile(now, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := first.Wait(); err != nil {
		t.Fatalf("the first start: %v\n%s", err, said)
	}
	another("--login", "--pin", opencryptokiPIN, "--keygen", "--key-type", "AES:32", "--label", "another", "--id", "01")
	if second, said := start(); second.Wait() != nil {
		t.Errorf("the second start: %s", said)
	}
}

// A proxy keeps opencryptoki's library loaded, which then closes descriptors of ours.
func TestOpencryptokiBehindAProxyIsRefused(t *testing.T) {
	dir := t.TempDir()
	o := hsmtest.StartOpencryptoki(t, filepath.Join(dir, "opencryptoki"))
	o.InitToken(t, "orgkeys", opencryptokiPIN)
	modules := t.TempDir()
	cfg := Config{Module: hsmtest.ProxyIn(t, modules, o.Module, ""), TokenLabel: "orgkeys", PINFile: filepath.Join(dir, "pin"), AttemptFile: AttemptFile(dir), CreateSealingKey: true}
	writePIN(t, cfg, opencryptokiPIN)
	if err := os.WriteFile(filepath.Join(modules, "only.module"), []byte("module: "+o.Module+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	within := append(hsmtest.WithinProxy(modules), binary)
	cmd := o.Command(t.Context(), within[0], within[1:]...)
	cmd.Env = append(append(os.Environ(), child+"=open"), configEnv(cfg)...)
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), errLoadedByAnother.Error()) {
		t.Errorf("opened: %v\n%s", err, out)
	}
}

// moduleTests run on every module: the contract, recovery from losses, first
// starts of several replicas, and PINs. The long form runs more of them.
func moduleTests() []string {
	tests := []string{"Contract", "RecoversUnderLoad", "KeyThatIsLost", "RecyclesByAge", "FirstStartsOfReplicasMakeOneKey", "KilledUnderLoad", "ARefusedPINIsOfferedOnce", "TheTwoKeysOfFormat2", "FinalizeClosesNothingOfOurs", "NothingLastingIsMadeWithoutTheMechanisms"}
	if long() {
		tests = append(tests, "RecoversWithoutAnError", "AbandonedGenerationsLeaveNothing", "DestroyLooksForWhatIsLeft", "Recycles", "ClosedTokenIsUnavailable", "TokenExchanged")
	}
	return tests
}

// Each module is in a process of its own: they share symbols, environment and
// handlers otherwise.
func TestModules(t *testing.T) {
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"SoftHSM, CBC and HMAC", "opencryptoki", "NSS", "NSS through p11-kit-proxy"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			run := func(name string, args ...string) *exec.Cmd { return exec.CommandContext(t.Context(), name, args...) }
			tests := [][]string{moduleTests()}
			switch name {
			case "opencryptoki":
				o := hsmtest.StartOpencryptoki(t, filepath.Join(t.TempDir(), "opencryptoki"))
				run = func(name string, args ...string) *exec.Cmd { return o.Command(t.Context(), name, args...) }
			case "NSS through p11-kit-proxy": // which leads a process to one database, whatever its configuration becomes
				run = func(name string, args ...string) *exec.Cmd { return hsmtest.ProxyCommand(t, name, args...) }
				tests = slices.Collect(slices.Chunk(moduleTests(), 1))
			}
			for _, some := range tests {
				cmd := run(binary, "-test.run", "^Test("+strings.Join(some, "|")+")$", "-test.v", "-test.timeout", "60m")
				cmd.Env = append(os.Environ(), kind+"="+name)
				out, err := cmd.CombinedOutput()
				if passed := strings.Count(string(out), "\n--- PASS: "); err != nil || passed != len(some) {
					t.Errorf("%d of %v passed, %v\n%s", passed, some, err, out)
				}
				for line := range strings.Lines(string(out)) {
					if strings.Contains(line, "_test.go:") { // how much was done
						t.Log(strings.TrimSpace(line))
					}
				}
			}
		})
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

// A token that cannot do what is needed is refused by the names of what it
// lacks, and left as it was.
func TestTokensThatCannotWorkAreRefusedByName(t *testing.T) {
	dir := t.TempDir()
	cfg := Config{TokenLabel: "orgkeys", PINFile: filepath.Join(dir, "pin"), AttemptFile: AttemptFile(dir), CreateSealingKey: true}
	writePIN(t, cfg, opencryptokiPIN)
	soft := softHSM(t)
	if err := dropSealingKey(soft); err != nil {
		t.Fatal(err)
	}
	tpm, remote := cfg, soft
	var tpmEnv, remoteEnv []string
	tpm.Module, tpmEnv = hsmtest.TPM(t, cfg.TokenLabel, opencryptokiPIN)
	remote.Module, remoteEnv = hsmtest.Remoting(t, soft.Module, soft.TokenLabel)
	remote.CreateSealingKey = true
	for name, c := range map[string]struct {
		cfg   Config
		env   []string
		lacks []string
	}{
		"tpm2-pkcs11": {tpm, tpmEnv, []string{"CKM_AES_KEY_GEN", "C_WrapKey", "private keys wrapped"}},
		// Its client passes no parameters of CKM_AES_GCM and CKM_AES_CBC_PAD on.
		"SoftHSM through p11-kit remoting": {remote, remoteEnv, []string{"CKM_AES_GCM", "CKM_AES_CBC_PAD"}},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := childCommand(t, "open", "", append(configEnv(c.cfg), c.env...)...).CombinedOutput()
			if err == nil {
				t.Fatal("it was accepted")
			}
			for _, lack := range append(c.lacks, "the token lacks what orgkeys needs") {
				if !strings.Contains(string(out), lack) {
					t.Errorf("it is not said that it lacks %s:\n%s", lack, out)
				}
			}
			list := exec.Command("pkcs11-tool", "--module", c.cfg.Module, "--token-label", c.cfg.TokenLabel, "--login", "--pin", "env:TOKEN_PIN", "--list-objects")
			list.Env = append(append(os.Environ(), c.env...), "TOKEN_PIN="+rightPIN(t, c.cfg))
			left, err := list.CombinedOutput()
			if err != nil || strings.Contains(string(left), " Object") {
				t.Errorf("left in the token: %v\n%s", err, left)
			}
		})
	}
}
