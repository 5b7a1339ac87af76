package verify_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/audittest"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

func TestAnUntouchedLogVerifies(t *testing.T) {
	l := audittest.New(t)
	for name, c := range map[string]*verify.Copy{"alone": nil, "with its sink": l.Copy(t)} {
		report, err := verify.Verify(t.Context(), l.DB, c, nil)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if report.Log.Size != 30 {
			t.Errorf("%s: %d events", name, report.Log.Size)
		}
		if c != nil && report.Covered != 30 {
			t.Errorf("%s: the copy covers %d", name, report.Covered)
		}
	}
}

// Promise 5: whatever is done to the log's tables is found, and the first bad event named.
func TestTamperingIsFoundWithoutASink(t *testing.T) {
	for _, c := range []struct {
		name  string
		sql   []string
		index int64
	}{
		{"the first event altered", []string{`UPDATE events SET leaf = replace(leaf, 'u-1', 'u-2'), actor = 'u-2' WHERE idx = 0`}, 0},
		{"an event altered", []string{`UPDATE events SET leaf = CAST(replace(leaf, 'u-1', 'u-2') AS BLOB), actor = 'u-2' WHERE idx = 12`}, 12},
		{"the last event altered", []string{`UPDATE events SET leaf = CAST(replace(leaf, 'u-1', 'u-2') AS BLOB), actor = 'u-2' WHERE idx = 29`}, 29},
		{"only a column altered", []string{`UPDATE events SET actor = 'u-2' WHERE idx = 12`}, 12},
		{"only the actor's kind altered", []string{`UPDATE events SET actor_kind = 'system' WHERE idx = 12`}, 12},
		{"only the reason column altered", []string{`UPDATE events SET reason = 'repeated' WHERE idx = 12`}, 12},
		{"only the time column altered", []string{`UPDATE events SET occurred_at = occurred_at + 1 WHERE idx = 12`}, 12},
		{"an event dropped", []string{`DELETE FROM events WHERE idx = 12`}, 12},
		{"the last event dropped", []string{`DELETE FROM events WHERE idx = 29`}, 29},
		{"the first event dropped", []string{`DELETE FROM events WHERE idx = 0`}, 0},
		{"an event taken out of the log, kept as a row", []string{`UPDATE events SET idx = NULL WHERE idx = 12`}, 12},
		{"an event dropped, those behind it moved up", []string{`DELETE FROM events WHERE idx = 12`, `UPDATE events SET idx = -idx WHERE idx > 12`, `UPDATE events SET idx = -idx - 1 WHERE idx < 0`}, 12},
		{"two events swapped", []string{`UPDATE events SET idx = 99 WHERE idx = 12`, `UPDATE events SET idx = 12 WHERE idx = 20`, `UPDATE events SET idx = 20 WHERE idx = 99`}, 12},
		{"an event inserted", []string{`UPDATE events SET idx = -idx WHERE idx >= 12`, `UPDATE events SET idx = 1 - idx WHERE idx < 0`,
			`INSERT INTO events (idx, id, occurred_at, type, org_id, actor_kind, actor, object, leaf) SELECT 12, 'x', occurred_at, type, org_id, actor_kind, actor, object, replace(leaf, id, 'x') FROM events WHERE idx = 13`}, 12},
		{"an event appended", []string{`INSERT INTO events (idx, id, occurred_at, type, org_id, actor_kind, actor, object, leaf) SELECT 30, 'x', occurred_at, type, org_id, actor_kind, actor, object, replace(leaf, id, 'x') FROM events WHERE idx = 13`}, 30},
		{"a hash of the tree altered", []string{fmt.Sprintf(`UPDATE log_hashes SET hash = zeroblob(32) WHERE idx = %d`, tlog.StoredHashIndex(0, 12))}, 12},
		{"an inner hash of the tree altered", []string{fmt.Sprintf(`UPDATE log_hashes SET hash = zeroblob(32) WHERE idx = %d`, tlog.StoredHashIndex(2, 2))}, 11},
		{"a hash of the tree dropped", []string{fmt.Sprintf(`DELETE FROM log_hashes WHERE idx = %d`, tlog.StoredHashIndex(0, 12))}, 12},
		{"hashes appended to the tree", []string{`INSERT INTO log_hashes SELECT max(idx) + 1, zeroblob(32) FROM log_hashes`}, 30},
		{"the head's size lowered", []string{`UPDATE log_head SET size = 29`}, 29},
		{"the head's size raised", []string{`UPDATE log_head SET size = 31`}, 30},
		{"the head's root altered", []string{`UPDATE log_head SET root = zeroblob(32)`}, -1},
		{"a personal part altered", []string{`UPDATE event_persons SET personal = CAST(replace(personal, 'Ada', 'Eve') AS BLOB) WHERE event_id = (SELECT id FROM events WHERE idx = 12)`}, 12},
		{"a leaf that is no event", []string{`UPDATE events SET leaf = CAST('{}' AS BLOB) WHERE idx = 12`}, 12},
		{"a key's record without its event", []string{`INSERT INTO org_keys (id, org_id, slot, state, sealed, created_at) VALUES ('k', 'acme', 1, 'released', x'00', 1)`}, -1},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := audittest.New(t)
			l.Exec(t, c.sql...)
			wantProblem(t, l.DB, nil, c.index)
		})
	}
}

func wantProblem(t *testing.T, db *sqlstore.DB, c *verify.Copy, index int64) {
	t.Helper()
	_, err := verify.Verify(t.Context(), db, c, nil)
	var problem *verify.Problem
	if !errors.As(err, &problem) {
		t.Fatalf("not found: %v", err)
	}
	if problem.Index != index {
		t.Errorf("found %q, want event %d", problem, index)
	}
}

// Promise 5: with a sink's copy that the attacker does not control, also what is consistent in itself is found.
func TestConsistentForgeriesAreFoundThroughTheSink(t *testing.T) {
	for _, c := range []struct {
		name  string
		forge func(t *testing.T, l audittest.Log)
		index int64
	}{
		{"the newest events cut off, the tree with them", func(t *testing.T, l audittest.Log) { l.Rebuild(t, "DELETE FROM events WHERE idx >= 25") }, 25},
		{"one event rewritten, the tree recomputed", func(t *testing.T, l audittest.Log) {
			l.Rebuild(t, "UPDATE events SET leaf = CAST(replace(leaf, 'u-1', 'u-2') AS BLOB), actor = 'u-2' WHERE idx = 12")
		}, 12},
		{"one event taken out, the tree recomputed", func(t *testing.T, l audittest.Log) {
			l.Rebuild(t, "DELETE FROM events WHERE idx = 12", "UPDATE events SET idx = -idx WHERE idx > 12", "UPDATE events SET idx = -idx - 1 WHERE idx < 0")
		}, 12},
		{"everything cut off", func(t *testing.T, l audittest.Log) { l.Rebuild(t, "DELETE FROM events") }, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := audittest.New(t)
			held := l.Copy(t)
			c.forge(t, l)
			if _, err := verify.Verify(t.Context(), l.DB, nil, nil); err != nil {
				t.Fatalf("the forgery is not consistent, so the case proves nothing: %v", err)
			}
			wantProblem(t, l.DB, held, c.index)
		})
	}
}

// The end of a sink's file vouches for what comes before it only with a checkpoint.
func TestACopyThatBeginsLaterCoversNothingBeforeIt(t *testing.T) {
	l := audittest.New(t)
	var events, checkpoint string
	for line := range strings.Lines(l.Text(t)) {
		var parsed audit.Line
		if err := json.Unmarshal([]byte(line), &parsed); err != nil {
			t.Fatal(err)
		}
		switch {
		case parsed.Index == nil:
			checkpoint = line
		case *parsed.Index >= 20:
			events += line
		}
	}
	read := func(text string) *verify.Copy {
		c, err := verify.ReadCopy(strings.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	check := func(what string, c *verify.Copy, covered int64) {
		t.Helper()
		if report, err := verify.Verify(t.Context(), l.DB, c, nil); err != nil || report.Covered != covered || covered != 0 && covered < 30 && report.Uncovered.IsZero() {
			t.Errorf("%s: %+v, %v, want that it covers %d", what, report, err, covered)
		}
	}
	earlier, err := l.DB.At(t.Context(), 10)
	if err != nil {
		t.Fatal(err)
	}
	between := read(events)
	between.AddCheckpoint(earlier)
	check("events alone", read(events), 0)
	check("with a checkpoint behind them", read(events+checkpoint), 30)
	check("with a checkpoint before them", between, 10)

	l.Rebuild(t, "UPDATE events SET leaf = CAST(replace(leaf, 'u-1', 'u-2') AS BLOB), actor = 'u-2' WHERE idx = 5")
	check("events alone, of a log that was rewritten before them", read(events), 0)
	wantProblem(t, l.DB, read(events+checkpoint), 29)
}

// A bare checkpoint that was kept elsewhere is enough.
func TestACheckpointAloneFindsARewrittenLog(t *testing.T) {
	l := audittest.New(t)
	head, err := l.DB.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c := &verify.Copy{}
	c.AddCheckpoint(head)
	if _, err := verify.Verify(t.Context(), l.DB, c, nil); err != nil {
		t.Fatal(err)
	}
	l.Rebuild(t, "UPDATE events SET leaf = CAST(replace(leaf, 'u-1', 'u-2') AS BLOB), actor = 'u-2' WHERE idx = 12")
	wantProblem(t, l.DB, c, 29)
}

func TestErasingAPersonIsSeenAndAllowed(t *testing.T) {
	l := audittest.New(t)
	erase := func() {
		if _, err := l.DB.Erase(t.Context(), "u-1", func(string, int64) audit.Event {
			e := audit.New(audit.PersonErased, "")
			e.Object = "u-1"
			return e
		}); err != nil {
			t.Fatal(err)
		}
	}
	erase()
	for _, place := range []string{"not in the log yet", "in the log"} {
		report, err := verify.Verify(t.Context(), l.DB, l.Copy(t), nil)
		if err != nil || report.Erased != 30 {
			t.Errorf("the event is %s: erased %d, %v", place, report.Erased, err)
		}
		l.Add(t, 0)
	}
	l.Add(t, 1) // event 31, of the same person
	l.Exec(t, "DELETE FROM event_persons")
	wantProblem(t, l.DB, l.Copy(t), 31)
}

// What is kept beside the log follows from it, and is checked against it.
func TestTamperingBesideTheLogIsFound(t *testing.T) {
	for _, c := range []struct {
		name  string
		sql   string
		index int64
	}{
		{"a policy altered", `UPDATE policies SET content = x'00' WHERE name = 'authz.rego'`, 30},
		{"a policy's file dropped", `DELETE FROM policies WHERE name = 'data.json'`, 30},
		{"a policy's file added", `INSERT INTO policies SELECT revision, 'more.rego', content FROM policies LIMIT 1`, 30},
		{"the policies dropped", `DELETE FROM policies`, 30},
		{"a policy that never decided", `INSERT INTO policies VALUES ('sha256:00', 'x.rego', x'00')`, -1},
		{"a receipt altered", `UPDATE event_receipts SET receipt = (SELECT receipt FROM event_receipts WHERE idx = 31) WHERE idx = 32`, 32},
		{"a receipt made up", `INSERT INTO event_receipts VALUES ('vault', 12, 'x')`, 12},
		{"a sink's receipts made up", `INSERT INTO event_receipts SELECT 'other', idx, receipt FROM event_receipts`, 30},
		{"the receipt key replaced", `UPDATE receipt_keys SET public = zeroblob(32)`, 30},
		{"a person dropped", `DELETE FROM event_persons WHERE event_id = (SELECT id FROM events WHERE idx = 12)`, 12},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := audittest.NewSigned(t)
			e.Exec(t, `INSERT INTO org_keys (id, org_id, slot, state, sealed) VALUES ('k-1', 'acme', NULL, 'deleted', NULL), ('k-2', 'acme', NULL, 'deleted', NULL), ('k-3', 'acme', 1, 'released', x'00')`)
			signed := &verify.Copy{}
			last, err := e.DB.LastSigned(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			signed.AddSigned(last.Checkpoint)
			if report, err := verify.Verify(t.Context(), e.DB, signed, nil); err != nil || report.Receipts != 10 {
				t.Fatalf("untouched: %d receipts, %v", report.Receipts, err)
			}
			e.Exec(t, c.sql)
			wantProblem(t, e.DB, signed, c.index)
		})
	}
}

func TestReadCopyRefusesWhatASinkDoesNotWrite(t *testing.T) {
	for name, text := range map[string]string{
		"not JSON":                  "hello\n",
		"an unknown line":           `{"x":1}` + "\n",
		"a gap":                     `{"index":0,"event":{}}` + "\n" + `{"index":2,"event":{}}` + "\n",
		"two versions of one event": `{"index":0,"event":{"a":1}}` + "\n" + `{"index":0,"event":{"a":2}}` + "\n",
		"a checkpoint without root": `{"checkpoint":"o\n1\n"}` + "\n",
	} {
		if _, err := verify.ReadCopy(strings.NewReader(text)); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}
