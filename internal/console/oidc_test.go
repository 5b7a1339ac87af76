package console_test

import (
	"fmt"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/authn/providertest"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/freeport"
	"github.com/orgkeys/orgkeys/internal/login"
)

// atProvider are the settings of a server whose console signs people in at a provider.
func atProvider(p *providertest.Provider, console string) []harness.Option {
	return []harness.Option{
		harness.Set("ORGKEYS_ISSUER", p.Issuer), harness.Set("ORGKEYS_AUDIENCE", "orgkeys"), harness.Set("ORGKEYS_JWKS_CA_FILE", p.CA.File),
		harness.Set("ORGKEYS_CLAIM_ROLE", "/realm_access/roles"), harness.Set("ORGKEYS_ROLE_MAP", "org-admins=ADMINISTRATOR"),
		harness.Set("ORGKEYS_CONSOLE", "true"), harness.Set("ORGKEYS_CONSOLE_URL", console), harness.Set("ORGKEYS_CONSOLE_CLIENT_ID", "console"),
		harness.Set("ORGKEYS_CONSOLE_CLIENT_SECRET", clientSecret), harness.Set("ORGKEYS_CONSOLE_RESOURCE", apiResource), harness.Set("ORGKEYS_CONSOLE_SCOPES", "openid,keys"),
	}
}

// What the provider knows the console and the API by.
const (
	clientSecret = "of-the-console"
	apiResource  = "https://orgkeys.example"
)

// A code is worth nothing without the verifier of the sign-in that it came from (PKCE), and an
// ID token nothing in another sign-in (nonce).
func TestACodeIsOfOneSignIn(t *testing.T) {
	t.Parallel()
	const redirect = "https://keys.example/console/callback"
	p := providertest.Start(t, "oidc-provider", redirect)
	web := &login.Web{
		Provider: login.Provider{Issuer: p.Issuer, ClientID: "console", Resource: apiResource, Scopes: []string{"openid", "keys"}, CAFile: p.CA.File},
		Secret:   clientSecret, Redirect: redirect,
	}
	begun := login.Attempt{State: "state", Nonce: "nonce", Verifier: strings.Repeat("v", 43)}
	another := login.Attempt{State: "state", Nonce: "another", Verifier: begun.Verifier}
	stolen := login.Attempt{State: "state", Nonce: begun.Nonce, Verifier: strings.Repeat("w", 43)}
	for _, c := range []struct {
		with login.Attempt
		want string // "": it signs in
	}{{begun, ""}, {stolen, "invalid_grant"}, {another, "for another login"}} {
		session, err := web.Finish(t.Context(), c.with, comeBack(t, p, web, begun))
		if c.want == "" && (err != nil || session.Access == "") || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || session.Access != "") {
			t.Errorf("a code of %v, with %v: %v, want %q", begun, c.with, err, c.want)
		}
	}
	answer := comeBack(t, p, web, begun)
	answer.Set("iss", "https://other.example")
	if _, err := web.Finish(t.Context(), begun, answer); err == nil || !strings.Contains(err.Error(), "another issuer answered") {
		t.Errorf("a code that another issuer sends: %v", err)
	}
}

// comeBack signs in at the provider, as a browser, and returns what it sends to the console.
func comeBack(t *testing.T, p *providertest.Provider, web *login.Web, a login.Attempt) url.Values {
	t.Helper()
	address, err := web.Begin(t.Context(), a)
	if err != nil {
		t.Fatal(err)
	}
	var back url.Values
	browser := p.Client(t)
	if browser.Jar, err = cookiejar.New(nil); err != nil {
		t.Fatal(err)
	}
	browser.CheckRedirect = func(req *http.Request, _ []*http.Request) error {
		if strings.HasPrefix(req.URL.String(), web.Redirect) {
			back = req.URL.Query()
			return http.ErrUseLastResponse
		}
		return nil
	}
	resp, err := browser.Get(address)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if back.Get("code") == "" || back.Get("state") != a.State {
		t.Fatalf("the provider sends %v, %d", back, resp.StatusCode)
	}
	return back
}

// With a provider, people sign in there and come back; what comes back to another
// browser, twice, or with another's state signs nobody in.
func TestPromise15_SigningInAtAProvider(t *testing.T) {
	t.Parallel()
	at, err := freeport.Find()
	if err != nil {
		t.Fatal(err)
	}
	address, console := fmt.Sprintf("127.0.0.1:%d", at), fmt.Sprintf("http://localhost:%d", at)
	provider := providertest.Start(t, "oidc-provider", console+"/console/callback") // on another site than the console
	issuer := provider.Issuer
	s := harness.Start(t, append(atProvider(provider, console), harness.Set("ORGKEYS_LISTEN", address))...)
	b := openBrowser(t, console, strings.TrimPrefix(issuer, "https://"))
	var answer string
	b.get(&answer, `const back = page.waitForRequest((r) => r.url().startsWith(BASE + '/console/callback'))
		await page.goto(BASE + '/console/enrollments')
		await page.click('text=Continue')
		const request = await back
		await page.waitForURL(BASE + '/console/enrollments')
		return request.url()`)
	b.shows("There is no enrollment")
	back, err := url.Parse(answer)
	if err != nil || back.Query().Get("code") == "" || len(back.Query().Get("state")) < 43 {
		t.Fatalf("the browser came back with %s, %v", answer, err)
	}
	var header string
	b.get(&header, `return await page.locator('header').innerText()`)
	if !strings.Contains(header, "acme") || !strings.Contains(header, "ADMINISTRATOR") {
		t.Errorf("signed in as %q", header)
	}

	// The code, in another browser, again, or with a state that was made up.
	for _, path := range []string{back.RequestURI(), "/console/callback?code=x&state=", "/console/callback?code=x", "/console/callback?error=access_denied&state=" + back.Query().Get("state")} {
		stranger := newPerson(t, s)
		if got := stranger.send(path, nil); got.StatusCode != http.StatusBadRequest || stranger.session() != nil {
			t.Errorf("a stranger with %s gets %d", path, got.StatusCode)
		}
	}
	mallory := newPerson(t, s)
	begun := mallory.send("/console/sign-in/begin?to=//evil.example", nil)
	asked, err := url.Parse(begun.Header.Get("Location"))
	if err != nil || begun.StatusCode != http.StatusSeeOther || !strings.HasPrefix(asked.String(), issuer) {
		t.Fatalf("signing in begins with %d %s", begun.StatusCode, asked)
	}
	q := asked.Query()
	if q.Get("code_challenge_method") != "S256" || q.Get("nonce") == "" || q.Get("redirect_uri") != console+"/console/callback" || q.Get("response_type") != "code" {
		t.Errorf("the provider is asked for %v", q)
	}
	// Somebody else's answer in one's own sign-in that has begun. It does not end that either.
	for _, state := range []string{"", "x", back.Query().Get("state"), q.Get("state")[:42], q.Get("state") + "&state=" + q.Get("state")} {
		got := mallory.send("/console/callback?code="+back.Query().Get("code")+"&iss="+url.QueryEscape(issuer)+"&state="+state, nil)
		if got.StatusCode != http.StatusBadRequest || !strings.Contains(got.text, "begun in another tab") || mallory.session() != nil || len(mallory.cookies) != 1 {
			t.Errorf("with the state %q one gets %d and %v", state, got.StatusCode, mallory.cookies)
		}
	}
	// Somebody else's code in it: PKCE and nonce are of the other.
	injected := mallory.send("/console/callback?code="+back.Query().Get("code")+"&iss="+url.QueryEscape(issuer)+"&state="+q.Get("state"), nil)
	if injected.StatusCode < 400 || mallory.session() != nil {
		t.Errorf("an injected code gets %d", injected.StatusCode)
	}
	denied := newPerson(t, s)
	begun = denied.send("/console/sign-in/begin", nil)
	asked, _ = url.Parse(begun.Header.Get("Location"))
	got := denied.send("/console/callback?error=access_denied&error_description=%3Cscript%3E&iss="+url.QueryEscape(issuer)+"&state="+asked.Query().Get("state"), nil)
	if got.StatusCode != http.StatusForbidden || strings.Contains(got.text, "<script>") || denied.session() != nil {
		t.Errorf("a denied sign-in gets %d", got.StatusCode)
	}
	if got := denied.send("/console/sign-in", url.Values{"token": {"x"}}); got.StatusCode != http.StatusNotFound || denied.session() != nil {
		t.Errorf("pasting a token answers %d", got.StatusCode)
	}

	// A second tab has the same session, and signing out in it ends both.
	b.do(`const second = await context.newPage()
		await second.goto(BASE + '/console/keys')
		await second.waitForSelector('#generate-start', { state: 'visible' })
		await page.goto(BASE + '/console/keys')
		await second.click('text=Sign out')
		await second.waitForSelector('text=You are signed out')
		await page.click('#generate-start')
		await page.waitForSelector('#generate-problem:has-text("You are signed out")', { timeout: 60000 })
		await page.click('#generate-problem a')
		await page.click('text=Continue')
		await page.waitForURL(BASE + '/console/keys')
		await page.waitForSelector('text=Open the key that is not saved yet')
		await page.click('#generate-start')
		await page.waitForSelector('#generate-save', { state: 'visible', timeout: 60000 })
		await page.reload()
		await page.click('#generate-start')
		await page.waitForSelector('#generate-save', { state: 'visible', timeout: 60000 })`)
	if n := harness.Number(t, s.Database(t), "SELECT count(*) FROM org_keys WHERE slot IS NOT NULL"); n != 1 {
		t.Errorf("a session that ended, a reload and a second try made %d keys", n)
	}
	// The answer to the receipt is lost: the key is not taken for one that is not saved yet.
	b.do(`await page.route('**/receipt', async (route) => { await route.fetch(); await route.abort() })
		await page.click('#generate-finish')
		await page.waitForSelector('#generate-problem:has-text("cannot be reached")')
		await page.unroute('**/receipt')
		await page.reload()
		await page.waitForSelector('#generate-start', { state: 'visible' })
		if ((await page.textContent('#generate-start')).includes('not saved')) throw new Error('a key that was saved is offered again')
		await page.click('#generate-start')
		await page.waitForSelector('#generate-save', { state: 'visible', timeout: 60000 })`)
	if n := harness.Number(t, s.Database(t), "SELECT count(*) FROM org_keys WHERE slot IS NOT NULL"); n != 2 {
		t.Errorf("after a receipt whose answer was lost there are %d keys, and one was saved and one asked for", n)
	}
}
