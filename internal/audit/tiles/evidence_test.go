package tiles_test

import (
	"context"
	"database/sql"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/audittest"
	"github.com/orgkeys/orgkeys/internal/audit/tiles"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// rolledBack is a log of 641 events of which event 40 accepted a rollback, a sink's text of
// 300 events, in which event 25 is the one that was lost, and the sink's text now.
func rolledBack(t *testing.T, location string) (e movable, before, now string) {
	t.Helper()
	dir := t.TempDir()
	e = movable{audittest.NewSignedAt(t, location), location, tiles.Archive{Store: tiles.NewDir(dir)}, dir}
	e.DB.UseArchive(e.Archive)
	head, err := e.DB.Head(t.Context())
	audittest.Must(t, err)
	r := audit.Rollback{From: head.Text(), To: head.Text(), Kept: 20, Reason: "a test"}
	sink := audit.NewFileSink(e.Sink)
	audittest.Must(t, sink.AcceptRollback(t.Context(), r))
	more := []audit.Event{r.Event()}
	for range 600 {
		more = append(more, e.Key(audit.KeysListed, ""))
	}
	e.SignedLog.Record(t, more...)
	last, err := sink.Last(t.Context())
	audittest.Must(t, err)
	entries, head, err := e.DB.Durable(t.Context(), last, 1000)
	audittest.Must(t, err)
	_, err = sink.Append(t.Context(), entries, head)
	audittest.Must(t, err)
	for _, row := range [][]any{{"k-1", nil, "deleted", nil}, {"k-2", nil, "deleted", nil}, {"k-3", 1, "released", []byte{0}}} {
		_, err := e.Raw.Exec("INSERT INTO org_keys (id, org_id, slot, state, sealed) VALUES ($1, 'acme', $2, $3, $4)", row...)
		audittest.Must(t, err)
	}
	now = e.Text(t)
	_, anew, _ := strings.Cut(now, `"rollback"`)
	for _, line := range strings.SplitAfter(anew, "\n")[1:301] {
		if strings.HasPrefix(line, `{"index":25,`) {
			line = strings.Replace(line, "u-1", "u-9", 1)
		}
		before += line
	}
	return e, before, now
}

// verifyWith verifies the log with a sink's text.
func (e movable) verifyWith(t *testing.T, db *sqlstore.DB, text string) (verify.Report, error) {
	t.Helper()
	evidence, err := verify.ReadCopy(strings.NewReader(text))
	audittest.Must(t, err)
	audittest.Must(t, evidence.AddKept(t.Context(), e.DB, nil))
	return verify.Verify(t.Context(), db, evidence, nil)
}

// That the event of an accepted rollback is no longer read is no forgery, and excuses nothing.
func TestARollbackWhoseEventIsNoLongerRead(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, location string) {
		e, before, now := rolledBack(t, location)
		other := audittest.OpenAt(t, location).DB // which has no archive
		want := func(what string, db *sqlstore.DB, unexplained int64) {
			t.Helper()
			report, err := e.verifyWith(t, db, now)
			if err != nil || report.Unexplained != unexplained || len(report.Rollbacks) != 1 || (report.Unread != nil) != (db == other && report.Archived > 0) {
				t.Errorf("%s: %+v, %v", what, report, err)
			}
			report, err = e.verifyWith(t, db, before)
			switch problem := new(verify.Problem); {
			case unexplained == 0 && (err != nil || !report.Before):
				t.Errorf("%s, a copy from before: %+v, %v", what, report, err)
			case unexplained > 0 && (!errors.As(err, &problem) || !strings.Contains(problem.What, "use a copy from after it")):
				t.Errorf("%s, a copy from before: %v", what, err)
			}
			forged := strings.Replace(now, `"kept":20`, `"kept":21`, 1)
			if unexplained == 0 {
				if _, err := e.verifyWith(t, db, forged); !errors.As(err, new(*verify.Problem)) {
					t.Errorf("%s, another rollback: %v", what, err)
				}
			}
		}
		want("all in the database", e.DB, 0)
		e.run(t, e.move(t), 512, 0)
		want("archived", e.DB, 0)
		want("the archive was not read", other, 1)
		m := e.move(t)
		m.Keep = time.Nanosecond
		e.run(t, m, 0, 512)
		want("removed", e.DB, 1)
		want("removed, and the archive was not read", other, 1)
		// One behind what is removed must have its event.
		evidence, err := verify.ReadCopy(strings.NewReader(now))
		audittest.Must(t, err)
		at, err := e.DB.At(t.Context(), 600)
		audittest.Must(t, err)
		evidence.Rollbacks = append(evidence.Rollbacks, audit.Rollback{From: at.Text(), To: at.Text(), Kept: 600, Reason: "forged"})
		if _, err := verify.Verify(t.Context(), e.DB, evidence, nil); !errors.As(err, new(*verify.Problem)) {
			t.Errorf("a rollback without an event: %v", err)
		}
	})
}

// A checkpoint that cannot be the archive's is no archive that was not read.
func TestACheckpointThatIsNotTheArchives(t *testing.T) {
	t.Parallel()
	e := newMovable(t, filepath.Join(t.TempDir(), "orgkeys.db"))
	first, err := e.DB.SignedAfter(t.Context(), 0)
	audittest.Must(t, err)
	e.run(t, e.move(t), 512, 0)
	path := filepath.Join(e.dir, "checkpoint")
	good, err := os.ReadFile(path)
	audittest.Must(t, err)
	origin, rest, _ := strings.Cut(string(good), "\n")
	for what, c := range map[string]struct {
		text  string
		index int64
	}{
		"empty":               {"", -1},
		"no checkpoint":       {"<html>503</html>\n", -1},
		"another log's":       {origin + "-other\n" + rest, -1},
		"less than was moved": {first[0].Note, first[0].Size},
	} {
		audittest.Must(t, os.WriteFile(path, []byte(c.text), 0o600))
		e.wantProblem(t, what, c.index)
	}
	// What cannot be read is another matter.
	audittest.Must(t, os.Remove(path))
	audittest.Must(t, os.Mkdir(path, 0o700))
	if report, err := e.verify(t, e.DB); err != nil || report.Unread == nil {
		t.Errorf("a file that cannot be read: %v, %v", report.Unread, err)
	}
	audittest.Must(t, os.Remove(path))
	audittest.Must(t, os.WriteFile(path, good, 0o600))
	e.wantGood(t)
}

// signing is a database that is signed once, between a run's first look at what is signed and
// the next.
type signing struct {
	tiles.Log
	sign func()
}

func (s *signing) Archived(ctx context.Context) (audit.Archived, error) {
	if s.sign != nil {
		s.sign()
		s.sign = nil
	}
	return s.Log.Archived(ctx)
}

// killed is a store in which a run is killed after it removed the first entries.
type killed struct{ tiles.Store }

func (k killed) RemoveAll(ctx context.Context, path string) error {
	err := k.Store.RemoveAll(ctx, path)
	if path == "tile/entries/000" {
		err = errors.Join(err, errKilled)
	}
	return err
}

// Whenever a run is killed, the archive by itself says why entries are missing.
func TestNothingIsRemovedThatTheArchiveDoesNotExplain(t *testing.T) {
	t.Parallel()
	e := newMovable(t, filepath.Join(t.TempDir(), "orgkeys.db"))
	e.run(t, e.move(t), 512, 0)
	m := e.move(t)
	m.Keep = time.Nanosecond
	m.Signed = func(context.Context, func(context.Context) (bool, error)) error { return errKilled }
	if _, err := m.Run(t.Context(), e.Archive, e.DB); !errors.Is(err, errKilled) {
		t.Fatal(err)
	}
	m.Signed = e.move(t).Signed
	if _, err := m.Run(t.Context(), tiles.Archive{Store: killed{e.Store}}, &signing{e.DB, func() { e.sign(t) }}); !errors.Is(err, errKilled) {
		t.Fatal(err)
	}
	keys, err := audit.ParseKeys(e.VKey(t))
	audittest.Must(t, err)
	if _, removed, err := tiles.Check(t.Context(), e.Archive, keys, audit.Checkpoint{}, nil); err != nil || removed != 256 {
		t.Errorf("the files alone: %d are removed, %v", removed, err)
	}
	_, err = m.Run(t.Context(), e.Archive, e.DB)
	audittest.Must(t, err)
	if report := e.wantGood(t); report.Removed != 512 {
		t.Errorf("%+v", report)
	}
}

// A log that was set back takes what was moved, and what says that something was removed, into
// another archive, and goes on there.
func TestALogThatWasSetBackTakesItsArchiveOver(t *testing.T) {
	t.Parallel()
	e := newMovable(t, filepath.Join(t.TempDir(), "orgkeys.db"))
	more := func(e movable, object string) {
		t.Helper()
		var events []audit.Event
		for range 600 {
			events = append(events, e.Key(audit.KeysListed, object))
		}
		e.SignedLog.Record(t, events...)
	}
	e.run(t, e.move(t), 512, 0)
	m := e.move(t)
	m.Keep = time.Nanosecond
	e.run(t, m, 0, 512)
	more(e, "")
	e.run(t, e.move(t), 768, 0)
	audittest.Must(t, errors.Join(e.Raw.Close(), e.DB.Close())) // the write-ahead log goes into the file
	backup, err := os.ReadFile(e.location)
	audittest.Must(t, err)
	open := func() {
		t.Helper()
		e.Log = audittest.OpenAt(t, e.location)
		e.Checkpoints = audit.NewCheckpointer(audit.NewLog(e.DB, nil), e.DB, e.Signer, time.Hour, nil)
		e.DB.UseArchive(e.Archive)
	}
	open()
	more(e, "lost")
	e.run(t, e.move(t), 512, 0)
	audittest.Must(t, errors.Join(e.Raw.Close(), e.DB.Close()))
	e.location = filepath.Join(t.TempDir(), "orgkeys.db")
	audittest.Must(t, os.WriteFile(e.location, backup, 0o600))
	open()
	more(e, "after")
	before := e.wantGood(t)
	if _, err := e.move(t).Run(t.Context(), e.Archive, e.DB); !errors.Is(err, tiles.ErrRewritten) {
		t.Fatalf("the archive, which is ahead: %v", err)
	}

	dir := t.TempDir()
	to := tiles.Archive{Store: tiles.NewDir(dir)}
	altered := filepath.Join(e.dir, "tile/entries/002")
	good, err := os.ReadFile(altered)
	audittest.Must(t, err)
	audittest.Must(t, os.WriteFile(altered, append(good[:len(good)-1:len(good)-1], good[len(good)-1]^1), 0o600))
	if _, err := tiles.Transfer(t.Context(), e.Archive, to, e.DB, e.move(t).Progress); !errors.As(err, new(*verify.Problem)) {
		t.Errorf("an altered bundle: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "checkpoint")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it has a checkpoint: %v", err)
	}
	audittest.Must(t, os.Remove(altered))
	if _, err := tiles.Transfer(t.Context(), e.Archive, to, e.DB, e.move(t).Progress); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), e.dir+" lacks") {
		t.Errorf("a bundle that is gone: %v", err)
	}
	audittest.Must(t, os.WriteFile(altered, good, 0o600))
	published, err := os.ReadFile(filepath.Join(e.dir, "checkpoint"))
	audittest.Must(t, err)
	audittest.Must(t, os.WriteFile(filepath.Join(dir, "checkpoint"), published, 0o600))
	if _, err := tiles.Transfer(t.Context(), e.Archive, to, e.DB, e.move(t).Progress); !errors.Is(err, fs.ErrNotExist) || strings.Contains(err.Error(), " lacks") {
		t.Errorf("a place that lacks a tile itself: %v", err)
	}
	audittest.Must(t, os.Remove(filepath.Join(dir, "checkpoint")))
	head, err := tiles.Transfer(t.Context(), e.Archive, to, e.DB, e.move(t).Progress)
	if err != nil || head.Size != before.Log.Size {
		t.Fatalf("%d events, %v", head.Size, err)
	}
	e.Archive, e.dir = to, dir
	e.DB.UseArchive(to)
	if report := e.wantGood(t); report.Receipts != before.Receipts || report.Archived != 1280 || report.Removed != 512 {
		t.Errorf("%+v, before %+v", report, before)
	}
	e.run(t, e.move(t), 512, 0)
	if report := e.wantGood(t); report.Receipts != before.Receipts {
		t.Errorf("%+v, before %+v", report, before)
	}
	keys, err := audit.ParseKeys(e.VKey(t))
	audittest.Must(t, err)
	if _, removed, err := tiles.Check(t.Context(), to, keys, audit.Checkpoint{}, nil); err != nil || removed != 512 {
		t.Errorf("the files alone: %d are removed, %v", removed, err)
	}
}

// What keeps old events in the database is named, and nothing is where nothing is to be moved.
func TestWhatHoldsEventsBackIsNamed(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, location string) {
		e := newMovable(t, location)
		late := time.Now().Add(time.Hour)
		want := func(what string, index int64, before time.Time, holders ...sqlstore.Hold) {
			t.Helper()
			got, err := e.DB.HeldBack(t.Context(), index, before, 740)
			for i := range got {
				if !got[i].At.IsZero() && !got[i].At.Before(before) { // the newest event is named
					got[i].At = before
				}
			}
			if err != nil || !slices.Equal(got, holders) {
				t.Errorf("%s: %+v, %v; want %+v", what, got, err, holders)
			}
		}
		want("nothing", 0, late)
		e.Exec(t, "INSERT INTO sink_progress (sink, next) VALUES ('away', 300)")
		e.run(t, e.move(t), 256, 0)
		want("a sink that is away", 256, late, sqlstore.Hold{Sink: "away", Next: 300})
		early := time.Now().Add(-time.Hour)
		e.Exec(t, "UPDATE events SET occurred_at = occurred_at + 1000000 WHERE idx = 400")
		want("events that are not old", 256, early, sqlstore.Hold{At: early, Next: 400})
		e.Exec(t, "UPDATE events SET occurred_at = occurred_at - 1000000 WHERE idx = 400")
		want("no whole bundle", 512, late)
		e.Exec(t, "DELETE FROM sink_progress WHERE sink = 'away'") // as operations.md says
		want("retired", 256, late)
		e.run(t, e.move(t), 256, 0)
		e.wantGood(t)
	})
}

// restorable is a log whose database can be put back to what it was.
func (e *movable) restorable(t *testing.T) (restore func()) {
	t.Helper()
	reopen := func() {
		t.Helper()
		e.Log = audittest.OpenAt(t, e.location)
		e.Checkpoints = audit.NewCheckpointer(audit.NewLog(e.DB, nil), e.DB, e.Signer, time.Hour, nil)
		e.DB.UseArchive(e.Archive)
	}
	closed := func() {
		t.Helper()
		audittest.Must(t, errors.Join(e.Raw.Close(), e.DB.Close()))
	}
	closed()
	if e.location[0] != 'p' {
		backup, err := os.ReadFile(e.location) // the write-ahead log is in it
		audittest.Must(t, err)
		reopen()
		return func() {
			closed()
			e.location = filepath.Join(t.TempDir(), "orgkeys.db")
			audittest.Must(t, os.WriteFile(e.location, backup, 0o600))
			reopen()
		}
	}
	admin, err := sql.Open("pgx", strings.Replace(e.location, "/orgkeys?", "/postgres?", 1))
	audittest.Must(t, err)
	t.Cleanup(func() { admin.Close() })
	_, err = admin.Exec("CREATE DATABASE backup TEMPLATE orgkeys")
	audittest.Must(t, err)
	reopen()
	return func() {
		closed()
		_, err := admin.Exec("DROP DATABASE orgkeys WITH (FORCE)")
		audittest.Must(t, err)
		_, err = admin.Exec("CREATE DATABASE orgkeys TEMPLATE backup")
		audittest.Must(t, err)
		reopen()
	}
}

// What an archive lacks is explained by what its own log says, up to a signed checkpoint, and
// by nothing else.
func TestRemovedEntriesAreExplainedByTheArchiveItself(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, location string) {
		e := newMovable(t, location)
		keys, err := audit.ParseKeys(e.VKey(t))
		audittest.Must(t, err)
		e.run(t, e.move(t), 512, 0)
		restore := e.restorable(t)
		explain := func(keys audit.Keys) (int64, error) { return e.move(t).Explain(t.Context(), e.Archive, e.DB, keys) }
		stolen := filepath.Join(e.dir, "tile/entries/000")
		entries, err := os.ReadFile(stolen)
		audittest.Must(t, err)
		audittest.Must(t, os.Remove(stolen))
		if _, err := explain(nil); !errors.Is(err, tiles.ErrEntriesGone) {
			t.Errorf("stolen entries, without keys: %v", err)
		}
		if n, err := explain(keys); n != 0 || !errors.As(err, new(*verify.Problem)) {
			t.Errorf("stolen entries: %d are said to be removed, %v", n, err)
		}
		audittest.Must(t, os.WriteFile(stolen, entries, 0o600))
		if n, err := explain(nil); err != nil || n != 0 {
			t.Errorf("where nothing is missing: %d, %v", n, err)
		}

		m := e.move(t)
		m.Keep = time.Nanosecond
		e.run(t, m, 0, 512)
		restore()
		if _, err := explain(nil); !errors.Is(err, tiles.ErrEntriesGone) {
			t.Errorf("removed entries, without keys: %v", err)
		}
		other := audittest.NewSignedAt(t, filepath.Join(t.TempDir(), "orgkeys.db"))
		others, err := audit.ParseKeys(other.VKey(t))
		audittest.Must(t, err)
		if n, err := explain(others); n != 0 || err == nil {
			t.Errorf("by another log's key %d are removed, %v", n, err)
		}
		if n := e.count(t, "events WHERE type = 'log.pruned'"); n != 0 {
			t.Errorf("%d removals are announced", n)
		}
		m = e.move(t)
		m.Signed = func(context.Context, func(context.Context) (bool, error)) error { return tiles.ErrNotCovered } // killed there
		if n, err := m.Explain(t.Context(), e.Archive, e.DB, keys); n != 0 || !errors.Is(err, tiles.ErrNotCovered) {
			t.Errorf("before the event is signed %d are removed, %v", n, err)
		}
		if n, err := explain(keys); err != nil || n != 512 {
			t.Errorf("%d are removed, %v; want 512", n, err)
		}
		if n, err := explain(nil); err != nil || n != 512 {
			t.Errorf("again: %d are removed, %v; want 512", n, err)
		}
		if report := e.wantGood(t); report.Removed != 512 || report.Archived != 512 {
			t.Errorf("%+v", report)
		}
		to := tiles.Archive{Store: tiles.NewDir(t.TempDir())}
		if _, err := tiles.Transfer(t.Context(), e.Archive, to, e.DB, e.move(t).Progress); err != nil {
			t.Fatal(err)
		}
		e.DB.UseArchive(to)
		e.wantGood(t)
		if _, removed, err := tiles.Check(t.Context(), to, keys, audit.Checkpoint{}, nil); err != nil || removed != 512 {
			t.Errorf("the files alone: %d are removed, %v", removed, err)
		}
	})
}

// A file sink that was away for longer than retention keeps is told what to do, and begins anew.
func TestASinkThatWasAwayForTooLong(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, location string) {
		e := newMovable(t, location) // of its 740 events the sink has 30
		e.run(t, e.move(t), 512, 0)
		m := e.move(t)
		m.Keep = time.Nanosecond
		e.run(t, m, 0, 512)
		head, err := e.DB.Head(t.Context())
		audittest.Must(t, err)

		log := audit.NewLog(e.DB, slog.New(slog.DiscardHandler), audit.NewFileSink(e.Sink))
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- log.Run(ctx) }()
		t.Cleanup(func() { stop(); <-ended })
		wait := func(what string, done func(audit.SinkStatus) bool) {
			t.Helper()
			for end := time.Now().Add(20 * time.Second); !done(log.Sinks()[0]); time.Sleep(10 * time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("%s: %+v", what, log.Sinks()[0])
				}
			}
		}
		wait("it is not told", func(s audit.SinkStatus) bool {
			return errors.Is(s.Err, sqlstore.ErrRemoved) && strings.Contains(s.Err.Error(), "move the sink's file aside")
		})
		audittest.Must(t, os.Rename(e.Sink, e.Sink+".old"))
		wait("it does not go on", func(s audit.SinkStatus) bool { return s.Err == nil && s.Held.Size >= head.Size })
		evidence := e.Copy(t)
		audittest.Must(t, evidence.AddKept(t.Context(), e.DB, nil))
		if report, err := verify.Verify(t.Context(), e.DB, evidence, nil); err != nil || report.Covered < head.Size {
			t.Errorf("by the new file: %+v, %v", report, err)
		}
	})
}
