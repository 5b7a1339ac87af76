package keypool_test

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/hsm"
	"github.com/orgkeys/orgkeys/internal/keypool"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// named has the token's keys by name, as Vault has, and seals with the token's key, which
// counts as an old one once it is rotated.
type named struct {
	*hsm.Token
	rotated atomic.Bool
	mu      sync.Mutex
	keys    map[string]orgkey.HeldKey
}

func (n *named) Credentials() string { return "those in use" }

func (n *named) CreateAhead(ctx context.Context, _ orgkey.Use, name string) (orgkey.Public, error) {
	k, err := n.Token.CreateAhead(ctx, name)
	if err != nil {
		return orgkey.Public{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.keys[name] = k
	return k.Public(), nil
}

func (n *named) key(name string) orgkey.HeldKey {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.keys[name]
}

func (n *named) TakenPlain(name string, _ orgkey.Public) orgkey.BackendKey   { return n.key(name) }
func (n *named) TakenSealed(name string, _ orgkey.Public) orgkey.SealableKey { return n.key(name) }

func (n *named) Discard(ctx context.Context, _ orgkey.Use, name string) error {
	k := n.key(name)
	n.mu.Lock()
	delete(n.keys, name)
	n.mu.Unlock()
	if k == nil {
		return nil
	}
	return k.Destroy(ctx)
}

func (n *named) Newest(context.Context) (func([]byte) bool, error) {
	newest := !n.rotated.Load()
	return func([]byte) bool { return newest }, nil
}

// shared is a pool on a real token and a real database, in which the test puts keys: somebody
// always waits for one, so that it is never filled.
type shared struct {
	*keypool.Shared
	db      *sqlstore.DB
	backend *named
}

func newShared(t *testing.T) shared {
	t.Helper()
	db, err := sqlstore.Open(t.Context(), filepath.Join(t.TempDir(), "orgkeys.db"))
	if err == nil {
		err = db.Migrate(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	backend := &named{Token: token, keys: map[string]orgkey.HeldKey{}}
	return shared{keypool.NewShared(keypool.Config{
		Size: 2, Exclusive: db.Exclusive, Backend: "test", Log: slog.New(slog.DiscardHandler),
		Idle:   func() time.Duration { return 0 },
		Sinks:  func() error { return nil },
		Record: func(context.Context, ...audit.Event) error { return nil },
	}, db, backend, backend), db, backend}
}

// put makes a key and puts it into the pool.
func (s shared) put(t *testing.T, made time.Time, credentials string) string {
	t.Helper()
	id := uuid.NewString()
	public, err := s.backend.CreateAhead(t.Context(), orgkey.UsePlain, id)
	if err != nil {
		t.Fatal(err)
	}
	der, err := public.DER()
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(map[string]any{"public": der, "made": made, "credentials": credentials})
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := s.backend.Seal(t.Context(), orgkey.AheadOf(orgkey.UsePlain, id), text)
	if err != nil {
		t.Fatal(err)
	}
	added, err := s.db.AddAhead(t.Context(), orgkey.UsePlain, id, 100, time.Minute)
	if err := errors.Join(err, s.db.FillAhead(t.Context(), id, sealed, orgkey.MaxAge)); err != nil || !added {
		t.Fatal(added, err)
	}
	return id
}

// A taker finds for itself that a key must not be used. Another replica's clock is no
// reason, for the database's decides.
func TestATakerRefusesAPoolKeyThatMustGo(t *testing.T) {
	for what, c := range map[string]struct {
		made        time.Duration // from now
		credentials string
		rotated     bool
		good        bool
	}{
		"as it should be":                  {0, "those in use", false, true},
		"made by a clock that is ahead":    {30 * time.Minute, "those in use", false, true},
		"made by a clock that is behind":   {-orgkey.MaxAge - 30*time.Minute, "those in use", false, true},
		"its time is altered":              {-orgkey.MaxAge - 2*time.Hour, "those in use", false, false},
		"its credentials are not in use":   {0, "revoked ones", false, false},
		"its record is under an older key": {0, "those in use", true, false},
	} {
		t.Run(what, func(t *testing.T) {
			s := newShared(t)
			id := s.put(t, time.Now().Add(c.made), c.credentials)
			s.backend.rotated.Store(c.rotated)
			taken, err := s.Reserve(t.Context(), org.ID("acme"), uuid.NewString(), 1, time.Minute)
			if err != nil || taken == nil || taken.ID != id {
				t.Fatal(taken, err)
			}
			key, _, err := taken.Open(t.Context())
			if (err == nil) != c.good {
				t.Errorf("opening it: %v", err)
			}
			if err == nil {
				if err := key.Destroy(t.Context()); err != nil {
					t.Error(err)
				}
			} else if s.backend.key(id) != nil {
				t.Error("it was refused, and is in the back end")
			}
			if n := s.Opened(); n != 0 {
				t.Errorf("%d rows are remembered that are gone", n)
			}
		})
	}
}

// What a taker has heard counts for the next ones, and no longer than for a moment: a key out of
// the pool that somebody may have is not handed out long after the rotation that is to end it.
func TestATakerSoonNoticesARotation(t *testing.T) {
	t.Parallel()
	s := newShared(t)
	for i, good := range []bool{true, false} {
		id := s.put(t, time.Now(), "those in use")
		taken, err := s.Reserve(t.Context(), org.ID("acme"), uuid.NewString(), 2, time.Minute)
		if err != nil || taken == nil {
			t.Fatal(taken, err)
		}
		key, _, err := taken.Open(t.Context())
		if (err == nil) != good {
			t.Errorf("key %d: %v", i, err)
		}
		if err == nil {
			if err := key.Destroy(t.Context()); err != nil {
				t.Error(err)
			}
		} else if s.backend.key(id) != nil {
			t.Error("it was refused, and is in the back end")
		}
		s.backend.rotated.Store(true)
		time.Sleep(1100 * time.Millisecond)
	}
}

// What must go goes also while keys are wanted all the time, when the pool is not filled.
func TestWhatMustGoIsDestroyedWhileKeysAreWanted(t *testing.T) {
	t.Parallel()
	s := newShared(t)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	time.Sleep(1500 * time.Millisecond) // by now the pool waits to be filled
	id := s.put(t, time.Now(), "revoked ones")
	deadline := time.Now().Add(time.Minute)
	for s.backend.key(id) != nil && time.Now().Before(deadline) {
		time.Sleep(50 * time.Millisecond)
	}
	if s.backend.key(id) != nil {
		t.Error("a key of revoked credentials is in the back end")
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
