package enroll

import (
	"context"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// made is what a call made itself.
type made struct {
	attempt string // whose copy in the back end this call destroyed
	wrapped []byte // the key, as it goes out
}

// make has the back end make and wrap a key and destroy its copy, and commits what was
// wrapped.
func (s *Service) make(ctx context.Context, pass gate.Pass, d Delivery) (made, error) {
	defer s.Busy()()
	attempt, mine, taken, err := s.begin(ctx, d.KeyID)
	if err != nil {
		return made{}, fmt.Errorf("beginning key %s: %w", d.KeyID, err)
	}
	if mine && taken != nil {
		m, used, err := s.fromPool(ctx, pass, d, taken)
		if used || err == nil {
			return m, err
		}
		s.Gate.Log.Warn("a key out of the pool could not be used; another one is made", "key", d.KeyID, "pool", taken.ID, "error", err)
		s.giveUp(ctx, d.KeyID, taken.ID)
		attempt = uuid.NewString()
		if mine, err = s.Store.Begin(ctx, d.KeyID, attempt, s.AttemptLife); err != nil {
			return made{}, fmt.Errorf("beginning key %s: %w", d.KeyID, err)
		}
	}
	if !mine {
		return made{}, ErrPending
	}
	wrapped, stored, err := s.attempt(ctx, pass, d, attempt)
	if err != nil && !stored {
		s.giveUp(ctx, d.KeyID, attempt)
	}
	if err != nil {
		return made{}, err
	}
	return made{attempt, wrapped}, nil
}

// begin begins an attempt, with a key out of the pool if there is one: the attempt's
// name is the key's then.
func (s *Service) begin(ctx context.Context, keyID string) (attempt string, mine bool, taken *orgkey.Taken[orgkey.SealableKey], err error) {
	attempt = uuid.NewString()
	if s.Pool == nil {
		mine, err = s.Store.Begin(ctx, keyID, attempt, s.AttemptLife)
		return attempt, mine, nil, err
	}
	mine, taken, err = s.Pool.Begin(ctx, keyID, attempt, s.AttemptLife)
	if taken != nil {
		attempt = taken.ID
	}
	return attempt, mine, taken, err
}

// fromPool is attempt with a key out of the pool: it is the delivery's only if this
// deletion removed it. used says that nothing else may be tried for this attempt.
func (s *Service) fromPool(ctx context.Context, pass gate.Pass, d Delivery, taken *orgkey.Taken[orgkey.SealableKey]) (_ made, used bool, err error) {
	key, since, err := taken.Open(ctx)
	if err != nil {
		return made{}, false, err
	}
	wrapped, err := s.wrap(ctx, d, key)
	if err != nil {
		return made{}, false, err
	}
	stored, err := s.store(ctx, pass, d, taken.ID, key.Public(), wrapped, orgkey.AheadDetail(since))
	if err != nil && !stored {
		s.giveUp(ctx, d.KeyID, taken.ID)
	}
	return made{taken.ID, wrapped.Value}, true, err
}

func (s *Service) attempt(ctx context.Context, pass gate.Pass, d Delivery, attempt string) (value []byte, stored bool, err error) {
	leave, err := s.Admit()
	if err != nil {
		return nil, false, err
	}
	defer leave()
	key, err := s.Keystore.CreateSealed(ctx, attempt)
	if err != nil {
		return nil, false, backEnd("making", d, err)
	}
	wrapped, err := s.wrap(ctx, d, key)
	if err != nil {
		return nil, false, err
	}
	stored, err = s.store(ctx, pass, d, attempt, key.Public(), wrapped, nil)
	return wrapped.Value, stored, err
}

// wrap has the back end wrap a key to d's recipient and destroy its copy, which also
// happens if the wrapping failed. Only then may anything be stored: another replica
// cannot see what is in this one's session with a token.
func (s *Service) wrap(ctx context.Context, d Delivery, key orgkey.SealableKey) (wrapped envelope.SealedKey, err error) {
	recipient, err := recipientOf(d)
	if err == nil {
		if wrapped, err = key.Seal(ctx, recipient); err != nil {
			err = backEnd("wrapping", d, err)
		}
	}
	ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupDeadline)
	defer cancel()
	// CRASH: the delivery is claimed, and what is in the back end bears the attempt's name.
	if kept := key.Destroy(ending); kept != nil {
		s.Gate.Log.Warn("the back end may still have its copy of a sealed key, which nobody gets", "key", d.KeyID, "error", kept)
		err = errors.Join(err, backEnd("destroying", d, kept))
	}
	// CRASH: the key is lost, and another attempt begins when this one's life is over.
	return wrapped, err
}

func backEnd(doing string, d Delivery, err error) error {
	if errors.Is(err, orgkey.ErrUnavailable) || errors.Is(err, orgkey.ErrSealedUnavailable) {
		return fmt.Errorf("%s key %s: %w", doing, d.KeyID, err)
	}
	return fmt.Errorf("%s key %s: %w: %w", doing, d.KeyID, orgkey.ErrBackend, err)
}

func recipientOf(d Delivery) (*rsa.PublicKey, error) {
	parsed, err := x509.ParsePKIXPublicKey(d.DER)
	if err != nil {
		return nil, fmt.Errorf("reading the recipient of key %s: %w", d.KeyID, err)
	}
	public, ok := parsed.(*rsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("reading the recipient of key %s: it is not an RSA key", d.KeyID)
	}
	// Whoever can write to the database must not choose who can read the key.
	if id, err := envelope.Recipient(public); err != nil || id != d.Recipient {
		return nil, fmt.Errorf("the recipient of key %s is not the one that claimed it", d.KeyID)
	}
	return public, nil
}

// store commits a wrapped key and its record. stored also says that they may
// have been committed.
func (s *Service) store(ctx context.Context, pass gate.Pass, d Delivery, attempt string, public orgkey.Public, wrapped envelope.SealedKey, pool map[string]string) (stored bool, err error) {
	der, err := public.DER()
	if err != nil {
		return false, fmt.Errorf("encoding key %s: %w", d.KeyID, err)
	}
	var record, value []byte
	both, sealing := errgroup.WithContext(ctx)
	both.Go(func() (err error) {
		record, err = s.Sealer.Seal(sealing, orgkey.PublicKeyOf(d.Org, d.KeyID), der)
		return err
	})
	both.Go(func() (err error) { value, err = s.Sealer.Seal(sealing, wrappedBinding(d), wrapped.Value); return err })
	if err := both.Wait(); err != nil {
		return false, backEnd("sealing", d, err)
	}
	fingerprint := public.Fingerprint()
	created := pass.Event(audit.KeyCreated)
	created.Object = d.KeyID
	created.Detail = map[string]string{"fingerprint": fingerprint, "backend": s.Backend, "algorithm": orgkey.Algorithm, "scope": string(d.Scope)}
	d.describe(created.Detail)
	created.Add(pool)
	storing, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupDeadline)
	defer cancel()
	err = s.Store.StoreWrapped(storing, d.KeyID, attempt, record,
		Wrapped{wrapped.Alg, value, envelope.Digest(wrapped.Value)}, fingerprint, created)
	if errors.Is(err, orgkey.ErrGone) {
		return false, fmt.Errorf("storing key %s: %w", d.KeyID, err)
	}
	if err == nil {
		s.Opener.Remember(d.Org, orgkey.SealedKey{ID: d.KeyID, Sealed: record}, public)
	}
	return true, err
}

// giveUp ends an attempt, so that the next one need not wait for its life.
func (s *Service) giveUp(ctx context.Context, keyID, attempt string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupDeadline)
	defer cancel()
	if err := s.Store.GiveUp(ctx, keyID, attempt); err != nil {
		s.Gate.Log.Warn("a sealed delivery waits until its attempt's life is over", "key", keyID, "error", err)
	}
}
