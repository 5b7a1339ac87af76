//go:build cgo

package hsm

import (
	"bytes"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/miekg/pkcs11"
	"golang.org/x/sys/unix"
)

// A token locks after a few wrong PINs, for all its users and for good. So each
// PIN is offered to a token once: attempts is the file in which that is kept
// across restarts. It holds one line,
//
//	orgkeys-pin-attempt-v1 STATE SALT HASH
//
// written and made durable before the PIN is offered, so that no crash makes an
// attempt forgotten. HASH is of the PIN and of the token's serial number under
// SALT: a changed PIN file may be tried, and so may another token. An empty
// line says that the last attempt succeeded. The file keeps its length, so that
// a disk that has become full stands in the way of no login.
//
// Every process that shares the file waits for the others' attempts.
type attempts struct{ path string }

const attemptFormat = "orgkeys-pin-attempt-v1"

// States of an attempt.
const (
	offered       = "offered"         // and nothing more is known: the process died, or the token did not say
	offeredToWary = "offered-to-wary" // the same, by a token that had already counted a refusal
	refused       = "refused"
)

const (
	saltSize       = 32
	hashIterations = 50_000 // PINs are short: what the file says about one must not be found by a quick search
	maxAttempt     = 512    // bytes of the file
)

// attemptWait bounds the wait for another process's attempt.
const attemptWait = 5 * time.Second

type attempt struct {
	state      string
	salt, hash []byte
}

// of reports whether a was made with pin at the token that has serial.
func (a attempt) of(pin []byte, serial string) bool {
	if a.state == "" {
		return false
	}
	hash, err := hashPIN(pin, serial, a.salt)
	return err == nil && subtle.ConstantTimeCompare(hash, a.hash) == 1
}

func hashPIN(pin []byte, serial string, salt []byte) ([]byte, error) {
	// The copies of the PIN here are not cleared: the standard library takes a string.
	return pbkdf2.Key(sha256.New, string(pin)+"\x00"+serial, salt, hashIterations, sha256.Size)
}

func newAttempt(state string, pin []byte, serial string) (attempt, error) {
	salt := make([]byte, saltSize)
	rand.Read(salt)
	hash, err := hashPIN(pin, serial, salt)
	return attempt{state, salt, hash}, err
}

func (a attempt) String() string {
	return fmt.Sprintf("%s %s %x %x\n", attemptFormat, a.state, a.salt, a.hash)
}

// parseAttempt takes a line that it cannot read for no attempt: the token's
// flags are read before every one.
func parseAttempt(line string) attempt {
	line, _, _ = strings.Cut(line, "\n")
	fields := strings.Fields(line)
	if len(fields) != 4 || fields[0] != attemptFormat {
		return attempt{}
	}
	salt, saltErr := hex.DecodeString(fields[2])
	hash, hashErr := hex.DecodeString(fields[3])
	if saltErr != nil || hashErr != nil || len(hash) != sha256.Size {
		return attempt{}
	}
	return attempt{fields[1], salt, hash}
}

// logIn logs the user in, for all sessions of this process, with the PIN that
// the file holds now. One that was accepted before stands in for a file that
// has gone away.
func (t *Token) logIn(slot uint, h pkcs11.SessionHandle) error {
	pin, err := readPIN(t.cfg.PINFile)
	if err != nil {
		if t.pin == nil {
			return err
		}
		t.cfg.Log.Warn("using the PIN of the last login", "error", err)
		pin = bytes.Clone(t.pin)
	}
	if err := t.login(slot, h, pin); err != nil {
		clear(pin)
		return err
	}
	clear(t.pin)
	t.pin = pin
	return nil
}

// errWary: the token counts refused PINs.
var errWary = errors.New("the token has refused a PIN since the last successful login, and further refusals lock it")

func (t *Token) checkNotWary(slot uint) error {
	info, err := t.lib.GetTokenInfo(slot)
	if err == nil && info.Flags&(pkcs11.CKF_USER_PIN_COUNT_LOW|pkcs11.CKF_USER_PIN_FINAL_TRY|pkcs11.CKF_USER_PIN_LOCKED) != 0 {
		err = errWary
	}
	return err
}

// login offers pin to the token once. It reports ErrPIN, and offers nothing, if
// the token's flags or an earlier attempt speak against it.
func (t *Token) login(slot uint, h pkcs11.SessionHandle, pin []byte) (err error) {
	file, err := attempts{t.cfg.AttemptFile}.open()
	if err != nil {
		return fmt.Errorf("the PIN is not used, because a refusal could not be recorded: %w", err)
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	info, err := t.lib.GetTokenInfo(slot)
	if err != nil {
		return fmt.Errorf("reading the token's flags: %w", err)
	}
	if err := judgeFlags(info.Flags); err != nil {
		return err
	}
	last, err := readAttempt(file)
	if err != nil {
		return err
	}
	wary := info.Flags&pkcs11.CKF_USER_PIN_COUNT_LOW != 0
	if last.of(pin, info.SerialNumber) {
		switch {
		case last.state == refused:
			return fmt.Errorf("%w (%s)", ErrPINRefused, t.cfg.AttemptFile)
		case last.state == offered && wary:
			return fmt.Errorf("%w (%s)", ErrPINInterrupted, t.cfg.AttemptFile)
		}
	}
	state := offered
	if wary {
		state = offeredToWary
		t.cfg.Log.Warn("the token has refused a PIN since the last successful login", "token", info.Label)
	}
	now, err := newAttempt(state, pin, info.SerialNumber)
	if err != nil {
		return err
	}
	if err := errors.Join(writeAttempt(file, now.String()), syncPath(filepath.Dir(t.cfg.AttemptFile))); err != nil {
		return fmt.Errorf("the PIN is not used, because a refusal could not be recorded: %w", err)
	}
	return t.settle(file, now, slot, t.lib.Login(h, pkcs11.CKU_USER, string(pin)))
}

// settle writes down how the attempt ended. Where the token did not say, it
// stays as it is: the flags tell at the next one.
func (t *Token) settle(file *os.File, now attempt, slot uint, err error) error {
	switch {
	case err == nil, is(err, pkcs11.CKR_USER_ALREADY_LOGGED_IN):
		return writeAttempt(file, "")
	case is(err, pkcs11.CKR_USER_PIN_NOT_INITIALIZED):
		return errors.Join(ErrPINNotInitialized, writeAttempt(file, ""))
	case !pinRefused(err):
		return fmt.Errorf("logging in: %w", err)
	}
	now.state = refused
	if err := writeAttempt(file, now.String()); err != nil {
		t.cfg.Log.Error("a refused PIN could not be recorded", "file", t.cfg.AttemptFile, "error", err)
	}
	switch {
	case is(err, pkcs11.CKR_PIN_LOCKED):
		return fmt.Errorf("%w (%w)", ErrPINLocked, err)
	case is(err, pkcs11.CKR_PIN_EXPIRED):
		return fmt.Errorf("%w (%w)", ErrPINExpired, err)
	}
	if info, infoErr := t.lib.GetTokenInfo(slot); infoErr == nil && info.Flags&pkcs11.CKF_USER_PIN_LOCKED != 0 {
		return fmt.Errorf("%w (%w)", ErrPINLocked, err)
	}
	return fmt.Errorf("%w (%w; %s)", ErrPINRefused, err, t.cfg.AttemptFile)
}

// judgeFlags reports what the token itself says against offering a PIN
// (PKCS#11 2.40, CK_TOKEN_INFO).
func judgeFlags(flags uint) error {
	has := func(f uint) bool { return flags&f != 0 }
	switch {
	case has(pkcs11.CKF_USER_PIN_LOCKED):
		return ErrPINLocked
	case !has(pkcs11.CKF_TOKEN_INITIALIZED):
		return ErrTokenNotInitialized
	case !has(pkcs11.CKF_USER_PIN_INITIALIZED) && has(pkcs11.CKF_LOGIN_REQUIRED):
		return ErrPINNotInitialized
	case has(pkcs11.CKF_USER_PIN_FINAL_TRY):
		return ErrPINFinalTry
	}
	return nil
}

// open opens the file, makes it if it is missing, and waits until no other
// process has it. One that root makes belongs to the directory's owner, whom
// the service runs as.
func (a attempts) open() (*os.File, error) {
	file, err := os.OpenFile(a.path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	err = giveToOwner(file, filepath.Dir(a.path))
	for deadline := time.Now().Add(attemptWait); err == nil; time.Sleep(10 * time.Millisecond) {
		err = unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return file, nil
		}
		if errors.Is(err, unix.EWOULDBLOCK) && time.Now().Before(deadline) {
			err = nil
		}
	}
	return nil, errors.Join(fmt.Errorf("%s: %w", a.path, err), file.Close())
}

func giveToOwner(file *os.File, dir string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if owner, ok := info.Sys().(*syscall.Stat_t); ok {
		return file.Chown(int(owner.Uid), int(owner.Gid))
	}
	return nil
}

func readAttempt(file *os.File) (attempt, error) {
	line, err := io.ReadAll(io.NewSectionReader(file, 0, maxAttempt))
	if err != nil {
		return attempt{}, fmt.Errorf("reading the last attempt with a PIN: %w", err)
	}
	return parseAttempt(string(line)), nil
}

func writeAttempt(file *os.File, line string) error {
	_, err := file.WriteAt(fmt.Appendf(nil, "%-*s\n", maxAttempt-1, line), 0)
	if err := errors.Join(err, file.Truncate(maxAttempt), file.Sync()); err != nil {
		return fmt.Errorf("writing down an attempt with a PIN: %w", err)
	}
	return nil
}
