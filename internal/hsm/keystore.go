//go:build cgo

package hsm

import (
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"math/big"
	"sync"

	"github.com/miekg/pkcs11"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// pair is an RSA key pair in the token.
type pair struct {
	name    string
	public  pkcs11.ObjectHandle
	private pkcs11.ObjectHandle
	key     orgkey.Public
	gone    bool // the handles mean nothing any more; guarded by the session's turn
}

// generatePair has the token make a key pair that lives no longer than h. A
// pair whose public half cannot be read is destroyed again.
func generatePair(lib *module, h pkcs11.SessionHandle, name string) (*pair, error) {
	public, private, err := lib.GenerateKeyPair(h,
		[]*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, nil)},
		[]*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, name),
			pkcs11.NewAttribute(pkcs11.CKA_ID, name),
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
			pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false),
			pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true),
			pkcs11.NewAttribute(pkcs11.CKA_MODULUS_BITS, orgkey.Bits),
			pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}),
		},
		[]*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, name),
			pkcs11.NewAttribute(pkcs11.CKA_ID, name),
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
			pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
			pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
			pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true),
			pkcs11.NewAttribute(pkcs11.CKA_SIGN, true),
		})
	if err != nil {
		return nil, err
	}
	p := &pair{name: name, public: public, private: private}
	if p.key, err = readPublic(lib, h, public); err != nil {
		return nil, errors.Join(err, p.destroy(lib, h))
	}
	return p, nil
}

func readPublic(lib *module, h pkcs11.SessionHandle, public pkcs11.ObjectHandle) (orgkey.Public, error) {
	attributes, err := lib.GetAttributeValue(h, public, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_MODULUS, nil),
		pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, nil),
	})
	if err != nil {
		return orgkey.Public{}, fmt.Errorf("reading the public key: %w", err)
	}
	n := new(big.Int).SetBytes(attributes[0].Value)
	e := new(big.Int).SetBytes(attributes[1].Value)
	if n.BitLen() != orgkey.Bits || e.Cmp(big.NewInt(65537)) != 0 {
		return orgkey.Public{}, fmt.Errorf("the token made a key of %d bits with exponent %v", n.BitLen(), e)
	}
	return orgkey.NewPublic(&rsa.PublicKey{N: n, E: 65537}), nil
}

// destroy removes both objects and confirms that nothing has p's name any more.
func (p *pair) destroy(lib *module, h pkcs11.SessionHandle) error {
	p.gone = true
	for _, object := range []pkcs11.ObjectHandle{p.private, p.public} {
		if err := lib.DestroyObject(h, object); err != nil && !is(err, pkcs11.CKR_OBJECT_HANDLE_INVALID) {
			return fmt.Errorf("destroying the key: %w", err)
		}
	}
	return checkAbsent(lib, h, p.name)
}

// errDestroyed: the key was to be exported after its destruction began.
var errDestroyed = errors.New("the key is destroyed")

// errPresent: what was destroyed is still there.
var errPresent = errors.New("the key is still in the token")

func checkAbsent(lib *module, h pkcs11.SessionHandle, name string) error {
	found, err := find(lib, h, 1, pkcs11.NewAttribute(pkcs11.CKA_ID, name))
	if err != nil {
		return err
	}
	if len(found) > 0 {
		return errPresent
	}
	return nil
}

// key is a generated key. It keeps its session, and thereby its objects, until
// it is destroyed.
type key struct {
	token *Token
	life  *life
	pair  *pair

	ahead bool          // made ahead: it holds no session, and its objects are used through others
	turn  chan struct{} // of a key made ahead: held by the call under way

	mu        sync.Mutex
	session   *session // nil: given back
	destroyed bool     // confirmed
}

// Create has the token generate a key pair of session objects.
func (t *Token) Create(ctx context.Context, name string) (orgkey.BackendKey, error) {
	return t.create(ctx, name)
}

func (t *Token) create(ctx context.Context, name string) (*key, error) {
	for attempt := 0; ; attempt++ {
		t.recycle(ctx)
		l, s, err := t.acquire(ctx, func(l *life) *pool { return l.generate })
		if err != nil {
			return nil, fault("waiting to generate a key", err)
		}
		p, err := t.generate(ctx, l, s, name)
		if err == nil {
			return &key{token: t, life: l, pair: p, session: s}, nil
		}
		if !lost(err) {
			return nil, fmt.Errorf("generating a key: %w", err)
		}
		t.renew(l, err)
		if attempt > 0 {
			return nil, fault("generating a key", err)
		}
	}
}

// generate keeps s if it succeeds and gives it back if not. If ctx ends before
// the pair is there, the pair is destroyed as soon as it is.
func (t *Token) generate(ctx context.Context, l *life, s *session, name string) (*pair, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, t.limits.generate, errSlow)
	defer cancel()
	var p *pair
	running, err := s.call(ctx, func(h pkcs11.SessionHandle) (err error) {
		// The wrapping key dies with the anchor; better to know now than
		// when the pair has been made.
		if err := l.anchor.do(func(h pkcs11.SessionHandle) error { return t.checkLogin(l, h) }); err != nil {
			return err
		}
		if p, err = generatePair(t.lib, h, name); err == nil {
			l.made.Add(1)
		}
		return err
	}, func(err error) {
		if err == nil {
			err = s.do(func(h pkcs11.SessionHandle) error { return p.destroy(t.lib, h) })
		}
		l.generate.put(s)
		if err != nil {
			t.renew(l, err)
		}
	})
	if running {
		return nil, err
	}
	if err != nil {
		l.generate.put(s)
		return nil, err
	}
	return p, nil
}

func (k *key) Public() orgkey.Public { return k.pair.key }

// Export wraps the key in the token and unwraps it here.
func (k *key) Export(ctx context.Context) ([]byte, error) {
	var der []byte
	err := k.use(ctx, func(h pkcs11.SessionHandle) (err error) {
		der, err = k.token.courier.export(k.token.lib, h, k.life.wrappingAs, k.life.wrapping, k.pair.private, k.pair.key)
		return err
	}, func() { clear(der) })
	if err != nil {
		return nil, fault("exporting the key", err)
	}
	return der, nil
}

// use runs f in the key's session, and late afterwards if ctx ended meanwhile.
// It is not done again in a new life: the key has not outlived the old one.
func (k *key) use(ctx context.Context, f func(pkcs11.SessionHandle) error, late func()) error {
	if k.ahead {
		return k.useAhead(ctx, f, late)
	}
	k.mu.Lock()
	s, t, l := k.session, k.token, k.life
	k.mu.Unlock()
	if s == nil {
		return errDestroyed
	}
	ctx, cancel := context.WithTimeoutCause(ctx, t.limits.answer, errSlow)
	defer cancel()
	_, err := s.call(ctx, func(h pkcs11.SessionHandle) error {
		if k.pair.gone {
			return errDestroyed
		}
		return f(h)
	}, func(error) { late() })
	if err != nil && lost(err) {
		t.renew(l, err)
	}
	return err
}

// Destroy goes on when ctx has ended, for a time of its own. An object that the
// token does not destroy ends with the life it was made in.
func (k *key) Destroy(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), k.token.limits.answer, errSlow)
	defer cancel()
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.destroyed {
		return nil
	}
	if k.ahead {
		if err := k.useAhead(ctx, func(h pkcs11.SessionHandle) error { return k.pair.destroy(k.token.lib, h) }, func() {}); err == nil {
			k.destroyed = true
			return nil
		}
	}
	if s := k.session; s != nil {
		k.session = nil
		if err := k.destroyIn(ctx, s); err == nil {
			k.destroyed = true
			return nil
		}
	}
	if err := k.token.checkAbsent(ctx, k.pair.name); err != nil {
		if k.ahead && errors.Is(err, errPresent) { // no session of its own whose end would end it
			k.token.renew(k.life, err)
		}
		return fault("confirming that the key is destroyed", err)
	}
	k.destroyed = true
	return nil
}

// destroyIn destroys the objects and gives s back, or begins to end its life.
func (k *key) destroyIn(ctx context.Context, s *session) error {
	finish := func(err error) {
		k.life.generate.put(s)
		if err != nil {
			k.token.renew(k.life, err)
		}
	}
	running, err := s.call(ctx, func(h pkcs11.SessionHandle) error {
		return k.pair.destroy(k.token.lib, h)
	}, finish)
	if !running {
		finish(err)
	}
	return err
}

func (t *Token) checkAbsent(ctx context.Context, name string) error {
	return t.seal(ctx, func(_ *life, h pkcs11.SessionHandle) error { return checkAbsent(t.lib, h, name) }, func() {})
}
