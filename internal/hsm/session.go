//go:build cgo

package hsm

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/pkcs11"
)

// session is a PKCS#11 session that one operation uses at a time.
type session struct {
	handle pkcs11.SessionHandle
	turn   chan struct{}             // holds an element while a call is in the library
	since  atomic.Pointer[time.Time] // when that call began; nil: none is in the library
	gone   bool                      // its life has ended; guarded by turn
}

func newSession(h pkcs11.SessionHandle) *session {
	return &session{handle: h, turn: make(chan struct{}, 1)}
}

// do runs f while no other operation uses the session.
func (s *session) do(f func(pkcs11.SessionHandle) error) error {
	s.turn <- struct{}{}
	defer func() { <-s.turn }()
	if s.gone {
		return errRetired
	}
	now := time.Now()
	s.since.Store(&now)
	defer s.since.Store(nil)
	return f(s.handle)
}

// stuck reports whether a call has been in the library for longer than limit.
func (s *session) stuck(limit time.Duration) bool {
	since := s.since.Load()
	return since != nil && time.Since(*since) > limit
}

// call is do with an end to the waiting. If ctx ends while f runs, call reports
// its cause and that f is still running, and late is called with f's error afterwards.
func (s *session) call(ctx context.Context, f func(pkcs11.SessionHandle) error, late func(error)) (running bool, err error) {
	if ctx.Err() != nil {
		return false, context.Cause(ctx)
	}
	done := make(chan error, 1)
	go func() { done <- s.do(f) }()
	select {
	case err := <-done:
		return false, err
	case <-ctx.Done():
		go func() { late(<-done) }()
		return true, context.Cause(ctx)
	}
}

// retire waits until no call is in the library and lets no further one in.
func (s *session) retire(ctx context.Context) error {
	select {
	case s.turn <- struct{}{}:
		s.gone = true
		<-s.turn
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for a call to return from the library: %w", ctx.Err())
	}
}

// pool lends sessions.
type pool struct {
	all     []*session
	limit   time.Duration // a call that takes longer is stuck
	idle    chan *session
	shut    chan struct{}
	shutter sync.Once
	waiter  sync.Once
}

func newPool(all []*session, limit time.Duration) *pool {
	p := &pool{all: all, limit: limit, idle: make(chan *session, len(all)), shut: make(chan struct{})}
	for _, s := range all {
		p.idle <- s
	}
	return p
}

// take waits for a session until ctx ends. It reports errRetired once the pool
// is closed, and errSlow if every session is stuck.
func (p *pool) take(ctx context.Context) (*session, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	select {
	case <-p.shut:
		return nil, errRetired
	default:
	}
	for p.stuck() < len(p.all) {
		select {
		case s := <-p.idle:
			return s, nil
		case <-p.shut:
			return nil, errRetired
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(p.limit):
		}
	}
	return nil, errSlow
}

// stuck counts the sessions that are.
func (p *pool) stuck() int {
	n := 0
	for _, s := range p.all {
		if s.stuck(p.limit) {
			n++
		}
	}
	return n
}

func (p *pool) put(s *session) { p.idle <- s }

// close lets nobody take a session any more.
func (p *pool) close() { p.shutter.Do(func() { close(p.shut) }) }

// drain closes the pool and waits for what it has lent, as long as patience
// lasts; a session still out then is retired in its holder's hands. It fails
// only if a call does not return from the library before ctx ends, and may
// then be called again.
func (p *pool) drain(ctx, patience context.Context) error {
	p.close()
	p.waiter.Do(func() {
		for range p.all {
			select {
			case <-p.idle:
			case <-patience.Done():
				return
			}
		}
	})
	for _, s := range p.all {
		if err := s.retire(ctx); err != nil {
			return err
		}
	}
	return nil
}
