package verdict

import (
	"context"
	"fmt"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/tiles"
)

// Tiles verifies the files of a published log. place is what they are called.
func (j *Judge) Tiles(ctx context.Context, store tiles.Store, place string, g Given) error {
	vkeys, err := g.requiredKeys()
	if err != nil {
		return err
	}
	keys, err := audit.ParseKeys(vkeys...)
	if err != nil {
		return err
	}
	text, err := g.checkpoint(true)
	if err != nil {
		return err
	}
	var kept audit.Signed
	if text != "" {
		if kept, err = keys.Open(text); err != nil {
			return fmt.Errorf("--checkpoint: %w", err)
		}
	}
	head, removed, err := tiles.Check(ctx, store, keys, kept.Checkpoint, j.progress("verified"))
	if err != nil {
		return fmt.Errorf("%s: %w", place, err)
	}
	fmt.Fprintf(j.out, "log %s: %d events, each covered by the signed checkpoint\nroot hash %s\n", head.Origin, head.Size, head.Root)
	if removed > 0 {
		fmt.Fprintf(j.out, "entries below %d were removed by the policy of retention: their hashes are verified\n", removed)
	}
	switch {
	case kept.Size == 0:
		return notExcluded("the files end with the signed checkpoint of %d events and cannot show whether there is a newer one; give one that was kept elsewhere with --checkpoint", head.Size)
	case kept.Size < head.Size:
		return notExcluded("the given checkpoint covers %d of %d events; give a newer one with --checkpoint", kept.Size, head.Size)
	}
	_, err = fmt.Fprintf(j.out, "truncation excluded: the given checkpoint covers %d of %d events\n", kept.Size, head.Size)
	return err
}
