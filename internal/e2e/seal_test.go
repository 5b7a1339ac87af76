package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// TestPromise2_MovedCiphertextsDoNotOpen swaps sealed public keys by SQL, as
// whoever can write the database can.
func TestPromise2_MovedCiphertextsDoNotOpen(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	first, second, third := harness.Org(), harness.Org(), harness.Org()
	a, b, c := s.Generate(t, first), s.Generate(t, first), s.Generate(t, second)
	d := s.Generate(t, third)
	db := s.Database(t)
	sealed := func(id string) []byte {
		var v []byte
		if err := db.QueryRow(`SELECT sealed FROM org_keys WHERE id = ?`, id).Scan(&v); err != nil {
			t.Fatal(err)
		}
		return v
	}
	put := func(id string, v []byte) { harness.Exec(t, db, `UPDATE org_keys SET sealed = ? WHERE id = ?`, v, id) }
	refused := func(t *testing.T, org string) {
		t.Helper()
		resp := s.Do(t, harness.Request{Method: "GET", Path: harness.KeyPath(org), Token: s.Token(t, org, "OWNER")})
		if resp.Status != 500 || strings.Contains(string(resp.Body), "BEGIN") || strings.Contains(string(resp.Body), a.ID) {
			t.Errorf("status %d, body %.300q; want 500 and no key", resp.Status, resp.Body)
		}
	}
	harness.Unprotect(t, db)
	sa, sb, sc := sealed(a.ID), sealed(b.ID), sealed(c.ID)
	s.List(t, first) // what the service remembers of an earlier list must not help
	s.List(t, second)

	t.Run("within one organization", func(t *testing.T) {
		put(a.ID, sb)
		put(b.ID, sa)
		refused(t, first)
	})
	t.Run("across organizations", func(t *testing.T) {
		put(a.ID, sc)
		put(b.ID, sb)
		put(c.ID, sa)
		refused(t, first)
		refused(t, second)
	})
	t.Run("with one bit changed", func(t *testing.T) {
		put(c.ID, sc)
		changed := append([]byte(nil), sa...)
		changed[len(changed)/2] ^= 1
		put(a.ID, changed)
		refused(t, first)
	})
	t.Run("cut short and emptied", func(t *testing.T) {
		put(a.ID, sa[:len(sa)-1])
		refused(t, first)
		put(a.ID, []byte{})
		refused(t, first)
	})
	t.Run("a row moved to another organization", func(t *testing.T) {
		put(a.ID, sa)
		harness.Exec(t, db, `UPDATE org_keys SET org_id = ?, slot = 2 WHERE id = ?`, second, a.ID)
		refused(t, second)
		harness.Exec(t, db, `UPDATE org_keys SET org_id = ?, slot = 1 WHERE id = ?`, first, a.ID)
	})
	t.Run("put back, everything opens again", func(t *testing.T) {
		if n := len(s.List(t, first)); n != 2 {
			t.Errorf("%d keys", n)
		}
	})
	t.Run("others were never affected, and the public key is in no file", func(t *testing.T) {
		if n := len(s.List(t, third)); n != 1 {
			t.Errorf("%d keys", n)
		}
		scan := &harness.Scanner{}
		scan.AddSecret("the public key", d.Private.N.Bytes())
		for _, f := range scan.ScanTree(t, s.Dir) {
			t.Error(f)
		}
	})
}

const allowBilling = `package orgkeys.authz

default decision := {"allow": false, "reason": "malformed_request", "scope": ""}

decision := {"allow": true, "reason": "allowed", "scope": "organization"} if {
	input.caller.kind == "user"
	input.caller.org == input.org
	input.caller.org != ""
	input.caller.subject != ""
	input.action in {"orgkey.generate", "orgkey.list", "orgkey.delete", "orgkey.delete_all"}
	some role in input.caller.roles
	role in {"OWNER", "ADMINISTRATOR", "BILLING"}
} else := {"allow": false, "reason": "insufficient_role", "scope": ""} if {
	input.caller.org == input.org
} else := {"allow": false, "reason": "other_organization", "scope": ""}
`

const denyAll = `package orgkeys.authz

decision := {"allow": false, "reason": "insufficient_role", "scope": ""}
`

// TestPolicyDirectoryDecides: no role is compared anywhere but in Rego, so
// another policy is another behaviour, within seconds and without a restart; a
// broken one changes nothing.
func TestPolicyDirectoryDecides(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "policy")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	put := func(text string) {
		file := filepath.Join(dir, "authz.rego")
		if err := os.WriteFile(file+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	put(allowBilling)
	s := harness.Start(t, harness.Set("ORGKEYS_POLICY_DIR", dir))
	org := harness.Org()
	status := func(role string) int {
		return s.Do(t, harness.Request{Method: "GET", Path: harness.KeyPath(org), Token: s.Token(t, org, role)}).Status
	}
	if got := status("BILLING"); got != 200 {
		t.Fatalf("BILLING under a policy that allows it: status %d", got)
	}
	if got := status("USER"); got != 403 {
		t.Fatalf("USER under that policy: status %d", got)
	}
	put(denyAll)
	harness.Eventually(t, harness.Patience, "everybody is denied", func() bool { return status("OWNER") == 403 })
	s.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: s.Token(t, org, "OWNER")}).Want(t, 403, roleMessage)
	put("package orgkeys.authz\n\ndecision := {")
	harness.Eventually(t, harness.Patience, "the log says that the policy is broken", func() bool {
		return strings.Count(string(s.Output()), "rego") > 0
	})
	if got := status("OWNER"); got != 403 {
		t.Errorf("under a broken policy: status %d, want that of the one before it", got)
	}
	put(allowBilling)
	harness.Eventually(t, harness.Patience, "BILLING is allowed again", func() bool { return status("BILLING") == 200 })
	revisions := map[string]bool{}
	harness.Eventually(t, harness.Patience, "both policies' revisions are in the log", func() bool {
		for _, l := range s.Sink(t).Find(func(l harness.Leaf) bool { return l.Org == org }) {
			revisions[l.Policy] = true
		}
		return len(revisions) >= 2
	})
	if revisions[""] {
		t.Errorf("an event without its policy's revision: %v", revisions)
	}
}
