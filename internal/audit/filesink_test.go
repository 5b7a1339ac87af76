package audit_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/audittest"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
)

func TestNoPersonIsInTheLeavesOrTheSink(t *testing.T) {
	l := audittest.New(t)
	b, err := os.ReadFile(l.Sink)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(b, []byte("Ada")) {
		t.Error("the sink holds a person's name")
	}
}

// A sink's file is repaired or filled again, whatever was done to it.
func TestFileSinkRecovers(t *testing.T) {
	for _, c := range []struct {
		name   string
		damage func(t *testing.T, path string)
		kept   int64 // the checkpoint that is left
	}{
		{"torn last line", func(t *testing.T, path string) { appendTo(t, path, `{"index":30,"ev`) }, 30},
		{"crash before the checkpoint's line", func(t *testing.T, path string) {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, b[:bytes.LastIndex(b, []byte(`{"checkpoint"`))], 0o600); err != nil {
				t.Fatal(err)
			}
		}, 20},
		{"removed", func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}, 0},
		{"emptied", func(t *testing.T, path string) {
			if err := os.Truncate(path, 0); err != nil {
				t.Fatal(err)
			}
		}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := audittest.New(t)
			c.damage(t, l.Sink)
			last, err := audit.NewFileSink(l.Sink).Last(t.Context())
			if err != nil || last.Size != c.kept {
				t.Fatalf("last checkpoint %d, %v; want %d", last.Size, err, c.kept)
			}
			l.Add(t, 5)
			if report, err := verify.Verify(t.Context(), l.DB, l.Copy(t), nil); err != nil || report.Covered != 35 {
				t.Errorf("after going on: covered %d, %v", report.Covered, err)
			}
		})
	}
}

func appendTo(t *testing.T, path, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestFileSinkNoticesThatItsFileWasReplacedWhileOpen(t *testing.T) {
	l := audittest.New(t)
	sink := audit.NewFileSink(l.Sink)
	if _, err := sink.Last(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(l.Sink, l.Sink+".rotated"); err != nil {
		t.Fatal(err)
	}
	if _, err := sink.Append(t.Context(), nil, audit.Checkpoint{Origin: "o", Size: 30}); err == nil {
		t.Error("a checkpoint went into a file that is no longer there, and counted as kept")
	}
}

func TestTheEventOfARollbackTellsWhatTheSinksAreTold(t *testing.T) {
	r := audit.Rollback{From: "a", To: "b", Kept: 3, Reason: "c"}
	text, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var said map[string]any
	audittest.Must(t, json.Unmarshal(text, &said))
	for name, value := range said {
		if got := r.Event().Detail[name]; got != fmt.Sprint(value) {
			t.Errorf("%s is %v in the sink, and %q in the event", name, value, got)
		}
	}
}

// A sink that was emptied while nothing ran is filled again, and would say nothing.
func TestAnEmptiedSinkIsReportedOnce(t *testing.T) {
	l := audittest.New(t)
	reports := func(events audittest.Log) int {
		t.Helper()
		var out bytes.Buffer
		log := audit.NewLog(events.DB, slog.New(slog.NewTextHandler(&out, nil)), audit.NewFileSink(events.Sink))
		for range 3 {
			if err := log.CheckExtends(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		return strings.Count(out.String(), "an audit sink is empty")
	}
	if n := reports(l); n != 0 {
		t.Errorf("with its file: %d reports", n)
	}
	if n := reports(audittest.Open(t)); n != 0 {
		t.Errorf("at a first start: %d reports", n)
	}
	if err := os.Remove(l.Sink); err != nil {
		t.Fatal(err)
	}
	if n := reports(l); n != 1 {
		t.Errorf("with its file removed: %d reports, want 1", n)
	}
}
