// Package archive exports the log for those who do not have the database: the whole
// log, or a proof of one event. It verifies both with public keys and, for the log's
// end, evidence from elsewhere.
package archive

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/authz"
)

// An export is a gzipped tar archive with these members in this order:
//
//	manifest.json           format, log, and size and SHA-256 of every other member
//	checkpoints.jsonl       {"checkpoint":"<signed note>"}, oldest first
//	receipt-keys.json       what sinks sign receipts with
//	policies/REVISION/NAME  the policies that were in force, file by file
//	events.jsonl            {"index":N,"event":<leaf, verbatim>,"receipts":{…}}
//	inventory.jsonl         the life of each key, in the order of creation
//	public-keys.jsonl       the public half of each key that lives, in that order
//
// It ends with the newest signed checkpoint, so a signature covers all of it. All
// but the last member is a function of the log: the same log gives the same bytes.
// The public keys are those that the database still has, and the fingerprints in
// the log prove them; without them the export is of the first format.
const (
	exportFormat      = "orgkeys-export/1"
	exportWithKeys    = "orgkeys-export/2"
	manifestName      = "manifest.json"
	checkpointsName   = "checkpoints.jsonl"
	receiptKeysName   = "receipt-keys.json"
	policiesDir       = "policies"
	eventsName        = "events.jsonl"
	inventoryName     = "inventory.jsonl"
	publicKeysName    = "public-keys.jsonl"
	publicKeysPage    = 500       // public keys that are opened at once
	pageSize          = 2000      // events, or receipts, that are asked for at once
	maxLine           = 1 << 20   // a leaf is under 64 KiB
	maxManifest       = 256 << 20 // a million files of policies
	maxSmallMember    = 64 << 20
	maxPolicy         = 64 << 20 // of all its files
	exportMode        = 0o600
	errNothingToProve = "no signed checkpoint: send the running server SIGUSR1, or run \"orgkeys audit checkpoint\" while it is stopped"
)

// ErrNotSigned: the log has no signed checkpoint.
var ErrNotSigned = errors.New(errNothingToProve)

// Source is a log that can be exported. Its implementation is sqlstore.
type Source interface {
	Entries(ctx context.Context, index int64, limit int) ([]audit.Entry, error)
	At(ctx context.Context, size int64) (audit.Checkpoint, error)
	Index(ctx context.Context, eventID string) (int64, bool, error)
	// FindArchived is Index for an event that is no longer in the database.
	FindArchived(ctx context.Context, eventID string) (int64, bool, error)
	// Inclusion proves that a log of size holds the event at index.
	Inclusion(ctx context.Context, size, index int64) (tlog.RecordProof, error)
	LastSigned(ctx context.Context) (audit.Signed, error)
	SignedAfter(ctx context.Context, seq int64) ([]audit.Signed, error)
	CheckpointKeys(ctx context.Context) ([]string, error)
	ReceiptKeys(ctx context.Context) ([]audit.ReceiptKey, error)
	// Receipts returns a sink's receipts for the events from index from to before to.
	Receipts(ctx context.Context, sink string, from, to int64) ([]audit.Receipt, error)
	// Policies calls do with the files of every policy that was in force, by name.
	Policies(ctx context.Context, do func(revision string, files map[string][]byte) error) error
}

// PublicKeys decrypts keys' public halves, PKIX DER. A key that is not in the answer
// was deleted since; a key that has no record is an error.
type PublicKeys func(ctx context.Context, keys []string) (map[string][]byte, error)

// Manifest describes an export.
type Manifest struct {
	Format         string   `json:"format"`
	Program        string   `json:"program"` // what wrote it
	Origin         string   `json:"origin"`
	Size           int64    `json:"size"`
	Root           string   `json:"root"` // base64
	CheckpointKeys []string `json:"checkpointKeys"`
	Policy         string   `json:"policy,omitempty"` // the newest revision that decided
	Members        []Member `json:"members"`
}

// Member is a file of an export.
type Member struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"` // hex
}

// exportLine is an event in an export.
type exportLine struct {
	Index    *int64            `json:"index"`
	Event    jsontext.Value    `json:"event"`
	Receipts map[string]string `json:"receipts,omitempty"`
}

// Write writes the log up to its newest signed checkpoint to w, by way of
// a temporary file in dir. It fails if the events do not have the root that was
// signed. open may be nil: then there are no public keys in it.
func Write(ctx context.Context, w io.Writer, e Source, open PublicKeys, dir, program string, progress verify.Progress) (Manifest, error) {
	file, err := os.CreateTemp(dir, ".orgkeys-export-*")
	if err != nil {
		return Manifest{}, err
	}
	defer func() { _ = errors.Join(file.Close(), os.Remove(file.Name())) }() // what counts was copied
	x := writer{source: e, open: open, file: file, out: bufio.NewWriterSize(file, 1<<20), progress: progress.Ticking()}
	if err := x.gather(ctx); err != nil {
		return Manifest{}, err
	}
	if err := x.out.Flush(); err != nil {
		return Manifest{}, err
	}
	keys, err := SigningKeys(ctx, e)
	if err != nil {
		return Manifest{}, err
	}
	m := Manifest{
		Format: exportFormat, Program: program, Origin: x.head.Origin, Size: x.head.Size,
		Root: base64.StdEncoding.EncodeToString(x.head.Root[:]), CheckpointKeys: keys, Policy: x.policy, Members: x.members,
	}
	if open != nil {
		m.Format = exportWithKeys
	}
	return m, x.pack(w, m)
}

type writer struct {
	source   Source
	open     PublicKeys
	file     *os.File // the members, one behind the other
	out      *bufio.Writer
	progress func(done, all int64)

	head    audit.Signed
	sinks   []string // that give receipts
	policy  string
	lives   inventory
	members []Member
}

// member adds a member.
func (x *writer) member(name string, fill func(io.Writer) error) error {
	content := &hashing{sum: sha256.New()}
	if err := fill(io.MultiWriter(x.out, content)); err != nil {
		return fmt.Errorf("exporting %s: %w", name, err)
	}
	x.members = append(x.members, Member{name, content.size, hex.EncodeToString(content.sum.Sum(nil))})
	return nil
}

func (x *writer) gather(ctx context.Context) error {
	var err error
	if x.head, err = x.source.LastSigned(ctx); err != nil {
		return err
	}
	if x.head.Size == 0 {
		return ErrNotSigned
	}
	if err := x.member(checkpointsName, func(w io.Writer) error { return x.writeCheckpoints(ctx, w) }); err != nil {
		return err
	}
	if err := x.member(receiptKeysName, func(w io.Writer) error { return x.writeReceiptKeys(ctx, w) }); err != nil {
		return err
	}
	if err := x.writePolicies(ctx); err != nil {
		return err
	}
	if err := x.member(eventsName, func(w io.Writer) error { return x.writeEvents(ctx, w) }); err != nil {
		return err
	}
	if err := x.member(inventoryName, x.lives.write); err != nil || x.open == nil {
		return err
	}
	return x.member(publicKeysName, func(w io.Writer) error { return x.writePublicKeys(ctx, w) })
}

func (x *writer) writePublicKeys(ctx context.Context, w io.Writer) error {
	for page := range slices.Chunk(x.lives.live(), publicKeysPage) {
		ids := make([]string, len(page))
		for i, life := range page {
			ids[i] = x.lives.key(life)
		}
		opened, err := x.open(ctx, ids)
		if err != nil {
			return err
		}
		for i, life := range page {
			der, there := opened[ids[i]]
			l := publicKeyLine{Key: ids[i], PublicKey: der, Deleted: !there}
			if there {
				if _, err := l.vouched(x.lives.fingerprint(life)); err != nil {
					return verify.Problemf(life.created.index, "%v", err)
				}
			}
			b, err := json.Marshal(l, json.Deterministic(true))
			if err != nil {
				return err
			}
			if _, err := w.Write(append(b, '\n')); err != nil {
				return err
			}
		}
	}
	return nil
}

// writeCheckpoints leaves out those that cover fewer events than one before them, or than
// the newest does not reach: versions before this one stored two of the same moment in any order.
func (x *writer) writeCheckpoints(ctx context.Context, w io.Writer) error {
	written := int64(0)
	for seq := int64(0); ; {
		page, err := x.source.SignedAfter(ctx, seq)
		if err != nil {
			return err
		}
		for _, s := range page {
			if s.Seq > x.head.Seq {
				return nil
			}
			seq = s.Seq
			if s.Size < written || s.Size > x.head.Size {
				continue
			}
			written = s.Size
			b, err := json.Marshal(audit.Line{Checkpoint: s.Note})
			if err != nil {
				return err
			}
			if _, err := w.Write(append(b, '\n')); err != nil {
				return err
			}
		}
		if len(page) == 0 {
			return nil
		}
	}
}

func (x *writer) writeReceiptKeys(ctx context.Context, w io.Writer) error {
	keys, err := x.source.ReceiptKeys(ctx)
	if err != nil {
		return err
	}
	for _, k := range keys {
		if len(x.sinks) == 0 || x.sinks[len(x.sinks)-1] != k.Sink {
			x.sinks = append(x.sinks, k.Sink)
		}
	}
	if keys == nil {
		keys = []audit.ReceiptKey{}
	}
	return json.MarshalWrite(w, keys, json.Deterministic(true))
}

func (x *writer) writePolicies(ctx context.Context) error {
	return x.source.Policies(ctx, func(revision string, files map[string][]byte) error {
		if authz.Revision(files) != revision {
			return verify.Problemf(-1, "the text of policy %s was changed", revision)
		}
		for _, name := range slices.Sorted(maps.Keys(files)) {
			err := x.member(path.Join(policiesDir, revision, name), func(w io.Writer) error { _, err := w.Write(files[name]); return err })
			if err != nil {
				return err
			}
		}
		return nil
	})
}

func (x *writer) writeEvents(ctx context.Context, w io.Writer) error {
	var tree verify.Frontier
	for tree.Size() < x.head.Size {
		entries, err := x.source.Entries(ctx, tree.Size(), int(min(pageSize, x.head.Size-tree.Size())))
		if err != nil {
			return err
		}
		if len(entries) == 0 {
			return verify.Problemf(tree.Size(), "it is missing: the signed checkpoint covers %d events", x.head.Size)
		}
		lines, err := x.lines(ctx, entries)
		if err != nil {
			return err
		}
		if _, err := w.Write(lines); err != nil {
			return err
		}
		for _, e := range entries {
			tree.Push(tlog.RecordHash(e.Leaf))
		}
		x.progress(tree.Size(), x.head.Size)
	}
	if tree.Root() != x.head.Root {
		return verify.Problemf(-1, "the events do not match the signed root hash: run \"orgkeys audit verify\"")
	}
	return nil
}

func (x *writer) lines(ctx context.Context, entries []audit.Entry) ([]byte, error) {
	receipts := make([]map[string]string, len(entries))
	from := entries[0].Index
	for _, sink := range x.sinks {
		page, err := x.source.Receipts(ctx, sink, from, from+int64(len(entries)))
		if err != nil {
			return nil, err
		}
		for _, r := range page {
			if receipts[r.Index-from] == nil {
				receipts[r.Index-from] = map[string]string{}
			}
			receipts[r.Index-from][sink] = string(r.Receipt)
		}
	}
	var out bytes.Buffer
	for i, e := range entries {
		event, err := audit.Decode(e.Leaf)
		if err != nil {
			return nil, verify.Problemf(e.Index, "its leaf is not an event")
		}
		if err := x.lives.add(e.Index, &event); err != nil {
			return nil, verify.Problemf(e.Index, "%v", err)
		}
		if event.Policy != "" {
			x.policy = event.Policy
		}
		fmt.Fprintf(&out, `{"index":%d,"event":%s`, e.Index, e.Leaf)
		if receipts[i] != nil {
			b, err := json.Marshal(receipts[i], json.Deterministic(true))
			if err != nil {
				return nil, err
			}
			fmt.Fprintf(&out, `,"receipts":%s`, b)
		}
		out.WriteString("}\n")
	}
	return out.Bytes(), nil
}

func (x *writer) pack(w io.Writer, m Manifest) error {
	packed, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err != nil {
		return err
	}
	out := tar.NewWriter(packed)
	manifest, err := json.Marshal(m, json.Deterministic(true), jsontext.WithIndent("  "))
	if err != nil {
		return err
	}
	if err := out.WriteHeader(header(manifestName, int64(len(manifest)))); err != nil {
		return err
	}
	if _, err := out.Write(manifest); err != nil {
		return err
	}
	if _, err := x.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	for _, member := range x.members {
		if err := out.WriteHeader(header(member.Name, member.Size)); err != nil {
			return err
		}
		if _, err := io.CopyN(out, x.file, member.Size); err != nil {
			return err
		}
	}
	return errors.Join(out.Close(), packed.Close())
}

// header is the same in every export of one log.
func header(name string, size int64) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: exportMode, Format: tar.FormatPAX}
}
