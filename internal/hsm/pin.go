//go:build cgo

package hsm

import (
	"bytes"
	"errors"
	"fmt"
	"unicode"

	"github.com/orgkeys/orgkeys/internal/privatefile"
)

const maxPIN = 255 // bytes; SoftHSM's limit, and more than other tokens take

// readPIN reads a PIN file. A line's end after the PIN is not part of it.
func readPIN(path string) ([]byte, error) {
	raw, err := privatefile.Read(path, maxPIN+2, privatefile.Owner)
	if err != nil {
		return nil, fmt.Errorf("reading the PIN file: %w", err)
	}
	pin := bytes.TrimRight(raw, "\r\n")
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
