package e2e

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/hsm/hsmtest"
)

const modulePIN = "12345678"

// withModule is a server that uses a token of a module, which is called orgkeys.
func withModule(t *testing.T, module string, more ...harness.Option) *harness.Server {
	t.Helper()
	pinFile := filepath.Join(t.TempDir(), "pin")
	if err := os.WriteFile(pinFile, []byte(modulePIN), 0o600); err != nil {
		t.Fatal(err)
	}
	s := harness.Configure(t, append(more, harness.Set("ORGKEYS_PKCS11_MODULE", module),
		harness.Set("ORGKEYS_PKCS11_TOKEN_LABEL", "orgkeys"), harness.Set("ORGKEYS_PKCS11_PIN_FILE", pinFile))...)
	if err := os.Mkdir(s.Dir, 0o700); err != nil { // without it, doctor does not use the PIN
		t.Fatal(err)
	}
	return s
}

// inEnvironment sets NAME=value.
func inEnvironment(env []string) (options []harness.Option) {
	for _, e := range env {
		name, value, _ := strings.Cut(e, "=")
		options = append(options, harness.Set(name, value))
	}
	return options
}

// What doctor says of each requirement, in the order of docs/hsm.md.
var requirements = []string{
	"AES-256 keys made in the token", "sealing (", "its wrapping key handed over encrypted", "private keys wrapped (",
	"RSA-2048 key pairs as session objects", "keys sealed to a recipient", "checkpoints signed in the token",
}

// TestModules is the program itself on each module that works: doctor says yes or no to
// each requirement before the first start and does not fail, and keys are made,
// listed and deleted, across a restart.
func TestModules(t *testing.T) {
	for name, c := range map[string]struct {
		start func(t *testing.T) *harness.Server
		lacks []string
	}{
		"SoftHSM": {func(t *testing.T) *harness.Server {
			return withModule(t, harness.SoftHSM, harness.Set("SOFTHSM2_CONF", harness.NewToken(t, "orgkeys", modulePIN)))
		}, nil},
		"opencryptoki": {func(t *testing.T) *harness.Server {
			o := hsmtest.StartOpencryptoki(t, filepath.Join(t.TempDir(), "opencryptoki"))
			o.InitToken(t, "orgkeys", modulePIN)
			return withModule(t, o.Module, harness.Within(o.Within()...))
		}, []string{"keys sealed to a recipient", "checkpoints signed in the token"}},
		"NSS": {func(t *testing.T) *harness.Server {
			module, args := hsmtest.NSS(t, "orgkeys", modulePIN)
			return withModule(t, module, harness.Set("ORGKEYS_PKCS11_INIT_ARGS", args))
		}, []string{"checkpoints signed in the token"}},
		"NSS through p11-kit-proxy": {func(t *testing.T) *harness.Server {
			dir := t.TempDir()
			module, args := hsmtest.NSS(t, "orgkeys", modulePIN)
			return withModule(t, hsmtest.ProxyIn(t, dir, module, args), harness.Within(hsmtest.WithinProxy(dir)...))
		}, []string{"checkpoints signed in the token"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := c.start(t)
			failing, said := diagnose(t, s)
			if len(failing) != 0 {
				t.Errorf("before the first start doctor fails: %v, of %+v", failing, said)
			}
			checkRequirements(t, said, c.lacks)
			if !strings.Contains(found(said, "HSM"), "has no sealing key yet") {
				t.Errorf("doctor does not say that the first start makes the sealing key: %s", found(said, "HSM"))
			}

			s.Start(t)
			org := harness.Org()
			kept, deleted := s.Generate(t, org), s.Generate(t, org)
			owner := s.Client(t, org, "OWNER")
			if err := owner.DeleteKey(context.Background(), org, deleted.ID); err != nil {
				t.Errorf("deleting a key: %v", err)
			}
			s.PutSecret(t, org, "env_s3", []byte("sealed by the token"))
			for range 2 {
				if listed := s.List(t, org); len(listed) != 1 || listed[0].ID != kept.ID {
					t.Errorf("listed are %+v, want %s alone", listed, kept.ID)
				}
				s.Stop(t)
				if failing, said := diagnose(t, s); len(failing) != 0 || !strings.Contains(found(said, "sealing key"), "decrypts the database's records") {
					t.Errorf("doctor fails: %v, of %+v", failing, said)
				}
				s.Start(t)
			}
			s.Generate(t, org)
		})
	}
}

func found(said []diagnosis, what string) string {
	var all []string
	for _, d := range said {
		if d.What == what {
			all = append(all, d.Found)
		}
	}
	return strings.Join(all, "\n")
}

// checkRequirements wants yes or no to each, and no to those that are lacking.
func checkRequirements(t *testing.T, said []diagnosis, lacks []string) {
	t.Helper()
	all := "\n" + found(said, "HSM")
	for _, r := range requirements {
		answer := "yes: "
		for _, l := range lacks {
			if r == l {
				answer = "no: "
			}
		}
		if !strings.Contains(all, "\n"+answer+r) {
			t.Errorf("doctor does not say %q to %q:%s", answer, r, all)
		}
	}
}

// TestModulesThatCannotWork are refused by the names of what they lack, by doctor and at the start.
func TestModulesThatCannotWork(t *testing.T) {
	for name, c := range map[string]struct {
		start func(t *testing.T) *harness.Server
		lacks []string
		says  []string
	}{
		"tpm2-pkcs11": {func(t *testing.T) *harness.Server {
			module, env := hsmtest.TPM(t, "orgkeys", modulePIN)
			return withModule(t, module, inEnvironment(env)...)
		}, []string{"AES-256 keys made in the token", "private keys wrapped ("}, []string{"CKM_AES_KEY_GEN", "C_WrapKey"}},
		"SoftHSM through p11-kit remoting": {func(t *testing.T) *harness.Server {
			module, env := hsmtest.Remoting(t, harness.SoftHSM, "orgkeys", "SOFTHSM2_CONF="+harness.NewToken(t, "orgkeys", modulePIN))
			return withModule(t, module, inEnvironment(env)...)
		}, []string{"sealing ("}, []string{"CKM_AES_GCM", "CKM_AES_CBC_PAD"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := c.start(t)
			failing, said := diagnose(t, s)
			if len(failing) == 0 {
				t.Errorf("doctor finds nothing: %+v", said)
			}
			all := "\n" + found(said, "HSM")
			for _, l := range c.lacks {
				if !strings.Contains(all, "\nno: "+l) {
					t.Errorf("doctor does not say no to %q:%s", l, all)
				}
			}
			stdout, stderr, code := s.Run(t, "serve")
			for _, says := range append(c.says, "the token lacks what orgkeys needs") {
				if code == 0 || !strings.Contains(stdout+stderr, says) {
					t.Errorf("serve exits with %d and does not say %q:\n%s%s", code, says, stdout, stderr)
				}
			}
		})
	}
}
