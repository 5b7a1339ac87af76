package archive

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/authz"
)

// Whoever has a key registers as many nodes with it as they like.
func TestTheNodesOfAKeyTakeTimeInProportion(t *testing.T) {
	register := func(n int) time.Duration {
		var v inventory
		nodes := int64(n)
		if err := v.add(0, &audit.Event{Type: audit.KeyCreated, Org: "acme", Object: "k-1"}); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		for i := range 2 * nodes { // each registers twice
			e := audit.Event{Type: audit.NodeRegistered, Outcome: audit.Success, Org: "acme", Actor: audit.Actor{Kind: authz.Node, ID: "k-1"}, Object: fmt.Sprintf("n-%09d", i%nodes)}
			if err := v.add(1+i, &e); err != nil {
				t.Fatal(err)
			}
		}
		took := time.Since(began)
		if got := v.nodes(v.find("k-1")); int64(len(got)) != nodes || got[nodes-1].Index != nodes {
			t.Fatalf("%d nodes", len(got))
		}
		return took
	}
	inProportion(t, "nodes", register)
}

// Whoever has the service's Vault token imports and exports as often as they like.
func TestExportsToOneNameTakeTimeInProportion(t *testing.T) {
	judge := func(n int) time.Duration {
		f := VaultFile{files: []VaultSpan{{Name: "audit.log"}}}
		took := func(operation, path string, line int) {
			raw := fmt.Sprintf(`{"type":"response","request":{"id":"%d","operation":"%s","path":"orgkeys-sealed/%s"},"response":{"data":{"keys":{}}}}`, line, operation, path)
			if err := f.sealed.entry([]byte(raw), vaultMark{time: int64(line), line: int64(line)}); err != nil {
				t.Fatal(err)
			}
		}
		for i := range n {
			took("update", "keys/r/import", 2*i)
			took("read", fmt.Sprintf("byok-export/r/k-%d/1", i), 2*i+1)
		}
		began := time.Now()
		r := f.sealed.judge(&f)
		spent := time.Since(began)
		last := fmt.Sprintf("under which %d recipients were imported, at audit.log:%d the last", n, 2*n-2)
		if r.Imports != n || r.Exports != n || len(f.bad) != 1 || !strings.Contains(f.bad[0].Error(), last) {
			t.Fatalf("%+v, %v", r, f.bad)
		}
		return spent
	}
	inProportion(t, "exports", judge)
}

// inProportion fails unless 16 times as many things take less than six times 16 times as long.
func inProportion(t *testing.T, things string, take func(n int) time.Duration) {
	t.Helper()
	const few, times = 2000, 16
	var a, b time.Duration
	for range 3 { // the machine may be busy with something else
		if a, b = take(few), take(times*few); b < 6*times*a {
			return
		}
	}
	t.Errorf("%d %s take %v, and %d times as many take %v: more than in proportion", few, things, a, times, b)
}
