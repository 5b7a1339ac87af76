package verify

import (
	"slices"

	"golang.org/x/mod/sumdb/tlog"
)

// Frontier is a tree that grows leaf by leaf, of which only the roots of the
// complete subtrees are kept, largest first.
type Frontier struct {
	size   int64
	stack  []tlog.Hash
	stored []tlog.Hash
}

// Size returns how many leaves the tree has.
func (f *Frontier) Size() int64 { return f.size }

// Push appends a leaf to the tree and returns the hashes that tlog stores for it.
// They are valid until the next call.
func (f *Frontier) Push(h tlog.Hash) []tlog.Hash {
	f.stored = append(f.stored[:0], h)
	for n := f.size; n&1 == 1; n >>= 1 {
		last := len(f.stack) - 1
		h = tlog.NodeHash(f.stack[last], h)
		f.stack = f.stack[:last]
		f.stored = append(f.stored, h)
	}
	f.stack = append(f.stack, h)
	f.size++
	return f.stored
}

// PushBundle appends the root of 256 leaves to a tree of whole bundles, and returns
// the hashes that tlog stores for it, from this root on.
func (f *Frontier) PushBundle(root tlog.Hash) []tlog.Hash {
	bundles := Frontier{size: f.size / bundleWidth, stack: f.stack, stored: f.stored}
	stored := bundles.Push(root)
	f.size, f.stack, f.stored = f.size+bundleWidth, bundles.stack, bundles.stored
	return stored
}

// Root returns the tree's root hash (RFC 6962, 2.1).
func (f *Frontier) Root() tlog.Hash {
	if len(f.stack) == 0 {
		empty, _ := tlog.TreeHash(0, nil) // reads no hash, so cannot fail
		return empty
	}
	h := f.stack[len(f.stack)-1]
	for _, left := range slices.Backward(f.stack[:len(f.stack)-1]) {
		h = tlog.NodeHash(left, h)
	}
	return h
}
