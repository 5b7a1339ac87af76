package authz

import (
	"context"
	"fmt"
	"os"
	"sync/atomic"
	"time"
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
	p, err := Load(ctx, os.DirFS(name))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	d := &Directory{name: name}
	d.current.Store(p)
	return d, nil
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
// seconds. Every change is reported once: with the new policy's revision, or
// with the error for which it was not taken up and the revision that stays in force.
func (d *Directory) Follow(ctx context.Context, report func(revision string, err error)) {
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	f := follower{directory: d, handled: d.Revision(), report: report}
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
	report    func(revision string, err error)
	seen      string // by the last reading
	handled   string // and settled: in force, or refused and reported
}

// unreadable takes the place of a revision where the directory cannot be read.
const unreadable = ""

func (f *follower) poll(ctx context.Context) {
	files, err := readSource(os.DirFS(f.directory.name))
	revision := unreadable
	if err == nil {
		revision = files.revision()
	}
	settled := revision == f.seen
	f.seen = revision
	if !settled || revision == f.handled {
		return
	}
	if err == nil {
		err = f.directory.replace(ctx, files)
	}
	if ctx.Err() != nil {
		return
	}
	f.handled = revision
	if err != nil {
		err = fmt.Errorf("%s: %w", f.directory.name, err)
	}
	f.report(f.directory.Revision(), err)
}

// replace puts the policy made of files in force, unless it is already.
func (d *Directory) replace(ctx context.Context, files source) error {
	if files.revision() == d.Revision() {
		return nil
	}
	p, err := load(ctx, files)
	if err != nil {
		return err
	}
	d.current.Store(p)
	return nil
}
