package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/vault/vaulttest"
)

// withVault is a server on a Vault of its own.
func withVault(t *testing.T) (*vaulttest.Server, *harness.Server) {
	t.Helper()
	v, err := vaulttest.Start(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := v.Stop(); err != nil {
			t.Error(err)
		}
	})
	login, err := v.AppRole(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return v, harness.Configure(t,
		harness.Set("ORGKEYS_KEYSTORE", "vault"), harness.Set("VAULT_ADDR", v.Address), harness.Set("VAULT_CACERT", v.CACert),
		harness.Set("ORGKEYS_VAULT_ROLE_ID_FILE", login.RoleIDFile), harness.Set("ORGKEYS_VAULT_SECRET_ID_FILE", login.SecretIDFile))
}

// ok runs a command that must succeed and returns its standard output.
func ok(t *testing.T, s *harness.Server, args ...string) string {
	t.Helper()
	out, errs, code := s.Run(t, args...)
	if code != 0 {
		t.Fatalf("%s: exit code %d: %s", strings.Join(args, " "), code, errs)
	}
	return out
}

// Issue 6: an export agrees with Vault's audit file event by event, and what
// only one of them holds is found.
func TestAnExportAgreesWithVaultsAuditFile(t *testing.T) {
	v, s := withVault(t)
	s.Start(t)
	org := harness.Org()
	s.Generate(t, org)
	s.Generate(t, org)
	s.Stop(t)
	key := strings.TrimSpace(ok(t, s, "audit", "key"))
	archive := filepath.Join(t.TempDir(), "export.tar.gz")
	ok(t, s, "audit", "export", archive)
	if out := ok(t, s, "audit", "verify", archive, "--key", key, "--vault-audit", v.AuditFile); !regexp.MustCompile(`truncation excluded as of [^ ]+, when the newest entry given was written: Vault's audit file holds each of the [1-9][0-9]* events, and 0 newer`).MatchString(out) {
		t.Errorf("said %q", out)
	}
	if out, errs, code := s.Run(t, "audit", "verify", archive, "--key", key); code != 3 || !strings.Contains(errs, "truncation not excluded") || !regexp.MustCompile(`[1-9][0-9]* receipts signed`).MatchString(out) {
		t.Errorf("with the key alone: exit code %d\n%s%s", code, out, errs)
	}
	file, err := os.ReadFile(v.AuditFile)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Count(string(file), "— "+strings.Split(key, "+")[0]) == 0 {
		t.Error("no signed checkpoint is in Vault's audit file")
	}
	t.Run("an event that Vault did not see", func(t *testing.T) {
		altered := filepath.Join(t.TempDir(), "audit.log")
		if err := os.WriteFile(altered, []byte(strings.ReplaceAll(string(file), `\"type\":\"orgkey.delivered\"`, `\"type\":\"orgkey.withdrawn\"`)), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, errs, code := s.Run(t, "audit", "verify", archive, "--key", key, "--vault-audit", altered); code != 1 || !strings.Contains(errs, "it is missing from Vault's audit file") {
			t.Errorf("code %d: %s", code, errs)
		}
	})
	t.Run("a line that a crash of Vault tore", func(t *testing.T) {
		torn := filepath.Join(t.TempDir(), "audit.log")
		if err := os.WriteFile(torn, append([]byte("{\"time\":\n"), file...), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, errs, code := s.Run(t, "audit", "verify", archive, "--key", key, "--vault-audit", torn); code != 3 || !strings.Contains(errs, "1 of its lines are incomplete, the first at "+torn+":1") {
			t.Errorf("code %d: %s%s", code, out, errs)
		}
	})
	t.Run("a file that is not Vault's", func(t *testing.T) {
		// A compressed one, beside the right one: it may hold what is missing.
		if _, errs, code := s.Run(t, "audit", "verify", archive, "--key", key, "--vault-audit", v.AuditFile, "--vault-audit", archive); code != 1 || !strings.Contains(errs, "decompress it") {
			t.Errorf("code %d: %s", code, errs)
		}
	})
	t.Run("newer events that were signed for", func(t *testing.T) {
		s.Start(t)
		s.List(t, org)
		s.Stop(t)
		if _, errs, code := s.Run(t, "audit", "verify", archive, "--key", key, "--vault-audit", v.AuditFile); code != 1 || !strings.Contains(errs, "it is missing: Vault's audit file") {
			t.Errorf("exit code %d: %s", code, errs)
		}
	})
}

// Promise 5: a backup that was put back is refused because of what Vault holds,
// until an operator accepts it; then Vault gets the log anew.
func TestARestoredBackupIsAcceptedInVaultToo(t *testing.T) {
	v, s := withVault(t)
	s.Configured("ORGKEYS_AUDIT_SINKS", "vault,file")
	s.Start(t)
	org := harness.Org()
	s.Generate(t, org)
	s.Stop(t)
	db := filepath.Join(s.Dir, "orgkeys.db")
	backup, err := os.ReadFile(db)
	if err != nil {
		t.Fatal(err)
	}
	s.Start(t)
	s.Generate(t, org)
	s.Stop(t)
	if err := os.WriteFile(db, backup, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, suffix := range []string{"-wal", "-shm"} {
		if err := os.RemoveAll(db + suffix); err != nil {
			t.Fatal(err)
		}
	}
	if _, errs, code := s.Run(t, "serve"); code != 1 || !strings.Contains(errs, "accept-rollback") {
		t.Fatalf("it started: code %d: %s", code, errs)
	}
	// In two runs, as when the first is interrupted between the sinks.
	for _, sinks := range []string{"vault", "vault,file"} {
		s.Configured("ORGKEYS_AUDIT_SINKS", sinks)
		if out := ok(t, s, "audit", "accept-rollback", "--reason", "restored the backup"); strings.Contains(out, "sink vault") != (sinks == "vault") || strings.Contains(out, "sink file") != (sinks != "vault") {
			t.Errorf("%s: said %q", sinks, out)
		}
	}
	s.Start(t)
	s.Generate(t, org)
	s.Stop(t)
	key := strings.TrimSpace(ok(t, s, "audit", "key"))
	archive := filepath.Join(t.TempDir(), "export.tar.gz")
	ok(t, s, "audit", "export", archive)
	out := ok(t, s, "audit", "verify", archive, "--key", key, "--vault-audit", v.AuditFile)
	if !strings.Contains(out, `a rollback was accepted: "restored the backup"`) || !regexp.MustCompile(`[1-9][0-9]* events in Vault's audit file, from .*:[0-9]+ to .*:[0-9]+, were lost in the rollback that event [0-9]+ accepted`).MatchString(out) {
		t.Errorf("said %q", out)
	}
	if out := ok(t, s, "audit", "accept-rollback", "--reason", "again"); !strings.HasPrefix(out, "nothing to accept") {
		t.Errorf("said %q", out)
	}
}
