package vault

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// rewrapBatch is how many records are rewrapped by one call and stored by one
// transaction, which a server's writers wait for.
const rewrapBatch = 100

// SealedStore holds what is sealed. Its implementation is sqlstore.
type SealedStore interface {
	// CountSealed returns how many records of a purpose there are, for the progress.
	CountSealed(ctx context.Context, purpose string) (int, error)
	// SealedAfter returns at most limit records of after's purpose behind it.
	SealedAfter(ctx context.Context, after orgkey.Binding, limit int) ([]orgkey.Sealed, error)
	// Reseal replaces those of the old values that are still stored, in one
	// transaction, and returns how many.
	Reseal(ctx context.Context, old []orgkey.Sealed, fresh [][]byte) (int, error)
}

// Rewrapped is what a run has done.
type Rewrapped struct {
	Version int // of the sealing key, to which records were brought
	Count   int // of records
	Broken  int // records that do not open
}

// Err reports records that do not open.
func (r Rewrapped) Err() error {
	if r.Broken == 0 {
		return nil
	}
	return fmt.Errorf("%w: %d of them, named above; restore them from a backup, or let their organizations make new ones", orgkey.ErrSealBroken, r.Broken)
}

// RewrapAll rewraps every record in store under the sealing key's newest version, inside
// Vault, and reports its progress. If that version is younger than settled, it waits and
// then checks all records again. It may be interrupted and run again; what it has done is
// returned with any error.
func (s *Sealer) RewrapAll(ctx context.Context, store SealedStore, settled time.Duration, progress io.Writer) (Rewrapped, error) {
	r := rewrapper{db: store, sealer: s, progress: progress, failed: map[orgkey.Binding]bool{}}
	err := r.run(ctx, settled)
	return Rewrapped{Version: r.key.Latest, Count: r.rewrapped, Broken: len(r.failed)}, err
}

// rewrapper is one run.
type rewrapper struct {
	db       SealedStore
	sealer   *Sealer
	progress io.Writer

	key       SealingKey
	rewrapped int
	failed    map[orgkey.Binding]bool
}

// run rewraps everything, and once more if the key's newest version was younger
// than settled when it began: until then a record may be stored that was sealed
// before that version was.
func (r *rewrapper) run(ctx context.Context, settled time.Duration) error {
	for seen := 0; ; {
		key, err := r.sealer.Key(ctx)
		if err != nil {
			return err
		}
		if key.Latest == seen {
			key.Age = settled // the wait is over, regardless of Vault's clock
		}
		r.key = key
		if err := r.pass(ctx); err != nil {
			return err
		}
		wait := settled - max(key.Age, 0)
		if wait <= 0 {
			return nil
		}
		fmt.Fprintf(r.progress, "version %d is new: sealing operations in progress are stored within %s; then all records are checked again\n", key.Latest, wait)
		seen = key.Latest
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// pass goes on to the key of events' MACs only if all else is of the newest version:
// the version that this key needs stands for the oldest in use.
func (r *rewrapper) pass(ctx context.Context) error {
	err := errors.Join(r.all(ctx, orgkey.PublicKey, "public keys"), r.all(ctx, orgkey.BootSecret, "boot secrets"),
		r.all(ctx, orgkey.EnrollmentToken, "enrollments"), r.all(ctx, orgkey.ChallengeSecret, "challenges of TPMs"), r.all(ctx, orgkey.WrappedKey, "sealed deliveries"))
	if err != nil {
		return err
	}
	return r.all(ctx, orgkey.EventKey, "keys that authenticate events")
}

// all rewraps the records of a purpose, which what names.
func (r *rewrapper) all(ctx context.Context, purpose, what string) error {
	of := ""
	if total, err := r.db.CountSealed(ctx, purpose); err == nil { // which may take too long with large tables
		of = fmt.Sprintf(" of about %d", total)
	}
	after, seen, before := orgkey.Binding{Purpose: purpose}, 0, r.rewrapped
	for {
		page, err := r.db.SealedAfter(ctx, after, rewrapBatch)
		if err != nil {
			return err
		}
		if len(page) == 0 {
			fmt.Fprintf(r.progress, "%s: %d, of which %d were rewrapped to version %d\n", what, seen, r.rewrapped-before, r.key.Latest)
			return nil
		}
		if err := r.batch(ctx, r.outdated(page)); err != nil {
			return err
		}
		after, seen = page[len(page)-1].Binding, seen+len(page)
		fmt.Fprintf(r.progress, "%s: %d%s\n", what, seen, of)
	}
}

// outdated are the records of another version, and those of none: Rewrap says
// what is wrong with those that it cannot bring up to date.
func (r *rewrapper) outdated(page []orgkey.Sealed) []orgkey.Sealed {
	var old []orgkey.Sealed
	for _, s := range page {
		if version, err := r.sealer.Version(s.Ciphertext); err != nil || version != r.key.Latest {
			old = append(old, s)
		}
	}
	return old
}

// batch rewraps all records at once or, if one of them does not open, each by
// itself.
func (r *rewrapper) batch(ctx context.Context, old []orgkey.Sealed) error {
	if len(old) == 0 {
		return nil
	}
	fresh, err := r.sealer.Rewrap(ctx, old)
	if errors.Is(err, orgkey.ErrSealBroken) {
		return r.apart(ctx, old, err)
	}
	if err != nil {
		return err
	}
	n, err := r.db.Reseal(ctx, old, fresh)
	r.rewrapped += n
	return err
}

func (r *rewrapper) apart(ctx context.Context, old []orgkey.Sealed, broken error) error {
	if len(old) == 1 {
		version, err := r.sealer.Version(old[0].Ciphertext)
		switch {
		case err == nil && version > r.key.Latest:
			return fmt.Errorf("there are records of version %d, and the newest version of the key orgkeys-seal/keys/seal is %d: Vault was restored to a time before that version was made; restore a newer backup of Vault, or those records are lost", version, r.key.Latest)
		case err == nil && version < r.key.MinDecryption:
			return fmt.Errorf("there are records of version %d, and versions below %d may not decrypt: lower min_decryption_version of the key orgkeys-seal/keys/seal and run this again", version, r.key.MinDecryption)
		}
		if b := old[0].Binding; !r.failed[b] {
			r.failed[b] = true
			fmt.Fprintln(r.progress, broken)
		}
		return nil
	}
	for i := range old {
		if err := r.batch(ctx, old[i:i+1]); err != nil {
			return err
		}
	}
	return nil
}
