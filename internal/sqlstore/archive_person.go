package sqlstore

import (
	"bytes"
	"compress/flate"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/orgkeys/orgkeys/internal/audit"
	"github.com/orgkeys/orgkeys/internal/audit/tiles"
)

// personal returns the personal parts of a bundle's events; an empty one: there is none.
func (s snapshot) personal(ctx context.Context, bundle int64) ([][]byte, error) {
	found, err := query(ctx, s.q, scanBytes, "SELECT content FROM archived_persons WHERE bundle = $1", bundle)
	if err != nil || len(found) == 0 {
		return make([][]byte, tiles.Width), err
	}
	_, personal, err := unpackPersons(found[0])
	return personal, err
}

func scanBytes(scan func(...any) error) (b []byte, err error) {
	err = scan(&b)
	return bytes.Clone(b), err
}

// DeliveredTo implements verify.Past.
func (s snapshot) DeliveredTo(ctx context.Context) (map[string][]byte, error) {
	all := map[string][]byte{}
	err := each(ctx, s.q, func(scan func(...any) error) error {
		var id string
		var personal []byte
		err := scan(&id, &personal)
		all[id] = bytes.Clone(personal)
		return err
	}, "SELECT event_id, personal FROM event_persons WHERE actor <> ''")
	return all, err
}

// maxPersons bounds what a bundle's personal parts may take when they are unpacked.
const maxPersons = 2 * tiles.Width * (audit.MaxLeaf + 2)

const (
	// saltsApart begins what packPersons makes. Before, there was DEFLATE alone, which cannot
	// begin with this byte: its block type is the one that does not exist (RFC 1951, 3.2.3).
	saltsApart = 0b110

	// whole begins a personal part, as it is packed, whose salt is not apart: others begin with a quote.
	whole = 0
)

// packPersons packs the actors and the personal parts of a bundle's events: DEFLATE, and
// behind it the parts' salts, which are as long as all the rest and take a third more in it.
func packPersons(actors, personal [][]byte) ([]byte, error) {
	all, salts := slices.Clone(actors), []byte(nil)
	for _, part := range personal {
		salt, rest, ok := audit.CutSalt(part)
		if !ok && len(part) > 0 {
			rest = append([]byte{whole}, part...)
		}
		all, salts = append(all, rest), append(salts, salt...)
	}
	plain, err := tiles.Pack(all)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	b.WriteByte(saltsApart)
	w, err := flate.NewWriter(&b, flate.BestCompression)
	if err != nil {
		return nil, err
	}
	_, err = w.Write(plain)
	err = errors.Join(err, w.Close())
	return append(b.Bytes(), salts...), err
}

// unpackPersons takes apart what packPersons makes, or made before salts were apart.
func unpackPersons(content []byte) (actors, personal [][]byte, err error) {
	packed, apart := bytes.CutPrefix(content, []byte{saltsApart})
	r := bytes.NewReader(packed) // a ByteReader: DEFLATE is read to its end and no further
	plain, err := io.ReadAll(io.LimitReader(flate.NewReader(r), maxPersons+1))
	if err != nil {
		return nil, nil, fmt.Errorf("the personal parts of archived events are damaged: %w", err)
	}
	all, err := tiles.Unpack(plain, 2*tiles.Width)
	if err != nil {
		return nil, nil, fmt.Errorf("the personal parts of archived events are damaged: %w", err)
	}
	actors, personal = all[:tiles.Width], all[tiles.Width:]
	if apart && !joinSalts(personal, packed[len(packed)-r.Len():]) {
		return nil, nil, errors.New("the personal parts of archived events are damaged: they have not as many salts")
	}
	return actors, personal, nil
}

// joinSalts gives each personal part its salt again, and reports whether there are as many.
func joinSalts(personal [][]byte, salts []byte) bool {
	for i, part := range personal {
		switch {
		case len(part) == 0:
		case part[0] == whole:
			personal[i] = part[1:]
		case len(salts) < audit.SaltSize:
			return false
		default:
			personal[i] = audit.JoinSalt(salts[:audit.SaltSize], part)
			salts = salts[audit.SaltSize:]
		}
	}
	return len(salts) == 0
}

// FindArchived implements archive.Source. It reads the archive from its beginning.
func (d *DB) FindArchived(ctx context.Context, eventID string) (int64, bool, error) {
	a, err := d.Archived(ctx)
	if err != nil {
		return 0, false, err
	}
	begins := fmt.Appendf(nil, `{"v":1,"id":%q,`, eventID) // the form of every leaf
	for index := a.Removed; index < a.Moved; index += tiles.Width {
		entries, err := d.over(d.read).archivedEntries(ctx, a, index, tiles.Width)
		if err != nil {
			return 0, false, err
		}
		for _, e := range entries {
			if bytes.HasPrefix(e.Leaf, begins) {
				return e.Index, true, nil
			}
		}
	}
	return 0, false, nil
}

// packs is which bundles of archived events have a person's parts: all of them from one on
// are to be looked at again.
type packs struct {
	bundles []int64
	from    int64
}

// archivedOf looks for a person, which takes long where much is archived, outside of any
// transaction.
func (d *DB) archivedOf(ctx context.Context, id string) (p packs, err error) {
	a, err := d.Archived(ctx) // first: a pseudonym that does not exist yet is in no event before
	if err != nil {
		return p, err
	}
	p.from = a.Moved / tiles.Width
	person, err := known(ctx, d.read, id)
	if err != nil {
		return p, err
	}
	err = eachArchived(ctx, d.read, func(bundle int64, content []byte) error {
		actors, _, err := unpackPersons(content)
		if bundle < p.from && slices.ContainsFunc(actors, func(actor []byte) bool {
			return len(actor) > 0 && slices.Contains(person.all(), string(actor))
		}) {
			p.bundles = append(p.bundles, bundle)
		}
		return err
	})
	return p, err
}

// eraseArchived erases the personal parts of archived events whose actor is one of a
// person's IDs, and returns how many of each there were.
func (d *DB) eraseArchived(ctx context.Context, tx *txn, where packs, ids ...string) (map[string]int64, error) {
	a, err := d.over(tx).Archived(ctx)
	if err != nil {
		return nil, err
	}
	erased := map[string]int64{}
	for _, id := range ids {
		if id == "" {
			continue
		}
		n, err := exec(ctx, tx, "DELETE FROM event_persons WHERE actor = $1", id)
		if err != nil {
			return nil, err
		}
		erased[id] = n
	}
	later, err := query(ctx, tx, func(scan func(...any) error) (b int64, err error) { return b, scan(&b) },
		"SELECT bundle FROM archived_persons WHERE bundle >= $1 ORDER BY bundle", where.from)
	if err != nil {
		return nil, err
	}
	for _, bundle := range slices.Concat(where.bundles, later) {
		content, err := query(ctx, tx, scanBytes, "SELECT content FROM archived_persons WHERE bundle = $1", bundle)
		if err != nil {
			return nil, err
		}
		if len(content) == 0 && bundle*tiles.Width < a.Removed { // meanwhile
			continue
		}
		if len(content) == 0 {
			return nil, fmt.Errorf("the personal parts of archived events from %d on are gone", bundle*tiles.Width)
		}
		actors, personal, err := unpackPersons(content[0])
		if err != nil {
			return nil, err
		}
		some := false
		for i, actor := range actors {
			if _, its := erased[string(actor)]; its {
				erased[string(actor)]++
				actors[i], personal[i], some = nil, nil, true
			}
		}
		if !some {
			continue
		}
		packed, err := packPersons(actors, personal)
		if err == nil {
			err = one(exec(ctx, tx, "UPDATE archived_persons SET content = $2 WHERE bundle = $1", bundle, packed))
		}
		if err != nil {
			return nil, err
		}
	}
	return erased, nil
}

// personsPage is how many bundles' personal parts are read at once.
const personsPage = 64

func eachArchived(ctx context.Context, q querier, do func(bundle int64, content []byte) error) error {
	type row struct {
		bundle  int64
		content []byte
	}
	for last := int64(-1); ; {
		page, err := query(ctx, q, func(scan func(...any) error) (r row, err error) {
			err = scan(&r.bundle, &r.content)
			r.content = bytes.Clone(r.content)
			return r, err
		}, "SELECT bundle, content FROM archived_persons WHERE bundle > $1 ORDER BY bundle LIMIT $2", last, personsPage)
		if err != nil || len(page) == 0 {
			return err
		}
		for _, r := range page {
			if err := do(r.bundle, r.content); err != nil {
				return err
			}
			last = r.bundle
		}
	}
}
