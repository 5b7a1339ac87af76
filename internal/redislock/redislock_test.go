package redislock_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"

	"github.com/orgkeys/orgkeys/internal/redislock"
	"github.com/orgkeys/orgkeys/internal/redislock/redistest"
)

func start(t *testing.T, args ...string) *redistest.Server {
	t.Helper()
	s, err := redistest.Start(args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func open(t *testing.T, url string) *redislock.Lock {
	t.Helper()
	l, err := redislock.Open(redislock.Config{URL: url}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func TestOneHolderAtATimeAcrossReplicas(t *testing.T) {
	s := start(t)
	replicas := []*redislock.Lock{open(t, s.URL()), open(t, s.URL()), open(t, s.URL())}
	var holders, most, held atomic.Int64
	var wg sync.WaitGroup
	for i := range 30 {
		wg.Go(func() {
			unlock, err := replicas[i%3].Lock(within(t, 20*time.Second), "acme")
			if err != nil {
				t.Error(err)
				return
			}
			most.Store(max(most.Load(), holders.Add(1)))
			held.Add(1)
			time.Sleep(time.Millisecond)
			holders.Add(-1)
			unlock()
		})
	}
	wg.Wait()
	if most.Load() != 1 || held.Load() != 30 {
		t.Errorf("%d held it, at most %d at once", held.Load(), most.Load())
	}
}

func TestWaitingIsBounded(t *testing.T) {
	s := start(t)
	l := open(t, s.URL())
	if _, err := l.Lock(t.Context(), "acme"); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Lock(within(t, 100*time.Millisecond), "acme"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("waiting for a held lock: %v", err)
	}
	if _, err := l.Lock(within(t, time.Second), "other"); err != nil {
		t.Errorf("another organization waits too: %v", err)
	}
}

// Whoever waits in vain for a lock that another holds says nothing of Redis.
func TestATimeoutIsNoFailureOfRedis(t *testing.T) {
	s := start(t)
	l := open(t, s.URL())
	if _, err := l.Lock(t.Context(), "acme"); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			for i := range 15 {
				// Time for one answer, also on a busy machine: without one, Redis counts as unavailable.
				ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond+time.Duration(i)*1400*time.Microsecond)
				if _, err := l.Lock(ctx, "acme"); err == nil {
					t.Error("two hold the lock")
				}
				cancel()
			}
		})
	}
	wg.Wait()
	if got, want := outcomes(t, l), "held 1, timeout 300, unavailable 0, unreleased 0"; got != want {
		t.Errorf("outcomes are %q, want %q", got, want)
	}
}

// A holder whose lock expired must not release the next one's.
func TestReleaseChecksTheToken(t *testing.T) {
	s := start(t)
	l := open(t, s.URL())
	unlock, err := l.Lock(t.Context(), "acme")
	if err != nil {
		t.Fatal(err)
	}
	c := redis.NewClient(&redis.Options{Addr: s.Addr()})
	defer c.Close()
	const key = "orgkeys:quota:{acme}"
	if err := c.Set(t.Context(), key, "the next holder's", time.Minute).Err(); err != nil {
		t.Fatal(err)
	}
	unlock()
	if got := c.Get(t.Context(), key).Val(); got != "the next holder's" {
		t.Errorf("the next holder's lock is %q", got)
	}
}

func TestARedisThatIsDownFailsAtOnceAndComesBack(t *testing.T) {
	s := start(t)
	l := open(t, s.URL())
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Lock(within(t, 5*time.Second), "acme"); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("without Redis: %v", err)
	}
	if _, err := l.Lock(within(t, 5*time.Second), "acme"); !errors.Is(err, redislock.ErrResting) {
		t.Errorf("right after a failure: %v", err)
	}
	if err := s.Restart(); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		unlock, err := l.Lock(within(t, time.Second), "acme")
		if err == nil {
			unlock()
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("Redis is back, the lock is not: %v", err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func TestAHungRedisCostsNoMoreThanThePatience(t *testing.T) {
	s := start(t)
	l := open(t, s.URL())
	if err := errors.Join(l.Healthy(t.Context()), s.Signal(syscall.SIGSTOP)); err != nil {
		t.Fatal(err)
	}
	defer s.Signal(syscall.SIGCONT)
	if _, err := l.Lock(within(t, 200*time.Millisecond), "acme"); err == nil {
		t.Fatal("locked on a hung Redis")
	}
	if _, err := l.Lock(within(t, time.Minute), "acme"); !errors.Is(err, redislock.ErrResting) {
		t.Errorf("the next request asks the hung Redis again: %v", err)
	}
}

func TestAnACLUserAndItsPassword(t *testing.T) {
	s := start(t, "--user", "default", "off", "--user", "orgkeys", "on", ">canary-password", "~orgkeys:*", "+@all")
	l := open(t, strings.Replace(s.URL(), "redis://", "redis://orgkeys:canary-password@", 1))
	unlock, err := l.Lock(within(t, 5*time.Second), "acme")
	if err != nil {
		t.Fatal(err)
	}
	unlock()
}

// A Redis that answers and cannot lock is not one to rely on, and says what is
// to be done.
func TestARedisThatCannotLockIsNotHealthy(t *testing.T) {
	user := func(rights ...string) []string {
		return append([]string{"--user", "orgkeys", "on", ">canary-password", "~orgkeys:*", "+ping", "+hello"}, rights...)
	}
	for _, tt := range []struct {
		name     string
		args     []string
		password string
		want     error
	}{
		{"all it needs", user("+set", "+get", "+del", "+eval", "+evalsha"), "canary-password", nil},
		{"no SET", user("+get", "+del", "+eval", "+evalsha"), "canary-password", redislock.ErrPermission},
		{"no EVAL", user("+set", "+get", "+del"), "canary-password", redislock.ErrPermission},
		{"no DEL", user("+set", "+get", "+eval", "+evalsha"), "canary-password", redislock.ErrPermission},
		{"another password", user("+@all"), "wrong", redislock.ErrLogin},
		{"a replica", append(user("+@all"), "--replicaof", "127.0.0.1", "1"), "canary-password", redislock.ErrReadOnly},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := start(t, tt.args...)
			l := open(t, strings.Replace(s.URL(), "redis://", "redis://orgkeys:"+tt.password+"@", 1))
			if err := l.Healthy(within(t, 5*time.Second)); !errors.Is(err, tt.want) || err != nil && strings.Contains(err.Error(), "canary") {
				t.Errorf("healthy: %v, want %v", err, tt.want)
			}
		})
	}
}

// outcomes is what was counted, in alphabetical order.
func outcomes(t *testing.T, l *redislock.Lock) string {
	t.Helper()
	r := prometheus.NewRegistry()
	r.MustRegister(l.Outcomes())
	families, err := r.Gather()
	if err != nil || len(families) != 1 {
		t.Fatalf("%d metrics, %v", len(families), err)
	}
	var all []string
	for _, m := range families[0].GetMetric() {
		all = append(all, fmt.Sprintf("%s %v", m.GetLabel()[0].GetValue(), m.GetCounter().GetValue()))
	}
	return strings.Join(all, ", ")
}

// Whether locks can be had shows in a metric, and in one warning a while.
func TestWhatBecomesOfLocksIsCounted(t *testing.T) {
	s := start(t, "--user", "orgkeys", "on", ">canary-password", "~orgkeys:*", "+set", "+hello")
	var log strings.Builder
	l, err := redislock.Open(redislock.Config{URL: strings.Replace(s.URL(), "redis://", "redis://orgkeys:canary-password@", 1)}, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	unlock, err := l.Lock(within(t, 5*time.Second), "acme")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Lock(within(t, 50*time.Millisecond), "acme"); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	unlock() // it may not
	if _, err := l.Lock(within(t, 5*time.Second), "acme"); !errors.Is(err, redislock.ErrResting) {
		t.Fatal(err)
	}
	if got, want := outcomes(t, l), "held 1, timeout 1, unavailable 1, unreleased 1"; got != want {
		t.Errorf("counted %q, want %q", got, want)
	}
	if n := strings.Count(log.String(), "level=WARN"); n != 1 || strings.Contains(log.String(), "canary") {
		t.Errorf("%d warnings, want 1:\n%s", n, log.String())
	}
}

func TestURLForms(t *testing.T) {
	for _, good := range []string{"redis://h:1", "rediss://u:p@h:1/2", "redis://h:1?addr=h:2&addr=h:3", "redis://h:1?master_name=m&addr=h:2"} {
		if l, err := redislock.Open(redislock.Config{URL: good}, slog.New(slog.DiscardHandler)); err != nil {
			t.Errorf("%s: %v", good, err)
		} else {
			l.Close()
		}
	}
	_, err := redislock.Open(redislock.Config{URL: "redis://u:canary-password@h:notaport?db=x"}, slog.New(slog.DiscardHandler))
	if err == nil || strings.Contains(err.Error(), "canary") {
		t.Errorf("a bad URL: %v", err)
	}
}
