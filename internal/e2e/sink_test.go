package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// What a file sink's disk is asked to do.
var (
	syncs  = []string{"fsync", "fdatasync"}
	writes = []string{"write", "pwrite64", "writev", "pwritev"}
)

// TestPromise4_NotOneByteBeforeASlowSink makes the file sink's disk slow by
// three seconds.
func TestPromise4_NotOneByteBeforeASlowSink(t *testing.T) {
	t.Parallel()
	const delay = 3 * time.Second
	s := harness.Start(t)
	org := harness.Org()
	owner := s.Token(t, org, "OWNER")
	s.List(t, org)
	settled(t, s)
	slow := s.Interfere(t, s.AuditFile(), syncs, fmt.Sprintf("delay_enter=%d", delay.Microseconds()))

	conn := post(t, s, org, owner)
	sent := time.Now()
	// The record is there, and as long as the sink is slow nobody sees it.
	db := s.Database(t)
	harness.Eventually(t, harness.Patience, "the key is pending", func() bool {
		return harness.Number(t, db, `SELECT count(*) FROM org_keys WHERE org_id = ? AND state = 'pending'`, org) == 1
	})
	pending := time.Now()
	if n := len(s.List(t, org)); n != 0 {
		t.Errorf("%d keys listed before the sink acknowledged the event", n)
	}
	if took := time.Since(pending); took > delay {
		t.Errorf("a list took %s: reads need not wait for sinks", took)
	}
	id := harness.Strings(t, db, `SELECT id FROM org_keys WHERE org_id = ?`, org)[0]
	s.Do(t, harness.Request{Method: "DELETE", Path: harness.KeyPath(org) + "/" + id, Token: owner}).Want(t, 404, notFoundMessage)
	first := make([]byte, 1)
	conn.SetReadDeadline(time.Now().Add(harness.Patience))
	if _, err := io.ReadFull(conn, first); err != nil {
		t.Fatal(err)
	}
	// A little is taken off, since the test sees the pending record after the fact.
	if waited := time.Since(pending); waited < delay-500*time.Millisecond {
		t.Errorf("the first byte came %s after the record was there, %s after the request; the sink takes %s", waited, time.Since(sent), delay)
	}
	resp, err := http.ReadResponse(bufio.NewReader(io.MultiReader(strings.NewReader(string(first)), conn)), nil)
	if err != nil {
		t.Fatal(err)
	}
	body := readAll(t, resp)
	if resp.StatusCode != 200 {
		t.Fatalf("status %d, body %.300q", resp.StatusCode, body)
	}
	harness.ParsePrivate(t, []byte(body))
	if seen := slow.Stop(t); !strings.Contains(seen, "DELAYED") {
		t.Errorf("strace delayed nothing:\n%s", seen)
	}
	if n := len(s.List(t, org)); n != 1 {
		t.Errorf("%d keys listed", n)
	}
}

// TestPromise4_AFailingSinkReleasesNothing lets the sink's writes fail, then
// its disk be full, then its disk be too slow for the deadline. The service
// says 503, keeps nothing, and works again without a restart.
func TestPromise4_AFailingSinkReleasesNothing(t *testing.T) {
	t.Parallel()
	disk := harness.SmallDisk(t, 1<<20)
	sink := filepath.Join(disk, "audit.jsonl")
	s := harness.Start(t, harness.Set("ORGKEYS_AUDIT_FILE", sink), harness.Set("ORGKEYS_AUDIT_DEADLINE", "1s"))
	org := harness.Org()
	owner := s.Token(t, org, "OWNER")
	kept := s.Generate(t, org)

	refused := func(t *testing.T) {
		t.Helper()
		resp := s.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: owner})
		if n, err := strconv.Atoi(resp.Header.Get("Retry-After")); resp.Status != 503 || err != nil || n < 1 {
			t.Fatalf("status %d, Retry-After %q, body %.300q; want 503", resp.Status, resp.Header.Get("Retry-After"), resp.Body)
		}
		if strings.Contains(string(resp.Body), "PRIVATE KEY") || resp.Header.Get("X-Key-Id") != "" {
			t.Error("a refused request released a key")
		}
		if resp.Took > 10*time.Second {
			t.Errorf("the refusal took %s, the deadline is 1s", resp.Took)
		}
		listed := s.List(t, org)
		if len(listed) != 1 || listed[0].ID != kept.ID {
			t.Errorf("listed %+v, want the first key alone", listed)
		}
		db := s.Database(t)
		harness.Eventually(t, harness.Patience, "the place is free again", func() bool {
			return harness.Number(t, db, `SELECT count(*) FROM org_keys WHERE org_id = ? AND slot IS NOT NULL`, org) == 1
		})
	}
	recovers := func(t *testing.T) {
		t.Helper()
		var resp harness.Response
		harness.Eventually(t, harness.Patience, "a key is released again", func() bool {
			resp = s.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: owner})
			return resp.Status == 200
		})
		key := harness.ReadKey(t, org, resp)
		s.Do(t, harness.Request{Method: "DELETE", Path: key.Location, Token: owner})
	}

	t.Run("its writes fail", func(t *testing.T) {
		broken := s.Interfere(t, sink, writes, "error=EIO")
		refused(t)
		ready := func() int { return s.Do(t, harness.Request{Method: "GET", Path: "/readyz"}).Status }
		harness.Eventually(t, harness.Patience, "it says that it is not ready", func() bool { return ready() == 503 })
		broken.Stop(t)
		recovers(t)
		harness.Eventually(t, harness.Patience, "it is ready again", func() bool { return ready() == 200 })
	})
	t.Run("its syncs fail", func(t *testing.T) {
		broken := s.Interfere(t, sink, syncs, "error=EIO")
		refused(t)
		broken.Stop(t)
		recovers(t)
	})
	t.Run("it is slower than the deadline", func(t *testing.T) {
		slow := s.Interfere(t, sink, syncs, "delay_enter=2500000")
		refused(t)
		slow.Stop(t)
		recovers(t)
	})
	t.Run("its disk is full", func(t *testing.T) {
		filler := filepath.Join(disk, "filler")
		harness.Fill(t, filler)
		// What is left of the sink's last page may still take an event.
		harness.Eventually(t, harness.Patience, "the disk is full", func() bool {
			resp := s.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: owner})
			if resp.Status == 200 {
				s.Do(t, harness.Request{Method: "DELETE", Path: resp.Header.Get("Location"), Token: owner})
			}
			return resp.Status == 503
		})
		refused(t)
		remove(t, filler)
		recovers(t)
	})
	t.Run("afterwards the sink has every event, once, and the log verifies", func(t *testing.T) {
		settled(t, s)
		withdrawn := 0
		for i, e := range s.Sink(t).Events {
			if e.Index != int64(i) {
				t.Fatalf("line %d of the sink has index %d", i, e.Index)
			}
			if e.Leaf.Type == "orgkey.withdrawn" {
				withdrawn++
			}
		}
		if withdrawn < 4 {
			t.Errorf("%d events say that a key was withdrawn, want one for each refusal", withdrawn)
		}
		s.Stop(t)
		if _, stderr, code := s.Run(t, "audit", "verify"); code != 0 {
			t.Errorf("audit verify: exit code %d\n%s", code, stderr)
		}
	})
}

// TestPromise4_ARefusedKeyStaysAwayAcrossRestarts kills the server while the
// sink is stuck: the pending key never becomes usable.
func TestPromise4_ARefusedKeyStaysAwayAcrossRestarts(t *testing.T) {
	t.Parallel()
	s := harness.Start(t, harness.Set("ORGKEYS_RESERVATION_TTL", "20s"))
	org := harness.Org()
	owner := s.Token(t, org, "OWNER")
	s.Interfere(t, s.AuditFile(), syncs, "delay_enter=20000000")
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go s.Try(ctx, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: owner})
	db := s.Database(t)
	harness.Eventually(t, harness.Patience, "the key is pending", func() bool {
		return harness.Number(t, db, `SELECT count(*) FROM org_keys WHERE org_id = ? AND state = 'pending'`, org) == 1
	})
	s.Kill()
	s.Start(t)
	if n := len(s.List(t, org)); n != 0 {
		t.Errorf("%d keys listed", n)
	}
	harness.Eventually(t, harness.Patience, "the sweeper withdrew the key, with an event", func() bool {
		return harness.Number(t, db, `SELECT count(*) FROM org_keys WHERE org_id = ? AND slot IS NOT NULL`, org) == 0 &&
			len(s.Sink(t).Find(func(l harness.Leaf) bool { return l.Org == org && l.Type == "orgkey.withdrawn" })) == 1
	})
	s.Generate(t, org)
}

// TestPromise9_FullDisk fills the data directory's disk, the database's and the
// sink's alike. Answers stay prompt and clear, and all is well when there is
// space again.
func TestPromise9_FullDisk(t *testing.T) {
	t.Parallel()
	disk := harness.SmallDisk(t, 8<<20)
	s := harness.Start(t, harness.In(filepath.Join(disk, "data")))
	org := harness.Org()
	owner := s.Token(t, org, "OWNER")
	key := s.Generate(t, org)
	filler := filepath.Join(disk, "filler")
	harness.Fill(t, filler)
	// What is left of the files' last pages may take a few events more.
	var refused harness.Response
	harness.Eventually(t, harness.Patience, "a read is refused, since its event cannot be written", func() bool {
		refused = s.Do(t, harness.Request{Method: "GET", Path: harness.KeyPath(org), Token: owner})
		return refused.Status != 200
	})
	for _, r := range []harness.Request{{Method: "GET", Path: harness.KeyPath(org)}, {Method: "POST", Path: harness.KeyPath(org)}, {Method: "DELETE", Path: key.Location}} {
		r.Token = owner
		resp := s.Do(t, r)
		if resp.Status != 503 && resp.Status != 500 || resp.Took > 10*time.Second {
			t.Errorf("%s on a full disk: status %d after %s, body %.300q", r.Method, resp.Status, resp.Took, resp.Body)
		}
		if body := strings.ToLower(string(resp.Body)); strings.Contains(body, "disk") || strings.Contains(body, "sql") || strings.Contains(body, "space") {
			t.Errorf("internal text reached the client: %s", resp.Body)
		}
	}
	s.Do(t, harness.Request{Method: "GET", Path: harness.KeyPath(org), Token: s.Token(t, org, "OWNER") + "x"})
	denied := s.Do(t, harness.Request{Method: "GET", Path: harness.KeyPath(harness.Org()), Token: owner})
	denied.Want(t, 403, otherOrgMessage)
	remove(t, filler)
	harness.Eventually(t, harness.Patience, "keys are listed again", func() bool {
		return s.Do(t, harness.Request{Method: "GET", Path: harness.KeyPath(org), Token: owner}).Status == 200
	})
	if listed := s.List(t, org); len(listed) != 1 || listed[0].ID != key.ID {
		t.Errorf("listed %+v", listed)
	}
	s.Generate(t, org)
	settled(t, s)
	s.Stop(t)
	if _, stderr, code := s.Run(t, "audit", "verify"); code != 3 {
		t.Errorf("audit verify: exit code %d\n%s", code, stderr)
	}
}

// post sends a request for a key on a connection of its own.
func post(t *testing.T, s *harness.Server, org, token string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.API, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: orgkeys\r\nAuthorization: Bearer %s\r\nContent-Length: 0\r\n\r\n", harness.KeyPath(org), token)
	return conn
}

// settled waits until the sink has everything that is recorded.
func settled(t *testing.T, s *harness.Server) {
	t.Helper()
	db := s.Database(t)
	harness.Eventually(t, harness.Patience, "the sink has every event", func() bool {
		return harness.Number(t, db, `SELECT count(*) FROM events`) == int64(len(s.Sink(t).Events))
	})
}

// Where there is no room for the sink nothing is released; what was written in
// part is mended, and everything comes when there is room again.
func TestASinkWithoutRoom(t *testing.T) {
	t.Parallel()
	disk := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "orgkeys-test", disk).CombinedOutput(); err != nil {
		t.Fatalf("a disk for this test: %v: %s", err, out)
	}
	t.Cleanup(func() { must(t, exec.Command("umount", "--lazy", disk).Run()) })
	s := harness.Start(t, harness.Set("ORGKEYS_AUDIT_FILE", filepath.Join(disk, "audit.jsonl")), harness.Set("ORGKEYS_AUDIT_DEADLINE", "2s"))
	org := harness.Org()
	s.Generate(t, org)
	filler, err := os.Create(filepath.Join(disk, "filler"))
	must(t, err)
	for piece := make([]byte, 4096); err == nil; {
		_, err = filler.Write(piece)
	}
	must(t, filler.Close())
	for range 20 {
		s.List(t, org) // more than the rest of a block has room for
	}
	generate := harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: s.Token(t, org, "OWNER")}
	if resp := s.Do(t, generate); resp.Status != 503 || !strings.Contains(string(resp.Body), "audit_unavailable") || resp.Header.Get("Retry-After") == "" {
		t.Errorf("without room: %d %s", resp.Status, resp.Body)
	}
	if said := s.AskAdmin(t, "/readyz"); !strings.Contains(said, "no space left on device") {
		t.Errorf("/readyz says %s", said)
	}
	must(t, os.Remove(filler.Name()))
	harness.Eventually(t, harness.Patience, "a key is released", func() bool { return s.Do(t, generate).Status == 200 })
	if n := len(s.List(t, org)); n != 2 {
		t.Errorf("%d keys are listed, want 2", n)
	}
	s.Stop(t)
	succeeds(t, s, "audit", "verify")
}
