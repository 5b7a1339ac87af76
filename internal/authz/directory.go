package authz

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// pollInterval is how often a directory is read. A change is taken up when two
// readings agree, so that files copied one after the other are not
// mistaken for a policy half way.
const pollInterval = 500 * time.Millisecond

// Directory is the policy in a directory, replaced while running when the
// directory's files change. It is safe for concurrent use.
type Directory struct {
	name    string
	current atomic.Pointer[Policy]
}

// Open loads the policy in the directory name.
func Open(ctx context.Context, name string) (*Directory, error) {
	files, err := readDirectory(name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	p, err := load(ctx, files)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	d := &Directory{name: name}
	d.current.Store(p)
	return d, nil
}

// readDirectory reads the policy's files, and refuses those that everybody
// could change or replace.
func readDirectory(name string) (source, error) {
	files, err := readSource(os.DirFS(name))
	if err != nil {
		return nil, err
	}
	for file := range files {
		for ; ; file = filepath.Dir(file) {
			if err := checkWriters(filepath.Join(name, file)); err != nil {
				return nil, err
			}
			if file == "." {
				break
			}
		}
	}
	return files, nil
}

// checkWriters lets a mode that allows writing pass where nobody can write:
// Kubernetes mounts directories with mode 0777 read only.
func checkWriters(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if info.Mode().Perm()&0o002 != 0 && !errors.Is(unix.Access(path, unix.W_OK), unix.EROFS) {
		return fmt.Errorf("%s may be written by everybody, who could then allow themselves anything: chmod o-w %s", path, path)
	}
	return nil
}

// Decide answers r by the current policy; see Policy.Decide.
func (d *Directory) Decide(ctx context.Context, r Request) (Decision, error) {
	return d.current.Load().Decide(ctx, r)
}

// Revision identifies the current policy's files.
func (d *Directory) Revision() string { return d.current.Load().Revision() }

// Current is the policy in force.
func (d *Directory) Current() *Policy { return d.current.Load() }

// Follow keeps up with the directory until ctx ends; a change counts within two
// seconds. A policy decides nothing before keep has succeeded, which stores its text for
// auditors; keep is repeated until it does. Every change is reported once: with the new
// policy's revision, or with the error for which it was not taken up, or not yet, and the
// revision that stays in force.
func (d *Directory) Follow(ctx context.Context, keep func(context.Context, *Policy) error, report func(revision string, err error)) {
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	f := follower{directory: d, keep: keep, handled: d.Revision(), report: report}
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			f.poll(ctx)
		}
	}
}

// follower remembers what was read and done about it.
type follower struct {
	directory *Directory
	keep      func(context.Context, *Policy) error
	report    func(revision string, err error)
	seen      string  // by the last reading
	handled   string  // and settled: in force, or refused and reported
	waiting   *Policy // is fit to be in force, but could not be kept yet
}

// unreadable takes the place of a revision where the directory cannot be read.
const unreadable = ""

func (f *follower) poll(ctx context.Context) {
	files, err := readDirectory(f.directory.name)
	revision := unreadable
	if err == nil {
		revision = files.revision()
	}
	settled := revision == f.seen
	f.seen = revision
	if !settled || revision == f.handled {
		return
	}
	reported := f.waiting != nil && f.waiting.Revision() == revision
	if err == nil {
		err = f.replace(ctx, files)
	} else {
		f.waiting = nil
	}
	if ctx.Err() != nil {
		return
	}
	if f.waiting == nil {
		f.handled = revision
	} else if reported {
		return
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", f.directory.name, err)
	}
	f.report(f.directory.Revision(), err)
}

// replace puts the policy made of files in force, unless it is already.
func (f *follower) replace(ctx context.Context, files source) error {
	p, revision := f.waiting, files.revision()
	f.waiting = nil
	if revision == f.directory.Revision() {
		return nil
	}
	if p == nil || p.Revision() != revision {
		var err error
		if p, err = load(ctx, files); err != nil {
			return err
		}
	}
	if err := f.keep(ctx, p); err != nil {
		f.waiting = p
		return fmt.Errorf("its text could not be stored yet, which is tried again: %w", err)
	}
	f.directory.current.Store(p)
	return nil
}
