package audit_test

import (
	"maps"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
)

func leaves(t testing.TB) []string {
	t.Helper()
	small := audit.Event{ID: "e-1", Time: time.Date(2024, 2, 29, 23, 59, 59, 999_999_000, time.UTC), Type: audit.KeysListed, Outcome: audit.Success}
	full := audit.New(audit.NodeRegistered, "acme")
	full.Reason, full.Actor, full.ActorOrg = "quota", audit.Actor{Kind: authz.Person, ID: "u-1"}, "acme"
	full.Roles, full.Action, full.Object = []authz.Role{"a", "b"}, "orgkey.list", "n-1"
	full.Request, full.Policy, full.Scope = "r-1", "sha256:00", "own"
	full.Detail = map[string]string{"ip": "192.0.2.7", "a": "", "z": "<&>"}
	full.Personal = audit.Personal{Name: "N. N."}
	var all []string
	for _, e := range []audit.Event{small, full} {
		r, err := e.Encode()
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, string(r.Leaf))
	}
	return all
}

// What is written usually takes the short way.
func TestScanReadsWhatIsEncoded(t *testing.T) {
	for _, leaf := range leaves(t) {
		var e audit.Event
		if n, ok := audit.Scan(leaf+`,"receipts":{}}`, &e, nil); !ok || n != len(leaf) {
			t.Errorf("%d bytes of %d, %v: %s", n, len(leaf), ok, leaf)
		}
		checkScan(t, leaf)
	}
}

// checkScan checks that Decode reads what Scan reads, and to the same event.
func checkScan(t *testing.T, text string) {
	t.Helper()
	held := map[string]string{"of an earlier": "event"}
	e := audit.Event{Roles: []authz.Role{"earlier"}, Reason: "earlier"}
	n, ok := audit.Scan(text, &e, held)
	if !ok {
		return
	}
	want, err := audit.Decode([]byte(text[:n]))
	if err != nil {
		t.Fatalf("read although %v: %s", err, text[:n])
	}
	if !maps.Equal(e.Detail, want.Detail) || len(e.Detail) == 0 != (len(want.Detail) == 0) {
		t.Fatalf("detail %v, want %v", e.Detail, want.Detail)
	}
	e.Detail, want.Detail = nil, nil
	if !reflect.DeepEqual(e, want) {
		t.Fatalf("%+v, want %+v, of %s", e, want, text[:n])
	}
	if c := want.Clone(); !reflect.DeepEqual(c, want) {
		t.Fatalf("a copy is %+v, want %+v", c, want)
	}
}

// What encoding/json refuses or reads differently must not be read.
func TestScanLeavesTheUnusualToDecode(t *testing.T) {
	for _, c := range [][2]string{
		{`"v":1`, `"v":1,"v":1`}, {`"v":1`, `"v":2`}, {`"v":1`, `"v": 1`}, {`,"org"`, `,"x":"","org"`}, {`,"org":"acme"`, `,"org":"acme","org":"acme"`},
		{`"a":""`, `"a":"","a":""`}, {`"a":""`, `"b":"","a":""`}, {`acme`, `ac\u006de`}, {`acme`, "ac\x01me"}, {`acme`, "ac\xffme"}, {`acme`, "ac\u00e9me"},
		{`"roles":["a","b"]`, `"roles":[]`}, {`"roles":["a","b"]`, `"roles":["a",]`}, {`"detail":{`, `"detail":{"":1,`}, {`}`, `,}`},
		{`"scope":"own"`, `"scope":null`},
	} {
		text := strings.Replace(leaves(t)[1], c[0], c[1], 1)
		if n, ok := audit.Scan(text, new(audit.Event), nil); ok || text == leaves(t)[1] {
			t.Errorf("%d bytes read of %s", n, text)
		}
	}
	for _, at := range []string{"2023-02-29T23:59:59.999999Z", "2024-00-29T23:59:59.999999Z", "2024-13-01T23:59:59.999999Z", "2024-02-00T23:59:59.999999Z", "2024-04-31T00:00:00.000000Z",
		"2024-02-29T24:00:00.000000Z", "2024-02-29T23:60:59.999999Z", "2024-02-29T23:59:60.999999Z", "2024-02-29T23:59:59,999999Z", "2024-02-29T23:59:59.99999Z", "2024-02-29 23:59:59.999999Z"} {
		text := strings.Replace(leaves(t)[0], "2024-02-29T23:59:59.999999Z", at, 1)
		if _, ok := audit.Scan(text, new(audit.Event), nil); ok {
			t.Errorf("%s is read", at)
		}
	}
}

func FuzzScan(f *testing.F) {
	for _, leaf := range leaves(f) {
		f.Add(leaf)
		f.Add(strings.Replace(leaf, "2024-02-29", "2100-02-29", 1))
		f.Add(strings.Replace(leaf, `"v":1`, `"v":1,"v":1`, 1))
	}
	f.Fuzz(checkScan)
}

// Receipts are read the same way as by encoding/json, or not at all.
func FuzzScanReceipts(f *testing.F) {
	f.Add(`{"vault":"vault:v1:AAAA"}`)
	f.Add(`{"a":"","b":"x"}}`)
	f.Add(`{"a":"","a":"x"}`)
	f.Fuzz(func(t *testing.T, text string) {
		got, n, ok := audit.ScanReceipts(text)
		if !ok {
			return
		}
		if want := strictStrings(t, text[:n]); !maps.Equal(got, want) {
			t.Fatalf("%q, want %q", got, want)
		}
	})
}

func strictStrings(t *testing.T, text string) map[string]string {
	t.Helper()
	var m map[string]string
	if err := json.Unmarshal([]byte(text), &m); err != nil {
		t.Fatalf("read although %v: %s", err, text)
	}
	return m
}
