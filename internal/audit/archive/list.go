package archive

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/org"
)

// Listed is a log whose events can be listed.
type Listed interface {
	Entries(ctx context.Context, index int64, limit int) ([]audit.Entry, error)
	Archived(ctx context.Context) (audit.Archived, error)
}

// List prints the events from an index on, of one organization or of all, as JSON lines: each
// leaf verbatim, with its index in front. Those that were removed are left out.
func List(ctx context.Context, w io.Writer, log Listed, from int64, of org.ID) error {
	if past, err := log.Archived(ctx); err == nil && from < past.Removed {
		from = past.Removed
	}
	out := bufio.NewWriter(w)
	for {
		entries, err := log.Entries(ctx, from, 1000)
		if err != nil || len(entries) == 0 {
			return errors.Join(err, out.Flush())
		}
		for _, e := range entries {
			event, err := audit.Decode(e.Leaf)
			if err != nil {
				return fmt.Errorf("event %d: %w", e.Index, err)
			}
			if of == "" || event.Org == of {
				fmt.Fprintf(out, `{"index":%d,"event":%s}`+"\n", e.Index, e.Leaf)
			}
		}
		from += int64(len(entries))
	}
}
