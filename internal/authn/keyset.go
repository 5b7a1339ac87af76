package authn

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

const (
	// MaxAge is how long a set of keys is trusted after it was last read. A
	// provider that is down keeps its tokens working for that long; then
	// authentication fails closed with ErrKeysUnavailable.
	MaxAge = 24 * time.Hour

	// fetchTimeout bounds one reading of the set, from connecting to its last byte.
	fetchTimeout = 5 * time.Second
)

// How a set in a file is read. That costs nothing, so no setting slows it down.
const (
	fileInterval = time.Second
	fileRefresh  = 5 * time.Second
)

// urlRefresh is how often a URL is read unasked, so that removed keys stop working.
const urlRefresh = 5 * time.Minute

// KeySetConfig says how a key set is read. Every field is required.
type KeySetConfig struct {
	// Interval is the least time from the start of one reading of a URL to the
	// start of the next, whatever asks for it.
	Interval time.Duration
	Log      *slog.Logger // receives failures, and changes of the set
}

// KeySet is an issuer's keys, kept up to date. It may be used by several
// goroutines.
//
// The set is read again while Run runs, and when a token names a key that it
// does not have. However many tokens do, and however fast, no more than one
// reading starts per interval; requests that come while one is under way wait
// for it, the others are refused at once. A failed reading, or one of
// something that is not a JWK set, leaves the last good set in force until it
// is MaxAge old. An empty set is a good one: its issuer has no keys.
type KeySet struct {
	read     func(ctx context.Context) ([]byte, error)
	interval time.Duration // the least time between the starts of two readings
	refresh  time.Duration // between readings unasked
	log      *slog.Logger

	mu      sync.Mutex
	keys    publishedKeys
	raw     []byte        // what keys was parsed from
	good    time.Time     // when keys was last read or confirmed; zero if never
	began   time.Time     // when the last reading began; zero if none did
	failure error         // of the last reading
	reading chan struct{} // closed when the reading under way ends; nil if none is
}

// OpenKeySet returns the key set at location, an https URL or a file's path.
//
// A file must be there, hold a JWK set with at least one usable key, and not
// be writable by everybody. A URL need not answer yet: until it does, tokens
// are answered with ErrKeysUnavailable, and Ready says so.
func OpenKeySet(location string, c KeySetConfig) (*KeySet, error) {
	if c.Interval <= 0 || c.Log == nil {
		return nil, errors.New("the key set lacks its interval or log")
	}
	if isURL(location) {
		read, err := fetcher(location)
		if err != nil {
			return nil, err
		}
		return newKeySet(read, c.Interval, max(urlRefresh, c.Interval), c.Log), nil
	}
	k := newKeySet(fileReader(location), fileInterval, fileRefresh, c.Log)
	if err := k.readAgain(context.Background()); err != nil { // bounded by fetchTimeout
		return nil, err
	}
	if err := k.Ready(); err != nil {
		return nil, err
	}
	return k, nil
}

// fixedKeySet returns a key set that is always set.
func fixedKeySet(set []byte) (*KeySet, error) {
	read := func(context.Context) ([]byte, error) { return set, nil }
	k := newKeySet(read, time.Second, time.Hour, slog.New(slog.DiscardHandler))
	return k, k.readAgain(context.Background()) // returns set at once
}

func newKeySet(read func(context.Context) ([]byte, error), interval, refresh time.Duration, log *slog.Logger) *KeySet {
	return &KeySet{read: read, interval: interval, refresh: refresh, log: log}
}

// Run keeps the set up to date until ctx ends: it reads it at every
// refresh, and after a failure at every interval.
func (k *KeySet) Run(ctx context.Context) {
	for ctx.Err() == nil {
		if k.readAgain(ctx) != nil {
			return
		}
		timer := time.NewTimer(k.untilNext())
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
		}
	}
}

func (k *KeySet) untilNext() time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	pause := k.refresh
	if k.failure != nil {
		pause = k.interval
	}
	return pause - time.Since(k.began)
}

// Ready returns nil if tokens can be verified now, and an error that wraps
// ErrKeysUnavailable and says why if not.
func (k *KeySet) Ready() error {
	keys, err := k.current()
	if err != nil {
		return err
	}
	if len(keys.usable) == 0 {
		return fmt.Errorf("%w: no key of the set is usable: %w", ErrKeysUnavailable, errors.Join(keys.ignored...))
	}
	return nil
}

// find returns the key that t names.
func (k *KeySet) find(ctx context.Context, t token) (crypto.PublicKey, error) {
	keys, err := k.current()
	if err == nil && (t.keyID == "" || keys.has(t.keyID)) {
		return keys.choose(t)
	}
	if err := k.readAgain(ctx); err != nil {
		return nil, fmt.Errorf("%w: waiting for them: %w", ErrKeysUnavailable, err)
	}
	keys, err = k.current()
	if err != nil {
		return nil, err
	}
	return keys.choose(t)
}

// current returns the set in force.
func (k *KeySet) current() (publishedKeys, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case k.good.IsZero() && k.failure != nil:
		return publishedKeys{}, fmt.Errorf("%w: %w", ErrKeysUnavailable, k.failure)
	case k.good.IsZero():
		return publishedKeys{}, fmt.Errorf("%w: not read yet", ErrKeysUnavailable)
	case time.Since(k.good) > MaxAge:
		return publishedKeys{}, fmt.Errorf("%w: last read more than %v ago", ErrKeysUnavailable, MaxAge)
	}
	return k.keys, nil
}

// readAgain waits for a reading of the set: the one under way, or a new one if
// the last began at least an interval ago. If neither is to be had it returns
// at once. Its error is ctx's.
func (k *KeySet) readAgain(ctx context.Context) error {
	k.mu.Lock()
	done := k.reading
	if done == nil {
		if !k.began.IsZero() && time.Since(k.began) < k.interval {
			k.mu.Unlock()
			return nil
		}
		done = make(chan struct{})
		k.reading, k.began = done, time.Now()
		go k.readOnce()
	}
	k.mu.Unlock()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// readOnce reads the set and ends the reading under way. Many requests may be
// waiting for it, so it lasts no shorter for one of them giving up.
func (k *KeySet) readOnce() {
	ctx, cancel := context.WithTimeout(context.Background(), fetchTimeout)
	defer cancel()
	raw, err := k.read(ctx)
	var keys publishedKeys
	if err == nil {
		keys, err = parseJWKS(raw)
	}
	changed := k.finish(keys, raw, err)
	if err != nil {
		k.log.Warn("reading the token issuer's keys failed", "error", err)
	}
	if changed {
		k.log.Info("the token issuer's keys changed", "usable", len(keys.usable), "ignored", len(keys.ignored))
	}
}

// finish puts keys in force, unless err says that the reading failed, and lets
// go on whoever waits for it. It reports whether keys is not what was in force.
func (k *KeySet) finish(keys publishedKeys, raw []byte, err error) (changed bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.failure = err
	if err == nil {
		changed = !bytes.Equal(raw, k.raw)
		k.keys, k.raw, k.good = keys, raw, time.Now()
	}
	close(k.reading)
	k.reading = nil
	return changed
}
