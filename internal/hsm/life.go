//go:build cgo

package hsm

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"
	"golang.org/x/sync/singleflight"
)

// life is what belongs to one span between C_Initialize and C_Finalize. The
// anchor session stays open, since closing a token's last session logs out, and
// owns the wrapping key; nothing else uses it but checks.
type life struct {
	born       time.Time
	due        time.Time    // not recycled before; guarded by Token.mu
	made       atomic.Int64 // keys generated
	slot       uint
	anchor     *session
	sealingKey sealingKey
	wrappingAs pkcs11.ObjectHandle // the wrapping key in the token
	wrapping   []byte              // the same key in this process; read under a session's turn only
	generate   *pool
	seal       *pool
	check      singleflight.Group // of Healthy: one check waits for the anchor, however many ask
}

// begin initialises the library, logs in and has everything made that a life
// needs. The first one finds out which mechanisms work, and only then makes the
// sealing key, if it may.
func (t *Token) begin(ctx context.Context) (_ *life, err error) {
	end, err := t.lib.takeTurn(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	l, anchor, err := t.enter()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			// Ends whatever was begun; the error that matters is the first one.
			_ = t.lib.Finalize()
		}
	}()
	if err := t.makeWrappingKey(l, anchor); err != nil {
		return nil, err
	}
	if err := t.findSealingKey(ctx, l, anchor); err != nil {
		return nil, err
	}
	if l.generate, err = t.openPool(l.slot, t.cfg.Generations, t.limits.generate); err != nil {
		return nil, err
	}
	if l.seal, err = t.openPool(l.slot, t.cfg.Sealings, t.limits.answer); err != nil {
		return nil, err
	}
	return l, nil
}

// enter initialises the library and logs in.
func (t *Token) enter() (_ *life, anchor pkcs11.SessionHandle, err error) {
	if err := t.lib.initialize(t.cfg.InitArgs); err != nil && !is(err, pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED) {
		return nil, 0, fmt.Errorf("initialising the module: %w", err)
	}
	defer func() {
		if err != nil {
			_ = t.lib.Finalize() // the error that matters is the first one
		}
	}()
	l := &life{born: time.Now()}
	if l.slot, err = t.cfg.findToken(t.lib); err != nil {
		return nil, 0, err
	}
	if anchor, err = t.openSession(l.slot); err != nil {
		return nil, 0, err
	}
	l.anchor = newSession(anchor)
	return l, anchor, t.logIn(l.slot, anchor)
}

// end drains l and finalises the library. Keys that are held for longer than
// held cease to exist, as session objects do. It reports an error, and may be
// called again, if a call does not return from the library.
func (t *Token) end(l *life, held time.Duration) error {
	patience, cancel := context.WithTimeout(context.Background(), held)
	defer cancel()
	ctx, cancelAll := context.WithTimeout(context.Background(), held+time.Second)
	defer cancelAll()
	// Generations first: they take longest, and sealing goes on meanwhile.
	if err := l.generate.drain(ctx, patience); err != nil {
		return err
	}
	if err := l.seal.drain(ctx, patience); err != nil {
		return err
	}
	if err := l.anchor.retire(ctx); err != nil {
		return err
	}
	clear(l.wrapping)
	// A library that somebody else finalised has ended the life already, and
	// one that fails to finalise is found out by C_Initialize.
	_ = t.lib.Finalize()
	return nil
}

func (t *Token) openSession(slot uint) (pkcs11.SessionHandle, error) {
	h, err := t.lib.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return 0, fmt.Errorf("opening a session: %w", err)
	}
	return h, nil
}

func (t *Token) openPool(slot uint, n int, limit time.Duration) (*pool, error) {
	sessions := make([]*session, n)
	for i := range sessions {
		h, err := t.openSession(slot)
		if err != nil {
			return nil, err
		}
		sessions[i] = newSession(h)
	}
	return newPool(sessions, limit), nil
}

// checkLogin reports whether l's anchor h is open and logged in.
func (t *Token) checkLogin(l *life, h pkcs11.SessionHandle) error {
	info, err := t.lib.GetSessionInfo(h)
	if err != nil {
		return err
	}
	if info.State != pkcs11.CKS_RW_USER_FUNCTIONS {
		return pkcs11.Error(pkcs11.CKR_USER_NOT_LOGGED_IN)
	}
	slot, err := t.lib.GetSlotInfo(l.slot)
	if err != nil {
		return err
	}
	if slot.Flags&pkcs11.CKF_TOKEN_PRESENT == 0 {
		return pkcs11.Error(pkcs11.CKR_TOKEN_NOT_PRESENT)
	}
	return nil
}

// checkUse reports whether l can be used: no call is stuck, and the anchor is
// logged in and opens what was sealed at start. The last finds out too that a
// token's files are gone, which a login outlives.
func (t *Token) checkUse(ctx context.Context, l *life) error {
	if l.generate.stuck()+l.seal.stuck() > 0 {
		return errSlow
	}
	checked := l.check.DoChan("", func() (any, error) {
		return nil, l.anchor.do(func(h pkcs11.SessionHandle) error {
			if err := t.checkLogin(l, h); err != nil {
				return err
			}
			return t.checkProbe(h, l.sealingKey)
		})
	})
	select {
	case result := <-checked:
		return result.Err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// find returns the objects that match, at most max of them.
func find(lib *module, h pkcs11.SessionHandle, max int, template ...*pkcs11.Attribute) ([]pkcs11.ObjectHandle, error) {
	if err := lib.FindObjectsInit(h, template); err != nil {
		return nil, fmt.Errorf("searching the token: %w", err)
	}
	found, _, err := lib.FindObjects(h, max)
	if err := errors.Join(err, lib.FindObjectsFinal(h)); err != nil {
		return nil, fmt.Errorf("searching the token: %w", err)
	}
	return found, nil
}
