//go:build cgo

package hsm

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/miekg/pkcs11"
	"golang.org/x/sys/unix"
)

const (
	softHSMLabel  = "orgkeys"
	softHSMConf   = "softhsm2.conf"
	softHSMTokens = "tokens"
	softHSMPIN    = "pin"
	softHSMRecord = "token.object" // what SoftHSM keeps of a token itself: label, flags, and the key to its objects under each PIN
	staging       = ".new"         // ends the name of what is not complete
)

// softHSMModules are the places where systems install SoftHSM: Debian and Arch,
// Fedora, others, macOS.
func softHSMModules() []string {
	return []string{
		"/usr/lib/softhsm/libsofthsm2.so",
		"/usr/lib64/pkcs11/libsofthsm2.so",
		"/usr/lib64/softhsm/libsofthsm2.so",
		"/usr/lib/pkcs11/libsofthsm2.so",
		"/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
		"/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
		"/usr/local/lib/softhsm/libsofthsm2.so",
		"/opt/homebrew/lib/softhsm/libsofthsm2.so",
	}
}

// FindSoftHSM returns the path of the installed SoftHSM module.
func FindSoftHSM() (string, error) {
	for _, path := range softHSMModules() {
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
			return path, nil
		}
	}
	return "", errors.New("SoftHSM is not installed: install it (Debian and Ubuntu: apt install softhsm2; Fedora: dnf install softhsm; Arch, macOS with Homebrew: the package softhsm), or set ORGKEYS_PKCS11_MODULE to a PKCS#11 module")
}

// InitSoftHSM makes a SoftHSM token under dir, with its PIN and sealing key, if
// there is none, and points SoftHSM to it. created says that it did: records
// sealed earlier were sealed by another token.
//
//	pin            random, 0600
//	tokens/        SoftHSM's object store
//	token.object   a copy of the file in tokens/ without which no PIN opens the token
//	softhsm2.conf  names tokens/; written anew when it is not as it must be
//
// The token is complete before it is given the name tokens, on disk too, and
// everything before that is begun again after a crash. The security officer's
// PIN is forgotten: nobody reinitialises this token. Of processes that do this in
// one directory at once, one makes the token. It sets SOFTHSM2_CONF for this process.
func InitSoftHSM(dir string) (cfg Config, created bool, err error) {
	module, err := FindSoftHSM()
	if err != nil {
		return Config{}, false, err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return Config{}, false, fmt.Errorf("locating the token: %w", err)
	}
	// SoftHSM's configuration has no quoting.
	if strings.ContainsAny(dir, "#=\r\n") {
		return Config{}, false, fmt.Errorf("SoftHSM cannot keep a token under %q: the path has one of #, = or a line's end", dir)
	}
	unlock, err := lockDir(dir)
	if err != nil {
		return Config{}, false, fmt.Errorf("locating the token: %w", err)
	}
	defer unlock()
	tokens := filepath.Join(dir, softHSMTokens)
	switch _, err := os.Stat(tokens); {
	case errors.Is(err, fs.ErrNotExist):
		if err := createSoftHSM(dir, ownToken(module, dir)); err != nil {
			return Config{}, false, fmt.Errorf("making the SoftHSM token: %w", err)
		}
		created = true
	case err != nil:
		return Config{}, false, fmt.Errorf("locating the token: %w", err)
	default:
		if err := restoreRecord(tokens, filepath.Join(dir, softHSMRecord)); err != nil {
			return Config{}, false, fmt.Errorf("restoring the token's record: %w", err)
		}
	}
	cfg, err = LocateSoftHSM(dir)
	return cfg, created, err
}

// lockDir waits until no other process makes or restores a token under dir.
func lockDir(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() { _ = f.Close() }, nil // it was only locked
}

func ownToken(module, dir string) Config {
	return Config{Module: module, TokenLabel: softHSMLabel, PINFile: filepath.Join(dir, softHSMPIN), AttemptFile: AttemptFile(dir)}
}

// LocateSoftHSM is InitSoftHSM without making or restoring anything, for who
// looks at a token that may be in use.
func LocateSoftHSM(dir string) (Config, error) {
	module, err := FindSoftHSM()
	if err != nil {
		return Config{}, err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return Config{}, fmt.Errorf("locating the token: %w", err)
	}
	cfg := ownToken(module, dir)
	if _, err := os.Stat(cfg.PINFile); err != nil {
		return Config{}, fmt.Errorf("there is a token, but no PIN for it; restore it from the backup: %w", err)
	}
	return cfg, useSoftHSM(filepath.Join(dir, softHSMConf), filepath.Join(dir, softHSMTokens))
}

// useSoftHSM writes conf for an object store and makes SoftHSM read it at the next C_Initialize.
func useSoftHSM(conf, tokens string) error {
	want := []byte("directories.tokendir = " + tokens + "\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n")
	if have, err := os.ReadFile(conf); err != nil || string(have) != string(want) {
		if err := writeFile(conf, want); err != nil {
			return err
		}
	}
	// Reaches the library's getenv: cgo's runtime passes it on.
	return os.Setenv("SOFTHSM2_CONF", conf)
}

// SoftHSM empties a token's record at each login and then writes it anew, with
// another generation, its first 8 bytes. Who is killed in between leaves a token
// that nothing opens, so a copy is kept.
const generation = 8

// KeepSoftHSM keeps a copy of the record of the token under dir. It is called
// when the token has been opened, which shows that the record is good.
func KeepSoftHSM(dir string) error {
	_, record, err := readRecord(filepath.Join(dir, softHSMTokens))
	if err != nil || !isRecord(record) { // another process may be at it
		return err
	}
	kept := filepath.Join(dir, softHSMRecord)
	if copied, err := os.ReadFile(kept); err == nil && isRecord(copied) && bytes.Equal(record[generation:], copied[generation:]) {
		return nil
	}
	return writeFile(kept, record)
}

// restoreRecord puts the copy back where the record is not whole: what was cut
// short is the beginning of what it was.
func restoreRecord(tokens, kept string) error {
	path, record, err := readRecord(tokens)
	if err != nil || path == "" {
		return err
	}
	copied, err := os.ReadFile(kept)
	if !isRecord(copied) || isRecord(record) && (len(record) >= len(copied) || !bytes.HasPrefix(copied[generation:], record[generation:])) {
		if isRecord(record) || errors.Is(err, fs.ErrNotExist) {
			return nil // whole, or opening the token tells
		}
		return err
	}
	return writeFile(path, copied)
}

func isRecord(b []byte) bool {
	return len(b) > generation && bytes.Contains(b[generation:], []byte(softHSMLabel))
}

// readRecord returns the record's place and text; none if the object store does
// not hold one token alone, as createSoftHSM makes it.
func readRecord(tokens string) (path string, record []byte, err error) {
	store, err := os.OpenRoot(tokens)
	if err != nil {
		return "", nil, err
	}
	defer store.Close()
	names, err := fs.Glob(store.FS(), "*/"+softHSMRecord)
	if err != nil || len(names) != 1 {
		return "", nil, err
	}
	record, err = store.ReadFile(names[0])
	return filepath.Join(tokens, names[0]), record, err
}

// createSoftHSM makes the PIN and then a token that is complete.
func createSoftHSM(dir string, cfg Config) error {
	pin, err := ensurePIN(cfg.PINFile)
	if err != nil {
		return err
	}
	defer clear(pin)
	tokens := filepath.Join(dir, softHSMTokens)
	conf := filepath.Join(dir, softHSMConf+staging)
	if err := os.RemoveAll(tokens + staging); err != nil {
		return err
	}
	if err := os.Mkdir(tokens+staging, 0o700); err != nil {
		return err
	}
	if err := useSoftHSM(conf, tokens+staging); err != nil {
		return err
	}
	if err := initToken(cfg, pin); err != nil {
		return err
	}
	if err := syncTree(tokens + staging); err != nil {
		return err
	}
	if err := os.Remove(conf); err != nil {
		return err
	}
	if err := os.Rename(tokens+staging, tokens); err != nil {
		return err
	}
	return syncPath(dir)
}

// ensurePIN returns the PIN of an earlier attempt, or a new one.
func ensurePIN(path string) ([]byte, error) {
	switch _, err := os.Stat(path); {
	case err == nil:
		return readPIN(path)
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	pin := randomPIN()
	return pin, writeFile(path, pin)
}

// randomPIN returns 128 bits as text.
func randomPIN() []byte {
	raw := make([]byte, 16)
	rand.Read(raw)
	pin := make([]byte, hex.EncodedLen(len(raw)))
	hex.Encode(pin, raw)
	clear(raw)
	return pin
}

// initToken initialises the first free slot through the PKCS#11 API.
func initToken(cfg Config, pin []byte) (err error) {
	lib, err := load(cfg.Module)
	if err != nil {
		return err
	}
	if err := lib.Initialize(); err != nil {
		return fmt.Errorf("initialising the module: %w", err)
	}
	defer func() { err = errors.Join(err, lib.Finalize()) }()
	slots, err := lib.GetSlotList(false)
	if err != nil {
		return fmt.Errorf("listing the slots: %w", err)
	}
	if len(slots) == 0 {
		return errors.New("SoftHSM has no free slot")
	}
	so := randomPIN()
	defer clear(so)
	if err := lib.InitToken(slots[0], string(so), cfg.TokenLabel); err != nil {
		return fmt.Errorf("initialising the token: %w", err)
	}
	slot, err := cfg.findToken(lib)
	if err != nil {
		return err
	}
	h, err := lib.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return fmt.Errorf("opening a session: %w", err)
	}
	if err := lib.Login(h, pkcs11.CKU_SO, string(so)); err != nil {
		return fmt.Errorf("logging in as security officer: %w", err)
	}
	if err := lib.InitPIN(h, string(pin)); err != nil {
		return fmt.Errorf("setting the PIN: %w", err)
	}
	if err := lib.Logout(h); err != nil {
		return fmt.Errorf("logging out: %w", err)
	}
	if err := lib.Login(h, pkcs11.CKU_USER, string(pin)); err != nil {
		return fmt.Errorf("logging in: %w", err)
	}
	_, err = generateSealingKey(lib, h, formatGCM, sealKeyLabel, newKeyID(), true)
	return err
}

// writeFile writes a file 0600 that is there as a whole or not at all, also
// after a power failure.
func writeFile(path string, content []byte) error {
	f, err := os.OpenFile(path+staging, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err := errors.Join(err, f.Chmod(0o600), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+staging, path); err != nil {
		return err
	}
	return syncPath(filepath.Dir(path))
}

// syncTree makes everything under root durable; SoftHSM itself does not.
func syncTree(root string) error {
	return filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return syncPath(path)
	})
}

func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
