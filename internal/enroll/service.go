package enroll

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/envelope"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/tpm"
)

const (
	shortestLife    = time.Minute // of an enrollment
	longestLife     = 30 * 24 * time.Hour
	usualLife       = 24 * time.Hour
	listed          = 1000                  // enrollments in a list, the newest
	cleanupDeadline = 5 * time.Second       // for giving up an attempt, or destroying a back end's key
	refusalTime     = 50 * time.Millisecond // the least that a refusal takes, so that its time says nothing
	sweepBatch      = 200
)

// Config is what a Service is made of. Every field but Roots is required.
type Config struct {
	Store    Store
	Keystore orgkey.SealedKeystore
	Sealer   orgkey.Sealer
	Opener   *orgkey.Opener
	Gate     gate.Gate
	Pool     Pool // nil: no keys are made ahead
	// Admit takes a place among the generations under way, or reports orgkey.ErrOverloaded.
	Admit func() (leave func(), err error)
	// Busy counts a caller who waits for a key, until served is called.
	Busy func() (served func())
	// Enter takes one of the places for verifying requests of unknown callers. leave
	// gives it back, reports whether the caller was verified, and returns the error
	// for an address that failed too often.
	Enter func(ctx context.Context, address string) (leave func(known bool) error, err error)
	// Count counts what became of an enrollment or delivery, for metrics.
	Count func(Outcome)

	Origin        string        // the audit log's
	Roots         tpm.Roots     // whose certificates of endorsement keys are believed; zero: nobody's
	Backend       string        // the keystore's name in audit events
	Limit         int           // organization keys an organization may have
	NodeLimit     int           // node keys an organization may have
	AttemptLife   time.Duration // how long a crash may hold a delivery; a generation has half of it
	AuditDeadline time.Duration // how long a release waits for the audit sinks
	DeliverFor    time.Duration // how long a sealed key waits for its receipt
}

// Pool has keys that were made ahead. Its implementations are keypool.Shared and
// keypool.Local.
type Pool interface {
	// Begin does what Store.Begin does. If there is a key in the pool, the same
	// transaction takes it; its ID is the attempt's name then, also of one that may have
	// been taken where the answer was lost.
	Begin(ctx context.Context, keyID, attempt string, life time.Duration) (mine bool, _ *orgkey.Taken[orgkey.SealableKey], err error)
}

// Outcome is what became of an enrollment or a delivery.
type Outcome string

// The outcomes that are counted.
const (
	Challenges  Outcome = "challenged" // a TPM was asked for its proof
	Devices     Outcome = "device_refused"
	Permissions Outcome = "minted"
	Claims      Outcome = "claimed"
	Conflicts   Outcome = "conflict" // another recipient than the one that has it, or may have it
	Receipts    Outcome = "received"
	Expirations Outcome = "expired"   // enrollments with uses that nobody claimed, or whose key was never made
	Withdrawals Outcome = "withdrawn" // sealed keys that nobody received in time
	Failures    Outcome = "failed"    // a key could not be made or handed out now; asking again may help
)

// Outcomes are all of them.
func Outcomes() []Outcome {
	return []Outcome{Challenges, Devices, Permissions, Claims, Conflicts, Receipts, Expirations, Withdrawals, Failures}
}

// Service is the use cases of enrollment. Each method leaves an audit event
// whatever the outcome, once the caller is known.
type Service struct{ Config }

// New returns a Service, or an error that says what is wrong with c.
func New(c Config) (*Service, error) {
	if c.Limit < 0 || c.NodeLimit < 0 || c.AttemptLife < 2*time.Second || c.AuditDeadline <= 0 || c.DeliverFor < time.Minute {
		return nil, fmt.Errorf("limits %d and %d, attempt life %s, audit deadline %s, delivery %s: out of range",
			c.Limit, c.NodeLimit, c.AttemptLife, c.AuditDeadline, c.DeliverFor)
	}
	return &Service{c}, nil
}

// Minted is a new enrollment with its token, which is shown once.
type Minted struct {
	Enrollment
	Token []byte // its text; cleared when the caller's deliver returns
}

// Create mints an enrollment. deliver writes it out with its token; when that
// fails the enrollment stays, is listed, and gives its places back at its expiry.
func (s *Service) Create(ctx context.Context, call gate.Call, org org.ID, body []byte, deliver func(Minted) error) error {
	pass, err := s.Gate.Decide(ctx, call, authz.CreateEnrollment, org, "")
	if err != nil {
		return err
	}
	t, err := parseTerms(body)
	if err != nil {
		return s.Gate.Failed(ctx, pass, audit.RequestFailed, "invalid", err)
	}
	token := envelope.Token{ID: uuid.NewString(), K: make([]byte, envelope.TokenSecretSize)}
	rand.Read(token.K) // never fails, crypto/rand
	defer clear(token.K)
	e, err := s.mint(ctx, pass, t, token)
	if err != nil {
		return s.failure(ctx, pass, err)
	}
	s.Count(Permissions)
	text := token.AppendText(make([]byte, 0, 128))
	defer clear(text)
	return deliver(Minted{e, text})
}

func (s *Service) mint(ctx context.Context, pass gate.Pass, t terms, token envelope.Token) (Enrollment, error) {
	challenge := make([]byte, tpm.SecretSize)
	rand.Read(challenge) // never fails, crypto/rand
	defer clear(challenge)
	sealed, err := s.Sealer.SealAll(ctx, []orgkey.Unsealed{
		{Binding: tokenBinding(pass.Org, token.ID), Plaintext: token.K}, {Binding: challengeBinding(pass.Org, token.ID), Plaintext: challenge},
	})
	if err != nil {
		return Enrollment{}, fmt.Errorf("sealing a token and its secret of challenges: %w", err)
	}
	p := Permission{K: sealed[0], Challenge: sealed[1], Enrollment: Enrollment{
		ID: token.ID, Org: pass.Org, Scope: t.scope, Uses: t.uses, Recipient: t.recipient, Origin: t.origin, TPM: t.tpm,
		Approval: t.approval, Address: t.address, Note: t.note,
	}}
	limit := s.NodeLimit
	if t.scope == ForOrganization {
		limit = s.Limit
	}
	keys := make([]string, t.uses)
	for i := range keys {
		keys[i] = uuid.NewString()
	}
	event := pass.Event(audit.EnrollmentCreated)
	event.Object = token.ID
	event.Detail = t.detail()
	storing, cancel := gate.Outlive(ctx)
	defer cancel()
	e, err := s.Store.CreateEnrollment(storing, p, t.life, keys, limit, event)
	if err != nil && !errors.As(err, new(*orgkey.QuotaError)) {
		s.unmint(ctx, pass, token.ID)
	}
	return e, err
}

// unmint ends an enrollment that may exist although the answer of its commit was lost:
// nobody has its token.
func (s *Service) unmint(ctx context.Context, pass gate.Pass, id string) {
	ctx, cancel := gate.Outlive(ctx)
	defer cancel()
	event := pass.Event(audit.EnrollmentRevoked)
	event.Object, event.Reason = id, "not_answered"
	// Without a claim there is no key to withdraw.
	err := s.Store.Revoke(ctx, pass.Org, id, event, func(string) audit.Event { return event })
	if err != nil && !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrUnchanged) {
		s.Gate.Log.Warn("an enrollment may exist that nobody has the token of; its places come back at its expiry", "enrollment", id, "error", err)
	}
}

// repeated records a request for what was so already, which is answered as the first one was.
func (s *Service) repeated(ctx context.Context, pass gate.Pass) error {
	return s.Gate.Record(ctx, pass.Event(audit.RequestRepeated))
}

// failure records why an administrator's request came to nothing, or had nothing left to do.
func (s *Service) failure(ctx context.Context, pass gate.Pass, err error) error {
	if errors.Is(err, ErrUnchanged) {
		return s.repeated(ctx, pass)
	}
	reason := gate.ReasonFor(ctx, "unavailable")
	switch {
	case errors.As(err, new(*orgkey.QuotaError)):
		reason = "quota"
	case errors.Is(err, ErrNotFound), errors.Is(err, ErrDeviceNotFound):
		reason = "not_found"
	case errors.Is(err, ErrTooManyDevices):
		reason = "too_many"
	case errors.Is(err, ErrSignature):
		reason = "bad_signature"
	case errors.Is(err, ErrClosed):
		reason = "enrollment_closed"
	}
	return s.Gate.Failed(ctx, pass, audit.RequestFailed, reason, err)
}

// List returns org's enrollments, newest first, with the newest claims of them all.
func (s *Service) List(ctx context.Context, call gate.Call, org org.ID) ([]Enrollment, error) {
	pass, err := s.Gate.Decide(ctx, call, authz.ListEnrollments, org, "")
	if err != nil {
		return nil, err
	}
	all, err := s.Store.Enrollments(ctx, org, listed)
	if err != nil {
		return nil, s.failure(ctx, pass, fmt.Errorf("reading enrollments: %w", err))
	}
	return all, s.Gate.Record(ctx, pass.Event(audit.EnrollmentsListed))
}

// Get returns one of org's enrollments.
func (s *Service) Get(ctx context.Context, call gate.Call, org org.ID, id string) (Enrollment, error) {
	pass, err := s.Gate.Decide(ctx, call, authz.ListEnrollments, org, id)
	if err != nil {
		return Enrollment{}, err
	}
	e, err := s.Store.Enrollment(ctx, org, id)
	if err != nil {
		return Enrollment{}, s.failure(ctx, pass, fmt.Errorf("reading an enrollment: %w", err))
	}
	return e, s.Gate.Record(ctx, pass.Event(audit.EnrollmentsListed))
}

// Approve lets the claim of recipient, which body names, go on.
func (s *Service) Approve(ctx context.Context, call gate.Call, org org.ID, id string, body []byte) error {
	pass, err := s.Gate.Decide(ctx, call, authz.ApproveEnrollment, org, id)
	if err != nil {
		return err
	}
	recipient, err := parseApproval(body)
	if err != nil {
		return s.Gate.Failed(ctx, pass, audit.RequestFailed, "invalid", err)
	}
	event := pass.Event(audit.EnrollmentApproved)
	event.Detail = map[string]string{"recipient": recipient}
	ctx, cancel := gate.Outlive(ctx)
	defer cancel()
	if err := s.Store.Approve(ctx, org, id, recipient, s.DeliverFor, event); err != nil {
		pass.Detail = event.Detail
		return s.failure(ctx, pass, err)
	}
	return nil
}

// Revoke ends an enrollment, and withdraws what it sealed and nobody received.
func (s *Service) Revoke(ctx context.Context, call gate.Call, org org.ID, id string) error {
	pass, err := s.Gate.Decide(ctx, call, authz.RevokeEnrollment, org, id)
	if err != nil {
		return err
	}
	ctx, cancel := gate.Outlive(ctx)
	defer cancel()
	err = s.Store.Revoke(ctx, org, id, pass.Event(audit.EnrollmentRevoked), func(keyID string) audit.Event {
		event := pass.Event(audit.KeyWithdrawn)
		event.Object, event.Reason, event.Outcome = keyID, "enrollment_revoked", audit.Failure
		return event
	})
	if err != nil {
		return s.failure(ctx, pass, err)
	}
	return nil
}

// Sweep ends what is past its time, every interval until ctx ends. Several
// replicas may do so at once.
func (s *Service) Sweep(ctx context.Context, interval time.Duration) error {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		if err := s.sweepOnce(ctx); err != nil && ctx.Err() == nil {
			s.Gate.Log.Warn("sweeping enrollments", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

func (s *Service) sweepOnce(ctx context.Context) error {
	return errors.Join(untilFew(ctx, s.sweepDeliveries), untilFew(ctx, s.sweepEnrollments))
}

// untilFew repeats a sweep until it finds less than a batch, or fails.
func untilFew(ctx context.Context, sweep func(context.Context) (int, error)) error {
	for {
		n, err := sweep(ctx)
		if err != nil || n < sweepBatch {
			return err
		}
	}
}

func (s *Service) sweepDeliveries(ctx context.Context) (int, error) {
	ended, back := map[string]bool{}, map[string]bool{} // a transaction that is aborted asks for its events again
	n, err := s.Store.SweepDeliveries(ctx, sweepBatch, func(org org.ID, keyID string) audit.Event {
		ended[keyID] = true
		return keyNotReceived(org, keyID)
	}, keyUsed, func(org org.ID, id string, places int) audit.Event {
		back[id] = true
		return placesBack(org, id, "not_made", places) // the rest of the enrollment may be open still
	})
	if err != nil {
		return 0, fmt.Errorf("ending late deliveries: %w", err)
	}
	for range ended {
		s.Count(Withdrawals)
	}
	for range back {
		s.Count(Expirations)
	}
	return n, nil
}

// sweepEnrollments ends each by itself, so that one that cannot be ended holds up no other.
func (s *Service) sweepEnrollments(ctx context.Context) (int, error) {
	expired, err := s.Store.ExpiredEnrollments(ctx, sweepBatch)
	if err != nil {
		return 0, fmt.Errorf("reading expired enrollments: %w", err)
	}
	var errs []error
	for _, id := range expired {
		places, err := s.Store.EndExpired(ctx, id, func(org org.ID, places int) audit.Event { return placesBack(org, id, "expired", places) })
		if err != nil {
			errs = append(errs, fmt.Errorf("ending enrollment %s: %w", id, err))
			continue
		}
		if places > 0 {
			s.Count(Expirations)
		}
	}
	return len(expired), errors.Join(errs...)
}

func sweeperEvent(t audit.Type, org org.ID, object, reason string, outcome audit.Outcome) audit.Event {
	event := audit.New(t, org)
	event.Actor = audit.Actor{Kind: audit.System, ID: "sweeper"}
	event.Object, event.Reason, event.Outcome = object, reason, outcome
	return event
}

func placesBack(org org.ID, enrollment, reason string, places int) audit.Event {
	event := sweeperEvent(audit.EnrollmentExpired, org, enrollment, reason, audit.Success)
	event.Detail = map[string]string{"places": strconv.Itoa(places)}
	return event
}

func keyNotReceived(org org.ID, keyID string) audit.Event {
	return sweeperEvent(audit.KeyWithdrawn, org, keyID, "not_received", audit.Failure)
}

func keyUsed(org org.ID, keyID string) audit.Event {
	return sweeperEvent(audit.KeyReceived, org, keyID, "used", audit.Success)
}

func tokenBinding(org org.ID, id string) orgkey.Binding {
	return orgkey.Binding{Purpose: orgkey.EnrollmentToken, Org: string(org), ID: id}
}

func challengeBinding(org org.ID, id string) orgkey.Binding {
	return orgkey.Binding{Purpose: orgkey.ChallengeSecret, Org: string(org), ID: id}
}

// wrappedBinding binds wrapped bytes to key and recipient as well.
func wrappedBinding(d Delivery) orgkey.Binding {
	return orgkey.Binding{Purpose: orgkey.WrappedKey, Org: string(d.Org), ID: d.KeyID + "/" + d.Recipient}
}

// terms is what an administrator asks for, checked.
type terms struct {
	scope     Scope
	uses      int
	life      time.Duration
	origin    KeyOrigin
	tpm       string
	recipient string
	approval  bool
	address   netip.Addr
	note      string
}
