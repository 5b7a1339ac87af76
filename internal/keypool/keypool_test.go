package keypool_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/hsm"
	"github.com/orgkeys/orgkeys/internal/hsm/tokentest"
	"github.com/orgkeys/orgkeys/internal/keypool"
	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// token is a SoftHSM token: one per process.
var token *hsm.Token

func TestMain(m *testing.M) { os.Exit(tokentest.Run(&token, m.Run)) }

// counted counts the generations of the pool, and what runs beside them.
type counted struct {
	keypool.Maker
	made, under, most atomic.Int64
}

func (c *counted) CreateAhead(ctx context.Context, name string) (orgkey.HeldKey, error) {
	if n := c.under.Add(1); n > c.most.Load() {
		c.most.Store(n)
	}
	defer c.under.Add(-1)
	c.made.Add(1)
	return c.Maker.CreateAhead(ctx, name)
}

// fixture is a pool of this process, on a real token and a real database.
type fixture struct {
	*keypool.Local
	maker *counted
	busy  atomic.Bool // somebody waits for a key
	sinks atomic.Bool // the sinks fail

	stop   func()
	events []audit.Event // after stop
}

func newFixture(t *testing.T, size int, before func(*fixture)) *fixture {
	t.Helper()
	db, err := sqlstore.Open(t.Context(), filepath.Join(t.TempDir(), "orgkeys.db"))
	if err == nil {
		err = db.Migrate(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{maker: &counted{Maker: token}}
	if before != nil {
		before(f)
	}
	f.Local = keypool.NewLocal(keypool.Config{
		Size: size, Exclusive: db.Exclusive, Backend: "pkcs11", Log: slog.New(slog.DiscardHandler),
		Idle: func() time.Duration {
			if f.busy.Load() {
				return 0
			}
			return time.Hour
		},
		Sinks: func() error {
			if f.sinks.Load() {
				return errors.New("the sink refuses")
			}
			return nil
		},
		Record: func(_ context.Context, events ...audit.Event) error {
			f.events = append(f.events, events...)
			return nil
		},
	}, db, f.maker)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- f.Run(ctx) }()
	f.stop = sync.OnceFunc(func() {
		cancel()
		if err := errors.Join(<-ended, db.Close()); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(f.stop)
	return f
}

// await waits until the pool has made n keys, and for a while longer makes no more.
func (f *fixture) await(t *testing.T, n int64) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for f.maker.made.Load() < n || f.maker.under.Load() > 0 {
		if time.Now().After(deadline) {
			t.Fatalf("%d keys were made ahead, want %d", f.maker.made.Load(), n)
		}
		time.Sleep(5 * time.Millisecond)
	}
	time.Sleep(200 * time.Millisecond)
	if got := f.maker.made.Load(); got != n {
		t.Fatalf("%d keys were made ahead, want %d", got, n)
	}
}

func (f *fixture) take(t *testing.T) *orgkey.Taken[orgkey.BackendKey] {
	t.Helper()
	taken, err := f.Reserve(t.Context(), org.ID("org-"+uuid.NewString()), uuid.NewString(), 1, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	return taken
}

// use takes what a taker does with a key.
func use(ctx context.Context, taken *orgkey.Taken[orgkey.BackendKey]) (string, error) {
	key, made, err := taken.Open(ctx)
	if err != nil {
		return "", err
	}
	if age := time.Since(made); age < 0 || age > time.Hour {
		err = fmt.Errorf("it was made %s ago", age)
	}
	der, exportErr := key.Export(ctx)
	clear(der)
	return key.Public().Fingerprint(), errors.Join(err, exportErr, key.Destroy(ctx))
}

func TestThePoolIsFilledOneKeyAtATime(t *testing.T) {
	f := newFixture(t, 3, nil)
	f.await(t, 3)
	if n := f.maker.most.Load(); n != 1 {
		t.Errorf("%d keys were made at once", n)
	}
	taken := f.take(t)
	if taken == nil {
		t.Fatal("a full pool gave no key")
	}
	if _, err := use(t.Context(), taken); err != nil {
		t.Error(err)
	}
	f.await(t, 4)
	f.stop()
	if len(f.events) != 1 || f.events[0].Type != audit.PoolFilled || f.events[0].Org != "" ||
		f.events[0].Detail["made"] != "4" || f.events[0].Detail["ready"] != "3" || f.events[0].Detail["destroyed"] != "0" {
		t.Errorf("the events are %+v", f.events)
	}
}

func TestEachTakerGetsAnotherKey(t *testing.T) {
	f := newFixture(t, 4, nil)
	f.await(t, 4)
	f.busy.Store(true)
	var all sync.WaitGroup
	var mu sync.Mutex
	seen := map[string]bool{}
	for range 12 {
		all.Go(func() {
			taken, err := f.Reserve(t.Context(), org.ID("org-"+uuid.NewString()), uuid.NewString(), 1, time.Minute)
			if err != nil || taken == nil {
				return
			}
			fingerprint, err := use(t.Context(), taken)
			mu.Lock()
			defer mu.Unlock()
			if err != nil || seen[fingerprint] {
				t.Errorf("taking a key: %v, taken before: %t", err, seen[fingerprint])
			}
			seen[fingerprint] = true
		})
	}
	all.Wait()
	if len(seen) != 4 {
		t.Errorf("12 takers got %d keys of 4", len(seen))
	}
	if n := f.maker.made.Load(); n != 4 {
		t.Errorf("%d keys were made while somebody waited", n-4)
	}
}

func TestNothingIsMadeWhileSomebodyWaitsOrASinkFails(t *testing.T) {
	for what, condition := range map[string]func(*fixture) *atomic.Bool{
		"somebody waits": func(f *fixture) *atomic.Bool { return &f.busy },
		"a sink fails":   func(f *fixture) *atomic.Bool { return &f.sinks },
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, 2, func(f *fixture) { condition(f).Store(true) })
			time.Sleep(2 * time.Second)
			if n := f.maker.made.Load(); n != 0 {
				t.Errorf("%d keys were made", n)
			}
			condition(f).Store(false)
			f.await(t, 2)
		})
	}
}

func TestAFullQuotaTakesNoKey(t *testing.T) {
	f := newFixture(t, 1, nil)
	f.await(t, 1)
	if _, err := f.Reserve(t.Context(), "acme", uuid.NewString(), 0, time.Minute); !errors.As(err, new(*orgkey.QuotaError)) {
		t.Fatal(err)
	}
	if taken := f.take(t); taken == nil {
		t.Error("the refused request took the key")
	} else if _, err := use(t.Context(), taken); err != nil {
		t.Error(err)
	}
}

func TestASizeOfZeroMakesNothing(t *testing.T) {
	f := newFixture(t, 0, nil)
	time.Sleep(1500 * time.Millisecond)
	if n := f.maker.made.Load(); n != 0 {
		t.Errorf("%d keys were made", n)
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(f)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() == "orgkeys_pool_keys" && family.GetMetric()[0].GetGauge().GetValue() == 0 {
			return
		}
	}
	t.Errorf("the metrics are %v", families)
}

// The answer of a commit can be lost: then the report is repeated, and what was made
// since is another one.
func TestAReportWhoseAnswerWasLostIsRepeatedAsItIs(t *testing.T) {
	recorded := map[string]string{} // what the log has: how many keys, by the event's ID
	lost := errors.New("no answer")
	p := keypool.NewLocal(keypool.Config{
		Backend: "pkcs11", Log: slog.New(slog.DiscardHandler),
		Record: func(_ context.Context, events ...audit.Event) error {
			for _, e := range events {
				recorded[e.ID] = e.Detail["made"]
			}
			return lost
		},
	}, nil, token)
	if err := p.Made(t.Context()); !errors.Is(err, lost) {
		t.Fatal(err)
	}
	lost = nil
	if err := p.Made(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, made := range recorded {
		if made != "1" || len(recorded) != 2 {
			t.Errorf("the log says that keys were made: %v, want 1 twice", recorded)
		}
	}
}
