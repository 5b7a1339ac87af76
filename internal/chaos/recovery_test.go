package chaos

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/chaos/cluster"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// inSink waits until the replica's own sink holds the key's delivery.
func inSink(t *testing.T, r *harness.Server, id string) {
	t.Helper()
	harness.Eventually(t, harness.Patience, "the sink holds the key's delivery", func() bool {
		return len(r.Sink(t).Find(func(l harness.Leaf) bool { return l.Type == "orgkey.delivered" && l.Object == id })) > 0
	})
}

// made is the ID of a new key. A busy machine may need more than one attempt.
func made(t *testing.T, r *harness.Server, org string) (id string) {
	t.Helper()
	harness.Eventually(t, 2*harness.Patience, "a key is made", func() bool {
		resp := r.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: r.Token(t, org, "OWNER")})
		id = resp.Header.Get("X-Key-Id")
		return resp.Status == 200
	})
	return id
}

// accepts runs the documented command with a replica's data directory.
func accepts(t *testing.T, r *harness.Server, command string) (said string) {
	t.Helper()
	said, code := r.Script(t, command, "REASON=a test")
	if code != 0 {
		t.Fatalf("accepting: exit code %d\n%s", code, said)
	}
	return said
}

// serveAndVerify starts the replicas, has each make a key, and verifies the log
// with each one's sink, by the documented command. Then it stops them, and has the
// independent verifier verify an export.
func serveAndVerify(t *testing.T, c *cluster.Cluster, verify string) {
	t.Helper()
	org := harness.Org()
	for _, r := range c.Replicas {
		r.Start(t)
	}
	for _, r := range c.Replicas {
		inSink(t, r, made(t, r, org))
	}
	for _, r := range c.Replicas {
		if out, code := r.Script(t, verify); code != 0 {
			t.Errorf("verifying: exit code %d\n%s", code, out)
		}
	}
	for _, r := range c.Replicas {
		r.Stop(t) // which signs a checkpoint of all
	}
	r := c.Replicas[0]
	export := filepath.Join(t.TempDir(), "export.tar.gz")
	if out, code := r.Script(t, `orgkeys audit export "$EXPORT"; orgkeys audit key > "$EXPORT.keys"`, "EXPORT="+export); code != 0 {
		t.Fatalf("exporting: exit code %d\n%s", code, out)
	}
	out, err := exec.Command("python3", filepath.Join(harness.ModuleRoot(t), "contrib", "verify_export.py"), export, "--key", export+".keys", "--checkpoint", r.AuditFile()).CombinedOutput()
	if err != nil {
		t.Errorf("the independent verifier: %v\n%s", err, out)
	}
}

// losesOneOf fails over to a standby that lacks the newest of org's keys. Only the sink of
// away, which is dead then, has it.
func (f *failovers) losesOneOf(t *testing.T, stays, away *harness.Server, org string) (lost string) {
	t.Helper()
	f.must(t, f.primary.Streaming(1))
	time.Sleep(time.Second) // the standby has what came before
	stays.Stop(t)
	f.must(t, f.standby.Stop())
	lost = made(t, away, org)
	inSink(t, away, lost)
	away.Kill()
	f.must(t, f.primary.Kill())
	f.must(t, f.standby.Restart())
	f.promote(t)
	return lost
}

// Promise 8: a replica that is away during an asynchronous failover may alone have
// a sink that is ahead of the log, and the log goes on. When it comes back it
// refuses to start, and the documented step names what was lost: it was no
// rewriting.
func TestPromise8_AReplicaThatIsAwayDuringAFailover(t *testing.T) {
	f := newFailovers(t, "Asynchronous standby")
	stays, away := f.Replicas[0], f.Replicas[1]
	org := harness.Org()
	kept := made(t, away, org)
	inSink(t, stays, kept)
	lost := f.losesOneOf(t, stays, away, org)
	if os.Getenv("ORGKEYS_TEST_LONG") == "" { // otherwise half a minute has to pass
		change(t, f.Cluster, "UPDATE replicas SET seen_at = seen_at - 31000000")
	}

	stays.Start(t)
	for range 3 {
		inSink(t, stays, made(t, stays, harness.Org()))
	}
	if n := number(t, database(t, f.Cluster), "SELECT count(*) FROM events WHERE type = 'log.database_changed'"); n != 1 {
		t.Errorf("%d events say that the database is another one, want 1", n)
	}
	if err := away.Launch(); err != nil {
		t.Fatal(err)
	}
	if code := away.Ended(t, harness.Patience); code == 0 || !strings.Contains(string(away.Output()), "accept-rollback") {
		t.Errorf("the replica that was away ended with %d:\n%s", code, away.Output())
	}
	stays.Stop(t)

	said := accepts(t, away, f.steps[1])
	if !strings.Contains(said, lost) || strings.Contains(said, kept) || !strings.Contains(said, "went on without them") {
		t.Errorf("of %s, which was lost, it says:\n%s", lost, said)
	}
	if said := accepts(t, stays, f.steps[1]); !strings.Contains(said, "nothing to accept") {
		t.Errorf("with the sink of the replica that went on: %s", said)
	}
	serveAndVerify(t, f.Cluster, f.steps[2])
}

// Promise 8: the sink that was alone ahead of the log is gone with its replica. The log
// stands still until an operator says so by name, and goes on then; if the replica comes
// back after all, it is refused, and its loss is accepted and named.
func TestPromise8_ASinkThatWasAheadIsGone(t *testing.T) {
	f := newFailovers(t, "Asynchronous standby")
	stays, away := f.Replicas[0], f.Replicas[1]
	org := harness.Org()
	inSink(t, stays, made(t, away, org))
	lost := f.losesOneOf(t, stays, away, org)
	change(t, f.Cluster, "UPDATE replicas SET seen_at = seen_at - 31000000")
	refused := func() {
		t.Helper()
		f.must(t, away.Launch())
		if code := away.Ended(t, harness.Patience); code == 0 || !strings.Contains(string(away.Output()), "events were lost") {
			t.Errorf("the replica that was away ended with %d:\n%s", code, away.Output())
		}
	}
	refused()
	f.must(t, os.Rename(away.AuditFile(), away.AuditFile()+".gone"))

	launched := len(stays.Output())
	f.must(t, stays.Launch())
	harness.Eventually(t, harness.Patience, "it listens", func() bool {
		return strings.Contains(string(stays.Output()[launched:]), `"msg":"listening"`)
	})
	harness.Eventually(t, harness.Patience, "it says that the log stands still, and what to do", func() bool {
		state := stays.AskAdmin(t, "/readyz")
		return strings.Contains(state, "sink file of ") && strings.Contains(state, "--lost-sink")
	})
	if out, _ := stays.Script(t, "orgkeys doctor"); !strings.Contains(out, "--lost-sink '") {
		t.Errorf("doctor does not say what to do:\n%s", out)
	}
	stays.Stop(t)
	size := number(t, database(t, f.Cluster), "SELECT size FROM log_head")
	holder := ""
	for _, without := range []string{f.steps[1], f.steps[1] + " --dry-run", f.steps[1] + " --lost-sink somebody"} {
		said, code := stays.Script(t, without, "REASON=a test")
		if named := regexp.MustCompile(`--lost-sink '(.+?)'`).FindStringSubmatch(said); code != 1 || named == nil || !strings.Contains(said, "since 20") {
			t.Fatalf("%s: exit code %d\n%s", without, code, said)
		} else {
			holder = named[1]
		}
	}
	giveUp := strings.TrimSpace(f.steps[1]) + " --lost-sink '" + holder + "'"
	if said := accepts(t, stays, giveUp+" --dry-run"); !strings.Contains(said, "would be accepted") || !strings.Contains(said, holder) {
		t.Errorf("the dry run says:\n%s", said)
	}
	if now := number(t, database(t, f.Cluster), "SELECT size FROM log_head"); now != size || number(t, database(t, f.Cluster), "SELECT count(*) FROM sinks_ahead") != 1 {
		t.Errorf("what gave nothing up changed the log: %d events, then %d", size, now)
	}
	if said := accepts(t, stays, giveUp); !strings.Contains(said, "accepted: ") || !strings.Contains(said, holder) {
		t.Errorf("giving it up says:\n%s", said)
	}
	if n := number(t, database(t, f.Cluster), `SELECT count(*) FROM events WHERE type = 'log.rollback_accepted' AND position('"lostHolder":"`+holder+`"' IN encode(leaf, 'escape')) > 0`); n != 1 {
		t.Errorf("%d events name what was given up", n)
	}
	stays.Start(t)
	inSink(t, stays, made(t, stays, harness.Org()))

	f.must(t, os.Rename(away.AuditFile()+".gone", away.AuditFile()))
	refused()
	stays.Stop(t)
	if said, code := stays.Script(t, f.steps[1], "REASON=a test"); code != 1 || !strings.Contains(said, holder) {
		t.Errorf("when it is back, elsewhere: exit code %d\n%s", code, said)
	}
	if said := accepts(t, away, f.steps[1]); !strings.Contains(said, lost) {
		t.Errorf("of %s, which was lost, it says:\n%s", lost, said)
	}
	serveAndVerify(t, f.Cluster, f.steps[2])
}

func change(t *testing.T, c *cluster.Cluster, statement string) {
	t.Helper()
	if _, err := database(t, c).Exec(statement); err != nil {
		t.Fatal(err)
	}
}

// Promise 8: the documented steps of a point-in-time recovery name what was lost,
// and end in a log that verifies.
func TestPromise8_PointInTimeRecovery(t *testing.T) {
	c := cluster.ConfigureOnHSM(t, 2)
	steps := documentedSteps(t, "Point-in-time recovery")
	outside := t.TempDir()
	for i, r := range c.Replicas {
		r.Configured("ORGKEYS_AUDIT_FILE", filepath.Join(outside, fmt.Sprintf("sink-%d.jsonl", i)))
	}
	archive := filepath.Join(c.Postgres.Dir(), "archive")
	settings := archiving(t, archive)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(c.Postgres.Shell("mkdir archive"))
	must(c.Postgres.Restart(settings...))
	for _, r := range c.Replicas {
		r.Start(t)
	}
	org := harness.Org()
	before := made(t, c.Replicas[0], org)
	must(c.Postgres.Shell("pg_basebackup -D base --checkpoint=fast --no-sync"))
	kept := made(t, c.Replicas[0], org)
	inSink(t, c.Replicas[1], kept)
	time.Sleep(1500 * time.Millisecond)
	var point string
	must(c.Postgres.Query("SELECT clock_timestamp()::text", &point))
	time.Sleep(100 * time.Millisecond)
	lost := made(t, c.Replicas[1], org)
	for _, r := range c.Replicas {
		inSink(t, r, lost)
	}
	for _, r := range c.Replicas {
		r.Stop(t)
	}
	must(c.Postgres.Stop())

	must(c.Postgres.Shell(steps[0], "BASE="+filepath.Join(c.Postgres.Dir(), "base"), "ARCHIVE="+archive, "POINT="+point))
	must(c.Postgres.Restart(settings...))
	harness.Eventually(t, harness.Patience, "PostgreSQL takes writes", func() bool {
		var recovering bool
		return c.Postgres.Query("SELECT pg_is_in_recovery()", &recovering) == nil && !recovering
	})
	if err := c.Replicas[0].Launch(); err != nil {
		t.Fatal(err)
	}
	if code := c.Replicas[0].Ended(t, harness.Patience); code == 0 {
		t.Error("a replica whose sink is ahead started")
	}
	for i, r := range c.Replicas {
		said := accepts(t, r, steps[1])
		if !strings.Contains(said, lost) || strings.Contains(said, kept) || strings.Contains(said, before) {
			t.Errorf("replica %d: of %s, which was lost, it says:\n%s", i, lost, said)
		}
	}
	serveAndVerify(t, c, steps[2])
	c.Replicas[1].Start(t)
	live := map[string]bool{}
	for _, l := range c.Replicas[1].List(t, org) {
		live[l.ID] = true
	}
	if len(live) != 2 || !live[before] || !live[kept] {
		t.Errorf("after the recovery there are %v", live)
	}
}

// archiving is what docs/operations.md asks of postgresql.conf, with an archive of
// this test's.
func archiving(t *testing.T, archive string) (settings []string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(harness.ModuleRoot(t), "docs", "operations.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`(?m)^(archive_mode|archive_command) = '?(.*?)'?$`).FindAllStringSubmatch(string(text), -1) {
		settings = append(settings, m[1]+"="+strings.ReplaceAll(m[2], "/srv/archive", archive))
	}
	if len(settings) != 2 {
		t.Fatalf("docs/operations.md asks for %v", settings)
	}
	return settings
}
