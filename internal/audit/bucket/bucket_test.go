package bucket_test

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/audittest"
	"github.com/orgkeys/orgkeys/internal/audit/bucket"
	"github.com/orgkeys/orgkeys/internal/audit/tiles"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
)

const accessKey, secretKey = "orgkeys", "not-so-secret"

// newBucket starts an S3-compatible server, and returns its address and a store in it.
func newBucket(t *testing.T) (endpoint string, b *bucket.Bucket) {
	t.Helper()
	build := exec.CommandContext(t.Context(), "../tiles/readers/fakes3/build")
	build.Stderr = t.Output()
	program, err := build.Output()
	audittest.Must(t, err)
	cmd := exec.CommandContext(t.Context(), strings.TrimSpace(string(program)), accessKey, secretKey)
	stdin, err := cmd.StdinPipe()
	audittest.Must(t, err)
	stdout, err := cmd.StdoutPipe()
	audittest.Must(t, err)
	audittest.Must(t, cmd.Start())
	t.Cleanup(func() { _ = errors.Join(stdin.Close(), cmd.Wait()) })
	line, err := bufio.NewReader(stdout).ReadString('\n')
	audittest.Must(t, err)
	endpoint = strings.TrimSpace(line)
	return endpoint, at(t, endpoint, secretKey)
}

func at(t *testing.T, endpoint, secret string) *bucket.Bucket {
	t.Helper()
	b, err := bucket.New(bucket.Config{Endpoint: endpoint, Region: "us-east-1", AccessKey: accessKey, SecretKey: secret, Place: "s3://log/years/of"})
	audittest.Must(t, err)
	return b
}

func TestAFileIsWrittenOnceAndTheCheckpointReplaced(t *testing.T) {
	t.Parallel()
	endpoint, b := newBucket(t)
	ctx := t.Context()
	want := func(path, content string) {
		t.Helper()
		if held, err := b.Read(ctx, path); err != nil || string(held) != content {
			t.Errorf("%s holds %q, %v; want %q", path, held, err, content)
		}
	}
	if _, err := b.Read(ctx, "checkpoint"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what is not there: %v", err)
	}
	audittest.Must(t, b.WriteOnce(ctx, "tile/0/000", []byte("first")))
	audittest.Must(t, b.WriteOnce(ctx, "tile/0/000", []byte("first")))
	if err := b.WriteOnce(ctx, "tile/0/000", []byte("other")); err == nil || !strings.Contains(err.Error(), "does not hold what the log holds") {
		t.Errorf("over another file: %v", err)
	}
	want("tile/0/000", "first")
	large := make([]byte, 16<<20) // more than one part, if there were parts
	_, _ = rand.Read(large)
	audittest.Must(t, b.WriteOnce(ctx, "tile/entries/000", large))
	want("tile/entries/000", string(large))
	if err := b.WriteOnce(ctx, "tile/entries/000", large[1:]); err == nil {
		t.Error("a large file was written over")
	}

	audittest.Must(t, b.Replace(ctx, "checkpoint", nil, []byte("one")))
	audittest.Must(t, b.Replace(ctx, "checkpoint", []byte("one"), []byte("two")))
	for _, before := range [][]byte{nil, []byte("one")} {
		if err := b.Replace(ctx, "checkpoint", before, []byte("three")); err == nil {
			t.Errorf("replaced, although it holds something else than %q", before)
		}
	}
	want("checkpoint", "two")

	audittest.Must(t, b.WriteOnce(ctx, "tile/entries/001.p/7", []byte("seven")))
	audittest.Must(t, b.WriteOnce(ctx, "tile/entries/001.p/8", []byte("eight")))
	audittest.Must(t, b.RemoveAll(ctx, "tile/entries/001.p"))
	audittest.Must(t, b.RemoveAll(ctx, "tile/entries/000"))
	audittest.Must(t, b.RemoveAll(ctx, "tile/entries/000"))
	for _, path := range []string{"tile/entries/001.p/7", "tile/entries/001.p/8", "tile/entries/000"} {
		if _, err := b.Read(ctx, path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there: %v", path, err)
		}
	}
	want("tile/0/000", "first")
	if _, err := at(t, endpoint, "wrong").Read(ctx, "tile/0/000"); err == nil || errors.Is(err, fs.ErrNotExist) || strings.Contains(err.Error(), "wrong") {
		t.Errorf("with a wrong secret key: %v", err)
	}
}

// Of many who write one file at once, with another content each, one wins.
func TestOneOfManyWriters(t *testing.T) {
	t.Parallel()
	_, b := newBucket(t)
	var won atomic.Int32
	var all sync.WaitGroup
	for i := range 32 {
		all.Go(func() {
			if b.WriteOnce(t.Context(), "tile/0/000", fmt.Appendf(nil, "%d", i)) == nil {
				won.Add(1)
			}
		})
	}
	all.Wait()
	if won.Load() != 1 {
		t.Errorf("%d have written", won.Load())
	}
}

// toBucket returns a proxy to a new bucket.
func toBucket(t *testing.T) *httputil.ReverseProxy {
	t.Helper()
	endpoint, _ := newBucket(t)
	to, err := url.Parse(endpoint)
	audittest.Must(t, err)
	return &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(to)
		r.Out.Host = r.In.Host // the signature covers it
	}}
}

// An answer that is lost makes the client ask again: what it wrote itself is there then.
func TestALostAnswerIsNoOthersFile(t *testing.T) {
	t.Parallel()
	var lost, puts atomic.Int32
	through := toBucket(t)
	through.ModifyResponse = func(r *http.Response) error {
		if r.Request.Method != http.MethodPut {
			return nil
		}
		if r.Request.Header.Get("If-None-Match") != "*" || r.Request.URL.Query().Has("uploadId") {
			t.Errorf("%s without its condition", r.Request.URL)
		}
		if puts.Add(1) == 1 {
			lost.Add(1)
			panic(http.ErrAbortHandler)
		}
		return nil
	}
	proxy := httptest.NewServer(through)
	t.Cleanup(proxy.Close)
	b := at(t, proxy.URL, secretKey)
	if err := b.WriteOnce(t.Context(), "tile/0/000", []byte("mine")); err != nil || lost.Load() != 1 || puts.Load() < 2 {
		t.Errorf("%v, %d of %d answers lost", err, lost.Load(), puts.Load())
	}
}

// A write that another one hinders, which then fails, is made again, a few times.
func TestAWriteUnderWayIsWaitedFor(t *testing.T) {
	t.Parallel()
	var conflicts, puts atomic.Int32
	through := toBucket(t)
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut && puts.Add(1) > 0 && conflicts.Add(-1) >= 0 {
			w.WriteHeader(http.StatusConflict)
			fmt.Fprint(w, "<Error><Code>ConditionalRequestConflict</Code><Message>under way</Message></Error>")
			return
		}
		through.ServeHTTP(w, r)
	}))
	t.Cleanup(proxy.Close)
	b := at(t, proxy.URL, secretKey)
	ctx := t.Context()
	hindered := func(n int32, do func() error) error {
		conflicts.Store(n)
		puts.Store(0)
		return do()
	}
	for n, do := range []func() error{
		func() error { return b.WriteOnce(ctx, "tile/0/000", []byte("mine")) },
		func() error { return b.Replace(ctx, "checkpoint", nil, []byte("one")) },
		func() error { return b.Replace(ctx, "checkpoint", []byte("one"), []byte("two")) },
	} {
		if err := hindered(2, do); err != nil || puts.Load() != 3 {
			t.Errorf("%d: %v after %d attempts", n, err, puts.Load())
		}
	}
	if err := hindered(2, func() error { return b.WriteOnce(ctx, "tile/0/000", []byte("other")) }); err == nil || puts.Load() != 1 {
		t.Errorf("what another wrote: %v after %d attempts", err, puts.Load())
	}
	if err := hindered(1000, func() error { return b.WriteOnce(ctx, "tile/0/001", []byte("mine")) }); err == nil || !strings.Contains(err.Error(), "under way") || puts.Load() != 5 {
		t.Errorf("always hindered: %v after %d attempts", err, puts.Load())
	}
	conflicts.Store(0)
	if err := b.Replace(ctx, "checkpoint", nil, []byte("three")); err == nil || !strings.Contains(err.Error(), "by another run") {
		t.Errorf("what another run has published: %v", err)
	}
}

// A log moves into a bucket, and is verified from there; a server that hangs or is gone is
// an error in time.
func TestALogMovesIntoABucket(t *testing.T) {
	t.Parallel()
	endpoint, b := newBucket(t)
	e := audittest.NewSignedAt(t, filepath.Join(t.TempDir(), "orgkeys.db"))
	for _, key := range []string{"k-1", "k-2", "k-3"} {
		_, err := e.Raw.Exec("INSERT INTO org_keys (id, org_id, state) VALUES ($1, 'acme', 'deleted')", key)
		audittest.Must(t, err)
	}
	events := []audit.Event{e.Key(audit.KeyDeleted, "k-3")}
	for range 600 {
		events = append(events, e.Key(audit.KeysListed, ""))
	}
	e.Record(t, events...)
	store := tiles.Archive{Store: b}
	e.DB.UseArchive(store)
	m := tiles.Move{
		Before: time.Now().Add(time.Hour), Keep: 0, Progress: func(string) verify.Progress { return nil },
		Signed: func(ctx context.Context, _ func(context.Context) (bool, error)) error {
			_, err := e.DB.Sequence(ctx, 1000, audit.Condition{})
			return errors.Join(err, e.Checkpoints.Sign(ctx))
		},
	}
	for _, want := range []int64{512, 0} {
		if done, err := m.Run(t.Context(), store, e.DB); err != nil || done.Events != want {
			t.Fatalf("%d events were moved, %v; want %d", done.Events, err, want)
		}
	}
	evidence := &verify.Copy{}
	audittest.Must(t, evidence.AddKept(t.Context(), e.DB, nil))
	report, err := verify.Verify(t.Context(), e.DB, evidence, nil)
	if err != nil || report.Archived != 512 || report.Unread != nil || report.Receipts == 0 {
		t.Errorf("%+v, %v", report, err)
	}
	m.Keep = time.Nanosecond
	if done, err := m.Run(t.Context(), store, e.DB); err != nil || done.Entries != 512 {
		t.Fatalf("%d entries were removed, %v", done.Entries, err)
	}
	keys, err := audit.ParseKeys(e.VKey(t))
	audittest.Must(t, err)
	if _, removed, err := tiles.Check(t.Context(), b, keys, audit.Checkpoint{}, nil); err != nil || removed != 512 {
		t.Errorf("the files: %d are removed, %v", removed, err)
	}

	stuck := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	t.Cleanup(stuck.Close)
	t.Cleanup(stuck.CloseClientConnections)
	for _, away := range []string{stuck.URL, "http://127.0.0.1:1"} {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		began := time.Now()
		e.DB.UseArchive(tiles.Archive{Store: at(t, away, secretKey)})
		report, err = verify.Verify(ctx, e.DB, nil, nil)
		if took := time.Since(began); took > 10*time.Second || err == nil && report.Unread == nil {
			t.Errorf("%s instead of %s: after %v %v, %v", away, endpoint, took, report.Unread, err)
		}
		cancel()
	}
}

func TestPlacesAndServers(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		endpoint, place string
		ok              bool
	}{
		{"https://s3.example.org", "s3://log", true},
		{"https://s3.example.org:9000", "s3://log/a/b/", true},
		{"http://127.0.0.1:9000", "s3://log", true},
		{"http://s3.example.org", "s3://log", false},
		{"s3.example.org", "s3://log", false},
		{"https://user:password@s3.example.org", "s3://log", false},
		{"https://s3.example.org/path", "s3://log", false},
		{"https://s3.example.org", "s3://", false},
		{"https://s3.example.org", "s3:///a", false},
		{"https://s3.example.org", "s3://log/../other", false},
	} {
		_, err := bucket.New(bucket.Config{Endpoint: c.endpoint, Place: c.place, AccessKey: "a", SecretKey: "s"})
		if (err == nil) != c.ok {
			t.Errorf("%+v: %v", c, err)
		}
		if err != nil && strings.Contains(err.Error(), "password") {
			t.Errorf("the error tells the password: %v", err)
		}
	}
}
