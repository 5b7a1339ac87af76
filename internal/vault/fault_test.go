package vault_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/orgkey"
	"github.com/orgkeys/orgkeys/internal/vault"
)

// prompt is how long an answer may take when Vault is away; it includes the
// one repetition, and leaves room for a busy machine.
const prompt = 3 * time.Second

// everything is each kind of call that the service makes.
func everything(ctx context.Context, c *vault.Client) map[string]func() error {
	return map[string]func() error{
		"generate": func() error { _, err := generate(ctx, c); return err },
		"seal":     func() error { _, err := c.Sealer().Seal(ctx, item.Binding, []byte("v")); return err },
		"open":     func() error { _, err := c.Sealer().Open(ctx, []sealedItem{item}); return err },
		"sink":     func() error { _, err := c.Sink().Last(ctx); return err },
		"receipt":  func() error { _, err := c.ReceiptKeys(ctx); return err },
		"healthy":  func() error { return c.Healthy(ctx) },
		"reap":     func() error { _, err := c.Reap(ctx, nobodyLives); return err },
	}
}

func nobodyLives(context.Context, []string) (map[string]bool, error) { return nil, nil }

func allUnavailable(t *testing.T, c *vault.Client) {
	t.Helper()
	for name, do := range everything(t.Context(), c) {
		t.Run(name, func(t *testing.T) { promptly(t, prompt, do) })
	}
}

// backAtWork fails the test unless the same client works again.
func backAtWork(t *testing.T, c *vault.Client) {
	t.Helper()
	eventually(t, func() error {
		if _, err := c.Sealer().Seal(t.Context(), item.Binding, []byte("v")); err != nil {
			return err
		}
		_, err := generate(t.Context(), c)
		return err
	})
	if p := problems(c); p != "" {
		t.Errorf("the check at start still finds: %s", p)
	}
}

func TestVaultSealed(t *testing.T) {
	c := open(t)
	if err := server.Seal(t.Context()); err != nil {
		t.Fatal(err)
	}
	allUnavailable(t, c)
	if p := problems(c); p != "Vault is sealed: vault operator unseal" {
		t.Errorf("the check at start finds: %s", p)
	}
	late := open(t) // opened while Vault is sealed
	if err := server.Unseal(t.Context()); err != nil {
		t.Fatal(err)
	}
	backAtWork(t, c)
	backAtWork(t, late)
}

// Vault Enterprise, and load balancers by its sys/health, answer with statuses of
// Vault's own for nodes that cannot serve. No Enterprise runs here, so a proxy says
// what its documentation says.
func TestStandbysOfEnterpriseAreNamed(t *testing.T) {
	for status, words := range map[int]string{472: "disaster-recovery", 473: "performance standby"} {
		for name, body := range map[string]string{"by Vault": `{"errors":[]}`, "by a health check": `{"initialized":true,"sealed":false,"standby":true}`, "without a body": ""} {
			t.Run(fmt.Sprint(status, " ", name), func(t *testing.T) {
				proxy, c := through(t)
				proxy.Before(func(w http.ResponseWriter, _ *http.Request) bool {
					w.WriteHeader(status)
					fmt.Fprint(w, body)
					return false
				})
				for call, do := range everything(t.Context(), c) {
					if err := do(); !errors.Is(err, orgkey.ErrUnavailable) || errors.Is(err, vault.ErrLogin) || !strings.Contains(err.Error(), words) {
						t.Errorf("%s: got %v", call, err)
					}
				}
				if p := problems(c); !strings.Contains(p, words) {
					t.Errorf("the check at start finds: %s", p)
				}
			})
		}
	}
	// It answers sys/seal-status as if all were well.
	proxy, c := through(t)
	proxy.Before(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path != "/v1/sys/health" {
			return true
		}
		w.WriteHeader(472)
		return false
	})
	if p := problems(c); !strings.Contains(p, "disaster-recovery") || strings.Contains(p, "\n") {
		t.Errorf("the check at start finds: %s", p)
	}
}

func TestVaultRestarted(t *testing.T) {
	c := open(t)
	if err := server.Kill(); err != nil {
		t.Fatal(err)
	}
	allUnavailable(t, c)
	if p := problems(c); !strings.Contains(p, "Vault does not answer") {
		t.Errorf("the check at start finds: %s", p)
	}
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	backAtWork(t, c)
}

func TestAuditFileCannotBeWritten(t *testing.T) {
	c := open(t)
	if err := server.BreakAudit(); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if c.Healthy(t.Context()) == nil {
			return errors.New("Vault still answers")
		}
		return nil
	})
	allUnavailable(t, c)
	if p := problems(c); !strings.Contains(p, "audit device") {
		t.Errorf("the check at start finds: %s", p)
	}
	if err := server.MendAudit(); err != nil {
		t.Fatal(err)
	}
	backAtWork(t, c)
}

func TestSlowVaultStillServes(t *testing.T) {
	const delay = 3 * time.Second // less than a call may take
	proxy, c := through(t)
	name := uuid.NewString()
	proxy.Before(func(_ http.ResponseWriter, r *http.Request) bool {
		select {
		case <-time.After(delay):
		case <-r.Context().Done():
		}
		return true
	})
	defer proxy.Before(nil)
	start := time.Now()
	k, err := c.Keystore().Create(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); took < 2*delay {
		t.Errorf("two calls took %s: they were not slow", took)
	}
	proxy.Before(nil)
	if err := k.Destroy(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestVaultThatNeverAnswersEndsWithTheCallTimeout(t *testing.T) {
	proxy, c := through(t, func(c *vault.Config) { c.CallTimeout = time.Second })
	released := make(chan struct{})
	proxy.Before(func(http.ResponseWriter, *http.Request) bool { <-released; return false })
	defer close(released)
	for name, do := range everything(t.Context(), c) {
		t.Run(name, func(t *testing.T) {
			promptly(t, prompt, func() error {
				err := do()
				if !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("got %v, want one that says the deadline passed", err)
				}
				return err
			})
		})
	}
}

func TestCallersDeadlineEndsTheCall(t *testing.T) {
	proxy, c := through(t)
	released := make(chan struct{})
	proxy.Before(func(http.ResponseWriter, *http.Request) bool { <-released; return false })
	defer close(released)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	promptly(t, 2*time.Second, func() error { return c.Healthy(ctx) })
}

func TestOneFailureIsRepeated(t *testing.T) {
	failures := map[string]func(w http.ResponseWriter){
		"500":                   func(w http.ResponseWriter) { w.WriteHeader(http.StatusInternalServerError) },
		"503":                   func(w http.ResponseWriter) { w.WriteHeader(http.StatusServiceUnavailable) },
		"the connection breaks": func(http.ResponseWriter) { panic(http.ErrAbortHandler) },
	}
	for name, fail := range failures {
		for _, when := range []string{"before Vault", "after Vault"} {
			t.Run(name+" "+when, func(t *testing.T) { oneFailure(t, when == "before Vault", fail) })
		}
	}
}

// oneFailure fails the first of each request once: before Vault sees it, or
// when Vault has done it and answers.
func oneFailure(t *testing.T, before bool, fail func(http.ResponseWriter)) {
	proxy, c := through(t)
	var mu sync.Mutex
	asked := map[string]int{}
	odd := func(r *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		asked[r.Method+r.URL.Path]++
		return asked[r.Method+r.URL.Path]%2 == 1
	}
	if before {
		proxy.Before(func(w http.ResponseWriter, r *http.Request) bool {
			if !odd(r) {
				return true
			}
			fail(w)
			return false
		})
	} else {
		proxy.After(func(r *http.Response) error {
			if odd(r.Request) {
				return errors.New("lost") // the proxy answers 502
			}
			return nil
		})
	}
	if _, err := generate(t.Context(), c); err != nil {
		t.Errorf("generating: %v", err)
	}
	if left := keysInVault(t); len(left) > 0 {
		t.Errorf("Transit still holds %v", left)
	}
	origin := freshLog(t)
	if err := appendAll(t, c.Sink(), entries(t, 0, 2), checkpointAt(origin, 2)); err != nil {
		t.Errorf("appending: %v", err)
	}
}

func TestLastingFailureIsReported(t *testing.T) {
	proxy, c := through(t)
	var asked atomic.Int64
	proxy.Before(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, "/sys/audit") {
			asked.Add(1)
		}
		w.WriteHeader(http.StatusInternalServerError)
		return false
	})
	promptly(t, prompt, func() error { return c.Healthy(t.Context()) })
	if n := asked.Load(); n != 2 {
		t.Errorf("Vault was asked %d times, want once and once more", n)
	}
}

// Who cannot wait any longer does not wait for the look that another began.
func TestALookAtTheTrailHoldsNobodyUp(t *testing.T) {
	proxy, c := through(t)
	asked, answer := make(chan struct{}, 64), make(chan struct{})
	proxy.Before(func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, "/sys/audit") {
			asked <- struct{}{}
			<-answer
		}
		return true
	})
	patient := make(chan error, 1)
	go func() { patient <- c.Healthy(t.Context()) }()
	<-asked
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	hurried := make(chan error, 1)
	go func() { hurried <- c.Healthy(ctx) }()
	select {
	case err := <-hurried:
		if !errors.Is(err, orgkey.ErrUnavailable) {
			t.Errorf("who could not wait heard %v", err)
		}
	case <-time.After(3 * time.Second):
		t.Error("who could not wait is still waiting")
	}
	close(answer)
	if err := <-patient; err != nil {
		t.Errorf("who waited heard %v", err)
	}
}

// TestFailedExportIsNotHeldUpByTheRemoval: nobody waits for a slow Vault to
// remove a key whose private half could not be had; it is removed all the same.
func TestFailedExportIsNotHeldUpByTheRemoval(t *testing.T) {
	proxy, c := through(t)
	k, err := c.Keystore().Create(t.Context(), uuid.NewString())
	if err != nil {
		t.Fatal(err)
	}
	released := make(chan struct{})
	proxy.Before(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/export/") {
			w.WriteHeader(http.StatusServiceUnavailable)
			return false
		}
		<-released
		return true
	})
	if _, err := k.Export(t.Context()); !errors.Is(err, orgkey.ErrUnavailable) {
		t.Errorf("exporting: %v", err)
	}
	promptly(t, 2*time.Second, func() error { return k.Destroy(t.Context()) })
	close(released)
	eventually(t, func() error {
		if left := keysInVault(t); len(left) > 0 {
			return fmt.Errorf("Transit still holds %v", left)
		}
		return nil
	})
	if err := k.Destroy(t.Context()); err != nil {
		t.Errorf("destroying it again: %v", err)
	}
}
