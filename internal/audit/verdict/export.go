package verdict

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit/archive"
)

// Export verifies the export in a file.
func (j *Judge) Export(ctx context.Context, name string, g Given) error {
	keys, err := g.requiredKeys()
	if err != nil {
		return err
	}
	asOf, err := g.asOf()
	if err != nil {
		return err
	}
	var outside archive.Outside
	if outside.Vault, err = g.vault(); err != nil {
		return err
	}
	if outside.Checkpoint, err = g.checkpoint(true); err != nil {
		return err
	}
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	// Most of the memory is the lives of keys, which stay to the end: collecting what
	// does not stay is cheap, and the usual 100 would double the memory.
	defer debug.SetGCPercent(debug.SetGCPercent(20))
	report, err := archive.Verify(ctx, f, keys, outside, j.progress("verified"))
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	j.verdict.ofExport(report)
	fmt.Fprintf(j.out, "log %s: %d events, each covered by the signed checkpoint\nroot hash %s\n", report.Manifest.Origin, report.Manifest.Size, report.Manifest.Root)
	fmt.Fprintf(j.out, "%d checkpoints and %d receipts signed by a given key; the inventory of %d keys agrees with the events\n", report.Checkpoints, report.Receipts, report.Keys)
	for _, r := range report.Rollbacks {
		fmt.Fprintln(j.out, accepted(r))
	}
	for _, e := range report.Enrolled {
		fmt.Fprintln(j.out, enrolled(e))
	}
	for _, line := range permitted(report) {
		fmt.Fprintln(j.out, line)
	}
	return exportVouched(j.out, report, asOf)
}

// enrolled says how a sealed key came to its holder.
func enrolled(e archive.Enrolled) string {
	var b strings.Builder
	fmt.Fprintf(&b, "sealed key %s of %s, for its %s", e.Key, e.Org, e.Scope)
	for _, n := range e.Nodes {
		fmt.Fprintf(&b, ", node %s", n.IP)
	}
	fmt.Fprintf(&b, ": permitted by %s %s (event %d, %s)", e.Permitted.Kind, e.Permitted.Actor, e.Permitted.Index, e.Permitted.Time)
	if e.Approved != nil {
		fmt.Fprintf(&b, "; approved by %s %s (event %d)", e.Approved.Kind, e.Approved.Actor, e.Approved.Index)
	}
	if e.Claimed != nil {
		fmt.Fprintf(&b, "; claimed by enrollment %s from %s (event %d, %s)", e.Enrollment, cmp.Or(e.From, "an address that is not recorded"), e.Claimed.Index, e.Claimed.Time)
	}
	fmt.Fprintf(&b, "; the bytes %s sealed to recipient %s (event %d)", e.SHA256, e.Recipient, e.Sealed.Index)
	switch {
	case e.Received != nil && e.Receipt != archive.Used:
		fmt.Fprintf(&b, " went out %d times", e.Answers)
	case e.Delivered != nil:
		fmt.Fprintf(&b, " went out at least once (event %d)", e.Delivered.Index)
	default:
		b.WriteString(" did not go out")
	}
	switch e.Receipt {
	case archive.Signed:
		fmt.Fprintf(&b, "; received: the holder of the private key signed for them (event %d, %s)", e.Received.Index, e.Received.Time)
	case archive.Unchecked:
		fmt.Fprintf(&b, "; received (event %d), and the signature was NOT checked: %s", e.Received.Index, e.Unchecked)
	case archive.Used:
		fmt.Fprintf(&b, "; nobody signed for them, and requests were signed with the key (event %d)", e.Received.Index)
	case archive.None:
		b.WriteString("; nobody has signed for them")
	}
	return b.String()
}

// permitted says what was compared with what administrators permitted, and what was not.
func permitted(r archive.Report) (lines []string) {
	for _, said := range []struct {
		n    int64
		text string
	}{
		{r.Enrollments, "%d enrollments: their claims and keys keep to the uses, recipient, TPM, scope, origin and approval that were permitted, and no claim came behind the end"},
		{r.InPart, "NOT checked: %d enrollments of which the log does not have all that was permitted; what it has was compared"},
		{r.Proofs, "%d proofs of keys that their holders made, each signed by that key"},
		{r.Unproven, "NOT checked: %d proofs of keys that their holders made, whose public keys are not in the export: it was made without, or the keys were deleted before"},
	} {
		if said.n > 0 {
			lines = append(lines, fmt.Sprintf(said.text, said.n))
		}
	}
	return lines
}

// exportVouched prints how many events of an export the evidence from outside
// covers. The key proves that every event in it is genuine, not that none came after.
func exportVouched(out io.Writer, r archive.Report, asOf time.Time) error {
	size := r.Manifest.Size
	if r.Vault != nil {
		return vaultVouched(out, size, *r.Vault, asOf)
	}
	switch {
	case r.Covered == 0:
		return notExcluded("the export ends with the signed checkpoint of %d events and cannot show whether there is a newer one; give one that was kept elsewhere with --checkpoint, or Vault's audit file with --vault-audit", size)
	case r.Covered < size:
		return notExcluded("the given checkpoint covers %d of %d events, and there is no evidence of where the log ended; give a newer one with --checkpoint, or Vault's audit file with --vault-audit", r.Covered, size)
	}
	_, err := fmt.Fprintf(out, "truncation excluded: the given checkpoint covers %d of %d events\n", r.Covered, size)
	return err
}

// vaultVouched says of what time Vault's audit files speak: nobody can see in
// them whether a file of another node is missing, or what came later.
func vaultVouched(out io.Writer, size int64, v archive.VaultReport, asOf time.Time) error {
	for _, f := range v.Files {
		fmt.Fprintf(out, "Vault's audit file %s: %d entries from %s to %s\n", f.Name, f.Entries, f.First.Format(time.RFC3339), f.Last.Format(time.RFC3339))
	}
	for _, l := range v.Lost {
		fmt.Fprintf(out, "%d events in Vault's audit file, from %s to %s, were lost in the rollback that event %d accepted\n", l.Events, l.First, l.Last, l.Index)
	}
	if n := len(v.Behind); n > 0 {
		fmt.Fprintf(out, "%d lines of Vault's audit file have text before a complete entry, the first at %s (from a device with a prefix, or from a program that captures Vault's output); the entries were read\n", n, v.Behind[0])
	}
	if s := v.Sealed; s.Exports > 0 {
		fmt.Fprintf(out, "%d sealed keys of the log left Vault to one recipient each, and none to another; %d keys left Vault that the log does not know: attempts that failed, or newer than the export\n", s.Delivered, len(s.Unknown))
	}
	newest := v.AsOf.Format(time.RFC3339)
	switch {
	case len(v.Torn) > 0:
		return notExcluded("Vault's audit file holds each of the %d events, but %d of its lines are incomplete, the first at %s: what Vault wrote there is unknown", size, len(v.Torn), v.Torn[0])
	case v.AsOf.Before(asOf):
		return notExcluded("Vault's audit file holds each of the %d events, but its newest entry is of %s, before %s: give the file of every node that was active since", size, newest, asOf.Format(time.RFC3339))
	}
	_, err := fmt.Fprintf(out, "truncation excluded as of %s, when the newest entry given was written: Vault's audit file holds each of the %d events, and %d newer ones that no signed checkpoint covers yet. "+
		"This assumes that the files of every node that was ever active were given\n", newest, size, v.Newer)
	return err
}
