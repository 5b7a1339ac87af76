package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/spf13/cobra"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/archive"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
)

// verdict is what verifying prints with --json. docs/audit.md describes it;
// fields are added, and none is taken away or given another meaning.
type verdict struct {
	Format             string `json:"format"`
	Verified           bool   `json:"verified"`
	TruncationExcluded bool   `json:"truncationExcluded"`
	ExitCode           int    `json:"exitCode"`
	Error              string `json:"error,omitempty"`       // what is wrong
	Event              *int64 `json:"event,omitempty"`       // the first bad one's index
	NotExcluded        string `json:"notExcluded,omitempty"` // why truncation is not

	Origin  string `json:"origin,omitempty"`
	Size    int64  `json:"size"`
	Root    string `json:"root,omitempty"` // base64
	Covered int64  `json:"covered"`        // events that something from elsewhere vouches for

	Checkpoints     int64              `json:"checkpoints,omitzero"`     // of an export, each signed by a given key
	Signed          int64              `json:"signed,omitzero"`          // of the log: events that a signed checkpoint covers
	Receipts        int64              `json:"receipts,omitzero"`        // each signed by a known key
	Keys            int64              `json:"keys,omitzero"`            // of an export: organization keys in the inventory
	Erased          int64              `json:"erased,omitzero"`          // events whose personal part was erased
	Unsequenced     int64              `json:"unsequenced,omitzero"`     // events without an index yet
	Unauthenticated int64              `json:"unauthenticated,omitzero"` // rows that orgkeys did not record
	Archived        int64              `json:"archived,omitzero"`        // of the log: first events that are in the archive
	Removed         int64              `json:"removed,omitzero"`         // of the log: first entries that the archive no longer has
	Rollbacks       []audit.Rollback   `json:"rollbacks,omitempty"`
	Unexplained     int64              `json:"unexplained,omitzero"` // of the log: rollbacks whose event was not read
	PublicKeys      int64              `json:"publicKeys,omitzero"`  // of an export, that the log's fingerprints vouch for
	Enrolled        []archive.Enrolled `json:"enrolled,omitempty"`   // of an export: how each sealed key came to its holder
	Vault           *vaultVerdict      `json:"vault,omitempty"`
	Proof           *proofVerdict      `json:"proof,omitempty"`
}

// vaultVerdict is what the comparison with Vault's audit files found.
type vaultVerdict struct {
	AsOf   time.Time     `json:"asOf"` // when the newest entry given was written
	Events int64         `json:"events"`
	Newer  int64         `json:"newer"`
	Files  []vaultSpan   `json:"files"`
	Torn   []string      `json:"torn,omitempty"`
	Behind []string      `json:"textBeforeEntry,omitempty"`
	Lost   int64         `json:"lost,omitzero"` // events that accepted rollbacks lost
	Sealed sealedVerdict `json:"sealed"`
}

// sealedVerdict is what Vault's audit files say of keys that left it wrapped.
type sealedVerdict struct {
	Imports   int      `json:"imports"` // of recipients
	Exports   int      `json:"exports"`
	Delivered int      `json:"delivered"`         // keys of the log, to one recipient each
	Unknown   []string `json:"unknown,omitempty"` // what left, and is no key of the log
}

type vaultSpan struct {
	Name    string    `json:"name"`
	First   time.Time `json:"first"`
	Last    time.Time `json:"last"`
	Entries int64     `json:"entries"`
}

// proofVerdict is the event that a proof is of.
type proofVerdict struct {
	Index int64  `json:"index"`
	Event string `json:"event"` // the leaf, verbatim
}

const verdictFormat = "orgkeys-verify/1"

// judged runs judge, which writes lines for people to out and fills in v, and
// prints v in their place if asked to. Either way the error decides the exit code.
func judged(cmd *cobra.Command, asJSON bool, judge func(out io.Writer, v *verdict) error) error {
	if !asJSON {
		return judge(cmd.OutOrStdout(), &verdict{})
	}
	v := verdict{Format: verdictFormat}
	err := judge(io.Discard, &v)
	v.conclude(err)
	if writeErr := json.MarshalWrite(cmd.OutOrStdout(), v, jsontext.WithIndent("  ")); writeErr != nil {
		return errors.Join(err, writeErr)
	}
	if _, writeErr := fmt.Fprintln(cmd.OutOrStdout()); writeErr != nil {
		return errors.Join(err, writeErr)
	}
	return err
}

func (v *verdict) conclude(err error) {
	v.ExitCode = exitCode(err)
	v.Verified = v.ExitCode == 0 || v.ExitCode == codeNotExcluded
	v.TruncationExcluded = v.ExitCode == 0 && v.Proof == nil
	var problem *verify.Problem
	switch {
	case err == nil:
	case v.Verified:
		v.NotExcluded = strings.TrimPrefix(err.Error(), notExcludedPrefix)
	default:
		v.Error = err.Error()
	}
	if errors.As(err, &problem) && problem.Index >= 0 {
		v.Event = &problem.Index
	}
}

func (v *verdict) ofLog(r verify.Report) {
	v.Origin, v.Size, v.Root, v.Covered = r.Log.Origin, r.Log.Size, r.Log.Root.String(), r.Covered
	v.Archived, v.Removed, v.Unexplained = r.Archived, r.Removed, r.Unexplained
	v.Signed, v.Receipts, v.Erased, v.Unsequenced, v.Unauthenticated, v.Rollbacks = r.Signed, r.Receipts, r.Erased, r.Unsequenced, r.Unauthenticated, r.Rollbacks
}

func (v *verdict) ofExport(r archive.Report) {
	v.Origin, v.Size, v.Root, v.Covered = r.Manifest.Origin, r.Manifest.Size, r.Manifest.Root, r.Covered
	v.Checkpoints, v.Receipts, v.Keys, v.Rollbacks = r.Checkpoints, r.Receipts, r.Keys, r.Rollbacks
	v.PublicKeys, v.Enrolled = r.PublicKeys, r.Enrolled
	if r.Vault == nil {
		return
	}
	v.Covered = r.Manifest.Size // each of them is in Vault's files, or the export is wrong
	v.Vault = &vaultVerdict{AsOf: r.Vault.AsOf, Events: r.Vault.Events, Newer: r.Vault.Newer, Torn: r.Vault.Torn, Behind: r.Vault.Behind, Sealed: sealedVerdict(r.Vault.Sealed)}
	for _, f := range r.Vault.Files {
		v.Vault.Files = append(v.Vault.Files, vaultSpan(f))
	}
	for _, l := range r.Vault.Lost {
		v.Vault.Lost += l.Events
	}
}

// keysGiven are verifier keys as they stand on the command line, or files that
// hold them, one a line.
func keysGiven(given []string) ([]string, error) {
	var keys []string
	for _, text := range given {
		if b, err := os.ReadFile(text); err == nil {
			text = string(b)
		} else if !strings.Contains(text, "+") {
			return nil, fmt.Errorf("--key: neither a verifier key nor a file that can be read: %w", err)
		}
		for line := range strings.Lines(text) {
			if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
				keys = append(keys, line)
			}
		}
	}
	if len(given) > 0 && len(keys) == 0 {
		return nil, errors.New("--key: the file holds no key")
	}
	return keys, nil
}

// checkpointGiven is the newest checkpoint in what --checkpoint names: a file,
// or the text itself, in any form in which a sink has it. Empty: none was given.
func checkpointGiven(given string, signed bool) (string, error) {
	if given == "" {
		return "", nil
	}
	text := given
	if trimmed := strings.TrimSpace(given); !strings.HasPrefix(trimmed, "{") && !strings.Contains(trimmed, "\n") {
		b, err := os.ReadFile(given)
		if err != nil {
			return "", fmt.Errorf("--checkpoint: neither a checkpoint nor a file that can be read: %w", err)
		}
		text = string(b)
	}
	newest, err := verify.NewestIn(text, signed)
	if err != nil {
		return "", fmt.Errorf("--checkpoint: %w", err)
	}
	return newest, nil
}
