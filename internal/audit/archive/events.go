package archive

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"hash"
	"io"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/go-json-experiment/json"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
)

// batch is some lines of events. Batches are read and hashed in order, parsed
// concurrently, and processed in order. Each is used again for later lines, so that
// a long log takes no more memory than a short one.
type batch struct {
	first  int64  // the index of its first line
	raw    []byte // whole lines
	lines  int
	hashed chan struct{} // receives when raw is in the member's digest
	parsed chan struct{} // receives when the fields below are set

	text   string // raw, to which events refer
	events []parsedEvent
	err    error // of the line after the last event
	leaf   hash.Hash
}

type parsedEvent struct {
	event    audit.Event
	detail   map[string]string // for the event, now or later
	leaf     tlog.Hash
	receipts int64
}

// batchSize is how much of the events is read at once. A longer line is read too.
const batchSize = 64 << 10

func newBatch() *batch {
	return &batch{raw: make([]byte, 0, batchSize), hashed: make(chan struct{}, 1), parsed: make(chan struct{}, 1), leaf: sha256.New()}
}

// readEvents parses and checks lines on all processors, and adds them to the tree in
// order.
func (x *verifier) readEvents(ctx context.Context, in *hashing) error {
	if err := x.endPolicy(); err != nil {
		return err
	}
	if err := x.checkPoints(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	n := 2 * runtime.GOMAXPROCS(0)
	free, toHash, queue := make(chan *batch, n), make(chan *batch, n), make(chan *batch, n)
	for range n {
		free <- newBatch()
	}
	go func() {
		for b := range toHash {
			in.add(b.raw)
			b.hashed <- struct{}{}
		}
	}()
	readErr := make(chan error, 1)
	go func() {
		defer close(queue)
		defer close(toHash)
		readErr <- x.readBatches(ctx, in.r, free, toHash, queue)
	}()
	var err error
	for b := range queue {
		<-b.hashed
		if <-b.parsed; err == nil {
			if err = x.take(b); err != nil {
				cancel()
			}
		}
		free <- b
	}
	return errors.Join(err, cancelled(<-readErr, err))
}

// cancelled leaves out that the reader stopped because of err.
func cancelled(readErr, err error) error {
	if err != nil && errors.Is(readErr, context.Canceled) {
		return nil
	}
	return readErr
}

// readBatches fills batches with whole lines, and passes them on.
func (x *verifier) readBatches(ctx context.Context, in io.Reader, free <-chan *batch, toHash, queue chan<- *batch) error {
	var rest []byte // of a line whose end was not read yet
	for index := int64(0); ; {
		var b *batch
		select {
		case b = <-free:
		case <-ctx.Done():
			return ctx.Err()
		}
		b.first = index
		b.raw = append(b.raw[:0], rest...)
		err := b.fill(in)
		end := bytes.LastIndexByte(b.raw, '\n') + 1
		rest = append(rest[:0], b.raw[end:]...)
		b.raw = b.raw[:end]
		b.lines = bytes.Count(b.raw, []byte{'\n'})
		index += int64(b.lines)
		toHash <- b
		go x.parse(b)
		queue <- b
		switch {
		case errors.Is(err, io.EOF) && len(rest) == 0:
			return nil
		case err != nil:
			return wrong("%s: line %d is incomplete or too long: %v", eventsName, index+1, err)
		}
	}
}

// fill reads until a batch is full and holds a whole line. The error says why it
// ends, io.EOF where the input does.
func (b *batch) fill(in io.Reader) error {
	for {
		if len(b.raw) == cap(b.raw) {
			switch {
			case bytes.IndexByte(b.raw, '\n') >= 0:
				return nil
			case len(b.raw) >= maxLine:
				return bufio.ErrBufferFull
			}
			b.raw = append(make([]byte, 0, min(2*cap(b.raw), maxLine)), b.raw...)
		}
		n, err := in.Read(b.raw[len(b.raw):cap(b.raw)])
		b.raw = b.raw[:len(b.raw)+n]
		if err != nil {
			return err
		}
	}
}

func (x *verifier) parse(b *batch) {
	b.text, b.err = string(b.raw), nil
	b.events = b.events[:0]
	rest := b.text
	for b.err == nil && len(b.events) < b.lines {
		var line string
		line, rest, _ = strings.Cut(rest, "\n")
		n := len(b.events) // how many lines there are says nothing: they can be empty
		b.events = slices.Grow(b.events, 1)[:n+1]
		if b.err = x.parseEvent(b.first+int64(n), line, &b.events[n], b.leaf); b.err != nil {
			b.events = b.events[:n]
		}
	}
	b.parsed <- struct{}{}
}

func (x *verifier) parseEvent(index int64, line string, p *parsedEvent, h hash.Hash) error {
	leaf, receipts, ok := p.scan(index, line)
	if !ok {
		var err error
		if leaf, receipts, err = p.decode(index, line); err != nil {
			return err
		}
	}
	h.Reset()
	_, _ = h.Write([]byte{0}) // a leaf, RFC 6962, section 2.1; a hash reports no error
	_, _ = io.WriteString(h, leaf)
	h.Sum(p.leaf[:0])
	p.receipts = int64(len(receipts))
	for sink, receipt := range receipts {
		if err := x.receipts[sink].Verify([]byte(leaf), []byte(receipt)); err != nil {
			return verify.Problemf(index, "the receipt of sink %s: %v", sink, err)
		}
	}
	return nil
}

// scan reads a line as exports are written, and leaves all others to decode.
func (p *parsedEvent) scan(index int64, line string) (leaf string, receipts map[string]string, ok bool) {
	const before, between, behind = `{"index":`, `,"event":`, `,"receipts":`
	rest, ok := strings.CutPrefix(line, before)
	if !ok {
		return "", nil, false
	}
	var digits [20]byte
	number := strconv.AppendInt(digits[:0], index, 10)
	if len(rest) < len(number) || rest[:len(number)] != string(number) {
		return "", nil, false
	}
	if rest, ok = strings.CutPrefix(rest[len(number):], between); !ok {
		return "", nil, false
	}
	if p.detail == nil {
		p.detail = map[string]string{}
	}
	n, ok := audit.Scan(rest, &p.event, p.detail)
	if !ok {
		return "", nil, false
	}
	leaf, rest = rest[:n], rest[n:]
	if text, more := strings.CutPrefix(rest, behind); more {
		if receipts, n, ok = audit.ScanReceipts(text); !ok {
			return "", nil, false
		}
		rest = text[n:]
	}
	return leaf, receipts, rest == "}"
}

// decode reads any line, and says what is wrong with it.
func (p *parsedEvent) decode(index int64, line string) (leaf string, receipts map[string]string, err error) {
	var l exportLine
	if err := json.Unmarshal([]byte(line), &l, json.RejectUnknownMembers(true)); err != nil || l.Index == nil {
		return "", nil, verify.Problemf(index, "its line is not in the format of an export")
	}
	if *l.Index != index {
		return "", nil, verify.Problemf(index, "it is missing: event %d is at its position", *l.Index)
	}
	if p.event, err = audit.Decode(l.Event); err != nil {
		return "", nil, verify.Problemf(index, "its leaf is not an event")
	}
	return string(l.Event), l.Receipts, nil
}

// take adds a batch to the tree, to the lives of keys, and compares it with
// Vault's audit file.
func (x *verifier) take(b *batch) error {
	for i := range b.events {
		p := &b.events[i]
		index := x.tree.Size()
		if p.event.Policy != "" && !x.policies[p.event.Policy] {
			return verify.Problemf(index, "the text of the policy that decided, %s, is missing", p.event.Policy)
		}
		if err := x.lives.add(index, &p.event); err != nil {
			return verify.Problemf(index, "%v", err)
		}
		if err := x.deliveries.add(index, &p.event, &x.lives); err != nil {
			return verify.Problemf(index, "%v", err)
		}
		if x.vault != nil {
			if err := x.vault.match(index, p.leaf); err != nil {
				return err
			}
			x.vault.sealed.event(index, &p.event)
		}
		if p.event.Type == audit.RollbackAccepted {
			r := verify.RollbackOf(p.event.Clone(), index)
			x.report.Rollbacks = append(x.report.Rollbacks, r.Rollback)
			x.accepted = append(x.accepted, r)
		}
		x.report.Receipts += p.receipts
		x.tree.Push(p.leaf)
		if err := x.checkRoot(); err != nil {
			return err
		}
	}
	x.progress(x.tree.Size(), x.report.Manifest.Size)
	return b.err
}
