package sqlstore_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// TestPseudonyms: one each, the same for everybody who asks at once, and after an
// erasure another one, with nothing left of the first.
func TestPseudonyms(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		const subject = "ada@acme.example"
		got := make(chan string, 16)
		for range cap(got) {
			go func() {
				p, err := db.Pseudonym(t.Context(), subject)
				if err != nil {
					t.Error(err)
				}
				got <- p
			}()
		}
		first := <-got
		for range cap(got) - 1 {
			if p := <-got; p != first || strings.Contains(p, "ada") {
				t.Errorf("pseudonyms %q and %q", p, first)
			}
		}
		if other, err := db.Pseudonym(t.Context(), "bob@acme.example"); err != nil || other == first {
			t.Errorf("another person has %q, %v", other, err)
		}
		var named []string
		if _, err := db.Erase(t.Context(), subject, func(id string, _ int64) audit.Event {
			named = append(named, id)
			return audit.New(audit.PersonErased, "")
		}); err != nil || !slices.Equal(named, []string{first}) {
			t.Errorf("the log is told %q, %v, want the pseudonym alone", named, err)
		}
		if again, err := db.Pseudonym(t.Context(), subject); err != nil || again == first {
			t.Errorf("after the erasure: %q, %v", again, err)
		}
	})
}

// Whoever has only an event at hand erases by what it shows.
func TestAPersonIsErasedByThePseudonymToo(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, location string) {
		const subject = "ada@acme.example"
		pseudonym, err := db.Pseudonym(t.Context(), subject)
		must(t, err)
		for _, actor := range []string{pseudonym, subject} { // as before there were pseudonyms
			e := event(audit.KeysListed, "acme", "")
			e.Actor = audit.Actor{Kind: authz.Person, ID: actor}
			must(t, db.Record(t.Context(), e))
		}
		if n, err := db.Erasable(t.Context(), pseudonym); err != nil || n != 2 {
			t.Errorf("%d events would be erased, %v, want 2", n, err)
		}
		var named []string
		n, err := db.Erase(t.Context(), pseudonym, func(id string, _ int64) audit.Event {
			named = append(named, id)
			return audit.New(audit.PersonErased, "")
		})
		if err != nil || n != 2 || !slices.Equal(named, []string{pseudonym, subject}) {
			t.Errorf("erased %d, the log is told %q, %v", n, named, err)
		}
		var left int
		must(t, raw(t, location).QueryRow("SELECT (SELECT count(*) FROM persons) + (SELECT count(*) FROM event_persons)").Scan(&left))
		if left != 0 {
			t.Errorf("%d rows are left", left)
		}
	})
}

// The address that a key was handed out to is a person's, and goes with the rest.
func TestErasingForgetsWhereKeysWent(t *testing.T) {
	onBoth(t, func(t *testing.T, db *sqlstore.DB, _ string) {
		id := released(t, db, "acme", 9)
		delivered := event(audit.KeyDelivered, "acme", id)
		delivered.Actor = audit.Actor{Kind: authz.Person, ID: "ada"}
		if err := db.Delivered(t.Context(), id, delivered); err != nil {
			t.Fatal(err)
		}
		if keys, err := db.Keys(t.Context(), "acme"); err != nil || keys[0].DeliveredTo != "192.0.2.1" || keys[0].Delivered.IsZero() {
			t.Errorf("%+v, %v", keys, err)
		}
		if n, err := db.Erase(t.Context(), "ada", func(string, int64) audit.Event { return audit.New(audit.PersonErased, "") }); err != nil || n == 0 {
			t.Errorf("erased %d, %v", n, err)
		}
		if keys, err := db.Keys(t.Context(), "acme"); err != nil || keys[0].DeliveredTo != "" || keys[0].Delivered.IsZero() {
			t.Errorf("%+v, %v", keys, err)
		}
	})
}
