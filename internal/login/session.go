package login

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	"github.com/orgkeys/orgkeys/internal/durable"
	"github.com/orgkeys/orgkeys/internal/privatefile"
)

// Limits of sessions.
const (
	maxFile     = 256 << 10        // bytes of a session's or a token's file
	margin      = 30 * time.Second // a token that is good for less is refreshed
	refreshTime = 2 * time.Minute  // for waiting for another process's refresh, and for one's own
)

var (
	// ErrNone: nobody is logged in to the server.
	ErrNone = errors.New("nobody is logged in")
	// ErrOver: the session has ended, and only a new login helps.
	ErrOver = errors.New("the login is over")
)

// Session is a login to one server.
type Session struct {
	Server string `json:"server"`
	// TokenFile holds the token, and is read for each request: something else
	// renews it. The rest is empty then.
	TokenFile string    `json:"tokenFile,omitempty"`
	Provider  Provider  `json:"provider,omitzero"`
	Access    string    `json:"accessToken,omitempty"`
	Refresh   string    `json:"refreshToken,omitempty"`
	Expires   time.Time `json:"expires,omitzero"`
}

// good reports whether the session's token can be used now.
func (s Session) good() bool {
	return s.Access != "" && (s.Expires.IsZero() || time.Until(s.Expires) > margin)
}

// Sessions are the sessions in a directory, one for each server: a token never
// goes to another server than the one that it was fetched for.
type Sessions struct{ Dir string }

func (s Sessions) path(server string) string {
	sum := sha256.Sum256([]byte(server))
	return filepath.Join(s.Dir, "session-"+hex.EncodeToString(sum[:8])+".json")
}

// Load returns the session with a server, or ErrNone.
func (s Sessions) Load(server string) (Session, error) {
	path := s.path(server)
	text, err := privatefile.Read(path, maxFile, privatefile.Owner)
	if errors.Is(err, fs.ErrNotExist) {
		return Session{}, ErrNone
	}
	if err != nil {
		return Session{}, err
	}
	defer clear(text)
	var session Session
	if err := json.Unmarshal(text, &session); err != nil || session.Server != server {
		return Session{}, fmt.Errorf("%s is no session with %s: delete it and log in again", path, server)
	}
	return session, nil
}

// Save stores a session in place of an older one with the same server.
func (s Sessions) Save(ctx context.Context, session Session) error {
	unlock, err := s.lock(ctx, session.Server)
	if err != nil {
		return err
	}
	return errors.Join(s.write(session), unlock())
}

func (s Sessions) write(session Session) error {
	text, err := json.Marshal(session)
	if err != nil {
		return err
	}
	defer clear(text)
	return durable.Replace(s.path(session.Server), text)
}

func (s Sessions) lock(ctx context.Context, server string) (unlock func() error, err error) {
	if err := durable.MkdirAll(s.Dir); err != nil {
		return nil, err
	}
	return durable.Lock(ctx, s.path(server)+".lock")
}

// Token returns a token for a server that is good now. It refreshes the session
// if need be, once for all processes that ask at the same time.
func (s Sessions) Token(ctx context.Context, server string) (string, error) {
	session, err := s.Load(server)
	if err != nil {
		return "", err
	}
	if session.TokenFile != "" {
		return ReadTokenFile(session.TokenFile)
	}
	if session.good() {
		return session.Access, nil
	}
	return s.refreshed(ctx, server)
}

func (s Sessions) refreshed(ctx context.Context, server string) (token string, err error) {
	ctx, cancel := context.WithTimeout(ctx, refreshTime)
	defer cancel()
	unlock, err := s.lock(ctx, server)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	session, err := s.Load(server) // another process may have refreshed it meanwhile
	if err != nil || session.good() {
		return session.Access, err
	}
	if session.Refresh == "" {
		return "", fmt.Errorf("%w: its token expired, and the provider gave none to refresh it with", ErrOver)
	}
	// A signal in between would lose the only good token there is.
	fresh, err := session.Provider.refresh(context.WithoutCancel(ctx), session.Refresh)
	if fresh.Refresh != "" {
		fresh.Server = server
		if writeErr := s.write(fresh); writeErr != nil {
			err = errors.Join(err, fmt.Errorf("storing the refreshed session: %w", writeErr))
		}
	}
	if err != nil {
		return "", err
	}
	if !fresh.good() {
		return "", fmt.Errorf("%w: the provider's token is good for less than %s; are the clocks right?", ErrProvider, margin)
	}
	return fresh.Access, nil
}

// Remove ends the session with a server, here and, if it can, at the provider.
// Here it is gone even where the error says that the provider was not reached.
func (s Sessions) Remove(ctx context.Context, server string) error {
	unlock, err := s.lock(ctx, server)
	if err != nil {
		return err
	}
	session, err := s.Load(server)
	if errors.Is(err, ErrNone) {
		return errors.Join(err, unlock())
	}
	// One that cannot be read goes too.
	if err := errors.Join(durable.Remove(s.path(server)), unlock()); err != nil {
		return err
	}
	if err != nil || session.Refresh == "" {
		return nil
	}
	return session.Provider.revoke(ctx, session.Refresh)
}

// ReadTokenFile reads a token from a file that others may not read.
func ReadTokenFile(path string) (string, error) {
	text, err := privatefile.Read(path, maxFile, privatefile.Group)
	if err != nil {
		return "", err
	}
	defer clear(text)
	return ParseToken(text)
}

// ParseToken reads a token from a text with white space around it.
func ParseToken(text []byte) (string, error) {
	token := string(bytes.TrimSpace(text))
	if token == "" || strings.ContainsFunc(token, func(c rune) bool { return c <= ' ' || c >= 0x7f }) {
		return "", errors.New("it holds no token")
	}
	return token, nil
}
