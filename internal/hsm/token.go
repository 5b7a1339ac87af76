//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"crypto/rsa"
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
	recyclePutOff      = time.Minute // until the token is asked again whether it still counts refused PINs
)

// Token is a PKCS#11 token in use.
type Token struct {
	cfg       Config
	limits    limits
	lib       *module
	pin       []byte // the newest that was accepted, should its file go away
	courier   *courier
	recipient func() (*rsa.PrivateKey, error) // the courier's key; made once
	format    byte                            // of a sealing key that is made
	sealID    []byte                          // the sealing key's CKA_ID
	made      []byte                          // the CKA_ID of a sealing key that was made and that no life has looked at yet
	makes     int                             // how many were
	probe     []byte                          // a sealed value, made at Open: opens under the sealing key of then

	signing sync.Mutex // guards signID
	signID  []byte     // the checkpoint key's CKA_ID; nil: not known yet

	mu       sync.Mutex
	life     *life    // nil: none is usable
	ending   *life    // to be drained before another can begin; nil: none
	renewal  *renewal // the one under way; nil: none is
	renewals int      // lives begun after the first
	failed   error    // why the last renewal failed
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
	t, err := newToken(cfg)
	if err != nil {
		return nil, err
	}
	go t.recipient() // an RSA key takes longest of all: it is made while the token logs in
	type begun struct {
		l   *life
		err error
	}
	done := make(chan begun, 1)
	go func() {
		l, err := t.start(ctx)
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
				_ = t.end(b.l, t.limits.closing) // nobody is left to hear of it
			}
			clear(t.pin)
		}()
		return nil, fmt.Errorf("opening the token: %w", ctx.Err())
	}
}

// What a start meets may pass by itself. At each login SoftHSM empties the file that
// says what its token is, and gives its lock back before it writes it: for some
// 0.1 ms other processes find no token, or one that is not initialized. opencryptoki
// has no slots for a moment after a process was killed. Objects of other starts
// come and go. So it is tried again, with pauses that double; a PIN that
// the token did not refuse is offered again, as by a service that is restarted.
const (
	startTries = 5
	startPause = 100 * time.Millisecond
)

// start is begin, with patience.
func (t *Token) start(ctx context.Context) (*life, error) {
	pause := startPause
	for try := 1; ; try++ {
		l, err := t.begin(ctx)
		for errors.Is(err, errMade) {
			l, err = t.begin(ctx)
		}
		if err == nil || try == startTries || !t.mayPass(err) {
			return l, err
		}
		t.cfg.Log.Warn("the token cannot be opened yet", "error", err)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, err
		}
		pause *= 2
	}
}

func (t *Token) mayPass(err error) bool {
	// SoftHSM may miss for good what another process made; a new life reads anew.
	return lost(err) || errors.Is(err, ErrTokenNotInitialized) || errors.Is(err, ErrNoSealingKey) && t.sealID != nil
}

// newToken loads the module.
func newToken(cfg Config) (*Token, error) {
	if cfg.AttemptFile == "" {
		return nil, errors.New("opening the token: no file for refused PINs is configured")
	}
	pin, err := readPIN(cfg.PINFile) // before a library is loaded that may print or wait
	if err != nil {
		return nil, err
	}
	clear(pin)
	lib, err := load(cfg.Module)
	if err != nil {
		return nil, err
	}
	return &Token{cfg: withDefaults(cfg), limits: defaultLimits(), lib: lib, recipient: sync.OnceValues(newRecipient)}, nil
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
	if cfg.KeyLabel == "" {
		cfg.KeyLabel = sealKeyLabel
	}
	if cfg.Register == nil {
		cfg.Register = alone{}
	}
	if cfg.ChangeNothing {
		cfg.Register = onlyRead{cfg.Register}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return cfg
}

// Capacity is the number of keys that the token generates at once.
func (t *Token) Capacity() int { return t.cfg.Generations }

// SealingKeyID is the CKA_ID of the sealing key in use.
func (t *Token) SealingKeyID() []byte { return bytes.Clone(t.sealID) }

// Healthy reports whether the token is there, logged in to, and answers. If the
// library has lost it a renewal begins and Healthy waits for it.
func (t *Token) Healthy(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, t.limits.answer, errSlow)
	defer cancel()
	for attempt := 0; ; attempt++ {
		l, err := t.await(ctx)
		if err != nil {
			return fault("checking the token", err)
		}
		if err = t.checkUse(ctx, l); err == nil {
			return nil
		}
		if attempt > 0 || !lost(err) {
			return fault("checking the token", err)
		}
		t.renew(l, err)
	}
}

// Close waits for what is under way, within bounds, and finalises the library.
// It reports an error, and may be called again, if a call does not return.
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
		case <-renewal.over:
		case <-time.After(t.limits.closing):
			return errors.New("closing the token: a call does not return from the library")
		}
	}
	t.mu.Lock()
	l := t.life
	if l == nil {
		l = t.ending
	}
	t.life, t.ending = nil, l
	t.mu.Unlock()
	if l != nil {
		if err := t.end(l, t.limits.closing); err != nil {
			return fmt.Errorf("closing the token: %w", err)
		}
	}
	t.mu.Lock()
	t.ending = nil
	t.mu.Unlock()
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
		if err := renewal.wait(ctx, t.limits.generate); err != nil {
			return nil, err
		}
	}
}

// acquire returns a session of one of the pools of the life in use, and waits
// for it until ctx ends, for a renewal no longer than a key pair may take.
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
		if err := renewal.wait(ctx, t.limits.generate); err != nil {
			return nil, nil, err
		}
	}
}

// current returns the life in use and the renewal under way. If there is
// neither it starts a renewal, unless one has just failed.
func (t *Token) current() (*life, *renewal, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.refused != nil {
		return nil, nil, t.refused
	}
	if t.life == nil && t.renewal == nil {
		if time.Since(t.failedAt) < t.limits.pause {
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
// time has passed. It puts that off while the token counts refused PINs: the
// PIN may have been changed, and the life in use is logged in already.
func (t *Token) recycle(ctx context.Context) {
	l := t.due()
	if l == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, t.limits.answer)
	defer cancel()
	_, err := l.anchor.call(ctx, func(pkcs11.SessionHandle) error { return t.checkNotWary(l.slot) }, func(error) {})
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.life != l || t.renewal != nil || t.refused != nil {
		return
	}
	if errors.Is(err, errWary) {
		t.cfg.Log.Warn("recycling the HSM library's memory is put off", "reason", err, "keys", l.made.Load())
		l.due = time.Now().Add(recyclePutOff)
		return
	}
	t.cfg.Log.Info("recycling the HSM library's memory", "keys", l.made.Load())
	t.startRenewal()
}

// due returns the life in use if it is to be recycled.
func (t *Token) due() *life {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.life
	if l == nil || t.renewal != nil || t.refused != nil || time.Now().Before(l.due) {
		return nil
	}
	if l.made.Load() < int64(t.cfg.RecycleKeys) && time.Since(l.born) < t.cfg.RecycleAge {
		return nil
	}
	return l
}

// renewal is a life's replacement under way.
type renewal struct {
	began time.Time
	over  chan struct{} // closed when it is
}

// wait waits until r is over or ctx ends, and for no renewal longer than limit
// after it began.
func (r *renewal) wait(ctx context.Context, limit time.Duration) error {
	select {
	case <-r.over:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(time.Until(r.began.Add(limit))):
		return errSlow
	}
}

// startRenewal needs t.mu. A life still in use makes no more keys, and goes on
// sealing until those under way are done.
func (t *Token) startRenewal() {
	if t.life != nil {
		t.ending = t.life
		t.ending.generate.close()
	}
	old, r := t.ending, &renewal{began: time.Now(), over: make(chan struct{})}
	t.renewal = r
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
		case errors.Is(err, errSealingKey):
			t.refused = fmt.Errorf("%w: %w", orgkey.ErrUnavailable, err)
			t.cfg.Log.Error("the HSM token cannot be used any more", "error", err)
		default:
			t.failed, t.failedAt = fmt.Errorf("%w: %w", orgkey.ErrUnavailable, err), time.Now()
			t.cfg.Log.Error("the HSM token is not available", "error", err)
		}
		close(r.over)
	}()
}

// replace ends old, if there is one, and begins another life.
func (t *Token) replace(old *life) (ended bool, l *life, err error) {
	if old != nil {
		if err := t.end(old, t.limits.held); err != nil {
			return false, nil, err
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), t.limits.generate)
	defer cancel()
	l, err = t.begin(ctx)
	return true, l, err
}
