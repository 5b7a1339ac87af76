package orgkey

import (
	"context"
	"sync"

	"github.com/orgkeys/orgkeys/internal/org"
)

// LocalLock is the Locker of a single process.
type LocalLock struct {
	mu   sync.Mutex
	held map[org.ID]*orgLock
}

type orgLock struct {
	place   chan struct{} // holds one value while the lock is taken
	waiters int           // holders and waiters, so that the last one removes it
}

// NewLocalLock returns a lock that nobody holds.
func NewLocalLock() *LocalLock { return &LocalLock{held: map[org.ID]*orgLock{}} }

// Lock implements Locker.
func (l *LocalLock) Lock(ctx context.Context, org org.ID) (func(), error) {
	lock := l.join(org)
	select {
	case lock.place <- struct{}{}:
		return func() { <-lock.place; l.leave(org) }, nil
	case <-ctx.Done():
		l.leave(org)
		return nil, ctx.Err()
	}
}

func (l *LocalLock) join(org org.ID) *orgLock {
	l.mu.Lock()
	defer l.mu.Unlock()
	lock := l.held[org]
	if lock == nil {
		lock = &orgLock{place: make(chan struct{}, 1)}
		l.held[org] = lock
	}
	lock.waiters++
	return lock
}

func (l *LocalLock) leave(org org.ID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	lock := l.held[org]
	lock.waiters--
	if lock.waiters == 0 {
		delete(l.held, org)
	}
}
