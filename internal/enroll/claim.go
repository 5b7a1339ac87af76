package enroll

import (
	"context"
	"crypto/hmac"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// Origin is where a request without a bearer token came from.
type Origin struct {
	Request string // the request's ID
	Address string // the client's IP address, as the transport observed it
}

// Answer is a wrapped key on its way out.
type Answer struct {
	envelope.Delivery
	Scope  Scope
	Sealed envelope.SealedKey // of FromBackend
	Event  []byte             // the log's leaf of orgkey.sealed, or of FromNode orgkey.created, verbatim
	Until  time.Time          // when the key is withdrawn unless it was received
	MAC    []byte             // nil for an administrator's own
}

// Claim answers a node that asks for the key of enrollment id: deliver writes
// the wrapped key out, or what the node's own key became; ask writes a challenge
// out, which its TPM has to answer first. ErrPending says that it is to ask again.
func (s *Service) Claim(ctx context.Context, from Origin, id string, body []byte, deliver func(Answer) error, ask func(Challenge) error) error {
	c, err := parseClaim(body)
	if err != nil {
		return err
	}
	p, k, err := s.known(ctx, from, id, func(k []byte) bool {
		return hmac.Equal(c.mac, envelope.ClaimMAC(k, id, c.recipient.ID))
	})
	if err != nil {
		return err
	}
	defer clear(k)
	pass, err := s.Gate.Decide(ctx, s.call(from, p), authz.ClaimEnrollment, p.Org, id)
	if err != nil {
		return err
	}
	// The address is that of a machine, not of a person, and auditors need it in exports.
	pass.Detail = map[string]string{"recipient": c.recipient.ID, "from": from.Address}
	challenge, err := s.judge(ctx, &pass, p, &c)
	if err != nil {
		return err
	}
	if challenge != nil {
		challenge.MAC = envelope.ChallengeMAC(k, id, c.recipient.ID, challenge.IDObject, challenge.EncSecret)
		s.Count(Challenges)
		return ask(*challenge)
	}
	// This is finished even if the node disconnects: it will ask again.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.AttemptLife/2)
	defer cancel()
	d, err := s.claim(ctx, pass, id, c.recipient)
	if err != nil {
		return err
	}
	return s.serve(ctx, pass, d, k, c.signature, deliver)
}

func (s *Service) call(from Origin, p Permission) gate.Call {
	return gate.Call{
		Caller:  authz.Caller{Kind: authz.Enrollment, Subject: p.ID, Org: p.Org},
		Request: from.Request, Address: from.Address,
	}
}

// known returns enrollment id and its K, which the caller clears, if proves
// finds that the asker has K. An unknown one and a wrong MAC are the same
// error, after the same time; only a known one costs an unsealing.
func (s *Service) known(ctx context.Context, from Origin, id string, proves func(k []byte) bool) (Permission, []byte, error) {
	started := time.Now()
	leave, err := s.Enter(ctx, from.Address)
	if err != nil {
		return Permission{}, nil, err
	}
	p, k, err := s.open(ctx, id)
	if err == nil && !proves(k) {
		clear(k)
		err = ErrUnknown
	}
	// An error of the store does not count against the caller's address.
	if tooMany := leave(!errors.Is(err, ErrUnknown)); tooMany != nil {
		err = tooMany
	}
	if err != nil {
		pause(ctx, refusalTime-time.Since(started))
		return Permission{}, nil, err
	}
	return p, k, nil
}

func (s *Service) open(ctx context.Context, id string) (Permission, []byte, error) {
	p, err := s.Store.Permission(ctx, id)
	if errors.Is(err, ErrNotFound) {
		return Permission{}, nil, ErrUnknown
	}
	if err != nil {
		return Permission{}, nil, fmt.Errorf("reading an enrollment: %w", err)
	}
	opened, err := s.Sealer.Open(ctx, []orgkey.Sealed{{Binding: tokenBinding(p.Org, id), Ciphertext: p.K}})
	if err != nil {
		return Permission{}, nil, fmt.Errorf("opening an enrollment: %w", err)
	}
	return p, opened[0], nil
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// claim gives the recipient its delivery, or records why not.
func (s *Service) claim(ctx context.Context, pass gate.Pass, id string, recipient Recipient) (Delivery, error) {
	conflict := pass.Event(audit.EnrollmentConflict)
	conflict.Object, conflict.Outcome, conflict.Reason = id, audit.Denied, "claimed"
	first := false
	d, err := s.Store.Claim(ctx, id, recipient, pass.Call.Address, s.DeliverFor, func(keyID string) audit.Event {
		first = true
		event := pass.Event(audit.EnrollmentClaimed)
		event.Object = id
		event.Detail["key"] = keyID
		return event
	}, conflict)
	switch {
	case err == nil:
		if first {
			s.Count(Claims)
		}
		return d, nil
	case errors.Is(err, ErrClaimed): // which has left its event, or was counted
		s.Count(Conflicts)
		return d, err
	case errors.Is(err, ErrInUse):
		return d, s.refused(ctx, pass, "recipient_unacceptable", err)
	case errors.Is(err, ErrClosed):
		return d, s.refused(ctx, pass, "enrollment_closed", err)
	default:
		return d, s.Gate.Failed(ctx, pass, audit.RequestFailed, gate.ReasonFor(ctx, "unavailable"), err)
	}
}

// serve brings a delivery as far as it goes and has deliver write it out.
// signature is the holder's, of a key that they made.
func (s *Service) serve(ctx context.Context, pass gate.Pass, d Delivery, k, signature []byte, deliver func(Answer) error) error {
	d, wrapped, err := s.advance(ctx, pass, d, signature)
	if errors.Is(err, ErrPending) {
		return err
	}
	var answer Answer
	if err == nil {
		answer, err = s.answer(ctx, d, wrapped, k)
	}
	if err != nil {
		if !errors.Is(err, ErrClosed) {
			s.Count(Failures)
		}
		return s.Gate.Failed(ctx, pass, audit.RequestFailed, reasonOf(ctx, err), err)
	}
	if err := deliver(answer); err != nil {
		return fmt.Errorf("writing key %s out: %w", d.KeyID, err)
	}
	if d.Origin == FromBackend {
		s.answered(ctx, pass, d)
	}
	return nil
}

func reasonOf(ctx context.Context, err error) string {
	switch {
	case errors.Is(err, orgkey.ErrOverloaded):
		return "overloaded"
	case errors.Is(err, orgkey.ErrSealedUnavailable):
		return "sealed_unavailable"
	case errors.Is(err, gate.ErrAudit):
		return "audit_not_acknowledged"
	case errors.Is(err, ErrClosed):
		return "enrollment_closed"
	case errors.Is(err, ErrInUse):
		return "recipient_unacceptable"
	default:
		return gate.ReasonFor(ctx, "generation_failed")
	}
}

// made is what a call made itself.
type made struct {
	attempt string // whose copy in the back end this call destroyed
	wrapped []byte // the key, as it goes out
}

// advance takes the steps that are left until d is available. Each is
// conditional, so that two who take the same one do it once. It also returns the
// wrapped key if this call made it.
func (s *Service) advance(ctx context.Context, pass gate.Pass, d Delivery, signature []byte) (_ Delivery, wrapped []byte, err error) {
	var own made
	for {
		switch d.Stage {
		case Claimed:
			if !d.Approved {
				return d, nil, ErrPending
			}
			if d.Origin == FromNode {
				err = s.storeOwn(ctx, pass, d, signature)
				break // CRASH: claimed, or sealed with the key pending; asking again goes on.
			}
			own, err = s.make(ctx, pass, d)
			// CRASH: the delivery is claimed, and another attempt can begin when this one's
			// life is over. What it left in the back end bears the attempt's name.
		case Stored:
			// The copy is gone since before it was stored, but a replica of an older
			// version stores first.
			if d.Attempt != own.attempt {
				err = s.Keystore.DestroySealed(ctx, d.Attempt)
			}
			if err == nil {
				err = s.Store.Seal(ctx, d.KeyID, sealedEvent(pass, d))
			}
			// CRASH: stored, and whoever asks next seals it; or sealed.
		case Sealed:
			err = s.offer(ctx, d)
			// CRASH: sealed, and nobody has had it.
		case Available:
			return d, own.wrapped, nil
		case Received:
			if d.Origin == FromNode { // its answer is no secret, and may be lost as often as any
				return d, nil, nil
			}
			return d, nil, ErrClosed
		default:
			return d, nil, ErrClosed
		}
		if err != nil {
			return d, nil, err
		}
		before := d.Stage
		if d, err = s.Store.Delivery(ctx, d.KeyID); err != nil {
			return d, nil, fmt.Errorf("reading a delivery: %w", err)
		}
		if d.Stage == before {
			return d, nil, ErrPending // somebody else is at it
		}
	}
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

func sealedEvent(pass gate.Pass, d Delivery) audit.Event {
	event := pass.Event(audit.KeySealed)
	event.Object = d.KeyID
	event.Detail = map[string]string{
		"recipient": d.Recipient, "alg": d.Wrapped.Alg, "sealed": d.Wrapped.SHA256, "fingerprint": d.Fingerprint,
		"attempt": d.Attempt, // the key's name in the back end's own records
	}
	d.describe(event.Detail)
	return event
}

// describe adds to an event's details by which enrollment a key came, and which
// TPM it, or its recipient, is in.
func (d Delivery) describe(detail map[string]string) {
	if d.Enrollment != "" {
		detail["enrollment"] = d.Enrollment
	}
	if d.Device.EK != "" {
		detail["ek"], detail["evidence"] = d.Device.EK, string(d.Device.Evidence)
	}
}

// offer waits until the sinks have the event of the sealing, and releases the key.
func (s *Service) offer(ctx context.Context, d Delivery) error {
	waiting, cancel := context.WithTimeout(ctx, s.AuditDeadline)
	defer cancel()
	if err := s.Gate.AuditLog.Acknowledged(waiting, d.Event); err != nil {
		return fmt.Errorf("%w: %w", gate.ErrAudit, err)
	}
	if err := s.Store.Offer(ctx, d.KeyID, s.DeliverFor); err != nil {
		return fmt.Errorf("releasing key %s: %w", d.KeyID, err)
	}
	return nil
}

// answer is what d's recipient gets: the same bytes each time.
// wrapped is what this call wrapped, if it did.
func (s *Service) answer(ctx context.Context, d Delivery, wrapped, k []byte) (Answer, error) {
	sealed := d.Origin == FromBackend
	if sealed && envelope.Digest(wrapped) != d.Wrapped.SHA256 {
		opened, err := s.Sealer.Open(ctx, []orgkey.Sealed{{Binding: wrappedBinding(d), Ciphertext: d.Wrapped.Value}})
		if err != nil {
			return Answer{}, fmt.Errorf("opening the delivery of key %s: %w", d.KeyID, err)
		}
		wrapped = opened[0]
	}
	leaf, err := s.Store.Leaf(ctx, d.KeyID)
	if err != nil {
		return Answer{}, fmt.Errorf("reading the event of key %s: %w", d.KeyID, err)
	}
	a := Answer{
		Delivery: s.vouched(d), Scope: d.Scope, Sealed: envelope.SealedKey{Alg: d.Wrapped.Alg, Value: wrapped}, Event: leaf, Until: d.Until,
	}
	if sealed && envelope.Digest(wrapped) != d.Wrapped.SHA256 {
		return Answer{}, fmt.Errorf("the delivery of key %s is not what was sealed: %w", d.KeyID, orgkey.ErrSealBroken)
	}
	if k != nil {
		a.MAC = a.Delivery.MAC(k)
	}
	return a, nil
}

func (s *Service) vouched(d Delivery) envelope.Delivery {
	return envelope.Delivery{
		Enrollment: d.Enrollment, Org: string(d.Org), Origin: s.Origin, KeyID: d.KeyID,
		Recipient: d.Recipient, Fingerprint: d.Fingerprint, SHA256: d.Wrapped.SHA256,
	}
}

// answered notes that a wrapped key went out. The asker has it by now, so a
// failure is logged; the count is one too low then.
func (s *Service) answered(ctx context.Context, pass gate.Pass, d Delivery) {
	ctx, cancel := gate.Outlive(ctx)
	defer cancel()
	event := pass.Event(audit.KeyDelivered)
	event.Object = d.KeyID
	if err := s.Store.Answered(ctx, d.KeyID, event); err != nil {
		s.Gate.Log.Warn("a delivery is not counted", "key", d.KeyID, "org", d.Org, "error", err)
	}
}

// Receive takes a node's receipt for the key of enrollment id. The same receipt
// again changes nothing.
func (s *Service) Receive(ctx context.Context, from Origin, id string, body []byte) error {
	r, err := parseReceipt(body)
	if err != nil {
		return err
	}
	leave, err := s.Enter(ctx, from.Address)
	if err != nil {
		return err
	}
	d, err := s.signed(ctx, r, func(ctx context.Context) (Delivery, error) { return s.Store.DeliveryTo(ctx, id, r.recipient) })
	if tooMany := leave(!errors.Is(err, ErrUnknown) && !errors.Is(err, ErrSignature)); tooMany != nil {
		err = tooMany
	}
	if err != nil {
		return err
	}
	call := gate.Call{
		Caller:  authz.Caller{Kind: authz.Enrollment, Subject: id, Org: d.Org},
		Request: from.Request, Address: from.Address,
	}
	pass, err := s.Gate.Decide(ctx, call, authz.ReceiveKey, d.Org, d.KeyID)
	if err != nil {
		return err
	}
	return s.receive(ctx, pass, d, r)
}

// signed returns the delivery that find knows, if its key signed the receipt.
func (s *Service) signed(ctx context.Context, r receipt, find func(context.Context) (Delivery, error)) (Delivery, error) {
	d, err := find(ctx)
	switch {
	case errors.Is(err, ErrNotFound):
		return d, ErrUnknown
	case err != nil:
		return d, fmt.Errorf("reading a delivery: %w", err)
	case d.Stage != Available && d.Stage != Received:
		return d, ErrClosed
	}
	opened, err := s.Opener.Open(ctx, d.Org, []orgkey.SealedKey{{ID: d.KeyID, Sealed: d.Public}})
	if err != nil {
		return d, fmt.Errorf("opening key %s: %w", d.KeyID, err)
	}
	if !opened[d.KeyID].Verifies(s.vouched(d).ReceiptText(), r.signature) {
		return d, ErrSignature
	}
	return d, nil
}

func (s *Service) receive(ctx context.Context, pass gate.Pass, d Delivery, r receipt) error {
	ctx, cancel := gate.Outlive(ctx)
	defer cancel()
	first := false
	err := s.Store.Receive(ctx, d.KeyID, func(answers int) audit.Event {
		first = true
		event := pass.Event(audit.KeyReceived)
		event.Object = d.KeyID
		event.Detail = map[string]string{
			"recipient": d.Recipient, "sealed": d.Wrapped.SHA256, "answers": strconv.Itoa(answers),
			"signature": base64.StdEncoding.EncodeToString(r.signature),
		}
		if d.Enrollment != "" {
			event.Detail["enrollment"] = d.Enrollment
		}
		return event
	})
	if err != nil {
		reason := gate.ReasonFor(ctx, "unavailable")
		if errors.Is(err, ErrClosed) {
			reason = "enrollment_closed"
		}
		return s.Gate.Failed(ctx, pass, audit.RequestFailed, reason, err)
	}
	if first {
		s.Count(Receipts)
	}
	return nil
}

// Generate has deliver write out a key for org, sealed to the recipient that
// body names, to its administrator. The same recipient again, before its
// receipt, gets the same key.
func (s *Service) Generate(ctx context.Context, call gate.Call, org org.ID, body []byte, deliver func(Answer) error) error {
	pass, err := s.Gate.Decide(ctx, call, authz.GenerateKey, org, "")
	if err != nil {
		return err
	}
	recipient, err := parseOwn(body)
	if err == nil {
		err = recipient.Check()
	}
	if err != nil {
		return s.Gate.Failed(ctx, pass, audit.KeyRefused, "recipient_unacceptable", err)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.AttemptLife/2)
	defer cancel()
	d, err := s.Store.ClaimOwn(ctx, org, uuid.NewString(), recipient, s.Limit, s.DeliverFor)
	if err != nil {
		reason := gate.ReasonFor(ctx, "unavailable")
		if errors.As(err, new(*orgkey.QuotaError)) {
			reason = "quota"
		}
		return s.Gate.Failed(ctx, pass, audit.KeyRefused, reason, err)
	}
	return s.serve(ctx, pass, d, nil, nil, deliver)
}

// Fetch has deliver write out an unreceived key of org again.
func (s *Service) Fetch(ctx context.Context, call gate.Call, org org.ID, keyID string, deliver func(Answer) error) error {
	pass, err := s.Gate.Decide(ctx, call, authz.FetchSealedKey, org, keyID)
	if err != nil {
		return err
	}
	d, err := s.own(ctx, org, keyID)
	if err != nil {
		return s.failure(ctx, pass, err)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.AttemptLife/2)
	defer cancel()
	return s.serve(ctx, pass, d, nil, nil, deliver)
}

// ReceiveOwn takes an administrator's receipt for key keyID of org.
func (s *Service) ReceiveOwn(ctx context.Context, call gate.Call, org org.ID, keyID string, body []byte) error {
	pass, err := s.Gate.Decide(ctx, call, authz.FetchSealedKey, org, keyID)
	if err != nil {
		return err
	}
	r, err := parseReceipt(body)
	if err != nil {
		return s.Gate.Failed(ctx, pass, audit.RequestFailed, "invalid", err)
	}
	d, err := s.signed(ctx, r, func(ctx context.Context) (Delivery, error) {
		d, err := s.own(ctx, org, keyID)
		if err == nil && d.Recipient != r.recipient {
			err = ErrNotFound
		}
		return d, err
	})
	if errors.Is(err, ErrUnknown) {
		err = ErrNotFound
	}
	if err != nil {
		return s.failure(ctx, pass, err)
	}
	return s.receive(ctx, pass, d, r)
}

// own is an administrator's own delivery, or ErrNotFound.
func (s *Service) own(ctx context.Context, org org.ID, keyID string) (Delivery, error) {
	d, err := s.Store.Delivery(ctx, keyID)
	if err == nil && (d.Org != org || d.Enrollment != "") {
		err = ErrNotFound
	}
	return d, err
}
