package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/chaos/cluster"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// steps are the system calls after which a run may be killed: what changes files, and what
// goes over the network.
const steps = "write,fsync,linkat,?renameat,?renameat2,?rename,unlinkat"

// hold is how long a run is held before each step, in microseconds: time to kill it after the step before.
const hold = 100_000

// killedAfter runs a command and kills it after its nth step, before the next; it returns the
// steps, and whether it was killed there: on a busy machine it may have come further.
// strace does it to the program as it ships.
func (p *person) killedAfter(t *testing.T, n int, args ...string) (seen []string, inTime bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 4*harness.Patience)
	defer cancel()
	cmd := p.command(ctx, args...)
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Fatal(err)
	}
	cmd.Args = append([]string{strace, "-f", "-s", "0", "-o", "/dev/fd/3", "-e", "trace=" + steps, "-e", fmt.Sprintf("inject=%s:delay_enter=%d", steps, hold), "--", cmd.Path}, cmd.Args[1:]...)
	cmd.Path, cmd.ExtraFiles = strace, []*os.File{write}
	output := &harness.Output{}
	cmd.Stdout, cmd.Stderr = output, output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	write.Close()
	step := regexp.MustCompile(`^(\d+) +(?:<\.\.\. )?([a-z0-9]+)(?:\(| resumed>).*\) += [-0-9]`)
	killed := false
	for lines := bufio.NewScanner(read); lines.Scan(); {
		m := step.FindStringSubmatch(lines.Text())
		if m == nil {
			continue
		}
		if seen = append(seen, m[2]); len(seen) < n || killed {
			continue
		}
		thread, err := strconv.Atoi(m[1])
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(thread, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Fatal(err)
		}
		killed = true
	}
	err = cmd.Wait()
	if ctx.Err() != nil {
		t.Fatalf("killed after step %d of %q: %v\n%s", n, args, ctx.Err(), output.From(0))
	}
	if !killed && err != nil {
		t.Fatalf("not killed: %v\n%s", err, output.From(0))
	}
	return seen, killed && len(seen) == n
}

// wholeOrNone fails the test if the file is there and is not a whole key.
func wholeOrNone(t *testing.T, path string) {
	t.Helper()
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	harness.ParsePrivate(t, text)
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

// killedThenAgain kills a run after its nth step and runs the same command again. That ends
// with the key of the first run, if it got one, and with nothing left behind.
func (p *person) killedThenAgain(t *testing.T, n int, list func() []client.Key) (inTime bool) {
	t.Helper()
	path := p.path("key.pem")
	seen, inTime := p.killedAfter(t, n, "key", "create", "--out", "key.pem")
	wholeOrNone(t, path)
	before := list()
	code, out, log := p.run("", "key", "create", "--out", "key.pem", "--wait", "30s")
	// Of a run that had done everything, its file is found.
	if done := code == exitCannotWrite && strings.Contains(log, "is there already") && len(before) == 1; code != 0 && !done {
		t.Errorf("killed after %q, and run again: %d\n%s%s", seen, code, out, log)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	after := list()
	if len(after) != 1 || len(before) > 1 || len(before) == 1 && before[0].ID != after[0].ID || after[0].Fingerprint != client.Fingerprint(&harness.ParsePrivate(t, text).PublicKey) {
		t.Errorf("killed after %q there was %+v, and then %+v, which is not what the file holds", seen, before, after)
	}
	entries, err := os.ReadDir(p.home)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() != "key.pem" && e.Name() != ".config" {
			t.Errorf("killed after %q, %s is left", seen, e.Name())
		}
	}
	p.only("session", "arrival")
	p.noArrival()
	return inTime
}

// A run may be killed after any step: the same command, run again, ends with the key that
// was made for the first, in one place of the quota.
func TestAKilledRunIsNoLostKey(t *testing.T) {
	t.Parallel()
	all, _ := owner(t).killedAfter(t, 1<<30, "key", "create", "--out", "key.pem")
	t.Logf("%d steps: %s", len(all), strings.Join(all, " "))
	for _, call := range []string{"write", "fsync", "linkat", "unlinkat"} {
		if !slices.Contains(all, call) {
			t.Fatalf("the steps lack %s: %q", call, all)
		}
	}
	var kills atomic.Int32
	t.Run("after step", func(t *testing.T) {
		for n := 1; n <= len(all); n++ {
			t.Run(fmt.Sprint(n), func(t *testing.T) {
				t.Parallel()
				for range 5 {
					p := owner(t)
					inTime := p.killedThenAgain(t, n, func() []client.Key {
						keys, err := server.Client(t, p.org, "OWNER").Keys(t.Context(), p.org)
						if err != nil {
							t.Fatal(err)
						}
						return keys
					})
					if received := harness.Number(t, server.Database(t), `SELECT count(*) FROM deliveries WHERE org_id = ? AND stage = 'received'`, p.org); received != 1 {
						t.Errorf("%d received deliveries", received)
					}
					if inTime {
						kills.Add(1)
						return
					}
				}
			})
		}
	})
	if int(kills.Load()) < len(all)*3/4 { // threads may make a step more or less
		t.Errorf("of %d runs %d were killed", len(all), kills.Load())
	}
}

// The same with Vault and two replicas, which answer in turns.
func TestAKilledRunBeforeReplicasIsNoLostKey(t *testing.T) {
	t.Parallel()
	c := cluster.Start(t, 2)
	var turn atomic.Int64
	var posts [2]atomic.Int64
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	balancer := httptest.NewServer(&httputil.ReverseProxy{Transport: transport, Rewrite: func(r *httputil.ProxyRequest) {
		i := turn.Add(1) % 2
		to, err := url.Parse(c.Replicas[i].API)
		if err != nil {
			panic(err)
		}
		if r.In.Method == http.MethodPost {
			posts[i].Add(1)
		}
		r.SetURL(to)
	}})
	t.Cleanup(balancer.Close)
	someone := func(t *testing.T) *person {
		p := newcomer(t, balancer.URL)
		if code, out, log := p.run(c.Owner(t, p.org)+"\n", "login", "--token-file", "-"); code != 0 {
			t.Fatalf("login: %d, %s%s", code, out, log)
		}
		return p
	}
	all, _ := someone(t).killedAfter(t, 1<<30, "key", "create", "--out", "key.pem")
	link := 0 // the step that gives the file its name; the one before only tries
	for i, call := range all {
		if call == "linkat" {
			link = i + 1
		}
	}
	kills := 0
	for _, n := range []int{link / 4, link / 2, link - 3, link, link + 3, len(all) - 2} {
		p := someone(t)
		if p.killedThenAgain(t, n, func() []client.Key {
			keys, err := c.Replicas[0].Client(t, p.org, "OWNER").Keys(t.Context(), p.org)
			if err != nil {
				t.Fatal(err)
			}
			return keys
		}) {
			kills++
		}
	}
	if kills < 5 || posts[0].Load() == 0 || posts[1].Load() == 0 {
		t.Errorf("%d runs were killed, and the replicas had %d and %d requests", kills, posts[0].Load(), posts[1].Load())
	}
}
