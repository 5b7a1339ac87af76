package orgkey

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/keypem"
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
// after the audit log has acknowledged it. deliver writes it out and flushes; an
// error from it withdraws the key, as does an end of ctx before the release.
//
// The notes marked CRASH say what a crash at that point leaves behind; the
// sweeper, and for Transit the reaper, clear it automatically.
func (s *Service) Generate(ctx context.Context, call gate.Call, org org.ID, deliver func(context.Context, Generated) error) error {
	pass, err := s.gate.Decide(ctx, call, authz.GenerateKey, org, "")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, s.reservationLife/2)
	defer cancel()

	served := sync.OnceFunc(s.Busy())
	defer served()
	place, err := s.place(ctx, org)
	id := place.id
	if err != nil {
		if !errors.As(err, new(*QuotaError)) {
			s.cancel(ctx, place.asked) // the reservation may exist although its answer was lost
		}
		return s.refused(ctx, pass, err)
	}
	defer func() { clear(place.der) }()
	// CRASH: a place in the quota stays taken until the reservation expires.
	leave := func() {}
	var key BackendKey
	if place.der == nil {
		if leave, err = s.Admit(); err != nil {
			s.cancel(ctx, place.asked)
			return s.refused(ctx, pass, err)
		}
		defer leave()
		key, err = s.keystore.Create(ctx, id)
		// CRASH: as above; a session key in the HSM is gone with the process,
		// and a Transit key has the reservation's name, by which the reaper finds it.
		if err != nil {
			s.cancel(ctx, place.asked)
			return s.refused(ctx, pass, fmt.Errorf("making key %s: %w: %w", id, ErrBackend, err))
		}
		place.public = key.Public()
	}
	// The private key is exported while the record is stored and the audit log
	// acknowledges it. The release needs both. One from the pool is exported already.
	record, pending := place, false
	halves := []func(context.Context) error{
		func(ctx context.Context) (err error) {
			pending, err = s.storeRecord(ctx, pass, record)
			return err
		},
	}
	if key != nil {
		halves = append(halves, func(ctx context.Context) (err error) { place.der, err = s.export(ctx, key, id); return err })
	}
	err = s.concurrently(ctx, halves...)
	// CRASH: if record and event are committed by now, the sweeper deletes the
	// record at its expiry, with an event that says so. The reaper leaves a
	// Transit key alone until then.
	switch {
	case err != nil && pending && s.withdraw(ctx, pass, id, place.asked, gate.ReasonFor(ctx, withdrawal(orOverloaded(ctx, err), "generation_failed"))):
		return orOverloaded(ctx, err)
	case err != nil:
		s.cancel(ctx, place.asked)
		return s.refused(ctx, pass, err)
	}
	if err := s.store.Release(ctx, id); err != nil {
		err = orOverloaded(ctx, fmt.Errorf("releasing key %s: %w", id, err))
		s.withdraw(ctx, pass, id, "", gate.ReasonFor(ctx, withdrawal(err, "release_failed")))
		return err
	}
	// CRASH: the key is released and listed as delivery "unconfirmed"; it is unknown
	// whether its holder got all of it, so nothing deletes it automatically.
	served()
	leave() // back end and audit log are done; a slow reader delays no other caller
	private := keypem.Encode("RSA PRIVATE KEY", place.der)
	defer clear(private)
	if err := deliver(ctx, Generated{ID: id, Org: org, Fingerprint: record.public.Fingerprint(), PEM: private}); err != nil {
		s.withdraw(ctx, pass, id, "", "write_failed")
		return fmt.Errorf("writing key %s out: %w", id, err)
	}
	// CRASH: as above, although the holder has it.
	s.delivered(ctx, pass, id)
	return nil
}

// place is a place in an organization's quota, and the key out of the pool that was
// taken with it, if one was there and could be exported.
type place struct {
	id     string // the key's
	asked  string // the reservation's own, which fences off whoever took the same pool key before a failover
	der    []byte // the private key; nil: no key was taken. The caller clears it
	public Public
	sealed []byte            // the public key, if it is sealed already
	detail map[string]string // for the event
}

// place takes a place in org's quota, with a key out of the pool if there is one. A
// pool key that cannot be exported is destroyed, and costs the caller only time: it
// gets a place for a key that is still to be made.
func (s *Service) place(ctx context.Context, org org.ID) (place, error) {
	if s.pool == nil {
		return s.reserve(ctx, org)
	}
	p := newPlace()
	var taken *Taken[BackendKey]
	err := s.locked(ctx, org, func() (err error) {
		taken, err = s.pool.Reserve(ctx, org, p.asked, s.limit, s.reservationLife)
		return err
	})
	if err != nil || taken == nil {
		return p, err
	}
	// CRASH: the reservation has the pool key's name, by which the reaper finds the key
	// once the reservation has expired.
	claimed, err := s.claim(ctx, org, taken)
	if err == nil {
		claimed.asked = p.asked
		return claimed, nil
	}
	s.gate.Log.Warn("a key out of the pool could not be used; another one is made", "key", taken.ID, "error", err)
	// The place stays taken meanwhile: another caller may wait for the next free one. One
	// that is gone was cancelled, and with it the request.
	return p, s.store.Exchange(ctx, p.asked, s.reservationLife)
}

// newPlace is a place for a key that is still to be made.
func newPlace() place {
	id := uuid.NewString()
	return place{id: id, asked: id}
}

// claim exports a key out of the pool and destroys it in the back end, while its public
// half is sealed. The key is the caller's only if its own deletion removed it in the back
// end, so claim fails otherwise.
func (s *Service) claim(ctx context.Context, org org.ID, taken *Taken[BackendKey]) (place, error) {
	key, made, err := taken.Open(ctx)
	if err != nil {
		return place{}, err
	}
	p := place{id: taken.ID, public: key.Public(), detail: AheadDetail(made)}
	err = s.concurrently(ctx,
		func(ctx context.Context) (err error) { p.der, err = s.export(ctx, key, p.id); return err },
		func(ctx context.Context) (err error) { p.sealed, err = s.seal(ctx, org, p.id, p.public); return err })
	if err != nil {
		clear(p.der)
		return place{}, err
	}
	return p, nil
}

// seal seals the public key of org's key id.
func (s *Service) seal(ctx context.Context, org org.ID, id string, public Public) ([]byte, error) {
	der, err := public.DER()
	if err != nil {
		return nil, fmt.Errorf("encoding key %s: %w", id, err)
	}
	sealed, err := s.sealer.Seal(ctx, PublicKeyOf(org, id), der)
	if err != nil {
		return nil, fmt.Errorf("sealing key %s: %w: %w", id, ErrBackend, err)
	}
	return sealed, nil
}

// reserve takes a place in org's quota for a key that is still to be made.
func (s *Service) reserve(ctx context.Context, org org.ID) (place, error) {
	p := newPlace()
	return p, s.locked(ctx, org, func() error { return s.store.Reserve(ctx, org, p.asked, s.limit, s.reservationLife) })
}

// locked does what takes a place in org's quota under its lock. The lock only keeps
// concurrent requests from colliding in the store, so after lockPatience locked
// continues without it.
func (s *Service) locked(ctx context.Context, org org.ID, do func() error) error {
	patient, cancel := context.WithTimeout(ctx, lockPatience)
	unlock, err := s.locker.Lock(patient, org)
	cancel()
	if err == nil {
		defer unlock()
	} else if ctx.Err() != nil {
		return ctx.Err()
	}
	return do()
}

// concurrently runs both halves at once and returns the error of the one that
// failed first, which also ends the other's context.
func (s *Service) concurrently(ctx context.Context, halves ...func(context.Context) error) error {
	both, failed := errgroup.WithContext(ctx)
	// Not the context failed itself: its cause is the other half's error, which a
	// back end would take for its own failure.
	working, stop := context.WithCancel(ctx)
	defer stop()
	defer context.AfterFunc(failed, stop)()
	for _, half := range halves {
		both.Go(func() error { return panics.Caught(s.gate.Log, func() error { return half(working) }) })
	}
	return both.Wait()
}

// export exports the private key from the back end, and destroys the back end's
// copy even if that fails. The caller clears what it returns.
func (s *Service) export(ctx context.Context, key BackendKey, id string) (der []byte, err error) {
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupDeadline)
		defer cancel()
		if kept := key.Destroy(ctx); kept != nil {
			// Logged here, too, because the caller may see an earlier error only.
			s.gate.Log.Warn("the back end may still have its copy of a key that was not released", "key", id, "error", kept)
			err = errors.Join(err, kept)
		}
		if err != nil {
			err = fmt.Errorf("taking key %s out of the back end: %w: %w", id, ErrBackend, err)
		}
	}()
	return key.Export(ctx)
}

// storeRecord stores the record of a key, which is pending from then on, and waits
// until the audit log has acknowledged it. pending also says that it may be, although the
// answer was lost.
func (s *Service) storeRecord(ctx context.Context, pass gate.Pass, p place) (pending bool, err error) {
	id, sealed := p.id, p.sealed
	if sealed == nil {
		if sealed, err = s.seal(ctx, pass.Org, id, p.public); err != nil {
			return false, err
		}
	}
	created := pass.Event(audit.KeyCreated)
	created.Object = id
	created.Add(map[string]string{"fingerprint": p.public.Fingerprint(), "backend": s.backend, "algorithm": Algorithm})
	created.Add(p.detail)
	// Not aborted with ctx: it would be unknown whether the record exists.
	storing, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupDeadline)
	defer cancel()
	if err := s.store.StorePending(storing, id, p.asked, sealed, created); err != nil {
		return !errors.Is(err, ErrGone), fmt.Errorf("storing key %s: %w", id, err)
	}
	waiting, cancel := context.WithTimeout(ctx, s.auditDeadline)
	defer cancel()
	if err := s.gate.AuditLog.Acknowledged(waiting, created.ID); err != nil {
		return true, fmt.Errorf("%w: %w", gate.ErrAudit, err)
	}
	return true, nil
}

// cancel gives a reservation back, even if the caller is gone. If that fails, the
// reservation expires.
func (s *Service) cancel(ctx context.Context, asked string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupDeadline)
	defer cancel()
	if err := s.store.Cancel(ctx, asked); err != nil {
		s.gate.Log.Warn("a reservation could not be cancelled and stays in the quota until it expires", "reservation", asked, "error", err)
	}
}

// withdraw ends a key that was not, or not completely, handed out, even if the
// caller is gone. If that fails, the caller does not wait: Sweep tries again. It returns
// false if there was no such key, and so no event says that it ended. asked is the
// reservation's own ID, unless the key is known to have been stored.
// CRASH: a pending key is swept at its expiry, and a released one stays
// "unconfirmed".
func (s *Service) withdraw(ctx context.Context, pass gate.Pass, id, asked, reason string) bool {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupDeadline)
	defer cancel()
	event := pass.Event(audit.KeyWithdrawn)
	event.Object, event.Reason, event.Outcome = id, reason, audit.Failure
	ended, err := s.end(ctx, event)
	if err != nil {
		s.gate.Log.Error("key not withdrawn yet", "key", id, "org", pass.Org, "reason", reason, "error", err)
		s.postpone(withdrawn{event, asked})
	}
	return ended || err != nil
}

// end withdraws the key that event is about, if there is one.
func (s *Service) end(ctx context.Context, event audit.Event) (ended bool, err error) {
	ended, err = s.store.Withdraw(ctx, event.Object, event)
	if ended {
		s.gate.Log.Warn("key withdrawn", "key", event.Object, "org", event.Org, "reason", event.Reason, "request", event.Request)
	}
	return ended, err
}

// withdrawn is a withdrawal that failed.
type withdrawn struct {
	event audit.Event
	asked string // the reservation's own ID, if it is not known whether the key was ever stored
}

func (s *Service) postpone(all ...withdrawn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.postponed = append(s.postponed, all...)
}

// withdrawPostponed repeats withdrawals that failed, up to the first that fails
// again.
func (s *Service) withdrawPostponed(ctx context.Context) error {
	s.mu.Lock()
	postponed := s.postponed
	s.postponed = nil
	s.mu.Unlock()
	for i, w := range postponed {
		if err := s.makeUpFor(ctx, w); err != nil {
			s.postpone(postponed[i:]...)
			return fmt.Errorf("%d keys still have to be withdrawn: %w", len(postponed)-i, err)
		}
	}
	return nil
}

// makeUpFor repeats a withdrawal. If the key was never stored, its place is given back and
// an event says that the request made none. It has the withdrawal's ID: one that was
// committed although its answer was lost is the request's event already.
func (s *Service) makeUpFor(ctx context.Context, w withdrawn) error {
	ended, err := s.end(ctx, w.event)
	if err != nil || ended || w.asked == "" {
		return err
	}
	if err := s.store.Cancel(ctx, w.asked); err != nil {
		return err
	}
	refused := w.event
	refused.Type, refused.Object = audit.KeyRefused, ""
	return s.store.RecordOnce(ctx, refused)
}

// delivered records that the private key was written out. A failure is only
// logged, because the caller has the key; it stays "unconfirmed".
func (s *Service) delivered(ctx context.Context, pass gate.Pass, id string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupDeadline)
	defer cancel()
	event := pass.Event(audit.KeyDelivered)
	event.Object = id
	if err := s.store.Delivered(ctx, id, event); err != nil {
		s.gate.Log.Warn("the delivery of a key could not be recorded", "key", id, "org", pass.Org, "error", err)
	}
}

// refused records that a request made no key, even if the caller is gone, and
// returns why.
func (s *Service) refused(ctx context.Context, pass gate.Pass, why error) error {
	why = orOverloaded(ctx, why)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupDeadline)
	defer cancel()
	return s.gate.Failed(ctx, pass, audit.KeyRefused, refusal(why), why)
}

// orOverloaded is why a generation failed. A timeout means that the back end is
// overloaded.
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

// refusal is the reason in the event of a request that made no key.
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
