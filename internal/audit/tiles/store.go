package tiles

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sync"

	"github.com/orgkeys/orgkeys/internal/durable"
)

// Store keeps the files. Its implementations are Dir and bucket.Bucket. Paths have slashes.
type Store interface {
	// Read returns a file's content; fs.ErrNotExist: there is no such file.
	Read(ctx context.Context, path string) ([]byte, error)
	// WriteOnce writes a file that never changes. One that is there must hold the same.
	WriteOnce(ctx context.Context, path string, content []byte) error
	// Flush returns when no crash can lose what was given to WriteOnce, also what an
	// earlier process had written.
	Flush(ctx context.Context) error
	// Replace makes path hold content, unless it holds something else than before
	// meanwhile; before is nil where it holds nothing.
	Replace(ctx context.Context, path string, before, content []byte) error
	// RemoveAll removes a file, if it is there, or every file right in a directory.
	RemoveAll(ctx context.Context, path string) error
	// Lock keeps other processes from writing, as far as it can; what is written is
	// safe without it.
	Lock(ctx context.Context) (unlock func() error, err error)
	fmt.Stringer
}

// Changed is the error of WriteOnce about a file that holds something else.
func Changed(where string) error {
	return fmt.Errorf("%s does not hold what the log holds: it was changed, or belongs to another log", where)
}

// Dir is a directory of files.
type Dir struct {
	root string

	mu      sync.Mutex
	touched map[string]bool // directories whose names are not known to last
}

// NewDir returns the store in a directory, which need not exist yet.
func NewDir(root string) *Dir { return &Dir{root: root, touched: map[string]bool{}} }

func (d *Dir) String() string { return d.root }

func (d *Dir) at(path string) string { return filepath.Join(d.root, filepath.FromSlash(path)) }

// Read implements Store.
func (d *Dir) Read(_ context.Context, path string) ([]byte, error) { return os.ReadFile(d.at(path)) }

// WriteOnce implements Store.
func (d *Dir) WriteOnce(_ context.Context, name string, content []byte) error {
	at := d.at(name)
	if err := os.MkdirAll(filepath.Dir(at), 0o700); err != nil {
		return err
	}
	d.touch(name)
	f, err := durable.Create(at, "new")
	if err == nil {
		err = f.Write(content)
	}
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	held, err := os.ReadFile(at)
	if err == nil && !bytes.Equal(held, content) {
		err = Changed(at)
	}
	return err
}

func (d *Dir) touch(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.touched[filepath.Dir(d.root)] = true
	for name != "." {
		name = path.Dir(name)
		d.touched[d.at(name)] = true
	}
}

// Flush implements Store.
func (d *Dir) Flush(context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	for _, dir := range slices.Sorted(maps.Keys(d.touched)) {
		errs = append(errs, durable.Sync(dir))
	}
	clear(d.touched)
	return errors.Join(errs...)
}

// Replace implements Store. The lock keeps others away.
func (d *Dir) Replace(_ context.Context, path string, _, content []byte) error {
	return durable.Replace(d.at(path), content)
}

// RemoveAll implements Store.
func (d *Dir) RemoveAll(_ context.Context, path string) error {
	at := d.at(path)
	if err := os.RemoveAll(at); err != nil {
		return err
	}
	err := durable.Sync(filepath.Dir(at))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Lock implements Store.
func (d *Dir) Lock(ctx context.Context) (func() error, error) {
	if err := durable.MkdirAll(d.root); err != nil {
		return nil, err
	}
	return durable.Lock(ctx, filepath.Join(d.root, ".lock"))
}
