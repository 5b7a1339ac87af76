package vault

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// errNotOwn: this process's deletion did not remove the key, or it is not known
// whether it did. Somebody else may have the key.
var errNotOwn = errors.New("another deletion than this one may have removed the key")

// aheadMount is where keys made ahead for a use live.
func aheadMount(use orgkey.Use) string {
	if use == orgkey.UseSealed {
		return sealedMount
	}
	return keysMount
}

// CreateAhead makes a key that stays in Transit until it is taken or discarded. The
// creation is sent once; if its outcome is unknown, the key is abandoned.
func (k *Keystore) CreateAhead(ctx context.Context, use orgkey.Use, name string) (orgkey.Public, error) {
	if !nameForm.MatchString(name) {
		return orgkey.Public{}, fmt.Errorf("creating a key ahead: %q is not a UUID", name)
	}
	public, err := k.c.create(once(correlated(ctx, name)), aheadMount(use)+"/keys/"+name)
	if err != nil {
		return orgkey.Public{}, fmt.Errorf("creating a key ahead: %w", err)
	}
	return public, nil
}

// TakenPlain is a key made ahead for orgkey.UsePlain. Its Destroy succeeds only if
// its own deletion removed the key: of several deletions at once Transit answers
// one with 204. A key whose Destroy failed must not be released.
func (k *Keystore) TakenPlain(name string, public orgkey.Public) orgkey.BackendKey {
	return &key{c: k.c, name: name, public: public, ahead: true}
}

// TakenSealed is likewise a key made ahead for orgkey.UseSealed.
func (k *Keystore) TakenSealed(name string, public orgkey.Public) orgkey.SealableKey {
	return &sealableKey{c: k.c, name: name, public: public, ahead: true}
}

// Discard removes a key made ahead and confirms that it is gone. What is not there
// is no error.
func (k *Keystore) Discard(ctx context.Context, use orgkey.Use, name string) error {
	if !nameForm.MatchString(name) {
		return fmt.Errorf("discarding a key: %q is not a UUID", name)
	}
	ctx = correlated(ctx, name)
	if err := k.c.removeAllowing(ctx, aheadMount(use)+"/keys/"+name); err != nil {
		return fmt.Errorf("discarding a key: %w", err)
	}
	return nil
}

// Credentials identifies what the client is logged in with, without revealing it. It
// is empty while the client is not logged in.
func (k *Keystore) Credentials() string {
	if s := k.c.current.Load(); s != nil {
		return s.mark
	}
	return ""
}

// credentialMark is of credentials of at least 122 random bits, so that nobody can
// find them from it.
func credentialMark(parts ...string) string {
	sum := sha256.Sum256([]byte("orgkeys credentials\x00" + strings.Join(parts, "\x00")))
	return hex.EncodeToString(sum[:8])
}

// Newest returns a function that reports whether a ciphertext is of the sealing key's
// newest version.
func (s *Sealer) Newest(ctx context.Context) (func([]byte) bool, error) {
	key, err := s.Key(ctx)
	if err != nil {
		return nil, err
	}
	return func(ciphertext []byte) bool {
		version, err := parseCiphertext(ciphertext)
		return err == nil && version == key.Latest
	}, nil
}
