package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// The exit code that the shipped unit does not restart.
const exitPIN = 77

// A PIN that the token refused is offered once, whichever command is run and
// however often, until its file changes.
func TestARefusedPINIsOfferedOnceByAllCommands(t *testing.T) {
	t.Parallel()
	pinFile := filepath.Join(t.TempDir(), "pin")
	write := func(pin string) {
		t.Helper()
		if err := os.WriteFile(pinFile, []byte(pin), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("123456")
	s := harness.Start(t,
		harness.Set("ORGKEYS_PKCS11_MODULE", harness.SoftHSM), harness.Set("ORGKEYS_PKCS11_PIN_FILE", pinFile),
		harness.Set("SOFTHSM2_CONF", harness.NewToken(t, "orgkeys", "123456")))
	org := harness.Org()
	s.Generate(t, org)
	s.Stop(t)

	write("wrong-1")
	offered := 0
	for _, command := range [][]string{
		{"doctor"}, {"serve"}, {"audit", "accept-rollback", "--reason", "a test"}, {"audit", "erase", "--subject", "somebody", "--reason", "a test"}, {"serve"}, {"doctor"},
	} {
		stdout, stderr, code := s.Run(t, command...)
		said := stdout + stderr
		if command[0] == "serve" && code != exitPIN {
			t.Errorf("%v exits with %d, want %d", command, code, exitPIN)
		}
		if code == 0 {
			t.Errorf("%v succeeds with a wrong PIN", command)
		}
		if strings.Contains(said, "CKR_PIN_INCORRECT") {
			offered++
		} else if strings.Contains(said, "the token refused it") && !strings.Contains(said, "pin.attempt") {
			t.Errorf("%v does not name the file that remembers the refusal:\n%s", command, said)
		}
	}
	if offered != 1 {
		t.Errorf("the wrong PIN was offered %d times", offered)
	}
	write("123456\n")
	s.Start(t)
	if n := len(s.List(t, org)); n != 1 {
		t.Errorf("with the right PIN again %d keys are listed, want 1", n)
	}
}

// Doctor before the first start makes nothing, also not the directory in which a refused
// PIN is recorded: it would be that of whoever ran it, and the server could not use it.
func TestDoctorMakesNoDataDirectory(t *testing.T) {
	t.Parallel()
	pinFile := filepath.Join(t.TempDir(), "pin")
	if err := os.WriteFile(pinFile, []byte("123456"), 0o600); err != nil {
		t.Fatal(err)
	}
	own := harness.Configure(t)
	s := harness.Configure(t,
		harness.Set("ORGKEYS_PKCS11_MODULE", harness.SoftHSM), harness.Set("ORGKEYS_PKCS11_PIN_FILE", pinFile),
		harness.Set("SOFTHSM2_CONF", harness.NewToken(t, "orgkeys", "123456")))
	for _, server := range []*harness.Server{own, s} {
		failing, said := diagnose(t, server)
		if _, err := os.Lstat(server.Dir); !os.IsNotExist(err) {
			t.Errorf("%s: %v; doctor says %+v", server.Dir, err, said)
		}
		if len(failing) > 0 {
			t.Errorf("%v fail: %+v", failing, said)
		}
	}
	if _, said := diagnose(t, s); !strings.Contains(found(said, "HSM"), "the PIN was not tried: ") {
		t.Errorf("doctor says %+v", said)
	}
	if err := os.Mkdir(s.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if failing, said := diagnose(t, s); len(failing) > 0 || !strings.Contains(found(said, "HSM"), "the login succeeded") {
		t.Errorf("with a directory: %+v", said)
	}
}
