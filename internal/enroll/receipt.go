package enroll

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// Receive takes a node's receipt for the key of enrollment id. The same receipt
// again changes nothing. For a key that is gone, or that nobody can have yet, there is
// nothing to check a signature with: such a receipt is one of an unknown enrollment, to
// its genuine holder too.
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
	if errors.Is(err, ErrClosed) {
		err = ErrUnknown
	}
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
	if errors.Is(err, ErrUnchanged) {
		if d.Enrollment == "" {
			return s.repeated(ctx, pass)
		}
		return nil
	}
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
