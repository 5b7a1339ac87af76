// Package durable writes small files so that a crash at any moment leaves the
// old content or the new one, whole, and nothing that was reported as written is
// lost. Files are readable by their owner alone; on Windows the directory's access
// list decides that.
package durable

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// New is a file that is to be created under a name that nothing has yet.
type New struct {
	path      string
	temporary *os.File
}

// Create makes sure that a file can be written at path, before there is
// anything to write. What is there already is fs.ErrExist, and stays. writer names
// who does: those of one name exclude each other, as with Lock, and what a crash
// left of an earlier call is removed.
func Create(path, writer string) (*New, error) {
	if _, err := os.Lstat(path); err == nil {
		return nil, &fs.PathError{Op: "create", Path: path, Err: fs.ErrExist}
	}
	if err := Clean(path, writer); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(temporary(path, writer), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	n := &New{path, f}
	// Some file systems, such as those of USB sticks, have no links. That has to be
	// known before there is content that exists once.
	err = os.Link(f.Name(), trial(path, writer))
	if err == nil {
		err = os.Remove(trial(path, writer))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("a file cannot be made there in one step (the file system may have no hard links; choose another directory): %w", err), n.Discard())
	}
	return n, nil
}

func temporary(path, writer string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+"."+writer)
}

func trial(path, writer string) string { return temporary(path, writer) + ".link" }

// Clean removes what a crash left of a writer's earlier Create, and nothing of path.
func Clean(path, writer string) error {
	for _, name := range []string{trial(path, writer), temporary(path, writer)} {
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// Write gives the file its content and its name, unless something has taken the
// name meanwhile.
func (n *New) Write(content []byte) error {
	err := writeSynced(n.temporary, content)
	if err == nil {
		// Unlike a rename, a link is never made in place of another file.
		err = os.Link(n.temporary.Name(), n.path)
	}
	if err := errors.Join(err, n.Discard()); err != nil {
		return err
	}
	return syncDir(filepath.Dir(n.path))
}

// Discard removes what Create made. After Write it does nothing.
func (n *New) Discard() error {
	if n.temporary == nil {
		return nil
	}
	name := n.temporary.Name()
	err := n.temporary.Close()
	n.temporary = nil
	return errors.Join(err, os.Remove(name))
}

// Replace makes path hold content, whatever it held before. Its writers exclude
// each other, as with Lock: what a crash left of an earlier call is removed.
func Replace(path string, content []byte) error {
	dir, err := os.OpenRoot(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(ReplaceIn(dir, filepath.Base(path), content), dir.Close())
}

// ReplaceIn is Replace in an open directory.
func ReplaceIn(dir *os.Root, name string, content []byte) error {
	temporary := "." + name + ".new"
	if err := dir.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := dir.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = errors.Join(writeSynced(f, content), f.Close())
	if err == nil {
		err = dir.Rename(temporary, name)
	}
	if err != nil {
		return errors.Join(err, dir.Remove(temporary))
	}
	return SyncIn(dir)
}

func writeSynced(f *os.File, content []byte) error {
	if _, err := f.Write(content); err != nil {
		return err
	}
	return f.Sync()
}

// MkdirAll makes a directory, mode 0700, and those above it. Unlike after
// os.MkdirAll, they are still there after a crash.
func MkdirAll(path string) error {
	err := os.Mkdir(path, 0o700)
	if errors.Is(err, fs.ErrNotExist) && path != filepath.Dir(path) {
		if err = MkdirAll(filepath.Dir(path)); err == nil {
			err = os.Mkdir(path, 0o700)
		}
	}
	if errors.Is(err, fs.ErrExist) { // it may be no directory: opening it tells
		return nil
	}
	if err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// Sync makes the names in a directory last, whoever made them.
func Sync(dir string) error { return syncDir(dir) }

// Remove removes path, if it is there, for good.
func Remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// ErrLocked means that another process held a lock for as long as the caller waited.
var ErrLocked = errors.New("another process holds the lock")

const lockPause = 50 * time.Millisecond

// Lock takes the lock that the file at path stands for, and waits for it until
// ctx ends. A process that ends, however it does, gives its locks back.
func Lock(ctx context.Context, path string) (unlock func() error, err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := LockFile(ctx, f); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), f.Close())
	}
	return f.Close, nil // which gives the lock back
}

// LockFile is Lock for an open file: closing it gives the lock back.
func LockFile(ctx context.Context, f *os.File) error {
	for {
		taken, err := tryLock(f)
		if err != nil {
			return fmt.Errorf("locking: %w", err)
		}
		if taken {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ErrLocked, ctx.Err())
		case <-time.After(lockPause):
		}
	}
}
