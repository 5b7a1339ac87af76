package audit_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/orgkeys/orgkeys/internal/audit"
)

// vaultLine is an entry of Vault's audit file, as a real one has it.
func vaultLine(t *testing.T, kind, failure string, texts ...string) string {
	t.Helper()
	var batch []map[string]string
	for _, text := range texts {
		batch = append(batch, map[string]string{"event": text, "input": "hmac-sha256:00"})
	}
	b, err := json.Marshal(map[string]any{"type": kind, "error": failure, "request": map[string]any{
		"path": "orgkeys-audit/sign/receipt", "operation": "update", "data": map[string]any{"batch_input": batch},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return string(b) + "\n"
}

// cmd/orgkeys has the same comparison with a real Vault.
func TestVaultsAuditFileIsComparedBothWays(t *testing.T) {
	e := newEvidence(t)
	archive := e.export(t)
	entries, err := e.db.Entries(t.Context(), 0, 100)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := e.db.SignedAfter(t.Context(), 0)
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
	whole := vaultLine(t, "response", "", events[:20]...) + vaultLine(t, "response", "", signed[0].Note) + vaultLine(t, "response", "", events[20:]...)
	for _, c := range []struct {
		name  string
		file  string
		index int64 // of the problem; -2: none
		newer int64
	}{
		{"the same events", whole, -2, 0},
		{"events given twice, as after a crash", whole + whole, -2, 0},
		{"newer events", whole + vaultLine(t, "response", "", string(foreign.Leaf)), -2, 1},
		{"an event missing", vaultLine(t, "response", "", append(events[:12:12], events[13:]...)...), 12, 0},
		{"an event that the log dropped", vaultLine(t, "response", "", string(foreign.Leaf)) + whole, -1, 0},
		{"an event that Vault refused does not vouch", vaultLine(t, "response", "", append(events[:12:12], events[13:]...)...) + vaultLine(t, "response", "permission denied", events[12]), 12, 0},
		{"a request without its response does not vouch", vaultLine(t, "response", "", append(events[:12:12], events[13:]...)...) + vaultLine(t, "request", "", events[12]), 12, 0},
		{"a checkpoint of another tree", whole + vaultLine(t, "response", "", other.Text()), other.Size - 1, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			vault := &audit.VaultFile{}
			if err := vault.Read(strings.NewReader(c.file)); err != nil {
				t.Fatal(err)
			}
			report, err := audit.VerifyExport(t.Context(), bytes.NewReader(archive), []string{e.vkey(t)}, vault, nil)
			var problem *audit.Problem
			switch {
			case c.index == -2 && (err != nil || report.Vault.Newer != c.newer):
				t.Errorf("%v, %+v", err, report.Vault)
			case c.index != -2 && (!errors.As(err, &problem) || problem.Index != c.index):
				t.Errorf("found %v, want event %d", err, c.index)
			}
		})
	}
	empty := &audit.VaultFile{}
	if err := empty.Read(strings.NewReader("{}\n")); err != nil || empty.CheckNotEmpty() == nil {
		t.Errorf("a file without events: %v", err)
	}
}
