package e2e

import (
	"database/sql"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/chaos/cluster"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// aNode stands for a role where a request is signed by a node.
const aNode = "node"

// TestPromise5_EveryOperationLeavesItsOwnEvent finds each by its request ID.
func TestPromise5_EveryOperationLeavesItsOwnEvent(t *testing.T) {
	t.Parallel()
	s := harness.Start(t, harness.Set("ORGKEYS_MAX", "1"))
	org, other := harness.Org(), harness.Org()
	key := s.Generate(t, org)
	const none = "/11111111-2222-4333-8444-555555555555"
	nodes, secret := "/organization/"+org+"/nodes", "/organization/"+org+"/secret"
	signed := func() []byte {
		body, err := cluster.Signed(key.Private, org, "192.0.2.7")
		must(t, err)
		return body
	}
	inJSON := http.Header{"Content-Type": {"application/json"}}
	if resp := s.Do(t, harness.Request{Method: "POST", Path: "/register", Body: signed(), Header: inJSON}); resp.Status != 200 {
		t.Fatalf("registering: %s", resp.Body)
	}
	var registered struct{ Data []struct{ ID string } }
	must(t, json.Unmarshal(s.Do(t, harness.Request{Method: "GET", Path: nodes, Token: s.Token(t, org, "USER")}).Body, &registered))
	node := "/organization/" + org + "/node/" + registered.Data[0].ID
	// Of another organization: a sealed key that was handed out, and an enrollment with a claim.
	third, recipient := harness.Org(), newRecipient(t)
	delivered, err := s.Client(t, third, "OWNER").SealedKey(t.Context(), third, recipient)
	must(t, err)
	private, err := client.ParsePrivateKey(delivered.PEM)
	must(t, err)
	receipt, err := delivered.SignReceipt(private)
	must(t, err)
	sealed := harness.KeyPath(third) + "/" + delivered.KeyID
	again, err := json.Marshal(map[string]string{"recipient": publicPEM(t, recipient)})
	must(t, err)
	m := mint(t, s, third, `{"approval":true}`)
	claim := claimRequest(t, m, recipient)
	approve, err := json.Marshal(map[string]string{"recipient": recipientID(t, claim)})
	must(t, err)
	if resp := s.Do(t, asks(m, claim)); resp.Status != 202 {
		t.Fatalf("claiming: %d %s", resp.Status, resp.Body)
	}
	enrollment := "/organization/" + third + "/enrollment/" + m.ID
	for i, c := range []struct {
		name      string
		request   harness.Request
		as, role  string
		status    int
		typ       string
		outcome   string
		reason    string
		object    string
		otherwise int // further events with the same request ID
	}{
		{"a list", harness.Request{Method: "GET", Path: harness.KeyPath(org)}, org, "OWNER", 200, "orgkey.listed", "success", "", "", 0},
		{"a refusal by quota", harness.Request{Method: "POST", Path: harness.KeyPath(org)}, org, "OWNER", 400, "orgkey.refused", "failure", "quota", "", 0},
		{"a list denied by role", harness.Request{Method: "GET", Path: harness.KeyPath(org)}, org, "USER", 403, "access.denied", "denied", "insufficient_role", "", 0},
		{"a key denied by role", harness.Request{Method: "POST", Path: harness.KeyPath(org)}, org, "BILLING", 403, "access.denied", "denied", "insufficient_role", "", 0},
		{"a key denied by organization", harness.Request{Method: "POST", Path: harness.KeyPath(org)}, other, "OWNER", 403, "access.denied", "denied", "other_organization", "", 0},
		{"a deletion denied", harness.Request{Method: "DELETE", Path: harness.KeyPath(org) + "/" + key.ID}, other, "OWNER", 403, "access.denied", "denied", "other_organization", key.ID, 0},
		{"a node's deletion denied", harness.Request{Method: "DELETE", Path: "/organization/" + org + "/node" + none}, org, "USER", 403, "access.denied", "denied", "insufficient_role", none[1:], 0},
		{"a secret's deletion denied", harness.Request{Method: "DELETE", Path: "/organization/" + org + "/secret/env_s3"}, org, "USER", 403, "access.denied", "denied", "insufficient_role", "env_s3", 0},
		{"a deletion with a body", harness.Request{Method: "DELETE", Path: harness.KeyPath(org) + "/" + key.ID, Body: make([]byte, 1<<20)}, org, "OWNER", 413, "request.failed", "failure", "*", key.ID, 0},
		{"deleting all denied", harness.Request{Method: "DELETE", Path: harness.KeyPath(org)}, org, "WORKSPACES", 403, "access.denied", "denied", "insufficient_role", "", 0},
		{"a deletion of what is not there", harness.Request{Method: "DELETE", Path: harness.KeyPath(org) + none}, org, "OWNER", 404, "request.failed", "failure", "not_found", none[1:], 0},
		{"an Accept that cannot be met", harness.Request{Method: "POST", Path: harness.KeyPath(org), Header: http.Header{"Accept": {"text/html"}}}, org, "OWNER", 406, "request.failed", "failure", "*", "", 0},
		{"a malformed organization", harness.Request{Method: "GET", Path: "/organization/-x/key"}, org, "OWNER", 400, "request.failed", "failure", "*", "", 0},
		{"nodes", harness.Request{Method: "GET", Path: nodes}, org, "USER", 200, "node.listed", "success", "", "", 0},
		{"nodes denied", harness.Request{Method: "GET", Path: nodes}, other, "OWNER", 403, "access.denied", "denied", "other_organization", "", 0},
		{"a node's deletion denied", harness.Request{Method: "DELETE", Path: node}, org, "USER", 403, "access.denied", "denied", "insufficient_role", registered.Data[0].ID, 0},
		{"a node's deletion", harness.Request{Method: "DELETE", Path: node}, org, "OWNER", 200, "node.deleted", "success", "", registered.Data[0].ID, 0},
		{"a node's deletion again", harness.Request{Method: "DELETE", Path: node}, org, "OWNER", 400, "request.failed", "failure", "already_deleted", registered.Data[0].ID, 0},
		{"a deletion of no node", harness.Request{Method: "DELETE", Path: "/organization/" + org + "/node" + none}, org, "OWNER", 404, "request.failed", "failure", "not_found", none[1:], 0},
		{"a registration", harness.Request{Method: "POST", Path: "/register"}, org, aNode, 200, "node.registered", "success", "*", registered.Data[0].ID, 0},
		{"a node's fetching of secrets", harness.Request{Method: "POST", Path: "/secrets"}, org, aNode, 200, "secret.fetched", "success", "", "", 0},
		{"an end of registration", harness.Request{Method: "POST", Path: "/unregister"}, org, aNode, 200, "node.unregistered", "success", "deleted", registered.Data[0].ID, 0},
		{"an end of no registration", harness.Request{Method: "POST", Path: "/unregister"}, org, aNode, 404, "request.failed", "failure", "not_found", "", 0},
		{"a secret", harness.Request{Method: "PUT", Path: secret + "/env_s3", Body: []byte("s")}, org, "OWNER", 200, "secret.put", "success", "*", "*", 0},
		{"a secret denied", harness.Request{Method: "PUT", Path: secret + "/env_s3", Body: []byte("s")}, org, "USER", 403, "access.denied", "denied", "insufficient_role", "env_s3", 0},
		{"a secret without a name of one", harness.Request{Method: "PUT", Path: secret + "/ENV", Body: []byte("s")}, org, "OWNER", 400, "request.failed", "failure", "invalid", "", 0},
		{"secrets", harness.Request{Method: "GET", Path: secret}, org, "ADMINISTRATOR", 200, "secret.listed", "success", "", "", 0},
		{"secrets denied", harness.Request{Method: "GET", Path: secret}, other, "OWNER", 403, "access.denied", "denied", "other_organization", "", 0},
		{"a secret's deletion denied", harness.Request{Method: "DELETE", Path: secret + "/env_s3"}, org, "BILLING", 403, "access.denied", "denied", "insufficient_role", "env_s3", 0},
		{"a secret's deletion", harness.Request{Method: "DELETE", Path: secret + "/env_s3"}, org, "OWNER", 200, "secret.deleted", "success", "*", "*", 0},
		{"a secret's deletion again", harness.Request{Method: "DELETE", Path: secret + "/env_s3"}, org, "OWNER", 404, "request.failed", "failure", "not_found", "*", 0},
		{"a reading of events", harness.Request{Method: "POST", Path: "/systemevent", Body: []byte("{}")}, org, "USER", 200, "event.read", "success", "", "", 0},
		{"a reading of events that is malformed", harness.Request{Method: "POST", Path: "/systemevent", Body: []byte(`{"take":0}`)}, org, "USER", 400, "request.failed", "failure", "invalid", "", 0},
		{"marks", harness.Request{Method: "POST", Path: "/systemevent/read", Body: []byte(`{"ids":[1]}`)}, org, "USER", 200, "event.marked", "success", "", "", 0},
		{"marks that are taken back", harness.Request{Method: "DELETE", Path: "/systemevent/read", Body: []byte(`{"id":1}`), Header: http.Header{"Content-Type": {"application/json"}}}, org, "USER", 200, "event.marked", "success", "", "", 0},
		{"marks that are malformed", harness.Request{Method: "POST", Path: "/systemevent/read", Body: []byte(`{"id":"1"}`)}, org, "USER", 400, "request.failed", "failure", "invalid", "", 0},
		{"a dry run", harness.Request{Method: "GET", Path: "/organization/" + org + "/decision/orgkey.generate"}, org, "USER", 200, "policy.asked", "success", "", "", 0},
		{"a dry run of nothing", harness.Request{Method: "GET", Path: "/organization/" + org + "/decision/x"}, org, "USER", 400, "request.failed", "failure", "invalid", "", 0},
		{"a stranger's dry run", harness.Request{Method: "GET", Path: "/organization/" + org + "/decision/orgkey.generate"}, other, "OWNER", 403, "access.denied", "denied", "other_organization", "", 0},
		{"nodes by their services", harness.Request{Method: "GET", Path: "/node?nodeServices=1"}, org, "USER", 200, "node.listed", "success", "", "", 0},
		{"nodes by malformed services", harness.Request{Method: "GET", Path: "/node?nodeServices=x"}, org, "USER", 400, "request.failed", "failure", "invalid", "", 0},
		{"a sealed key again", harness.Request{Method: "POST", Path: harness.KeyPath(third), Body: again, Header: http.Header{"Accept": {"application/vnd.orgkeys.sealed+json"}}}, third, "OWNER", 200, "orgkey.fetched", "success", "", delivered.KeyID, 0},
		{"a sealed key for another administrator", harness.Request{Method: "GET", Path: sealed + "/sealed"}, third, "ADMINISTRATOR", 200, "orgkey.fetched", "success", "", delivered.KeyID, 0},
		{"a receipt", harness.Request{Method: "POST", Path: sealed + "/receipt", Body: receipt}, third, "OWNER", 200, "orgkey.received", "success", "", delivered.KeyID, 0},
		{"a receipt again", harness.Request{Method: "POST", Path: sealed + "/receipt", Body: receipt}, third, "OWNER", 200, "request.repeated", "success", "", delivered.KeyID, 0},
		{"a sealed key that is over", harness.Request{Method: "GET", Path: sealed + "/sealed"}, third, "OWNER", 410, "request.failed", "failure", "enrollment_closed", delivered.KeyID, 0},
		{"an approval", harness.Request{Method: "POST", Path: enrollment + "/approve", Body: approve}, third, "OWNER", 200, "enrollment.approved", "success", "", m.ID, 0},
		{"an approval again", harness.Request{Method: "POST", Path: enrollment + "/approve", Body: approve}, third, "OWNER", 200, "request.repeated", "success", "", m.ID, 0},
		{"a revocation", harness.Request{Method: "DELETE", Path: enrollment}, third, "OWNER", 200, "enrollment.revoked", "success", "", m.ID, 0},
		{"a revocation again", harness.Request{Method: "DELETE", Path: enrollment}, third, "OWNER", 200, "request.repeated", "success", "", m.ID, 0},
		{"an approval of what was revoked", harness.Request{Method: "POST", Path: enrollment + "/approve", Body: approve}, third, "OWNER", 404, "request.failed", "failure", "not_found", m.ID, 0},
		{"a deletion", harness.Request{Method: "DELETE", Path: harness.KeyPath(org) + "/" + key.ID}, org, "ADMINISTRATOR", 200, "orgkey.deleted", "success", "", key.ID, 0},
		{"a key", harness.Request{Method: "POST", Path: harness.KeyPath(org)}, org, "OWNER", 200, "orgkey.created", "success", "", "*", 1},
		{"deleting all", harness.Request{Method: "DELETE", Path: harness.KeyPath(org)}, org, "OWNER", 200, "orgkey.all_deleted", "success", "", "", 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			id := fmt.Sprintf("operation-%d", i)
			if c.request.Header == nil {
				c.request.Header = http.Header{}
			}
			c.request.Header.Set("X-Request-Id", id)
			if c.request.Header.Get("Content-Type") == "" {
				c.request.Header.Set("Content-Type", map[string]string{"POST": "application/json", "PUT": "application/octet-stream"}[c.request.Method])
			}
			actor, kind := "admin", "user"
			if c.role == aNode {
				actor, kind, c.request.Body = key.ID, "node", signed()
			} else {
				c.request.Token = s.Token(t, c.as, c.role)
			}
			if resp := s.Do(t, c.request); resp.Status != c.status {
				t.Fatalf("status %d, want %d; body %.300q", resp.Status, c.status, resp.Body)
			}
			var events []harness.Leaf
			harness.Eventually(t, harness.Patience, "the sink has the operation's events", func() bool {
				events = s.Sink(t).Find(func(l harness.Leaf) bool { return l.Request == id })
				return len(events) >= 1+c.otherwise
			})
			if len(events) != 1+c.otherwise {
				t.Errorf("%d events, want %d: %+v", len(events), 1+c.otherwise, events)
			}
			e := events[slices.IndexFunc(events, func(l harness.Leaf) bool { return l.Type == c.typ || len(events) == 1 })]
			if e.Type != c.typ || e.Outcome != c.outcome || c.reason != "*" && e.Reason != c.reason || c.object != "*" && e.Object != c.object {
				t.Errorf("the event is %+v", e)
			}
			if e.Actor != actor || e.Kind != kind || e.Time == "" || e.Action == "" {
				t.Errorf("who, when and what for is incomplete: %+v", e)
			}
			// What is not an organization's ID is never shown to the policy.
			if decided := strings.HasPrefix(e.Policy, "sha256:"); decided != (e.Org != "") {
				t.Errorf("the policy's revision is %q", e.Policy)
			}
		})
	}
	for _, e := range s.Sink(t).Events {
		for _, word := range []string{"127.0.0.1", "BEGIN", "eyJ"} {
			if strings.Contains(string(e.Raw), word) && !strings.Contains(string(e.Raw), `"type":"enrollment.claimed"`) { // a machine's address
				t.Errorf("leaf %d holds %q: %s", e.Index, word, e.Raw)
			}
		}
	}
	if stdout, stderr, code := s.Run(t, "audit", "verify"); code != 3 {
		t.Errorf("audit verify beside the running server: exit code %d\n%s%s", code, stdout, stderr)
	}
	stdout, stderr, code := s.Run(t, "audit", "list")
	if n := strings.Count(stdout, "\n"); code != 0 || n != len(s.Sink(t).Events) {
		t.Errorf("audit list: exit code %d, %d lines, the sink has %d events\n%s", code, n, len(s.Sink(t).Events), stderr)
	}
}

// TestPromise5_CallersNobodyKnowsLeaveOneSummary ends the server instead of
// waiting for the minute's end.
func TestPromise5_CallersNobodyKnowsLeaveOneSummary(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	for range 25 {
		want401(t, "no token", s.Do(t, harness.Request{Method: "GET", Path: "/organization/acme/key"}))
	}
	s.Stop(t)
	s.Start(t)
	harness.Eventually(t, harness.Patience, "the summary is in the log", func() bool {
		return len(s.Sink(t).Find(func(l harness.Leaf) bool { return l.Type == "authn.failed" })) > 0
	})
	events := s.Sink(t).Find(func(l harness.Leaf) bool { return l.Type == "authn.failed" })
	if len(events) != 1 {
		t.Fatalf("%d summaries: %+v", len(events), events)
	}
	if detail, _ := json.Marshal(events[0].Detail); !strings.Contains(string(detail), `"25"`) {
		t.Errorf("the summary is %+v", events[0])
	}
}

// A history is a stopped server's data with an audit log worth attacking,
// its file sink outside the data directory.
type history struct {
	server *harness.Server
	sink   string
	size   int64
}

func newHistory(t *testing.T) history {
	t.Helper()
	outside := filepath.Join(t.TempDir(), "sink.jsonl")
	s := harness.Start(t, harness.Set("ORGKEYS_AUDIT_FILE", outside))
	org := harness.Org()
	owner, user := s.Token(t, org, "OWNER"), s.Token(t, org, "USER")
	key := s.Generate(t, org)
	for range 4 {
		s.List(t, org)
		s.Do(t, harness.Request{Method: "GET", Path: harness.KeyPath(org), Token: user})
	}
	s.Generate(t, org)
	s.Do(t, harness.Request{Method: "DELETE", Path: key.Location, Token: owner})
	s.List(t, org)
	settled(t, s)
	if code := s.Stop(t); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	return history{s, outside, int64(len(s.Sink(t).Events))}
}

// verify runs audit verify on a data directory.
func (h history) verify(t *testing.T, dir string, sink string) (output string, code int) {
	t.Helper()
	v := harness.Configure(t, harness.In(dir), harness.Set("ORGKEYS_AUDIT_FILE", sink))
	stdout, stderr, code := v.Run(t, "audit", "verify")
	return stdout + stderr, code
}

func TestPromise5_VerifyFindsWhatWasChanged(t *testing.T) {
	t.Parallel()
	h := newHistory(t)
	if out, code := h.verify(t, h.server.Dir, h.sink); code != 0 {
		t.Fatalf("an untouched log with its sink outside: exit code %d\n%s", code, out)
	}
	const k = 7
	if h.size < k+4 {
		t.Fatalf("only %d events", h.size)
	}

	tampered := func(name string, first int64, tamper func(t *testing.T, db *sql.DB)) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := harness.Copy(t, h.server.Dir)
			db := harness.OpenDatabase(t, dir)
			harness.Unprotect(t, db)
			tamper(t, db)
			db.Close()
			// Without the sink's help as well: whatever is not a cut at the end or a wholesale rewrite shows by itself.
			for _, sink := range []string{h.sink, filepath.Join(dir, "audit.jsonl")} {
				out, code := h.verify(t, dir, sink)
				if code != 1 {
					t.Errorf("sink %s: exit code %d, want 1\n%s", filepath.Base(sink), code, out)
				}
				if first >= 0 && !strings.Contains(out, fmt.Sprintf("event %d:", first)) {
					t.Errorf("sink %s: does not name event %d:\n%s", filepath.Base(sink), first, out)
				}
			}
		})
	}

	tampered("one event's leaf altered", k, func(t *testing.T, db *sql.DB) {
		alter(t, db, k)
	})
	tampered("one event dropped", k, func(t *testing.T, db *sql.DB) {
		harness.Exec(t, db, `DELETE FROM events WHERE idx = ?`, k)
	})
	tampered("one event dropped and the rest moved up", k, func(t *testing.T, db *sql.DB) {
		harness.Exec(t, db, `DELETE FROM events WHERE idx = ?`, k)
		harness.Exec(t, db, `UPDATE events SET idx = -idx WHERE idx > ?`, k)
		harness.Exec(t, db, `UPDATE events SET idx = -idx - 1 WHERE idx < 0`)
	})
	tampered("two events reordered", k, func(t *testing.T, db *sql.DB) {
		harness.Exec(t, db, `UPDATE events SET idx = -1 WHERE idx = ?`, k)
		harness.Exec(t, db, `UPDATE events SET idx = ? WHERE idx = ?`, k, k+1)
		harness.Exec(t, db, `UPDATE events SET idx = ? WHERE idx = -1`, k+1)
	})
	tampered("an event inserted", k, func(t *testing.T, db *sql.DB) {
		harness.Exec(t, db, `UPDATE events SET idx = -idx - 1 WHERE idx >= ?`, k)
		harness.Exec(t, db, `UPDATE events SET idx = -idx WHERE idx < 0`)
		forge(t, db, k)
	})
	tampered("an event appended", h.size, func(t *testing.T, db *sql.DB) { forge(t, db, h.size) })
	tampered("the first event dropped", 0, func(t *testing.T, db *sql.DB) {
		harness.Exec(t, db, `DELETE FROM events WHERE idx = 0`)
	})
	tampered("the last event dropped", h.size-1, func(t *testing.T, db *sql.DB) {
		harness.Exec(t, db, `DELETE FROM events WHERE idx = ?`, h.size-1)
	})
	tampered("every event dropped", 0, func(t *testing.T, db *sql.DB) { harness.Exec(t, db, `DELETE FROM events`) })
	tampered("a leaf's hash altered", k, func(t *testing.T, db *sql.DB) {
		harness.Exec(t, db, `UPDATE log_hashes SET hash = randomblob(32) WHERE idx = ?`, tlog.StoredHashIndex(0, k))
	})
	tampered("an inner hash altered", 3, func(t *testing.T, db *sql.DB) {
		harness.Exec(t, db, `UPDATE log_hashes SET hash = randomblob(32) WHERE idx = ?`, tlog.StoredHashIndex(2, 0))
	})
	tampered("a hash dropped", -1, func(t *testing.T, db *sql.DB) {
		harness.Exec(t, db, `DELETE FROM log_hashes WHERE idx = ?`, tlog.StoredHashIndex(1, 1))
	})
	tampered("the head's root altered", -1, func(t *testing.T, db *sql.DB) {
		harness.Exec(t, db, `UPDATE log_head SET root = randomblob(32)`)
	})
	tampered("the head's size lowered", -1, func(t *testing.T, db *sql.DB) {
		harness.Exec(t, db, `UPDATE log_head SET size = size - 1`)
	})
	tampered("the head's size raised", -1, func(t *testing.T, db *sql.DB) {
		harness.Exec(t, db, `UPDATE log_head SET size = size + 1`)
	})
	tampered("the head's origin altered", -1, func(t *testing.T, db *sql.DB) {
		harness.Exec(t, db, `UPDATE log_head SET root = randomblob(32), origin = 'another'`)
	})
	tampered("a key's record made up", -1, func(t *testing.T, db *sql.DB) {
		harness.Exec(t, db, `INSERT INTO org_keys (id, org_id, slot, state, sealed, created_at, released_at)
			SELECT 'aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee', org_id, slot + 1, state, sealed, created_at, released_at FROM org_keys WHERE state = 'released' LIMIT 1`)
	})
	tampered("a released key's record dropped", -1, func(t *testing.T, db *sql.DB) {
		harness.Exec(t, db, `DELETE FROM org_keys WHERE state = 'released'`)
	})
	tampered("a deleted key brought back", -1, func(t *testing.T, db *sql.DB) {
		harness.Exec(t, db, `UPDATE org_keys SET state = 'released', slot = 9, deleted_at = NULL, sealed = x'00' WHERE state = 'deleted'`)
	})
	for _, column := range []string{"id", "occurred_at", "type", "org_id", "actor"} {
		tampered("an event's column "+column+" altered", k, func(t *testing.T, db *sql.DB) {
			value := "'forged'"
			if column == "occurred_at" {
				value = "occurred_at - 3600000000"
			}
			harness.Exec(t, db, `UPDATE events SET `+column+` = `+value+` WHERE idx = ?`, k)
		})
	}
	tampered("a personal part altered", k, func(t *testing.T, db *sql.DB) {
		n := harness.Exec(t, db, `UPDATE event_persons SET personal = replace(personal, '127.0.0.1', '203.0.113.9') WHERE event_id = (SELECT id FROM events WHERE idx = ?)`, k)
		if n != 1 {
			t.Fatalf("%d rows", n)
		}
	})

	t.Run("a personal part erased is no tampering", func(t *testing.T) {
		t.Parallel()
		dir := harness.Copy(t, h.server.Dir)
		v := harness.Configure(t, harness.In(dir), harness.Set("ORGKEYS_AUDIT_FILE", h.sink))
		if stdout, stderr, code := v.Run(t, "audit", "erase", "--subject", "admin", "--reason", "asked for"); code != 0 || strings.Contains(stdout, "in 0 events") {
			t.Fatalf("exit code %d\n%s%s", code, stdout, stderr)
		}
		if out, code := h.verify(t, dir, h.sink); code != 0 {
			t.Errorf("exit code %d\n%s", code, out)
		}
	})
	t.Run("personal parts deleted by hand are", func(t *testing.T) {
		t.Parallel()
		dir := harness.Copy(t, h.server.Dir)
		db := harness.OpenDatabase(t, dir)
		harness.Unprotect(t, db)
		harness.Exec(t, db, `DELETE FROM event_persons`)
		db.Close()
		if out, code := h.verify(t, dir, h.sink); code != 1 || !strings.Contains(out, "no event says that it was erased") {
			t.Errorf("exit code %d\n%s", code, out)
		}
	})
	t.Run("without a sink outside, truncation is not excluded", func(t *testing.T) {
		t.Parallel()
		dir := harness.Copy(t, h.server.Dir)
		out, code := h.verify(t, dir, filepath.Join(dir, "audit.jsonl"))
		if code != 3 || !strings.Contains(out, "truncation not excluded") {
			t.Errorf("exit code %d\n%s", code, out)
		}
		v := harness.Configure(t, harness.In(dir))
		stdout, stderr, code := v.Run(t, "audit", "verify", "--sink", h.sink)
		if code != 0 {
			t.Errorf("with the copy given by --sink: exit code %d\n%s%s", code, stdout, stderr)
		}
	})
	t.Run("an altered sink is found as well", func(t *testing.T) {
		t.Parallel()
		b, err := os.ReadFile(h.sink)
		if err != nil {
			t.Fatal(err)
		}
		forged := filepath.Join(t.TempDir(), "sink.jsonl")
		text := strings.Replace(string(b), `"insufficient_role"`, `"other_organization"`, 1)
		if err := os.WriteFile(forged, []byte(text), 0o600); err != nil || text == string(b) {
			t.Fatalf("%v, changed %t", err, text != string(b))
		}
		if out, code := h.verify(t, h.server.Dir, forged); code != 1 {
			t.Errorf("exit code %d\n%s", code, out)
		}
	})
	t.Run("the tree recomputed wholesale is found through the sink alone", func(t *testing.T) {
		t.Parallel()
		dir := harness.Copy(t, h.server.Dir)
		db := harness.OpenDatabase(t, dir)
		harness.Unprotect(t, db)
		alter(t, db, k)
		rebuild(t, db)
		db.Close()
		if out, code := h.verify(t, dir, filepath.Join(dir, "none.jsonl")); code != 3 {
			t.Errorf("the forgery is not consistent in itself, so this test shows nothing: exit code %d\n%s", code, out)
		}
		out, code := h.verify(t, dir, h.sink)
		if code != 1 || !strings.Contains(out, fmt.Sprintf("event %d:", k)) {
			t.Errorf("exit code %d, want 1 and event %d\n%s", code, k, out)
		}
	})
	t.Run("the end cut off consistently is found through the sink alone", func(t *testing.T) {
		t.Parallel()
		dir := harness.Copy(t, h.server.Dir)
		db := harness.OpenDatabase(t, dir)
		harness.Unprotect(t, db)
		harness.Exec(t, db, `DELETE FROM events WHERE idx = ?`, h.size-1)
		rebuild(t, db)
		db.Close()
		if out, code := h.verify(t, dir, filepath.Join(dir, "none.jsonl")); code != 3 || !strings.Contains(out, "truncation not excluded") {
			t.Errorf("without a sink: exit code %d, want 3\n%s", code, out)
		}
		out, code := h.verify(t, dir, h.sink)
		if code != 1 || !strings.Contains(out, fmt.Sprintf("event %d:", h.size-1)) {
			t.Errorf("exit code %d, want 1 and event %d\n%s", code, h.size-1, out)
		}
	})
}

// TestPromise5_YesterdaysDataIsRefused puts an old copy of the data directory
// back. The sink, which is elsewhere, knows better.
func TestPromise5_YesterdaysDataIsRefused(t *testing.T) {
	t.Parallel()
	h := newHistory(t)
	s := h.server
	yesterday := harness.Copy(t, s.Dir)
	s.Start(t)
	org := harness.Org()
	s.Generate(t, org)
	s.List(t, org)
	settled(t, s)
	s.Stop(t)

	if err := os.RemoveAll(s.Dir); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(s.Dir, os.DirFS(yesterday)); err != nil {
		t.Fatal(err)
	}
	harness.Tighten(t, s.Dir)
	if _, stderr, code := s.Run(t, "audit", "verify"); code != 1 || !strings.Contains(stderr, fmt.Sprintf("event %d:", h.size)) {
		t.Errorf("audit verify: exit code %d, want 1 and event %d\n%s", code, h.size, stderr)
	}
	if _, stderr, code := s.Run(t, "serve"); code == 0 || !strings.Contains(stderr, "accept-rollback") {
		t.Fatalf("serve on yesterday's data: exit code %d\n%s", code, stderr)
	}
	if _, _, code := s.Run(t, "audit", "accept-rollback"); code == 0 {
		t.Error("accept-rollback without a reason succeeded")
	}
	if stdout, stderr, code := s.Run(t, "audit", "accept-rollback", "--reason", "restored from backup"); code != 0 {
		t.Fatalf("accept-rollback: exit code %d\n%s%s", code, stdout, stderr)
	}
	s.Start(t)
	s.Generate(t, org)
	settled := func() []harness.Leaf {
		return s.Sink(t).Find(func(l harness.Leaf) bool { return l.Type == "log.rollback_accepted" })
	}
	harness.Eventually(t, harness.Patience, "the sink has the event of the accepted rollback", func() bool { return len(settled()) == 1 })
	if detail, _ := json.Marshal(settled()[0].Detail); !strings.Contains(string(detail), "restored from backup") {
		t.Errorf("the event is %+v", settled()[0])
	}
	s.Stop(t)
	if stdout, stderr, code := s.Run(t, "audit", "verify"); code != 0 || !strings.Contains(stdout, "rollback") {
		t.Errorf("audit verify after it was accepted: exit code %d\n%s%s", code, stdout, stderr)
	}
	// And it does not excuse the next one.
	if err := os.RemoveAll(s.Dir); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(s.Dir, os.DirFS(yesterday)); err != nil {
		t.Fatal(err)
	}
	harness.Tighten(t, s.Dir)
	if _, stderr, code := s.Run(t, "serve"); code == 0 {
		t.Errorf("serve on the same old data again: exit code 0\n%s", stderr)
	}
}

// TestPromise5_AForgedRowIsNotSequenced: a row that somebody else puts into the
// running server's database reaches no sink, is reported, and is in nobody's way.
func TestPromise5_AForgedRowIsNotSequenced(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org := harness.Org()
	s.Generate(t, org)
	const id = "99999999-9999-4999-8999-999999999999"
	harness.Exec(t, s.Database(t), `INSERT INTO events (id, occurred_at, type, org_id, actor_kind, actor, object, leaf) VALUES (?, 1767225600000000, 'secret.fetched', 'acme', 'user', 'admin', '', ?)`,
		id, []byte(`{"v":1,"id":"`+id+`","time":"2026-01-01T00:00:00.000000Z","type":"secret.fetched","outcome":"success","org":"acme","actorKind":"user","actor":"admin"}`))
	harness.Eventually(t, harness.Patience, "the metric counts it", func() bool {
		return strings.Contains(s.AskAdmin(t, "/metrics"), "\norgkeys_audit_events_unauthenticated 1\n")
	})
	harness.Eventually(t, harness.Patience, "readiness names it", func() bool {
		return strings.Contains(s.AskAdmin(t, "/readyz"), "1 events in the database were not recorded by orgkeys")
	})
	s.Generate(t, org) // whose event needs its place before the key is released
	if _, stderr, code := s.Run(t, "audit", "erase", "--subject", "nobody", "--reason", "a test"); code != 0 {
		t.Errorf("a command that records beside the server: exit code %d\n%s", code, stderr)
	}
	harness.Eventually(t, harness.Patience, "the command's event is in the log", func() bool {
		return len(s.Sink(t).Find(func(l harness.Leaf) bool { return l.Type == "person.erased" })) == 1
	})
	if len(s.Sink(t).Find(func(l harness.Leaf) bool { return l.ID == id })) != 0 {
		t.Error("the forged event is in the sink")
	}
	if !strings.Contains(string(s.Output()), "another program writes to the database") {
		t.Error("the server's log says nothing")
	}
	if stdout, stderr, _ := s.Run(t, "audit", "verify"); !strings.Contains(stdout, "1 rows of the table events are not authentic") {
		t.Errorf("verifying says %s%s", stdout, stderr)
	}
}

// TestPromise5_HangingUpDoesNotAvoidTheEvent: a denied caller closes its half of
// the connection right behind the request.
func TestPromise5_HangingUpDoesNotAvoidTheEvent(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	org, other := harness.Org(), harness.Org()
	token := s.Token(t, other, "OWNER")
	const requests = 30
	for i := range requests {
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.API, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "DELETE %s HTTP/1.1\r\nHost: orgkeys\r\nAuthorization: Bearer %s\r\nX-Request-Id: hanging-up-%d\r\n\r\n", harness.KeyPath(org), token, i)
		if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, conn); err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
	harness.Eventually(t, harness.Patience, "each has its event", func() bool {
		return len(s.Sink(t).Find(func(l harness.Leaf) bool {
			return l.Type == "access.denied" && l.Org == org && strings.HasPrefix(l.Request, "hanging-up-")
		})) == requests
	})
}

// alter turns an event's outcome, which no column repeats, into another.
func alter(t *testing.T, db *sql.DB, index int64) {
	t.Helper()
	leaf := harness.Strings(t, db, `SELECT leaf FROM events WHERE idx = ?`, index)[0]
	altered := strings.NewReplacer(`"outcome":"denied"`, `"outcome":"success"`, `"outcome":"success"`, `"outcome":"failure"`).Replace(leaf)
	if altered == leaf {
		t.Fatalf("leaf %s has no outcome to alter", leaf)
	}
	harness.Exec(t, db, `UPDATE events SET leaf = ? WHERE idx = ?`, []byte(altered), index)
}

// forge puts an event of the attacker's at an index, in every column right.
func forge(t *testing.T, db *sql.DB, index int64) {
	t.Helper()
	const id = "99999999-9999-4999-8999-999999999999"
	leaf := `{"v":1,"id":"` + id + `","time":"2026-01-01T00:00:00.000000Z","type":"orgkey.listed","outcome":"success","org":"acme","actorKind":"user","actor":"admin"}`
	harness.Exec(t, db, `INSERT INTO events (idx, id, occurred_at, type, org_id, actor_kind, actor, object, leaf) VALUES (?, ?, 1767225600000000, 'orgkey.listed', 'acme', 'user', 'admin', '', ?)`,
		index, id, []byte(leaf))
}

// rebuild computes the tree anew from the leaves, as an attacker with this
// library and the database would.
func rebuild(t *testing.T, db *sql.DB) {
	t.Helper()
	harness.Exec(t, db, `DELETE FROM signed_checkpoints`) // a forger who left them would be found by them
	leaves := harness.Strings(t, db, `SELECT leaf FROM events WHERE idx IS NOT NULL ORDER BY idx`)
	var stored []tlog.Hash
	read := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		for i, at := range indexes {
			out[i] = stored[at]
		}
		return out, nil
	})
	for n, leaf := range leaves {
		hashes, err := tlog.StoredHashes(int64(n), []byte(leaf), read)
		if err != nil {
			t.Fatal(err)
		}
		stored = append(stored, hashes...)
	}
	root, err := tlog.TreeHash(int64(len(leaves)), read)
	if err != nil {
		t.Fatal(err)
	}
	harness.Exec(t, db, `DELETE FROM log_hashes`)
	for i, h := range stored {
		harness.Exec(t, db, `INSERT INTO log_hashes (idx, hash) VALUES (?, ?)`, i, h[:])
	}
	harness.Exec(t, db, `UPDATE log_head SET size = ?, root = ?`, len(leaves), root[:])
}
