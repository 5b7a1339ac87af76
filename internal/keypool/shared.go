package keypool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/org"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// Store keeps the rows of a shared pool. Each method is one transaction. Its
// implementation is sqlstore.
type Store interface {
	// ReserveAhead does what orgkey.Store.Reserve does, for a pool key for
	// orgkey.UsePlain if there is one, whose row it deletes.
	ReserveAhead(ctx context.Context, org org.ID, asked string, limit int, life time.Duration) (*orgkey.Ahead, error)
	// BeginAhead does what enroll.Store.Begin does, likewise, for orgkey.UseSealed. With an
	// error it returns the key that may have been taken, if the answer was lost.
	BeginAhead(ctx context.Context, keyID, attempt string, life time.Duration) (mine bool, taken *orgkey.Ahead, err error)
	// AddAhead adds a row for a key that is to be made within life, unless the pool has
	// limit keys for that use.
	AddAhead(ctx context.Context, use orgkey.Use, id string, limit int, life time.Duration) (added bool, err error)
	// FillAhead stores the record of a key that was made, which expires after life, or
	// reports orgkey.ErrGone.
	FillAhead(ctx context.Context, id string, sealed []byte, life time.Duration) error
	// RemoveAhead deletes a row, unless somebody else has done so.
	RemoveAhead(ctx context.Context, id string) (removed bool, err error)
	// Ahead returns all rows.
	Ahead(ctx context.Context) ([]orgkey.Ahead, error)
	// Credentials returns the mark of each replica that runs; an empty one says nothing.
	Credentials(ctx context.Context) ([]string, error)
}

// Keystore makes keys that wait in the back end. Its implementation is vault.
type Keystore interface {
	CreateAhead(ctx context.Context, use orgkey.Use, name string) (orgkey.Public, error)
	// TakenPlain and TakenSealed return a key that was taken. Their Destroy succeeds
	// only if its own deletion removed the key.
	TakenPlain(name string, public orgkey.Public) orgkey.BackendKey
	TakenSealed(name string, public orgkey.Public) orgkey.SealableKey
	// Discard removes a key and confirms that it is gone. What is not there is no error.
	Discard(ctx context.Context, use orgkey.Use, name string) error
	// Credentials is a mark of those that are in use, or empty.
	Credentials() string
}

// Sealer seals the rows. SealedAsNow reports whether a value was sealed under the key that is
// used now.
type Sealer interface {
	orgkey.Sealer
	Newest(ctx context.Context) (sealedAsNow func(ciphertext []byte) bool, err error)
}

// Shared is the pool of all replicas.
type Shared struct {
	*runner
	store    Store
	keystore Keystore
	sealer   Sealer

	mu     sync.Mutex
	opened map[string]opened // by the key's name, so that a taker need not wait for the sealer
	latest present           // so that a taker need not ask, either
}

// opened is a row that the sealer has opened.
type opened struct {
	row orgkey.Ahead
	record
	public orgkey.Public
}

// NewShared returns a pool whose keys wait in keystore.
func NewShared(c Config, store Store, keystore Keystore, sealer Sealer) *Shared {
	p := &Shared{store: store, keystore: keystore, sealer: sealer, opened: map[string]opened{}}
	p.runner = newRunner(c, p)
	return p
}

// record is what is sealed of a pool key.
type record struct {
	Public      []byte    `json:"public"` // PKIX DER
	Made        time.Time `json:"made"`
	Credentials string    `json:"credentials"`
}

func (p *Shared) uses() []orgkey.Use { return []orgkey.Use{orgkey.UsePlain, orgkey.UseSealed} }

// Reserve implements orgkey.Pool.
func (p *Shared) Reserve(ctx context.Context, org org.ID, asked string, limit int, life time.Duration) (*orgkey.Taken[orgkey.BackendKey], error) {
	ahead, err := p.store.ReserveAhead(ctx, org, asked, limit, life)
	if err != nil {
		return nil, err
	}
	return open(p, orgkey.UsePlain, ahead, p.keystore.TakenPlain), nil
}

// Begin implements enroll.Pool.
func (p *Shared) Begin(ctx context.Context, keyID, attempt string, life time.Duration) (mine bool, _ *orgkey.Taken[orgkey.SealableKey], err error) {
	mine, ahead, err := p.store.BeginAhead(ctx, keyID, attempt, life)
	if err != nil && ahead != nil { // the answer of the commit was lost: the caller ends the attempt by its name
		return false, &orgkey.Taken[orgkey.SealableKey]{ID: ahead.ID}, err
	}
	if err != nil || !mine {
		return mine, nil, err
	}
	return mine, open(p, orgkey.UseSealed, ahead, p.keystore.TakenSealed), nil
}

// open returns a key that was taken, or nil.
func open[K any](p *Shared, use orgkey.Use, ahead *orgkey.Ahead, key func(string, orgkey.Public) K) *orgkey.Taken[K] {
	p.taken(use, ahead != nil)
	if ahead == nil {
		return nil
	}
	return &orgkey.Taken[K]{ID: ahead.ID, Open: func(ctx context.Context) (none K, made time.Time, err error) {
		defer p.forgetOpened(ahead.ID)
		reason := reasonFailed
		r, public, err := p.read(ctx, *ahead)
		if err == nil {
			reason, err = p.check(ctx, *ahead, r)
		}
		if err != nil {
			return none, made, errors.Join(fmt.Errorf("opening pool key %s: %w", ahead.ID, err), p.destroy(ctx, *ahead, reason))
		}
		return key(ahead.ID, public), r.Made, nil
	}}
}

// check refuses a key that must be destroyed, but that keep has not come to. It asks what
// is present only if that is not known of late, or if a key does not match it, which may be newer.
func (p *Shared) check(ctx context.Context, a orgkey.Ahead, r record) (reason string, err error) {
	p.mu.Lock()
	now := p.latest
	p.mu.Unlock()
	if time.Since(now.at) < stale && now.doom(a, r) == "" {
		return "", nil
	}
	if now, err = p.present(ctx); err != nil {
		return reasonFailed, err
	}
	if reason = now.doom(a, r); reason != "" {
		return reason, fmt.Errorf("the pool key must not be used any more: %s", reason)
	}
	return "", nil
}

func (p *Shared) forgetOpened(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.opened, id)
}

// read opens the record of a pool key, unless the very same row was opened before.
func (p *Shared) read(ctx context.Context, a orgkey.Ahead) (record, orgkey.Public, error) {
	p.mu.Lock()
	known, ok := p.opened[a.ID]
	p.mu.Unlock()
	if ok && known.row.Use == a.Use && bytes.Equal(known.row.Sealed, a.Sealed) {
		return known.record, known.public, nil
	}
	text, err := p.sealer.Open(ctx, []orgkey.Sealed{{Binding: orgkey.AheadOf(a.Use, a.ID), Ciphertext: a.Sealed}})
	if err != nil {
		return record{}, orgkey.Public{}, err
	}
	var r record
	if err := json.Unmarshal(text[0], &r, json.RejectUnknownMembers(true)); err != nil {
		return r, orgkey.Public{}, err
	}
	public, err := orgkey.ParsePublic(r.Public)
	if err != nil {
		return r, orgkey.Public{}, err
	}
	p.mu.Lock()
	p.opened[a.ID] = opened{a, r, public}
	p.mu.Unlock()
	return r, public, nil
}

// forgetAllBut drops what was opened of rows that are not there any more.
func (p *Shared) forgetAllBut(all []orgkey.Ahead) {
	p.mu.Lock()
	defer p.mu.Unlock()
	maps.DeleteFunc(p.opened, func(id string, _ opened) bool {
		return !slices.ContainsFunc(all, func(a orgkey.Ahead) bool { return a.ID == id })
	})
}

// add implements stock.
func (p *Shared) add(ctx context.Context, use orgkey.Use) (full bool, err error) {
	// Every name is in the database before its key is in the back end, so that the
	// reaper knows what a crash leaves: the row expires, and then nobody needs the key.
	a := orgkey.Ahead{ID: uuid.NewString(), Use: use}
	added, err := p.store.AddAhead(ctx, use, a.ID, p.Size, makeLife)
	if err != nil || !added {
		return err == nil, err
	}
	making, cancel := context.WithTimeout(ctx, makeLife)
	defer cancel()
	// CRASH: the row expires, and the key may be in the back end, where the reaper finds it.
	public, err := p.keystore.CreateAhead(making, use, a.ID)
	if err != nil {
		p.forget(ctx, a)
		return false, fmt.Errorf("making a key ahead: %w", err)
	}
	p.count.made(use)
	if a.Sealed, err = p.seal(making, a, public); err == nil {
		err = p.store.FillAhead(making, a.ID, a.Sealed, orgkey.MaxAge)
	}
	if err != nil {
		p.forget(ctx, a)
		return false, errors.Join(fmt.Errorf("storing a key made ahead: %w", err), p.destroy(ctx, a, reasonFailed))
	}
	if _, _, err := p.read(making, a); err != nil {
		return false, fmt.Errorf("reading a key made ahead: %w", err)
	}
	return false, nil
}

func (p *Shared) seal(ctx context.Context, a orgkey.Ahead, public orgkey.Public) ([]byte, error) {
	der, err := public.DER()
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(record{der, time.Now().UTC(), p.keystore.Credentials()})
	if err != nil {
		return nil, err
	}
	return p.sealer.Seal(ctx, orgkey.AheadOf(a.Use, a.ID), text)
}

// forget removes the row of a key that will not be in the pool. If that fails, the row
// expires, or the key is destroyed later than it could be.
func (p *Shared) forget(ctx context.Context, a orgkey.Ahead) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
	defer cancel()
	if _, err := p.store.RemoveAhead(ctx, a.ID); err != nil {
		p.Log.Warn("the row of a pool key stays until it expires", "key", a.ID, "error", err)
	}
}

// destroy removes a key that nobody can take any more from the back end. If that fails, the
// reaper does it.
func (p *Shared) destroy(ctx context.Context, a orgkey.Ahead, reason string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
	defer cancel()
	p.count.destroyed(a.Use, reason)
	if err := p.keystore.Discard(ctx, a.Use, a.ID); err != nil {
		return fmt.Errorf("destroying pool key %s: %w", a.ID, err)
	}
	return nil
}

// keep implements stock.
func (p *Shared) keep(ctx context.Context) error {
	all, err := p.store.Ahead(ctx)
	if err != nil {
		return err
	}
	if p.forgetAllBut(all); len(all) == 0 {
		return nil
	}
	now, err := p.present(ctx)
	if err != nil {
		return err
	}
	var failed []error
	for _, a := range all {
		reason, err := p.doom(ctx, a, now)
		if err != nil {
			failed = append(failed, err)
		}
		if reason == "" {
			continue
		}
		// Who deletes the row decides what becomes of the key: a taker, or this.
		removed, err := p.store.RemoveAhead(ctx, a.ID)
		if err == nil && removed {
			p.Log.Info("a pool key is destroyed", "key", a.ID, "reason", reason)
			err = p.destroy(ctx, a, reason)
		}
		if err != nil {
			failed = append(failed, err)
		}
	}
	return errors.Join(failed...)
}

// present is what pool keys are compared with.
type present struct {
	sealedAsNow func([]byte) bool
	credentials []string // of all replicas; nil: not known
	at          time.Time
}

// doom is the reason for which a key must be destroyed, or empty. Its age is for the
// database to know, whose clock all replicas share: here only a time that no clock
// explains is one.
func (now present) doom(a orgkey.Ahead, r record) string {
	switch {
	case !now.sealedAsNow(a.Sealed):
		return reasonSealingKey
	case time.Since(r.Made).Abs() > orgkey.MaxAge+clocks:
		return reasonExpired
	case now.credentials != nil && !slices.Contains(now.credentials, r.Credentials):
		return reasonCredentials
	}
	return ""
}

// present asks what is present, and remembers it.
func (p *Shared) present(ctx context.Context) (now present, err error) {
	now.at = time.Now()
	if now.sealedAsNow, err = p.sealer.Newest(ctx); err != nil {
		return now, err
	}
	all, err := p.store.Credentials(ctx)
	if err != nil {
		return now, err
	}
	if all = append(all, p.keystore.Credentials()); !slices.Contains(all, "") {
		now.credentials = all
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.latest = now
	return now, nil
}

// doom is the reason for which a key must be destroyed, or empty.
func (p *Shared) doom(ctx context.Context, a orgkey.Ahead, now present) (string, error) {
	switch {
	case a.Expired:
		return reasonExpired, nil
	case a.Sealed == nil:
		return "", nil // it is being made
	case p.Size == 0:
		return reasonOff, nil
	case !now.sealedAsNow(a.Sealed):
		return reasonSealingKey, nil
	}
	r, _, err := p.read(ctx, a)
	switch {
	case errors.Is(err, orgkey.ErrUnavailable):
		return "", err
	case err != nil:
		return reasonUnreadable, nil
	}
	return now.doom(a, r), nil
}

// ready implements stock.
func (p *Shared) ready(ctx context.Context) (map[orgkey.Use]int, error) {
	all, err := p.store.Ahead(ctx)
	n := map[orgkey.Use]int{}
	for _, a := range all {
		if a.Sealed != nil && !a.Expired {
			n[a.Use]++
		}
	}
	return n, err
}
