package node

import (
	"crypto/sha256"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// What is remembered of envelopes.
const (
	envelopesKept   = 1 << 12
	longestEnvelope = 4 << 10 // of those, in bytes: all together take 16 MiB at most
	envelopeLife    = 5 * time.Minute
)

// envelopes remembers for a while what went out: when an organization's nodes boot at
// once, each of its secrets is opened and sealed to their key once, not once a
// node. What is kept here is for the key's holder only, as it was on the wire, and is found
// by a stored secret's whole ciphertext, so that it is not given for one that was
// changed or deleted.
type envelopes struct {
	kept *lru.Cache[envelopeID, keptEnvelope]
}

// envelopeID identifies a stored secret and the key that it is sealed to.
type envelopeID [sha256.Size]byte

type keptEnvelope struct {
	text  []byte
	until time.Time
}

func newEnvelopes() (*envelopes, error) {
	kept, err := lru.New[envelopeID, keptEnvelope](envelopesKept)
	return &envelopes{kept}, err
}

// identify takes the recipient's fingerprint. It has no NUL, and neither have the parts
// of a binding, so different ones are different bytes.
func identify(recipient string, s orgkey.Sealed) envelopeID {
	b := append([]byte(recipient), 0)
	b = append(append(b, s.Binding.Context()...), 0)
	return sha256.Sum256(append(b, s.Ciphertext...))
}

func (e *envelopes) get(id envelopeID, now time.Time) []byte {
	if known, ok := e.kept.Get(id); ok && now.Before(known.until) {
		return known.text
	}
	return nil
}

func (e *envelopes) add(id envelopeID, text []byte, now time.Time) {
	if len(text) <= longestEnvelope {
		e.kept.Add(id, keptEnvelope{text, now.Add(envelopeLife)})
	}
}
