package console_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/authn/providertest"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/testca"
)

// As it is set up for people: over TLS, under a name of its own, with a provider that is
// another site. Chromium finds the name on this machine.
func TestPromise15_TheConsoleOverTLS(t *testing.T) {
	t.Parallel()
	const console = "https://keys.example"
	provider := providertest.Start(t, "oidc-provider", console+"/console/callback")
	ca := testca.New(t)
	s := harness.Start(t, append(atProvider(provider, console), harness.TLS(ca, ca.Issue(t, "keys.example")))...)
	address, issuer := strings.TrimPrefix(s.API, "https://"), strings.TrimPrefix(provider.Issuer, "https://")
	b := openBrowserWith(t, console, []string{trusting(t, address, issuer), "--host-resolver-rules=MAP keys.example:443 " + address}, issuer)
	b.do(`await page.goto(BASE + '/console/secrets')
		await page.click('text=Continue')
		await page.waitForURL(BASE + '/console/secrets')`)
	b.shows("There is no boot secret")

	// The one cookie is the session's. It cannot be planted by another host, is not sent in the clear, and no script reads it.
	var cookies []struct {
		Name, Domain, Path, SameSite string
		HTTPOnly, Secure             bool
	}
	b.get(&cookies, `return await context.cookies(BASE)`)
	if len(cookies) != 1 || cookies[0].Name != "__Host-orgkeys-session-443" || cookies[0].Domain != "keys.example" || cookies[0].Path != "/" ||
		cookies[0].SameSite != "Lax" || !cookies[0].HTTPOnly || !cookies[0].Secure {
		t.Errorf("the cookies are %+v", cookies)
	}
	b.do(`if (await page.evaluate(() => document.cookie)) throw new Error('scripts read cookies')`)

	// From now on the browser uses no http for this host: nothing listens for it.
	b.do(`await page.goto('http://keys.example/console/nodes')
		await page.waitForURL(BASE + '/console/nodes')`)
	b.shows("No node has registered")

	b.do(`await page.goto(BASE + '/console/keys')`)
	generate(t, b)
	othersPages(t, s, b, provider.Issuer)
	signOutEverywhere(t, b, provider.Issuer)
}

// othersPages has a page of another site try what it can.
func othersPages(t *testing.T, s *harness.Server, b *browser, elsewhere string) {
	t.Helper()
	reads := func() int64 {
		return harness.Number(t, s.Database(t), "SELECT count(*) FROM events WHERE org_id = 'acme'")
	}
	before := reads()
	// Its forms, with which a browser sends no cookie of SameSite=Lax, and its frames, images, scripts and fetches.
	b.do(`await page.goto(ELSEWHERE + '/.well-known/openid-configuration')
		for (const path of ['sign-out', 'keys/x/delete', 'devices']) {
			await page.evaluate((to) => {
				const form = Object.assign(document.createElement('form'), { method: 'post', action: to })
				document.body.append(form)
				form.submit()
			}, BASE + '/console/' + path)
			await page.waitForSelector('text=This request was sent by a page of another site')
			await page.goto(ELSEWHERE + '/.well-known/openid-configuration')
		}
		const violations = tools.seen.violations.length
		const loaded = await page.evaluate(async (base) => {
			const loads = (tag, to) => new Promise((done) => {
				const e = document.createElement(tag)
				e.onload = () => done(tag)
				e.onerror = () => done('')
				e.src = to
				document.body.append(e)
				setTimeout(() => done(''), 3000)
			})
			const fetched = await fetch(base + '/console/events/export', { credentials: 'include' }).then(() => 'fetch', () => '')
			return [fetched, await loads('img', base + '/console/keys'), await loads('script', base + '/console/events'), await loads('iframe', base + '/console/keys')]
		}, BASE)
		// A frame "loads" an error page: it must not be the console's.
		if (loaded.slice(0, 3).some((x) => x) || page.frames().slice(1).some((f) => f.url().startsWith(BASE))) throw new Error(loaded + ' ' + page.frames().map((f) => f.url()))
		if (tools.seen.violations.length === violations) throw new Error('the frame was not refused by the policy')
		tools.seen.violations.length = violations`, "ELSEWHERE", elsewhere)
	if after := reads(); after != before {
		t.Errorf("pages of another site caused %d events in the person's name", after-before)
	}
	// A link leads to the console as ever, signed in.
	b.do(`await page.evaluate((to) => {
			const a = Object.assign(document.createElement('a'), { href: to, textContent: 'a link' })
			document.body.append(a)
		}, BASE + '/console/secrets?done=secret-stored')
		await page.click('text=a link')
		await page.waitForURL(BASE + '/console/secrets?done=secret-stored')`)
	b.shows("There is no boot secret")
	b.lacks("The boot secret is stored")
}

// signOutEverywhere ends the session of the console, and then that of the provider.
func signOutEverywhere(t *testing.T, b *browser, issuer string) {
	t.Helper()
	var atProvider [2]string
	b.get(&atProvider, `const session = async () => (await context.cookies(ISSUER)).filter((c) => c.name === '_session').map((c) => c.value).join()
		const before = await session()
		await page.goto(BASE + '/console/')
		await page.click('text=Sign out')
		await page.waitForSelector('text=You are signed out')
		if ((await context.cookies(BASE)).length) throw new Error('a cookie is left')
		await page.route('https://fonts.googleapis.com/**', (r) => r.abort()) // which the provider's page would like
		await page.click('text=sign out there too')
		await page.waitForURL(ISSUER + '/**')
		await page.click('button:has-text("Yes")')
		await page.waitForSelector('text=Sign-out Success')
		tools.seen.hosts.delete('fonts.googleapis.com')
		return [before, await session()]`, "ISSUER", issuer)
	if atProvider[0] == "" || atProvider[0] == atProvider[1] {
		t.Errorf("the provider's session was %q, and is %q", atProvider[0], atProvider[1])
	}
	b.do(`await page.goto(BASE + '/console/')
		await page.waitForURL(BASE + '/console/sign-in?to=*')`)
	b.lacks("You are signed out")
}

// Other hosts and ports are not told what to do by the console's.
func TestStrictTransportIsOfTheConsolesOwnHost(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	s := harness.Start(t, harness.TLS(ca, ca.Issue(t, "localhost"))) // with the development issuer: localhost is everybody's
	ada := newPerson(t, s)
	got := ada.send("/console/sign-in", nil)
	if got.StatusCode != http.StatusOK || got.Header.Get("Strict-Transport-Security") != "" {
		t.Errorf("on this machine: %d %q", got.StatusCode, got.Header.Get("Strict-Transport-Security"))
	}
	ada.signIn("OWNER")
	if len(ada.cookies) != 1 || ada.cookies["__Host-orgkeys-session-"+port(s)] == nil || !ada.cookies["__Host-orgkeys-session-"+port(s)].Secure {
		t.Errorf("over TLS the cookies are %v", ada.cookies)
	}
	if got := newPerson(t, s).send("/console/keys", nil, "Cookie", "orgkeys-session-"+port(s)+"="+ada.cookies["__Host-orgkeys-session-"+port(s)].Value); got.StatusCode != http.StatusSeeOther {
		t.Errorf("a session in a cookie that another host may set: %d", got.StatusCode)
	}
}
