package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/authn/providertest"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/login"
)

// provider is a real OpenID provider, node-oidc-provider, that runs, and a server
// that trusts its tokens.
type provider struct {
	*providertest.Provider
	server *harness.Server
}

func startProvider(t *testing.T) *provider {
	t.Helper()
	p := &provider{Provider: providertest.Start(t, "oidc-provider")}
	p.server = harness.Start(t, harness.Set("ORGKEYS_ISSUER", p.Issuer), harness.Set("ORGKEYS_AUDIENCE", "orgkeys"), harness.Set("ORGKEYS_JWKS_CA_FILE", p.CA.File),
		harness.Set("ORGKEYS_CLAIM_ROLE", "/realm_access/roles"), harness.Set("ORGKEYS_ROLE_MAP", "org-admins=ADMINISTRATOR"))
	return p
}

func (p *provider) newcomer(t *testing.T) *person {
	ada := newcomer(t, p.server.API)
	ada.org = "acme"
	ada.env = []string{"ORGKEYSCTL_ISSUER=" + p.Issuer, "ORGKEYSCTL_CLIENT_ID=orgkeysctl", "ORGKEYSCTL_RESOURCE=https://orgkeys.example",
		"ORGKEYSCTL_SCOPE=openid,offline_access,keys", "ORGKEYSCTL_ISSUER_CA_FILE=" + p.CA.File, "ORGKEYSCTL_NO_BROWSER=true"}
	return ada
}

// browser is a person's browser, which trusts the provider's authority.
func (p *provider) browser(t *testing.T) *http.Client {
	t.Helper()
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	browser := p.Client(t)
	browser.Jar = jar
	return browser
}

var hidden = regexp.MustCompile(`<input type="hidden" name="([^"]+)" value="([^"]*)"`)

// visit opens an address and sends whatever form comes, until there is none.
func visit(t *testing.T, browser *http.Client, address string, more url.Values) (last string) {
	t.Helper()
	resp, err := browser.Get(address)
	for range 5 {
		if err != nil {
			t.Errorf("the browser: %v", err)
			return ""
		}
		text, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		last = string(text)
		form := url.Values{}
		for _, m := range hidden.FindAllStringSubmatch(last, -1) {
			form.Set(m[1], m[2])
		}
		if len(form) == 0 {
			return last
		}
		for name, values := range more {
			form[name] = values
		}
		to := regexp.MustCompile(`<form[^>]* action="([^"]+)"`).FindStringSubmatch(last)
		if to == nil {
			return last
		}
		target, err2 := resp.Request.URL.Parse(to[1])
		if err2 != nil {
			t.Errorf("the form's action: %v", err2)
			return ""
		}
		resp, err = browser.PostForm(target.String(), form)
	}
	return last
}

// logIn starts a login, has act read what it says, and returns its end.
func (p *person) logInWith(t *testing.T, says string, act func(found string), args ...string) (code int, out, log string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), harness.Patience)
	defer cancel()
	cmd := p.command(ctx, append([]string{"login"}, args...)...)
	var stdout bytes.Buffer
	cmd.Stdout = &stdout
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pattern := regexp.MustCompile(says)
	acted := false
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		log += lines.Text() + "\n"
		if m := pattern.FindStringSubmatch(lines.Text()); m != nil && !acted {
			acted = true
			act(m[1])
		}
	}
	_ = cmd.Wait()
	if ctx.Err() != nil {
		t.Fatalf("login %q: %v, %s", args, ctx.Err(), log)
	}
	return cmd.ProcessState.ExitCode(), stdout.String(), log
}

// session reads the one that is stored, and store writes it again.
func (p *person) session() (session login.Session, path string) {
	p.t.Helper()
	found, err := filepath.Glob(p.path(".config/orgkeysctl/session-*.json"))
	if err != nil || len(found) != 1 {
		p.t.Fatalf("sessions %q, %v", found, err)
	}
	text, err := os.ReadFile(found[0])
	if err == nil {
		err = json.Unmarshal(text, &session)
	}
	if err != nil {
		p.t.Fatal(err)
	}
	return session, found[0]
}

// expire makes the stored token one that has to be refreshed.
func (p *person) expire() login.Session {
	p.t.Helper()
	session, path := p.session()
	session.Expires = time.Now()
	text, err := json.Marshal(session)
	if err == nil {
		err = os.WriteFile(path, text, 0o600)
	}
	if err != nil {
		p.t.Fatal(err)
	}
	return session
}

func TestLogins(t *testing.T) {
	t.Parallel()
	p := startProvider(t)
	t.Run("in the browser", func(t *testing.T) { t.Parallel(); loginInTheBrowser(t, p) })
	t.Run("elsewhere", func(t *testing.T) { t.Parallel(); loginElsewhere(t, p) })
	t.Run("refused", func(t *testing.T) { t.Parallel(); loginRefused(t, p) })
}

const addressSaid = `^(https://\S+/auth\?\S+)$`

func loginInTheBrowser(t *testing.T, p *provider) {
	ada := p.newcomer(t)
	code, out, log := ada.logInWith(t, addressSaid, func(address string) {
		// Others on this machine may ask at the port too.
		asked, err := url.Parse(address)
		if err != nil {
			t.Error(err)
			return
		}
		query := asked.Query()
		if query.Get("code_challenge_method") != "S256" || query.Get("resource") == "" || query.Get("nonce") == "" {
			t.Errorf("asked for %v", query)
		}
		for _, stranger := range []string{"?code=x", "?code=x&state=y"} {
			resp, err := http.Get(query.Get("redirect_uri") + stranger)
			if err != nil || resp.StatusCode != http.StatusBadRequest {
				t.Errorf("a stranger's answer: %v, %v", resp, err)
			}
		}
		if page := visit(t, p.browser(t), address, nil); !strings.Contains(page, "You are logged in") {
			t.Errorf("the browser ends at %s", page)
		}
	})
	if code != 0 {
		t.Fatalf("%d, %s", code, log)
	}
	looksLike(t, "login", ada.home, out)
	ada.only("session")
	ada.does("key", "list")
	ada.does("key", "create", "--out", "key.pem")

	// A token that expired is refreshed once, by whichever of several comes first: a
	// provider that sees a refresh token twice ends the session.
	for range 2 {
		before := ada.expire()
		var all sync.WaitGroup
		for range 6 {
			all.Go(func() {
				if out, err := ada.command(t.Context(), "key", "list").CombinedOutput(); err != nil {
					t.Errorf("%v: %s", err, out)
				}
			})
		}
		all.Wait()
		after, _ := ada.session()
		if after.Refresh == before.Refresh || after.Access == before.Access || !after.Expires.After(time.Now()) {
			t.Error("the session was not refreshed")
		}
	}
	ada.only("session", "arrival")

	// Someone else's use of an old refresh token ends the session, and the next one says so.
	old := ada.expire()
	stolen := old.Refresh
	ada.does("whoami")
	refresh(t, p, stolen)
	ada.expire()
	ada.fails(exitRefused, "the login is over", "key", "list")

	ada.does("logout")
	ada.fails(exitRefused, "nobody is logged in", "whoami")
}

// refresh uses a refresh token as a thief would.
func refresh(t *testing.T, p *provider, token string) int {
	t.Helper()
	resp, err := p.browser(t).PostForm(p.Issuer+"/token", url.Values{"grant_type": {"refresh_token"}, "refresh_token": {token}, "client_id": {"orgkeysctl"}})
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

func loginElsewhere(t *testing.T, p *provider) {
	ada := p.newcomer(t)
	code, out, log := ada.logInWith(t, ` or at (https://\S+)$`, func(address string) {
		if page := visit(t, p.browser(t), address, nil); !strings.Contains(page, "Sign-in Success") {
			t.Errorf("the browser ends at %s", page)
		}
	}, "--device")
	if code != 0 {
		t.Fatalf("%d, %s", code, log)
	}
	looksLike(t, "login", ada.home, out)
	ada.does("key", "list")
	before := ada.expire()
	ada.does("key", "list")
	after, _ := ada.session()
	if after.Refresh == before.Refresh {
		t.Error("the session was not refreshed")
	}
	ada.does("logout")
	if status := refresh(t, p, after.Refresh); status != http.StatusBadRequest {
		t.Errorf("after logout the refresh token gets %d", status)
	}
}

func loginRefused(t *testing.T, p *provider) {
	ada := p.newcomer(t)
	ada.env = append(ada.env, "ORGKEYSCTL_RESOURCE=", "ORGKEYSCTL_SCOPE=openid")
	code, _, log := ada.logInWith(t, addressSaid, func(address string) { visit(t, p.browser(t), address, nil) })
	if code != exitConfig || !strings.Contains(log, "access token is not a JWT") || !strings.Contains(log, "--resource") {
		t.Errorf("an opaque token: %d, %s", code, log)
	}
	ada.fails(exitRefused, "nobody is logged in", "whoami")

	var sent []url.Values // all that a login sends is its own
	no := p.newcomer(t)
	code, _, log = no.logInWith(t, addressSaid, func(address string) {
		asked, err := url.Parse(address)
		if err != nil {
			t.Error(err)
			return
		}
		sent = append(sent, asked.Query())
		back := url.Values{"error": {"access_denied"}, "error_description": {"\x1b[31mno"}, "state": asked.Query()["state"], "iss": {p.Issuer}}
		resp, err := http.Get(asked.Query().Get("redirect_uri") + "?" + back.Encode())
		if err != nil || resp.StatusCode != http.StatusForbidden {
			t.Errorf("%v, %v", resp, err)
		}
	})
	if code != exitRefused || !strings.Contains(log, `the login was denied: "access_denied"`) || strings.Contains(log, "\x1b") {
		t.Errorf("a denied login: %d, %q", code, log)
	}

	mixed := p.newcomer(t)
	code, _, log = mixed.logInWith(t, addressSaid, func(address string) {
		asked, err := url.Parse(address)
		if err != nil {
			t.Error(err)
			return
		}
		sent = append(sent, asked.Query())
		back := url.Values{"code": {"x"}, "state": asked.Query()["state"], "iss": {"https://other.example"}}
		if _, err := http.Get(asked.Query().Get("redirect_uri") + "?" + back.Encode()); err != nil {
			t.Error(err)
		}
	})
	if code != exitUnavailable || !strings.Contains(log, "another issuer answered") {
		t.Errorf("another issuer's answer: %d, %q", code, log)
	}

	for _, name := range []string{"state", "nonce", "code_challenge"} {
		if len(sent) != 2 || len(sent[0].Get(name)) < 26 || sent[0].Get(name) == sent[1].Get(name) {
			t.Errorf("two logins sent the %s of %q", name, sent)
		}
	}

	mixed.env = append(mixed.env, "ORGKEYSCTL_ISSUER_CA_FILE=")
	mixed.fails(exitUnavailable, "certificate", "login")
	mixed.fails(exitUnavailable, "is not https", "login", "--issuer", "http://id.example")
	mixed.env = nil
	mixed.fails(exitUsage, "log in where?", "login")
}
