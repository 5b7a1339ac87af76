package orgkey

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/gate"
	"github.com/orgkeys/orgkeys/internal/org"
)

// Time limits of the service's own work.
const (
	lockPatience    = 500 * time.Millisecond // for the quota lock, before going on without it
	cleanupDeadline = 5 * time.Second        // for cancelling a reservation, destroying a back end's key, or withdrawing a key
	sweepBatch      = 200                    // expired records a transaction
)

// Config holds the parts of a Service. Every field but Pool is required.
type Config struct {
	Store    Store
	Keystore Keystore
	Sealer   Sealer
	Opener   *Opener // with the same Sealer
	Locker   Locker
	Gate     gate.Gate
	Pool     Pool // nil: no keys are made ahead

	Backend         string        // the keystore's name in audit events
	Limit           int           // keys an organization may have
	Concurrency     int           // concurrent generations
	ReservationLife time.Duration // how long a reservation lasts after a crash; a generation times out after half of it
	AuditDeadline   time.Duration // how long a release waits for the audit sinks
}

// Service implements the use cases of organization keys. Each method asks the gate
// first, and leaves an audit event for every outcome.
type Service struct {
	gate      gate.Gate
	store     Store
	keystore  Keystore
	sealer    Sealer
	opener    *Opener
	locker    Locker
	pool      Pool
	admission *semaphore.Weighted
	waiting   atomic.Int64              // callers who wait for a key
	quiet     atomic.Pointer[time.Time] // when the last of them was served, by a clock that nobody sets; nil: none was yet

	backend         string
	limit           int
	reservationLife time.Duration
	auditDeadline   time.Duration

	mu        sync.Mutex
	postponed []withdrawn
}

// New returns a Service, or an error that names what is wrong with c.
func New(c Config) (*Service, error) {
	if c.Limit < 0 || c.Concurrency < 1 || c.ReservationLife < 2*time.Second || c.AuditDeadline <= 0 {
		return nil, fmt.Errorf("limit %d, concurrency %d, reservation life %s, audit deadline %s: out of range", c.Limit, c.Concurrency, c.ReservationLife, c.AuditDeadline)
	}
	return &Service{
		gate: c.Gate, store: c.Store, keystore: c.Keystore, sealer: c.Sealer, locker: c.Locker, pool: c.Pool,
		admission: semaphore.NewWeighted(int64(c.Concurrency)), opener: c.Opener,
		backend: c.Backend, limit: c.Limit, reservationLife: c.ReservationLife, auditDeadline: c.AuditDeadline,
	}, nil
}

// Admit counts a caller among the concurrent generations, for another use case that
// makes keys, or reports ErrOverloaded. leave ends that.
func (s *Service) Admit() (leave func(), err error) {
	if !s.admission.TryAcquire(1) {
		return nil, ErrOverloaded
	}
	served := s.Busy()
	return sync.OnceFunc(func() { s.admission.Release(1); served() }), nil
}

// Busy counts a caller who waits for a key, until served is called.
func (s *Service) Busy() (served func()) {
	s.waiting.Add(1)
	return func() {
		now := time.Now()
		s.quiet.Store(&now)
		s.waiting.Add(-1)
	}
}

// Idle is for how long nobody has waited for a key; 0 while somebody does.
func (s *Service) Idle() time.Duration {
	if s.waiting.Load() > 0 {
		return 0
	}
	quiet := s.quiet.Load()
	if quiet == nil {
		return math.MaxInt64
	}
	return time.Since(*quiet)
}

// List returns org's released keys, newest first. It fails closed: one record
// that does not decrypt for its organization and ID fails the whole list.
func (s *Service) List(ctx context.Context, call gate.Call, org org.ID) ([]Key, error) {
	return s.list(ctx, call, org, false)
}

// ListNodeKeys returns the released keys of org's nodes, likewise.
func (s *Service) ListNodeKeys(ctx context.Context, call gate.Call, org org.ID) ([]Key, error) {
	return s.list(ctx, call, org, true)
}

func (s *Service) list(ctx context.Context, call gate.Call, org org.ID, ofNodes bool) ([]Key, error) {
	pass, err := s.gate.Decide(ctx, call, authz.ListKeys, org, "")
	if err != nil {
		return nil, err
	}
	if ofNodes {
		pass.Detail = map[string]string{"scope": "node"}
	}
	keys, err := s.keys(ctx, org, ofNodes)
	if err != nil {
		return nil, s.gate.Failed(ctx, pass, audit.KeysListed, listFailure(ctx, err), err)
	}
	if err := s.gate.Record(ctx, pass.Event(audit.KeysListed)); err != nil {
		return nil, err
	}
	return keys, nil
}

func listFailure(ctx context.Context, err error) string {
	if errors.Is(err, ErrSealBroken) {
		return "seal_broken"
	}
	return gate.ReasonFor(ctx, "unavailable")
}

func (s *Service) keys(ctx context.Context, org org.ID, ofNodes bool) ([]Key, error) {
	read := s.store.Keys
	if ofNodes {
		read = s.store.NodeKeys
	}
	records, err := read(ctx, org)
	if err != nil {
		return nil, fmt.Errorf("reading keys: %w", err)
	}
	sealed := make([]SealedKey, len(records))
	for i, r := range records {
		sealed[i] = SealedKey{r.ID, r.Sealed}
	}
	opened, err := s.opener.Open(ctx, org, sealed)
	if err != nil {
		return nil, fmt.Errorf("decrypting keys: %w", err)
	}
	keys := make([]Key, len(records))
	for i, r := range records {
		public := opened[r.ID]
		keys[i] = Key{
			ID: r.ID, Org: org, Public: public, Fingerprint: public.Fingerprint(),
			Created: r.Created, Delivered: r.Delivered, DeliveredTo: r.DeliveredTo, Enrollment: r.Enrollment, OfNode: ofNodes, LastUsed: r.LastUsed, Nodes: r.Nodes,
		}
	}
	return keys, nil
}

// Delete ends org's key id for every request that begins after it returned.
func (s *Service) Delete(ctx context.Context, call gate.Call, org org.ID, id string) error {
	pass, err := s.gate.Decide(ctx, call, authz.DeleteKey, org, id)
	if err != nil {
		return err
	}
	ctx, cancel := gate.Outlive(ctx)
	defer cancel()
	err = s.store.DeleteKey(ctx, org, id, pass.Event(audit.KeyDeleted))
	return s.recordFailure(ctx, pass, err)
}

// recordFailure records that an allowed change failed, and returns why.
func (s *Service) recordFailure(ctx context.Context, pass gate.Pass, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrNotFound):
		return s.gate.Failed(ctx, pass, audit.RequestFailed, "not_found", err)
	default:
		return s.gate.Failed(ctx, pass, audit.RequestFailed, "unavailable", err)
	}
}

// DeleteAll ends all of org's keys, those of its nodes only withNodeKeys, cancels
// what is being generated, and returns how many released keys it ended.
func (s *Service) DeleteAll(ctx context.Context, call gate.Call, org org.ID, withNodeKeys bool) (Ended, error) {
	pass, err := s.gate.Decide(ctx, call, authz.DeleteAllKeys, org, "")
	if err != nil {
		return Ended{}, err
	}
	if withNodeKeys {
		pass.Detail = map[string]string{"scope": "all"}
	}
	ctx, cancel := gate.Outlive(ctx)
	defer cancel()
	n, err := s.store.DeleteKeys(ctx, org, withNodeKeys, pass.Event(audit.KeysDeleted), func(id string, released bool) audit.Event {
		event := pass.Event(audit.KeyDeleted)
		if !released {
			event.Type, event.Reason = audit.KeyWithdrawn, "cancelled"
		}
		event.Object = id
		return event
	}, func(enrollment string, unmade int) audit.Event {
		event := pass.Event(audit.EnrollmentRevoked)
		event.Object, event.Reason = enrollment, "all_keys_deleted"
		if unmade > 0 { // it is over already, and its places come back
			event.Type, event.Reason = audit.EnrollmentExpired, "not_made"
			event.Add(map[string]string{"places": strconv.Itoa(unmade)})
		}
		return event
	})
	return n, s.recordFailure(ctx, pass, err)
}

// Sweep ends expired reservations and pending records, and repeats postponed
// withdrawals, every interval until ctx ends. Several replicas may run it at once.
func (s *Service) Sweep(ctx context.Context, interval time.Duration) error {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		if err := errors.Join(s.withdrawPostponed(ctx), s.sweepOnce(ctx)); err != nil && ctx.Err() == nil {
			s.gate.Log.Warn("sweeping expired keys", "error", err)
		}
		select {
		case <-ctx.Done():
			ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupDeadline)
			defer cancel()
			if err := s.withdrawPostponed(ending); err != nil {
				s.gate.Log.Error("ending", "error", err)
			}
			return nil
		case <-ticker.C:
		}
	}
}

func (s *Service) sweepOnce(ctx context.Context) error {
	for {
		n, err := s.store.Sweep(ctx, sweepBatch, s.reservationLife, SweptEvent)
		if err != nil || n < sweepBatch {
			return err
		}
		s.gate.Log.Info("swept expired keys", "count", n)
	}
}

// SweptEvent says that a pending key expired before it was released.
func SweptEvent(org org.ID, id string) audit.Event {
	event := audit.New(audit.KeyWithdrawn, org)
	event.Actor = audit.Actor{Kind: audit.System, ID: "sweeper"}
	event.Object, event.Reason, event.Outcome = id, "expired", audit.Failure
	return event
}
