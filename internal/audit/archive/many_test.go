package archive_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/archive"
	"github.com/orgkeys/orgkeys/internal/audit/audittest"
	"github.com/orgkeys/orgkeys/internal/authz"
)

// manyNodes is a log of one key with which that many nodes register, and another behind it.
func manyNodes(t *testing.T, nodes int64) *bigLog {
	t.Helper()
	name := func(kind byte, i int64) string {
		id := uuid.UUID{kind}
		binary.BigEndian.PutUint64(id[8:], uint64(i))
		return id.String()
	}
	l := &bigLog{size: nodes + 2, of: func(i int64) audit.Event {
		e := audit.Event{
			ID: name(1, i), Time: time.UnixMicro(1_800_000_000_000_000 + i).UTC(), Outcome: audit.Success, Org: "acme", Request: name(2, i),
			Type: audit.KeyCreated, Actor: audit.Actor{Kind: authz.Person, ID: "u-1"}, Object: name(3, i),
			Detail: map[string]string{"algorithm": "rsa-2048", "backend": "vault"},
		}
		if i > 0 && i <= nodes {
			address := netip.MustParseAddr("2001:db8::").As16()
			binary.BigEndian.PutUint64(address[8:], uint64(i))
			e.Type, e.Actor, e.Object = audit.NodeRegistered, audit.Actor{Kind: authz.Node, ID: name(3, 0)}, name(4, i)
			e.Detail = map[string]string{"ip": netip.AddrFrom16(address).String()}
		}
		return e
	}}
	return l.sign(t)
}

// However many nodes register with a key, whoever keeps it, exports verify.
func TestPromise5_AKeyOfManyNodesVerifies(t *testing.T) {
	l := manyNodes(t, 25_000)
	var out bytes.Buffer
	_, err := archive.Write(t.Context(), &out, l, nil, t.TempDir(), "a test", nil)
	audittest.Must(t, err)
	if line, _, _ := bytes.Cut(unpack(t, out.Bytes()).get(t, "inventory.jsonl"), []byte("\n")); len(line) <= 1<<20 {
		t.Fatalf("the line has %d bytes, so the case proves nothing", len(line))
	}
	report, err := verifyExport(t, out.Bytes(), l.vkey)
	if err != nil || report.Keys != 2 {
		t.Errorf("%d keys, %v", report.Keys, err)
	}
	if said, ok := byPython(t, out.Bytes(), l.vkey); !ok {
		t.Error(said)
	}
	for name, change := range map[string]func([]string) []string{
		"a node altered":    at(0, `"2001:db8::4e20"`, `"2001:db8::4e21"`),
		"the last node cut": at(0, fmt.Sprintf(`,{"node":"%s-0000-0000-0000-0000000061a8","ip":"2001:db8::61a8","index":25000}`, "04000000"), ""),
		"torn":              func(l []string) []string { return []string{l[0], l[1][:50]} },
		"a line behind it":  func(l []string) []string { return append(l, "\n{}") },
		"a long one behind": func(l []string) []string { return append(l, "\n"+strings.Repeat(" ", 3<<20)) },
		"an empty line":     func(l []string) []string { return slices.Insert(l, 1, "\n") },
	} {
		m := unpack(t, out.Bytes())
		m.edit(t, "inventory.jsonl", change)
		m.relist(t)
		if _, err := verifyExport(t, m.pack(t), l.vkey); err == nil {
			t.Errorf("%s: it verifies", name)
		}
	}
}

// Empty lines are no events, and take no place for them.
func TestEmptyLinesTakeNoMemory(t *testing.T) {
	e := audittest.NewSigned(t)
	m := unpack(t, export(t, e))
	m.list[m.find(t, "events.jsonl")].data = bytes.Repeat([]byte("\n"), 8<<20)
	m.relist(t)
	packed := m.pack(t)
	took := allocated(func() {
		if _, err := verifyExport(t, packed, e.VKey(t)); err == nil {
			t.Error("it verifies")
		}
	})
	if took > 8 {
		t.Errorf("%d MiB", took)
	}
}

// Every policy that was in force is exported, for ever: large ones, and many of them. None
// takes memory from the others.
func TestPromise5_ALogOfManyPoliciesVerifies(t *testing.T) {
	const large = 4<<20 - 100 // almost as large as the server loads
	for name, c := range map[string]struct {
		policies, size int
		most           uint64 // MiB that each step allocates, of which each policy takes some as it is read
	}{
		"large": {17, large, 17 * 4 * 6},
		"many":  {300, 100, 32},
	} {
		t.Run(name, func(t *testing.T) {
			e := audittest.NewSigned(t)
			for i := range c.policies {
				files := map[string][]byte{"a.rego": []byte("package orgkeys.authz\n"), "data.json": append(bytes.Repeat([]byte(" "), c.size), fmt.Sprintf(`{"n":%d}`, i)...)}
				audittest.Must(t, e.DB.KeepPolicy(t.Context(), authz.Revision(files), files))
			}
			var packed []byte
			if took := allocated(func() { packed = export(t, e) }); took > c.most {
				t.Errorf("the export takes %d MiB", took)
			}
			took := allocated(func() {
				if _, err := verifyExport(t, packed, e.VKey(t)); err != nil {
					t.Error(err)
				}
			})
			if took > c.most {
				t.Errorf("to verify takes %d MiB", took)
			}
			said, ok := byPython(t, packed, e.VKey(t))
			if !ok || !strings.Contains(said, fmt.Sprintf("the text of %d policies", c.policies+1)) {
				t.Error(said)
			}
		})
	}
}

// The manifest names each file of each policy: one of 200 files that changes each day for a year.
func TestPromise5_ALogOfManyPolicyFilesVerifies(t *testing.T) {
	l := (&bigLog{size: 10, policies: 350}).sign(t)
	var out bytes.Buffer
	_, err := archive.Write(t.Context(), &out, l, nil, t.TempDir(), "a test", nil)
	audittest.Must(t, err)
	if _, err := verifyExport(t, out.Bytes(), l.vkey); err != nil {
		t.Error(err)
	}
}

// What a manifest lists takes no more memory than the manifest itself.
func TestAManifestOfNothingTakesNoMemory(t *testing.T) {
	e := audittest.NewSigned(t)
	m := unpack(t, export(t, e))
	m.list[0].data = bytes.Replace(m.list[0].data, []byte(`"members": [`), []byte(`"members": [`+strings.Repeat("{},", 5<<20)), 1)
	packed := m.pack(t)
	took := allocated(func() {
		if _, err := verifyExport(t, packed, e.VKey(t)); err == nil || !strings.Contains(err.Error(), "not a member of an export") {
			t.Errorf("%.200v", err)
		}
	})
	if took > 20 { // its text is 15 MiB
		t.Errorf("%d MiB", took)
	}
}

// A policy is hashed when its last file was read, so nothing of it comes behind that.
func TestAPolicysFilesFollowOneAnother(t *testing.T) {
	e := audittest.NewSigned(t)
	more := map[string][]byte{"x.rego": []byte("package orgkeys.authz\n"), "y.json": []byte("{}")}
	audittest.Must(t, e.DB.KeepPolicy(t.Context(), authz.Revision(more), more))
	m := unpack(t, export(t, e))
	last := m.find(t, "events.jsonl") - 1
	m.move(t, m.list[last-3].name, last)
	m.relist(t)
	refused(t, m.pack(t), e.VKey(t), -1)
}

// allocated returns how many MiB do allocates.
func allocated(do func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	do()
	runtime.ReadMemStats(&after)
	return (after.TotalAlloc - before.TotalAlloc) >> 20
}
