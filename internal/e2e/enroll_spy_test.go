package e2e

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// TestPromise11_WhatTheTokenSeesOfSealedDeliveries runs the program through
// pkcs11-spy while nodes fetch keys: each is made and wrapped once, by an AES
// key that was made for it, which was handed to the recipient. What these calls
// hold is looked at in internal/hsm, where they do not overlap with others.
func TestPromise11_WhatTheTokenSeesOfSealedDeliveries(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	pinFile, log := filepath.Join(dir, "pin"), filepath.Join(dir, "spy.log")
	pin := "spied-" + harness.Org()
	must(t, os.WriteFile(pinFile, []byte(pin), 0o600))
	s := harness.Start(t, harness.Set("ORGKEYS_PKCS11_MODULE", spyModule(t)), harness.Set("ORGKEYS_PKCS11_PIN_FILE", pinFile),
		harness.Set("PKCS11SPY", harness.SoftHSM), harness.Set("PKCS11SPY_OUTPUT", log), harness.Set("SOFTHSM2_CONF", harness.NewToken(t, "orgkeys", pin)))
	calls := func() map[string]int {
		b, err := os.ReadFile(log)
		must(t, err)
		counts := map[string]int{}
		for _, m := range regexp.MustCompile(`(?m)^\d+: (C_\w+)$`).FindAllSubmatch(b, -1) {
			counts[string(m[1])]++
		}
		return counts
	}
	org, recipient := harness.Org(), newRecipient(t)
	deliver := func() {
		e := enrollment(t, s.API, mint(t, s, org, `{}`).Token, recipient, 20*time.Second)
		fetch(t, e)
	}
	deliver() // and what the first one needs besides
	before := calls()
	const more = 3
	for range more {
		deliver()
	}
	after := calls()
	// The binding asks OAEP for the length first.
	for name, each := range map[string]int{"C_GenerateKeyPair": 1, "C_GenerateKey": 1, "C_WrapKey": 3} {
		if got := after[name] - before[name]; got != each*more {
			t.Errorf("%d %s for %d deliveries, want %d", got, name, more, each*more)
		}
	}
	for _, name := range []string{"C_UnwrapKey", "C_CopyObject", "C_SetAttributeValue", "C_DeriveKey", "C_DigestKey", "C_GetOperationState", "C_DecryptUpdate"} {
		if after[name] > before[name] {
			t.Errorf("%s was called %d times", name, after[name]-before[name])
		}
	}
}
