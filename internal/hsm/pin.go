//go:build cgo

package hsm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"unicode"
)

const maxPIN = 255 // bytes; SoftHSM's limit, and more than other tokens take

// readPIN reads a PIN file that nobody but its owner can read. A line's end
// after the PIN is not part of it.
func readPIN(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading the PIN file: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("reading the PIN file: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("PIN file %s is not a regular file", path)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("PIN file %s is open to others (mode %04o): chmod 600 it", path, info.Mode().Perm())
	}
	raw := make([]byte, maxPIN+3)
	n, err := io.ReadFull(f, raw)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("reading the PIN file: %w", err)
	}
	pin := bytes.TrimRight(raw[:n], "\r\n")
	if err := checkPIN(pin); err != nil {
		clear(raw)
		return nil, fmt.Errorf("PIN file %s %w", path, err)
	}
	return pin, nil
}

// checkPIN refuses what is hardly meant as a PIN, since offering it costs one of
// the few attempts that a token gives.
func checkPIN(pin []byte) error {
	switch {
	case len(pin) == 0 || len(pin) > maxPIN:
		return fmt.Errorf("must hold a PIN of 1 to %d bytes", maxPIN)
	case bytes.ContainsFunc(pin, unicode.IsControl):
		return errors.New("holds more than one line, or control characters: it must hold the PIN alone")
	case bytes.HasPrefix(pin, []byte("\ufeff")):
		return errors.New("begins with a byte order mark: it must hold the PIN alone")
	}
	return nil
}
