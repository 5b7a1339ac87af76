package orgkey

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sync/singleflight"

	"github.com/orgkeys/orgkeys/internal/org"
)

const (
	keysOpened      = 1 << 15         // opened public keys that are remembered, about 1 KiB each
	openingDeadline = 5 * time.Second // for unsealing an organization's keys
	brokenFor       = time.Minute     // before a record that did not open is tried again
)

// SealedKey is an organization's public key as the store holds it.
type SealedKey struct {
	ID     string
	Sealed []byte // the public key, PKIX DER, sealed
}

// Opener decrypts public keys, for the list and for nodes' signatures, and caches
// them by binding and ciphertext. So the back end is asked about new keys only,
// and a record whose ciphertext was changed or moved is still sent to the back
// end, and refused. Whether a key is live is not cached: the transaction that
// acts reads it.
type Opener struct {
	sealer  Sealer
	log     *slog.Logger
	now     func() time.Time
	opened  *lru.Cache[digest, opened]
	opening singleflight.Group
}

type digest [sha256.Size]byte

// opened is what is known of a record: its public key or, if it does not open,
// when to try again.
type opened struct {
	public Public
	broken time.Time
}

// NewOpener returns an opener with an empty cache. now is the clock.
func NewOpener(s Sealer, log *slog.Logger, now func() time.Time) (*Opener, error) {
	cache, err := lru.New[digest, opened](keysOpened)
	return &Opener{sealer: s, log: log, now: now, opened: cache}, err
}

// Open returns org's public keys by ID. A record that does not decrypt is left
// out, and the error, which is returned with the other keys, wraps ErrSealBroken.
// Calls that miss the same keys share one decryption, which outlives the call that
// began it.
func (o *Opener) Open(ctx context.Context, org org.ID, sealed []SealedKey) (map[string]Public, error) {
	keys := make(map[string]Public, len(sealed))
	var missing []Sealed
	var broken error
	for _, k := range sealed {
		s := Sealed{PublicKeyOf(org, k.ID), k.Sealed}
		switch known, ok := o.opened.Get(s.digest()); {
		case ok && known.broken.IsZero():
			keys[k.ID] = known.public
		case ok && o.now().Before(known.broken):
			broken = fmt.Errorf("key %s: %w", k.ID, ErrSealBroken)
		default:
			missing = append(missing, s)
		}
	}
	if len(missing) == 0 {
		return keys, broken
	}
	found, err := o.share(ctx, missing)
	maps.Copy(keys, found)
	return keys, errors.Join(broken, err)
}

// Remember has Open know what the record decrypts to, which the caller has just had sealed: the
// first signature by a new key need not ask the back end.
func (o *Opener) Remember(org org.ID, k SealedKey, public Public) {
	o.opened.Add(Sealed{PublicKeyOf(org, k.ID), k.Sealed}.digest(), opened{public: public})
}

// share unseals items, once for all calls that miss the same.
func (o *Opener) share(ctx context.Context, items []Sealed) (map[string]Public, error) {
	var names strings.Builder
	for _, s := range items {
		d := s.digest()
		names.Write(d[:])
	}
	shared := o.opening.DoChan(names.String(), func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), openingDeadline)
		defer cancel()
		return o.unseal(ctx, items)
	})
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case result := <-shared:
		return result.Val.(map[string]Public), result.Err
	}
}

// unseal decrypts and caches public keys. The sealer decrypts all or none; one
// damaged record must not make an organization's other keys unusable, nor make
// every request without a valid key ask the sealer again.
func (o *Opener) unseal(ctx context.Context, items []Sealed) (map[string]Public, error) {
	keys, err := o.unsealAll(ctx, items)
	if !errors.Is(err, ErrSealBroken) {
		return keys, err
	}
	if len(items) == 1 {
		b := items[0].Binding
		o.log.Error("a public key does not decrypt, so it verifies no signature", "org", b.Org, "key", b.ID, "error", err)
		o.opened.Add(items[0].digest(), opened{broken: o.now().Add(brokenFor)})
		return nil, err
	}
	keys = make(map[string]Public, len(items))
	var broken error
	for i := range items {
		one, err := o.unseal(ctx, items[i:i+1])
		if err != nil && !errors.Is(err, ErrSealBroken) {
			return nil, err
		}
		broken = errors.Join(broken, err)
		maps.Copy(keys, one)
	}
	return keys, broken
}

func (o *Opener) unsealAll(ctx context.Context, items []Sealed) (map[string]Public, error) {
	ders, err := o.sealer.Open(ctx, items)
	if err != nil {
		return nil, fmt.Errorf("decrypting public keys: %w", err)
	}
	keys := make(map[string]Public, len(items))
	for i, der := range ders {
		key, err := ParsePublic(der)
		if err != nil {
			return nil, fmt.Errorf("public key %s: %w", items[i].Binding.ID, err)
		}
		keys[items[i].Binding.ID] = key
		o.opened.Add(items[i].digest(), opened{public: key})
	}
	return keys, nil
}

// digest identifies a binding and a ciphertext. Neither organization IDs nor
// key IDs contain a NUL, so different ones are different bytes.
func (s Sealed) digest() digest {
	return sha256.Sum256(append(append(s.Binding.Context(), 0), s.Ciphertext...))
}
