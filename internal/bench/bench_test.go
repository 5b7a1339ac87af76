// Package bench_test measures the shipped program beside its back end alone,
// both in one run and in turns, so that a busy machine slows both alike.
// scripts/bench runs it; docs/benchmarks.md has figures and how they came about.
package bench_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/vault/api"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/hsm"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
	"github.com/orgkeys/orgkeys/internal/vault/vaulttest"
	"github.com/orgkeys/orgkeys/policies"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }

// inPhases has n clients do b.N of a, then b.N of b, in rounds of a tenth, and
// reports both rates and their ratio. It is for work that queues for the
// processors, where clients in turns would only wait for each other.
func inPhases(b *testing.B, n int, nameA string, doA func(i int) error, nameB string, doB func(i int) error) {
	b.Helper()
	round := max(1, b.N/10)
	var tookA, tookB time.Duration
	b.ResetTimer()
	for from := 0; from < b.N; from += round {
		to := min(from+round, b.N)
		tookA += phase(b, n, from, to, doA)
		tookB += phase(b, n, from, to, doB)
	}
	b.ReportMetric(float64(b.N)/tookA.Seconds(), nameA+"/s")
	b.ReportMetric(float64(b.N)/tookB.Seconds(), nameB+"/s")
	b.ReportMetric(100*tookA.Seconds()/tookB.Seconds(), "%")
}

func phase(b *testing.B, n, from, to int, do func(i int) error) time.Duration {
	var next atomic.Int64
	next.Store(int64(from))
	start := time.Now()
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			for i := int(next.Add(1) - 1); i < to; i = int(next.Add(1) - 1) {
				if err := do(i); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	return time.Since(start)
}

// inTurns has n clients do a and then b, b.N times in all, and reports both
// rates, per client-second times n, and their ratio.
func inTurns(b *testing.B, n int, nameA string, doA func() error, nameB string, doB func() error) {
	b.Helper()
	var left, tookA, tookB atomic.Int64
	left.Store(int64(b.N))
	var wg sync.WaitGroup
	b.ResetTimer()
	for range n {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				start := time.Now()
				if err := doA(); err != nil {
					b.Error(err)
					return
				}
				middle := time.Now()
				if err := doB(); err != nil {
					b.Error(err)
					return
				}
				tookA.Add(int64(middle.Sub(start)))
				tookB.Add(int64(time.Since(middle)))
			}
		})
	}
	wg.Wait()
	rate := func(took *atomic.Int64) float64 {
		return float64(b.N) * float64(n) * float64(time.Second) / float64(took.Load())
	}
	b.ReportMetric(rate(&tookA), nameA+"/s")
	b.ReportMetric(rate(&tookB), nameB+"/s")
	b.ReportMetric(100*rate(&tookB)/rate(&tookA), "%")
}

// oneKey is what a key costs on the library alone: the same sessions, the same
// mechanisms, and nothing else.
func oneKey(ctx context.Context, token *hsm.Token) error {
	key, err := token.Create(ctx, uuid.NewString())
	if err != nil {
		return err
	}
	der, err := key.Export(ctx)
	clear(der)
	if err != nil {
		return err
	}
	return key.Destroy(ctx)
}

// BenchmarkKeysSoftHSM: keys a second through the running program, beside a
// loop on a session pool like its own. RSA keys take widely different times to
// make, so use some 1,000 of them.
func BenchmarkKeysSoftHSM(b *testing.B) {
	cfg, _, err := hsm.InitSoftHSM(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	token, err := hsm.Open(b.Context(), cfg)
	if err != nil {
		b.Fatal(err)
	}
	defer token.Close()
	s := harness.Start(b, harness.Set("ORGKEYS_MAX", fmt.Sprint(mostKeys)))
	inTurns(b, 2, "library", func() error { return oneKey(context.Background(), token) }, "orgkeys", generator(b, s))
}

func call(s *harness.Server, method, path, bearer string) (int, []byte, error) {
	req, err := http.NewRequest(method, s.API+path, nil)
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Authorization", "Bearer "+bearer)
	resp, err := s.HTTP.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, body, err
}

// percentiles reports p50 and p99 of what was measured.
func percentiles(b *testing.B, took []time.Duration) {
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Nanoseconds())/1000, "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds())/1000, "p99-µs")
}

// BenchmarkDecision: one decision of the shipped policy, in a heap like the server's.
func BenchmarkDecision(b *testing.B) {
	defer runtime.KeepAlive(make([]byte, 16<<20)) // heapFloor of internal/server
	p, err := authz.Load(b.Context(), policies.Files)
	if err != nil {
		b.Fatal(err)
	}
	r := authz.Request{
		Caller: authz.Caller{Kind: authz.Person, Subject: "u-1", Org: "acme", Roles: []authz.Role{authz.Owner}},
		Action: authz.GenerateKey, Org: "acme",
	}
	took := make([]time.Duration, 0, b.N)
	for b.Loop() {
		r.Caller.Subject = strconv.Itoa(len(took)) // what was decided once is remembered
		start := time.Now()
		d, err := p.Decide(b.Context(), r)
		if err != nil || !d.Allow {
			b.Fatal(d, err)
		}
		took = append(took, time.Since(start))
	}
	percentiles(b, took)
}

// BenchmarkListFiveKeysSoftHSM: GET …/key of an organization with five keys,
// through the running program, its audit event durable.
func BenchmarkListFiveKeysSoftHSM(b *testing.B) {
	listFive(b, harness.Start(b))
}

func listFive(b *testing.B, s *harness.Server) {
	bearer := s.Token(b, "bench", "OWNER")
	for range 5 {
		if status, body, err := call(s, http.MethodPost, harness.KeyPath("bench"), bearer); err != nil || status != http.StatusOK {
			b.Fatal(status, string(body), err)
		}
	}
	took := make([]time.Duration, 0, b.N)
	for b.Loop() {
		start := time.Now()
		status, body, err := call(s, http.MethodGet, harness.KeyPath("bench"), bearer)
		if err != nil || status != http.StatusOK || bytes.Count(body, []byte("BEGIN PUBLIC KEY")) != 5 {
			b.Fatal(status, err)
		}
		took = append(took, time.Since(start))
	}
	percentiles(b, took)
}

// BenchmarkStart: from starting the process on an existing data directory to
// its being ready, and its resident memory then.
func BenchmarkStart(b *testing.B) {
	s := harness.Start(b)
	s.Stop(b)
	took := make([]time.Duration, 0, b.N)
	var resident, library int64
	for b.Loop() {
		start := time.Now()
		s.Start(b)
		took = append(took, time.Since(start))
		time.Sleep(500 * time.Millisecond) // at rest
		resident, library = memory(b, s.PID())
		s.Stop(b)
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Milliseconds()), "ready-ms")
	b.ReportMetric(float64(resident)/1024, "resident-MiB")
	b.ReportMetric(float64(library)/1024, "of-it-HSM-library-MiB")
}

// memory is a process's resident memory in KiB, and how much of it is mapped
// from the PKCS#11 module and OpenSSL, which only the module uses.
func memory(b *testing.B, pid int) (resident, library int64) {
	smaps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		b.Fatal(err)
	}
	ofLibrary := false
	for line := range strings.Lines(string(smaps)) {
		f := strings.Fields(line)
		if len(f) >= 5 && strings.Contains(f[0], "-") {
			name := filepath.Base(f[len(f)-1])
			ofLibrary = strings.HasPrefix(name, "libsofthsm2") || strings.HasPrefix(name, "libcrypto") ||
				strings.HasPrefix(name, "libstdc++") || strings.HasPrefix(name, "libm.")
		}
		if len(f) < 2 || f[0] != "Rss:" {
			continue
		}
		kib, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil {
			b.Fatal(err)
		}
		resident += kib
		if ofLibrary {
			library += kib
		}
	}
	return resident, library
}

// BenchmarkEvents: events into the log and its file sink, by 64 callers at once
// and by one, each event durable before its caller goes on.
func BenchmarkEvents(b *testing.B) {
	for _, callers := range []int{1, 64, 512} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			dir := b.TempDir()
			db, err := sqlstore.Open(b.Context(), filepath.Join(dir, "orgkeys.db"))
			if err != nil {
				b.Fatal(err)
			}
			defer db.Close()
			if err := db.Migrate(b.Context()); err != nil {
				b.Fatal(err)
			}
			db.UseEventKey(audit.NewEventKey())
			auditLog := audit.NewLog(db, slog.New(slog.DiscardHandler), audit.NewFileSink(filepath.Join(dir, "audit.jsonl")))
			ctx, stop := context.WithCancel(b.Context())
			ended := make(chan error, 1)
			go func() { ended <- auditLog.Run(ctx) }()
			record(b, auditLog, callers)
			for auditLog.Sinks()[0].Next < int64(b.N) {
				time.Sleep(time.Millisecond)
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "events/s")
			stop()
			if err := <-ended; err != nil {
				b.Fatal(err)
			}
		})
	}
}

func record(b *testing.B, auditLog *audit.Log, callers int) {
	var left atomic.Int64
	left.Store(int64(b.N))
	var wg sync.WaitGroup
	b.ResetTimer()
	for range callers {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				e := audit.New(audit.KeysListed, "acme")
				e.Actor = audit.Actor{Kind: authz.Person, ID: "u-1"}
				e.Request = "0f0e0d0c-0b0a-0908-0706-050403020100"
				if err := auditLog.Record(b.Context(), e); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// withVault starts a real Vault and the program on it.
func withVault(b *testing.B, opts ...harness.Option) (*vaulttest.Server, *harness.Server) {
	b.Helper()
	v, err := vaulttest.Start(b.Context(), b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := v.Stop(); err != nil {
			b.Error(err)
		}
	})
	login, err := v.AppRole(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	opts = append(opts, harness.Set("ORGKEYS_KEYSTORE", "vault"),
		harness.Set("ORGKEYS_VAULT_ROLE_ID_FILE", login.RoleIDFile), harness.Set("ORGKEYS_VAULT_SECRET_ID_FILE", login.SecretIDFile))
	for _, pair := range v.Env() {
		if name, value, ok := strings.Cut(pair, "="); ok && strings.HasPrefix(name, "VAULT_") {
			opts = append(opts, harness.Set(name, value))
		}
	}
	return v, harness.Start(b, opts...)
}

// mostKeys is the highest quota there is.
const mostKeys = 64

// generator returns a function that has a key made, in one of as many
// organizations as b.N keys need.
func generator(b *testing.B, s *harness.Server) func() error {
	bearers := make([]string, b.N/mostKeys+1)
	for i := range bearers {
		bearers[i] = s.Token(b, fmt.Sprintf("bench-%d", i), "OWNER")
	}
	var made atomic.Int64
	return func() error {
		i := int(made.Add(1)) % len(bearers)
		status, body, err := call(s, http.MethodPost, harness.KeyPath(fmt.Sprintf("bench-%d", i)), bearers[i])
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("status %d: %s", status, body)
		}
		return err
	}
}

// BenchmarkKeysVault: keys a second through the running program on Vault
// Transit, beside a loop that calls Transit directly.
func BenchmarkKeysVault(b *testing.B) {
	for _, clients := range []int{1, 2, 8} {
		b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) {
			v, s := withVault(b, harness.Set("ORGKEYS_MAX", fmt.Sprint(mostKeys)))
			direct := directClient(b, v)
			key := generator(b, s)
			inPhases(b, clients, "direct", func(int) error { return transitKey(context.Background(), direct) },
				"orgkeys", func(int) error { return key() })
		})
	}
}

// directClient is a client with the settings and the login that the program's
// own has.
func directClient(b *testing.B, v *vaulttest.Server) *api.Client {
	client, err := v.Client("")
	if err != nil {
		b.Fatal(err)
	}
	settings := client.CloneConfig()
	transport := settings.HttpClient.Transport.(*http.Transport)
	transport.Protocols = new(http.Protocols)
	transport.Protocols.SetHTTP1(true)
	transport.ForceAttemptHTTP2, transport.TLSNextProto, transport.TLSClientConfig.NextProtos = false, nil, nil
	transport.MaxIdleConnsPerHost = 64
	if client, err = api.NewClient(settings); err != nil {
		b.Fatal(err)
	}
	login, err := client.Logical().WriteWithContext(b.Context(), "auth/approle/login", credentials(b, v))
	if err != nil {
		b.Fatal(err)
	}
	client.SetToken(login.Auth.ClientToken)
	renewal, err := client.NewLifetimeWatcher(&api.LifetimeWatcherInput{Secret: login})
	if err != nil {
		b.Fatal(err)
	}
	go renewal.Start()
	b.Cleanup(renewal.Stop)
	return client
}

// credentials are those of the program's login.
func credentials(b *testing.B, v *vaulttest.Server) map[string]any {
	role, err := v.AppRole(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	return map[string]any{"role_id": readLine(b, role.RoleIDFile), "secret_id": readLine(b, role.SecretIDFile)}
}

// transitKey is what a key costs on Transit alone.
func transitKey(ctx context.Context, client *api.Client) error {
	path, l := "orgkeys/keys/"+uuid.NewString(), client.Logical()
	if _, err := l.WriteWithContext(ctx, path, map[string]any{"type": "rsa-2048", "exportable": true}); err != nil {
		return err
	}
	if _, err := l.WriteWithContext(ctx, path+"/config", map[string]any{"deletion_allowed": true}); err != nil {
		return err
	}
	if _, err := l.ReadWithContext(ctx, "orgkeys/export/encryption-key/"+strings.TrimPrefix(path, "orgkeys/keys/")+"/1"); err != nil {
		return err
	}
	_, err := l.DeleteWithContext(ctx, path)
	return err
}

// BenchmarkListFiveKeysVault is BenchmarkListFiveKeysSoftHSM on Vault.
func BenchmarkListFiveKeysVault(b *testing.B) {
	_, s := withVault(b)
	listFive(b, s)
}

// BenchmarkRegister: durable registrations a second, of nodes that all have
// their own address, beside AppRole logins on a real Vault, 16 clients each.
// The client's signatures are made before.
func BenchmarkRegister(b *testing.B) {
	v, err := vaulttest.Start(b.Context(), b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	defer v.Stop()
	vaultClient, err := v.Client("")
	if err != nil {
		b.Fatal(err)
	}
	login := credentials(b, v)

	n := startNodes(b, b.N)
	inPhases(b, 16, "logins", func(int) error {
		_, err := vaultClient.Logical().WriteWithContext(context.Background(), "auth/approle/login", login)
		return err
	}, "registrations", n.register)
}

// nodes are those of one organization, beside the running program.
type nodes struct {
	s        *harness.Server
	requests [][]byte // registrations, each of another node, signed before
}

// startNodes starts the program, with two boot secrets to fetch.
func startNodes(b *testing.B, registrations int, opts ...harness.Option) nodes {
	b.Helper()
	s := harness.Start(b, append(opts, harness.Set("ORGKEYS_TIMESTAMP_WINDOW", "3600s"))...)
	key := s.Generate(b, "bench")
	owner := s.Token(b, "bench", "OWNER")
	for _, name := range []string{"env_s3", "env_gcs"} {
		s.Do(b, harness.Request{
			Method: http.MethodPut, Path: "/organization/bench/secret/" + name, Token: owner, Body: make([]byte, 500),
			Header: http.Header{"Content-Type": {"application/octet-stream"}},
		}).Want(b, http.StatusOK, "Secret stored successfully")
	}
	n := nodes{s, make([][]byte, registrations)}
	for i := range n.requests {
		n.requests[i] = registration(b, key.Private, i)
	}
	return n
}

func (n nodes) register(i int) error { return n.post("/register", n.requests[i]) }

// fetch fetches the secrets. Nothing of a signature is used up by that.
func (n nodes) fetch(i int) error { return n.post("/secrets", n.requests[i%len(n.requests)]) }

func (n nodes) post(path string, request []byte) error {
	resp, err := n.s.HTTP.Post(n.s.API+path, "application/json", bytes.NewReader(request))
	if err != nil {
		return err
	}
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d: %s", resp.StatusCode, body)
	}
	return errors.Join(err, resp.Body.Close())
}

// BenchmarkSecrets: fetches of two boot secrets a second, by 16 clients, each
// acknowledged by the file sink before it is answered.
func BenchmarkSecrets(b *testing.B) {
	n := startNodes(b, 100)
	b.ResetTimer()
	took := phase(b, 16, 0, b.N, n.fetch)
	b.ReportMetric(float64(b.N)/took.Seconds(), "fetches/s")
}

// BenchmarkNodesAtHalfLoad: how long a registration and a fetch take while they
// come at half of the rate that 16 clients reach.
func BenchmarkNodesAtHalfLoad(b *testing.B) {
	const measuring = 2000
	for _, c := range []struct {
		name string
		do   func(n nodes, i int) error
	}{{"register", nodes.register}, {"secrets", nodes.fetch}} {
		b.Run(c.name, func(b *testing.B) {
			n := startNodes(b, measuring+b.N)
			whole := phase(b, 16, 0, measuring, func(i int) error { return c.do(n, i) })
			interval := 2 * whole / measuring
			b.ResetTimer()
			percentiles(b, atIntervals(b, b.N, interval, func(i int) error { return c.do(n, measuring+i) }))
			b.ReportMetric(float64(time.Second)/float64(interval), "offered/s")
		})
	}
}

// atIntervals has do begin n times, whether or not earlier ones have ended,
// and returns how long after its moment each was done.
func atIntervals(b *testing.B, n int, interval time.Duration, do func(i int) error) []time.Duration {
	took := make([]time.Duration, n)
	var wg sync.WaitGroup
	begin := time.Now()
	for i := range n {
		moment := begin.Add(time.Duration(i) * interval)
		time.Sleep(time.Until(moment))
		wg.Go(func() {
			if err := do(i); err != nil {
				b.Error(err)
			}
			took[i] = time.Since(moment)
		})
	}
	wg.Wait()
	return took
}

func readLine(b *testing.B, path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		b.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

func registration(b *testing.B, key *rsa.PrivateKey, i int) []byte {
	ip, at := fmt.Sprintf("10.%d.%d.%d", i>>16&255, i>>8&255, i&255), strconv.FormatInt(time.Now().UnixMilli(), 10)
	digest := sha256.Sum256([]byte(ip + "|eu-1|" + at))
	signature, err := rsa.SignPKCS1v15(nil, key, crypto.SHA256, digest[:])
	if err != nil {
		b.Fatal(err)
	}
	return fmt.Appendf(nil, `{"ip":%q,"region":"eu-1","timestamp":%q,"id_org":"bench","signature":%q,"version":"1.0","status":"running"}`,
		ip, at, base64.StdEncoding.EncodeToString(signature))
}
