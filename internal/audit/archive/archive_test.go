package archive_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	jsonv2 "github.com/go-json-experiment/json"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/archive"
	"github.com/orgkeys/orgkeys/internal/audit/audittest"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/authz"
	"github.com/orgkeys/orgkeys/internal/sqlstore"
)

// export returns an export of the log.
func export(t *testing.T, e audittest.SignedLog) []byte {
	t.Helper()
	var out bytes.Buffer
	if _, err := archive.Write(t.Context(), &out, e.DB, nil, t.TempDir(), "a test", nil); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// byPython has the independent implementation verify an export. It returns what
// that says and whether it verified.
func byPython(t *testing.T, packed []byte, keys ...string) (string, bool) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "export.tar.gz")
	if err := os.WriteFile(path, packed, 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"../../../contrib/verify_export.py", path}
	for _, key := range keys {
		args = append(args, "--key", key)
	}
	cmd := exec.Command("python3", args...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("python3 is needed: %v", err)
	}
	said := string(out)
	begins := map[int]string{1: "wrong: ", 3: "verified: ", 4: "not judged: "}[cmd.ProcessState.ExitCode()]
	if begins == "" || !strings.HasPrefix(said, begins) {
		t.Fatalf("the independent implementation broke down: %v\n%s", err, said)
	}
	return said, cmd.ProcessState.ExitCode() == 3
}

func verifyExport(t *testing.T, packed []byte, keys ...string) (archive.Report, error) {
	t.Helper()
	return archive.Verify(t.Context(), bytes.NewReader(packed), keys, archive.Outside{}, nil)
}

func TestAnExportVerifiesWithNothingButTheKey(t *testing.T) {
	e := audittest.NewSigned(t)
	packed := export(t, e)
	report, err := verifyExport(t, packed, e.VKey(t))
	if err != nil {
		t.Fatal(err)
	}
	if report.Manifest.Size != 40 || report.Checkpoints != 4 || report.Receipts != 10 || report.Keys != 3 {
		t.Errorf("report %+v", report)
	}
	said, ok := byPython(t, packed, e.VKey(t))
	if root, _ := base64.StdEncoding.DecodeString(report.Manifest.Root); !ok || !strings.HasPrefix(said, fmt.Sprintf("verified: 40 events, 3 keys, root %x\n", root)) || !strings.Contains(said, "truncation not excluded") {
		t.Errorf("the independent implementation says %q", said)
	}
}

func TestTheSameLogExportsToTheSameBytes(t *testing.T) {
	e := audittest.NewSigned(t)
	if !bytes.Equal(export(t, e), export(t, e)) {
		t.Error("two exports differ")
	}
}

func TestAnExportEndsWithTheNewestSignedCheckpoint(t *testing.T) {
	e := audittest.NewSigned(t)
	e.Add(t, 3)
	report, err := verifyExport(t, export(t, e), e.VKey(t))
	if err != nil || report.Manifest.Size != 40 {
		t.Errorf("%d events, %v; 40 are signed", report.Manifest.Size, err)
	}
}

func TestALogWithoutSignedCheckpointIsNotExported(t *testing.T) {
	l := audittest.New(t)
	if _, err := archive.Write(t.Context(), io.Discard, l.DB, nil, t.TempDir(), "a test", nil); !errors.Is(err, archive.ErrNotSigned) {
		t.Errorf("%v", err)
	}
}

func TestTheInventoryTellsEachKeysLife(t *testing.T) {
	e := audittest.NewSigned(t)
	members := unpack(t, export(t, e))
	var lives []archive.Life
	for line := range bytes.Lines(members.get(t, "inventory.jsonl")) {
		var life archive.Life
		if err := json.Unmarshal(line, &life); err != nil {
			t.Fatal(err)
		}
		lives = append(lives, life)
	}
	if len(lives) != 3 {
		t.Fatalf("%d keys", len(lives))
	}
	k1, k2, k3 := lives[0], lives[1], lives[2]
	switch {
	case k1.Key != "k-1" || k1.Org != "acme" || k1.GeneratedIn != "pkcs11" || k1.Created.Actor != "u-1" || k1.Created.Policy != e.Policy || k1.Created.Index != 30:
		t.Errorf("created: %+v %+v", k1, k1.Created)
	case k1.Delivered == nil || k1.Delivered.Index != 31:
		t.Errorf("delivered: %+v", k1.Delivered)
	case len(k1.Nodes) != 2 || k1.Nodes[0].Node != "n-1" || k1.Nodes[1].Index != 33 || k1.Nodes[1].IP != "192.0.2.7":
		t.Errorf("nodes: %+v", k1.Nodes)
	case k1.LastUse == nil || k1.LastUse.Type != audit.SecretsFetched || k1.LastUse.Index != 36:
		t.Errorf("last use: %+v", k1.LastUse)
	case k1.Ended == nil || k1.Ended.Type != audit.KeyDeleted || k1.Ended.Index != 37:
		t.Errorf("ended: %+v", k1.Ended)
	case k2.Delivered != nil || k2.Ended == nil || k2.Ended.Type != audit.KeyWithdrawn:
		t.Errorf("withdrawn: %+v", k2)
	case k3.Ended != nil || len(k3.Nodes) != 1:
		t.Errorf("in use: %+v", k3)
	}
}

type member struct {
	name string
	data []byte
}

// members is an unpacked export, for tampering.
type members struct{ list []member }

func unpack(t *testing.T, packed []byte) *members {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		t.Fatal(err)
	}
	m, in := &members{}, tar.NewReader(z)
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return m
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}
		m.list = append(m.list, member{h.Name, data})
	}
}

func (m *members) find(t *testing.T, suffix string) int {
	t.Helper()
	for i, x := range m.list {
		if strings.HasSuffix(x.name, suffix) {
			return i
		}
	}
	t.Fatalf("no %s", suffix)
	return 0
}

func (m *members) get(t *testing.T, suffix string) []byte {
	t.Helper()
	return m.list[m.find(t, suffix)].data
}

// edit replaces a member's lines by what change makes of them.
func (m *members) edit(t *testing.T, suffix string, change func(lines []string) []string) {
	t.Helper()
	i := m.find(t, suffix)
	before := string(m.list[i].data)
	after := strings.Join(change(strings.SplitAfter(strings.TrimSuffix(before, "\n"), "\n")), "")
	if after == before {
		t.Fatal("the case changes nothing, so it proves nothing")
	}
	if !strings.HasSuffix(after, "\n") {
		after += "\n"
	}
	m.list[i].data = []byte(after)
}

func (m *members) remove(t *testing.T, suffix string) {
	t.Helper()
	i := m.find(t, suffix)
	m.list = append(m.list[:i:i], m.list[i+1:]...)
}

// manifest changes the manifest.
func (m *members) manifest(t *testing.T, change func(*archive.Manifest)) {
	t.Helper()
	var x archive.Manifest
	if err := json.Unmarshal(m.list[0].data, &x); err != nil {
		t.Fatal(err)
	}
	change(&x)
	var err error
	if m.list[0].data, err = json.Marshal(x); err != nil {
		t.Fatal(err)
	}
}

// relist makes the manifest fit the members, as a forger does.
func (m *members) relist(t *testing.T) {
	t.Helper()
	m.manifest(t, func(x *archive.Manifest) {
		x.Members = nil
		for _, f := range m.list[1:] {
			sum := sha256.Sum256(f.data)
			x.Members = append(x.Members, archive.Member{Name: f.name, Size: int64(len(f.data)), SHA256: hex.EncodeToString(sum[:])})
		}
	})
}

// move puts a member into another place.
func (m *members) move(t *testing.T, suffix string, to int) {
	t.Helper()
	moved := m.list[m.find(t, suffix)]
	m.remove(t, suffix)
	m.list = slices.Insert(m.list, to, moved)
}

func (m *members) pack(t *testing.T) []byte { return m.packWith(t, nil) }

// packWith has something behind the end of the tar archive.
func (m *members) packWith(t *testing.T, behind []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	w := tar.NewWriter(z)
	for _, f := range m.list {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: f.name, Size: int64(len(f.data)), Mode: 0o600, Format: tar.FormatPAX}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(f.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	_, err := z.Write(behind)
	if err := errors.Join(err, z.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// at replaces old by new in line i.
func at(i int, old, new string) func([]string) []string {
	return func(lines []string) []string {
		lines[i] = strings.Replace(lines[i], old, new, 1)
		return lines
	}
}

// signWith replaces the newest checkpoint by one of the given leaves, signed by s.
func (m *members) signWith(t *testing.T, s audit.LocalSigner, origin string, leaves [][]byte) {
	t.Helper()
	_, root, err := audit.Grow(0, leaves, nil)
	if err != nil {
		t.Fatal(err)
	}
	c := audit.Checkpoint{Origin: origin, Size: int64(len(leaves)), Root: root}
	signed := noteBy(t, s, c)
	line, err := json.Marshal(map[string]string{"checkpoint": signed})
	if err != nil {
		t.Fatal(err)
	}
	m.list[m.find(t, "checkpoints.jsonl")].data = append(line, '\n')
	m.manifest(t, func(x *archive.Manifest) {
		x.Size, x.Root = c.Size, base64.StdEncoding.EncodeToString(root[:])
	})
}

func noteBy(t *testing.T, s audit.LocalSigner, c audit.Checkpoint) string {
	t.Helper()
	seed := append([]byte{1}, s.Private.Seed()...)
	vkey, err := audit.VerifierKey(c.Origin, s.Private.Public().(ed25519.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	hash := strings.Split(vkey, "+")[1]
	signer, err := note.NewSigner("PRIVATE+KEY+" + c.Origin + "+" + hash + "+" + base64.StdEncoding.EncodeToString(seed))
	if err != nil {
		t.Fatal(err)
	}
	signed, err := note.Sign(&note.Note{Text: c.Text()}, signer)
	if err != nil {
		t.Fatal(err)
	}
	return string(signed)
}

func (m *members) leaves(t *testing.T) [][]byte {
	t.Helper()
	var all [][]byte
	for line := range bytes.Lines(m.get(t, "events.jsonl")) {
		var l struct{ Event json.RawMessage }
		if err := json.Unmarshal(line, &l); err != nil {
			t.Fatal(err)
		}
		all = append(all, l.Event)
	}
	return all
}

// Each forger fits the manifest to what was changed, unless the case says otherwise.
func TestTamperedExportsAreRefusedByBothImplementations(t *testing.T) {
	e := audittest.NewSigned(t)
	packed, key := export(t, e), e.VKey(t)
	origin := strings.Split(key, "+")[0]
	mallory := audittest.NewSigner(t)
	for _, c := range []struct {
		name   string
		tamper func(t *testing.T, m *members)
		index  int64 // of the first thing wrong, as ours names it
	}{
		{"an event altered", func(t *testing.T, m *members) { m.edit(t, "events.jsonl", at(12, "u-1", "u-2")) }, 29},
		{"an event of a later checkpoint altered", func(t *testing.T, m *members) { m.edit(t, "events.jsonl", at(32, "192.0.2.7", "192.0.2.8")) }, 32},
		{"white space in a leaf", func(t *testing.T, m *members) { m.edit(t, "events.jsonl", at(12, `"v":1`, `"v": 1`)) }, 29},
		{"an event dropped, the others renumbered", func(t *testing.T, m *members) {
			m.edit(t, "events.jsonl", func(lines []string) []string { return renumber(append(lines[:12:12], lines[13:]...)) })
		}, 29},
		{"an event dropped", func(t *testing.T, m *members) {
			m.edit(t, "events.jsonl", func(lines []string) []string { return append(lines[:12:12], lines[13:]...) })
		}, 12},
		{"an event inserted", func(t *testing.T, m *members) {
			m.edit(t, "events.jsonl", func(lines []string) []string {
				return renumber(append(append(lines[:12:12], lines[3]), lines[12:]...))
			})
		}, 29},
		{"two events swapped", func(t *testing.T, m *members) {
			m.edit(t, "events.jsonl", func(lines []string) []string {
				lines[12], lines[20] = lines[20], lines[12]
				return renumber(lines)
			})
		}, 29},
		{"the newest event cut off", func(t *testing.T, m *members) {
			m.edit(t, "events.jsonl", func(lines []string) []string { return lines[:39] })
		}, 39},
		{"the newest event cut off, the manifest says so", func(t *testing.T, m *members) {
			m.edit(t, "events.jsonl", func(lines []string) []string { return lines[:39] })
			m.manifest(t, func(x *archive.Manifest) { x.Size = 39 })
		}, -1},
		{"an event appended", func(t *testing.T, m *members) {
			m.edit(t, "events.jsonl", func(lines []string) []string { return renumber(append(lines, "\n"+lines[3])) })
		}, 40},
		{"a line with a field that is not known", func(t *testing.T, m *members) { m.edit(t, "events.jsonl", at(12, "}\n", `,"x":1}`+"\n")) }, 12},
		{"a member twice in an event", func(t *testing.T, m *members) { m.edit(t, "events.jsonl", at(12, `{"v":1,`, `{"v":1,"v":1,`)) }, 12},
		{"a member of an event that is not known", func(t *testing.T, m *members) { m.edit(t, "events.jsonl", at(12, `{"v":1,`, `{"v":1,"x":1,`)) }, 12},
		{"a detail twice", func(t *testing.T, m *members) {
			m.edit(t, "events.jsonl", at(32, `"detail":{`, `"detail":{"ip":"192.0.2.7",`))
		}, 32},
		{"a line with its index twice", func(t *testing.T, m *members) {
			m.edit(t, "events.jsonl", at(12, `{"index":12`, `{"index":12,"index":12`))
		}, 12},
		{"a line with two receipts of one sink", func(t *testing.T, m *members) {
			m.edit(t, "events.jsonl", at(31, `"receipts":{`, `"receipts":{"vault":"vault:v1:AAAA",`))
		}, 31},
		{"a line without its index", func(t *testing.T, m *members) { m.edit(t, "events.jsonl", at(12, `"index":12,`, ``)) }, 12},
		{"everything rewritten, signed by another key", func(t *testing.T, m *members) {
			m.edit(t, "events.jsonl", at(12, "u-1", "u-2"))
			m.signWith(t, mallory, origin, m.leaves(t))
		}, -1},
		{"no checkpoint", func(t *testing.T, m *members) { m.list[m.find(t, "checkpoints.jsonl")].data = nil }, -1},
		{"a checkpoint's root altered", func(t *testing.T, m *members) {
			_, root, err := audit.Grow(0, m.leaves(t)[:3], nil)
			if err != nil {
				t.Fatal(err)
			}
			m.edit(t, "checkpoints.jsonl", at(3, m.root(t), base64.StdEncoding.EncodeToString(root[:])))
		}, -1},
		{"an old checkpoint replaced by one of another tree, signed by another key", func(t *testing.T, m *members) {
			signed, err := json.Marshal(map[string]string{"checkpoint": noteBy(t, mallory, audit.Checkpoint{Origin: origin, Size: 30, Root: tlog.RecordHash(nil)})})
			if err != nil {
				t.Fatal(err)
			}
			m.edit(t, "checkpoints.jsonl", func(lines []string) []string { lines[0] = string(signed) + "\n"; return lines })
		}, -1},
		{"the checkpoint of another log, signed by the same key", func(t *testing.T, m *members) { m.signWith(t, e.Signer, "orgkeys/other", m.leaves(t)) }, -1},
		{"checkpoints out of order", func(t *testing.T, m *members) {
			m.edit(t, "checkpoints.jsonl", func(lines []string) []string {
				return []string{lines[1], lines[0], lines[2], lines[3]}
			})
		}, -1},
		{"a receipt altered", func(t *testing.T, m *members) { m.edit(t, "events.jsonl", at(31, `"vault:v1:`, `"vault:v1:AAAA`)) }, 31},
		{"two receipts exchanged", func(t *testing.T, m *members) {
			m.edit(t, "events.jsonl", func(lines []string) []string {
				const mark = `,"receipts":`
				a, b, _ := strings.Cut(lines[31], mark)
				c, d, _ := strings.Cut(lines[32], mark)
				lines[31], lines[32] = a+mark+d, c+mark+b
				return lines
			})
		}, 31},
		{"a receipt by another key, listed among the keys", func(t *testing.T, m *members) {
			public := base64.StdEncoding.EncodeToString(mallory.Private.Public().(ed25519.PublicKey))
			m.list[m.find(t, "receipt-keys.json")].data = []byte(`[{"sink":"vault","version":1,"public":"` + public + `"}]`)
		}, 30},
		{"the inventory leaves a deletion out", func(t *testing.T, m *members) {
			m.edit(t, "inventory.jsonl", func(lines []string) []string {
				before, _, _ := strings.Cut(lines[0], `,"ended"`)
				lines[0] = before + "}\n"
				return lines
			})
		}, 30},
		{"the inventory leaves a key out", func(t *testing.T, m *members) {
			m.edit(t, "inventory.jsonl", func(lines []string) []string { return lines[:2] })
		}, 38},
		{"the inventory invents a key", func(t *testing.T, m *members) {
			m.edit(t, "inventory.jsonl", func(lines []string) []string { return append(lines, "\n"+lines[0]) })
		}, -1},
		{"the policy's text altered", func(t *testing.T, m *members) {
			m.edit(t, "authz.rego", at(0, "package", "package  "))
		}, -1},
		{"the policy left out", func(t *testing.T, m *members) { m.remove(t, "authz.rego"); m.remove(t, "data.json") }, 30},
		{"the policy's data left out", func(t *testing.T, m *members) { m.remove(t, "data.json") }, -1},
		{"a member that no export has", func(t *testing.T, m *members) { m.list = append(m.list, member{"extra", nil}) }, -1},
		{"a second inventory", func(t *testing.T, m *members) { m.list = append(m.list, member{"inventory.jsonl", nil}) }, -1},
		{"a second one of the events", func(t *testing.T, m *members) { m.list = append(m.list, member{"events.jsonl", nil}) }, -1},
		{"second checkpoints", func(t *testing.T, m *members) {
			m.list = append(m.list, member{"checkpoints.jsonl", m.get(t, "checkpoints.jsonl")})
		}, -1},
		{"second receipt keys", func(t *testing.T, m *members) { m.list = append(m.list, member{"receipt-keys.json", []byte("[]")}) }, -1},
		{"a policy twice, the wrong one first", func(t *testing.T, m *members) {
			rego := m.list[m.find(t, "authz.rego")]
			m.list = slices.Insert(m.list, m.find(t, "authz.rego"), member{rego.name, []byte("package evil")})
		}, -1},
		{"a policy behind the events", func(t *testing.T, m *members) {
			m.list = append(m.list, member{"policies/" + e.Policy + "/more.rego", []byte("package evil")})
		}, -1},
		{"a policy that nothing names, under a hash that is not its own", func(t *testing.T, m *members) {
			m.list = slices.Insert(m.list, m.find(t, "events.jsonl"), member{"policies/sha256:00/x.rego", []byte("package evil")})
		}, -1},
		{"a policy whose name leads elsewhere", func(t *testing.T, m *members) {
			m.list = slices.Insert(m.list, m.find(t, "events.jsonl"), member{"policies/../../../../tmp/evil", []byte("x")})
		}, -1},
		{"a policy whose name leads elsewhere on Windows", func(t *testing.T, m *members) {
			m.list = slices.Insert(m.list, m.find(t, "events.jsonl"), member{`policies/x/..\..\evil`, []byte("x")})
		}, -1},
		{"a policy outside its directory", func(t *testing.T, m *members) {
			m.list = slices.Insert(m.list, m.find(t, "events.jsonl"), member{"policies/x", []byte("x")})
		}, -1},
		{"the events before the checkpoints", func(t *testing.T, m *members) { m.move(t, "events.jsonl", 1) }, -1},
		{"the inventory before the events", func(t *testing.T, m *members) { m.move(t, "inventory.jsonl", m.find(t, "events.jsonl")) }, -1},
		{"a receipt that writes its version otherwise", func(t *testing.T, m *members) { m.edit(t, "events.jsonl", at(31, `"vault:v1:`, `"vault:v01:`)) }, 31},
		{"the inventory left out", func(t *testing.T, m *members) { m.remove(t, "inventory.jsonl") }, -1},
		{"the events left out", func(t *testing.T, m *members) { m.remove(t, "events.jsonl") }, -1},
		{"another format", func(t *testing.T, m *members) {
			m.manifest(t, func(x *archive.Manifest) { x.Format = "orgkeys-export/2" })
		}, -1},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			m := unpack(t, packed)
			c.tamper(t, m)
			m.relist(t)
			refused(t, m.pack(t), key, c.index)
		})
	}
}

func (m *members) root(t *testing.T) string {
	t.Helper()
	var x archive.Manifest
	if err := json.Unmarshal(m.list[0].data, &x); err != nil {
		t.Fatal(err)
	}
	return x.Root
}

// renumber gives lines of events their indices anew.
func renumber(lines []string) []string {
	all := strings.Split(strings.Trim(strings.ReplaceAll(strings.Join(lines, ""), "\n\n", "\n"), "\n"), "\n")
	for i, l := range all {
		_, rest, _ := strings.Cut(l, ",")
		all[i] = fmt.Sprintf(`{"index":%d,%s`+"\n", i, rest)
	}
	return all
}

func refused(t *testing.T, packed []byte, key string, index int64) {
	t.Helper()
	_, err := verifyExport(t, packed, key)
	var problem *verify.Problem
	if !errors.As(err, &problem) {
		t.Fatalf("not found: %v", err)
	}
	if problem.Index != index {
		t.Errorf("found %q, want event %d", problem, index)
	}
	if said, ok := byPython(t, packed, key); ok {
		t.Errorf("the independent implementation says %s", said)
	}
}

// A log that is read in many pieces is checked like a short one.
func TestALongExportIsCheckedToItsEnd(t *testing.T) {
	l := newBigLog(t, 3000, 300)
	var out bytes.Buffer
	_, err := archive.Write(t.Context(), &out, l, nil, t.TempDir(), "a test", nil)
	audittest.Must(t, err)
	report, err := verifyExport(t, out.Bytes(), l.vkey)
	if err != nil || report.Keys != 300 {
		t.Fatalf("%d keys, %v", report.Keys, err)
	}
	for name, c := range map[string]struct {
		change func([]string) []string
		index  int64
	}{
		"altered":             {at(1500, "user-1", "user-2"), 2999},
		"of another index":    {at(1500, `"index":1500`, `"index":1501`), 1500},
		"dropped":             {func(l []string) []string { return append(l[:1500:1500], l[1501:]...) }, 1500},
		"put twice":           {func(l []string) []string { return slices.Insert(l, 1500, l[1500]) }, 1501},
		"the last one's half": {func(l []string) []string { l[2999] = l[2999][:100] + "\n"; return l }, 2999},
		"too long":            {at(1500, `,"event"`, strings.Repeat(" ", 1<<20)+`,"event"`), -1},
	} {
		m := unpack(t, out.Bytes())
		m.edit(t, "events.jsonl", c.change)
		m.relist(t)
		var problem *verify.Problem
		if _, err := verifyExport(t, m.pack(t), l.vkey); !errors.As(err, &problem) || problem.Index != c.index {
			t.Errorf("%s: %v", name, err)
		}
	}
	m := unpack(t, out.Bytes()) // white space between the members of a line is allowed, also if it is much
	m.edit(t, "events.jsonl", at(1500, `,"event"`, strings.Repeat(" ", 300_000)+`,"event"`))
	m.relist(t)
	if _, err := verifyExport(t, m.pack(t), l.vkey); err != nil {
		t.Error(err)
	}
}

// The inventory is what encoding a Life gives, whatever the events hold.
func TestTheInventoryIsOrdinaryJSON(t *testing.T) {
	e := audittest.NewSigned(t)
	values := []string{"", "x", "a\"b\\c\u2028<é>", "683f334f-31c2-4300-9a01-b96eceffc579", "683F334F-31c2-4300-9a01-b96eceffc579", "683f334f+31c2-4300-9a01-b96eceffc579",
		"VXY3gR8pBtaHUe071sZNYuNBAvzsp1qbLsU9XiG0Olw", "VXY3gR8pBtaHUe071sZNYuNBAvzsp1qbLsU9XiG0Olx", strings.Repeat("long", 1000)}
	for i, v := range values {
		created := e.Key(audit.KeyCreated, fmt.Sprintf("k-%d", i)+v)
		created.Request, created.Reason, created.Detail = v, v, map[string]string{"fingerprint": v, "algorithm": v, "backend": v}
		created.Actor.ID = v
		used := e.Node(audit.NodeRegistered, created.Object, "n"+v)
		used.Request = v
		deleted := e.Key(audit.KeyDeleted, created.Object)
		deleted.Request, deleted.Action = v, authz.Action(v)
		e.Record(t, created, used, deleted)
	}
	packed := export(t, e)
	if _, err := verifyExport(t, packed, e.VKey(t)); err != nil {
		t.Error(err)
	}
	if said, ok := byPython(t, packed, e.VKey(t)); !ok {
		t.Error(said)
	}
	n := 0
	for line := range bytes.Lines(unpack(t, packed).get(t, "inventory.jsonl")) {
		var life archive.Life
		audittest.Must(t, jsonv2.Unmarshal(line, &life, jsonv2.RejectUnknownMembers(true)))
		again, err := jsonv2.Marshal(life, jsonv2.Deterministic(true))
		if err != nil || string(again)+"\n" != string(line) {
			t.Errorf("%v: %.500s\n%.500s", err, again, line)
		}
		n++
	}
	if n != 3+len(values) {
		t.Errorf("%d keys", n)
	}
}

// These need no forger: a disk, a mail program or a wrong key is enough.
func TestDamagedExportsAreRefused(t *testing.T) {
	e := audittest.NewSigned(t)
	packed, key := export(t, e), e.VKey(t)
	t.Run("an event altered, the manifest not", func(t *testing.T) {
		m := unpack(t, packed)
		m.edit(t, "events.jsonl", at(12, "u-1", "u-2"))
		refused(t, m.pack(t), key, 29)
	})
	t.Run("a member altered that nothing else covers", func(t *testing.T) {
		m := unpack(t, packed)
		m.list[m.find(t, "receipt-keys.json")].data = append(m.get(t, "receipt-keys.json"), ' ')
		refused(t, m.pack(t), key, -1)
	})
	t.Run("cut off", func(t *testing.T) {
		for _, n := range []int{0, 10, len(packed) / 2, len(packed) - 30} {
			if _, err := verifyExport(t, packed[:n], key); err == nil {
				t.Errorf("%d bytes of %d verified", n, len(packed))
			}
			if n > 0 {
				byPythonRefused(t, packed[:n], key)
			}
		}
	})
	t.Run("another key", func(t *testing.T) {
		other := audittest.NewSigned(t).VKey(t)
		refused(t, packed, other, -1)
	})
	t.Run("another key under this log's name", func(t *testing.T) {
		other, err := audit.VerifierKey(strings.Split(key, "+")[0], audittest.NewSigner(t).Private.Public().(ed25519.PublicKey))
		if err != nil {
			t.Fatal(err)
		}
		refused(t, packed, other, -1)
	})
	t.Run("something behind its end", func(t *testing.T) {
		m := unpack(t, packed)
		var plain bytes.Buffer
		z, err := gzip.NewReader(bytes.NewReader((&members{[]member{{"inventory.jsonl", []byte("evil\n")}}}).pack(t)))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(&plain, z); err != nil {
			t.Fatal(err)
		}
		for name, b := range map[string][]byte{
			"garbage in the tar archive": m.packWith(t, []byte("garbage")),
			"another tar archive":        m.packWith(t, plain.Bytes()),
			"garbage":                    append(m.pack(t), "garbage"...),
			"another gzip member":        append(m.pack(t), packed...),
		} {
			t.Run(name, func(t *testing.T) { refused(t, b, key, -1) })
		}
		padded := m.packWith(t, make([]byte, 10000))
		if _, err := verifyExport(t, padded, key); err != nil {
			t.Errorf("padding: %v", err)
		}
		if said, ok := byPython(t, padded, key); !ok {
			t.Errorf("padding: %s", said)
		}
	})
	t.Run("not an archive", func(t *testing.T) { refused(t, []byte("hello"), key, -1) })
}

// A small file must not take much memory: zeros are packed a thousandfold.
func TestPoliciesTakeLimitedMemory(t *testing.T) {
	e := audittest.NewSigned(t)
	m := unpack(t, export(t, e))
	big := make([]byte, 40<<20)
	for i := range 2 {
		m.list = slices.Insert(m.list, m.find(t, "events.jsonl"), member{fmt.Sprintf("policies/x/%d", 9-i), big})
	}
	m.relist(t)
	_, err := verifyExport(t, m.pack(t), e.VKey(t))
	if err == nil || !strings.Contains(err.Error(), "larger than orgkeys writes") {
		t.Errorf("%v", err)
	}
}

func byPythonRefused(t *testing.T, packed []byte, key string) {
	t.Helper()
	if said, ok := byPython(t, packed, key); ok {
		t.Errorf("the independent implementation says %s of %d bytes", said, len(packed))
	}
}

func TestAnExportOfATamperedLogFails(t *testing.T) {
	for name, statements := range map[string][]string{
		"an event altered": {`UPDATE events SET leaf = CAST(replace(leaf, 'u-1', 'u-2') AS BLOB), actor = 'u-2' WHERE idx = 12`},
		"an event dropped": {`DELETE FROM events WHERE idx = 12`},
		"the end cut off":  {`DELETE FROM events WHERE idx >= 39`},
	} {
		e := audittest.NewSigned(t)
		e.Exec(t, statements...)
		if _, err := archive.Write(t.Context(), io.Discard, e.DB, nil, t.TempDir(), "a test", nil); err == nil {
			t.Errorf("%s: exported", name)
		}
	}
}

// A policy that is in force mends its own text, so that exports go on to verify.
func TestAChangedPolicyIsPutRight(t *testing.T) {
	e := audittest.NewSigned(t)
	e.Exec(t, `UPDATE policies SET content = x'00' WHERE name = 'authz.rego'`)
	if _, err := archive.Write(t.Context(), io.Discard, e.DB, nil, t.TempDir(), "a test", nil); err == nil || !strings.Contains(err.Error(), "was changed") {
		t.Errorf("exported, although the archive cannot verify: %v", err)
	}
	audittest.Must(t, e.DB.KeepPolicy(t.Context(), e.Policy, map[string][]byte{"authz.rego": []byte("package orgkeys.authz\n"), "data.json": []byte("{}")}))
	if _, err := verifyExport(t, export(t, e), e.VKey(t)); err != nil {
		t.Error(err)
	}
}

func TestOnlyKeysThatHaveSignedAreShown(t *testing.T) {
	e := audittest.NewSigned(t)
	genuine := e.VKey(t)
	forged, err := audit.VerifierKey(strings.Split(genuine, "+")[0], audittest.NewSigner(t).Private.Public().(ed25519.PublicKey))
	audittest.Must(t, err)
	e.Exec(t, `INSERT INTO checkpoint_keys (vkey) VALUES ('`+forged+`'), ('evil+00000000+AAAA')`)
	keys, err := archive.SigningKeys(t.Context(), e.DB)
	if err != nil || len(keys) != 1 || keys[0] != genuine {
		t.Errorf("%q, %v", keys, err)
	}
}

func TestProofsOfSingleEvents(t *testing.T) {
	e := audittest.NewSigned(t)
	entries, err := e.DB.Entries(t.Context(), 0, 100)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		proof, err := archive.Prove(t.Context(), e.DB, fmt.Sprint(entry.Index))
		if err != nil {
			t.Fatal(err)
		}
		text, err := json.Marshal(proof)
		if err != nil {
			t.Fatal(err)
		}
		got, signed, err := archive.VerifyProof(text, []string{e.VKey(t)})
		if err != nil || got.Event != string(entry.Leaf) || signed.Size != 40 {
			t.Errorf("event %d: %v", entry.Index, err)
		}
	}
	event, err := audit.Decode(entries[17].Leaf)
	if err != nil {
		t.Fatal(err)
	}
	byID, err := archive.Prove(t.Context(), e.DB, event.ID)
	if err != nil || byID.Index != 17 {
		t.Errorf("by ID: event %d, %v", byID.Index, err)
	}
	e.Add(t, 1)
	if _, err := archive.Prove(t.Context(), e.DB, "40"); !errors.Is(err, archive.ErrNotSigned) {
		t.Errorf("an event that no checkpoint covers: %v", err)
	}
}

func TestForgedProofsAreRefused(t *testing.T) {
	e, other := audittest.NewSigned(t), audittest.NewSigned(t)
	good, err := archive.Prove(t.Context(), e.DB, "12")
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := archive.Prove(t.Context(), other.DB, "12")
	if err != nil {
		t.Fatal(err)
	}
	for name, forge := range map[string]func(p *archive.Proof){
		"the event altered":                func(p *archive.Proof) { p.Event = strings.Replace(p.Event, "u-1", "u-2", 1) },
		"another index":                    func(p *archive.Proof) { p.Index = 13 },
		"a negative index":                 func(p *archive.Proof) { p.Index = -12 },
		"an index past the end":            func(p *archive.Proof) { p.Index = 1 << 40 },
		"a path that is shorter":           func(p *archive.Proof) { p.Path = p.Path[1:] },
		"a path that is longer":            func(p *archive.Proof) { p.Path = append(p.Path, p.Path[0]) },
		"a path with something else in it": func(p *archive.Proof) { p.Path = append([]string{"x"}, p.Path[1:]...) },
		"an inner node as the event":       func(p *archive.Proof) { p.Event, p.Path = p.Path[0], p.Path[1:] },
		"the checkpoint of another log":    func(p *archive.Proof) { p.Checkpoint = foreign.Checkpoint },
		"all of another log":               func(p *archive.Proof) { *p = foreign },
		"an unsigned checkpoint":           func(p *archive.Proof) { p.Checkpoint, _, _ = strings.Cut(p.Checkpoint, "\n\n") },
		"another format":                   func(p *archive.Proof) { p.Format = "orgkeys-proof/2" },
	} {
		p := good
		p.Path = append([]string{}, good.Path...)
		forge(&p)
		text, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		var problem *verify.Problem
		if _, _, err := archive.VerifyProof(text, []string{e.VKey(t)}); !errors.As(err, &problem) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

var _ archive.Source = (*sqlstore.DB)(nil)
