package chaos

import (
	"crypto/sha256"
	"fmt"
	"strings"
	"testing"
	"time"
)

// sound is the evidence of a run in which nothing was broken: one key of each
// fate, in an organization that may have three.
func sound() Evidence {
	e := Evidence{
		Limit:     3,
		Received:  []Received{{"acme", "kept", "print of kept"}, {"acme", "deleted", "print of deleted"}, {"acme", "cut", "print of cut"}},
		Deletions: map[string]bool{"request-1": true},
		Deleted:   []string{"deleted"},
		Listed:    map[string][]string{"acme": {"kept", "unconfirmed"}},
		Public:    map[string]string{"kept": "print of kept", "unconfirmed": "print of unconfirmed"},
		Device:    map[string]time.Time{},
	}
	released := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	e.Keys = []KeyRow{
		{"kept", "acme", "released", 1, released}, {"deleted", "acme", "deleted", 0, released}, {"cut", "acme", "deleted", 0, released},
		{"swept", "acme", "deleted", 0, time.Time{}}, {"unconfirmed", "acme", "released", 2, released},
	}
	for _, l := range []Leaf{
		{Type: "orgkey.created", Object: "kept"}, {Type: "orgkey.created", Object: "deleted"}, {Type: "orgkey.created", Object: "cut"},
		{Type: "orgkey.withdrawn", Object: "cut", Reason: "write_failed"},
		{Type: "orgkey.deleted", Object: "deleted", Request: "request-1"},
		{Type: "orgkey.created", Object: "swept"}, {Type: "orgkey.withdrawn", Object: "swept", Reason: "expired"},
		{Type: "orgkey.created", Object: "unconfirmed"},
	} {
		e.append(l)
	}
	for _, l := range e.Log {
		e.Device[l.ID] = released.Add(-time.Second)
	}
	return e
}

// append puts an event at the end of the log.
func (e *Evidence) append(l Leaf) {
	l.Index, l.Org = int64(len(e.Log)), "acme"
	l.ID = fmt.Sprint("event-", l.Index)
	l.Detail.Fingerprint = "print of " + l.Object
	l.Raw = []byte(l.ID)
	e.Log = append(e.Log, l)
	e.hash()
}

func (e *Evidence) hash() {
	hashes := make([][32]byte, len(e.Log))
	for i, l := range e.Log {
		hashes[i] = sha256.Sum256(append([]byte{0}, l.Raw...))
	}
	root := rootOf(hashes)
	e.Size, e.Root = int64(len(e.Log)), root[:]
}

func TestNothingIsFoundInASoundRun(t *testing.T) {
	if broken := Check(sound()); len(broken) > 0 {
		t.Errorf("found %q", broken)
	}
}

// TestRootOf: the root of RFC 9162's example tree shape, computed by hand.
func TestRootOf(t *testing.T) {
	leaf := func(s string) [32]byte { return sha256.Sum256([]byte("\x00" + s)) }
	node := func(l, r [32]byte) [32]byte { return sha256.Sum256(append(append([]byte{1}, l[:]...), r[:]...)) }
	a, b, c := leaf("a"), leaf("b"), leaf("c")
	if rootOf([][32]byte{a, b, c}) != node(node(a, b), c) {
		t.Error("the root of three leaves is wrong")
	}
}

// TestEveryViolationIsFound plants one violation of each kind.
func TestEveryViolationIsFound(t *testing.T) {
	for _, tt := range []struct {
		name  string
		plant func(*Evidence)
		found string
	}{
		{"a received key is gone without a word", func(e *Evidence) { e.Listed["acme"] = []string{"unconfirmed"}; e.Keys[0].State = "lost" }, "key kept was received, and is neither listed nor ended"},
		{"a received key was swept", func(e *Evidence) { e.Log[3].Reason = "expired" }, `key cut was received, and withdrawn for the reason "expired"`},
		{"a received key was cancelled", func(e *Evidence) { e.Log[3].Reason = "cancelled" }, `key cut was received, and withdrawn for the reason "cancelled"`},
		{"a received key was deleted by nobody", func(e *Evidence) { e.Deletions = nil }, "deleted by a request that nobody made"},
		{"a received key was never released", func(e *Evidence) { e.Keys[0].Released = time.Time{} }, "key kept was received, and never released"},
		{"a key was handed out twice", func(e *Evidence) { e.Received = append(e.Received, e.Received[0]) }, "key kept was received twice"},
		{"a client holds a key that is not the listed one", func(e *Evidence) { e.Public["kept"] = "print of another" }, "key kept was received, and another is listed under its ID"},
		{"a client holds a key that is not the one in the log", func(e *Evidence) { e.Log[1].Detail.Fingerprint = "print of another" }, "key deleted was received, and the log tells of another under its ID"},
		{"one key was handed to two clients", func(e *Evidence) { e.Received[2].Thumbprint = e.Received[0].Thumbprint }, "keys kept and cut are one"},
		{"an answered deletion was lost", func(e *Evidence) { e.Deleted = append(e.Deleted, "kept") }, "the deletion of key kept was answered"},
		{"an organization was above its limit for a moment", func(e *Evidence) { e.Limit = 2 }, "organization acme has 3 keys, and may have 2"},
		{"a key was created twice", func(e *Evidence) { e.append(Leaf{Type: "orgkey.created", Object: "swept"}) }, "key swept was created twice"},
		{"a key ended twice", func(e *Evidence) { e.append(Leaf{Type: "orgkey.deleted", Object: "cut"}) }, "key cut ended twice"},
		{"a key ended that nobody created", func(e *Evidence) { e.append(Leaf{Type: "orgkey.withdrawn", Object: "ghost"}) }, "key ghost of organization acme ended and was never created"},
		{"a release without its event", func(e *Evidence) { e.Log[0].Type = "orgkey.listed" }, "key kept was released, and the log does not say that it was created"},
		{"a release without Vault's audit entry", func(e *Evidence) { delete(e.Device, "event-0") }, "key kept was released, and Vault's audit device does not have its event"},
		{"a release before Vault's audit entry", func(e *Evidence) { e.Device["event-0"] = e.Keys[0].Released.Add(time.Millisecond) }, "key kept was released 1ms before Vault's audit device had its event"},
		{"a leaf was altered", func(e *Evidence) { e.Log[2].Raw = []byte("altered") }, "the log's root does not match its events"},
		{"an event is missing", func(e *Evidence) { e.Log = append(e.Log[:2:2], e.Log[3:]...) }, "the log has no event 2"},
		{"the log's end is missing", func(e *Evidence) { e.Log = e.Log[:7] }, "the log's head says 8 events, and there are 7"},
		{"an event never got its place", func(e *Evidence) { e.Unplaced = 1 }, "1 events have no place in the log"},
		{"audit verify objects", func(e *Evidence) { e.Verified = "event 3: it was altered" }, "audit verify: event 3: it was altered"},
		{"an ended key is usable", func(e *Evidence) { e.Keys[1].State, e.Keys[1].Slot = "released", 3 }, "key deleted has ended, and its record is released"},
		{"a released key is not listed", func(e *Evidence) { e.Listed["acme"] = []string{"kept"} }, "key unconfirmed is released and not listed"},
		{"a pending key is listed", func(e *Evidence) { e.Keys[4].State = "pending" }, "key unconfirmed is listed, and its record is pending"},
		{"a record was deleted without an event", func(e *Evidence) { e.Keys[4].State, e.Keys[4].Slot, e.Listed["acme"] = "deleted", 0, []string{"kept"} }, "the record of key unconfirmed is deleted, and no event says why"},
		{"a record is gone", func(e *Evidence) { e.Keys = append(e.Keys[:3:3], e.Keys[4:]...) }, "key swept was created, and there is no record of it"},
		{"two keys have one place", func(e *Evidence) { e.Keys[4].Slot = 1 }, "key unconfirmed has place 1 of organization acme"},
		{"a place beyond the limit", func(e *Evidence) { e.Keys[4].Slot = 4 }, "key unconfirmed has place 4 of organization acme"},
		{"a reservation is left", func(e *Evidence) { e.Keys = append(e.Keys, KeyRow{"stale", "acme", "reserved", 3, time.Time{}}) }, "key stale is still reserved"},
		{"a pending record is left", func(e *Evidence) { e.Keys = append(e.Keys, KeyRow{"stale", "acme", "pending", 3, time.Time{}}) }, "key stale is still pending"},
		{"a Transit key is left", func(e *Evidence) { e.Transit = []string{"orphan"} }, "Transit still has key orphan"},
		{"a lock is left", func(e *Evidence) { e.Locks = []string{"orgkeys:quota:{acme}"} }, "lock orgkeys:quota:{acme} is left"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := sound()
			tt.plant(&e)
			if broken := strings.Join(Check(e), "\n"); !strings.Contains(broken, tt.found) {
				t.Errorf("found %q, want %q", broken, tt.found)
			}
		})
	}
}
