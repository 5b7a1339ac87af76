package node

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/shares"
)

// margin is how much longer than the window a use of a signature is kept. The
// store's clock decides when that is over, and refuses a use that comes later; a
// replica whose clock is behind that one by less than the margin notices nothing.
const margin = 60 * time.Second

// Config is what a Service is made of. Every field but Now is required.
type Config struct {
	Store  Store
	Sealer orgkey.Sealer
	Opener *orgkey.Opener // with the same Sealer
	Gate   gate.Gate

	Window        time.Duration    // how far a timestamp may be from the present, either way
	AuditDeadline time.Duration    // how long secrets wait for the audit sinks
	Now           func() time.Time // the clock; time.Now if nil
}

// Service is the use cases of bridge nodes. Each leaves an audit event if
// the signature was good, whatever the outcome.
type Service struct {
	gate          gate.Gate
	store         Store
	sealer        orgkey.Sealer
	window        time.Duration
	auditDeadline time.Duration
	now           func() time.Time

	verifier  *verifier
	seen      *seen
	envelopes *envelopes
	sizes     *lru.Cache[org.ID, int64] // of organizations' sealed secrets, as they were last
	memory    *shares.Amount[org.ID]    // of answers to Secrets, in bytes
}

// New returns a Service, or an error that says what is wrong with c.
func New(c Config) (*Service, error) {
	if c.Window <= 0 || c.AuditDeadline <= 0 {
		return nil, fmt.Errorf("timestamp window %s, audit deadline %s: out of range", c.Window, c.AuditDeadline)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	v, err := newVerifier(c.Store, c.Opener, c.Now)
	if err != nil {
		return nil, err
	}
	kept, err := newEnvelopes()
	if err != nil {
		return nil, err
	}
	sizes, err := lru.New[org.ID, int64](organizationsKept)
	if err != nil {
		return nil, err
	}
	return &Service{
		envelopes: kept, sizes: sizes,
		gate: c.Gate, store: c.Store, sealer: c.Sealer, window: c.Window, auditDeadline: c.AuditDeadline, now: c.Now,
		verifier: v, seen: newSeen(), memory: shares.NewAmount[org.ID](answersMemory),
	}, nil
}

// Enter takes a place among the verifications under way, for another use case
// whose callers prove who they are. leave gives it back and says whether the
// caller did; it returns ErrTooManyFailures for one whose address failed too often.
func (s *Service) Enter(ctx context.Context, address string) (leave func(known bool) error, err error) {
	out, err := s.verifier.lanes.enter(ctx, address)
	if err != nil {
		return nil, err
	}
	return func(known bool) error {
		if err := out(known); errors.Is(err, ErrTooManyFailures) {
			return err
		}
		return nil
	}, nil
}

// signed is a request whose signature is good and that the policy lets through.
type signed struct {
	request
	proof
	pass gate.Pass
}

// admit parses and verifies a body, and asks the policy.
func (s *Service) admit(ctx context.Context, from Origin, e endpoint, action authz.Action, body []byte) (signed, error) {
	r, err := parse(e, body)
	if err != nil {
		return signed{}, err
	}
	if age := s.now().Sub(r.time); age > s.window || age < -s.window {
		return signed{}, ErrStale
	}
	p, err := s.verifier.verify(ctx, from.Address, r)
	if err != nil {
		return signed{}, err
	}
	call := gate.Call{
		Caller:  authz.Caller{Kind: authz.Node, Subject: p.Key, Org: r.org},
		Request: from.Request, Address: from.Address,
	}
	pass, err := s.gate.Decide(ctx, call, action, r.org, "")
	pass.Detail = map[string]string{"ip": r.addr.String()}
	return signed{r, p, pass}, err
}

func (s *Service) use(r signed) Use {
	stamp := r.presentable(r.line)
	return Use{
		Org: r.org, Signer: r.Signer, Message: sha256.Sum256([]byte(r.line)), Request: r.digest(),
		Stamp: stamp, Until: stamp.Add(s.window + margin),
	}
}

// event is about the node that r claims to be.
func (r signed) event(t audit.Type, id string, c Change) audit.Event {
	e := r.pass.Event(t)
	e.Object, e.Reason = id, string(c)
	return e
}

// Register makes the node that the body describes one of its organization's,
// or brings its record up to date.
func (s *Service) Register(ctx context.Context, from Origin, body []byte) error {
	return s.acting(ctx, from, register, authz.RegisterNode, body, func(r signed) error {
		n := r.node
		n.ID = audit.NewID()
		ctx, cancel := gate.Outlive(ctx)
		defer cancel()
		return s.concluded(ctx, r, s.store.Register(ctx, s.use(r), n, func(id string, c Change) audit.Event {
			return r.event(audit.NodeRegistered, id, c)
		}))
	})
}

// Unregister deletes the node that the body names.
func (s *Service) Unregister(ctx context.Context, from Origin, body []byte) error {
	return s.acting(ctx, from, unregister, authz.UnregisterNode, body, func(r signed) error {
		ctx, cancel := gate.Outlive(ctx)
		defer cancel()
		return s.concluded(ctx, r, s.store.Unregister(ctx, s.use(r), r.addr, func(id string, c Change) audit.Event {
			return r.event(audit.NodeUnregistered, id, c)
		}))
	})
}

// acting has act do what a request asks for, if its signature is good and the policy lets
// it through. If the key is gone by then it is verified once more by what is stored:
// the key that verified may have been remembered, or sealed anew.
func (s *Service) acting(ctx context.Context, from Origin, e endpoint, action authz.Action, body []byte, act func(signed) error) error {
	for again := false; ; again = true {
		r, err := s.admit(ctx, from, e, action, body)
		if err != nil {
			return err
		}
		if err := act(r); !errors.Is(err, ErrKeyGone) {
			return err
		}
		s.verifier.forget(r.org)
		if again {
			return ErrSignature
		}
	}
}

// concluded notes the use of the key, or records that an authenticated
// request came to nothing.
func (s *Service) concluded(ctx context.Context, r signed, err error) error {
	switch {
	case err == nil:
		s.seen.key(r.Key, s.now())
		return nil
	case errors.Is(err, ErrKeyGone), errors.Is(err, ErrLarger): // it is tried once more; no event is about this time
		return err
	case errors.Is(err, ErrStale):
		return s.gate.Failed(ctx, r.pass, audit.RequestFailed, "stale", err)
	case errors.Is(err, ErrReused):
		return s.gate.Failed(ctx, r.pass, audit.RequestFailed, "signature_reused", err)
	case errors.Is(err, ErrAddressInUse), errors.Is(err, ErrAddressNotAllowed):
		return s.gate.Failed(ctx, r.pass, audit.RequestFailed, "address_refused", err)
	case errors.Is(err, ErrNodeNotFound):
		return s.gate.Failed(ctx, r.pass, audit.RequestFailed, "not_found", err)
	default:
		return s.gate.Failed(ctx, r.pass, audit.RequestFailed, gate.ReasonFor(ctx, "unavailable"), err)
	}
}
