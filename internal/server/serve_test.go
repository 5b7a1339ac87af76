package server

import (
	"log/slog"
	"maps"
	"path/filepath"
	"testing"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authn"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

func TestASummaryThatCouldNotBeRecordedIsInTheNextOne(t *testing.T) {
	db, err := sqlstore.Open(t.Context(), filepath.Join(t.TempDir(), "orgkeys.db"))
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	failures := &authn.Failures{}
	failures.Count(authn.ReasonExpired)
	if err := recordFailures(t.Context(), failures, audit.NewLog(db, slog.New(slog.DiscardHandler))); err == nil {
		t.Fatal("recorded in a database that is closed")
	}
	failures.Count(authn.ReasonExpired)
	if counts, want := failures.Flush(), map[string]int64{authn.ReasonExpired: 2}; !maps.Equal(counts, want) {
		t.Errorf("the next summary says %v, want %v", counts, want)
	}
}
