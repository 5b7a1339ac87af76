package orgkey

import (
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"fmt"

	lru "github.com/hashicorp/golang-lru/v2"
)

// keysOpened is how many opened public keys are remembered, about 1 KiB each.
const keysOpened = 1 << 14

// opener opens public keys and remembers them by what was opened: binding and
// ciphertext. So a list asks the back end about new keys only, and a record
// whose ciphertext was changed or moved is still asked about, and refused.
type opener struct {
	sealer Sealer
	opened *lru.Cache[[sha256.Size]byte, *rsa.PublicKey]
}

func newOpener(s Sealer) (*opener, error) {
	opened, err := lru.New[[sha256.Size]byte, *rsa.PublicKey](keysOpened)
	return &opener{s, opened}, err
}

// open opens all of org's records or none.
func (o *opener) open(ctx context.Context, org string, records []Record) ([]*rsa.PublicKey, error) {
	keys := make([]*rsa.PublicKey, len(records))
	var missing []Sealed
	var places []int
	for i, r := range records {
		s := Sealed{Binding{PublicKey, org, r.ID}, r.Sealed}
		if key, ok := o.opened.Get(s.digest()); ok {
			keys[i] = key
			continue
		}
		missing, places = append(missing, s), append(places, i)
	}
	if len(missing) == 0 {
		return keys, nil
	}
	opened, err := o.sealer.Open(ctx, missing)
	if err != nil {
		return nil, err
	}
	for n, i := range places {
		key, err := ParsePublic(opened[n])
		if err != nil {
			return nil, fmt.Errorf("key %s: %w", records[i].ID, err)
		}
		keys[i] = key
		o.opened.Add(missing[n].digest(), key)
	}
	return keys, nil
}

// digest identifies a binding and a ciphertext. Neither organization IDs nor
// key IDs hold a NUL, so no two have the same bytes.
func (s Sealed) digest() [sha256.Size]byte {
	return sha256.Sum256(append(append(s.Binding.Context(), 0), s.Ciphertext...))
}
