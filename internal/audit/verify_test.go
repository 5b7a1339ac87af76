package audit_test

import (
	"bytes"
	"crypto/ed25519"
	"database/sql"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// log30 is a log of 30 events in three batches, and its file sink.
type log30 struct {
	db   *sqlstore.DB
	raw  *sql.DB // for tampering, past sqlstore
	sink string
}

func newLog30(t *testing.T) log30 {
	t.Helper()
	l := openLog(t)
	for range 3 {
		l.add(t, 10)
	}
	return l
}

// openLog makes an empty log.
func openLog(t *testing.T) log30 {
	t.Helper()
	dir := t.TempDir()
	db, err := sqlstore.Open(t.Context(), filepath.Join(dir, "orgkeys.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	if err := db.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	db.UseEventKey(audit.EventKey{})
	raw, err := sql.Open("sqlite", "file:"+filepath.Join(dir, "orgkeys.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Close() })
	return log30{db, raw, filepath.Join(dir, "elsewhere.jsonl")}
}

// add records n events, sequences them and feeds the sink.
func (l log30) add(t *testing.T, n int) {
	t.Helper()
	for range n {
		e := audit.New(audit.KeysListed, "acme")
		e.Actor = audit.Actor{Kind: "user", ID: "u-1"}
		e.Personal = audit.Personal{Name: "Ada"}
		if err := l.db.Record(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.db.Sequence(t.Context(), 1000); err != nil {
		t.Fatal(err)
	}
	sink := audit.NewFileSink(l.sink)
	last, err := sink.Last(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	entries, err := l.db.Entries(t.Context(), last.Size, 1000)
	if err != nil {
		t.Fatal(err)
	}
	head, err := l.db.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sink.Append(t.Context(), entries, head); err != nil {
		t.Fatal(err)
	}
}

func (l log30) exec(t *testing.T, statements ...string) {
	t.Helper()
	for _, s := range statements {
		if _, err := l.raw.Exec(s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
}

func (l log30) copy(t *testing.T) *audit.Copy {
	t.Helper()
	f, err := os.Open(l.sink)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c, err := audit.ReadCopy(f)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestAnUntouchedLogVerifies(t *testing.T) {
	l := newLog30(t)
	for name, c := range map[string]*audit.Copy{"alone": nil, "with its sink": l.copy(t)} {
		report, err := audit.Verify(t.Context(), l.db, c, nil)
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
			l := newLog30(t)
			l.exec(t, c.sql...)
			wantProblem(t, l.db, nil, c.index)
		})
	}
}

func wantProblem(t *testing.T, db *sqlstore.DB, c *audit.Copy, index int64) {
	t.Helper()
	_, err := audit.Verify(t.Context(), db, c, nil)
	var problem *audit.Problem
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
		forge func(t *testing.T, l log30)
		index int64
	}{
		{"the newest events cut off, the tree with them", func(t *testing.T, l log30) { l.rebuild(t, "DELETE FROM events WHERE idx >= 25") }, 25},
		{"one event rewritten, the tree recomputed", func(t *testing.T, l log30) {
			l.rebuild(t, "UPDATE events SET leaf = CAST(replace(leaf, 'u-1', 'u-2') AS BLOB), actor = 'u-2' WHERE idx = 12")
		}, 12},
		{"one event taken out, the tree recomputed", func(t *testing.T, l log30) {
			l.rebuild(t, "DELETE FROM events WHERE idx = 12", "UPDATE events SET idx = -idx WHERE idx > 12", "UPDATE events SET idx = -idx - 1 WHERE idx < 0")
		}, 12},
		{"everything cut off", func(t *testing.T, l log30) { l.rebuild(t, "DELETE FROM events") }, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLog30(t)
			held := l.copy(t)
			c.forge(t, l)
			if _, err := audit.Verify(t.Context(), l.db, nil, nil); err != nil {
				t.Fatalf("the forgery is not consistent, so the case proves nothing: %v", err)
			}
			wantProblem(t, l.db, held, c.index)
		})
	}
}

// A bare checkpoint that was kept elsewhere is enough.
func TestACheckpointAloneFindsARewrittenLog(t *testing.T) {
	l := newLog30(t)
	head, err := l.db.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c := &audit.Copy{}
	c.AddCheckpoint(head)
	if _, err := audit.Verify(t.Context(), l.db, c, nil); err != nil {
		t.Fatal(err)
	}
	l.rebuild(t, "UPDATE events SET leaf = CAST(replace(leaf, 'u-1', 'u-2') AS BLOB), actor = 'u-2' WHERE idx = 12")
	wantProblem(t, l.db, c, 29)
}

// rebuild tampers and then recomputes the whole tree, as an attacker who has
// our code and the database would.
func (l log30) rebuild(t *testing.T, statements ...string) {
	t.Helper()
	l.exec(t, statements...)
	rows, err := l.raw.Query("SELECT leaf FROM events WHERE idx IS NOT NULL ORDER BY idx")
	if err != nil {
		t.Fatal(err)
	}
	var leaves [][]byte
	for rows.Next() {
		var b []byte
		if err := rows.Scan(&b); err != nil {
			t.Fatal(err)
		}
		leaves = append(leaves, b)
	}
	hashes, root, err := audit.Grow(0, leaves, nil)
	if err != nil {
		t.Fatal(err)
	}
	l.exec(t, "DELETE FROM log_hashes")
	for i, h := range hashes {
		if _, err := l.raw.Exec("INSERT INTO log_hashes VALUES ($1, $2)", i, h[:]); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.raw.Exec("UPDATE log_head SET size = $1, root = $2", len(leaves), root[:]); err != nil {
		t.Fatal(err)
	}
}

func TestErasingAPersonIsSeenAndAllowed(t *testing.T) {
	l := newLog30(t)
	erase := func() {
		if _, err := l.db.Erase(t.Context(), "u-1", func(int64) audit.Event {
			e := audit.New(audit.PersonErased, "")
			e.Object = "u-1"
			return e
		}); err != nil {
			t.Fatal(err)
		}
	}
	erase()
	for _, place := range []string{"not in the log yet", "in the log"} {
		report, err := audit.Verify(t.Context(), l.db, l.copy(t), nil)
		if err != nil || report.Erased != 30 {
			t.Errorf("the event is %s: erased %d, %v", place, report.Erased, err)
		}
		l.add(t, 0)
	}
	l.add(t, 1) // event 31, of the same person
	l.exec(t, "DELETE FROM event_persons")
	wantProblem(t, l.db, l.copy(t), 31)
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
			e := newEvidence(t)
			e.exec(t, `INSERT INTO org_keys (id, org_id, slot, state, sealed) VALUES ('k-1', 'acme', NULL, 'deleted', NULL), ('k-2', 'acme', NULL, 'deleted', NULL), ('k-3', 'acme', 1, 'released', x'00')`)
			signed := &audit.Copy{}
			last, err := e.db.LastSigned(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			signed.AddSigned(last.Checkpoint)
			if report, err := audit.Verify(t.Context(), e.db, signed, nil); err != nil || report.Receipts != 10 {
				t.Fatalf("untouched: %d receipts, %v", report.Receipts, err)
			}
			e.exec(t, c.sql)
			wantProblem(t, e.db, signed, c.index)
		})
	}
}

// A policy that is in force mends its own text, so that exports go on to verify.
func TestAChangedPolicyIsPutRight(t *testing.T) {
	e := newEvidence(t)
	e.exec(t, `UPDATE policies SET content = x'00' WHERE name = 'authz.rego'`)
	if _, err := audit.Export(t.Context(), io.Discard, e.db, t.TempDir(), "a test", nil); err == nil || !strings.Contains(err.Error(), "was altered") {
		t.Errorf("exported, although the archive cannot verify: %v", err)
	}
	must(t, e.db.KeepPolicy(t.Context(), e.policy, map[string][]byte{"authz.rego": []byte("package orgkeys.authz\n"), "data.json": []byte("{}")}))
	if _, err := verifyExport(t, e.export(t), e.vkey(t)); err != nil {
		t.Error(err)
	}
}

func TestOnlyKeysThatHaveSignedAreShown(t *testing.T) {
	e := newEvidence(t)
	genuine := e.vkey(t)
	forged, err := audit.VerifierKey(strings.Split(genuine, "+")[0], newSigner(t).Private.Public().(ed25519.PublicKey))
	must(t, err)
	e.exec(t, `INSERT INTO checkpoint_keys (vkey) VALUES ('`+forged+`'), ('evil+00000000+AAAA')`)
	keys, err := audit.SigningKeys(t.Context(), e.db)
	if err != nil || len(keys) != 1 || keys[0] != genuine {
		t.Errorf("%q, %v", keys, err)
	}
}

func TestNoPersonIsInTheLeavesOrTheSink(t *testing.T) {
	l := newLog30(t)
	b, err := os.ReadFile(l.sink)
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
			l := newLog30(t)
			c.damage(t, l.sink)
			last, err := audit.NewFileSink(l.sink).Last(t.Context())
			if err != nil || last.Size != c.kept {
				t.Fatalf("last checkpoint %d, %v; want %d", last.Size, err, c.kept)
			}
			l.add(t, 5)
			if report, err := audit.Verify(t.Context(), l.db, l.copy(t), nil); err != nil || report.Covered != 35 {
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
	l := newLog30(t)
	sink := audit.NewFileSink(l.sink)
	if _, err := sink.Last(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(l.sink, l.sink+".rotated"); err != nil {
		t.Fatal(err)
	}
	if _, err := sink.Append(t.Context(), nil, audit.Checkpoint{Origin: "o", Size: 30}); err == nil {
		t.Error("a checkpoint went into a file that is no longer there, and counted as kept")
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
		if _, err := audit.ReadCopy(strings.NewReader(text)); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}

func TestCheckpointTextRoundTrips(t *testing.T) {
	c := audit.Checkpoint{Origin: "orgkeys/x", Size: 7, Root: tlog.RecordHash([]byte("x"))}
	if want := "orgkeys/x\n7\n" + base64.StdEncoding.EncodeToString(c.Root[:]) + "\n"; c.Text() != want {
		t.Errorf("text %q, want %q", c.Text(), want)
	}
	if back, err := audit.ParseCheckpoint(c.Text()); err != nil || back != c {
		t.Errorf("read back %+v, %v", back, err)
	}
	for _, bad := range []string{"", "o\n1\nAA==\n", "o\n-1\n" + c.Root.String() + "\n", "o\n01\n" + c.Root.String() + "\n", "\n1\n" + c.Root.String() + "\n"} {
		if _, err := audit.ParseCheckpoint(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}
