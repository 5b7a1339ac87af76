package archive

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/go-json-experiment/json"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

const proofFormat = "orgkeys-proof/1"

// Proof shows that the log holds one event, without the rest of the log.
type Proof struct {
	Format     string   `json:"format"`
	Index      int64    `json:"index"`
	Event      string   `json:"event"`      // the leaf, verbatim
	Path       []string `json:"path"`       // the inclusion proof (RFC 6962, 2.1.1), base64, from the leaf up
	Checkpoint string   `json:"checkpoint"` // the signed checkpoint that it leads to
}

// Prove makes a proof of the event with that ID or index, under the newest
// signed checkpoint.
func Prove(ctx context.Context, e Source, event string) (Proof, error) {
	index, err := findEvent(ctx, e, event)
	if err != nil {
		return Proof{}, err
	}
	head, err := e.LastSigned(ctx)
	if err != nil {
		return Proof{}, err
	}
	if index >= head.Size {
		return Proof{}, fmt.Errorf("event %d: %w covers it", index, ErrNotSigned)
	}
	entries, err := e.Entries(ctx, index, 1)
	if err != nil {
		return Proof{}, err
	}
	if len(entries) == 0 {
		return Proof{}, verify.Problemf(index, "it is missing")
	}
	path, err := e.Inclusion(ctx, head.Size, index)
	if err != nil {
		return Proof{}, fmt.Errorf("proving event %d: %w", index, err)
	}
	if tlog.CheckRecord(path, head.Size, head.Root, index, tlog.RecordHash(entries[0].Leaf)) != nil {
		return Proof{}, verify.Problemf(index, "its path does not lead to the signed root: run \"orgkeys audit verify\"")
	}
	p := Proof{Format: proofFormat, Index: index, Event: string(entries[0].Leaf), Path: []string{}, Checkpoint: head.Note}
	for _, h := range path {
		p.Path = append(p.Path, base64.StdEncoding.EncodeToString(h[:]))
	}
	return p, nil
}

func findEvent(ctx context.Context, e Source, event string) (int64, error) {
	if index, err := strconv.ParseInt(event, 10, 64); err == nil && index >= 0 {
		return index, nil
	}
	index, sequenced, err := e.Index(ctx, event)
	if err != nil && errors.Is(err, orgkey.ErrGone) {
		archived, found, searchErr := e.FindArchived(ctx, event)
		if searchErr != nil || found {
			return archived, searchErr
		}
	}
	if err == nil && !sequenced {
		err = fmt.Errorf("event %s is not in the log yet", event)
	}
	return index, err
}

// VerifyProof checks a proof against verifier keys and returns what it proves.
// What is wrong is a *Problem.
func VerifyProof(text []byte, vkeys []string) (Proof, audit.Signed, error) {
	keys, err := audit.ParseKeys(vkeys...)
	if err != nil {
		return Proof{}, audit.Signed{}, err
	}
	var p Proof
	if err := json.Unmarshal(text, &p, json.RejectUnknownMembers(true)); err != nil {
		return p, audit.Signed{}, wrong("it is not a proof: %v", err)
	}
	if p.Format != proofFormat {
		return p, audit.Signed{}, wrong("its format is %q; this version of orgkeys reads %s", p.Format, proofFormat)
	}
	signed, err := keys.Open(p.Checkpoint)
	if err != nil {
		return p, audit.Signed{}, wrong("the checkpoint: %v", err)
	}
	if _, err := audit.Decode([]byte(p.Event)); err != nil {
		return p, audit.Signed{}, verify.Problemf(p.Index, "its leaf is not an event")
	}
	path := make(tlog.RecordProof, len(p.Path))
	for i, encoded := range p.Path {
		b, err := base64.StdEncoding.Strict().DecodeString(encoded)
		if err != nil || len(b) != tlog.HashSize {
			return p, audit.Signed{}, verify.Problemf(p.Index, "its path holds a value that is not a hash")
		}
		path[i] = tlog.Hash(b)
	}
	if err := tlog.CheckRecord(path, signed.Size, signed.Root, p.Index, tlog.RecordHash([]byte(p.Event))); err != nil {
		return p, audit.Signed{}, verify.Problemf(p.Index, "its path does not lead to the signed root: it was changed, or belongs to another log")
	}
	return p, signed, nil
}
