package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"time"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/durable"
)

const (
	lockName     = ".orgkeys-node.lock"
	manifestName = ".orgkeys-node.json"
	maxManifest  = 64 << 10
)

// lockPatience is how long an attempt waits for another run to give the lock back.
const lockPatience = time.Minute

// nameForm is what a secret's name must look like before a path is made of it.
var nameForm = regexp.MustCompile(`^[a-z][a-z0-9_]{0,63}$`)

// dir is a directory of secrets or of the node's key, locked against another
// run. Nothing outside it can be reached through it.
type dir struct {
	root *os.Root
	lock *os.File
}

func openDir(ctx context.Context, path string) (*dir, error) {
	wrong := func(err error, hint string) (*dir, error) {
		return nil, &failure{exitCannotWrite, "directory " + path, hint, err}
	}
	if err := durable.MkdirAll(path); err != nil {
		return wrong(err, "create it, mode 0700, owned by the user that this runs as")
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return wrong(err, "")
	}
	info, err := root.Stat(".")
	if err == nil {
		err = checkOwner(info)
	}
	if err != nil {
		return wrong(errors.Join(err, root.Close()), "chown it to the user that this runs as")
	}
	if mode := info.Mode().Perm(); mode&0o022 != 0 {
		return wrong(errors.Join(fmt.Errorf("others may write to it, mode %04o", mode), root.Close()), "chmod 700 "+path)
	}
	lock, err := root.OpenFile(lockName, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return wrong(errors.Join(err, root.Close()), "check its owner")
	}
	d := &dir{root, lock}
	ctx, cancel := context.WithTimeout(ctx, lockPatience)
	defer cancel()
	if err := durable.LockFile(ctx, d.lock); err != nil {
		d.close()
		return wrong(err, "wait until another run ends")
	}
	return d, nil
}

// openOther locks another directory that a run writes to; nil if it is d itself.
func (d *dir) openOther(ctx context.Context, path string) (*dir, error) {
	own, err := d.root.Stat(".")
	if err != nil {
		return nil, err
	}
	if there, err := os.Stat(path); err == nil && os.SameFile(own, there) {
		return nil, nil
	}
	return openDir(ctx, path)
}

// checkOwner refuses what belongs to another user, who could change it, or its
// mode, at any time. Root could do so anyhow.
func checkOwner(info fs.FileInfo) error {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return errors.New("its owner is not known")
	}
	if user := os.Geteuid(); stat.Uid != 0 && stat.Uid != uint32(user) {
		return fmt.Errorf("it belongs to user %d, and this runs as user %d", stat.Uid, user)
	}
	return nil
}

func (d *dir) close() {
	if d == nil {
		return
	}
	// Closing gives the lock back; nothing was written through these.
	_ = d.lock.Close()
	_ = d.root.Close()
}

// manifest says which files in the directory come from the server. It names
// each before it is written and until it is removed, so that a run that was
// killed leaves none that the next one does not know.
type manifest struct {
	Secrets []string `json:"secrets"`
}

// readManifest returns the secrets that earlier runs wrote, nil if none ever did. One that
// cannot be read as such names none: whatever it named stays.
func readManifest(root *os.Root) ([]string, error) {
	f, err := root.Open(manifestName)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxManifest))
	if err != nil {
		return nil, err
	}
	var m manifest
	if json.Unmarshal(text, &m) != nil || m.Secrets == nil {
		return []string{}, nil
	}
	return slices.DeleteFunc(m.Secrets, func(name string) bool { return !nameForm.MatchString(name) }), nil
}

// writeManifest makes names the secrets that come from the server.
func (d *dir) writeManifest(names []string) error {
	slices.Sort(names)
	text, err := json.Marshal(manifest{slices.Compact(names)})
	if err != nil {
		return err
	}
	_, err = d.replace(manifestName, append(text, '\n'))
	return err
}

// ownNames are the names in the directory that are taken by the node's own files,
// whether or not they are there. Whoever stores secrets chooses their names, and must
// not be able to put a key or a token there, or have one removed.
func (s *settings) ownNames(d *dir) (names []string) {
	within, err := d.root.Stat(".")
	if err != nil {
		return nil // and nothing can be written either
	}
	for _, path := range []string{s.token, s.keyFile, s.recipientFile, s.caFile, s.tlsCert, s.tlsKey, s.config, s.sealedFile, s.receiptFile} {
		if path == "" {
			continue
		}
		paths := []string{path}
		if led, err := filepath.EvalSymlinks(path); err == nil {
			paths = append(paths, led)
		}
		for _, p := range paths {
			if parent, err := os.Stat(filepath.Dir(p)); err == nil && os.SameFile(parent, within) {
				names = append(names, filepath.Base(p))
			}
		}
	}
	return names
}

// update makes the directory hold these secrets, and of what earlier runs wrote
// nothing else. Files that were put there by others stay, and so do the node's own.
func (d *dir) update(secrets []client.Secret, own []string, r *report) error {
	written, err := readManifest(d.root)
	if err != nil {
		return err
	}
	isOwn := func(name string) bool { return slices.Contains(own, name) }
	written = slices.DeleteFunc(written, isOwn)
	var names []string
	for _, s := range secrets {
		if isOwn(s.Name) {
			r.NotWritten = append(r.NotWritten, s.Name)
			continue
		}
		names = append(names, s.Name)
	}
	if err := d.writeManifest(slices.Concat(names, written)); err != nil {
		return err
	}
	for _, s := range secrets {
		if isOwn(s.Name) {
			continue
		}
		changed, err := d.write(s.Name, s.Value)
		switch {
		case err != nil:
			return fmt.Errorf("%s: %w", s.Name, err)
		case changed:
			r.Changed = append(r.Changed, s.Name)
		default:
			r.Unchanged = append(r.Unchanged, s.Name)
		}
	}
	for _, name := range written {
		if slices.Contains(names, name) {
			continue
		}
		if err := d.remove(name); err != nil {
			return fmt.Errorf("removing %s: %w", name, err)
		}
		r.Removed = append(r.Removed, name)
	}
	return d.writeManifest(names)
}

// remove removes a file, and makes its absence last.
func (d *dir) remove(name string) error {
	if err := d.root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return durable.SyncIn(d.root)
}

// write makes the secret name hold value and reports whether it did not before.
func (d *dir) write(name string, value []byte) (changed bool, err error) {
	if !nameForm.MatchString(name) {
		return false, fmt.Errorf("%q is not a valid name of a secret", name)
	}
	return d.replace(name, value)
}

// replace makes name hold value, mode 0600, and reports whether it did not
// before. Whoever reads name sees the old value or the new one, whole.
func (d *dir) replace(name string, value []byte) (changed bool, err error) {
	if d.holds(name, value) {
		return false, nil
	}
	if err := durable.ReplaceIn(d.root, name, value); err != nil {
		return false, err
	}
	return true, nil
}

// holds reports whether name is a file of mode 0600 that has value in it.
func (d *dir) holds(name string, value []byte) bool {
	info, err := d.root.Lstat(name)
	if err != nil || info.Mode() != 0o600 || info.Size() != int64(len(value)) {
		return false
	}
	f, err := d.root.Open(name)
	if err != nil {
		return false
	}
	defer f.Close()
	have, err := io.ReadAll(io.LimitReader(f, int64(len(value))+1))
	defer clear(have)
	return err == nil && bytes.Equal(have, value)
}

// listSecrets returns which of the secrets that earlier runs wrote are in path,
// and which are not. Of a version without a manifest it returns all files.
func listSecrets(path string) (found, missing []string, err error) {
	wrong := func(err error) error {
		return &failure{exitCannotWrite, "directory " + path, "check its owner", err}
	}
	root, err := os.OpenRoot(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, wrong(err)
	}
	defer root.Close()
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return nil, nil, wrong(err)
	}
	for _, e := range entries {
		if nameForm.MatchString(e.Name()) && e.Type().IsRegular() {
			found = append(found, e.Name())
		}
	}
	written, err := readManifest(root)
	if err != nil {
		return nil, nil, wrong(err)
	}
	if written == nil {
		return found, nil, nil
	}
	for _, name := range written {
		if !slices.Contains(found, name) {
			missing = append(missing, name)
		}
	}
	return slices.DeleteFunc(found, func(name string) bool { return !slices.Contains(written, name) }), missing, nil
}
