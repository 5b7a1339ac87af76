package e2e

import (
	"context"
	"encoding/json"
	"math/rand/v2"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
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
}

const crashLimit = 3

// TestPromise8_KilledUnderLoad kills the server at random moments. Afterwards
// the quota is right, whatever was acknowledged is there, no key is without its
// event and no event without its record, the token holds the sealing key alone,
// and within one reservation's life every place is free again.
func TestPromise8_KilledUnderLoad(t *testing.T) {
	t.Parallel()
	const life = 6 * time.Second
	issuer := harness.NewIssuer(t)
	outside := filepath.Join(t.TempDir(), "sink.jsonl")
	s := harness.Start(t, harness.TrustedBy(issuer), harness.Set("ORGKEYS_RESERVATION_TTL", life.String()),
		harness.Set("ORGKEYS_MAX", strconv.Itoa(crashLimit)), harness.Set("ORGKEYS_AUDIT_FILE", outside))
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
		time.Sleep(time.Duration(200+random.IntN(2300)) * time.Millisecond)
		s.Kill()
		cancel()
		load.Wait()
		s.Start(t)
		known.check(t, s, orgs)
	}
	onlyOwnKeys(t, s)
	db := s.Database(t)
	harness.Eventually(t, life+harness.Patience, "no reservation is left over", func() bool {
		return harness.Number(t, db, `SELECT count(*) FROM org_keys WHERE state IN ('reserved', 'pending')`) == 0
	})
	for _, org := range orgs {
		for range crashLimit - len(s.List(t, org)) {
			s.Generate(t, org)
		}
		s.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: s.Token(t, org, "OWNER")}).Want(t, 400, strings.Replace(quotaMessage, "(5)", "(3)", 1))
	}
	known.check(t, s, orgs)
	eventsMatchRecords(t, s)
	s.Stop(t)
	if _, stderr, code := s.Run(t, "audit", "verify"); code != 0 {
		t.Errorf("audit verify after %d kills: exit code %d\n%s", *kills, code, stderr)
	}
	t.Logf("%d keys received, %d deletions over %d kills", len(known.keys), len(known.deleted), *kills)
}

// work sends requests until ctx ends. Whoever finds an organization full makes
// place, so that most of the load is keys being made.
func (k *received) work(ctx context.Context, t *testing.T, s *harness.Server, issuer *harness.Issuer, orgs []string, random *rand.Rand) {
	for ctx.Err() == nil {
		org := orgs[random.IntN(len(orgs))]
		token := issuer.Token(t, harness.Claims{"org_id": org})
		resp, err := s.Try(ctx, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: token})
		if err != nil {
			continue
		}
		switch {
		case resp.Status == http.StatusOK:
			k.mu.Lock()
			k.keys[resp.Header.Get("X-Key-Id")] = org
			k.mu.Unlock()
		case resp.Status == http.StatusBadRequest:
			k.deleteOne(ctx, t, s, org, token, random)
		// A generation has half a reservation's life, which can be short on a busy machine.
		case resp.Status != http.StatusServiceUnavailable && !strings.Contains(string(resp.Body), `"generation_failed"`):
			t.Errorf("under load: status %d, body %.300q", resp.Status, resp.Body)
		}
	}
}

func (k *received) deleteOne(ctx context.Context, t *testing.T, s *harness.Server, org, token string, random *rand.Rand) {
	list, err := s.Try(ctx, harness.Request{Method: "GET", Path: harness.KeyPath(org), Token: token})
	if err != nil || list.Status != http.StatusOK {
		return
	}
	keys := harness.ReadList(t, list)
	if len(keys) > crashLimit {
		t.Errorf("under load: %s has %d keys", org, len(keys))
	}
	if len(keys) == 0 {
		return
	}
	id := keys[random.IntN(len(keys))].ID
	k.mu.Lock()
	k.deleted[id] = true
	k.mu.Unlock()
	resp, err := s.Try(ctx, harness.Request{Method: "DELETE", Path: harness.KeyPath(org) + "/" + id, Token: token})
	if err == nil && resp.Status == http.StatusOK {
		k.mu.Lock()
		k.certain[id] = true
		k.mu.Unlock()
	}
}

// check compares the lists with what clients know.
func (k *received) check(t *testing.T, s *harness.Server, orgs []string) {
	t.Helper()
	listed := map[string]bool{}
	for _, org := range orgs {
		keys := s.List(t, org)
		if len(keys) > crashLimit {
			t.Errorf("%s has %d keys, the limit is %d", org, len(keys), crashLimit)
		}
		for _, l := range keys {
			listed[l.ID] = true
			l.Public(t)
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

// TestPromise8_KilledWhileItStartsForTheFirstTime: the token, the issuer's key
// and the database are made at the first start, and a kill at any moment of it
// must not need anybody's hand.
func TestPromise8_KilledWhileItStartsForTheFirstTime(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(*seed, 1))
	for range 3 {
		s := harness.Configure(t)
		for range *kills {
			s.StartFor(t, time.Duration(random.IntN(600))*time.Millisecond)
		}
		s.Start(t)
		org := harness.Org()
		s.Generate(t, org)
		if n := len(s.List(t, org)); n != 1 {
			t.Errorf("%d keys listed", n)
		}
		onlyOwnKeys(t, s)
		s.Stop(t)
	}
}

// onlyOwnKeys fails unless the token holds the service's own keys and nothing
// else: the sealing key, and from the first signature on the pair that signs
// checkpoints, of which a kill may leave half until the next signature.
func onlyOwnKeys(t *testing.T, s *harness.Server) {
	t.Helper()
	objects := s.TokenObjects(t)
	others := slices.DeleteFunc(slices.Clone(objects), func(o string) bool {
		return strings.HasPrefix(o, "Secret Key Object; AES") || strings.Contains(o, "Object; EC_EDWARDS")
	})
	if len(others) > 0 || len(objects) < 1 || len(objects) > 3 {
		t.Errorf("objects in the token: %v", objects)
	}
}
