package tiles

import (
	"bytes"
	"context"
	"fmt"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
)

// Width is how many events an entry bundle has.
const Width = width

// Archive is a store that holds what is no longer in the database. Nothing that it
// returns was verified: the database has the root hash of each bundle.
type Archive struct{ Store }

// Checkpoint returns the checkpoint up to which it holds the log. What is none is a
// *verify.Problem.
func (a Archive) Checkpoint(ctx context.Context) (audit.Checkpoint, error) {
	note, err := a.Read(ctx, checkpointName)
	if err != nil {
		return audit.Checkpoint{}, err
	}
	c, err := audit.ParseCheckpoint(string(note))
	if err != nil {
		return c, verify.Problemf(-1, "%s in %s: %v", checkpointName, a, err)
	}
	return c, nil
}

// Leaves returns the events of a full bundle.
func (a Archive) Leaves(ctx context.Context, bundle int64) ([][]byte, error) {
	b, err := a.Read(ctx, bundlePath(bundle, width))
	if err != nil {
		return nil, err
	}
	return a.parts(b, bundlePath(bundle, width))
}

func (a Archive) parts(b []byte, path string) ([][]byte, error) {
	all, err := entries(b, width)
	if err != nil {
		return nil, fmt.Errorf("%s in %s %w", path, a, err)
	}
	return all, nil
}

// Hashes returns the leaf hashes of a full bundle.
func (a Archive) Hashes(ctx context.Context, bundle int64) ([]tlog.Hash, error) {
	return readHashes(ctx, a.Store, bundle)
}

func readHashes(ctx context.Context, store Store, bundle int64) ([]tlog.Hash, error) {
	path := tilePath(0, bundle, width)
	b, err := store.Read(ctx, path)
	if err != nil {
		return nil, err
	}
	if len(b) != width*tlog.HashSize {
		return nil, fmt.Errorf("%s in %s has %d bytes", path, store, len(b))
	}
	hashes := make([]tlog.Hash, width)
	for i := range hashes {
		hashes[i] = tlog.Hash(b[i*tlog.HashSize:])
	}
	return hashes, nil
}

// Root returns the root hash over a power of two of hashes.
func Root(hashes []tlog.Hash) tlog.Hash { return subtree(hashes) }

// receiptsPath is where a sink's receipts for the events of a bundle are, in the form of
// an entry bundle; an empty one: there is none. They are no part of tlog-tiles.
func receiptsPath(sink string, bundle int64) string {
	return "receipts/" + sink + "/" + numbered(bundle, width)
}

// Receipts returns a sink's receipts for the events of a full bundle.
func (a Archive) Receipts(ctx context.Context, sink string, bundle int64) ([][]byte, error) {
	b, err := a.Read(ctx, receiptsPath(sink, bundle))
	if err != nil {
		return nil, err
	}
	return a.parts(b, receiptsPath(sink, bundle))
}

// Pack joins short texts, and Unpack takes them apart: the form of an entry bundle.
func Pack(texts [][]byte) (packed []byte, err error) {
	for _, text := range texts {
		if packed, err = appendEntry(packed, text); err != nil {
			return nil, err
		}
	}
	return packed, nil
}

// Unpack returns the n texts that Pack has joined.
func Unpack(packed []byte, n int) ([][]byte, error) { return entries(packed, n) }

// Keep writes a full bundle's receipts of a sink.
func (a Archive) Keep(ctx context.Context, sink string, bundle int64, receipts [][]byte) error {
	packed, err := Pack(receipts)
	if err != nil {
		return err
	}
	return a.WriteOnce(ctx, receiptsPath(sink, bundle), packed)
}

// Holds reports an error unless the archive holds a full bundle as it is given, and the
// receipts of each sink.
func (a Archive) Holds(ctx context.Context, bundle int64, leaves [][]byte, receipts map[string][][]byte) error {
	want := map[string][]byte{}
	var err error
	if want[bundlePath(bundle, width)], err = Pack(leaves); err != nil {
		return err
	}
	hashes := make([]tlog.Hash, len(leaves))
	for i, leaf := range leaves {
		hashes[i] = tlog.RecordHash(leaf)
	}
	want[tilePath(0, bundle, width)] = plain(hashes)
	for sink, of := range receipts {
		if want[receiptsPath(sink, bundle)], err = Pack(of); err != nil {
			return err
		}
	}
	for path, content := range want {
		held, err := a.Read(ctx, path)
		if err == nil && !bytes.Equal(held, content) {
			err = Changed(a.String() + "/" + path)
		}
		if err != nil {
			return fmt.Errorf("reading back what is to be moved: %w", err)
		}
	}
	return nil
}

// Remove removes the entries of a full bundle, also where they were published while
// it was not full, and the receipts. Hashes stay.
func (a Archive) Remove(ctx context.Context, bundle int64, sinks []string) error {
	paths := []string{bundlePath(bundle, width) + ".p", bundlePath(bundle, width)}
	for _, sink := range sinks {
		paths = append(paths, receiptsPath(sink, bundle))
	}
	for _, path := range paths {
		if err := a.RemoveAll(ctx, path); err != nil {
			return err
		}
	}
	return nil
}
