package tiles_test

import (
	"bytes"
	"compress/flate"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/archive"
	"github.com/orgkeys/orgkeys/internal/audit/audittest"
	"github.com/orgkeys/orgkeys/internal/audit/tiles"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/internal/sqlstore/pgtest"
)

// movable is a log of 740 events in a database, of which 512 can be moved, and an archive.
type movable struct {
	audittest.SignedLog
	location string
	tiles.Archive
	dir string
}

func newMovable(t *testing.T, location string) movable {
	t.Helper()
	dir := t.TempDir()
	e := movable{audittest.NewSignedAt(t, location), location, tiles.Archive{Store: tiles.NewDir(dir)}, dir}
	e.DB.UseArchive(e.Archive)
	delivered := e.Key(audit.KeyDelivered, "k-3")
	delivered.Personal = audit.Personal{Address: "192.0.2.99"}
	added := e.Key(audit.KeyCreated, "k-4") // its holder made it, and has it
	added.Personal = audit.Personal{Address: "192.0.2.98"}
	events := []audit.Event{delivered, added}
	for i := range 698 {
		event := e.Key(audit.KeysListed, "")
		event.Actor.ID = fmt.Sprintf("u-%d", i%3+1)
		event.Personal = audit.Personal{Name: "Grace " + event.Actor.ID, Address: "192.0.2.1"}
		events = append(events, event)
	}
	e.SignedLog.Record(t, events...)
	for _, row := range [][]any{{"k-1", nil, "deleted", nil, nil, nil}, {"k-2", nil, "deleted", nil, nil, nil}, {"k-3", 1, "released", []byte{0}, delivered.ID, 1}, {"k-4", 2, "released", []byte{0}, added.ID, 1}} {
		_, err := e.Raw.Exec("INSERT INTO org_keys (id, org_id, slot, state, sealed, delivery_event, delivered_at) VALUES ($1, 'acme', $2, $3, $4, $5, $6)", row...)
		audittest.Must(t, err)
	}
	return e
}

// move is what moves everything.
func (e movable) move(t *testing.T) tiles.Move {
	return tiles.Move{
		Before:   time.Now().Add(time.Hour),
		Progress: func(string) verify.Progress { return nil },
		Signed: func(ctx context.Context, covered func(context.Context) (bool, error)) error {
			for range 20 { // another may give the indices just now
				e.sign(t)
				if done, err := covered(ctx); err != nil || done {
					return err
				}
				time.Sleep(50 * time.Millisecond)
			}
			return errors.New("a signed checkpoint covers no event of this")
		},
	}
}

// sign gives indices to what was recorded, and signs.
func (e movable) sign(t *testing.T) {
	t.Helper()
	_, err := e.DB.Sequence(t.Context(), 1000, audit.Condition{})
	audittest.Must(t, err)
	e.Sign(t)
}

func (e movable) run(t *testing.T, m tiles.Move, events, entries int64) tiles.Moved {
	t.Helper()
	done, err := m.Run(t.Context(), e.Archive, e.DB)
	if err != nil || done.Events != events || done.Entries != entries {
		t.Fatalf("moved %d events and removed %d entries, %v; want %d and %d", done.Events, done.Entries, err, events, entries)
	}
	return done
}

// verify verifies the log in the database, with its signed checkpoints.
func (e movable) verify(t *testing.T, db *sqlstore.DB) (verify.Report, error) {
	t.Helper()
	evidence := &verify.Copy{}
	audittest.Must(t, evidence.AddKept(t.Context(), db, nil))
	return verify.Verify(t.Context(), db, evidence, nil)
}

func (e movable) wantGood(t *testing.T) verify.Report {
	t.Helper()
	report, err := e.verify(t, e.DB)
	if err != nil || report.Unread != nil {
		t.Fatalf("verifying the log: %v, %v", err, report.Unread)
	}
	audittest.Must(t, e.DB.CheckArchived(t.Context()))
	return report
}

func (e movable) wantProblem(t *testing.T, what string, index int64) {
	t.Helper()
	_, err := e.verify(t, e.DB)
	if problem := new(verify.Problem); !errors.As(err, &problem) || problem.Index != index {
		t.Errorf("%s: %v; want a problem with event %d", what, err, index)
	}
}

func (e movable) count(t *testing.T, what string) (n int64) {
	t.Helper()
	audittest.Must(t, e.Raw.QueryRow("SELECT count(*) FROM "+what).Scan(&n))
	return n
}

func (e movable) leaves(t *testing.T, n int64) [][]byte {
	t.Helper()
	var all [][]byte
	for int64(len(all)) < n {
		page, err := e.DB.Entries(t.Context(), int64(len(all)), int(n)-len(all))
		if err != nil || len(page) == 0 {
			t.Fatalf("after %d events: %v", len(all), err)
		}
		for _, entry := range page {
			all = append(all, bytes.Clone(entry.Leaf))
		}
	}
	return all
}

func (e movable) export(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	_, err := archive.Write(t.Context(), &b, e.DB, nil, t.TempDir(), "test", nil)
	audittest.Must(t, err)
	return b.Bytes()
}

// onBoth runs a test over both kinds of databases.
func onBoth(t *testing.T, test func(t *testing.T, location string)) {
	t.Run("sqlite", func(t *testing.T) { t.Parallel(); test(t, filepath.Join(t.TempDir(), "orgkeys.db")) })
	t.Run("postgres", func(t *testing.T) {
		t.Parallel()
		test(t, newPostgres(t))
	})
}

func newPostgres(t *testing.T) string {
	t.Helper()
	server, err := pgtest.Start()
	audittest.Must(t, err)
	t.Cleanup(func() { server.Close() })
	location, err := server.NewDatabase("orgkeys")
	audittest.Must(t, err)
	return location
}

func TestALogSpansDatabaseAndArchive(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, location string) {
		e := newMovable(t, location)
		const size = 740
		leaves, before := e.leaves(t, size), e.wantGood(t)
		kept, err := e.DB.Keys(t.Context(), "acme")
		audittest.Must(t, err)
		roots := map[int64]tlog.Hash{}
		for _, n := range []int64{1, 255, 256, 300, 511, 512, 513, 700} {
			at, err := e.DB.At(t.Context(), n)
			audittest.Must(t, err)
			roots[n] = at.Root
		}

		done := e.run(t, e.move(t), 512, 0)
		if done.Moved != 512 || e.count(t, "events") != size+1-512 || e.count(t, "events WHERE idx < 512") != 0 {
			t.Errorf("%d are no longer there, %d are", done.Moved, e.count(t, "events"))
		}
		if n := e.count(t, fmt.Sprintf("log_hashes WHERE idx <= %d", tlog.StoredHashIndex(9, 0))); n != 3 {
			t.Errorf("%d hashes of the archived part, want those of two bundles and of both", n)
		}
		after := e.wantGood(t)
		if after.Archived != 512 || after.Receipts != before.Receipts || after.Signed != size+1 {
			t.Errorf("%+v, before %+v", after, before)
		}
		if !slices.EqualFunc(leaves, e.leaves(t, size), bytes.Equal) {
			t.Error("other events")
		}
		for n, root := range roots {
			at, err := e.DB.At(t.Context(), n)
			if err != nil || at.Root != root {
				t.Errorf("at %d: %v, want %v; %v", n, at.Root, root, err)
			}
			head, err := e.DB.Head(t.Context())
			audittest.Must(t, err)
			proof, err := e.DB.Consistency(t.Context(), head.Size, n)
			if err != nil || tlog.CheckTree(proof, head.Size, head.Root, n, root) != nil {
				t.Errorf("consistency from %d: %v", n, err)
			}
		}
		first, err := audit.Decode(leaves[300])
		audittest.Must(t, err)
		for _, name := range []string{"0", "255", "511", "512", "740", first.ID} {
			proof, err := archive.Prove(t.Context(), e.DB, name)
			if err != nil {
				t.Errorf("proving event %s: %v", name, err)
				continue
			}
			if name == first.ID && proof.Index != 300 {
				t.Errorf("event %s is %d", name, proof.Index)
			}
		}
		if _, err := archive.Prove(t.Context(), e.DB, "019f0000-0000-7000-8000-000000000000"); err == nil {
			t.Error("an event that never was is proved")
		}
		now, err := e.DB.Keys(t.Context(), "acme")
		if err != nil || len(now) != 2 || now[0].DeliveredTo != "192.0.2.99" || now[1].DeliveredTo != "192.0.2.98" || !reflect.DeepEqual(now, kept) {
			t.Errorf("the list says %+v, and said %+v, %v", now, kept, err)
		}
		readByOthers(t, e.dir, e.VKey(t), size+1)

		packed := e.export(t)
		report, err := archive.Verify(t.Context(), bytes.NewReader(packed), []string{e.VKey(t)}, archive.Outside{}, nil)
		if err != nil || report.Manifest.Size != size+1 || report.Receipts != before.Receipts {
			t.Errorf("the export: %+v, %v", report, err)
		}
		path := filepath.Join(t.TempDir(), "export.tar.gz")
		audittest.Must(t, os.WriteFile(path, packed, 0o600))
		if said, err := exec.Command("python3", "../../../contrib/verify_export.py", path, "--key", e.VKey(t)).CombinedOutput(); !strings.HasPrefix(string(said), "verified: ") {
			t.Errorf("the independent implementation: %v\n%s", err, said)
		}

		// A second run changes nothing; and later ones go on, with what is new.
		before2 := files(t, e.dir)
		delete(before2, "checkpoint")
		e.run(t, e.move(t), 0, 0)
		if n := e.count(t, "events"); n != size+1-512 {
			t.Errorf("a second run recorded an event: %d", n)
		}
		var more []audit.Event
		for range 100 {
			more = append(more, e.Key(audit.KeysListed, ""))
		}
		e.SignedLog.Record(t, more...)
		e.run(t, e.move(t), 256, 0)
		if e.wantGood(t).Archived != 768 {
			t.Error("the third bundle was not moved")
		}
		for name, content := range before2 {
			if now := files(t, e.dir)[name]; now != content {
				t.Errorf("%s was changed", name)
			}
		}
	})
}

// The server starts and serves without its archive; what needs the archive says so.
func TestWithoutItsArchiveALogGoesOn(t *testing.T) {
	t.Parallel()
	e := newMovable(t, filepath.Join(t.TempDir(), "orgkeys.db"))
	old, err := e.DB.LastSigned(t.Context())
	audittest.Must(t, err)
	e.run(t, e.move(t), 512, 0)
	l := e.SignedLog
	l.Log = audittest.OpenAt(t, e.location)
	l.Checkpoints = audit.NewCheckpointer(audit.NewLog(l.DB, nil), l.DB, e.Signer, time.Hour, nil)
	l.Record(t, l.Key(audit.KeysListed, ""))
	audittest.Must(t, l.DB.CheckArchived(t.Context()))
	if at, err := l.DB.At(t.Context(), old.Size); err != nil || at != old.Checkpoint {
		t.Errorf("the checkpoint from before: %v, %v", at, err)
	}
	report, err := e.verify(t, l.DB)
	if err != nil || !errors.Is(report.Unread, sqlstore.ErrNoArchive) || report.Archived != 512 || report.Signed != 742 {
		t.Errorf("verifying: %+v, %v", report, err)
	}
	if _, err := l.DB.Entries(t.Context(), 5, 1); !errors.Is(err, sqlstore.ErrNoArchive) {
		t.Errorf("an archived event: %v", err)
	}
	if _, err := l.DB.At(t.Context(), 5); !errors.Is(err, sqlstore.ErrNoArchive) {
		t.Errorf("an archived checkpoint: %v", err)
	}
	// An empty sink begins behind what was moved, and the checkpoint covers all of it.
	entries, after, err := l.DB.Durable(t.Context(), audit.Checkpoint{}, 1000)
	if err != nil || len(entries) != 230 || entries[0].Index != 512 || after.Size != 742 {
		t.Fatalf("%d entries, up to %d, %v", len(entries), after.Size, err)
	}
	sink := audit.NewFileSink(l.Sink)
	_, err = sink.Last(t.Context())
	audittest.Must(t, err)
	_, err = sink.Append(t.Context(), entries, after)
	audittest.Must(t, err)
	if report, err := verify.Verify(t.Context(), e.DB, l.Copy(t), nil); err == nil && report.Covered != 742 {
		t.Errorf("its copy covers %d events", report.Covered)
	}
	// The same DB handle with an archive that lost its files.
	audittest.Must(t, os.Rename(e.dir, e.dir+".away"))
	e.wantProblem(t, "an archive that is gone", 0)
	audittest.Must(t, os.Rename(e.dir+".away", e.dir))
	e.wantGood(t)
}

// Whatever is altered in an archive is found, by verifying the log or the files.
func TestTamperingWithAnArchiveIsFound(t *testing.T) {
	t.Parallel()
	e := newMovable(t, filepath.Join(t.TempDir(), "orgkeys.db"))
	e.run(t, e.move(t), 512, 0)
	keys, err := audit.ParseKeys(e.VKey(t))
	audittest.Must(t, err)
	found := map[string]bool{}
	for name, content := range files(t, e.dir) {
		if strings.HasSuffix(name, ".p/228") {
			continue // of the checkpoint before, which nobody asks for
		}
		for what, altered := range map[string]string{"shortened": content[:len(content)-1], "altered": content[:len(content)/2] + string([]byte{content[len(content)/2] ^ 1}) + content[len(content)/2+1:], "gone": ""} {
			path := filepath.Join(e.dir, name)
			audittest.Must(t, os.WriteFile(path, []byte(altered), 0o600))
			if what == "gone" {
				audittest.Must(t, os.Remove(path))
			}
			_, logErr := e.verify(t, e.DB)
			_, _, filesErr := tiles.Check(t.Context(), e.Archive, keys, audit.Checkpoint{}, nil)
			receipts := strings.HasPrefix(name, "receipts/")
			if _, err := e.DB.Entries(t.Context(), 5, 1); (err == nil) != (name != "tile/entries/000") {
				t.Errorf("%s %s: event 5 is read: %v", name, what, err)
			}
			switch {
			case receipts && what != "gone" && logErr == nil, !receipts && filesErr == nil:
				t.Errorf("%s %s: not found", name, what)
			case slices.Contains([]string{"tile/entries/000", "tile/entries/001"}, name) && logErr == nil:
				t.Errorf("%s %s: not found by verifying the log", name, what)
			}
			if logErr != nil {
				found[name] = true
			}
			audittest.Must(t, os.WriteFile(path, []byte(content), 0o600))
		}
	}
	if want := []string{"checkpoint", "receipts/vault/000", "receipts/vault/001", "tile/entries/000", "tile/entries/001"}; !slices.Equal(slices.Sorted(maps.Keys(found)), want) {
		t.Errorf("verifying the log found %q, want %q", slices.Sorted(maps.Keys(found)), want)
	}
	e.wantGood(t)
}

// What the archive holds is read back before anything is deleted.
func TestNothingIsMovedThatTheArchiveDoesNotHold(t *testing.T) {
	t.Parallel()
	e := newMovable(t, filepath.Join(t.TempDir(), "orgkeys.db"))
	_, err := tiles.Publish(t.Context(), e.Archive, e.DB, nil)
	audittest.Must(t, err)
	for _, name := range []string{"tile/entries/001", "tile/0/001"} {
		path := filepath.Join(e.dir, name)
		b, err := os.ReadFile(path)
		audittest.Must(t, err)
		audittest.Must(t, os.WriteFile(path, append(bytes.Clone(b[:len(b)-1]), b[len(b)-1]^1), 0o600))
		if done, err := e.move(t).Run(t.Context(), e.Archive, e.DB); err == nil || done.Moved != 0 || e.count(t, "events WHERE idx < 512") != 512 {
			t.Errorf("%s altered: %d events were moved, %v", name, done.Moved, err)
		}
		audittest.Must(t, os.WriteFile(path, b, 0o600))
	}
	audittest.Must(t, os.MkdirAll(filepath.Join(e.dir, "receipts/vault"), 0o700))
	audittest.Must(t, os.WriteFile(filepath.Join(e.dir, "receipts/vault/000"), []byte("others"), 0o600))
	if done, err := e.move(t).Run(t.Context(), e.Archive, e.DB); err == nil || done.Moved != 0 {
		t.Errorf("other receipts: %d events were moved, %v", done.Moved, err)
	}
	audittest.Must(t, os.Remove(filepath.Join(e.dir, "receipts/vault/000")))
	e.run(t, e.move(t), 512, 0)
	e.wantGood(t)
}

// Nobody can pass off events that were deleted as archived.
func TestDeletedEventsAreNoArchivedOnes(t *testing.T) {
	t.Parallel()
	deletes := func(t *testing.T, e movable, from, to int64) {
		t.Helper()
		e.Exec(t, fmt.Sprintf("DELETE FROM events WHERE idx >= %d AND idx < %d", from, to), fmt.Sprintf("UPDATE log_archive SET moved = %d", to))
		for b := from / tiles.Width; b < to/tiles.Width; b++ {
			e.Exec(t, fmt.Sprintf("DELETE FROM log_hashes WHERE idx >= %d AND idx < %d", tlog.StoredHashIndex(0, b*tiles.Width), tlog.StoredHashIndex(8, b)))
		}
	}
	for name, thief := range map[string]struct {
		index int64
		do    func(t *testing.T, e movable)
	}{
		"nothing was ever archived": {0, func(t *testing.T, e movable) {
			_, err := tiles.Publish(t.Context(), e.Archive, e.DB, nil)
			audittest.Must(t, err)
			deletes(t, e, 0, 512)
		}},
		"an event that is not signed says so": {0, func(t *testing.T, e movable) {
			_, err := tiles.Publish(t.Context(), e.Archive, e.DB, nil)
			audittest.Must(t, err)
			forged := audit.LogMoved(512, 0, "nowhere", audit.Checkpoint{})
			audittest.Must(t, e.DB.Announce(t.Context(), forged))
			_, err = e.DB.Sequence(t.Context(), 1000, audit.Condition{})
			audittest.Must(t, err)
			deletes(t, e, 0, 512)
			e.Exec(t, "UPDATE log_archive SET moved_by = next_move")
		}},
		"more than was archived": {512, func(t *testing.T, e movable) {
			var more []audit.Event
			for range 100 {
				more = append(more, e.Key(audit.KeysListed, ""))
			}
			e.run(t, e.move(t), 512, 0)
			e.SignedLog.Record(t, more...)
			_, err := tiles.Publish(t.Context(), e.Archive, e.DB, nil)
			audittest.Must(t, err)
			deletes(t, e, 512, 768)
		}},
		"entries of the archive": {0, func(t *testing.T, e movable) {
			e.run(t, e.move(t), 512, 0)
			audittest.Must(t, e.Archive.Remove(t.Context(), 0, []string{"vault"}))
			e.Exec(t, "UPDATE log_archive SET removed = 256, removed_by = moved_by")
			keys, err := audit.ParseKeys(e.VKey(t))
			audittest.Must(t, err)
			if _, _, err := tiles.Check(t.Context(), e.Archive, keys, audit.Checkpoint{}, nil); !errors.As(err, new(*verify.Problem)) {
				t.Errorf("the files alone: %v", err)
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := newMovable(t, filepath.Join(t.TempDir(), "orgkeys.db"))
			thief.do(t, e)
			e.wantProblem(t, name, thief.index)
			if err := e.DB.CheckArchived(t.Context()); err == nil {
				t.Error("a start finds nothing")
			}
		})
	}
}

// asPackedBefore moves the events, and packs the personal parts of the first bundle's as it was done
// before salts were apart.
func (e movable) asPackedBefore(t *testing.T, move func()) {
	t.Helper()
	type part struct{ id, actor, personal []byte }
	parts := make([]part, tiles.Width)
	for i := range parts {
		p := &parts[i]
		err := e.Raw.QueryRow("SELECT e.id, e.actor, coalesce(p.personal, '') FROM events e LEFT JOIN event_persons p ON p.event_id = e.id WHERE e.idx = $1", i).
			Scan(&p.id, &p.actor, &p.personal)
		audittest.Must(t, err)
	}
	move()
	texts := make([][]byte, 2*tiles.Width)
	for i, p := range parts {
		if len(p.personal) > 0 && e.count(t, "event_persons WHERE event_id = '"+string(p.id)+"'") == 0 {
			texts[i], texts[tiles.Width+i] = p.actor, p.personal
		}
	}
	plain, err := tiles.Pack(texts)
	audittest.Must(t, err)
	var packed bytes.Buffer
	w, err := flate.NewWriter(&packed, flate.BestCompression)
	audittest.Must(t, err)
	_, err = w.Write(plain)
	audittest.Must(t, errors.Join(err, w.Close()))
	_, err = e.Raw.Exec("UPDATE archived_persons SET content = $1 WHERE bundle = 0", packed.Bytes())
	audittest.Must(t, err)
}

// Erasing reaches what archived events knew of a person, in either form, and only that is missing then.
func TestErasingAPersonReachesTheArchivedPart(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, location string) {
		e := newMovable(t, location)
		want := e.count(t, "event_persons WHERE event_id IN (SELECT id FROM events WHERE actor = 'u-1')")
		e.asPackedBefore(t, func() { e.run(t, e.move(t), 512, 0) })
		n, err := e.DB.Erasable(t.Context(), "u-1")
		if err != nil || int64(n) != want {
			t.Errorf("%d would be erased, %v; want %d", n, err, want)
		}
		e.wantGood(t)
		erased, err := e.DB.Erase(t.Context(), "u-1", func(id string, n int64) audit.Event {
			event := audit.New(audit.PersonErased, "")
			event.Object = id
			return event
		})
		if err != nil || erased != want {
			t.Errorf("%d were erased, %v; want %d", erased, err, want)
		}
		e.sign(t)
		if report := e.wantGood(t); report.Erased != want {
			t.Errorf("%d are missing, want %d", report.Erased, want)
		}
		if n, err := e.DB.Erasable(t.Context(), "u-1"); err != nil || n != 0 {
			t.Errorf("%d are left, %v", n, err)
		}
		if now, err := e.DB.Keys(t.Context(), "acme"); err != nil || now[0].DeliveredTo != "" || now[1].DeliveredTo != "" {
			t.Errorf("the list says %+v, %v", now, err)
		}
		if n, err := e.DB.Erasable(t.Context(), "u-2"); err != nil || n != 233 {
			t.Errorf("of another person %d are left, %v", n, err)
		}
		e.Exec(t, "DELETE FROM archived_persons")
		if _, err := e.verify(t, e.DB); !errors.As(err, new(*verify.Problem)) {
			t.Errorf("without an event that says so: %v", err)
		}
	})
}

// failing is a store and a database that fail at one call: before it, or after it
// was done.
type failing struct {
	tiles.Store
	tiles.Log
	left  *atomic.Int64 // a bucket's files are written several at once
	after bool
}

var errKilled = errors.New("killed")

func (f failing) at(do func() error) error {
	left := f.left.Add(-1)
	switch {
	case left < 0, left == 0 && !f.after:
		return errKilled
	case left == 0:
		return errors.Join(do(), errKilled)
	}
	return do()
}

type failingStore struct{ failing }
type failingLog struct{ failing }

func (f failingStore) String() string { return f.Store.String() }
func (f failingStore) WriteOnce(ctx context.Context, path string, content []byte) error {
	return f.at(func() error { return f.Store.WriteOnce(ctx, path, content) })
}
func (f failingStore) Replace(ctx context.Context, path string, before, content []byte) error {
	return f.at(func() error { return f.Store.Replace(ctx, path, before, content) })
}
func (f failingStore) RemoveAll(ctx context.Context, path string) error {
	return f.at(func() error { return f.Store.RemoveAll(ctx, path) })
}
func (f failingLog) Announce(ctx context.Context, e audit.Event) error {
	return f.at(func() error { return f.Log.Announce(ctx, e) })
}
func (f failingLog) MoveOut(ctx context.Context, from, to int64) error {
	return f.at(func() error { return f.Log.MoveOut(ctx, from, to) })
}
func (f failingLog) NoteRemoved(ctx context.Context, from, to int64) error {
	return f.at(func() error { return f.Log.NoteRemoved(ctx, from, to) })
}

// Every change of files or database is the last before a crash once, and once it is the
// first that a crash prevents. Nothing is lost or moved twice, and the next run goes on.
func TestACrashAtAnyStepMovesNothingTwiceAndLosesNothing(t *testing.T) {
	t.Parallel()
	origin := newMovable(t, filepath.Join(t.TempDir(), "orgkeys.db"))
	leaves := origin.leaves(t, 740)
	audittest.Must(t, errors.Join(origin.Raw.Close(), origin.DB.Close())) // the write-ahead log goes into the file
	copied := func(t *testing.T) movable {
		e := origin
		e.dir = t.TempDir()
		e.location = filepath.Join(t.TempDir(), "orgkeys.db")
		b, err := os.ReadFile(origin.location)
		audittest.Must(t, err)
		audittest.Must(t, os.WriteFile(e.location, b, 0o600))
		e.Log = audittest.OpenAt(t, e.location)
		e.Checkpoints = audit.NewCheckpointer(audit.NewLog(e.DB, nil), e.DB, e.Signer, time.Hour, nil)
		e.Archive = tiles.Archive{Store: tiles.NewDir(e.dir)}
		e.DB.UseArchive(e.Archive)
		return e
	}
	steps := 0
	for crashes := true; crashes; {
		steps++
		for _, after := range []bool{false, true} {
			e := copied(t)
			var left atomic.Int64
			left.Store(int64(steps))
			f := failing{Store: e.Store, Log: e.DB, left: &left, after: after}
			_, err := e.move(t).Run(t.Context(), tiles.Archive{Store: failingStore{f}}, failingLog{f})
			if crashes = errors.Is(err, errKilled); !crashes {
				audittest.Must(t, err)
			}
			if moved := e.wantSome(t); moved > 0 {
				e.wantGood(t)
			} else if _, err := e.verify(t, e.DB); err != nil {
				t.Fatalf("step %d: %v", steps, err)
			}
			e.sign(t)
			_, err = e.move(t).Run(t.Context(), e.Archive, e.DB)
			audittest.Must(t, err)
			if e.wantSome(t) != 512 || !slices.EqualFunc(leaves, e.leaves(t, 740), bytes.Equal) {
				t.Fatalf("step %d: the log is another one", steps)
			}
			if report := e.wantGood(t); report.Archived != 512 {
				t.Fatalf("step %d: %d events are archived", steps, report.Archived)
			}
			keys, err := audit.ParseKeys(e.VKey(t))
			audittest.Must(t, err)
			if _, _, err := tiles.Check(t.Context(), e.Archive, keys, audit.Checkpoint{}, nil); err != nil {
				t.Fatalf("step %d: %v", steps, err)
			}
			if n := e.count(t, "events WHERE type = 'log.archived'"); n != 1 {
				t.Fatalf("step %d: %d events say that the same is moved", steps, n)
			}
			audittest.Must(t, e.DB.Close())
		}
	}
	if steps < 10 {
		t.Errorf("only %d steps", steps)
	}
}

// wantSome is how many events are no longer in the database.
func (e movable) wantSome(t *testing.T) int64 {
	t.Helper()
	a, err := e.DB.Archived(t.Context())
	audittest.Must(t, err)
	return a.Moved
}

// Two at once move each bundle once.
func TestTwoMoveAtOnce(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, location string) {
		e := newMovable(t, location)
		other := e
		other.Log = audittest.OpenAt(t, location)
		var request sync.Mutex
		other.Archive = tiles.Archive{Store: unlocked{tiles.NewDir(e.dir), &request}}
		e.Archive = tiles.Archive{Store: unlocked{e.Store, &request}}
		moved := make(chan int64, 2)
		for _, one := range []movable{e, other} {
			go func() {
				done, _ := one.move(t).Run(t.Context(), one.Archive, one.DB) // one of them may find that the other was faster
				moved <- done.Moved
			}()
		}
		if a, b := <-moved, <-moved; max(a, b) != 512 {
			t.Errorf("%d and %d events were moved", a, b)
		}
		e.sign(t)
		if e.wantGood(t).Archived != 512 {
			t.Error("not everything was moved")
		}
	})
}

// unlocked is a store whose lock keeps nobody away, and whose writes are one request each,
// as those of a bucket.
type unlocked struct {
	tiles.Store
	request *sync.Mutex
}

func (u unlocked) WriteOnce(ctx context.Context, path string, content []byte) error {
	u.request.Lock()
	defer u.request.Unlock()
	return u.Store.WriteOnce(ctx, path, content)
}

func (u unlocked) Replace(ctx context.Context, path string, before, content []byte) error {
	u.request.Lock()
	defer u.request.Unlock()
	return u.Store.Replace(ctx, path, before, content)
}

func (unlocked) Lock(context.Context) (func() error, error) { return func() error { return nil }, nil }

// Retention removes entries, and nothing else; the log says so, and proves the rest.
func TestRetentionRemovesEntriesAlone(t *testing.T) {
	t.Parallel()
	onBoth(t, func(t *testing.T, location string) {
		e := newMovable(t, location)
		_, err := tiles.Publish(t.Context(), e.Archive, e.DB, nil)
		audittest.Must(t, err)
		e.run(t, e.move(t), 512, 0)
		before := files(t, e.dir)
		if packs, kept := e.count(t, "archived_persons"), e.count(t, "event_persons WHERE actor <> ''"); packs != 2 || kept != 2 {
			t.Fatalf("%d packs of personal parts, and %d kept ones", packs, kept)
		}
		m := e.move(t)
		m.Keep = time.Hour
		e.run(t, m, 0, 0)
		m.Keep = time.Nanosecond
		e.run(t, m, 0, 512)
		now := files(t, e.dir)
		for name, content := range before {
			removed := strings.HasPrefix(name, "receipts/") || name == "tile/entries/000" || name == "tile/entries/001"
			if now[name] == "" != removed || !removed && now[name] != content && name != "checkpoint" {
				t.Errorf("%s: %d bytes are left of %d", name, len(now[name]), len(content))
			}
		}
		if packs, kept := e.count(t, "archived_persons"), e.count(t, "event_persons WHERE actor <> ''"); packs != 0 || kept != 0 {
			t.Errorf("of events that are removed %d packs of personal parts are left, and %d kept ones", packs, kept)
		}
		if now, err := e.DB.Keys(t.Context(), "acme"); err != nil || len(now) != 2 || now[0].DeliveredTo != "" || now[1].DeliveredTo != "" {
			t.Errorf("the list says %+v, %v", now, err)
		}
		report := e.wantGood(t)
		if report.Removed != 512 || report.Archived != 512 {
			t.Errorf("%+v", report)
		}
		keys, err := audit.ParseKeys(e.VKey(t))
		audittest.Must(t, err)
		if _, removed, err := tiles.Check(t.Context(), e.Archive, keys, audit.Checkpoint{}, nil); err != nil || removed != 512 {
			t.Errorf("of the files %d are removed, %v", removed, err)
		}
		if at, err := e.DB.At(t.Context(), 300); err != nil || at.Size != 300 {
			t.Errorf("the root of 300 events: %v", err)
		}
		if _, err := archive.Prove(t.Context(), e.DB, "5"); !errors.Is(err, sqlstore.ErrRemoved) {
			t.Errorf("proving what is removed: %v", err)
		}
		if _, err := archive.Write(t.Context(), io.Discard, e.DB, nil, t.TempDir(), "test", nil); !errors.Is(err, sqlstore.ErrRemoved) {
			t.Errorf("exporting: %v", err)
		}
		e.run(t, m, 0, 0)
		// The event about the removal is moved, too, and a later one vouches for it.
		var more []audit.Event
		for range 700 {
			more = append(more, e.Key(audit.KeysListed, ""))
		}
		e.SignedLog.Record(t, more...)
		m.Keep = 0
		e.run(t, m, 768, 0)
		if report := e.wantGood(t); report.Removed != 512 || report.Archived != 1280 {
			t.Errorf("%+v", report)
		}
		// A hash tile of what is removed.
		path := filepath.Join(e.dir, "tile/0/001")
		b, err := os.ReadFile(path)
		audittest.Must(t, err)
		b[40] ^= 1
		audittest.Must(t, os.WriteFile(path, b, 0o600))
		e.wantProblem(t, "an altered tile", 256)
		audittest.Must(t, os.Remove(path))
		e.wantProblem(t, "a tile that is gone", 256)
	})
}
