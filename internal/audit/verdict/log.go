package verdict

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
)

// inFlight is how long an event may be on its way to the sinks before it
// counts as one that they do not have.
const inFlight = time.Minute

var errNoCopy = notExcluded("no copy of the log from outside the data directory was compared; keep the file sink elsewhere (ORGKEYS_AUDIT_FILE), or give a copy with --sink or a checkpoint that was kept elsewhere with --checkpoint")

// Log is the log in the database.
type Log interface {
	verify.Checkpoints
	verify.Log
}

// Sink is the file sink of the settings.
type Sink struct {
	File    string
	Outside bool // whoever can change the log's directory cannot change it
}

// Log verifies the log in db and its copy: the one that was given, or sink.
func (j *Judge) Log(ctx context.Context, db Log, sink Sink, g Given) error {
	keys, err := g.keys()
	if err != nil {
		return err
	}
	evidence, independent, err := g.evidence(sink, keys)
	if err != nil {
		return err
	}
	if err := evidence.AddKept(ctx, db, keys); err != nil {
		return err
	}
	report, err := verify.Verify(ctx, db, evidence, j.progress("verified"))
	if err != nil {
		return err
	}
	j.verdict.ofLog(report)
	fmt.Fprintf(j.out, "log %s: %d events, all match the tree\n", report.Log.Origin, report.Log.Size)
	fmt.Fprintf(j.out, "root hash %s\n", report.Log.Root)
	if report.Archived > 0 {
		fmt.Fprintln(j.out, archived(report))
	}
	if report.Signed > 0 {
		fmt.Fprintf(j.out, "the newest signed checkpoint covers %d of them%s\n", report.Signed, unlessGiven(keys))
	}
	if report.Receipts > 0 {
		fmt.Fprintf(j.out, "%d of them have a valid receipt\n", report.Receipts)
	}
	if report.Erased > 0 {
		fmt.Fprintf(j.out, "%d events had their personal part erased\n", report.Erased)
	}
	if report.Unsequenced > 0 {
		fmt.Fprintf(j.out, "%d recorded events have no index in the log yet: nothing protects them until the server runs\n", report.Unsequenced)
	}
	if report.Unauthenticated > 0 {
		fmt.Fprintf(j.out, "%d rows of the table events are not authentic: orgkeys did not record them, and they get no index in the log\n", report.Unauthenticated)
	}
	for _, r := range report.Rollbacks {
		fmt.Fprintln(j.out, accepted(r))
	}
	if report.Unexplained > 0 {
		fmt.Fprintf(j.out, "%d of these rollbacks are known from the copy alone: their events are in the part of the log that was not read\n", report.Unexplained)
	}
	switch {
	case report.Unread != nil:
		return &NotExcludedError{fmt.Errorf("the first %d events are in an archive that was not read: their content, and keys that are older than the rest, were not verified: %w", report.Archived, report.Unread)}
	case !independent:
		return errNoCopy
	}
	return vouched(j.out, report)
}

// archived says what of the log is not in the database.
func archived(r verify.Report) string {
	said := fmt.Sprintf("the first %d of them are in the archive", r.Archived)
	if r.Removed > 0 {
		said += fmt.Sprintf("; entries below %d were removed by the policy of retention: their hashes are verified", r.Removed)
	}
	return said + "; the log says so itself"
}

// accepted says what was accepted.
func accepted(r audit.Rollback) string {
	said := fmt.Sprintf("a rollback was accepted: %q", r.Reason)
	if to, err := audit.ParseCheckpoint(r.To); err == nil && r.Kept < to.Size {
		said += fmt.Sprintf("; it kept the first %d of %d events, and the log was rewritten from event %d on", r.Kept, to.Size, r.Kept)
	}
	return said
}

// vouched prints how many events of the log a copy from outside covers. Events that are
// newer than the copy are usual while the server runs; those that nobody has
// taken for longer are as good as unprotected.
func vouched(out io.Writer, r verify.Report) error {
	newer := r.Log.Size - r.Covered
	switch {
	case r.Covered == 0:
		return notExcluded("the given copy or checkpoint holds no event of this log")
	case r.Before:
		return notExcluded("the copy is older than the last accepted rollback and covers %d of %d events; use a copy from after it", r.Covered, r.Log.Size)
	case r.Unauthenticated > 0:
		return notExcluded("somebody other than orgkeys writes to the database, and may have removed what waited for its place in the log; keep the %d rows of the table events (idx IS NULL AND refused <> 0) as evidence, find out who wrote them, and delete them", r.Unauthenticated)
	case newer == 0:
		_, err := fmt.Fprintf(out, "truncation excluded: the copy covers %d of %d events\n", r.Covered, r.Log.Size)
		return err
	case time.Since(r.Uncovered) > inFlight:
		return notExcluded("the copy covers %d of %d events; the %d newer events are not in it, and the oldest of these is of %s", r.Covered, r.Log.Size, newer, r.Uncovered.Format(time.RFC3339))
	}
	_, err := fmt.Fprintf(out, "truncation excluded: the copy covers %d of %d events; the %d newest, less than a minute old, are not in it yet\n", r.Covered, r.Log.Size, newer)
	return err
}

// evidence reads what to compare the log with, and says whether it comes
// from outside the data directory.
func (g Given) evidence(s Sink, keys []string) (*verify.Copy, bool, error) {
	sink := g.Sink
	checkpoint, err := g.checkpoint(len(keys) > 0)
	if err != nil {
		return nil, false, err
	}
	independent := sink != "" || checkpoint != ""
	if sink == "" {
		sink = s.File
		independent = independent || s.Outside
		if _, err := os.Stat(sink); errors.Is(err, os.ErrNotExist) {
			if s.Outside {
				return nil, false, fmt.Errorf("the file sink is gone: %w", err)
			}
			sink = ""
		}
	}
	evidence := &verify.Copy{}
	if sink != "" {
		var err error
		if evidence, err = verify.ReadCopyFile(sink); err != nil {
			return nil, false, err
		}
	}
	if checkpoint != "" {
		c, err := readCheckpoint(checkpoint, keys)
		if err != nil {
			return nil, false, fmt.Errorf("--checkpoint: %w", err)
		}
		evidence.AddCheckpoint(c)
	}
	return evidence, independent, nil
}

func unlessGiven(keys []string) string {
	if len(keys) == 0 {
		return "; its key was taken from the database, because no --key was given"
	}
	return ""
}
