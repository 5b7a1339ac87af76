package audit

import (
	"encoding/base64"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/tlog"
)

// Checkpoint is the log at one size. Its text is the body of a C2SP
// tlog-checkpoint: origin, size and root hash, a line each.
type Checkpoint struct {
	Origin string // which log this is
	Size   int64  // how many events it held
	Root   tlog.Hash
}

// Text returns the checkpoint's body, as C2SP tlog-checkpoint has it.
func (c Checkpoint) Text() string {
	return fmt.Sprintf("%s\n%d\n%s\n", c.Origin, c.Size, base64.StdEncoding.EncodeToString(c.Root[:]))
}

// ParseCheckpoint reads a checkpoint's body; further lines are extensions or
// signatures and are left alone.
func ParseCheckpoint(text string) (Checkpoint, error) {
	lines := strings.SplitN(text, "\n", 4)
	if len(lines) < 4 || lines[0] == "" {
		return Checkpoint{}, fmt.Errorf("reading a checkpoint: it has %d lines, not origin, size and root", len(lines)-1)
	}
	size, err := strconv.ParseInt(lines[1], 10, 64)
	if err != nil || size < 0 || strconv.FormatInt(size, 10) != lines[1] {
		return Checkpoint{}, fmt.Errorf("reading a checkpoint: %q is not a size", lines[1])
	}
	root, err := base64.StdEncoding.Strict().DecodeString(lines[2])
	if err != nil || len(root) != tlog.HashSize {
		return Checkpoint{}, fmt.Errorf("reading a checkpoint: %q is not a root hash", lines[2])
	}
	return Checkpoint{Origin: lines[0], Size: size, Root: tlog.Hash(root)}, nil
}

// Grow appends leaves to a tree of size whose stored hashes r reads. It
// returns the hashes to store, the first at tlog.StoredHashIndex(0, size) and
// the rest behind it, and the new root.
func Grow(size int64, leaves [][]byte, r tlog.HashReader) ([]tlog.Hash, tlog.Hash, error) {
	// What comes builds on the roots of the complete subtrees, which are what the
	// tree's own root is made of.
	edge := map[int64]tlog.Hash{}
	if _, err := tlog.TreeHash(size, tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		hashes, err := r.ReadHashes(indexes)
		for i, h := range hashes {
			edge[indexes[i]] = h
		}
		return hashes, err
	})); err != nil {
		return nil, tlog.Hash{}, fmt.Errorf("reading the tree's edge: %w", err)
	}
	start := tlog.StoredHashIndex(0, size)
	var added []tlog.Hash
	reader := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		for i, x := range indexes {
			if x >= start {
				out[i] = added[x-start]
				continue
			}
			h, ok := edge[x]
			if !ok {
				return nil, fmt.Errorf("hash %d is not on the tree's edge", x)
			}
			out[i] = h
		}
		return out, nil
	})
	for i, leaf := range leaves {
		hashes, err := tlog.StoredHashes(size+int64(i), leaf, reader)
		if err != nil {
			return nil, tlog.Hash{}, fmt.Errorf("extending the tree: %w", err)
		}
		added = append(added, hashes...)
	}
	root, err := tlog.TreeHash(size+int64(len(leaves)), reader)
	if err != nil {
		return nil, tlog.Hash{}, fmt.Errorf("hashing the tree: %w", err)
	}
	return added, root, nil
}
