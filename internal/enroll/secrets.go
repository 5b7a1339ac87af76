package enroll

import (
	"bytes"
	"crypto/sha256"
	"sync"
	"time"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

const (
	secretLife  = 10 * time.Minute // a token is mostly used soon, and a node that waits for approval asks again and again
	secretsKept = 4096
)

// secrets remembers what tokens' sealed secrets open to, so that the back end need not open
// them for each question. One is found by its binding and ciphertext together: one that was changed or moved
// in the database goes to the back end, and is refused there. Whether an enrollment is
// still good is not remembered.
type secrets struct {
	mu    sync.Mutex
	known map[[sha256.Size]byte]secret
}

type secret struct {
	k     []byte
	since time.Time
}

func secretOf(s orgkey.Sealed) [sha256.Size]byte {
	return sha256.Sum256(append(append(s.Binding.Context(), 0), s.Ciphertext...))
}

// remember keeps a copy of k.
func (r *secrets) remember(s orgkey.Sealed, k []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	at := secretOf(s)
	if _, ok := r.known[at]; ok || len(r.known) >= secretsKept {
		return
	}
	if r.known == nil {
		r.known = map[[sha256.Size]byte]secret{}
	}
	r.known[at] = secret{bytes.Clone(k), time.Now()}
}

// find returns a copy, which the caller clears, or nil.
func (r *secrets) find(s orgkey.Sealed) []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	known := r.known[secretOf(s)]
	if time.Since(known.since) > secretLife {
		return nil
	}
	return bytes.Clone(known.k)
}

// forget clears those whose time is over.
func (r *secrets) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for at, known := range r.known {
		if time.Since(known.since) > secretLife {
			clear(known.k)
			delete(r.known, at)
		}
	}
}
