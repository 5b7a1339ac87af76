package audit

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
)

// EventKey authenticates events until they have their place in the log: an
// event's row bears its leaf's HMAC-SHA256, and the sequencer gives no index to
// one whose MAC is wrong. So whoever can write to the database and does
// nothing else cannot have events sequenced, sent to the sinks and signed. A
// log has one key, which its processes share and the database holds sealed only.
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

// UnauthenticatedError says that events were set aside, whose rows nobody who
// has the key has written.
type UnauthenticatedError struct{ Count int }

func (e *UnauthenticatedError) Error() string {
	return fmt.Sprintf("%d events in the database were not recorded by orgkeys, and get no place in the log", e.Count)
}
