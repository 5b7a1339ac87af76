//go:build cgo

package hsm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

const (
	defaultRecycleKeys = 20_000
	defaultRecycleAge  = time.Hour

	// patience is how long a life that is to end waits for keys that are held;
	// a key is held from its generation to its destruction, mostly well under a second.
	patience = 30 * time.Second
	// pause is the least time between a renewal that failed and the next.
	pause = time.Second
	// destroyTime bounds a destruction, which does not end with its request.
	destroyTime = 10 * time.Second
)

// Token is a PKCS#11 token in use.
type Token struct {
	cfg      Config
	lib      *pkcs11.Ctx
	pin      []byte
	courier  *courier
	probe    []byte // a sealed value, made at Open: opens under the sealing key of then
	patience time.Duration

	mu       sync.Mutex
	life     *life         // nil: none is usable
	ending   *life         // to be drained before another can begin; nil: none
	renewal  chan struct{} // closed when the renewal under way is over; nil: none is
	renewals int           // lives begun after the first
	failed   error         // why the last renewal failed
	failedAt time.Time
	refused  error // why no renewal is tried any more; nil: none such
}

var (
	_ orgkey.Keystore = (*Token)(nil)
	_ orgkey.Sealer   = (*Token)(nil)
)

// Open loads the module, logs in to the token, and finds or makes the sealing
// key. It finds out by trying which mechanisms the token has, and fails if
// those that keep a private key from ever being readable are not among them. A
// process has one Token for a module at a time.
func Open(ctx context.Context, cfg Config) (*Token, error) {
	t := &Token{cfg: withDefaults(cfg), patience: patience}
	pin, err := readPIN(cfg.PINFile)
	if err != nil {
		return nil, err
	}
	t.pin = pin
	if t.lib = pkcs11.New(cfg.Module); t.lib == nil {
		return nil, fmt.Errorf("loading the PKCS#11 module %q: not there, or not a PKCS#11 module", cfg.Module)
	}
	type begun struct {
		l   *life
		err error
	}
	done := make(chan begun, 1)
	go func() {
		l, err := t.begin()
		done <- begun{l, err}
	}()
	select {
	case b := <-done:
		if b.err != nil {
			clear(t.pin)
			return nil, fault("opening the token", b.err)
		}
		t.life = b.l
		return t, nil
	case <-ctx.Done():
		go func() {
			if b := <-done; b.err == nil {
				_ = t.end(b.l) // nobody is left to hear of it
			}
			clear(t.pin)
		}()
		return nil, fmt.Errorf("opening the token: %w", ctx.Err())
	}
}

func withDefaults(cfg Config) Config {
	if cfg.Generations <= 0 {
		cfg.Generations = runtime.NumCPU()
	}
	if cfg.Sealings <= 0 {
		cfg.Sealings = max(2, runtime.NumCPU())
	}
	if cfg.RecycleKeys <= 0 {
		cfg.RecycleKeys = defaultRecycleKeys
	}
	if cfg.RecycleAge <= 0 {
		cfg.RecycleAge = defaultRecycleAge
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return cfg
}

// Capacity is the number of keys that the token generates at once.
func (t *Token) Capacity() int { return t.cfg.Generations }

// Healthy reports whether the token is there and logged in to. If it is not, a
// renewal begins and Healthy waits for it.
func (t *Token) Healthy(ctx context.Context) error {
	for attempt := 0; ; attempt++ {
		l, err := t.await(ctx)
		if err != nil {
			return fault("checking the token", err)
		}
		checked := make(chan error, 1)
		go func() { checked <- t.checkLogin(l) }()
		select {
		case err = <-checked:
		case <-ctx.Done():
			err = ctx.Err()
		}
		if err == nil {
			return nil
		}
		if attempt > 0 || !lost(err) {
			return fault("checking the token", err)
		}
		t.renew(l, err)
	}
}

// Close waits for what is under way, within bounds, and finalises the library.
// Whatever is asked of t afterwards fails with orgkey.ErrUnavailable. The module
// stays loaded: unloading one that has registered exit or thread handlers, as
// OpenSSL's do, crashes the process later.
func (t *Token) Close() error {
	t.mu.Lock()
	t.refused = fmt.Errorf("%w: the token is closed", orgkey.ErrUnavailable)
	renewal := t.renewal
	t.mu.Unlock()
	if renewal != nil {
		select {
		case <-renewal:
		case <-time.After(t.patience + 2*time.Second):
			return errors.New("closing the token: a call does not return from the library")
		}
	}
	t.mu.Lock()
	l := t.life
	if l == nil {
		l = t.ending
	}
	t.life, t.ending = nil, nil
	t.mu.Unlock()
	if l == nil {
		clear(t.pin)
		return nil
	}
	if err := t.end(l); err != nil {
		return fmt.Errorf("closing the token: %w", err)
	}
	clear(t.pin)
	return nil
}

// await returns the life in use, after the renewal that may be under way.
func (t *Token) await(ctx context.Context) (*life, error) {
	for {
		l, renewal, err := t.current()
		if err != nil {
			return nil, err
		}
		if renewal == nil {
			return l, nil
		}
		select {
		case <-renewal:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// acquire returns a session of one of the pools of the life in use, and waits
// for it, and for a renewal, until ctx ends.
func (t *Token) acquire(ctx context.Context, from func(*life) *pool) (*life, *session, error) {
	for {
		l, renewal, err := t.current()
		if err != nil {
			return nil, nil, err
		}
		if l != nil {
			s, err := from(l).take(ctx)
			if !errors.Is(err, errRetired) {
				return l, s, err
			}
		}
		if renewal == nil {
			continue // it began, or was over, since current looked
		}
		select {
		case <-renewal:
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		}
	}
}

// current returns the life in use and the renewal under way. If there is
// neither it starts a renewal, unless one has just failed.
func (t *Token) current() (*life, <-chan struct{}, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.refused != nil {
		return nil, nil, t.refused
	}
	if t.life == nil && t.renewal == nil {
		if time.Since(t.failedAt) < pause {
			return nil, nil, t.failed
		}
		t.startRenewal()
	}
	return t.life, t.renewal, nil
}

// renew ends l because of what a call in it has met, unless that is happening
// already. It does not wait.
func (t *Token) renew(l *life, cause error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.life != l || t.refused != nil {
		return
	}
	t.cfg.Log.Warn("the HSM library lost its sessions; starting over", "error", cause)
	t.life, t.ending = nil, l // nobody else is to find out
	if t.renewal == nil {
		t.startRenewal()
	}
}

// recycle ends the life in use if enough keys have been made in it, or enough
// time has passed.
func (t *Token) recycle() {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.life
	if l == nil || t.renewal != nil || t.refused != nil {
		return
	}
	if l.made.Load() < int64(t.cfg.RecycleKeys) && time.Since(l.born) < t.cfg.RecycleAge {
		return
	}
	t.cfg.Log.Info("recycling the HSM library's memory", "keys", l.made.Load())
	t.startRenewal()
}

// startRenewal needs t.mu. A life still in use makes no more keys, and goes on
// sealing until those under way are done.
func (t *Token) startRenewal() {
	if t.life != nil {
		t.ending = t.life
		t.ending.generate.close()
	}
	old, done := t.ending, make(chan struct{})
	t.renewal = done
	go func() {
		ended, l, err := t.replace(old)
		t.mu.Lock()
		defer t.mu.Unlock()
		t.life, t.renewal = l, nil
		if ended {
			t.ending = nil
		}
		switch {
		case err == nil:
			t.renewals++
		case errors.Is(err, ErrPIN), errors.Is(err, errSealingKey):
			t.refused = fmt.Errorf("%w: %w", orgkey.ErrUnavailable, err)
			t.cfg.Log.Error("the HSM token cannot be used any more", "error", err)
		default:
			t.failed, t.failedAt = fmt.Errorf("%w: %w", orgkey.ErrUnavailable, err), time.Now()
			t.cfg.Log.Error("the HSM token is not available", "error", err)
		}
		close(done)
	}()
}

// replace ends old, if there is one, and begins another life.
func (t *Token) replace(old *life) (ended bool, l *life, err error) {
	if old != nil {
		if err := t.end(old); err != nil {
			return false, nil, err
		}
	}
	l, err = t.begin()
	return true, l, err
}
