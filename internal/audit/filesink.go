package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Line is one line of a file sink: exactly one of its fields is present.
type Line struct {
	Index      *int64         `json:"index,omitempty"`
	Event      jsontext.Value `json:"event,omitempty"`
	Checkpoint string         `json:"checkpoint,omitempty"`
	Rollback   *Rollback      `json:"rollback,omitempty"`
}

// Rollback is a rollback that an operator accepted. The sink gets the whole log
// again after it; the lines before it hold events that the log may have lost.
type Rollback struct {
	From   string `json:"from"` // the checkpoint that a sink held
	To     string `json:"to"`   // the log's checkpoint when it was accepted
	Kept   int64  `json:"kept"` // how many first events of To are the same in the sink: fewer than To has if the log was rewritten
	Reason string `json:"reason"`
}

// Event is the log's event about an accepted rollback.
func (r Rollback) Event() Event {
	e := New(RollbackAccepted, "")
	e.Actor = Actor{System, "operator"}
	e.Reason = "accepted"
	e.Detail = map[string]string{"from": r.From, "to": r.To, "kept": strconv.FormatInt(r.Kept, 10), "reason": r.Reason}
	return e
}

// FileSink is a JSON-lines file, fsynced. Each event is a line
// {"index":N,"event":…} with the leaf verbatim; after each batch comes a line
// {"checkpoint":"…"}. A file that was removed or replaced is filled again
// from the beginning of the log.
type FileSink struct {
	path  string
	asked bool // and never written

	mu   sync.Mutex
	file *os.File
	end  int64      // bytes that are complete and synced
	last Checkpoint // that the file holds
}

// NewFileSink returns a sink that appends to the file at path, creating it 0600.
func NewFileSink(path string) *FileSink { return &FileSink{path: path} }

// AskFileSink returns a sink that says what the file at path holds, and neither makes, nor
// mends, nor writes it: a server may be writing to it.
func AskFileSink(path string) *FileSink { return &FileSink{path: path, asked: true} }

// Name implements Sink.
func (s *FileSink) Name() string { return "file" }

// Shared implements Sink: each replica has a file of its own.
func (s *FileSink) Shared() bool { return false }

// Last implements Sink.
func (s *FileSink) Last(context.Context) (Checkpoint, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.asked {
		return askFile(s.path)
	}
	if err := s.open(); err != nil {
		return Checkpoint{}, err
	}
	var err error
	s.last, err = lastCheckpoint(s.file, s.end)
	return s.last, err
}

// Append implements Sink: it writes and syncs the entries and the checkpoint's
// line at once.
func (s *FileSink) Append(_ context.Context, entries []Entry, c Checkpoint) ([][]byte, error) {
	last, err := json.Marshal(Line{Checkpoint: c.Text()})
	if err != nil {
		return nil, err
	}
	size := len(last) + 1
	for _, e := range entries {
		size += len(`{"index":9223372036854775807,"event":}`) + len(e.Leaf) + 1
	}
	b := make([]byte, 0, size)
	for _, e := range entries {
		b = strconv.AppendInt(append(b, `{"index":`...), e.Index, 10)
		b = append(append(append(b, `,"event":`...), e.Leaf...), "}\n"...)
	}
	return nil, s.write(append(append(b, last...), '\n'), c)
}

// KeepSigned implements Sink. The file's last checkpoint is repeated behind the
// signed one, which may be older, since the sink goes on from the last one.
func (s *FileSink) KeepSigned(_ context.Context, note string) error {
	s.mu.Lock()
	last := s.last
	s.mu.Unlock()
	if last.Size == 0 {
		return errors.New("the sink's file has no checkpoint that matches the signed one")
	}
	var b []byte
	for _, text := range []string{note, last.Text()} {
		l, err := json.Marshal(Line{Checkpoint: text})
		if err != nil {
			return err
		}
		b = append(append(b, l...), '\n')
	}
	return s.write(b, last)
}

// AcceptRollback implements Sink: it is written to the file, and the log follows
// again from its first event.
func (s *FileSink) AcceptRollback(_ context.Context, r Rollback) error {
	to, err := ParseCheckpoint(r.To)
	if err != nil {
		return err
	}
	empty, err := tlog.TreeHash(0, nil)
	if err != nil {
		return err
	}
	start := Checkpoint{Origin: to.Origin, Root: empty}
	var b []byte
	for _, l := range []Line{{Rollback: &r}, {Checkpoint: start.Text()}} {
		text, err := json.Marshal(l)
		if err != nil {
			return err
		}
		b = append(append(b, text...), '\n')
	}
	if _, err := s.Last(context.Background()); err != nil {
		return err
	}
	return s.write(b, start)
}

// write writes lines, of which the last has the checkpoint last.
func (s *FileSink) write(b []byte, last Checkpoint) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.file == nil {
		return errors.New("the sink's file is not open")
	}
	if err := s.unchanged(); err != nil {
		s.close()
		return err
	}
	if err := s.appendSynced(b); err != nil {
		// An incomplete line must be removed; if that fails, open removes it.
		err = errors.Join(err, s.file.Truncate(s.end))
		s.close()
		return err
	}
	s.end += int64(len(b))
	s.last = last
	return nil
}

func (s *FileSink) appendSynced(b []byte) error {
	if _, err := s.file.WriteAt(b, s.end); err != nil {
		return err
	}
	return s.file.Sync()
}

// unchanged reports whether path is still the open file, and no other program has
// written to it.
func (s *FileSink) unchanged() error {
	now, err := os.Stat(s.path)
	if err != nil {
		return err
	}
	then, err := s.file.Stat()
	if err != nil {
		return err
	}
	if !os.SameFile(now, then) || now.Size() != s.end {
		return fmt.Errorf("%s was changed by another program", s.path)
	}
	return nil
}

func (s *FileSink) open() error {
	s.close()
	created := false
	f, err := os.OpenFile(s.path, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		f, err = os.OpenFile(s.path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		created = true
	}
	if err != nil {
		return err
	}
	end, err := cutTornLine(f)
	if err == nil && created {
		err = syncDir(filepath.Dir(s.path))
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	s.file, s.end = f, end
	return nil
}

func (s *FileSink) close() {
	if s.file != nil {
		_ = s.file.Close() // everything in it was synced, or is not relied on
		s.file = nil
	}
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// askFile is the newest checkpoint in a file; Size 0 if there is no file.
func askFile(path string) (last Checkpoint, err error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return Checkpoint{}, nil
	}
	if err != nil {
		return Checkpoint{}, err
	}
	end, _, err := completeLines(f)
	if err == nil {
		last, err = lastCheckpoint(f, end)
	}
	return last, errors.Join(err, f.Close())
}

// cutTornLine removes what follows the last newline, a write that a crash cut
// short, and returns the file's size without it.
func cutTornLine(f *os.File) (int64, error) {
	end, size, err := completeLines(f)
	if err != nil || end == size {
		return end, err
	}
	return end, errors.Join(f.Truncate(end), f.Sync())
}

// completeLines is where the last complete line of a file ends, and the file's size.
func completeLines(f *os.File) (end, size int64, err error) {
	info, err := f.Stat()
	if err != nil {
		return 0, 0, err
	}
	tail, from, err := readTail(f, info.Size(), func(b []byte) bool { return bytes.IndexByte(b, '\n') >= 0 })
	return from + int64(bytes.LastIndexByte(tail, '\n')+1), info.Size(), err
}

var checkpointPrefix = []byte("\n" + `{"checkpoint":`)

// lastCheckpoint finds the last checkpoint line before end.
func lastCheckpoint(f io.ReaderAt, end int64) (Checkpoint, error) {
	tail, _, err := readTail(f, end, func(b []byte) bool { return bytes.Contains(b, checkpointPrefix) })
	if err != nil {
		return Checkpoint{}, err
	}
	at := bytes.LastIndex(tail, checkpointPrefix)
	if at < 0 {
		return Checkpoint{}, nil
	}
	raw, _, _ := bytes.Cut(tail[at+1:], []byte("\n"))
	var l Line
	if err := json.Unmarshal(raw, &l); err != nil {
		return Checkpoint{}, fmt.Errorf("reading the sink's last checkpoint: %w", err)
	}
	return ParseCheckpoint(l.Checkpoint)
}

// readTail reads backwards from end until enough is satisfied or the file
// begins, and returns what it read and where that starts.
func readTail(f io.ReaderAt, end int64, enough func([]byte) bool) ([]byte, int64, error) {
	for size := int64(64 << 10); ; size *= 2 {
		from := max(0, end-size)
		b := make([]byte, end-from)
		if _, err := f.ReadAt(b, from); err != nil && !errors.Is(err, io.EOF) {
			return nil, 0, err
		}
		if from == 0 || enough(b) {
			return b, from, nil
		}
	}
}
