package sqlstore

import (
	"context"
	"crypto/ed25519"
	"database/sql"
	"errors"
	"math"
	"math/bits"
	"slices"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/orgkeys/orgkeys/internal/audit"
)

var _ audit.CheckpointStore = (*DB)(nil)

// Consistency implements audit.CheckpointStore.
func (d *DB) Consistency(ctx context.Context, size, old int64) (tlog.TreeProof, error) {
	return tlog.ProveTree(size, old, d.over(d.read).hashReader(ctx))
}

// Inclusion implements archive.Source.
func (d *DB) Inclusion(ctx context.Context, size, index int64) (tlog.RecordProof, error) {
	return tlog.ProveRecord(size, index, d.over(d.read).hashReader(ctx))
}

func scanSigned(scan func(...any) error) (s audit.Signed, err error) {
	if err := scan(&s.Seq, &s.Note); err != nil {
		return s, err
	}
	s.Checkpoint, err = audit.ParseCheckpoint(s.Note)
	return s, err
}

const lastSigned = "SELECT seq, text FROM signed_checkpoints WHERE superseded = 0 ORDER BY seq DESC LIMIT 1"

// signedAfter is a page of those behind $1, up to $2.
const signedAfter = "SELECT seq, text FROM signed_checkpoints WHERE superseded = 0 AND seq > $1 AND seq <= $2 ORDER BY seq LIMIT $3"

// LastSigned implements audit.CheckpointStore.
func (d *DB) LastSigned(ctx context.Context) (audit.Signed, error) {
	found, err := query(ctx, d.read, scanSigned, lastSigned)
	if err != nil || len(found) == 0 {
		return audit.Signed{}, err
	}
	return found[0], nil
}

// SignedAfter implements audit.Store and verify.Checkpoints.
func (s snapshot) SignedAfter(ctx context.Context, seq int64) ([]audit.Signed, error) {
	return query(ctx, s.q, scanSigned, signedAfter, seq, int64(math.MaxInt64), 1000)
}

// KeepSigned implements audit.CheckpointStore.
func (d *DB) KeepSigned(ctx context.Context, s audit.Signed, vkey string) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		// A replica that was stopped between Exclusive and here may come after another.
		if err := d.lock(ctx, tx, "signed checkpoints"); err != nil {
			return err
		}
		if _, err := exec(ctx, tx, "INSERT INTO checkpoint_keys (vkey) VALUES ($1) ON CONFLICT DO NOTHING", vkey); err != nil {
			return err
		}
		last, err := query(ctx, tx, scanSigned, lastSigned)
		if err != nil || len(last) > 0 && last[0].Size > s.Size {
			return err
		}
		return one(exec(ctx, tx, "INSERT INTO signed_checkpoints (size, text) VALUES ($1, $2)", s.Size, s.Note))
	})
}

// Of the signed checkpoints the newest closeSigned stay, and of older ones fewer the older
// they are: among those that came n places ago, one for about every 2n/closeSigned, of
// each key. The newest covers what they cover; they bound how exactly a comparison finds
// where a log parted from them, and show which keys have signed.
const (
	closeSigned = 1024
	thinEvery   = 256  // new ones before they are looked through again
	thinRead    = 1000 // that are read at once
	thinMost    = 5000 // that are deleted in one call, and thinBatch in one transaction
	thinBatch   = 500
)

// ThinSigned implements audit.CheckpointStore. It deletes none without an older one of its key
// that stands for it, and so never the first that a key has signed.
func (d *DB) ThinSigned(ctx context.Context) error {
	newest, err := d.LastSigned(ctx)
	if err != nil || newest.Seq < d.thinned.Load()+thinEvery {
		return err
	}
	last := map[uint32]int64{} // by key, the newest that stays
	deleted := 0
	for seq := int64(0); ; {
		page, err := query(ctx, d.read, scanSigned, signedAfter, seq, newest.Seq-closeSigned, thinRead)
		if err != nil {
			return err
		}
		var spare []int64
		for _, s := range page {
			seq = s.Seq
			key, err := audit.SignerOf(s.Note)
			if err != nil {
				continue // nobody can say what it is worth
			}
			width := int64(1) << bits.Len64(uint64((newest.Seq-seq)/closeSigned))
			if kept, some := last[key]; some && kept >= seq-seq%width {
				spare = append(spare, seq)
				continue
			}
			last[key] = seq
		}
		for batch := range slices.Chunk(spare, thinBatch) {
			if err := d.deleteSigned(ctx, batch); err != nil {
				return err
			}
		}
		if deleted += len(spare); deleted >= thinMost {
			return nil // the next call goes on
		}
		if len(page) < thinRead {
			d.thinned.Store(newest.Seq)
			return nil
		}
	}
}

func (d *DB) deleteSigned(ctx context.Context, seqs []int64) error {
	some, err := list(seqs)
	if err != nil {
		return err
	}
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		_, err := exec(ctx, tx, "DELETE FROM signed_checkpoints WHERE superseded = 0 AND seq IN "+d.integers("$1"), some)
		return err
	})
}

// Supersede marks the signed checkpoints from place seq on as being of a log
// that was set back since.
func (d *DB) Supersede(ctx context.Context, seq int64) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		_, err := exec(ctx, tx, "UPDATE signed_checkpoints SET superseded = 1 WHERE seq >= $1", seq)
		return err
	})
}

// CheckpointKeys implements archive.Source and verify.Checkpoints.
func (s snapshot) CheckpointKeys(ctx context.Context) ([]string, error) {
	return query(ctx, s.q, func(scan func(...any) error) (vkey string, err error) {
		err = scan(&vkey)
		return vkey, err
	}, "SELECT vkey FROM checkpoint_keys ORDER BY seq")
}

// SealedCheckpointKey returns the sealed private half of a checkpoint key that
// is kept here, or nil.
func (d *DB) SealedCheckpointKey(ctx context.Context) (sealed []byte, err error) {
	err = d.read.QueryRowContext(ctx, "SELECT sealed FROM checkpoint_keys WHERE sealed IS NOT NULL ORDER BY seq LIMIT 1").Scan(&sealed)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	return sealed, unavailable(err)
}

// KeepCheckpointKey stores a checkpoint key's verifier key, with its sealed
// private half where that is kept here. One that is known stays as it is, and of
// those that replicas make at once with a sealed half one stays.
func (d *DB) KeepCheckpointKey(ctx context.Context, vkey string, sealed []byte) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		if sealed != nil {
			n, err := exec(ctx, tx, "INSERT INTO token_keys (purpose, cka_id) VALUES ('sealed checkpoint', $1) ON CONFLICT DO NOTHING", vkey)
			if err != nil || n == 0 {
				return err
			}
		}
		_, err := exec(ctx, tx, "INSERT INTO checkpoint_keys (vkey, sealed) VALUES ($1, $2) ON CONFLICT DO NOTHING", vkey, sealed)
		return err
	})
}

// SealedEventKey returns the sealed key that authenticates the events of the
// log of this origin, or nil.
func (d *DB) SealedEventKey(ctx context.Context, origin string) (sealed []byte, err error) {
	err = d.read.QueryRowContext(ctx, "SELECT sealed FROM event_keys WHERE origin = $1", origin).Scan(&sealed)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	return sealed, unavailable(err)
}

// KeepEventKey stores it, unless there is one.
func (d *DB) KeepEventKey(ctx context.Context, origin string, sealed []byte) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		_, err := exec(ctx, tx, "INSERT INTO event_keys (origin, sealed) VALUES ($1, $2) ON CONFLICT DO NOTHING", origin, sealed)
		return err
	})
}

// KeepReceiptKeys stores the public keys that a sink signs receipts with.
func (d *DB) KeepReceiptKeys(ctx context.Context, sink string, keys map[int]ed25519.PublicKey) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		for version, public := range keys {
			if _, err := exec(ctx, tx, "INSERT INTO receipt_keys (sink, version, public) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
				sink, version, []byte(public)); err != nil {
				return err
			}
		}
		return nil
	})
}

// ReceiptKeys implements archive.Source and verify.Snapshot.
func (s snapshot) ReceiptKeys(ctx context.Context) ([]audit.ReceiptKey, error) {
	return query(ctx, s.q, func(scan func(...any) error) (k audit.ReceiptKey, err error) {
		err = scan(&k.Sink, &k.Version, &k.Public)
		return k, err
	}, "SELECT sink, version, public FROM receipt_keys ORDER BY sink, version")
}

// KeepPolicy stores the files of a policy that is in force, and puts right what
// was changed in them.
func (d *DB) KeepPolicy(ctx context.Context, revision string, files map[string][]byte) error {
	return d.write(ctx, func(ctx context.Context, tx *txn) error {
		for name, content := range files {
			if _, err := exec(ctx, tx, `INSERT INTO policies (revision, name, content) VALUES ($1, $2, $3)
				ON CONFLICT (revision, name) DO UPDATE SET content = excluded.content WHERE policies.content <> excluded.content`,
				revision, name, content); err != nil {
				return err
			}
		}
		return nil
	})
}

// Policies implements archive.Source and verify.Snapshot.
func (s snapshot) Policies(ctx context.Context, do func(revision string, files map[string][]byte) error) error {
	revisions, err := query(ctx, s.q, scanText, "SELECT DISTINCT revision FROM policies ORDER BY revision")
	if err != nil {
		return err
	}
	for _, revision := range revisions {
		files := map[string][]byte{}
		_, err := query(ctx, s.q, func(scan func(...any) error) (name string, err error) {
			var content []byte
			err = scan(&name, &content)
			files[name] = content
			return name, err
		}, "SELECT name, content FROM policies WHERE revision = $1", revision)
		if err == nil {
			err = do(revision, files)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Receipts implements archive.Source and verify.Snapshot. What is moved between its two
// reads, from the database to the archive, is in both.
func (s snapshot) Receipts(ctx context.Context, sink string, from, to int64) ([]audit.Receipt, error) {
	rows, err := query(ctx, s.q, func(scan func(...any) error) (r audit.Receipt, err error) {
		err = scan(&r.Index, &r.Receipt)
		return r, err
	}, "SELECT idx, receipt FROM event_receipts WHERE sink = $1 AND idx >= $2 AND idx < $3 ORDER BY idx", sink, from, to)
	if err != nil {
		return nil, err
	}
	archived, moved, err := s.archivedReceipts(ctx, sink, from, to)
	return append(archived, slices.DeleteFunc(rows, func(r audit.Receipt) bool { return r.Index < moved })...), err
}
