package e2e

import (
	"context"
	"math"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// TestPromise3_ThirtyConcurrentRequestsGiveExactlyFiveKeys: requests that
// find no place in the back end may hear 503 and come again, as clients do.
func TestPromise3_ThirtyConcurrentRequestsGiveExactlyFiveKeys(t *testing.T) {
	t.Parallel()
	s := harness.Start(t, raceOption(t)...)
	org := harness.Org()
	owner := s.Token(t, org, "OWNER")
	var mu sync.Mutex
	statuses := map[int]int{}
	ids := map[string]bool{}
	inParallel(30, func(int) {
		resp := s.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: owner})
		mu.Lock()
		defer mu.Unlock()
		statuses[resp.Status]++
		switch resp.Status {
		case 200:
			ids[resp.Header.Get("X-Key-Id")] = true
		case 400:
			if got := resp.Message(t); got != quotaMessage {
				t.Errorf("message %q", got)
			}
		default:
			t.Errorf("status %d, body %.300q", resp.Status, resp.Body)
		}
	})
	listed := s.List(t, org)
	if len(listed) != 5 || len(ids) != 5 || statuses[200] != 5 || statuses[400] != 25 {
		t.Errorf("%d keys listed, %d released, statuses %v; want exactly 5 keys and 25 refusals", len(listed), len(ids), statuses)
	}
	for _, l := range listed {
		if !ids[l.ID] {
			t.Errorf("key %s is listed and nobody received it", l.ID)
		}
	}
}

func TestPromise3_LimitLoweredBelowWhatIsThereGivesNoKey(t *testing.T) {
	t.Parallel()
	s := harness.Start(t, harness.Set("ORGKEYS_MAX", "3"))
	org := harness.Org()
	for range 3 {
		s.Generate(t, org)
	}
	s.Stop(t)
	s.Configured("ORGKEYS_MAX", "2")
	s.Start(t)
	owner := s.Token(t, org, "OWNER")
	post := harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: owner}
	message := strings.Replace(quotaMessage, "(5)", "(2)", 1)
	s.Do(t, post).Want(t, 400, message)
	// Two of three are still the limit; only the next deletion makes a place.
	s.Do(t, harness.Request{Method: "DELETE", Path: harness.KeyPath(org) + "/" + s.List(t, org)[0].ID, Token: owner})
	s.Do(t, post).Want(t, 400, message)
	s.Do(t, harness.Request{Method: "DELETE", Path: harness.KeyPath(org) + "/" + s.List(t, org)[0].ID, Token: owner})
	s.Generate(t, org)
	s.Do(t, post).Want(t, 400, message)
}

// TestOverloadAnswersAtOnce: past the bound on generations there is 503 with
// Retry-After and no queue, and a full organization still hears 400.
func TestOverloadAnswersAtOnce(t *testing.T) {
	t.Parallel()
	s := harness.Start(t, harness.Set("ORGKEYS_MAX_GENERATIONS", "1"), harness.Set("ORGKEYS_MAX", "1"))
	full := harness.Org()
	s.Generate(t, full)
	fullOwner := s.Token(t, full, "OWNER")
	orgs := make([]string, 8)
	for i := range orgs {
		orgs[i] = harness.Org()
		s.Token(t, orgs[i], "OWNER")
	}
	var mu sync.Mutex
	statuses := map[int]int{}
	var slowest time.Duration               // refusal
	fastest := time.Duration(math.MaxInt64) // generation
	inParallel(2*len(orgs), func(i int) {
		if i%2 == 1 {
			s.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(full), Token: fullOwner}).Want(t, 400, strings.Replace(quotaMessage, "(5)", "(1)", 1))
			return
		}
		org := orgs[i/2]
		resp := s.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: s.Token(t, org, "OWNER")})
		mu.Lock()
		defer mu.Unlock()
		statuses[resp.Status]++
		if resp.Status == 200 {
			fastest = min(fastest, resp.Took)
		}
		if resp.Status == 503 {
			slowest = max(slowest, resp.Took)
			if n, err := strconv.Atoi(resp.Header.Get("Retry-After")); err != nil || n < 1 {
				t.Errorf("Retry-After is %q", resp.Header.Get("Retry-After"))
			}
		}
	})
	if statuses[200] == 0 || statuses[503] == 0 || statuses[200]+statuses[503] != len(orgs) {
		t.Errorf("statuses %v", statuses)
	}
	// At once is before the one generation that has the place could be over.
	// The database and the audit log, which a refusal asks, share the machine.
	if slowest >= fastest {
		t.Errorf("the slowest refusal took %s, the fastest generation %s", slowest, fastest)
	}
	// Whoever was refused holds no place.
	for _, org := range orgs {
		if len(s.List(t, org)) == 0 {
			s.Generate(t, org)
			return
		}
	}
}

// TestPromise6_DeletingAllKeysCancelsWhatIsBeingGenerated: after the deletion
// answered, no request that was under way leaves a usable key behind.
func TestPromise6_DeletingAllKeysCancelsWhatIsBeingGenerated(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	owner := s.Token(t, org, "OWNER")
	var mu sync.Mutex
	var during []harness.Response
	done := make(chan struct{})
	go func() {
		defer close(done)
		inParallel(4, func(int) {
			resp, err := s.Try(context.Background(), harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: owner})
			if err == nil {
				mu.Lock()
				during = append(during, resp)
				mu.Unlock()
			}
		})
	}()
	db := s.Database(t)
	harness.Eventually(t, harness.Patience, "four places are taken", func() bool {
		return harness.Number(t, db, `SELECT count(*) FROM org_keys WHERE org_id = ? AND slot IS NOT NULL`, org) >= 4
	})
	if resp := s.Do(t, harness.Request{Method: "DELETE", Path: harness.KeyPath(org), Token: owner}); resp.Status != 200 {
		t.Fatalf("status %d", resp.Status)
	}
	if n := len(s.List(t, org)); n != 0 {
		t.Errorf("%d keys listed after all were deleted", n)
	}
	<-done
	if n := len(s.List(t, org)); n != 0 {
		t.Errorf("%d keys listed after the requests under way ended", n)
	}
	for _, resp := range during {
		if resp.Status == 200 {
			continue // released before the deletion; the list shows that it is gone
		}
		if resp.Status != http.StatusInternalServerError && resp.Status != http.StatusServiceUnavailable && resp.Status != http.StatusConflict {
			t.Errorf("a cancelled request heard %d: %s", resp.Status, resp.Body)
		}
	}
	s.Generate(t, org)
}

// inParallel runs f n times at once and waits.
func inParallel(n int, f func(i int)) {
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range n {
		wg.Go(func() {
			<-start
			f(i)
		})
	}
	close(start)
	wg.Wait()
}
