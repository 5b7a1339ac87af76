package enroll

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

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
	d, err := s.claimOwn(ctx, pass, recipient)
	if err != nil {
		return err
	}
	return over(s.serve(ctx, pass, d, nil, nil, deliver))
}

// claimOwn takes a place for an administrator's own delivery, or records why there is none.
// One that may have been taken although the answer of its commit was lost is given back.
func (s *Service) claimOwn(ctx context.Context, pass gate.Pass, recipient Recipient) (Delivery, error) {
	asked := Delivery{KeyID: uuid.NewString(), Org: pass.Org}
	d, err := s.Store.ClaimOwn(ctx, pass.Org, asked.KeyID, recipient, s.Limit, s.DeliverFor)
	if err == nil {
		return d, nil
	}
	reason := gate.ReasonFor(ctx, "unavailable")
	switch {
	case errors.As(err, new(*orgkey.QuotaError)):
		reason = "quota"
	case errors.Is(err, ErrInUse):
		reason = "recipient_unacceptable"
	default:
		if s.giveBack(ctx, pass, asked, reason) {
			return Delivery{}, err
		}
	}
	return Delivery{}, s.Gate.Failed(ctx, pass, audit.KeyRefused, reason, err)
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
	return over(s.serve(ctx, pass, d, nil, nil, deliver))
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
		return over(s.failure(ctx, pass, err))
	}
	return over(s.receive(ctx, pass, d, r))
}

// own is an administrator's own delivery of a sealed key, or ErrNotFound: a key that its
// holder made is nothing to fetch, and only Add, which checks their signature, goes on with it.
func (s *Service) own(ctx context.Context, org org.ID, keyID string) (Delivery, error) {
	d, err := s.Store.Delivery(ctx, keyID)
	if err == nil && (d.Org != org || d.Enrollment != "" || d.Origin != FromBackend) {
		err = ErrNotFound
	}
	return d, err
}

// over says of ErrClosed that it is about an administrator's own key.
func over(err error) error {
	if errors.Is(err, ErrClosed) {
		return fmt.Errorf("%w: %w", ErrOver, err)
	}
	return err
}
