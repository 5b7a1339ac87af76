package verify_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/audittest"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
)

// setBack is a log that was set back from 30 events to 20, changed by the
// statements, and accepted as one that kept the first events.
func setBack(t *testing.T, kept int64, statements ...string) audittest.Log {
	t.Helper()
	l := audittest.New(t)
	from, err := l.DB.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	l.Rebuild(t, append(statements, "DELETE FROM events WHERE idx >= 20")...)
	to, err := l.DB.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r := audit.Rollback{From: from.Text(), To: to.Text(), Kept: kept, Reason: "a test"}
	if err := l.DB.Record(t.Context(), r.Event()); err != nil {
		t.Fatal(err)
	}
	if err := audit.NewFileSink(l.Sink).AcceptRollback(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	l.Add(t, 5)
	return l
}

// Promise 5: that a rollback was accepted does not excuse that the log's
// beginning was rewritten.
func TestAnAcceptedRollbackHidesNoRewriting(t *testing.T) {
	l := setBack(t, 20)
	report, err := verify.Verify(t.Context(), l.DB, l.Copy(t), nil)
	if err != nil || report.Log.Size != 26 || report.Covered != 26 || len(report.Rollbacks) != 1 {
		t.Errorf("a log that was only set back: %+v, %v", report, err)
	}
	t.Run("rewritten, and the sink got both versions", func(t *testing.T) {
		l := setBack(t, 20, audittest.AlterEvent7)
		_, err := verify.ReadCopy(strings.NewReader(l.Text(t)))
		var problem *verify.Problem
		if !errors.As(err, &problem) || problem.Index != 7 {
			t.Errorf("%v, want event 7", err)
		}
	})
	t.Run("rewritten, and the sink has not got it anew", func(t *testing.T) {
		l := setBack(t, 20, audittest.AlterEvent7)
		text := l.Text(t)
		at := strings.Index(text, `{"rollback"`)
		end := at + strings.Index(text[at:], "\n") + 1
		c, err := verify.ReadCopy(strings.NewReader(text[:end]))
		if err != nil {
			t.Fatal(err)
		}
		wantProblem(t, l.DB, c, 7)
	})
	t.Run("rewritten, and accepted as that", func(t *testing.T) {
		l := setBack(t, 7, audittest.AlterEvent7)
		if report, err := verify.Verify(t.Context(), l.DB, l.Copy(t), nil); err != nil || report.Rollbacks[0].Kept != 7 {
			t.Errorf("%+v, %v", report, err)
		}
	})
	t.Run("the sink's note says something else than the event", func(t *testing.T) {
		l := setBack(t, 20, audittest.AlterEvent7)
		text := strings.Replace(l.Text(t), `"kept":20`, `"kept":7`, 1)
		c, err := verify.ReadCopy(strings.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		wantProblem(t, l.DB, c, -1)
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
		{"rewritten before it", []string{audittest.AlterEvent7}, true, 7},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := setBack(t, 20, c.sql...)
			text, _, _ := strings.Cut(l.Text(t), `{"rollback"`)
			before, err := verify.ReadCopy(strings.NewReader(text))
			if err != nil {
				t.Fatal(err)
			}
			if c.signed {
				head, err := l.DB.Head(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				before.AddSigned(head)
			}
			if c.problem >= 0 {
				wantProblem(t, l.DB, before, c.problem)
				return
			}
			report, err := verify.Verify(t.Context(), l.DB, before, nil)
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
		{"rewritten", []string{audittest.AlterEvent7}, 7},
		{"a rewritten backup", []string{"DELETE FROM events WHERE idx >= 20", audittest.AlterEvent7}, 7},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := audittest.New(t)
			points := &verify.Copy{}
			for _, size := range []int64{5, 10, 30} {
				p, err := l.DB.At(t.Context(), size)
				if err != nil {
					t.Fatal(err)
				}
				points.AddCheckpoint(p)
			}
			l.Rebuild(t, c.sql...)
			head, err := l.DB.Head(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for what, held := range map[string]*verify.Copy{"events": l.Copy(t), "checkpoints": points} {
				problem, err := held.Differs(t.Context(), head, l.DB.LeafHashes)
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
