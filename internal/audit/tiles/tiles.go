// Package tiles publishes the log as files that other programs read: C2SP
// tlog-tiles (https://c2sp.org/tlog-tiles), with uncompressed entry bundles. It
// verifies such files, too.
package tiles

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
)

const (
	width          = 256 // of a full tile, and of a full entry bundle
	checkpointName = "checkpoint"
)

// tilePath is where the hashes of a level are. A tile that is not full has its own
// path, so that each path has one content for ever.
func tilePath(level int, n int64, w int) string {
	return fmt.Sprintf("tile/%d/%s", level, numbered(n, w))
}

func bundlePath(n int64, w int) string { return "tile/entries/" + numbered(n, w) }

// numbered is a number in groups of three digits, all but the last marked by an x.
func numbered(n int64, w int) string {
	text := fmt.Sprintf("%03d", n%1000)
	for n /= 1000; n > 0; n /= 1000 {
		text = fmt.Sprintf("x%03d/%s", n%1000, text)
	}
	if w < width {
		text += fmt.Sprintf(".p/%d", w)
	}
	return text
}

// tree is a log's tree of which, of each level of tiles, only the tile is kept
// that is not full.
type tree struct {
	size   int64
	levels [][]tlog.Hash
}

// push appends a leaf and passes on each tile that it makes full.
func (t *tree) push(h tlog.Hash, full func(path string, content []byte) error) error {
	t.size++
	for level := 0; ; level++ {
		if level == len(t.levels) {
			t.levels = append(t.levels, make([]tlog.Hash, 0, width))
		}
		t.levels[level] = append(t.levels[level], h)
		if len(t.levels[level]) < width {
			return nil
		}
		if err := full(tilePath(level, t.size>>(8*(level+1))-1, width), plain(t.levels[level])); err != nil {
			return err
		}
		h = subtree(t.levels[level])
		t.levels[level] = t.levels[level][:0]
	}
}

// edge passes on the tiles that are not full.
func (t *tree) edge(do func(path string, content []byte) error) error {
	for level, hashes := range t.levels {
		if len(hashes) == 0 {
			continue
		}
		if err := do(tilePath(level, t.size>>(8*(level+1)), len(hashes)), plain(hashes)); err != nil {
			return err
		}
	}
	return nil
}

// loadEdge is the tree of that size, by the contents of its tiles that are not full.
func loadEdge(size int64, read func(path string) ([]byte, error)) (*tree, error) {
	t := &tree{size: size}
	for level := 0; size>>(8*level) > 0; level++ {
		hashes := make([]tlog.Hash, 0, width)
		if w := int(size >> (8 * level) % width); w > 0 {
			path := tilePath(level, size>>(8*(level+1)), w)
			b, err := read(path)
			if err != nil {
				return nil, err
			}
			if len(b) != w*tlog.HashSize {
				return nil, fmt.Errorf("%s has %d bytes, not %d", path, len(b), w*tlog.HashSize)
			}
			for ; len(b) > 0; b = b[tlog.HashSize:] {
				hashes = append(hashes, tlog.Hash(b[:tlog.HashSize]))
			}
		}
		t.levels = append(t.levels, hashes)
	}
	return t, nil
}

func (t *tree) clone() *tree {
	c := &tree{size: t.size}
	for _, hashes := range t.levels {
		c.levels = append(c.levels, append(make([]tlog.Hash, 0, width), hashes...))
	}
	return c
}

// root is the root hash (RFC 6962, 2.1).
func (t *tree) root() tlog.Hash {
	var whole []tlog.Hash // the roots of the complete subtrees, largest first
	for level := len(t.levels) - 1; level >= 0; level-- {
		hashes := t.levels[level]
		for n := width / 2; n > 0; n /= 2 {
			if len(hashes) >= n {
				whole, hashes = append(whole, subtree(hashes[:n])), hashes[n:]
			}
		}
	}
	if len(whole) == 0 {
		empty, _ := tlog.TreeHash(0, nil) // reads no hash, so cannot fail
		return empty
	}
	h := whole[len(whole)-1]
	for i := len(whole) - 2; i >= 0; i-- {
		h = tlog.NodeHash(whole[i], h)
	}
	return h
}

// subtree is the root over a power of two of hashes.
func subtree(hashes []tlog.Hash) tlog.Hash {
	if len(hashes) == 1 {
		return hashes[0]
	}
	return tlog.NodeHash(subtree(hashes[:len(hashes)/2]), subtree(hashes[len(hashes)/2:]))
}

func plain(hashes []tlog.Hash) []byte {
	b := make([]byte, 0, len(hashes)*tlog.HashSize)
	for _, h := range hashes {
		b = append(b, h[:]...)
	}
	return b
}

// appendEntry appends a leaf to an entry bundle.
func appendEntry(bundle, leaf []byte) ([]byte, error) {
	if len(leaf) > audit.MaxLeaf {
		return nil, fmt.Errorf("it has %d bytes, and an entry bundle takes at most %d", len(leaf), audit.MaxLeaf)
	}
	return append(binary.BigEndian.AppendUint16(bundle, uint16(len(leaf))), leaf...), nil
}

var errBundle = errors.New("is not an entry bundle of its size")

// entries are the leaves of an entry bundle, which must have w of them.
func entries(bundle []byte, w int) ([][]byte, error) {
	all := make([][]byte, 0, w)
	for len(bundle) > 0 {
		if len(all) == w || len(bundle) < 2 || len(bundle)-2 < int(binary.BigEndian.Uint16(bundle)) {
			return nil, errBundle
		}
		n := int(binary.BigEndian.Uint16(bundle))
		all, bundle = append(all, bundle[2:2+n]), bundle[2+n:]
	}
	if len(all) != w {
		return nil, errBundle
	}
	return all, nil
}
