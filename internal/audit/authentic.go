package audit

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
)

// EventKey authenticates events until they have their index: an event's row has
// its leaf's HMAC-SHA256, and the sequencer gives no index to a row whose MAC is
// wrong. So an attacker who can only write to the database cannot get events
// sequenced, sent to the sinks and signed. A log has one key, which its processes
// share; the database holds it only sealed.
type EventKey [32]byte

// NewEventKey returns a random key.
func NewEventKey() (k EventKey) {
	rand.Read(k[:]) // never fails, crypto/rand
	return k
}

// MAC authenticates a leaf.
func (k EventKey) MAC(leaf []byte) []byte {
	h := hmac.New(sha256.New, k[:])
	h.Write(leaf)
	return h.Sum(nil)
}

// Authentic reports whether mac is that of leaf.
func (k EventKey) Authentic(leaf, mac []byte) bool { return hmac.Equal(k.MAC(leaf), mac) }

// DatabaseChange returns the event that the log goes on, from its checkpoint then on,
// in another database than before. from and to name the two.
func (k EventKey) DatabaseChange(then Checkpoint, from, to string) Event {
	e := New(DatabaseChanged, "")
	e.Actor = Actor{System, "orgkeys"}
	e.Detail = map[string]string{"from": from, "to": to}
	e.Detail["mac"] = base64.StdEncoding.EncodeToString(k.changeMAC(then, e.Detail))
	return e
}

// Changed reports whether e, which comes right behind then in a log, is the event
// of DatabaseChange. An event that has its place bears no other MAC, and whoever
// can write to the database could put one here, to have a rewritten log taken for
// one that was cut short by a failover.
func (k EventKey) Changed(then Checkpoint, e Event) bool {
	mac, err := base64.StdEncoding.DecodeString(e.Detail["mac"])
	return err == nil && e.Type == DatabaseChanged && hmac.Equal(mac, k.changeMAC(then, e.Detail))
}

// changeMAC is by a key of its own, so that it is no leaf's MAC.
func (k EventKey) changeMAC(then Checkpoint, detail map[string]string) []byte {
	own := EventKey(k.MAC([]byte(DatabaseChanged)))
	return own.MAC(fmt.Appendf(nil, "%q %q %q", then.Text(), detail["from"], detail["to"]))
}

// UnauthenticatedError says that events were set aside because their MACs are wrong.
type UnauthenticatedError struct{ Count int }

func (e *UnauthenticatedError) Error() string {
	return fmt.Sprintf("%d events in the database were not recorded by orgkeys, and get no index in the log", e.Count)
}
