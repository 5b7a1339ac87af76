package enroll

import (
	"context"
	"crypto/hmac"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/gate"
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
	var attempt Attempt
	if s.Pool == nil { // which begins one with a key of its own
		attempt = Attempt{uuid.NewString(), s.AttemptLife}
	}
	d, err := s.Store.Claim(ctx, id, recipient, pass.Call.Address, s.DeliverFor, attempt, func(keyID string) audit.Event {
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
		if d.Begun { // although the answer was lost, perhaps
			s.giveUp(ctx, d.KeyID, d.Attempt)
		}
		return d, s.Gate.Failed(ctx, pass, audit.RequestFailed, gate.ReasonFor(ctx, "unavailable"), err)
	}
}
