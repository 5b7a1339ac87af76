package tiles

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/mod/sumdb/tlog"
	"golang.org/x/sync/errgroup"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
)

// Source is a log that can be published. Its implementation is sqlstore.
type Source interface {
	Archived(ctx context.Context) (audit.Archived, error)
	Entries(ctx context.Context, index int64, limit int) ([]audit.Entry, error)
	// LeafHashes returns those of a whole bundle that was moved.
	LeafHashes(ctx context.Context, index int64, limit int) ([]tlog.Hash, error)
	LastSigned(ctx context.Context) (audit.Signed, error)
}

// Reasons why nothing is published.
var (
	ErrNotSigned = errors.New("no signed checkpoint: send the running server SIGUSR1, or run \"orgkeys audit checkpoint\" while it is stopped")
	ErrRewritten = errors.New("the log does not extend what is published there: it was set back or rewritten since, or it is another log; publish it to another place")
)

// writers is how many files are written, and flushed to disk, at once.
const writers = 16

// Publish writes the log, up to its newest signed checkpoint, to a store, which
// may hold what was published before. The checkpoint comes last: whoever reads it finds
// all that it covers, and after a crash the next call goes on. Nothing that
// was published is changed or removed but the checkpoint. It returns the checkpoint
// that is published then. A log that does not have the root that was signed is
// a *verify.Problem.
func Publish(ctx context.Context, store Store, source Source, progress verify.Progress) (signed audit.Signed, err error) {
	unlock, err := store.Lock(ctx)
	if err != nil {
		return audit.Signed{}, err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	return publish(ctx, store, source, progress)
}

// publish is Publish under the store's lock.
func publish(ctx context.Context, store Store, source Source, progress verify.Progress) (audit.Signed, error) {
	head, err := source.LastSigned(ctx)
	if err != nil {
		return audit.Signed{}, err
	}
	if head.Size == 0 {
		return audit.Signed{}, ErrNotSigned
	}
	published, err := readPublished(ctx, store)
	if err != nil {
		return audit.Signed{}, err
	}
	if published.size > head.Size || published.origin != "" && published.origin != head.Origin {
		return audit.Signed{}, ErrRewritten
	}
	past, err := source.Archived(ctx)
	if err != nil {
		return audit.Signed{}, err
	}
	p := publication{store: store, source: source, head: head, removed: past.Removed, tick: progress.Ticking()}
	// The first pass only reads: a file of a wrong log could never be replaced.
	nothing := func(string, []byte) error { return nil }
	if err := p.walk(ctx, published.clone(), nothing); err != nil {
		return audit.Signed{}, err
	}
	if err := p.write(ctx, published.tree); err != nil {
		return audit.Signed{}, err
	}
	if err := store.Replace(ctx, checkpointName, published.note, []byte(head.Note)); err != nil {
		return audit.Signed{}, err
	}
	return head, nil
}

// published is what a store holds.
type published struct {
	*tree
	origin string // empty: nothing
	note   []byte // the checkpoint
}

func readPublished(ctx context.Context, store Store) (published, error) {
	note, err := store.Read(ctx, checkpointName)
	if errors.Is(err, fs.ErrNotExist) {
		return published{tree: &tree{}}, nil
	}
	if err != nil {
		return published{}, err
	}
	c, err := audit.ParseCheckpoint(string(note))
	if err != nil {
		return published{}, fmt.Errorf("%s in %s: %w", checkpointName, store, err)
	}
	t, err := loadEdge(c.Size, func(path string) ([]byte, error) { return store.Read(ctx, path) })
	if err != nil {
		return published{}, fmt.Errorf("what is published in %s cannot be read: %w", store, err)
	}
	if t.root() != c.Root {
		return published{}, fmt.Errorf("the tiles in %s do not match their checkpoint: they were changed", store)
	}
	return published{t, c.Origin, note}, nil
}

type publication struct {
	store   Store
	source  Source
	head    audit.Signed
	removed int64 // first events of which only hashes are left
	tick    func(done, all int64)
}

// write writes what is new, in no order. When it returns a crash of the machine loses
// nothing of it, also if an earlier process, which crashed, wrote a part.
func (p *publication) write(ctx context.Context, from *tree) error {
	group, writing := errgroup.WithContext(ctx)
	group.SetLimit(writers)
	err := p.walk(writing, from, func(path string, content []byte) error {
		group.Go(func() error { return p.store.WriteOnce(writing, path, content) })
		return writing.Err()
	})
	if waited := group.Wait(); waited != nil { // which is why walk was cancelled
		return waited
	}
	return errors.Join(err, p.store.Flush(ctx))
}

// walk goes from what is published to the head, and passes on each file that comes
// about. The events of a bundle that was not full are read again: they must be those
// that were published.
func (p *publication) walk(ctx context.Context, t *tree, emit func(path string, content []byte) error) error {
	var before []tlog.Hash
	if len(t.levels) > 0 {
		before, t.levels[0] = t.levels[0], make([]tlog.Hash, 0, width)
	}
	t.size -= int64(len(before))
	for first := t.size; first < p.head.Size; first = t.size {
		w := int(min(width, p.head.Size-first))
		if first < p.removed {
			if err := p.hashes(ctx, t, before, emit); err != nil {
				return err
			}
		} else {
			bundle, err := p.bundle(ctx, t, w, before, emit)
			if err != nil {
				return err
			}
			if err := emit(bundlePath(first/width, w), bundle); err != nil {
				return err
			}
		}
		before = nil
		p.tick(t.size, p.head.Size)
	}
	if t.root() != p.head.Root {
		return verify.Problemf(-1, "the events do not have the root hash that was signed, or do not extend those that are published: run \"orgkeys audit verify\"")
	}
	return t.edge(emit)
}

// hashes reads the next bundle, of which nothing else is left, into the tree.
func (p *publication) hashes(ctx context.Context, t *tree, before []tlog.Hash, emit func(path string, content []byte) error) error {
	hashes, err := p.source.LeafHashes(ctx, t.size, width)
	if err != nil {
		return err
	}
	for i, h := range hashes {
		if i < len(before) && h != before[i] {
			return fmt.Errorf("event %d: %w", t.size, ErrRewritten)
		}
		if err := t.push(h, emit); err != nil {
			return err
		}
	}
	return nil
}

// bundle reads the next w events into the tree and into an entry bundle.
func (p *publication) bundle(ctx context.Context, t *tree, w int, before []tlog.Hash, emit func(path string, content []byte) error) ([]byte, error) {
	page, err := p.source.Entries(ctx, t.size, w)
	if err != nil {
		return nil, err
	}
	if len(page) < w {
		return nil, verify.Problemf(t.size+int64(len(page)), "it is missing: the signed checkpoint covers %d events", p.head.Size)
	}
	var bundle []byte
	for i, e := range page {
		h := tlog.RecordHash(e.Leaf)
		if i < len(before) && h != before[i] {
			return nil, fmt.Errorf("event %d: %w", e.Index, ErrRewritten)
		}
		if bundle, err = appendEntry(bundle, e.Leaf); err != nil {
			return nil, verify.Problemf(e.Index, "%v", err)
		}
		if err := t.push(h, emit); err != nil {
			return nil, err
		}
	}
	return bundle, nil
}
