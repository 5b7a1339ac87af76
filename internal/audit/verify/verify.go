// Package verify verifies that a log is unchanged since it was recorded. It does not
// use the code that builds the log: it recomputes the tree from the leaves, with two
// hash functions of golang.org/x/mod/sumdb/tlog, and compares it with the stored
// hashes, with the columns and records that repeat the events, and with copies from
// elsewhere.
package verify

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/go-json-experiment/json"

	"github.com/orgkeys/orgkeys/internal/audit"
)

// Row is an event as the database holds it: the leaf, and the columns that
// repeat it for queries.
type Row struct {
	Index int64
	audit.Record
}

// StoredHash is one of the tree's hashes, numbered as tlog does.
type StoredHash struct {
	Index int64
	Hash  tlog.Hash
}

// Log is a log that grows, and is moved to its archive, while it is verified. Its
// implementation is sqlstore.
type Log interface {
	Past
	// Snapshot calls do with the log at one moment.
	Snapshot(ctx context.Context, do func(Snapshot) error) error
}

// Snapshot is a log at rest, to be verified.
type Snapshot interface {
	Checkpoints
	Head(ctx context.Context) (audit.Checkpoint, error)
	// Rows yields the sequenced events in the order of their indices.
	Rows(ctx context.Context) iter.Seq2[Row, error]
	// Hashes yields the tree's hashes in the order of their numbers.
	Hashes(ctx context.Context) iter.Seq2[StoredHash, error]
	// Unsequenced counts events that have no index yet.
	Unsequenced(ctx context.Context) (int64, error)
	// Unauthenticated counts events that the sequencer refused an index.
	Unauthenticated(ctx context.Context) (int64, error)
	// Erasing returns the persons in PersonErased events that have no index yet.
	Erasing(ctx context.Context) ([]string, error)
	// Policies calls do with the files of every policy that was in force, by name.
	Policies(ctx context.Context, do func(revision string, files map[string][]byte) error) error
	// ReceiptSinks names the sinks of which there are receipts.
	ReceiptSinks(ctx context.Context) ([]string, error)
	// ReceiptKeys returns what sinks sign receipts with.
	ReceiptKeys(ctx context.Context) ([]audit.ReceiptKey, error)
	// Receipts returns a sink's receipts for the events from index from to before to.
	Receipts(ctx context.Context, sink string, from, to int64) ([]audit.Receipt, error)
	// Contradictions describes records and events that do not agree.
	Contradictions(ctx context.Context, a ArchivedKeys) ([]string, error)
	Archived(ctx context.Context) (audit.Archived, error)
}

// Problem is the first error that verification found.
type Problem struct {
	Index int64 // of the event, or -1 if the problem is not about one event
	What  string
}

func (p *Problem) Error() string {
	if p.Index < 0 {
		return p.What
	}
	return fmt.Sprintf("event %d: %s", p.Index, p.What)
}

// Problemf returns a problem with an event; index -1: not about one event.
func Problemf(index int64, format string, args ...any) *Problem {
	return &Problem{index, fmt.Sprintf(format, args...)}
}

// Report is the result of verifying a log without errors.
type Report struct {
	Log             audit.Checkpoint
	Covered         int64     // events that the copy covers
	Uncovered       time.Time // when the first event after them was recorded; zero: there is none
	Signed          int64     // events that a signed checkpoint covers
	Unsequenced     int64     // events that have no index yet, and so no proof
	Unauthenticated int64     // events that the sequencer refused an index
	Receipts        int64     // each signed by a stored receipt key
	Erased          int64     // events whose personal part was erased
	Rollbacks       []audit.Rollback
	Unexplained     int64 // of these, whose event was not read: it is in the archive that was not, or was removed from it
	Before          bool  // the copy is older than the last of them, in which the rest of the copy was lost
	Archived        int64 // first events that were moved out of the database
	Removed         int64 // first entries that the archive no longer has
	Unread          error // why the archive was not read; nil: it was, or there is none
}

// Verify checks that every event matches the tree, that none is missing, inserted or
// out of order, that the log extends copy, which may be nil, and that the tables
// beside the log agree with it: records, policies, receipts, erasures. The archive is read
// first, outside of any snapshot of the database. An error in the log is a *Problem.
func Verify(ctx context.Context, log Log, copy *Copy, progress Progress) (Report, error) {
	head, err := log.Head(ctx)
	if err != nil {
		return Report{}, err
	}
	if copy == nil {
		copy = &Copy{}
	}
	v := &verification{
		Report: Report{Log: head, Rollbacks: copy.Rollbacks}, copy: copy, progress: progress.Ticking(),
		policies: map[string]int64{}, erased: map[string]int64{}, missing: map[string]int64{},
	}
	for err = errMovedOn; errors.Is(err, errMovedOn); { // which is read, too
		if err = v.readArchive(ctx, log); err != nil {
			return Report{}, v.first(err)
		}
		err = log.Snapshot(ctx, func(s Snapshot) error { return v.atRest(ctx, s) })
	}
	if err != nil {
		return Report{}, err
	}
	return v.Report, nil
}

// atRest verifies what the database holds, behind what was read of the archive.
func (v *verification) atRest(ctx context.Context, s Snapshot) error {
	if err := v.open(ctx, s); err != nil {
		return err
	}
	if err := v.first(v.checkLog(ctx, s)); err != nil {
		return err
	}
	if err := errors.Join(v.checkPolicies(ctx, s), v.checkErasures(ctx, s)); err != nil {
		return err
	}
	contradictions, err := s.Contradictions(ctx, v.archived)
	if err == nil && len(contradictions) > 0 {
		err = &Problem{-1, contradictions[0]}
	}
	return err
}

func (v *verification) checkLog(ctx context.Context, s Snapshot) (err error) {
	if v.Unsequenced, err = s.Unsequenced(ctx); err != nil {
		return err
	}
	if v.Unauthenticated, err = s.Unauthenticated(ctx); err != nil {
		return err
	}
	if err := v.openReceipts(ctx, s); err != nil {
		return err
	}
	if err := v.walk(ctx, s); err != nil {
		return err
	}
	if err := v.finish(); err != nil {
		return err
	}
	return v.checkClaims()
}

// first returns the problem that comes first: that the log differs from the copy, or err.
func (v *verification) first(err error) error {
	if parted := v.unaccounted(); parted != nil {
		return parted
	}
	return err
}

type verification struct {
	Report
	tree     Frontier
	copy     *Copy
	progress func(done, all int64)
	accepted []AcceptedRollback
	parted   *Problem  // the first event that differs from the copy
	behind   time.Time // when the first event after the copy's checkpoints was recorded

	policies map[string]int64 // by revision, the first event that it decided
	erased   map[string]int64 // by person, the newest PersonErased event
	missing  map[string]int64 // by actor, the newest event whose personal part is gone

	archived  ArchivedKeys
	claims    []claim
	delivered map[string][]byte
	hashed    int64        // first events of which only hashes were read
	pending   []hashBehind // of the tree, of which the database's are not compared yet

	receiptKeys map[string]audit.ReceiptKeys // by sink
	receipts    map[receiptOf][]byte         // of the page under way
}

func (v *verification) walk(ctx context.Context, s Snapshot) error {
	stored, stop := iter.Pull2(s.Hashes(ctx))
	defer stop()
	if v.tree.size == 0 {
		if err := v.checkCheckpoint(); err != nil {
			return err
		}
	}
	if err := v.compareArchived(stored); err != nil {
		return err
	}
	for row, err := range s.Rows(ctx) {
		if err != nil {
			return err
		}
		if row.Index != v.tree.size {
			return &Problem{v.tree.size, "it is missing"}
		}
		if v.archived.Known.IsZero() {
			v.archived.Known = row.Time
		}
		if err := v.checkRow(row); err != nil {
			return err
		}
		if err := v.checkReceipts(ctx, s, row); err != nil {
			return err
		}
		if err := v.grow(tlog.RecordHash(row.Leaf), stored); err != nil {
			return err
		}
		v.progress(v.tree.size, v.Log.Size)
	}
	if h, err, more := stored(); more {
		if err != nil {
			return err
		}
		return &Problem{v.tree.size, fmt.Sprintf("it is missing, although the tree has a hash (%d) for it", h.Index)}
	}
	return nil
}

// grow appends a leaf, compares the hashes with the stored ones, and the tree with the
// copy's checkpoints.
func (v *verification) grow(h tlog.Hash, stored func() (StoredHash, error, bool)) error {
	for _, h := range v.tree.Push(h) {
		if err := checkHash(h, v.tree.size-1, stored); err != nil {
			return err
		}
	}
	return v.checkCheckpoint()
}

// checkRow compares an event with its columns and with the sink's copy.
func (v *verification) checkRow(row Row) error {
	e, err := audit.Decode(row.Leaf)
	if err != nil {
		return &Problem{row.Index, "its leaf is not an event"}
	}
	if e.ID != row.ID || !e.Time.Equal(row.Time) || e.Type != row.Type || e.Reason != row.Reason || e.Org != row.Org ||
		e.Actor != (audit.Actor{Kind: row.Kind, ID: row.Actor}) || e.Object != row.Object {
		return &Problem{row.Index, "its columns differ from its leaf: it was changed"}
	}
	v.compare(row.Index, tlog.RecordHash(row.Leaf))
	return v.checkEvent(row, e)
}

// compare compares an event with the sink's copy.
func (v *verification) compare(index int64, h tlog.Hash) {
	if held, ok := v.copy.leaf(index); ok && held != h {
		v.parted = &Problem{index, "it differs from the sink's copy: the log was rewritten"}
		v.copy.keep(index)
	}
}

func (v *verification) checkEvent(row Row, e audit.Event) error {
	if row.Index == v.copy.end() {
		v.Uncovered = e.Time
	}
	if row.Index == v.Covered {
		v.behind = e.Time
	}
	switch e.Type {
	case audit.RollbackAccepted:
		v.accepted = append(v.accepted, RollbackOf(e, row.Index))
	case audit.PersonErased:
		v.erased[e.Object] = row.Index
	case audit.LogArchived, audit.LogPruned:
		v.claims = append(v.claims, claim{row.Index, e.Moved(), e.Removed()})
	}
	if _, known := v.policies[e.Policy]; !known && e.Policy != "" {
		v.policies[e.Policy] = row.Index
	}
	return v.checkPersonal(row)
}

func (v *verification) checkPersonal(row Row) error {
	var l audit.Leaf
	if err := json.Unmarshal(row.Leaf, &l); err != nil {
		return err
	}
	switch {
	case row.Personal == nil && l.Personal != "":
		v.Erased++
		v.missing[row.Actor] = row.Index
	case row.Personal != nil && audit.PersonalDigest(row.Personal) != l.Personal:
		return &Problem{row.Index, "its personal part was changed"}
	}
	return nil
}

func checkHash(want tlog.Hash, index int64, stored func() (StoredHash, error, bool)) error {
	got, err, ok := stored()
	if err != nil {
		return err
	}
	if !ok {
		return &Problem{index, "the tree does not contain it: it was appended or inserted"}
	}
	if got.Hash != want {
		return &Problem{index, "it does not match the tree: the event or the tree was changed, moved or inserted"}
	}
	return nil
}

// checkCheckpoint compares the tree, at its present size, with the copy's
// checkpoints of that size.
func (v *verification) checkCheckpoint() error {
	for _, c := range v.copy.checkpoints(v.tree.size) {
		if c.Origin != v.Log.Origin {
			return &Problem{-1, fmt.Sprintf("the sink's copy is of another log (%s, not %s)", c.Origin, v.Log.Origin)}
		}
		if c.Root != v.tree.Root() {
			return &Problem{max(0, v.tree.size-1), "the tree up to it has a different root than the sink's checkpoint: the log was rewritten"}
		}
		v.Covered = max(v.Covered, c.Size)
	}
	for _, c := range v.copy.signed[v.tree.size] {
		if c.Origin != v.Log.Origin || c.Root != v.tree.Root() {
			return &Problem{max(0, v.tree.size-1), "the tree up to it has a different root than the signed checkpoint: the log was rewritten"}
		}
		v.Signed = max(v.Signed, c.Size)
	}
	return nil
}

func (v *verification) finish() error {
	switch {
	case v.tree.size < v.Log.Size:
		return &Problem{v.tree.size, fmt.Sprintf("it is missing: according to its size the log holds %d events", v.Log.Size)}
	case v.tree.size > v.Log.Size:
		return &Problem{v.Log.Size, fmt.Sprintf("according to its size the log holds %d events: this one was appended", v.Log.Size)}
	case v.tree.Root() != v.Log.Root:
		return &Problem{-1, "the log's root does not match its events"}
	case v.copy.end() > v.tree.size:
		return &Problem{v.tree.size, fmt.Sprintf("it is missing: the sink's copy holds %d events, so the log was truncated or restored", v.copy.end())}
	}
	for size := range v.copy.signed {
		if size > v.tree.size {
			return &Problem{v.tree.size, fmt.Sprintf("it is missing: a signed checkpoint covers %d events, so the log was truncated or restored", size)}
		}
	}
	// Events of the copy vouch for themselves, and only a checkpoint for what comes before them.
	if v.copy.first <= v.Covered {
		v.Covered = max(v.Covered, min(v.copy.end(), v.tree.size))
	} else {
		v.Uncovered = v.behind
	}
	for _, r := range v.Rollbacks {
		switch {
		case slices.ContainsFunc(v.accepted, func(a AcceptedRollback) bool { return a.Rollback == r }):
		case place(r) < v.unread():
			v.Unexplained++
		default:
			return &Problem{-1, "the sink's copy records a rollback for which the log has no event"}
		}
	}
	return nil
}

// unread is how many first events only hashes were read of.
func (v *verification) unread() int64 {
	if v.Unread != nil {
		return v.Archived
	}
	return v.hashed
}

// unaccounted returns the problem that the log differs from the copy, unless the copy
// is older than an accepted rollback that explains it. The event of a rollback counts
// only if a signed checkpoint covers it: anybody who writes to the database could
// insert one. One that was not read excuses nothing.
func (v *verification) unaccounted() error {
	if v.parted == nil {
		return nil
	}
	for _, r := range v.accepted {
		if !r.Accounts(v.parted.Index) {
			continue
		}
		if r.Index < v.Signed {
			v.Rollbacks, v.Before = append(v.Rollbacks, r.Rollback), true
			return nil
		}
		v.parted.What += fmt.Sprintf(", or the copy is older than the rollback that event %d accepted, which no signed checkpoint covers yet", r.Index)
	}
	if v.parted.Index < v.unread() {
		v.parted.What += fmt.Sprintf(", or the copy is older than a rollback whose event is among the first %d, which were not read: use a copy from after it", v.unread())
	}
	return v.parted
}
