// Package rollback accepts a rollback of the log, for example after a backup was
// restored: it is recorded in the log and its sinks, which continue from there.
package rollback

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/org"
)

// Store is the database that the log is in. Its implementation is sqlstore.
type Store interface {
	verify.Checkpoints
	Head(ctx context.Context) (audit.Checkpoint, error)
	At(ctx context.Context, size int64) (audit.Checkpoint, error)
	// Entries returns events, and LeafHashes hashes of leaves, from an index on: those in
	// the archive, too, and at least one if there is one.
	Entries(ctx context.Context, index int64, limit int) ([]audit.Entry, error)
	LeafHashes(ctx context.Context, index int64, limit int) ([]tlog.Hash, error)
	Archived(ctx context.Context) (audit.Archived, error)
	Index(ctx context.Context, eventID string) (int64, bool, error)
	// ChangedAt reports whether the log's event at an index says that the log continued
	// in another database from there, and whether orgkeys recorded it.
	ChangedAt(ctx context.Context, index int64) (bool, error)
	// AcceptRollback records the event that accepts the rollback to head, gives it the
	// next index, before all waiting events, and ends the halt because of the sinks in ends.
	// It makes every open enrollment void: its places are given back, and keys made
	// for it that are not released are withdrawn, each with its event. It returns
	// how many.
	AcceptRollback(ctx context.Context, head audit.Checkpoint, e audit.Event, ends []audit.AheadSink, v Voids) (int, error)
	// SinksAhead returns the sinks, of all replicas, that hold the log back; ForgetAhead
	// ends the halt because of one.
	SinksAhead(ctx context.Context) ([]audit.AheadSink, error)
	ForgetAhead(ctx context.Context, s audit.AheadSink) error
	// OpenEnrollments returns how many enrollments that would make void.
	OpenEnrollments(ctx context.Context) (int, error)
	SinkNext(ctx context.Context, sink string) (int64, error)
	Acknowledge(ctx context.Context, sink string, next int64, receipts [][]byte) error
	LastSigned(ctx context.Context) (audit.Signed, error)
	// Supersede sets the signed checkpoints from place seq on aside.
	Supersede(ctx context.Context, seq int64) error
}

// Voids makes the events of what a rollback ends.
type Voids struct {
	// Enrollment: what was claimed since the backup is forgotten, so that a
	// token which gave a key already would give another.
	Enrollment func(org org.ID, id string, places int) audit.Event
	Withdrawn  func(org org.ID, keyID string) audit.Event // a key that was never released
}

func voids() Voids {
	return Voids{
		Enrollment: func(org org.ID, id string, places int) audit.Event {
			e := voided(audit.EnrollmentRevoked, org, id)
			e.Detail = map[string]string{"places": strconv.Itoa(places)}
			return e
		},
		Withdrawn: func(org org.ID, keyID string) audit.Event {
			e := voided(audit.KeyWithdrawn, org, keyID)
			e.Outcome = audit.Failure
			return e
		},
	}
}

func voided(t audit.Type, org org.ID, object string) audit.Event {
	e := audit.New(t, org)
	e.Actor = audit.Actor{Kind: audit.System, ID: "operator"}
	e.Object, e.Reason = object, "rollback_accepted"
	return e
}

// Request is what an operator accepts.
type Request struct {
	Sinks     []audit.Sink
	SinkFile  string // the file sink's path; empty: there is none among Sinks
	Reason    string // the reason for the rollback
	Rewritten bool   // whether to accept a log that differs from the lost one
	DryRun    bool   // whether to print only what would be accepted

	Holder    string   // whose Sinks are, as AheadSink has it
	LostSinks []string // holders of sinks that no longer exist
}

// acceptance is a rollback, from the checkpoint of the first sink that the log does not
// extend, and whether the log has its event.
type acceptance struct {
	audit.Rollback
	recorded bool

	request Request
	store   Store
	out     io.Writer
	head    audit.Checkpoint
	ahead   []audit.AheadSink
}

// Accept accepts that the log in store does not extend the sinks' copies, or its newest
// signed checkpoint, and prints what it did. It refuses a rewritten log unless that is
// requested.
// The event is written before a sink's note: after a crash in between, the server still
// refuses to start, and the command can be run again.
func Accept(ctx context.Context, store Store, r Request, out io.Writer) error {
	head, err := store.Head(ctx)
	if err != nil {
		return err
	}
	a := &acceptance{Rollback: audit.Rollback{To: head.Text(), Kept: head.Size, Reason: r.Reason}, request: r, store: store, out: out, head: head}
	if a.ahead, err = store.SinksAhead(ctx); err != nil {
		return err
	}
	if err := a.compare(ctx); err != nil {
		return err
	}
	if err := a.nameLosses(ctx); err != nil {
		return err
	}
	before := a.recorded
	accepted, err := a.acceptHere(ctx)
	if err != nil {
		return err
	}
	lost, elsewhere, err := a.elsewhere(ctx, accepted && !before)
	if err != nil {
		return err
	}
	if (accepted || lost) && r.DryRun {
		if err := a.nameOpen(ctx); err != nil {
			return err
		}
	}
	if !accepted && !lost {
		if _, err := fmt.Fprintln(out, "nothing to accept: the log extends what the sinks hold"); err != nil {
			return err
		}
	}
	return heldBack(elsewhere)
}

// acceptHere accepts the rollback in the request's sinks and of the signed checkpoints,
// and reports whether there was one.
func (a *acceptance) acceptHere(ctx context.Context) (accepted bool, err error) {
	for _, s := range a.request.Sinks {
		done, err := a.acceptIn(ctx, s)
		if err != nil {
			return false, fmt.Errorf("sink %s: %w", s.Name(), err)
		}
		accepted = accepted || done
	}
	done, err := a.acceptSigned(ctx)
	return accepted || done, err
}

// compare returns how many of the log's first events agree with the sinks and the signed
// checkpoints: all, unless the log was rewritten. A rollback that was accepted before
// with the same reason, in another sink or by an interrupted run, is accepted again.
func (a *acceptance) compare(ctx context.Context) error {
	held, err := a.held(ctx)
	if err != nil {
		return err
	}
	problem, err := held.Differs(ctx, a.head, a.store.LeafHashes)
	if err != nil || problem == nil {
		return err
	}
	earlier, err := acceptedBefore(ctx, a.store, problem.Index)
	if err != nil {
		return err
	}
	for _, e := range earlier {
		if e.Reason == a.request.Reason {
			a.Rollback, a.recorded = e.Rollback, true
			return nil
		}
	}
	changed, err := a.store.ChangedAt(ctx, problem.Index)
	if err != nil {
		return err
	}
	switch {
	case changed: // nobody knew then that this sink held more: its replica was away
		a.Kept = problem.Index
		_, err = fmt.Fprintf(a.out, "the database failed over, or was recovered, when the log held %d events; this sink held more, and the log went on without them\n", problem.Index)
		return err
	case a.request.Rewritten:
		a.Kept = problem.Index
		_, err = fmt.Fprintf(a.out, "rewritten: %v\n", problem)
		return err
	case len(earlier) > 0:
		return fmt.Errorf("the sink's copy differs from event %d on. Event %d accepted a rollback that explains this; if you meant that one, repeat --reason %q: %w", problem.Index, earlier[0].Index, earlier[0].Reason, problem)
	}
	return fmt.Errorf("this is more than a rollback, the log was rewritten: %w; keep the database and the sinks as evidence, and find out who changed it; only --rewritten accepts it", problem)
}

// acceptedBefore returns the accepted rollbacks that explain a difference from a sink at
// an index.
func acceptedBefore(ctx context.Context, db Store, differs int64) ([]verify.AcceptedRollback, error) {
	var all []verify.AcceptedRollback
	archived, err := db.Archived(ctx)
	if err != nil {
		return nil, err
	}
	for index := archived.Removed; ; {
		page, err := db.Entries(ctx, index, acceptedPage)
		if err != nil || len(page) == 0 {
			return all, err
		}
		for _, entry := range page {
			e, err := audit.Decode(entry.Leaf)
			if err != nil {
				return nil, err
			}
			if e.Type != audit.RollbackAccepted {
				continue
			}
			if r := verify.RollbackOf(e, entry.Index); r.Accounts(differs) {
				all = append(all, r)
			}
		}
		index += int64(len(page))
	}
}

// acceptedPage is how many events are read at once.
const acceptedPage = 1000

// held is what the log is compared with: the events in the sink's file, and every
// checkpoint.
func (a *acceptance) held(ctx context.Context) (*verify.Copy, error) {
	held := &verify.Copy{}
	if a.request.SinkFile != "" {
		var err error
		if held, err = verify.ReadCopyFile(a.request.SinkFile); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	for _, s := range a.request.Sinks {
		last, err := s.Last(ctx)
		if errors.Is(err, audit.ErrCheckpointLost) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("sink %s: %w", s.Name(), err)
		}
		held.AddCheckpoint(last)
	}
	return held, verify.EachSigned(ctx, a.store, func(s audit.Signed) error { held.AddCheckpoint(s.Checkpoint); return nil })
}

// lastOf is what a sink holds, or ErrCheckpointLost.
func lastOf(ctx context.Context, db Store, s audit.Sink) (audit.Checkpoint, error) {
	held, err := s.Last(ctx)
	if err != nil {
		return held, err
	}
	next, err := db.SinkNext(ctx, s.Name())
	if err != nil {
		return held, err
	}
	return held, audit.CheckHeld(s, held, next)
}

// extended reports whether the log, which is at head, extends held.
func extended(ctx context.Context, db Store, head, held audit.Checkpoint) (bool, error) {
	if held.Size == 0 {
		return true, nil
	}
	if held.Size > head.Size {
		return false, nil
	}
	then, err := db.At(ctx, held.Size)
	return then == held, err
}

func (a *acceptance) acceptIn(ctx context.Context, s audit.Sink) (bool, error) {
	held, err := lastOf(ctx, a.store, s)
	had := fmt.Sprintf("had acknowledged %d", held.Size)
	switch {
	case errors.Is(err, audit.ErrCheckpointLost):
		had = "does not report what it had acknowledged: " + err.Error()
		if held, err = a.store.At(ctx, 0); err != nil {
			return false, err
		}
	case err != nil:
		return false, err
	default:
		if ok, err := extended(ctx, a.store, a.head, held); ok || err != nil {
			return false, err
		}
	}
	if a.request.DryRun {
		_, err = fmt.Fprintf(a.out, "would be accepted: the log continues from %d events; sink %s %s\n", a.head.Size, s.Name(), had)
		return true, err
	}
	if err := a.record(ctx, held); err != nil {
		return false, err
	}
	if s.Shared() {
		// The position is stored first: if it were higher than the sink's, a replica would take
		// the entries for acknowledged.
		if err := a.store.Acknowledge(ctx, s.Name(), 0, nil); err != nil {
			return false, err
		}
	}
	if err := s.AcceptRollback(ctx, a.Rollback); err != nil {
		return false, err
	}
	_, err = fmt.Fprintf(a.out, "accepted: the log continues from %d events; sink %s %s\n", a.head.Size, s.Name(), had)
	return true, err
}

// record adds the event that accepts the rollback. It gets its index at once, directly
// after the kept events: events recorded since the rollback, or that lost their index
// in it, come later.
func (a *acceptance) record(ctx context.Context, held audit.Checkpoint) error {
	if a.recorded {
		return nil
	}
	a.From = held.Text()
	// The others are told by acceptedBefore, or at their start, that theirs is to be accepted, too.
	ends := slices.DeleteFunc(slices.Clone(a.ahead), a.isLost)
	if err := a.acceptEvent(ctx, a.head, a.Event(), ends); err != nil {
		return err
	}
	a.recorded = true
	return nil
}

func (a *acceptance) acceptEvent(ctx context.Context, head audit.Checkpoint, e audit.Event, ends []audit.AheadSink) error {
	void, err := a.store.AcceptRollback(ctx, head, e, ends, voids())
	if err == nil && void > 0 {
		_, err = fmt.Fprintf(a.out, "void: %d open enrollments, whose tokens may have been used since; mint new ones\n", void)
	}
	return err
}

func (a *acceptance) nameOpen(ctx context.Context) error {
	open, err := a.store.OpenEnrollments(ctx)
	if err == nil && open > 0 {
		_, err = fmt.Fprintf(a.out, "would be void: %d open enrollments\n", open)
	}
	return err
}

// acceptSigned sets aside the signed checkpoints that the log does not extend.
func (a *acceptance) acceptSigned(ctx context.Context) (bool, error) {
	last, err := a.store.LastSigned(ctx)
	if err != nil {
		return false, err
	}
	if ok, err := extended(ctx, a.store, a.head, last.Checkpoint); ok || err != nil {
		return false, err
	}
	if a.request.DryRun {
		_, err = fmt.Fprintf(a.out, "would be accepted: the log continues from %d events; the newest signed checkpoint covered %d\n", a.head.Size, last.Size)
		return true, err
	}
	first := last.Seq
	err = verify.EachSigned(ctx, a.store, func(s audit.Signed) error {
		ok, err := extended(ctx, a.store, a.head, s.Checkpoint)
		if err == nil && !ok {
			first = min(first, s.Seq)
		}
		return err
	})
	if err != nil {
		return false, err
	}
	if err := a.record(ctx, last.Checkpoint); err != nil {
		return false, err
	}
	if err := a.store.Supersede(ctx, first); err != nil {
		return false, err
	}
	_, err = fmt.Fprintf(a.out, "accepted: the log continues from %d events; the newest signed checkpoint covered %d\n", a.head.Size, last.Size)
	return true, err
}
