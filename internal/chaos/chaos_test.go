package chaos

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/chaos/cluster"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }

// setting reads what scripts/chaos was asked for.
func setting(t *testing.T, name string, otherwise int) int {
	t.Helper()
	text := os.Getenv("ORGKEYS_TEST_CHAOS_" + name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 {
		t.Fatalf("ORGKEYS_TEST_CHAOS_%s is %q", name, text)
	}
	return n
}

// TestChaos runs three replicas under load while they are killed, and what
// they stand on is killed, emptied, restarted and sealed, and then has the
// checker read everything. It ends after so many kills or seconds, whatever
// comes first; the seed decides what is done to whom.
func TestChaos(t *testing.T) {
	seed := uint64(setting(t, "SEED", 1))
	kills, seconds := setting(t, "KILLS", 12), setting(t, "SECONDS", 20)
	clients, orgs := setting(t, "CLIENTS", 6), setting(t, "ORGS", 8)

	c := cluster.Configure(t, 3,
		harness.Set("ORGKEYS_RESERVATION_TTL", reservationLife.String()), harness.Set("ORGKEYS_AUDIT_DEADLINE", "4s"), harness.Set("ORGKEYS_MAX_GENERATIONS", "3"))
	m := &monkey{Cluster: c, dice: rand.New(rand.NewPCG(seed, 0)), counts: map[string]int{}}
	for _, r := range c.Replicas {
		m.must(t, r.Launch())
	}
	for _, r := range c.Replicas {
		harness.Eventually(t, time.Minute, r.Address()+" is ready", r.Ready)
	}
	l := newLoad(t, c, orgs)
	ctx, cancel := context.WithTimeout(t.Context(), time.Duration(seconds)*time.Second)
	defer cancel()
	var loading sync.WaitGroup
	loading.Go(func() { l.run(ctx, clients, seed) })
	started := time.Now()
	m.run(ctx, t, kills)
	cancel()
	loading.Wait()
	took := time.Since(started)

	m.relaunch(t)
	awaitLives(t, c)
	e := collect(t, c, l)
	t.Logf("seed %d, %s: %v", seed, took.Round(time.Second), m.counts)
	t.Log(l.summary(e))
	for _, broken := range append(Check(e), l.wrong...) {
		t.Error(broken)
	}
	if len(l.received) == 0 || m.counts["kill -9"] == 0 {
		t.Error("the run shows nothing: no key was received, or nobody killed")
	}
}

// monkey breaks things.
type monkey struct {
	*cluster.Cluster
	dice   *rand.Rand
	counts map[string]int
}

func (m *monkey) must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// run breaks things until ctx ends or so many processes were killed.
func (m *monkey) run(ctx context.Context, t *testing.T, kills int) {
	for began, reported := time.Now(), time.Now(); m.counts["kill -9"] < kills; {
		if time.Since(reported) > time.Minute {
			reported = time.Now()
			t.Logf("after %s: %v", time.Since(began).Round(time.Second), m.counts)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Duration(100+m.dice.IntN(900)) * time.Millisecond):
		}
		m.relaunch(t)
		if m.served() {
			m.must(t, m.act(ctx))
		}
	}
}

// served reports whether anybody serves, but now and then says so anyhow:
// otherwise a slow machine shows no load, or none killed while they start.
func (m *monkey) served() bool {
	return m.dice.IntN(10) == 0 || slices.ContainsFunc(m.Replicas, (*harness.Server).Ready)
}

// act does one thing: mostly it kills a replica.
func (m *monkey) act(ctx context.Context) error {
	switch n := m.dice.IntN(100); {
	case n < 82:
		r := m.Replicas[m.dice.IntN(len(m.Replicas))]
		if !r.Running() {
			return nil
		}
		m.counts["kill -9"]++
		r.Kill()
		return r.Launch()
	case n < 88:
		m.counts["Redis flushed"]++
		return m.Redis.Flush(context.WithoutCancel(ctx))
	case n < 92:
		m.counts["Redis killed and restarted"]++
		return m.Redis.Restart()
	case n < 96:
		m.counts["PostgreSQL shut down at once and restarted"]++
		return m.Postgres.Restart()
	default:
		m.counts["Vault sealed and unsealed"]++
		return m.seal(context.WithoutCancel(ctx))
	}
}

func (m *monkey) seal(ctx context.Context) error {
	if err := m.Vault.Seal(ctx); err != nil {
		return fmt.Errorf("sealing Vault: %w", err)
	}
	time.Sleep(time.Duration(m.dice.IntN(1000)) * time.Millisecond)
	return m.Vault.Unseal(ctx)
}

// relaunch launches the replicas that ended by themselves, as a supervisor
// does: they may, while Vault or PostgreSQL is away as they start.
func (m *monkey) relaunch(t *testing.T) {
	t.Helper()
	for _, r := range m.Replicas {
		if !r.Running() {
			m.counts["replica ended by itself and launched again"]++
			m.must(t, r.Launch())
		}
	}
}
