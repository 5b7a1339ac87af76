package enroll

import (
	"context"
	"errors"
	"fmt"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// serve brings a delivery as far as it goes and has deliver write it out.
// signature is the holder's, of a key that they made.
func (s *Service) serve(ctx context.Context, pass gate.Pass, d Delivery, k, signature []byte, deliver func(Answer) error) error {
	began := d
	d, wrapped, err := s.advance(ctx, pass, d, signature)
	if errors.Is(err, orgkey.ErrGone) {
		err = s.gone(ctx, began, err)
	}
	own := began.Enrollment == "" // an administrator's, of which every request leaves its event
	if errors.Is(err, ErrPending) {
		if own {
			return s.Gate.Failed(ctx, pass, audit.RequestFailed, "pending", err)
		}
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
		return s.failed(ctx, pass, began, err)
	}
	again := own && (d.Answers > 0 || d.Origin == FromNode && !d.Made)
	if again { // before it goes out, as other reads
		if err := s.again(ctx, pass, d); err != nil {
			return err
		}
	}
	if err := deliver(answer); err != nil {
		err = fmt.Errorf("writing key %s out: %w", d.KeyID, err)
		if own { // most of it may have arrived
			return s.Gate.Failed(ctx, pass, audit.RequestFailed, "write_failed", err)
		}
		return err
	}
	if d.Origin == FromBackend && !s.answered(ctx, pass, d) && own && !again {
		_ = s.again(ctx, pass, d) // another answer came first; a failure was logged and counted
	}
	return nil
}

// gone is what the next request for a delivery hears, of which a step was not there to be taken any more:
// it was ended meanwhile, or another attempt has it.
func (s *Service) gone(ctx context.Context, d Delivery, why error) error {
	now, err := s.Store.Delivery(ctx, d.KeyID)
	switch {
	case err != nil && !errors.Is(err, ErrNotFound):
		return fmt.Errorf("reading a delivery: %w", err)
	case err != nil || now.Stage == Ended:
		return fmt.Errorf("%w: %w", ErrClosed, why)
	}
	return fmt.Errorf("%w: %w", ErrPending, why)
}

// again records that an administrator gets what went out before.
func (s *Service) again(ctx context.Context, pass gate.Pass, d Delivery) error {
	event := pass.Event(audit.KeyFetched)
	if d.Origin == FromNode {
		event = pass.Event(audit.RequestRepeated)
	}
	event.Object = d.KeyID
	return s.Gate.Record(ctx, event)
}

// failed records why d got no further. An enrollment keeps its place in the quota, which it
// took when it was made. An administrator's own delivery took one for this request, and gives
// it back if nothing was made: nobody else can, before its time is over.
// CRASH: the place waits for that time, or for the same recipient.
func (s *Service) failed(ctx context.Context, pass gate.Pass, d Delivery, why error) error {
	reason := reasonOf(ctx, why)
	if d.Enrollment == "" && d.Stage == Claimed && s.giveBack(ctx, pass, d, reason) {
		return why
	}
	return s.Gate.Failed(ctx, pass, audit.RequestFailed, reason, why)
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
	case errors.Is(err, ErrProof):
		return "bad_signature"
	default:
		return gate.ReasonFor(ctx, "generation_failed")
	}
}

// advance takes the steps that are left until d is available. Each is
// conditional, so that two who take the same one do it once. It also returns the
// wrapped key if this call made it.
func (s *Service) advance(ctx context.Context, pass gate.Pass, d Delivery, signature []byte) (_ Delivery, wrapped []byte, err error) {
	for {
		before := d.Stage
		switch d.Stage {
		case Claimed:
			if !d.Approved {
				return d, nil, ErrPending
			}
			if d.Origin == FromNode {
				d, err = s.storeOwn(ctx, pass, d, signature)
				break // CRASH: claimed, or sealed with the key pending; asking again goes on.
			}
			d, wrapped, err = s.make(ctx, pass, d)
			// CRASH: the delivery is claimed, and another attempt can begin when this one's
			// life is over. What it left in the back end bears the attempt's name. Or it is sealed,
			// and nobody has had it.
		case Stored:
			// A replica of an older version stores before it destroys.
			if err = s.Keystore.DestroySealed(ctx, d.Attempt); err == nil {
				d, err = s.Store.Seal(ctx, d.KeyID, sealedEvent(pass, d))
			}
			// CRASH: stored, and whoever asks next seals it; or sealed.
		case Sealed:
			d, err = s.offer(ctx, d)
			// CRASH: sealed, and nobody has had it.
		case Available:
			return d, wrapped, nil
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
		if d.Stage == before {
			return d, nil, ErrPending // somebody else is at it
		}
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
func (s *Service) offer(ctx context.Context, d Delivery) (Delivery, error) {
	waiting, cancel := context.WithTimeout(ctx, s.AuditDeadline)
	defer cancel()
	if err := s.Gate.AuditLog.Acknowledged(waiting, d.Event); err != nil {
		return d, fmt.Errorf("%w: %w", gate.ErrAudit, err)
	}
	offered, err := s.Store.Offer(ctx, d.KeyID, s.DeliverFor)
	if err != nil {
		return d, fmt.Errorf("releasing key %s: %w", d.KeyID, err)
	}
	offered.Made = d.Made
	return offered, nil
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

// answered notes that a wrapped key went out, and reports whether that has left an event,
// as for the first time. The asker has it by now, so a failure is logged; the count is one
// too low then.
func (s *Service) answered(ctx context.Context, pass gate.Pass, d Delivery) (told bool) {
	ctx, cancel := gate.Outlive(ctx)
	defer cancel()
	event := pass.Event(audit.KeyDelivered)
	event.Object = d.KeyID
	told, err := s.Store.Answered(ctx, d.KeyID, event)
	if err != nil {
		s.Gate.Log.Warn("a delivery is not counted", "key", d.KeyID, "org", d.Org, "error", err)
	}
	return told && err == nil
}
