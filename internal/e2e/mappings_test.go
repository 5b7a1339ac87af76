package e2e

import (
	"encoding/json"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// TestPromise9_HostileTokensUnderEachMapping: a server with the settings of a page
// of docs/identity accepts that page's token, and none that is hostile. The short
// form has one page of each kind: settings, claims.rego, the file of issuers.
func TestPromise9_HostileTokensUnderEachMapping(t *testing.T) {
	const pages = "../../docs/identity"
	short := []string{"keycloak.md", "cognito.md", "github-actions.md"}
	files, err := filepath.Glob(pages + "/*.md")
	if err != nil || len(files) < len(short) {
		t.Fatalf("%d pages, %v", len(files), err)
	}
	if os.Getenv("ORGKEYS_TEST_LONG") == "" {
		files = nil
		for _, name := range short {
			files = append(files, filepath.Join(pages, name))
		}
	}
	for _, file := range files {
		if filepath.Base(file) == "README.md" {
			continue
		}
		t.Run(strings.TrimSuffix(filepath.Base(file), ".md"), func(t *testing.T) {
			t.Parallel()
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			hostileUnder(t, string(text))
		})
	}
}

func hostileUnder(t *testing.T, page string) {
	issuer, rsaKey := harness.NewIssuer(t), newRSAKey(t)
	issuer.Add(t, "rs", jose.RS256, rsaKey)
	issuer.Add(t, "es", jose.ES256, harness.NewECKey(t))
	issuer.Publish(t)
	var claims harness.Claims
	if err := json.Unmarshal([]byte(blockBehind(t, page, "\n## The token\n")), &claims); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	claims["iat"], claims["exp"] = now.Unix(), now.Add(time.Hour).Unix()
	delete(claims, "nbf")
	issuer.Name = claims["iss"].(string)
	payload := func(change harness.Claims) []byte {
		c := maps.Clone(claims)
		maps.Copy(c, change)
		maps.DeleteFunc(c, func(name string, value any) bool { _, changed := change[name]; return changed && value == nil })
		b, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	s := harness.Start(t, settingsOf(t, page, issuer)...)
	// GET /node is about the organization that the mapping makes of the claims.
	good := issuer.Sign(t, "es", nil, payload(nil))
	if resp := s.Do(t, harness.Request{Method: http.MethodGet, Path: "/node", Token: good}); resp.Status != http.StatusOK {
		t.Fatalf("the page's own token: status %d, body %.300q", resp.Status, resp.Body)
	}
	explain := func(token string, code int, says ...string) {
		t.Helper()
		stdout, stderr, exited := s.RunWith(t, token, "token", "explain")
		if exited != code {
			t.Errorf("token explain: exit code %d, want %d\n%s%s", exited, code, stdout, stderr)
		}
		for _, words := range says {
			if !strings.Contains(stdout, words) {
				t.Errorf("token explain does not say %q:\n%s", words, stdout)
			}
		}
		if code == 0 && (strings.Contains(stdout, "fail ") || strings.Contains(stdout, "warn ")) {
			t.Errorf("token explain complains of the page's own token:\n%s", stdout)
		}
	}
	setting := "-> ORGKEYS_AUDIENCE"
	if strings.HasPrefix(blockBehind(t, page, "\n## Settings\n"), "{") {
		setting = "-> audiences in "
	}
	explain(good, 0, "ok    organization")
	explain(issuer.Sign(t, "es", nil, payload(harness.Claims{"aud": "somebody-else"})), 1, `fail  audience      aud is "somebody-else", and accepted is`, setting)
	for name, token := range hostileTokens(t, issuer, rsaKey, payload) {
		if strings.Contains(name, "audience") && claims["aud"] == nil && !strings.Contains(name, "another") {
			continue // claims.rego says whom it is for
		}
		want401(t, name, s.Do(t, harness.Request{Method: http.MethodGet, Path: "/node", Token: token}))
	}
}

// settingsOf are a page's settings, with the issuer's keys in place of the provider's.
func settingsOf(t *testing.T, page string, issuer *harness.Issuer) []harness.Option {
	t.Helper()
	settings := blockBehind(t, page, "\n## Settings\n")
	if strings.HasPrefix(settings, "{") {
		file := filepath.Join(t.TempDir(), "issuers.json")
		quoted, err := json.Marshal(issuer.JWKS)
		if err != nil {
			t.Fatal(err)
		}
		settings = strings.Replace(settings, `"issuer":`, `"jwks": `+string(quoted)+`, "issuer":`, 1)
		if err := os.WriteFile(file, []byte(settings), 0o600); err != nil {
			t.Fatal(err)
		}
		return []harness.Option{harness.Set("ORGKEYS_ISSUERS_FILE", file)}
	}
	var options []harness.Option
	for line := range strings.Lines(settings) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		switch name {
		case "ORGKEYS_JWKS", "ORGKEYS_JWKS_CA_FILE":
			continue
		case "ORGKEYS_POLICY_DIR":
			value = policyWith(t, blockBehind(t, page, "`claims.rego`:\n"))
		}
		options = append(options, harness.Set(name, value))
	}
	return append(options, harness.Set("ORGKEYS_JWKS", issuer.JWKS))
}

// policyWith is a directory with the shipped policy and these claim rules.
func policyWith(t *testing.T, rules string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "policy")
	err := os.CopyFS(dir, os.DirFS(filepath.Join(harness.ModuleRoot(t), "policies")))
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "claims.rego"), []byte(rules), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// blockBehind is the first fenced block behind a text of a page.
func blockBehind(t *testing.T, page, text string) string {
	t.Helper()
	_, after, ok := strings.Cut(page, text)
	parts := strings.SplitN(after, "\n```", 3)
	if !ok || len(parts) < 3 {
		t.Fatalf("no block behind %q", text)
	}
	_, block, _ := strings.Cut(parts[1], "\n")
	return block + "\n"
}
