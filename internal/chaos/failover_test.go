package chaos

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/chaos/cluster"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/sqlstore/pgtest"
)

// failovers is replicas under load on a database whose primary is killed, round
// after round, and whose standby is promoted by the documented steps.
type failovers struct {
	*cluster.Cluster
	load             *load
	primary, standby *pgtest.Server
	steps            []string // the documented commands
	lost             map[string]bool
	losses           int // rounds in which something was lost
	deaths           []death
}

// death is when a primary was killed, and when its standby's promotion began.
type death struct{ killed, promoted time.Time }

// documentedSteps are the commands of a section of docs/operations.md.
func documentedSteps(t *testing.T, heading string) (steps []string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(harness.ModuleRoot(t), "docs", "operations.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(text), "\n### "+heading+"\n")
	section, _, _ = strings.Cut(section, "\n##")
	for _, block := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(section, -1) {
		steps = append(steps, block[1])
	}
	if !found || len(steps) == 0 {
		t.Fatalf("docs/operations.md has no steps under %q", heading)
	}
	return steps
}

func newFailovers(t *testing.T, heading string) *failovers {
	t.Helper()
	c := cluster.ConfigureOnHSM(t, 2, harness.Set("ORGKEYS_RESERVATION_TTL", reservationLife.String()), harness.Set("ORGKEYS_AUDIT_DEADLINE", "4s"))
	f := &failovers{Cluster: c, primary: c.Postgres, steps: documentedSteps(t, heading), lost: map[string]bool{}}
	var err error
	if f.standby, err = f.primary.Standby("s1"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.standby.Close() })
	c.Database = fmt.Sprintf("postgres://orgkeys@127.0.0.1:%d,127.0.0.1:%d/orgkeys?sslmode=disable&target_session_attrs=read-write", f.primary.Port(), f.standby.Port())
	outside := t.TempDir()
	for i, r := range c.Replicas {
		r.Configured("ORGKEYS_DATABASE_URL", c.Database)
		r.Configured("ORGKEYS_AUDIT_FILE", filepath.Join(outside, fmt.Sprintf("sink-%d.jsonl", i)))
		r.Start(t) // one after the other: the first makes the token
	}
	f.load = newLoad(t, c, 6)
	return f
}

func (f *failovers) must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// under has clients make requests while do is done.
func (f *failovers) under(seed uint64, do func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var loading sync.WaitGroup
	loading.Go(func() { f.load.run(ctx, 4, seed) })
	do()
	cancel()
	loading.Wait()
}

// promote promotes the standby, by the document.
func (f *failovers) promote(t *testing.T) {
	t.Helper()
	if out, code := f.Replicas[0].Script(t, f.steps[0], "STANDBY="+f.standby.URL("postgres")); code != 0 {
		t.Fatalf("promoting: exit code %d\n%s", code, out)
	}
	f.primary, f.standby = f.standby, f.primary
}

// rebuild has the server that was killed follow the new primary.
func (f *failovers) rebuild(t *testing.T) {
	t.Helper()
	f.must(t, f.standby.Rebuild(f.primary, "s1"))
	f.must(t, f.primary.Streaming(1))
}

func (f *failovers) ready() bool {
	return !slices.ContainsFunc(f.Replicas, func(r *harness.Server) bool { return !r.Ready() })
}

// awaitReady waits until every replica serves again.
func (f *failovers) awaitReady(t *testing.T, round int) {
	t.Helper()
	harness.Eventually(t, 90*time.Second, fmt.Sprintf("round %d: every replica is ready again: %s", round, f.Replicas[0].AskAdmin(t, "/readyz")), f.ready)
}

// finish has the checker read what all rounds left.
func (f *failovers) finish(t *testing.T) {
	t.Helper()
	awaitLives(t, f.Cluster)
	e := collect(t, f.Cluster, f.load)
	if out, code := f.Replicas[0].Script(t, f.steps[len(f.steps)-1]); code != 0 {
		t.Errorf("the last of the documented steps: exit code %d\n%s", code, out)
	}
	t.Log(f.load.summary(e))
	for _, broken := range append(Check(e), f.load.wrong...) {
		t.Error(broken)
	}
	if len(f.load.received) == 0 {
		t.Error("the run shows nothing: no key was received")
	}
}

func rounds() int {
	if os.Getenv("ORGKEYS_TEST_LONG") != "" {
		return 20
	}
	return 2
}

// Promise 8: with a synchronous standby a failover loses nothing that was
// released or answered, also when the standby was away before for longer than
// every deadline, and needs nobody's word.
func TestPromise8_SynchronousFailover(t *testing.T) {
	f := newFailovers(t, "Synchronous standby")
	f.steps = append(f.steps, documentedSteps(t, "Asynchronous standby")[2]) // audit verify
	for round := range rounds() {
		f.must(t, f.primary.Streaming(1))
		f.must(t, f.primary.Set("synchronous_standby_names", "s1"))
		f.under(uint64(round), func() {
			time.Sleep(2 * time.Second)
			if round%2 == 1 {
				f.must(t, f.standby.Stop())
				time.Sleep(10 * time.Second) // longer than the client's limits
			}
			f.must(t, f.primary.Kill())
			if round%2 == 1 {
				f.must(t, f.standby.Restart())
			}
			f.promote(t)
			f.awaitReady(t, round)
			time.Sleep(time.Second)
		})
		f.rebuild(t)
	}
	f.finish(t)
}

// named are what "audit accept-rollback" says was lost.
var named = regexp.MustCompile(`(?m)^lost: event \d+, \S+, (\S+), organization "(\S*)", object "(\S*)"$`)

// Promise 8: with an asynchronous standby a failover loses events that sinks hold.
// Then the log stands still, the documented steps name each lost event, and end
// in a log that verifies.
func TestPromise8_AsynchronousFailover(t *testing.T) {
	f := newFailovers(t, "Asynchronous standby")
	promote, accept, verified := f.steps[0], f.steps[1], f.steps[2]
	f.steps = []string{promote, verified}
	for round := range rounds() {
		f.must(t, f.primary.Streaming(1))
		f.under(uint64(round), func() {
			time.Sleep(2 * time.Second)
			if round%2 == 0 {
				f.must(t, f.standby.Stop()) // what comes now is lost
				time.Sleep(time.Second)
			}
			killed := time.Now()
			f.must(t, f.primary.Kill())
			if round%2 == 0 {
				f.must(t, f.standby.Restart())
			}
			f.deaths = append(f.deaths, death{killed, time.Now()})
			f.promote(t)
			time.Sleep(3 * time.Second)
		})
		f.recover(t, round, accept)
		f.rebuild(t)
	}
	if f.losses == 0 {
		t.Error("the run shows nothing: no round lost anything")
	}
	f.forget(t)
	f.finish(t)
}

// recover takes the documented steps, if anything was lost.
func (f *failovers) recover(t *testing.T, round int, accept string) {
	t.Helper()
	var state string
	harness.Eventually(t, 90*time.Second, "the replicas are ready, or say that events were lost", func() bool {
		if f.ready() {
			state = ""
			return true
		}
		state = f.Replicas[0].AskAdmin(t, "/readyz") + f.Replicas[1].AskAdmin(t, "/readyz")
		return strings.Contains(state, "events were lost") && strings.Contains(state, "accept-rollback")
	})
	if state == "" {
		return
	}
	f.losses++
	size := number(t, database(t, f.Cluster), "SELECT size FROM log_head")
	time.Sleep(time.Second)
	if now := number(t, database(t, f.Cluster), "SELECT size FROM log_head"); now != size {
		t.Errorf("round %d: the log grew from %d to %d while a sink was ahead", round, size, now)
	}
	if out, _ := f.Replicas[0].Script(t, "orgkeys doctor"); !strings.Contains(out, "accept-rollback") {
		t.Errorf("round %d: doctor does not say what to do:\n%s", round, out)
	}
	for _, r := range f.Replicas {
		r.Stop(t)
	}
	for i, r := range slices.Concat(f.Replicas, f.Replicas) { // a sink of the second may alone be ahead
		out, code := r.Script(t, accept, fmt.Sprintf("REASON=failover %d", round))
		if code != 0 && (i > 0 || !strings.Contains(out, "--lost-sink")) {
			t.Fatalf("round %d: accepting: exit code %d\n%s", round, code, out)
		}
		for _, m := range named.FindAllStringSubmatch(out, -1) {
			f.lost[m[1]+" "+m[3]] = true
		}
	}
	for _, r := range f.Replicas {
		r.Start(t)
	}
}

// sinksTrail is how long before its primary's end a change may have been answered whose event
// no sink has: changes do not wait for the sinks (docs/operations.md says so).
const sinksTrail = 2 * time.Second

// unnamed reports whether the deletion of a key was lost and nobody can name it: no sink has
// it, and it was answered just before a primary was killed.
func (f *failovers) unnamed(t *testing.T, id string) bool {
	t.Helper()
	for _, r := range f.Replicas {
		if slices.ContainsFunc(r.Sink(t).Events, func(e harness.SunkEvent) bool { return e.Leaf.Type == "orgkey.deleted" && e.Leaf.Object == id }) {
			return false
		}
	}
	answered := f.load.answered[id]
	return slices.ContainsFunc(f.deaths, func(d death) bool {
		return answered.After(d.killed.Add(-sinksTrail)) && answered.Before(d.promoted)
	})
}

// forget takes out of what the clients know what was named as lost. Of a key whose
// creation the standby had, and not its release, the log says that it expired.
func (f *failovers) forget(t *testing.T) {
	t.Helper()
	l := f.load
	awaitLives(t, f.Cluster)
	rows(t, database(t, f.Cluster), "SELECT object FROM events WHERE type = 'orgkey.withdrawn' AND reason = 'expired'", func(scan func(...any) error) error {
		var id string
		err := scan(&id)
		f.lost["orgkey.created "+id] = true
		return err
	})
	for _, id := range l.deleted {
		if f.unnamed(t, id) {
			t.Logf("the deletion of key %s was lost, and no sink had it yet", id)
			f.lost["orgkey.deleted "+id] = true
		}
	}
	l.received = slices.DeleteFunc(l.received, func(r Received) bool { return f.lost["orgkey.created "+r.ID] })
	l.deleted = slices.DeleteFunc(l.deleted, func(id string) bool { return f.lost["orgkey.deleted "+id] || f.lost["orgkey.created "+id] })
	l.wrong = slices.DeleteFunc(l.wrong, func(text string) bool {
		for named := range f.lost {
			if id, deleted := strings.CutPrefix(named, "orgkey.deleted "); deleted && strings.Contains(text, id) {
				return true
			}
		}
		return false
	})
}
