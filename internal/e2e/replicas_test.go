package e2e

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/orgkeys/orgkeys/internal/chaos/cluster"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// long tells a run that may take its time.
func long() bool { return os.Getenv("ORGKEYS_TEST_LONG") != "" }

// shortLife is how long reservations last in a test that waits for their end. A generation
// has half of it, so that half is ten generations long on a machine that is busy too; the
// tests wait a minute for what the end of a reservation brings about.
func shortLife(t *testing.T, least time.Duration) harness.Option {
	t.Helper()
	const tries = 4
	begun := time.Now()
	for range tries {
		newRSAKey(t)
	}
	life := min(max(least, 2*10*time.Since(begun)/tries), 30*time.Second)
	return harness.Set("ORGKEYS_RESERVATION_TTL", life.Round(time.Second).String())
}

// TestPromise3_AcrossReplicas: three processes on one PostgreSQL, Redis and
// Vault give exactly as many keys as an organization may have, whatever
// becomes of Redis meanwhile.
func TestPromise3_AcrossReplicas(t *testing.T) {
	c := cluster.Start(t, 3, harness.Set("ORGKEYS_MAX_GENERATIONS", "4"))
	t.Run("60 requests for one organization", func(t *testing.T) { contend(t, c, 1, 60) })
	for _, trouble := range []struct {
		name  string
		begin func() error
		end   func() error
	}{
		{"with Redis stopped", c.Redis.Stop, c.Redis.Restart},
		{"with Redis hanging", func() error { return c.Redis.Signal(syscall.SIGSTOP) }, func() error { return c.Redis.Signal(syscall.SIGCONT) }},
		{"with Redis flushed all the time", nil, nil},
	} {
		t.Run("60 requests for one organization "+trouble.name, func(t *testing.T) {
			if trouble.begin == nil {
				stop := flushing(t, c)
				defer stop()
			} else {
				must(t, trouble.begin())
				defer func() { must(t, trouble.end()) }()
			}
			contend(t, c, 1, 60)
		})
	}
	many := 6
	if long() {
		many = 200
	}
	t.Run("many organizations at once", func(t *testing.T) { contend(t, c, many, 7) })
	t.Run("many organizations at once with Redis stopped", func(t *testing.T) {
		must(t, c.Redis.Stop())
		defer func() { must(t, c.Redis.Restart()) }()
		contend(t, c, many, 7)
	})
}

// contend has n requests made for each of so many new organizations, spread
// over the replicas, and wants exactly five keys of each. Whoever hears 503, or
// that generating failed because Vault took too long, comes again, as clients do.
func contend(t *testing.T, c *cluster.Cluster, orgs, n int) {
	t.Helper()
	names, owners := make([]string, orgs), make([]string, orgs)
	for i := range names {
		names[i] = harness.Org()
		owners[i] = c.Owner(t, names[i])
	}
	var mu sync.Mutex
	released := map[string]map[string]bool{}
	refused := 0
	places := make(chan struct{}, 60)
	deadline := time.Now().Add(2*time.Minute + time.Duration(orgs)*2*time.Second)
	inParallel(orgs*n, func(i int) {
		places <- struct{}{}
		defer func() { <-places }()
		org := i % orgs
		request := harness.Request{Method: "POST", Path: harness.KeyPath(names[org]), Token: owners[org]}
		for attempt := range 10_000 {
			resp := c.Replicas[(i/orgs+attempt)%len(c.Replicas)].Do(t, request)
			if resp.Status >= 500 && time.Now().Before(deadline) {
				time.Sleep(250 * time.Millisecond) // Retry-After says more, and the test has less time
				continue
			}
			mu.Lock()
			defer mu.Unlock()
			switch resp.Status {
			case 200:
				if released[names[org]] == nil {
					released[names[org]] = map[string]bool{}
				}
				released[names[org]][resp.Header.Get("X-Key-Id")] = true
			case 400:
				refused++
				if got := resp.Message(t); got != quotaMessage {
					t.Errorf("message %q", got)
				}
			default:
				t.Errorf("status %d, body %.300q", resp.Status, resp.Body)
			}
			return
		}
	})
	for i, org := range names {
		listed := c.Replicas[i%len(c.Replicas)].List(t, org)
		if len(listed) != 5 || len(released[org]) != 5 {
			t.Errorf("organization %s: %d keys listed, %d released, want exactly 5", org, len(listed), len(released[org]))
		}
		for _, l := range listed {
			if !released[org][l.ID] {
				t.Errorf("key %s is listed and nobody received it", l.ID)
			}
		}
	}
	if refused != orgs*(n-5) {
		t.Errorf("%d requests refused, want %d", refused, orgs*(n-5))
	}
}

// flushing empties Redis again and again until stop.
func flushing(t *testing.T, c *cluster.Cluster) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			if err := c.Redis.Flush(ctx); err != nil && ctx.Err() == nil {
				t.Error(err)
				return
			}
		}
	}()
	return func() { cancel(); <-done }
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestPromise6_DeletedOnOneReplicaRefusedOnAnother: a key that replica B has
// opened and keeps is refused there as soon as its deletion on A answered.
func TestPromise6_DeletedOnOneReplicaRefusedOnAnother(t *testing.T) {
	c := cluster.Start(t, 2, harness.Set("ORGKEYS_MAX_GENERATIONS", "4"))
	rounds := 24
	if long() {
		rounds = 1000
	}
	deletedAndRefused(t, c, 4, rounds)
}

// deletedAndRefused has workers delete keys on one replica that the other has opened.
func deletedAndRefused(t *testing.T, c *cluster.Cluster, workers, rounds int) {
	t.Helper()
	inParallel(workers, func(worker int) {
		a, b := c.Replicas[worker%2], c.Replicas[1-worker%2]
		org := harness.Org()
		owner := c.Owner(t, org)
		for round := range rounds / workers {
			key := a.Generate(t, org)
			// Failures are limited by address, and these come on purpose.
			nodes := from(net.IPv4(127, byte(1+worker), byte(round>>8), byte(1+round%250)))
			for _, path := range []string{"/secrets", "/register"} {
				if status := ask(t, nodes, b, path, key, org); status != 200 {
					t.Errorf("%s with a live key: status %d", path, status)
				}
			}
			deleted := a.Do(t, harness.Request{Method: "DELETE", Path: harness.KeyPath(org) + "/" + key.ID, Token: owner})
			if deleted.Status != 200 {
				t.Errorf("deleting: status %d, body %.300q", deleted.Status, deleted.Body)
			}
			for _, path := range []string{"/secrets", "/register"} {
				if status := ask(t, nodes, b, path, key, org); status != 400 {
					t.Errorf("round %d: %s on another replica with a deleted key: status %d, want 400", round, path, status)
				}
			}
			nodes.CloseIdleConnections()
		}
	})
}

// from is a client whose requests come from a loopback address of its own.
func from(ip net.IP) *http.Client {
	dialer := &net.Dialer{LocalAddr: &net.TCPAddr{IP: ip}}
	return &http.Client{Transport: &http.Transport{DialContext: dialer.DialContext}, Timeout: harness.Patience}
}

// ask sends one signed request of a node and returns the answer's status.
func ask(t *testing.T, nodes *http.Client, s *harness.Server, path string, key harness.Key, org string) int {
	t.Helper()
	body, err := cluster.Signed(key.Private, org, "192.0.2.7")
	if err != nil {
		t.Fatal(err)
	}
	resp, err := nodes.Post(s.API+path, "application/json", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

// TestTheSequencersPlaceIsTakenOver: the process that is giving events their
// place in the log is killed, or stopped, in the middle of that. Another goes
// on soon, and keys are released meanwhile.
func TestTheSequencersPlaceIsTakenOver(t *testing.T) {
	c := cluster.Configure(t, 3)
	admin, err := sql.Open("pgx", c.Database)
	must(t, err)
	defer admin.Close()
	byRole := map[string]*harness.Server{} // each has a role of its own, by which its connections are known
	for i, r := range c.Replicas {
		role := fmt.Sprintf("replica_%d", i)
		_, err := admin.Exec("CREATE ROLE " + role + " SUPERUSER LOGIN")
		must(t, err)
		r.Configured("ORGKEYS_DATABASE_URL", strings.Replace(c.Behind, "//orgkeys", "//"+role, 1))
		byRole[role] = r
		r.Start(t)
	}
	for _, tt := range []struct {
		name   string
		strike func(*harness.Server) (mend func())
		within time.Duration
	}{
		{"killed", func(s *harness.Server) func() { s.Kill(); return func() { s.Start(t) } }, 2 * time.Second},
		{"stopped", func(s *harness.Server) func() {
			must(t, syscall.Kill(s.PID(), syscall.SIGSTOP))
			return func() { must(t, syscall.Kill(s.PID(), syscall.SIGCONT)) }
		}, 4 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			// Whoever gives the next event its place waits for the log's head.
			head, err := admin.Begin()
			must(t, err)
			_, err = head.Exec("SELECT 1 FROM log_head FOR UPDATE")
			must(t, err)
			org := harness.Org()
			list(t, c, org)
			var role string
			harness.Eventually(t, 4*time.Second, "a process is at the log's head", func() bool {
				return admin.QueryRow("SELECT usename FROM pg_stat_activity JOIN pg_locks USING (pid) WHERE locktype = 'advisory' AND wait_event_type = 'Lock' LIMIT 1").Scan(&role) == nil
			})
			mend := tt.strike(byRole[role])
			must(t, head.Rollback())
			started := time.Now()
			harness.Eventually(t, harness.Patience, "the event has its place", func() bool {
				var waiting int
				must(t, admin.QueryRow("SELECT count(*) FROM events WHERE idx IS NULL").Scan(&waiting))
				return waiting == 0
			})
			if took := time.Since(started); took > tt.within {
				t.Errorf("taken over after %s", took)
			}
			for other, r := range byRole {
				if other != role {
					resp := r.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: c.Owner(t, org)})
					if resp.Status != http.StatusOK {
						t.Errorf("a key of %s: %d %s", r.Address(), resp.Status, resp.Body)
					}
				}
			}
			mend()
			harness.Eventually(t, time.Minute, "the process serves again", byRole[role].Ready)
		})
	}
}

// list makes an event.
func list(t *testing.T, c *cluster.Cluster, org string) {
	t.Helper()
	resp := c.Replicas[0].Do(t, harness.Request{Method: "GET", Path: harness.KeyPath(org), Token: c.Owner(t, org)})
	if resp.Status != http.StatusOK {
		t.Fatalf("listing: %d %s", resp.Status, resp.Body)
	}
}

// TestDoctorNamesWhatIsWrong breaks one thing at a time and sees that it, and
// nothing else that was whole, is named.
func TestDoctorNamesWhatIsWrong(t *testing.T) {
	c := cluster.Start(t, 2)
	s := c.Replicas[0]
	if failing, said := diagnose(t, s); len(failing) != 0 {
		t.Fatalf("with nothing broken: %s", said)
	}
	setting := func(name, value string) func() (mend func()) {
		return func() func() {
			before := s.Setting(name)
			s.Configured(name, value)
			return func() { s.Configured(name, before) }
		}
	}
	other := t.TempDir()
	for _, tt := range []struct {
		name   string
		breaks func() (mend func())
		state  string
		what   string
		says   string
	}{
		{"an unknown setting", setting("ORGKEYS_MAXX", "5"), "fail", "configuration", "ORGKEYS_MAXX is not a setting"},
		{"a limit that the replicas do not have", setting("ORGKEYS_MAX", "7"), "warn", "replicas", "ORGKEYS_MAX is 5, not 7"},
		{"a policy that the replicas do not have", setting("ORGKEYS_POLICY_DIR", otherPolicy(t)), "warn", "replicas", "its policy is"},
		{"a broken policy", setting("ORGKEYS_POLICY_DIR", other), "fail", "policy", ""},
		{"token keys that are gone", setting("ORGKEYS_JWKS", filepath.Join(other, "none.json")), "fail", "token keys", ""},
		{"a file sink that is gone", setting("ORGKEYS_AUDIT_FILE", filepath.Join(other, "none.jsonl")), "warn", "sink file", "does not exist"},
		{"a file sink of another log", setting("ORGKEYS_AUDIT_FILE", foreignSink(t)), "fail", "sink file", "accept-rollback"},
		{"a data directory that others may enter", func() func() {
			must(t, os.Chmod(s.Dir, 0o755))
			return func() { must(t, os.Chmod(s.Dir, 0o700)) }
		}, "fail", "data directory", "chmod 700"},
		{"Redis down", func() func() {
			must(t, c.Redis.Stop())
			return func() { must(t, c.Redis.Restart()) }
		}, "warn", "Redis", "does not answer"},
		{"a Redis user that may not lock", func() func() {
			admin := redis.NewClient(&redis.Options{Addr: c.Redis.Addr()})
			must(t, errors.Join(admin.Do(t.Context(), "ACL", "SETUSER", "narrow", "on", ">narrow", "~orgkeys:*", "+ping", "+hello").Err(), admin.Close()))
			return setting("ORGKEYS_REDIS_URL", strings.Replace(c.Redis.URL(), "redis://", "redis://narrow:narrow@", 1))()
		}, "warn", "Redis", "ACL SETUSER"},
		{"a PostgreSQL role that may only read", func() func() {
			admin, err := sql.Open("pgx", c.Database)
			must(t, err)
			_, err = admin.Exec("CREATE ROLE reader LOGIN; GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
			must(t, errors.Join(err, admin.Close()))
			return setting("ORGKEYS_DATABASE_URL", strings.Replace(c.Behind, "orgkeys@", "reader@", 1))()
		}, "fail", "database", "lacks INSERT on events"},
		{"fewer connections than the replicas may open", func() func() {
			must(t, c.Postgres.Restart("max_connections=30"))
			return func() { must(t, c.Postgres.Restart()) }
		}, "warn", "connections", "2 replicas may open 40 connections, but PostgreSQL allows 27"},
		{"PostgreSQL down", func() func() {
			must(t, c.Postgres.Stop())
			return func() { must(t, c.Postgres.Restart()) }
		}, "fail", "database", "ORGKEYS_DATABASE_URL"},
		{"PostgreSQL that may lose what it acknowledged", func() func() {
			must(t, c.Postgres.Restart("fsync=off"))
			return func() { must(t, c.Postgres.Restart()) }
		}, "fail", "database", "fsync=off"},
		{"an empty database", func() func() {
			empty, err := c.Postgres.NewDatabase("empty")
			must(t, err)
			return setting("ORGKEYS_DATABASE_URL", empty)()
		}, "fail", "database", "orgkeys migrate"},
		{"Vault sealed", func() func() {
			must(t, c.Vault.Seal(t.Context()))
			return func() { must(t, c.Vault.Unseal(t.Context())) }
		}, "fail", "Vault", "sealed"},
		{"Vault's audit device full", func() func() {
			must(t, c.Vault.BreakAudit())
			return func() { must(t, c.Vault.MendAudit()) }
		}, "fail", "Vault", "audit"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			mend := tt.breaks()
			defer mend()
			failing, said := diagnose(t, s)
			found := false
			for _, d := range said {
				if d.What == tt.what && d.State == tt.state && strings.Contains(d.Found+" "+d.Remedy, tt.says) && d.Remedy != "" {
					found = true
				}
			}
			if !found || tt.state == "fail" && len(failing) == 0 || tt.state == "warn" && len(failing) != 0 {
				t.Errorf("failing %v; said %+v", failing, said)
			}
		})
	}
}

// Beside a server on SQLite doctor says nothing of replicas, and sets what it
// says in one column.
func TestDoctorBesideOneProcess(t *testing.T) {
	s := harness.Start(t)
	stdout, stderr, code := s.Run(t, "doctor")
	if code != 0 {
		t.Errorf("exit code %d: %s", code, stderr)
	}
	if !strings.Contains(stdout, "yes: keys sealed to a recipient (AES key wrap with padding, RFC 5649): as RSA_AES_KEY_WRAP_SHA_") {
		t.Errorf("nothing of sealed delivery: %s", stdout)
	}
	lines := 0
	for line := range strings.Lines(stdout) {
		lines++
		if strings.Contains(line, "replicas") {
			t.Errorf("of replicas: %q", line)
		}
		if len(line) < 23 || line[21] != ' ' || line[22] == ' ' {
			t.Errorf("not in its column: %q", line)
		}
	}
	if lines == 0 {
		t.Error("it says nothing")
	}
}

type diagnosis struct{ What, State, Found, Remedy string }

// diagnose runs doctor and returns what fails and all it says.
func diagnose(t *testing.T, s *harness.Server) (failing []string, said []diagnosis) {
	t.Helper()
	stdout, stderr, code := s.Run(t, "doctor", "--json")
	if err := json.Unmarshal([]byte(stdout), &said); err != nil {
		t.Fatalf("doctor said %q and %q", stdout, stderr)
	}
	for _, d := range said {
		if d.State == "fail" {
			failing = append(failing, d.What)
		}
	}
	if (code == 1) != (len(failing) > 0) {
		t.Errorf("exit code %d, and failing is %v", code, failing)
	}
	return failing, said
}

// otherPolicy is the shipped policy with a comment more.
func otherPolicy(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	must(t, os.CopyFS(dir, os.DirFS(filepath.Join(harness.ModuleRoot(t), "policies"))))
	f, err := os.OpenFile(filepath.Join(dir, "authz.rego"), os.O_APPEND|os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteString("\n# ours\n")
	must(t, errors.Join(err, f.Close()))
	return dir
}

// foreignSink is the file sink of a server with a log of its own.
func foreignSink(t *testing.T) string {
	t.Helper()
	s := harness.Start(t)
	s.List(t, "acme")
	harness.Eventually(t, harness.Patience, "the sink has a checkpoint", func() bool { return len(s.Sink(t).Checkpoints) > 0 })
	s.Stop(t)
	return s.AuditFile()
}

// TestRollingRestartLosesNoRequest restarts one replica after another under
// load, behind what a load balancer does: it asks each for its readiness and
// sends requests only to those that are ready.
func TestRollingRestartLosesNoRequest(t *testing.T) {
	c := cluster.Start(t, 3, harness.Set("ORGKEYS_SHUTDOWN_NOTICE", "3s"))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	b := &balancer{ready: make([]atomic.Bool, len(c.Replicas))}
	for i, r := range c.Replicas {
		b.addresses = append(b.addresses, r.Address())
		b.checks.Go(func() { b.check(ctx, i, r) })
	}
	harness.Eventually(t, harness.Patience, "all are ready", func() bool { return b.serving() == len(c.Replicas) })

	org := harness.Org()
	owner := c.Owner(t, org)
	var answered, lost atomic.Int64
	var loading sync.WaitGroup
	for worker := range 4 {
		loading.Go(func() {
			for n := worker; ctx.Err() == nil; n++ {
				method, path := "GET", harness.KeyPath(org)
				if worker == 0 {
					method = "POST"
				}
				status, err := b.send(n, method, path, owner)
				if err != nil || status == 503 {
					lost.Add(1)
					t.Errorf("a request was lost: status %d, %v", status, err)
				}
				answered.Add(1)
			}
		})
	}
	for _, r := range c.Replicas {
		if code := r.Stop(t); code != 0 {
			t.Errorf("exit code %d", code)
		}
		r.Start(t)
		harness.Eventually(t, harness.Patience, "all are ready again", func() bool { return b.serving() == len(c.Replicas) })
	}
	cancel()
	loading.Wait()
	b.checks.Wait()
	t.Logf("%d requests answered, %d lost", answered.Load(), lost.Load())
}

// balancer is the part of a load balancer that matters here.
type balancer struct {
	addresses []string
	ready     []atomic.Bool
	checks    sync.WaitGroup
	client    http.Client
}

func (b *balancer) check(ctx context.Context, i int, r *harness.Server) {
	for ctx.Err() == nil {
		b.ready[i].Store(r.Ready())
		time.Sleep(50 * time.Millisecond)
	}
}

func (b *balancer) serving() (n int) {
	for i := range b.ready {
		if b.ready[i].Load() {
			n++
		}
	}
	return n
}

// send sends a request to the n-th replica, or the next one that is ready.
func (b *balancer) send(n int, method, path, token string) (int, error) {
	for !b.ready[n%len(b.ready)].Load() {
		n++
	}
	request, err := http.NewRequest(method, "http://"+b.addresses[n%len(b.addresses)]+path, nil)
	if err != nil {
		return 0, err
	}
	request.Header.Set("Authorization", "Bearer "+token)
	response, err := b.client.Do(request)
	if err != nil {
		return 0, err
	}
	defer response.Body.Close()
	_, err = io.Copy(io.Discard, response.Body)
	return response.StatusCode, err
}
