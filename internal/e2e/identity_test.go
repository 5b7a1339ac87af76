package e2e

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// TestAnAddressAsSubjectIsInNoLeafAndCanBeErased: the subject and who acts for it
// are mail addresses. The log has pseudonyms, and an erasure leaves neither.
func TestAnAddressAsSubjectIsInNoLeafAndCanBeErased(t *testing.T) {
	t.Parallel()
	issuer := harness.NewIssuer(t)
	sink := filepath.Join(t.TempDir(), "audit.jsonl")
	s := harness.Start(t, harness.TrustedBy(issuer), harness.Set("ORGKEYS_AUDIT_FILE", sink))
	org := harness.Org()
	const ada, bob = "ada@acme.example", "bob@acme.example"
	token := issuer.Token(t, harness.Claims{"org_id": org, "sub": ada, "act": map[string]string{"sub": bob}})
	for _, r := range []harness.Request{{Method: "POST", Path: harness.KeyPath(org)}, {Method: "GET", Path: harness.KeyPath(org)}, {Method: "DELETE", Path: harness.KeyPath(org)}} {
		r.Token = token
		if resp := s.Do(t, r); resp.Status != 200 {
			t.Fatalf("%s: status %d, body %.300q", r.Method, resp.Status, resp.Body)
		}
	}
	var pseudonym string
	harness.Eventually(t, harness.Patience, "the events are in the sink", func() bool {
		return len(s.Sink(t).Find(func(l harness.Leaf) bool { return l.Type == "orgkey.all_deleted" })) == 1
	})
	for _, l := range s.Sink(t).Find(func(l harness.Leaf) bool { return l.Kind == "user" }) {
		if !strings.HasPrefix(l.Actor, "person-") || !strings.HasPrefix(l.Detail["actedBy"], "person-") || l.Actor == l.Detail["actedBy"] {
			t.Errorf("%s by %q, acting %q", l.Type, l.Actor, l.Detail["actedBy"])
		}
		pseudonym = l.Actor
	}
	for _, who := range []string{pseudonym, bob, "zoe@acme.example"} { // of the first, only events are at hand
		if stdout, stderr, code := s.Run(t, "audit", "erase", "--subject", who, "--reason", "asked for"); code != 0 {
			t.Fatalf("erase %s: exit code %d\n%s%s", who, code, stdout, stderr)
		}
	}
	harness.Eventually(t, harness.Patience, "the erasures are in the sink", func() bool {
		return len(s.Sink(t).Find(func(l harness.Leaf) bool { return l.Type == "person.erased" })) == 3
	})
	if erased := s.Sink(t).Find(func(l harness.Leaf) bool { return l.Type == "person.erased" && l.Object == pseudonym }); len(erased) != 1 {
		t.Errorf("%d events say that %s was erased", len(erased), pseudonym)
	}
	if b, err := os.ReadFile(sink); err != nil || strings.Contains(string(b), "acme.example") {
		t.Errorf("an address is in the log: %v", err)
	}
	db := harness.OpenDatabase(t, s.Dir)
	defer db.Close()
	var left int
	if err := db.QueryRow(`SELECT (SELECT count(*) FROM persons) + (SELECT count(*) FROM event_persons WHERE personal LIKE '%acme.example%') +
		(SELECT count(*) FROM events WHERE leaf LIKE '%acme.example%' OR actor LIKE '%acme.example%' OR object LIKE '%acme.example%')`).Scan(&left); err != nil || left != 0 {
		t.Errorf("%d rows still know an address, %v", left, err)
	}
	if stdout, stderr, code := s.Run(t, "audit", "verify"); code != 0 {
		t.Errorf("verify: exit code %d\n%s%s", code, stdout, stderr)
	}
}

// TestALoginNameThatWasErasedStaysOutOfTheLog: the command is repeated, as after a lost answer.
func TestALoginNameThatWasErasedStaysOutOfTheLog(t *testing.T) {
	t.Parallel()
	issuer := harness.NewIssuer(t)
	sink := filepath.Join(t.TempDir(), "audit.jsonl")
	s := harness.Start(t, harness.TrustedBy(issuer), harness.Set("ORGKEYS_AUDIT_FILE", sink), harness.Set("ORGKEYS_SUBJECT_PSEUDONYMS", "always"))
	org := harness.Org()
	token := issuer.Token(t, harness.Claims{"org_id": org, "sub": "jdoe-of-acme"})
	if resp := s.Do(t, harness.Request{Method: "GET", Path: harness.KeyPath(org), Token: token}); resp.Status != 200 {
		t.Fatalf("status %d, body %.300q", resp.Status, resp.Body)
	}
	for range 2 {
		if stdout, stderr, code := s.Run(t, "audit", "erase", "--subject", "jdoe-of-acme", "--reason", "asked for"); code != 0 {
			t.Fatalf("exit code %d\n%s%s", code, stdout, stderr)
		}
	}
	harness.Eventually(t, harness.Patience, "the erasures are in the sink", func() bool {
		return len(s.Sink(t).Find(func(l harness.Leaf) bool { return l.Type == "person.erased" })) == 2
	})
	if b, err := os.ReadFile(sink); err != nil || strings.Contains(string(b), "jdoe") {
		t.Errorf("the login name is in the log: %v", err)
	}
}

// TestTokenExplain: the program itself, with the settings of a server.
func TestTokenExplain(t *testing.T) {
	t.Parallel()
	issuer := harness.NewIssuer(t)
	s := harness.Configure(t, harness.TrustedBy(issuer), harness.Set("ORGKEYS_CLAIM_ROLE", "/realm_access/roles"), harness.Set("ORGKEYS_ROLE_MAP", "admins=ADMINISTRATOR"))
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	good := harness.Claims{"org_id": "acme", "realm_access": map[string]any{"roles": []string{"offline_access", "admins"}}}
	for _, c := range []struct {
		name   string
		change harness.Claims
		code   int
		says   []string
	}{
		{"a good one", nil, 0, []string{"ok    signature", `"acme", from org_id`, "ADMINISTRATOR, from /realm_access/roles"}},
		{"an address as subject", harness.Claims{"sub": "ada@acme.example"}, 0, []string{"it is an address", "ORGKEYS_SUBJECT_PSEUDONYMS"}},
		{"no role", harness.Claims{"realm_access": nil}, 0, []string{"warn  role", "403, insufficient_role", "ORGKEYS_ROLE_MAP"}},
		{"everything wrong at once", harness.Claims{"iss": issuer.Name + "/", "aud": "x", "exp": 1, "org_id": "a.b"}, 1,
			[]string{"fail  issuer", "they differ in the slash at the end", "-> ORGKEYS_ISSUER", "fail  audience", "-> ORGKEYS_AUDIENCE", "fail  time", "expired", "fail  organization", "-> ORGKEYS_CLAIM_ORG"}},
	} {
		claims := harness.Claims{}
		for _, all := range []harness.Claims{good, c.change} {
			for k, v := range all {
				claims[k] = v
			}
		}
		token := issuer.Token(t, claims)
		stdout, stderr, code := s.RunWith(t, "Authorization: Bearer "+token+"\n", "token", "explain")
		if code != c.code {
			t.Errorf("%s: exit code %d\n%s%s", c.name, code, stdout, stderr)
		}
		for _, says := range c.says {
			if !strings.Contains(stdout, says) {
				t.Errorf("%s: nothing says %q:\n%s", c.name, says, stdout)
			}
		}
		if signature := token[strings.LastIndexByte(token, '.')+1:]; strings.Contains(stdout+stderr, signature) {
			t.Errorf("%s: the signature is printed", c.name)
		}
	}
	for _, junk := range []string{"", " \n", "opaque", "a.b", "e30.e30.e30.e30.e30", strings.Repeat("a", 100_000)} {
		if stdout, stderr, code := s.RunWith(t, junk, "token", "explain"); code != 1 || strings.Contains(stderr, "panic") {
			t.Errorf("%.20q: exit code %d\n%s%s", junk, code, stdout, stderr)
		}
	}
}

// TestChallengesSayWhatWasWrong: RFC 6750, section 3.
func TestChallengesSayWhatWasWrong(t *testing.T) {
	t.Parallel()
	issuer := harness.NewIssuer(t)
	s := harness.Start(t, harness.TrustedBy(issuer))
	for name, c := range map[string]struct{ token, challenge string }{
		"no token": {"", `Bearer`},
		"expired":  {issuer.Token(t, harness.Claims{"exp": 1}), `Bearer error="invalid_token", error_description="the token has expired"`},
		"audience": {issuer.Token(t, harness.Claims{"aud": "x"}), `Bearer error="invalid_token", error_description="the token is for another audience"`},
		"bound":    {issuer.Token(t, harness.Claims{"cnf": map[string]string{"jkt": "x"}}), `Bearer error="invalid_token", error_description="the token is bound to a key, and is not accepted as a bearer token"`},
	} {
		resp := s.Do(t, harness.Request{Method: http.MethodGet, Path: harness.KeyPath("acme"), Token: c.token})
		if resp.Status != 401 || resp.Header.Get("WWW-Authenticate") != c.challenge {
			t.Errorf("%s: status %d, WWW-Authenticate %q", name, resp.Status, resp.Header.Get("WWW-Authenticate"))
		}
	}
}
