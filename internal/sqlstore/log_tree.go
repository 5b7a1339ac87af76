package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/verify"
	"github.com/orgkeys/orgkeys/internal/orgkey"
)

type rowQuerier interface {
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// hashReader reads the tree's stored hashes, all that are asked for at once:
// few, along the tree's edge or a proof's path. Those that were moved come from the archive.
func (s snapshot) hashReader(ctx context.Context) tlog.HashReader {
	return tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		if len(indexes) == 0 {
			return nil, nil
		}
		var c conditions
		places := make([]string, len(indexes))
		for i, x := range indexes {
			places[i] = c.arg(x)
		}
		read, err := query(ctx, s.q, scanHash, "SELECT idx, hash FROM log_hashes WHERE idx IN ("+strings.Join(places, ", ")+")", c.args...)
		if err != nil {
			return nil, fmt.Errorf("reading the tree's hashes: %w", err)
		}
		found := make(map[int64]tlog.Hash, len(read))
		for _, h := range read {
			found[h.Index] = h.Hash
		}
		out := make([]tlog.Hash, len(indexes))
		for i, x := range indexes {
			h, ok := found[x]
			if !ok {
				if h, err = s.archivedHash(ctx, x); err != nil {
					return nil, err
				}
			}
			out[i] = h
		}
		return out, nil
	})
}

func scanHash(scan func(...any) error) (h verify.StoredHash, err error) {
	var b []byte
	if err := scan(&h.Index, &b); err != nil {
		return h, err
	}
	if len(b) != tlog.HashSize {
		return h, fmt.Errorf("the tree's hash %d has %d bytes", h.Index, len(b))
	}
	h.Hash = tlog.Hash(b)
	return h, nil
}

func readHead(ctx context.Context, q rowQuerier) (audit.Checkpoint, error) {
	var c audit.Checkpoint
	var root []byte
	if err := q.QueryRowContext(ctx, "SELECT origin, size, root FROM log_head").Scan(&c.Origin, &c.Size, &root); err != nil {
		return c, fmt.Errorf("reading the log's head: %w", unavailable(err))
	}
	if len(root) != tlog.HashSize {
		return c, fmt.Errorf("the log's root has %d bytes", len(root))
	}
	c.Root = tlog.Hash(root)
	return c, nil
}

// At implements audit.Store.
func (d *DB) At(ctx context.Context, size int64) (audit.Checkpoint, error) {
	return d.over(d.read).at(ctx, size)
}

func (s snapshot) at(ctx context.Context, size int64) (audit.Checkpoint, error) {
	head, err := readHead(ctx, s.q)
	if err != nil {
		return head, err
	}
	return s.below(ctx, head, size)
}

// below returns the checkpoint that the log had at an earlier size than head's.
func (s snapshot) below(ctx context.Context, head audit.Checkpoint, size int64) (audit.Checkpoint, error) {
	if size == head.Size {
		return head, nil
	}
	if size > head.Size {
		return head, fmt.Errorf("the log holds %d events, not %d", head.Size, size)
	}
	root, err := tlog.TreeHash(size, s.hashReader(ctx))
	return audit.Checkpoint{Origin: head.Origin, Size: size, Root: root}, err
}

// Entries implements audit.Store.
func (d *DB) Entries(ctx context.Context, index int64, limit int) ([]audit.Entry, error) {
	return d.over(d.read).entries(ctx, index, limit)
}

func (s snapshot) entries(ctx context.Context, index int64, limit int) ([]audit.Entry, error) {
	entries, err := query(ctx, s.q, func(scan func(...any) error) (e audit.Entry, err error) {
		err = scan(&e.Index, &e.Leaf)
		return e, err
	}, "SELECT idx, leaf FROM events WHERE idx >= $1 ORDER BY idx LIMIT CAST($2 AS BIGINT)", index, limit) // cast, see deliveryTo
	if err != nil {
		return nil, err
	}
	if len(entries) == 0 || entries[0].Index != index {
		a, err := s.Archived(ctx)
		if err != nil {
			return nil, err
		}
		if index < a.Moved {
			return s.archivedEntries(ctx, a, index, limit)
		}
	}
	for i, e := range entries {
		if e.Index != index+int64(i) {
			return nil, fmt.Errorf("event %d is missing from the log", index+int64(i))
		}
	}
	return entries, nil
}

// Index implements audit.Store. Only in PostgreSQL can a failover take an index
// back that was given.
func (d *DB) Index(ctx context.Context, eventID string) (int64, bool, error) {
	if !d.postgres {
		if index, known := d.writer.given.Get(eventID); known {
			return index, true, nil
		}
	}
	var idx sql.NullInt64
	err := d.read.QueryRowContext(ctx, "SELECT idx FROM events WHERE id = $1", eventID).Scan(&idx)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, false, fmt.Errorf("event %s was never recorded: %w", eventID, orgkey.ErrGone)
	}
	return idx.Int64, idx.Valid, unavailable(err)
}
