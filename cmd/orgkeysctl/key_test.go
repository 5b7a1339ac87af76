package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/orgkeys/orgkeys/client"
	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// wantKey fails the test unless the file holds the one key that the organization
// has, readable by its owner alone.
func wantKey(t *testing.T, p *person, path string) *client.Key {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	private := harness.ParsePrivate(t, text)
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	keys, err := server.Client(t, p.org, "OWNER").Keys(t.Context(), p.org)
	if err != nil || len(keys) != 1 {
		t.Fatalf("%d keys, %v; want one", len(keys), err)
	}
	if client.Fingerprint(&private.PublicKey) != keys[0].Fingerprint {
		t.Error("the file holds another key than the list")
	}
	return &keys[0]
}

func TestAKeyIsSealedToThisMachine(t *testing.T) {
	t.Parallel()
	p := owner(t)
	out := p.does("key", "create", "--out", "key.pem")
	looksLike(t, "key-create", p.home, out)
	key := wantKey(t, p, p.path("key.pem"))
	p.only("session", "arrival")
	p.noArrival()

	// What the service stored says that the key was sealed, and received.
	db := server.Database(t)
	if n := harness.Number(t, db, `SELECT count(*) FROM deliveries WHERE key_id = ? AND stage = 'received' AND wrapped IS NULL`, key.ID); n != 1 {
		t.Errorf("%d received deliveries of the key", n)
	}
	p.env = append(p.env, "ORGKEYSCTL_SCOPE=openid") // a login's, and not that of keys
	looksLike(t, "key-list", p.home, p.does("key", "list"))
	if out := p.does("key", "list", "--scope", "node"); out != "no keys\n" {
		t.Errorf("node keys: %s", out)
	}
	p.fails(exitUsage, `"pigeon", neither organization nor node`, "key", "list", "--scope", "pigeon")
	looksLike(t, "key-show", p.home, p.does("key", "show", key.ID))
	looksLike(t, "key-list-json", p.home, p.does("key", "list", "--json"))
	p.fails(exitNotFound, "has no key", "key", "show", "nonsense")

	p.fails(exitUsage, "names organization", "key", "delete", "--all", "other")
	p.fails(exitUsage, "takes the keys' IDs", "key", "delete")
	looksLike(t, "key-delete", p.home, p.does("key", "delete", key.ID))
	p.fails(exitNotFound, "key_not_found", "key", "delete", key.ID)
	looksLike(t, "key-list-none", p.home, p.does("key", "list"))
	p.does("key", "create", "--out", "again.pem", "--json")
	p.does("key", "delete", "--all", p.org)
	looksLike(t, "key-list-none", p.home, p.does("key", "list"))
}

// noArrival fails the test if a recipient is left.
func (p *person) noArrival() {
	p.t.Helper()
	entries, err := os.ReadDir(p.path(".config/orgkeysctl"))
	if err != nil {
		p.t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "arrival-") && !strings.HasSuffix(e.Name(), ".lock") {
			p.t.Errorf("%s is left after the receipt", e.Name())
		}
	}
}

func TestAFileIsNeverOverwritten(t *testing.T) {
	t.Parallel()
	p := owner(t)
	if err := os.WriteFile(p.path("key.pem"), []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, more := range [][]string{nil, {"--plain"}} {
		p.fails(exitCannotWrite, "is there already, and is not overwritten", append([]string{"key", "create", "--out", "key.pem"}, more...)...)
		p.fails(exitCannotWrite, "could not be written", append([]string{"key", "create", "--out", "none/key.pem"}, more...)...)
	}
	p.fails(exitCannotWrite, "is there already", "enrollment", "create", "--token-out", "key.pem")
	if text, err := os.ReadFile(p.path("key.pem")); err != nil || string(text) != "precious" {
		t.Errorf("the file holds %q, %v", text, err)
	}
	if keys := server.List(t, p.org); len(keys) != 0 {
		t.Errorf("%d keys were made for files that could not be written", len(keys))
	}
	if entries, err := os.ReadDir(p.home); err != nil || len(entries) != 2 { // key.pem, .config
		t.Errorf("left: %v, %v", entries, err)
	}
}

func TestAPlainKey(t *testing.T) {
	t.Parallel()
	p := owner(t)
	looksLike(t, "key-create-plain", p.home, p.does("key", "create", "--plain", "--out", "key.pem"))
	wantKey(t, p, p.path("key.pem"))
}

// cutter is what stands between a person and the shared server, and cuts one
// answer off after some bytes of its body.
type cutter struct {
	path  string // the end of the request's path
	after int    // bytes of the body that get through; -1: the request does not even get there
	cut   atomic.Bool
}

func (c *cutter) start(t *testing.T) string {
	t.Helper()
	to, err := url.Parse(server.API)
	if err != nil {
		t.Fatal(err)
	}
	// One of its own: the end of another test's server closes connections of the default one.
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	forward := &httputil.ReverseProxy{Transport: transport, Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(to) }}
	between := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// net/http closes the body when the answer begins. If the proxy has not read its
		// end by then, it takes that for a failure and cuts the answer off.
		body, err := io.ReadAll(r.Body)
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		if r.Method != http.MethodPost || !strings.HasSuffix(r.URL.Path, c.path) || c.cut.Swap(true) {
			forward.ServeHTTP(w, r)
			return
		}
		if c.after < 0 {
			panic(http.ErrAbortHandler)
		}
		whole := httptest.NewRecorder()
		forward.ServeHTTP(whole, r)
		answer := whole.Body.Bytes()
		for name, values := range whole.Header() {
			w.Header()[name] = values
		}
		w.WriteHeader(whole.Code)
		_, _ = w.Write(answer[:min(c.after, len(answer))])
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}))
	t.Cleanup(between.Close)
	return between.URL
}

// Wherever the connection is cut, the same command run again ends with the same
// key, in one place of the quota.
func TestACutConnectionIsNoLostKey(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]*cutter{
		"before the request":   {path: "/key", after: -1},
		"before the key":       {path: "/key", after: 0},
		"within the key":       {path: "/key", after: 1000},
		"before the receipt":   {path: "/receipt", after: -1},
		"the receipt's answer": {path: "/receipt", after: 0},
		"within that of it":    {path: "/receipt", after: 10},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := owner(t)
			through := c.start(t)
			p.server = through
			p.logIn("OWNER")
			p.fails(exitUnavailable, "", "key", "create", "--out", "key.pem")
			if !c.cut.Load() {
				t.Fatal("nothing was cut")
			}
			before := server.List(t, p.org)
			out := p.does("key", "create", "--out", "key.pem", "--json")
			key := wantKey(t, p, p.path("key.pem"))
			if len(before) > 1 || len(before) == 1 && before[0].ID != key.ID || c.after >= 0 && len(before) == 0 {
				t.Errorf("keys after the cut: %+v; after the next run %s", before, key.ID)
			}
			var m made
			if err := json.Unmarshal([]byte(out), &m); err != nil || m.ID != key.ID || m.Fingerprint != key.Fingerprint || !m.Sealed {
				t.Errorf("it says %s, %v", out, err)
			}
			p.noArrival()
			db := server.Database(t)
			if n := harness.Number(t, db, `SELECT count(*) FROM deliveries WHERE org_id = ? AND stage = 'received'`, p.org); n != 1 {
				t.Errorf("%d received deliveries", n)
			}
		})
	}
}

// A key that was withdrawn or deleted before its receipt is said to be, and the
// next run makes another.
func TestAKeyThatIsGoneBeforeItsReceipt(t *testing.T) {
	t.Parallel()
	p := owner(t)
	p.server = (&cutter{path: "/receipt", after: -1}).start(t)
	p.logIn("OWNER")
	p.fails(exitUnavailable, "run the same command again", "key", "create", "--out", "key.pem")
	p.does("key", "delete", wantKey(t, p, p.path("key.pem")).ID)
	p.fails(exitRefused, "withdrew or deleted key", "key", "create", "--out", "key.pem")
	p.noArrival()
	p.fails(exitCannotWrite, "is there already", "key", "create", "--out", "key.pem")
	p.does("key", "create", "--out", "other.pem")
	wantKey(t, p, p.path("other.pem"))
}

// What may exist although nobody has it is said to programs, too.
func TestProgramsHearOfWhatMayBeLost(t *testing.T) {
	t.Parallel()
	for path, c := range map[string]struct {
		want string
		args []string
	}{
		"/key":        {`"orgkeysctl key list" shows it`, []string{"key", "create", "--plain", "--out", "key.pem"}},
		"/enrollment": {`"orgkeysctl enrollment list" shows it`, []string{"enrollment", "create"}},
		"/receipt":    {"run the same command again", []string{"key", "create", "--out", "key.pem"}},
	} {
		p := owner(t)
		p.server = (&cutter{path: path}).start(t)
		p.logIn("OWNER")
		p.fails(exitUnavailable, c.want, append(c.args, "--json")...)
	}
	// Where nothing was sent, nothing is lost.
	closed := httptest.NewServer(nil)
	closed.Close()
	untrusted := httptest.NewTLSServer(nil)
	defer untrusted.Close()
	for _, at := range []string{closed.URL, untrusted.URL} {
		p := newcomer(t, at)
		p.logIn("OWNER")
		if code, _, log := p.run("", "key", "create", "--plain", "--out", "key.pem"); code != exitUnavailable || strings.Contains(log, "there may be") {
			t.Errorf("%s: %d, %s", at, code, log)
		}
	}
}

// A receipt that was taken, and the file moved: the next run has another key, and says so.
func TestAnotherKeyThanTheInterruptedRuns(t *testing.T) {
	t.Parallel()
	p := owner(t)
	p.server = (&cutter{path: "/receipt"}).start(t)
	p.logIn("OWNER")
	p.fails(exitUnavailable, "before you move it", "key", "create", "--out", "key.pem")
	first := wantKey(t, p, p.path("key.pem"))
	if err := os.Rename(p.path("key.pem"), p.path("moved.pem")); err != nil {
		t.Fatal(err)
	}
	code, out, log := p.run("", "key", "create", "--out", "key.pem", "--json")
	var second made
	if err := json.Unmarshal([]byte(out), &second); code != 0 || err != nil || second.ID == first.ID {
		t.Fatalf("%d, %v, %s%s", code, err, out, log)
	}
	if !strings.Contains(log, first.ID) || !strings.Contains(log, "this is another one, "+second.ID) {
		t.Errorf("it does not say that there are two keys: %s", log)
	}
}

// What is wrong with a file of its own is not told as the server's.
func TestFilesOfItsOwnAreNotTheServers(t *testing.T) {
	t.Parallel()
	p := owner(t)
	p.does("key", "create", "--out", "key.pem")
	locks, err := filepath.Glob(p.path(".config/orgkeysctl/arrival-*.lock"))
	if err != nil || len(locks) != 1 {
		t.Fatalf("%v %v", locks, err)
	}
	if err := errors.Join(os.Remove(locks[0]), os.Mkdir(locks[0], 0o700)); err != nil {
		t.Fatal(err)
	}
	p.fails(exitCannotWrite, "arrival-", "key", "create", "--out", "second.pem")
	if err := os.Remove(locks[0]); err != nil {
		t.Fatal(err)
	}

	// The recipient cannot be removed, once the receipt is there.
	to, err := url.Parse(server.API)
	if err != nil {
		t.Fatal(err)
	}
	forward := &httputil.ReverseProxy{Transport: &http.Transport{DisableKeepAlives: true}, Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(to) }}
	between := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/receipt") {
			arrivals, err := filepath.Glob(p.path(".config/orgkeysctl/arrival-*.json"))
			if err != nil || len(arrivals) != 1 {
				t.Errorf("%v %v", arrivals, err)
			}
			for _, of := range arrivals {
				if err := errors.Join(os.Remove(of), os.MkdirAll(filepath.Join(of, "full"), 0o700)); err != nil {
					t.Error(err)
				}
			}
		}
		forward.ServeHTTP(w, r)
	}))
	defer between.Close()
	p.server = between.URL
	p.logIn("OWNER")
	p.fails(exitCannotWrite, "is in "+p.path("third.pem")+", and its recipient", "key", "create", "--out", "third.pem")

	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	for _, more := range [][]string{nil, {"--json"}} {
		cmd := p.command(t.Context(), append([]string{"key", "list"}, more...)...)
		var log bytes.Buffer
		cmd.Stdout, cmd.Stderr = full, &log
		if err := cmd.Run(); cmd.ProcessState.ExitCode() != exitCannotWrite || strings.Contains(log.String(), "cannot be reached") {
			t.Errorf("%q: %v, %s", more, err, &log)
		}
	}
}

// Two at once wait for each other, and each ends with a key of its own.
func TestTwoCreateKeysAtOnce(t *testing.T) {
	t.Parallel()
	p := owner(t)
	results := make(chan string, 2)
	for _, name := range []string{"a.pem", "b.pem"} {
		go func() {
			out, err := p.command(t.Context(), "key", "create", "--out", name, "--json").Output()
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			results <- string(out)
		}()
	}
	if first, second := <-results, <-results; first == second {
		t.Error("both have the same key")
	}
	if keys := server.List(t, p.org); len(keys) != 2 {
		t.Errorf("%d keys", len(keys))
	}
	p.noArrival()
}

// What a hostile server, or a hostile text in a good one, says reaches a
// terminal as text alone.
func TestHostileTextsAreShownAsText(t *testing.T) {
	t.Parallel()
	const note = "\x1b]0;owned\x07\u202egnp.exe\u009b31m\r\nENROLLED fine \xff"
	quoted := func(text string) []byte {
		b, _ := json.Marshal(text)
		return b
	}
	stub := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("X-Request-Id", "r")
		if strings.HasSuffix(r.URL.Path, "/secret") {
			w.WriteHeader(http.StatusForbidden)
			_, _ = io.WriteString(w, `{"success":false,"errorCode":"insufficient_role","requestId":"r","message":`+string(quoted(note))+`}`)
			return
		}
		_, _ = io.WriteString(w, `{"success":true,"total":1,"data":[{"id":"a","state":"open","scope":"node","status":`+string(quoted(note))+`,"note":`+string(quoted(note))+
			`,"uses":1,"createdAt":"2026-01-02T03:04:05Z","expiresAt":"2026-01-02T03:04:05Z","claims":[]}]}`)
	}))
	defer stub.Close()
	p := newcomer(t, stub.URL)
	p.logIn("OWNER")
	_, _, refused := p.run("", "secret", "list")
	for name, out := range map[string]string{
		"hostile-enrollments": p.does("enrollment", "list"), "hostile-nodes": p.does("node", "list"),
		"hostile-nodes-json": p.does("node", "list", "--json"), "hostile-refusal": refused,
	} {
		if strings.ContainsFunc(out, func(c rune) bool { return c != '\n' && (c < ' ' || c >= 0x7f && c < 0xa0 || c == '\u202e') }) {
			t.Errorf("%s has control characters: %q", name, out)
		}
		looksLike(t, name, p.home, strings.ReplaceAll(out, stub.URL, "http://127.0.0.1:3000"))
	}
}
