package tiles_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/audittest"
	"github.com/orgkeys/orgkeys/internal/audit/tiles"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

var _ tiles.Source = (*sqlstore.DB)(nil)

// log is a log in memory, whose events follow from their index, so that every
// process has the same.
type log struct {
	size   int64
	branch int64 // from here on it has other events
	signer note.Signer
	vkey   string
	pause  time.Duration // in each page
}

const origin = "orgkeys/tiles"

func newLog(t *testing.T) *log {
	t.Helper()
	private := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	vkey, err := audit.VerifierKey(origin, private.Public().(ed25519.PublicKey))
	audittest.Must(t, err)
	seed := base64.StdEncoding.EncodeToString(append([]byte{1}, private.Seed()...))
	signer, err := note.NewSigner("PRIVATE+KEY+" + origin + "+" + strings.Split(vkey, "+")[1] + "+" + seed)
	audittest.Must(t, err)
	return &log{branch: 1 << 40, signer: signer, vkey: vkey}
}

func (l *log) leaf(i int64) []byte {
	e := audit.Event{ID: fmt.Sprintf("e-%d", i), Time: time.UnixMicro(1_800_000_000_000_000 + i).UTC(), Type: audit.KeysListed, Outcome: audit.Success, Org: "acme"}
	if i >= l.branch {
		e.Org = "other"
	}
	r, err := e.Encode()
	if err != nil {
		panic(err)
	}
	return r.Leaf
}

func (l *log) Entries(ctx context.Context, index int64, limit int) ([]audit.Entry, error) {
	time.Sleep(l.pause)
	var page []audit.Entry
	for i := index; i < min(index+int64(limit), l.size); i++ {
		page = append(page, audit.Entry{Index: i, Leaf: l.leaf(i)})
	}
	return page, ctx.Err()
}

// Nothing was moved out of it.
func (l *log) Archived(context.Context) (audit.Archived, error) { return audit.Archived{}, nil }
func (l *log) LeafHashes(context.Context, int64, int) ([]tlog.Hash, error) {
	return nil, errors.New("no event was moved")
}

func (l *log) LastSigned(context.Context) (audit.Signed, error) {
	if l.size == 0 {
		return audit.Signed{}, nil
	}
	var tree verify.Frontier
	for i := range l.size {
		tree.Push(tlog.RecordHash(l.leaf(i)))
	}
	c := audit.Checkpoint{Origin: origin, Size: l.size, Root: tree.Root()}
	text, err := note.Sign(&note.Note{Text: c.Text()}, l.signer)
	return audit.Signed{Checkpoint: c, Seq: 1, Note: string(text)}, err
}

func (l *log) publish(t *testing.T, dir string, size int64) {
	t.Helper()
	l.size = size
	head, err := tiles.Publish(t.Context(), tiles.NewDir(dir), l, nil)
	if err != nil || head.Size != size {
		t.Fatalf("%d events published, %v; want %d", head.Size, err, size)
	}
}

func (l *log) check(t *testing.T, dir string) (audit.Signed, error) {
	t.Helper()
	keys, err := audit.ParseKeys(l.vkey)
	audittest.Must(t, err)
	signed, _, err := tiles.Check(t.Context(), tiles.NewDir(dir), keys, audit.Checkpoint{}, nil)
	return signed, err
}

// files are the contents under dir that readers look at.
func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	audittest.Must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.HasPrefix(d.Name(), ".") {
			return err
		}
		b, err := os.ReadFile(path)
		name, _ := filepath.Rel(dir, path)
		all[filepath.ToSlash(name)] = string(b)
		return err
	}))
	return all
}

// readByOthers has clients that others wrote read what is published, and check it.
func readByOthers(t *testing.T, dir, vkey string, size int64) {
	t.Helper()
	said, err := others(t, dir, vkey)
	if err != nil || strings.TrimSpace(said) != fmt.Sprintf("verified: %d events", size) {
		t.Errorf("%v: %s", err, said)
	}
}

func others(t *testing.T, dir, vkey string) (string, error) {
	t.Helper()
	build := exec.CommandContext(t.Context(), "readers/build")
	build.Stderr = t.Output()
	path, err := build.Output()
	audittest.Must(t, err)
	read := exec.CommandContext(t.Context(), strings.TrimSpace(string(path)), dir, vkey)
	read.Stderr = t.Output()
	out, err := read.Output()
	return string(out), err
}

// Each size has tiles of another form: none full, all full, one event more, a second level
// and a third.
func TestOthersReadAndProveWhatIsPublished(t *testing.T) {
	t.Parallel()
	l, dir := newLog(t), t.TempDir()
	var before map[string]string
	sizes := []int64{1, 255, 256, 257, 700, 65_536, 66_000}
	if os.Getenv("ORGKEYS_TEST_LONG") != "" {
		sizes = append(sizes, 256*1001+3) // the numbers of tiles have a second group of digits
	}
	for _, size := range sizes {
		l.publish(t, dir, size)
		if head, err := l.check(t, dir); err != nil || head.Size != size {
			t.Fatalf("%d events, %v; want %d", head.Size, err, size)
		}
		readByOthers(t, dir, l.vkey, size)
		now := files(t, dir)
		for name, content := range before {
			if now[name] != content && name != "checkpoint" {
				t.Errorf("%s was changed or removed", name)
			}
		}
		before = now
	}
	for _, name := range []string{"tile/0/000.p/1", "tile/0/000", "tile/0/001.p/1", "tile/1/000.p/2", "tile/1/000", "tile/2/000.p/1", "tile/entries/000.p/255", "tile/entries/257.p/208", "checkpoint"} {
		if before[name] == "" {
			t.Errorf("%s is missing", name)
		}
	}
}

func TestTheLogInTheDatabaseIsPublished(t *testing.T) {
	t.Parallel()
	e, dir := audittest.NewSigned(t), filepath.Join(t.TempDir(), "new", "dir")
	for _, size := range []int64{40, 341} {
		head, err := tiles.Publish(t.Context(), tiles.NewDir(dir), e.DB, nil)
		if err != nil || head.Size != size {
			t.Fatalf("%d events, %v", head.Size, err)
		}
		readByOthers(t, dir, e.VKey(t), size)
		e.Add(t, 301)
		e.Sign(t)
	}
}

func TestWhatIsPublishedIsCheckedToTheLastByte(t *testing.T) {
	t.Parallel()
	l, dir := newLog(t), t.TempDir()
	l.publish(t, dir, 700)
	for name, content := range files(t, dir) {
		for what, altered := range map[string]string{"shortened": content[:len(content)-1], "altered": content[:len(content)-2] + string([]byte{content[len(content)-2] ^ 1}) + content[len(content)-1:], "appended to": content + "x", "gone": ""} {
			path := filepath.Join(dir, name)
			audittest.Must(t, os.WriteFile(path, []byte(altered), 0o600))
			if what == "gone" {
				audittest.Must(t, os.Remove(path))
			}
			_, err := l.check(t, dir)
			if problem := new(verify.Problem); err == nil || !errors.As(err, &problem) && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s %s: %v", name, what, err)
			}
			audittest.Must(t, os.WriteFile(path, []byte(content), 0o600))
		}
	}
	if _, err := l.check(t, dir); err != nil {
		t.Error(err)
	}
	keys, err := audit.ParseKeys(l.vkey)
	audittest.Must(t, err)
	for _, other := range []struct{ size, branch int64 }{{701, 1 << 40}, {300, 100}} {
		l.size, l.branch = other.size, other.branch
		kept, err := l.LastSigned(t.Context())
		audittest.Must(t, err)
		if _, _, err := tiles.Check(t.Context(), tiles.NewDir(dir), keys, kept.Checkpoint, nil); !errors.As(err, new(*verify.Problem)) {
			t.Errorf("a checkpoint of %d events from elsewhere: %v", other.size, err)
		}
	}
}

// A log that does not extend what is published, or is not what was signed, changes nothing.
func TestAnotherLogIsNotPublishedOverIt(t *testing.T) {
	t.Parallel()
	l, dir := newLog(t), t.TempDir()
	l.publish(t, dir, 700)
	before := files(t, dir)
	for name, change := range map[string]func(){
		"set back":                            func() { l.size = 699 },
		"rewritten behind the last bundle":    func() { l.size, l.branch = 900, 650 },
		"rewritten within a full bundle":      func() { l.size, l.branch = 900, 100 },
		"rewritten, and no larger":            func() { l.size, l.branch = 700, 100 },
		"rewritten at its end, and no larger": func() { l.size, l.branch = 700, 699 },
	} {
		change()
		if _, err := tiles.Publish(t.Context(), tiles.NewDir(dir), l, nil); err == nil {
			t.Errorf("%s: published", name)
		}
		if !maps.Equal(before, files(t, dir)) {
			t.Errorf("%s: files have changed", name)
		}
		l.branch = 1 << 40
	}
	audittest.Must(t, os.Mkdir(filepath.Join(dir, "tile/entries/003.p"), 0o700))
	audittest.Must(t, os.WriteFile(filepath.Join(dir, "tile/entries/003.p/132"), []byte("in the way"), 0o600))
	l.size = 900
	if _, err := tiles.Publish(t.Context(), tiles.NewDir(dir), l, nil); err == nil || !strings.Contains(err.Error(), "does not hold what the log holds") {
		t.Errorf("over another file: %v", err)
	}
	if files(t, dir)["checkpoint"] != before["checkpoint"] {
		t.Error("the checkpoint was replaced")
	}
}

// signedBefore is a log with the newest checkpoint of another.
type signedBefore struct {
	*log
	signed audit.Signed
}

func (l signedBefore) LastSigned(context.Context) (audit.Signed, error) { return l.signed, nil }

// Bundles and tiles that agree with each other are a forgery all the same, unless
// the signature covers them; and none of them are written.
func TestARewrittenLogUnderTheOldCheckpoint(t *testing.T) {
	t.Parallel()
	l := newLog(t)
	genuine, forged := t.TempDir(), t.TempDir()
	l.publish(t, genuine, 700)
	signed, err := l.LastSigned(t.Context())
	audittest.Must(t, err)
	l.branch = 100
	l.publish(t, forged, 700)
	audittest.Must(t, os.WriteFile(filepath.Join(forged, "checkpoint"), []byte(signed.Note), 0o600))
	if _, err := l.check(t, forged); !errors.As(err, new(*verify.Problem)) {
		t.Errorf("the forged files: %v", err)
	}
	empty := t.TempDir()
	if _, err := tiles.Publish(t.Context(), tiles.NewDir(empty), signedBefore{l, signed}, nil); !errors.As(err, new(*verify.Problem)) {
		t.Errorf("publishing them: %v", err)
	}
	if left := files(t, empty); len(left) != 0 {
		t.Errorf("%d files were written", len(left))
	}
}

// A killed process leaves what was published whole, and the next one goes on.
func TestAKillAtAnyMomentLosesNothing(t *testing.T) {
	if to := os.Getenv("TILES_TEST_PUBLISH"); to != "" {
		dir, size, _ := strings.Cut(to, "|")
		l := newLog(t)
		n, err := strconv.ParseInt(size, 10, 64)
		audittest.Must(t, err)
		l.pause = 5 * time.Millisecond
		l.publish(t, dir, n)
		return
	}
	t.Parallel()
	l, dir, whole := newLog(t), t.TempDir(), t.TempDir()
	l.publish(t, dir, 1000)
	l.publish(t, whole, 1000)
	kills := 0
	for wait := time.Duration(0); ; wait += wait/4 + 5*time.Millisecond {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run", "^"+t.Name()+"$")
		cmd.Env = append(os.Environ(), "TILES_TEST_PUBLISH="+dir+"|12000")
		audittest.Must(t, cmd.Start())
		time.Sleep(wait)
		_ = cmd.Process.Kill() // it may have ended
		err := cmd.Wait()
		head, checked := l.check(t, dir)
		if checked != nil || head.Size != 1000 && head.Size != 12000 {
			t.Fatalf("after %v: %d events, %v", wait, head.Size, checked)
		}
		if err == nil {
			break
		}
		kills++
	}
	l.publish(t, whole, 12000)
	if a, b := files(t, dir), files(t, whole); !maps.Equal(a, b) {
		t.Errorf("%d files, want %d: %q", len(a), len(b), slices.Sorted(maps.Keys(a)))
	}
	if kills < 5 {
		t.Errorf("only %d kills", kills)
	}
}

func TestAnEventThatNoBundleTakesIsNotRecorded(t *testing.T) {
	t.Parallel()
	l := audittest.New(t)
	e := audit.New(audit.KeysListed, "acme")
	small, err := e.Encode()
	audittest.Must(t, err)
	room := audit.MaxLeaf - len(small.Leaf) - len(`,"detail":{"x":""}`)
	e.Detail = map[string]string{"x": strings.Repeat("y", room)}
	audittest.Must(t, l.DB.Record(t.Context(), e))
	e = audit.New(audit.KeysListed, "acme")
	e.Detail = map[string]string{"x": strings.Repeat("y", room+1)}
	if err := l.DB.Record(t.Context(), e); !errors.Is(err, audit.ErrLeafTooLarge) {
		t.Errorf("%v", err)
	}
}

func TestOthersFindWhatWasAltered(t *testing.T) {
	t.Parallel()
	l, dir := newLog(t), t.TempDir()
	l.publish(t, dir, 700)
	path := filepath.Join(dir, "tile/0/001")
	b, err := os.ReadFile(path)
	audittest.Must(t, err)
	audittest.Must(t, os.WriteFile(path, bytes.Repeat([]byte{1}, len(b)), 0o600))
	if said, err := others(t, dir, l.vkey); err == nil {
		t.Errorf("they say %s", said)
	}
}
