package archive

import (
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
)

// VaultFile holds the events and checkpoints that Vault has signed, as recorded in
// its audit files. Vault writes a "response" entry after it has signed; a refused
// request leaves an error and does not count. It needs memory for every event.
type VaultFile struct {
	at      map[tlog.Hash]vaultMark // the positions of events that are not matched yet
	points  map[int64][]vaultPoint  // by size
	files   []VaultSpan
	read    int64 // events, checkpoints and entries about sealed keys, of all files
	events  int64
	matched []vaultMark // the positions of the log's events, by index
	bad     []vaultProblem
	sealed  sealings
	torn    []string // incomplete lines
	behind  []string // lines with text before a complete entry
}

// VaultSpan is the time span of one audit file. Only the active node writes
// entries, so in a cluster a single file does not cover the whole span.
type VaultSpan struct {
	Name        string
	First, Last time.Time // of all its entries
	Entries     int64
}

func (s *VaultSpan) add(at time.Time) {
	if s.Entries == 0 || at.Before(s.First) {
		s.First = at
	}
	if s.Entries == 0 || at.After(s.Last) {
		s.Last = at
	}
	s.Entries++
}

// vaultMark is a position among the entries of all files, which are ordered by
// their time, not by the order in which the files are given.
type vaultMark struct {
	time int64 // of the entry, in nanoseconds
	n    int64 // as read, for what one entry holds
	file int
	line int64
}

func (m vaultMark) before(other vaultMark) bool {
	return m.time < other.time || m.time == other.time && m.n < other.n
}

type vaultPoint struct {
	audit.Checkpoint
	vaultMark
	signed bool // a signed note, which the log holds by then
}

type vaultProblem struct {
	vaultMark
	*verify.Problem
}

// VaultReport is the result of the comparison with Vault's audit file.
type VaultReport struct {
	Events int64 // that the file holds
	Newer  int64 // of them that are newer than the export and covered by no signed checkpoint yet
	Lost   []VaultLoss
	Sealed VaultSealed
	Files  []VaultSpan
	AsOf   time.Time // when the newest entry of any file was written
	Behind []string  // where text is before a complete entry: a device's prefix, or that of a program that captures its output
	Torn   []string  // where lines are incomplete, for example after a crash of Vault: their content is unknown
}

// VaultLoss describes the events that were lost in an accepted rollback.
type VaultLoss struct {
	Index       int64 // of the event that accepted it
	Events      int64
	First, Last string // their positions in Vault's audit file
}

// vaultEntry is a line of Vault's audit file, with the fields that are used here.
type vaultEntry struct {
	Time    time.Time `json:"time"`
	Type    string    `json:"type"`
	Error   string    `json:"error"`
	Request struct {
		Path string `json:"path"`
		Data struct {
			Batch []struct {
				Event string `json:"event"`
			} `json:"batch_input"`
		} `json:"data"`
	} `json:"request"`
}

const (
	receiptPath  = "orgkeys-audit/sign/receipt"
	maxVaultLine = 1 << 30 // Vault takes requests of 32 MiB, and writes 80 bytes for a short text in one
)

// Read adds an audit file of Vault, in any order. An incomplete last line, as in a
// copy of a file that Vault is writing, is ignored; others are reported.
func (f *VaultFile) Read(name string, r io.Reader) error {
	if f.at == nil {
		f.at, f.points = map[tlog.Hash]vaultMark{}, map[int64][]vaultPoint{}
	}
	f.files = append(f.files, VaultSpan{Name: name})
	span := &f.files[len(f.files)-1]
	in := bufio.NewReaderSize(r, 1<<20)
	size, jsonx := 0, false
	for line := int64(1); ; line++ {
		raw, err := wholeLine(in)
		last := errors.Is(err, io.EOF)
		if errors.Is(err, bufio.ErrBufferFull) {
			return fmt.Errorf("%s: line %d is too long for Vault's audit file: is the file compressed?", name, line)
		}
		if err != nil && !last {
			return fmt.Errorf("%s: line %d: %w", name, line, err)
		}
		size += len(raw)
		jsonx = jsonx || bytes.HasPrefix(bytes.TrimSpace(raw), []byte("<json:")) || bytes.Contains(raw, []byte("<json:object "))
		if err := f.line(raw, line, last, span); err != nil {
			return fmt.Errorf("%s: line %d cannot be read: %w", name, line, err)
		}
		switch {
		case !last:
		case span.Entries > 0 || size == 0:
			return nil
		case jsonx:
			return fmt.Errorf("%s is from a device with format=jsonx: let another audit device of Vault write format=json, its default", name)
		default:
			return fmt.Errorf("%s holds no entry of Vault's audit file, one JSON object a line: decompress it, and let an audit device of Vault write format=json, its default", name)
		}
	}
}

// wholeLine reads a line, which is long where somebody else who uses Vault listed much.
func wholeLine(in *bufio.Reader) ([]byte, error) {
	raw, err := in.ReadSlice('\n')
	if !errors.Is(err, bufio.ErrBufferFull) {
		return raw, err
	}
	long := bytes.Clone(raw)
	for errors.Is(err, bufio.ErrBufferFull) && len(long) < maxVaultLine {
		raw, err = in.ReadSlice('\n')
		long = append(long, raw...)
	}
	return long, err
}

// line reads one line. A complete entry may follow other text: after a crash Vault
// continues behind an incomplete line, and devices with a prefix, or programs that
// capture their output, put text before each entry.
func (f *VaultFile) line(raw []byte, line int64, last bool, span *VaultSpan) error {
	raw = bytes.TrimSpace(raw)
	if len(raw) == 0 {
		return nil
	}
	place := fmt.Sprintf("%s:%d", span.Name, line)
	at, when, found := findEntry(raw)
	switch {
	case found && at > 0 && raw[0] != '{':
		f.behind = append(f.behind, place)
	case found && at > 0 || !found && !last:
		f.torn = append(f.torn, place)
	}
	if !found {
		return nil
	}
	span.add(when)
	return f.entry(raw[at:], when, line)
}

// findEntry returns where the entry at the end of a line begins, and when it was
// written.
func findEntry(raw []byte) (at int, when time.Time, found bool) {
	const objects = 1000 // before it, at most: each is read to its end
	for range objects {
		if when, found = wholeEntry(raw[at:]); found {
			return at, when, true
		}
		next := bytes.Index(raw[at+1:], []byte(`{"`))
		if next < 0 {
			break
		}
		at += 1 + next
	}
	return 0, time.Time{}, false
}

// wholeEntry reports whether text is one complete entry, about any request, and when
// it was written.
func wholeEntry(text []byte) (time.Time, bool) {
	var e struct {
		Time time.Time `json:"time"`
		Type string    `json:"type"`
	}
	if text[0] != '{' {
		return time.Time{}, false
	}
	err := json.Unmarshal(text, &e, jsontext.AllowInvalidUTF8(true), jsontext.AllowDuplicateNames(true))
	return e.Time, err == nil && !e.Time.IsZero() && e.Type != ""
}

func (f *VaultFile) entry(raw []byte, when time.Time, line int64) error {
	if bytes.Contains(raw, []byte(sealedMount)) {
		f.read++
		if err := f.sealed.entry(raw, vaultMark{when.UnixNano(), f.read, len(f.files) - 1, line}); err != nil {
			return err
		}
	}
	if !bytes.Contains(raw, []byte(receiptPath)) {
		return nil
	}
	var e vaultEntry
	if err := json.Unmarshal(raw, &e); err != nil {
		return err
	}
	if e.Type != "response" || e.Error != "" || e.Request.Path != receiptPath {
		return nil
	}
	for _, item := range e.Request.Data.Batch {
		f.add(item.Event, vaultMark{e.Time.UnixNano(), f.read, len(f.files) - 1, line})
		f.read++
	}
	return nil
}

func (f *VaultFile) add(text string, mark vaultMark) {
	if !strings.HasPrefix(text, "{") {
		if c, err := audit.ParseCheckpoint(text); err == nil {
			f.points[c.Size] = append(f.points[c.Size], vaultPoint{c, mark, text != c.Text()})
		}
		return
	}
	h := tlog.RecordHash([]byte(text))
	first, known := f.at[h] // a sink may get an event more than once
	if !known {
		f.events++
	}
	if !known || mark.before(first) {
		f.at[h] = mark
	}
}

func (f *VaultFile) place(m vaultMark) string {
	return fmt.Sprintf("%s:%d", f.files[m.file].Name, m.line)
}

// match records that the log holds an event. It is called for each, in order.
func (f *VaultFile) match(index int64, leaf tlog.Hash) error {
	mark, ok := f.at[leaf]
	if !ok {
		return verify.Problemf(index, "it is missing from Vault's audit file: it was changed or inserted, or not every audit file was given")
	}
	delete(f.at, leaf)
	f.matched = append(f.matched, mark)
	return nil
}

// matchRoot compares the checkpoints that Vault has signed with the log's tree.
func (f *VaultFile) matchRoot(origin string, size int64, root func() tlog.Hash) {
	for _, p := range f.points[size] {
		if p.Origin == origin && p.Root != root() {
			f.found(p.vaultMark, size-1, "the checkpoint of that size in Vault's audit file (%s) has a different root: the log was rewritten", f.place(p.vaultMark))
		}
	}
}

func (f *VaultFile) found(m vaultMark, index int64, format string, args ...any) {
	f.bad = append(f.bad, vaultProblem{m, verify.Problemf(index, format, args...)})
}

// loss returns the positions in Vault's file of the events that were lost in an
// accepted rollback: after the last that the log kept, and before the event that
// accepts it.
type loss struct {
	after, until vaultMark
	index        int64
	events       int64
	first, last  vaultMark // of these events
}

func (l *loss) add(m vaultMark) {
	if l.events == 0 || m.before(l.first) {
		l.first = m
	}
	if l.events == 0 || l.last.before(m) {
		l.last = m
	}
	l.events++
}

// lossAt returns the loss that contains m, or nil.
func lossAt(losses []*loss, m vaultMark) *loss {
	for _, l := range losses {
		if l.after.before(m) && m.before(l.until) {
			return l
		}
	}
	return nil
}

func (f *VaultFile) losses(accepted []verify.AcceptedRollback) []*loss {
	all := make([]*loss, len(accepted))
	for i, r := range accepted {
		all[i] = &loss{until: f.matched[r.Index], index: r.Index}
		if r.Kept > 0 {
			all[i].after = f.matched[min(r.Kept, r.Index)-1]
		}
	}
	return all
}

// finish decides about events that only Vault's file holds. Those within an accepted
// rollback were lost in it. Those after the last common event are newer than the
// export, unless a signed checkpoint covers them. All others are missing from the log.
func (f *VaultFile) finish(origin string, accepted []verify.AcceptedRollback) (VaultReport, error) {
	r := VaultReport{Events: f.events, Files: f.files, Behind: f.behind, Torn: f.torn}
	for _, file := range f.files {
		if file.Last.After(r.AsOf) {
			r.AsOf = file.Last
		}
	}
	losses := f.losses(accepted)
	var newest vaultMark
	for _, m := range f.matched {
		if newest.before(m) {
			newest = m
		}
	}
	for _, m := range f.at {
		switch l := lossAt(losses, m); {
		case l != nil:
			l.add(m)
		case newest.before(m):
			r.Newer++
		default:
			f.found(m, -1, "Vault's audit file holds an event (%s) that is missing from the log: it was removed, the log was rolled back, or it belongs to another log that used this Vault before", f.place(m))
		}
	}
	f.findNewer(origin)
	f.bad = slices.DeleteFunc(f.bad, func(p vaultProblem) bool { return lossAt(losses, p.vaultMark) != nil })
	r.Sealed = f.sealed.judge(f) // after that: no rollback explains that somebody else can have a key
	for _, l := range losses {
		if l.events > 0 {
			r.Lost = append(r.Lost, VaultLoss{l.index, l.events, f.place(l.first), f.place(l.last)})
		}
	}
	if len(f.bad) == 0 {
		return r, nil
	}
	return r, slices.MinFunc(f.bad, func(a, b vaultProblem) int {
		return cmp.Or(cmp.Compare(a.time, b.time), cmp.Compare(a.n, b.n))
	}).Problem
}

// findNewer finds signed checkpoints that cover more than the export holds.
func (f *VaultFile) findNewer(origin string) {
	size := int64(len(f.matched))
	for covered, points := range f.points {
		for _, p := range points {
			if covered > size && p.signed && p.Origin == origin {
				f.found(p.vaultMark, size, "it is missing: Vault's audit file (%s) holds a signed checkpoint of %d events; the export is older, or the log was truncated: make a new export", f.place(p.vaultMark), covered)
			}
		}
	}
}

var errNoVaultEvents = errors.New("the file holds nothing that Vault signed for orgkeys: is it Vault's audit file, with one entry a line and not wrapped in another log's lines?")

// CheckNotEmpty reports an error if nothing in the files read came from orgkeys.
func (f *VaultFile) CheckNotEmpty() error {
	if f.events == 0 {
		return errNoVaultEvents
	}
	return nil
}
