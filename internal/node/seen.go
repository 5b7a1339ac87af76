package node

import (
	"context"
	"sync"
	"time"
)

const (
	forgetBatch = 500             // expired uses a transaction
	lastFlush   = 5 * time.Second // for the last uses at the end of the service
)

// seen collects when keys were last used and nodes last seen, so that this
// costs one statement per interval instead of one write per request. A crash loses
// the last interval; the evidence is the audit log.
type seen struct {
	mu    sync.Mutex
	keys  map[string]time.Time
	nodes map[Contact]time.Time
}

func newSeen() *seen {
	return &seen{keys: map[string]time.Time{}, nodes: map[Contact]time.Time{}}
}

func (s *seen) key(id string, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys[id] = at
}

func (s *seen) node(node Contact, at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nodes[node] = at
}

// take returns what was collected and starts again.
func (s *seen) take() (map[string]time.Time, map[Contact]time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	keys, nodes := s.keys, s.nodes
	s.keys, s.nodes = map[string]time.Time{}, map[Contact]time.Time{}
	return keys, nodes
}

// Keep stores, every interval until ctx ends and then once more, when keys and
// nodes were last seen, and deletes uses of signatures that are out of their time
// window. Several replicas may run it at once.
func (s *Service) Keep(ctx context.Context, interval time.Duration) error {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastFlush)
			defer cancel()
			s.flush(ctx)
			return nil
		case <-ticker.C:
			s.flush(ctx)
			s.forget(ctx)
		}
	}
}

func (s *Service) flush(ctx context.Context) {
	keys, nodes := s.seen.take()
	if len(keys) == 0 && len(nodes) == 0 {
		return
	}
	if err := s.store.Seen(ctx, ago(s.now(), keys), ago(s.now(), nodes)); err != nil {
		s.gate.Log.Warn("last uses of keys and last contacts of nodes could not be stored", "keys", len(keys), "nodes", len(nodes), "error", err)
	}
}

// ago is how long before now each time was, by Go's monotonic clock.
func ago[K comparable](now time.Time, times map[K]time.Time) map[K]time.Duration {
	all := make(map[K]time.Duration, len(times))
	for k, at := range times {
		all[k] = now.Sub(at)
	}
	return all
}

func (s *Service) forget(ctx context.Context) {
	for {
		n, err := s.store.ForgetUses(ctx, forgetBatch)
		if err != nil && ctx.Err() == nil {
			s.gate.Log.Warn("expired uses of signatures could not be removed", "error", err)
		}
		if err != nil || n < forgetBatch {
			return
		}
	}
}
