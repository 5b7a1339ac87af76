package e2e

import (
	"context"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/vault/vaulttest"
)

// onCluster are the settings of a server on a cluster of Vaults.
func onCluster(t *testing.T) (*vaulttest.Cluster, harness.Option) {
	t.Helper()
	c, err := vaulttest.StartCluster(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	})
	login, err := c.AppRole(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return c, func(s *harness.Server) {
		for name, value := range map[string]string{
			"ORGKEYS_KEYSTORE": "vault", "VAULT_ADDR": c.Address, "VAULT_CACERT": c.CACert,
			"ORGKEYS_VAULT_ROLE_ID_FILE": login.RoleIDFile, "ORGKEYS_VAULT_SECRET_ID_FILE": login.SecretIDFile, "ORGKEYS_MAX": "64",
		} {
			harness.Set(name, value)(s)
		}
	}
}

// fault is something that happens to the node that serves.
type fault struct {
	name   string
	strike func(context.Context, *vaulttest.Cluster, *vaulttest.Server) error
	mend   func(context.Context, *vaulttest.Cluster, *vaulttest.Server) error
}

// stepDown has n hand over, again if the others elect it once more.
func stepDown(ctx context.Context, c *vaulttest.Cluster, n *vaulttest.Server) error {
	for {
		if err := c.StepDown(ctx, n); err != nil {
			return err
		}
		for range 150 {
			if active := c.Active(ctx); active != nil && active != n {
				return nil
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(100 * time.Millisecond):
			}
		}
	}
}

var clusterFaults = []fault{
	{"it steps down", stepDown, nil},
	{"it is killed", func(_ context.Context, _ *vaulttest.Cluster, n *vaulttest.Server) error { return n.Kill() }, func(ctx context.Context, c *vaulttest.Cluster, n *vaulttest.Server) error {
		return c.Rejoin(ctx, n)
	}},
	{"it is sealed", func(ctx context.Context, _ *vaulttest.Cluster, n *vaulttest.Server) error { return n.Seal(ctx) }, func(ctx context.Context, c *vaulttest.Cluster, n *vaulttest.Server) error {
		return c.UnsealNode(ctx, n)
	}},
}

// While the nodes of a cluster take over from one another, nobody hears that a
// generation failed, no key that was handed out is lost, it goes on without a
// restart, and the nodes' audit files together hold every event.
func TestPromise9_AClusterOfVaultsFailsOver(t *testing.T) {
	c, settings := onCluster(t)
	s := harness.Start(t, settings)
	load := newLoad(t, s)
	rounds, faults := 1, clusterFaults[:2]
	if long() {
		rounds, faults = 5, clusterFaults
	}
	for range rounds {
		for _, f := range faults {
			t.Run(f.name, func(t *testing.T) { load.through(t, c, f) })
		}
	}
	keys := load.end()
	for org, handedOut := range keys {
		listed := s.List(t, org)
		for _, key := range handedOut {
			if !slices.ContainsFunc(listed, func(l harness.Listed) bool { return l.ID == key }) {
				t.Errorf("key %s of %s was handed out, and is not there", key, org)
			}
		}
	}
	settled(t, s)
	if code := s.Stop(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
	verifiesFromAllNodes(t, c, s)
}

func verifiesFromAllNodes(t *testing.T, c *vaulttest.Cluster, s *harness.Server) {
	t.Helper()
	archive := filepath.Join(t.TempDir(), "export.tar.gz")
	for _, args := range [][]string{{"audit", "export", archive}} {
		if out, errs, code := s.Run(t, args...); code != 0 {
			t.Fatalf("%v: %d\n%s%s", args, code, out, errs)
		}
	}
	key, errs, code := s.Run(t, "audit", "key")
	if code != 0 {
		t.Fatalf("audit key: %d\n%s", code, errs)
	}
	verify := []string{"audit", "verify", archive, "--key", strings.TrimSpace(key)}
	files := c.AuditFiles()
	all := verify
	for _, file := range files {
		all = append(all, "--vault-audit", file)
	}
	out, errs, code := s.Run(t, all...)
	t.Logf("%d nodes were active\n%s%s", len(files), out, errs)
	if code != 0 {
		t.Errorf("with every node's file: exit code %d", code)
	}
	if len(files) < 2 {
		t.Errorf("%d nodes were ever active: there was no failover", len(files))
	}
}

// load asks for keys all the time.
type load struct {
	stop    context.CancelFunc
	done    chan struct{}
	answers chan answered
	keys    map[string][]string // by organization
}

type answered struct {
	at     time.Time
	status int
	retry  string
	body   string
	key    string
	org    string
}

// newLoad has organizations ask in turns, so that none comes near its quota.
func newLoad(t *testing.T, s *harness.Server) *load {
	ctx, stop := context.WithCancel(context.Background())
	l := &load{stop: stop, done: make(chan struct{}), answers: make(chan answered, 100_000), keys: map[string][]string{}}
	var requests []harness.Request
	var orgs []string
	for range 60 {
		org := harness.Org()
		orgs = append(orgs, org)
		requests = append(requests, harness.Request{Method: http.MethodPost, Path: harness.KeyPath(org), Token: s.Token(t, org, "OWNER")})
	}
	go func() {
		defer close(l.done)
		for i := 0; ctx.Err() == nil; i = (i + 1) % len(orgs) {
			resp, err := s.Try(ctx, requests[i])
			if err != nil {
				continue
			}
			l.answers <- answered{time.Now(), resp.Status, resp.Header.Get("Retry-After"), string(resp.Body), resp.Header.Get("X-Key-Id"), orgs[i]}
			if resp.Status != http.StatusOK {
				time.Sleep(100 * time.Millisecond)
			}
		}
	}()
	return l
}

func (l *load) note(a answered) { l.keys[a.org] = append(l.keys[a.org], a.key) }

// through has f happen to the active node, and waits until keys come again.
func (l *load) through(t *testing.T, c *vaulttest.Cluster, f fault) {
	l.until(t, time.Now())
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	node := c.Active(ctx)
	if node == nil {
		t.Fatal("no node is active")
	}
	struck := time.Now()
	if err := f.strike(ctx, c, node); err != nil {
		t.Fatal(err)
	}
	if err := c.AwaitAnother(ctx, node); err != nil {
		t.Fatal(err)
	}
	back := l.until(t, time.Now())
	t.Logf("%s: keys came again after %.1f s", f.name, back.Sub(struck).Seconds())
	if f.mend != nil {
		if err := f.mend(ctx, c, node); err != nil {
			t.Fatal(err)
		}
	}
}

// until reads answers until a key came after at, and judges them.
func (l *load) until(t *testing.T, at time.Time) time.Time {
	t.Helper()
	limit := time.After(time.Minute)
	for {
		select {
		case a := <-l.answers:
			switch {
			case a.status == http.StatusOK:
				l.note(a)
				if a.at.After(at) {
					return a.at
				}
			case a.status != http.StatusServiceUnavailable || a.retry == "":
				t.Errorf("status %d, Retry-After %q: %s", a.status, a.retry, a.body)
			}
		case <-limit:
			t.Fatal("no key came within a minute")
		}
	}
}

func (l *load) end() map[string][]string {
	l.stop()
	<-l.done
	close(l.answers)
	for a := range l.answers {
		if a.status == http.StatusOK {
			l.note(a)
		}
	}
	return l.keys
}

// A sealing key whose older versions open nothing any more closes the records;
// a restart would be refused, so readiness says it before.
func TestReadinessSeesThatVaultClosesTheRecords(t *testing.T) {
	v, _, settings := throughVault(t)
	s := harness.Start(t, settings)
	s.Generate(t, harness.Org())
	ready := func() bool { return strings.Contains(s.AskAdmin(t, "/readyz"), `"status":"ready"`) }
	write := func(path string, fields map[string]any) {
		t.Helper()
		_, err := root(t, v).WriteWithContext(context.WithoutCancel(t.Context()), path, fields)
		must(t, err)
	}
	write("orgkeys-seal/keys/seal/rotate", nil)
	latest, err := root(t, v).ReadWithContext(t.Context(), "orgkeys-seal/keys/seal")
	must(t, err)
	write("orgkeys-seal/keys/seal/config", map[string]any{"min_decryption_version": latest.Data["latest_version"]})
	defer write("orgkeys-seal/keys/seal/config", map[string]any{"min_decryption_version": 1})
	harness.Eventually(t, harness.Patience, "readiness says so, with what to do", func() bool {
		said := s.AskAdmin(t, "/readyz")
		return !ready() && strings.Contains(said, "sealed records") && strings.Contains(said, "lower it and run orgkeys rewrap")
	})
	write("orgkeys-seal/keys/seal/config", map[string]any{"min_decryption_version": 1})
	harness.Eventually(t, harness.Patience, "it is ready again", ready)
}
