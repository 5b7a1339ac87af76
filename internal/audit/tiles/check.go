package tiles

import (
	"bytes"
	"context"
	"errors"
	"io/fs"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
)

// Check verifies what is published in a store: that the checkpoint is signed by one of the
// keys, that the entry bundles hold its events and no others, and that every
// tile holds their hashes. kept is a checkpoint of the log that was kept elsewhere, which the
// events must extend or hold; size 0: none. The first events may be removed, whole
// bundles, if a later event says so: it returns how many are. What is wrong is a
// *verify.Problem.
func Check(ctx context.Context, store Store, keys audit.Keys, kept audit.Checkpoint, progress verify.Progress) (signed audit.Signed, removed int64, err error) {
	note, err := store.Read(ctx, checkpointName)
	if err != nil {
		return audit.Signed{}, 0, err
	}
	signed, err = keys.Open(string(note))
	if err != nil {
		return audit.Signed{}, 0, verify.Problemf(-1, "%s: %v", checkpointName, err)
	}
	c := check{ctx: ctx, store: store, kept: kept, origin: signed.Origin}
	tick := progress.Ticking()
	for c.size < signed.Size {
		if err := ctx.Err(); err != nil {
			return audit.Signed{}, 0, err
		}
		if err := c.bundle(int(min(width, signed.Size-c.size))); err != nil {
			return audit.Signed{}, 0, err
		}
		tick(c.size, signed.Size)
	}
	if c.root() != signed.Root {
		return audit.Signed{}, 0, verify.Problemf(-1, "the events do not have the root hash of the signed checkpoint: at least one was changed, removed, inserted or moved")
	}
	if err := c.edge(c.holds); err != nil {
		return audit.Signed{}, 0, err
	}
	if kept.Size > signed.Size {
		return audit.Signed{}, 0, verify.Problemf(signed.Size, "it is missing: the checkpoint given covers %d events; what is published is older, or was truncated", kept.Size)
	}
	if c.removed > c.allowed {
		return audit.Signed{}, 0, verify.Problemf(c.allowed, "%s is missing, and no event says that it was removed by the policy of retention", bundlePath(c.allowed/width, width))
	}
	return signed, c.removed, nil
}

type check struct {
	tree
	ctx    context.Context
	store  Store
	kept   audit.Checkpoint
	origin string

	removed int64 // first events whose bundles are not there
	allowed int64 // how many may be removed, as an event says
}

// bundle reads the next w events.
func (c *check) bundle(w int) error {
	path := bundlePath(c.size/width, w)
	b, err := c.store.Read(c.ctx, path)
	if errors.Is(err, fs.ErrNotExist) && c.size == c.removed && w == width {
		return c.gone()
	}
	if err != nil {
		return verify.Problemf(c.size, "%s cannot be read: %v", path, err)
	}
	leaves, err := entries(b, w)
	if err != nil {
		return verify.Problemf(c.size, "%s %v", path, err)
	}
	for _, leaf := range leaves {
		e, err := audit.Decode(leaf)
		if err != nil {
			return verify.Problemf(c.size, "its leaf is not an event")
		}
		c.allowed = max(c.allowed, e.Removed())
		if err := c.add(tlog.RecordHash(leaf)); err != nil {
			return err
		}
	}
	return nil
}

// gone takes the hashes of a bundle that is not there from its tile.
func (c *check) gone() error {
	hashes, err := readHashes(c.ctx, c.store, c.size/width)
	if err != nil {
		return verify.Problemf(c.size, "it is missing: neither its entry bundle nor its hash can be read: %v", err)
	}
	for _, h := range hashes {
		if err := c.add(h); err != nil {
			return err
		}
	}
	c.removed = c.size
	return nil
}

func (c *check) add(h tlog.Hash) error {
	if err := c.push(h, c.holds); err != nil {
		return err
	}
	if c.size == c.kept.Size && (c.kept.Origin != c.origin || c.kept.Root != c.root()) {
		return verify.Problemf(c.size-1, "the events up to it do not match the given checkpoint: the log was rewritten, or it is another log")
	}
	return nil
}

// holds reports a tile that does not hold the hashes of the events.
func (c *check) holds(path string, content []byte) error {
	b, err := c.store.Read(c.ctx, path)
	if err != nil {
		return verify.Problemf(-1, "%s cannot be read: %v", path, err)
	}
	if !bytes.Equal(b, content) {
		return verify.Problemf(-1, "%s does not hold the hashes of the events", path)
	}
	return nil
}
