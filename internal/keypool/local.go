package keypool

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// Maker makes keys that end with their process. Its implementation is hsm.
type Maker interface {
	CreateAhead(ctx context.Context, name string) (orgkey.HeldKey, error)
}

// Reserver takes places in the quota and begins attempts, as orgkey.Store and enroll.Store do.
type Reserver interface {
	Reserve(ctx context.Context, org org.ID, asked string, limit int, life time.Duration) error
	Begin(ctx context.Context, keyID, attempt string, life time.Duration) (bool, error)
}

// Local is the pool of one process. Its keys have no rows. A key serves either use.
type Local struct {
	*runner
	store Reserver
	maker Maker

	mu   sync.Mutex
	held []held // the oldest first
}

type held struct {
	key  orgkey.HeldKey
	made time.Time
}

// doom is the reason for which a key must not be used, or empty.
func (h held) doom() string {
	switch {
	case !h.key.Alive(): // after a new login, a lost session or a token that was away
		return reasonSessions
	case checkAge(h.made) != nil:
		return reasonExpired
	}
	return ""
}

// NewLocal returns a pool of keys that maker makes.
func NewLocal(c Config, store Reserver, maker Maker) *Local {
	p := &Local{store: store, maker: maker}
	p.runner = newRunner(c, p)
	return p
}

func (p *Local) uses() []orgkey.Use { return []orgkey.Use{orgkey.UseAny} }

// Reserve implements orgkey.Pool. The process alone has its keys, and gives each to one
// caller, after that caller's reservation.
func (p *Local) Reserve(ctx context.Context, org org.ID, asked string, limit int, life time.Duration) (*orgkey.Taken[orgkey.BackendKey], error) {
	if err := p.store.Reserve(ctx, org, asked, limit, life); err != nil {
		return nil, err
	}
	return take(p, asked, func(k orgkey.HeldKey) (orgkey.BackendKey, bool) { return k, true }), nil
}

// Begin implements enroll.Pool.
func (p *Local) Begin(ctx context.Context, keyID, attempt string, life time.Duration) (mine bool, _ *orgkey.Taken[orgkey.SealableKey], err error) {
	mine, err = p.store.Begin(ctx, keyID, attempt, life)
	if err != nil || !mine {
		return mine, nil, err
	}
	return mine, take(p, attempt, func(k orgkey.HeldKey) (orgkey.SealableKey, bool) { return k, k.CanSeal() }), nil
}

// take takes the oldest key that is still there.
func take[K any](p *Local, id string, as func(orgkey.HeldKey) (key K, good bool)) *orgkey.Taken[K] {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.held) > 0 {
		first := p.held[0]
		p.held = p.held[1:]
		if reason := first.doom(); reason != "" {
			p.discard(first, reason)
			continue
		}
		key, good := as(first.key)
		if !good {
			p.held = append([]held{first}, p.held...)
			return nil // nor would a key that is made now do
		}
		p.taken(orgkey.UseAny, true)
		return &orgkey.Taken[K]{ID: id, Open: func(context.Context) (K, time.Time, error) { return key, first.made, nil }}
	}
	p.taken(orgkey.UseAny, false)
	return nil
}

// discard destroys a key in the background: a token may take its time.
func (p *Local) discard(h held, reason string) {
	p.count.destroyed(orgkey.UseAny, reason)
	if !h.key.Alive() {
		return // it went with the sessions of its time
	}
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), cleanup)
		defer cancel()
		if err := h.key.Destroy(ctx); err != nil {
			p.Log.Warn("a pool key may stay in the token until the process ends", "error", err)
		}
	}()
}

// add implements stock.
func (p *Local) add(ctx context.Context, _ orgkey.Use) (full bool, err error) {
	if p.size() >= p.Size {
		return true, nil
	}
	making, cancel := context.WithTimeout(ctx, makeLife)
	defer cancel()
	key, err := p.maker.CreateAhead(making, uuid.NewString())
	if err != nil {
		return false, fmt.Errorf("making a key ahead: %w", err)
	}
	p.count.made(orgkey.UseAny)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.held = append(p.held, held{key, time.Now()})
	return false, nil
}

func (p *Local) size() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.held)
}

// keep implements stock.
func (p *Local) keep(context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var left []held
	for _, h := range p.held {
		if reason := h.doom(); reason != "" {
			p.discard(h, reason)
			continue
		}
		left = append(left, h)
	}
	p.held = left
	return nil
}

// ready implements stock.
func (p *Local) ready(context.Context) (map[orgkey.Use]int, error) {
	return map[orgkey.Use]int{orgkey.UseAny: p.size()}, nil
}
