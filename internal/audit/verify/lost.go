package verify

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/go-json-experiment/json"

	"github.com/orgkeys/orgkeys/internal/audit"
)

// Behind returns the events that a file sink holds after the first kept ones, in order:
// those that a log which kept these has lost.
func Behind(r io.Reader, kept int64) ([]audit.Entry, error) {
	found := map[int64]audit.Entry{}
	in := bufio.NewReaderSize(r, maxLine)
	for n := 1; ; n++ {
		raw, err := in.ReadSlice('\n')
		if errors.Is(err, io.EOF) {
			break
		}
		var l audit.Line
		if err == nil {
			err = json.Unmarshal(raw, &l)
		}
		switch {
		case err != nil:
			return nil, fmt.Errorf("line %d of the sink's copy: %w", n, err)
		case l.Rollback != nil: // what it gave up is no loss of this time
			maps.DeleteFunc(found, func(index int64, _ audit.Entry) bool { return index >= l.Rollback.Kept })
		case l.Index != nil && l.Event != nil && *l.Index >= kept:
			found[*l.Index] = audit.Entry{Index: *l.Index, Leaf: bytes.Clone(l.Event)}
		}
	}
	all := make([]audit.Entry, 0, len(found))
	for _, index := range slices.Sorted(maps.Keys(found)) {
		all = append(all, found[index])
	}
	return all, nil
}
