package console_test

import (
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
	"github.com/orgkeys/orgkeys/internal/tpm/tpmtest"
)

// A day in the life of an organization, all of it in the console.
func TestPromise15_TheConsoleInChromium(t *testing.T) {
	t.Parallel()
	s := harness.Start(t, harness.Set("ORGKEYS_CHECKPOINT_INTERVAL", "1s"))
	b := openBrowser(t, s.API)
	b.signIn(s.Token(t, "acme", "OWNER"), "keys")
	b.shows("There is no key yet")

	// A refusal ends the recipient only if it proves that there is no key for it.
	for code, want := range map[string]int{"insufficient_role": 1, "unavailable": 1, "quota_exceeded": 0, "recipient_unacceptable": 0, "sealed_unavailable": 0, "enrollment_closed": 0} {
		b.do(`await page.route('**/console/api/key', (r) => r.fulfill({ status: 403, contentType: 'application/json', body: JSON.stringify({ success: false, message: 'refused: ' + CODE, errorCode: CODE }) }))
			await page.click('#generate-start')
			await page.waitForSelector('#generate-problem:has-text("refused: ' + CODE + '")')
			await page.unroute('**/console/api/key')`, "CODE", code)
		if got := b.recipients(); got != want {
			t.Errorf("after %s the browser has %d recipients", code, got)
		}
	}

	// The private key is in the file that the browser saves, and nowhere else.
	private := generate(t, b)
	scan := &harness.Scanner{}
	scan.AddPrivate("the generated key", private)
	if found := scan.ScanMemory(s.Memory(t)); len(found) > 0 {
		t.Errorf("the server's memory holds %v", found)
	}
	var wire []string
	b.get(&wire, `return tools.seen.bodies`)
	if len(wire) == 0 {
		t.Error("nothing was seen on the wire")
	}
	for _, body := range wire {
		if found := scan.Scan([]byte(body)); len(found) > 0 {
			t.Errorf("the wire carried %v", found)
		}
	}
	b.shows("Key made", "Key sealed to its recipient", "Private key handed out", "Receipt signed")
	id := b.path()[len("/console/keys/"):]
	if keys := s.List(t, "acme"); len(keys) != 1 || keys[0].ID != id || keys[0].Public(t).N.Cmp(private.N) != 0 {
		t.Fatalf("the organization's keys are %v", keys)
	}
	if b.recipients() != 0 {
		t.Error("the recipient outlives the receipt")
	}

	// A boot secret is written and never read; a node fetches its key, and the secret.
	b.do(`await page.goto(BASE + '/console/secrets')
		await page.fill('[name=name]', 'env_s3')
		await page.fill('[name=value]', 'AWS_REGION=eu-west-1\nSECOND=line')
		await page.click('text=Store >> nth=-1')
		await page.waitForSelector('.notice.good')`)
	b.shows("env_s3")
	b.lacks("eu-west-1")
	note := `<img src=x onerror=alert(1)> "quoted" {{.}} ` + "\u202e" + `txet`
	b.do(`await page.goto(BASE + '/console/enrollments')
		await page.fill('[name=note]', NOTE)
		await page.click('main button.main')
		await page.waitForSelector('#token')`, "NOTE", strings.ReplaceAll(note, "\u202e", ""))
	var token string
	b.get(&token, `return await page.locator('#token').innerText()`)
	b.shows("shown this once", "shell", "cloud-init", "systemd")
	b.looksRight("the minted token", "")
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "token"), []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	node := exec.CommandContext(t.Context(), harness.NodeBinary(t), "boot", "--server", s.API, "--ip", "192.0.2.7", "--region", "eu", "--dir", filepath.Join(dir, "node"), "--token-file", filepath.Join(dir, "token"))
	if out, err := node.CombinedOutput(); err != nil {
		t.Fatalf("orgkeys-node: %v\n%s", err, out)
	}
	stored, err := os.ReadFile(filepath.Join(dir, "node", "env_s3"))
	if err != nil || string(stored) != "AWS_REGION=eu-west-1\nSECOND=line" {
		t.Errorf("the node has %q, %v", stored, err)
	}
	b.do(`await page.click('text=Who claims it')`)
	b.shows("received", "127.0.0.1", `<img src=x onerror=alert(1)>`)
	b.lacks(token)
	register(t, s, private, "192.0.2.9", `<b>v1</b>`, "</td><script>alert(2)</script>")
	b.do(`await page.goto(BASE + '/console/nodes')`)
	b.shows("192.0.2.7", "192.0.2.9", "<b>v1</b>", "<script>alert(2)</script>")
	b.do(`const row = page.locator('tr', { hasText: '192.0.2.7' })
		await row.locator('summary').click()
		await row.locator('[name=reason]').fill('was <i>replaced</i>')
		await row.locator('button').click()
		await page.waitForSelector('.notice.good')`)
	b.lacks("192.0.2.7")
	b.do(`await page.goto(BASE + '/console/events?show=nodes')`)
	b.shows("Node deleted", "was <i>replaced</i>")

	allowDevice(t, b)
	approve(t, s, b)
	everyScreen(t, b, id)
	removeDevice(b)
	withoutScripts(b, id)

	// An event verifies in the browser; one that was changed in the database does not.
	key := verifierKey(t, s)
	b.do(`await page.goto(BASE + '/console/keys/' + ID)
		await page.click('.timeline li:first-child >> text=verify')
		await page.fill('#verify-key', KEY)
		await page.click('#verify-start')
		await page.waitForFunction(() => /Verified|Not verified/.test(document.getElementById('verify-verdict').textContent), null, { timeout: 60000 })`, "ID", id, "KEY", key)
	b.shows("Verified: the log holds this event, unchanged", "The checkpoint is signed by the key")
	if dir := os.Getenv("ORGKEYS_SCREENSHOTS"); dir != "" {
		screenshots(b, dir, id, key)
	}
	another := harness.Start(t, harness.Set("ORGKEYS_CHECKPOINT_INTERVAL", "1s"))
	another.List(t, "acme")
	other := verifierKey(t, another)
	verifyAgain := func(key, want string) {
		t.Helper()
		b.do(`await page.fill('#verify-key', KEY)
			await page.click('#verify-start')
			await page.waitForFunction(() => document.getElementById('verify-verdict').textContent === 'Checking …' || true)
			await page.waitForFunction(() => /erified|authenticated/.test(document.getElementById('verify-verdict').textContent))`, "KEY", key)
		b.shows(want)
	}
	verifyAgain(other, "not signed by that key")
	verifyAgain("", "Included, but not authenticated")
	db := s.Database(t)
	harness.Unprotect(t, db)
	harness.Exec(t, db, "UPDATE events SET leaf = CAST(replace(CAST(leaf AS TEXT), '\"outcome\":\"success\"', '\"outcome\":\"failure\"') AS BLOB) WHERE object = ? AND type = 'orgkey.created'", id)
	verifyAgain(key, "the event, or the log, was changed")

	deleteKey(t, s, b, id)
	endings(t, s, b)
}

// allowDevice allows a TPM by what orgkeys-node prints of a real one.
func allowDevice(t *testing.T, b *browser) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), harness.NodeBinary(t), "ek", "--tpm", tpmtest.Start(t).Socket).Output()
	if err != nil {
		t.Fatalf("orgkeys-node ek: %v", err)
	}
	ek := strings.TrimSpace(string(out))
	b.do(`await page.goto(BASE + '/console/')
		await page.click('nav >> text=Devices')`)
	b.shows("No device is allowed")
	b.do(`await page.fill('[name=ek]', 'sha256-x')
		await page.click('main button.main')
		if (await page.evaluate(() => document.querySelector('[name=ek]').checkValidity())) throw new Error('a device that is none is sent')
		await page.fill('[name=ek]', EK)
		await page.fill('[name=note]', '<b>rack 12</b>')
		await page.keyboard.press('Enter')
		await page.waitForSelector('.notice.good')`, "EK", ek)
	b.shows(ek, "<b>rack 12</b>", "The device is allowed")
}

// removeDevice removes the device by keyboard alone.
func removeDevice(b *browser) {
	b.t.Helper()
	b.do(`await page.goto(BASE + '/console/devices')` + byKeyboard + `
		await until(() => document.activeElement.textContent === 'Remove …')
		await page.keyboard.press('Enter')
		await until(() => document.activeElement.name === 'reason')
		await page.keyboard.type('sold')
		await page.keyboard.press('Enter')
		await page.waitForURL('**/console/devices?done=device-removed')`)
	b.shows("No device is allowed", "The device is removed")
	b.do(`await page.goto(BASE + '/console/events?show=enrollments')`)
	b.shows("Device allowed", "Device removed", "sold")
}

// approve has a node wait for its approval, which the browser gives for the recipient
// that the node says.
func approve(t *testing.T, s *harness.Server, b *browser) {
	t.Helper()
	b.do(`await page.goto(BASE + '/console/enrollments')
		await page.click('text=Mint an enrollment')
		await page.check('[name=approval]')
		await page.click('main button.main')
		await page.waitForSelector('#token')`)
	var token string
	b.get(&token, `return await page.locator('#token').innerText()`)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "token"), []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	boot := func(wait string) *exec.Cmd {
		return exec.CommandContext(t.Context(), harness.NodeBinary(t), "boot", "--wait", wait, "--server", s.API, "--ip", "192.0.2.8", "--region", "eu",
			"--dir", filepath.Join(dir, "node"), "--token-file", filepath.Join(dir, "token"))
	}
	out, err := boot("0s").CombinedOutput()
	recipient := regexp.MustCompile(`an administrator approves recipient ([0-9a-f]{64})`).FindSubmatch(out)
	if err == nil || recipient == nil {
		t.Fatalf("a node that is not approved: %v\n%s", err, out)
	}
	node, said := boot("120s"), &harness.Output{}
	node.Stderr = said
	if err := node.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- node.Wait() }()
	b.do(`await page.click('text=Who claims it')`)
	b.shows("waiting", string(recipient[1]))
	b.looksRight("a claim that waits", "")
	select {
	case err := <-ended:
		t.Fatalf("the node did not wait: %v\n%s", err, said.From(0))
	default:
	}
	b.do(`await page.click('button:has-text("Approve")')
		await page.waitForSelector('.notice.good:has-text("The claim is approved")')`)
	if err := <-ended; err != nil {
		t.Fatalf("orgkeys-node: %v\n%s", err, said.From(0))
	}
	b.do(`await page.reload()
		await page.waitForSelector('td:has-text("received")')
		await page.goto(BASE + '/console/nodes')`)
	b.shows("192.0.2.8")
	b.do(`await page.goto(BASE + '/console/events?show=enrollments')`)
	b.shows("Claim approved")
}

// endings are those of a session: it expires, or is signed out.
func endings(t *testing.T, s *harness.Server, b *browser) {
	t.Helper()
	harness.Exec(t, s.Database(t), "UPDATE console_sessions SET expires_at = 1")
	b.do(`await page.click('nav >> text=Boot secrets')
		await page.waitForURL('**/console/sign-in?to=%2Fconsole%2Fsecrets')
		await page.fill('textarea[name=token]', TOKEN)
		await page.click('main button')
		await page.waitForURL('**/console/secrets')`, "TOKEN", s.Token(t, "acme", "OWNER"))
	b.shows("env_s3")
	// Neither a page nor a cookie is left in the browser for whoever comes next.
	b.do(`await page.click('text=Sign out')
		await page.waitForSelector('text=You are signed out')
		await page.goBack()
		await page.waitForURL('**/console/sign-in?to=*')
		if ((await context.cookies()).length) throw new Error('left: ' + JSON.stringify(await context.cookies()))`)
	b.lacks("env_s3")
}

// generate generates a key in the console, and returns what the browser saved.
func generate(t *testing.T, b *browser) *rsa.PrivateKey {
	t.Helper()
	var text string
	b.get(&text, `page.on('response', async (r) => { if (r.url().includes('/console/')) tools.seen.bodies.push(await r.text().catch(() => '')) })
		page.on('request', (r) => { if (r.postData()) tools.seen.bodies.push(r.postData()) })
		await page.click('#generate-start')
		await page.waitForSelector('#generate-save', { state: 'visible', timeout: 60000 })
		const [download] = await Promise.all([page.waitForEvent('download'), page.click('#generate-save')])
		if (download.suggestedFilename() !== 'private_key.pem') throw new Error(download.suggestedFilename())
		const chunks = []
		for await (const chunk of await download.createReadStream()) chunks.push(chunk)
		await page.click('#generate-finish')
		await page.waitForURL('**/console/keys/*-*')
		return Buffer.concat(chunks).toString()`)
	block, rest := pem.Decode([]byte(text))
	if block == nil || len(rest) > 0 || block.Type != "RSA PRIVATE KEY" {
		t.Fatalf("the browser saved %.60q", text)
	}
	private, err := x509.ParsePKCS1PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if string(pem.EncodeToMemory(block)) != text {
		t.Error("the file has another form than openssl writes")
	}
	return private
}

// A receipt that did not arrive is repeated when the page is opened again. The key that it is
// for may be gone by then, and another one can be generated all the same.
func TestAKeyThatIsDeletedBeforeItsReceipt(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	b := openBrowser(t, s.API)
	b.signIn(s.Token(t, "acme", "OWNER"), "keys")
	b.do(`await page.click('#generate-start')
		await page.waitForSelector('#generate-save', { state: 'visible', timeout: 60000 })
		await page.route('**/receipt', (route) => route.abort())
		await page.click('#generate-finish')
		await page.waitForSelector('#generate-problem:has-text("cannot be reached")')
		await page.unroute('**/receipt')`)
	keys := s.List(t, "acme")
	if len(keys) != 1 || b.recipients() != 1 {
		t.Fatalf("there are %d keys, and the browser has %d recipients", len(keys), b.recipients())
	}
	s.Do(t, harness.Request{Method: "DELETE", Path: harness.KeyPath("acme") + "/" + keys[0].ID, Token: s.Token(t, "acme", "OWNER")}).
		Want(t, 200, "Organization key deleted successfully")
	b.do(`const answer = page.waitForResponse('**/receipt')
		await page.reload()
		const { errorCode } = await (await answer).json()
		if (errorCode !== 'enrollment_closed') throw new Error('the receipt of a deleted key is answered with ' + errorCode)
		await page.waitForLoadState('networkidle')
		if (await page.isVisible('#generate-problem')) throw new Error(await page.textContent('#generate-problem'))`)
	if n := b.recipients(); n != 0 {
		t.Errorf("the browser has %d recipients of keys that are gone", n)
	}
	generate(t, b)
}

// recipients is how many the browser has stored.
func (b *browser) recipients() (n int) {
	b.t.Helper()
	b.get(&n, `return await page.evaluate(() => new Promise((done) => {
		const o = indexedDB.open('orgkeys', 1)
		o.onsuccess = () => { const r = o.result.transaction('recipients').objectStore('recipients').count(); r.onsuccess = () => done(r.result) } }))`)
	return n
}

func (b *browser) path() (path string) {
	b.t.Helper()
	b.get(&path, `return new URL(page.url()).pathname`)
	return path
}

func register(t *testing.T, s *harness.Server, key *rsa.PrivateKey, ip, version, status string) {
	t.Helper()
	c, err := client.New(client.Config{Server: s.API})
	if err != nil {
		t.Fatal(err)
	}
	n := client.Node{Client: c, Org: "acme", IP: ip, Region: "eu", Key: key}
	if err := n.Register(t.Context(), client.Registration{Version: version, Status: status}); err != nil {
		t.Fatal(err)
	}
}

func verifierKey(t *testing.T, s *harness.Server) string {
	t.Helper()
	var key string
	harness.Eventually(t, harness.Patience, "a verifier key", func() bool {
		out, _, code := s.Run(t, "audit", "key")
		key = strings.TrimSpace(out)
		return code == 0 && key != ""
	})
	return key
}

// Every screen, at both widths and in both schemes.
func everyScreen(t *testing.T, b *browser, key string) {
	t.Helper()
	var enrollment string
	b.get(&enrollment, `await page.goto(BASE + '/console/enrollments')
		return await page.locator('td a').first().getAttribute('href')`)
	for _, path := range []string{"", "keys", "keys/" + key, "enrollments", strings.TrimPrefix(enrollment, "/console/"), "nodes", "devices", "secrets", "events", "verify", "policy?action=orgkey.generate",
		"sign-in", "events?show=nonsense&object=nothing", "keys/00000000-0000-4000-8000-000000000000", "nowhere"} {
		b.looksRight("/console/"+path, `await page.goto(BASE + '/console/'+PATH)`, "PATH", path)
	}
}

// looksRight goes somewhere at both widths and in both schemes, and has axe-core and the
// layout checked, with everything unfolded.
func (b *browser) looksRight(what, visit string, with ...string) {
	b.t.Helper()
	for _, look := range [][2]string{{"375", "dark"}, {"1600", "light"}} {
		var found struct {
			Axe      []string
			Overflow struct {
				By      int
				Element string
			}
		}
		b.get(&found, `await page.setViewportSize({ width: Number(WIDTH), height: 900 })
			await page.emulateMedia({ colorScheme: SCHEME, reducedMotion: 'reduce' }) // no colour between two
			`+visit+`
			for (const d of await page.locator('details').all()) await d.evaluate((e) => { e.removeAttribute('name'); e.open = true })
			return { Axe: await tools.axe(page), Overflow: await tools.overflow(page) }`,
			append(with, "WIDTH", look[0], "SCHEME", look[1])...)
		for _, violation := range found.Axe {
			b.t.Errorf("%s, %v: %s", what, look, violation)
		}
		if found.Overflow.By > 0 || found.Overflow.Element != "" {
			b.t.Errorf("%s, %v, is %d wider than the window: %s", what, look, found.Overflow.By, found.Overflow.Element)
		}
	}
}

// Without JavaScript pages are read, and say what needs it.
func withoutScripts(b *browser, key string) {
	b.t.Helper()
	b.do(`const plain = await tools.open({ javaScriptEnabled: false, storageState: await context.storageState() })
		const other = await plain.newPage()
		for (const [path, want] of [['', 'Audit log'], ['keys', 'orgkeysctl key create'], ['keys/' + KEY, 'Key made'], ['enrollments', 'received'], ['nodes', 'Region'], ['devices', 'orgkeys-node ek'], ['secrets', 'env_s3'],
			['events', 'Events read'], ['verify', 'verify-proof'], ['policy', 'orgkey.generate']]) {
			await other.goto(BASE + '/console/' + path)
			const text = await other.locator('main').innerText()
			if (!text.includes(want)) throw new Error(path + ' without JavaScript: ' + text)
		}
		await plain.close()`, "KEY", key)
}

// byKeyboard is JavaScript: until(test) presses Tab until what has the focus passes the test.
const byKeyboard = `
		const until = async (test) => { for (let i = 0; i < 80; i++) { await page.keyboard.press('Tab'); if (await page.evaluate(test)) return } throw new Error('not reached by keyboard') }`

// deleteKey deletes a key in the console, by keyboard alone.
func deleteKey(t *testing.T, s *harness.Server, b *browser, id string) {
	t.Helper()
	b.do(`await page.goto(BASE + '/console/keys/' + ID)`+byKeyboard+`
		await until(() => document.activeElement.textContent === 'Delete this key')
		await page.keyboard.press('Enter')
		await until(() => document.activeElement.name === 'reason')
		await page.keyboard.press('Enter') // without a reason nothing is sent
		await page.keyboard.type('rotated')
		await page.keyboard.press('Enter')
		await page.waitForURL('**/console/keys?done=key-deleted')`, "ID", id)
	b.shows("There is no key yet", "The key is deleted")
	if keys := s.List(t, "acme"); len(keys) != 0 {
		t.Errorf("there is still %v", keys)
	}
	b.do(`await page.goto(BASE + '/console/keys/' + ID)`, "ID", id)
	b.shows("This key is no more", "Key deleted", "rotated")
}

var leafForm = regexp.MustCompile(`^\{"v":1,`)

// What is exported is the log's own bytes.
func checkExport(t *testing.T, text string) {
	t.Helper()
	for line := range strings.Lines(text) {
		if !leafForm.MatchString(line) || !json.Valid([]byte(line)) {
			t.Errorf("the export has %.80q", line)
		}
	}
}
