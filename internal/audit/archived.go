package audit

import (
	"strconv"
	"time"
)

// Archived is what is no longer in the database: the first events of the log, which
// are in an archive, and the first entries that the archive no longer has.
// The events that say so are in the log, and are covered by a signed checkpoint before
// anything is moved or removed: nobody can pass off a deletion as that.
type Archived struct {
	Moved       int64
	MovedBy     string // the ID of the event that says so
	NextMove    string // of the newest such event: more may be moved
	Removed     int64
	RemovedBy   string
	NextRemoval string
}

// LogMoved is the event that the first n events may be moved out of the database, to
// where, which holds the log up to held. Of these, the first removed ones have no entry there any more.
func LogMoved(n, removed int64, where string, held Checkpoint) Event {
	e := byOperator(LogArchived, n)
	e.Detail["to"], e.Detail["published"] = where, strconv.FormatInt(held.Size, 10)
	if removed > 0 {
		e.Detail["removed"] = strconv.FormatInt(removed, 10)
	}
	return e
}

// EntriesRemoved is the event that the first n entries may be removed from the archive:
// they happened before a time.
func EntriesRemoved(n int64, before time.Time) Event {
	e := byOperator(LogPruned, n)
	e.Detail["before"] = before.UTC().Format(TimeFormat)
	return e
}

// EntriesFoundRemoved is the event that the first n entries are not in the archive at where any
// more, into which this log had been moved before it was set back: what was lost in that says
// there, up to held, that they may be removed.
func EntriesFoundRemoved(n int64, where string, held Checkpoint) Event {
	e := byOperator(LogPruned, n)
	e.Detail["from"], e.Detail["published"] = where, strconv.FormatInt(held.Size, 10)
	return e
}

func byOperator(t Type, n int64) Event {
	e := New(t, "")
	e.Actor = Actor{System, "operator"}
	e.Detail = map[string]string{"events": strconv.FormatInt(n, 10)}
	return e
}

// Moved is how many first events may be moved, as the event says.
func (e Event) Moved() int64 {
	if e.Type != LogArchived {
		return 0
	}
	return count(e.Detail["events"])
}

// Removed is how many first entries may be removed, as the event says.
func (e Event) Removed() int64 {
	switch e.Type {
	case LogPruned:
		return count(e.Detail["events"])
	case LogArchived:
		return count(e.Detail["removed"])
	}
	return 0
}

// count reads a number; what is none counts as 0.
func count(text string) int64 {
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 {
		return 0
	}
	return n
}
