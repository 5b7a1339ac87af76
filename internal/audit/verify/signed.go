package verify

import (
	"context"
	"fmt"

	"github.com/orgkeys/orgkeys/internal/audit"
)

// Checkpoints are the signed checkpoints that the database keeps with the log.
// Its implementation is sqlstore.
type Checkpoints interface {
	// SignedAfter returns the signed checkpoints behind place seq, oldest first.
	SignedAfter(ctx context.Context, seq int64) ([]audit.Signed, error)
	// CheckpointKeys returns the verifier keys that are kept with them.
	CheckpointKeys(ctx context.Context) ([]string, error)
}

// EachSigned calls do for each signed checkpoint that is kept with the log.
func EachSigned(ctx context.Context, kept Checkpoints, do func(audit.Signed) error) error {
	return eachSignedAfter(ctx, kept, 0, do)
}

func eachSignedAfter(ctx context.Context, kept Checkpoints, seq int64, do func(audit.Signed) error) error {
	for {
		page, err := kept.SignedAfter(ctx, seq)
		if err != nil || len(page) == 0 {
			return err
		}
		for _, s := range page {
			if err := do(s); err != nil {
				return err
			}
			seq = s.Seq
		}
	}
}

// AddKept adds the signed checkpoints that are kept with the log. Each must be
// signed by a given key or, where none is given, by one that is kept there, too. Verify adds
// those that are kept until then.
func (c *Copy) AddKept(ctx context.Context, kept Checkpoints, vkeys []string) error {
	c.kept = &keptSigned{vkeys: vkeys}
	return c.addNewer(ctx, kept, 0)
}

// keptSigned is which of the signed checkpoints that are kept with the log were added.
type keptSigned struct {
	vkeys []string // whose; none: whose keys are kept, too
	last  int64    // place of the newest
}

// addNewer adds those that are kept since. They cover what was compared of the log before.
func (c *Copy) addNewer(ctx context.Context, kept Checkpoints, compared int64) error {
	if c.kept == nil {
		return nil
	}
	var notes []audit.Signed
	if err := eachSignedAfter(ctx, kept, c.kept.last, func(s audit.Signed) error { notes = append(notes, s); return nil }); err != nil {
		return err
	}
	vkeys := c.kept.vkeys
	if len(vkeys) == 0 {
		var err error
		if vkeys, err = kept.CheckpointKeys(ctx); err != nil {
			return err
		}
	}
	keys, err := audit.ParseKeys(vkeys...)
	if err != nil {
		return err
	}
	for _, s := range notes {
		opened, err := keys.Open(s.Note)
		if err != nil {
			return fmt.Errorf("signed checkpoint %d in the database: %w", s.Seq, err)
		}
		if compared > 0 && opened.Size <= compared {
			return fmt.Errorf("signed checkpoint %d in the database, which was stored while the log was verified, covers %d events: verify the log again", s.Seq, opened.Size)
		}
		c.AddSigned(opened.Checkpoint)
		c.kept.last = s.Seq
	}
	return nil
}
