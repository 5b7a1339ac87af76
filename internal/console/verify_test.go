package console_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/e2e/harness"
)

// testLog is a log of the test's own: its events, its tree by sumdb/tlog, and its key.
type testLog struct {
	t      *testing.T
	name   string
	public ed25519.PublicKey
	secret ed25519.PrivateKey
	ids    []string
	leaves [][]byte
	hashes hashes
}

type hashes []tlog.Hash

func (h hashes) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	found := make([]tlog.Hash, len(indexes))
	for i, at := range indexes {
		found[i] = h[at]
	}
	return found, nil
}

func newTestLog(t *testing.T, name string, size int) *testLog {
	t.Helper()
	l := &testLog{t: t, name: name}
	var err error
	if l.public, l.secret, err = ed25519.GenerateKey(rand.Reader); err != nil {
		t.Fatal(err)
	}
	for i := range size {
		id := uuid.NewString()
		leaf := fmt.Appendf(nil, `{"v":1,"id":%q,"time":"2026-11-25T04:26:31Z","type":"orgkey.created","note":"é %d"}`, id, i)
		more, err := tlog.StoredHashes(int64(i), leaf, l.hashes)
		if err != nil {
			t.Fatal(err)
		}
		l.ids, l.leaves, l.hashes = append(l.ids, id), append(l.leaves, leaf), append(l.hashes, more...)
	}
	return l
}

// proof is a proof as the API sends it.
type proof struct {
	Format     string   `json:"format"`
	Index      int64    `json:"index"`
	Event      string   `json:"event"`
	Path       []string `json:"path"`
	Checkpoint string   `json:"checkpoint"`
}

// prove is the honest proof of an event in a tree of that size, and the root.
func (l *testLog) prove(index, size int) (proof, tlog.Hash) {
	l.t.Helper()
	path, err := tlog.ProveRecord(int64(size), int64(index), l.hashes)
	if err != nil {
		l.t.Fatal(err)
	}
	root, err := tlog.TreeHash(int64(size), l.hashes)
	if err != nil {
		l.t.Fatal(err)
	}
	p := proof{"orgkeys-proof/1", int64(index), string(l.leaves[index]), []string{}, l.signed(l.name, fmt.Sprint(size), root)}
	for _, h := range path {
		p.Path = append(p.Path, base64.StdEncoding.EncodeToString(h[:]))
	}
	return p, root
}

func checkpointText(origin, size string, root tlog.Hash) string {
	return origin + "\n" + size + "\n" + base64.StdEncoding.EncodeToString(root[:]) + "\n"
}

func (l *testLog) signed(origin, size string, root tlog.Hash) string {
	text := checkpointText(origin, size, root)
	return text + l.line(l.public, text)
}

// line is the signature of a text, under the name of the key that it claims to be by.
func (l *testLog) line(claimed ed25519.PublicKey, text string) string {
	hash := sha256.Sum256(append([]byte(l.name+"\n\x01"), claimed...))
	return "\n— " + l.name + " " + base64.StdEncoding.EncodeToString(append(hash[:4], ed25519.Sign(l.secret, []byte(text))...)) + "\n"
}

func (l *testLog) key() string {
	key, err := note.NewEd25519VerifierKey(l.name, l.public)
	if err != nil {
		l.t.Fatal(err)
	}
	return key
}

// The page believes what the log's key has signed of the event that was asked for, and nothing
// that a server makes up.
func TestPromise15_ForgedProofsDoNotVerify(t *testing.T) {
	t.Parallel()
	s := harness.Start(t)
	b := openBrowser(t, s.API)
	b.signIn(s.Token(t, "acme", "OWNER"), "verify")
	rootsAreThoseOfTlog(t, b)

	const index, size, name = 5, 11, "orgkeys/test"
	l, thief := newTestLog(t, name, size), newTestLog(t, name, size)
	honest, root := l.prove(index, size)
	key := l.key()
	forged := map[string]struct {
		change func(p *proof)
		key    string
		want   string
	}{
		"nothing":              {func(*proof) {}, key, "Verified: the log holds this event, unchanged"},
		"nothing, without key": {func(*proof) {}, "", "Included, but not authenticated"},
		"the event":            {func(p *proof) { p.Event = strings.Replace(p.Event, "created", "deleted", 1) }, key, "the event, or the log, was changed"},
		"white space in it":    {func(p *proof) { p.Event += " " }, key, "the event, or the log, was changed"},
		"another event":        {func(p *proof) { *p, _ = l.prove(index+1, size) }, key, "another event than the one that was asked for"},
		"the place":            {func(p *proof) { p.Index-- }, key, "the event, or the log, was changed"},
		"beyond the end":       {func(p *proof) { p.Index = size }, key, "does not cover the event"},
		"a short path":         {func(p *proof) { p.Path = p.Path[:len(p.Path)-1] }, key, "The proof is too short"},
		"a long path":          {func(p *proof) { p.Path = append(p.Path, p.Path[0]) }, key, "The proof is too long"},
		"a hash":               {func(p *proof) { p.Path = append([]string{p.Path[1]}, p.Path[1:]...) }, key, "the event, or the log, was changed"},
		"no signature":         {func(p *proof) { p.Checkpoint = checkpointText(name, fmt.Sprint(size), root) + "\n" }, key, "not signed by that key"},
		"the signature": {func(p *proof) {
			text := checkpointText(name, fmt.Sprint(size), root)
			p.Checkpoint = text + l.line(l.public, text+"x")
		}, key, "not signed by that key"},
		"the signer, with a key of its own": {func(p *proof) {
			text := checkpointText(name, fmt.Sprint(size), root)
			p.Checkpoint = text + thief.line(thief.public, text)
		}, key, "not signed by that key"},
		"the signer, under the key's hash": {func(p *proof) {
			text := checkpointText(name, fmt.Sprint(size), root)
			p.Checkpoint = text + thief.line(l.public, text)
		}, key, "not signed by that key"},
		"event and root, under the old signature": {func(p *proof) {
			p.Event = strings.Replace(p.Event, "created", "deleted", 1)
			p.Index, p.Path = 0, []string{}
			text := checkpointText(name, fmt.Sprint(size), root)
			p.Checkpoint = checkpointText(name, "1", tlog.RecordHash([]byte(p.Event))) + l.line(l.public, text)
		}, key, "not signed by that key"},
		"event and root, before a text that is signed": {func(p *proof) {
			p.Event = strings.Replace(p.Event, "created", "deleted", 1)
			p.Index, p.Path = 0, []string{}
			p.Checkpoint = checkpointText(name, "1", tlog.RecordHash([]byte(p.Event))) + "\n" + honest.Checkpoint
		}, key, "not signed by that key"},
		"the log":            {func(p *proof) { p.Checkpoint = l.signed("orgkeys/other", fmt.Sprint(size), root) }, key, "of another log than the key"},
		"the size's form":    {func(p *proof) { p.Checkpoint = l.signed(name, "011", root) }, key, "The checkpoint is malformed"},
		"the key":            {func(*proof) {}, thief.key(), "not signed by that key"},
		"the key's hash":     {func(*proof) {}, strings.Replace(key, "+", "+00000000", 1)[:len(name)+9] + key[len(name)+9:], "The verifier key is damaged"},
		"a key that is none": {func(*proof) {}, "BEGIN PUBLIC KEY", "That is no verifier key"},
	}
	b.do(`await context.route('**/console/api/event/*/proof', (r) => r.fulfill({ contentType: 'application/json', body: globalThis.forged }))`)
	for what, c := range forged {
		p := honest
		p.Path = append([]string{}, honest.Path...)
		c.change(&p)
		text, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		var shown string
		b.get(&shown, `globalThis.forged = PROOF
			await page.goto(BASE + '/console/verify?event=' + ID)
			await page.fill('#verify-key', KEY)
			await page.click('#verify-start')
			await page.waitForFunction(() => /^(Verified|Not verified|Included)/.test(document.getElementById('verify-verdict').textContent))
			return await page.locator('#verify-verdict').innerText() + '\n' + await page.locator('#verify-steps').innerText()`, "PROOF", string(text), "ID", l.ids[index], "KEY", c.key)
		if !strings.Contains(shown, c.want) || strings.HasPrefix(shown, "Verified") != strings.HasPrefix(c.want, "Verified") {
			t.Errorf("changed: %s; want %q, and the page shows\n%s", what, c.want, shown)
		}
	}
	if len(forged) < 20 {
		t.Errorf("only %d forgeries", len(forged))
	}
}

// rootsAreThoseOfTlog compares the page's arithmetic with an implementation that shares
// nothing with it, for every event of small trees, and for paths that are wrong.
func rootsAreThoseOfTlog(t *testing.T, b *browser) {
	t.Helper()
	l := newTestLog(t, "orgkeys/test", 17)
	type vector struct {
		Leaf, Root  string
		Index, Size int
		Path        []string
	}
	var all []vector
	for size := 1; size <= len(l.leaves); size++ {
		for index := range size {
			p, root := l.prove(index, size)
			all = append(all, vector{p.Event, base64.StdEncoding.EncodeToString(root[:]), index, size, p.Path})
		}
	}
	text, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	var result struct {
		Good, Bad int
		Wrong     []string
	}
	b.get(&result, `return await page.evaluate(async (vectors) => {
			const { rootOf } = await import(document.querySelector('script').src.replace('console.js', 'verify.js'))
			const bytes = (s) => Uint8Array.from(atob(s), (c) => c.charCodeAt(0))
			const root = async (v) => btoa(String.fromCharCode(...await rootOf(new TextEncoder().encode(v.Leaf), v.Index, String(v.Size), v.Path.map(bytes))))
			const result = { Good: 0, Bad: 0, Wrong: [] }
			for (const v of JSON.parse(vectors)) {
				if (await root(v) === v.Root) result.Good++
				else result.Wrong.push('root of ' + v.Index + ' in ' + v.Size)
				const bad = [{ ...v, Leaf: v.Leaf + ' ' }, { ...v, Path: [...v.Path, v.Root] }, { ...v, Index: v.Size }]
				for (let i = 0; i < v.Path.length; i++) {
					bad.push({ ...v, Path: v.Path.toSpliced(i, 1) }, { ...v, Path: v.Path.with(i, v.Root) }, { ...v, Path: v.Path.toSpliced(i, 0, v.Root) })
				}
				if (v.Index > 0) bad.push({ ...v, Index: v.Index - 1 })
				for (const w of bad) {
					if (await root(w).catch(() => '') === v.Root) result.Wrong.push('accepted ' + JSON.stringify(w))
					else result.Bad++
				}
			}
			return result
		}, VECTORS)`, "VECTORS", string(text))
	if result.Good != 17*18/2 || result.Bad < 1000 || len(result.Wrong) > 0 {
		t.Errorf("%d roots are right, %d wrong paths are refused, and\n%s", result.Good, result.Bad, strings.Join(result.Wrong, "\n"))
	}
}
