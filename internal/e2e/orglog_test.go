package e2e

import (
	"bytes"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// What an organization reads of the log is the log's: a proof from the API verifies with
// the command, and nobody reads what is not theirs.
func TestWhatAnOrganizationReadsOfTheLog(t *testing.T) {
	t.Parallel()
	s := harness.Start(t, harness.Set("ORGKEYS_CHECKPOINT_INTERVAL", "1s"))
	key := s.Generate(t, "acme")
	s.Generate(t, "other")
	s.PutSecret(t, "acme", "env_s3", []byte("x"))
	owner, member, stranger := s.Client(t, "acme", "OWNER"), s.Client(t, "acme", "USER"), s.Client(t, "other", "OWNER")

	page, err := owner.Log(t.Context(), "acme", client.LogFilter{Object: key.ID})
	if err != nil || len(page.Entries) < 2 || page.Next != 0 {
		t.Fatalf("the key's events are %+v, %v", page, err)
	}
	sink, err := os.ReadFile(s.AuditFile())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range page.Entries {
		if !strings.Contains(e.Leaf, key.ID) || e.Index == nil || !bytes.Contains(sink, []byte(e.Leaf)) {
			t.Errorf("%s is not an event of the log", e.Leaf)
		}
	}
	var all []client.LogEntry
	for f := (client.LogFilter{Take: 1}); ; {
		p, err := owner.Log(t.Context(), "acme", f)
		if err != nil || len(p.Entries) != 1 && f.Before == 0 {
			t.Fatalf("a page of one has %+v, %v", p, err)
		}
		all = append(all, p.Entries...)
		if f.Before = p.Next; f.Before == 0 || len(all) > 50 {
			break
		}
	}
	if len(all) < 4 {
		t.Errorf("page by page there are %d events", len(all))
	}
	own, err := member.Log(t.Context(), "acme", client.LogFilter{})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range own.Entries {
		if !strings.Contains(e.Leaf, `"actor":"admin"`) {
			t.Errorf("a member reads %s", e.Leaf)
		}
	}

	created := page.Entries[len(page.Entries)-1]
	id := eventID(t, created.Leaf)
	path := "/organization/acme/event/" + id + "/proof"
	var proof harness.Response
	harness.Eventually(t, harness.Patience, "a checkpoint that covers the event", func() bool {
		proof = s.Do(t, harness.Request{Path: path, Token: s.Token(t, "acme", "OWNER")})
		return proof.Status == http.StatusOK
	})
	file := filepath.Join(t.TempDir(), "proof.json")
	if err := os.WriteFile(file, proof.Body, 0o600); err != nil {
		t.Fatal(err)
	}
	vkey, _, _ := s.Run(t, "audit", "key")
	if out, log, code := s.Run(t, "audit", "verify-proof", file, "--key", strings.TrimSpace(vkey)); code != 0 {
		t.Errorf("the proof does not verify: %s%s", out, log)
	}
	s.Do(t, harness.Request{Path: "/organization/other/event/" + id + "/proof", Token: s.Token(t, "other", "OWNER")}).Want(t, http.StatusNotFound, "Event not found")
	s.Do(t, harness.Request{Path: "/organization/acme/event/x/proof", Token: s.Token(t, "acme", "OWNER")}).Want(t, http.StatusNotFound, "Event not found")
	if got := s.Do(t, harness.Request{Path: "/organization/acme/checkpoint", Token: s.Token(t, "acme", "OWNER")}); got.Status != http.StatusOK {
		t.Errorf("the checkpoint answers %d %s", got.Status, got.Body)
	}
	for _, path := range []string{path, "/organization/acme/event", "/organization/acme/summary", "/organization/acme/checkpoint", "/organization/acme/decision"} {
		if got := s.Do(t, harness.Request{Path: path, Token: s.Token(t, "other", "OWNER")}); got.Status != http.StatusForbidden {
			t.Errorf("%s answers a stranger %d", path, got.Status)
		}
	}

	sum, err := owner.Summary(t.Context(), "acme")
	if err != nil || sum.Keys.Used != 1 || sum.Keys.Limit != 5 || sum.Secrets != 1 || len(sum.Occupants) != 1 || sum.Occupants[0].ID != key.ID || sum.Occupants[0].State != "released" {
		t.Errorf("the summary is %+v, %v", sum, err)
	}
	if _, err := member.Summary(t.Context(), "acme"); err == nil {
		t.Error("a member reads the summary")
	}
	if n := 0; sum != nil {
		for _, hour := range sum.EventsByHour {
			n += hour
		}
		if n < 4 || len(sum.EventsByHour) != 24 || sum.Log.Size == 0 {
			t.Errorf("the summary counts %d events of %d", n, sum.Log.Size)
		}
	}

	rows, err := member.Policy(t.Context(), "acme")
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range rows {
		alone, err := member.AskPolicy(t.Context(), "acme", row.Action)
		if err != nil || alone.Allow != row.Allow || alone.Reason != row.Reason || row.ByRole["USER"].Allow != row.Allow || len(row.ByRole) != 5 {
			t.Errorf("%s: %+v, asked alone %+v, %v", row.Action, row, alone, err)
		}
	}

	// A reason is in the part that can be erased, and nowhere in the log.
	const why = "laptop <lost> in Zürich"
	if err := owner.Because(why).DeleteKey(t.Context(), "acme", key.ID); err != nil {
		t.Fatal(err)
	}
	ended, err := owner.Log(t.Context(), "acme", client.LogFilter{Object: key.ID, Types: []string{"orgkey.deleted"}})
	if err != nil || len(ended.Entries) != 1 || ended.Entries[0].Note != why || strings.Contains(ended.Entries[0].Leaf, "Zürich") {
		t.Errorf("the deletion is %+v, %v", ended, err)
	}
	if err := owner.Because("two\nlines").DeleteKey(t.Context(), "acme", key.ID); err == nil || !strings.Contains(err.Error(), "reason") {
		t.Errorf("a reason of two lines: %v", err)
	}
	if _, err := stranger.Log(t.Context(), "acme", client.LogFilter{}); err == nil {
		t.Error("a stranger reads the log")
	}
}

func eventID(t *testing.T, leaf string) string {
	t.Helper()
	var e struct{ ID string }
	if err := json.Unmarshal([]byte(leaf), &e); err != nil {
		t.Fatal(err)
	}
	return e.ID
}
