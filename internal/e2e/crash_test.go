package e2e

import (
	"context"
	"encoding/json"
	"math/rand/v2"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// received is what clients know for certain: the keys they hold whole, and the
// deletions that were confirmed to them or may have happened.
type received struct {
	mu      sync.Mutex
	keys    map[string]string // key ID → organization
	deleted map[string]bool   // asked for, whatever was answered
	certain map[string]bool   // confirmed
	refused int
}

// TestPromise8_KilledUnderLoad kills the server at random moments. Afterwards
// the quota is right, whatever was acknowledged is there, no key is without its
// event and no event without its record, the token holds the sealing key alone,
// and within one reservation's life every place is free again.
func TestPromise8_KilledUnderLoad(t *testing.T) {
	t.Parallel()
	const life = 2 * time.Second
	issuer := harness.NewIssuer(t)
	outside := filepath.Join(t.TempDir(), "sink.jsonl")
	s := harness.Start(t, harness.TrustedBy(issuer), harness.Set("ORGKEYS_RESERVATION_TTL", life.String()),
		harness.Set("ORGKEYS_MAX", "3"), harness.Set("ORGKEYS_AUDIT_FILE", outside))
	sealing := s.TokenObjects(t)
	orgs := []string{harness.Org(), harness.Org(), harness.Org()}
	known := &received{keys: map[string]string{}, deleted: map[string]bool{}, certain: map[string]bool{}}
	random := rand.New(rand.NewPCG(*seed, 0))
	for range *kills {
		ctx, cancel := context.WithCancel(context.Background())
		var load sync.WaitGroup
		for i := range 4 {
			n := random.Uint64()
			load.Go(func() { known.work(ctx, t, s, issuer, orgs, rand.New(rand.NewPCG(n, uint64(i)))) })
		}
		time.Sleep(time.Duration(100+random.IntN(1400)) * time.Millisecond)
		s.Kill()
		cancel()
		load.Wait()
		s.Start(t)
		known.check(t, s, orgs, 3)
	}
	if got := s.TokenObjects(t); !slices.Equal(got, sealing) {
		t.Errorf("objects in the token: %v, at the first start: %v", got, sealing)
	}
	db := s.Database(t)
	harness.Eventually(t, life+harness.Patience, "no reservation is left over", func() bool {
		return harness.Number(t, db, `SELECT count(*) FROM org_keys WHERE state IN ('reserved', 'pending')`) == 0
	})
	for _, org := range orgs {
		for range 3 - len(s.List(t, org)) {
			s.Generate(t, org)
		}
		s.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: s.Token(t, org, "OWNER")}).Want(t, 400, strings.Replace(quotaMessage, "(5)", "(3)", 1))
	}
	known.check(t, s, orgs, 3)
	eventsMatchRecords(t, s)
	s.Stop(t)
	if _, stderr, code := s.Run(t, "audit", "verify"); code != 0 {
		t.Errorf("audit verify after %d kills: exit code %d\n%s", *kills, code, stderr)
	}
	t.Logf("%d keys received, %d deletions, %d refusals over %d kills", len(known.keys), len(known.deleted), known.refused, *kills)
}

// work sends requests until ctx ends.
func (k *received) work(ctx context.Context, t *testing.T, s *harness.Server, issuer *harness.Issuer, orgs []string, random *rand.Rand) {
	for ctx.Err() == nil {
		org := orgs[random.IntN(len(orgs))]
		token := issuer.Token(t, harness.Claims{"org_id": org})
		switch random.IntN(5) {
		case 0:
			k.deleteOne(ctx, s, org, token)
		case 1:
			s.Try(ctx, harness.Request{Method: "GET", Path: harness.KeyPath(org), Token: token})
		default:
			resp, err := s.Try(ctx, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: token})
			k.mu.Lock()
			switch {
			case err == nil && resp.Status == http.StatusOK:
				k.keys[resp.Header.Get("X-Key-Id")] = org
			case err == nil:
				k.refused++
				if resp.Status != 400 && resp.Status != 503 {
					t.Errorf("under load: status %d, body %q", resp.Status, resp.Body)
				}
			}
			k.mu.Unlock()
		}
	}
}

func (k *received) deleteOne(ctx context.Context, s *harness.Server, org, token string) {
	k.mu.Lock()
	var id string
	for candidate, owner := range k.keys {
		if owner == org && !k.deleted[candidate] {
			id = candidate
			break
		}
	}
	if id != "" {
		k.deleted[id] = true
	}
	k.mu.Unlock()
	if id == "" {
		return
	}
	resp, err := s.Try(ctx, harness.Request{Method: "DELETE", Path: harness.KeyPath(org) + "/" + id, Token: token})
	if err == nil && resp.Status == http.StatusOK {
		k.mu.Lock()
		k.certain[id] = true
		k.mu.Unlock()
	}
}

// check compares the lists with what clients know.
func (k *received) check(t *testing.T, s *harness.Server, orgs []string, limit int) {
	t.Helper()
	listed := map[string]bool{}
	for _, org := range orgs {
		keys := s.List(t, org)
		if len(keys) > limit {
			t.Errorf("%s has %d keys, the limit is %d", org, len(keys), limit)
		}
		for _, l := range keys {
			listed[l.ID] = true
			l.Public(t)
			if k.keys[l.ID] == "" && l.Delivery != "unconfirmed" {
				t.Logf("key %s is listed as delivered, and the client did not get it whole", l.ID)
			}
		}
	}
	for id := range k.keys {
		if !listed[id] && !k.deleted[id] {
			t.Errorf("key %s was received, never deleted, and is not listed", id)
		}
		if listed[id] && k.certain[id] {
			t.Errorf("key %s was deleted, and is listed", id)
		}
	}
}

// eventsMatchRecords: every key that is there has its events in the log, and
// every key that an event says was made is there or has an event of its end.
func eventsMatchRecords(t *testing.T, s *harness.Server) {
	t.Helper()
	db := s.Database(t)
	harness.Eventually(t, harness.Patience, "every event has its index", func() bool {
		return harness.Number(t, db, `SELECT count(*) FROM events WHERE idx IS NULL`) == 0
	})
	created, ended := map[string]bool{}, map[string]bool{}
	for _, raw := range harness.Strings(t, db, `SELECT leaf FROM events ORDER BY idx`) {
		var leaf harness.Leaf
		if err := json.Unmarshal([]byte(raw), &leaf); err != nil {
			t.Fatalf("leaf %q: %v", raw, err)
		}
		switch leaf.Type {
		case "orgkey.created":
			created[leaf.Object] = true
		case "orgkey.withdrawn", "orgkey.deleted":
			ended[leaf.Object] = true
		}
	}
	there := map[string]bool{}
	for _, id := range harness.Strings(t, db, `SELECT id FROM org_keys WHERE state IN ('pending', 'released')`) {
		there[id] = true
		if !created[id] {
			t.Errorf("key %s is there without its event", id)
		}
	}
	for id := range created {
		if there[id] == ended[id] {
			t.Errorf("key %s: record there %t, ended by an event %t", id, there[id], ended[id])
		}
	}
}
