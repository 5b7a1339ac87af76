package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// TestPromise1_WhatTheTokenSees runs the program on SoftHSM through OpenSC's
// pkcs11-spy, which logs every call.
func TestPromise1_WhatTheTokenSees(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	pin := "spied-" + harness.Org()
	pinFile, log := filepath.Join(dir, "pin"), filepath.Join(dir, "spy.log")
	if err := os.WriteFile(pinFile, []byte(pin), 0o600); err != nil {
		t.Fatal(err)
	}
	conf := harness.NewToken(t, "orgkeys", pin)
	s := harness.Start(t, harness.Set("ORGKEYS_PKCS11_MODULE", spyModule(t)), harness.Set("ORGKEYS_PKCS11_PIN_FILE", pinFile),
		harness.Set("PKCS11SPY", harness.SoftHSM), harness.Set("PKCS11SPY_OUTPUT", log), harness.Set("SOFTHSM2_CONF", conf))
	calls := func(name string) int {
		b, err := os.ReadFile(log)
		if err != nil {
			t.Fatal(err)
		}
		// What the spy says of concurrent calls is mixed up, but for their first lines.
		return len(regexp.MustCompile(`(?m)^\d+: `+name+`$`).FindAll(b, -1))
	}
	org := harness.Org()
	s.Generate(t, org)
	generated, wrapped, destroyed := calls("C_GenerateKeyPair"), calls("C_WrapKey"), calls("C_DestroyObject")
	if generated == 0 || wrapped == 0 {
		t.Fatalf("pkcs11-spy counts %d C_GenerateKeyPair and %d C_WrapKey", generated, wrapped)
	}
	const more = 3
	for range more {
		s.Generate(t, org)
	}
	if got := calls("C_GenerateKeyPair") - generated; got != more {
		t.Errorf("%d C_GenerateKeyPair for %d keys", got, more)
	}
	if got := calls("C_WrapKey") - wrapped; got != more {
		t.Errorf("%d C_WrapKey for %d keys", got, more)
	}
	if got := calls("C_DestroyObject") - destroyed; got < 2*more {
		t.Errorf("%d C_DestroyObject for %d key pairs", got, more)
	}
	s.Stop(t)

	list := exec.Command("pkcs11-tool", "--module", harness.SoftHSM, "--login", "--pin", "env:TOKEN_PIN", "--list-objects")
	list.Env = []string{"PATH=" + os.Getenv("PATH"), "SOFTHSM2_CONF=" + conf, "TOKEN_PIN=" + pin}
	out, err := list.CombinedOutput()
	if err != nil {
		t.Fatalf("listing the token's objects: %v\n%s", err, out)
	}
	text := string(out)
	// The sealing key, and the pair that signs checkpoints of the audit log.
	if strings.Contains(text, "RSA") || strings.Count(text, " Object;") != 3 || strings.Count(text, "Object; EC_EDWARDS") != 2 || strings.Count(text, "label:      orgkeys-checkpoint-v1") != 2 {
		t.Errorf("objects in the token:\n%s", text)
	}
	// The checkpoint key never leaves the token either; what counts is the entry of each.
	sealing := regexp.MustCompile(`(?m)^Secret Key Object;.*\n(?: .*\n)*`).FindString(text)
	for _, attribute := range []string{"label:      orgkeys-seal-v1", "sensitive", "never extractable"} {
		if !strings.Contains(sealing, attribute) {
			t.Errorf("the sealing key's entry lacks %q:\n%s", attribute, text)
		}
	}
}

func spyModule(t *testing.T) string {
	t.Helper()
	found, err := filepath.Glob("/usr/lib/*/pkcs11-spy.so")
	if err != nil || len(found) == 0 {
		t.Fatalf("pkcs11-spy is not installed (Debian's opensc): %v", err)
	}
	return found[0]
}
