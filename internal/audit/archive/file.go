package archive

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/orgkeys/orgkeys/internal/audit/verify"
)

// WriteFile is Write to a file of that name, which is whole or not there.
func WriteFile(ctx context.Context, name string, e Source, open PublicKeys, program string, progress verify.Progress) (Manifest, error) {
	dir := filepath.Dir(name)
	f, err := os.CreateTemp(dir, ".orgkeys-export-*")
	if err != nil {
		return Manifest{}, err
	}
	manifest, err := Write(ctx, f, e, open, dir, program, progress)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		return Manifest{}, errors.Join(err, os.Remove(f.Name()))
	}
	return manifest, nil
}
