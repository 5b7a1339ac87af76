package sqlstore_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/audit"
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
