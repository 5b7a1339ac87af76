package server

import (
	"cmp"
	"context"
	"errors"
	"path/filepath"
	"slices"
	"testing"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authn"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// The answer of a commit can be lost: then the summary is repeated, and what was counted
// since is another one.
func TestASummaryWhoseAnswerWasLostIsInTheLogOnce(t *testing.T) {
	db, err := sqlstore.Open(t.Context(), filepath.Join(t.TempDir(), "orgkeys.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	db.UseEventKey(audit.EventKey{})
	lost := errors.New("no answer")
	s := summary{failures: &authn.Failures{}, record: func(ctx context.Context, events ...audit.Event) error {
		return cmp.Or(db.RecordOnce(ctx, events...), lost)
	}}
	s.failures.Count(authn.ReasonExpired)
	if err := s.report(t.Context()); !errors.Is(err, lost) {
		t.Fatal(err)
	}
	s.failures.Count(authn.ReasonExpired)
	s.failures.Count(authn.ReasonExpired)
	lost = nil
	if err := s.report(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := db.Sequence(t.Context(), 10, audit.Condition{}); err != nil {
		t.Fatal(err)
	}
	entries, err := db.Entries(t.Context(), 0, 10)
	if err != nil {
		t.Fatal(err)
	}
	var counts []string
	for _, entry := range entries {
		e, err := audit.Decode(entry.Leaf)
		if err != nil {
			t.Fatal(err)
		}
		counts = append(counts, e.Detail["count"])
	}
	if want := []string{"1", "2"}; !slices.Equal(counts, want) {
		t.Errorf("the log counts %v, want %v", counts, want)
	}
}
