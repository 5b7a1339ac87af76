package tiles

import (
	"bytes"
	"context"
	"os"
	"path/filepath"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
)

// Check verifies what is published in dir: that the checkpoint is signed by one of the
// keys, that the entry bundles hold its events and no others, and that every
// tile holds their hashes. kept is a checkpoint of the log that was kept elsewhere, which the
// events must extend or hold; size 0: none. What is wrong is a *verify.Problem.
func Check(ctx context.Context, dir string, keys audit.Keys, kept audit.Checkpoint, progress verify.Progress) (audit.Signed, error) {
	note, err := os.ReadFile(filepath.Join(dir, checkpointName))
	if err != nil {
		return audit.Signed{}, err
	}
	signed, err := keys.Open(string(note))
	if err != nil {
		return audit.Signed{}, verify.Problemf(-1, "%s: %v", checkpointName, err)
	}
	c := check{dir: dir, kept: kept}
	tick := progress.Ticking()
	for c.size < signed.Size {
		if err := ctx.Err(); err != nil {
			return audit.Signed{}, err
		}
		if err := c.bundle(int(min(width, signed.Size-c.size)), signed.Origin); err != nil {
			return audit.Signed{}, err
		}
		tick(c.size, signed.Size)
	}
	if c.root() != signed.Root {
		return audit.Signed{}, verify.Problemf(-1, "the events do not have the root hash of the signed checkpoint: at least one was changed, removed, inserted or moved")
	}
	if err := c.edge(c.holds); err != nil {
		return audit.Signed{}, err
	}
	if kept.Size > signed.Size {
		return audit.Signed{}, verify.Problemf(signed.Size, "it is missing: the checkpoint given covers %d events; what is published is older, or was truncated", kept.Size)
	}
	return signed, nil
}

type check struct {
	tree
	dir  string
	kept audit.Checkpoint
}

// bundle reads the next w events.
func (c *check) bundle(w int, origin string) error {
	path := bundlePath(c.size/width, w)
	b, err := os.ReadFile(filepath.Join(c.dir, path))
	if err != nil {
		return verify.Problemf(c.size, "%s cannot be read: %v", path, err)
	}
	leaves, err := entries(b, w)
	if err != nil {
		return verify.Problemf(c.size, "%s %v", path, err)
	}
	for _, leaf := range leaves {
		if _, err := audit.Decode(leaf); err != nil {
			return verify.Problemf(c.size, "its leaf is not an event")
		}
		if err := c.push(tlog.RecordHash(leaf), c.holds); err != nil {
			return err
		}
		if c.size == c.kept.Size && (c.kept.Origin != origin || c.kept.Root != c.root()) {
			return verify.Problemf(c.size-1, "the events up to it do not match the given checkpoint: the log was rewritten, or it is another log")
		}
	}
	return nil
}

// holds reports a tile that does not hold the hashes of the events.
func (c *check) holds(path string, content []byte) error {
	b, err := os.ReadFile(filepath.Join(c.dir, path))
	if err != nil {
		return verify.Problemf(-1, "%s cannot be read: %v", path, err)
	}
	if !bytes.Equal(b, content) {
		return verify.Problemf(-1, "%s does not hold the hashes of the events", path)
	}
	return nil
}
