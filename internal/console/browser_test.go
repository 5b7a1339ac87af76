package console_test

import (
	"bufio"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }

// browser is a real Chromium with one page.
type browser struct {
	t       *testing.T
	base    string // of the server
	in      io.WriteCloser
	answers *bufio.Reader
}

// openBrowser starts one. At its end no page has broken its own policy, and none has
// asked any host but the server and these, which are reached over TLS.
func openBrowser(t *testing.T, base string, hosts ...string) *browser {
	t.Helper()
	return openBrowserWith(t, base, []string{trusting(t, hosts...)}, hosts...)
}

// trusting is Chromium's flag to believe the certificates that these addresses have now, and no others of the test.
func trusting(t *testing.T, addresses ...string) string {
	t.Helper()
	var pins []string
	for _, address := range addresses {
		c, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		pin := sha256.Sum256(c.ConnectionState().PeerCertificates[0].RawSubjectPublicKeyInfo)
		pins = append(pins, base64.StdEncoding.EncodeToString(pin[:]))
		c.Close()
	}
	return "--ignore-certificate-errors-spki-list=" + strings.Join(pins, ",")
}

// openBrowserWith is openBrowser with flags for Chromium.
func openBrowserWith(t *testing.T, base string, flags []string, hosts ...string) *browser {
	t.Helper()
	build := exec.CommandContext(t.Context(), "browser/build")
	build.Stderr = os.Stderr
	out, err := build.Output()
	if err != nil {
		t.Fatalf("installing what drives the browser: %v", err)
	}
	dir := strings.TrimSpace(string(out))
	cmd := exec.Command("node", append([]string{filepath.Join(dir, "driver.mjs"), "/usr/bin/chromium"}, flags...)...)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	b := &browser{t, base, in, bufio.NewReader(stdout)}
	t.Cleanup(func() { _ = in.Close(); _ = cmd.Wait() })
	b.answer(new(string))
	t.Cleanup(func() {
		var seen struct{ Violations, Hosts []string }
		b.get(&seen, `return { Violations: tools.seen.violations, Hosts: [...tools.seen.hosts] }`)
		if len(seen.Violations) > 0 {
			t.Errorf("pages broke their policy:\n%s", strings.Join(seen.Violations, "\n"))
		}
		allowed := append(hosts, strings.TrimPrefix(strings.TrimPrefix(base, "http://"), "https://"))
		for _, host := range seen.Hosts {
			if !contains(allowed, host) && host != "" {
				t.Errorf("a page asked %s", host)
			}
		}
	})
	return b
}

func contains(all []string, one string) bool {
	for _, a := range all {
		if a == one {
			return true
		}
	}
	return false
}

func (b *browser) answer(into any) {
	b.t.Helper()
	line, err := b.answers.ReadBytes('\n')
	if err != nil {
		b.t.Fatalf("the browser's driver ended: %v", err)
	}
	var answer struct {
		Result json.RawMessage
		Error  string
	}
	if err := json.Unmarshal(line, &answer); err != nil {
		b.t.Fatal(err)
	}
	if answer.Error != "" {
		b.t.Fatal(answer.Error)
	}
	if into != nil {
		if err := json.Unmarshal(answer.Result, into); err != nil {
			b.t.Fatalf("%s: %v", answer.Result, err)
		}
	}
}

// get runs JavaScript in the driver: BASE is the server, and the names in with are strings.
func (b *browser) get(into any, script string, with ...string) {
	b.t.Helper()
	head := "const BASE = " + quote(b.base) + "; "
	for i := 0; i < len(with); i += 2 {
		head += "const " + with[i] + " = " + quote(with[i+1]) + "; "
	}
	if _, err := io.WriteString(b.in, quote(head+script)+"\n"); err != nil {
		b.t.Fatal(err)
	}
	b.answer(into)
}

func quote(text string) string {
	b, _ := json.Marshal(text)
	return string(b)
}

// do is get for what has no result.
func (b *browser) do(script string, with ...string) { b.t.Helper(); b.get(nil, script, with...) }

// text is what a page shows.
func (b *browser) text() (text string) {
	b.t.Helper()
	b.get(&text, `return await page.locator('main').innerText()`)
	return text
}

// shows fails the test unless the page shows a text.
func (b *browser) shows(want ...string) {
	b.t.Helper()
	text := b.text()
	for _, w := range want {
		if !strings.Contains(text, w) {
			b.t.Errorf("the page does not show %q:\n%s", w, text)
		}
	}
}

// lacks fails the test if the page shows a text.
func (b *browser) lacks(unwanted ...string) {
	b.t.Helper()
	text := b.text()
	for _, u := range unwanted {
		if strings.Contains(text, u) {
			b.t.Errorf("the page shows %q:\n%s", u, text)
		}
	}
}

// signIn signs in with a token of the development issuer, on the way to a page.
func (b *browser) signIn(token, to string) {
	b.t.Helper()
	b.do(`await page.goto(BASE + '/console/' + TO)
		await page.fill('textarea[name=token]', TOKEN)
		await page.click('main button')
		await page.waitForURL((u) => !u.pathname.startsWith('/console/sign-in'))`, "TOKEN", token, "TO", to)
}
