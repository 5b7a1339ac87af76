// Package verdict is what auditors are told: it takes what they have to compare with,
// has the log, an export, a proof or published files verified, and says what was found and whether
// truncation is excluded, in lines for people or as one JSON object.
package verdict

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/archive"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
)

// The exit codes of whoever verifies.
const (
	CodeFailed      = 1 // an error, or an event that is known to be missing or changed
	CodeNotExcluded = 3 // consistent, and may lack its end
)

// NotExcludedError: everything that was read is consistent, and truncation is not excluded.
type NotExcludedError struct{ err error }

func (e *NotExcludedError) Error() string { return e.err.Error() }

// Unwrap implements errors.Is and errors.As.
func (e *NotExcludedError) Unwrap() error { return e.err }

const notExcludedPrefix = "truncation not excluded: "

// notExcluded is the error when no evidence from outside excludes truncation.
func notExcluded(format string, args ...any) error {
	return &NotExcludedError{fmt.Errorf(notExcludedPrefix+format, args...)}
}

// Code is the exit code that says what err does.
func Code(err error) int {
	switch {
	case err == nil:
		return 0
	case errors.As(err, new(*NotExcludedError)):
		return CodeNotExcluded
	}
	return CodeFailed
}

// Judge has something verified and says what was found.
type Judge struct {
	out      io.Writer
	progress func(doing string) verify.Progress
	verdict  Verdict
}

// Say runs do with a judge that writes lines for people to w or, if asked to, prints the
// verdict in their place. Either way the error is do's, and decides the exit code.
func Say(w io.Writer, asJSON bool, progress func(doing string) verify.Progress, do func(*Judge) error) error {
	if !asJSON {
		return do(&Judge{out: w, progress: progress})
	}
	j := Judge{io.Discard, progress, Verdict{Format: format}}
	err := do(&j)
	j.verdict.conclude(err)
	if writeErr := json.MarshalWrite(w, j.verdict, jsontext.WithIndent("  ")); writeErr != nil {
		return errors.Join(err, writeErr)
	}
	if _, writeErr := fmt.Fprintln(w); writeErr != nil {
		return errors.Join(err, writeErr)
	}
	return err
}

// Verdict is what verifying prints with --json. docs/audit.md describes it;
// fields are added, and none is taken away or given another meaning.
type Verdict struct {
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
	Unexplained     int64              `json:"unexplained,omitzero"`     // of the log: rollbacks whose event was not read
	PublicKeys      int64              `json:"publicKeys,omitzero"`      // of an export, that the log's fingerprints vouch for
	Enrolled        []archive.Enrolled `json:"enrolled,omitempty"`       // of an export: how each sealed key came to its holder
	Proofs          int64              `json:"proofs,omitzero"`          // of an export: of keys that their holders made, each signed by that key
	ProofsUnchecked int64              `json:"proofsUnchecked,omitzero"` // such, whose public keys are not in the export
	Enrollments     int64              `json:"enrollments,omitzero"`     // of an export, whose claims and keys are as was permitted
	TermsUnchecked  int64              `json:"termsUnchecked,omitzero"`  // of those that were claimed, of which the log does not have all that was permitted
	Vault           *Vault             `json:"vault,omitempty"`
	Proof           *Proof             `json:"proof,omitempty"`
}

// Vault is what the comparison with Vault's audit files found.
type Vault struct {
	AsOf   time.Time `json:"asOf"` // when the newest entry given was written
	Events int64     `json:"events"`
	Newer  int64     `json:"newer"`
	Files  []Span    `json:"files"`
	Torn   []string  `json:"torn,omitempty"`
	Behind []string  `json:"textBeforeEntry,omitempty"`
	Lost   int64     `json:"lost,omitzero"` // events that accepted rollbacks lost
	Sealed Sealed    `json:"sealed"`
}

// Sealed is what Vault's audit files say of keys that left it wrapped.
type Sealed struct {
	Imports   int      `json:"imports"` // of recipients
	Exports   int      `json:"exports"`
	Delivered int      `json:"delivered"`         // keys of the log, to one recipient each
	Unknown   []string `json:"unknown,omitempty"` // what left, and is no key of the log
}

// Span is an audit file of Vault, from its first entry to its last.
type Span struct {
	Name    string    `json:"name"`
	First   time.Time `json:"first"`
	Last    time.Time `json:"last"`
	Entries int64     `json:"entries"`
}

// Proof is the event that a proof is of.
type Proof struct {
	Index int64  `json:"index"`
	Event string `json:"event"` // the leaf, verbatim
}

const format = "orgkeys-verify/1"

func (v *Verdict) conclude(err error) {
	v.ExitCode = Code(err)
	v.Verified = v.ExitCode != CodeFailed
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

func (v *Verdict) ofLog(r verify.Report) {
	v.Origin, v.Size, v.Root, v.Covered = r.Log.Origin, r.Log.Size, r.Log.Root.String(), r.Covered
	v.Archived, v.Removed, v.Unexplained = r.Archived, r.Removed, r.Unexplained
	v.Signed, v.Receipts, v.Erased, v.Unsequenced, v.Unauthenticated, v.Rollbacks = r.Signed, r.Receipts, r.Erased, r.Unsequenced, r.Unauthenticated, r.Rollbacks
}

func (v *Verdict) ofExport(r archive.Report) {
	v.Origin, v.Size, v.Root, v.Covered = r.Manifest.Origin, r.Manifest.Size, r.Manifest.Root, r.Covered
	v.Checkpoints, v.Receipts, v.Keys, v.Rollbacks = r.Checkpoints, r.Receipts, r.Keys, r.Rollbacks
	v.PublicKeys, v.Enrolled = r.PublicKeys, r.Enrolled
	v.Proofs, v.ProofsUnchecked, v.Enrollments, v.TermsUnchecked = r.Proofs, r.Unproven, r.Enrollments, r.InPart
	if r.Vault == nil {
		return
	}
	v.Covered = r.Manifest.Size // each of them is in Vault's files, or the export is wrong
	v.Vault = &Vault{AsOf: r.Vault.AsOf, Events: r.Vault.Events, Newer: r.Vault.Newer, Torn: r.Vault.Torn, Behind: r.Vault.Behind, Sealed: Sealed(r.Vault.Sealed)}
	for _, f := range r.Vault.Files {
		v.Vault.Files = append(v.Vault.Files, Span(f))
	}
	for _, l := range r.Vault.Lost {
		v.Vault.Lost += l.Events
	}
}
