//go:build cgo

package hsm

import (
	"context"

	"github.com/miekg/pkcs11"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// CreateAhead has the token generate a key pair of session objects that wait in the
// pool. The session in which they were made stays open, as all do until the life ends,
// and makes further keys.
func (t *Token) CreateAhead(ctx context.Context, name string) (orgkey.HeldKey, error) {
	k, err := t.create(ctx, name)
	if err != nil {
		return nil, err
	}
	k.ahead, k.turn = true, make(chan struct{}, 1)
	k.life.generate.put(k.session)
	k.session = nil
	return k, nil
}

// CanSeal implements orgkey.HeldKey.
func (k *key) CanSeal() bool { return k.token.checkSealed() == nil }

// Alive reports whether the life in which the key was made has not ended.
func (k *key) Alive() bool {
	k.token.mu.Lock()
	defer k.token.mu.Unlock()
	return k.token.life == k.life
}

// useAhead is use for a key that waited in the pool. It takes a sealing session, which
// no generation occupies. Who waits for a call under way, for what one session destroys
// another must not wrap, waits without one.
func (k *key) useAhead(ctx context.Context, f func(pkcs11.SessionHandle) error, late func()) error {
	l := k.life
	ctx, cancel := context.WithTimeoutCause(ctx, k.token.limits.answer, errSlow)
	defer cancel()
	select {
	case k.turn <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	s, err := l.seal.take(ctx)
	if err != nil {
		<-k.turn
		return err
	}
	end := func() { l.seal.put(s); <-k.turn }
	running, err := s.call(ctx, func(h pkcs11.SessionHandle) error {
		if k.pair.gone {
			return errDestroyed
		}
		return f(h)
	}, func(error) { late(); end() })
	if !running {
		end()
	}
	if err != nil && lost(err) {
		k.token.renew(l, err)
	}
	return err
}
