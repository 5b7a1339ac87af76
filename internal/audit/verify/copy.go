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

// Copy is what a sink's copy of the log, or a checkpoint kept somewhere, says.
type Copy struct {
	Rollbacks []audit.Rollback

	first  int64 // index of the first event it holds
	leaves []tlog.Hash
	points map[int64][]audit.Checkpoint
	last   int64 // size of the largest checkpoint
	signed map[int64][]audit.Checkpoint
}

// pageSize is how many events, or receipts, are asked for at once.
const pageSize = 2000

// maxLine bounds a line of a sink's file: a leaf is under 4 KiB.
const maxLine = 1 << 20

// ReadCopy reads a file sink's lines. A last line that is not whole, as a crash
// leaves it, is passed over.
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
		return errors.New("it is not one that a sink writes")
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
	return errors.New("it is not one that a sink writes")
}

// AddCheckpoint adds a checkpoint that was kept apart from the log.
func (c *Copy) AddCheckpoint(p audit.Checkpoint) {
	if c.points == nil {
		c.points = map[int64][]audit.Checkpoint{}
	}
	c.points[p.Size] = append(c.points[p.Size], p)
	c.last = max(c.last, p.Size)
}

// AddSigned adds a checkpoint that was kept beside the log, and that its
// signature protects: the log must extend it, but whoever cut off the log's end
// could have removed it too, so it does not exclude that.
func (c *Copy) AddSigned(p audit.Checkpoint) {
	if c.signed == nil {
		c.signed = map[int64][]audit.Checkpoint{}
	}
	c.signed[p.Size] = append(c.signed[p.Size], p)
}

func (c *Copy) addLeaf(index int64, h tlog.Hash) error {
	if len(c.leaves) == 0 {
		c.first = index
	}
	at := index - c.first
	switch {
	case at == int64(len(c.leaves)):
		c.leaves = append(c.leaves, h)
	case at < 0 || at > int64(len(c.leaves)):
		return &Problem{c.first + int64(len(c.leaves)), "it is missing in the sink's copy"}
	case c.leaves[at] != h:
		return &Problem{index, "the sink's copy holds two different ones"}
	}
	return nil
}

// addRollback forgets what the log has lost: an operator accepted that it was
// set back, and the sink has got it anew from its first event. What the log
// kept stays, so that it must come again unchanged.
func (c *Copy) addRollback(r audit.Rollback) error {
	for _, text := range []string{r.From, r.To} {
		if _, err := audit.ParseCheckpoint(text); err != nil {
			return err
		}
	}
	// The event of an earlier one is among what the log has lost this time.
	c.Rollbacks = append(slices.DeleteFunc(c.Rollbacks, func(earlier audit.Rollback) bool { return place(earlier) >= r.Kept }), r)
	if c.first > 0 {
		c.leaves = nil // a copy that begins later: the events before that come now
	}
	c.keep(r.Kept)
	return nil
}

// keep forgets all but the log's first events.
func (c *Copy) keep(size int64) {
	c.leaves = c.leaves[:min(int64(len(c.leaves)), max(0, size-c.first))]
	maps.DeleteFunc(c.points, func(at int64, _ []audit.Checkpoint) bool { return at > size })
	c.last = 0
	for at := range c.points {
		c.last = max(c.last, at)
	}
}

// Differs compares the log, which is at head, with what the copy holds of it. It
// returns the first event that is another one, or nil. That the copy holds more
// than the log is no difference.
func (c *Copy) Differs(ctx context.Context, head audit.Checkpoint, entries func(ctx context.Context, index int64, limit int) ([]audit.Entry, error)) (*Problem, error) {
	var tree Frontier
	agreed := int64(0) // the largest checkpoint that fits
	for tree.size < head.Size {
		page, err := entries(ctx, tree.size, int(min(pageSize, head.Size-tree.size)))
		if err != nil {
			return nil, err
		}
		if len(page) == 0 {
			return &Problem{tree.size, "it is missing"}, nil
		}
		for _, e := range page {
			h := tlog.RecordHash(e.Leaf)
			if held, ok := c.leaf(e.Index); ok && held != h {
				return &Problem{e.Index, "it is not the one that the sink's copy holds"}, nil
			}
			tree.Push(h)
			for _, p := range c.points[tree.size] {
				if p.Origin != head.Origin || p.Root != tree.Root() {
					return &Problem{agreed, fmt.Sprintf("it, or one behind it, is not among the %d that a checkpoint vouches for", tree.size)}, nil
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

func (c *Copy) checkpoints(size int64) []audit.Checkpoint { return c.points[size] }

// end is how many events the log must have at least.
func (c *Copy) end() int64 {
	if len(c.leaves) == 0 {
		return c.last
	}
	return max(c.last, c.first+int64(len(c.leaves)))
}
