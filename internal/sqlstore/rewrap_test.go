package sqlstore_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/node"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// Every sealed value is found once whatever the page, and put back only where
// nobody was faster.
func TestSealedValuesAreReplaced(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		var keys []string
		for i := range 5 {
			org := org.ID(fmt.Sprintf("org%d", i%2))
			keys = append(keys, released(t, db, org, 5))
			secret := node.SealedSecret{Name: fmt.Sprintf("s%d", i), Sealed: fmt.Appendf(nil, "secret %d", i)}
			must(t, db.PutSecret(t.Context(), org, secret, 10, event(audit.SecretPut, org, secret.Name)))
		}
		head, err := db.Head(t.Context())
		must(t, err)
		must(t, db.KeepEventKey(t.Context(), head.Origin, []byte("event key")))

		for purpose, want := range map[string]int{orgkey.PublicKey: 5, orgkey.BootSecret: 5, orgkey.EventKey: 1} {
			if n, err := db.CountSealed(t.Context(), purpose); err != nil || n != want {
				t.Errorf("%s: counted %d, %v", purpose, n, err)
			}
			all := sealedOf(t, db, purpose)
			if len(all) != want {
				t.Errorf("%s: found %d", purpose, len(all))
			}
			var stale []orgkey.Sealed
			var fresh [][]byte
			for i, s := range all {
				fresh = append(fresh, append([]byte("fresh "), s.Ciphertext...))
				if i == 0 {
					s.Ciphertext = []byte("somebody was faster")
				}
				stale = append(stale, s)
			}
			if n, err := db.Reseal(t.Context(), stale, fresh); err != nil || n != want-1 {
				t.Errorf("%s: replaced %d, %v", purpose, n, err)
			}
			for i, s := range sealedOf(t, db, purpose) {
				want := string(fresh[i])
				if i == 0 {
					want = string(all[0].Ciphertext)
				}
				if s.Binding != all[i].Binding || string(s.Ciphertext) != want {
					t.Errorf("%s: %+v holds %q, want %q", purpose, s.Binding, s.Ciphertext, want)
				}
			}
		}

		all := sealedOf(t, db, orgkey.PublicKey)
		must(t, db.DeleteKey(t.Context(), org.ID(all[1].Binding.Org), all[1].Binding.ID, event(audit.KeyDeleted, org.ID(all[1].Binding.Org), all[1].Binding.ID)))
		if n, err := db.Reseal(t.Context(), all[1:2], [][]byte{[]byte("back from the dead")}); err != nil || n != 0 {
			t.Errorf("a deleted key was sealed again: %d, %v", n, err)
		}
		if n := len(sealedOf(t, db, orgkey.PublicKey)); n != len(keys)-1 {
			t.Errorf("%d sealed keys after one was deleted", n)
		}
	})
}

// Deliveries, of which there is one for each key, are found by their primary key.
func TestSealedDeliveriesAreReplaced(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, location string) {
		admin := raw(t, location)
		for i := range 5 {
			statement(t, admin, fmt.Sprintf(`INSERT INTO deliveries (key_id, org_id, enrollment_id, scope, stage, recipient, wrapped)
				VALUES ('key%d', 'acme', 'e', 'node', 'available', 'r%d', $1)`, i, 9-i), []byte{byte(i + 1)})
		}
		all := sealedOf(t, db, orgkey.WrappedKey)
		if len(all) != 5 || all[4].Binding.ID != "key4/r5" {
			t.Fatalf("found %+v", all)
		}
		fresh := [][]byte{[]byte("a"), []byte("b"), []byte("c")}
		stale := []orgkey.Sealed{all[0], all[1], all[2]}
		stale[1].Binding.ID, stale[2].Ciphertext = "key1/another", []byte("somebody was faster")
		if n, err := db.Reseal(t.Context(), stale, fresh); err != nil || n != 1 {
			t.Errorf("replaced %d, %v, want the first alone", n, err)
		}
		if now := sealedOf(t, db, orgkey.WrappedKey); string(now[0].Ciphertext) != "a" || string(now[1].Ciphertext) != "\x02" {
			t.Errorf("then there are %+v", now)
		}
		want := "key_id>"
		if strings.HasPrefix(location, "postgres") {
			admin.SetMaxOpenConns(1)
			statement(t, admin, "SET enable_seqscan = off; SET enable_bitmapscan = off")
			want = "Index Cond: (key_id > "
		}
		if plan := planOf(t, admin, location, sqlstore.WrappedKeysAfter, "key1", 2); !strings.Contains(plan, want) || strings.Contains(plan, "Sort") || strings.Contains(plan, "B-TREE") {
			t.Errorf("the plan is\n%s", plan)
		}
	})
}

// sealedOf reads the sealed values of a purpose by pages of two.
func sealedOf(t *testing.T, db *sqlstore.DB, purpose string) []orgkey.Sealed {
	t.Helper()
	var all []orgkey.Sealed
	for after := (orgkey.Binding{Purpose: purpose}); ; {
		page, err := db.SealedAfter(t.Context(), after, 2)
		must(t, err)
		if len(page) == 0 {
			return all
		}
		all, after = append(all, page...), page[len(page)-1].Binding
	}
}
