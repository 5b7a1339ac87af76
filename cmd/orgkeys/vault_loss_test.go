package main

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/hashicorp/vault/api"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/vault/vaulttest"
)

// administrator is a client of somebody who may do anything in Vault.
func administrator(t *testing.T, v *vaulttest.Server) *api.Client {
	t.Helper()
	client, err := v.Client(v.RootToken)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

func vaultWrite(t *testing.T, v *vaulttest.Server, path string, fields map[string]any) {
	t.Helper()
	if _, err := administrator(t, v).Logical().WriteWithContext(t.Context(), path, fields); err != nil {
		t.Fatal(err)
	}
}

// generateOnce starts the server, has it make a key, and stops it.
func generateOnce(t *testing.T, s *harness.Server, org string) {
	t.Helper()
	s.Start(t)
	s.Generate(t, org)
	s.Stop(t)
}

// refusedRelease fails the test unless a request for a key is answered with 503.
func refusedRelease(t *testing.T, s *harness.Server, org string) {
	t.Helper()
	resp := s.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: s.Token(t, org, "OWNER"), Header: http.Header{"Accept": {"application/x-pem-file"}}})
	if resp.Status != http.StatusServiceUnavailable {
		t.Errorf("a key was released: %d", resp.Status)
	}
}

// refusedStart fails the test unless the server and doctor refuse with these words.
func refusedStart(t *testing.T, s *harness.Server, words ...string) {
	t.Helper()
	for _, command := range []string{"serve", "doctor"} {
		out, errs, code := s.Run(t, command)
		for _, w := range words {
			if code == 0 || !strings.Contains(out+errs, w) {
				t.Errorf("%s: exit code %d, want %q in\n%s%s", command, code, w, out, errs)
			}
		}
	}
}

// verifies makes an export and checks it by Vault's audit file.
func verifies(t *testing.T, v *vaulttest.Server, s *harness.Server) (said string) {
	t.Helper()
	key := strings.TrimSpace(ok(t, s, "audit", "key"))
	archive := filepath.Join(t.TempDir(), "export.tar.gz")
	ok(t, s, "audit", "export", archive)
	args := []string{"audit", "verify", archive, "--vault-audit", v.AuditFile}
	for k := range strings.Lines(key) {
		args = append(args, "--key", strings.TrimSpace(k))
	}
	return ok(t, s, args...)
}

// Promise 5: a receipt key that was made anew vouches for nothing from before.
func TestALostReceiptKeyIsNoticed(t *testing.T) {
	t.Parallel()
	v, s := withVault(t)
	org := harness.Org()
	generateOnce(t, s, org)
	if err := administrator(t, v).Sys().UnmountWithContext(t.Context(), "orgkeys-audit"); err != nil {
		t.Fatal(err)
	}
	refusedStart(t, s, "no mount for orgkeys-audit/keys/receipt", "restore Vault from its backup")
	if _, err := v.Setup(t.Context()); err != nil {
		t.Fatal(err)
	}
	refusedStart(t, s, "is a different key than before", "docs/operations.md")

	// What docs/operations.md says to do without a backup.
	vaultWrite(t, v, "orgkeys-audit/keys/receipt/rotate", nil)
	vaultWrite(t, v, "orgkeys-audit/keys/receipt/config", map[string]any{"min_decryption_version": 2})
	generateOnce(t, s, org)
	if said := verifies(t, v, s); !strings.Contains(said, "truncation excluded") {
		t.Errorf("said %s", said)
	}
}

// Promise 5: a checkpoint that was deleted is neither a fresh Vault nor a reason
// to have an administrator mend Vault by hand.
func TestALostCheckpointIsAcceptedOnPurposeOnly(t *testing.T) {
	t.Parallel()
	v, s := withVault(t)
	org := harness.Org()
	for _, lost := range []struct{ path, words string }{
		{"orgkeys-state/data/checkpoint", "was deleted in Vault"},
		{"orgkeys-state/metadata/checkpoint", "sink vault holds none, and has acknowledged"},
	} {
		generateOnce(t, s, org)
		if _, err := administrator(t, v).Logical().DeleteWithContext(t.Context(), lost.path); err != nil {
			t.Fatal(err)
		}
		refusedStart(t, s, lost.words, "accept-rollback")
		if out := ok(t, s, "audit", "accept-rollback", "--reason", "the clean-up of Sunday deleted it"); !strings.Contains(out, "sink vault does not report what it had acknowledged") {
			t.Errorf("said %q", out)
		}
		generateOnce(t, s, org)
		if said := verifies(t, v, s); !strings.Contains(said, `a rollback was accepted: "the clean-up of Sunday deleted it"`) {
			t.Errorf("said %s", said)
		}
	}
}

// Promise 5: whoever can write to Vault cannot keep the checkpoint from following
// the log unseen.
func TestACheckpointAheadOfTheLogStopsTheRelease(t *testing.T) {
	t.Parallel()
	v, s := withVault(t)
	s.Start(t)
	org := harness.Org()
	s.Generate(t, org)
	at, err := administrator(t, v).KVv2("orgkeys-state").Get(t.Context(), "checkpoint")
	if err != nil {
		t.Fatal(err)
	}
	held, err := audit.ParseCheckpoint(at.Data["checkpoint"].(string))
	if err != nil {
		t.Fatal(err)
	}
	held.Size += 40
	vaultWrite(t, v, "orgkeys-state/data/checkpoint", map[string]any{
		"options": map[string]any{"cas": at.VersionMetadata.Version}, "data": map[string]any{"checkpoint": held.Text()}})
	refusedRelease(t, s, org)
	harness.Eventually(t, harness.Patience, "readiness shows it", func() bool { return strings.Contains(s.AskAdmin(t, "/readyz"), "sink vault has acknowledged") })
	s.Stop(t)
	refusedStart(t, s, "sink vault has acknowledged", "accept-rollback")
	ok(t, s, "audit", "accept-rollback", "--reason", "an administrator tried something out")
	generateOnce(t, s, org)
	if said := verifies(t, v, s); !strings.Contains(said, "truncation excluded") {
		t.Errorf("said %s", said)
	}
}

// Promise 5: where a rewritten log was accepted, Vault signs what it holds now.
func TestARewrittenLogIsGivenToVaultAnew(t *testing.T) {
	t.Parallel()
	v, s := withVault(t)
	s.Start(t)
	org := harness.Org()
	s.Generate(t, org)
	for range 6 {
		s.List(t, org)
	}
	s.Stop(t)
	db := harness.OpenDatabase(t, s.Dir)
	harness.Unprotect(t, db)
	rewriteEvent3(t, db)
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	refusedStart(t, s, "sink vault has acknowledged")
	ok(t, s, "audit", "accept-rollback", "--reason", "known to us", "--rewritten")
	generateOnce(t, s, org)
	if said := verifies(t, v, s); !strings.Contains(said, "known to us") {
		t.Errorf("said %s", said)
	}
}

// A version of the sealing key that was withdrawn too early is said to be one.
func TestASealingKeyWithdrawnTooEarlyIsNamed(t *testing.T) {
	t.Parallel()
	v, s := withVault(t)
	generateOnce(t, s, harness.Org())
	vaultWrite(t, v, "orgkeys-seal/keys/seal/rotate", nil)
	vaultWrite(t, v, "orgkeys-seal/keys/seal/config", map[string]any{"min_decryption_version": 2})
	refusedStart(t, s, "lower it and run orgkeys rewrap")
	vaultWrite(t, v, "orgkeys-seal/keys/seal/config", map[string]any{"min_decryption_version": 1})
	generateOnce(t, s, harness.Org())
}

// After a rotation and a rewrap, a backup of Vault from before is worth nothing,
// which every command says.
func TestAVaultFromBeforeTheRotationIsNamed(t *testing.T) {
	t.Parallel()
	v, s := withVault(t)
	s.Configured("ORGKEYS_RESERVATION_TTL", "10s")
	generateOnce(t, s, harness.Org())
	if err := v.Stop(); err != nil {
		t.Fatal(err)
	}
	storage, backup := filepath.Join(v.Dir, "storage"), t.TempDir()
	if err := os.CopyFS(backup, os.DirFS(storage)); err != nil {
		t.Fatal(err)
	}
	if err := v.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	vaultWrite(t, v, "orgkeys-seal/keys/seal/rotate", nil)
	stored := func() string {
		db := harness.OpenDatabase(t, s.Dir)
		defer db.Close()
		return strings.Join(harness.Strings(t, db, `SELECT hex(sealed) FROM org_keys WHERE sealed IS NOT NULL UNION ALL SELECT hex(sealed) FROM event_keys UNION ALL SELECT leaf FROM events`), "\n")
	}
	before := stored()
	if _, errs, code := s.Run(t, "rewrap", "--dry-run"); code != 0 || !strings.Contains(errs, "dry run, nothing is stored: public keys: ") || stored() != before {
		t.Errorf("a dry run: exit code %d, changed %t: %s", code, stored() != before, errs)
	}
	ok(t, s, "rewrap")
	if err := v.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.RemoveAll(storage), os.CopyFS(storage, os.DirFS(backup))); err != nil {
		t.Fatal(err)
	}
	if err := v.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	refusedStart(t, s, "or it is an older version of it: restore", "newest backup")
	if _, errs, code := s.Run(t, "rewrap"); code == 0 || !strings.Contains(errs, "there are records of version 2, and the newest version of the key orgkeys-seal/keys/seal is 1") {
		t.Errorf("rewrap: exit code %d: %s", code, errs)
	}
}

// Promise 5: receipts verify at once, also by a key that was rotated a moment ago.
func TestReceiptsVerifyAtOnce(t *testing.T) {
	t.Parallel()
	v, s := withVault(t)
	s.Configured("ORGKEYS_AUDIT_SINKS", "vault,file")
	s.Configured("ORGKEYS_AUDIT_FILE", filepath.Join(t.TempDir(), "sink.jsonl"))
	s.Start(t)
	org := harness.Org()
	for range 2 {
		s.Generate(t, org)
		if out := ok(t, s, "audit", "verify"); !strings.Contains(out, "have a valid receipt") {
			t.Errorf("said %s", out)
		}
		vaultWrite(t, v, "orgkeys-audit/keys/receipt/rotate", nil)
	}
}

// Promise 5: a version that was made anew, after Vault was put back, releases nothing.
func TestAReceiptKeyMadeAnewWhileServingReleasesNothing(t *testing.T) {
	t.Parallel()
	v, s := withVault(t)
	s.Start(t)
	org := harness.Org()
	s.Generate(t, org)
	// As if version 2 had been another one before Vault was put back.
	db := s.Database(t)
	harness.Exec(t, db, `INSERT INTO receipt_keys (sink, version, public) VALUES ('vault', 2, randomblob(32))`)
	vaultWrite(t, v, "orgkeys-audit/keys/receipt/rotate", nil)
	refusedRelease(t, s, org)
	if said := s.AskAdmin(t, "/readyz"); !strings.Contains(said, "is a different key than before") {
		t.Errorf("readiness says %s", said)
	}
}

// A mere warning of Vault does not keep doctor from looking at the rest.
func TestDoctorLooksOnBehindAWarning(t *testing.T) {
	t.Parallel()
	v, s := withVault(t)
	s.Configured("ORGKEYS_RESERVATION_TTL", "10s")
	generateOnce(t, s, harness.Org())
	vaultWrite(t, v, "orgkeys/keys/"+uuid.NewString(), map[string]any{"type": "rsa-2048"})
	if _, err := administrator(t, v).Logical().DeleteWithContext(t.Context(), "orgkeys-state/data/checkpoint"); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, harness.Patience, "the key is old", func() bool {
		out, _, _ := s.Run(t, "doctor")
		return strings.Contains(out, "Transit holds 1 keys")
	})
	if out, _, code := s.Run(t, "doctor"); code != 1 || !strings.Contains(out, "was deleted in Vault") {
		t.Errorf("exit code %d: %s", code, out)
	}
}

// A wrapped secret ID is good for one login, which is all that a command needs.
func TestAWrappedSecretIDIsEnoughForACommand(t *testing.T) {
	t.Parallel()
	v, s := withVault(t)
	generateOnce(t, s, harness.Org())
	dir := t.TempDir()
	s.Configured("ORGKEYS_VAULT_SECRET_ID_FILE", filepath.Join(dir, "secret_id"))
	s.Configured("ORGKEYS_VAULT_SECRET_ID_PATH", "auth/approle/role/orgkeys/secret-id")
	if _, err := v.Setup(t.Context(), "--credentials", dir, "--wrap", "5m"); err != nil {
		t.Fatal(err)
	}
	ok(t, s, "audit", "accept-rollback", "--reason", "none")
}
