package enroll

import (
	"context"
	"crypto/hmac"
	"encoding/base64"
	"errors"
	"fmt"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/tpm"
)

// maxDevices is how many TPMs an organization can allow.
const maxDevices = 10_000

// Challenge is what a node's TPM has to answer before its claim counts.
type Challenge struct {
	tpm.Challenge
	MAC []byte
}

// judge decides whether the claim's key is one for the enrollment: made by the
// right side, strong, its private half with the asker, and in a TPM if it says so
// or has to be. It returns the challenge that has to be answered first.
func (s *Service) judge(ctx context.Context, pass *gate.Pass, p Permission, c *claim) (*Challenge, error) {
	challenge, err := s.judged(ctx, pass, p, c)
	switch {
	case err == nil:
		return challenge, nil
	case errors.Is(err, ErrOrigin):
		return nil, s.refused(ctx, *pass, "origin_not_allowed", err)
	case errors.Is(err, ErrDevice):
		s.Count(Devices)
		if p.TPM != "" { // which has left its event as a conflict, or was counted
			return nil, err
		}
		return nil, s.refused(ctx, *pass, "device_not_allowed", err)
	case errors.Is(err, ErrProof):
		return nil, s.refused(ctx, *pass, "bad_signature", err)
	case errors.As(err, new(*RecipientError)):
		return nil, s.refused(ctx, *pass, "recipient_unacceptable", err)
	default:
		return nil, s.Gate.Failed(ctx, *pass, audit.RequestFailed, gate.ReasonFor(ctx, "unavailable"), err)
	}
}

// refused records why somebody who has K gets nothing. It counts against their
// address as a bad signature does: whoever has a token, an old one too, could
// else write as much into the log as they like. One refusal too many leaves no
// event of its own, and the error is the one that says so.
func (s *Service) refused(ctx context.Context, pass gate.Pass, reason string, why error) error {
	leave, tooMany := s.Enter(ctx, pass.Call.Address)
	if tooMany == nil {
		tooMany = leave(false)
	}
	if tooMany != nil {
		return tooMany
	}
	return s.Gate.Failed(ctx, pass, audit.RequestFailed, reason, why)
}

func (s *Service) judged(ctx context.Context, pass *gate.Pass, p Permission, c *claim) (*Challenge, error) {
	if c.recipient.Origin != p.Origin {
		return nil, ErrOrigin
	}
	if err := c.recipient.Check(); err != nil {
		return nil, err
	}
	if p.Origin == FromNode && !orgkey.NewPublic(c.recipient.Public).Verifies(envelope.ClaimText(p.ID, c.recipient.ID), c.signature) {
		return nil, ErrProof
	}
	if c.tpm == nil {
		if p.TPM != "" {
			return nil, s.refuseDevice(ctx, *pass, p, c)
		}
		return nil, nil
	}
	return s.judgeTPM(ctx, pass, p, c)
}

func (s *Service) judgeTPM(ctx context.Context, pass *gate.Pass, p Permission, c *claim) (*Challenge, error) {
	use := tpm.Decrypting
	if p.Origin == FromNode {
		use = tpm.Speaking
	}
	key, err := tpm.ReadKey(c.tpm.public, use)
	if err != nil {
		return nil, &RecipientError{"in the TPM " + err.Error()}
	}
	// What is examined must be what is used.
	if !key.Public.Equal(c.recipient.Public) {
		return nil, &RecipientError{"is another key than the one in the TPM"}
	}
	ek := c.tpm.ek
	pass.Detail["ek"] = ek.ID
	if public := ek.RSA(); public != nil {
		if weak := weakness(public); weak != "" {
			return nil, &RecipientError{"is in a TPM whose endorsement key " + weak}
		}
	}
	evidence, err := s.allowed(ctx, p, ek)
	if err != nil {
		return nil, err
	}
	if evidence == "" {
		return nil, s.refuseDevice(ctx, *pass, p, c)
	}
	secret, err := s.challengeSecret(ctx, p, c.recipient.ID, ek.ID, key.Name)
	if err != nil {
		return nil, err
	}
	defer clear(secret)
	if c.tpm.proof == nil {
		challenge, err := ek.Challenge(key.Name, secret)
		if err != nil {
			return nil, &RecipientError{"is in a TPM whose endorsement key cannot be encrypted to"}
		}
		return &Challenge{Challenge: challenge}, nil
	}
	if !hmac.Equal(c.tpm.proof, envelope.ClaimMAC(secret, p.ID, c.recipient.ID)) {
		return nil, ErrProof
	}
	pass.Detail["evidence"] = string(evidence)
	c.recipient.Device = Device{ek.ID, evidence}
	return nil, nil
}

// allowed says why the TPM may have a key of the enrollment, or nothing.
func (s *Service) allowed(ctx context.Context, p Permission, ek tpm.EK) (Evidence, error) {
	if p.TPM != "" && p.TPM != AnyAllowedTPM {
		if p.TPM == ek.ID {
			return ByEnrollment, nil
		}
		return "", nil
	}
	_, err := s.Store.Device(ctx, p.Org, ek.ID)
	switch {
	case err == nil:
		return ByList, nil
	case !errors.Is(err, ErrDeviceNotFound):
		return "", fmt.Errorf("reading a device: %w", err)
	case ek.Certified(s.Roots, time.Now()) == nil:
		return ByCertificate, nil
	}
	return "", nil
}

// refuseDevice returns ErrDevice. Whoever has the token of an enrollment that is
// bound to another TPM is seen, as with another recipient.
func (s *Service) refuseDevice(ctx context.Context, pass gate.Pass, p Permission, c *claim) error {
	if p.TPM == "" {
		return ErrDevice
	}
	conflict := pass.Event(audit.EnrollmentConflict)
	conflict.Object, conflict.Outcome, conflict.Reason = p.ID, audit.Denied, "device"
	if err := s.Store.Conflict(ctx, p.ID, c.recipient.ID, conflict); err != nil {
		return fmt.Errorf("recording a conflict: %w", err)
	}
	s.Count(Conflicts)
	return ErrDevice
}

// challengeSecret is the secret of the challenge for a key in a TPM. It is the
// same whenever it is asked for, so that two boots at once do not invalidate each
// other's, and nothing has to be stored for whoever asks.
func (s *Service) challengeSecret(ctx context.Context, p Permission, recipient, ek string, name []byte) ([]byte, error) {
	if p.Challenge == nil { // minted by a version that knew no TPMs
		return nil, &RecipientError{"is in a TPM, and the enrollment was made before TPMs were known; make a new one"}
	}
	opened, err := s.Sealer.Open(ctx, []orgkey.Sealed{{Binding: challengeBinding(p.Org, p.ID), Ciphertext: p.Challenge}})
	if err != nil {
		return nil, fmt.Errorf("opening a secret of challenges: %w", err)
	}
	defer clear(opened[0])
	return envelope.ChallengeSecret(opened[0], p.ID, recipient, ek, name), nil
}

// storeOwn commits the public half of a key that its holder made. signature is
// theirs, and evidence that they have the private half: whoever reads the log checks it, so
// it is checked here, too, however the delivery got this far.
func (s *Service) storeOwn(ctx context.Context, pass gate.Pass, d Delivery, signature []byte) (Delivery, error) {
	recipient, err := recipientOf(d)
	if err != nil {
		return d, err
	}
	text := envelope.ClaimText(d.Enrollment, d.Recipient)
	if d.Enrollment == "" {
		text = envelope.OwnKeyText(string(d.Org), d.Recipient)
	}
	if !orgkey.NewPublic(recipient).Verifies(text, signature) {
		return d, fmt.Errorf("storing key %s: %w", d.KeyID, ErrProof)
	}
	record, err := s.Sealer.Seal(ctx, orgkey.PublicKeyOf(d.Org, d.KeyID), d.DER)
	if err != nil {
		return d, backEnd("sealing", d, err)
	}
	fingerprint := orgkey.NewPublic(recipient).Fingerprint()
	created := pass.Event(audit.KeyCreated)
	created.Object = d.KeyID
	created.Detail = map[string]string{
		"fingerprint": fingerprint, "backend": string(FromNode), "algorithm": orgkey.Algorithm, "scope": string(d.Scope),
		"recipient": d.Recipient, "signature": base64.StdEncoding.EncodeToString(signature),
	}
	d.describe(created.Detail)
	storing, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupDeadline)
	defer cancel()
	stored, err := s.Store.StoreOwn(storing, d.KeyID, record, fingerprint, created)
	if errors.Is(err, ErrNotFound) { // another request for it failed meanwhile, and gave its place back
		return d, ErrPending
	}
	if err != nil {
		return d, fmt.Errorf("storing key %s: %w", d.KeyID, err)
	}
	stored.Made = stored.Event == created.ID
	return stored, nil
}

// Add makes a key that the caller made one of org's, and has deliver say so. The
// same key again is the same one.
func (s *Service) Add(ctx context.Context, call gate.Call, org org.ID, body []byte, deliver func(Answer) error) error {
	pass, err := s.Gate.Decide(ctx, call, authz.AddKey, org, "")
	if err != nil {
		return err
	}
	key, signature, err := parseAdded(body)
	if err == nil {
		err = key.Check()
	}
	if err != nil {
		return s.Gate.Failed(ctx, pass, audit.KeyRefused, "recipient_unacceptable", err)
	}
	if !orgkey.NewPublic(key.Public).Verifies(envelope.OwnKeyText(string(org), key.ID), signature) {
		return s.Gate.Failed(ctx, pass, audit.KeyRefused, "bad_signature", ErrProof)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.AttemptLife/2)
	defer cancel()
	d, err := s.claimOwn(ctx, pass, key)
	if err != nil {
		return err
	}
	return over(s.serve(ctx, pass, d, nil, signature, deliver))
}

// AllowDevice lets keys of org be in the TPM whose endorsement key has that ID.
func (s *Service) AllowDevice(ctx context.Context, call gate.Call, org org.ID, ek string, body []byte) (AllowedDevice, error) {
	pass, err := s.Gate.Decide(ctx, call, authz.AllowDevice, org, ek)
	if err != nil {
		return AllowedDevice{}, err
	}
	note, err := parseNote(body)
	if err == nil && !tpm.IsEK(ek) {
		err = &InputError{Field: "ek", Problem: `is not "sha256-" and 64 lower-case hex digits`}
	}
	if err != nil {
		return AllowedDevice{}, s.Gate.Failed(ctx, pass, audit.RequestFailed, "invalid", err)
	}
	ctx, cancel := gate.Outlive(ctx)
	defer cancel()
	device, err := s.Store.AllowDevice(ctx, org, ek, note, maxDevices, pass.Event(audit.DeviceAllowed))
	if err != nil {
		return AllowedDevice{}, s.failure(ctx, pass, err)
	}
	return device, nil
}

// ListDevices returns the TPMs that org allows, newest first.
func (s *Service) ListDevices(ctx context.Context, call gate.Call, org org.ID) ([]AllowedDevice, error) {
	pass, err := s.Gate.Decide(ctx, call, authz.ListDevices, org, "")
	if err != nil {
		return nil, err
	}
	all, err := s.Store.Devices(ctx, org)
	if err != nil {
		return nil, s.failure(ctx, pass, fmt.Errorf("reading devices: %w", err))
	}
	return all, s.Gate.Record(ctx, pass.Event(audit.DevicesListed))
}

// GetDevice returns one of them.
func (s *Service) GetDevice(ctx context.Context, call gate.Call, org org.ID, ek string) (AllowedDevice, error) {
	pass, err := s.Gate.Decide(ctx, call, authz.ListDevices, org, ek)
	if err != nil {
		return AllowedDevice{}, err
	}
	if !tpm.IsEK(ek) { // such a device cannot exist
		return AllowedDevice{}, s.failure(ctx, pass, ErrDeviceNotFound)
	}
	device, err := s.Store.Device(ctx, org, ek)
	if err != nil {
		return AllowedDevice{}, s.failure(ctx, pass, err)
	}
	return device, s.Gate.Record(ctx, pass.Event(audit.DevicesListed))
}

// RemoveDevice ends org's permission for a TPM. The keys in it stay.
func (s *Service) RemoveDevice(ctx context.Context, call gate.Call, org org.ID, ek string) error {
	pass, err := s.Gate.Decide(ctx, call, authz.RemoveDevice, org, ek)
	if err != nil {
		return err
	}
	if !tpm.IsEK(ek) { // such a device cannot exist
		return s.failure(ctx, pass, ErrDeviceNotFound)
	}
	ctx, cancel := gate.Outlive(ctx)
	defer cancel()
	if err := s.Store.RemoveDevice(ctx, org, ek, pass.Event(audit.DeviceRemoved)); err != nil {
		return s.failure(ctx, pass, err)
	}
	return nil
}
