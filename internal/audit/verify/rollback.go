package verify

import (
	"strconv"

	"github.com/orgkeys/orgkeys/internal/audit"
)

// AcceptedRollback is a rollback and the index of the event that accepted it.
type AcceptedRollback struct {
	audit.Rollback
	Index int64
}

// Accounts reports whether the rollback explains that a copy of the log, made before
// it, differs at an index.
func (r AcceptedRollback) Accounts(differs int64) bool {
	return r.Kept <= differs && differs <= r.Index
}

// RollbackOf is the rollback that the event at an index records. If the event does not
// say how many events were kept, none were.
func RollbackOf(e audit.Event, index int64) AcceptedRollback {
	kept, _ := strconv.ParseInt(e.Detail["kept"], 10, 64)
	return AcceptedRollback{audit.Rollback{From: e.Detail["from"], To: e.Detail["to"], Kept: kept, Reason: e.Detail["reason"]}, index}
}

// place is the index of the rollback's event: it comes right behind To.
func place(r audit.Rollback) int64 {
	to, _ := audit.ParseCheckpoint(r.To) // was read before, or counts as size 0
	return to.Size
}
