//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// errSealingKey: the token's sealing key is not the one that it was, or not
// what it must be. Nothing gets better by trying again.
var errSealingKey = errors.New("the token's sealing key cannot be trusted")

// Seal encrypts plaintext in the token.
func (t *Token) Seal(ctx context.Context, b orgkey.Binding, plaintext []byte) ([]byte, error) {
	sealed, err := t.SealAll(ctx, []orgkey.Unsealed{{Binding: b, Plaintext: plaintext}})
	if err != nil {
		return nil, err
	}
	return sealed[0], nil
}

// SealAll encrypts values in the token, on one session.
func (t *Token) SealAll(ctx context.Context, values []orgkey.Unsealed) ([][]byte, error) {
	var sealed [][]byte
	err := t.seal(ctx, func(l *life, h pkcs11.SessionHandle) error {
		all := make([][]byte, len(values))
		for i, v := range values {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			var err error
			if all[i], err = l.sealingKey.encrypt(t.lib, h, v.Binding.Context(), v.Plaintext); err != nil {
				return err
			}
		}
		sealed = all
		return nil
	}, func() {})
	if err != nil {
		return nil, sealFault("sealing", err)
	}
	return sealed, nil
}

// Open decrypts items in the token, on one session.
func (t *Token) Open(ctx context.Context, items []orgkey.Sealed) ([][]byte, error) {
	var opened values
	if err := t.open(ctx, items, &opened); err != nil {
		return nil, sealFault("opening", err)
	}
	return opened, nil
}

// values are what was opened.
type values [][]byte

func (v values) clear() {
	for _, value := range v {
		clear(value)
	}
}

// open sets opened, unless it reports an error: then it clears what it opened, also
// what the token opens only afterwards.
func (t *Token) open(ctx context.Context, items []orgkey.Sealed, opened *values) error {
	return t.seal(ctx, func(l *life, h pkcs11.SessionHandle) error {
		*opened = make(values, 0, len(items))
		for i, item := range items {
			value, err := t.openOne(ctx, l, h, item)
			if err != nil {
				opened.clear()
				return fmt.Errorf("item %d: %w", i, err)
			}
			*opened = append(*opened, value)
		}
		return nil
	}, func() { opened.clear() })
}

func (t *Token) openOne(ctx context.Context, l *life, h pkcs11.SessionHandle, item orgkey.Sealed) ([]byte, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	value, err := l.sealingKey.decrypt(t.lib, h, item.Binding.Context(), item.Ciphertext)
	if err == nil || errors.Is(err, orgkey.ErrSealBroken) || !is(err, pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED) {
		return value, err
	}
	// SoftHSM says CKR_GENERAL_ERROR of a wrong tag, as of a token that is
	// gone. If the session opens what is known to be good, it was the tag.
	if probed := t.checkProbe(h, l.sealingKey); probed != nil {
		return nil, err
	}
	return nil, fmt.Errorf("%w: %v", orgkey.ErrSealBroken, err)
}

// seal runs f on a sealing session, and once more in a new life if the library
// turns out to have lost the first one. f leaves nothing behind if it fails; late is
// called afterwards if ctx ended while f ran.
func (t *Token) seal(ctx context.Context, f func(*life, pkcs11.SessionHandle) error, late func()) error {
	ctx, cancel := context.WithTimeoutCause(ctx, t.limits.answer, errSlow)
	defer cancel()
	for attempt := 0; ; attempt++ {
		l, s, err := t.acquire(ctx, func(l *life) *pool { return l.seal })
		if err != nil {
			return err
		}
		running, err := s.call(ctx,
			func(h pkcs11.SessionHandle) error { return f(l, h) },
			func(error) { late(); l.seal.put(s) })
		if !running {
			l.seal.put(s)
		}
		if err == nil || !lost(err) {
			return err
		}
		t.renew(l, err)
		if attempt > 0 {
			return err
		}
	}
}

// sealFault marks whatever the module reports as orgkey.ErrUnavailable.
func sealFault(doing string, err error) error {
	var rv pkcs11.Error
	if errors.As(err, &rv) {
		return fmt.Errorf("%s: %w: %w", doing, orgkey.ErrUnavailable, err)
	}
	return fault(doing, err)
}

// checkSameKey reports errSealingKey if key works but does not open what was
// sealed at start.
func (t *Token) checkSameKey(h pkcs11.SessionHandle, key sealingKey) error {
	err := t.checkProbe(h, key)
	if err == nil {
		return nil
	}
	fresh, works := key.encrypt(t.lib, h, probeContext(), probeText())
	if works == nil {
		_, works = key.decrypt(t.lib, h, probeContext(), fresh)
	}
	if works != nil {
		return err
	}
	return fmt.Errorf("%w: it is another one than at start: %w", errSealingKey, err)
}

// checkProbe opens what was sealed at start.
func (t *Token) checkProbe(h pkcs11.SessionHandle, key sealingKey) error {
	text, err := key.decrypt(t.lib, h, probeContext(), t.probe)
	if err == nil && !bytes.Equal(text, probeText()) {
		err = orgkey.ErrSealBroken
	}
	return err
}

// No binding has these bytes: they hold no NUL.
func probeContext() []byte { return []byte("orgkeys/v1/probe") }

func probeText() []byte { return []byte("known to be good") }
