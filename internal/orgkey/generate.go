package orgkey

import (
	"bytes"
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"sync"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/panics"
)

// Generated is a key at the moment of its release, as deliver receives it.
type Generated struct {
	ID          string
	Org         org.ID
	Fingerprint string // RFC 7638 thumbprint, base64url
	PEM         []byte // PKCS#1 "RSA PRIVATE KEY"; cleared when deliver returns
}

// Generate makes a key for org and hands its private half to deliver, once,
// after the audit trail has it. deliver writes it out and flushes; an error
// from it withdraws the key, as does an end of ctx before the release.
//
// A crash (CRASH below) loses no more than this says; the sweeper, and for
// Transit the reaper, clear it without anybody's help.
func (s *Service) Generate(ctx context.Context, call gate.Call, org org.ID, deliver func(context.Context, Generated) error) error {
	pass, err := s.gate.Decide(ctx, call, authz.GenerateKey, org, "")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, s.reservationLife/2)
	defer cancel()

	id := uuid.NewString()
	if err := s.reserve(ctx, org, id); err != nil {
		if !errors.As(err, new(*QuotaError)) {
			s.cancel(ctx, id) // it may have been made, and only the answer be missing
		}
		return s.refused(ctx, pass, err)
	}
	// CRASH: a place in the quota stays taken until the reservation expires.
	if !s.admission.TryAcquire(1) {
		s.cancel(ctx, id)
		return s.refused(ctx, pass, ErrOverloaded)
	}
	leave := sync.OnceFunc(func() { s.admission.Release(1) })
	defer leave()
	key, err := s.keystore.Create(ctx, id)
	// CRASH: as above; a key object of the session is gone with the process,
	// and a Transit key bears the reservation's name, by which the reaper finds it.
	if err != nil {
		s.cancel(ctx, id)
		return s.refused(ctx, pass, fmt.Errorf("making key %s: %w: %w", id, ErrBackend, err))
	}
	// The private half leaves the back end while the record is made and the
	// trail hears of it. The release needs both.
	var der []byte
	defer func() { clear(der) }()
	pending := false
	err = s.sideBySide(ctx,
		func(ctx context.Context) (err error) { der, err = s.take(ctx, key, id); return err },
		func(ctx context.Context) (err error) { pending, err = s.enter(ctx, pass, id, key.Public()); return err })
	// CRASH: if record and event are committed by now, the sweeper deletes the
	// record at its expiry, with an event that says so. The reaper leaves a
	// Transit key alone until then.
	switch {
	case err != nil && pending:
		err = orOverloaded(ctx, err)
		s.withdraw(ctx, pass, id, gate.ReasonFor(ctx, withdrawal(err, "generation_failed")))
		return err
	case err != nil:
		s.cancel(ctx, id)
		return s.refused(ctx, pass, err)
	}
	if err := s.store.Release(ctx, id); err != nil {
		err = orOverloaded(ctx, fmt.Errorf("releasing key %s: %w", id, err))
		s.withdraw(ctx, pass, id, gate.ReasonFor(ctx, withdrawal(err, "release_failed")))
		return err
	}
	// CRASH: the key is released and listed as delivery "unconfirmed"; whether
	// its holder got it whole, nobody knows, so nothing deletes it by itself.
	leave() // back end and trail are done; a caller who reads slowly holds up nobody else
	private := encodePEM(der)
	defer clear(private)
	if err := deliver(ctx, Generated{ID: id, Org: org, Fingerprint: Thumbprint(key.Public()), PEM: private}); err != nil {
		s.withdraw(ctx, pass, id, "write_failed")
		return fmt.Errorf("writing key %s out: %w", id, err)
	}
	// CRASH: as above, although the holder has it.
	s.delivered(ctx, pass, id)
	return nil
}

// reserve takes a place in org's quota. The lock only keeps concurrent
// requests from colliding in the store, so one that cannot be had within
// lockPatience is done without.
func (s *Service) reserve(ctx context.Context, org org.ID, id string) error {
	locked, cancel := context.WithTimeout(ctx, lockPatience)
	unlock, err := s.locker.Lock(locked, org)
	cancel()
	if err == nil {
		defer unlock()
	} else if ctx.Err() != nil {
		return ctx.Err()
	}
	return s.store.Reserve(ctx, org, id, s.limit, s.reservationLife)
}

// errBug is a panic, which the log tells of.
var errBug = errors.New("a bug in the program")

// sideBySide runs both halves at once and returns the error of the one that
// failed first, which also ends the other's context. A panic is an error: from
// another goroutine than the request's it would end the process.
func (s *Service) sideBySide(ctx context.Context, halves ...func(context.Context) error) error {
	both, failed := errgroup.WithContext(ctx)
	// Not failed itself: its cause is the other half's error, in which a back end
	// would see a failure of its own.
	working, stop := context.WithCancel(ctx)
	defer stop()
	defer context.AfterFunc(failed, stop)()
	for _, half := range halves {
		both.Go(func() (err error) {
			defer func() {
				if v := recover(); v != nil {
					panics.Log(s.gate.Log, v)
					err = errBug
				}
			}()
			return half(working)
		})
	}
	return both.Wait()
}

// take has the back end give the private half out, and forget it whatever
// becomes of that. The caller clears what it returns.
func (s *Service) take(ctx context.Context, key BackendKey, id string) (der []byte, err error) {
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupDeadline)
		defer cancel()
		if kept := key.Destroy(ctx); kept != nil {
			// Said here, too, since the caller may hear of something that failed before.
			s.gate.Log.Warn("the back end may still have its copy of a key that was not released", "key", id, "error", kept)
			err = errors.Join(err, kept)
		}
		if err != nil {
			err = fmt.Errorf("taking key %s out of the back end: %w: %w", id, ErrBackend, err)
		}
	}()
	return key.Export(ctx)
}

// enter makes the record of a key, pending from then on, and waits until the
// trail has it.
func (s *Service) enter(ctx context.Context, pass gate.Pass, id string, public *rsa.PublicKey) (pending bool, err error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return false, fmt.Errorf("encoding key %s: %w", id, err)
	}
	sealed, err := s.sealer.Seal(ctx, PublicKeyOf(pass.Org, id), der)
	if err != nil {
		return false, fmt.Errorf("sealing key %s: %w: %w", id, ErrBackend, err)
	}
	created := pass.Event(audit.KeyCreated)
	created.Object = id
	created.Add(map[string]string{"fingerprint": Thumbprint(public), "backend": s.backend, "algorithm": "rsa-2048"})
	// Not given up halfway: nobody would know whether the record is there.
	storing, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupDeadline)
	defer cancel()
	if err := s.store.StorePending(storing, id, sealed, created); err != nil {
		return false, fmt.Errorf("storing key %s: %w", id, err)
	}
	waiting, cancel := context.WithTimeout(ctx, s.auditDeadline)
	defer cancel()
	if err := s.gate.Trail.Acknowledged(waiting, created.ID); err != nil {
		return true, fmt.Errorf("%w: %w", gate.ErrAudit, err)
	}
	return true, nil
}

// cancel gives a reserved place back, also when the caller has gone. If that
// fails the place comes back when the reservation expires.
func (s *Service) cancel(ctx context.Context, id string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupDeadline)
	defer cancel()
	if err := s.store.Cancel(ctx, id); err != nil {
		s.gate.Log.Warn("a place in the quota stays taken until its reservation expires", "key", id, "error", err)
	}
}

// withdraw ends a key that was not, or not wholly, handed out, also when the
// caller has gone. If that fails the caller does not wait for it: Sweep tries
// again. CRASH: a pending key is swept at its expiry all the same, and a
// released one stays "unconfirmed".
func (s *Service) withdraw(ctx context.Context, pass gate.Pass, id, reason string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupDeadline)
	defer cancel()
	event := pass.Event(audit.KeyWithdrawn)
	event.Object, event.Reason, event.Outcome = id, reason, audit.Failure
	if err := s.end(ctx, event); err != nil {
		s.gate.Log.Error("key not withdrawn yet", "key", id, "org", pass.Org, "reason", reason, "error", err)
		s.owe(event)
	}
}

// end withdraws the key that event is about.
func (s *Service) end(ctx context.Context, event audit.Event) error {
	err := s.store.Withdraw(ctx, event.Object, event)
	if err == nil {
		s.gate.Log.Warn("key withdrawn", "key", event.Object, "org", event.Org, "reason", event.Reason, "request", event.Request)
	}
	return err
}

func (s *Service) owe(events ...audit.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.owed = append(s.owed, events...)
}

// withdrawOwed makes up for withdrawals that failed, up to the first that
// fails again.
func (s *Service) withdrawOwed(ctx context.Context) error {
	s.mu.Lock()
	owed := s.owed
	s.owed = nil
	s.mu.Unlock()
	for i, event := range owed {
		if err := s.end(ctx, event); err != nil {
			s.owe(owed[i:]...)
			return fmt.Errorf("%d keys are still to be withdrawn: %w", len(owed)-i, err)
		}
	}
	return nil
}

// delivered notes that the private key went out. The caller has it by now, so
// a failure is logged and the key stays "unconfirmed".
func (s *Service) delivered(ctx context.Context, pass gate.Pass, id string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupDeadline)
	defer cancel()
	event := pass.Event(audit.KeyDelivered)
	event.Object = id
	if err := s.store.Delivered(ctx, id, event); err != nil {
		s.gate.Log.Warn("delivery not confirmed in the record", "key", id, "org", pass.Org, "error", err)
	}
}

// refused records that no key came of a request, also when the caller has
// gone, and returns why.
func (s *Service) refused(ctx context.Context, pass gate.Pass, why error) error {
	why = orOverloaded(ctx, why)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupDeadline)
	defer cancel()
	return s.gate.Failed(ctx, pass, audit.KeyRefused, refusal(why), why)
}

// orOverloaded is why a generation failed. One that ran out of time is one too
// many for the back end.
func orOverloaded(ctx context.Context, why error) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("%w: %w", ErrOverloaded, why)
	}
	return why
}

// withdrawal is the reason in the event of a key that ends before its release.
func withdrawal(err error, otherwise string) string {
	switch {
	case errors.Is(err, gate.ErrAudit):
		return "audit_not_acknowledged"
	case errors.Is(err, ErrOverloaded):
		return "overloaded"
	case errors.Is(err, ErrUnavailable):
		return "unavailable"
	default:
		return otherwise
	}
}

// refusal is the reason in the event of a request that no key came of.
func refusal(err error) string {
	var quota *QuotaError
	switch {
	case errors.As(err, &quota):
		return "quota"
	case errors.Is(err, ErrOverloaded):
		return "overloaded"
	case errors.Is(err, ErrGone):
		return "cancelled"
	case errors.Is(err, context.Canceled):
		return "caller_gone"
	case errors.Is(err, ErrUnavailable):
		return "unavailable"
	default:
		return "generation_failed"
	}
}

// Thumbprint is the RFC 7638 thumbprint of a public key: base64url, unpadded,
// of SHA-256 over the JWK's required members in lexicographic order.
func Thumbprint(k *rsa.PublicKey) string {
	b64 := base64.RawURLEncoding.EncodeToString
	e := b64(big.NewInt(int64(k.E)).Bytes())
	sum := sha256.Sum256([]byte(`{"e":"` + e + `","kty":"RSA","n":"` + b64(k.N.Bytes()) + `"}`))
	return b64(sum[:])
}

// encodePEM is pem.Encode into a buffer that never grows, so that no copy of
// the key is left behind in a smaller one.
func encodePEM(der []byte) []byte {
	buf := bytes.NewBuffer(make([]byte, 0, 2*len(der)+128))
	// A bytes.Buffer does not fail.
	_ = pem.Encode(buf, &pem.Block{Type: "RSA PRIVATE KEY", Bytes: der})
	return buf.Bytes()
}
