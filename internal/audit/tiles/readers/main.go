// Command readers has the clients of other projects read and check a directory of
// tlog-tiles: tessera's client and fsck, and torchwood's client.
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"filippo.io/torchwood"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera/api"
	"github.com/transparency-dev/tessera/client"
	"github.com/transparency-dev/tessera/fsck"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// timeout is for everything: fsck waits for ever when a worker has failed.
const timeout = 2 * time.Minute

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: readers DIR VERIFIER-KEY")
		os.Exit(2)
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	done := make(chan error, 1)
	var size uint64
	go func() {
		var err error
		size, err = read(ctx, os.Args[1], os.Args[2])
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil {
			fmt.Println("wrong:", err)
			os.Exit(1)
		}
		fmt.Printf("verified: %d events\n", size)
	case <-ctx.Done():
		fmt.Println("wrong: it takes too long")
		os.Exit(1)
	}
}

func read(ctx context.Context, dir, vkey string) (uint64, error) {
	verifier, err := note.NewVerifier(vkey)
	if err != nil {
		return 0, err
	}
	files := client.FileFetcher{Root: dir}
	head, _, _, err := client.FetchCheckpoint(ctx, files.ReadCheckpoint, verifier, verifier.Name())
	if err != nil {
		return 0, fmt.Errorf("tessera's client: %w", err)
	}
	if err := byTessera(ctx, files, verifier, head.Size, head.Hash); err != nil {
		return 0, fmt.Errorf("tessera: %w", err)
	}
	if err := byTorchwood(ctx, dir, tlog.Tree{N: int64(head.Size), Hash: tlog.Hash(head.Hash)}); err != nil {
		return 0, fmt.Errorf("torchwood: %w", err)
	}
	return head.Size, nil
}

// some are events whose proofs are checked: the first, the last, and those about full tiles.
func some(size uint64) []uint64 {
	all := []uint64{0, 254, 255, 256, 257, size / 2, 65535, 65536, size - 1}
	all = slices.DeleteFunc(all, func(i uint64) bool { return i >= size })
	slices.Sort(all)
	return slices.Compact(all)
}

func byTessera(ctx context.Context, files client.FileFetcher, verifier note.Verifier, size uint64, root []byte) error {
	hashes := func(bundle []byte) ([][]byte, error) {
		var b api.EntryBundle
		if err := b.UnmarshalText(bundle); err != nil {
			return nil, err
		}
		var all [][]byte
		for _, e := range b.Entries {
			all = append(all, rfc6962.DefaultHasher.HashLeaf(e))
		}
		return all, nil
	}
	if err := fsck.New(verifier.Name(), verifier, files, hashes, fsck.Opts{N: 2}).Check(ctx); err != nil {
		return err
	}
	builder, err := client.NewProofBuilder(ctx, size, files.ReadTile)
	if err != nil {
		return err
	}
	for _, i := range some(size) {
		bundle, err := client.GetEntryBundle(ctx, files.ReadEntryBundle, i/256, size)
		if err != nil {
			return err
		}
		path, err := builder.InclusionProof(ctx, i)
		if err != nil {
			return err
		}
		if err := proof.VerifyInclusion(rfc6962.DefaultHasher, i, size, rfc6962.DefaultHasher.HashLeaf(bundle.Entries[i%256]), path, root); err != nil {
			return fmt.Errorf("event %d: %w", i, err)
		}
	}
	return nil
}

func byTorchwood(ctx context.Context, dir string, tree tlog.Tree) error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := &http.Server{Handler: http.FileServer(http.Dir(dir)), ReadHeaderTimeout: timeout}
	go func() { _ = server.Serve(listener) }() // Close ends it
	defer func() { _ = server.Close() }()
	fetcher, err := torchwood.NewTileFetcher("http://" + listener.Addr().String() + "/")
	if err != nil {
		return err
	}
	reader, err := torchwood.NewClient(fetcher)
	if err != nil {
		return err
	}
	n := int64(0)
	for n < tree.N { // Entries stops where the last full tile ends, once
		before := n
		for i, entry := range reader.Entries(ctx, tree, n) {
			if i != n || !strings.HasPrefix(string(entry), `{"v":1,`) {
				return fmt.Errorf("entry %d, want %d, is %q", i, n, entry)
			}
			n++
		}
		if err := reader.Err(); err != nil {
			return err
		}
		if n == before {
			return errors.New("the last entries are not to be had")
		}
	}
	for _, i := range some(uint64(tree.N)) {
		if _, _, err := reader.Entry(ctx, tree, int64(i)); err != nil {
			return err
		}
	}
	return nil
}
