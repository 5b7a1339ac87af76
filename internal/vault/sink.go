package vault

import (
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"sync"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"golang.org/x/mod/sumdb/tlog"
	"golang.org/x/sync/errgroup"

	"github.com/orgkeys/orgkeys/internal/audit"
)

// One call carries at most this many events and about this many bytes of
// them. Vault's audit device writes each call as one line, twice.
const (
	receiptBatch = 100
	receiptBytes = 256 << 10
)

// Sink has Vault's audit device record every event in clear, and keeps the
// newest checkpoint in Vault. It implements audit.Sink.
//
// Its receipts are Vault's word that the device has an event: Transit's
// signature of the leaf, as "vault:v1:" and base64 of the Ed25519 signature.
// Vault signs only after the whole request was written to the device.
type Sink struct {
	c *Client
	// Keys, if set, is told the receipt key's public halves before the first
	// receipt by one of them counts, and may refuse them.
	Keys func(context.Context, audit.ReceiptKeys) error

	mu      sync.Mutex
	keys    audit.ReceiptKeys
	version int  // of the checkpoint entry, as this sink last saw it
	seen    bool // whether that entry may be written over
}

// Sink returns the sink.
func (c *Client) Sink() *Sink { return &Sink{c: c} }

// Name implements audit.Sink.
func (s *Sink) Name() string { return "vault" }

// Shared implements audit.Sink: all replicas feed the same Vault.
func (s *Sink) Shared() bool { return true }

// Last implements audit.Sink.
func (s *Sink) Last(ctx context.Context) (audit.Checkpoint, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last(ctx)
}

func (s *Sink) last(ctx context.Context) (audit.Checkpoint, error) {
	answer, err := s.c.do(ctx, request{method: http.MethodGet, path: checkpoint})
	if err != nil && !errors.Is(err, errNotFound) {
		return audit.Checkpoint{}, fmt.Errorf("reading the checkpoint in Vault: %w", err)
	}
	entry, decodeErr := data[struct {
		Data struct {
			Checkpoint any `json:"checkpoint"`
		} `json:"data"`
		Metadata struct {
			Version int `json:"version"`
		} `json:"metadata"`
	}](answer.body)
	switch {
	case missingMount(err):
		return audit.Checkpoint{}, fmt.Errorf("reading the checkpoint in Vault: run vault/setup: %w", err)
	case decodeErr != nil && !(err != nil && errors.Is(decodeErr, errNoData)):
		return audit.Checkpoint{}, decodeErr
	}
	s.version, s.seen = entry.Metadata.Version, false
	switch {
	case err != nil && s.version == 0:
		s.seen = true
		return audit.Checkpoint{}, nil
	case err != nil:
		return audit.Checkpoint{}, fmt.Errorf("%w: version %d of %s was deleted in Vault", audit.ErrCheckpointLost, s.version, checkpoint)
	}
	text, _ := entry.Data.Checkpoint.(string)
	held, err := audit.ParseCheckpoint(text)
	if err != nil {
		return audit.Checkpoint{}, fmt.Errorf("%w: another program wrote version %d of %s in Vault: %w", audit.ErrCheckpointLost, s.version, checkpoint, err)
	}
	s.seen = true
	return held, nil
}

// missingMount tells "no such mount" from "no such entry": only the first
// comes with a message.
func missingMount(err error) bool {
	var status *statusError
	return errors.As(err, &status) && status.status == http.StatusNotFound && len(status.messages) > 0
}

// Append implements audit.Sink. The events are in Vault's audit file, in
// order, when it returns; every receipt was checked. It fails while the audit
// devices are not as Check wants them, and while Vault holds a larger checkpoint
// than c: that is another replica's, or no checkpoint of this log, which who
// calls Last can tell.
func (s *Sink) Append(ctx context.Context, entries []audit.Entry, c audit.Checkpoint) ([][]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.c.audited(ctx); err != nil {
		return nil, err
	}
	var receipts [][]byte
	var both errgroup.Group
	both.Go(func() error { return s.advance(ctx, c) })
	both.Go(func() (err error) { receipts, err = s.sign(ctx, entries); return err })
	return receipts, both.Wait()
}

// sign has Vault sign entries, in as many calls as they need.
func (s *Sink) sign(ctx context.Context, entries []audit.Entry) ([][]byte, error) {
	receipts := make([][]byte, 0, len(entries))
	for len(entries) > 0 {
		n := batchLen(entries)
		signed, err := s.acknowledge(ctx, entries[:n])
		if err != nil {
			return nil, err
		}
		receipts = append(receipts, signed...)
		entries = entries[n:]
	}
	return receipts, nil
}

// AcceptRollback implements audit.Sink.
func (s *Sink) AcceptRollback(ctx context.Context, r audit.Rollback) error {
	to, err := audit.ParseCheckpoint(r.To)
	if err != nil {
		return err
	}
	empty, err := tlog.TreeHash(0, nil)
	if err != nil {
		return fmt.Errorf("hashing the empty log: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.last(ctx); err != nil && !errors.Is(err, audit.ErrCheckpointLost) {
		return err
	}
	return s.put(ctx, audit.Checkpoint{Origin: to.Origin, Root: empty})
}

func batchLen(entries []audit.Entry) int {
	n, size := 0, 0
	for n < len(entries) && n < receiptBatch && (n == 0 || size+len(entries[n].Leaf) <= receiptBytes) {
		size += len(entries[n].Leaf)
		n++
	}
	return n
}

// acknowledge has Vault sign each entry. "event" is the field that the mount
// is tuned to audit in clear; it must be one flat string, since Vault goes by
// the innermost name. "input" is what Transit signs.
func (s *Sink) acknowledge(ctx context.Context, entries []audit.Entry) ([][]byte, error) {
	body, err := signBody(entries)
	if err != nil {
		return nil, err
	}
	answer, err := s.c.do(ctx, request{method: http.MethodPut, path: auditMount + "/sign/receipt", body: body})
	if err != nil {
		return nil, fmt.Errorf("having Vault sign %d events from %d: %w", len(entries), entries[0].Index, err)
	}
	signed, err := data[struct {
		Results []struct {
			Signature string `json:"signature"`
			Error     string `json:"error"`
		} `json:"batch_results"`
	}](answer.body)
	if err != nil {
		return nil, err
	}
	if len(signed.Results) != len(entries) {
		return nil, fmt.Errorf("having Vault sign events: it answered %d events with %d signatures", len(entries), len(signed.Results))
	}
	receipts := make([][]byte, len(entries))
	for i, r := range signed.Results {
		receipts[i] = []byte(r.Signature)
		if r.Error != "" {
			return nil, fmt.Errorf("having Vault sign event %d: %s", entries[i].Index, r.Error)
		}
		if err := s.verify(ctx, entries[i].Leaf, receipts[i]); err != nil {
			return nil, fmt.Errorf("checking the receipt of event %d: %w", entries[i].Index, err)
		}
	}
	return receipts, nil
}

func signBody(entries []audit.Entry) ([]byte, error) {
	body := []byte(`{"batch_input":[`)
	for i, e := range entries {
		if i > 0 {
			body = append(body, ',')
		}
		body = append(body, `{"event":`...)
		var err error
		if body, err = jsontext.AppendQuote(body, e.Leaf); err != nil {
			return nil, fmt.Errorf("encoding event %d: %w", e.Index, err)
		}
		body = append(body, `,"input":"`...)
		body = base64.StdEncoding.AppendEncode(body, e.Leaf)
		body = append(body, `"}`...)
	}
	return append(body, `]}`...), nil
}

// verify checks a receipt against the keys known, and asks for them once more
// when its version is a new one.
func (s *Sink) verify(ctx context.Context, leaf, receipt []byte) error {
	version, _, err := audit.ParseReceipt(receipt)
	if err != nil {
		return err
	}
	if s.keys[version] == nil {
		keys, err := s.c.ReceiptKeys(ctx)
		if err == nil && s.Keys != nil {
			err = s.Keys(ctx, keys)
		}
		if err != nil {
			return err
		}
		s.keys = keys
	}
	return s.keys.Verify(leaf, receipt)
}

// advance replaces the version of the checkpoint that was last read, unless another
// process has written one that c does not extend.
func (s *Sink) advance(ctx context.Context, c audit.Checkpoint) error {
	var refusal error
	refused := -1 // the version over which Vault refused to write
	for {
		if !s.seen {
			held, err := s.last(ctx)
			if err != nil || held == c {
				return err
			}
			if s.version == refused {
				return refusal // not a concurrent write: Vault refuses for another reason
			}
			if err := follows(c, held); err != nil {
				s.seen = false
				return err
			}
		}
		err := s.put(ctx, c)
		if err == nil || !badRequest(err) {
			return err
		}
		refused, refusal, s.seen = s.version, err, false
	}
}

// follows reports an error unless c can come after held.
func follows(c, held audit.Checkpoint) error {
	switch {
	case held.Size > 0 && held.Origin != c.Origin || held.Size == c.Size && held.Root != c.Root:
		return fmt.Errorf("the checkpoint in Vault, at size %d, belongs to another log", held.Size)
	case held.Size > c.Size:
		return fmt.Errorf("the checkpoint in Vault, at size %d, is ahead of size %d", held.Size, c.Size)
	}
	return nil
}

func (s *Sink) put(ctx context.Context, c audit.Checkpoint) error {
	body, err := json.Marshal(map[string]any{
		"options": map[string]int{"cas": s.version},
		"data":    map[string]string{"checkpoint": c.Text()},
	})
	if err != nil {
		return fmt.Errorf("encoding the checkpoint: %w", err)
	}
	answer, err := s.c.do(ctx, request{method: http.MethodPut, path: checkpoint, body: body})
	if err != nil {
		return fmt.Errorf("writing the checkpoint to Vault: %w", err)
	}
	written, err := data[struct {
		Version int `json:"version"`
	}](answer.body)
	if err != nil {
		return err
	}
	s.version, s.seen = written.Version, true
	return nil
}

// ReceiptKeys reads the receipt key's public halves. Kept outside Vault, they
// let receipts be verified offline.
func (c *Client) ReceiptKeys(ctx context.Context) (audit.ReceiptKeys, error) {
	answer, err := c.do(ctx, request{method: http.MethodGet, path: receiptKey})
	if err != nil {
		return nil, fmt.Errorf("reading the receipt key: %w", err)
	}
	k, err := data[struct {
		Keys map[string]struct {
			PublicKey []byte `json:"public_key"` // base64 in JSON
		} `json:"keys"`
	}](answer.body)
	if err != nil {
		return nil, err
	}
	keys := make(audit.ReceiptKeys, len(k.Keys))
	for text, key := range k.Keys {
		version, err := strconv.Atoi(text)
		if err != nil || len(key.PublicKey) != ed25519.PublicKeySize {
			return nil, fmt.Errorf("reading the receipt key: version %q is not an Ed25519 key", text)
		}
		keys[version] = key.PublicKey
	}
	return keys, nil
}
