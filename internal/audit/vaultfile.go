package audit

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/go-json-experiment/json"
)

// VaultFile is what the audit files of Vault say of the log: the events and
// checkpoints that Vault has signed. Vault writes a "response" entry after it
// has done so; a request that it refused leaves an error, and does not count.
type VaultFile struct {
	at      map[tlog.Hash]int64    // the line of each event that is not matched yet
	points  map[int64][]vaultPoint // by size
	line    int64
	events  int64
	last    int64 // the line of the newest event that the log holds, too
	bad     *Problem
	badLine int64
}

type vaultPoint struct {
	Checkpoint
	line int64
}

// VaultReport is what the comparison with Vault's audit file found.
type VaultReport struct {
	Events int64 // that the file holds
	Newer  int64 // of them that the log has got after the export
	Lost   int64 // of them that the log has lost by an accepted rollback
}

// vaultEntry is a line of Vault's audit file, as far as it matters here.
type vaultEntry struct {
	Type    string `json:"type"`
	Error   string `json:"error"`
	Request struct {
		Path string `json:"path"`
		Data struct {
			Batch []struct {
				Event string `json:"event"`
			} `json:"batch_input"`
		} `json:"data"`
	} `json:"request"`
}

const (
	receiptPath  = "orgkeys-audit/sign/receipt"
	maxVaultLine = 16 << 20
)

// Read adds an audit file of Vault. Several are given in the order of time.
func (f *VaultFile) Read(r io.Reader) error {
	if f.at == nil {
		f.at, f.points = map[tlog.Hash]int64{}, map[int64][]vaultPoint{}
	}
	in := bufio.NewScanner(r)
	in.Buffer(make([]byte, 1<<20), maxVaultLine)
	for in.Scan() {
		f.line++
		if !bytes.Contains(in.Bytes(), []byte(receiptPath)) {
			continue
		}
		var e vaultEntry
		if err := json.Unmarshal(in.Bytes(), &e); err != nil {
			return fmt.Errorf("line %d of Vault's audit file cannot be read: %w", f.line, err)
		}
		if e.Type != "response" || e.Error != "" || e.Request.Path != receiptPath {
			continue
		}
		for _, item := range e.Request.Data.Batch {
			f.add(item.Event)
		}
	}
	if err := in.Err(); err != nil {
		return fmt.Errorf("reading Vault's audit file: %w", err)
	}
	return nil
}

func (f *VaultFile) add(text string) {
	if !strings.HasPrefix(text, "{") {
		if c, err := ParseCheckpoint(text); err == nil {
			f.points[c.Size] = append(f.points[c.Size], vaultPoint{c, f.line})
		}
		return
	}
	h := tlog.RecordHash([]byte(text))
	if _, known := f.at[h]; !known { // a sink may get an event more than once
		f.at[h] = f.line
		f.events++
	}
}

// match notes that the log holds an event.
func (f *VaultFile) match(index int64, leaf tlog.Hash) error {
	line, ok := f.at[leaf]
	if !ok {
		return &Problem{index, "Vault's audit file does not hold it: it was altered or inserted, or not every audit file was given"}
	}
	delete(f.at, leaf)
	f.last = max(f.last, line)
	return nil
}

// matchRoot compares the checkpoints that Vault has signed with the log's tree.
func (f *VaultFile) matchRoot(origin string, size int64, root func() tlog.Hash) {
	for _, p := range f.points[size] {
		if p.Origin == origin && p.Root != root() {
			f.found(p.line, &Problem{size - 1, fmt.Sprintf("the checkpoint of that size in Vault's audit file (line %d) has another root: the log was rewritten", p.line)})
		}
	}
}

// found keeps the problem of the earliest line.
func (f *VaultFile) found(line int64, p *Problem) {
	if f.bad == nil || line < f.badLine {
		f.bad, f.badLine = p, line
	}
}

// finish judges what only Vault's file holds: what came after the last common
// event is newer than the export; what came before is missing in the log, which
// only an accepted rollback explains.
func (f *VaultFile) finish(rolledBack bool) (VaultReport, error) {
	r := VaultReport{Events: f.events}
	for _, line := range f.at {
		if line >= f.last {
			r.Newer++
			continue
		}
		r.Lost++
		f.found(line, &Problem{-1, fmt.Sprintf("Vault's audit file holds an event (line %d) that the log does not: it was dropped, or the log was set back", line)})
	}
	if f.bad != nil && !rolledBack {
		return r, f.bad
	}
	return r, nil
}

var errNoVaultEvents = errors.New("the file holds nothing that orgkeys had Vault sign: is it Vault's audit file?")

// CheckNotEmpty reports an error if nothing in the files read came from orgkeys.
func (f *VaultFile) CheckNotEmpty() error {
	if f.events == 0 {
		return errNoVaultEvents
	}
	return nil
}
