package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// systemEvents is the answer of POST /systemevent.
type systemEvents struct {
	Events []struct {
		ID int64

		Timestamp, ContextID, Context, Event, OrgID, UserID, UserName, UserEmail, JSONData string

		WorkspaceID *string
		ShowUnread  *bool
	}
	Total, Skip, Take int
}

func askSystemEvents(t *testing.T, s *harness.Server, token, body string) systemEvents {
	t.Helper()
	resp := s.Do(t, harness.Request{
		Method: "POST", Path: "/systemevent", Token: token, Body: []byte(body), Header: http.Header{"Content-Type": {"application/json"}},
	})
	if resp.Status != http.StatusOK {
		t.Fatalf("status %d, body %q", resp.Status, resp.Body)
	}
	var page systemEvents
	if err := json.Unmarshal(resp.Body, &page); err != nil {
		t.Fatal(err)
	}
	return page
}

// changes is what a page says, newest first: "orgkey/created <key>".
func (p systemEvents) changes() string {
	var all []string
	for _, e := range p.Events {
		all = append(all, fmt.Sprintf("%s/%s %s", e.Context, e.Event, e.ContextID))
	}
	return strings.Join(all, ", ")
}

func TestSystemEventsOfAKeysLife(t *testing.T) {
	t.Parallel()
	i := harness.NewIssuer(t)
	s := harness.Start(t, harness.TrustedBy(i))
	org, other := harness.Org(), harness.Org()
	token := func(subject, org, role string) string {
		return i.Token(t, harness.Claims{"sub": subject, "org_id": org, "org_role": role, "name": "Ada", "email": "ada@example.org"})
	}
	ada, bob := token("ada", org, "OWNER"), token("bob", org, "ADMINISTRATOR")
	made := s.Do(t, harness.Request{Method: "POST", Path: harness.KeyPath(org), Token: ada})
	key := harness.ReadKey(t, org, made)
	s.List(t, org)
	wantSuccess(t, s.Do(t, harness.Request{Method: "DELETE", Path: key.Location, Token: bob}), "Organization key deleted successfully")
	life := fmt.Sprintf("orgkey/deleted %s, orgkey/updated %[1]s, orgkey/created %[1]s", key.ID)

	page := askSystemEvents(t, s, ada, "")
	if page.changes() != life || page.Total != 3 || page.Skip != 0 || page.Take != 20 {
		t.Fatalf("%s, total %d, skip %d, take %d", page.changes(), page.Total, page.Skip, page.Take)
	}
	for n, e := range page.Events {
		who := []string{"bob", "ada", "ada"}[n]
		if e.OrgID != org || e.UserID != who || e.UserName != "Ada" || e.UserEmail != "ada@example.org" || e.WorkspaceID != nil || e.ShowUnread == nil || !*e.ShowUnread || e.ID < 1 {
			t.Errorf("%+v", e)
		}
		var leaf harness.Leaf
		if err := json.Unmarshal([]byte(e.JSONData), &leaf); err != nil || leaf.Object != key.ID {
			t.Errorf("jsonData %s: %v", e.JSONData, err)
		}
		harness.Eventually(t, harness.Patience, "the sink holds the event byte for byte", func() bool {
			for _, sunk := range s.Sink(t).Events {
				if string(sunk.Raw) == e.JSONData {
					return true
				}
			}
			return false
		})
	}
	for _, c := range []struct{ name, token, body, want string }{
		{"a page", ada, `{"skip":1,"take":1}`, "orgkey/updated " + key.ID},
		{"deletions", ada, `{"context":10,"event":2}`, "orgkey/deleted " + key.ID},
		{"nodes", ada, `{"context":9}`, ""},
		{"by actor", ada, `{"userId":"bob"}`, "orgkey/deleted " + key.ID},
		{"by key", ada, `{"contextId":"` + key.ID + `"}`, life},
		{"before all", ada, `{"to_timestamp":1700000000}`, ""},
		{"a member's own", token("ada", org, "USER"), `{}`, "orgkey/updated " + key.ID + ", orgkey/created " + key.ID},
		{"a member's own only", token("ada", org, "USER"), `{"userId":"bob"}`, ""},
		{"another organization's", token("ada", other, "OWNER"), `{"contextId":"` + key.ID + `"}`, ""},
	} {
		if got := askSystemEvents(t, s, c.token, c.body).changes(); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
	for body, status := range map[string]int{`{"take":101}`: 400, `null`: 400, `{"skip":1,"skip":1}`: 400, `{"orgId":"` + other + `"}`: 403} {
		resp := s.Do(t, harness.Request{Method: "POST", Path: "/systemevent", Token: ada, Body: []byte(body), Header: http.Header{"Content-Type": {"application/json"}}})
		if resp.Status != status {
			t.Errorf("%s: status %d, body %q", body, resp.Status, resp.Body)
		}
	}
	if resp := s.Do(t, harness.Request{Method: "POST", Path: "/systemevent", Body: []byte(`{}`)}); resp.Status != 401 {
		t.Errorf("without a token: status %d", resp.Status)
	}
	harness.Eventually(t, harness.Patience, "each read, refusal and denial is in the sink", func() bool {
		count := map[string]int{}
		for _, e := range s.Sink(t).Events {
			if e.Leaf.Action == "event.read" {
				count[e.Leaf.Type]++
			}
		}
		return count["event.read"] == 10 && count["request.failed"] == 3 && count["access.denied"] == 1
	})
}
