package enroll

import (
	"context"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/panics"
)

// make has the back end make and wrap a key and destroy its copy, and commits what was
// wrapped.
func (s *Service) make(ctx context.Context, pass gate.Pass, d Delivery) (_ Delivery, wrapped []byte, err error) {
	defer s.Busy()()
	attempt, mine, taken := d.Attempt, d.Begun, (*orgkey.Taken[orgkey.SealableKey])(nil)
	if !mine {
		if attempt, mine, taken, err = s.begin(ctx, d.KeyID); err != nil {
			s.giveUp(ctx, d.KeyID, attempt) // it may have begun although the answer was lost
			return d, nil, fmt.Errorf("beginning key %s: %w", d.KeyID, err)
		}
	}
	if mine && taken != nil {
		made, wrapped, used, err := s.fromPool(ctx, pass, d, taken)
		if used || err == nil {
			return made, wrapped, err
		}
		s.Gate.Log.Warn("a key out of the pool could not be used; another one is made", "key", d.KeyID, "pool", taken.ID, "error", err)
		s.giveUp(ctx, d.KeyID, taken.ID)
		attempt = uuid.NewString()
		if mine, err = s.Store.Begin(ctx, d.KeyID, attempt, s.AttemptLife); err != nil {
			s.giveUp(ctx, d.KeyID, attempt)
			return d, nil, fmt.Errorf("beginning key %s: %w", d.KeyID, err)
		}
	}
	if !mine {
		return d, nil, ErrPending
	}
	made, wrapped, stored, err := s.attempt(ctx, pass, d, attempt)
	if err != nil && !stored {
		s.giveUp(ctx, d.KeyID, attempt)
	}
	return made, wrapped, err
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
func (s *Service) fromPool(ctx context.Context, pass gate.Pass, d Delivery, taken *orgkey.Taken[orgkey.SealableKey]) (made Delivery, wrapped []byte, used bool, err error) {
	key, since, err := taken.Open(ctx)
	if err != nil {
		return d, nil, false, err
	}
	w, err := s.wrap(ctx, d, key)
	if err != nil {
		return d, nil, false, err
	}
	made, stored, err := s.store(ctx, pass, d, taken.ID, w, orgkey.AheadDetail(since))
	if err != nil && !stored {
		s.giveUp(ctx, d.KeyID, taken.ID)
	}
	return made, w.key.Value, true, err
}

// attempt also says whether something may have been stored.
func (s *Service) attempt(ctx context.Context, pass gate.Pass, d Delivery, attempt string) (made Delivery, wrapped []byte, stored bool, err error) {
	leave, err := s.Admit()
	if err != nil {
		return d, nil, false, err
	}
	defer leave()
	key, err := s.Keystore.CreateSealed(ctx, attempt)
	if err != nil {
		return d, nil, false, backEnd("making", d, err)
	}
	w, err := s.wrap(ctx, d, key)
	if err != nil {
		return d, nil, false, err
	}
	made, stored, err = s.store(ctx, pass, d, attempt, w, nil)
	return made, w.key.Value, stored, err
}

// wrapped is a key that exists nowhere but wrapped to its recipient, and both its
// halves as they are stored.
type wrapped struct {
	public      orgkey.Public
	key         envelope.SealedKey
	record, own []byte // the public half and the wrapped key, sealed
}

// wrap has the back end wrap a key to d's recipient, and destroy its copy while it seals
// what is to be stored. The copy is destroyed also if something else fails. Only then may
// anything be stored: another replica cannot see what is in this one's session with a token.
func (s *Service) wrap(ctx context.Context, d Delivery, key orgkey.SealableKey) (_ wrapped, err error) {
	w := wrapped{public: key.Public()}
	recipient, err := recipientOf(d)
	if err == nil {
		if w.key, err = key.Seal(ctx, recipient); err != nil {
			err = backEnd("wrapping", d, err)
		}
	}
	// CRASH: the delivery is claimed, and what is in the back end bears the attempt's name.
	sealed := make(chan error, 1)
	if err == nil {
		go func() { sealed <- panics.Caught(s.Gate.Log, func() error { return s.seal(ctx, d, &w) }) }()
	} else {
		sealed <- err
	}
	kept := s.destroy(ctx, d, key)
	// CRASH: the key is lost, and another attempt begins when this one's life is over.
	err = errors.Join(<-sealed, kept) // before w is copied, whose halves seal fills
	return w, err
}

func (s *Service) destroy(ctx context.Context, d Delivery, key orgkey.SealableKey) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupDeadline)
	defer cancel()
	err := key.Destroy(ctx)
	if err == nil {
		return nil
	}
	s.Gate.Log.Warn("the back end may still have its copy of a sealed key, which nobody gets", "key", d.KeyID, "error", err)
	return backEnd("destroying", d, err)
}

// seal seals both halves of w, in one call.
func (s *Service) seal(ctx context.Context, d Delivery, w *wrapped) error {
	der, err := w.public.DER()
	if err != nil {
		return fmt.Errorf("encoding key %s: %w", d.KeyID, err)
	}
	sealed, err := s.Sealer.SealAll(ctx, []orgkey.Unsealed{
		{Binding: orgkey.PublicKeyOf(d.Org, d.KeyID), Plaintext: der}, {Binding: wrappedBinding(d), Plaintext: w.key.Value},
	})
	if err != nil {
		return backEnd("sealing", d, err)
	}
	w.record, w.own = sealed[0], sealed[1]
	return nil
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
func (s *Service) store(ctx context.Context, pass gate.Pass, d Delivery, attempt string, w wrapped, pool map[string]string) (made Delivery, stored bool, err error) {
	d.Attempt, d.Fingerprint = attempt, w.public.Fingerprint()
	d.Wrapped = Wrapped{w.key.Alg, w.own, envelope.Digest(w.key.Value)}
	created := pass.Event(audit.KeyCreated)
	created.Object = d.KeyID
	created.Detail = map[string]string{"fingerprint": d.Fingerprint, "backend": s.Backend, "algorithm": orgkey.Algorithm, "scope": string(d.Scope)}
	d.describe(created.Detail)
	created.Add(pool)
	storing, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupDeadline)
	defer cancel()
	made, err = s.Store.StoreWrapped(storing, d.KeyID, attempt, w.record, d.Wrapped, d.Fingerprint, created, sealedEvent(pass, d))
	if errors.Is(err, orgkey.ErrGone) {
		return d, false, fmt.Errorf("storing key %s: %w", d.KeyID, err)
	}
	if err == nil {
		s.Opener.Remember(d.Org, orgkey.SealedKey{ID: d.KeyID, Sealed: w.record}, w.public)
	}
	return made, true, err
}

// giveUp ends an attempt, so that the next one need not wait for its life.
func (s *Service) giveUp(ctx context.Context, keyID, attempt string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupDeadline)
	defer cancel()
	if err := s.Store.GiveUp(ctx, keyID, attempt); err != nil {
		s.Gate.Log.Warn("a sealed delivery waits until its attempt's life is over", "key", keyID, "error", err)
	}
}

// giveBack ends an administrator's own delivery that came to nothing, and reports whether it
// did so, with the event of that. It is not ended if it may have come to something: whoever is
// making its key has an attempt, and so has a key of which it is not known whether it was stored.
func (s *Service) giveBack(ctx context.Context, pass gate.Pass, d Delivery, reason string) bool {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupDeadline)
	defer cancel()
	refused := pass.Event(audit.KeyRefused)
	refused.Outcome, refused.Reason = audit.Failure, reason
	given, err := s.Store.GiveBackOwn(ctx, d.Org, d.KeyID, refused)
	if err != nil {
		s.Gate.Log.Warn("a sealed delivery that failed keeps its place in the quota until it is asked for again, or its time is over", "key", d.KeyID, "org", d.Org, "error", err)
	}
	return given
}
