package archive_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/archive"
	"github.com/orgkeys/orgkeys/internal/audit/audittest"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
)

// vaultLine is an entry of Vault's audit file at a second, as a real one has it.
func vaultLine(t *testing.T, second int, kind, failure string, texts ...string) string {
	t.Helper()
	var batch []map[string]string
	for _, text := range texts {
		batch = append(batch, map[string]string{"event": text, "input": "hmac-sha256:00"})
	}
	b, err := json.Marshal(map[string]any{"time": time.Unix(int64(1e9+second), 123456789).UTC().Format(time.RFC3339Nano), "type": kind, "error": failure, "request": map[string]any{
		"path": "orgkeys-audit/sign/receipt", "operation": "update", "data": map[string]any{"batch_input": batch},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return string(b) + "\n"
}

// cmd/orgkeys has the same comparison with a real Vault.
func TestVaultsAuditFileIsComparedBothWays(t *testing.T) {
	e := audittest.NewSigned(t)
	packed := export(t, e)
	entries, err := e.DB.Entries(t.Context(), 0, 100)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := e.DB.SignedAfter(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	events := make([]string, len(entries))
	for i, entry := range entries {
		events[i] = string(entry.Leaf)
	}
	foreign, err := audit.New(audit.KeysListed, "acme").Encode()
	if err != nil {
		t.Fatal(err)
	}
	other, err := audit.ParseCheckpoint(strings.Replace(signed[1].Text(), "\n3", "\n2", 1))
	if err != nil {
		t.Fatal(err)
	}
	unsigned := audit.Checkpoint{Origin: signed[0].Origin, Size: 41}.Text()
	newer := noteBy(t, e.Signer, audit.Checkpoint{Origin: signed[0].Origin, Size: 41})
	whole := vaultLine(t, 1, "response", "", events[:20]...) + vaultLine(t, 2, "response", "", signed[0].Note) + vaultLine(t, 3, "response", "", events[20:]...)
	for _, c := range []struct {
		name  string
		file  string
		index int64 // of the problem; -2: none
		newer int64
	}{
		{"the same events", whole, -2, 0},
		{"events given twice, as after a crash", whole + whole, -2, 0},
		{"newer events", whole + vaultLine(t, 9, "response", "", string(foreign.Leaf)), -2, 1},
		{"newer events that a checkpoint was signed over", whole + vaultLine(t, 9, "response", "", string(foreign.Leaf), newer), 40, 0},
		{"a newer checkpoint that is not in the log yet", whole + vaultLine(t, 9, "response", "", string(foreign.Leaf), unsigned), -2, 1},
		{"a last line that is being written", whole + strings.TrimSuffix(whole, "\"}\n"), -2, 0},
		{"half a line of somebody else's", "{\"type\":\"resp\n" + whole, -2, 0},
		{"half a line with the next one behind it", whole[:len(whole)/8] + whole, -2, 0},
		{"an empty line", "\n" + whole + "\n", -2, 0},
		{"a line without its end", strings.TrimSuffix(whole, "\n"), -2, 0},
		{"somebody else's list of 300,000", `{"time":"2026-01-01T00:00:00Z","type":"response","response":{"data":{"keys":["` + strings.Repeat(`hmac-sha256:`+strings.Repeat("0", 64)+`","`, 300_000) + `"]}}}` + "\n" + whole, -2, 0},
		{"an event missing", vaultLine(t, 5, "response", "", append(events[:12:12], events[13:]...)...), 12, 0},
		{"an event that the log dropped", vaultLine(t, 0, "response", "", string(foreign.Leaf)) + whole, -1, 0},
		{"an event that Vault refused does not vouch", vaultLine(t, 5, "response", "", append(events[:12:12], events[13:]...)...) + vaultLine(t, 5, "response", "permission denied", events[12]), 12, 0},
		{"a request without its response does not vouch", vaultLine(t, 5, "response", "", append(events[:12:12], events[13:]...)...) + vaultLine(t, 5, "request", "", events[12]), 12, 0},
		{"a checkpoint of another tree", whole + vaultLine(t, 9, "response", "", other.Text()), other.Size - 1, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			vault := &archive.VaultFile{}
			if err := vault.Read("audit.log", strings.NewReader(c.file)); err != nil {
				t.Fatal(err)
			}
			report, err := archive.Verify(t.Context(), bytes.NewReader(packed), []string{e.VKey(t)}, archive.Outside{Vault: vault}, nil)
			var problem *verify.Problem
			switch {
			case c.index == -2 && (err != nil || report.Vault.Newer != c.newer):
				t.Errorf("%v, %+v", err, report.Vault)
			case c.index != -2 && (!errors.As(err, &problem) || problem.Index != c.index):
				t.Errorf("found %v, want event %d", err, c.index)
			}
		})
	}
	empty := &archive.VaultFile{}
	if err := empty.Read("audit.log", strings.NewReader(`{"time":"2026-01-01T00:00:00Z","type":"request"}`+"\n")); err != nil || empty.CheckNotEmpty() == nil {
		t.Errorf("a file without events: %v", err)
	}
}

// A line that begins with somebody else's text, and ends with a whole entry, is
// read and said; one whose entry is torn is another matter.
func TestTextBeforeAWholeEntryIsNoTornLine(t *testing.T) {
	e := audittest.NewSigned(t)
	packed := export(t, e)
	var events []string
	for _, l := range unpack(t, packed).leaves(t) {
		events = append(events, string(l))
	}
	whole := vaultLine(t, 1, "response", "", events...)
	for _, c := range []struct {
		name, file   string
		behind, torn int
	}{
		{"a prefix", "vault: " + whole, 1, 0},
		{"a journal's line", "Nov 29 08:00:00 host vault[123]: " + whole, 1, 0},
		{"Vault's own messages among captured lines", "2026-11-29T08:00:00Z [INFO] core: {\"a\":1} " + whole, 1, 0},
		{"a prefix that ends like an object", "x} " + whole, 1, 0},
		{"an entry behind a torn one", whole[:len(whole)/8] + whole, 0, 1},
		{"a torn entry behind a prefix", "vault: " + whole[:len(whole)/2] + "\n" + whole, 0, 1},
		{"a bare number", "17\n" + whole, 0, 1},
		{"a list", "[1]\n" + whole, 0, 1},
		{"an object that is no entry", "{\"a\":1}\n" + whole, 0, 1},
	} {
		vault := &archive.VaultFile{}
		if err := vault.Read("audit.log", strings.NewReader(c.file)); err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		report, err := archive.Verify(t.Context(), bytes.NewReader(packed), []string{e.VKey(t)}, archive.Outside{Vault: vault}, nil)
		if err != nil || len(report.Vault.Behind) != c.behind || len(report.Vault.Torn) != c.torn {
			t.Errorf("%s: %v, %+v", c.name, err, report.Vault)
		}
	}
}

// What no entry can be read from says what to change in Vault.
func TestAFileThatHoldsNoEntrySaysWhy(t *testing.T) {
	for name, c := range map[string]struct{ file, want string }{
		"jsonx":                       {"<json:object name=\"auth\">\n<json:string name=\"x\">y</json:string>\n</json:object>\n", "format=jsonx"},
		"jsonx with a number's line":  {"<json:object name=\"auth\"><json:string name=\"x\">a\n17\nb</json:string></json:object>\n", "format=jsonx"},
		"jsonx behind a prefix":       {"vault: <json:object name=\"auth\"></json:object>\n", "format=jsonx"},
		"compressed":                  {"\x1f\x8b\x08\x00\n\x00\n", "decompress it"},
		"numbers":                     {"17\n18\n", "decompress it"},
		"another log's wrapped lines": {`{"log":"{\"time\":\"2026-01-01T00:00:00Z\"}","stream":"stdout"}` + "\n", "format=json"},
	} {
		if err := new(archive.VaultFile).Read("audit.log", strings.NewReader(c.file)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

// The files say nothing of what came after their newest entry, and each shows
// what time it covers.
func TestVaultsAuditFilesShowWhatTimeTheyCover(t *testing.T) {
	e := audittest.NewSigned(t)
	packed := export(t, e)
	var events []string
	for _, l := range unpack(t, packed).leaves(t) {
		events = append(events, string(l))
	}
	at := func(second int) time.Time { return time.Unix(int64(1e9+second), 123456789).UTC() }
	other := `{"time":"` + at(50).Format(time.RFC3339Nano) + `","type":"request","request":{"path":"auth/token/lookup-self"}}` + "\n"
	vault := &archive.VaultFile{}
	for name, file := range map[string]string{
		"n1": vaultLine(t, 3, "response", "", events[20:]...) + other, "n2": vaultLine(t, 1, "response", "", events[:20]...),
	} {
		if err := vault.Read(name, strings.NewReader(file)); err != nil {
			t.Fatal(err)
		}
	}
	report, err := archive.Verify(t.Context(), bytes.NewReader(packed), []string{e.VKey(t)}, archive.Outside{Vault: vault}, nil)
	if err != nil || !report.Vault.AsOf.Equal(at(50)) || len(report.Vault.Files) != 2 {
		t.Fatalf("%v, %+v", err, report.Vault)
	}
	for _, f := range report.Vault.Files {
		want := map[string]archive.VaultSpan{"n1": {Name: "n1", First: at(3), Last: at(50), Entries: 2}, "n2": {Name: "n2", First: at(1), Last: at(1), Entries: 1}}[f.Name]
		if f != want {
			t.Errorf("%+v, want %+v", f, want)
		}
	}
}

// Rotated files may be given in any order: the time of their entries counts.
func TestVaultsAuditFilesAreOrderedByTime(t *testing.T) {
	e := audittest.NewSigned(t)
	packed := export(t, e)
	dropped, err := audit.New(audit.KeysListed, "acme").Encode()
	if err != nil {
		t.Fatal(err)
	}
	var events []string
	for _, l := range unpack(t, packed).leaves(t) {
		events = append(events, string(l))
	}
	first := vaultLine(t, 1, "response", "", events[:20]...) + vaultLine(t, 2, "response", "", string(dropped.Leaf))
	second := vaultLine(t, 3, "response", "", events[20:]...)
	for name, files := range map[string][]string{"oldest first": {first, second}, "newest first": {second, first}} {
		vault := &archive.VaultFile{}
		for _, f := range files {
			if err := vault.Read("audit.log", strings.NewReader(f)); err != nil {
				t.Fatal(err)
			}
		}
		_, err := archive.Verify(t.Context(), bytes.NewReader(packed), []string{e.VKey(t)}, archive.Outside{Vault: vault}, nil)
		if err == nil || !strings.Contains(err.Error(), "audit.log:2") {
			t.Errorf("%s: the event that the log dropped is not found: %v", name, err)
		}
	}
}

// An accepted rollback excuses what it lost, and nothing before or after.
func TestAnAcceptedRollbackExcusesOnlyWhatItLost(t *testing.T) {
	e := audittest.NewSigned(t)
	entries, err := e.DB.Entries(t.Context(), 0, 100)
	if err != nil {
		t.Fatal(err)
	}
	from, err := e.DB.LastSigned(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var before []string
	for _, entry := range entries {
		before = append(before, string(entry.Leaf))
	}
	e.Rebuild(t, "DELETE FROM events WHERE idx >= 35", "DELETE FROM event_receipts WHERE idx >= 35", "DELETE FROM signed_checkpoints WHERE size > 35")
	to, err := e.DB.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	quiet := slog.New(slog.DiscardHandler)
	e.Checkpoints = audit.NewCheckpointer(audit.NewLog(e.DB, quiet), e.DB, e.Signer, time.Hour, quiet)
	e.Record(t, audit.Rollback{From: from.Text(), To: to.Text(), Kept: 35, Reason: "a test"}.Event())
	e.Record(t, audit.New(audit.KeysListed, "acme"))
	packed := export(t, e)
	var after []string
	for _, l := range unpack(t, packed).leaves(t) {
		after = append(after, string(l))
	}
	if len(after) != 37 {
		t.Fatalf("%d events", len(after))
	}
	dropped, err := audit.New(audit.KeysListed, "acme").Encode()
	if err != nil {
		t.Fatal(err)
	}
	line := func(second int, texts ...string) string { return vaultLine(t, second, "response", "", texts...) }
	other := func(size int64) string {
		return noteBy(t, e.Signer, audit.Checkpoint{Origin: from.Origin, Size: size})
	}
	whole := line(1, before[:10]...) + line(3, before[10:]...) + line(4, from.Note, other(36)) + line(5, after[:36]...) + line(7, after[36])
	for _, c := range []struct {
		name, more string
		index      int64 // of the problem; -2: none
	}{
		{"what the rollback lost", "", -2},
		{"more that it lost", line(4, string(dropped.Leaf)), -2},
		{"an event dropped long before", line(2, string(dropped.Leaf)), -1},
		{"an event dropped after it", line(6, string(dropped.Leaf)), -1},
		{"another root before", line(2, other(10)), 9},
		{"another root after", line(8, other(37)), 36},
		{"a checkpoint that covers more, after it", line(8, other(40)), 37},
		{"a key that left Vault to one recipient", imports(4, "ra") + leaves(4, "ra", "a"), -2},
		{"a key of the lost events that left Vault to two", leaves(4, "ra", "a") + leaves(4, "rt", "a"), -1},
		{"one before, and one after it", leaves(2, "ra", "a") + leaves(6, "rt", "a"), -1},
		{"one among the lost events, and another after it", leaves(4, "ra", "a") + leaves(4, "rt", "a") + leaves(6, "rb", "b") + leaves(6, "rt", "b"), -1},
	} {
		t.Run(c.name, func(t *testing.T) {
			vault := &archive.VaultFile{}
			if err := vault.Read("audit.log", strings.NewReader(whole+c.more)); err != nil {
				t.Fatal(err)
			}
			report, err := archive.Verify(t.Context(), bytes.NewReader(packed), []string{e.VKey(t)}, archive.Outside{Vault: vault}, nil)
			var problem *verify.Problem
			switch {
			case c.index == -2 && err != nil:
				t.Error(err)
			case c.index == -2 && (len(report.Vault.Lost) != 1 || report.Vault.Lost[0].Index != 35 || report.Vault.Lost[0].Events < 5 || report.Vault.Lost[0].First != "audit.log:2"):
				t.Errorf("lost: %+v", report.Vault.Lost)
			case c.index != -2 && (!errors.As(err, &problem) || problem.Index != c.index):
				t.Errorf("found %v, want event %d", err, c.index)
			}
		})
	}
}

// What lies outside vouches for an export's end, as far as it goes.
func TestACheckpointFromElsewhereVouchesForAnExport(t *testing.T) {
	e := audittest.NewSigned(t)
	packed := export(t, e)
	signed, err := e.DB.SignedAfter(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	origin := signed[0].Origin
	for _, c := range []struct {
		name       string
		checkpoint string
		covered    int64
		fails      string
	}{
		{"none", "", 0, ""},
		{"the newest", signed[3].Note, 40, ""},
		{"an older one", signed[0].Note, 30, ""},
		{"one that covers more", noteBy(t, e.Signer, audit.Checkpoint{Origin: origin, Size: 41}), 0, "event 40: it is missing"},
		{"one of another tree", noteBy(t, e.Signer, audit.Checkpoint{Origin: origin, Size: 12}), 0, "event 11:"},
		{"one of another log", noteBy(t, e.Signer, audit.Checkpoint{Origin: "orgkeys/other", Size: 40}), 0, "none of the given keys"},
		{"one that is not signed", signed[3].Text(), 0, "the checkpoint given"},
		{"one that another key signed", noteBy(t, audittest.NewSigner(t), signed[3].Checkpoint), 0, "none of the given keys"},
	} {
		report, err := archive.Verify(t.Context(), bytes.NewReader(packed), []string{e.VKey(t)}, archive.Outside{Checkpoint: c.checkpoint}, nil)
		if c.fails == "" && (err != nil || report.Covered != c.covered) || c.fails != "" && (err == nil || !strings.Contains(err.Error(), c.fails)) {
			t.Errorf("%s: covered %d, %v", c.name, report.Covered, err)
		}
	}
}
