package server

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/orgkeys/orgkeys/internal/durable"
	"github.com/orgkeys/orgkeys/internal/privatefile"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// DataDir is the directory that belongs to one process at a time.
type DataDir struct {
	path string
	lock *os.File
}

var errLocked = errors.New("another orgkeys process uses this data directory: stop it, or set ORGKEYS_DATA_DIR to another one")

// MakeDataDir creates the directory 0700 if it is missing, refuses one that
// others may enter, and returns its absolute path.
func MakeDataDir(path string) (string, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return "", fmt.Errorf("making the data directory: %w", err)
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	if err := privatefile.CheckDir(path); err != nil {
		return "", fmt.Errorf("the data directory: %w", err)
	}
	return path, nil
}

// OpenDataDir is MakeDataDir, and locks the directory until close or the
// process's end.
func OpenDataDir(path string) (*DataDir, error) {
	path, err := MakeDataDir(path)
	if err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(path, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("ORGKEYS_DATA_DIR must be a directory that can be written to (a unit's sandbox names those in ReadWritePaths=): %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("%s: %w", path, errLocked)
		}
		return nil, errors.Join(err, lock.Close())
	}
	return &DataDir{path, lock}, nil
}

// own is a name that the directory keeps, and that no other has but a copy of it.
func (d *DataDir) own() (string, error) {
	path := d.ownPath()
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		b = []byte(rand.Text()[:8] + "\n")
		err = durable.Replace(path, b)
	}
	if err != nil {
		return "", fmt.Errorf("naming the data directory: %w", err)
	}
	own := strings.TrimSpace(string(b))
	if own == "" {
		return "", fmt.Errorf("%s is empty: remove it, and the next start makes another", path)
	}
	return own, nil
}

// holder is what other replicas call the sinks of a server in the directory; empty: none
// ran there yet.
func (d *DataDir) holder() (string, error) {
	if _, err := os.Stat(d.ownPath()); errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	own, err := d.own()
	if err != nil {
		return "", err
	}
	return sqlstore.Holder(d.path, own)
}

func (d *DataDir) ownPath() string { return filepath.Join(d.path, "replica") }

// Close gives the directory free for another process.
func (d *DataDir) Close() error { return d.lock.Close() }

// HideMemory excludes private keys from core dumps and protects them from other
// processes of the same user.
func HideMemory() error {
	syscall.Umask(0o077)
	return errors.Join(
		unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}),
		unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0),
	)
}
