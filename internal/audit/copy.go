package audit

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/go-json-experiment/json"
)

// Copy is what a sink's copy of the log, or a checkpoint kept somewhere, says.
type Copy struct {
	Rollbacks []Rollback

	first  int64 // index of the first event it holds
	leaves []tlog.Hash
	points map[int64][]Checkpoint
	last   int64 // size of the largest checkpoint
	signed map[int64][]Checkpoint
}

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

func (c *Copy) add(raw []byte) error {
	var l line
	if err := json.Unmarshal(raw, &l, json.RejectUnknownMembers(true)); err != nil {
		return errors.New("it is not one that a sink writes")
	}
	switch {
	case l.Index != nil && l.Event != nil:
		return c.addLeaf(*l.Index, tlog.RecordHash(l.Event))
	case l.Checkpoint != "":
		p, err := ParseCheckpoint(l.Checkpoint)
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
func (c *Copy) AddCheckpoint(p Checkpoint) {
	if c.points == nil {
		c.points = map[int64][]Checkpoint{}
	}
	c.points[p.Size] = append(c.points[p.Size], p)
	c.last = max(c.last, p.Size)
}

// AddSigned adds a checkpoint that was kept beside the log, and that its
// signature protects: the log must extend it, but whoever cut off the log's end
// could have removed it too, so it does not exclude that.
func (c *Copy) AddSigned(p Checkpoint) {
	if c.signed == nil {
		c.signed = map[int64][]Checkpoint{}
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

// addRollback forgets what the copy holds so far: an operator accepted that the
// log was set back, and the sink has got it anew from its first event.
func (c *Copy) addRollback(r Rollback) error {
	for _, text := range []string{r.From, r.To} {
		if _, err := ParseCheckpoint(text); err != nil {
			return err
		}
	}
	*c = Copy{Rollbacks: append(c.Rollbacks, r), signed: c.signed}
	return nil
}

func (c *Copy) leaf(index int64) (tlog.Hash, bool) {
	at := index - c.first
	if at < 0 || at >= int64(len(c.leaves)) {
		return tlog.Hash{}, false
	}
	return c.leaves[at], true
}

func (c *Copy) checkpoints(size int64) []Checkpoint { return c.points[size] }

// end is how many events the log must have at least.
func (c *Copy) end() int64 {
	if len(c.leaves) == 0 {
		return c.last
	}
	return max(c.last, c.first+int64(len(c.leaves)))
}
