package archive

import (
	"context"
	"slices"

	"github.com/orgkeys/orgkeys/internal/audit"
)

// SigningKeys returns the stored verifier keys that have signed a stored
// checkpoint, oldest first: in the database anybody's could stand.
func SigningKeys(ctx context.Context, e Source) ([]string, error) {
	stored, err := e.CheckpointKeys(ctx)
	if err != nil {
		return nil, err
	}
	has := map[string]bool{}
	for seq := int64(0); len(has) < len(stored); {
		page, err := e.SignedAfter(ctx, seq)
		if err != nil {
			return nil, err
		}
		if len(page) == 0 {
			break
		}
		for _, s := range page {
			for _, vkey := range stored {
				if !has[vkey] && signedBy(vkey, s.Note) {
					has[vkey] = true
				}
			}
			seq = s.Seq
		}
	}
	return slices.DeleteFunc(stored, func(vkey string) bool { return !has[vkey] }), nil
}

func signedBy(vkey, note string) bool {
	keys, err := audit.ParseKeys(vkey)
	if err == nil {
		_, err = keys.Open(note)
	}
	return err == nil
}
