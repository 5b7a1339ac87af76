package main

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

type ruleFile struct {
	Groups []struct {
		Name  string
		Rules []struct {
			Alert       string
			Expr        string
			For         string
			Labels      map[string]string
			Annotations map[string]string
		}
	}
}

// The rules that an operator is woken by name metrics and labels that a running
// server has: an alert on a metric that was renamed never fires.
func TestAlertsNameMetricsThatExist(t *testing.T) {
	var file ruleFile
	decoder := yaml.NewDecoder(strings.NewReader(document(t, "prometheus-rules.yml")))
	decoder.KnownFields(true)
	if err := decoder.Decode(&file); err != nil {
		t.Fatal(err)
	}
	shown := metricsOf(t)
	name := regexp.MustCompile(`\borgkeys_\w+`)
	label := regexp.MustCompile(`(\w+)=~?"`)
	alerts := 0
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			alerts++
			if r.Alert == "" || r.Annotations["summary"] == "" || r.Labels["severity"] != "page" && r.Labels["severity"] != "ticket" {
				t.Errorf("rule %q lacks a name, summary or severity", r.Alert)
			}
			if strings.Count(r.Expr, "(") != strings.Count(r.Expr, ")") || strings.Count(r.Expr, "{") != strings.Count(r.Expr, "}") {
				t.Errorf("%s: brackets do not match: %s", r.Alert, r.Expr)
			}
			for _, m := range name.FindAllString(r.Expr, -1) {
				if !regexp.MustCompile(`(?m)^` + m + `[{ ]`).MatchString(shown) {
					t.Errorf("%s: no metric %s", r.Alert, m)
				}
			}
			for _, l := range label.FindAllStringSubmatch(r.Expr, -1) {
				if l[1] != "job" && !strings.Contains(shown, l[1]+`="`) {
					t.Errorf("%s: no label %s", r.Alert, l[1])
				}
			}
			for _, route := range regexp.MustCompile(`route="([^"]*)"`).FindAllString(r.Expr, -1) {
				if !strings.Contains(shown, route) {
					t.Errorf("%s: no %s", r.Alert, route)
				}
			}
		}
	}
	if alerts == 0 {
		t.Error("no alerts")
	}
}

// Each alert fires when it should, and only then, as Prometheus' own tool finds.
func TestAlertsFire(t *testing.T) {
	tool := exec.Command("../../scripts/promtool")
	tool.Stderr = os.Stderr
	path, err := tool.Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"check", "rules", "../../docs/prometheus-rules.yml"}, {"test", "rules", "testdata/rules.yml"}} {
		if out, err := exec.Command(strings.TrimSpace(string(path)), args...).CombinedOutput(); err != nil {
			t.Errorf("%v: %v\n%s", args, err, out)
		}
	}
}

// metricsOf is what a server shows that has had requests of each kind.
func metricsOf(t *testing.T) string {
	t.Helper()
	s := harness.Start(t)
	org := harness.Org()
	s.Generate(t, org)
	s.Do(t, harness.Request{Method: "GET", Path: harness.KeyPath(org), Token: "nobody"})
	waitingClaim(t, s, org)
	return s.AskAdmin(t, "/metrics")
}

// waitingClaim has a node wait for an administrator's approval.
func waitingClaim(t *testing.T, s *harness.Server, org string) {
	t.Helper()
	resp := s.Do(t, harness.Request{Method: "POST", Path: "/organization/" + org + "/enrollment", Token: s.Token(t, org, "OWNER"), Body: []byte(`{"approval":true}`)})
	var minted struct{ Data struct{ Token string } }
	if err := json.Unmarshal(resp.Body, &minted); err != nil {
		t.Fatal(err)
	}
	recipient, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		t.Fatal(err)
	}
	c, err := client.New(client.Config{Server: s.API})
	if err != nil {
		t.Fatal(err)
	}
	e, err := client.NewEnrollment(c, []byte(minted.Data.Token), recipient)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.Fetch(t.Context()); !errors.Is(err, client.Pending) {
		t.Fatal(err)
	}
}
