package main

import (
	"bufio"
	"context"
	"database/sql"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/redislock/redistest"
	"github.com/orgkeys/orgkeys/internal/sqlstore/pgtest"
)

// onPostgres starts a server with PostgreSQL whose file sink is elsewhere.
func onPostgres(t *testing.T, opts ...harness.Option) (*harness.Server, *pgtest.Server, *sql.DB) {
	t.Helper()
	pg, err := pgtest.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pg.Close() })
	redis, err := redistest.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { redis.Close() })
	location, err := pg.NewDatabase("orgkeys")
	if err != nil {
		t.Fatal(err)
	}
	s := harness.Start(t, append([]harness.Option{
		harness.Set("ORGKEYS_DATABASE_URL", location), harness.Set("ORGKEYS_REDIS_URL", redis.URL()), harness.Set("ORGKEYS_CHECKPOINT_INTERVAL", "1s"),
		harness.Set("ORGKEYS_AUDIT_FILE", filepath.Join(t.TempDir(), "sink.jsonl")),
	}, opts...)...)
	return s, pg, opened(t, location)
}

func opened(t *testing.T, location string) *sql.DB {
	t.Helper()
	db, err := sql.Open("pgx", location)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func statements(t *testing.T, db *sql.DB, all ...string) {
	t.Helper()
	for _, s := range all {
		if _, err := db.Exec(s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
}

// listed has n events recorded, and covered by a signed checkpoint: what none covers is not moved.
func listed(t *testing.T, s *harness.Server, n int) {
	t.Helper()
	org := harness.Org()
	for range n {
		s.List(t, org)
	}
	db := opened(t, s.Setting("ORGKEYS_DATABASE_URL"))
	var size int64
	if err := db.QueryRow("SELECT size FROM log_head").Scan(&size); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, harness.Patience, "a signed checkpoint covers the events", func() (covered bool) {
		err := db.QueryRow("SELECT max(size) >= $1 FROM signed_checkpoints WHERE superseded = 0", size).Scan(&covered)
		return err == nil && covered
	})
	if err := db.Close(); err != nil { // its database may be dropped next
		t.Fatal(err)
	}
}

// movingAll is the command that moves everything.
func movingAll(args ...string) []string {
	return append([]string{"audit", "archive", "--before", time.Now().Format(time.RFC3339Nano)}, args...)
}

// archivedEvents is how many verifying the log finds in the archive.
func archivedEvents(t *testing.T, s *harness.Server) int {
	t.Helper()
	said := ok(t, s, "audit", "verify")
	moved := regexp.MustCompile(`the first (\d+) of them are in the archive`).FindStringSubmatch(said)
	if moved == nil {
		return 0
	}
	n, err := strconv.Atoi(moved[1])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// With PostgreSQL the command moves the log beside a server, whatever moment it is killed
// at and whoever else runs it; and what --help says makes the files smaller.
func TestTheArchiveCommandOnPostgreSQL(t *testing.T) {
	t.Parallel()
	archive := filepath.Join(t.TempDir(), "archive")
	s, _, db := onPostgres(t, harness.Set("ORGKEYS_AUDIT_ARCHIVE", archive))
	listed(t, s, 900)
	other := harness.Copy(t, s.Dir) // another host, which has the same token
	kills := 0
	for wait := 50 * time.Millisecond; ; wait += wait/3 + 20*time.Millisecond {
		ctx, cancel := context.WithTimeout(t.Context(), wait)
		killed := s.RunUntil(t, ctx, movingAll()...)
		cancel()
		archivedEvents(t, s)
		listed(t, s, 1)
		if !killed {
			break
		}
		kills++
	}
	ok(t, s, movingAll()...) // the one before may have found the lock still taken
	moved := archivedEvents(t, s)
	if kills < 3 || moved < 768 {
		t.Errorf("after %d kills %d events are moved", kills, moved)
	}
	var left int
	if err := db.QueryRow("SELECT count(*) FROM events WHERE idx < $1", moved).Scan(&left); err != nil || left > 0 {
		t.Errorf("%d of them are in the database, %v", left, err)
	}

	help := ok(t, s, "audit", "archive", "--help")
	statement := regexp.MustCompile(`(?m)^VACUUM .*$`).FindString(help)
	tables := regexp.MustCompile(`\w+`).FindAllString(strings.SplitN(statement, ")", 2)[1], -1)
	size := func() (sum int64) {
		for _, table := range tables {
			var n int64
			if err := db.QueryRow("SELECT pg_total_relation_size($1::regclass)", table).Scan(&n); err != nil {
				t.Fatal(err)
			}
			sum += n
		}
		return sum
	}
	before := size()
	if said := ok(t, s, movingAll("--vacuum")...); !strings.Contains(said, "see orgkeys audit archive --help") {
		t.Errorf("--vacuum says %s", said)
	}
	statements(t, db, statement)
	if after := size(); len(tables) < 5 || after*2 > before {
		t.Errorf("%s take %d bytes, and took %d", tables, after, before)
	}
	listed(t, s, 400)

	// Two at once: one of them moves, and nothing is moved twice.
	var both sync.WaitGroup
	for _, dir := range []string{s.Dir, other} {
		both.Go(func() {
			cmd := exec.CommandContext(t.Context(), harness.Binary(t), movingAll()...)
			cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + filepath.Dir(dir), "ORGKEYS_DATA_DIR=" + dir}
			for _, name := range []string{"DATABASE_URL", "REDIS_URL", "AUDIT_FILE", "AUDIT_ARCHIVE", "CHECKPOINT_INTERVAL"} {
				cmd.Env = append(cmd.Env, "ORGKEYS_"+name+"="+s.Setting("ORGKEYS_"+name))
			}
			if said, err := cmd.CombinedOutput(); err != nil && !strings.Contains(string(said), "another process moves the log") {
				t.Errorf("%v: %s", err, said)
			}
		})
	}
	both.Wait()
	if now := archivedEvents(t, s); now < moved+256 {
		t.Errorf("%d events are moved, and %d were", now, moved)
	}
	ok(t, s, "audit", "prove", "3")
	ok(t, s, "audit", "export", filepath.Join(t.TempDir(), "export.tar.gz"))
}

// interrupted passes requests on to a bucket. After the answer to the n-th it calls
// interrupt, and passes that answer on to nobody.
type interrupted struct {
	url string

	mu        sync.Mutex
	left      int
	interrupt func()
}

func newInterrupted(t *testing.T) *interrupted {
	t.Helper()
	const accessKey, secretKey = "orgkeys", "not-so-secret"
	build := exec.CommandContext(t.Context(), filepath.Join(harness.ModuleRoot(t), "internal/audit/tiles/readers/fakes3/build"))
	build.Stderr = t.Output()
	program, err := build.Output()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), strings.TrimSpace(string(program)), accessKey, secretKey)
	stdin, inErr := cmd.StdinPipe()
	stdout, outErr := cmd.StdoutPipe()
	if err := errors.Join(inErr, outErr, cmd.Start()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = errors.Join(stdin.Close(), cmd.Wait()) })
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	to, err := url.Parse(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	i := &interrupted{}
	through := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(to)
		r.Out.Host = r.In.Host // the signature covers it
	}}
	through.ModifyResponse = func(*http.Response) error {
		i.mu.Lock()
		defer i.mu.Unlock()
		if i.left--; i.left != 0 {
			return nil
		}
		i.interrupt()
		panic(http.ErrAbortHandler)
	}
	proxy := httptest.NewServer(through)
	t.Cleanup(proxy.Close)
	i.url = proxy.URL
	return i
}

func (i *interrupted) settings() (all []harness.Option) {
	for name, value := range map[string]string{"ENDPOINT": i.url, "REGION": "us-east-1", "ACCESS_KEY": "orgkeys", "SECRET_KEY": "not-so-secret"} {
		all = append(all, harness.Set("ORGKEYS_AUDIT_S3_"+name, value))
	}
	return all
}

// kills runs a command until its first request to the bucket is answered, then until its second, and
// so on, by steps, until it ends by itself. It looks after each.
func (i *interrupted) kills(t *testing.T, s *harness.Server, step int, look func(), args ...string) (kills int) {
	t.Helper()
	for n := 1; ; n += step {
		ctx, cancel := context.WithCancel(t.Context())
		i.set(n, cancel)
		killed := s.RunUntil(t, ctx, args...)
		cancel()
		i.set(0, nil)
		look()
		if !killed {
			ok(t, s, args...) // it may have found the lock still taken
			return kills
		}
		kills++
	}
}

func (i *interrupted) set(n int, interrupt func()) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.left, i.interrupt = n, interrupt
}

// Whatever request to its bucket the command is killed behind, the next run goes on; and
// after a restored backup, when the archive is taken over to another place.
func TestTheArchiveCommandIsKilledWithABucket(t *testing.T) {
	t.Parallel()
	bucket := newInterrupted(t)
	s, pg, db := onPostgres(t, append(bucket.settings(), harness.Set("ORGKEYS_AUDIT_ARCHIVE", "s3://log/old"))...)
	step := 5
	if os.Getenv("ORGKEYS_TEST_LONG") != "" {
		step = 1
	}
	verifies := func() { archivedEvents(t, s) }
	listed(t, s, 700)
	if n := bucket.kills(t, s, step, verifies, movingAll()...); n < 3 {
		t.Errorf("only %d kills", n)
	}
	if n := archivedEvents(t, s); n < 512 {
		t.Errorf("%d events are moved", n)
	}
	key := strings.TrimSpace(ok(t, s, "audit", "key"))
	if out, errs, code := s.Run(t, "audit", "verify-tiles", "s3://log/old", "--key", key); code != 3 {
		t.Errorf("the files alone: exit code %d: %s%s", code, out, errs)
	}

	s.Stop(t)
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	admin := opened(t, pg.URL("postgres"))
	statements(t, admin, "CREATE DATABASE backup TEMPLATE orgkeys")
	s.Start(t)
	listed(t, s, 300)
	ok(t, s, movingAll()...)
	s.Stop(t)
	statements(t, admin, "DROP DATABASE orgkeys WITH (FORCE)", "CREATE DATABASE orgkeys TEMPLATE backup")
	ok(t, s, "audit", "accept-rollback", "--reason", "restored the backup")
	s.Start(t)
	listed(t, s, 300)
	if out, errs, code := s.Run(t, movingAll()...); code != 1 || !strings.Contains(errs, "once with --from s3://log/old") {
		t.Errorf("the archive, which is ahead: exit code %d: %s%s", code, out, errs)
	}
	s.Configured("ORGKEYS_AUDIT_ARCHIVE", "s3://log/next")
	at := func(place string) func() {
		return func() {
			out, errs, code := s.Run(t, "audit", "verify")
			if code == 0 {
				return
			}
			// Until it is taken over, the archive is where it was.
			s.Configured("ORGKEYS_AUDIT_ARCHIVE", place)
			defer s.Configured("ORGKEYS_AUDIT_ARCHIVE", "s3://log/next")
			if out2, errs2, code := s.Run(t, "audit", "verify"); code != 0 {
				t.Fatalf("neither place verifies: %s%s\n%s%s", out, errs, out2, errs2)
			}
		}
	}
	if n := bucket.kills(t, s, step, at("s3://log/old"), movingAll("--from", "s3://log/old")...); n < 3 {
		t.Errorf("only %d kills of taking over", n)
	}
	if n := archivedEvents(t, s); n < 768 {
		t.Errorf("%d events are moved after taking over", n)
	}
	if out, errs, code := s.Run(t, "audit", "verify-tiles", "s3://log/next", "--key", key); code != 3 {
		t.Errorf("the files alone: exit code %d: %s%s", code, out, errs)
	}
	listed(t, s, 300)
	ok(t, s, movingAll()...)
	ok(t, s, "audit", "prove", "3")
	if n := archivedEvents(t, s); n < 1024 {
		t.Errorf("%d events are moved the night after", n)
	}
}
