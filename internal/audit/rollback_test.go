package audit_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
)

// setBack is a log that was set back from 30 events to 20, changed by the
// statements, and accepted as one that kept the first events.
func setBack(t *testing.T, kept int64, statements ...string) log30 {
	t.Helper()
	l := newLog30(t)
	from, err := l.db.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	l.rebuild(t, append(statements, "DELETE FROM events WHERE idx >= 20")...)
	to, err := l.db.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r := audit.Rollback{From: from.Text(), To: to.Text(), Kept: kept, Reason: "a test"}
	if err := l.db.Record(t.Context(), r.Event()); err != nil {
		t.Fatal(err)
	}
	if err := audit.NewFileSink(l.sink).AcceptRollback(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	l.add(t, 5)
	return l
}

const alteredAt7 = `UPDATE events SET leaf = CAST(replace(leaf, 'u-1', 'u-2') AS BLOB), actor = 'u-2' WHERE idx = 7`

// Promise 5: that a rollback was accepted does not excuse that the log's
// beginning was rewritten.
func TestAnAcceptedRollbackHidesNoRewriting(t *testing.T) {
	l := setBack(t, 20)
	report, err := audit.Verify(t.Context(), l.db, l.copy(t), nil)
	if err != nil || report.Log.Size != 26 || report.Covered != 26 || len(report.Rollbacks) != 1 {
		t.Errorf("a log that was only set back: %+v, %v", report, err)
	}
	t.Run("rewritten, and the sink got both versions", func(t *testing.T) {
		l := setBack(t, 20, alteredAt7)
		_, err := audit.ReadCopy(strings.NewReader(read(t, l.sink)))
		var problem *audit.Problem
		if !errors.As(err, &problem) || problem.Index != 7 {
			t.Errorf("%v, want event 7", err)
		}
	})
	t.Run("rewritten, and the sink has not got it anew", func(t *testing.T) {
		l := setBack(t, 20, alteredAt7)
		text := read(t, l.sink)
		at := strings.Index(text, `{"rollback"`)
		end := at + strings.Index(text[at:], "\n") + 1
		c, err := audit.ReadCopy(strings.NewReader(text[:end]))
		if err != nil {
			t.Fatal(err)
		}
		wantProblem(t, l.db, c, 7)
	})
	t.Run("rewritten, and accepted as that", func(t *testing.T) {
		l := setBack(t, 7, alteredAt7)
		if report, err := audit.Verify(t.Context(), l.db, l.copy(t), nil); err != nil || report.Rollbacks[0].Kept != 7 {
			t.Errorf("%+v, %v", report, err)
		}
	})
	t.Run("the sink's note says something else than the event", func(t *testing.T) {
		l := setBack(t, 20, alteredAt7)
		text := strings.Replace(read(t, l.sink), `"kept":20`, `"kept":7`, 1)
		c, err := audit.ReadCopy(strings.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		wantProblem(t, l.db, c, -1)
	})
}

// Promise 5: a copy from before a rollback is excused for what that lost, if the
// service has signed over it, and for nothing else.
func TestACopyFromBeforeARollback(t *testing.T) {
	for _, c := range []struct {
		name    string
		sql     []string
		signed  bool
		problem int64 // -1: none
	}{
		{"signed over", nil, true, -1},
		{"not signed over yet, as a forger's", nil, false, 20},
		{"rewritten before it", []string{alteredAt7}, true, 7},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := setBack(t, 20, c.sql...)
			text, _, _ := strings.Cut(read(t, l.sink), `{"rollback"`)
			before, err := audit.ReadCopy(strings.NewReader(text))
			if err != nil {
				t.Fatal(err)
			}
			if c.signed {
				head, err := l.db.Head(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				before.AddSigned(head)
			}
			if c.problem >= 0 {
				wantProblem(t, l.db, before, c.problem)
				return
			}
			report, err := audit.Verify(t.Context(), l.db, before, nil)
			if err != nil || !report.Before || report.Covered != 20 || len(report.Rollbacks) != 1 {
				t.Errorf("%+v, %v", report, err)
			}
		})
	}
}

func TestDiffersNamesTheFirstEventThatIsAnotherOne(t *testing.T) {
	for _, c := range []struct {
		name  string
		sql   []string
		index int64 // -1: none
	}{
		{"untouched", nil, -1},
		{"a backup", []string{"DELETE FROM events WHERE idx >= 20"}, -1},
		{"rewritten", []string{alteredAt7}, 7},
		{"a rewritten backup", []string{"DELETE FROM events WHERE idx >= 20", alteredAt7}, 7},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLog30(t)
			points := &audit.Copy{}
			for _, size := range []int64{5, 10, 30} {
				p, err := l.db.At(t.Context(), size)
				if err != nil {
					t.Fatal(err)
				}
				points.AddCheckpoint(p)
			}
			l.rebuild(t, c.sql...)
			head, err := l.db.Head(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for what, held := range map[string]*audit.Copy{"events": l.copy(t), "checkpoints": points} {
				problem, err := held.Differs(t.Context(), head, l.db.Entries)
				want := c.index
				if want == 7 && what == "checkpoints" {
					want = 5 // the largest that still fits
				}
				if err != nil || (problem == nil) != (want < 0) || problem != nil && problem.Index != want {
					t.Errorf("by %s: %v, %v; want event %d", what, problem, err, want)
				}
			}
		})
	}
}

// What a sink would refuse is not signed: the key's word for two logs would be
// worth nothing.
func TestWhatASinkRefusesIsNotSigned(t *testing.T) {
	quiet := slog.New(slog.DiscardHandler)
	for name, damage := range map[string]func(t *testing.T, l log30){
		"yesterday's log":             func(t *testing.T, l log30) { l.rebuild(t, "DELETE FROM events WHERE idx >= 20") },
		"another log":                 func(t *testing.T, l log30) { l.rebuild(t, alteredAt7) },
		"a sink that does not answer": func(t *testing.T, l log30) { must(t, os.Remove(l.sink)); must(t, os.Mkdir(l.sink, 0o700)) },
	} {
		t.Run(name, func(t *testing.T) {
			l := newLog30(t)
			damage(t, l)
			c := audit.NewCheckpointer(audit.NewLog(l.db, quiet, audit.NewFileSink(l.sink)), l.db, newSigner(t), time.Hour, quiet)
			if err := c.Sign(t.Context()); err == nil || c.Status().Err == nil {
				t.Errorf("signed: %v", err)
			}
			if last, err := l.db.LastSigned(t.Context()); err != nil || last.Seq != 0 {
				t.Errorf("a signed checkpoint of %d events is stored, %v", last.Size, err)
			}
		})
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestTheEventOfARollbackTellsWhatTheSinksAreTold(t *testing.T) {
	r := audit.Rollback{From: "a", To: "b", Kept: 3, Reason: "c"}
	text, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var said map[string]any
	must(t, json.Unmarshal(text, &said))
	for name, value := range said {
		if got := r.Event().Detail[name]; got != fmt.Sprint(value) {
			t.Errorf("%s is %v in the sink, and %q in the event", name, value, got)
		}
	}
}
