package archive_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/archive"
	"github.com/orgkeys/orgkeys/internal/audit/audittest"
)

var errUnreadable = errors.New("the log cannot be read")

// halfReadable is a log whose events cannot be read.
type halfReadable struct{ archive.Source }

func (halfReadable) Entries(context.Context, int64, int) ([]audit.Entry, error) {
	return nil, errUnreadable
}

// Of an export that failed nothing is left, and an earlier one stays as it was.
func TestAFileIsWholeOrNotThere(t *testing.T) {
	l := audittest.NewSigned(t)
	l.Sign(t)
	dir := t.TempDir()
	name := filepath.Join(dir, "export.tar.gz")
	if err := os.WriteFile(name, []byte("the one before"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := archive.WriteFile(t.Context(), name, halfReadable{l.DB}, nil, "test", nil); !errors.Is(err, errUnreadable) {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(name); err != nil || string(b) != "the one before" {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := archive.WriteFile(t.Context(), name, l.DB, nil, "test", nil); err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := files[0].Info(); len(files) != 1 || err != nil || info.Size() < 100 || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", files, err)
	}
}

// What is listed is what the tree commits to.
func TestListedEventsAreTheLeaves(t *testing.T) {
	l := audittest.New(t)
	var all, of strings.Builder
	if err := errors.Join(archive.List(t.Context(), &all, l.DB, 28, ""), archive.List(t.Context(), &of, l.DB, 0, "nobody")); err != nil {
		t.Fatal(err)
	}
	entries, err := l.DB.Entries(t.Context(), 28, 10)
	if err != nil || len(entries) != 2 {
		t.Fatal(len(entries), err)
	}
	want := fmt.Sprintf("{\"index\":28,\"event\":%s}\n{\"index\":29,\"event\":%s}\n", entries[0].Leaf, entries[1].Leaf)
	if all.String() != want || of.String() != "" {
		t.Errorf("all: %s\nan organization without events: %s", all.String(), of.String())
	}
}
