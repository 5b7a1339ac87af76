package authn

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
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
	fileInterval = spacing
	fileRefresh  = 5 * time.Second
)

// urlRefresh is how often a URL is read without a request for it, so that removed keys stop working.
const urlRefresh = 5 * time.Minute

// How often requests may have the set read, beyond what Run does.
const (
	// unknownBurst is how many readings for key IDs that the set does not have may
	// follow one another; one more is granted each interval. A reading that brought
	// a new key does not count, so a provider may rotate as often as it likes.
	unknownBurst = 5
	// spacing is the least time between the starts of two readings; requests wait for it.
	spacing = 100 * time.Millisecond
	// retiredFor is how long a key that was taken out of the set is remembered, to
	// tell its tokens from those of a key that is not known yet.
	retiredFor = 10 * time.Minute
	// firstRetry is the pause after a first failure; it doubles up to the interval.
	firstRetry = time.Second
)

// maxRetired bounds the keys that are remembered.
const maxRetired = 64

// KeySetConfig says how a key set is read. Interval and Log are required.
type KeySetConfig struct {
	// Interval is the time in which one more reading is granted to key IDs that the
	// set does not have, and the longest between two attempts while reading fails.
	Interval time.Duration
	Log      *slog.Logger // receives failures, and changes of the set
	CAFile   string       // PEM; the only authorities that a URL's certificate may come from. Empty: the system's
	Issuer   string       // whose metadata names the set, where no location does
}

// KeySet is an issuer's keys, kept up to date. It may be used by several
// goroutines.
//
// The set is read again while Run runs, and when a token may be signed by a key
// that it does not have: under an unknown key ID, under one that was taken out, or
// under a known one whose key does not fit. Requests wait for a reading that began
// after they came, so that none is judged by an older set. How often they cause one
// is bounded by token buckets, one for each of these causes. ErrKeysUnavailable
// is the answer to an unknown key ID when no reading is to be had; a signature that does
// not fit is refused. A failed reading, or one of
// something that is not a JWK set, leaves the last good set in force until it
// is MaxAge old. An empty set is a good one: its issuer has no keys.
type KeySet struct {
	read     func(ctx context.Context) ([]byte, error)
	interval time.Duration
	refresh  time.Duration // between readings that no request asked for
	log      *slog.Logger

	mu       sync.Mutex
	keys     publishedKeys
	retired  []retiredKey
	good     time.Time     // when keys was last read or confirmed; zero if never
	began    time.Time     // when the last reading that has ended began; zero if none did
	failure  error         // of that reading
	failures int           // in a row
	reading  chan struct{} // closed when the reading under way ends; nil if none is

	unknown, removed, mismatched bucket
}

// retiredKey is a key that the set once had.
type retiredKey struct {
	publishedKey
	since time.Time
}

// bucket is a token bucket: it holds at most size, and gains one each interval.
// The zero value with a size is full.
type bucket struct {
	size  int
	spent int
	since time.Time // when spent was last reduced, or began to be more than none
}

func (b *bucket) take(now time.Time, interval time.Duration) bool {
	if gained := int(now.Sub(b.since) / interval); gained > 0 {
		b.spent, b.since = max(0, b.spent-gained), b.since.Add(time.Duration(gained)*interval)
	}
	if b.spent == 0 {
		b.since = now
	}
	if b.spent >= b.size {
		return false
	}
	b.spent++
	return true
}

func (b *bucket) giveBack() { b.spent = max(0, b.spent-1) }

// OpenKeySet returns the key set at location, an https URL or a file's path. An
// empty location is found through the metadata of c.Issuer.
//
// A file must be there, hold a JWK set with at least one usable key, and not
// be writable by everybody. A URL need not answer yet: until it does, tokens
// are answered with ErrKeysUnavailable, and Ready says so.
func OpenKeySet(location string, c KeySetConfig) (*KeySet, error) {
	if c.Interval <= 0 || c.Log == nil {
		return nil, errors.New("the key set lacks its interval or log")
	}
	if location == "" || isURL(location) {
		read, err := remote(location, c)
		if err != nil {
			return nil, err
		}
		return newKeySet(read, c.Interval, max(urlRefresh, c.Interval), c.Log), nil
	}
	if c.CAFile != "" {
		return nil, errors.New("the JWK set is a file, so no server is asked and a CA file has no use")
	}
	k := newKeySet(fileReader(location), fileInterval, fileRefresh, c.Log)
	if err := k.readNow(context.Background()); err != nil { // bounded by fetchTimeout
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
	k := newKeySet(read, time.Nanosecond, time.Hour, slog.New(slog.DiscardHandler))
	return k, k.readNow(context.Background()) // returns set at once
}

func newKeySet(read func(context.Context) ([]byte, error), interval, refresh time.Duration, log *slog.Logger) *KeySet {
	return &KeySet{
		read: read, interval: interval, refresh: refresh, log: log,
		unknown: bucket{size: unknownBurst}, removed: bucket{size: 1}, mismatched: bucket{size: 1},
	}
}

// Run keeps the set up to date until ctx ends: it reads it at every
// refresh, and after failures more often.
func (k *KeySet) Run(ctx context.Context) {
	for ctx.Err() == nil {
		if k.readNow(ctx) != nil {
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
		pause = min(max(k.interval, firstRetry), firstRetry<<min(k.failures-1, 16))
	}
	return pause - time.Since(k.began)
}

// Ready returns nil if tokens can be verified now, and an error that wraps
// ErrKeysUnavailable and says why if not.
func (k *KeySet) Ready() error {
	keys, _, err := k.current()
	switch {
	case err != nil:
		return err
	case len(keys.usable) == 0 && len(keys.ignored) == 0:
		return fmt.Errorf("%w: the set is empty", ErrKeysUnavailable)
	case len(keys.usable) == 0:
		var why []error
		for _, key := range keys.ignored {
			why = append(why, key)
		}
		return fmt.Errorf("%w: no key of the set is usable: %w", ErrKeysUnavailable, errors.Join(why...))
	}
	return nil
}

// Read reads the set now, and returns what Ready does.
func (k *KeySet) Read(ctx context.Context) error {
	if err := k.readNow(ctx); err != nil {
		return err
	}
	return k.Ready()
}

// verify checks the signature of t, with a set that was read after the call if
// that may make a difference.
func (k *KeySet) verify(ctx context.Context, t token) error {
	called := time.Now()
	for {
		keys, began, err := k.current()
		if err == nil {
			err = keys.verify(t)
		}
		cause := k.mayBeNewer(t, err)
		if cause == nil {
			return err
		}
		switch again, waitErr := k.readSince(ctx, called, began, cause); {
		case waitErr != nil:
			return fmt.Errorf("%w: waiting for them: %w", ErrKeysUnavailable, waitErr)
		case !again:
			return k.verdict(cause, began.Before(called), err)
		}
	}
}

// mayBeNewer returns the bucket that bounds readings of the set after err, and nil if
// reading it again cannot help.
func (k *KeySet) mayBeNewer(t token, err error) *bucket {
	if err == nil {
		return nil
	}
	var refusal *TokenError
	if !errors.As(err, &refusal) {
		return &k.unknown
	}
	keys, retired := k.known(t.keyID)
	switch refusal.Reason {
	case ReasonUnknownKey:
		if keys.has(t.keyID) || t.keyID == "" && len(keys.usable) > 1 {
			return nil // it is not clear which one is meant, and will not become so
		}
		if slices.ContainsFunc(retired, t.signedBy) {
			return &k.removed // it may be put back, and only its tokens are asked for: no stranger has any
		}
		return &k.unknown
	case ReasonSignature, ReasonAlgorithm:
		if !slices.ContainsFunc(retired, t.signedBy) {
			return &k.mismatched
		}
	}
	return nil
}

// known returns the set in force, and the keys with that ID (any ID if it is empty)
// that were removed from it recently.
func (k *KeySet) known(id string) (keys publishedKeys, retired []publishedKey) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, r := range k.retired {
		if (id == "" || r.id == id) && time.Since(r.since) < retiredFor {
			retired = append(retired, r.publishedKey)
		}
	}
	return k.keys, retired
}

// UnsureError is the answer to a token whose key ID the set in force does not have, where a newer
// set may and could not be read now. It wraps ErrKeysUnavailable.
type UnsureError struct{ Refusal *TokenError }

func (e *UnsureError) Error() string {
	return ErrKeysUnavailable.Error() + ": the token may be signed with a newer key, but too many unknown keys were asked for recently"
}

func (e *UnsureError) Unwrap() error { return ErrKeysUnavailable }

// verdict is the answer when the set may not be read again now: err, unless the key
// ID may be missing only because the set that was asked is older than the call.
func (k *KeySet) verdict(cause *bucket, older bool, err error) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	refusal, refused := errors.AsType[*TokenError](err)
	switch {
	case k.failure != nil:
		return fmt.Errorf("%w: the token may be signed with a newer key: %w", ErrKeysUnavailable, k.failure)
	case refused && older && cause == &k.unknown:
		return &UnsureError{refusal}
	}
	return err
}

// current returns the set in force, and when the last reading began.
func (k *KeySet) current() (keys publishedKeys, began time.Time, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case k.good.IsZero() && k.failure != nil:
		err = fmt.Errorf("%w: %w", ErrKeysUnavailable, k.failure)
	case k.good.IsZero():
		err = fmt.Errorf("%w: not read yet", ErrKeysUnavailable)
	case time.Since(k.good) > MaxAge:
		err = fmt.Errorf("%w: last read more than %v ago", ErrKeysUnavailable, MaxAge)
	}
	if err != nil {
		return publishedKeys{}, k.began, err
	}
	return k.keys, k.began, nil
}

// readSince waits for a reading that began after called: the one under way may
// be older, and then another follows if cause has one left. It reports whether
// the set was read since the caller looked, when the last reading was that of seen. Its error is ctx's.
func (k *KeySet) readSince(ctx context.Context, called, seen time.Time, cause *bucket) (again bool, err error) {
	k.mu.Lock()
	done := k.reading
	if done == nil {
		if !k.began.Equal(seen) {
			defer k.mu.Unlock()
			return k.failure == nil, nil
		}
		if !k.began.Before(called) || !cause.take(time.Now(), k.interval) {
			k.mu.Unlock()
			return false, nil
		}
		done = k.begin(cause)
	}
	k.mu.Unlock()
	if err := wait(ctx, done); err != nil {
		return false, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.failure == nil, nil
}

// readNow waits for a reading: the one under way, or a new one. Its error is ctx's.
func (k *KeySet) readNow(ctx context.Context) error {
	k.mu.Lock()
	done := k.reading
	if done == nil {
		done = k.begin(nil)
	}
	k.mu.Unlock()
	return wait(ctx, done)
}

func wait(ctx context.Context, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// begin starts a reading. k.mu is held.
func (k *KeySet) begin(cause *bucket) chan struct{} {
	k.reading = make(chan struct{})
	pause := time.Duration(0)
	if cause != nil && !k.began.IsZero() {
		pause = min(spacing, k.interval) - time.Since(k.began)
	}
	go k.readOnce(pause, cause)
	return k.reading
}

// readOnce reads the set and ends the reading under way. Many requests may be
// waiting for it, so it goes on when one of them gives up.
func (k *KeySet) readOnce(pause time.Duration, cause *bucket) {
	time.Sleep(pause)
	began := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), fetchTimeout)
	defer cancel()
	raw, err := k.read(ctx)
	var keys publishedKeys
	if err == nil {
		keys, err = parseJWKS(raw)
	}
	changed := k.finish(began, keys, err, cause)
	if err != nil {
		k.log.Warn("reading the token issuer's keys failed", "error", err)
	}
	if changed {
		k.log.Info("the token issuer's keys changed", "usable", len(keys.usable), "ignored", len(keys.ignored))
	}
}

// finish puts keys in force, unless err says that the reading failed, and wakes
// whoever waits for it. It reports whether the set changed.
func (k *KeySet) finish(began time.Time, keys publishedKeys, err error, cause *bucket) (changed bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.began, k.failure = began, err
	k.failures++
	if err == nil {
		k.failures, k.good = 0, time.Now()
		added, gone := keys.without(k.keys), k.keys.without(keys)
		changed = len(added)+len(gone) > 0
		if cause != nil && k.areNew(added) {
			cause.giveBack()
		}
		k.retire(gone)
		k.keys = keys
	}
	close(k.reading)
	k.reading = nil
	return changed
}

// areNew reports whether one of the keys was never seen before. A provider whose
// replicas disagree shows the same ones again and again.
func (k *KeySet) areNew(keys []publishedKey) bool {
	return slices.ContainsFunc(keys, func(key publishedKey) bool {
		return !slices.ContainsFunc(k.retired, func(r retiredKey) bool { return r.same(key) })
	})
}

// retire remembers keys that were taken out of the set, the newest last.
func (k *KeySet) retire(keys []publishedKey) {
	for _, key := range keys {
		k.retired = slices.DeleteFunc(k.retired, func(r retiredKey) bool { return r.same(key) })
		k.retired = append(k.retired, retiredKey{key, time.Now()})
	}
	if n := len(k.retired) - maxRetired; n > 0 {
		k.retired = slices.Delete(k.retired, 0, n)
	}
}
