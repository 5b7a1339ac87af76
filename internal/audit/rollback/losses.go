package rollback

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

// namedLosses is how many lost events are printed.
const namedLosses = 1000

// nameLosses prints the events that the file sink holds and the database has lost. An
// event that the database still has but without an index gets a new index.
func (a *acceptance) nameLosses(ctx context.Context) error {
	behind, err := a.behind()
	if err != nil {
		return err
	}
	lost, keys, erased := 0, 0, 0
	for _, entry := range behind {
		e, err := audit.Decode(entry.Leaf)
		if err != nil {
			return fmt.Errorf("event %d of %s: %w", entry.Index, a.request.SinkFile, err)
		}
		_, _, err = a.store.Index(ctx, e.ID)
		if err == nil {
			continue
		}
		if !errors.Is(err, orgkey.ErrGone) {
			return err
		}
		switch e.Type {
		case audit.KeyCreated:
			keys++
		case audit.PersonErased:
			erased++
		}
		if lost++; lost > namedLosses {
			continue
		}
		if _, err := fmt.Fprintf(a.out, "lost: event %d, %s, %s, organization %q, object %q\n", entry.Index, e.Time.Format(time.RFC3339), e.Type, e.Org, e.Object); err != nil {
			return err
		}
	}
	if lost == 0 {
		return nil
	}
	if lost > namedLosses {
		fmt.Fprintf(a.out, "and %d more: all are in %s\n", lost-namedLosses, a.request.SinkFile)
	}
	_, err = fmt.Fprintf(a.out, "lost: %d events, of which %d created a key; they are not in the database any more\n", lost, keys)
	if err == nil && erased > 0 {
		_, err = fmt.Fprintf(a.out, "lost: %d of them erased a person, whose data may be in the database again: repeat \"orgkeys audit erase\" with each one's object\n", erased)
	}
	return err
}

// behind returns the events of the file sink after those that the log kept.
func (a *acceptance) behind() ([]audit.Entry, error) {
	f, err := os.Open(a.request.SinkFile)
	if a.request.SinkFile == "" || errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	all, err := verify.Behind(f, a.Kept)
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("%s: %w", a.request.SinkFile, err)
	}
	return all, nil
}
