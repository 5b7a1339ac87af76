package orgkey_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// onePool has one key, made ahead in a real token, and does with it what a test wants.
type onePool struct {
	db    *sqlstore.DB
	open  func(orgkey.BackendKey) (orgkey.BackendKey, error)
	taken int
	key   orgkey.BackendKey
	id    string
	lost  error // instead of the answer
}

func (p *onePool) Reserve(ctx context.Context, org org.ID, id string, limit int, life time.Duration) (*orgkey.Taken[orgkey.BackendKey], error) {
	if p.taken++; p.taken > 1 {
		return nil, p.db.Reserve(ctx, org, id, limit, life)
	}
	_, err := p.db.AddAhead(ctx, orgkey.UsePlain, p.id, 1, time.Minute)
	if err := errors.Join(err, p.db.FillAhead(ctx, p.id, []byte("sealed"), time.Hour)); err != nil {
		return nil, err
	}
	if taken, err := p.db.ReserveAhead(ctx, org, id, limit, life); err != nil || taken.ID != p.id {
		return nil, errors.Join(errors.New("not taken"), err)
	}
	if p.lost != nil {
		return nil, p.lost
	}
	return &orgkey.Taken[orgkey.BackendKey]{ID: p.id, Open: func(context.Context) (orgkey.BackendKey, time.Time, error) {
		k, err := p.open(p.key)
		return k, time.Now(), err
	}}, nil
}

// notOwn is a key that another deletion removed.
type notOwn struct{ orgkey.BackendKey }

func (k notOwn) Destroy(ctx context.Context) error {
	return errors.Join(errors.New("another deletion may have removed the key"), k.BackendKey.Destroy(ctx))
}

// rivalled is a store in which others wait for each place that becomes free.
type rivalled struct{ *sqlstore.DB }

func (s rivalled) Cancel(ctx context.Context, asked string) error {
	return errors.Join(s.DB.Cancel(ctx, asked), s.DB.Reserve(ctx, "acme", uuid.NewString(), 1, time.Minute))
}

// unexportable is a key that is gone.
type unexportable struct{ orgkey.BackendKey }

func (k unexportable) Export(context.Context) ([]byte, error) { return nil, errors.New("not found") }

// A key out of the pool is released only if it was opened, exported, and destroyed by the
// caller's own deletion. Otherwise the caller gets another key in the place that it has,
// although others wait for one.
func TestAPoolKeyThatIsNotOwnIsNotReleased(t *testing.T) {
	for what, c := range map[string]struct {
		open     func(orgkey.BackendKey) (orgkey.BackendKey, error)
		released bool
	}{
		"it is": {func(k orgkey.BackendKey) (orgkey.BackendKey, error) { return k, nil }, true},
		"its record does not open": {func(k orgkey.BackendKey) (orgkey.BackendKey, error) {
			return nil, errors.Join(orgkey.ErrSealBroken, k.Destroy(context.Background()))
		}, false},
		"it is gone":                  {func(k orgkey.BackendKey) (orgkey.BackendKey, error) { return unexportable{k}, nil }, false},
		"another deletion removed it": {func(k orgkey.BackendKey) (orgkey.BackendKey, error) { return notOwn{k}, nil }, false},
	} {
		t.Run(what, func(t *testing.T) {
			ahead, err := token.CreateAhead(t.Context(), uuid.NewString())
			if err != nil {
				t.Fatal(err)
			}
			pool := &onePool{open: c.open, key: ahead, id: uuid.NewString()}
			f := newFixture(t, func(cfg *orgkey.Config) {
				pool.db, cfg.Pool, cfg.Limit = cfg.Store.(*sqlstore.DB), pool, 1
				cfg.Store = rivalled{pool.db}
			})
			id, _ := f.generate(t, "acme")
			if (id == pool.id) != c.released {
				t.Errorf("the pool key %s, and the caller got %s", pool.id, id)
			}
			if got, want := f.history(t, "object = ?", pool.id), "orgkey.created orgkey.delivered"; (got == want) != c.released || got != "" && !c.released {
				t.Errorf("of the pool key the log says %q", got)
			}
			keys, err := f.List(t.Context(), owner("acme"), "acme")
			if err != nil || len(keys) != 1 || keys[0].ID != id {
				t.Errorf("listed are %v, %v", keys, err)
			}
			if c.released != (keys[0].Fingerprint == ahead.Public().Fingerprint()) {
				t.Error("the public key is of another key than was released")
			}
		})
	}
}

// Promise 6: a deletion of all keys while a pool key is being opened ends the request,
// also if the pool key then cannot be used.
func TestPromise6_DeletingAllKeysCancelsAGenerationWhosePoolKeyFails(t *testing.T) {
	ahead, err := token.CreateAhead(t.Context(), uuid.NewString())
	if err != nil {
		t.Fatal(err)
	}
	pool := &onePool{key: ahead, id: uuid.NewString()}
	f := newFixture(t, func(c *orgkey.Config) { pool.db, c.Pool = c.Store.(*sqlstore.DB), pool })
	pool.open = func(k orgkey.BackendKey) (orgkey.BackendKey, error) {
		_, err := f.DeleteAll(context.Background(), owner("acme"), "acme", false)
		return nil, errors.Join(err, errors.New("not found"), k.Destroy(context.Background()))
	}
	if err := f.Generate(t.Context(), owner("acme"), "acme", accept); !errors.Is(err, orgkey.ErrGone) {
		t.Errorf("%v, want that the reservation is gone", err)
	}
	if keys, err := f.List(t.Context(), owner("acme"), "acme"); err != nil || len(keys) != 0 {
		t.Errorf("after the deletion of all keys there are %v, %v", keys, err)
	}
}

// Promise 3: a lost answer holds no place, also if the place is for a pool key whose name
// the caller has not heard.
func TestPromise3_AReservationForAPoolKeyWhoseAnswerWasLostIsGivenBack(t *testing.T) {
	pool := &onePool{id: uuid.NewString(), lost: context.Canceled}
	f := newFixture(t, func(c *orgkey.Config) { pool.db, c.Pool = c.Store.(*sqlstore.DB), pool })
	if err := f.Generate(t.Context(), owner("acme"), "acme", accept); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if n := f.count(t, "SELECT count(*) FROM org_keys WHERE slot IS NOT NULL"); n != 0 || pool.taken != 1 {
		t.Errorf("%d places are held; %d keys were asked for", n, pool.taken)
	}
}
