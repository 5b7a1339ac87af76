package console_test

import (
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// The service takes 256 bytes of a note, whatever letters they make: one that is longer is
// not sent, and stays in its form. Nothing shorter is kept from being typed.
func TestNotesAreAsLongAsTheServiceTakes(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	b := openBrowser(t, s.API)
	b.signIn(s.Token(t, "acme", "OWNER"), "devices")
	for page, rest := range map[string]string{
		"devices":     `await page.fill('[name=ek]', 'sha256-' + 'a'.repeat(64))`,
		"enrollments": ``,
	} {
		for _, c := range []struct {
			note string
			fits bool
		}{{strings.Repeat("ж", 200), false}, {strings.Repeat("😀", 65), false}, {strings.Repeat("x", 256), true}, {strings.Repeat("ж", 128), true}} {
			var got struct {
				Most       int
				Why, Title string
			}
			b.get(&got, `await page.goto(BASE + '/console/' + PAGE)
				await page.locator('details:has([name=note])').evaluate((d) => { d.open = true })
				`+rest+`
				await page.fill('[name=note]', NOTE)
				const note = page.locator('[name=note]')
				const found = await note.evaluate((n) => ({ Most: n.maxLength, Why: n.validationMessage }))
				const click = page.click('form:has([name=note]) button.main')
				await Promise.all(found.Why === '' ? [click, page.waitForEvent('load')] : [click])
				return { ...found, Title: await page.locator('h1').innerText() }`, "PAGE", page, "NOTE", c.note)
			if got.Most != 256 || (got.Why == "") != c.fits || strings.Contains(got.Title, "did not work") {
				t.Errorf("%s: a note of %d bytes that begins with %.4s: %+v", page, len(c.note), c.note, got)
			}
		}
	}
}

// Whoever has to sign in again comes back to the event that was to be verified.
func TestSigningInAgainLeadsBackToTheEvent(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	b := openBrowser(t, s.API)
	b.signIn(s.Token(t, "acme", "OWNER"), "verify")
	const event = "11111111-2222-4333-8444-555555555555"
	var value string
	b.get(&value, `await page.goto(BASE + '/console/verify')
		await page.fill('#verify-event', EVENT)
		await page.context().clearCookies()
		await page.click('#verify-start')
		await page.locator('main a[href^="/console/sign-in"]').click()
		await page.fill('textarea[name=token]', TOKEN)
		await page.click('main button')
		await page.waitForURL((u) => !u.pathname.startsWith('/console/sign-in'))
		return await page.inputValue('#verify-event')`, "EVENT", event, "TOKEN", s.Token(t, "acme", "OWNER"))
	if value != event {
		t.Errorf("after signing in the page is about %q", value)
	}
}
