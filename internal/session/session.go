// Package session keeps a person signed in to the console. The browser has a
// cookie with a secret, and the database a row with the person's access token,
// sealed under a key that only the secret gives: neither who reads the database
// nor who restores an old one can act for anybody, and every replica serves every
// session. What a session may do is what its token may do, and it ends with the
// token, at the latest.
package session

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"time"
)

// Limits of sessions.
const (
	MaxLife   = 8 * time.Hour // however long the token lasts
	PerPerson = 16            // the oldest of one person ends when there are more
)

// secretSize is that of a cookie's secret, in bytes.
const secretSize = 32

// Secret is what a browser's cookie holds.
type Secret [secretSize]byte

// NewSecret returns a fresh secret. Every sign-in has one: a value that a browser
// brought along is never taken over.
func NewSecret() (s Secret) {
	rand.Read(s[:]) // never fails, crypto/rand
	return s
}

// ErrForm: the text is no secret.
var ErrForm = errors.New("not a session's cookie")

// ParseSecret reads what Text wrote.
func ParseSecret(text string) (s Secret, err error) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(text)
	if err != nil || len(b) != secretSize || len(text) != base64.RawURLEncoding.EncodedLen(secretSize) { // line ends are passed over
		return s, ErrForm
	}
	return Secret(b), nil
}

// Text is the secret as a cookie holds it.
func (s Secret) Text() string { return base64.RawURLEncoding.EncodeToString(s[:]) }

// Derive returns 32 bytes for one purpose (HKDF, RFC 5869), from which neither the
// secret nor those of another purpose follow.
func (s Secret) Derive(purpose string) []byte {
	key, err := hkdf.Key(sha256.New, s[:], nil, "orgkeys console "+purpose, 32)
	if err != nil {
		panic(err) // only for a length that SHA-256 does not give
	}
	return key
}

// ID names the session in the database.
func (s Secret) ID() string { return hex.EncodeToString(s.Derive("session")) }

// Stored is a session as the database has it.
type Stored struct {
	ID      string
	Holder  string // of whom PerPerson are kept; see Holder
	Sealed  []byte
	Expires time.Time
}

// Store keeps sessions. Its implementation is sqlstore.DB.
type Store interface {
	// KeepSession stores s, and ends the oldest of the same holder while there are
	// more than most.
	KeepSession(ctx context.Context, s Stored, most int) error
	// Session returns one that has not expired, or false.
	Session(ctx context.Context, id string) (Stored, bool, error)
	// DropSession ends one; that there is none is no error.
	DropSession(ctx context.Context, id string) error
}

// Holder names a person of an organization, without telling who it is.
func Holder(org, subject string) string {
	sum := sha256.Sum256([]byte(org + "\n" + subject))
	return hex.EncodeToString(sum[:])
}

// Seal returns the session of a token.
func (s Secret) Seal(token, holder string, expires time.Time) (Stored, error) {
	aead, err := s.aead()
	if err != nil {
		return Stored{}, err
	}
	return Stored{s.ID(), holder, aead.Seal(nil, nil, []byte(token), []byte(s.ID())), expires}, nil
}

// Open returns the token of a stored session.
func (s Secret) Open(stored Stored) (token string, err error) {
	aead, err := s.aead()
	if err != nil {
		return "", err
	}
	text, err := aead.Open(nil, nil, stored.Sealed, []byte(s.ID()))
	if err != nil {
		return "", fmt.Errorf("opening a session: %w", err)
	}
	return string(text), nil
}

func (s Secret) aead() (cipher.AEAD, error) {
	block, err := aes.NewCipher(s.Derive("token"))
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}
