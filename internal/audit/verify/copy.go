package verify

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/go-json-experiment/json"

	"github.com/orgkeys/orgkeys/internal/audit"
)

// Copy is a sink's copy of the log, or a checkpoint kept elsewhere.
type Copy struct {
	Rollbacks []audit.Rollback

	first  int64 // index of the first event it holds
	anew   bool  // the next event may be any: the log comes again, or what of it was not archived
	leaves []tlog.Hash
	points map[int64][]audit.Checkpoint
	last   int64 // size of the largest checkpoint
	signed map[int64][]audit.Checkpoint
	kept   *keptSigned // nil: they are not asked for
}

// pageSize is how many events, or receipts, are read at once.
const pageSize = 2000

// maxLine bounds a line of a sink's file: a leaf is under 4 KiB.
const maxLine = 1 << 20

// ReadCopy reads a file sink's lines. An incomplete last line, which a crash leaves,
// is ignored.
func ReadCopy(r io.Reader) (*Copy, error) {
	c := &Copy{}
	in := bufio.NewReaderSize(r, maxLine)
	for n := 1; ; n++ {
		raw, err := in.ReadSlice('\n')
		if errors.Is(err, io.EOF) {
			return c, nil
		}
		if err != nil {
			return nil, fmt.Errorf("line %d of the sink's copy: %w", n, err)
		}
		if err := c.add(bytes.TrimSuffix(raw, []byte("\n"))); err != nil {
			return nil, fmt.Errorf("line %d of the sink's copy: %w", n, err)
		}
	}
}

// ReadCopyFile reads the file of a file sink.
func ReadCopyFile(name string) (*Copy, error) {
	f, err := os.Open(name)
	if err != nil {
		return &Copy{}, err
	}
	c, err := ReadCopy(f)
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return c, nil
}

func (c *Copy) add(raw []byte) error {
	var l audit.Line
	if err := json.Unmarshal(raw, &l, json.RejectUnknownMembers(true)); err != nil {
		return errors.New("it is not in the sink's format")
	}
	switch {
	case l.Index != nil && l.Event != nil:
		return c.addLeaf(*l.Index, tlog.RecordHash(l.Event))
	case l.Checkpoint != "":
		p, err := audit.ParseCheckpoint(l.Checkpoint)
		if err != nil {
			return err
		}
		c.AddCheckpoint(p)
		return nil
	case l.Rollback != nil:
		return c.addRollback(*l.Rollback)
	}
	return errors.New("it is not in the sink's format")
}

// AddCheckpoint adds a checkpoint that was kept apart from the log.
func (c *Copy) AddCheckpoint(p audit.Checkpoint) {
	if c.points == nil {
		c.points = map[int64][]audit.Checkpoint{}
	}
	c.points[p.Size] = append(c.points[p.Size], p)
	c.last = max(c.last, p.Size)
}

// AddSigned adds a signed checkpoint that was stored with the log. The log must extend
// it, but an attacker who truncated the log could have removed it too, so it does not
// exclude truncation.
func (c *Copy) AddSigned(p audit.Checkpoint) {
	if c.signed == nil {
		c.signed = map[int64][]audit.Checkpoint{}
	}
	c.signed[p.Size] = append(c.signed[p.Size], p)
}

func (c *Copy) addLeaf(index int64, h tlog.Hash) error {
	if len(c.leaves) == 0 || c.anew && index > c.first+int64(len(c.leaves)) {
		c.first, c.leaves = index, nil
	}
	c.anew = false
	at := index - c.first
	switch {
	case at == int64(len(c.leaves)):
		c.leaves = append(c.leaves, h)
	case at < 0 || at > int64(len(c.leaves)):
		return &Problem{c.first + int64(len(c.leaves)), "it is missing from the sink's copy"}
	case c.leaves[at] != h:
		return &Problem{index, "the sink's copy holds two different events at this index"}
	}
	return nil
}

// addRollback drops the events that were lost in an accepted rollback, after which the
// sink got the log again from its first event. The kept events stay, so that they must
// come again unchanged.
func (c *Copy) addRollback(r audit.Rollback) error {
	for _, text := range []string{r.From, r.To} {
		if _, err := audit.ParseCheckpoint(text); err != nil {
			return err
		}
	}
	// The event of an earlier rollback was lost in this one.
	c.Rollbacks = append(slices.DeleteFunc(c.Rollbacks, func(earlier audit.Rollback) bool { return place(earlier) >= r.Kept }), r)
	if c.first > 0 {
		c.leaves = nil // a copy that begins later: the events before it come now
	}
	c.keep(r.Kept)
	c.anew = true
	return nil
}

// keep drops all but the first size events.
func (c *Copy) keep(size int64) {
	c.leaves = c.leaves[:min(int64(len(c.leaves)), max(0, size-c.first))]
	maps.DeleteFunc(c.points, func(at int64, _ []audit.Checkpoint) bool { return at > size })
	c.last = 0
	for at := range c.points {
		c.last = max(c.last, at)
	}
}

// Differs compares the log, which is at head, with the copy. It returns the first
// event that differs, or nil. A copy that holds more than the log is no difference.
// hashes returns leaf hashes, at least one if there is one.
func (c *Copy) Differs(ctx context.Context, head audit.Checkpoint, hashes func(ctx context.Context, index int64, limit int) ([]tlog.Hash, error)) (*Problem, error) {
	var tree Frontier
	agreed := int64(0) // the largest checkpoint that fits
	for tree.size < head.Size {
		page, err := hashes(ctx, tree.size, int(min(pageSize, head.Size-tree.size)))
		if err != nil {
			return nil, err
		}
		if len(page) == 0 {
			return &Problem{tree.size, "it is missing"}, nil
		}
		for _, h := range page {
			if held, ok := c.leaf(tree.size); ok && held != h {
				return &Problem{tree.size, "it differs from the sink's copy"}, nil
			}
			tree.Push(h)
			for _, p := range c.points[tree.size] {
				if p.Origin != head.Origin || p.Root != tree.Root() {
					return &Problem{agreed, fmt.Sprintf("it, or a later one, is not among the %d events that a checkpoint covers", tree.size)}, nil
				}
				agreed = tree.size
			}
		}
	}
	return nil, nil
}

// HoldsEvents reports whether it has events to compare, not checkpoints alone.
func (c *Copy) HoldsEvents() bool { return len(c.leaves) > 0 }

func (c *Copy) leaf(index int64) (tlog.Hash, bool) {
	at := index - c.first
	if at < 0 || at >= int64(len(c.leaves)) {
		return tlog.Hash{}, false
	}
	return c.leaves[at], true
}

// bundle returns the root hash of the bundle that begins at an index, if the copy holds all of it.
func (c *Copy) bundle(index int64) (tlog.Hash, bool) {
	var tree Frontier
	for tree.size < bundleWidth {
		h, ok := c.leaf(index + tree.size)
		if !ok {
			return h, false
		}
		tree.Push(h)
	}
	return tree.Root(), true
}

func (c *Copy) checkpoints(size int64) []audit.Checkpoint { return c.points[size] }

// end is how many events the log must have at least.
func (c *Copy) end() int64 {
	if len(c.leaves) == 0 {
		return c.last
	}
	return max(c.last, c.first+int64(len(c.leaves)))
}
